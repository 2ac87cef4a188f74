"""Networks whose leaves are used more than once or inside loops, for `ntk.py`: functions, parameters and samples.

Each is bare JAX. "loop" and "scan" are one function: its layers as slices of a stack in a Python loop, or scanned.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

VOCABULARY, HEADS, CHANNELS = 64, 4, 32
Problem = tuple[Callable[[Any, jax.Array], jax.Array], Any, jax.Array]


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name; all in float64."""
    found: dict[str, dict[str, Any]] = {}

    def add(name: str, **settings: Any) -> None:
        found[f"{name}-f64"] = {"model": name.partition("-")[0], "dtype": "float64", **settings}

    for way in ("loop", "scan"):
        add(f"stack-128-{way}", n=128, m=128, depth=6, scanned=way == "scan")
        for tied in ("tied", "untied"):
            for depth, m, steps in ((2, 64, 32), (6, 64, 32), (2, 64, 128), (2, 256, 32), (6, 256, 32)):
                name = f"gpt-{depth}-{m}-{steps}-{way}-{tied}"
                add(name, n=8, m=m, c=4, depth=depth, steps=steps, scanned=way == "scan", tied=tied == "tied")
    for model in ("gru", "lstm"):
        add(f"{model}-64-32", n=32, m=64, c=2, steps=32)
        add(f"{model}-256-16", n=32, m=256, c=2, steps=16)
    add("siamese-128", n=64, m=128, c=4)
    add("pinn-128", n=128, m=128, c=2)
    return found


def problem(model: str, *, n: int, m: int, c: int = 1, dtype: str, **settings: Any) -> Problem:
    """Function, parameters and samples of a case."""
    draw = partial(_draw, np.random.default_rng(0), dtype)
    return _MODELS[model](draw, n=n, m=m, c=c, **settings)


def _draw(rng: np.random.Generator, dtype: str, *shape: int, scale: float | None = None) -> jax.Array:
    """Normal entries, by default of variance one over the last but one axis."""
    scale = float(shape[-2]) ** -0.5 if scale is None else scale
    return jnp.asarray(rng.normal(size=shape) * scale, dtype)


def _layers(layer: Callable[..., jax.Array], h: jax.Array, stack: Any, scanned: bool) -> jax.Array:
    if scanned:
        return lax.scan(lambda h, leaves: (layer(h, leaves), None), h, stack)[0]
    for number in range(jax.tree.leaves(stack)[0].shape[0]):
        h = layer(h, jax.tree.map(lambda leaf, at=number: leaf[at], stack))
    return h


def _stack(draw: Callable[..., jax.Array], *, n: int, m: int, c: int, depth: int, scanned: bool) -> Problem:
    params = {"w": draw(depth, m, m), "b": draw(depth, m, scale=0.1), "out": draw(m, c)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        stack = (p["w"], p["b"])
        return _layers(lambda h, leaves: jnp.tanh(h @ leaves[0] + leaves[1]), x, stack, scanned) @ p["out"]

    return apply_fn, params, draw(n, m, scale=1.0)


def _normed(h: jax.Array, scale: jax.Array) -> jax.Array:
    return h * lax.rsqrt(jnp.mean(h * h, axis=-1, keepdims=True) + 1e-6) * scale


def _block(h: jax.Array, p: Any) -> jax.Array:
    """Pre-norm causal attention and a two-layer network."""
    n, steps, m = h.shape
    q, k, v = jnp.moveaxis((_normed(h, p["n1"]) @ p["qkv"]).reshape(n, steps, 3, HEADS, m // HEADS), 2, 0)
    scores = jnp.einsum("nthd,nshd->nhts", q, k) / np.sqrt(m // HEADS)
    scores = jnp.where(np.tril(np.ones((steps, steps), bool)), scores, -1e30)
    mixed = jnp.einsum("nhts,nshd->nthd", jax.nn.softmax(scores), v).reshape(n, steps, m)
    h = h + mixed @ p["o"]
    return h + jax.nn.gelu(_normed(h, p["n2"]) @ p["up"] + p["b"]) @ p["down"]


def _gpt(
    draw: Callable[..., jax.Array], *, n: int, m: int, c: int, depth: int, steps: int, scanned: bool, tied: bool
) -> Problem:
    """The first c logits of the last position."""
    stack = {
        "qkv": draw(depth, m, 3 * m),
        "o": draw(depth, m, m),
        "up": draw(depth, m, 4 * m),
        "down": draw(depth, 4 * m, m),
        "b": draw(depth, 4 * m, scale=0.1),
        "n1": 1 + draw(depth, m, scale=0.1),
        "n2": 1 + draw(depth, m, scale=0.1),
    }
    params = {"embed": draw(VOCABULARY, m), "place": draw(steps, m), "layers": stack, "last": 1 + draw(m, scale=0.1)}
    params |= {} if tied else {"head": draw(VOCABULARY, m)}

    def apply_fn(p: Any, ids: jax.Array) -> jax.Array:
        h = _layers(_block, p["embed"][ids] + p["place"], p["layers"], scanned)
        return _normed(h, p["last"])[:, -1] @ p["embed" if tied else "head"].T[:, :c]

    return apply_fn, params, jnp.asarray(np.random.default_rng(1).integers(0, VOCABULARY, (n, steps)))


def _recurrent(draw: Callable[..., jax.Array], *, n: int, m: int, c: int, steps: int, gates: int) -> Problem:
    params = {
        "w": draw(CHANNELS, gates * m),
        "u": draw(m, gates * m),
        "b": draw(gates * m, scale=0.1),
        "out": draw(m, c),
    }

    def gru(p: Any, h: jax.Array, x: jax.Array) -> jax.Array:
        inner, outer = jnp.split(x @ p["w"] + p["b"], [2 * m], axis=-1)
        recurrent, last = jnp.split(h @ p["u"], [2 * m], axis=-1)
        reset, update = jnp.split(jax.nn.sigmoid(inner + recurrent), 2, axis=-1)
        return (1 - update) * jnp.tanh(outer + reset * last) + update * h

    def lstm(p: Any, state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        h, cell = state
        i, f, g, o = jnp.split(x @ p["w"] + h @ p["u"] + p["b"], 4, axis=-1)
        cell = jax.nn.sigmoid(f) * cell + jax.nn.sigmoid(i) * jnp.tanh(g)
        return jax.nn.sigmoid(o) * jnp.tanh(cell), cell

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        zero, sequence = jnp.zeros((x.shape[0], m), x.dtype), jnp.swapaxes(x, 0, 1)
        if gates == 3:
            return lax.scan(lambda h, piece: (gru(p, h, piece), None), zero, sequence)[0] @ p["out"]
        return lax.scan(lambda state, piece: (lstm(p, state, piece), None), (zero, zero), sequence)[0][0] @ p["out"]

    return apply_fn, params, draw(n, steps, CHANNELS, scale=1.0)


def _siamese(draw: Callable[..., jax.Array], *, n: int, m: int, c: int) -> Problem:
    params = {"w": draw(m, m), "b": draw(m, scale=0.1), "v": draw(m, m // 2), "out": draw(m // 2, c)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        one, two = (jnp.tanh(jnp.tanh(x[:, side] @ p["w"] + p["b"]) @ p["v"]) for side in range(2))
        return (one * two) @ p["out"]

    return apply_fn, params, draw(n, 2, m, scale=1.0)


def _pinn(draw: Callable[..., jax.Array], *, n: int, m: int, c: int) -> Problem:
    """A function of two variables and its derivative along the first."""
    params = [(draw(a, b), draw(b, scale=0.1)) for a, b in ((2, m), (m, m), (m, m), (m, 1))]

    def value(p: Any, x: jax.Array) -> jax.Array:
        for weight, bias in p[:-1]:
            x = jnp.tanh(x @ weight + bias)
        return x @ p[-1][0] + p[-1][1]

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        along = jnp.zeros_like(x).at[:, 0].set(1)
        return jnp.concatenate(jax.jvp(lambda a: value(p, a), (x,), (along,)), axis=1)[:, :c]

    return apply_fn, params, draw(n, 2, scale=1.0)


_MODELS: dict[str, Callable[..., Problem]] = {
    "stack": _stack,
    "gpt": _gpt,
    "gru": partial(_recurrent, gates=3),
    "lstm": partial(_recurrent, gates=4),
    "siamese": _siamese,
    "pinn": _pinn,
}
