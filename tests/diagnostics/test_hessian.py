"""Hessian and kernel extremes against dense matrices, closed forms and the edge of stability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree

from lplr_jax.diagnostics import hessian
from lplr_jax.diagnostics.hessian import Extremes, hessian_extremes, ntk_extremes
from lplr_jax.lanczos import extreme_ritz
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk


def network(params, x):
    hidden, out = params
    return jnp.tanh(x @ hidden) @ out


def problem(n=30, d=4, c=2, width=5):
    rng = np.random.default_rng(0)
    x, y, hidden, out = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for shape in ((n, d), (n, c), (d, width), (width, c))
    )
    return (hidden, out), x, y


def sum_loss(params, x, y):
    return 0.5 * jnp.sum(jnp.square(network(params, x) - y))


def mean_loss(params, x, y):
    return sum_loss(params, x, y) / x.shape[0]


def dense_hessian(loss, params, *data):
    """Hessian from nested forward mode on the flat vector, with no product in common with the code."""
    with jax.enable_x64(True):
        params, data = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), (params, data))
        flat, unravel = ravel_pytree(params)
        return np.asarray(jax.jacfwd(jax.jacfwd(lambda v: loss(unravel(v), *data)))(flat))


def quadratic(w, d):
    return 0.5 * jnp.sum(d * w * w)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 20]))
def test_quadratic_with_known_spectrum(seed, p):
    d = np.random.default_rng(seed).uniform(-3, 3, p)
    result = hessian_extremes(quadratic, jnp.ones(p), d)
    # The Krylov space is the whole space (p <= 24), so only rounding is left.
    assert result.least == pytest.approx(d.min(), abs=1e-9)
    assert result.largest == pytest.approx(d.max(), abs=1e-9)
    assert result.converged


@pytest.mark.parametrize("num_matvecs", [12, 40])
def test_dense_hessian_of_a_network(num_matvecs):
    params, x, y = problem()
    h = dense_hessian(mean_loss, params, x, y)
    values = np.linalg.eigvalsh(h)
    result = hessian_extremes(mean_loss, params, x, y, num_matvecs=num_matvecs, tolerance=1e-7)
    assert result.converged
    # An eigenvalue lies within the residual of each Ritz value; the outer ones are isolated here. 1e-12: rounding.
    for value, residual, truth in (
        (result.least, result.least_residual, values[0]),
        (result.largest, result.largest_residual, values[-1]),
    ):
        assert abs(value - truth) <= residual + 1e-12 * values[-1]
        assert residual <= 1e-7 * values[-1]
    # Ritz values lie inside the spectrum.
    assert result.least >= values[0] - 1e-12 * values[-1]
    assert result.largest <= values[-1] * (1 + 1e-12)
    assert isinstance(result.least, float)


def test_residuals_are_those_of_the_returned_vectors():
    params, x, y = problem()
    h = dense_hessian(mean_loss, params, x, y)
    result = hessian_extremes(mean_loss, params, x, y, num_matvecs=6, max_matvecs=6)
    assert not result.converged
    for value, residual, vector in (
        (result.least, result.least_residual, result.least_vector),
        (result.largest, result.largest_residual, result.largest_vector),
    ):
        assert np.linalg.norm(vector) == pytest.approx(1.0, abs=1e-12)
        # Both sides are computed to rounding of ‖H‖; the residuals here are 1e-3 and more of it.
        assert np.linalg.norm(h @ vector - value * vector) == pytest.approx(residual, rel=1e-6, abs=1e-12)


def test_unconverged_values_flatter_and_say_so():
    params, x, y = problem()
    values = np.linalg.eigvalsh(dense_hessian(mean_loss, params, x, y))
    result = hessian_extremes(mean_loss, params, x, y, num_matvecs=3, max_matvecs=3)
    assert not result.converged
    assert result.num_matvecs == 3
    assert values[0] < result.least < result.largest < values[-1]


@pytest.mark.parametrize("scale", [1, 12])
def test_linear_model_has_the_gauss_newton_spectrum(scale):
    # f(w) = X w: ∇²L = Xᵀ X / s, whose largest eigenvalue is λ_max(Θ) / s with Θ = X Xᵀ; p > n makes it singular.
    n, p = 12, 20
    x = np.random.default_rng(1).standard_normal((n, p))

    def loss(w, x):
        return 0.5 * jnp.sum(jnp.square(x @ w - 1.0)) / scale

    result = hessian_extremes(loss, jnp.ones(p), x)
    theta = np.asarray(empirical_ntk(lambda w, x: x @ w, jnp.ones(p), x))
    assert result.largest == pytest.approx(np.linalg.eigvalsh(theta)[-1] / scale, rel=1e-10)
    assert abs(result.least) <= 1e-10 * result.largest
    assert result.converged


@pytest.mark.parametrize(
    ("reduction", "loss", "samples"), [("sum", sum_loss, 7), ("mean", mean_loss, 16), ("mean", mean_loss, 1)]
)
def test_micro_batches_do_not_change_the_result(monkeypatch, reduction, loss, samples):
    params, x, y = problem()
    whole = hessian_extremes(loss, params, x, y)
    assert whole.batch_size is None
    monkeypatch.setattr(hessian, "_batch_size", lambda *_: samples)
    parts = hessian_extremes(loss, params, x, y, reduction=reduction)
    assert parts.batch_size == samples
    # Only the order of summation differs.
    assert parts.largest == pytest.approx(whole.largest, rel=1e-12)
    assert parts.least == pytest.approx(whole.least, rel=1e-9)


def test_memory_budget_sets_the_batch():
    params, x, y = problem(n=64)
    small, medium, double, whole = (
        hessian._batch_size(mean_loss, params, (x, y), budget) for budget in (1, 2**13, 2**14, 2**40)
    )
    assert small == 1
    assert whole is None
    assert medium is not None
    assert double is not None
    assert 1 < medium < double < 64
    # Hidden values and outputs with tangent, cotangent and its tangent: at least 4 (width + c) floats a sample.
    assert 2**13 / medium >= 4 * (5 + 2) * 4
    result = hessian_extremes(mean_loss, params, x, y, reduction="mean", memory_budget=2**14)
    # The product runs in float64, so half as many samples fit.
    assert result.batch_size == pytest.approx(double / 2, abs=1)


def test_wrong_reduction_is_noticed():
    params, x, y = problem()
    with pytest.raises(ValueError, match='reduction="sum" does not describe the loss'):
        hessian_extremes(mean_loss, params, x, y, reduction="sum", memory_budget=1)


def test_float64_by_default_whatever_the_flag():
    # λ = 1 + 1e-9 needs more than float32 holds.
    d = np.array([1.0 + 1e-9, 1.0 + 2e-9])
    exact = hessian_extremes(quadratic, jnp.ones(2, jnp.float32), d)
    assert exact.largest - 1.0 == pytest.approx(2e-9, rel=1e-5)
    assert exact.largest_vector.dtype == np.float64
    coarse = hessian_extremes(quadratic, jnp.ones(2, jnp.float32), d, dtype="float32")
    assert coarse.largest_vector.dtype == np.float32
    assert coarse.largest == pytest.approx(1.0, abs=1e-6)


def test_start_from_an_earlier_result_saves_products():
    # The upper end is isolated, the lower one (1, 1.001, ...) is not, so one cycle of 8 is too short from scratch.
    d = np.r_[np.linspace(1.0, 2.0, 1000), 100.0]
    cold = hessian_extremes(quadratic, jnp.ones(1001), d, num_matvecs=8, max_matvecs=800, tolerance=1e-4)
    warm = hessian_extremes(
        quadratic, jnp.ones(1001), d * 1.001, num_matvecs=8, max_matvecs=800, tolerance=1e-4, start=cold
    )
    assert cold.converged
    assert warm.converged
    assert warm.num_matvecs < cold.num_matvecs
    assert warm.largest == pytest.approx(100.1, rel=1e-9)
    with pytest.raises(ValueError, match=r"start holds vectors of shape \(1001,\), but the operator needs \(2,\)"):
        hessian_extremes(quadratic, jnp.ones(2), jnp.ones(2), start=cold)


@pytest.mark.parametrize("value", [0.0, 1.0, -2.5])
def test_multiples_of_the_identity_end_the_iteration_early(value):
    result = hessian_extremes(quadratic, jnp.ones(40), np.full(40, value))
    assert result.least == pytest.approx(value, abs=1e-12)
    assert result.largest == pytest.approx(value, abs=1e-12)
    assert result.converged


def test_not_finite_products_are_unconverged_not_numbers():
    result = hessian_extremes(lambda w, d: quadratic(w, jnp.sqrt(d)), jnp.ones(5), np.full(5, -1.0))
    assert np.isnan(result.least)
    assert np.isnan(result.largest)
    assert not result.converged


def test_same_loss_is_traced_once():
    traces = []

    def loss(w, d):
        traces.append(1)
        return 0.5 * jnp.sum(d * w * w)

    hessian_extremes(loss, jnp.ones(3), jnp.ones(3))
    first = len(traces)
    result = hessian_extremes(loss, jnp.full(3, 2.0), jnp.array([1.0, 2.0, 5.0]))
    # The data are arguments: new values need no new program, and yet they count.
    assert len(traces) == first
    assert result.largest == pytest.approx(5.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_matvecs": 1}, "num_matvecs must be >= 2, got 1"),
        ({"num_matvecs": 9, "max_matvecs": 8}, "max_matvecs must be >= num_matvecs = 9, got 8"),
        ({"tolerance": 0.0}, "tolerance must be a finite number > 0"),
        ({"reduction": "max"}, "reduction must be one of sum, mean, got 'max'"),
        ({"memory_budget": 0}, "memory_budget must be >= 1, got 0"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        hessian_extremes(quadratic, jnp.ones(3), jnp.ones(3), **settings)


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match="floating arrays, got a leaf of dtype int"):
        hessian_extremes(quadratic, jnp.ones(3, int), jnp.ones(3))
    with pytest.raises(ValueError, match=r"must return a scalar, got shape \(3,\)"):
        hessian_extremes(lambda w, d: w * d, jnp.ones(3), jnp.ones(3))
    with pytest.raises(ValueError, match="must share their leading axis"):
        hessian_extremes(lambda w, a, b: jnp.sum(w), jnp.ones(3), jnp.ones(3), jnp.ones(2), reduction="sum")
    with pytest.raises(ValueError, match="empty vector"):
        extreme_ritz(lambda v: v, jnp.ones(0))


def test_result_reads_its_units():
    result = hessian_extremes(quadratic, jnp.ones(2), jnp.ones(2))
    assert isinstance(result, Extremes)
    assert result.units == "loss per squared parameter"
    assert "vector" not in repr(result)


def test_kernel_products_see_both_ends_of_a_small_kernel():
    params, x, _ = problem(n=8)
    theta = np.asarray(empirical_ntk(network, params, x))
    values = np.linalg.eigvalsh(theta)
    full = ntk_extremes(network, params, x, num_matvecs=16)
    assert full.least == pytest.approx(values[0], abs=1e-12 * values[-1])
    assert full.largest == pytest.approx(values[-1], rel=1e-12)
    short = ntk_extremes(network, params, x, num_matvecs=4, max_matvecs=4)
    assert not short.converged
    assert short.least > values[0]
    assert short.largest < values[-1]


@pytest.mark.slow
def test_edge_of_stability():
    # Full-batch descent on a tanh network: the sharpness rises to 2/η and stays there, while a smaller step lets it
    # rise well past that number, so it is the step size that holds it (Cohen et al. 2021).
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((100, 6)), jnp.float32)
    y = jnp.asarray(np.sign(rng.standard_normal((100, 1))), jnp.float32)
    model = MLP(width=32, depth=4, activation="tanh")

    def loss(params, x, y):
        return 0.5 * jnp.mean(jnp.square(model.apply(params, x) - y))

    def sharpness(eta, checkpoints):
        params = model.init(jax.random.key(0), x[:1])

        @jax.jit
        def descend(params, x, y):
            def step(_, params):
                return jax.tree.map(lambda a, g: a - eta * g, params, jax.grad(loss)(params, x, y))

            return jax.lax.fori_loop(0, 500, step, params)

        values = [hessian_extremes(loss, params, x, y, tolerance=1e-4).largest]
        for _ in range(checkpoints):
            params = descend(params, x, y)
            values.append(hessian_extremes(loss, params, x, y, tolerance=1e-4).largest)
        return values

    at_edge = sharpness(0.1, 4)
    assert at_edge[0] < 0.6 * 2 / 0.1
    assert at_edge[1:] == pytest.approx([2 / 0.1] * 4, rel=0.02)
    assert sharpness(0.05, 4)[-1] > 1.3 * 2 / 0.1


def weighted(w, u, c):
    return 0.5 * jnp.sum(c * (u * w[0]) ** 2) / jnp.sum(c)


def masked(w, u, mask):
    return 0.5 * jnp.sum(mask * (u * w[0]) ** 2) / jnp.maximum(jnp.sum(mask), jnp.ones_like(jnp.sum(mask)))


def decayed(w, u, c):
    return 0.5 * jnp.sum(c * (u * w[0]) ** 2) + 0.005 * jnp.sum(w * w)


def reverse_only(w, u, c):
    @jax.custom_vjp
    def square(z):
        return z * z

    square.defvjp(lambda z: (z * z, z), lambda z, g: (2 * z * g,))
    return 0.5 * jnp.sum(c * square(u * w[0])) / jnp.sum(c)


@pytest.mark.parametrize(
    ("loss", "reduction"),
    [(weighted, "mean"), (masked, "mean"), (decayed, "sum"), (weighted, "sum"), (reverse_only, "mean")],
)
@pytest.mark.parametrize("point", [1.0, 0.0])
def test_a_reduction_that_holds_for_the_first_batches_alone_is_refused(loss, reduction, point):
    """Sorted by weight, the first batches are a plain mean each; at zero loss and slope say nothing either."""
    u, c = np.repeat([1.0, 2.0], 32), np.repeat([1.0, 9.0], 32)
    if loss is masked:
        c = np.r_[np.ones(40), np.zeros(24)]
    w = np.array([point, point])
    with pytest.raises(ValueError, match=f'reduction="{reduction}" does not describe the loss.*of all data'):
        hessian_extremes(loss, w, u, c, reduction=reduction, memory_budget=300)
    # All at once it is right: (32 + 9 · 4 · 32) / 320, 1/40 (32 + 4 · 8), and the decay beside the data's direction.
    right = {
        weighted: (0.0, 3.7),
        masked: (0.0, 1.6),
        decayed: (0.01, 32 + 9 * 4 * 32 + 0.01),
        reverse_only: (0.0, 3.7),
    }
    found = hessian_extremes(loss, w, u, c)
    assert (found.least, found.largest) == pytest.approx(right[loss], rel=1e-12, abs=1e-12)


def test_a_penalty_in_a_mean_is_repeated_rightly():
    def loss(w, u):
        return 0.5 * jnp.mean((u * w[0]) ** 2) + 0.005 * jnp.sum(w * w)

    u = np.linspace(1.0, 2.0, 64)
    found = hessian_extremes(loss, np.ones(2), u, reduction="mean", memory_budget=300)
    assert found.batch_size is not None
    assert (found.least, found.largest) == pytest.approx((0.01, np.mean(u**2) + 0.01), rel=1e-12)


def test_a_zero_hessian_has_vectors_that_do_no_harm():
    zero = hessian_extremes(lambda w, d: jnp.sum(d * w), np.ones(5), np.ones(5))
    assert (zero.least, zero.largest, zero.converged) == (0.0, 0.0, True)
    assert np.isfinite(zero.least_vector).all()
    assert np.isfinite(zero.largest_vector).all()
    d = np.array([-1.0, 2.0, 3.0, 4.0, 5.0])
    after = hessian_extremes(quadratic, np.ones(5), d, start=zero)
    assert (after.least, after.largest) == pytest.approx((-1.0, 5.0), rel=1e-12)


def test_residuals_hold_the_rounding_of_their_products():
    d = np.array([1.0, 2.0, 3.0])
    found = hessian_extremes(quadratic, np.ones(3), d)
    for value, residual, vector in (
        (found.least, found.least_residual, found.least_vector),
        (found.largest, found.largest_residual, found.largest_vector),
    ):
        true = np.linalg.norm(d * vector - value * vector)
        assert true <= residual < 1e-12


def test_leaves_that_are_no_parameters_are_carried_along():
    def loss(params, d):
        return 0.5 * params["times"] * jnp.sum(d * params["function"](params["w"]) ** 2)

    params = {"w": np.zeros(3), "times": 2, "function": jnp.sin, "none": None}
    found = hessian_extremes(loss, params, np.array([1.0, 2.0, 3.0]))
    assert (found.least, found.largest) == pytest.approx((2.0, 6.0), rel=1e-12)
    assert found.largest_vector.shape == (3,)
