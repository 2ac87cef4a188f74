"""Matrix products, convolutions, row lookups and biases brought to one form: operand h[b, s, k], cotangent δ[b, s, m].

b counts batch entries or feature groups, s positions, k contracted and m free entries of the leaf.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplr_jax.ntk.jaxpr import Op, Program
from lplr_jax.ntk.walk import AFFINE, Enter, Use


@dataclass(frozen=True, eq=False)
class Geometry:
    """Sizes b, s, k, m of a use, and how its operand and its cotangent are laid out in that form.

    Attributes:
        b: Batch entries or feature groups.
        s: Positions.
        k: Contracted entries of the leaf, or rows of a table.
        m: Free entries of the leaf.
        operand: From the other operand to h (b, s, k), or to row numbers (1, s) of a table, -1 where it fills in.
        cotangent: From the cotangent at the result to δ (b, s, m); as `operand`, with what the leaf is merged with.
        entries: From an array of the leaf's shape at the operation to (b, k, m).
        layout: What the cotangent's layout depends on beside the sizes.
        lookup: Whether rows are looked up.
    """

    b: int
    s: int
    k: int
    m: int
    operand: Callable[..., jax.Array]
    cotangent: Callable[..., jax.Array]
    entries: Callable[[np.ndarray], np.ndarray]
    layout: Hashable
    lookup: bool = False


def geometry(program: Program, use: Use) -> Geometry | None:
    """Form of the use; None where its way is no isometry, or for another operation than those named above."""
    if not use.isometric:
        return None
    rules = {"dot_general": _matrix_product, "conv_general_dilated": _convolution, "gather": _row_lookup}
    rule = rules.get(use.op.name, _bias if use.op.name in AFFINE else None)
    form = None if rule is None else rule(program, use)
    return form if form is None or use.merge is None else _merged(program, use, form)


def _merged(program: Program, use: Use, form: Geometry) -> Geometry | None:
    """Form of A in x f(A B) or x f(B A), where f moves entries: the other factor goes to h or δ, whichever it meets.

    None where its axes do not meet one of the two alone, or the leaf has several of such products.
    """
    step = use.merge
    if step is None or form.b != 1 or form.lookup or use.op.name in AFFINE:
        return None
    (contract, batch), at = step.op.params["dimension_numbers"], step.at
    mine, other, made = _shape(program, step.op.ins[at]), _shape(program, step.op.ins[1 - at]), step.op.outs[0]
    rest = use.chain[use.chain.index(step) + 1 :]
    if batch[0] or any(isinstance(later, Enter) and later.sliced for later in rest):
        return None
    free = tuple(d for d in range(len(mine)) if d not in contract[at])
    there = tuple(d for d in range(len(other)) if d not in contract[1 - at])
    rank, own = (math.prod(mine[d] for d in axes) for axes in (contract[at], free))
    theirs = math.prod(other[d] for d in there)
    numbers = np.arange(own * theirs).reshape(program.avals[made].shape)
    array = numbers
    for later in rest:
        array = array if isinstance(later, Enter) else moved(program, later.op, array)
    array = form.entries(array).reshape(form.k, form.m)
    product = numbers.reshape(own, theirs) if at == 0 else numbers.reshape(theirs, own).T

    def times(positions: jax.Array, factor: jax.Array) -> jax.Array:
        matrix = jnp.transpose(factor, (*there, *contract[1 - at])).reshape(theirs, rank)
        return jnp.einsum("bsi,ir->bsr", positions, matrix, precision=lax.Precision.HIGHEST)

    def of_leaf(leaf: np.ndarray) -> np.ndarray:
        return leaf.transpose((*free, *contract[at])).reshape(1, own, rank)

    factor = step.op.ins[1 - at]
    layout = (form.layout, "merged", factor if isinstance(factor, int) else id(factor))
    if np.array_equal(array, product):  # x A B: δ Bᵀ meets x
        return Geometry(
            1,
            form.s,
            own,
            rank,
            lambda h, _: form.operand(h),
            lambda delta, b: times(form.cotangent(delta), b),
            of_leaf,
            layout,
        )
    if np.array_equal(array, product.T):  # x B A: x B meets δ
        return Geometry(
            1,
            form.s,
            rank,
            own,
            lambda h, b: times(form.operand(h), b),
            lambda delta, _: form.cotangent(delta),
            lambda leaf: of_leaf(leaf).swapaxes(1, 2),
            (form.layout, "merged"),
        )
    return None


def moved(program: Program, op: Op, array: np.ndarray) -> np.ndarray:
    """An isometric operation of a way, on the numbers of the entries."""
    if op.name in IN_PLACE:
        return array
    if op.name == "transpose":
        return array.transpose(op.params["permutation"])
    if op.name == "rev":
        return np.flip(array, op.params["dimensions"])
    if op.name == "slice":
        limits = zip(op.params["start_indices"], op.params["limit_indices"], strict=True)
        strides = op.params["strides"] or (1,) * array.ndim
        return array[tuple(slice(*limit, stride) for limit, stride in zip(limits, strides, strict=True))]
    return array.reshape(program.avals[op.outs[0]].shape)  # the other moves leave the order of entries


# Operations of an isometric way that leave every entry where it is.
IN_PLACE = frozenset({"copy", "copy_p", "convert_element_type", "neg", "mul", "div"}) | AFFINE


def _shape(program: Program, atom: Any) -> tuple[int, ...]:
    return program.avals[atom].shape if isinstance(atom, int) else jnp.shape(atom.val)


def _bias(program: Program, use: Use) -> Geometry | None:
    """Form of a leaf every entry of which is added to one entry of the result, None for any other."""
    m, shape = math.prod(program.avals[use.op.outs[0]].shape), _shape(program, use.op.ins[use.position])
    if math.prod(shape) != m or use.factors:
        return None
    sign = -1 if use.op.name == "sub" and use.position == 1 else 1
    one = np.full((1, 1, 1), sign, program.avals[use.source].dtype)
    return Geometry(
        1,
        1,
        1,
        m,
        lambda _: jnp.asarray(one),
        lambda delta: delta.reshape(1, 1, m),
        lambda leaf: leaf.reshape(1, 1, m),
        "bias",
    )


def _matrix_product(program: Program, use: Use) -> Geometry:
    contract, batch = use.op.params["dimension_numbers"]
    at = use.position
    mine, other = _shape(program, use.op.ins[at]), _shape(program, use.op.ins[1 - at])
    free = tuple(d for d in range(len(mine)) if d not in (*contract[at], *batch[at]))
    there = tuple(d for d in range(len(other)) if d not in (*contract[1 - at], *batch[1 - at]))
    b = math.prod(mine[d] for d in batch[at])
    k = math.prod(mine[d] for d in contract[at])
    m = math.prod(mine[d] for d in free)
    s = math.prod(other[d] for d in there)

    def operand(h: Any) -> jax.Array:
        return jnp.transpose(h, (*batch[1 - at], *there, *contract[1 - at])).reshape(b, s, k)

    def cotangent(delta: Any) -> jax.Array:  # the result has batch axes, then those of the left operand, then the right
        return jnp.swapaxes(delta.reshape(b, m, s), 1, 2) if at == 0 else delta.reshape(b, s, m)

    def entries(leaf: np.ndarray) -> np.ndarray:
        return leaf.transpose((*batch[at], *contract[at], *free)).reshape(b, k, m)

    return Geometry(b, s, k, m, operand, cotangent, entries, ("dot_general", at))


def _convolution(program: Program, use: Use) -> Geometry:
    params = use.op.params
    numbers = params["dimension_numbers"]
    lhs, rhs = numbers.lhs_spec, numbers.rhs_spec
    out_spec = numbers.out_spec
    groups = params["feature_group_count"]
    kernel = _shape(program, use.op.ins[1])
    result = program.avals[use.op.outs[0]].shape
    images = _shape(program, use.op.ins[0])[lhs[0]]
    window = tuple(kernel[d] for d in rhs[2:])
    spatial = tuple(result[d] for d in out_spec[2:])
    depth, features = kernel[rhs[1]], kernel[rhs[0]] // groups
    s = images * math.prod(spatial)
    k = depth * math.prod(window)

    axes, rows = len(window), []
    for axis in range(axes):  # pixels of the padded image, (*spatial, *window) when broadcast together
        stride, dilation = params["window_strides"][axis], params["rhs_dilation"][axis]
        pixels = np.arange(spatial[axis])[:, None] * stride + np.arange(window[axis]) * dilation
        rows.append(np.expand_dims(pixels, [d for d in range(2 * axes) if d % axes != axis]))

    def by_group(positions: jax.Array) -> jax.Array:
        return jnp.moveaxis(positions.reshape(s, groups, -1), 1, 0)

    def operand(h: Any) -> jax.Array:
        h = jnp.transpose(h, (lhs[0], *lhs[2:], lhs[1]))
        padding = [(0, 0, 0)]
        padding += [(*p, d - 1) for p, d in zip(params["padding"], params["lhs_dilation"], strict=True)]
        h = lax.pad(h, jnp.zeros((), h.dtype), [*padding, (0, 0, 0)])
        # One gather compiles several times faster than a slice for every entry of the window, and runs no slower.
        patches = h.at[(slice(None), *rows)].get(mode="promise_in_bounds")
        patches = patches.reshape(s, math.prod(window), groups, depth)
        return by_group(jnp.swapaxes(patches, 1, 2))

    def cotangent(delta: Any) -> jax.Array:
        return by_group(jnp.transpose(delta, (out_spec[0], *out_spec[2:], out_spec[1])))

    def entries(leaf: np.ndarray) -> np.ndarray:
        leaf = leaf.transpose((*rhs[2:], rhs[1], rhs[0])).reshape(k, groups, features)
        return np.moveaxis(leaf, 1, 0)

    return Geometry(groups, s, k, features, operand, cotangent, entries, ("conv", out_spec))


def _row_lookup(program: Program, use: Use) -> Geometry | None:
    """Form of a gather of whole rows of a table, None for any other."""
    numbers, mode = use.op.params["dimension_numbers"], str(use.op.params["mode"])
    table, indices = (_shape(program, atom) for atom in use.op.ins)
    rows = numbers.start_index_map == (0,) and numbers.collapsed_slice_dims == (0,)
    whole = tuple(use.op.params["slice_sizes"]) == (1, *table[1:])
    last = len(program.avals[use.op.outs[0]].shape)
    trailing = numbers.offset_dims == tuple(range(len(indices) - 1, last))
    # A scaled table would scale the comparison of its row numbers.
    if not (rows and whole and trailing) or numbers.operand_batching_dims or use.factors:
        return None
    m = math.prod(table[1:])
    s = math.prod(indices[:-1])

    def numbers_of(index: Any) -> jax.Array:
        index = index.reshape(1, -1)
        inside = (index >= 0) & (index < table[0])
        if "CLIP" in mode.upper():
            return jnp.clip(index, 0, table[0] - 1)
        return jnp.where(inside, index, np.array(-1, index.dtype))

    return Geometry(
        1,
        s,
        table[0],
        m,
        numbers_of,
        lambda delta: delta.reshape(1, s, m),
        lambda leaf: leaf.reshape(1, table[0], m),
        "gather",
        lookup=True,
    )
