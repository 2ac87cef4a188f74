"""Rules of the operations that keep samples apart: where the result holds them, given where the operands do."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from operator import mul
from typing import Any, NamedTuple

from lplr_jax.ntk.demand import ELEMENTWISE
from lplr_jax.ntk.jaxpr import Op

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


class UnknownError(Exception):
    """There is no rule for an operation, or it mixes samples."""


class Along(NamedTuple):
    """Where a value holds all samples: an axis whose entries are numbered by (before, sample, behind)."""

    axis: int
    before: int = 1
    behind: int = 1


Place = Along | None
Shape = tuple[int, ...]


def need(condition: bool, why: str) -> None:
    """Raise UnknownError unless a condition holds."""
    if not condition:
        raise UnknownError(why)


class Read(NamedTuple):
    """An operation on many samples: its settings, and the shapes of its operands and of its first result."""

    op: Op
    shapes: list[Shape]
    result: Shape

    @property
    def params(self) -> dict[str, Any]:
        """Settings of the operation."""
        return self.op.params


Rule = Callable[[Read, list[Place]], Along]


def _same(places: Sequence[Place]) -> Along:
    """The place of all operands that depend on samples."""
    found = {place for place in places if place is not None}
    if len(found) != 1:
        raise UnknownError("samples along different axes")
    return found.pop()


def _entries(read: Read, places: list[Place]) -> Along:
    place = _same(places)
    for shape, own in zip(read.shapes, places, strict=True):  # one entry is repeated for all samples
        need(own is not None or not shape or shape[place.axis] == 1, "an operand of several samples")
    return place


def _leaving(name: str) -> Rule:
    """Rule of what acts along the axis or axes of a setting and leaves the others."""

    def rule(read: Read, places: list[Place]) -> Along:
        need(all(place is not None for place in places), "an operand without samples")
        place, value = _same(places), read.params[name]
        acted = {axis % len(read.shapes[0]) for axis in (value if isinstance(value, Sequence) else (value,))}
        need(place.axis not in acted, f"{read.op.name} over samples")
        return place

    return rule


def _reducing(name: str) -> Rule:
    """Rule of what takes some axes away."""

    def rule(read: Read, places: list[Place]) -> Along:
        place = _leaving(name)(read, places)
        gone = sum(axis % len(read.shapes[0]) < place.axis for axis in read.params[name])
        return place._replace(axis=place.axis - gone)

    return rule


def _broadcast(read: Read, places: list[Place]) -> Along:
    need(len(places) == 1, "a shape that is computed")
    place = _same(places)
    axis = read.params["broadcast_dimensions"][place.axis]
    need(read.shapes[0][place.axis] == read.result[axis], "samples that are repeated")
    return place._replace(axis=axis)


def _reshape(read: Read, places: list[Place]) -> Along:
    need(len(places) == 1 and read.params.get("dimensions") is None, "a reshape of another order")
    place = _same(places)
    samples = read.shapes[0][place.axis] // (place.before * place.behind)
    before = prod(read.shapes[0][: place.axis]) * place.before
    for axis, (outside, size) in enumerate(zip(accumulate(read.result, mul, initial=1), read.result, strict=False)):
        if size % samples == 0 and outside and before % outside == 0:
            lead = before // outside
            if lead and size % (lead * samples) == 0:
                return Along(axis, lead, size // (lead * samples))
    raise UnknownError("a reshape through samples")


def _transpose(read: Read, places: list[Place]) -> Along:
    place = _same(places)
    return place._replace(axis=tuple(read.params["permutation"]).index(place.axis))


def _slice(read: Read, places: list[Place]) -> Along:
    place, strides = _same(places), read.params["strides"]
    whole = read.result[place.axis] == read.shapes[0][place.axis]
    need(whole and (strides is None or strides[place.axis] == 1), "a slice of samples")
    return place


def _dynamic_slice(read: Read, places: list[Place]) -> Along:
    need(all(place is None for place in places[1:]), "a place that depends on the sample")
    place = _same(places)
    need(read.result[place.axis] == read.shapes[0][place.axis], "a slice of samples")
    return place


def _dynamic_update_slice(read: Read, places: list[Place]) -> Along:
    need(all(place is None for place in places[2:]), "a place that depends on the sample")
    need(places[0] is not None and places[1] is not None, "an operand without samples")
    place = _same(places)
    need(read.shapes[1][place.axis] == read.shapes[0][place.axis], "a slice of samples")
    return place


def _pad(read: Read, places: list[Place]) -> Along:
    need(places[1] is None, "padding by a sample's value")
    place = _same(places)
    need(tuple(read.params["padding_config"][place.axis]) == (0, 0, 0), "samples that are padded")
    return place


def _matrix_product(read: Read, places: list[Place]) -> Along:
    contract, batch = read.params["dimension_numbers"]
    at = 0 if places[0] is not None else 1
    place = places[at]
    if place is None:
        raise UnknownError("dot_general")
    need(place.axis not in contract[at], "a sum over samples")
    if place.axis in batch[at]:
        number = tuple(batch[at]).index(place.axis)
        other = places[1 - at]
        need(other is not None and other == place._replace(axis=batch[1 - at][number]), "samples of one operand")
        return place._replace(axis=number)
    need(places[1 - at] is None, "samples with samples")
    free = [
        [axis for axis in range(len(shape)) if axis not in (*contract[i], *batch[i])]
        for i, shape in enumerate(read.shapes)
    ]
    before = len(batch[0]) + (len(free[0]) if at else 0)
    return place._replace(axis=before + free[at].index(place.axis))


def _convolution(read: Read, places: list[Place]) -> Along:
    numbers = read.params["dimension_numbers"]
    place = places[0]
    need(places[1] is None and read.params["batch_group_count"] == 1, "a filter that depends on the sample")
    if place is None or place.axis != numbers.lhs_spec[0]:
        raise UnknownError("a convolution over samples")
    return place._replace(axis=numbers.out_spec[0])


def _windows(read: Read, places: list[Place]) -> Along:
    place = places[0]
    need(all(other is None for other in places[1:]), "windows of several operands")
    params = read.params
    if place is None:
        raise UnknownError(read.op.name)
    one = [params[name][place.axis] for name in ("window_dimensions", "window_strides")]
    one += [params[name][place.axis] for name in ("base_dilation", "window_dilation") if params.get(name)]
    need(set(one) == {1} and tuple(params["padding"][place.axis]) == (0, 0), "windows over samples")
    return place


def _gather(read: Read, places: list[Place]) -> Along:
    numbers, sizes = read.params["dimension_numbers"], read.params["slice_sizes"]
    array, index = places
    behind = [axis for axis in range(len(read.result)) if axis not in numbers.offset_dims]
    paired: tuple[int, ...] = tuple(getattr(numbers, "operand_batching_dims", ()))
    rows: tuple[int, ...] = tuple(getattr(numbers, "start_indices_batching_dims", ()))
    if index is not None:  # each sample looks up rows of its own
        need(index.axis < len(read.shapes[1]) - 1, "an index of several samples")
        if array is None:
            need(index.axis not in rows, "rows of all samples")
        else:
            mine = paired[rows.index(index.axis)] if index.axis in rows else None
            need(mine is not None and array == index._replace(axis=mine), "rows of other samples")
        return index._replace(axis=behind[index.axis])
    if array is None:
        raise UnknownError("gather")
    gone = {*numbers.collapsed_slice_dims, *paired}
    need(array.axis not in gone and array.axis not in numbers.start_index_map, "rows by their number")
    need(sizes[array.axis] == read.shapes[0][array.axis], "rows of some samples")
    kept = [axis for axis in range(len(read.shapes[0])) if axis not in gone]
    return array._replace(axis=numbers.offset_dims[kept.index(array.axis)])


def _scatter(read: Read, places: list[Place]) -> Along:
    numbers = read.params["dimension_numbers"]
    array, index, update = places
    need(index is None, "a place that depends on the sample")
    if array is None or update is None:
        raise UnknownError("an operand without samples")
    gone = {*numbers.inserted_window_dims, *getattr(numbers, "operand_batching_dims", ())}
    need(array.axis not in gone and array.axis not in numbers.scatter_dims_to_operand_dims, "samples by their number")
    kept = [axis for axis in range(len(read.shapes[0])) if axis not in gone]
    axis = numbers.update_window_dims[kept.index(array.axis)]
    whole = read.shapes[2][axis] == read.shapes[0][array.axis]
    need(whole and update == array._replace(axis=axis), "some samples")
    return array


def _of_matrices(read: Read, places: list[Place]) -> Along:
    """Rule of what acts on the last two axes of every operand."""
    need(all(place is not None for place in places), "an operand without samples")
    place = _same(places)
    need(place.axis < len(read.shapes[0]) - 2, "matrices across samples")
    return place


def _fourier(read: Read, places: list[Place]) -> Along:
    place = _same(places)
    need(place.axis < len(read.shapes[0]) - len(read.params["fft_lengths"]), "a transform over samples")
    return place


def _top(read: Read, places: list[Place]) -> Along:
    place = _same(places)
    need(place.axis != read.params.get("axis", -1) % len(read.shapes[0]), "the largest of several samples")
    return place


RULES: dict[str, Rule] = {
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
    **dict.fromkeys(("reduce_window_sum", "reduce_window_max", "reduce_window_min"), _windows),
    **dict.fromkeys(_ENTRY_BY_ENTRY, _entries),
    "gather": _gather,
    **dict.fromkeys(("scatter", "scatter-add", "scatter_add", "scatter-mul", "scatter_mul"), _scatter),
    **dict.fromkeys(("cholesky", "triangular_solve"), _of_matrices),
    "fft": _fourier,
    "top_k": _top,
}
"""What an operation on many samples must be for them to stay apart, and where its result holds them."""
