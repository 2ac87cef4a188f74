"""A function of one sample as a flat list of primitive operations, with every call that only groups operations inlined.

The engine looks for the one operation that consumes each parameter leaf. That operation may lie inside a jitted,
checkpointed or otherwise wrapped call, so the jaxpr of the function is flattened first. Calls that carry their own
derivative rule (`custom_jvp`, `custom_vjp`) and control flow stay whole: inlining them would change the derivative.

Only `jax.make_jaxpr` and `jax.extend.core` are used.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax import lax

from lplr_jax import layouts, programs

# Calls whose body means exactly what the call means, for values and for derivatives.
_TRANSPARENT_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint"})
# Operations that return their operand: where its entries lie is not for a program of one sample to say.
_IDENTITIES = frozenset({"sharding_constraint"})


def _stack(*arrays: Any, axis: int) -> Any:
    return lax.concatenate([lax.expand_dims(array, (axis,)) for array in arrays], axis)


def _unstack(array: Any, *, axis: int) -> list[Any]:
    return [lax.index_in_dim(array, i, axis, keepdims=False) for i in range(array.shape[axis])]


def _tile(array: Any, *, reps: Sequence[int]) -> Any:
    shape = [size for pair in zip(reps, array.shape, strict=True) for size in pair]
    array = lax.broadcast_in_dim(array, shape, range(1, 2 * array.ndim, 2))
    return lax.reshape(array, [one * size for one, size in zip(shape[::2], shape[1::2], strict=True)])


# Operations of newer JAX that are others put together.
_MADE_OF: Mapping[str, Callable[..., Any]] = {"stack": _stack, "unstack": _unstack, "tile": _tile}


@dataclass(frozen=True, eq=False)
class Op:
    """One primitive operation: its equation, and the slots (or literals) that it reads and the slots that it writes.

    `loop` is the body of a scan that was entered (`loops.Loop`), `level` the numbers of the loops that the operation
    lies in, from the outermost on.
    """

    eqn: Any
    ins: tuple[Any, ...]
    outs: tuple[int, ...]
    loop: Any = None
    level: tuple[int, ...] = ()

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
class Held:
    """A value in the place of a literal."""

    val: Any


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
        lengths: Steps of each loop that was entered; `avals` inside are those of one step.
        levels: Loops that a slot lies in, none where it is not named.
    """

    ops: tuple[Op, ...]
    params: tuple[int, ...]
    inputs: tuple[int, ...]
    consts: tuple[tuple[int, Any], ...]
    output: Any
    avals: tuple[jax.ShapeDtypeStruct, ...]
    uses: Mapping[int, tuple[tuple[Op, int], ...]]
    on_x: frozenset[int]
    lengths: tuple[int, ...] = ()
    levels: Mapping[int, tuple[int, ...]] = field(default_factory=dict)

    @cached_property
    def made_by(self) -> Mapping[int, Op]:
        """The operation that writes each slot."""
        ops, made = list(self.ops), {}
        while ops:
            op = ops.pop()
            made.update((slot, op) for slot in op.outs)
            ops += [] if op.loop is None else op.loop.ops
        return made

    def level(self, slot: int) -> tuple[int, ...]:
        """Loops that a slot lies in, the outermost first."""
        return self.levels.get(slot, ())

    def steps(self, level: Sequence[int]) -> tuple[int, ...]:
        """Steps of some loops."""
        return tuple(self.lengths[loop] for loop in level)

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
        wanted: Set[int] = frozenset(),
    ) -> dict[int, Any]:
        """Evaluate every slot; `shifts` are added to the slots they name as soon as these are known.

        Slots inside a loop have their shifts, and those `wanted` their values, of all steps, with the steps in front.
        """
        env: dict[int, Any] = dict(zip(self.params, params, strict=True))
        env.update(zip(self.inputs, inputs, strict=True))
        env.update(zip((slot for slot, _ in self.consts), consts, strict=True))
        evaluate(self.ops, env, {} if shifts is None else shifts, wanted)
        return env


def evaluate(ops: Sequence[Op], env: dict[int, Any], shifts: Mapping[int, Any], wanted: Set[int]) -> None:
    """Evaluate operations in order and put their results into `env`; see `Program.run`."""
    for op in ops:
        if op.loop is not None and (op.loop.inside & (shifts.keys() | wanted)):
            values, within = op.loop.run(env, shifts, wanted, len(op.outs))
            env.update(within)
        else:
            values = op.evaluate([read(env, atom) for atom in op.ins])
        for slot, value in zip(op.outs, values, strict=True):
            env[slot] = value + shifts[slot] if slot in shifts else value


def read(env: Mapping[int, Any], atom: Any) -> Any:
    """Value of a slot or of a literal."""
    return env[atom] if isinstance(atom, int) else atom.val


def contains(eqn: Any, primitive: str) -> bool:
    """Whether the equation is a primitive with this in its name or holds one in a body, at any depth."""
    if primitive in eqn.primitive.name:
        return True
    return any(contains(inner, primitive) for body in jex.jaxprs_in_params(eqn.params) for inner in body.eqns)


def inline(
    closed: Any, args: Sequence[Any], new: Callable[[Any], int], hold: Callable[[Any, Any], Any], ops: list[Op]
) -> list[Any]:
    """Append the operations of a closed jaxpr to `ops`, those of the calls in it inlined; list its results.

    Args:
        closed: The jaxpr.
        args: Slots or literals of its arguments.
        new: From the aval of a result to its slot.
        hold: From aval and value of a captured array to its slot.
        ops: What is appended to.
    """
    env: dict[Any, Any] = dict(zip(closed.jaxpr.invars, args, strict=True))
    for var, value in zip(closed.jaxpr.constvars, closed.consts, strict=True):
        env[var] = hold(var.aval, value)

    def atom(var: Any) -> Any:
        return var if isinstance(var, jex.Literal) else env[var]

    for eqn in closed.jaxpr.eqns:
        ins = [atom(var) for var in eqn.invars]
        body = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        if eqn.primitive.name in _TRANSPARENT_CALLS and body is not None:
            closed_body = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
            env.update(zip(eqn.outvars, inline(closed_body, ins, new, hold, ops), strict=True))
            continue
        if eqn.primitive.name in _IDENTITIES:
            env.update(zip(eqn.outvars, ins, strict=True))
            continue
        if eqn.primitive.name in _MADE_OF:
            function = partial(_MADE_OF[eqn.primitive.name], **eqn.params)
            made = jax.make_jaxpr(function)(*(jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in eqn.invars))
            env.update(zip(eqn.outvars, inline(made, ins, new, hold, ops), strict=True))
            continue
        outs = [new(var.aval) for var in eqn.outvars]
        env.update(zip(eqn.outvars, outs, strict=True))
        ops.append(Op(eqn, tuple(ins), tuple(outs)))
    return [atom(var) for var in closed.jaxpr.outvars]


class Inlined(NamedTuple):
    """A closed jaxpr as operations on slots; fields as in `Program`."""

    arguments: list[int]
    ops: list[Op]
    results: list[Any]
    avals: list[jax.ShapeDtypeStruct]
    consts: list[tuple[int, Any]]


def inlined(closed: Any) -> Inlined:
    """All operations of a closed jaxpr, with slots of its own."""
    found = Inlined([], [], [], [], [])

    def new(aval: Any) -> int:
        shape, dtype = getattr(aval, "shape", ()), getattr(aval, "dtype", jnp.dtype(np.float32))
        found.avals.append(jax.ShapeDtypeStruct(shape, dtype))
        return len(found.avals) - 1

    def hold(aval: Any, value: Any) -> int:
        found.consts.append((new(aval), value))
        return found.consts[-1][0]

    found.arguments.extend(new(var.aval) for var in closed.jaxpr.invars)
    found.results.extend(inline(closed, found.arguments, new, hold, found.ops))
    return found


def flatten(closed: Any, num_params: int) -> Program:
    """Flatten a closed jaxpr of one output whose first `num_params` arguments are parameters and the others x.

    Args:
        closed: What `jax.make_jaxpr` returned.
        num_params: Number of leading arguments that are parameters.

    Returns:
        The program, with operations that the output does not depend on removed.
    """
    found = inlined(closed)
    params, inputs = tuple(found.arguments[:num_params]), tuple(found.arguments[num_params:])
    (output,) = found.results
    return assemble(found.ops, found.avals, output, params=params, inputs=inputs, consts=found.consts)


def assemble(
    ops: Sequence[Op],
    avals: Sequence[jax.ShapeDtypeStruct],
    output: Any,
    *,
    params: tuple[int, ...],
    inputs: tuple[int, ...],
    consts: Sequence[tuple[int, Any]],
    keep: bool = False,
) -> Program:
    """The program of some operations, none of them inside a loop, without those that the output does not depend on.

    Args:
        ops: Operations in order.
        avals: As for `Program`.
        output: As for `Program`.
        params: As for `Program`.
        inputs: As for `Program`.
        consts: As for `Program`.
        keep: Whether to keep captured arrays that nothing reads.
    """
    live = {output} if isinstance(output, int) else set()
    kept: list[Op] = []
    for op in reversed(ops):
        if live.intersection(op.outs):
            live.update(atom for atom in op.ins if isinstance(atom, int))
            kept.append(op)
    kept.reverse()

    uses: dict[int, list[tuple[Op, int]]] = {}
    on_x = set(inputs)
    for op in kept:
        slots = [(atom, position) for position, atom in enumerate(op.ins) if isinstance(atom, int)]
        for slot, position in slots:
            uses.setdefault(slot, []).append((op, position))
        if any(slot in on_x for slot, _ in slots):
            on_x.update(op.outs)
    return Program(
        ops=tuple(kept),
        params=params,
        inputs=inputs,
        consts=tuple((slot, value) for slot, value in consts if keep or slot in live),
        output=output,
        avals=tuple(avals),
        uses={slot: tuple(readers) for slot, readers in uses.items()},
        on_x=frozenset(on_x),
    )


class Rewriting:
    """A program that is written anew, operation by operation: its slots so far, and what stands for which.

    Attributes:
        given: The program as it was.
        avals: Shape and dtype of each slot, those of `given` first.
        ops: Operations so far.
        same: Slot (or literal) that takes the place of one of `given`.
    """

    def __init__(self, program: Program):
        self.given = program
        self.avals = list(program.avals)
        self.ops: list[Op] = []
        self.same: dict[int, Any] = {}

    def named(self, atom: Any) -> Any:
        """What stands for a slot or literal."""
        return self.same.get(atom, atom) if isinstance(atom, int) else atom

    def new(self, aval: Any) -> int:
        """A slot."""
        self.avals.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(self.avals) - 1

    def aval(self, atom: Any) -> Any:
        """What has the shape and dtype of a slot or literal."""
        return self.avals[atom] if isinstance(atom, int) else jnp.asarray(atom.val)

    def assembled(self, output: Any) -> Program:
        """The program that was written, with the arguments of the one given."""
        given = self.given
        arguments = {"params": given.params, "inputs": given.inputs, "consts": given.consts}
        return assemble(self.ops, self.avals, output, keep=True, **arguments)
