"""How a program lays out its convolutions, where that decides its speed."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

_CALLS = ("jit", "pjit")


def plain_convolutions(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return `fn` with the convolutions of its program laid out as NHWC × HWIO -> NHWC, transposes around them.

    For gradients inside `lax.scan` on a CPU: there XLA brings a convolution into the one layout that its fast routine
    takes only outside of loops, and a gradient's own layouts run some twenty times slower inside. The sums are the
    same; on other backends `fn` is returned as it is. Apply it outside of `jax.grad`, inside of `jax.jit`.

    Args:
        fn: function of pytrees of arrays; called bodies are inlined, loops and custom derivatives left whole.
    """
    if not _matters():
        return fn

    @wraps(fn)
    def wrapped(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        closed, out = jax.make_jaxpr(lambda *flat: fn(*tree.unflatten(flat)), return_shape=True)(*leaves)
        return jax.tree.unflatten(jax.tree.structure(out), evaluate(closed, leaves))

    return wrapped


def _matters() -> bool:
    return jax.default_backend() == "cpu"


def evaluate(closed: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    """Evaluate a program, its convolutions laid out as by `plain_convolutions` where the backend wants it."""
    return _evaluate_plain(closed, args) if _matters() else list(jex.jaxpr_as_fun(closed)(*args))


def bind(eqn: Any, operands: Sequence[Any]) -> list[Any]:
    """Apply the primitive of an equation to operands, and list its results."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # a pair up to JAX 0.9
    out = eqn.primitive.bind(*functions, *operands, **params)
    return list(out) if eqn.primitive.multiple_results else [out]


def _evaluate_plain(closed: jex.ClosedJaxpr, args: Sequence[Any]) -> list[Any]:
    known: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
    known.update(zip(closed.jaxpr.invars, args, strict=True))

    def value(atom: Any) -> Any:
        return atom.val if isinstance(atom, jex.Literal) else known[atom]

    for eqn in closed.jaxpr.eqns:
        operands = [value(atom) for atom in eqn.invars]
        if eqn.primitive.name in _CALLS:
            results = _evaluate_plain(eqn.params["jaxpr"], operands)
        elif eqn.primitive is jex.primitives.conv_general_dilated_p:
            results = [_plain_convolution(*operands, **eqn.params)]
        else:
            results = bind(eqn, operands)
        known.update(zip(eqn.outvars, results, strict=True))
    return [value(atom) for atom in closed.jaxpr.outvars]


def _plain_convolution(lhs: Array, rhs: Array, *, dimension_numbers: Any, **params: Any) -> Array:
    """Bind the convolution in the layout NHWC × HWIO -> NHWC, for any number of pixel axes."""
    left, right, result = dimension_numbers
    pixels = tuple(range(1, len(left) - 1))
    inputs = (0, len(pixels) + 1, *pixels)
    kernel = (len(pixels) + 1, len(pixels), *range(len(pixels)))
    out = jex.primitives.conv_general_dilated_p.bind(
        jnp.transpose(lhs, (left[0], *left[2:], left[1])),
        jnp.transpose(rhs, (*right[2:], right[1], right[0])),
        dimension_numbers=jax.lax.ConvDimensionNumbers(inputs, kernel, inputs),
        **params,
    )
    return jnp.transpose(out, np.argsort((result[0], *result[2:], result[1])).tolist())
