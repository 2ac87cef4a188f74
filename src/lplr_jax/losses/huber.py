"""The Huber loss."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lplr_jax import checks
from lplr_jax.losses.base import Loss, Scale, Values


@dataclass(frozen=True)
class Huber(Loss):
    """Huber loss ℓ_i = Σ_o h(f_io - y_io), h(r) = r²/2 where |r| <= δ and δ(|r| - δ/2) beyond.

    Attributes:
        delta: δ > 0, in units of the outputs.

    Example:
        >>> Huber(0.5).per_sample(np.array([2.0, 0.25]), np.zeros(2)).tolist()
        [0.875, 0.03125]
    """

    delta: float
    scale: Scale = "mean"
    name: str = field(init=False, repr=False, compare=False)
    curvature = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "delta", checks.number("delta", self.delta, above=0))
        object.__setattr__(self, "name", f"huber({self.delta!r})")

    def _per_sample(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        r = f - y
        clipped = jnp.clip(r, -self.delta, self.delta)
        # One formula for both pieces, whose second derivative at r = 0 is 1: that of |r| would be lost there.
        return jnp.sum(clipped * (r - 0.5 * clipped), axis=1)

    def _gradient(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        return jnp.clip(f - y, -self.delta, self.delta)

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return min(2 ℓ_i, δ²) and min(2 ℓ_i, c δ²): all on one output, or spread over all."""
        return np.minimum(2 * values, self.delta**2), np.minimum(2 * values, c * self.delta**2)
