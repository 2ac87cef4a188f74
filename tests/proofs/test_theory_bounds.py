"""Bounds and estimates of L_Θ: the proved upper bound above every sampled ratio, the search below the truth, R*."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax.measurement import closing
from lplr_jax.measurement.closing import pair_distances
from lplr_jax.measurement.gradients import flat_parameters
from lplr_jax.measurement.kernel import max_eig_upper
from lplr_jax.measurement.search import pair_shifts, search_ball
from lplr_jax.models import MLP
from lplr_jax.proofs.affine import is_affine
from lplr_jax.proofs.ball import SMOOTH, anchor, certified_radius
from lplr_jax.proofs.rounding import ACTIVATIONS


def flat_problem(activation, c, depth=3, seed=0, n=5, width=6):
    """A small network, its parameters as one float64 vector, and functions of the vector; NumPy in and out."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, 4))
    model = MLP(width=width, depth=depth, activation=activation, outputs=c)
    with jax.enable_x64(True):
        params = jax.tree.map(
            lambda leaf: jnp.asarray(leaf, "float64"), model.init(jax.random.key(seed), x.astype(np.float32))
        )
        flat, unravel = jax.flatten_util.ravel_pytree(params)
    return model, x, np.asarray(flat), unravel, rng


def jacobian_of(model, x, unravel):
    outputs = jax.jit(jax.jacrev(lambda theta: model.apply(unravel(theta), x).reshape(-1)))

    def evaluate(theta):
        with jax.enable_x64(True):
            return np.asarray(outputs(jnp.asarray(theta)))

    return evaluate


def anchored(model, x, params, jacobian, residual=1.0, s=1.0):
    return anchor(
        model.apply,
        params,
        x,
        max_eig_upper=float(np.linalg.norm(jacobian, 2) ** 2),
        residual_norm=residual,
        loss_scale=s,
    )


CASES = [("softplus", 1, 3), ("softplus", 2, 2), ("tanh", 3, 4)]


@pytest.mark.parametrize(("activation", "c", "depth"), CASES)
def test_no_sampled_ratio_exceeds_the_upper_bound(activation, c, depth):
    model, x, flat, unravel, rng = flat_problem(activation, c, depth)
    jacobian = jacobian_of(model, x, unravel)
    with jax.enable_x64(True):
        base = anchored(model, x, unravel(jnp.asarray(flat)), jacobian(flat))
    assert base is not None
    tightest = math.inf
    for radius in (1e-3, 0.1, 1.0, 10.0):
        bounds = base.on_ball(radius)
        for _ in range(40):
            ends = []
            for _ in range(2):
                v = rng.standard_normal(flat.size)
                ends.append(flat + radius * rng.uniform() ** 0.2 * v / np.linalg.norm(v))
            # Near pairs too: they see the derivative.
            if rng.uniform() < 0.5:
                ends[1] = ends[0] + 1e-3 * (ends[1] - ends[0])
            one, two = (jacobian(end) for end in ends)
            apart = np.linalg.norm(ends[0] - ends[1])
            assert np.linalg.norm(one, 2) <= bounds.jacobian
            assert np.linalg.norm(one - two, 2) / apart <= bounds.jacobian_lipschitz
            ratio = np.linalg.norm(one @ one.T - two @ two.T, 2) / apart
            assert ratio <= bounds.lipschitz
            tightest = min(tightest, bounds.lipschitz / ratio)
    # Random directions are far from the worst one; a bound further off than this would be of no use.
    assert tightest < 3e3


def test_worst_direction_found_stays_below_the_bound():
    model, x, flat, unravel, _ = flat_problem("tanh", 1, depth=2)
    jacobian = jacobian_of(model, x, unravel)
    with jax.enable_x64(True):
        params = unravel(jnp.asarray(flat))
        base = anchored(model, x, params, jacobian(flat))
    assert base is not None
    radius = 0.05
    found = search_ball(model.apply, params, x, radius=radius, gradient=np.ones(flat.size), error=0.0, steps=6)
    bound = base.on_ball(radius).lipschitz
    assert max(found.random, found.gradient, found.power) <= bound
    assert found.power >= 0.999 * found.random
    # On so small a net the worst direction comes within two orders of the bound.
    assert bound / found.power < 100


def test_no_hessian_exceeds_the_smoothness_bound():
    model, x, flat, unravel, rng = flat_problem("softplus", 1, depth=2)
    jacobian, y, s = jacobian_of(model, x, unravel), rng.standard_normal((5, 1)), 5.0

    def loss(theta):
        return 0.5 * jnp.sum(jnp.square(model.apply(unravel(theta), x) - y)) / s

    second = jax.jit(jax.hessian(loss))
    with jax.enable_x64(True):
        params = unravel(jnp.asarray(flat))
        residual = float(jnp.linalg.norm(model.apply(params, x) - y))
        base = anchored(model, x, params, jacobian(flat), residual=residual, s=s)
        assert base is not None
        for radius in (0.01, 1.0):
            for _ in range(5):
                v = rng.standard_normal(flat.size)
                theta = flat + radius * v / np.linalg.norm(v)
                hessian = np.asarray(second(jnp.asarray(theta)))
                assert np.linalg.eigvalsh(hessian)[-1] <= base.on_ball(radius).smoothness


def test_two_layer_linear_network_against_its_closed_form():
    """f = x W w without biases: Θ = ‖w‖² XXᵀ + XW(XW)ᵀ, and DΘ[(V, v)] follows by hand."""
    rng = np.random.default_rng(3)
    x, W, w = rng.standard_normal((4, 3)), rng.standard_normal((3, 5)), rng.standard_normal((5, 1))

    def apply_fn(params, inputs):
        return (inputs @ params["a"]) @ params["b"]

    theta = float(np.sum(w * w)) * x @ x.T + x @ W @ (x @ W).T
    with jax.enable_x64(True):
        params = {"a": jnp.asarray(W), "b": jnp.asarray(w)}
        largest = float(np.linalg.eigvalsh(theta)[-1]) * (1 + 1e-12)
        base = anchor(apply_fn, params, x, max_eig_upper=largest, residual_norm=1.0, loss_scale=1.0)
    assert base is not None
    assert all(layer.activation.name == "identity" for layer in base.layers)
    # The derivative along (0, w/‖w‖) is 2 ‖w‖ XXᵀ, a lower bound of L_Θ on every ball.
    truth = 2 * np.linalg.norm(w) * np.linalg.norm(x @ x.T, 2)
    assert truth <= base.on_ball(0.0).lipschitz <= 20 * truth
    assert not is_affine(apply_fn, params, x)


@pytest.mark.parametrize(
    ("sigma", "slope", "bend", "centre"),
    [
        (jax.nn.softplus, lambda z: 1 / (1 + np.exp(-z)), lambda z: 0.25 / np.cosh(z / 2) ** 2, 0.0),
        (jnp.tanh, lambda z: np.cosh(z) ** -2.0, lambda z: -2 * np.tanh(z) / np.cosh(z) ** 2, 0.66),
    ],
    ids=["softplus", "tanh"],
)
@pytest.mark.parametrize("radius", [0.0, 0.5, 2.0])
def test_one_neuron_against_its_hessian_on_a_grid(sigma, slope, bend, centre, radius):
    """f = b σ(a x): J is (b σ' x, σ), so DJ is [[b σ'' x², σ' x], [σ' x, 0]], at every point of a disc."""
    x, a, b = 1.5, centre / 1.5, 20.0
    with jax.enable_x64(True):
        params = {"a": jnp.asarray([[a]]), "b": jnp.asarray([[b]])}

        def apply_fn(q, inputs):
            return sigma(inputs @ q["a"]) @ q["b"]

        gradient = jax.grad(lambda q: apply_fn(q, jnp.asarray([[x]]))[0, 0])(params)
        size = sum(float(jnp.sum(leaf**2)) for leaf in jax.tree.leaves(gradient))
        base = anchor(apply_fn, params, np.asarray([[x]]), max_eig_upper=size, residual_norm=1.0, loss_scale=1.0)
    assert base is not None
    angle, length = np.meshgrid(np.linspace(0, 2 * np.pi, 73), np.linspace(0, radius, 21))
    at, bt = a + length * np.cos(angle), b + length * np.sin(angle)
    top, side = bt * bend(at * x) * x**2, slope(at * x) * x
    truth = np.max(np.abs(top) / 2 + np.sqrt(top**2 / 4 + side**2))
    # One neuron leaves little to lose: |σ'| <= 1 and the radius counted once for each layer.
    assert truth <= base.on_ball(radius).jacobian_lipschitz <= 1.5 * truth


def test_chain_of_scalars_around_zero():
    """f = x w_1 ... w_5 at w = 0: the bound has the radius alone; D²f at w = R/√5 has the eigenvalue 4 (R/√5)³ x."""
    x, radius = 1.5, 2.0
    with jax.enable_x64(True):
        weights = [jnp.zeros((1, 1)) for _ in range(5)]

        def apply_fn(q, inputs):
            for weight in q:
                inputs = inputs @ weight
            return inputs

        base = anchor(apply_fn, weights, np.asarray([[x]]), max_eig_upper=0.0, residual_norm=1.0, loss_scale=1.0)
    assert base is not None
    truth = 4 * (radius / math.sqrt(5)) ** 3 * x
    # The bound lets every layer use up the whole radius: (√5)³ too much, and a little for the sums.
    assert truth <= base.on_ball(radius).jacobian_lipschitz <= 20 * truth
    assert base.on_ball(0.0).jacobian_lipschitz <= 1e-100


@given(radii=st.lists(st.floats(0.0, 1e6), min_size=2, max_size=2), seed=st.integers(0, 3))
def test_bounds_grow_with_the_radius(radii, seed):
    base = small_anchor(seed)
    low, high = (base.on_ball(radius) for radius in sorted(radii))
    for name in ("jacobian", "jacobian_lipschitz", "lipschitz", "smoothness"):
        assert getattr(low, name) <= getattr(high, name)


_ANCHORS = {}


def small_anchor(seed):
    if seed not in _ANCHORS:
        model, x, flat, unravel, _ = flat_problem("softplus", 1, seed=seed)
        with jax.enable_x64(True):
            _ANCHORS[seed] = anchored(model, x, unravel(jnp.asarray(flat)), jacobian_of(model, x, unravel)(flat))
    return _ANCHORS[seed]


@given(budget=st.floats(1e-12, 1e12))
def test_certified_radius_is_the_root_from_below(budget):
    base = small_anchor(0)
    radius = certified_radius(base, budget)
    assert radius > 0
    assert base.on_ball(radius).lipschitz * radius < budget
    # R* is bisected to 1e-4, the inflation is 1e-6, the growth of L_Θ(R) R at least linear.
    outside = radius * (1 + 2e-4)
    assert base.on_ball(outside).lipschitz * outside > budget


def test_radius_without_a_budget_and_without_a_slope():
    base = small_anchor(0)
    assert certified_radius(base, 0.0) == 0.0
    assert certified_radius(base, -1.0) == 0.0
    with jax.enable_x64(True):
        w = jnp.ones((2, 1))
        linear = anchor(lambda w, x: x @ w, w, np.eye(2), max_eig_upper=1.0, residual_norm=1.0, loss_scale=1.0)
    assert linear is not None
    assert linear.on_ball(5.0).lipschitz == 0.0
    # β = λ_max / s, up to the inflation.
    assert linear.on_ball(5.0).smoothness == pytest.approx(1.0, rel=1e-5)
    assert certified_radius(linear, 1e-9) == math.inf


def test_networks_without_a_bound():
    x = np.ones((3, 4))
    for model in (MLP(width=4, depth=3, activation="relu"),):
        params = model.init(jax.random.key(0), x.astype(np.float32))
        assert anchor(model.apply, params, x, max_eig_upper=1.0, residual_norm=1.0, loss_scale=1.0) is None
    with pytest.raises(ValueError, match="radius must be >= 0, got -1"):
        small_anchor(0).on_ball(-1.0)


def test_upper_bound_of_the_largest_eigenvalue():
    rng = np.random.default_rng(0)
    for n in (3, 40):
        q, _ = np.linalg.qr(rng.standard_normal((n, n)))
        values = np.geomspace(1e-6, 5.0, n)
        theta = (q * values) @ q.T
        theta = (theta + theta.T) / 2
        bound = max_eig_upper(theta, 0.25)
        # A tenth of a per cent of room for the test, and the error on top.
        assert 5.25 - 1e-9 <= bound <= 5.25 + 0.01
    assert math.isnan(max_eig_upper(np.eye(2), math.nan))


def test_pair_shifts_are_spectral_norms():
    rng = np.random.default_rng(1)
    kernels = [a @ a.T for a in rng.standard_normal((5, 12, 20))]
    shifts = pair_shifts(kernels)
    for i in range(5):
        for j in range(5):
            # Twelve steps exhaust a space of twelve dimensions.
            assert shifts[i, j] == pytest.approx(np.linalg.norm(kernels[i] - kernels[j], 2), rel=1e-8, abs=1e-12)
    assert pair_shifts([np.eye(3)] * 3).tolist() == np.zeros((3, 3)).tolist()
    assert pair_shifts([np.eye(3)]).tolist() == [[0.0]]


def test_pair_shifts_of_large_kernels_stay_below_and_come_near():
    rng = np.random.default_rng(2)
    base = rng.standard_normal((150, 150))
    kernels = [base @ base.T + scale * np.outer(base[0], base[0]) for scale in (0.0, 1.0, 3.0)]
    shifts = pair_shifts(kernels)
    for i, j, scale in ((0, 1, 1.0), (0, 2, 3.0), (1, 2, 2.0)):
        truth = scale * float(base[0] @ base[0])
        assert truth * (1 - 1e-9) <= shifts[i, j] <= truth * (1 + 1e-9)


def test_pair_distances_are_those_of_whole_vectors(monkeypatch):
    monkeypatch.setattr(closing, "_COLUMNS", 7)  # several blocks a leaf, the last one short
    rng = np.random.default_rng(3)
    base = {"w": rng.standard_normal((5, 9)).astype(np.float32), "b": np.float32(2.0)}
    # The last pair is so close that squares of norms would not tell the two apart.
    moves = (0.0, 1.0, 1e-6)
    points = [jax.tree.map(lambda leaf, by=by: np.asarray(leaf + np.float32(by)), base) for by in moves]
    found = pair_distances(points)
    for i, one in enumerate(points):
        for j, two in enumerate(points):
            assert found[i, j] == pytest.approx(np.linalg.norm(flat_parameters(one) - flat_parameters(two)), rel=1e-13)
    assert 0 < found[0, 2] < 2e-5
    assert pair_distances(points[:1]).tolist() == [[0.0]]


def test_search_finds_the_end_of_a_parabola():
    """f = w²/2 for one sample: Θ = w², and the ratio of a pair is |a + b|, at most 2 (w_0 + R) in the ball."""
    with jax.enable_x64(True):
        w = jnp.asarray([[1.5]])
        found = search_ball(
            lambda w, x: 0.5 * jnp.square(w) * x,
            w,
            np.ones((1, 1)),
            radius=0.5,
            gradient=np.ones(1),
            error=0.0,
            steps=6,
        )
    truth = 2 * (1.5 + 0.5)
    for value in vars(found).values():
        # The last tenth of the diameter has its middle at 0.95 R; the end piece of the iteration at 0.99 R.
        assert 0.98 * truth <= value <= truth
    with pytest.raises(ValueError, match="radius must be a finite number > 0, got 0"):
        search_ball(lambda w, x: w * x, w, np.ones((1, 1)), radius=0.0, gradient=np.ones(1), error=0.0, steps=1)


X = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(4, 3)
W, B = np.full((3, 2), 0.3, np.float32), np.full((2,), 0.1, np.float32)
AFFINE = {
    "dense": lambda p, x: x @ p[0] + p[1],
    "features": lambda p, x: jnp.tanh(x) @ p[0] - p[1],
    "moved": lambda p, x: (x @ jnp.transpose(p[0].T)).reshape(x.shape[0], 2) * 3.0 / 2.0,
    "mask": lambda p, x: jnp.where(x[:, :1] > 0, x @ p[0], jnp.zeros((1, 2), x.dtype)),
    "sum": lambda p, x: jnp.sum(x[:, :, None] * p[0], axis=1),
    "joined": lambda p, x: jnp.concatenate([x @ p[0], -jnp.broadcast_to(p[1], (x.shape[0], 2))], axis=1),
    "jitted": lambda p, x: jax.jit(lambda a, b: a @ b)(x, p[0]),
    "convolution": lambda p, x: jax.lax.conv_general_dilated(x[:, None], p[0].T[:, None], (1,), "VALID")[:, :, 0],
}
CURVED = {
    "square": lambda p, x: x @ (p[0] * p[0]),
    "product": lambda p, x: (x @ p[0]) * p[1],
    "softplus": lambda p, x: jax.nn.softplus(x @ p[0]),
    "mask": lambda p, x: jnp.where(p[1] > 0, x @ p[0], 2 * (x @ p[0])),
    "quotient": lambda p, x: (x @ p[0]) / (1 + p[1]),
    "rounded": lambda p, x: x @ p[0].astype(jnp.bfloat16).astype(x.dtype),
    "maximum": lambda p, x: jnp.max(x[:, :, None] * p[0], axis=1),
}


@pytest.mark.parametrize("name", AFFINE)
def test_affine_programs_are_recognised(name):
    jacobian = jax.jacrev(lambda p: AFFINE[name](p, X))
    with jax.numpy_rank_promotion("allow"):
        assert is_affine(AFFINE[name], (W, B), X)
        for one, two in zip(jacobian((W, B)), jacobian((W + 1, B - 2)), strict=True):
            np.testing.assert_array_equal(one, two)


@pytest.mark.parametrize("name", CURVED)
def test_other_programs_are_not(name):
    with jax.numpy_rank_promotion("allow"):
        assert not is_affine(CURVED[name], (W, B), X)


@pytest.mark.parametrize("name", SMOOTH)
def test_bounds_near_a_point_hold_on_all_of_the_interval(name):
    """Against derivatives in 30 digits on a fine grid that holds both ends and the steepest points."""
    activation = ACTIVATIONS[name]
    exact = {
        "softplus": (lambda z: 1 / (1 + mpmath.exp(-z)), lambda z: mpmath.exp(-z) / (1 + mpmath.exp(-z)) ** 2),
        "tanh": (lambda z: mpmath.sech(z) ** 2, lambda z: 2 * abs(mpmath.tanh(z)) * mpmath.sech(z) ** 2),
        "identity": (lambda z: mpmath.mpf(1), lambda z: mpmath.mpf(0)),
    }[name]
    with mpmath.workdps(30):
        for z in (-40.0, -3.0, -0.7, -0.1, 0.0, 0.5, 0.66, 2.0, 40.0):
            for reach in (0.0, 1e-9, 0.2, 1.0, 50.0):
                grid = [
                    *np.linspace(z - reach, z + reach, 201),
                    *(t for t in (-0.6584789, 0.0, 0.6584789) if abs(t - z) <= reach),
                ]
                for near, derivative in zip((activation.slope_near, activation.bend_near), exact, strict=True):
                    bound = float(near(np.array([[z]]), np.array([[reach]]))[0, 0])
                    truth = max(derivative(mpmath.mpf(float(t))) for t in grid)
                    # The grid is fine enough for one part in a thousand; 64 u is what rounding is allowed.
                    assert truth <= bound <= truth * (1 + 1e-3) + 1e-14, (z, reach)
