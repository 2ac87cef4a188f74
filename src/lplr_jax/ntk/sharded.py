"""The kernel over a mesh: each device keeps the features of its samples and holds its rows of Θ.

Features travel round the ring of devices. Without x2 each device meets only the half of the others that follow it, and
sends the mirror image of what it formed to the device that owns it, so every device does its share of the work.
Samples are padded to a multiple of the devices by repeating the last one.
"""

from collections.abc import Callable, Iterator
from math import ceil, gcd
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from lplr_jax.ntk.result import blocks, symmetric


def default_mesh(samples: int) -> Mesh | None:
    """All devices in a row, or None where there is one, a default device is set, or devices outnumber samples."""
    devices = jax.devices()
    default = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    if len(devices) == 1 or default is not None or samples < len(devices):
        return None
    return Mesh(np.asarray(devices), ("rows",))


def share(n: int, mesh: Mesh) -> int:
    """Samples for each device."""
    return ceil(n / mesh.size)


def kernel(run: Any, arrays: list[jax.Array], first: list[jax.Array], second: list[jax.Array] | None) -> jax.Array:
    """Run the compiled kernel of a mesh.

    Args:
        run: The engine's compiled call, with a mesh and with the arrays that the function captures.
        arrays: Array leaves of the parameters, the same in every process.
        first: Leaves of x1, the same in every process.
        second: Leaves of x2 or None.

    Returns:
        The kernel, its rows sharded over the mesh where the devices divide them, or else in blocks (`placement`).
    """
    return run.whole(*_placed(run, arrays, first, second))


def strips(run: Any, arrays: list[jax.Array], first: list[jax.Array]) -> Iterator[tuple[int, np.ndarray]]:
    """First row, and rows on the host, of every device of this process; nothing of them moves to another one.

    Args:
        run: As for `kernel`, for one set of samples.
        arrays: As for `kernel`.
        first: As for `kernel`.
    """
    rows = run.sides[0] * run.rows
    theta = compile_strips(run)(*_placed(run, arrays, first, None))
    for shard in theta.addressable_shards:
        start = shard.index[0].start or 0
        if start < rows:  # else the device has nothing but samples that were repeated
            yield start, np.asarray(shard.data)[: rows - start, :rows]


def _placed(run: Any, arrays: list[jax.Array], first: list[jax.Array], second: list[jax.Array] | None) -> Any:
    mesh: Mesh = run.call.mesh
    rows = [_place(mesh, _pad(a, mesh.size), P(mesh.axis_names)) for a in first]
    cols = None if second is None else [_place(mesh, _pad(a, mesh.size), P(mesh.axis_names)) for a in second]
    whole = [_place(mesh, a, P()) for a in arrays]
    captured = [_place(mesh, a, P()) for a in run.consts]
    return whole, captured, rows, cols


def compile_kernel(run: Any) -> Callable[..., jax.Array]:
    """The compiled function (arrays, consts, padded x1, padded x2) -> kernel for the mesh of the call."""
    n1, n2 = run.sides[0], run.sides[-1]
    shape = (n1 * run.rows, run.traced.c if run.call.outputs == "diagonal" else n2 * run.rows)
    inner = compile_strips(run)

    def padded(arrays: Any, consts: Any, first: Any, second: Any) -> jax.Array:
        theta = inner(arrays, consts, first, second)
        return theta[: shape[0], : shape[1]]

    return jax.jit(padded, out_shardings=placement(run.call.mesh, shape))


def compile_strips(run: Any) -> Callable[..., jax.Array]:
    """The same for the kernel of the padded samples, each device with the rows of its own."""
    mesh: Mesh = run.call.mesh
    axes, size = mesh.axis_names, mesh.size
    symmetric = run.call.n2 is None

    def ring(tree: Any, shift: int) -> Any:
        """What the device `shift` places further on holds."""
        return lax.ppermute(tree, axes, [((d + shift) % size, d) for d in range(size)])

    def local(arrays: Any, consts: Any, first: Any, second: Any) -> jax.Array:
        me = lax.axis_index(axes)
        total = None
        for group in run.groups:
            one = run.features(group, arrays, consts, first)
            two = one if symmetric else run.features(group, arrays, consts, second)
            diagonal = run.call.outputs == "diagonal"
            part = run.diagonal(group, one, two) if diagonal else strip(group, one, two, me)
            total = part if total is None else total + part
        return jnp.zeros((), run.dtype) if total is None else total

    def strip(group: Any, one: Any, two: Any, me: Any) -> jax.Array:
        height, width = (jax.tree.leaves(f)[0].shape[0] * run.rows for f in (one, two))

        def block(other: Any, same: bool) -> jax.Array:
            empty = jnp.zeros((height, width), run.dtype)
            return _block(run, group, same, empty, one, other)

        def put(strip: jax.Array, value: jax.Array, owner: Any) -> jax.Array:
            return lax.dynamic_update_slice(strip, value, (jnp.zeros_like(owner), owner % size * width))

        result = jnp.zeros((height, width * size), run.dtype)
        result = put(result, block(two, symmetric), me)
        for shift in range(1, size // 2 + 1 if symmetric else size):
            value = block(ring(two, shift), False)
            if not symmetric:
                result = put(result, value, me + shift)
                continue
            mirror = ring(value.T, size - shift)  # formed by the device `shift` places back
            if 2 * shift == size:  # both of a pair formed the same block: one of the two counts, for exact symmetry
                result = put(result, jnp.where(me < shift, value, mirror), me + shift)
            else:
                result = put(put(result, value, me + shift), mirror, me - shift + size)
        return result

    spec = P(axes)
    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), spec, spec), out_specs=spec, check_vma=False))


def placement(mesh: Mesh, shape: tuple[int, int]) -> NamedSharding:
    """Rows of a matrix on the devices of a mesh, or blocks of it where the devices do not divide its rows.

    JAX shards in equal parts. Parts of which there are fewer than devices are held several times.
    """
    down = gcd(shape[0], mesh.size)
    if down == mesh.size:
        return NamedSharding(mesh, P(mesh.axis_names))
    across = gcd(shape[1], mesh.size // down)
    devices = mesh.devices.reshape(down, across, mesh.size // (down * across))
    return NamedSharding(Mesh(devices, ("down", "across", "same")), P("down", "across"))


def _block(run: Any, group: Any, same: bool, empty: jax.Array, one: Any, two: Any) -> jax.Array:
    """The block of Θ between two sets of samples, tile by tile; `same` if they are one set.

    Tiles all have one shape, so the last of a row or column may begin before the previous one ends; its entries are the
    same there.
    """
    rows, cols = (list(blocks(jax.tree.leaves(f)[0].shape[0], group.tile)) for f in (one, two))
    starts = np.array([(r.start, c.start) for r in rows for c in cols if not same or c.own <= r.own], np.int32)

    def body(step: Any, theta: jax.Array) -> jax.Array:
        r, c = jnp.asarray(starts)[step]
        value = run.tile(group, _cut(one, r, group.tile), _cut(two, c, group.tile))
        if same:
            value = jnp.where(r == c, symmetric(value, r), value)
        theta = lax.dynamic_update_slice(theta, value, (r * run.rows, c * run.rows))
        return lax.dynamic_update_slice(theta, value.T, (c * run.rows, r * run.rows)) if same else theta

    return body(0, empty) if len(starts) == 1 else lax.fori_loop(0, len(starts), body, empty)


def _cut(tree: Any, start: Any, size: int) -> Any:
    """Rows [start, start + size) of every array; the array itself where it has no more."""
    return jax.tree.map(lambda a: a if a.shape[0] <= size else lax.dynamic_slice_in_dim(a, start, size), tree)


def _pad(array: Any, size: int) -> np.ndarray:
    """The samples on the host, the last repeated until `size` divides them."""
    host = np.asarray(array)
    return np.concatenate([host, np.repeat(host[-1:], -len(host) % size, axis=0)])


def _place(mesh: Mesh, array: Any, spec: P) -> jax.Array:
    extended = jnp.issubdtype(array.dtype, jax.dtypes.extended)
    return jax.device_put(array if extended else np.asarray(array), NamedSharding(mesh, spec))
