"""Each rule of the kernel engine against the Jacobian, for every layout a primitive allows."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from lplr_jax.ntk import engine
from lplr_jax.ntk.rules import Positions, Side

ALL = ("full", "trace", "diagonal")
TOLERANCE = 1e-12  # the products sum at most 1e4 float64 terms: 1e4 · 1.1e-16 in the worst case


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def jacobian_kernel(apply_fn, params, x):
    """J Jᵀ from the forward-mode Jacobian of the whole batch (the engine: reverse mode, one sample)."""
    leaves = jax.tree.leaves(jax.jacfwd(lambda p: apply_fn(p, x).reshape(-1))(params))
    jacobian = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)
    return jacobian @ jacobian.T


def check(apply_fn, params, x, rules=None, outputs=("full",)):
    """The kernels asked for agree with the Jacobian, and the plan serves leaves by the rules named."""
    want = np.asarray(jax.jit(functools.partial(jacobian_kernel, apply_fn))(params, x))
    n = jax.tree.leaves(x)[0].shape[0]
    c = want.shape[0] // n
    blocks = want.reshape(n, c, n, c)
    wanted = {"full": want, "trace": np.einsum("iojo->ij", blocks), "diagonal": np.diagonal(want).reshape(n, c)}
    for name in outputs:
        got = np.asarray(engine.kernel(apply_fn, params, x, outputs=name))
        assert np.max(np.abs(got - wanted[name])) <= TOLERANCE * np.max(np.abs(wanted[name])), name
    assert np.max(np.abs(want)) > 0
    if rules is not None:
        found = {leaf.path: leaf.rule for leaf in engine.explain(apply_fn, params, x).leaves}
        for path, rule in rules.items():
            assert rule in found[path], found


def head(h, out=2):
    """A fixed nonlinear map (n, ...) -> (n, out), so that every cotangent is dense and differs between samples."""
    flat = jnp.tanh(h).reshape(h.shape[0], -1)
    mix = normal(99, flat.shape[1], out) / math.sqrt(flat.shape[1])
    return jnp.tanh(flat @ mix) if out > 1 else jnp.tanh(flat @ mix)[:, 0]


# --- products

PRODUCTS = {
    "dense": ("ni,io->no", (5, 3), (3, 4), "(h hᵀ) ∘ (δ δᵀ)"),
    "dense, weight first": ("oi,ni->no", (5, 3), (4, 3), "(h hᵀ) ∘ (δ δᵀ)"),
    "all inputs at once": ("nti,tio->no", (5, 2, 3), (2, 3, 4), "(h hᵀ) ∘ (δ δᵀ)"),
    "per position": ("nti,io->nto", (5, 6, 3), (3, 4), "per-example gradients"),
    "two positions, wide": ("nti,io->nto", (5, 2, 40), (40, 50), "pairs of positions"),
    "heads": ("ntd,dhk->nhtk", (5, 3, 6), (6, 2, 4), "matrix product"),
    "output of heads": ("nhtk,hkd->ntd", (5, 2, 3, 4), (2, 4, 6), "matrix product"),
    "batched": ("nhi,hio->nho", (5, 3, 4), (3, 4, 2), "matrix product"),
    "batched, wide": ("nhi,hio->nho", (5, 2, 40), (2, 40, 30), "pairs of positions"),
    "batched, over positions": ("nthi,hio->ohtn", (5, 2, 3, 20), (3, 20, 20), "pairs of positions"),
    "no contraction": ("ni,o->nio", (5, 3), (4,), "per-example gradients"),
    "transposed result": ("ni,io->on", (5, 3), (3, 4), "(h hᵀ) ∘ (δ δᵀ)"),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_matrix_products(name):
    spec, x_shape, w_shape, rule = PRODUCTS[name]
    out_axis = spec.split("->")[1].index("n")
    sample_first = spec.startswith("n")
    params = {"w": normal(1, *w_shape)}

    def apply_fn(p, x):
        operands = (x, p["w"]) if sample_first else (p["w"], x)
        return head(jnp.moveaxis(jnp.einsum(spec, *operands), out_axis, 0))

    check(
        apply_fn, params, normal(2, *x_shape), {"['w']": rule}, ALL if "wide" in name or name == "dense" else ("full",)
    )


def test_a_batch_of_any_length_makes_a_program_of_one_length():
    lengths = {}
    for batches in (2, 130):
        side = Side("plain", 2, (lambda env: env[0],), lambda env, deltas: deltas[0])
        term = Positions((0,), (side,), batches)
        h, delta = jax.ShapeDtypeStruct((3, batches, 2, 4), float), jax.ShapeDtypeStruct((3, batches, 2, 2, 5), float)
        features = (((h,), delta),)
        for method in (term.full, term.trace, term.diagonal):
            lengths.setdefault(method.__name__, set()).add(len(jax.make_jaxpr(method)(features, features).eqns))
    assert all(len(seen) == 1 for seen in lengths.values()), lengths


def test_many_batches():
    check(
        lambda p, x: head(jnp.einsum("nhi,hio->nho", x, p)),
        normal(1, 40, 6, 5),
        normal(2, 4, 40, 6),
        {"": "pairs of positions"},
        ALL,
    )


# --- convolutions

CONVOLUTIONS = {
    "1-d": ((9, 3), (3, 3, 4), {}),
    "1-d, same, stride 2": ((9, 3), (3, 3, 4), {"window_strides": (2,), "padding": "SAME"}),
    "1-d, causal, dilated": ((9, 3), (3, 3, 4), {"padding": [(4, 0)], "rhs_dilation": (2,)}),
    "2-d, same": ((6, 5, 2), (3, 3, 2, 4), {"padding": "SAME"}),
    "2-d, stride and uneven padding": (
        (6, 7, 2),
        (3, 2, 2, 4),
        {"window_strides": (2, 3), "padding": [(1, 0), (0, 2)]},
    ),
    "2-d, cropped": ((6, 6, 2), (2, 2, 2, 3), {"padding": [(-1, 0), (0, -2)]}),
    "2-d, 1x1": ((4, 4, 5), (1, 1, 5, 3), {"window_strides": (2, 2)}),
    "2-d, groups": ((5, 5, 4), (3, 3, 2, 6), {"feature_group_count": 2}),
    "2-d, depthwise": ((5, 5, 3), (2, 2, 1, 6), {"feature_group_count": 3}),
    "2-d, transposed": ((4, 4, 3), (3, 3, 3, 2), {"lhs_dilation": (2, 2), "padding": [(1, 2), (2, 1)]}),
    "2-d, dilated both ways": (
        (4, 5, 2),
        (2, 3, 2, 3),
        {"lhs_dilation": (2, 1), "rhs_dilation": (2, 2), "padding": [(2, 2), (1, 3)]},
    ),
    "2-d, one position": ((3, 3, 2), (3, 3, 2, 4), {}),
    "2-d, two positions, wide": ((3, 4, 12), (3, 3, 12, 20), {}),
    "3-d": ((4, 3, 4, 2), (2, 2, 2, 2, 3), {"padding": "SAME", "window_strides": (1, 2, 1)}),
}
LAYOUTS = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NDHWC", "DHWIO", "NDHWC")}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name):
    shape, kernel, options = CONVOLUTIONS[name]
    dims = len(shape) - 1
    settings = {"window_strides": (1,) * dims, "padding": "VALID", **options}
    params = {"kernel": normal(1, *kernel), "bias": normal(2, kernel[-1])}

    def apply_fn(p, x):
        out = lax.conv_general_dilated(x, p["kernel"], dimension_numbers=LAYOUTS[dims], **settings)
        return head(out + jnp.broadcast_to(p["bias"], out.shape))

    check(
        apply_fn, params, normal(3, 4, *shape), {"['kernel']": "convolution"}, ALL if name == "2-d, same" else ("full",)
    )


def test_convolution_layout_of_other_frameworks():
    params = {"kernel": normal(1, 5, 3, 2, 2)}

    def apply_fn(p, x):
        return head(
            lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NCHW", "OIHW", "NCHW"))
        )

    check(apply_fn, params, normal(3, 4, 3, 4, 4), {"['kernel']": "convolution"})


def test_pairs_of_positions_serve_a_convolution_with_few_positions():
    params = {"kernel": normal(1, 2, 2, 24, 20)}

    def apply_fn(p, x):
        return head(lax.conv_general_dilated(x, p["kernel"], (1, 1), "VALID", dimension_numbers=LAYOUTS[2]))

    check(apply_fn, params, normal(3, 4, 3, 2, 24), {"['kernel']": "pairs of positions"})


# --- biases, scales and lookups


def test_bias_behind_a_dense_layer_shares_its_cotangent():
    params = {"w": normal(1, 3, 4), "b": normal(2, 4)}

    def apply_fn(p, x):
        h = x @ p["w"]
        return head(h + jnp.broadcast_to(p["b"], h.shape))

    check(apply_fn, params, normal(3, 5, 3), {"['b']": "bias: δ δᵀ"})
    traced = engine.trace(apply_fn, params, normal(3, 5, 3))
    plan = engine.make_plan(traced.program, traced.leaves, engine.workload("full", traced.c, (5,)))
    assert len(plan.terms) == 1
    assert set(plan.terms[0].leaves) == {0, 1}


@pytest.mark.parametrize("sign", [1, -1])
def test_bias_over_positions(sign):
    def apply_fn(p, x):
        return head(x + jnp.broadcast_to(p, x.shape) if sign > 0 else jnp.broadcast_to(p, x.shape) - jnp.sin(x))

    check(apply_fn, normal(1, 3), normal(2, 5, 4, 3), {"": "bias"})


def test_bias_added_twice_over():
    def apply_fn(p, x):
        wide = jnp.broadcast_to(p, x.shape)
        return head(jnp.sin(x + wide) + wide)

    check(apply_fn, normal(1, 3), normal(2, 5, 3), {"": "2 × bias: per-example gradients"}, ALL)


@pytest.mark.parametrize("divide", [False, True])
def test_scale(divide):
    def apply_fn(p, x):
        wide = jnp.broadcast_to(p, x.shape)
        return head(wide / (2 + x**2) if divide else x * wide)

    check(apply_fn, normal(1, 3), normal(2, 5, 4, 3), {"": "scale"})


def test_scalar_parameter():
    check(lambda p, x: head(x * p), jnp.asarray(0.7), normal(2, 5, 3), {"": "scale"})


@pytest.mark.parametrize("mode", ["fill", "clip", "promise_in_bounds"])
@pytest.mark.parametrize(("length", "rule"), [(2, "equal ids"), (12, "per-example gradients")])
def test_embedding(mode, length, rule):
    ids = np.random.default_rng(3).integers(0, 7, (6, length))
    ids[0, 0], ids[1, 0] = ids[2, 0], ids[2, 0]
    if mode != "promise_in_bounds":
        ids[3, 0], ids[4, 0], ids[0, 1] = 9, 9, 7

    def apply_fn(p, x):
        rows = p.at[x].get(mode=mode, fill_value=0)
        return head(rows)

    check(apply_fn, normal(1, 7, 3), jnp.asarray(ids), {"": rule}, ALL if mode == "fill" else ("full",))


def test_gather_that_is_no_row_lookup():
    def apply_fn(p, x):
        return head(jax.vmap(lambda i: lax.dynamic_slice(p, (i[0], 0), (2, 3)))(x))

    check(apply_fn, normal(1, 7, 3), jnp.asarray([[0], [3], [5]]))


# --- what may lie between and around


CHAINS = {
    "transpose": lambda w: w.T.T,
    "reshape": lambda w: w.reshape(2, 6).reshape(3, 4),
    "scaled": lambda w: w / np.sqrt(3.0),
    "scaled by an array": lambda w: jnp.asarray(0.3) * w,
    "masked": lambda w: w * jnp.asarray(np.arange(12.0).reshape(3, 4) % 3),
    "negated": lambda w: -w,
    "reversed": lambda w: w[::-1],
    "cut": lambda w: w[:2],
    "broadcast": lambda w: jnp.broadcast_to(w[:1], (3, 4)),
    "through float32": lambda w: w.astype(jnp.float32).astype(jnp.float64),
}


@pytest.mark.parametrize("name", CHAINS)
def test_leaf_passes_through_linear_operations(name):
    def apply_fn(p, x):
        w = CHAINS[name](p["w"])
        return head(x[:, : w.shape[0]] @ w)

    served = {} if name in ("masked", "broadcast") else {"['w']": "(h hᵀ) ∘ (δ δᵀ)"}
    if name == "through float32":  # the Jacobian itself is rounded to float32 there, on both sides
        params, x = {"w": normal(1, 3, 4)}, normal(2, 5, 3)
        want = jacobian_kernel(apply_fn, params, x)
        np.testing.assert_allclose(engine.kernel(apply_fn, params, x), want, rtol=0, atol=1e-6 * np.abs(want).max())
        return
    check(apply_fn, {"w": normal(1, 3, 4)}, normal(2, 5, 3), served)


def _custom(fn):
    wrapped = jax.custom_vjp(fn)
    wrapped.defvjp(lambda p, x: (fn(p, x), (p, x)), lambda res, ct: tuple(2 * g for g in jax.vjp(fn, *res)[1](ct)))
    return wrapped


WRAPPERS = {
    "jit": jax.jit,
    "jit twice": lambda f: jax.jit(lambda p, x: jax.jit(f)(p, x)),
    "checkpoint": jax.checkpoint,
    "checkpoint in jit": lambda f: jax.jit(jax.checkpoint(f)),
    "vmap": lambda f: jax.vmap(lambda p, x: f(p, x[None])[0], in_axes=(None, 0)),
    "named call": lambda f: jax.named_call(f, name="layer"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_rules_reach_through_calls(name):
    def layer(p, x):
        return jnp.tanh(x @ p)

    def apply_fn(p, x):
        wrapped = WRAPPERS[name](layer)
        return head(wrapped(p["b"], wrapped(p["a"], x)))

    params = {"a": normal(1, 3, 4), "b": normal(2, 4, 4)}
    check(apply_fn, params, normal(3, 5, 3), {"['a']": "(h hᵀ) ∘ (δ δᵀ)", "['b']": "(h hᵀ) ∘ (δ δᵀ)"})


def test_custom_derivative_rules_are_kept():
    def layer(p, x):
        return jnp.tanh(x @ p)

    def apply_fn(p, x):
        return head(_custom(layer)(p["b"], jax.nn.relu(x @ p["a"])))

    params = {"a": normal(1, 3, 4), "b": normal(2, 4, 4)}
    x = normal(3, 5, 3)
    # The custom rule doubles the derivative of its arguments, so reverse mode is the oracle.
    jac = jax.jacrev(lambda p: apply_fn(p, x))(params)
    rows = jnp.concatenate([leaf.reshape(10, -1) for leaf in jax.tree.leaves(jac)], axis=1)
    want = rows @ rows.T
    np.testing.assert_allclose(engine.kernel(apply_fn, params, x), want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    assert "custom_vjp_call" in {leaf.path: leaf.reason for leaf in engine.explain(apply_fn, params, x).leaves}["['b']"]


def test_unused_leaf_and_constant_output():
    check(lambda p, x: head(x * p[0]), (jnp.asarray(0.7), normal(1, 3)), normal(2, 5, 3), {"[1]": "none"})
    zero = engine.kernel(lambda p, x: jnp.sin(x[:, :2]), {"w": normal(1, 3)}, normal(2, 5, 3))
    assert zero.shape == (10, 10)
    assert not np.any(zero)


def test_leaf_that_is_the_output():
    want = np.tile(np.eye(2), (4, 4))
    got = engine.kernel(lambda p, x: jnp.broadcast_to(p, (x.shape[0], 2)), normal(1, 2), normal(2, 4, 3))
    np.testing.assert_array_equal(got, want)
    got = engine.kernel(lambda p, x: p, normal(1, 1, 2), normal(2, 4, 3))
    np.testing.assert_array_equal(got, want)


def test_while_loop_needs_forward_mode():
    def apply_fn(p, x):
        h = x @ p["before"]
        _, h = lax.while_loop(lambda s: s[0] < 3, lambda s: (s[0] + 1, jnp.tanh(s[1] @ p["inside"])), (0, h))
        return head(h @ p["after"])

    params = {name: normal(i, 4, 4) for i, name in enumerate(("before", "inside", "after"))}
    rules = {
        "['before']": "Jacobian (forward mode)",
        "['inside']": "Jacobian (forward mode)",
        "['after']": "(h hᵀ) ∘ (δ δᵀ)",
    }
    check(apply_fn, params, normal(4, 5, 4), rules)


def test_cond_on_the_sample():
    def apply_fn(p, x):
        def one(row):
            return lax.cond(row[0] > 0, lambda r: jnp.tanh(r @ p), lambda r: jnp.sin(r @ p), row)

        return head(jax.vmap(one)(x))

    check(apply_fn, normal(1, 3, 4), normal(2, 6, 3))


@pytest.mark.parametrize(
    "activation", [jax.nn.relu, jax.nn.gelu, jax.nn.softplus, functools.partial(jax.nn.leaky_relu)]
)
def test_activations_with_rules_of_their_own(activation):
    def apply_fn(p, x):
        return head(activation(x @ p), out=1)

    check(apply_fn, normal(1, 3, 4), normal(2, 5, 3), {"": "(h hᵀ) ∘ (δ δᵀ)"})
