"""Scans entered: the body of a loop as operations of the program, so that a leaf is followed into it.

Inside, a slot stands for its value in every step. What the body closes over keeps the slot that it has outside, and so
does a carry that every step hands on unchanged; a scanned array gets a slot for its slice.
"""

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplr_jax.ntk import counters
from lplr_jax.ntk.jaxpr import Held, Op, Program, contains, evaluate, inline, read


@dataclass(frozen=True, eq=False)
class Carry:
    """A value handed from step to step: its slot inside, where it starts, what the next step gets, which result."""

    slot: int
    start: Any
    after: Any
    result: int
    aval: jax.ShapeDtypeStruct


@dataclass(frozen=True, eq=False)
class Loop:
    """The body of a scan, without what nothing reads.

    Attributes:
        number: Place of its length in `Program.lengths`.
        length: Steps.
        settings: `reverse` and `unroll` of the scan.
        ops: Operations.
        carries: What is handed from step to step.
        sliced: Slot of the slice, slot (or literal) of the array and place among the operands, of each scanned array.
        stacked: Slot (or literal) inside and number of the result, of each result that has all steps.
        constant: The same of each result that is handed on unchanged; the slot is one outside.
        inside: Slots of the body, and of the loops in it.
    """

    number: int
    length: int
    settings: Mapping[str, Any]
    ops: tuple[Op, ...]
    carries: tuple[Carry, ...]
    sliced: tuple[tuple[int, Any, int], ...]
    stacked: tuple[tuple[Any, int], ...]
    constant: tuple[tuple[Any, int], ...]
    inside: frozenset[int]

    def run(
        self, env: Mapping[int, Any], shifts: Mapping[int, Any], wanted: Set[int], results: int
    ) -> tuple[list[Any], dict[int, Any]]:
        """Results of the scan, None for those that nothing reads, and what is wanted of the slots inside."""
        mine = {slot: value for slot, value in shifts.items() if slot in self.inside}
        asked = sorted(self.inside & wanted)

        def of(carry: Carry, value: Any) -> jax.Array:
            return jnp.broadcast_to(jnp.asarray(value, carry.aval.dtype), carry.aval.shape)

        def step(state: list[Any], scanned: Any) -> tuple[list[Any], Any]:
            slices, moved = scanned
            here = dict(env)
            here.update(zip((carry.slot for carry in self.carries), state, strict=True))
            here.update(zip((slot for slot, _, _ in self.sliced), slices, strict=True))
            evaluate(self.ops, here, moved, wanted)
            stacked = [jnp.asarray(read(here, atom)) for atom, _ in self.stacked]
            return [of(carry, read(here, carry.after)) for carry in self.carries], (
                stacked,
                {s: here[s] for s in asked},
            )

        start = [of(carry, read(env, carry.start)) for carry in self.carries]
        arrays = [read(env, array) for _, array, _ in self.sliced]
        state, (stacked, within) = lax.scan(step, start, (arrays, mine), length=self.length, **self.settings)
        found = {number: read(env, atom) for atom, number in self.constant}
        found.update(zip((carry.result for carry in self.carries), state, strict=True))
        found.update(zip((number for _, number in self.stacked), stacked, strict=True))
        return [found.get(number) for number in range(results)], within


def enter(program: Program) -> Program:
    """The program with its scans entered, but those that hold a `while`, call back into Python or have effects."""
    entering = _Entering(program)
    needed = {atom for atom in (*(atom for op in program.ops for atom in op.ins), program.output) if _is_slot(atom)}
    ops = entering.ops(program.ops, (), needed)
    if not entering.lengths:
        return program
    on_x = set(program.inputs)
    _spread(ops, on_x)
    uses: dict[int, list[tuple[Op, int]]] = {}
    _collect(ops, uses)
    return replace(
        program,
        ops=ops,
        output=entering.named(program.output),
        avals=tuple(entering.avals),
        uses={slot: tuple(readers) for slot, readers in uses.items()},
        on_x=frozenset(on_x),
        lengths=tuple(entering.lengths),
        levels=entering.levels,
    )


def enterable(op: Op) -> bool:
    """Whether it is a scan whose body says all that it does."""
    if op.name != "scan" or op.eqn.effects:
        return False
    return not any(contains(op.eqn, name) for name in ("while", "callback"))


def operand_counts(params: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many operands of a scan are constants, and how many are carried; newer JAX tells by their trees."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    constants, carried, _ = params["ft_in"].unpack()
    return len(constants), len(carried)


class _Entering:
    def __init__(self, program: Program):
        self.avals = list(program.avals)
        self.levels: dict[int, tuple[int, ...]] = {}
        self.lengths: list[int] = []
        self.same: dict[int, Any] = {}
        self.made_by: dict[int, Op] = {}

    def named(self, atom: Any) -> Any:
        return self.same.get(atom, atom) if isinstance(atom, int) else atom

    def ops(self, ops: Sequence[Op], level: tuple[int, ...], needed: Set[Any]) -> tuple[Op, ...]:
        return tuple(one for op in ops for one in self._op(op, level, needed))

    def _op(self, op: Op, level: tuple[int, ...], needed: Set[Any]) -> list[Op]:
        op = replace(op, ins=tuple(self.named(atom) for atom in op.ins), level=level)
        self.levels.update((slot, level) for slot in op.outs if level)
        self.made_by.update((slot, op) for slot in op.outs)
        return self._scan(op, level, needed) if enterable(op) else [op]

    def _new(self, aval: Any) -> int:
        self.avals.append(jax.ShapeDtypeStruct(aval.shape, aval.dtype))
        return len(self.avals) - 1

    def _scan(self, op: Op, level: tuple[int, ...], needed: Set[Any]) -> list[Op]:
        params = op.params
        body, (whole, handed) = params["jaxpr"], operand_counts(params)
        begin, avals = len(self.avals), [var.aval for var in body.jaxpr.invars]
        slots = [self._new(aval) for aval in avals[whole:]]
        ops: list[Op] = []

        def unfold() -> list[Any]:
            ops.clear()
            return inline(body, [*op.ins[:whole], *slots], self._new, lambda _, value: Held(value), ops)

        outs = unfold()
        unchanged = [i for i in range(handed) if outs[i] is slots[i]]
        if unchanged:
            for i in unchanged:
                slots[i] = op.ins[whole + i]
                self.same[op.outs[i]] = slots[i]
            outs = unfold()
        ops, before, counted = self._by_counter(op, level, ops, slots, outs)
        alive = {i for i, slot in enumerate(op.outs) if slot in needed}
        while True:  # a carry is read where a step reads it, until nothing is added
            reading = {outs[i] for i in alive if isinstance(outs[i], int)}
            kept = []
            for inner in reversed(ops):
                if reading.intersection(inner.outs):
                    reading.update(atom for atom in inner.ins if isinstance(atom, int))
                    kept.append(inner)
            more = {i for i in range(handed) if slots[i] in reading and i not in unchanged} - alive
            if not more:
                break
            alive |= more
        number, within = len(self.lengths), (*level, len(self.lengths))
        self.lengths.append(params["length"])
        self.levels.update((slot, within) for i, slot in enumerate(slots) if i not in unchanged)
        self.levels.update((slot, within) for slot, _, _ in counted)
        loop_ops = self.ops(kept[::-1], within, reading)
        arrays = zip(slots[handed:], op.ins[whole + handed :], range(whole + handed, len(op.ins)), strict=True)
        arrays = [*arrays, *counted]
        loop = Loop(
            number=number,
            length=params["length"],
            settings={"reverse": params["reverse"], "unroll": params["unroll"]},
            ops=loop_ops,
            carries=tuple(
                Carry(slots[i], op.ins[whole + i], self.named(outs[i]), i, self._spec(avals[whole + i]))
                for i in sorted(alive)
                if i < handed and i not in unchanged
            ),
            sliced=tuple(item for item in arrays if item[0] in reading),
            stacked=tuple((self.named(outs[i]), i) for i in sorted(alive) if i >= handed),
            constant=tuple((slots[i], i) for i in unchanged),
            inside=frozenset(range(begin, len(self.avals))) - {slot for one in before for slot in one.outs},
        )
        return [*before, replace(op, loop=loop)]

    def _by_counter(
        self, op: Op, level: tuple[int, ...], ops: Sequence[Op], slots: Sequence[Any], outs: Sequence[Any]
    ) -> tuple[list[Op], list[Op], list[tuple[int, Any, int]]]:
        """The body with its slices by a counter as scanned arrays: operations, those before the loop, and arrays."""
        if not any(inner.name in ("dynamic_slice", "gather") for inner in ops):
            return list(ops), [], []
        length, (whole, handed) = op.params["length"], operand_counts(op.params)
        carried = zip(slots[:handed], op.ins[whole : whole + handed], outs[:handed], strict=True)
        numbers = [
            (slot, counters.iota(self.made_by.get(atom)))
            for slot, atom in zip(slots[handed:], op.ins[whole + handed :], strict=True)
            if isinstance(atom, int)
        ]
        numbers = [(slot, found) for slot, found in numbers if found is not None]
        known = counters.counters(length, op.params["reverse"], list(carried), numbers, ops)
        inside = {slot for inner in ops for slot in inner.outs}.union(slots[handed:], known)
        inside.update(slot for i, slot in enumerate(slots[:handed]) if outs[i] is not slot)
        body, before, arrays = [], [], []
        for inner in ops:
            array: Any = inner.ins[0] if inner.ins else None
            fit = isinstance(array, int) and array not in inside
            rows = counters.taken(inner, self.avals[array].shape, known) if fit else None
            if rows is None:
                body.append(inner)
                continue
            start, stride = rows
            if (start, stride, length) != (0, 1, self.avals[array].shape[0]):
                for step in counters.rows_of(start, stride, length):
                    before.append(counters.operation(step, self.avals[array], array, self._new, level=level))
                    (array,) = before[-1].outs
            slot = self._new(jax.ShapeDtypeStruct(self.avals[array].shape[1:], self.avals[array].dtype))
            arrays.append((slot, array, len(op.ins) + len(arrays)))
            shape = self.avals[inner.outs[0]].shape
            made = counters.operation(lambda a, to=shape: lax.reshape(a, to), self.avals[slot], slot, self._new)
            body.append(replace(made, outs=inner.outs))
        self.levels.update((slot, level) for one in before for slot in one.outs if level)
        return body, before, arrays

    @staticmethod
    def _spec(aval: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(aval.shape, aval.dtype)


def _spread(ops: Sequence[Op], on_x: set[int]) -> None:
    """Add the slots that depend on those already there."""
    for op in ops:
        loop = op.loop
        if loop is None:
            if any(isinstance(atom, int) and atom in on_x for atom in op.ins):
                on_x.update(op.outs)
            continue
        before = -1
        while before != len(on_x):
            before = len(on_x)
            on_x.update(slot for slot, array, _ in loop.sliced if _among(array, on_x))
            on_x.update(c.slot for c in loop.carries if _among(c.start, on_x) or _among(c.after, on_x))
            _spread(loop.ops, on_x)
        results = [(c.slot, c.result) for c in loop.carries] + [*loop.stacked, *loop.constant]
        on_x.update(op.outs[number] for atom, number in results if _among(atom, on_x))


def _is_slot(atom: Any) -> bool:
    return isinstance(atom, int)


def _among(atom: Any, slots: Set[int]) -> bool:
    return _is_slot(atom) and atom in slots


def _collect(ops: Sequence[Op], uses: dict[int, list[tuple[Op, int]]]) -> None:
    """Who reads each slot, at which operand; −1 where the body of a loop hands it out or on."""

    def add(atom: Any, op: Op, at: int) -> None:
        if isinstance(atom, int):
            uses.setdefault(atom, []).append((op, at))

    for op in ops:
        if op.loop is None:
            for at, atom in enumerate(op.ins):
                add(atom, op, at)
            continue
        whole, _ = operand_counts(op.params)
        for carry in op.loop.carries:
            add(carry.start, op, whole + carry.result)
        for _, array, at in op.loop.sliced:
            add(array, op, at)
        _collect(op.loop.ops, uses)
        for atom in (*(carry.after for carry in op.loop.carries), *(atom for atom, _ in op.loop.stacked)):
            add(atom, op, -1)
