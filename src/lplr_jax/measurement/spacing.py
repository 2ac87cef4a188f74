"""How coarse the floating-point numbers are that parameters are stored in."""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

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
