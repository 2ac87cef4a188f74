"""Slices of an array by the counter of a loop, `w[i]` in a `fori_loop`, as what they are: scanned arrays.

A counter is a scalar of the loop's state that starts at a literal and is made of itself and of literals, or an entry of
an `iota`. Where the rows that it takes are evenly spaced and inside of the array, those rows are the slices.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplr_jax.ntk.jaxpr import Held, Op

# Scalars alone pass through them.
_ARITHMETIC: Mapping[str, Callable[..., Any]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "neg": np.negative,
    "max": np.maximum,
    "min": np.minimum,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "select_n": lambda which, *cases: cases[int(which)],
    **dict.fromkeys(("convert_element_type", "broadcast_in_dim", "reshape", "squeeze", "copy"), lambda value: value),
}


def operation(function: Callable[[Any], Any], aval: Any, atom: Any, new: Callable[[Any], int], **place: Any) -> Op:
    """A function that is one primitive, as an operation on a slot or literal."""
    eqns = jax.make_jaxpr(function)(aval).jaxpr.eqns
    if not eqns:  # JAX leaves out what changes nothing
        eqns = jax.make_jaxpr(jnp.copy)(aval).jaxpr.eqns
    eqn = eqns[-1]
    return Op(eqn, (atom,), (new(eqn.outvars[0].aval),), **place)


def counters(
    length: int, reverse: bool, carried: Sequence[tuple[Any, Any, Any]], scanned: Sequence[tuple[Any, Any]], ops: Any
) -> dict[Any, np.ndarray]:
    """Numbers that are known in every step of a loop.

    Args:
        length: Steps.
        reverse: Whether the last entry of a scanned array comes first.
        carried: Slot inside, start and next value of what is handed from step to step; slots or literals.
        scanned: Slot inside and numbers (steps,) of scanned arrays that are known.
        ops: Operations of the body.

    Returns:
        Integer of each known slot in every step, by the place of the step in scanned arrays.
    """
    state = {slot: _number(start) for slot, start, _ in carried}
    state = {slot: value for slot, value in state.items() if value is not None}
    following = {slot: after for slot, _, after in carried}
    order = range(length)[::-1] if reverse else range(length)
    while True:  # what is not made of numbers alone is no counter, and then what is made of it is none either
        values, found, lost = dict(state), {}, set()
        for step in order:
            here = {**values, **{slot: int(numbers[step]) for slot, numbers in scanned}}
            _evaluate(ops, here)
            lost = {slot for slot in state if _known(here, following[slot]) is None}
            if lost:
                break
            for slot, value in here.items():
                found.setdefault(slot, np.zeros(length, np.int64))[step] = value
            values = {slot: _known(here, following[slot]) for slot in state}
        if not lost:
            return found
        state = {slot: value for slot, value in state.items() if slot not in lost}


def taken(op: Op, shape: Sequence[int], known: Mapping[Any, np.ndarray]) -> tuple[int, int] | None:
    """First row and stride of the rows of an array that a slice or lookup takes step by step; None if it does not.

    Args:
        op: An operation of the body.
        shape: Shape of its first operand.
        known: What `counters` found.
    """
    if not shape or op.name not in ("dynamic_slice", "gather"):
        return None
    if tuple(op.params["slice_sizes"]) != (1, *shape[1:]):
        return None
    if op.name == "gather":
        numbers = op.params["dimension_numbers"]
        if numbers.start_index_map != (0,) or numbers.operand_batching_dims:
            return None
        if numbers.collapsed_slice_dims not in ((), (0,)):
            return None
    rows = known.get(op.ins[1]) if isinstance(op.ins[1], int) else None
    if rows is None or rows.min() < 0 or rows.max() >= shape[0]:
        return None
    strides = np.unique(np.diff(rows)) if len(rows) > 1 else np.ones(1, np.int64)
    if len(strides) != 1 or strides[0] == 0:
        return None
    return int(rows[0]), int(strides[0])


def rows_of(start: int, stride: int, length: int) -> Sequence[Callable[[jax.Array], jax.Array]]:
    """Operations that take evenly spaced rows, in the order in which a loop does."""
    end = start + (length - 1) * stride
    low, high = min(start, end), max(start, end) + 1
    steps = [lambda a: lax.slice_in_dim(a, low, high, abs(stride))]
    return steps if stride > 0 else [*steps, lambda a: lax.rev(a, (0,))]


def folded(op: Op, known: Mapping[int, Held], aval: Callable[[Any], Any]) -> Held | Op:
    """An operation with numbers that are known: its result where that is one, or slices at numbers as such.

    Args:
        op: The operation.
        known: Numbers by slot.
        aval: From slot or literal to its shape and dtype.
    """
    op = replace(op, ins=tuple(known.get(atom, atom) if isinstance(atom, int) else atom for atom in op.ins))
    rule, out = _ARITHMETIC.get(op.name), aval(op.outs[0])
    numbers = [_number(atom) for atom in op.ins]
    if rule and numbers and math.prod(out.shape) == 1 and out.dtype.kind in "iub" and None not in numbers:
        return Held(np.asarray(rule(*numbers)).astype(out.dtype).reshape(out.shape))
    places = [number for number in numbers[1:] if number is not None]
    if op.name != "dynamic_slice" or len(places) != len(op.ins) - 1 or not isinstance(op.ins[0], int):
        return op
    sizes, shape = op.params["slice_sizes"], aval(op.ins[0]).shape
    starts = [min(max(s, 0), full - size) for s, full, size in zip(places, shape, sizes, strict=True)]
    limits = [start + size for start, size in zip(starts, sizes, strict=True)]
    made = operation(lambda a: lax.slice(a, starts, limits), aval(op.ins[0]), op.ins[0], lambda _: op.outs[0])
    return replace(made, level=op.level)


def iota(op: Op | None) -> np.ndarray | None:
    """The numbers that an operation without operands gives, if they are integers in a row."""
    if op is None or op.name != "iota" or len(op.params["shape"]) != 1:
        return None
    return np.arange(op.params["shape"][0]) if jnp.issubdtype(op.params["dtype"], jnp.integer) else None


def _number(atom: Any) -> int | None:
    if isinstance(atom, int):
        return None
    value = np.asarray(atom.val)
    return int(value) if value.size == 1 and value.dtype.kind in "iub" else None


def _known(values: Mapping[Any, int], atom: Any) -> int | None:
    return values.get(atom) if isinstance(atom, int) else _number(atom)


def _evaluate(ops: Sequence[Op], values: dict[Any, int]) -> None:
    """Add the scalars that are made of known ones."""
    for op in ops:
        rule = _ARITHMETIC.get(op.name)
        operands = [_known(values, atom) for atom in op.ins] if rule else []
        if rule and operands and all(operand is not None for operand in operands):
            values[op.outs[0]] = int(rule(*operands))
