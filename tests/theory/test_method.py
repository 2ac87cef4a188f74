"""The method is read off the steps: the test's own loop over optimisers on a linear model, judged without a config."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from controls import by_claim, step_arrays, tampered

from lplr_jax.records import Record
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import MET

SAMPLES, PARAMETERS, EPOCHS, ETA = 20, 40, 60, 0.05


def data():
    rng = np.random.default_rng(0)
    return rng.standard_normal((SAMPLES, PARAMETERS)), rng.standard_normal(SAMPLES)


def run(optimizer, *, dtype="float32", eta=ETA, epochs=EPOCHS, batch=None, start=0.0):
    """The record of a linear regression: θ, L, ∇L by NumPy in `dtype`, updates by optax, kernel in closed form."""
    x, y = (array.astype(dtype) for array in data())
    theta = np.full(PARAMETERS, start, dtype)
    trajectory, gradients, losses = [theta], [], []
    # optax counts steps in int32 and multiplies by Python floats.
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("standard"):
        state = optimizer.init(theta)
        for epoch in range(epochs + 1):
            residual = x @ theta - y
            losses.append(float(residual @ residual) / (2 * SAMPLES))
            gradients.append(x.T @ residual / np.asarray(SAMPLES, dtype))
            used = gradients[-1]
            if batch:
                rows = np.arange(epoch * batch, (epoch + 1) * batch) % SAMPLES
                used = x[rows].T @ residual[rows] / np.asarray(batch, dtype)
            if epoch < epochs:
                update, state = optimizer.update(used, state, theta)
                theta = np.asarray(optax.apply_updates(theta, update), dtype)
                trajectory.append(theta)
    wide_x, wide_y = (array.astype(np.float64) for array in (x, y))
    at = np.arange(0, epochs + 1, epochs // 3)
    points = np.stack([trajectory[t].astype(np.float64) for t in at])
    residuals = points @ wide_x.T - wide_y
    values, vectors = np.linalg.eigh(wide_x @ wide_x.T)
    k, energy = at.size, (residuals @ vectors) ** 2
    slopes = residuals @ wide_x / SAMPLES
    # Entries of XXᵀ are sums of 40 products, so each is off by 40 u ‖x_i‖‖x_j‖ at most.
    error = PARAMETERS * 2.0**-53 * np.trace(wide_x @ wide_x.T)
    arrays = {
        "epoch": np.arange(epochs + 1),
        "loss": np.array(losses),
        "grad_sq_norm": np.array([float(g @ g) for g in gradients]),
        "drift": np.array([float(np.linalg.norm(q - trajectory[0])) for q in trajectory]),
        **step_arrays(trajectory, gradients, epochs + 1),
        "probe_epoch": at,
        "probe_loss": (residuals**2).sum(axis=1) / (2 * SAMPLES),
        "probe_grad_sq_norm": (slopes**2).sum(axis=1),
        "ntk_min_eig": np.full(k, values[0]),
        "ntk_min_eig_lower": np.full(k, values[0] - error),
        "ntk_min_eig_upper": np.full(k, values[0] + error),
        "ntk_max_eig": np.full(k, values[-1]),
        "ntk_rayleigh": (energy @ values) / energy.sum(axis=1),
        "ntk_shift": np.zeros(k),
        "ntk_assembly_error": np.full(k, error),
        "param_pair_distance": np.linalg.norm(points[:, None] - points[None], axis=2),
        "smoothness_upper": values[-1] / SAMPLES * (1 + 1e-3),
        "affine_in_parameters": 1,
        "parameter_eps": float(np.finfo(dtype).eps),
        "loss_scale": SAMPLES,
        "learning_rate": eta,
        "n": SAMPLES,
        "c": 1,
        "p": PARAMETERS,
    }
    return Record("linear", {name: np.asarray(array) for name, array in arrays.items()}, {})


FIXED = {"sgd": optax.sgd(ETA)}
MOVING = {
    "cosine": optax.sgd(optax.cosine_decay_schedule(ETA, EPOCHS)),
    "warm-up": optax.sgd(optax.linear_schedule(ETA / 10, ETA, 10)),
    "one jump": optax.sgd(optax.piecewise_constant_schedule(ETA, {EPOCHS - 1: 1.01})),
    "norm clip": optax.chain(optax.clip_by_global_norm(0.5), optax.sgd(ETA)),
}
OTHER = {
    "heavy ball": optax.sgd(ETA, momentum=0.9),
    "light ball": optax.sgd(ETA, momentum=0.01),
    "nesterov": optax.sgd(ETA, momentum=0.9, nesterov=True),
    "adam": optax.adam(0.01),
    "adamw": optax.adamw(0.01),
    "lion": optax.lion(0.001),
    "rmsprop": optax.rmsprop(0.01),
    "weight decay": optax.chain(optax.add_decayed_weights(1e-2), optax.sgd(ETA)),
    "elementwise clip": optax.chain(optax.clip(0.1), optax.sgd(ETA)),
    "ascent": optax.sgd(-1e-3),
    "accumulation": optax.MultiSteps(optax.sgd(ETA), 2).gradient_transformation(),
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", FIXED)
def test_gradient_descent_is_proved(name, dtype):
    record = run(FIXED[name], dtype=dtype)
    found = by_claim(record)
    for claim in ("consistency", "compatibility", "local_pl", "linear_rate", "regime"):
        assert found[claim].outcome == "proved", found[claim]
    assert f"at all {EPOCHS} seen steps (of {EPOCHS})" in found["linear_rate"].part("descent").note
    assert found["consistency"].part("step_size").outcome == "proved"
    method = Evidence(record).method
    assert method.plain
    assert method.eta == pytest.approx(ETA, rel=1e-4 if dtype == "float32" else 1e-12)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MOVING)
def test_a_step_that_moves_is_told_with_its_range(name, dtype):
    record = run(MOVING[name], dtype=dtype)
    found = by_claim(record)
    assert Evidence(record).method.kind == "gradient descent"
    assert found["linear_rate"].outcome == "not refuted"
    assert "with a fixed step; η moved from" in found["linear_rate"].note
    assert found["linear_rate"].reference != "Theorem 5.7"
    assert found["consistency"].outcome == "proved", found["consistency"]
    assert found["regime"].part("descent").outcome == "not refuted", "every η_t is below 1/β"


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", OTHER)
def test_other_methods_are_told_by_their_steps(name, dtype):
    record = run(OTHER[name], dtype=dtype)
    found = by_claim(record)
    assert Evidence(record).method.kind == "other"
    if name == "light ball":  # one of the two that a statement of ours is about, and whose step is short enough
        assert found["linear_rate"].outcome == "not refuted", found["linear_rate"]
    else:
        assert found["linear_rate"].outcome == "not applicable", found["linear_rate"]
    ball = name in ("heavy ball", "light ball")
    assert found["linear_rate"].reference == ("ours (heavy ball)" if ball else "Theorem 5.7")
    assert ("is heavy ball" if ball else "at step") in found["linear_rate"].note
    assert found["consistency"].outcome == "proved", found["consistency"]
    assert found["local_pl"].outcome == "proved"
    assert "descent" not in {part.claim.partition(".")[2] for part in found["regime"].parts}
    assert found["regime"].outcome in MET


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_mini_batches_are_another_method(dtype):
    found = by_claim(run(optax.sgd(ETA), dtype=dtype, batch=5))
    assert found["linear_rate"].outcome == "not applicable"
    assert "not along -∇L" in found["linear_rate"].note


def test_config_keys_change_nothing():
    """Keys that name another method, precision or batch stand in the config of a run that was gradient descent."""
    record = run(optax.sgd(ETA))
    keys = {"momentum": 0.9, "batch_size": 2, "schedule": "cosine", "dtype": "float64", "optimizer": "adam"}
    claimed = dataclasses.replace(record, config={**keys, "diagnostics_every": 7})
    assert by_claim(claimed) == by_claim(record)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("wrong", [1 / 5, 1 / 1.01, 1.01, 10])
def test_a_recorded_step_size_that_is_not_that_of_the_steps_is_a_contradiction(wrong, dtype):
    found = by_claim(run(optax.sgd(ETA), dtype=dtype, eta=ETA * wrong))
    assert found["consistency"].inconsistent
    part = found["consistency"].part("step_size")
    assert part.outcome == "refuted"
    assert part.measured == pytest.approx(abs(wrong - 1), rel=1e-2)


def test_without_a_recorded_step_size_the_measured_one_is_taken():
    found = by_claim(run(optax.sgd(ETA), eta=np.nan))
    assert found["linear_rate"].outcome == "proved"


def test_the_first_step_and_the_drift_after_it_agree():
    """True of every method, so a drift that is off is a contradiction under Adam as well."""
    for optimizer in (optax.sgd(ETA), optax.adam(0.01)):
        record = run(optimizer)

        def change(drift):
            drift[1] *= 1.01
            return drift

        found = by_claim(tampered(record, drift=change))
        assert found["consistency"].inconsistent
        assert found["consistency"].part("first_step").outcome == "refuted"


def unseen(record):
    return dataclasses.replace(record, arrays={k: v for k, v in record.arrays.items() if not k.startswith("step_")})


@pytest.mark.parametrize(
    ("optimizer", "eta", "consistent"),
    [
        (optax.sgd(ETA), ETA, "proved"),
        (optax.sgd(ETA), ETA / 5, "undecided"),
        (optax.adam(0.01), 0.01, "undecided"),
        (optax.sgd(ETA, momentum=0.9), ETA, "proved"),
    ],
    ids=["descent", "wrong step", "adam", "heavy ball"],
)
def test_without_steps_the_rate_is_undecided(optimizer, eta, consistent):
    found = by_claim(unseen(run(optimizer, eta=eta)))
    rate = found["linear_rate"]
    assert rate.outcome == "undecided"
    assert "not measured: step_size, step_deviation, step_rounding" in rate.note
    assert "the update was not seen" in rate.note
    assert {part.outcome for part in rate.parts if part.claim.partition(".")[2].startswith(("bound", "desc"))} == {
        "undecided"
    }
    assert found["consistency"].outcome == consistent
    if consistent == "undecided":
        assert "is not the first step's" in found["consistency"].note
    assert found["regime"].outcome == "not refuted"
    assert not any(verdict.inconsistent for verdict in found.values())


def test_steps_below_the_spacing_of_the_parameters_decide_nothing():
    """From θ = 1000 a float32 moves by 6e-5 at least, which is some of the step of η = 1e-5."""
    record = run(optax.sgd(1e-9), eta=1e-9, start=1000.0)
    method = Evidence(record).method
    assert method.updates == EPOCHS
    assert method.kind == "unseen"
    rate = by_claim(record)["linear_rate"]
    assert rate.outcome == "undecided"
    assert "too short to be told from rounding" in rate.note
