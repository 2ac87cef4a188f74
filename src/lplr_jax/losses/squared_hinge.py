"""The squared hinge loss of one output."""

from dataclasses import dataclass
from typing import Any

from lplr_jax.losses.base import Scale, Values
from lplr_jax.losses.margins import MarginLoss


@dataclass(frozen=True)
class SquaredHinge(MarginLoss):
    """Squared hinge loss ℓ_i = ½ max(0, 1 - y_i f_i)² of one output, labels y_i = ±1.

    Example:
        >>> import numpy as np
        >>> SquaredHinge().per_sample(np.float32([2.0, 0.5, -1.0]), np.ones(3, np.float32)).tolist()
        [0.0, 0.125, 2.0]
    """

    scale: Scale = "mean"
    name = "squared_hinge"
    curvature = 1.0
    TITLE = "squared hinge"

    def _value(self, margin: Any) -> Any:
        import jax.numpy as jnp

        return 0.5 * jnp.square(self._slope(margin))

    def _slope(self, margin: Any) -> Any:
        import jax.numpy as jnp

        return jnp.maximum(1 - margin, jnp.zeros_like(margin))

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return 2 ℓ_i twice."""
        del c
        return 2 * values, 2 * values
