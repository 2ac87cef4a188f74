"""How coarse the floating-point numbers are that parameters are stored in, and the loss is computed in."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lplr_jax.losses import Objective
from lplr_jax.narrowing import narrowing
from lplr_jax.ntk.empirical import cast_floating, precision_scope
from lplr_jax.parameters import theta_alone
from lplr_jax.types import Params


def spacing(leaf: Float[jax.Array | np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Return the distance from every |entry| to the next larger number of its own dtype, in float64."""
    return np.asarray(np.spacing(np.abs(np.asarray(leaf))), np.float64)


def _floating(params: Params) -> list[jax.Array | np.ndarray]:
    leaves = [leaf for leaf in jax.tree.leaves(params) if hasattr(leaf, "dtype")]
    return [leaf for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]


def parameter_spacing(params: Params) -> float:
    """Return the 2-norm of the spacing of every floating parameter, each in its own dtype."""
    return math.sqrt(sum(float(np.square(spacing(leaf)).sum()) for leaf in _floating(params)))


def parameter_eps(params: Params) -> float:
    """Return the coarsest spacing of 1 among the dtypes of the floating parameters; 0 where there are none."""
    return max((float(jnp.finfo(leaf.dtype).eps) for leaf in _floating(params)), default=0.0)


def loss_eps(objective: Objective, params: Params, x: Any, y: Any) -> float:
    """Return the coarsest spacing of 1 among the dtypes of θ and of what depends on it on the way to the loss.

    A float64 leaf may well meet a program that computes in float32 or narrower, by a cast or by promotion.
    """
    apply_fn, params = theta_alone(objective.apply_fn, params)  # JAX traces arrays alone
    objective = Objective(apply_fn, objective.loss)
    leaves, tree = jax.tree.flatten((params, x, y))
    of_theta = len(jax.tree.leaves(params))
    with jax.numpy_dtype_promotion("standard"):  # it is asked what a program rounds to, not whether it may
        closed = jax.make_jaxpr(lambda *leaves: objective.value(*jax.tree.unflatten(tree, leaves)))(*leaves)
    found = narrowing(closed, [at < of_theta for at in range(len(leaves))], jnp.float64)
    return max(parameter_eps(params), 0.0 if found is None else found.eps)


def probe_eps(objective: Objective, params: Params, x: Any, y: Any) -> float:
    """Return the coarsest spacing of 1 on the way from θ to the loss where both are taken in float64."""
    with precision_scope("float64"):
        return loss_eps(objective, *cast_floating((params, x, y), "float64"))
