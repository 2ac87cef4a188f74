"""A program that computes only those entries of its intermediate values that the output depends on.

A network that reads one position of its last layer, as a language model or a classifier by a token does, needs that
layer at this position alone; its weights then act at one position. Slices are moved up through operations that keep
axes apart, as boxes: an interval of each axis.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplr_jax.ntk.counters import operation
from lplr_jax.ntk.jaxpr import Held, Op, Program, Rewriting

Box = tuple[tuple[int, int], ...]

# Each entry of the result is made of that entry of the operands, or of scalars.
ELEMENTWISE = frozenset(
    {
        "add",
        "add_any",
        "sub",
        "mul",
        "div",
        "max",
        "min",
        "neg",
        "exp",
        "exp2",
        "log",
        "log1p",
        "expm1",
        "tanh",
        "logistic",
        "sin",
        "cos",
        "tan",
        "sinh",
        "cosh",
        "sqrt",
        "rsqrt",
        "pow",
        "integer_pow",
        "square",
        "erf",
        "erfc",
        "abs",
        "sign",
        "is_finite",
        "select_n",
        "clamp",
        "and",
        "or",
        "not",
        "eq",
        "ne",
        "lt",
        "le",
        "gt",
        "ge",
        "convert_element_type",
        "stop_gradient",
        "copy",
        "copy_p",
        "real",
        "imag",
        "conj",
        "complex",
    }
)
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"})


def narrow(program: Program) -> Program:
    """The program without the entries that the output does not depend on; the same one where there are none.

    Args:
        program: Flat program, no loop entered.
    """
    if not any(op.name == "slice" for op in program.ops):
        return program
    want: dict[int, Box] = {program.output: _full(program.avals[program.output].shape)} if program.ops else {}
    for op in reversed(program.ops):
        boxes, _ = _boxes(program, op, want)
        for atom, box in zip(op.ins, boxes, strict=True):
            if isinstance(atom, int):
                want[atom] = _hull(want.get(atom, box), box)
    if all(want.get(slot, whole) == whole for op in program.ops for slot, whole in _results(program, op)):
        return program
    return _Narrowing(program, want).program()


def _results(program: Program, op: Op) -> list[tuple[int, Box]]:
    return [(slot, _full(program.avals[slot].shape)) for slot in op.outs]


def _full(shape: Sequence[int]) -> Box:
    return tuple((0, size) for size in shape)


def _hull(one: Box, two: Box) -> Box:
    return tuple((min(a, c), max(b, d)) for (a, b), (c, d) in zip(one, two, strict=True))


def _sizes(box: Box) -> tuple[int, ...]:
    return tuple(high - low for low, high in box)


def _boxes(program: Program, op: Op, want: dict[int, Box]) -> tuple[list[Box], Box | None]:
    """What of each operand is read for the box that is wanted of the result, and the box that is made of it.

    None for an operation that is left as it is.
    """
    shapes = [program.avals[atom].shape if isinstance(atom, int) else jnp.shape(atom.val) for atom in op.ins]
    everything = [_full(shape) for shape in shapes]
    if len(op.outs) != 1 or not op.ins:
        return everything, None
    (slot,) = op.outs
    result = program.avals[slot].shape
    box, params = want[slot], op.params
    if op.name in ELEMENTWISE:
        return [_of_axes(shape, result, box) if shape else () for shape in shapes], box
    if op.name == "broadcast_in_dim" and len(op.ins) == 1:
        axes = params["broadcast_dimensions"]
        return [_of_axes(shapes[0], [result[axis] for axis in axes], [box[axis] for axis in axes])], box
    if op.name == "transpose":
        back = np.argsort(params["permutation"])
        return [tuple(box[axis] for axis in back)], box
    if op.name == "squeeze" or op.name in _REDUCTIONS:
        gone = {axis % len(shapes[0]) for axis in params["dimensions" if op.name == "squeeze" else "axes"]}
        kept = iter(box)
        return [tuple((0, size) if axis in gone else next(kept) for axis, size in enumerate(shapes[0]))], box
    if op.name == "reshape" and len(op.ins) == 1 and params.get("dimensions") is None:
        read, made = _reshaped(shapes[0], result, box)
        return [read], made
    if op.name == "slice" and params["strides"] is None:
        starts = params["start_indices"]
        return [tuple((low + s, high + s) for (low, high), s in zip(box, starts, strict=True))], box
    if op.name == "dot_general":
        return _of_product(shapes, params["dimension_numbers"], box), box
    return everything, None


def _of_axes(shape: Sequence[int], result: Sequence[int], box: Sequence[tuple[int, int]]) -> Box:
    """What is read of an operand whose axes are those of the result, or one entry that is repeated along them."""
    axes = zip(shape, result, box, strict=True)
    return tuple(limits if size == length else (0, size) for size, length, limits in axes)


def _of_product(shapes: Sequence[tuple[int, ...]], numbers: Any, box: Box) -> list[Box]:
    contract, batch = numbers
    rest, found = iter(box[len(batch[0]) :]), []
    for shape, contracted, mapped in zip(shapes, contract, batch, strict=True):
        whole = list(_full(shape))
        for place, axis in enumerate(mapped):
            whole[axis] = box[place]
        for axis in range(len(shape)):
            if axis not in contracted and axis not in mapped:
                whole[axis] = next(rest)
        found.append(tuple(whole))
    return found


def _reshaped(before: Sequence[int], after: Sequence[int], box: Box) -> tuple[Box, Box]:
    """What a reshape reads and makes: axes that are joined or divided are taken whole."""
    read, made = list(_full(before)), list(_full(after))
    i = j = 0
    while i < len(before) or j < len(after):
        left, right = i, j
        one = two = 1
        while True:  # the shortest run of axes with as many entries on both sides
            if one <= two and i < len(before):
                one, i = one * before[i], i + 1
            elif j < len(after):
                two, j = two * after[j], j + 1
            else:
                one, i = one * before[i], i + 1
            if one == two or (i == len(before) and j == len(after)):
                break
        wide = [axis for axis in range(left, i) if before[axis] != 1]
        there = [axis for axis in range(right, j) if after[axis] != 1]
        if len(wide) == len(there) == 1:
            read[wide[0]] = made[there[0]] = box[there[0]]
    return tuple(read), tuple(made)


class _Narrowing(Rewriting):
    def __init__(self, program: Program, want: dict[int, Box]):
        super().__init__(program)
        self.want = want
        self.have: dict[int, Box] = {}
        self.views: dict[tuple[int, Box], int] = {}

    def program(self) -> Program:
        given = self.given
        for op in given.ops:
            self._add(op)
        return self.assembled(self._view(given.output, _full(given.avals[given.output].shape)))

    def _view(self, atom: Any, box: Box) -> Any:
        """What holds a box of a slot or literal."""
        if not isinstance(atom, int):
            value = np.asarray(atom.val)
            return atom if box == _full(value.shape) else Held(value[tuple(slice(*limits) for limits in box)])
        have = self.have.get(atom, _full(self.given.avals[atom].shape))
        slot = self.named(atom)
        if have == box:
            return slot
        if (atom, box) not in self.views:
            starts = [low - base for (low, _), (base, _) in zip(box, have, strict=True)]
            limits = [high - base for (_, high), (base, _) in zip(box, have, strict=True)]
            cut = operation(lambda a: lax.slice(a, starts, limits), self.avals[slot], slot, self.new)
            self.ops.append(cut)
            (self.views[atom, box],) = cut.outs
        return self.views[atom, box]

    def _add(self, op: Op) -> None:
        boxes, made = _boxes(self.given, op, self.want)
        ins = tuple(self._view(atom, box) for atom, box in zip(op.ins, boxes, strict=True))
        whole = [box for _, box in _results(self.given, op)]
        if made is None or (made == whole[0] and op.name != "slice"):
            self.ops.append(replace(op, ins=ins))
            return
        (slot,) = op.outs
        self.have[slot] = made
        if op.name == "slice":  # what holds the box is the slice
            self.same[slot] = ins[0]
            return
        params = dict(op.params)
        if op.name in ("broadcast_in_dim", "reshape"):
            params["shape" if op.name == "broadcast_in_dim" else "new_sizes"] = _sizes(made)
        avals = list(map(self.aval, ins))
        bind = lambda *operands: op.eqn.primitive.bind(*operands, **params)  # noqa: E731
        eqn = jax.make_jaxpr(bind)(*avals).jaxpr.eqns[-1]
        self.avals[slot] = jax.ShapeDtypeStruct(_sizes(made), self.avals[slot].dtype)
        self.ops.append(Op(eqn, ins, op.outs))
