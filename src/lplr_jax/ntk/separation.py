"""Whether a function treats its samples apart: shown from its programs, with nothing evaluated.

The program of many samples is read beside that of one, operation by operation. Each of its values either is that of the
one sample's program, the same for all samples, or holds that value of every sample along one of its axes; each
operation must keep samples apart along that axis. Then output i is that of sample i alone, whatever parameters and
samples hold, but for rounding. Where an operation has no rule here nothing is shown, and samples are tried
(`coupling`).
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lplr_jax import programs
from lplr_jax.ntk.demand import ELEMENTWISE
from lplr_jax.ntk.jaxpr import Op, Program, flatten, inline
from lplr_jax.ntk.loops import operand_counts
from lplr_jax.ntk.traced import Traced
from lplr_jax.parameters import Parameters

# Each entry of a result is made of that entry of the operands, or of scalars.
_ENTRY_BY_ENTRY = ELEMENTWISE | {
    "acos",
    "acosh",
    "asin",
    "asinh",
    "atan",
    "atan2",
    "atanh",
    "bessel_i0e",
    "bessel_i1e",
    "cbrt",
    "ceil",
    "clz",
    "digamma",
    "erf_inv",
    "floor",
    "igamma",
    "igamma_grad_a",
    "igammac",
    "lgamma",
    "mulhi",
    "nextafter",
    "optimization_barrier",
    "polygamma",
    "population_count",
    "reduce_precision",
    "regularized_incomplete_beta",
    "rem",
    "round",
    "shift_left",
    "shift_right_arithmetic",
    "shift_right_logical",
    "xor",
    "zeta",
}
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
_CALLS = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr"}


class UnknownError(Exception):
    """There is no rule for an operation, or it mixes samples."""


class Along(NamedTuple):
    """Where a value holds all samples: an axis whose entries are numbered by (before, sample, behind)."""

    axis: int
    before: int = 1
    behind: int = 1


Place = Along | None
Shape = tuple[int, ...]


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
    leaves, tree = jax.tree.flatten(x)
    arrays = [jax.ShapeDtypeStruct(jnp.shape(a), jnp.result_type(a)) for a in params.arrays]

    def flat(values: list[Any], inputs: list[Any]) -> Any:
        return apply_fn(params.join(values), jax.tree.unflatten(tree, inputs))

    def program(count: int) -> Any:
        samples = [jax.ShapeDtypeStruct((count, *jnp.shape(a)[1:]), jnp.result_type(a)) for a in leaves]
        try:
            with jax.default_matmul_precision("highest"):
                closed, out = jax.make_jaxpr(flat, return_shape=True)(arrays, samples)
        except Exception:  # a function may refuse several samples in its own words
            return None
        return closed if isinstance(out, jax.ShapeDtypeStruct) else None

    every, few = max(2, every), max(2, few)
    closed = {count: program(count) for count in {every, few}}
    known = closed[few] and programs.Key(
        (programs.key(closed[few], rules=True), tuple(programs.digest(value) for value in closed[few].consts))
    )
    return Seen(closed[every] is not None and _apart(flatten(closed[every], len(arrays)), one), known)


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
    def of(cls, program: Program) -> "_Side":
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
        _need(len(axes) == 2 and axes[0] in batch[0], "samples of one operand")
        number = tuple(batch[0]).index(axes[0])
        _need(batch[1][number] == axes[1], "samples with samples")

        def alone_in(sides: Any) -> Any:
            pairs = zip(sides, axes, strict=True)
            return tuple(tuple(d - (d > axis) for d in side if d != axis) for side, axis in pairs)

        numbers = alone_in(contract), alone_in(batch)
        same = numbers == tuple(tuple(map(tuple, sides)) for sides in product.params["dimension_numbers"])
        order = tuple(axis for axis in range(len(self.many.aval(op.outs[0])[0])) if axis != number)
        _need(
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
            return self._body(op.params[_CALLS[op.name]], alone.params[_CALLS[op.name]], places)
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
        rule = _RULES.get(op.name, _entries if op.name in _ENTRY_BY_ENTRY else None)
        if rule is None:
            raise UnknownError(op.name)
        place = rule(_Read(op, [self.many.aval(atom)[0] for atom in op.ins], self.many.aval(op.outs[0])[0]), places)
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
        mine, theirs = _flat(many), _flat(one)
        inner = _Pairing(self.count, theirs.side, mine.side)
        for slot, other, place in zip(mine.arguments, theirs.arguments, places, strict=True):
            inner.pair(slot, other, place)
        inner.follow(theirs.ops, mine.ops)
        return [inner.place(a, b) for a, b in zip(mine.results, theirs.results, strict=True)]

    def _scan(self, op: Op, alone: Op, places: list[Place]) -> list[Place]:
        names = ("length", "reverse", "num_consts", "num_carry")
        if any(op.params.get(name) != alone.params.get(name) for name in names):
            raise UnknownError("scan")
        whole, carried = operand_counts(op.params)
        if operand_counts(alone.params) != (whole, carried):
            raise UnknownError("scan")
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


class _Flat(NamedTuple):
    side: _Side
    arguments: list[int]
    ops: list[Op]
    results: list[Any]


def _flat(body: Any) -> _Flat:
    closed = body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())
    avals: list[Any] = []
    consts: dict[int, Any] = {}
    ops: list[Op] = []

    def new(aval: Any) -> int:
        avals.append(aval)
        return len(avals) - 1

    def hold(aval: Any, value: Any) -> int:
        consts[new(aval)] = value
        return len(avals) - 1

    arguments = [new(var.aval) for var in closed.jaxpr.invars]
    results = inline(closed, arguments, new, hold, ops)
    return _Flat(_Side(avals, consts), arguments, ops, results)


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


class _Read(NamedTuple):
    """An operation on many samples: its settings, and the shapes of its operands and of its first result."""

    op: Op
    shapes: list[Shape]
    result: Shape

    @property
    def params(self) -> dict[str, Any]:
        return self.op.params


Rule = Callable[[_Read, list[Place]], Along]


def _same(places: Sequence[Place]) -> Along:
    """The place of all operands that depend on samples."""
    found = {place for place in places if place is not None}
    if len(found) != 1:
        raise UnknownError("samples along different axes")
    return found.pop()


def _into(place: Place) -> Place:
    """The place in a slice along the first axis."""
    if place is not None and place.axis == 0:
        raise UnknownError("a loop over samples")
    return place and place._replace(axis=place.axis - 1)


def _need(condition: bool, why: str) -> None:
    if not condition:
        raise UnknownError(why)


def _entries(read: _Read, places: list[Place]) -> Along:
    place = _same(places)
    for shape, own in zip(read.shapes, places, strict=True):  # one entry is repeated for all samples
        _need(own is not None or not shape or shape[place.axis] == 1, "an operand of several samples")
    return place


def _leaving(*names: str) -> Rule:
    """Rule of what acts along some axes and leaves the others."""

    def rule(read: _Read, places: list[Place]) -> Along:
        _need(all(place is not None for place in places), "an operand without samples")
        place, acted = _same(places), set()
        for name in names:
            value = read.params.get(name, ())
            acted |= {axis % len(read.shapes[0]) for axis in (value if isinstance(value, Sequence) else (value,))}
        _need(place.axis not in acted, f"{read.op.name} over samples")
        return place

    return rule


def _reducing(name: str) -> Rule:
    """Rule of what takes some axes away."""

    def rule(read: _Read, places: list[Place]) -> Along:
        place = _leaving(name)(read, places)
        gone = sum(axis % len(read.shapes[0]) < place.axis for axis in read.params[name])
        return place._replace(axis=place.axis - gone)

    return rule


def _broadcast(read: _Read, places: list[Place]) -> Along:
    _need(len(places) == 1, "a shape that is computed")
    place = _same(places)
    axis = read.params["broadcast_dimensions"][place.axis]
    _need(read.shapes[0][place.axis] == read.result[axis], "samples that are repeated")
    return place._replace(axis=axis)


def _reshape(read: _Read, places: list[Place]) -> Along:
    _need(len(places) == 1 and read.params.get("dimensions") is None, "a reshape of another order")
    place = _same(places)
    samples = read.shapes[0][place.axis] // (place.before * place.behind)
    before = prod(read.shapes[0][: place.axis]) * place.before
    for axis, (outside, size) in enumerate(zip(accumulate(read.result, mul, initial=1), read.result, strict=False)):
        if size % samples == 0 and outside and before % outside == 0:
            lead = before // outside
            if lead and size % (lead * samples) == 0:
                return Along(axis, lead, size // (lead * samples))
    raise UnknownError("a reshape through samples")


def _transpose(read: _Read, places: list[Place]) -> Along:
    place = _same(places)
    return place._replace(axis=tuple(read.params["permutation"]).index(place.axis))


def _slice(read: _Read, places: list[Place]) -> Along:
    place, strides = _same(places), read.params["strides"]
    whole = read.result[place.axis] == read.shapes[0][place.axis]
    _need(whole and (strides is None or strides[place.axis] == 1), "a slice of samples")
    return place


def _dynamic_slice(read: _Read, places: list[Place]) -> Along:
    _need(all(place is None for place in places[1:]), "a place that depends on the sample")
    place = _same(places)
    _need(read.result[place.axis] == read.shapes[0][place.axis], "a slice of samples")
    return place


def _dynamic_update_slice(read: _Read, places: list[Place]) -> Along:
    _need(all(place is None for place in places[2:]), "a place that depends on the sample")
    _need(places[0] is not None and places[1] is not None, "an operand without samples")
    place = _same(places)
    _need(read.shapes[1][place.axis] == read.shapes[0][place.axis], "a slice of samples")
    return place


def _pad(read: _Read, places: list[Place]) -> Along:
    _need(places[1] is None, "padding by a sample's value")
    place = _same(places)
    _need(tuple(read.params["padding_config"][place.axis]) == (0, 0, 0), "samples that are padded")
    return place


def _matrix_product(read: _Read, places: list[Place]) -> Along:
    contract, batch = read.params["dimension_numbers"]
    at = 0 if places[0] is not None else 1
    place = places[at]
    if place is None:
        raise UnknownError("dot_general")
    _need(place.axis not in contract[at], "a sum over samples")
    if place.axis in batch[at]:
        number = tuple(batch[at]).index(place.axis)
        other = places[1 - at]
        _need(other is not None and other == place._replace(axis=batch[1 - at][number]), "samples of one operand")
        return place._replace(axis=number)
    _need(places[1 - at] is None, "samples with samples")
    free = [
        [axis for axis in range(len(shape)) if axis not in (*contract[i], *batch[i])]
        for i, shape in enumerate(read.shapes)
    ]
    before = len(batch[0]) + (len(free[0]) if at else 0)
    return place._replace(axis=before + free[at].index(place.axis))


def _convolution(read: _Read, places: list[Place]) -> Along:
    numbers = read.params["dimension_numbers"]
    place = places[0]
    _need(places[1] is None and read.params["batch_group_count"] == 1, "a filter that depends on the sample")
    if place is None or place.axis != numbers.lhs_spec[0]:
        raise UnknownError("a convolution over samples")
    return place._replace(axis=numbers.out_spec[0])


def _windows(read: _Read, places: list[Place]) -> Along:
    place = places[0]
    _need(all(other is None for other in places[1:]), "windows of several operands")
    params = read.params
    if place is None:
        raise UnknownError(read.op.name)
    one = [params[name][place.axis] for name in ("window_dimensions", "window_strides")]
    one += [params[name][place.axis] for name in ("base_dilation", "window_dilation") if params.get(name)]
    _need(set(one) == {1} and tuple(params["padding"][place.axis]) == (0, 0), "windows over samples")
    return place


def _gather(read: _Read, places: list[Place]) -> Along:
    numbers, sizes = read.params["dimension_numbers"], read.params["slice_sizes"]
    array, index = places
    behind = [axis for axis in range(len(read.result)) if axis not in numbers.offset_dims]
    paired: tuple[int, ...] = tuple(getattr(numbers, "operand_batching_dims", ()))
    rows: tuple[int, ...] = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    if index is not None:  # each sample looks up rows of its own
        _need(index.axis < len(read.shapes[1]) - 1, "an index of several samples")
        if array is None:
            _need(index.axis not in rows, "rows of all samples")
        else:
            mine = paired[rows.index(index.axis)] if index.axis in rows else None
            _need(mine is not None and array == index._replace(axis=mine), "rows of other samples")
        return index._replace(axis=behind[index.axis])
    if array is None:
        raise UnknownError("gather")
    gone = {*numbers.collapsed_slice_dims, *paired}
    _need(array.axis not in gone and array.axis not in numbers.start_index_map, "rows by their number")
    _need(sizes[array.axis] == read.shapes[0][array.axis], "rows of some samples")
    kept = [axis for axis in range(len(read.shapes[0])) if axis not in gone]
    return array._replace(axis=numbers.offset_dims[kept.index(array.axis)])


def _scatter(read: _Read, places: list[Place]) -> Along:
    numbers = read.params["dimension_numbers"]
    array, index, update = places
    _need(index is None, "a place that depends on the sample")
    if array is None or update is None:
        raise UnknownError("an operand without samples")
    gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    _need(array.axis not in gone and array.axis not in numbers.scatter_dims_to_operand_dims, "samples by their number")
    kept = [axis for axis in range(len(read.shapes[0])) if axis not in gone]
    axis = numbers.update_window_dims[kept.index(array.axis)]
    whole = read.shapes[2][axis] == read.shapes[0][array.axis]
    _need(whole and update == array._replace(axis=axis), "some samples")
    return array


def _of_matrices(read: _Read, places: list[Place]) -> Along:
    """Rule of what acts on the last two axes of every operand."""
    _need(all(place is not None for place in places), "an operand without samples")
    place = _same(places)
    _need(place.axis < len(read.shapes[0]) - 2, "matrices across samples")
    return place


def _fourier(read: _Read, places: list[Place]) -> Along:
    place = _same(places)
    _need(place.axis < len(read.shapes[0]) - len(read.params["fft_lengths"]), "a transform over samples")
    return place


def _top(read: _Read, places: list[Place]) -> Along:
    place = _same(places)
    _need(place.axis != read.params.get("axis", -1) % len(read.shapes[0]), "the largest of several samples")
    return place


_RULES: dict[str, Rule] = {
    "broadcast_in_dim": _broadcast,
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _reducing("dimensions"),
    **dict.fromkeys(
        ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin"),
        _reducing("axes"),
    ),
    **dict.fromkeys(("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"), _leaving("axis")),
    "rev": _leaving("dimensions"),
    **dict.fromkeys(("sort", "concatenate"), _leaving("dimension")),
    "split": _leaving("axis"),
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "pad": _pad,
    "dot_general": _matrix_product,
    "conv_general_dilated": _convolution,
    **dict.fromkeys(
        ("reduce_window_sum", "reduce_window_max", "reduce_window_min"),
        _windows,
    ),
    "gather": _gather,
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"), _scatter),
    **dict.fromkeys(("cholesky", "triangular_solve"), _of_matrices),
    "fft": _fourier,
    "top_k": _top,
}
