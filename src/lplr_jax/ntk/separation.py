"""Whether a function treats its samples apart: shown from its programs, with nothing evaluated.

The program of many samples is read beside that of one, operation by operation. Each of its values either is that of the
one sample's program, the same for all samples, or holds that value of every sample along one of its axes; each
operation must keep samples apart along that axis. Then output i is that of sample i alone, whatever parameters and
samples hold, but for rounding. Where an operation has no rule here nothing is shown, and samples are tried
(`coupling`).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lplr_jax import programs
from lplr_jax.ntk.jaxpr import Inlined, Op, Program, flatten, inlined
from lplr_jax.ntk.loops import operand_counts
from lplr_jax.ntk.places import RULES, Along, Place, Read, Shape, UnknownError, need
from lplr_jax.ntk.traced import Traced, at_samples
from lplr_jax.parameters import Parameters

# Settings that repeat the shape of the result, or are looked at by the rule.
_SHAPED = {
    "broadcast_in_dim": ("shape",),
    "reshape": ("new_sizes",),
    "iota": ("shape",),
    "slice": ("limit_indices",),
    "dynamic_slice": ("slice_sizes",),
    "gather": ("slice_sizes",),
}
_SQUEEZED = ["squeeze", "squeeze", "dot_general", "broadcast_in_dim"]
_CALLS = frozenset({"custom_jvp_call", "custom_vjp_call"})


class Seen(NamedTuple):
    """What the programs of several samples show.

    Attributes:
        apart: Whether every output is that of its sample alone.
        key: What the function computes of a few samples; None where it fails on them.
    """

    apart: bool
    key: Hashable


def look(apply_fn: Callable[[Any, Any], Any], params: Parameters, x: Any, traced: Traced, few: int) -> Seen:
    """Trace a function at the samples x, and at a few of them, and see what that shows.

    Args:
        apply_fn: As for `ntk.kernel`.
        params: Its parameters.
        x: Samples, of which only the shapes matter; two at least are traced.
        traced: The function as a program of one sample.
        few: Samples that are tried.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    # A function that may have changed since it was traced has been traced anew.
    return _seen.get((traced, n, few), lambda: _look(apply_fn, params, x, traced.program, n, min(few, n)))


def _look(apply_fn: Callable[[Any, Any], Any], params: Parameters, x: Any, one: Program, every: int, few: int) -> Seen:
    def program(count: int) -> Any:
        try:
            closed, out = at_samples(apply_fn, params, x, count)
        except Exception:  # a function may refuse several samples in its own words
            return None
        return closed if isinstance(out, jax.ShapeDtypeStruct) else None

    every, few = max(2, every), max(2, few)
    closed = {count: program(count) for count in {every, few}}
    known = closed[few] and programs.Key(
        (programs.key(closed[few], rules=True), tuple(programs.digest(value) for value in closed[few].consts))
    )
    return Seen(closed[every] is not None and _apart(flatten(closed[every], len(params.arrays)), one), known)


_seen = programs.Kept(64)


def _apart(many: Program, one: Program) -> bool:
    """Whether a program of many samples is shown to be that of one, sample by sample."""
    if not many.inputs:
        return False
    count = many.avals[many.inputs[0]].shape[0]
    pairing = _Pairing(count, _Side.of(one), _Side.of(many))
    try:
        for mine, theirs in zip(many.params, one.params, strict=True):
            pairing.pair(mine, theirs, None)
        for mine, theirs in zip(many.inputs, one.inputs, strict=True):
            pairing.pair(mine, theirs, Along(0))
        pairing.follow(one.ops, many.ops)
        return pairing.place(many.output, one.output) == Along(0)
    except (UnknownError, KeyError):  # a setting that this JAX calls otherwise
        return False


class _Side(NamedTuple):
    """One of the two programs: shapes and dtypes of its slots, and values of those that are captured."""

    avals: Sequence[Any]
    consts: Mapping[int, Any]

    @classmethod
    def of(cls, program: Program | Inlined) -> "_Side":
        return cls(program.avals, dict(program.consts))

    def aval(self, atom: Any) -> tuple[Shape, Any]:
        found = self.avals[atom] if isinstance(atom, int) else atom.val
        return tuple(jnp.shape(found)), jnp.result_type(found)


class _Pairing:
    """Which slot of the program of one sample a slot of that of many stands for, and along which axis."""

    def __init__(self, count: int, one: _Side, many: _Side) -> None:
        self.count, self.one, self.many = count, one, many
        self.stands: dict[int, tuple[Any, Place]] = {}

    def pair(self, mine: int, theirs: Any, place: Place) -> None:
        """Note what a slot stands for; raises where its shape or dtype is not the one that follows."""
        (shape, dtype), (alone, dtype_alone) = self.many.aval(mine), self.one.aval(theirs)
        if dtype != dtype_alone or shape != self._grown(alone, place):
            raise UnknownError(f"{alone} -> {shape} along {place}")
        self.stands[mine] = (theirs, place)

    def _grown(self, shape: Shape, place: Place) -> Shape:
        if place is None:
            return shape
        if place.axis >= len(shape) or shape[place.axis] != place.before * place.behind:
            raise UnknownError(f"{place} in {shape}")
        return (*shape[: place.axis], shape[place.axis] * self.count, *shape[place.axis + 1 :])

    def place(self, mine: Any, theirs: Any) -> Place:
        """Where an atom holds the samples, if it stands for `theirs`."""
        if isinstance(mine, int):
            if mine in self.stands:
                known, place = self.stands[mine]
                if known is theirs or known == theirs:
                    return place
            elif self._captured_alike(mine, theirs):
                self.stands[mine] = (theirs, None)
                return None
        elif not isinstance(theirs, int) and programs.digest(mine.val) == programs.digest(theirs.val):
            return None
        raise UnknownError("operands differ")

    def _captured_alike(self, mine: int, theirs: Any) -> bool:
        if mine not in self.many.consts or not isinstance(theirs, int) or theirs not in self.one.consts:
            return False
        return programs.digest(self.many.consts[mine]) == programs.digest(self.one.consts[theirs])

    def follow(self, one: Sequence[Op], many: Sequence[Op]) -> None:
        """Go through both lists of operations."""
        waiting = list(one)[::-1]
        for op in many:
            if waiting and op.name == waiting[-1].name and self._matches(op, waiting[-1]):
                waiting.pop()
            elif op.name == "dot_general" and [other.name for other in waiting[-4:][::-1]] == _SQUEEZED:
                self._squeezed(op, waiting[-4:][::-1])
                del waiting[-4:]
            else:
                self._repeated(op)
        if waiting:
            raise UnknownError(f"{waiting[-1].name} of one sample alone")

    def _repeated(self, op: Op) -> None:
        """A broadcast over the samples, which one sample by itself does without."""
        if op.name != "broadcast_in_dim" or len(op.ins) != 1 or not isinstance(op.ins[0], int):
            raise UnknownError(op.name)
        known, place = self.stands.get(op.ins[0], (None, None))
        shape, (result, _) = self.many.aval(op.ins[0])[0], self.many.aval(op.outs[0])
        unequal = [axis for axis, (size, grown) in enumerate(zip(shape, result, strict=False)) if size != grown]
        in_order = tuple(op.params["broadcast_dimensions"]) == tuple(range(len(result)))
        if known is None or place is not None or not in_order or len(shape) != len(result) or len(unequal) != 1:
            raise UnknownError(op.name)
        self.pair(op.outs[0], known, Along(unequal[0]))

    def _squeezed(self, op: Op, alone: Sequence[Op]) -> None:
        """A product of a batch of samples, which `jax.numpy` takes out of its batch of one before and puts back."""
        *squeezes, product, back = alone
        places = [self.place(mine, one.ins[0]) for mine, one in zip(op.ins, squeezes, strict=True)]
        contract, batch = op.params["dimension_numbers"]
        axes = [place.axis for place in places if place is not None and place == Along(place.axis)]
        need(len(axes) == 2 and axes[0] in batch[0], "samples of one operand")
        number = tuple(batch[0]).index(axes[0])
        need(batch[1][number] == axes[1], "samples with samples")

        def alone_in(sides: Any) -> Any:
            pairs = zip(sides, axes, strict=True)
            return tuple(tuple(d - (d > axis) for d in side if d != axis) for side, axis in pairs)

        numbers = alone_in(contract), alone_in(batch)
        same = numbers == tuple(tuple(map(tuple, sides)) for sides in product.params["dimension_numbers"])
        order = tuple(axis for axis in range(len(self.many.aval(op.outs[0])[0])) if axis != number)
        need(
            same
            and product.ins == tuple(one.outs[0] for one in squeezes)
            and [one.params["dimensions"] for one in squeezes] == [(axis,) for axis in axes]
            and back.ins == product.outs
            and tuple(back.params["broadcast_dimensions"]) == order
            and [part for part in _settings(op) if part[0] != "dimension_numbers"]
            == [part for part in _settings(product) if part[0] != "dimension_numbers"],
            "a product of one sample",
        )
        self.pair(op.outs[0], back.outs[0], Along(number))

    def _matches(self, op: Op, alone: Op) -> bool:
        """Pair the results of an operation with those of its counterpart, or return False."""
        if len(op.ins) != len(alone.ins) or len(op.outs) != len(alone.outs):
            return False
        try:
            places = [self.place(mine, theirs) for mine, theirs in zip(op.ins, alone.ins, strict=True)]
            found = self._places(op, alone, places)
            for mine, theirs, place in zip(op.outs, alone.outs, found, strict=True):
                self.pair(mine, theirs, place)
        except UnknownError:
            return False
        return True

    def _places(self, op: Op, alone: Op, places: list[Place]) -> Sequence[Place]:
        if op.name in _CALLS:
            return self._body(op.params["call_jaxpr"], alone.params["call_jaxpr"], places)
        if op.name == "scan":
            return self._scan(op, alone, places)
        if op.name == "while":
            return self._while(op, alone, places)
        if op.name == "cond":
            return self._cond(op, alone, places)
        if _settings(op) != _settings(alone):
            raise UnknownError(f"settings of {op.name}")
        if all(place is None for place in places):
            return self._of_nothing(op, alone)
        if op.name not in RULES:
            raise UnknownError(op.name)
        place = RULES[op.name](
            Read(op, [self.many.aval(atom)[0] for atom in op.ins], self.many.aval(op.outs[0])[0]), places
        )
        return [place] * len(op.outs)

    def _of_nothing(self, op: Op, alone: Op) -> list[Place]:
        """Places of what depends on no sample: it is the same for all, or repeated for each."""
        found: list[Place] = []
        for mine, theirs in zip(op.outs, alone.outs, strict=True):
            (shape, _), (single, _) = self.many.aval(mine), self.one.aval(theirs)
            unequal = [axis for axis, (one, two) in enumerate(zip(shape, single, strict=True)) if one != two]
            if not unequal:
                found.append(None)
                continue
            (axis, *more) = unequal
            if more or not _repeats(op, axis, self.many):
                raise UnknownError(op.name)
            found.append(Along(axis, 1, single[axis]))
        return found

    def _body(self, many: Any, one: Any, places: Sequence[Place]) -> list[Place]:
        """Places of the results of a body, given those of its arguments."""
        mine, theirs = (inlined(_closed(body)) for body in (many, one))
        inner = _Pairing(self.count, _Side.of(theirs), _Side.of(mine))
        for slot, other, place in zip(mine.arguments, theirs.arguments, places, strict=True):
            inner.pair(slot, other, place)
        inner.follow(theirs.ops, mine.ops)
        return [inner.place(a, b) for a, b in zip(mine.results, theirs.results, strict=True)]

    def _scan(self, op: Op, alone: Op, places: list[Place]) -> list[Place]:
        whole, carried = operand_counts(op.params)
        same = all(op.params[name] == alone.params[name] for name in ("length", "reverse"))
        need(same and operand_counts(alone.params) == (whole, carried), "steps of scan")
        inside = [*places[: whole + carried], *map(_into, places[whole + carried :])]
        found = self._body(op.params["jaxpr"], alone.params["jaxpr"], inside)
        if found[:carried] != places[whole : whole + carried]:
            raise UnknownError("state of scan")
        return [*found[:carried], *(place and place._replace(axis=place.axis + 1) for place in found[carried:])]

    def _while(self, op: Op, alone: Op, places: list[Place]) -> list[Place]:
        asked, done = op.params["cond_nconsts"], op.params["body_nconsts"]
        if (asked, done) != (alone.params["cond_nconsts"], alone.params["body_nconsts"]):
            raise UnknownError("while")
        state = places[asked + done :]
        (goes_on,) = self._body(op.params["cond_jaxpr"], alone.params["cond_jaxpr"], [*places[:asked], *state])
        after = self._body(op.params["body_jaxpr"], alone.params["body_jaxpr"], places[asked:])
        if goes_on is not None or after != state:
            raise UnknownError("state of while")
        return state

    def _cond(self, op: Op, alone: Op, places: list[Place]) -> list[Place]:
        (which, *arguments) = places
        pairs = list(zip(op.params["branches"], alone.params["branches"], strict=True))
        found = [self._body(many, one, arguments) for many, one in pairs]
        if which is not None or any(other != found[0] for other in found):
            raise UnknownError("cond")
        return found[0]


def _closed(body: Any) -> jex.ClosedJaxpr:
    return body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())


def _settings(op: Op) -> Any:
    shaped = _SHAPED.get(op.name, ())
    return [(name, programs.identity(value)) for name, value in sorted(op.params.items()) if name not in shaped]


def _repeats(op: Op, axis: int, side: _Side) -> bool:
    """Whether all entries of a result along an axis are equal, where no operand depends on the samples."""
    if op.name == "iota":
        return op.params["dimension"] != axis
    if op.name != "broadcast_in_dim" or len(op.ins) != 1:
        return False
    shape = side.aval(op.ins[0])[0]
    return all(size == 1 for size, to in zip(shape, op.params["broadcast_dimensions"], strict=True) if to == axis)


def _into(place: Place) -> Place:
    """The place in a slice along the first axis."""
    if place is not None and place.axis == 0:
        raise UnknownError("a loop over samples")
    return place and place._replace(axis=place.axis - 1)
