"""A traced function evaluated in fixed-point numbers: a float is a `Fixed`, whole numbers and truth values are exact.

What a primitive does is said once, in `primitives.RULES`. Loops of a fixed length are run step by step.
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from lplr_jax import layouts
from lplr_jax.ntk.loops import operand_counts
from lplr_jax.proofs import elementary as el
from lplr_jax.proofs import fixed as fx
from lplr_jax.proofs.fixed import Fixed, UndecidedError
from lplr_jax.proofs.primitives import BY_DIGIT, RULES, TAKE_ANY, Value, by_digit, exact, joined, moved

_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint", "custom_jvp_call", "custom_vjp_call"}
)
_GAUSSIAN = f"exp_neg_sq at {Path(jax.__file__).parent}"
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
        branch = settings["branches"][int(np.clip(exact(ins[0]), 0, len(settings["branches"]) - 1))]
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
    if name in BY_DIGIT:
        return [by_digit(eqn, ins)]
    rule = RULES.get(name)
    if rule is None:
        raise UndecidedError(f"{name} has no rule")
    if name not in TAKE_ANY and any(not isinstance(x, Fixed) and np.issubdtype(x.dtype, np.floating) for x in ins):
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
    wide = np.asarray(number).astype(np.float64)
    if np.issubdtype(whole.dtype, np.floating):  # with an infinity or a NaN among them
        equal = np.array_equal(wide, whole, equal_nan=True)
    else:
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
        here = [moved(row, lambda a, t=t: a[t]) for row in rows]
        outs = run(_closed(settings["jaxpr"]), [*consts, *carry, *here], places, inside)
        carry = outs[:carried]
        found.append(outs[carried:])
    if settings["reverse"]:
        found.reverse()
    if not found:
        raise UndecidedError("a loop of no steps has no rule")
    stacked = [None if parts[0] is None else joined(list(parts), np.stack) for parts in zip(*found, strict=True)]
    return [*carry, *stacked]


_KNOWN = frozenset(RULES) | BY_DIGIT | _CALLS | {"scan", "cond", "iota"}


def without_rule(jaxpr: Any) -> Iterator[str]:
    """Yield the names of the primitives of a jaxpr, those in bodies included, that take floats and have no rule."""
    for eqn in jaxpr.eqns:
        floats = any(jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in (*eqn.invars, *eqn.outvars))
        if floats and eqn.primitive.name not in _KNOWN:
            yield eqn.primitive.name
        elif eqn.primitive.name in _KNOWN and not _is_gaussian(eqn):
            for body in jex.jaxprs_in_params(eqn.params):
                yield from without_rule(getattr(body, "jaxpr", body))
