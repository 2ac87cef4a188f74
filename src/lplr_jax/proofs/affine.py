"""Is a program affine in its parameters? Read off the jaxpr, not off numbers.

f(θ) is affine where every operation on the way from the parameters to the output is linear in the values that depend on
them, jointly. Then the Jacobian, and with it the kernel, does not depend on θ: L_Θ = 0, and the squared loss is convex
with Hessian JᵀJ / s. The analysis is one-sided: an operation that is not in the lists below counts as not affine.
"""

from typing import Any

import jax.numpy as jnp

from lplr_jax import parameters
from lplr_jax.ntk import engine
from lplr_jax.ntk.empirical import cast_floating, cast_parameters, precision_scope
from lplr_jax.ntk.jaxpr import Op, Program
from lplr_jax.parameters import Trainable
from lplr_jax.types import ApplyFn, Params

# Linear in all operands jointly.
_JOINTLY = frozenset({"add", "add_any", "sub", "neg", "concatenate", "real", "imag", "copy", "copy_p"})
# Linear in the first operand, whatever the static settings; the others (indices, padding, predicates) must be constant.
_IN_FIRST = frozenset(
    {
        "reshape",
        "transpose",
        "squeeze",
        "expand_dims",
        "broadcast_in_dim",
        "rev",
        "slice",
        "dynamic_slice",
        "gather",
        "reduce_sum",
        "cumsum",
        "reduce_window_sum",
        "div",
    }
)
# Linear in each operand while the other is constant.
_BILINEAR = frozenset({"mul", "dot_general", "conv_general_dilated"})


def is_affine(apply_fn: ApplyFn, params: Params, x: Any, *, trainable: Trainable = None) -> bool:
    """Return whether `apply_fn` is certainly affine in its parameters, for every θ; False says nothing.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,), each row of which depends on its own sample alone.
        params: pytree of parameters; shapes and dtypes are used, not values.
        x: inputs (n, ...); shapes and dtypes are used.
        trainable: as for `ntk.empirical_ntk`.

    Example:
        >>> import jax.numpy as jnp
        >>> is_affine(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((3, 2)))
        True
        >>> is_affine(lambda w, x: x @ (w * w), jnp.ones((2, 1)), jnp.ones((3, 2)))
        False
    """
    # In the precision of the kernel: float64 leaves cannot be traced outside its scope.
    with precision_scope("float64"):
        split = cast_parameters(parameters.split(params, trainable), "float64")
        traced = engine.trace(apply_fn, split, cast_floating(x, "float64"))
    program = traced.program
    depends = {program.params[i] for i in traced.leaves}
    for op in program.ops:
        touched = [isinstance(atom, int) and atom in depends for atom in op.ins]
        if not any(touched):
            continue
        if not _linear(program, op, touched):
            return False
        depends.update(op.outs)
    return True


def _linear(program: Program, op: Op, touched: list[bool]) -> bool:
    if not _as_wide(program, op, touched):
        return False
    if op.name in _JOINTLY:
        return True
    if op.name in _IN_FIRST:
        return touched[0] and not any(touched[1:])
    if op.name in _BILINEAR:
        return sum(touched) == 1
    if op.name == "select_n":
        return not touched[0]
    return op.name == "convert_element_type"


def _as_wide(program: Program, op: Op, touched: list[bool]) -> bool:
    """Whether the results hold all digits and exponents of the operands that depend on θ.

    Rounding to a narrower type is not linear, and to integers a step function. A product of narrower operands may be
    told to have a narrower result, or to round its operands first.
    """
    before = [program.avals[atom].dtype for atom, moves in zip(op.ins, touched, strict=True) if moves]
    after = [program.avals[slot].dtype for slot in op.outs]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (*before, *after)):
        return False
    if "_" in str(op.params.get("precision") or ""):  # an algorithm by name, such as BF16_BF16_F32
        return False
    known = [(jnp.finfo(dtype).nmant, jnp.finfo(dtype).nexp) for dtype in (*before, *after)]
    digits, exponents = zip(*known, strict=True)
    count = len(before)
    return min(digits[count:]) >= max(digits[:count]) and min(exponents[count:]) >= max(exponents[:count])
