"""The engine on models of four frameworks and on bare pytrees, against the Jacobian and against neural-tangents."""

import contextlib
import functools

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lplr_jax.models import MLP
from lplr_jax.ntk import engine, neural_tangents


@contextlib.contextmanager
def lenient():
    """Frameworks promote dtypes and ranks of their own accord; the library's own code is traced in there too."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def perturbed(params, seed=5):
    """Parameters away from the zeros and ones of an initialisation, which would hide terms."""
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [
        leaf + 0.1 * rng.normal(size=leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
        for leaf in leaves
    ]
    return jax.tree.unflatten(treedef, moved)


def cast(tree, dtype):
    return jax.tree.map(
        lambda a: jnp.asarray(a, dtype) if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating) else jnp.asarray(a), tree
    )


def jacobian_kernel(apply_fn, params, x):
    """J Jᵀ from the reverse-mode Jacobian of the whole batch."""
    leaves, treedef = jax.tree.flatten(params)
    moving = [i for i, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]

    def outputs(values):
        every = list(leaves)
        for i, value in zip(moving, values, strict=True):
            every[i] = value
        return apply_fn(jax.tree.unflatten(treedef, every), x).reshape(-1)

    jac = jax.jit(jax.jacrev(outputs))([leaves[i] for i in moving])
    rows = jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jac], axis=1)
    return np.asarray(rows @ rows.T)


# --- models


class CNN(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(6, (3, 3))(x))
        x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(8, (3, 3), strides=2, feature_group_count=2)(x))
        return nn.Dense(3)(x.reshape(x.shape[0], -1))


class ResNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Conv(4, (3, 3), use_bias=False)(x)
        for features, stride in ((4, 1), (8, 2)):
            y = nn.relu(nn.GroupNorm(2)(x))
            skip = nn.Conv(features, (1, 1), stride, use_bias=False)(y)
            y = nn.Conv(features, (3, 3), stride, use_bias=False)(y)
            y = nn.Conv(features, (3, 3), use_bias=False)(nn.relu(nn.GroupNorm(2)(y)))
            x = skip + y
        return nn.Dense(2)(nn.relu(nn.GroupNorm(2)(x)).mean(axis=(1, 2)))


class Transformer(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(11, 8)
        h = table(ids) + self.param("position", nn.initializers.normal(1.0), (ids.shape[1], 8))
        h = h + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(h))
        h = h + nn.Dense(8)(nn.gelu(nn.Dense(12)(nn.LayerNorm()(h))))
        return nn.Dense(2)(nn.LayerNorm()(h).mean(axis=1))


class Tied(nn.Module):
    @nn.compact
    def __call__(self, ids):
        table = nn.Embed(7, 6)
        h = nn.tanh(nn.Dense(6)(table(ids).mean(axis=1)))
        return table.attend(h)[:, :3]


class Recurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2)(nn.RNN(nn.GRUCell(5, param_dtype=x.dtype))(x)[:, -1])


def linen(module, x):
    params = jax.jit(module.init)(jax.random.key(0), x)
    return module.apply, params, x


def nnx_mlp(x):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(x.shape[1], 6, rngs=rngs)
            self.norm = nnx.LayerNorm(6, rngs=rngs)
            self.second = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, value):
            return self.second(nnx.relu(self.norm(self.first(value))))

    graph, params = nnx.split(Net(nnx.Rngs(0)))
    return lambda p, value: nnx.merge(graph, p)(value), params, x


def equinox_cnn(x):
    keys = jax.random.split(jax.random.key(0), 3)
    model = eqx.nn.Sequential(
        [
            eqx.nn.Conv2d(2, 4, 3, key=keys[0]),
            eqx.nn.GroupNorm(2, 4),
            eqx.nn.Lambda(jax.nn.relu),
            eqx.nn.Lambda(jnp.ravel),
            eqx.nn.Linear(64, 5, key=keys[1]),
            eqx.nn.Lambda(jnp.tanh),
            eqx.nn.Linear(5, 2, key=keys[2]),
        ]
    )
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return lambda p, value: jax.vmap(eqx.combine(p, static))(value), params, x


def equinox_whole(x):
    """The module itself as the pytree of parameters: its activation functions are leaves too."""
    model = eqx.nn.MLP(x.shape[1], 3, 6, 2, key=jax.random.key(0))
    return lambda p, value: jax.vmap(p)(value), model, x


def haiku_net(x):
    def net(value):
        value = hk.Conv2D(4, 3)(value)
        value = jax.nn.relu(hk.LayerNorm(-1, True, True)(value))
        return hk.nets.MLP([6, 2])(hk.Flatten()(value))

    transformed = hk.without_apply_rng(hk.transform(net))
    return transformed.apply, jax.jit(transformed.init)(jax.random.key(0), x), x


def bare(x):
    params = {
        "layers": ((normal(1, 4, 5), normal(2, 5)), (normal(3, 5, 2), None)),
        "steps": np.int32(3),
        "table": np.arange(4),
        "mask": np.array([True, False, True, True]),
    }

    def apply_fn(p, value):
        (w1, b1), (w2, _) = p["layers"]
        h = jnp.where(p["mask"][p["table"]], value, -value)
        return jnp.tanh(h @ w1 + b1) @ w2 * p["steps"].astype(w2.dtype)

    return apply_fn, params, x


def subset(x):
    module = MLP(width=6, depth=3, outputs=2)
    frozen = perturbed(module.init(jax.random.key(0), x))["params"]
    frozen = cast(frozen, x.dtype)

    def apply_fn(last, value):
        return module.apply({"params": {**frozen, "dense_2": last}}, value)

    return apply_fn, frozen["dense_2"], x


def pytree_of_inputs(x):
    module = MLP(width=6, depth=3)

    def apply_fn(p, value):
        joined = jnp.concatenate([value["a"], value["b"][1][:, None] * value["a"][:, :1]], axis=1)
        return module.apply(p, joined)[:, 0]

    return apply_fn, module.init(jax.random.key(0), x[:, :4]), {"a": x[:, :3], "b": (None, x[:, 3])}


IMAGES, ROWS, IDS = normal(1, 5, 6, 6, 2), normal(2, 7, 4), np.random.default_rng(3).integers(0, 7, (6, 4))
MODELS = {
    **{
        f"mlp {activation} {c}": (
            functools.partial(linen, MLP(width=9, depth=4, activation=activation, outputs=c)),
            ROWS,
        )
        for activation, c in (("softplus", 1), ("softplus", 10), ("relu", 10), ("tanh", 1))
    },
    "cnn": (functools.partial(linen, CNN()), IMAGES),
    "resnet": (functools.partial(linen, ResNet()), IMAGES),
    "transformer": (functools.partial(linen, Transformer()), IDS),
    "tied": (functools.partial(linen, Tied()), IDS),
    "recurrent": (functools.partial(linen, Recurrent()), normal(4, 5, 6, 3)),
    "nnx": (nnx_mlp, ROWS),
    "equinox cnn": (equinox_cnn, np.moveaxis(IMAGES, -1, 1)),
    "equinox, whole module": (equinox_whole, ROWS),
    "haiku": (haiku_net, IMAGES),
    "bare": (bare, ROWS),
    "subset": (subset, ROWS),
    "inputs": (pytree_of_inputs, ROWS),
}
DEEP = {"cnn", "resnet", "transformer", "recurrent", "equinox cnn", "haiku"}


def build(name, dtype):
    make, data = MODELS[name]
    apply_fn, params, x = make(cast(data, dtype))
    arrays = [leaf for leaf in jax.tree.leaves(params) if not callable(leaf)]
    if len(arrays) < len(jax.tree.leaves(params)):
        static = eqx.partition(params, eqx.is_array)
        return apply_fn, eqx.combine(cast(perturbed(static[0]), dtype), static[1]), x
    return apply_fn, cast(perturbed(cast(params, dtype)), dtype), x


def oracle(apply_fn, params, x):
    if any(callable(leaf) for leaf in jax.tree.leaves(params)):
        arrays, static = eqx.partition(params, eqx.is_array)
        return jacobian_kernel(lambda p, value: apply_fn(eqx.combine(p, static), value), arrays, x)
    return jacobian_kernel(apply_fn, params, x)


# Leaves whose path has the key are served by a rule with the value in its name, and no leaf falls back to its Jacobian.
EXPECTED = {
    "resnet": {"Conv": "convolution", "GroupNorm": "", "Dense": "δ δᵀ"},
    "transformer": {"kernel": "", "embedding": "embedding", "LayerNorm": ""},
    "nnx": {"first": "δ δᵀ", "second": "δ δᵀ"},
    "equinox cnn": {"weight": ""},
    "haiku": {"linear": "δ δᵀ", "conv2_d": ""},
}


SLOW = {"haiku", "equinox cnn", "recurrent", "mlp relu 10", "resnet", "transformer"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in MODELS]
)
def test_float64(name):
    with jax.enable_x64(True), lenient():
        apply_fn, params, x = build(name, "float64")
        want = oracle(apply_fn, params, x)
        got = np.asarray(engine.kernel(apply_fn, params, x))
        leaves = engine.explain(apply_fn, params, x).leaves
    assert got.dtype == np.float64
    assert got.shape == want.shape
    assert np.max(np.abs(got - want)) <= 1e-12 * np.max(np.abs(want))
    np.testing.assert_array_equal(got, got.T)
    for part, rule in EXPECTED.get(name, {}).items():
        assert not [leaf for leaf in leaves if leaf.rule.startswith("Jacobian")]
        served = [leaf.rule for leaf in leaves if part in leaf.path]
        assert served
        assert all(rule in found for found in served)


@pytest.mark.parametrize(
    "name",
    [
        "mlp softplus 10",
        "mlp tanh 1",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet", "transformer")),
    ],
)
def test_float32(name):
    with jax.enable_x64(True), lenient():
        apply_fn, params, x = build(name, "float32")
        want = oracle(apply_fn, cast(params, "float64"), cast(x, "float64"))
        got = np.asarray(engine.kernel(apply_fn, params, x))
    assert got.dtype == np.float32
    # 2^-24 = 6e-8 a rounding; tens of layers of sums of at most 100 terms, worse behind normalisations.
    assert np.max(np.abs(got - want)) <= (1e-4 if name in DEEP else 1e-5) * np.max(np.abs(want))


@pytest.mark.parametrize(
    ("name", "outputs"),
    [
        ("mlp softplus 10", "full"),
        ("mlp softplus 10", "trace"),
        pytest.param("cnn", "full", marks=pytest.mark.slow),
        pytest.param("resnet", "full", marks=pytest.mark.slow),
    ],
)
def test_neural_tangents_agrees(name, outputs):
    if neural_tangents.available() is not None:
        pytest.skip(neural_tangents.available())
    with jax.enable_x64(True), lenient():
        apply_fn, params, x = build(name, "float64")
        want = np.asarray(neural_tangents.kernel(apply_fn, params, x, None, outputs=outputs))
        got = np.asarray(engine.kernel(apply_fn, params, x, outputs=outputs))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())
