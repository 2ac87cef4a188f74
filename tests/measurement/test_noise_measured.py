"""The noise of mini-batches against all batches there are, on least squares with exact expectations."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lplr_jax as lp
from lplr_jax.losses import Objective, Squared
from lplr_jax.measurement.noise import DRAWS, Batches, batch_decrease, sample_noise

N, D, C = 6, 4, 2


def linear(w, x):
    return x @ w


def setting(seed=0, n=N, d=D, c=C):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((d, c)), rng.standard_normal((n, d)), rng.standard_normal((n, c))


def by_hand(w, x, y, b, scale):
    """Gradients g_B of all batches without replacement, ∇L, and L as a function, in NumPy."""
    n, s = len(x), len(x) if scale == "mean" else 1.0
    gradients = [(n / s) * x[i][:, None] * (x[i] @ w - y[i]) for i in range(n)]
    batches = [np.mean([gradients[i] for i in rows], axis=0) for rows in itertools.combinations(range(n), b)]
    return np.array(gradients), np.array(batches), lambda q: np.sum((x @ q - y) ** 2) / (2 * s)


@pytest.mark.parametrize("scale", ["mean", "sum"])
@pytest.mark.parametrize("b", [1, 2, 4, 6])
def test_the_variance_of_all_batches_is_that_of_the_diagonal_blocks(b, scale):
    w, x, y = setting()
    gradients, batches, _ = by_hand(w, x, y, b, scale)
    theta = np.kron(x @ x.T, np.eye(C))
    s = float(N) if scale == "mean" else 1.0
    found = sample_noise(theta, x @ w - y, s)
    assert found["sample_grad_sq_norm"] == pytest.approx(np.mean([np.sum(g**2) for g in gradients]), rel=1e-12)
    assert found["sample_kernel_max"] == pytest.approx((x**2).sum(axis=1).max(), rel=1e-12)
    whole = gradients.mean(axis=0)
    variance = np.mean([np.sum((g - whole) ** 2) for g in batches])
    predicted = (found["sample_grad_sq_norm"] - np.sum(whole**2)) / b * (N - b) / (N - 1)
    assert predicted == pytest.approx(variance, rel=1e-10, abs=1e-13)


def test_blocks_are_those_of_the_sample_and_not_the_diagonal_alone():
    """Outputs that depend on each other: a block with off-diagonal entries, whose diagonal alone is not enough."""
    block = np.array([[2.0, 1.5], [1.5, 2.0]])
    theta = np.kron(np.eye(3), block)
    g = np.tile([1.0, -1.0], (3, 1))
    found = sample_noise(theta, g, 3.0)
    assert found["sample_grad_sq_norm"] == pytest.approx(1.0), "gᵀΘ_ii g = 2 + 2 - 3"
    assert found["sample_kernel_max"] == pytest.approx(3.5)


@pytest.mark.parametrize("b", [1, 3])
def test_the_mean_step_is_that_of_all_batches(b):
    w, x, y = setting()
    _, batches, loss = by_hand(w, x, y, b, "mean")
    eta = 0.1
    expected = np.mean([loss(w - eta * g) - loss(w) for g in batches])
    found = batch_decrease(Objective(linear, "mean"), *map(jnp.asarray, (w, x, y)), Batches(b, eta, 3))
    if b == 1:
        assert found == {"batch_decrease": pytest.approx(expected, rel=1e-5), "batch_decrease_error": 0.0}
    else:
        assert abs(found["batch_decrease"] - expected) < found["batch_decrease_error"]
        # The remainder is ½ η² g_BᵀH g_B: the interval is narrower than the mean step for such an η.
        assert found["batch_decrease_error"] < abs(expected)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    """At 95 %, on 20 draws: more than 4 misses have probability 3e-3; the interval is wider than that in truth."""
    w, x, y = setting(1)
    _, batches, loss = by_hand(w, x, y, 3, "mean")
    expected = np.mean([loss(w - 0.3 * g) - loss(w) for g in batches])
    misses, narrow = 0, 0
    for seed in range(20):
        arrays = map(jnp.asarray, (w, x, y))
        found = batch_decrease(Objective(linear, "mean"), *arrays, Batches(3, 0.3, seed))
        off = abs(found["batch_decrease"] - expected)
        misses += off > found["batch_decrease_error"]
        narrow += off > found["batch_decrease_error"] / 10
    assert misses <= 4
    assert narrow > 0, "a tenth of the interval would not hold it"
    assert DRAWS == 64


def run(sampling, *, b=2, eta=0.05, noise=0.0, seed=0, steps=60):
    w, x, y = setting(5, n=8, d=20 if not noise else 3, c=1)
    problem = lp.Problem(linear, *(jnp.asarray(a, jnp.float32) for a in (0 * w, x, y)), loss=Squared("mean"))
    probes = lp.Probes(20, search=0, hessian=99)
    return lp.train(
        problem, optax.sgd(eta), steps=steps, batch_size=b, sampling=sampling, seed=seed, probes=probes,
        learning_rate=eta,
    )  # fmt: skip


def test_independent_batches_are_drawn_anew_and_resume_alike(tmp_path):
    """A pass uses every sample once or not; both are reproducible, and say what they are."""
    first, again, other = run("independent"), run("independent"), run("reshuffle")
    np.testing.assert_array_equal(first["loss"], again["loss"])
    assert not np.array_equal(first["loss"], other["loss"])
    assert (int(first["batch_size"]), int(first["batches_independent"]), int(other["batches_independent"])) == (2, 1, 0)
    assert first.config["sampling"] == "independent"
    assert "sampling" not in other.config, "the usual run is the same run as before"


def test_least_squares_that_interpolate_have_no_noise_ball():
    """20 parameters for 8 samples: σ² goes with the loss, and both to zero; with 3 parameters neither does."""
    fits, stuck = run("independent", eta=0.02, steps=600), run("independent", eta=0.02, steps=600, noise=1.0)
    assert fits["loss"][-1] < 1e-3 * fits["loss"][0]
    assert fits["sample_grad_sq_norm"][-1] < 1e-2 * fits["sample_grad_sq_norm"][0]
    assert stuck["sample_grad_sq_norm"][-1] > 0.05 * stuck["sample_grad_sq_norm"][0]
    for record in (fits, stuck):
        found = lp.verify(record)["noise"]
        assert found.outcome == "not refuted", found
        assert "growth" in found.note


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match="sampling must be one of reshuffle, independent, got 'cyclic'"):
        run("cyclic")
