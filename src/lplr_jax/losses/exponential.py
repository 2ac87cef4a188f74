"""The exponential loss of one output."""

from dataclasses import dataclass
from typing import Any

from lplr_jax.losses.base import Scale, Values
from lplr_jax.losses.margins import MarginLoss


@dataclass(frozen=True)
class Exponential(MarginLoss):
    """Exponential loss ℓ_i = exp(-y_i f_i) of one output, labels y_i = ±1.

    It overflows where a margin is below -88 in float32 or -709 in float64; such a run is told as diverged. Its second
    derivative has no bound.

    Example:
        >>> import numpy as np
        >>> Exponential().per_sample(np.zeros(2, np.float32), np.float32([1, -1])).tolist()
        [1.0, 1.0]
    """

    scale: Scale = "mean"
    name = "exponential"
    TITLE = "exponential"

    def _value(self, margin: Any) -> Any:
        import jax.numpy as jnp

        return jnp.exp(-margin)

    def _slope(self, margin: Any) -> Any:
        return self._value(margin)

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return ℓ_i² twice."""
        del c
        return values**2, values**2
