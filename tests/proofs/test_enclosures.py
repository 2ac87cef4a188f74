"""What a proof may take for granted: types, rules, ranges, and errors of what it is given."""

import math

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest

from lplr_jax import diagnostics
from lplr_jax.curves.pairs import proof_radius
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs.affine import is_affine
from lplr_jax.proofs.assembly import assembly_bound, dense_network
from lplr_jax.proofs.ball import anchor

RNG = np.random.default_rng(0)
X, W, V = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 5)), RNG.normal(size=(5, 1))


def product(preferred, precision=None):
    def apply_fn(params, x):
        out = jax.lax.dot_general(
            x, params, (((1,), (0,)), ((), ())), preferred_element_type=preferred, precision=precision
        )
        return out.astype(x.dtype)

    return apply_fn


def test_a_product_that_rounds_is_not_affine():
    assert is_affine(product(jnp.float64), W, X)
    assert is_affine(product(None), W, X)
    assert not is_affine(product(jnp.float32), W, X)
    assert not is_affine(product(jnp.bfloat16), W, X)


def test_other_roundings_are_not_affine():
    assert not is_affine(lambda w, x: x @ jax.lax.reduce_precision(w, 8, 10), W, X)
    assert not is_affine(product(None, jax.lax.DotAlgorithmPreset.BF16_BF16_F32), W, X)
    # float16 and bfloat16 have as many bits, and neither holds the numbers of the other.
    assert not is_affine(lambda w, x: x @ w.astype("float16").astype(x.dtype), W, X)
    assert is_affine(lambda w, x: x.astype("float32").astype("float64") @ w, W, X)


def network(first, activation=jnp.tanh):
    return lambda params, x: activation(first(params[0], x)) @ params[1]


@pytest.mark.parametrize(
    ("apply_fn", "proved"),
    [
        (network(product(None)), True),
        (network(product(jnp.float32)), False),
        (network(lambda w, x: x @ jax.lax.reduce_precision(w, 8, 10)), False),
    ],
)
def test_layers_that_round_have_no_assembly_bound(apply_fn, proved):
    assert diagnostics.empirical_ntk_min_eig(apply_fn, [W, V], X).proved is proved


def custom_relu(slope):
    @jax.custom_jvp
    def relu(z):
        return jax.nn.relu(z)

    @relu.defjvp
    def rule(primals, tangents):
        return relu(*primals), slope * tangents[0] * (primals[0] > 0).astype(primals[0].dtype)

    return relu


def wrapped_relu():
    """A rule of the user's on a function of JAX's."""
    relu = jax.custom_jvp(jax.nn.relu)
    relu.defjvps(lambda g, ans, z: 3 * g * (z > 0).astype(g.dtype))
    return relu


@pytest.mark.parametrize("relu", [custom_relu(3.0), wrapped_relu()])
def test_the_rule_is_part_of_an_activation(relu):
    apply_fn = network(lambda w, x: x @ w, relu)
    theta = np.asarray(empirical_ntk(apply_fn, [W, V], X))
    plain = np.asarray(empirical_ntk(network(lambda w, x: x @ w, jax.nn.relu), [W, V], X))
    assert np.abs(theta - plain).max() > 0.1
    assert assembly_bound(apply_fn, [W, V], X, theta, proof="never") is None
    # Where it is evaluated instead of recognised, its own rule is.
    other = assembly_bound(apply_fn, [W, V], X, plain)
    assert other.assembly_error > 0.1
    assert assembly_bound(apply_fn, [W, V], X, theta).assembly_error < 1e-10
    assert assembly_bound(network(lambda w, x: x @ w, jax.nn.relu), [W, V], X, plain) is not None
    # Written for one sample, it is the same activation.
    single = jax.vmap(network(lambda w, x: x @ w, jax.nn.relu), in_axes=(None, 0))
    assert assembly_bound(single, [W, V], X, plain) is not None


@pytest.mark.parametrize("scale", [1e70, 1e78, 1e100, 1e150])
def test_what_overflows_has_no_bound(scale):
    least = diagnostics.empirical_ntk_min_eig(lambda w, x: x @ w, np.ones((3, 2)), X[:1] * scale)
    exact = float(mpmath.fsum(mpmath.mpf(v) ** 2 for v in X[0] * scale))
    assert least.value == pytest.approx(exact, rel=1e-12)
    if least.proved:
        assert least.lower <= exact <= least.upper


def test_the_anchor_holds_the_exact_residual():
    """Outputs of 1e8 that nearly cancel the targets: their rounding is far above 1e-6 of the residual."""
    weights = [RNG.normal(size=(3, 40)) * 30, RNG.normal(size=(40, 1)) * 1e7]

    def apply_fn(params, x):
        return jax.nn.softplus(x @ params[0]) @ params[1]

    with mpmath.workdps(60):
        z = mpmath.matrix(X.tolist()) * mpmath.matrix(weights[0].tolist())
        hidden = z.apply(lambda v: mpmath.log1p(mpmath.exp(v)))
        exact = hidden * mpmath.matrix(weights[1].tolist())
        y = np.array([[float(value)] for value in exact])
        residual = float(mpmath.norm(exact - mpmath.matrix(y.tolist())))
        with jax.enable_x64(True):
            computed = np.asarray(apply_fn([jnp.asarray(w) for w in weights], jnp.asarray(X)))
        error = float(mpmath.norm(exact - mpmath.matrix(computed.tolist())))
    bound = float(np.linalg.norm(dense_network(apply_fn, weights, X).output_error))
    assert error <= bound < 1e6 * error + 1e-3
    given = float(np.linalg.norm(computed - y))
    base = anchor(apply_fn, weights, X, max_eig_upper=1.0, residual_norm=given, loss_scale=1.0)
    assert base.residual >= residual
    assert base.residual >= given + bound


@pytest.mark.parametrize("p", [10, 10**5, 10**6])
def test_the_radius_holds_float32_drifts(p):
    """Squares summed one after the other in float32, the worst order, some of them below the normal numbers."""
    for scale in (1.0, 1e-20, 1e-22):
        step = (RNG.normal(size=min(p, 10**5)) * scale).astype(np.float32)
        squares = np.square(step)
        squares[squares < np.finfo(np.float32).tiny] = 0  # flushed
        total = np.add.accumulate(squares, dtype=np.float32)[-1]
        exact = math.sqrt(math.fsum((step.astype(np.float64) ** 2).tolist()))
        assert proof_radius(np.array([np.nan, float(np.sqrt(total))]), p) >= exact


@pytest.mark.parametrize(("p", "factor"), [(100, 1 + 104 * 2**-24), (6 * 10**6, 1.8), (2**24, math.inf)])
def test_the_radius_grows_with_the_sum_behind_it(p, factor):
    """γ = k u / (1 - k u) for k = p + 4 terms; k u alone is no bound of it, and above 1/2 there is none."""
    k = p + 4
    loss = k * 2.0**-24
    need = 1 / math.sqrt(1 - loss / (1 - loss)) if loss < 0.5 else math.inf
    radius = proof_radius(np.array([1.0]), p)
    assert need <= radius <= max(factor, 1 + 1e-12) * (1 + 1e-9)
