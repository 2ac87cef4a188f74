"""Snapshots become records: against the whole run, from every kind of file, and what does not fit is said."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lplr_jax import theory
from lplr_jax.measurement.probe import save_params
from lplr_jax.runs.problem import Probes, Problem
from lplr_jax.runs.snapshots import measure, step_of
from lplr_jax.runs.watch import watch

FEW = Probes(search=0, hessian=0)


@pytest.fixture(scope="module")
def run():
    """A small network under gradient descent: the problem, its points by step, and the record of every step."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(6, 4)).astype(np.float32), rng.normal(size=(6, 1)).astype(np.float32)
    params = {
        "a": jnp.asarray(rng.normal(size=(4, 8)) / 2, jnp.float32),
        "b": {"kernel": jnp.asarray(rng.normal(size=(8, 1)) / 3, jnp.float32)},
    }
    problem = Problem(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"]["kernel"], params, x, y, name="net")
    points, theta = {}, problem.params
    gradient = jax.jit(jax.grad(problem.objective.value))
    with watch(problem, probes=Probes(every=4, search=0, hessian=0)) as look:
        for t in range(9):
            points[t] = theta
            look(t, theta)
            theta = jax.tree.map(lambda p, g: p - np.float32(0.1) * g, theta, gradient(theta, x, y))
    return problem, points, look.record


def test_snapshots_agree_with_the_whole_run(run):
    problem, points, whole = run
    few = measure(problem, {t: points[t] for t in (0, 4, 8)}, probes=FEW)
    assert few["epoch"].tolist() == few["probe_epoch"].tolist() == [0, 4, 8]
    for name in ("ntk_min_eig", "ntk_rayleigh", "probe_loss", "ntk_shift", "ntk_pair_shift", "param_pair_distance"):
        np.testing.assert_array_equal(few[name], whole[name])
    there, here = ({v.claim: v for v in theory.verify(record)} for record in (whole, few))
    # What rests on probes alone comes out the same.
    for claim in ("ntk_positive", "ntk_lipschitz", "compatibility", "weyl"):
        assert here[claim].outcome == there[claim].outcome
    assert here["linear_rate"].outcome in ("undecided", "not applicable")
    assert "not seen" in here["linear_rate"].note or here["compatibility"].outcome == "refuted"
    assert not theory.any_inconsistent(here.values())


def test_neighbours_tell_the_update(run):
    problem, points, _ = run
    record = measure(problem, {t: points[t] for t in (0, 4, 5)}, probes=FEW)
    known = np.isfinite(record["step_size"])
    assert record["epoch"][known].tolist() == [4]
    assert record["step_size"][known] == pytest.approx(0.1, rel=1e-4)


def test_files_of_every_kind(run, tmp_path):
    problem, points, _ = run
    expected = measure(problem, {t: points[t] for t in (0, 4, 8)}, probes=FEW)
    for t in (0, 4, 8):
        save_params(points[t], tmp_path / "npz" / f"epoch_{t:06d}.npz")
        nested = {"state": {"params": points[t]}, "step": np.int64(t)}
        save_params(nested, tmp_path / "nested" / f"ckpt-{t}.npz")
    for places, key in (
        (tmp_path / "npz", None),
        (str(tmp_path / "npz" / "*"), None),
        ([tmp_path / "npz" / f"epoch_{t:06d}.npz" for t in (8, 0, 4)], None),
        (tmp_path / "nested", "state.params"),
    ):
        record = measure(problem, places, key=key, probes=FEW)
        assert record["epoch"].tolist() == [0, 4, 8]
        np.testing.assert_array_equal(record["ntk_min_eig"], expected["ntk_min_eig"])


def test_what_is_carried_along_need_not_be_in_a_file(tmp_path):
    """Functions are in no file; a counter that is there is not what the network is measured with."""
    x, y = np.eye(3, dtype=np.float32), np.ones((3, 1), np.float32)
    params = {"w": jnp.ones((3, 1)), "steps": 0, "act": jnp.tanh}
    problem = Problem(lambda p, x: p["act"](x @ p["w"]), params, x, y)
    for step in (0, 4):
        np.savez(tmp_path / f"at-{step}.npz", w=np.ones((3, 1), np.float32) * (1 - step / 10), steps=np.int64(step))
    record = measure(problem, tmp_path, probes=FEW)
    expected = [(np.tanh(1 - step / 10) - 1) ** 2 / 2 for step in (0, 4)]
    np.testing.assert_allclose(record["loss"], expected, rtol=1e-5)
    assert float(record["p"]) == 3


def test_orbax_folders(run, tmp_path):
    ocp = pytest.importorskip("orbax.checkpoint")
    problem, points, _ = run
    for t in (0, 10):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(tmp_path / "ckpts" / str(t), {"params": points[t // 2]})
    record = measure(problem, tmp_path / "ckpts", key="params", probes=FEW)
    assert record["epoch"].tolist() == [0, 10]
    np.testing.assert_array_equal(
        record["ntk_min_eig"][1:], measure(problem, {5: points[5]}, probes=FEW)["ntk_min_eig"][1:]
    )


def test_names_are_sorted_as_numbers(run, tmp_path):
    problem, points, _ = run
    for t in (2, 10):
        save_params(points[min(t, 8)], tmp_path / f"s{t}.npz")
    assert measure(problem, tmp_path, probes=FEW)["epoch"].tolist() == [0, 2, 10]
    assert step_of(tmp_path / "run2-step_000120") == 120


def test_what_does_not_fit_is_said(run, tmp_path):
    problem, points, _ = run
    with pytest.raises(ValueError, match="no snapshot is named"):
        measure(problem, tmp_path / "none-*")
    (tmp_path / "5.pkl").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(ValueError, match="would be run"):
        measure(problem, [tmp_path / "5.pkl"], probes=FEW)
    np.savez(tmp_path / "6.npz", a=np.array([{"an": "object"}], dtype=object))
    with pytest.raises(ValueError, match="pickled objects are not read"):
        measure(problem, [tmp_path / "6.npz"], probes=FEW)
    save_params({"a": points[0]["a"]}, tmp_path / "7.npz")
    with pytest.raises(ValueError, match=r"lacks 'b.kernel'.*it holds a"):
        measure(problem, [tmp_path / "7.npz"], probes=FEW)
    save_params({"a": points[0]["a"][:2], "b": points[0]["b"]}, tmp_path / "8.npz")
    with pytest.raises(ValueError, match=r"a is float32 of shape \(2, 8\) where the problem has float32 of \(4, 8\)"):
        measure(problem, [tmp_path / "8.npz"], probes=FEW)
    with pytest.raises(ValueError, match="no integer in its name"):
        measure(problem, [tmp_path / "last.npz"], probes=FEW)
    with pytest.raises(ValueError, match="both of step 7"):
        measure(problem, [tmp_path / "7.npz", tmp_path / "x7.npz"], probes=FEW)
    with pytest.raises(ValueError, match="holds nothing under 'ema'"):
        measure(problem, [tmp_path / "7.npz"], key="ema", probes=FEW)


def test_snapshots_of_another_method_say_so(run):
    """Adam's first step is along the sign of the gradient, which two neighbouring snapshots show."""
    problem, _, _ = run
    optimizer = optax.adam(0.01)
    gradient = jax.grad(problem.objective.value)(problem.params, *problem.data)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update(gradient, optimizer.init(problem.params), problem.params)
    after = optax.apply_updates(problem.params, updates)
    record = measure(problem, {0: problem.params, 1: after}, probes=FEW)
    assert record["step_deviation"][0] > 0.1
    verdict = next(v for v in theory.verify(record) if v.claim == "linear_rate")
    assert verdict.outcome == "not applicable"
    assert "not along" in verdict.note
