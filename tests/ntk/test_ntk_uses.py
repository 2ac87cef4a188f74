"""Leaves that are used more than once, against the Jacobian: the kernel is the sum over pairs of uses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernel import ALL, TOLERANCE, check, head, normal

from lplr_jax.ntk import engine, neural_tangents


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def siamese(p, x):
    def tower(h):
        h = jnp.tanh(h @ p["w"] + jnp.broadcast_to(p["b"], (h.shape[0], p["b"].shape[0])))
        return h @ p["v"]

    return head(tower(x[:, 0]) * tower(x[:, 1]))


def test_siamese():
    params = {"w": normal(1, 8, 12), "b": normal(2, 12), "v": normal(3, 12, 10)}
    rules = {"['w']": "2 × matrix product: pairs of positions", "['v']": "2 × matrix product: pairs of positions"}
    check(siamese, params, normal(4, 4, 2, 8), {**rules, "['b']": "2 × bias: per-example gradients"}, ALL)


@pytest.mark.slow
def test_neural_tangents_agrees_on_a_siamese_network():
    if neural_tangents.available() is not None:
        pytest.skip(neural_tangents.available())
    params, x = {"w": normal(1, 8, 12), "b": normal(2, 12), "v": normal(3, 12, 10)}, normal(4, 4, 2, 8)
    want = neural_tangents.kernel(siamese, params, x, None, outputs="full")
    np.testing.assert_allclose(engine.kernel(siamese, params, x), want, rtol=0, atol=TOLERANCE * np.abs(want).max())


WAYS = {
    "the same twice": lambda x, w: (x @ w, (x * x) @ w),
    "negated": lambda x, w: (x @ w, jnp.sin(x) @ -w),
    "scaled": lambda x, w: (x @ w, jnp.sin(x) @ (w / 3)),
    "transposed": lambda x, w: (x @ w, jnp.tanh(x @ w) @ w.T),
    "weight first": lambda x, w: (x @ w, jnp.einsum("io,ni->on", w, jnp.sin(x)).T),
    "reversed": lambda x, w: (x @ w, x @ w[::-1]),
    "at positions": lambda x, w: (x @ w, jnp.stack([x, *(jnp.sin(i * x) for i in range(1, 6))], axis=1) @ w),
    "in parts": lambda x, w: (x[:, :7] @ w[:7], jnp.sin(x[:, :9]) @ w[7:]),
    "in parts and whole": lambda x, w: (x[:, :7] @ w[:7], x @ w),
    "in heads": lambda x, w: (jnp.einsum("ni,iho->nho", x, w.reshape(16, 4, 4)), jnp.sin(x) @ w),
    "as a product": lambda x, w: (x @ w, x @ (w * w)),
    "and thrice": lambda x, w: (x @ w, jnp.tanh(jnp.tanh(x @ w) @ w.T) @ w),
    "compared": lambda x, w: (x @ w, x @ jnp.where(w > 0, 1.0, -1.0)),
}
PAIRS = {
    "the same twice": "2 × matrix product: pairs",
    "negated": "2 × matrix product: pairs",
    "scaled": "2 × matrix product: pairs",
    "transposed": "3 × matrix product: pairs",
    "weight first": "2 × matrix product: pairs",
    "reversed": "per-example",
    "at positions": "2 × matrix product: per-example",
    "in parts": "dense: (h hᵀ) ∘ (δ δᵀ)",
    "in parts and whole": "per-example",
    "in heads": "2 × matrix product: pairs",
    "and thrice": "4 × matrix product",
    "compared": "dense: (h hᵀ) ∘ (δ δᵀ)",
}


QUICK = {"negated", "transposed", "reversed", "in parts", "in parts and whole"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in WAYS])
def test_two_ways_of_one_matrix(name):
    def apply_fn(p, x):
        one, two = WAYS[name](x, p)
        return head(jnp.concatenate([one.reshape(x.shape[0], -1), two.reshape(x.shape[0], -1)], axis=1))

    check(
        apply_fn,
        normal(1, 16, 16),
        normal(2, 3, 16),
        {"": PAIRS.get(name, "")},
        ALL if name == "transposed" else ("full",),
    )


def test_slices_of_a_stack_are_strangers():
    def apply_fn(p, x):
        h = x
        for layer in range(3):
            h = jnp.tanh(h @ p[layer])
        return head(h)

    check(apply_fn, normal(1, 3, 6, 6), normal(2, 4, 6), {"": "dense: (h hᵀ) ∘ (δ δᵀ)"})


@pytest.mark.parametrize(
    ("vocabulary", "rule"),
    [(200, "pairs of positions"), pytest.param(5, "per-example gradients", marks=pytest.mark.slow)],
)
def test_tied_embedding(vocabulary, rule):
    """Rows that are looked up and columns that give the logits; ids beyond the table are filled with zeros."""

    def apply_fn(p, ids):
        h = p.at[ids].get(mode="fill", fill_value=0)
        h = jnp.tanh(h + jnp.roll(h, 1, axis=1))
        logits = h @ p.T
        return head(logits)

    ids = np.random.default_rng(3).integers(0, 5, (4, 3))
    ids[0, 0], ids[1, 2], ids[2, 1] = 300, 300, ids[0, 1]
    check(apply_fn, normal(1, vocabulary, 20), jnp.asarray(ids), {"": f"embedding, matrix product: {rule}"}, ALL)


@pytest.mark.slow
def test_embedding_looked_up_and_multiplied_as_it_is():
    """The table's rows as embeddings, and the whole table by a vector of counts: plain uses meet lookups."""

    def apply_fn(p, x):
        ids = (jnp.abs(x[:, :3]) * 50).astype(jnp.int32) % 60
        return head(jnp.concatenate([p[ids].reshape(x.shape[0], -1), jnp.sin(x) @ p], axis=1))

    check(apply_fn, normal(1, 60, 5), normal(2, 4, 60), {"": "embedding, matrix product: pairs of positions"}, ALL)


@pytest.mark.slow
def test_two_embeddings_of_one_table():
    def apply_fn(p, ids):
        return head(p[ids[:, :2]] * jnp.sin(p)[ids[:, 2:]] + p[ids[:, 1:3]])

    check(apply_fn, normal(1, 50, 4), jnp.asarray(np.random.default_rng(3).integers(0, 50, (4, 4))), {"": ""})

    def twice(p, ids):
        return head(p[ids[:, :2]] * p[ids[:, 2:]])

    ids = jnp.asarray(np.random.default_rng(3).integers(0, 6, (4, 4)))
    check(twice, normal(1, 200, 4), ids, {"": "2 × embedding: pairs of equal ids"})


@pytest.mark.slow
def test_convolution_used_twice():
    def apply_fn(p, x):
        def convolve(h):
            return jax.lax.conv_general_dilated(h, p, (2,), "VALID", dimension_numbers=("NHC", "HIO", "NHC"))

        return head(convolve(x) * convolve(jnp.sin(x)))

    check(apply_fn, normal(1, 3, 16, 20), normal(2, 4, 5, 16), {"": "2 × convolution: pairs of positions"})


@pytest.mark.slow
def test_batched_product_used_with_exchanged_sides():
    def apply_fn(p, x):
        h = jnp.tanh(jnp.einsum("nbi,bio->nbo", x, p))
        return head(jnp.einsum("nbo,bio->nbi", h, p))

    check(apply_fn, normal(1, 3, 10, 12), normal(2, 4, 3, 10), {"": "2 × matrix product: pairs of positions"})


def test_physics_informed_network():
    """u and ∂u/∂x, forward and reverse: each weight enters with the activations and with their tangents."""

    def u(p, x):
        h = jnp.tanh(x @ p["a"] + jnp.broadcast_to(p["b"], (x.shape[0], 20)))
        return jnp.tanh(h @ p["c"]) @ p["d"]

    def forward(p, x):
        value, slope = jax.jvp(lambda a: u(p, a), (x,), (jnp.ones_like(x),))
        return jnp.concatenate([value, slope], axis=1)

    def reverse(p, x):
        return jnp.concatenate([u(p, x), jax.grad(lambda a: u(p, a).sum())(x)], axis=1)

    params = {"a": normal(1, 2, 20), "b": normal(2, 20), "c": normal(3, 20, 20), "d": normal(4, 20, 1)}
    x = normal(5, 4, 2)
    check(forward, params, x, {"['c']": "2 × matrix product: pairs of positions"})
    check(reverse, params, x, {"['c']": "matrix product"})


MERGES = {
    "low rank": lambda p: p["w"] + 0.5 * (p["a"] @ p["b"]),
    "low rank, transposed": lambda p: p["w"] - (p["b"].T @ p["a"].T).T,
    "by einsum": lambda p: p["w"] + jnp.einsum("rm,kr->km", p["b"], p["a"]),
    "centred": lambda p: p["w"] - jnp.mean(p["w"]) + p["a"] @ p["b"],
}


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("low rank", 1),
        *(pytest.param(name, 4, marks=() if name == "low rank" else pytest.mark.slow) for name in MERGES),
    ],
)
def test_merged_low_rank_update(name, steps):
    def apply_fn(p, x):
        return head(jnp.tanh(x) @ MERGES[name](p))

    params = {"w": normal(1, 12, 10), "a": normal(2, 12, 2), "b": normal(3, 2, 10)}
    rules = {"['a']": "merged matrix product: ", "['b']": "merged matrix product: "}
    rules |= {} if name == "centred" else {"['w']": "matrix product" if steps > 1 else "dense"}
    check(apply_fn, params, normal(4, 3, steps, 12) if steps > 1 else normal(4, 3, 12), rules)


def test_merged_update_of_scanned_layers():
    def apply_fn(p, x):
        def layer(h, leaves):
            return jnp.tanh(h @ (leaves["w"] + leaves["a"] @ leaves["b"] + p["c"] @ leaves["b"])), None

        return head(jax.lax.scan(layer, x, {name: p[name] for name in "wab"})[0])

    params = {"w": normal(1, 2, 12, 12) / 4, "a": normal(2, 2, 12, 2), "b": normal(3, 2, 2, 12), "c": normal(4, 12, 2)}
    rule = "merged matrix product in 2 steps"
    check(apply_fn, params, normal(5, 3, 12), {"['a']": rule, "['b']": rule, "['c']": rule, "['w']": "in 2 steps"}, ALL)


def test_merge_that_is_no_product_of_axes_stops_there():
    def apply_fn(p, x):
        return head(x @ (p["a"] @ p["b"]).reshape(6, 24))

    check(apply_fn, {"a": normal(1, 12, 2), "b": normal(2, 2, 12)}, normal(3, 3, 6), {"['a']": "matrix product"})


def test_weight_normalisation():
    def apply_fn(p, x):
        norm = jnp.sqrt(jnp.sum(p["v"] ** 2, axis=0))
        return head(x @ (p["v"] * jnp.broadcast_to(p["g"] / norm, p["v"].shape)))

    check(apply_fn, {"v": normal(1, 5, 4), "g": normal(2, 4)}, normal(3, 4, 5), {"['v']": "Jacobian"})


@pytest.mark.slow
def test_unrolled_recurrence():
    def apply_fn(p, x):
        h = jnp.zeros((x.shape[0], 12), x.dtype)
        for t in range(4):
            h = jnp.tanh(h @ p["u"] + x[:, t] @ p["w"] + jnp.broadcast_to(p["b"], h.shape))
        return head(h)

    params = {"u": normal(1, 12, 12) / 3, "w": normal(2, 8, 12), "b": normal(3, 12)}
    check(apply_fn, params, normal(4, 3, 4, 8), {"['u']": "4 × matrix product", "['w']": "4 × matrix product"})


@pytest.mark.slow
def test_ways_that_double_fall_back():
    def apply_fn(p, x):
        power = p
        for _ in range(12):
            power = power * power
        return head(x @ power)

    check(apply_fn, 1 + normal(1, 3, 3) / 1e5, normal(2, 3, 3), {"": "Jacobian (reverse mode)"})
