"""Products with a weight that is put together of several, taken part by part.

x [A; B] = x_1 A + x_2 B and x [A B] = [x A, x B]: so each part enters a matrix product of its own. Cells of recurrent
networks join the kernels of their gates in this way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplr_jax.ntk.jaxpr import Held, Op, Program, Rewriting, inline

# What a weight may pass through as a whole that its parts may pass through each by itself.
_MOVES = frozenset({"transpose", "convert_element_type", "copy", "copy_p", "neg"})


def divide(program: Program) -> Program:
    """The program with the products of concatenated weights divided; the same one where there are none.

    Args:
        program: Flat program, no loop entered.
    """
    joined = [op for op in program.ops if op.name == "concatenate" and _is_weight(program, op)]
    return _Division(program, joined).program() if joined else program


def _is_weight(program: Program, op: Op) -> bool:
    slot, axis = op.outs[0], op.params["dimension"]
    return slot not in program.on_x and _enters_products(program, slot, axis)


def _enters_products(program: Program, slot: int, axis: int) -> bool:
    """Whether nothing but matrix products reads what is put together along an axis that is not one of their batches."""
    readers = program.uses.get(slot, ())
    for op, at in readers:
        if op.name in _MOVES:
            if not _enters_products(program, op.outs[0], _moved(op, axis)):
                return False
        elif op.name != "dot_general" or axis in op.params["dimension_numbers"][1][at]:
            return False
    return bool(readers) and slot != program.output


def _moved(op: Op, axis: int) -> int:
    """Where an axis lies behind a move."""
    return op.params["permutation"].index(axis) if op.name == "transpose" else axis


@dataclass(frozen=True)
class _Joined:
    """Slots (or literals) of the parts, and the axis that they lie along."""

    parts: tuple[Any, ...]
    axis: int


class _Division(Rewriting):
    def __init__(self, program: Program, joined: Sequence[Op]):
        super().__init__(program)
        self.first = set(joined)
        self.joined: dict[Any, _Joined] = {}

    def program(self) -> Program:
        for op in self.given.ops:
            self._add(Op(op.eqn, tuple(map(self.named, op.ins)), op.outs), whole=op in self.first)
        return self.assembled(self.named(self.given.output))

    def _apply(self, function: Callable[..., jax.Array], atoms: Sequence[Any]) -> Any:
        body = jax.make_jaxpr(function)(*map(self.aval, atoms))
        (out,) = inline(body, atoms, self.new, lambda _, value: Held(value), self.ops)
        return out

    def _add(self, op: Op, *, whole: bool) -> None:
        (slot,) = op.outs[:1]
        at = next((at for at, atom in enumerate(op.ins) if isinstance(atom, int) and atom in self.joined), None)
        if whole:
            self.joined[slot] = _Joined(op.ins, op.params["dimension"])
        if at is None:
            self.ops.append(op)
            return
        weight = self.joined[op.ins[at]]
        if op.name in _MOVES:
            parts = tuple(self._apply(lambda part: _move(op, part), [part]) for part in weight.parts)
            self.joined[slot] = _Joined(parts, _moved(op, weight.axis))
            self.ops.append(op)  # left out at the end, unless both operands of a product are put together
            return
        self.same[slot] = self._apply(_by_parts(op, at, weight.axis), [op.ins[1 - at], *weight.parts])


def _move(op: Op, part: jax.Array) -> jax.Array:
    return op.evaluate([part])[0]


def _by_parts(op: Op, at: int, axis: int) -> Callable[..., jax.Array]:
    """The product as a function of its other operand and of the parts that lie along an axis of operand `at`."""
    contract, batch = op.params["dimension_numbers"]

    def product(other: jax.Array, part: jax.Array) -> jax.Array:
        return op.evaluate([part, other] if at == 0 else [other, part])[0]

    def apply(other: jax.Array, *parts: jax.Array) -> jax.Array:
        if axis not in contract[at]:
            place = len(batch[0]) + sum(d not in (*contract[at], *batch[at]) for d in range(axis))
            if at == 1:
                place += other.ndim - len(contract[0]) - len(batch[0])
            return lax.concatenate([product(other, part) for part in parts], place)
        along, start, total = contract[1 - at][contract[at].index(axis)], 0, None
        for part in parts:
            stop = start + part.shape[axis]
            share = product(lax.slice_in_dim(other, start, stop, axis=along), part)
            total, start = share if total is None else total + share, stop
        return jnp.asarray(total)

    return apply
