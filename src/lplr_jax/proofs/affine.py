"""Is a program affine in its parameters? Read off the jaxpr, not off numbers.

f(θ) is affine where every operation on the way from the parameters to the output is linear in the values that depend on
them, jointly. Then the Jacobian, and with it the kernel, does not depend on θ: L_Θ = 0, and the squared loss is convex
with Hessian JᵀJ / s. The analysis is one-sided: an operation that is not in the lists below counts as not affine.
"""

from typing import Any

import jax.numpy as jnp

from lplr_jax.ntk import engine
from lplr_jax.ntk.empirical import cast_floating, precision_scope
from lplr_jax.ntk.jaxpr import Op, Program
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


def is_affine(apply_fn: ApplyFn, params: Params, x: Any) -> bool:
    """Return whether `apply_fn` is certainly affine in its parameters, for every θ; False says nothing.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,), each row of which depends on its own sample alone.
        params: pytree of arrays; shapes and dtypes are used, not values.
        x: inputs (n, ...); shapes and dtypes are used.

    Example:
        >>> import jax.numpy as jnp
        >>> is_affine(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.ones((3, 2)))
        True
        >>> is_affine(lambda w, x: x @ (w * w), jnp.ones((2, 1)), jnp.ones((3, 2)))
        False
    """
    # In the precision of the kernel: float64 leaves cannot be traced outside its scope.
    with precision_scope("float64"):
        program = engine.trace(apply_fn, *cast_floating((params, x), "float64")).program
    depends = set(program.params)
    for op in program.ops:
        touched = [isinstance(atom, int) and atom in depends for atom in op.ins]
        if not any(touched):
            continue
        if not _linear(program, op, touched):
            return False
        depends.update(op.outs)
    return True


def _linear(program: Program, op: Op, touched: list[bool]) -> bool:
    if op.name in _JOINTLY:
        return True
    if op.name in _IN_FIRST:
        return touched[0] and not any(touched[1:])
    if op.name in _BILINEAR:
        return sum(touched) == 1
    if op.name == "select_n":
        return not touched[0]
    if op.name == "convert_element_type":
        # Rounding to a narrower type is not linear, and to integers a step function.
        types = [program.avals[op.ins[0]].dtype, program.avals[op.outs[0]].dtype]
        floating = all(jnp.issubdtype(dtype, jnp.floating) for dtype in types)
        return floating and jnp.finfo(types[1]).bits >= jnp.finfo(types[0]).bits
    return False
