"""A function of one sample as a flat list of primitive operations, with every call that only groups operations inlined.

The engine looks for the one operation that consumes each parameter leaf. That operation may lie inside a jitted,
checkpointed or otherwise wrapped call, so the jaxpr of the function is flattened first. Calls that carry their own
derivative rule (`custom_jvp`, `custom_vjp`) and control flow stay whole: inlining them would change the derivative.

Only `jax.make_jaxpr` and `jax.extend.core` are used.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from lplr_jax import layouts, programs

# Calls whose body means exactly what the call means, for values and for derivatives.
_TRANSPARENT_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"})
# Operations that return their operand: where its entries lie is not for a program of one sample to say.
_IDENTITIES = frozenset({"sharding_constraint"})


@dataclass(frozen=True, eq=False)
class Op:
    """One primitive operation: its equation, and the slots (or literals) that it reads and the slots that it writes."""

    eqn: Any
    ins: tuple[Any, ...]
    outs: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the primitive."""
        return self.eqn.primitive.name

    @property
    def params(self) -> dict[str, Any]:
        """Static parameters of the equation."""
        return self.eqn.params

    def evaluate(self, operands: Sequence[Any]) -> list[Any]:
        """Apply the primitive to the operands and list its results."""
        return layouts.bind(self.eqn, operands)


@dataclass(frozen=True, eq=False)
class Program:
    """A flat jaxpr: `ops` in order of evaluation, on numbered slots.

    Attributes:
        ops: Operations that the output depends on.
        params: Slot of each array among the parameter leaves.
        inputs: Slot of each leaf of x.
        consts: Slot and value of each captured array; they are passed as arguments wherever the program is compiled.
        output: Slot (or literal) of the output.
        avals: Shape and dtype of each slot.
        uses: For each slot the operations that read it, with the position.
        on_x: Whether the value of a slot depends on x.
    """

    ops: tuple[Op, ...]
    params: tuple[int, ...]
    inputs: tuple[int, ...]
    consts: tuple[tuple[int, Any], ...]
    output: Any
    avals: tuple[jax.ShapeDtypeStruct, ...]
    uses: Mapping[int, tuple[tuple[Op, int], ...]]
    on_x: frozenset[int]

    def key(self) -> Hashable:
        """Return what the program computes, whatever the captured arrays hold, as something to look it up by."""
        slots = {slot: number for number, slot in enumerate((*self.params, *self.inputs, *(s for s, _ in self.consts)))}
        parts: list[Hashable] = [tuple((self.avals[slot].shape, self.avals[slot].dtype) for slot in slots)]
        parts.append((len(self.params), len(self.inputs)))

        def name(atom: Any) -> Hashable:
            return slots[atom] if isinstance(atom, int) else (jnp.result_type(atom.val), programs.digest(atom.val))

        for op in self.ops:
            ins = tuple(name(atom) for atom in op.ins)
            for slot in op.outs:
                slots[slot] = len(slots)
            outs = tuple((self.avals[slot].shape, self.avals[slot].dtype) for slot in op.outs)
            parts.append((op.name, ins, outs, programs.equation_key(op.eqn, rules=True)))
        return (*parts, name(self.output))

    def run(
        self,
        params: Sequence[Any],
        inputs: Sequence[Any],
        consts: Sequence[Any],
        shifts: Mapping[int, Any] | None = None,
    ) -> dict[int, Any]:
        """Evaluate every slot; `shifts` are added to the slots they name as soon as these are known."""
        env: dict[int, Any] = dict(zip(self.params, params, strict=True))
        env.update(zip(self.inputs, inputs, strict=True))
        env.update(zip((slot for slot, _ in self.consts), consts, strict=True))
        for op in self.ops:
            for slot, value in zip(op.outs, op.evaluate([read(env, atom) for atom in op.ins]), strict=True):
                env[slot] = value if shifts is None or slot not in shifts else value + shifts[slot]
        return env


def read(env: Mapping[int, Any], atom: Any) -> Any:
    """Value of a slot or of a literal."""
    return env[atom] if isinstance(atom, int) else atom.val


def contains(eqn: Any, primitive: str) -> bool:
    """Whether the equation is a primitive with this in its name or holds one in a body, at any depth."""
    if primitive in eqn.primitive.name:
        return True
    return any(contains(inner, primitive) for body in jex.jaxprs_in_params(eqn.params) for inner in body.eqns)


def flatten(closed: Any, num_params: int) -> Program:
    """Flatten a closed jaxpr of one output whose first `num_params` arguments are parameters and the others x.

    Args:
        closed: What `jax.make_jaxpr` returned.
        num_params: Number of leading arguments that are parameters.

    Returns:
        The program, with operations that the output does not depend on removed.
    """
    avals: list[jax.ShapeDtypeStruct] = []
    consts: list[tuple[int, Any]] = []
    ops: list[Op] = []

    def new(aval: Any) -> int:
        avals.append(jax.ShapeDtypeStruct(getattr(aval, "shape", ()), getattr(aval, "dtype", jnp.dtype(np.float32))))
        return len(avals) - 1

    def inline(jaxpr: Any, values: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        env: dict[Any, Any] = {}
        for var, value in zip(jaxpr.constvars, values, strict=True):
            env[var] = new(var.aval)
            consts.append((env[var], value))
        env.update(zip(jaxpr.invars, args, strict=True))

        def atom(var: Any) -> Any:
            return var if isinstance(var, jex.Literal) else env[var]

        for eqn in jaxpr.eqns:
            ins = [atom(var) for var in eqn.invars]
            body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
            if eqn.primitive.name in _TRANSPARENT_CALLS and body is not None:
                closed_body = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
                env.update(zip(eqn.outvars, inline(closed_body.jaxpr, closed_body.consts, ins), strict=True))
                continue
            if eqn.primitive.name in _IDENTITIES:
                env.update(zip(eqn.outvars, ins, strict=True))
                continue
            outs = [new(var.aval) for var in eqn.outvars]
            env.update(zip(eqn.outvars, outs, strict=True))
            ops.append(Op(eqn, tuple(ins), tuple(outs)))
        return [atom(var) for var in jaxpr.outvars]

    arguments = [new(var.aval) for var in closed.jaxpr.invars]
    (output,) = inline(closed.jaxpr, closed.consts, arguments)

    live = {output} if isinstance(output, int) else set()
    kept: list[Op] = []
    for op in reversed(ops):
        if live.intersection(op.outs):
            live.update(atom for atom in op.ins if isinstance(atom, int))
            kept.append(op)
    kept.reverse()

    uses: dict[int, list[tuple[Op, int]]] = {}
    on_x = set(arguments[num_params:])
    for op in kept:
        slots = [(atom, position) for position, atom in enumerate(op.ins) if isinstance(atom, int)]
        for slot, position in slots:
            uses.setdefault(slot, []).append((op, position))
        if any(slot in on_x for slot, _ in slots):
            on_x.update(op.outs)
    return Program(
        ops=tuple(kept),
        params=tuple(arguments[:num_params]),
        inputs=tuple(arguments[num_params:]),
        consts=tuple((slot, value) for slot, value in consts if slot in live),
        output=output,
        avals=tuple(avals),
        uses={slot: tuple(readers) for slot, readers in uses.items()},
        on_x=frozenset(on_x),
    )
