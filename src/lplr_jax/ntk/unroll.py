"""Short scans of much work written out step by step: they compile slower and run quicker than a loop.

Inside a loop every operand and cotangent that is kept is first written into an array of all steps, and read from there.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any

import jax
import jax.extend.core as jex
import numpy as np
from jax import lax

from lplr_jax.ntk.counters import folded, operation
from lplr_jax.ntk.jaxpr import Held, Op, Program, Rewriting, inline
from lplr_jax.ntk.loops import enterable, operand_counts

# Scans of at most this many steps (calibrated on six layers of a transformer of width 64: a third of the time is saved,
# and compiling takes a quarter longer).
STEPS = 8
# Multiply-adds of one forward sweep of all samples through one step, below which compiling is all that counts.
WORK = 10**6


def unroll(program: Program, samples: int) -> Program:
    """The program with the short scans of its outermost level written out.

    Args:
        program: Flat program, no loop entered.
        samples: Samples that it is evaluated for.
    """
    if not any(_is_short(op, samples) for op in program.ops):
        return program
    return _Unrolling(program).program(samples)


def multiply_adds(closed: Any) -> int:
    """Multiply-adds of the products and convolutions of a closed jaxpr, the steps of its scans counted."""
    total = 0
    for eqn in closed.jaxpr.eqns:
        steps = eqn.params.get("length", 1) if eqn.primitive.name == "scan" else 1
        for body in jex.jaxprs_in_params(eqn.params):
            total += steps * multiply_adds(jex.ClosedJaxpr(body, ()))
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += prod(eqn.outvars[0].aval.shape) * prod(eqn.invars[0].aval.shape[d] for d in contract)
        elif eqn.primitive.name == "conv_general_dilated":
            features = eqn.params["dimension_numbers"].rhs_spec[0]
            kernel = eqn.invars[1].aval.shape
            total += prod(eqn.outvars[0].aval.shape) * prod(kernel) // kernel[features]
    return total


def _is_short(op: Op, samples: int) -> bool:
    if not enterable(op) or op.params["length"] > STEPS:
        return False
    return samples * multiply_adds(op.params["jaxpr"]) >= WORK


class _Unrolling(Rewriting):
    def program(self, samples: int) -> Program:
        given = self.given
        needed = {atom for op in given.ops for atom in op.ins if isinstance(atom, int)} | {given.output}
        for op in given.ops:
            op = replace(op, ins=tuple(map(self.named, op.ins)))
            if _is_short(op, samples):
                self._steps(op, needed)
            else:
                self.ops.append(op)
        return self.assembled(self.named(given.output))

    def _apply(self, function: Any, atom: Any) -> Any:
        self.ops.append(operation(function, self.aval(atom), atom, self.new))
        return self.ops[-1].outs[0]

    def _steps(self, op: Op, needed: set[Any]) -> None:
        body, length, (whole, handed) = op.params["jaxpr"], op.params["length"], operand_counts(op.params)
        held = [var.aval for var in body.jaxpr.invars[whole : whole + handed]]

        def typed(atom: Any, aval: Any) -> Any:  # a literal of a loop's state has the type that the state has
            return (
                atom if isinstance(atom, int) else Held(np.broadcast_to(np.asarray(atom.val, aval.dtype), aval.shape))
            )

        state = list(op.ins[whole : whole + handed])
        rows: list[list[Any]] = [[None] * length for _ in op.outs[handed:]]
        for step in range(length)[::-1] if op.params["reverse"] else range(length):
            slices = []
            for array in op.ins[whole + handed :]:
                row = self._apply(lambda a, at=step: lax.slice_in_dim(a, at, at + 1), array)
                slices.append(self._apply(lambda a: lax.squeeze(a, (0,)), row))
            state = [typed(atom, aval) for atom, aval in zip(state, held, strict=True)]
            ops: list[Op] = []
            hold = lambda _, value: Held(value)  # noqa: E731
            outs = self._folded(ops, inline(body, [*op.ins[:whole], *state, *slices], self.new, hold, ops))
            state = outs[:handed]
            for results, atom in zip(rows, outs[handed:], strict=True):
                results[step] = atom
        for slot, atom in zip(op.outs, state, strict=False):
            self.same[slot] = atom
        for slot, results in zip(op.outs[handed:], rows, strict=True):
            if slot in needed:
                self._stack(slot, results)

    def _folded(self, ops: Sequence[Op], outs: Sequence[Any]) -> list[Any]:
        known: dict[int, Held] = {}
        for op in ops:
            found = folded(op, known, self.aval)
            if isinstance(found, Held):
                known[op.outs[0]] = found
            else:
                self.ops.append(found)
        return [known.get(atom, atom) if isinstance(atom, int) else atom for atom in outs]

    def _stack(self, slot: int, results: Sequence[Any]) -> None:
        aval = self.avals[slot]
        to = lambda a: lax.broadcast_in_dim(a, (1, *aval.shape[1:]), tuple(range(1, len(aval.shape))))  # noqa: E731
        one = jax.ShapeDtypeStruct(aval.shape[1:], aval.dtype)
        rows = []
        for atom in results:
            self.ops.append(operation(to, one, atom, self.new))
            rows.append(self.ops[-1].outs[0])
        eqn = jax.make_jaxpr(lambda *a: lax.concatenate(a, 0))(*(self.avals[row] for row in rows)).jaxpr.eqns[-1]
        self.ops.append(Op(eqn, tuple(rows), (slot,)))
