"""Transposed convolutions, complex products and weights chosen by number, against the Jacobian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernel import ALL, check, head, normal
from jax import lax

from lplr_jax.ntk import engine


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


CONVOLUTIONS = {
    "stride 2": {"strides": (2, 2), "padding": "SAME"},
    "uneven": {"strides": (3, 1), "padding": "VALID"},
    "dilated": {"strides": (2, 2), "padding": "VALID", "rhs_dilation": (2, 1)},
    "mirrored": {"strides": (2, 2), "padding": "SAME", "transpose_kernel": True},
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "uneven" else pytest.mark.slow) for name in CONVOLUTIONS]
)
def test_transposed_convolution(name):
    def apply_fn(p, x):
        return head(lax.conv_transpose(x, p, **CONVOLUTIONS[name]))

    shape = (3, 2, 5, 4) if name == "mirrored" else (3, 2, 4, 5)
    rule = "transposed convolution of patches of δ: "
    check(apply_fn, normal(1, *shape), normal(2, 3, 4, 5, 4), {"": rule}, ALL if name == "uneven" else ("full",))


@pytest.mark.slow
def test_transposed_convolution_of_groups_used_twice():
    def apply_fn(p, x):
        def up(h):
            return lax.conv_general_dilated(
                h, p, (1,), [(2, 1)], lhs_dilation=(2,), feature_group_count=2, dimension_numbers=("NHC", "HIO", "NHC")
            )

        return head(up(x) * up(jnp.sin(x)))

    check(apply_fn, normal(1, 3, 2, 6), normal(2, 3, 5, 4), {"": "2 × transposed convolution of patches of δ"})


def test_patches_of_the_cotangent_count_a_quarter():
    """At stride 2 there are a quarter as many positions, and as many entries of the gradient."""
    params, x = normal(1, 4, 4, 8, 16), normal(2, 2, 8, 8, 8)
    found = engine.explain(lambda p, x: head(lax.conv_transpose(x, p, (2, 2), "SAME")), params, x)
    (leaf,) = found.leaves
    assert "per-example" in leaf.rule
    rows, pairs = 2 * 2 * 8 * 8 * params.size, 3 * 4 * params.size
    assert leaf.multiply_adds == rows + pairs


SPECTRAL = {
    "complex": lambda p: lax.complex(p["a"], p["b"]),
    "by i": lambda p: p["a"].astype(complex) + 1j * p["b"].astype(complex),
    "conjugate, scaled": lambda p: (p["a"].astype(complex) - 1j * p["b"].astype(complex)) / (2 - 1j),
    "one leaf": lambda p: p["ab"][..., 0].astype(complex) + 1j * p["ab"][..., 1].astype(complex),
    "real alone": lambda p: p["a"].astype(complex),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "by i" else pytest.mark.slow) for name in SPECTRAL]
)
def test_fourier_layer(name):
    shape, leaf = (4, 6, 5), "complex matrix product"
    params = {"ab": normal(1, *shape, 2)} if name == "one leaf" else {"a": normal(1, *shape), "b": normal(2, *shape)}
    if name == "real alone":
        del params["b"]

    def apply_fn(p, x):
        modes = jnp.einsum("nki,kio->nko", jnp.fft.rfft(x, axis=1)[:, :4], SPECTRAL[name](p))
        return head(jnp.fft.irfft(modes, n=6, axis=1))

    rules = dict.fromkeys((f"['{one}']" for one in params), leaf)
    check(apply_fn, params, normal(3, 3, 6, 6), rules, ALL if name == "by i" else ("full",))


@pytest.mark.slow
def test_complex_leaves_of_other_kinds():
    def apply_fn(p, x):
        h = jnp.fft.fft(x) @ lax.complex(p["w"], p["w"])
        h = h + jnp.broadcast_to(lax.complex(p["b"], p["c"]) + p["d"].astype(complex), h.shape)
        return head(jnp.abs(h) + h.real)

    params = {"w": normal(1, 8, 6), "b": normal(2, 6), "c": normal(3, 6), "d": normal(4, 6)}
    check(apply_fn, params, normal(5, 3, 8), {"['w']": "2 × complex matrix product"})
    table = {"t": normal(6, 30, 3), "u": normal(7, 3, 4)}
    ids = jnp.asarray(np.random.default_rng(8).integers(0, 5, (4, 3)))

    def looked_up(p, ids):
        h = jnp.exp(1j * ids[..., None].astype(complex)) * p["t"].astype(complex)[ids]
        return head((h @ p["u"].astype(complex)).imag)

    check(looked_up, table, ids, {"['t']": "complex embedding: pairs", "['u']": "complex matrix product"}, ALL)


def experts(p, x):
    """Each position takes the weights of one expert; ids beyond the last take none."""
    ids = (jnp.abs(x[..., 0]) * 50).astype(int) % 6
    h = jnp.einsum("ntk,ntkm->ntm", x, p["w"].at[ids].get(mode="fill", fill_value=0))
    h = jnp.tanh(h + p["b"].at[ids].get(mode="fill", fill_value=0))
    return head(jnp.einsum("ntm,ntom->nto", h, p["v"].swapaxes(1, 2).at[ids].get(mode="fill", fill_value=0)))


@pytest.mark.parametrize("count", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_expert_weights(count):
    params = {"w": normal(1, count, 12, 10), "b": normal(2, count, 10), "v": normal(3, count, 10, 11)}
    rules = {f"['{name}']": "routed matrix product: pairs of positions" for name in "wv"}
    check(experts, params, normal(4, 4, 3, 12), rules if count > 1 else {}, ALL)


@pytest.mark.slow
def test_expert_weights_as_gradients():
    params = {"w": normal(1, 2, 3, 2), "b": normal(2, 2, 2), "v": normal(3, 2, 2, 3)}
    check(experts, params, normal(4, 3, 20, 3), {"['w']": "routed matrix product: per-example gradients"}, ALL)


@pytest.mark.slow
def test_one_expert_for_a_sample_in_scanned_layers():
    def apply_fn(p, x):
        ids = (jnp.abs(x[:, :1]) * 50).astype(int) % 4

        def layer(h, w):
            return jnp.tanh(h + jnp.einsum("nk,nkm->nm", h, w[ids[:, 0]])), None

        return head(lax.scan(layer, x, p)[0])

    rule = "routed matrix product in 2 steps of its own slices: pairs of positions"
    check(apply_fn, normal(1, 2, 4, 9, 9) / 3, normal(2, 4, 9), {"": rule}, ALL)


@pytest.mark.slow
def test_several_experts_in_one_product_fall_back():
    def apply_fn(p, x):
        ids = (jnp.abs(x[:, :2]) * 50).astype(int) % 4
        return head(jnp.einsum("nk,ntkm->ntm", x, p[ids]))

    check(apply_fn, normal(1, 4, 5, 6), normal(2, 4, 5), {"": "embedding"}, ALL)


MADE_OF_OTHERS = {
    "stacked columns": (
        lambda p, x: jnp.tanh(x @ jnp.stack([p["a"][:, 0], p["b"][:, 1]], axis=1)),
        {"a": "dense: (h hᵀ) ∘ (δ δᵀ)", "b": "dense: (h hᵀ) ∘ (δ δᵀ)"},
    ),
    "unstacked layers": (
        lambda p, x: sum(jnp.tanh(x @ w) for w in jnp.unstack(p["layers"])),
        {"layers": "dense: (h hᵀ) ∘ (δ δᵀ)"},
    ),
    "tiled": (lambda p, x: jnp.tanh(x @ jnp.tile(p["a"], (1, 2)))[:, ::2], {"a": "matrix product"}),
}


@pytest.mark.parametrize("name", MADE_OF_OTHERS)
def test_operations_that_are_others_put_together(name):
    """`stack`, `unstack` and `tile` are operations of their own in newer JAX, and have the rules of what they mean."""
    apply_fn, rules = MADE_OF_OTHERS[name]
    shapes = {"a": (3, 4), "b": (3, 4), "layers": (2, 3, 4)}
    params = {leaf: normal(number, *shapes[leaf]) for number, leaf in enumerate(rules)}
    check(apply_fn, params, normal(9, 5, 3), {f"['{leaf}']": rule for leaf, rule in rules.items()}, ALL)


def test_a_window_that_fits_nowhere():
    """A convolution without positions has no share in Θ, and what reads it has the entries that are left."""

    def apply_fn(p, x):
        numbers = ("NWC", "WIO", "NWC")
        nowhere = jnp.tanh(lax.conv_general_dilated(x, p["filter"], (1,), "VALID", dimension_numbers=numbers))
        rest = nowhere.reshape(x.shape[0], 0) @ p["none"]
        return jnp.tanh(x.reshape(x.shape[0], 6) @ p["w"]) + rest

    params = {"filter": normal(1, 5, 2, 3), "none": normal(2, 0, 2), "w": normal(3, 6, 2)}
    check(apply_fn, params, normal(4, 4, 3, 2), {"['filter']": "none", "['w']": "dense"}, ALL)
