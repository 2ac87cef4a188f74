"""The chain from a gradient to a loss that is not squared: sharp ends, known rates, planted faults."""

import itertools
import math

import numpy as np
import pytest
from controls import replaced, tampered
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax import theory
from lplr_jax.records import Record
from lplr_jax.theory.claims.example import logistic_regression
from lplr_jax.theory.claims.loss_bridge import chain_of
from lplr_jax.theory.evidence import GROWTH, Evidence


def bridge(record):
    return Evidence(record).verdict("loss_bridge")


def diagonal(slope, value, *, name, theta, eta=0.1, steps=40, probes=(0, 20, 40), floor=0.0, c=1):
    """Gradient descent on the mean of value(θ_i): every sample has a parameter of its own, so Θ is the identity."""
    theta, n = np.asarray(theta, float), len(theta) // c
    points = [theta]
    for _ in range(steps):
        points.append(points[-1] - eta * slope(points[-1]) / n)
    points = np.array(points)
    g, losses = np.array([slope(p) for p in points]), np.array([value(p) for p in points])
    at, square = np.array(probes), (g**2).sum(axis=1)
    unknown = np.where(np.arange(steps + 1) < steps, 1.0, np.nan)
    rows = n * c
    arrays = {
        "epoch": np.arange(steps + 1),
        "loss": losses.sum(axis=1) / n,
        "grad_sq_norm": square / n**2,
        "drift": np.linalg.norm(points - theta, axis=1),
        "step_size": eta * unknown,
        "step_deviation": 0 * unknown,
        "step_rounding": 1e-12 * unknown,
        "seen": np.ones(steps + 1, int),
        "probe_epoch": at,
        "probe_loss": losses.sum(axis=1)[at] / n,
        "probe_grad_sq_norm": square[at] / n**2,
        "output_grad_norm": np.sqrt(square)[at],
        "output_norm": np.linalg.norm(points, axis=1)[at],
        "samples_beyond": (losses > np.log(2)).sum(axis=1)[at].astype(float),
        "sample_bound_sum": square[at],
        **{f"ntk_{k}": np.ones(at.size) for k in ("min_eig", "max_eig", "rayleigh")},
        **{f"ntk_min_eig_{end}": 1 + sign * np.full(at.size, 1e-12) for end, sign in (("lower", -1), ("upper", 1))},
        "ntk_assembly_error": np.full(at.size, 1e-12),
        "ntk_shift": np.zeros(at.size),
        "affine_in_parameters": 1,
        "parameter_eps": 2.0**-52,
        "parameter_spacing": 0.0,
        "loss_scale": float(n),
        "learning_rate": eta,
        "n": n,
        "c": c,
        "p": rows,
    }
    if floor:
        arrays["loss_infimum"] = floor
    return Record("bridge", {key: np.asarray(array) for key, array in arrays.items()}, {}, loss=name)


def logistic(theta, **settings):
    return diagonal(
        lambda f: -1 / (1 + np.exp(f)), lambda f: np.log1p(np.exp(-f)), name="logistic", theta=theta, **settings
    )


def test_equal_samples_make_every_link_an_equality():
    """n equal samples and Θ the identity: ρ = λ, ‖g‖² = Σψ and Jensen's inequality is an equality."""
    found = bridge(logistic([1.0] * 5))
    assert found.outcome == "not refuted", found
    chain = chain_of(Evidence(logistic([1.0] * 5)))
    np.testing.assert_allclose(chain.gradient / chain.eigenvalue, 1, rtol=1e-12)
    np.testing.assert_allclose(chain.square / chain.bound, 1, rtol=1e-12)
    assert found.measured == pytest.approx(1, rel=1e-12)


def test_separable_logistic_regression_falls_as_one_over_t():
    """One sample under small steps: dθ/dt = 1/(1 + e^θ), so θ + e^θ = t + 1 from θ = 0, and L is about 1/t."""
    record = logistic([0.0], eta=0.01, steps=40_000, probes=(0, 4000, 20_000, 40_000))
    found = bridge(record)
    envelope, path = found.part("envelope"), found.part("length")
    t = 0.01 * 40_000
    theta = math.log(t + 1 - math.log(t))  # one step of Newton's method on θ + e^θ = t + 1
    assert envelope.measured == pytest.approx(math.log1p(math.exp(-theta)), rel=5e-3)
    # The bound itself, by hand: v_0 = 1, and a_t is 1 - η/2 ψ'' ... >= 1 - η / 8.
    tau = 0.01 * 40_000
    assert envelope.bound == pytest.approx(math.log1p(1 / (1 + tau / 2)), rel=2e-3)
    assert envelope.outcome == "not refuted"
    # v falls as 2/t in the bound and as 1/t on the run: the factor v_0 = 1 is lost.
    assert envelope.margin == pytest.approx(2, rel=0.05)
    # Of one sample ‖∇L‖ = (1 - e^-L) is what the bound integrates: an equality but for a_t.
    assert path.measured == pytest.approx(path.bound, rel=3e-3)
    assert path.measured <= path.bound
    assert found.part("exponent").measured == pytest.approx(2, abs=0.1)
    assert "1/t" in found.part("exponent").note


def test_what_does_not_separate_converges_linearly_and_says_so():
    """Two samples of one parameter and unlike labels: L >= ln 2, of exponent 1 above it; k never goes to 0."""
    theta, points = 2.0, []
    for _ in range(41):
        points.append(theta)
        theta -= 0.4 * np.tanh(theta / 2) / 2
    points = np.array(points)
    f = np.stack([points, -points], axis=1)
    losses, g = np.log1p(np.exp(-f)), np.stack([-1 / (1 + np.exp(points)), 1 / (1 + np.exp(-points))], axis=1)
    at = np.array([0, 20, 40])
    record = tampered(
        logistic([1.0, 1.0]),
        loss=lambda _: losses.mean(axis=1),
        grad_sq_norm=lambda _: (g.sum(axis=1) / 2) ** 2,
        drift=lambda _: np.abs(points - 2),
        step_size=lambda old: 0.4 + 0 * old,
        learning_rate=lambda _: np.asarray(0.4),
        probe_loss=lambda _: losses.mean(axis=1)[at],
        probe_grad_sq_norm=lambda _: ((g.sum(axis=1) / 2) ** 2)[at],
        output_grad_norm=lambda _: np.linalg.norm(g, axis=1)[at],
        sample_bound_sum=lambda _: (g**2).sum(axis=1)[at],
        samples_beyond=lambda _: (losses > np.log(2)).sum(axis=1)[at].astype(float),
        **{name: lambda _: np.zeros(3) for name in ("ntk_min_eig", "ntk_min_eig_lower")},
        ntk_max_eig=lambda _: np.full(3, 2.0),
        ntk_rayleigh=lambda _: (g.sum(axis=1) ** 2 / (g**2).sum(axis=1))[at],
    )
    found = bridge(record)
    assert found.outcome == "undecided"
    assert found.part("chain").outcome == "not refuted"
    assert found.part("eigenvalue").outcome == "undecided"
    assert "k = 1 samples lie beyond ln 2" in found.part("envelope").note
    gap = losses.mean(axis=1) - np.log(2)
    assert np.all(np.diff(np.log(gap[5:35])) < -0.05), "the control is linear"


@given(seed=st.integers(0, 10**6), n=st.integers(1, 6), spread=st.floats(0.1, 6))
def test_the_chain_holds_for_any_margins(seed, n, spread):
    """k samples beyond ln 2 or none: the bound never exceeds Σψ, and is attained where all others are at 0 loss."""
    margins = np.random.default_rng(seed).normal(scale=spread, size=n)
    record = logistic(margins)
    found = bridge(record)
    assert found.part("chain").outcome == "not refuted", found
    chain = chain_of(Evidence(record))
    assert np.all(chain.bound <= chain.samples * (1 + 1e-12))


def test_the_line_of_samples_beyond_is_sharp():
    """One sample just beyond ln 2 and the others learnt: Σψ is a quarter, and Jensen's inequality would fail."""
    record = logistic([-1e-9, 60.0, 60.0, 60.0], steps=2, eta=1e-12, probes=(0, 1, 2))
    chain = chain_of(Evidence(record))
    np.testing.assert_allclose(chain.samples / chain.bound, 1, rtol=1e-6)
    # Plain Jensen where k > 0: 10 samples far beyond and one learnt.
    far = logistic([-30.0, 60.0], steps=2, eta=1e-12, probes=(0, 1, 2))
    total = 2 * float(far["loss"][0])
    assert 2 * np.expm1(-total / 2) ** 2 > float(far["sample_bound_sum"][0]), "plain Jensen is false here"
    assert bridge(far).part("chain").outcome == "not refuted"


def softmax(theta, *, smoothing=0.0, eta=0.1, steps=40, probes=(0, 20, 40)):
    """Samples of three classes, the first theirs, each output a parameter."""
    c = 3
    tau = np.array([1.0, 0.0, 0.0]) * (1 - smoothing) + smoothing / c

    def p(f):
        e = np.exp(f.reshape(-1, c))
        return e / e.sum(axis=1, keepdims=True)

    name = f"softmax_cross_entropy({smoothing})" if smoothing else "softmax_cross_entropy"
    entropy = -float((tau[tau > 0] * np.log(tau[tau > 0])).sum())
    record = diagonal(
        lambda f: (p(f) - tau).reshape(-1), lambda f: -(tau * np.log(p(f))).sum(axis=1), name=name, theta=theta, c=c,
        eta=eta, steps=steps, probes=probes, floor=entropy,
    )  # fmt: skip
    points, at = [np.asarray(theta, float)], np.array(probes)
    for _ in range(steps):
        points.append(points[-1] - eta * (p(points[-1]) - tau).reshape(-1) / (len(theta) // c))
    shares = np.array([p(points[t]) for t in at])
    excess = -(tau * np.log(shares)).sum(axis=2) - entropy
    bound = 3 / 2 * np.expm1(-excess) ** 2
    arrays = {f"ntk_class_min_eig{end}": np.ones(at.size) for end in ("", "_lower", "_upper")}
    if smoothing:
        least = np.minimum(shares, tau).min(axis=2)
        bound, arrays["sample_least_share"] = 2 * least * excess, least.min(axis=1)
    arrays["sample_bound_sum"] = bound.sum(axis=1)
    return Record("bridge", {**record.arrays, **arrays}, {}, loss=name)


def test_softmax_of_equal_wrong_classes_is_the_sharp_end_of_gamma():
    """The rest spread over all other classes: ‖g‖² = (c/(c-1)) (1 - e^-ℓ)², and not less."""
    found = bridge(softmax([2.0, 0.0, 0.0] * 2))
    assert found.outcome == "not refuted", found
    assert found.part("chain").measured == pytest.approx(1, rel=1e-9)
    assert "λ_⊥" in found.part("eigenvalue").note
    # Two classes are logistic loss on the difference: γ λ_⊥ = 2 λ_⊥ there is λ of the difference.
    assert found.part("envelope").outcome == found.part("length").outcome == "not refuted"


@given(seed=st.integers(0, 10**6), smoothing=st.sampled_from([0.0, 0.1, 0.6]))
def test_softmax_and_smoothed_labels(seed, smoothing):
    theta = np.random.default_rng(seed).normal(scale=2, size=6)
    found = bridge(softmax(theta, smoothing=smoothing))
    assert found.part("chain").outcome == "not refuted", found
    if smoothing:
        infimum = found.part("infimum")
        assert infimum.outcome == "not refuted"
        assert infimum.measured >= 0


def test_smoothed_labels_converge_linearly_to_their_entropy():
    record = softmax([1.9, 0.02, 0.02], smoothing=0.3, eta=1.0, steps=60, probes=(0, 30, 60))
    found = bridge(record)
    tau = np.array([0.8, 0.1, 0.1])
    assert float(record["loss"][-1]) == pytest.approx(-float((tau * np.log(tau)).sum()), rel=1e-6)
    assert found.part("infimum").measured < 1e-6
    assert found.part("exponent").measured == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("start", [0.5, 20.0])
def test_hubers_phase(start):
    record = diagonal(
        lambda r: np.clip(r, -1, 1), lambda r: np.where(abs(r) <= 1, r**2 / 2, abs(r) - 0.5), name="huber(1.0)",
        theta=[start],
    )  # fmt: skip
    found = bridge(record)
    assert found.outcome == "not refuted"
    assert ("from epoch 0 on" in found.part("phase").note) == (start == 0.5)
    assert found.part("chain").measured == pytest.approx(1, rel=1e-12), "one sample is an equality in either phase"


@pytest.mark.parametrize(
    ("name", "slope", "value"),
    [
        ("squared_hinge", lambda f: -np.maximum(1 - f, 0), lambda f: np.maximum(1 - f, 0) ** 2 / 2),
        ("exponential", lambda f: -np.exp(-f), lambda f: np.exp(-f)),
    ],
)
def test_losses_of_a_margin(name, slope, value):
    record = diagonal(slope, value, name=name, theta=[0.3, 0.3])
    found = bridge(record)
    assert found.outcome == "not refuted", found
    assert found.part("chain").measured == pytest.approx(1, rel=1e-12), "equal samples"


FAULTS = {
    "chain": ({"output_grad_norm": 0.5}, "refuted", True),
    "samples": ({"sample_bound_sum": 3.0}, "refuted", True),
    "floor": ({"margin_max": -9.0}, "refuted", True),
    "eigenvalue": ({"ntk_min_eig": -1e-3, "ntk_min_eig_lower": -1e-3}, "undecided", False),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_seen(fault):
    changes, outcome, inconsistent = FAULTS[fault]
    part = {"samples": "chain"}.get(fault, fault)
    record = tampered(logistic_regression(), **{name: replaced(value) for name, value in changes.items()})
    found = bridge(record)
    assert found.part(part).outcome == outcome, found.part(part)
    assert found.inconsistent == inconsistent


def test_a_run_above_its_envelope_is_refuted():
    """Eigenvalues four times too large promise a decrease that the run does not have."""
    record = logistic_regression()
    raised = tampered(record, **{f"ntk_{name}": lambda old: 4 * old for name in ("min_eig", "rayleigh", "max_eig")})
    found = bridge(raised)
    assert found.part("envelope").outcome == found.part("length").outcome == "refuted"
    assert found.outcome == "refuted"
    short = bridge(tampered(record, loss_scale=replaced(1.0)))
    assert "stated for the mean" in short.part("envelope").note


def test_a_floor_from_some_of_the_samples_counts_the_others_as_nothing():
    record = logistic([1.0] * 3)
    arrays = {**record.arrays, "margin_max": np.asarray(1.0), "margin_slope_upper": np.asarray(2.0)}
    whole = bridge(Record("all", arrays, {}, loss="logistic")).part("floor")
    assert whole.bound == pytest.approx(math.log1p(math.exp(-1 - 2 * float(record["drift"].max()))), rel=1e-4)
    few = bridge(Record("few", {**arrays, "kernel_samples": np.asarray(1)}, {}, loss="logistic")).part("floor")
    assert few.bound == pytest.approx(whole.bound / 3, rel=1e-12)


def test_below_a_known_infimum_nothing_can_be():
    record = softmax([0.5, 0.2, 0.1], smoothing=0.3)
    assert bridge(record).part("infimum").outcome == "not refuted"
    broken = bridge(tampered(record, loss_infimum=lambda old: old + 1.0))
    assert broken.part("infimum").outcome == "refuted"
    assert broken.inconsistent


def test_the_growth_of_a_loss_is_the_supremum_rounded_up():
    x = np.linspace(1e-6, 40, 400_001)
    sup = float(np.max(np.expm1(-x) ** 2 / x))
    assert sup <= GROWTH["logistic"] <= sup * (1 + 2e-5)
    assert 2 * sup <= GROWTH["softmax_cross_entropy"] <= 2 * sup * (1 + 2e-5)


def test_every_loss_but_the_squared_one_is_held():
    found = theory.verify(logistic_regression())
    assert found["loss_bridge"].outcome == "not refuted"
    assert found["descent"].outcome == found["path"].outcome == "not refuted"
    assert found["consistency"].outcome in ("proved", "not refuted")
    for name, verdict in itertools.product(("local_pl", "floor_pl"), [found]):
        assert verdict[name].outcome == "not applicable"
