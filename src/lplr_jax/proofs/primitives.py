"""What each primitive does to fixed-point numbers: moves and sums, and functions entry by entry.

A primitive without a rule, a comparison that may come out either way and a number out of range are undecided.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lplr_jax import layouts
from lplr_jax.proofs import elementary as el
from lplr_jax.proofs import fixed as fx
from lplr_jax.proofs import products
from lplr_jax.proofs.fixed import Fixed, UndecidedError

Value = Fixed | np.ndarray
Rule = Callable[[dict[str, Any], list[Any], int], Any]


def exact(x: Value) -> np.ndarray:
    """Return whole numbers or truth values.

    Raises:
        UndecidedError: for floats.
    """
    if isinstance(x, Fixed):
        raise UndecidedError("a number that decides which way a program goes is a float")
    return x


def joined(parts: list[Value], join: Callable[[list[np.ndarray]], np.ndarray]) -> Value:
    """Return several arrays put into one by `join`, each entry taken from one."""
    if all(isinstance(part, Fixed) for part in parts):
        return fx.joined([part for part in parts if isinstance(part, Fixed)], join)
    return join([exact(part) for part in parts])


def moved(x: Value, move: Callable[[np.ndarray], np.ndarray]) -> Value:
    """Return the entries of an array where `move` puts them."""
    return x.map(move) if isinstance(x, Fixed) else move(x)


# Moves and sums.

# Entries of the result are entries of the first operand, or sums of entries of it and of other floats with the same
# E: the primitive acts on each digit. Operands that are no floats say where.
BY_DIGIT = frozenset(
    {
        "gather",
        "scatter",
        "scatter-add",
        "scatter_add",
        "dynamic_slice",
        "dynamic_update_slice",
        "cumsum",
        "reduce_window_sum",
        "pad",
        "copy",
        "copy_p",
    }
)
_DIGIT_SUMS = frozenset({"scatter-add", "scatter_add", "cumsum", "reduce_window_sum"})


def by_digit(eqn: Any, ins: list[Value]) -> Fixed:
    """Apply a primitive of `BY_DIGIT` to each digit.

    Raises:
        UndecidedError: for numbers that are not finite, or that it reads beyond an array.
    """
    floats = [x for x in ins if isinstance(x, Fixed)]
    sums = eqn.primitive.name in _DIGIT_SUMS
    if any(not isinstance(x, Fixed) and np.issubdtype(x.dtype, np.floating) for x in ins):
        # It would count in every digit.
        raise UndecidedError(f"{eqn.primitive.name} takes a number that is not finite")
    if sums:
        floats = [x.near() for x in floats]
    if eqn.params.get("fill_value"):
        # So would what is read beyond the array: made NaN, it is refused.
        eqn = eqn.replace(params={**eqn.params, "fill_value": math.nan})

    def apply(arrays: list[np.ndarray]) -> np.ndarray:
        left = iter(arrays)
        out = np.asarray(layouts.bind(eqn, [next(left) if isinstance(x, Fixed) else x for x in ins])[0])
        if not np.isfinite(out).all():
            raise UndecidedError(f"{eqn.primitive.name} reads beyond an array")
        return out

    terms = max(math.prod(x.shape) for x in floats)
    if terms > 2 ** (53 - fx.BITS):
        raise UndecidedError(f"a sum of up to {terms} numbers is too long to be exact")
    return fx.joined(floats, apply, terms + 1 if sums else 1)


def _move(move: Callable[[dict[str, Any], np.ndarray], np.ndarray]) -> Rule:
    return lambda settings, ins, _: moved(ins[0], lambda a: move(settings, a))


def _broadcast(settings: dict[str, Any], a: np.ndarray) -> np.ndarray:
    shape, axes = settings["shape"], settings["broadcast_dimensions"]
    wide = [1] * len(shape)
    for axis, size in zip(axes, a.shape, strict=True):
        wide[axis] = size
    return np.broadcast_to(a.reshape(wide), shape)


def _slice(settings: dict[str, Any], a: np.ndarray) -> np.ndarray:
    strides = settings["strides"] or (1,) * a.ndim
    return a[tuple(map(slice, settings["start_indices"], settings["limit_indices"], strides))]


def _reshape(settings: dict[str, Any], a: np.ndarray) -> np.ndarray:
    order = settings.get("dimensions")
    return (a if order is None else a.transpose(order)).reshape(settings["new_sizes"])


def _split(settings: dict[str, Any], ins: list[Any], _: int) -> list[Value]:
    ends = np.cumsum(settings["sizes"])[:-1]
    count = len(settings["sizes"])
    return [moved(ins[0], lambda a, i=i: np.split(a, ends, axis=settings["axis"])[i]) for i in range(count)]


def _unstack(settings: dict[str, Any], ins: list[Any], _: int) -> list[Value]:
    axis = settings["axis"]
    return [moved(ins[0], lambda a, i=i: np.take(a, i, axis)) for i in range(ins[0].shape[axis])]


def _concatenate(settings: dict[str, Any], ins: list[Any], _: int) -> Value:
    return joined(ins, lambda arrays: np.concatenate(arrays, axis=settings["dimension"]))


def _reduce_sum(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    (a,), axes = ins, tuple(settings["axes"])
    return fx.linear(a, lambda x: x.sum(axis=axes), math.prod(a.shape[axis] for axis in axes))


def _last(a: Fixed, axes: Sequence[int]) -> Fixed:
    """Return the array with some axes joined to one, the last."""
    kept = [axis for axis in range(len(a.shape)) if axis not in axes]
    shape = (*(a.shape[axis] for axis in kept), -1)
    return a.map(lambda x: x.transpose(*kept, *axes).reshape(shape))


def _largest(a: Fixed) -> Fixed:
    """Return the largest along the last axis."""
    while a.shape[-1] > 1:
        half = a.shape[-1] // 2
        one = a.map(lambda x, half=half: x[..., :half])
        two = a.map(lambda x, half=half: x[..., half : 2 * half])
        rest = a.map(lambda x, half=half: x[..., 2 * half :])
        a = fx.maximum(one, two)
        if rest.shape[-1]:
            a = fx.joined([a, rest], lambda arrays: np.concatenate(arrays, axis=-1))
    return a.map(lambda x: x[..., 0])


def _reduce_max(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    axes = tuple(settings["axes"])
    return replace(_largest(_last(ins[0], axes)), largest_of=(ins[0], axes))


def _kept_shape(of: tuple[Fixed, tuple[int, ...]]) -> tuple[int, ...]:
    return tuple(1 if axis in of[1] else size for axis, size in enumerate(of[0].shape))


def _reshaped(settings: dict[str, Any], ins: list[Any], _: int) -> Value:
    (x,), shaped = ins, moved(ins[0], lambda a: _reshape(settings, a))
    of = x.largest_of if isinstance(x, Fixed) else None
    # With the axes that were reduced kept at size one, and only so, maxima lie beside what they are of.
    if of is not None and isinstance(shaped, Fixed) and shaped.shape == _kept_shape(of) and x.shape != shaped.shape:
        return replace(shaped, largest_of=of) if settings.get("dimensions") is None else shaped
    return shaped


def _is_largest(a: Fixed, b: Fixed) -> np.ndarray | None:
    """Return the sign of a - b, b the maxima of a with their axes kept and broadcast; None where b is something else.

    Raises:
        UndecidedError: where a second number is within its error of the largest.
    """
    of = b.largest_of
    if of is None or of[0] is not a or b.shape != _kept_shape(of):
        return None
    gap = fx.sub(Fixed(a.digits, a.high, a.radius, a.places), Fixed(b.digits, b.high, b.radius, b.places))
    less = gap.mid < -gap.error * 1.001
    if a.far is not None:
        less |= a.far
    # The one that is not certainly less is the largest; of several none is known to be.
    if (np.sum(~less, axis=of[1]) != 1).any():
        raise UndecidedError("the largest of several numbers is not certain")
    return np.where(less, -1.0, 0.0)


def _reduce_prod(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    a = _last(ins[0], settings["axes"])
    found = a.map(lambda x: x[..., 0])
    for i in range(1, a.shape[-1]):
        found = fx.mul(found, a.map(lambda x, i=i: x[..., i]))
    return found


def _window_index(settings: dict[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """Return which entries of an array a window holds, (*windows, entries of one), -1 outside of the array."""
    dilated = [*settings.get("base_dilation", ()), *settings.get("window_dilation", ())]
    if any(step != 1 for step in dilated):
        raise UndecidedError("a dilated window has no rule")
    padding = settings["padding"]
    if min(min(pair) for pair in padding) < 0:
        raise UndecidedError("a window with a negative margin has no rule")
    index = np.pad(np.arange(math.prod(shape)).reshape(shape), padding, constant_values=-1)
    window, strides = settings["window_dimensions"], settings["window_strides"]
    found = sliding_window_view(index, window)[tuple(slice(None, None, step) for step in strides)]
    return found.reshape(*found.shape[: len(shape)], -1)


def _windows(a: Fixed, index: np.ndarray) -> Fixed:
    found = a.map(lambda x: x.reshape(-1)[np.maximum(index, 0)])
    outside = index < 0
    if not outside.any():
        return found
    far = outside if found.far is None else found.far | outside
    radius = None if found.radius is None else np.where(outside, 0.0, found.radius)
    return Fixed(np.where(outside, 0.0, found.digits), found.high, radius, found.places, far)


def _reduce_window_max(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    return _largest(_windows(ins[0], _window_index(settings, ins[0].shape)))


def _select_and_scatter_add(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    source, operand = ins
    if settings["select_prim"].name != "ge":
        raise UndecidedError("a selection by anything but >= has no rule")
    index = _window_index(settings, operand.shape)
    held = _windows(operand, index)
    below = np.zeros(index.shape, bool) if held.far is None else held.far
    middle = np.where(below, -np.inf, held.mid)
    # The first of equal ones is taken.
    first = np.argmax(middle, axis=-1)[..., None]
    taken = held.map(lambda x: np.take_along_axis(x, first, axis=-1)).near()
    if (below & (taken.mid - taken.error * 1.001 < fx.STILL_NEAR)).any():
        raise UndecidedError("a number may be less than one that masks something out")
    gap = fx.sub(Fixed(taken.digits, taken.high, taken.radius, taken.places), el.exactly_near(held))
    same = np.arange(middle.shape[-1]) == first
    equal = (gap.mid == 0) & (gap.error == 0)
    if not (same | equal | below | (gap.mid > gap.error * 1.001)).all():
        raise UndecidedError("the largest of a window is not certain")
    place = np.take_along_axis(index, first, axis=-1).reshape(-1)

    def scatter(x: np.ndarray) -> np.ndarray:
        out = np.zeros(math.prod(operand.shape))
        np.add.at(out, place, x.reshape(-1))
        return out.reshape(operand.shape)

    return fx.linear(source, scatter, index.shape[-1])


# Entry by entry.


def _integer_power(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    (a,), exponent = ins, settings["y"]
    if exponent == 0:
        return fx.fixed(np.ones(a.shape), a.places)
    found, square, left = None, a, abs(exponent)
    while left:
        if left & 1:
            found = square if found is None else fx.mul(found, square)
        left >>= 1
        square = fx.mul(square, square) if left else square
    assert found is not None
    return el.reciprocal(found) if exponent < 0 else found


def _power(_: dict[str, Any], ins: list[Any], places: int) -> Fixed:
    base, exponent = ins
    power = exponent if isinstance(exponent, Fixed) else fx.fixed(exponent, places)
    return el.exp(fx.mul(power, el.log(base)))


def _absolute(_: dict[str, Any], ins: list[Any], places: int) -> Fixed:
    return fx.mul(ins[0], fx.fixed(np.where(ins[0].mid < 0, -1.0, 1.0), places))


def _select(_: dict[str, Any], ins: list[Any], places: int) -> Value:
    which, cases = exact(ins[0]).astype(np.int64), ins[1:]
    if any(isinstance(case, Fixed) for case in cases):
        wide = np.broadcast_to(which, cases[0].shape)
        if any(not isinstance(case, Fixed) and (wide == i).any() for i, case in enumerate(cases)):
            raise UndecidedError("a number that is not finite is chosen")
        return fx.choose(which, [case if isinstance(case, Fixed) else fx.fixed(0.0, places) for case in cases])
    return np.choose(np.broadcast_to(which, cases[0].shape), cases)


def _clamp(_: dict[str, Any], ins: list[Any], places: int) -> Fixed:
    low, x, high = ins
    return _minimum({}, [fx.maximum(low, x), high], places)


def _minimum(_: dict[str, Any], ins: list[Any], __: int) -> Fixed:
    a, b = ins
    return fx.neg(fx.maximum(fx.neg(a), fx.neg(b)))


def _compare(of_sign: Callable[[np.ndarray], np.ndarray]) -> Rule:
    def rule(_: dict[str, Any], ins: list[Any], places: int) -> np.ndarray:
        a, b = ins
        if a is b:
            return of_sign(np.zeros(a.shape))
        if isinstance(a, Fixed) and isinstance(b, Fixed) and (sign := _is_largest(a, b)) is not None:
            return of_sign(sign)
        for one, other, sign in ((a, b, -1.0), (b, a, 1.0)):
            if not isinstance(other, Fixed) and np.isposinf(other).all() and isinstance(one, Fixed):
                return of_sign(np.full(np.broadcast_shapes(a.shape, b.shape), sign))
        if not (isinstance(a, Fixed) and isinstance(b, Fixed)):
            raise UndecidedError("a comparison with an infinity may come out either way")
        # The derivative of a maximum asks which of the two it is.
        for one, other, sign in ((a, b, 1.0), (b, a, -1.0)):
            for this, that in (pair for pair in (other.larger_of, (other.larger_of or ())[::-1]) if pair):
                if fx.same(this, one):
                    return of_sign(sign * np.minimum(fx.certain_signs(this, that), 0.0))
        return of_sign(fx.certain_signs(a, b))

    return rule


def _convert(settings: dict[str, Any], ins: list[Any], places: int) -> Value:
    dtype = settings["new_dtype"]
    if not jnp.issubdtype(dtype, jnp.floating):
        raise UndecidedError("a float becomes a whole number")
    return ins[0]


def _entry(function: Callable[[Fixed], Fixed]) -> Rule:
    return lambda _settings, ins, _places: function(ins[0])


def _pair(function: Callable[[Fixed, Fixed], Fixed]) -> Rule:
    return lambda _settings, ins, _places: function(ins[0], ins[1])


RULES: dict[str, Rule] = {
    "broadcast_in_dim": _move(_broadcast),
    "reshape": _reshaped,
    "transpose": _move(lambda settings, a: a.transpose(settings["permutation"])),
    "squeeze": _move(lambda settings, a: a.squeeze(tuple(settings["dimensions"]))),
    "expand_dims": _move(lambda settings, a: np.expand_dims(a, tuple(settings["dimensions"]))),
    "slice": _move(_slice),
    "rev": _move(lambda settings, a: np.flip(a, settings["dimensions"])),
    "optimization_barrier": lambda _settings, ins, _places: list(ins),
    "sharding_constraint": lambda _settings, ins, _places: ins[0],
    "name": lambda _settings, ins, _places: ins[0],
    "stop_gradient": lambda _settings, ins, _places: ins[0],
    "split": _split,
    "stack": lambda settings, ins, _: joined(ins, lambda arrays: np.stack(arrays, axis=settings["axis"])),
    "unstack": _unstack,
    "tile": _move(lambda settings, a: np.tile(a, settings["reps"])),
    "concatenate": _concatenate,
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce_max,
    "reduce_min": lambda settings, ins, places: fx.neg(_reduce_max(settings, [fx.neg(ins[0])], places)),
    "reduce_prod": _reduce_prod,
    "reduce_window_max": _reduce_window_max,
    "select_and_scatter_add": _select_and_scatter_add,
    "dot_general": products.dot_general,
    "conv_general_dilated": products.convolution,
    "add": _pair(fx.add),
    "add_any": _pair(fx.add),
    "sub": _pair(fx.sub),
    "mul": _pair(fx.mul),
    "div": _pair(el.div),
    "max": _pair(fx.maximum),
    "min": _minimum,
    "clamp": _clamp,
    "neg": _entry(fx.neg),
    "square": _entry(lambda a: fx.mul(a, a)),
    "one_minus_square": _entry(lambda a: fx.sub(fx.fixed(1.0, a.places), fx.mul(a, a))),
    "integer_pow": _integer_power,
    "pow": _power,
    "sqrt": _entry(el.sqrt),
    "rsqrt": _entry(el.rsqrt),
    "exp": _entry(el.exp),
    "log": _entry(el.log),
    "log1p": _entry(el.log1p),
    "expm1": _entry(el.expm1),
    "exp2": _entry(lambda a: el.exp(fx.mul(a, el.ln2(a.places)))),
    "sinh": _entry(lambda a: el.scaled(fx.sub(el.exp(a), el.exp(fx.neg(a))), 0.5)),
    "cosh": _entry(lambda a: el.scaled(fx.add(el.exp(a), el.exp(fx.neg(a))), 0.5)),
    "tan": _entry(lambda a: el.div(el.sin(a), el.cos(a))),
    "tanh": _entry(el.tanh),
    "logistic": _entry(el.logistic),
    "erf": _entry(el.erf),
    "erfc": _entry(lambda a: fx.sub(fx.fixed(1.0, a.places), el.erf(a))),
    "sin": _entry(el.sin),
    "cos": _entry(el.cos),
    "abs": _absolute,
    "sign": lambda _settings, ins, places: fx.fixed(fx.certain_signs(ins[0], fx.fixed(0.0, places)), places),
    "select_n": _select,
    "is_finite": lambda _settings, ins, _places: np.ones(ins[0].near().shape, bool),
    "gt": _compare(lambda sign: sign > 0),
    "ge": _compare(lambda sign: sign >= 0),
    "lt": _compare(lambda sign: sign < 0),
    "le": _compare(lambda sign: sign <= 0),
    "eq": _compare(lambda sign: sign == 0),
    "ne": _compare(lambda sign: sign != 0),
    "convert_element_type": _convert,
}
"""What a primitive does to fixed-point numbers: of its settings, its operands and the digits of constants."""

TAKE_ANY = frozenset(
    {"gt", "ge", "lt", "le", "eq", "ne", "select_n", "convert_element_type"}
    | {"broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "rev"}
)
