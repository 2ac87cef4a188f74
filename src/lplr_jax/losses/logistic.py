"""The logistic loss of one output."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lplr_jax.losses.base import Scale, Values
from lplr_jax.losses.margins import MarginLoss


def logistic_of(margin: Any) -> tuple[Any, Any]:
    """Return log(1 + e^-m) and 1/(1 + e^m), each to full relative precision at both ends."""
    import jax.numpy as jnp

    small = jnp.exp(-jnp.abs(margin))
    return jnp.logaddexp(-margin, jnp.zeros_like(margin)), jnp.where(margin >= 0, small, jnp.ones_like(small)) / (
        1 + small
    )


@dataclass(frozen=True)
class Logistic(MarginLoss):
    """Logistic loss ℓ_i = log(1 + exp(-y_i f_i)) of one output, labels y_i = ±1.

    Example:
        >>> float(Logistic().per_sample(np.zeros(1, np.float32), np.ones(1, np.float32))[0])  # log 2
        0.6931471824645996
    """

    scale: Scale = "mean"
    name = "logistic"
    curvature = 0.25
    TITLE = "logistic"

    def _value(self, margin: Any) -> Any:
        return logistic_of(margin)[0]

    def _slope(self, margin: Any) -> Any:
        return logistic_of(margin)[1]

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return (1 - exp(-ℓ_i))² twice."""
        del c
        return np.expm1(-values) ** 2, np.expm1(-values) ** 2
