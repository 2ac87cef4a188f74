"""Loss, gradient and parameters at one point, in float64, for what is measured on the host."""

from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Float

from lplr_jax.losses import Objective
from lplr_jax.ntk.empirical import cast_floating, precision_scope
from lplr_jax.parameters import split
from lplr_jax.types import Params


@partial(jax.jit, static_argnames=("objective",))
def loss_and_gradient(params: Params, x: Any, y: Any, *, objective: Objective) -> tuple[Array, Params]:
    """Return L(θ) and ∇L(θ) in the precision of their arguments, on the device."""
    return objective.value_and_gradient(params, x, y)


def gradient_at(objective: Objective, params: Params, x: Any, y: Any) -> Float[np.ndarray, " p"]:
    """Return ∇L(θ), flat, in float64 on the host."""
    with precision_scope("float64"):
        wide = cast_floating((params, x, y), "float64")
        return flat_parameters(jax.device_get(loss_and_gradient(*wide, objective=objective)[1]))


def output_gradient_at(objective: Objective, params: Params, x: Any, y: Any) -> Float[np.ndarray, "n c"]:
    """Return g = ∂ℓ/∂f at f(θ), undivided by s, in float64 on the host."""
    with precision_scope("float64"):
        wide = cast_floating((params, x, y), "float64")
        return jax.device_get(_output_gradient(*wide, objective=objective))


@partial(jax.jit, static_argnames=("objective",))
def _output_gradient(params: Params, x: Any, y: Any, *, objective: Objective) -> Any:
    return objective.gradient_in_outputs(params, x, y)


def flat_parameters(params: Params) -> Float[np.ndarray, " p"]:
    """Return the leaves of a pytree as one vector in float64, in the order of `jax.tree.leaves`."""
    return np.concatenate([np.asarray(leaf, np.float64).reshape(-1) for leaf in split(params).values])
