"""Networks that read a part of what they compute, against the Jacobian: only that part is computed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernel import check, head, normal
from jax import lax

from lplr_jax.ntk import engine


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def block(h, p):
    """Attention of two heads and a layer behind it; positions are the second axis."""
    n, steps, m = h.shape
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 0.1)
    q, k, v = (jnp.reshape(normed @ p[name], (n, steps, 2, m // 2)) for name in "qkv")
    scores = jnp.where(np.tril(np.ones((steps, steps), bool)), jnp.einsum("nthd,nshd->nhts", q, k), -1e30)
    h = h + jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v).reshape(n, steps, m) @ p["o"]
    out = h @ p["w"]
    return h + jnp.tanh(out + jnp.broadcast_to(p["b"], out.shape)) @ p["u"]


def blocks(count):
    shapes = {**dict.fromkeys("qkvo", (6, 6)), "w": (6, 12), "b": (12,), "u": (12, 6)}
    return [
        {name: normal(10 * number + seed, *shape) / 2 for seed, (name, shape) in enumerate(shapes.items())}
        for number in range(count)
    ]


@pytest.mark.parametrize("place", [-1, pytest.param(0, marks=pytest.mark.slow)])
def test_last_layer_of_a_transformer_that_reads_one_position(place):
    def apply_fn(p, x):
        for layer in p:
            x = block(x, layer)
        return head(x[:, place])

    params, x = blocks(2), normal(3, 3, 7, 6)
    alone = "dense: (h hᵀ) ∘ (δ δᵀ)"
    rules = {f"[1]['{name}']": alone for name in "qowu"} | {"[1]['b']": "bias: δ δᵀ", "[1]['k']": "matrix product"}
    check(apply_fn, params, x, {**rules, "[0]['w']": "matrix product: per-example"})


PARTS = {
    "a strip": lambda h: h[:, 2:4],
    "two strips": lambda h: jnp.concatenate([h[:, :2], h[:, 1:4]], axis=1),
    "far apart": lambda h: h[:, 0] * h[:, -1],
    "of features": lambda h: h[..., 1:3],
    "strided": lambda h: h[:, ::2],
    "behind a reshape": lambda h: h.reshape(h.shape[0], 5, 2, 3)[:, 1:3],
    "across a reshape": lambda h: h.reshape(h.shape[0], 10, 3)[:, 1:4],
    "joined": lambda h: h.reshape(h.shape[0], 30)[:, 7:16],
    "transposed": lambda h: jnp.swapaxes(h, 1, 2)[:, 1:3],
    "of a sum": lambda h: jnp.sum(h, axis=2)[:, 1:3],
    "at a number": lambda h: lax.dynamic_index_in_dim(h, 3, 1),
    "sliced twice": lambda h: h[:, 1:4][:, 1:],
    "beside a mean": lambda h: h[:, 1] + jnp.mean(h, axis=1),
    "sorted": lambda h: jnp.sort(h, axis=1)[:, :2],
    "before a product": lambda h: jnp.einsum("nti,ntj->nij", h, jnp.sin(h))[:, 1:3],
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "across a reshape" else pytest.mark.slow) for n in PARTS]
)
def test_parts(name):
    def apply_fn(p, x):
        h = x @ p["w"]
        h = jnp.tanh(h + jnp.broadcast_to(p["b"], h.shape) + jnp.broadcast_to(p["t"][:, None], h.shape)) * p["s"]
        return head(PARTS[name](h) * 2.0)

    params = {"w": normal(1, 4, 6), "b": normal(2, 6), "t": normal(3, 5), "s": normal(4, 5, 6)}
    params["s"] = params["s"][None]
    check(apply_fn, params, normal(5, 3, 5, 4), {}, ("full",))


def test_a_part_costs_what_it_is():
    """Reading one of 50 positions counts as many multiply-adds as a network of that position alone."""
    params, x = {"w": normal(1, 4, 6), "b": normal(2, 6)}, normal(3, 3, 50, 4)

    def network(p, x):
        h = x @ p["w"]
        return jnp.tanh(h + jnp.broadcast_to(p["b"], h.shape))

    whole = engine.explain(lambda p, x: head(network(p, x)[:, 20]), params, x)
    alone = engine.explain(lambda p, x: head(network(p, x[:, 20])), params, x)
    assert whole.multiply_adds == alone.multiply_adds
    assert whole.bytes == alone.bytes
