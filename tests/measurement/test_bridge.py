"""λ_⊥ and the sums of samples against dense products at 60 digits, and a run of every loss with its verdict."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

import lplr_jax as lp
from lplr_jax import losses, theory
from lplr_jax.diagnostics import evaluate_point
from lplr_jax.measurement import bridge
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs.rounding import AssemblyBound

N, D, C = 4, 9, 3
RNG = np.random.default_rng(0)
X = (RNG.standard_normal((N, D)) / 3).astype(np.float32)
CLASSES = np.array([0, 2, 1, 1])
SIGNS = np.array([[1.0], [-1.0], [1.0], [-1.0]], np.float32)


def apply_fn(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def start(c, width=12):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((D, width)) / 3, rng.standard_normal((width, c)) / 3
    return {"a": jnp.asarray(a, jnp.float32), "b": jnp.asarray(b, jnp.float32)}


@pytest.mark.parametrize("c", [2, 3, 7])
def test_the_reduced_kernel_is_a_congruence(c):
    """Against the product at 60 digits, entry by entry; its eigenvalues do not depend on the basis."""
    n = 3
    factor = np.random.default_rng(c).standard_normal((n * c, 30))
    factor *= np.logspace(0, 4, n * c)[:, None]  # so that a bound relative to the largest entry alone says little
    theta = factor @ factor.T
    theta = (theta + theta.T) / 2
    found, error = bridge.class_kernel(theta, c)
    with mpmath.workdps(60):
        exact = mpmath.zeros(c, c - 1)
        for k in range(1, c):
            scale = 1 / mpmath.sqrt(mpmath.mpf(k) * (k + 1))
            for i in range(k):
                exact[i, k - 1] = scale
            exact[k, k - 1] = -k * scale
        whole = mpmath.zeros(n * c, n * (c - 1))
        for i in range(n):
            for a in range(c):
                for b in range(c - 1):
                    whole[i * c + a, i * (c - 1) + b] = exact[a, b]
        product = whole.T * mpmath.matrix(theta.tolist()) * whole
        off = np.array([[float(product[i, j] - mpmath.mpf(float(found[i, j]))) for j in range(found.shape[0])]
                        for i in range(found.shape[0])])  # fmt: skip
    assert np.linalg.norm(off) <= error
    assert error <= 1e-12 * np.linalg.norm(theta), "a bound this wide proves nothing"
    other, _ = np.linalg.qr(np.random.default_rng(9).standard_normal((c, c - 1)) - 0.0)
    other -= other.mean(axis=0)
    other, _ = np.linalg.qr(other)
    wide = np.kron(np.eye(n), other)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(found), np.linalg.eigvalsh(wide.T @ theta @ wide), rtol=1e-8, atol=1e-12 * theta.max()
    )


def test_the_interval_of_the_classes_holds_the_truth():
    """λ_⊥ at 60 digits of a matrix that is far from the given one by as much as is allowed."""
    factor = np.random.default_rng(3).standard_normal((N * C, 40))
    theta = factor @ factor.T
    for error in (0.0, 1e-3):
        least, proved = bridge.class_min_eig(theta, C, 40, AssemblyBound(error, 0.0, ()))
        assert proved
        assert least.proved
        vector = np.linalg.eigh(bridge.class_kernel(theta, C)[0])[1][:, 0]
        direction = np.kron(np.eye(N), bridge.contrasts(C)) @ vector
        for sign in (-1, 1):
            moved = theta + sign * error * np.outer(direction, direction)
            with mpmath.workdps(60):
                kernel, _ = bridge.class_kernel(moved, C)
                truth = float(min(mpmath.eigsy(mpmath.matrix(kernel.tolist()), eigvals_only=True)))
            assert least.lower <= truth <= least.upper
        assert least.upper - least.lower <= 2 * error * (1 + 1e-6) + 1e-11
    few, _ = bridge.class_min_eig(theta, C, 5, None)
    assert (few.lower, few.upper) == (0.0, 0.0), "more rows than parameters"


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_values_of_a_point(smoothing):
    loss, params = losses.SoftmaxCrossEntropy(smoothing=smoothing), start(C)
    point = evaluate_point(apply_fn, params, X, CLASSES, loss=loss)
    theta = np.asarray(empirical_ntk(apply_fn, params, X))
    found = bridge.bridge_values(theta, point, loss, 1000, bound=None)
    assert set(found) == set(bridge.names(loss))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), params)
        f = np.asarray(apply_fn(wide, jnp.asarray(X, jnp.float64)))
    p = np.exp(f) / np.exp(f).sum(axis=1, keepdims=True)
    tau = (1 - smoothing) * np.eye(C)[CLASSES] + smoothing / C
    values = -(tau * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(point.losses, values, rtol=1e-12)
    assert found["samples_beyond"] == np.sum(values > np.log(2))
    assert found["output_grad_norm"] == pytest.approx(np.linalg.norm(p - tau), rel=1e-12)
    assert found["output_norm"] == pytest.approx(np.linalg.norm(f), rel=1e-12)
    square = ((p - tau) ** 2).sum(axis=1)
    if smoothing:
        excess = values + (tau * np.log(tau)).sum(axis=1)
        share = np.minimum(p, tau).min(axis=1)
        assert found["sample_least_share"] == pytest.approx(share.min(), rel=1e-12)
        assert found["sample_bound_sum"] == pytest.approx(np.sum(2 * share * excess), rel=1e-9)
    else:
        assert found["sample_bound_sum"] == pytest.approx(1.5 * np.sum(np.expm1(-values) ** 2), rel=1e-12)
    assert found["sample_bound_sum"] <= square.sum()
    assert found["ntk_class_min_eig"] >= np.linalg.eigvalsh(theta)[0]
    assert math.isnan(found["ntk_class_min_eig_lower"]), "without the error of assembly there is no interval"
    reordered = (p - tau).reshape(-1)
    assert reordered @ theta @ reordered >= found["ntk_class_min_eig"] * square.sum() * (1 - 1e-9)


CASES = {
    "logistic": (losses.Logistic(), SIGNS, 1.0, True),
    "softmax_cross_entropy": (losses.SoftmaxCrossEntropy(), CLASSES, 1.0, True),
    "softmax_cross_entropy(0.1)": (losses.SoftmaxCrossEntropy(smoothing=0.1), CLASSES, 0.5, False),
    "soft_cross_entropy": (losses.SoftmaxCrossEntropy(soft=True), np.float32([[0.5, 0.25, 0.25]] * N), 0.5, False),
    "huber(0.2)": (losses.Huber(0.2), SIGNS, 0.3, False),
    "squared_hinge": (losses.SquaredHinge(), SIGNS, 0.3, False),
    "exponential": (losses.Exponential(), SIGNS, 0.2, True),
}


QUICK = {"logistic", "softmax_cross_entropy", "huber(0.2)"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CASES]
)
def test_a_run_of_every_loss_is_judged(name):
    """Trained, measured and read again: the record names the loss, and no number contradicts another."""
    loss, y, eta, floor = CASES[name]
    problem = lp.Problem(apply_fn, start(C if "cross" in name else 1), X, y, loss=loss)
    record = lp.train(problem, optax.sgd(eta), steps=40, probes=lp.Probes(every=10, search=0))
    assert record.loss == name
    found = theory.verify(record)
    assert not theory.any_inconsistent(found), found
    assert found["consistency"].outcome in ("proved", "not refuted"), found["consistency"]
    assert found["descent"].outcome == found["path"].outcome == "not refuted"
    verdict = found["loss_bridge"]
    assert verdict.part("chain").outcome == "not refuted"
    assert verdict.part("eigenvalue").outcome == "proved", verdict.part("eigenvalue")
    assert verdict.part("chain").measured >= 1
    if floor:
        # K from L_J on the ball and the blocks at θ_0, against the margins that the run itself had.
        assert verdict.part("floor").outcome == "proved"
        assert verdict.part("floor").bound <= float(record["loss"][-1])
    if "cross" in name and not floor:
        entropy = float(losses.by_name(name).least(problem.loss.targets(y, (N, C), np.float64)).sum()) / N
        assert float(record["loss_infimum"]) == pytest.approx(entropy, rel=1e-6)
        assert float(record["loss_infimum"]) <= entropy


def test_the_slope_of_a_margin_bounds_what_margins_do_in_the_ball():
    """By ascent: random directions and the gradient of each margin, at the radius that the bound was made for."""
    loss, params = losses.SoftmaxCrossEntropy(), start(C)
    problem = lp.Problem(apply_fn, params, X, CLASSES, loss=loss)
    record = lp.train(problem, optax.sgd(0.3), steps=10, probes=lp.Probes(every=10, search=0))
    slope, radius = float(record["margin_slope_upper"]), float(record["drift"].max())
    flat, back = jax.flatten_util.ravel_pytree(params)
    rows = np.eye(C)[CLASSES]

    def margins(vector):
        return loss.margins(np.asarray(apply_fn(back(vector), X), np.float64), rows)

    base = margins(flat)
    assert float(record["margin_max"]) == pytest.approx(base.max(), rel=1e-5)
    rng = np.random.default_rng(0)
    most = 0.0
    for _ in range(50):
        step = rng.standard_normal(flat.size).astype(np.float32)
        step *= radius / np.linalg.norm(step)
        most = max(most, float(np.abs(margins(flat + step) - base).max()) / radius)
    assert 0 < most <= slope
