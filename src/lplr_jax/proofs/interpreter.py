"""A traced function evaluated in fixed-point numbers: a float is a `Fixed`, whole numbers and truth values are exact.

What a primitive does is said once, in `_RULES`; a primitive without a rule, a comparison that may come out either way
and a number out of range are undecided. Loops of a fixed length are run step by step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from lplr_jax import layouts
from lplr_jax.ntk.loops import operand_counts
from lplr_jax.proofs import elementary as el
from lplr_jax.proofs import fixed as fx
from lplr_jax.proofs.fixed import Fixed, UndecidedError

Value = Fixed | np.ndarray
Rule = Callable[[dict[str, Any], list[Any], int], Any]

_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
)
_GAUSSIAN = f"exp_neg_sq at {Path(jax.__file__).parent}"
_STACK_ENTRIES = 2**25
"""Entries of patches that are held at a time."""
_FEW = 4
"""Digits of the operands of a product that enters nothing but sums: no step is left to multiply its error."""
_SUMS = frozenset(
    {"add", "add_any", "sub", "neg", "reduce_sum", "reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim"}
    | {"rev", "convert_element_type", "copy", "concatenate", "slice"}
)
"""Primitives of a last step that keep errors as large as they are, but for how often an entry is taken."""


def value(array: Any, places: int) -> Value:
    """Return an array as the interpreter holds it.

    Raises:
        UndecidedError: for floats that are not finite.
    """
    dtype = jnp.result_type(array)
    if jnp.issubdtype(dtype, jax.dtypes.extended):
        return array  # keys of random numbers, of which whole numbers are made
    if not jnp.issubdtype(dtype, jnp.floating):
        return np.asarray(array)
    wide = np.asarray(array).astype(np.float64)
    # What is compared with ∞ is less, and a NaN may be left unchosen; they are good for nothing else.
    return wide if (np.isposinf(wide) | np.isnan(wide)).any() else fx.fixed(wide, places)


class Want(NamedTuple):
    """What is wanted of results: whether they are needed, and whether nothing is made of them but sums."""

    needed: Sequence[bool]
    ends: Sequence[bool]


def run(closed: jex.ClosedJaxpr, args: Sequence[Value], places: int, want: Want | None = None) -> list[Any]:
    """Evaluate a jaxpr; what no result that is needed depends on is left out.

    Args:
        closed: of float64 arrays, whole numbers and truth values.
        args: its arguments.
        places: digits of its constants, and so of what is made of them.
        want: of its results; products that enter nothing but ends take few digits. None for all, and no ends.

    Returns:
        The results, None for one that is not needed.

    Raises:
        UndecidedError: for a primitive without a rule, or a result that has no bound.
    """
    jaxpr, count = closed.jaxpr, len(closed.jaxpr.outvars)
    want = Want([True] * count, [False] * count) if want is None else want
    env: dict[Any, Any] = dict(zip(jaxpr.invars, args, strict=True))
    env.update((var, value(const, places)) for var, const in zip(jaxpr.constvars, closed.consts, strict=True))
    last = {var: i for i, eqn in enumerate(jaxpr.eqns) for var in eqn.invars if not isinstance(var, jex.Literal)}
    kept = {var for var in jaxpr.outvars if not isinstance(var, jex.Literal)}
    last_steps = _last_steps(jaxpr, want.ends) if any(want.ends) else frozenset()
    live = _live(jaxpr, want.needed)

    def read(var: Any) -> Value:
        return value(var.val, places) if isinstance(var, jex.Literal) else env[var]

    for i, eqn in enumerate(jaxpr.eqns):
        here = Want([var in live for var in eqn.outvars], [var in last_steps for var in eqn.outvars])
        if not any(here.needed):
            continue
        outs = _apply(eqn, [read(var) for var in eqn.invars], places, here)
        env.update(zip(eqn.outvars, outs, strict=True))
        for var in {var for var in eqn.invars if not isinstance(var, jex.Literal)} - kept:
            if last[var] == i:
                env.pop(var, None)
    return [read(var) if needed else None for var, needed in zip(jaxpr.outvars, want.needed, strict=True)]


def _live(jaxpr: Any, needed: Sequence[bool]) -> set[Any]:
    """Return the variables that results which are needed depend on."""
    found = {var for var, one in zip(jaxpr.outvars, needed, strict=True) if one and not isinstance(var, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        if found.intersection(eqn.outvars):
            found.update(var for var in eqn.invars if not isinstance(var, jex.Literal))
    return found


def _last_steps(jaxpr: Any, ends: Sequence[bool]) -> frozenset[Any]:
    """Return the variables that enter the results marked as ends by moves and sums, and nothing else."""
    found = {var for var, end in zip(jaxpr.outvars, ends, strict=True) if end and not isinstance(var, jex.Literal)}
    others = {var for var, end in zip(jaxpr.outvars, ends, strict=True) if not end and not isinstance(var, jex.Literal)}
    for eqn in reversed(jaxpr.eqns):
        ends_here = all(var in found and var not in others for var in eqn.outvars)
        passes = eqn.primitive.name in _SUMS and ends_here
        (found if passes else others).update(var for var in eqn.invars if not isinstance(var, jex.Literal))
    return frozenset(found - others)


def _apply(eqn: Any, ins: list[Any], places: int, want: Want) -> Sequence[Any]:
    name, settings = eqn.primitive.name, eqn.params
    if _is_gaussian(eqn):
        return [el.exp(fx.neg(fx.mul(ins[0], ins[0])))]
    if name in _CALLS:
        return run(_closed(settings.get("jaxpr", settings.get("call_jaxpr"))), ins, places, want)
    if name == "scan":
        return _scan(settings, ins, places, want)
    if name == "cond":
        branch = settings["branches"][int(np.clip(_exact(ins[0]), 0, len(settings["branches"]) - 1))]
        return run(_closed(branch), ins[1:], places, want)
    floats = any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in eqn.outvars)
    if not any(isinstance(x, Fixed) for x in ins) and (not floats or name in ("iota", "convert_element_type")):
        outs = layouts.bind(eqn, ins)
        if floats and name != "iota":
            _require_exact(ins[0], outs[0])
        return [value(out, places) for out in outs]
    for var in eqn.outvars:
        if jnp.issubdtype(var.aval.dtype, jnp.inexact) and var.aval.dtype != np.float64:
            raise UndecidedError(f"{name} gives {var.aval.dtype}, not float64")
    if "_" in str(settings.get("precision") or ""):  # an algorithm by name, such as BF16_BF16_F32
        raise UndecidedError(f"{name} rounds its operands")
    if floats and _is_empty(eqn):
        return [fx.fixed(np.zeros(var.aval.shape), places) for var in eqn.outvars]
    if name in _BY_DIGIT:
        return [_by_digit(eqn, ins)]
    rule = _RULES.get(name)
    if rule is None:
        raise UndecidedError(f"{name} has no rule")
    if name not in _TAKE_ANY and any(not isinstance(x, Fixed) and np.issubdtype(x.dtype, np.floating) for x in ins):
        raise UndecidedError(f"{name} takes a number that is not finite")
    if all(want.ends) and name in ("dot_general", "conv_general_dilated"):
        ins = [fx.with_places(x, min(_FEW, x.places)) if isinstance(x, Fixed) else x for x in ins]
    found = rule(settings, ins, places)
    return found if isinstance(found, list) else [found]


def _require_exact(whole: np.ndarray, number: Any) -> None:
    """Refuse whole numbers that a float does not hold, in float64 or in what is narrower.

    Raises:
        UndecidedError: if there is any.
    """
    if np.issubdtype(whole.dtype, np.floating):  # with an infinity or a NaN among them
        wide = np.asarray(number).astype(np.float64)
        equal = np.array_equal(wide, whole, equal_nan=True)
    else:
        wide = np.asarray(number).astype(np.float64)
        equal = bool((np.abs(wide) <= 2.0**53).all()) and np.array_equal(wide, whole.astype(np.float64))
    if not equal:
        raise UndecidedError("a number becomes a float that does not hold it")


def _is_empty(eqn: Any) -> bool:
    """Return whether the one result of an equation has no entries, or is made of sums of no products."""
    (out, *others) = eqn.outvars
    products = eqn.primitive.name in ("dot_general", "conv_general_dilated")
    looked_at = (out, *eqn.invars) if products else (out,)
    return not others and any(math.prod(var.aval.shape) == 0 for var in looked_at)


def _is_gaussian(eqn: Any) -> bool:
    """Return whether an equation is what newer JAX takes for e^(-x²): it splits x by its bits, and means the number."""
    if eqn.primitive.name != "custom_jvp_call":
        return False
    info = getattr(_closed(eqn.params["call_jaxpr"]).jaxpr.debug_info, "func_src_info", None) or ""
    return info.startswith(_GAUSSIAN)


def _closed(body: Any) -> jex.ClosedJaxpr:
    return body if isinstance(body, jex.ClosedJaxpr) else jex.ClosedJaxpr(body, ())


def _exact(x: Value) -> np.ndarray:
    if isinstance(x, Fixed):
        raise UndecidedError("a number that decides which way a program goes is a float")
    return x


def _scan(settings: dict[str, Any], ins: list[Any], places: int, want: Want) -> list[Any]:
    fixed_count, carried = operand_counts(settings)
    consts, carry, rows = ins[:fixed_count], ins[fixed_count : fixed_count + carried], ins[fixed_count + carried :]
    steps = range(settings["length"])
    inside = Want(
        [needed or i < carried for i, needed in enumerate(want.needed)],
        [end and i >= carried for i, end in enumerate(want.ends)],
    )
    found: list[list[Value]] = []
    for t in reversed(steps) if settings["reverse"] else steps:
        here = [_moved(row, lambda a, t=t: a[t]) for row in rows]
        outs = run(_closed(settings["jaxpr"]), [*consts, *carry, *here], places, inside)
        carry = outs[:carried]
        found.append(outs[carried:])
    if settings["reverse"]:
        found.reverse()
    if not found:
        raise UndecidedError("a loop of no steps has no rule")
    stacked = [None if parts[0] is None else _joined(list(parts), np.stack) for parts in zip(*found, strict=True)]
    return [*carry, *stacked]


def _joined(parts: list[Value], join: Callable[[list[np.ndarray]], np.ndarray]) -> Value:
    if all(isinstance(part, Fixed) for part in parts):
        return fx.joined([part for part in parts if isinstance(part, Fixed)], join)
    return join([_exact(part) for part in parts])


def _moved(x: Value, move: Callable[[np.ndarray], np.ndarray]) -> Value:
    return x.map(move) if isinstance(x, Fixed) else move(x)


# Moves and sums.

# Entries of the result are entries of the first operand, or sums of entries of it and of other floats with the same
# E: the primitive acts on each digit. Operands that are no floats say where.
_BY_DIGIT = frozenset(
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


def _by_digit(eqn: Any, ins: list[Value]) -> Fixed:
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
    return lambda settings, ins, _: _moved(ins[0], lambda a: move(settings, a))


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
    return [_moved(ins[0], lambda a, i=i: np.split(a, ends, axis=settings["axis"])[i]) for i in range(count)]


def _unstack(settings: dict[str, Any], ins: list[Any], _: int) -> list[Value]:
    axis = settings["axis"]
    return [_moved(ins[0], lambda a, i=i: np.take(a, i, axis)) for i in range(ins[0].shape[axis])]


def _concatenate(settings: dict[str, Any], ins: list[Any], _: int) -> Value:
    return _joined(ins, lambda arrays: np.concatenate(arrays, axis=settings["dimension"]))


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
    (x,), moved = ins, _moved(ins[0], lambda a: _reshape(settings, a))
    of = x.largest_of if isinstance(x, Fixed) else None
    # With the axes that were reduced kept at size one, and only so, maxima lie beside what they are of.
    if of is not None and isinstance(moved, Fixed) and moved.shape == _kept_shape(of) and x.shape != moved.shape:
        return replace(moved, largest_of=of) if settings.get("dimensions") is None else moved
    return moved


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


# Products.


def _dot_general(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    a, b = ins
    (of_a, of_b), (batch_a, batch_b) = settings["dimension_numbers"]
    free_a = [axis for axis in range(len(a.shape)) if axis not in (*of_a, *batch_a)]
    free_b = [axis for axis in range(len(b.shape)) if axis not in (*of_b, *batch_b)]
    batch, m = [a.shape[axis] for axis in batch_a], [a.shape[axis] for axis in free_a]
    n, terms = [b.shape[axis] for axis in free_b], math.prod(a.shape[axis] for axis in of_a)

    def form(stack: np.ndarray, other: np.ndarray) -> np.ndarray:
        g, axes = stack.shape[0], [axis + 1 for axis in (*batch_a,)]
        order = [*axes, 0, *(axis + 1 for axis in free_a), *(axis + 1 for axis in of_a)]
        left = stack.transpose(order).reshape(math.prod(batch), g * math.prod(m), terms)
        right = other.transpose(*batch_b, *of_b, *free_b).reshape(math.prod(batch), terms, math.prod(n))
        out = np.matmul(left, right).reshape(*batch, g, *m, *n)
        return np.moveaxis(out, len(batch), 0)

    return fx.contract(a, b, form, terms)


def _convolution(settings: dict[str, Any], ins: list[Any], _: int) -> Fixed:
    a, b = ins
    numbers = settings["dimension_numbers"]
    kernel = [b.shape[axis] for axis in numbers.rhs_spec]
    groups, batches = settings["feature_group_count"], settings["batch_group_count"]
    window, inputs, outputs = kernel[2:], kernel[1], kernel[0]
    strides, spread = settings["window_strides"], settings["rhs_dilation"]
    terms = inputs * math.prod(window)

    def patches(stack: np.ndarray) -> np.ndarray:
        x = stack.transpose(0, *(axis + 1 for axis in numbers.lhs_spec))
        for axis, step in enumerate(settings["lhs_dilation"], start=3):
            if step > 1:
                shape = list(x.shape)
                shape[axis] = (shape[axis] - 1) * step + 1
                wide = np.zeros(shape)
                wide[(slice(None),) * axis + (slice(None, None, step),)] = x
                x = wide
        padding = settings["padding"]
        x = np.pad(x, [(0, 0)] * 3 + [(max(low, 0), max(high, 0)) for low, high in padding])
        cropped = [slice(max(-low, 0), x.shape[i + 3] - max(-high, 0)) for i, (low, high) in enumerate(padding)]
        x = x[(slice(None),) * 3 + tuple(cropped)]
        reach = [(size - 1) * step + 1 for size, step in zip(window, spread, strict=True)]
        views = sliding_window_view(x, reach, axis=tuple(range(3, x.ndim)))
        inner = tuple(slice(None, None, step) for step in spread)
        return views[(slice(None),) * 3 + tuple(slice(None, None, step) for step in strides) + inner]

    def form(stack: np.ndarray, other: np.ndarray) -> np.ndarray:
        weight = other.transpose(numbers.rhs_spec)
        size = max(1, _STACK_ENTRIES // max(1, stack[0].size * math.prod(window)))
        found = [once(stack[i : i + size], weight) for i in range(0, stack.shape[0], size)]
        return np.concatenate(found)

    def once(stack: np.ndarray, weight: np.ndarray) -> np.ndarray:
        view = patches(stack)
        g, n, c = view.shape[:3]
        places = view.shape[3 : 3 + len(window)]
        d = len(window)
        parts = max(groups, batches)
        # (group, stack, batch, positions, terms)
        if batches > 1:
            view = view.reshape(g, batches, n // batches, c, *places, *window)
            order = (1, 0, 2, *range(4, 4 + d), 3, *range(4 + d, 4 + 2 * d))
            n //= batches
        else:
            view = view.reshape(g, n, groups, c // groups, *places, *window)
            order = (2, 0, 1, *range(4, 4 + d), 3, *range(4 + d, 4 + 2 * d))
        left = view.transpose(order).reshape(parts, -1, terms)
        right = weight.reshape(parts, outputs // parts, terms).transpose(0, 2, 1)
        out = np.matmul(left, right).reshape(parts, g, n, *places, outputs // parts)
        # (stack, batch, features, positions), then as it is asked for
        out = out.transpose(1, 2, 0, 3 + d, *range(3, 3 + d)).reshape(g, n, outputs, *places)
        back = np.argsort(numbers.out_spec)
        return out.transpose(0, *(axis + 1 for axis in back))

    return fx.contract(a, b, form, terms)


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
    which, cases = _exact(ins[0]).astype(np.int64), ins[1:]
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


_RULES: dict[str, Rule] = {
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
    "stack": lambda settings, ins, _: _joined(ins, lambda arrays: np.stack(arrays, axis=settings["axis"])),
    "unstack": _unstack,
    "tile": _move(lambda settings, a: np.tile(a, settings["reps"])),
    "concatenate": _concatenate,
    "reduce_sum": _reduce_sum,
    "reduce_max": _reduce_max,
    "reduce_min": lambda settings, ins, places: fx.neg(_reduce_max(settings, [fx.neg(ins[0])], places)),
    "reduce_prod": _reduce_prod,
    "reduce_window_max": _reduce_window_max,
    "select_and_scatter_add": _select_and_scatter_add,
    "dot_general": _dot_general,
    "conv_general_dilated": _convolution,
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

_TAKE_ANY = frozenset(
    {"gt", "ge", "lt", "le", "eq", "ne", "select_n", "convert_element_type"}
    | {"broadcast_in_dim", "reshape", "transpose", "squeeze", "expand_dims", "slice", "rev"}
)
_KNOWN = frozenset(_RULES) | _BY_DIGIT | _CALLS | {"scan", "cond", "iota"}


def without_rule(jaxpr: Any) -> Iterator[str]:
    """Yield the names of the primitives of a jaxpr, those in bodies included, that take floats and have no rule."""
    for eqn in jaxpr.eqns:
        floats = any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in (*eqn.invars, *eqn.outvars))
        if floats and eqn.primitive.name not in _KNOWN:
            yield eqn.primitive.name
        elif eqn.primitive.name in _KNOWN and not _is_gaussian(eqn):
            for body in jex.jaxprs_in_params(eqn.params):
                yield from without_rule(getattr(body, "jaxpr", body))
