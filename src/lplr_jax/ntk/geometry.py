"""Matrix products, convolutions, row lookups and biases brought to one form: operand h[b, s, k], cotangent δ[b, s, m].

b counts batch entries or feature groups, s positions, k contracted and m free entries of the leaf. The gradient of a
real leaf in a complex product is Re Σ_s h δ = Σ_s Re h Re δ - Im h Im δ: twice as many real positions.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplr_jax.ntk.jaxpr import Op, Program
from lplr_jax.ntk.walk import AFFINE, Apply, Enter, Use


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
        rows: Matrices (k, m) of the leaf, of which every position takes one.
        row: From the other operand and the lookup's indices to the number of that matrix (b, s).
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
    rows: int = 1
    row: Callable[..., jax.Array] | None = None


def geometry(program: Program, use: Use, *, by_input: bool = False) -> Geometry | None:
    """Form of the use; None where its way is no isometry, or for another operation than those named above.

    Args:
        program: The program.
        use: The use.
        by_input: Whether the positions of a convolution are the entries of its operand, and δ is cut into patches.
    """
    if not use.isometric:
        return None
    convolution = _transposed if by_input and dilated(use) else _convolution
    rules = {"dot_general": _matrix_product, "conv_general_dilated": convolution, "gather": _row_lookup}
    rule = rules.get(use.op.name, _bias if use.op.name in AFFINE else None)
    form = None if rule is None else rule(program, use)
    if form is not None and use.merge is not None:
        form = _merged(program, use, form) if use.route is None else None
    elif form is not None and use.route is not None:
        form = _routed(program, use, form)
    if form is None or not jnp.issubdtype(program.avals[use.op.outs[0]].dtype, jnp.complexfloating):
        return form
    return _real(form)


def dilated(use: Use) -> bool:
    """Whether the operation is a transposed convolution: its operand is spread out, and the window moves by one."""
    params = use.op.params
    if use.op.name != "conv_general_dilated" or any(stride != 1 for stride in params["window_strides"]):
        return False
    return any(dilation > 1 for dilation in params["lhs_dilation"])


def _real(form: Geometry) -> Geometry:
    """Form of a real leaf in a complex operation, in real numbers."""
    if form.lookup:
        return replace(form, cotangent=lambda delta: form.cotangent(delta).real, layout=("complex", form.layout))

    def operand(*given: Any) -> jax.Array:
        h = form.operand(*given)
        return jnp.concatenate([h.real, -h.imag], axis=1)

    def cotangent(*given: Any) -> jax.Array:
        delta = form.cotangent(*given)
        return jnp.concatenate([delta.real, delta.imag], axis=1)

    row = None if form.row is None else lambda *given: jnp.tile(form.row(*given), (1, 2))  # pyright: ignore[reportOptionalCall]
    layout = ("complex", form.layout)
    return replace(form, s=2 * form.s, operand=operand, cotangent=cotangent, row=row, layout=layout)


def _routed(program: Program, use: Use, form: Geometry) -> Geometry | None:
    """Form of a leaf of matrices, of which every batch entry of a product takes one by its number.

    None where a batch entry takes entries of several, or in an order of its own.
    """
    step = use.route
    if step is None or form.lookup or use.op.name != "dot_general":
        return None
    before = use.chain[: use.chain.index(step)]
    rest = use.chain[use.chain.index(step) + 1 :]
    lookup = _row_lookup(program, replace(use, op=step.op, position=0, factors=()))
    if lookup is None or any(isinstance(later, Enter) for later in rest):
        return None
    if any(isinstance(earlier, Enter) and not earlier.sliced for earlier in before):
        return None
    array = np.arange(lookup.s * lookup.m).reshape(program.avals[step.op.outs[0]].shape)
    for later in rest:
        if isinstance(later, Apply):
            array = moved(program, later.op, array)
    array = form.entries(array)
    taken, place = np.divmod(array, lookup.m)
    which = taken[:, :1, :1]
    if array.size != lookup.s * lookup.m or np.any(taken != which) or np.any(place != place[:1]):
        return None
    which = which.reshape(-1)

    def row(_: Any, index: Any) -> jax.Array:
        return jnp.repeat(lookup.operand(index)[0][which], form.s).reshape(1, -1)

    s = form.b * form.s
    return Geometry(
        1,
        s,
        form.k,
        form.m,
        lambda h, _: form.operand(h).reshape(1, s, form.k),
        lambda delta, _: form.cotangent(delta).reshape(1, s, form.m),
        lambda leaf: leaf,
        (form.layout, "routed"),
        rows=lookup.k,
        row=row,
    )


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
IN_PLACE = frozenset({"copy", "copy_p", "convert_element_type", "neg", "mul", "div", "complex"}) | AFFINE


def _shape(program: Program, atom: Any) -> tuple[int, ...]:
    return program.avals[atom].shape if isinstance(atom, int) else jnp.shape(atom.val)


def _bias(program: Program, use: Use) -> Geometry | None:
    """Form of a leaf every entry of which is added to one entry of the result, None for any other."""
    m, shape = math.prod(program.avals[use.op.outs[0]].shape), _shape(program, use.op.ins[use.position])
    complex_ = jnp.issubdtype(program.avals[use.op.outs[0]].dtype, jnp.complexfloating)
    if math.prod(shape) != m or use.factors or complex_:
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


def _transposed(program: Program, use: Use) -> Geometry:
    """Form of a transposed convolution whose positions are the entries of its operand, before they are spread out."""
    params = use.op.params
    numbers = params["dimension_numbers"]
    lhs, rhs, out_spec = numbers.lhs_spec, numbers.rhs_spec, numbers.out_spec
    groups = params["feature_group_count"]
    kernel, image = (_shape(program, use.op.ins[at]) for at in (1, 0))
    result = program.avals[use.op.outs[0]].shape
    window = tuple(kernel[d] for d in rhs[2:])
    depth, features = kernel[rhs[1]], kernel[rhs[0]] // groups
    taps, axes = math.prod(window), len(window)
    s = image[lhs[0]] * math.prod(image[d] for d in lhs[2:])

    rows = []
    for axis in range(axes):  # pixels of the result that an entry reaches, and one behind the last where there is none
        dilation, last = params["rhs_dilation"][axis], result[out_spec[2 + axis]]
        entries_at = np.arange(image[lhs[2 + axis]])[:, None] * params["lhs_dilation"][axis]
        pixels = params["padding"][axis][0] + entries_at - np.arange(window[axis]) * dilation
        pixels = np.where((pixels >= 0) & (pixels < last), pixels, last)
        rows.append(np.expand_dims(pixels, [d for d in range(2 * axes) if d % axes != axis]))

    def operand(h: Any) -> jax.Array:
        h = jnp.transpose(h, (lhs[0], *lhs[2:], lhs[1])).reshape(s, groups, depth)
        return jnp.moveaxis(h, 1, 0)

    def cotangent(delta: Any) -> jax.Array:
        delta = jnp.transpose(delta, (out_spec[0], *out_spec[2:], out_spec[1]))
        patches = delta.at[(slice(None), *rows)].get(mode="fill", fill_value=0)
        patches = jnp.moveaxis(patches.reshape(s, taps, groups, features), 2, 0)
        return patches.reshape(groups, s, taps * features)

    def entries(leaf: np.ndarray) -> np.ndarray:
        leaf = leaf.transpose((*rhs[2:], rhs[1], rhs[0])).reshape(taps, depth, groups, features)
        return leaf.transpose((2, 1, 0, 3)).reshape(groups, depth, taps * features)

    return Geometry(groups, s, depth, taps * features, operand, cotangent, entries, ("transposed", out_spec))


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
