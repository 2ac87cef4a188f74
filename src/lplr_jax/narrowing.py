"""Where a traced program rounds to a narrower type than was asked for."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np


class Narrow(NamedTuple):
    """What a program rounds to a narrower type than that of its parameters.

    Attributes:
        eps: distance from 1 to the next number of the narrowest type.
        roundings: roundings at that type on the way, added up over operations; an inner product of k terms has k.
        operation: the first operation that narrows, and its types, in words.
    """

    eps: float
    roundings: int
    operation: str


def narrowing(closed: Any, depends: Sequence[bool], wide: Any) -> Narrow | None:
    """Find where a program rounds more coarsely than a type does.

    Args:
        closed: what `jax.make_jaxpr` returned.
        depends: for each argument, whether what depends on it counts.
        wide: the type that the caller asked for.

    Returns:
        The narrowest rounding among values that depend on these arguments, None where all are as wide as asked for.
    """
    found = _Narrowing(float(jnp.finfo(wide).eps))
    found.walk(closed.jaxpr, list(depends))
    if not found.roundings:
        return None
    return Narrow(found.eps, found.roundings, found.operation)


class _Narrowing:
    def __init__(self, eps: float) -> None:
        self.asked, self.eps, self.roundings, self.operation = eps, eps, 0, ""

    def walk(self, jaxpr: Any, depends: list[bool]) -> list[bool]:
        marked = dict(zip(jaxpr.invars, depends, strict=True))

        def mark(var: Any) -> bool:
            return not isinstance(var, jex.Literal) and marked.get(var, False)

        for eqn in jaxpr.eqns:
            touched = [mark(var) for var in eqn.invars]
            if any(touched):
                self._equation(eqn, touched)
            for var in eqn.outvars:
                marked[var] = any(touched)
        return [mark(var) for var in jaxpr.outvars]

    def _equation(self, eqn: Any, touched: list[bool]) -> None:
        bodies = list(jex.jaxprs_in_params(eqn.params))
        for body in bodies:
            inner = getattr(body, "jaxpr", body)
            # Loops and branches bind their operands in an order of their own: then everything counts.
            same = len(inner.invars) == len(touched)
            times = int(eqn.params.get("length") or 1)
            before = self.roundings
            self.walk(inner, touched if same else [True] * len(inner.invars))
            self.roundings = before + times * (self.roundings - before)
        if bodies:
            return
        eps = max((_eps_of(eqn, var) for var in eqn.outvars), default=0.0)
        if eps <= self.asked:
            return
        self.eps = max(self.eps, eps)
        self.roundings += _terms(eqn)
        if not self.operation:
            before = sorted({str(var.aval.dtype) for var in eqn.invars if hasattr(var.aval, "dtype")})
            after = str(eqn.outvars[0].aval.dtype)
            self.operation = f"`{eqn.primitive.name}` from {' and '.join(before)} to {after}{_source(eqn)}"


def _eps_of(eqn: Any, var: Any) -> float:
    if not jnp.issubdtype(getattr(var.aval, "dtype", np.dtype(bool)), jnp.floating):
        return 0.0
    if eqn.primitive.name == "reduce_precision":
        return max(float(jnp.finfo(var.aval.dtype).eps), 2.0 ** -eqn.params["mantissa_bits"])
    precision = str(eqn.params.get("precision", "")).upper()
    named = {"BF16": 2.0**-7, "TF32": 2.0**-10, "F16": 2.0**-10, "F32": 2.0**-23}
    algorithm = [eps for word, eps in named.items() if word in precision and "_" in precision]
    return max([float(jnp.finfo(var.aval.dtype).eps), *algorithm[:1]])


def _terms(eqn: Any) -> int:
    """Count the roundings behind one entry of the result."""
    if eqn.primitive.name == "dot_general":
        (left, _), _ = eqn.params["dimension_numbers"]
        return int(np.prod([eqn.invars[0].aval.shape[d] for d in left], dtype=np.int64)) or 1
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval.shape
        return int(np.prod(kernel, dtype=np.int64)) // kernel[eqn.params["dimension_numbers"].rhs_spec[0]] or 1
    if eqn.primitive.name.startswith(("reduce_sum", "cum", "reduce_window")):
        return max(1, eqn.invars[0].aval.size // max(1, eqn.outvars[0].aval.size))
    return 1


def _source(eqn: Any) -> str:
    """Where in the user's code an operation stands, where JAX knows."""
    foreign = (str(Path(jax.__file__).parent), str(Path(__file__).parent))
    try:
        frames = (f for f in eqn.source_info.traceback.frames if not f.file_name.startswith(foreign))
        frame = next(frames)
        return f" ({Path(frame.file_name).name}, line {frame.line_num})"
    except Exception:  # JAX keeps this to itself; a message without the line is still a message
        return ""
