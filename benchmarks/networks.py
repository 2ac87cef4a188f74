"""Networks of several kinds for `ntk.py`, in bare JAX: functions, parameters and samples."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Draw = Callable[..., jax.Array]
Problem = tuple[Callable[[Any, jax.Array], jax.Array], Any, jax.Array]


def cases() -> dict[str, dict[str, Any]]:
    """Every case by name; all in float64."""
    sizes = {"vit": 64, "mixer": 64, "convnext": 32, "unet": 16, "lora": 256, "moe": 64, "gnn": 64, "fourier": 32}
    return {
        f"{name}-{m}-f64": {"model": name, "n": 16, "m": m, "c": 4, "dtype": "float64"} for name, m in sizes.items()
    }


def problem(model: str, *, n: int, m: int, c: int, dtype: str) -> Problem:
    """Function, parameters and samples of a case."""
    rng = np.random.default_rng(0)

    def draw(*shape: int, scale: float | None = None) -> jax.Array:
        """Normal entries, by default of variance one over the product of all but the last axis."""
        by = float(np.prod(shape[:-1])) ** -0.5 if scale is None else scale
        return jnp.asarray(rng.normal(size=shape) * by, dtype)

    return _MODELS[model](draw, n=n, m=m, c=c)


def _normed(h: jax.Array, p: Any) -> jax.Array:
    centred = h - jnp.mean(h, axis=-1, keepdims=True)
    return centred * lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + 1e-6) * p["scale"] + p["shift"]


def _norm(draw: Draw, m: int) -> Any:
    return {"scale": 1 + draw(m, scale=0.1), "shift": draw(m, scale=0.1)}


def _pair(draw: Draw, m: int, inner: int) -> Any:
    return {"up": draw(m, inner), "b": draw(inner, scale=0.1), "down": draw(inner, m), "norm": _norm(draw, m)}


def _mixed(h: jax.Array, p: Any) -> jax.Array:
    return h + jax.nn.gelu(_normed(h, p["norm"]) @ p["up"] + p["b"]) @ p["down"]


def _vit(
    draw: Draw, *, n: int, m: int, c: int, depth: int = 2, side: int = 32, patch: int = 4, heads: int = 4
) -> Problem:
    """Two layers on 64 patches; the class is read off a token of its own."""
    count = (side // patch) ** 2

    def layer() -> Any:
        return {"qkv": draw(m, 3 * m), "o": draw(m, m), "norm": _norm(draw, m), "mlp": _pair(draw, m, 4 * m)}

    params = {"patch": draw(patch, patch, 3, m), "token": draw(m), "place": draw(count + 1, m, scale=0.1)}
    params |= {"layers": [layer() for _ in range(depth)], "norm": _norm(draw, m), "head": draw(m, c)}

    def attended(h: jax.Array, p: Any) -> jax.Array:
        size, steps, _ = h.shape
        q, k, v = jnp.moveaxis((_normed(h, p["norm"]) @ p["qkv"]).reshape(size, steps, 3, heads, m // heads), 2, 0)
        weights = jax.nn.softmax(jnp.einsum("nthd,nshd->nhts", q, k) / np.sqrt(m // heads))
        return h + jnp.einsum("nhts,nshd->nthd", weights, v).reshape(size, steps, m) @ p["o"]

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        h = _convolved(x, p["patch"], patch, "VALID").reshape(x.shape[0], count, m)
        h = jnp.concatenate([jnp.broadcast_to(p["token"], (x.shape[0], 1, m)), h], axis=1) + p["place"]
        for layer in p["layers"]:
            h = _mixed(attended(h, layer), layer["mlp"])
        return _normed(h, p["norm"])[:, 0] @ p["head"]

    return apply_fn, params, draw(n, side, side, 3, scale=1.0)


def _convolved(x: jax.Array, w: jax.Array, stride: int = 1, padding: str = "SAME", groups: int = 1) -> jax.Array:
    return lax.conv_general_dilated(
        x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def _mixer(draw: Draw, *, n: int, m: int, c: int, depth: int = 2, side: int = 32, patch: int = 4) -> Problem:
    count = (side // patch) ** 2
    layers = [{"places": _pair(draw, count, 2 * count), "features": _pair(draw, m, 4 * m)} for _ in range(depth)]
    params = {"patch": draw(patch, patch, 3, m), "layers": layers, "norm": _norm(draw, m), "head": draw(m, c)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        h = _convolved(x, p["patch"], patch, "VALID").reshape(x.shape[0], count, m)
        for layer in p["layers"]:
            h = jnp.swapaxes(_mixed(jnp.swapaxes(h, 1, 2), layer["places"]), 1, 2)
            h = _mixed(h, layer["features"])
        return jnp.mean(_normed(h, p["norm"]), axis=1) @ p["head"]

    return apply_fn, params, draw(n, side, side, 3, scale=1.0)


def _convnext(draw: Draw, *, n: int, m: int, c: int, depth: int = 2, side: int = 32) -> Problem:
    layers = [
        {"depth": draw(7, 7, 1, m), "mlp": _pair(draw, m, 4 * m), "layer": draw(m, scale=0.5)} for _ in range(depth)
    ]
    params = {"stem": draw(4, 4, 3, m), "norm": _norm(draw, m), "layers": layers, "head": draw(m, c)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        h = _normed(_convolved(x, p["stem"], 4, "VALID"), p["norm"])
        for layer in p["layers"]:
            inner, mlp = _convolved(h, layer["depth"], groups=m), layer["mlp"]
            inner = jax.nn.gelu(_normed(inner, mlp["norm"]) @ mlp["up"] + mlp["b"]) @ mlp["down"]
            h = h + layer["layer"] * inner
        return jnp.mean(h, axis=(1, 2)) @ p["head"]

    return apply_fn, params, draw(n, side, side, 3, scale=1.0)


def _unet(draw: Draw, *, n: int, m: int, c: int, side: int = 32) -> Problem:
    """Three widths, transposed convolutions on the way up; each output is the mean over a strip of the image."""
    params = {
        "in": draw(3, 3, 3, m),
        "down": [draw(3, 3, m, 2 * m), draw(3, 3, 2 * m, 4 * m)],
        "up": [draw(2, 2, 4 * m, 2 * m), draw(2, 2, 2 * m, m)],
        "join": [draw(3, 3, 4 * m, 2 * m), draw(3, 3, 2 * m, m)],
        "out": draw(m, 1),
    }

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        h, skips = jax.nn.silu(_convolved(x, p["in"])), []
        for w in p["down"]:
            skips.append(h)
            h = jax.nn.silu(_convolved(h, w, 2))
        for up, join in zip(p["up"], p["join"], strict=True):
            h = jnp.concatenate([lax.conv_transpose(h, up, (2, 2), "SAME"), skips.pop()], axis=-1)
            h = jax.nn.silu(_convolved(h, join))
        return jnp.mean((h @ p["out"]).reshape(x.shape[0], c, -1), axis=2)

    return apply_fn, params, draw(n, side, side, 3, scale=1.0)


def _lora(draw: Draw, *, n: int, m: int, c: int, depth: int = 3, steps: int = 32, rank: int = 4) -> Problem:
    """Frozen layers with merged updates of low rank, the only parameters."""
    frozen = [draw(m, m) for _ in range(depth)]
    head = draw(m, c)
    params = [{"a": draw(m, rank), "b": draw(rank, m, scale=0.1)} for _ in range(depth)]

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        for w, update in zip(frozen, p, strict=True):
            x = x + jnp.tanh(x @ (w + update["a"] @ update["b"]))
        return jnp.mean(x, axis=1) @ head

    return apply_fn, params, draw(n, steps, m, scale=1.0)


def _moe(draw: Draw, *, n: int, m: int, c: int, steps: int = 16, experts: int = 8) -> Problem:
    """Each position takes the weights of its first expert by number, scaled by the gate."""
    params = {
        "gate": draw(m, experts),
        "up": draw(experts, m, 2 * m),
        "down": draw(experts, 2 * m, m),
        "head": draw(m, c),
    }
    params = {name: value * (experts**0.5 if value.ndim > 2 else 1) for name, value in params.items()}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        gates = jax.nn.softmax(x @ p["gate"])
        chosen = jnp.argmax(gates, axis=-1)
        h = jax.nn.gelu(jnp.einsum("nti,ntio->nto", x, p["up"][chosen]))
        h = jnp.einsum("nti,ntio->nto", h, p["down"][chosen]) * jnp.max(gates, axis=-1, keepdims=True)
        return jnp.mean(jnp.tanh(x + h), axis=1) @ p["head"]

    return apply_fn, params, draw(n, steps, m, scale=1.0)


def _gnn(draw: Draw, *, n: int, m: int, c: int, nodes: int = 24, features: int = 16, depth: int = 3) -> Problem:
    """Messages over a weighted graph; a sample is its matrix beside its features."""
    sizes = [features, *[m] * depth]
    layers = [{"own": draw(a, b), "near": draw(a, b), "b": draw(b, scale=0.1)} for a, b in itertools.pairwise(sizes)]
    params = {"layers": layers, "head": draw(m, c)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        graph, h = jax.nn.softmax(x[..., :nodes]), x[..., nodes:]
        for layer in p["layers"]:
            h = jnp.tanh(h @ layer["own"] + graph @ h @ layer["near"] + layer["b"])
        return jnp.mean(h, axis=1) @ p["head"]

    return apply_fn, params, draw(n, nodes, nodes + features, scale=1.0)


def _fourier(draw: Draw, *, n: int, m: int, c: int, grid: int = 64, modes: int = 16, depth: int = 2) -> Problem:
    """A neural operator in one dimension."""
    layers = [
        {"re": draw(modes, m, m, scale=m**-0.5), "im": draw(modes, m, m, scale=m**-0.5), "w": draw(m, m)}
        for _ in range(depth)
    ]
    params = {"in": draw(1, m, scale=1.0), "layers": layers, "head": draw(m, c)}

    def apply_fn(p: Any, x: jax.Array) -> jax.Array:
        h = x @ p["in"]
        for layer in p["layers"]:
            spectrum = jnp.fft.rfft(h, axis=1)[:, :modes]
            moved = jnp.einsum("nki,kio->nko", spectrum, lax.complex(layer["re"], layer["im"]))
            h = jax.nn.gelu(jnp.fft.irfft(moved, n=grid, axis=1) + h @ layer["w"])
        return jnp.mean(h, axis=1) @ p["head"]

    return apply_fn, params, draw(n, grid, 1, scale=1.0)


_MODELS: dict[str, Callable[..., Problem]] = {
    "vit": _vit,
    "mixer": _mixer,
    "convnext": _convnext,
    "unet": _unet,
    "lora": _lora,
    "moe": _moe,
    "gnn": _gnn,
    "fourier": _fourier,
}
