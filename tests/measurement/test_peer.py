"""The second opinion on the kernel: what it measures, when it keeps silent, and the claim that holds it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lplr_jax import theory
from lplr_jax.losses import Objective, Squared
from lplr_jax.measurement import closing, peer
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk, engine, neural_tangents
from lplr_jax.records import Record
from lplr_jax.theory.claims.example import linear_regression

N, D, C = 6, 4, 2
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((N, D)).astype(np.float32), RNG.standard_normal((N, C)).astype(np.float32)
MODEL = MLP(5, 3, "softplus", C)
START = MODEL.init(jax.random.key(0), X)
POINTS = {step: jax.tree.map(lambda a, k=step: a * np.float32(1 + k / 100), START) for step in (0, 3, 8)}


def probed(apply_fn=MODEL.apply, points=None, *, subset=None, kernel="auto", between=lambda probe: probe):
    """Arrays of a run through given points, closed by what `between` makes of the probe."""
    points = POINTS if points is None else points
    probe = KernelProbe(Objective(apply_fn, Squared("mean")), X, Y, subset=subset, kernel=kernel)
    rows = [probe(params, step) for step, params in points.items()]
    arrays = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    arrays["probe_epoch"] = np.array(list(points))
    arrays["drift"] = closing.pair_distances([points[0], *points.values()])[0, 1:]
    return {**arrays, **between(probe).close(arrays, search_steps=0, seed=0)}


def test_both_implementations_agree_at_the_first_and_the_last_probe():
    found = probed(subset=np.array([4, 1, 2]))["ntk_peer_difference"]
    assert np.isnan(found[1])
    # Two sums of 62 products in float64.
    assert (found[[0, 2]] < 1e-13).all()
    assert probed(points={0: START})["ntk_peer_difference"].shape == (1,)


def test_what_is_measured_is_the_largest_entry_of_the_subset(monkeypatch):
    """A peer that is off in one entry, against the dense kernel of the subset alone."""
    right, subset = neural_tangents.kernel, np.array([1, 4])

    def off(*args, **settings):
        theta = np.array(right(*args, **settings))
        theta[0, 3] += 0.5
        theta[3, 0] += 0.5
        return jnp.asarray(theta)

    monkeypatch.setattr(neural_tangents, "kernel", off)
    found = probed(subset=subset)["ntk_peer_difference"]
    for place, step in ((0, 0), (2, 8)):
        largest = np.abs(np.asarray(empirical_ntk(MODEL.apply, POINTS[step], X[subset]))).max()
        assert found[place] == pytest.approx(0.5 / largest, rel=1e-12)


def test_the_peer_of_neural_tangents_is_the_engine(monkeypatch):
    asked, right = [], engine.evaluate
    monkeypatch.setattr(engine, "evaluate", lambda *args, **settings: asked.append(1) or right(*args, **settings))
    found = probed(kernel="neural-tangents:jacobian")
    assert len(asked) == 2
    assert np.nanmax(found["ntk_peer_difference"]) < 1e-13


def narrowing(params, x):
    """Rounds inside to float32, whatever the type of its arguments."""
    outputs = MODEL.apply(jax.tree.map(lambda a: a.astype(jnp.float32), params), x.astype(jnp.float32))
    return outputs.astype(x.dtype)


@pytest.mark.parametrize("why", ["absent", "refuses", "is not finite", "narrow"])
def test_without_a_peer_there_is_no_opinion_and_no_warning(why, monkeypatch, caplog):
    def kernel(*args, **settings):
        if why == "is not finite":
            return jnp.full((N * C, N * C), jnp.nan)
        raise ImportError("not installed") if why == "absent" else NotImplementedError("cannot treat\nscan")

    if why != "narrow":
        monkeypatch.setattr(neural_tangents, "kernel", kernel)
    caplog.set_level(logging.INFO, "lplr_jax")
    if why == "narrow":
        with pytest.warns(UserWarning, match="rounds to a unit"):  # of the run's own kernel
            found = probed(narrowing)
    else:
        found = probed()
    assert "ntk_peer_difference" not in found
    said = [record for record in caplog.records if "second opinion" in record.getMessage()]
    assert len(said) == 1
    assert said[0].levelno == logging.INFO
    assert "\n" not in said[0].getMessage()


def test_no_other_array_knows_of_the_peer(monkeypatch):
    with_peer = probed(subset=np.array([0, 5]))
    monkeypatch.setattr(peer, "at_point", lambda *args, **settings: 1 / 0)
    without = probed(subset=np.array([0, 5]))
    assert set(with_peer) - set(without) == {"ntk_peer_difference"}
    for name, array in without.items():
        np.testing.assert_array_equal(array, with_peer[name], err_msg=name)


def test_a_resumed_probe_has_the_same_opinion():
    def recalled(probe):
        other = KernelProbe(Objective(MODEL.apply, Squared("mean")), X, Y, subset=None, kernel="auto")
        for step in POINTS:
            other.recall(step, probe.remembered(step), START)
        return other

    np.testing.assert_array_equal(
        probed()["ntk_peer_difference"], probed(between=recalled)["ntk_peer_difference"], strict=True
    )


@pytest.mark.parametrize(("n", "outputs", "subset", "size"), [(500, 1, None, 200), (500, 5, None, 40), (9, 300, 5, 1)])
def test_the_samples_are_few_distinct_and_the_same_each_time(n, outputs, subset, size):
    among = np.arange(n) if subset is None else np.arange(n)[-subset:]
    given = None if subset is None else among
    found = peer.peer_samples(n, outputs, given, 3)
    assert found.size == size == np.unique(found).size
    assert np.isin(found, among).all()
    np.testing.assert_array_equal(found, peer.peer_samples(n, outputs, given, 3))
    np.testing.assert_array_equal(peer.peer_samples(n, 1, np.array([7, 2]), 3), [2, 7])


def judged(difference, p=None):
    record = linear_regression()
    changes = {"ntk_peer_difference": np.asarray(difference, np.float64)}
    changes |= {} if p is None else {"p": np.asarray(p)}
    return theory.verify(Record("peer", {**record.arrays, **changes}, {}))[0]


def test_consistency_holds_the_difference_to_the_rounding_of_both():
    probes = linear_regression()["probe_epoch"].size
    gap = np.full(probes, np.nan)
    assert "consistency.peer" not in [part.claim for part in judged(gap).parts]
    for p, bound in ((None, 1e-9), (10**8, 2 * (10**8 + 8e4) * 2.0**-53)):  # γ_k of k = p + 8 √p, twice
        gap[[0, -1]] = bound * 0.999, 0
        assert judged(gap, p).part("peer").outcome == "proved"
        gap[[0, -1]] = 0, bound * 1.001
        found = judged(gap, p)
        assert found.part("peer").outcome == "refuted"
        assert found.part("peer").step == linear_regression()["probe_epoch"][-1]
        assert found.inconsistent
    gap[0] = np.inf
    assert judged(gap).inconsistent
