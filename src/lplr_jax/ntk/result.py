"""Where features are cut and tiles of Θ put together: on the host where it computes itself, on the device elsewhere.

Both results take the tiles of one row and one column of blocks as they come. Blocks all have one shape, so the last
one begins before the previous one ends; of each tile only the entries that are its own are taken.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax import lax

# Tiles under way while the host writes those before: one is computed, the next waits (calibrated: more gains nothing).
AHEAD = 2


@dataclass(frozen=True)
class Span:
    """One block of rows or columns of Θ.

    Attributes:
        start: Its first row.
        own: The first row that is its own; those before belong to the previous block.
        stop: The row behind its last one.
    """

    start: int
    own: int
    stop: int


def blocks(total: int, size: int) -> Iterator[Span]:
    """Cut `total` rows into blocks of one size, the last moved back to end at `total`."""
    for own in range(0, total, size):
        stop = min(own + size, total)
        yield Span(max(stop - size, 0), own, stop)


def cut(features: Any, spans: Sequence[Span]) -> list[Any]:
    """Cut arrays with the sample as leading axis into arrays for each block; on a CPU these are views, not copies."""
    leaves, tree = jax.tree.flatten(features)
    if len(spans) == 1:
        return [features]
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return [tree.unflatten([leaf[span.start : span.stop] for leaf in leaves]) for span in spans]
    device = next(iter(leaves[0].devices()))
    if device.platform != "cpu":
        return [tree.unflatten(_cut(leaves, span.start, span.stop - span.start)) for span in spans]
    host = [np.asarray(leaf) for leaf in leaves]
    return [
        tree.unflatten(jax.device_put([a[span.start : span.stop] for a in host], device, may_alias=True))
        for span in spans
    ]


@partial(jax.jit, static_argnums=2)
def _cut(leaves: list[jax.Array], start: Any, size: int) -> list[jax.Array]:
    return [lax.dynamic_slice_in_dim(leaf, start, size) for leaf in leaves]


class HostResult:
    """Θ as a NumPy array that becomes a JAX array of the CPU without a copy: no program is compiled to write it."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, device: Any) -> None:
        self._theta, self._device = _aligned(shape, np.dtype(dtype)), device
        self._waiting: deque[tuple[jax.Array, Span, Span, bool, bool]] = deque()

    def add(self, tile: jax.Array, rows: Span, cols: Span, *, mirror: bool, first: bool) -> None:
        """Take a tile.

        Args:
            tile: Entries of Θ.
            rows: Its rows.
            cols: Its columns.
            mirror: Whether Θ is symmetric and the tile stands for its mirror image too.
            first: Whether the tile is the first one at its place; others are added.
        """
        self._waiting.append((tile, rows, cols, mirror, first))
        if len(self._waiting) > AHEAD:
            self._write(*self._waiting.popleft())

    def finish(self) -> jax.Array:
        """Return Θ."""
        while self._waiting:
            self._write(*self._waiting.popleft())
        return jax.device_put(self._theta, self._device, may_alias=True)

    def _write(self, tile: jax.Array, rows: Span, cols: Span, mirror: bool, first: bool) -> None:
        value = np.asarray(tile)[rows.own - rows.start :, cols.own - cols.start :]
        diagonal = mirror and rows == cols
        if diagonal:
            value = np.tril(value)
            value += np.tril(value, -1).T
        self._put(slice(rows.own, rows.stop), slice(cols.own, cols.stop), value, first)
        if mirror and not diagonal:
            self._put(slice(cols.own, cols.stop), slice(rows.own, rows.stop), value.T, first)

    def _put(self, rows: slice, cols: slice, value: np.ndarray, first: bool) -> None:
        if first:
            self._theta[rows, cols] = value
        else:
            self._theta[rows, cols] += value


class DeviceResult:
    """Θ on an accelerator, updated in place."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, device: Any) -> None:
        self._theta = jnp.zeros(shape, dtype, device=device)

    def add(self, tile: jax.Array, rows: Span, cols: Span, *, mirror: bool, first: bool) -> None:
        """Take a tile; arguments as in `HostResult.add`."""
        del first  # entries begin as zeros
        places = tuple(np.int32(value) for span in (rows, cols) for value in (span.start, span.own))
        kind = "plain" if not mirror else "diagonal" if rows == cols else "mirrored"
        self._theta = _add(self._theta, tile, *places, kind=kind)

    def finish(self) -> jax.Array:
        """Return Θ."""
        return self._theta


@partial(jax.jit, static_argnames="kind", donate_argnames="theta")
def _add(theta: jax.Array, tile: jax.Array, row: Any, own_row: Any, col: Any, own_col: Any, *, kind: str) -> jax.Array:
    own = (index(tile, 0) >= own_row - row) & (index(tile, 1) >= own_col - col)
    value = jnp.where(own, symmetric(tile, row) if kind == "diagonal" else tile, jnp.zeros_like(tile))
    theta = _add_at(theta, value, row, col)
    return _add_at(theta, value.T, col, row) if kind == "mirrored" else theta


def _add_at(theta: jax.Array, value: jax.Array, row: Any, col: Any) -> jax.Array:
    return lax.dynamic_update_slice(theta, value + lax.dynamic_slice(theta, (row, col), value.shape), (row, col))


def index(block: jax.Array, axis: int) -> jax.Array:
    """Return the number of each entry along an axis."""
    return lax.broadcasted_iota(jnp.int32, block.shape, axis)


def symmetric(block: jax.Array, start: Any) -> jax.Array:
    """Return the lower triangle and its mirror image.

    Args:
        block: A block on the diagonal.
        start: Its first row, known when the program runs: XLA would work out a mask of constants entry by entry, which
            takes a second for 65,000 of them.
    """
    return jnp.where(index(block, 0) + start >= index(block, 1) + start, block, block.T)


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return zeros at an address that XLA takes without a copy."""
    alignment = 64
    size = int(np.prod(shape)) * dtype.itemsize
    raw = np.zeros(size + alignment, np.uint8)
    start = -raw.ctypes.data % alignment
    return raw[start : start + size].view(dtype).reshape(shape)


def result(shape: tuple[int, ...], tile: jax.Array) -> HostResult | DeviceResult:
    """Return an empty Θ for tiles like the given one; a traced one has no device yet, and stays in the program."""
    if isinstance(tile, jax.core.Tracer):
        return DeviceResult(shape, tile.dtype, None)
    device = next(iter(tile.devices()))
    return (HostResult if device.platform == "cpu" else DeviceResult)(shape, tile.dtype, device)
