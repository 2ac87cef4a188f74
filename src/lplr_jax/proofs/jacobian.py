"""The Jacobian of any network in an enclosure, and with it a bound on the distance between a kernel and the exact one.

For a few samples at a time, the traced derivative of their outputs by θ, forward and backward pass in one program, is
evaluated in fixed-point numbers (`interpreter`): K̂ is what comes out, rounded to float64, and the error of each entry
is known. The digits are raised until the error is far below what float64 itself would lose: a deep network may
multiply errors a hundredfold in every layer, and again on the way back; more digits outrun it, whatever the layers.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lplr_jax import programs
from lplr_jax.ntk.memory import budget
from lplr_jax.parameters import Parameters
from lplr_jax.proofs import interpreter
from lplr_jax.proofs.assembly_conv import compare
from lplr_jax.proofs.assembly_steps import Part
from lplr_jax.proofs.fixed import Fixed, UndecidedError
from lplr_jax.proofs.rounding import INFLATE, UNDERFLOW, AssemblyBound
from lplr_jax.types import ApplyFn

ASSUMPTIONS = (
    "sums and products of whole numbers below 2⁵³ are exact in float64, in BLAS too",
    "the network is the one read off its program, and its derivative the one that JAX traces",
)
DIGITS = (6, 8, 10, 12, 15, 20, 28)
"""Digits of 20 bits that are tried in turn."""
MOST_WORK = 1.2e11
"""Work beyond which no bound is made unless it is asked for. Calibrated: a minute of two cores."""
_USUAL = 15
"""Digits that `work` is about: most networks take fewer, and those that take more cost more."""
_LENIENCE = 2.0
"""Times `most_work` that tries with more and more digits may come to."""
_bounds = programs.Kept(8)
_ENTRIES = 2**16
"""Entries of the largest array up to which samples go together: fewer calls, while arrays stay in a cache."""
_MOST = 64
"""Most samples that go together."""
_FINE = 2.0**-28
"""Error of the Jacobian of a sample, relative to it, at which no more digits are asked for."""
_MID = 2.0**-49
"""Relative error of `Fixed.mid`."""


@dataclass(frozen=True)
class Rows:
    """Rows of the Jacobian that belong to some samples.

    Attributes:
        leaves: for each leaf of θ the rows (k c, p_l) in float64.
        errors: for each leaf the bounds of the 2-norms of their errors, (k c,).
        digits: how many were used.
    """

    leaves: list[np.ndarray]
    errors: list[np.ndarray]
    digits: int


def enclosed_bound(
    apply_fn: ApplyFn, wide: Parameters, x: Any, theta: Float[np.ndarray, "nc nc"], *, most_work: float = MOST_WORK
) -> AssemblyBound:
    """Bound the distance between a computed kernel and the exact one.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,), of each sample alone.
        wide: its parameters in float64.
        x: inputs, pytree of arrays (n, ...), floats in float64.
        theta: the computed kernel, (n c, n c).
        most_work: `work` that may be spent.

    Returns:
        The bound.

    Raises:
        UndecidedError: where there is none, with the reason: a primitive without a rule, a kink within reach of the
            error, a number out of range, too much work or memory.
    """
    inputs = [np.asarray(a) for a in jax.tree.leaves(x)]
    n, rows, p = inputs[0].shape[0], theta.shape[0], sum(value.size for value in wide.values)
    held = 16 * rows * p
    if held > budget(None):
        raise UndecidedError(f"the Jacobian of {rows} rows and {p} parameters takes {held / 1e9:.1f} GB")
    closed = traced(apply_fn, wide, x)
    missing = sorted(set(interpreter.without_rule(closed.jaxpr)))
    if missing:
        raise UndecidedError(f"{', '.join(missing)} has no rule")
    together = min(n, max(1, min(_MOST, _ENTRIES // largest(closed.jaxpr))))
    several = traced(apply_fn, wide, x, together)
    needed = math.ceil(n / together) * work(several.jaxpr)
    if needed > most_work:
        raise UndecidedError(
            f'a proof takes about {needed / 2e9:.0f} seconds of two cores, and proof="always" asks for it'
        )
    factor = [np.empty((rows, value.size)) for value in wide.values]
    errors = [np.empty(rows) for _ in wide.values]
    # Runs that differ in how they train begin at one point.
    name = (
        programs.key(closed, rules=False),
        most_work,
        *map(programs.digest, (*closed.consts, *wide.arrays, *inputs, theta)),
    )
    if name in _bounds:
        return _bounds[name]
    digits, c, start, spent = DIGITS[0], rows // n, 0, 0.0

    def pay(tried: int) -> bool:
        nonlocal spent
        price = work(several.jaxpr) * (tried / _USUAL) ** 1.7
        left = math.ceil((n - start) / together)
        if tried > digits and spent + left * price > _LENIENCE * most_work:
            return False
        spent += price
        return True

    while start < n:
        # The last few are filled up with the last of them, which is then left out.
        here = [a[np.minimum(np.arange(start, start + together), n - 1)] for a in inputs]
        try:
            found = sample_rows(several, wide.arrays, here, digits, pay)
        except UndecidedError:
            # A branch that one sample does not take is taken where samples go together.
            if together == 1 or spent + (n - start) * work(closed.jaxpr) > _LENIENCE * most_work:
                raise
            together, several = 1, closed
            continue
        digits, count = found.digits, min(together, n - start)
        for leaf, part in enumerate(found.leaves):
            factor[leaf][start * c : (start + count) * c] = part[: count * c]
            errors[leaf][start * c : (start + count) * c] = found.errors[leaf][: count * c]
        start += count
    parts = (
        Part(leaf, errors[leaf], lambda leaf=leaf: iter([(np.arange(factor[leaf].shape[1]), factor[leaf])]))
        for leaf in range(len(factor))
    )
    bound = compare(parts, theta)
    if not bound.finite:
        raise UndecidedError("a number overflows")
    bound = AssemblyBound(bound.assembly_error, bound.factor_error, ASSUMPTIONS)
    _bounds.put(name, bound)
    return bound


_ENTRY = {
    **dict.fromkeys(("exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "sin", "cos"), 8000.0),
    **dict.fromkeys(("pow", "tan", "sinh", "cosh"), 20000.0),
    **dict.fromkeys(("erf", "erfc"), 25000.0),
    **dict.fromkeys(("mul", "div", "square", "integer_pow", "sqrt", "rsqrt", "max", "min", "clamp"), 150.0),
}
"""Nanoseconds of an entry, 20 for any other."""
_COMPARISONS = frozenset({"reduce_max", "reduce_min", "reduce_window_max", "select_and_scatter_add"})
_CALL = 3e5
"""Nanoseconds of an equation without entries."""


def work(jaxpr: Any) -> float:
    """Return about how many nanoseconds of a core a jaxpr takes: entries and multiply-adds by what was measured."""
    total = 0.0
    for eqn in jaxpr.eqns:
        size = sum(math.prod(getattr(var.aval, "shape", ())) for var in eqn.outvars)
        name = eqn.primitive.name
        repeats = eqn.params["length"] if name == "scan" else 1
        total += repeats * sum(work(getattr(body, "jaxpr", body)) for body in jex.jaxprs_in_params(eqn.params))
        total += _CALL + size * _ENTRY.get(name, 20.0)
        if name in _COMPARISONS:
            window = math.prod(eqn.params.get("window_dimensions", (1,)))
            total += 150.0 * window * max(math.prod(var.aval.shape) for var in (*eqn.invars, *eqn.outvars))
        if name == "reduce_prod":  # factor by factor
            (entries,) = eqn.invars
            total += (_CALL + 150.0 * size) * math.prod(entries.aval.shape) / max(size, 1)
        if name in ("dot_general", "conv_general_dilated"):
            total += 4.0 * size * _terms(eqn)
    return total


def largest(jaxpr: Any) -> int:
    """Return the entries of the largest array of a jaxpr."""
    sizes = [math.prod(getattr(var.aval, "shape", ())) for eqn in jaxpr.eqns for var in eqn.outvars]
    inside = [largest(getattr(body, "jaxpr", body)) for eqn in jaxpr.eqns for body in jex.jaxprs_in_params(eqn.params)]
    return max([1, *sizes, *inside])


def _terms(eqn: Any) -> int:
    """Return the products of an entry of a contraction."""
    shape = eqn.invars[1].aval.shape
    if eqn.primitive.name == "dot_general":
        (_, axes), _ = eqn.params["dimension_numbers"]
        return math.prod(shape[axis] for axis in axes)
    return math.prod(shape[axis] for axis in eqn.params["dimension_numbers"].rhs_spec[1:])


def traced(apply_fn: ApplyFn, wide: Parameters, x: Any, together: int = 1) -> jex.ClosedJaxpr:
    """Trace the Jacobian of some samples: from the array leaves and samples (k, ...) to rows (k, c, *leaf)."""
    specs = [jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in wide.arrays]
    samples, xdef = jax.tree.flatten(x)
    xs = [jax.ShapeDtypeStruct((together, *np.shape(a)[1:]), jnp.result_type(a)) for a in samples]

    def rows(arrays: list[Any], inputs: list[Any]) -> Any:
        def outputs(theta: list[Any]) -> Any:
            every = list(arrays)
            for i, leaf in zip(wide.theta, theta, strict=True):
                every[i] = leaf
            one = jax.tree.unflatten(xdef, [a[None] for a in inputs])
            return jnp.reshape(apply_fn(wide.join(every), one), -1)

        out, pull = jax.vjp(outputs, [arrays[i] for i in wide.theta])
        return jax.vmap(pull)(jnp.eye(out.size, dtype=out.dtype))[0]

    with jax.default_matmul_precision("highest"):
        if together == 1:
            return jax.make_jaxpr(lambda arrays, inputs: [a[None] for a in rows(arrays, [a[0] for a in inputs])])(
                specs, xs
            )
        return jax.make_jaxpr(jax.vmap(rows, in_axes=(None, 0)))(specs, xs)


def sample_rows(
    closed: jex.ClosedJaxpr,
    arrays: Sequence[Any],
    x: Sequence[Any],
    least: int = DIGITS[0],
    pay: Callable[[int], bool] = lambda _: True,
) -> Rows:
    """Return the Jacobian of the samples that were traced, with as many digits as it takes, `least` or more.

    Args:
        closed: what `traced` returned.
        arrays: the array leaves.
        x: the samples.
        least: digits of the first try.
        pay: asked before each try with so many digits whether it is to be made; the first one always is.

    Raises:
        UndecidedError: if no digits are enough, or a primitive has no rule.
    """
    found: list[tuple[np.ndarray, np.ndarray]] = []
    undecided: UndecidedError | None = None
    everything = interpreter.Want(*[[True] * len(closed.jaxpr.outvars)] * 2)
    digits = least
    for tried in (tried for tried in DIGITS if tried >= least):
        if not pay(tried):
            if undecided is not None:
                raise UndecidedError(f'{undecided}; proof="always" tries with more digits than {digits}') from undecided
            break
        digits = tried
        try:
            with jax.enable_x64(True), np.errstate(all="ignore"):
                args = [interpreter.value(a, digits) for a in (*arrays, *x)]
                found = [_row(out) for out in interpreter.run(closed, args, digits, everything)]
        except UndecidedError as error:
            if digits == DIGITS[-1]:
                raise
            undecided = error
            continue
        undecided = None
        size = sum(float(np.square(rows).sum()) for rows, _ in found)
        error = sum(float(np.square(errors).sum()) for _, errors in found)
        if error <= _FINE**2 * size or digits == DIGITS[-1]:
            break
    return Rows([rows for rows, _ in found], [errors for _, errors in found], digits)


def _row(out: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return rows (k c, p_l) in float64 and the 2-norms of their errors."""
    assert isinstance(out, Fixed)
    rows = math.prod(out.shape[:2])
    middle = out.mid.reshape(rows, -1)
    entries = out.error.reshape(rows, -1) + np.abs(middle) * _MID
    return middle, np.sqrt(np.einsum("ij,ij->i", entries, entries)) * INFLATE + UNDERFLOW
