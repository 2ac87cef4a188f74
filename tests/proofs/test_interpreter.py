"""Traced functions in fixed-point numbers.

On whole numbers every move, sum and product is exact in float64 as well, so JAX itself is the oracle, to the last bit.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lplr_jax.proofs import interpreter
from lplr_jax.proofs.fixed import Fixed, UndecidedError, fixed, widened

RNG = np.random.default_rng(0)


def whole(*shape):
    return RNG.integers(-9, 10, shape).astype(np.float64)


def run(function, *args, places=6):
    with jax.enable_x64(True):
        closed = jax.make_jaxpr(function)(*args)
        return interpreter.run(closed, [interpreter.value(a, places) for a in args], places)


def conv(x, w, **settings):
    numbers = settings.pop("numbers", ("NHWC", "HWIO", "NHWC"))
    given = {"window_strides": (1, 1), "padding": "SAME", **settings}
    return lax.conv_general_dilated(x, w, dimension_numbers=numbers, **given)


def pooled_gradient(x):
    return jax.grad(lambda x: (nn.max_pool(x, (2, 2), (2, 2)) * jnp.arange(1.0, 9.0).reshape(1, 2, 2, 2)).sum())(x)


def loop(x):
    def step(carry, row):
        return carry + row * carry[0], (row * carry, row.sum())

    return lax.scan(step, x[0], x, reverse=True)


EXACT = {
    "reshape, transpose, rev": (lambda x: jnp.flip(jnp.transpose(x.reshape(2, 3, 4), (2, 0, 1)), 1), whole(6, 4)),
    "slices": (lambda x: x[1:5:2, ::-1] + x[0, 1], whole(6, 4)),
    "concatenate, pad, stack": (lambda x: jnp.pad(jnp.concatenate([x, 2 * x], 1), ((1, 0), (2, 3))), whole(3, 2)),
    "tile": (lambda x: jnp.tile(x, (2, 3, 1)) - jnp.tile(x, (1, 1)).sum(), whole(2, 6)),
    "split": (lambda x: jnp.split(x, [1, 4], axis=1), whole(2, 6)),
    "sums": (lambda x: (x.sum(), x.sum(0), x.mean(1), jnp.cumsum(x, 1)), whole(3, 4)),
    "largest": (lambda x: (x.max(), x.max(1), jnp.minimum(x, 2.0), jnp.clip(x, -3, 4)), whole(5, 7)),
    "products, least": (lambda x: (x[:, :3].prod(1), x.min(0)), whole(5, 7)),
    "masks of whole numbers": (
        lambda x: jnp.where((jnp.arange(7) % 2 == 0) & ~(jnp.arange(7) > 4) | (jnp.argmax(jnp.arange(7)) > 9), x, 0.0),
        whole(5, 7),
    ),
    "where": (lambda x: jnp.where(x > 2, x, jnp.where(x == 0, 5.0, -x)), whole(5, 7)),
    "abs, sign, power": (lambda x: jnp.abs(x) * jnp.sign(x) + x**3 + jnp.square(x), whole(9)),
    "matrix products": (lambda x, y: (x @ y, jnp.einsum("ij,kj->ki", x, x)), whole(3, 5), whole(5, 4)),
    "batched products": (lambda x, y: jnp.einsum("bthe,bshe->bhts", x, y), whole(2, 3, 4, 5), whole(2, 6, 4, 5)),
    "convolution": (conv, whole(2, 6, 5, 3), whole(3, 3, 3, 4)),
    "strided": (lambda x, w: conv(x, w, window_strides=(2, 3)), whole(2, 7, 8, 3), whole(3, 2, 3, 4)),
    "dilated": (
        lambda x, w: conv(x, w, rhs_dilation=(2, 1), lhs_dilation=(1, 3), padding=((1, 2), (0, 1))),
        whole(1, 6, 5, 2),
        whole(3, 2, 2, 3),
    ),
    "cropped": (lambda x, w: conv(x, w, padding=((-1, 2), (3, -2))), whole(1, 8, 9, 2), whole(3, 3, 2, 2)),
    "grouped": (lambda x, w: conv(x, w, feature_group_count=2), whole(2, 5, 5, 4), whole(3, 3, 2, 6)),
    "batch groups": (lambda x, w: conv(x, w, batch_group_count=2), whole(4, 5, 5, 3), whole(3, 3, 3, 6)),
    "other orders": (
        lambda x, w: conv(x, w, numbers=("NCHW", "OIHW", "NHWC")),
        whole(2, 3, 6, 5),
        whole(4, 3, 3, 3),
    ),
    "of one axis": (
        lambda x, w: lax.conv_general_dilated(x, w, (2,), "VALID", dimension_numbers=("NWC", "WIO", "NWC")),
        whole(2, 9, 3),
        whole(3, 3, 2),
    ),
    "gradients of a convolution": (
        lambda x, w: jax.grad(lambda x, w: (conv(x, w, window_strides=(2, 2)) ** 2).sum(), (0, 1))(x, w),
        whole(2, 6, 6, 3),
        whole(3, 3, 3, 2),
    ),
    "gradients of a grouped convolution": (
        lambda x, w: jax.grad(lambda x, w: (conv(x, w, feature_group_count=2) ** 2).sum(), (0, 1))(x, w),
        whole(2, 4, 4, 4),
        whole(3, 3, 2, 4),
    ),
    "average pool": (
        lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 2, 2, 1), (1, 2, 2, 1), "SAME"),
        whole(1, 4, 4, 2),
    ),
    "maximum pool": (lambda x: nn.max_pool(x, (3, 2), (2, 1), "SAME"), whole(2, 6, 5, 3)),
    "gradient of a maximum pool, ties": (pooled_gradient, np.sign(whole(1, 4, 4, 2))),
    "embedding": (lambda t: jax.grad(lambda t: (t[jnp.array([2, 0, 2])] ** 2).sum())(t), whole(4, 3)),
    "gather and scatter": (lambda x: jnp.asarray(x).at[jnp.array([1, 1, 3])].add(x[:3]).at[0].set(7.0), whole(5, 2)),
    "dynamic slices": (
        lambda x: lax.dynamic_update_slice(x, lax.dynamic_slice(x, (1, 2), (2, 2)), (3, 0)),
        whole(5, 4),
    ),
    "loop": (loop, np.sign(whole(4, 3))),
    "gradient of a loop": (
        lambda x: jax.grad(lambda x: loop(x)[1][1].sum() + loop(x)[0].sum())(x),
        np.sign(whole(4, 3)),
    ),
    "branches": (lambda x: lax.cond(jnp.arange(3)[1] > 0, lambda x: x * 2, lambda x: x, x), whole(4)),
    "remat, jit": (lambda x: jax.grad(lambda x: jax.checkpoint(jax.jit(lambda x: (x**3).sum()))(x))(x), whole(4)),
    "relu": (lambda x: (jax.nn.relu(x), jax.vmap(jax.grad(jax.nn.relu))(x)), whole(12)),
    "leaky": (lambda x: jax.vmap(jax.grad(lambda x: jax.nn.leaky_relu(x, 0.25)))(x), whole(12)),
}


@pytest.mark.parametrize("name", EXACT)
def test_whole_numbers_are_exact(name):
    function, *args = EXACT[name]
    found = run(function, *args)
    with jax.enable_x64(True):
        truth = jax.tree.leaves(function(*args))
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert isinstance(one, Fixed)
        assert one.shape == other.shape
        if name == "sums":  # a mean of four divides: exact in float64, within its radius here
            assert (np.abs(one.mid - np.asarray(other)) <= one.error + 1e-300).all()
        else:
            np.testing.assert_array_equal(one.mid, np.asarray(other))
            assert one.error.max(initial=0.0) < 1e-30


BARE = {"use_bias": False, "use_scale": False, "use_fast_variance": False, "force_float32_reductions": False}

SMOOTH = {
    "layer norm": lambda x: nn.LayerNorm(**BARE).apply({}, x),
    "fast layer norm": lambda x: nn.LayerNorm(**{**BARE, "use_fast_variance": True}).apply({}, x),
    "rms norm": lambda x: nn.RMSNorm(use_scale=False, force_float32_reductions=False).apply({}, x),
    "group norm": lambda x: nn.GroupNorm(2, **BARE).apply({}, x),
    "softmax": lambda x: jax.nn.softmax(x),
    "masked softmax": lambda x: jax.nn.softmax(jnp.where(jnp.tri(4, 6, dtype=bool), x, -jnp.inf)),
    "log softmax": lambda x: jax.nn.log_softmax(x),
    "gelu": lambda x: jax.nn.gelu(x, approximate=False) + jax.nn.gelu(x),
    "silu, softplus": lambda x: jax.nn.silu(x) + jax.nn.softplus(x) + jax.nn.mish(x),
    "elu, selu": lambda x: jax.nn.elu(x) - jax.nn.selu(x),
    "sigmoid, tanh": lambda x: jax.nn.sigmoid(x) * jnp.tanh(x),
    "hyperbolic, powers of 2": lambda x: jnp.sinh(x) - jnp.cosh(x) + jnp.exp2(x) + jnp.tan(x / 4),
    "logsumexp": lambda x: x * jax.nn.logsumexp(x),
    "largest of each": lambda x: x.max(axis=1, keepdims=True) * x.max(axis=0, keepdims=True) * jnp.max(x),
    "sines": lambda x: jnp.sin(3 * x) + jnp.cos(x**2),
    "powers": lambda x: jnp.abs(x) ** 1.5 + 1 / (1 + x**2) + jnp.sqrt(1 + x**2),
}


@pytest.mark.parametrize("name", SMOOTH)
def test_functions_and_their_gradients_agree_with_float64(name):
    function, x, weight = SMOOTH[name], RNG.normal(size=(4, 6)), RNG.normal(size=(4, 6))

    def both(x):
        return jax.value_and_grad(lambda x: (function(x) * weight).sum())(x)

    found = run(both, x)
    with jax.enable_x64(True):
        truth = jax.tree.leaves(both(x))
    for one, other in zip(found, truth, strict=True):
        # float64's own rounding of some hundred operations on numbers of order one
        np.testing.assert_allclose(one.mid, np.asarray(other), rtol=1e-12, atol=1e-12)
        assert one.error.max() < 1e-20


UNDECIDED = {
    "sort has no rule": lambda x: jnp.sort(x),
    "kink or a jump": lambda x: jnp.where(x > 1.0, x, 0.0),
    "divisor may be zero": lambda x: 1.0 / (x - 1.0),
    "not float64": lambda x: x.astype(jnp.float32) * 2.0,
    "becomes a whole number": lambda x: x.astype(jnp.int32),
    "largest of several numbers is not certain": lambda x: jax.grad(lambda x: jnp.max(x))(x),
    "largest of a window is not certain": lambda x: jax.grad(lambda x: nn.max_pool(x[None, :, None], (2,)).sum())(x),
}


@pytest.mark.parametrize("text", UNDECIDED)
def test_what_may_come_out_either_way_is_undecided(text):
    x = np.ones(4)
    with jax.enable_x64(True):
        closed = jax.make_jaxpr(UNDECIDED[text])(x)
    with pytest.raises(UndecidedError, match=text):
        interpreter.run(closed, [widened(fixed(x, 6), np.full(4, 1e-9))], 6)


def kept_at(x, fill):
    """An entry within the array and one beyond it, read by an index that only the program knows."""
    return x.at[jnp.array([1, 9])].get(mode="fill", fill_value=fill)


MASK = jnp.array([True, False, True, False])


# Not one of these is what it was taken for, digit by digit or without regard to what is only known to be far below.
REFUSED = {
    "gather reads beyond an array": lambda x: kept_at(x, 5.0),
    "gather takes a number that is not finite": lambda x: jnp.array([jnp.inf, 3.0])[jnp.array([1])] * x,
    "dynamic_slice takes a number": lambda x: lax.dynamic_slice(jnp.array([jnp.inf, 3.0]), (1,), (1,)) * x,
    "dynamic_update_slice takes a number": lambda x: lax.dynamic_update_slice(jnp.array([jnp.inf, 3.0]), x[:1], (0,)),
    "scatter takes a number": lambda x: jnp.array([jnp.nan, 3.0]).at[jnp.array([0])].set(x[0]),
    "masks something out is used as a number": lambda x: jnp.isfinite(jnp.where(MASK, -jnp.inf, x)),
    "a number that masks something out": lambda x: jnp.cumsum(jnp.where(MASK, -1e30, x)),
    "a large number is added": lambda x: jnp.where(MASK, -1e26, x) + 1e26 * x,
}


@pytest.mark.parametrize("text", REFUSED)
def test_what_no_digit_tells_is_refused(text):
    with pytest.raises(UndecidedError, match=text):
        run(REFUSED[text], np.arange(1.0, 5.0))


def test_what_is_masked_out_of_a_window_gets_no_gradient():
    def gradient(x):
        def pooled(x):
            h = jnp.where(MASK, -jnp.inf, x)
            return lax.reduce_window(h, -jnp.inf, lax.max, (2,), (2,), "VALID").sum()

        return jax.grad(pooled)(x)

    (found,) = run(gradient, np.array([-7.0, -3.0, -2.0, -6.0]))
    np.testing.assert_array_equal(found.mid, [0.0, 1.0, 0.0, 1.0])


EMPTY = {
    "convolution": lambda x: conv(x.reshape(1, 2, 2, 1), jnp.ones((3, 3, 1, 2)), padding="VALID").sum() + x,
    "gradient of a convolution": lambda x: jax.grad(
        lambda x: conv(x.reshape(1, 2, 2, 1), jnp.ones((3, 3, 1, 2)), padding="VALID").sum() + (x**2).sum()
    )(x),
    "product": lambda x: jnp.zeros((2, 0)) @ jnp.ones((0, 4)) * x[None] + x[None],
    "maximum pool": lambda x: lax.reduce_window(x, -jnp.inf, lax.max, (5,), (1,), "VALID").sum() + x,
}


@pytest.mark.parametrize("name", EMPTY)
def test_what_has_no_entries_adds_nothing(name):
    x = np.arange(1.0, 5.0)
    (found,) = run(EMPTY[name], x)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(found.mid, np.asarray(EMPTY[name](x)))


def test_keys_of_random_numbers_give_whole_numbers():
    """What draws no float is known exactly: a permutation of features with a fixed key."""

    def function(x):
        return x[:, jax.random.permutation(jax.random.key(3), 4)] * 2.0

    x = whole(3, 4)
    (found,) = run(function, x)
    with jax.enable_x64(True):
        np.testing.assert_array_equal(found.mid, np.asarray(function(x)))


def test_a_whole_number_that_a_narrow_float_does_not_hold_is_refused():
    function = lambda x: x * (jnp.arange(2) + 2**24).astype(jnp.float32).astype(x.dtype)  # noqa: E731
    with pytest.raises(UndecidedError, match="becomes a float that does not hold it"):
        run(function, np.ones(2))
    (found,) = run(lambda x: x * (jnp.arange(2) * 0 + 2**24).astype(jnp.float32).astype(x.dtype), np.ones(2))
    assert found.mid.tolist() == [2.0**24] * 2
