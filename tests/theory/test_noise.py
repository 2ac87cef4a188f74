"""The claim `noise`: its constants, a planted violation for every part, and runs that must not be refuted."""

import dataclasses

import numpy as np
import pytest
from controls import replaced, scaled, tampered
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax.theory.claims import noise
from lplr_jax.theory.evidence import Evidence


def found(record):
    """The claim alone: `verify` would not look at a record that was spoilt."""
    return Evidence(record).verdict("noise")


def with_arrays(record, **more):
    return dataclasses.replace(record, arrays={**record.arrays, **{k: np.asarray(v) for k, v in more.items()}})


def stochastic(seed, *, n=6, d=9, b=1, eta=0.05, steps=400, growth=1.0):
    """SGD on least squares that interpolate, single samples drawn anew, its exact mean step and noise at 3 probes."""
    rng = np.random.default_rng(seed)
    x, y = rng.standard_normal((n, d)), rng.standard_normal(n)
    kernel = x @ x.T
    (least, *_, largest), theta = np.linalg.eigvalsh(kernel), np.zeros(d)
    beta = largest / n
    losses, slopes, probes = [], [], {}
    for t in range(steps + 1):
        r = x @ theta - y
        losses.append(r @ r / (2 * n) * growth**t)
        slopes.append(np.sum((x.T @ r / n) ** 2))
        if t % (steps // 2) == 0:
            each = x * r[:, None]
            mean_step = np.mean([np.sum((x @ (theta - eta * g) - y) ** 2) for g in each]) / (2 * n) - r @ r / (2 * n)
            probes[t] = (losses[-1], slopes[-1], np.mean(np.sum(each**2, axis=1)), mean_step)
        i = rng.integers(n)
        theta = theta - eta * x[i] * r[i]
    values = np.array(list(probes.values()))
    k = len(probes)
    arrays = {
        "epoch": np.arange(steps + 1), "loss": losses, "grad_sq_norm": slopes, "drift": np.zeros(steps + 1),
        "probe_epoch": list(probes), "probe_loss": values[:, 0], "probe_grad_sq_norm": values[:, 1],
        "sample_grad_sq_norm": values[:, 2], "batch_decrease": values[:, 3], "batch_decrease_error": np.zeros(k),
        "sample_kernel_max": np.full(k, np.diag(kernel).max()), "ntk_min_eig": np.full(k, least),
        "ntk_max_eig": np.full(k, largest), "sharpness": np.full(k, beta),
        "batch_size": b, "batches_independent": 1, "loss_scale": float(n), "learning_rate": eta, "n": n, "c": 1, "p": d,
    }  # fmt: skip
    return noise.example().__class__("sgd", {name: np.asarray(value) for name, value in arrays.items()}, {})


@given(x=st.floats(1e-6, 50))
def test_growth_constants_bound_the_gradient_of_a_sample(x):
    ratio = np.expm1(-x) ** 2 / x
    assert ratio <= noise.GROWTH["logistic"]
    assert 2 * ratio <= noise.GROWTH["softmax_cross_entropy"]


def test_growth_constants_are_sharp():
    best = 1.25643  # where (1 - e^{-x})²/x is largest: 2 x = e^x - 1
    ratio = np.expm1(-best) ** 2 / best
    assert noise.GROWTH["logistic"] == pytest.approx(ratio, rel=1e-4)
    assert noise.GROWTH["softmax_cross_entropy"] == pytest.approx(2 * ratio, rel=1e-4)


def test_growth_is_sharp_for_one_sample_that_has_all_the_loss():
    """n = 2, b = 1, one residual 0: σ² = S² = ‖G_1‖²/4, v L = 2 Θ̄ r²/4 = ‖G_1‖²/2; both samples alike leave 0."""
    record = tampered(
        noise.example(),
        sample_grad_sq_norm=lambda a: a,
        batch_size=replaced(2),
    )
    verdict = found(record)
    assert verdict.outcome == "not refuted"
    assert 0 < verdict.part("growth").measured < verdict.part("growth").bound


@pytest.mark.parametrize("factor", [10.0, 0.3])
def test_noise_that_is_no_variance_or_exceeds_its_bound_is_a_contradiction(factor):
    """‖∇L‖² <= (1/n) Σ ‖G_i‖² <= 2 (n/s) Θ̄ L (n/s): outside of these the record contradicts itself."""
    verdict = found(tampered(noise.example(), sample_grad_sq_norm=scaled(factor)))
    assert verdict.outcome == "refuted"
    assert verdict.inconsistent
    assert verdict.part("growth").outcome == "refuted"


def test_full_batches_are_not_spoken_of():
    record = noise.example()
    for spoilt in (tampered(record, batch_size=replaced(3)), dataclasses.replace(
        record, arrays={k: v for k, v in record.arrays.items() if k != "batch_size"})):  # fmt: skip
        assert found(spoilt).outcome == "not applicable"


@pytest.mark.parametrize("seed", range(8))
def test_a_run_as_the_theorem_describes_it_is_not_refuted(seed):
    """Of 8 runs at level .01 one would be refuted with probability below .08; the seeds are fixed."""
    verdict = found(stochastic(seed))
    assert verdict.outcome == "not refuted", verdict
    step = verdict.part("one_step")
    assert "exactly" in step.note
    assert step.measured <= step.bound + 1e-9


def test_the_mean_step_is_the_bound_where_the_curvature_is_the_same_everywhere():
    """One eigenvalue: E L(θ - ηg) - L = -η‖G‖² + η²β(‖G‖² + σ²)/2 exactly, so 1e-3 less of β is refuted."""
    n, eta = 3, 0.1
    r = np.array([1.0, -0.5, 0.2])
    # Rows √2 e_i: H = 2/n I, ∇ℓ_i = √2 r_i e_i.
    loss, slope, squares = r @ r / (2 * n), 2 * (r @ r) / n**2, 2 * (r @ r) / n
    exact = np.mean([np.sum((r - 2 * eta * np.eye(n)[i] * r[i]) ** 2) for i in range(n)]) / (2 * n) - loss
    base = stochastic(0)
    more = {
        "probe_epoch": [0], "probe_loss": [loss], "probe_grad_sq_norm": [slope], "sample_grad_sq_norm": [squares],
        "sample_kernel_max": [2.0], "sharpness": [2 / n], "batch_decrease": [exact], "batch_decrease_error": [0.0],
        "ntk_min_eig": [2.0], "ntk_max_eig": [2.0], "batch_size": 1, "learning_rate": eta, "n": n, "loss_scale": 3.0,
    }  # fmt: skip
    record = with_arrays(base, **more)
    part = found(record).part("one_step")
    assert part.outcome == "not refuted"
    assert part.bound == pytest.approx(exact, rel=2e-3), "the sharpness is given its own error"
    less = found(with_arrays(record, sharpness=[2 / n * 0.99])).part("one_step")
    assert less.outcome == "refuted"
    assert "does not bind" not in less.note
    assert "does not bound the curvature" in less.note


def test_a_run_whose_loss_grows_where_a_fall_is_promised_is_refuted_at_its_level():
    """Planted: the loss of every step is raised by 4 % of itself, step after step, against a q that promises a fall."""
    record = stochastic(0, eta=0.01)
    calm = tampered(record, sample_kernel_max=scaled(1.0))
    assert found(calm).part("supermartingale").outcome == "not refuted"
    grown = found(stochastic(0, eta=0.01, growth=1.04)).part("supermartingale")
    assert grown.outcome == "refuted"
    assert f"p = {1 / grown.measured:.2g}" in grown.note
    assert grown.measured > 1 / noise.LEVEL


@pytest.mark.parametrize(("peak", "outcome"), [(50.0, "not refuted"), (200.0, "refuted")])
def test_the_level_decides(peak, outcome):
    """sup L_t/L_0 = 50 has probability 1/50 at most, 200 has 1/200: the level is 1 %."""
    record = stochastic(0)
    loss = np.array(record["loss"])
    loss[1] = peak * loss[0]
    part = found(with_arrays(record, loss=loss, sharpness=np.zeros(3), ntk_min_eig=np.zeros(3))).part("supermartingale")
    assert part.outcome == outcome
    assert part.measured == pytest.approx(peak, rel=1e-9)


def test_a_pass_over_the_data_is_outside_the_theorem():
    record = with_arrays(noise.example(), batches_independent=0)
    verdict = found(record)
    assert verdict.part("supermartingale").outcome == "not applicable"
    assert "outside the theorem" in verdict.part("supermartingale").note
    assert verdict.outcome == "not refuted", "growth holds all the same"
