"""Bounds on the assembly of a kernel, against the same network evaluated with fifty digits."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from lplr_jax.linalg import min_eig
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs import assembly, dense
from lplr_jax.proofs.assembly import assembly_bound, dense_network, spectral_norm_bound

U = 2.0**-53
EXACT = {
    "softplus": (lambda z: mpmath.log(1 + mpmath.exp(z)), lambda z: 1 / (1 + mpmath.exp(-z))),
    "tanh": (mpmath.tanh, lambda z: 1 - mpmath.tanh(z) ** 2),
    "relu": (lambda z: max(z, mpmath.mpf(0)), lambda z: mpmath.mpf(z > 0)),
}


def network(activation="softplus", *, n=6, d=5, width=4, depth=3, outputs=1, seed=0, gain=1.0):
    model = MLP(width=width, depth=depth, activation=activation, outputs=outputs)
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((n, d)), jnp.float32)
    params = model.init(jax.random.key(seed), x)
    params = jax.tree.map(
        lambda a: a * jnp.float32(gain) + jnp.asarray(0.1 * rng.standard_normal(a.shape), a.dtype), params
    )
    return model, params, x


def matrices(params):
    layers = params["params"]
    return [
        (np.asarray(layers[f"dense_{i}"]["kernel"]), np.asarray(layers[f"dense_{i}"]["bias"]))
        for i in range(len(layers))
    ]


def exact_factors(params, x, activation):
    """Inputs h and derivatives δ of every layer, with 50 digits, by the textbook recursion; c = 1 or more."""
    value, slope = EXACT[activation]
    layers = [tuple(mpmath.matrix(a.astype(float).tolist()) for a in (w, b[None])) for w, b in matrices(params)]
    result = []
    for row in np.asarray(x, float):
        h, inputs, pre = mpmath.matrix(row[None].tolist()), [], []
        for i, (w, b) in enumerate(layers):
            inputs.append(h)
            z = h * w + b
            pre.append(z)
            h = z.apply(value) if i + 1 < len(layers) else z
        for o in range(h.cols):
            delta = mpmath.matrix(1, h.cols)
            delta[0, o] = 1
            deltas = [delta]
            for i in reversed(range(1, len(layers))):
                g = deltas[0] * layers[i][0].T
                deltas.insert(0, mpmath.matrix([[g[0, j] * slope(pre[i - 1][0, j]) for j in range(g.cols)]]))
            result.append((inputs, deltas))
    return result


def exact_kernel(factors):
    def entry(one, two):
        (h1, d1), (h2, d2) = one, two
        return sum((mpmath.fdot(a, b) + 1) * mpmath.fdot(p, q) for a, b, p, q in zip(h1, h2, d1, d2, strict=True))

    return mpmath.matrix([[entry(one, two) for two in factors] for one in factors])


CASES = [
    ("softplus", {}),
    ("softplus", {"outputs": 2, "depth": 2}),
    ("softplus", {"gain": 8.0, "depth": 4}),
    ("tanh", {"seed": 1}),
    ("tanh", {"gain": 5.0, "outputs": 2}),
    ("relu", {"seed": 2}),
    ("relu", {"depth": 1}),
]


def cancelling(activation, *, depth=4, steep=0.0, last=1.0):
    """One input near 1e8 and first weights that take it to numbers near 1: the first sums lose 1e-8.

    Later layers then only pass that error on, so their rounding cannot hide a part that the bound forgets. `steep` is
    the norm of second weights that see nothing of the first hidden values but their error, `last` scales the last ones.
    """
    model, params, _ = network(activation, n=1, depth=depth)
    layers, rng = params["params"], np.random.default_rng(7)
    x = np.round(rng.standard_normal((1, 5)) * 1e8)
    null = np.linalg.svd(x)[2][1:].T  # (5, 4), orthogonal to the input
    first = null @ rng.standard_normal((4, 4)) + 1e-8 * rng.standard_normal((5, 4))
    hidden = getattr(jax.nn, activation)(jnp.asarray(x @ first + np.asarray(layers["dense_0"]["bias"])[None]))
    blind = np.linalg.svd(np.asarray(hidden, float))[2][1:]  # (3, 4), orthogonal to the hidden values
    layers["dense_0"]["kernel"] = first
    layers["dense_1"]["kernel"] = np.asarray(layers["dense_1"]["kernel"], float)
    if steep:
        layers["dense_1"]["kernel"] += steep * blind.T @ rng.standard_normal((3, 4))
    name = f"dense_{depth - 1}"
    layers[name]["kernel"] = last * np.asarray(layers[name]["kernel"], float)
    return model, params, x


def check_factors(model, params, x, activation, c):
    """Assert that all errors are below their bounds; return the largest ratio for each kind of row."""
    network = dense_network(model.apply, params, x)
    assert network is not None
    # The error of the factors does not depend on the kernel that is compared with theirs.
    bound = assembly_bound(model.apply, params, x, np.zeros((len(x) * c, len(x) * c)))
    assert bound is not None
    ratios = {"h": 0.0, "delta": 0.0, "factor": 0.0}
    with mpmath.workdps(50):
        exact = exact_factors(params, x, activation)
        total = mpmath.mpf(0)
        for at, part in enumerate(network.factors):
            for row, (inputs, deltas) in enumerate(exact):
                h, delta = (mpmath.matrix(a.tolist()).T for a in (part.h[row // c], part.delta[row]))
                for kind, error, limit in (
                    ("h", mpmath.norm(h - inputs[at]), part.h_error[row // c]),
                    ("delta", mpmath.norm(delta - deltas[at]), part.delta_error[row]),
                ):
                    assert error <= limit
                    ratios[kind] = max(ratios[kind], float(error / limit) if limit > 1e-100 else 0.0)
                total += sum(
                    (p * q - r * s) ** 2
                    for p, r in zip([*h, 1], [*inputs[at], 1], strict=True)
                    for q, s in zip(delta, deltas[at], strict=True)
                )
        assert mpmath.sqrt(total) <= bound.factor_error
        ratios["factor"] = float(mpmath.sqrt(total) / bound.factor_error) if bound.factor_error > 1e-100 else 0.0
    return ratios


@pytest.mark.parametrize(("activation", "shape"), CASES)
def test_row_errors_stay_below_their_bounds(activation, shape):
    model, params, x = network(activation, **shape)
    ratios = check_factors(model, params, x, activation, shape.get("outputs", 1))
    # The bounds are not vacuous; one affine layer is exact but for its unused output.
    assert max(ratios.values()) > 1 / 500 or shape == {"depth": 1}


@pytest.mark.parametrize(
    ("activation", "shape"),
    [("softplus", {}), ("tanh", {}), ("softplus", {"steep": 300.0}), ("relu", {"depth": 2, "last": 1e-6})],
)
def test_errors_that_are_passed_on_stay_below_their_bounds(activation, shape):
    ratios = check_factors(*cancelling(activation, **shape), activation, 1)
    # Not vacuous: a bound that drops what it inherits from the layer before is exceeded in one of these cases.
    assert max(ratios.values()) > 1e-3


@pytest.mark.parametrize(("activation", "shape"), CASES)
def test_interval_holds_the_smallest_eigenvalue_of_the_exact_kernel(activation, shape):
    model, params, x = network(activation, **shape)
    theta = np.asarray(empirical_ntk(model.apply, params, x))
    bound = assembly_bound(model.apply, params, x, theta)
    assert bound is not None
    m = min_eig(
        theta,
        assembly_error=bound.assembly_error,
        factor_error=bound.factor_error,
        assumptions=bound.assumptions,
    )
    with mpmath.workdps(50):
        exact = exact_kernel(exact_factors(params, x, activation))
        truth = min(mpmath.eigsy(exact, eigvals_only=True))
        assert mpmath.mpf(m.lower) <= truth <= mpmath.mpf(m.upper)
        distance = mpmath.mnorm(mpmath.matrix(theta.tolist()) - exact, "f")
    # ‖Θ - K Kᵀ‖₂ <= assembly_error + 2 ‖K̂‖ factor_error + factor_error²; the Frobenius norm is at most √(n c) times it.
    factor = math.sqrt(np.trace(theta))
    both = bound.assembly_error + 2 * factor * bound.factor_error + bound.factor_error**2
    assert distance <= math.sqrt(len(theta)) * both
    assert m.proved
    assert set(assembly.ASSUMPTIONS) < set(m.assumptions)
    # Ten million roundings of the trace, even for weights eight times too large.
    assert both < 1e7 * U * np.trace(theta)


def test_a_wrong_kernel_is_charged_for_its_distance():
    model, params, x = network()
    theta = np.asarray(empirical_ntk(model.apply, params, x))
    right = assembly_bound(model.apply, params, x, theta)
    off = theta.copy()
    off[0, 0] += 1e-3
    wrong = assembly_bound(model.apply, params, x, off)
    assert right is not None
    assert wrong is not None
    assert right.assembly_error < 1e-9
    assert wrong.assembly_error == pytest.approx(1e-3, rel=1e-3)
    assert wrong.factor_error == right.factor_error


def test_a_float32_kernel_is_undecided_where_the_float64_one_is_proved():
    # Two inputs at distance 1e-4: λ_min is near 1e-8 of the trace, beyond float32.
    model, params, x = network(n=2)
    x = jnp.stack([x[0], x[0] + jnp.float32(1e-4)])

    def certified(dtype):
        theta = np.asarray(empirical_ntk(model.apply, params, x, dtype=dtype)).astype(np.float64)
        bound = assembly_bound(model.apply, params, x, theta)
        assert bound is not None
        return min_eig(theta, assembly_error=bound.assembly_error, factor_error=bound.factor_error)

    exact, coarse = certified("float64"), certified("float32")
    assert exact.sign == 1
    assert coarse.sign == 0
    assert coarse.lower <= exact.value <= coarse.upper


def test_kernel_in_blocks_gives_the_same_distance(monkeypatch):
    model, params, x = network(n=7, outputs=2)
    theta = np.asarray(empirical_ntk(model.apply, params, x)) + 1e-6 * np.eye(14)
    whole = assembly_bound(model.apply, params, x, theta)
    monkeypatch.setattr(dense, "_BLOCK_ENTRIES", 1)
    blocks = assembly_bound(model.apply, params, x, theta)
    assert whole is not None
    assert blocks is not None
    assert blocks.assembly_error == pytest.approx(whole.assembly_error, rel=1e-9)


def test_images_are_flattened_and_biases_may_be_missing():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 2)), jnp.float32)
    model = MLP(width=4, depth=2)
    params = model.init(jax.random.key(0), x)
    assert assembly_bound(model.apply, params, x, np.asarray(empirical_ntk(model.apply, params, x))) is not None

    def bare(params, x):
        return jnp.tanh(x @ params[0] + params[1][None]) @ params[2]

    params = [jnp.ones((2, 3)), jnp.arange(3.0), jnp.ones((3, 1))]
    x = x[:, 0]
    theta = np.asarray(empirical_ntk(bare, params, x))
    bound = assembly_bound(bare, params, x, theta)
    assert bound is not None
    # Were the missing bias counted, the distance would be 1 in every entry.
    assert bound.assembly_error < 1e-10


W = jnp.ones((3, 2))
B = jnp.ones(2)


@pytest.mark.parametrize(
    ("apply_fn", "params"),
    [
        (lambda p, x: jnp.sin(x @ p[0]), [W]),
        (lambda p, x: (x @ p[0]) @ p[0].T, [W]),
        (lambda p, x: x @ p[0] + x @ p[1], [W, W]),
        (lambda p, x: x @ p[0] / jnp.sqrt(3.0), [W]),
        (lambda p, x: jnp.tanh(x * p[1][None]) @ p[0], [W, jnp.ones(3)]),
        (lambda p, x: jnp.tanh(jnp.tanh(x @ p[0])), [W]),
        (lambda p, x: x @ p[0] + p[1][None] + p[2][None], [W, B, B]),
        (lambda p, x: jnp.maximum(x @ p[0], 0.5), [W]),
        (lambda p, x: x @ p[0].reshape(3, 2), [W.reshape(-1)]),
        (lambda p, x: x @ p[0].T, [W.T]),
        (lambda p, x: x @ p[0] + jnp.array([[1.0, 2.0]]), [W]),
        (lambda p, x: x @ p[0] * p[1], [W, 2]),
    ],
)
def test_programs_that_are_no_chain_of_dense_layers_have_no_factors(apply_fn, params):
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3)), jnp.float32)
    assert dense_network(apply_fn, params, x) is None


def test_relu_at_its_kink_has_no_bound():
    def apply_fn(params, x):
        return jax.nn.relu(x @ params)

    x = jnp.array([[1.0, 1.0], [1.0, 2.0]])
    theta = np.asarray(empirical_ntk(apply_fn, jnp.array([[1.0], [-0.75]]), x))
    assert assembly_bound(apply_fn, jnp.array([[1.0], [-0.75]]), x, theta) is not None
    # The first pre-activation is exactly zero.
    assert assembly_bound(apply_fn, jnp.array([[1.0], [-1.0]]), x, theta, proof="never") is None


def test_overflow_has_no_bound():
    def apply_fn(params, x):
        return jax.nn.relu(x @ params[0]) @ params[1]

    params = [np.full((2, 2), 1e200), np.full((2, 1), 1e200)]
    assert assembly_bound(apply_fn, params, np.ones((1, 2)), np.ones((1, 1))) is None


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (300, 40), (40, 500)])
def test_spectral_norm_bound_is_above_and_close(shape):
    w = np.random.default_rng(0).standard_normal(shape)
    norm = np.linalg.norm(w, 2)
    # 1 % of λ_max is to spare, half of it in the norm; a Frobenius norm would be 3.5 times too large for the wide ones.
    assert norm <= spectral_norm_bound(w) <= 1.006 * norm
    assert spectral_norm_bound(np.zeros((3, 2))) < 1e-70
    with np.errstate(over="ignore", invalid="ignore"):
        assert spectral_norm_bound(1e200 * w) == math.inf


@pytest.mark.parametrize(
    ("function", "exact", "points"),
    [
        (np.exp, mpmath.exp, -np.geomspace(1e-12, 700, 400)),
        (np.log1p, mpmath.log1p, np.geomspace(1e-18, 1, 400)),
        (np.tanh, mpmath.tanh, np.geomspace(1e-12, 30, 400)),
    ],
)
def test_elementary_functions_are_within_four_ulp(function, exact, points):
    computed = function(points)
    with mpmath.workdps(40):
        errors = [
            float(abs(mpmath.mpf(value) - exact(mpmath.mpf(point)))) / math.ulp(value)
            for value, point in zip(computed.tolist(), points.tolist(), strict=True)
        ]
    assert 0 < max(errors) <= 4


@pytest.mark.slow
@pytest.mark.parametrize(("width", "wanted"), [(128, 1e-3), (1024, 3e-3)])
def test_relative_width_on_a_thousand_digits(width, wanted):
    from lplr_jax import data

    problem = data.load("mnist")
    model = MLP(width=width)
    x = jnp.asarray(problem.x).reshape(1000, -1)
    params = model.init(jax.random.key(0), x[:1])
    theta = np.asarray(empirical_ntk(model.apply, params, x))
    bound = assembly_bound(model.apply, params, x, theta)
    assert bound is not None
    m = min_eig(theta, assembly_error=bound.assembly_error, factor_error=bound.factor_error)
    assert m.sign == 1
    assert (m.upper - m.lower) / m.value <= wanted
