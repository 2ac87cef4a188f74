"""A network whose parameters are one vector in float64 on the host."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Float

from lplr_jax.ntk.empirical import cast_floating, empirical_ntk, precision_scope
from lplr_jax.types import ApplyFn, Params


class FlatNetwork:
    """A network and its samples, with kernels at vectors of parameters.

    Attributes:
        centre: the parameters that it was made with, flat.
        unravel: from a vector on the device to the tree of parameters; call it inside `precision_scope("float64")`.
        x: the inputs in float64.
    """

    def __init__(self, apply_fn: ApplyFn, params: Params, x: Any, kernel: str) -> None:
        """Take a point apart; `kernel` is one of `lplr_jax.ntk.KERNELS`."""
        self.apply_fn, self._kernel = apply_fn, kernel
        with precision_scope("float64"):
            wide, self.x = cast_floating((params, x), "float64")
            flat, self.unravel = ravel_pytree(wide)
            self.centre = np.asarray(flat)

    def kernel(self, theta: Float[np.ndarray, " p"]) -> Float[np.ndarray, "nc nc"]:
        """Return the full kernel at a point."""
        with precision_scope("float64"):
            return np.asarray(
                empirical_ntk(self.apply_fn, self.unravel(jnp.asarray(theta)), self.x, kernel=self._kernel)
            )
