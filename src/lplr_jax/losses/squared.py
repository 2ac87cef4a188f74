"""The squared loss."""

from dataclasses import dataclass
from typing import Any

from lplr_jax.losses.base import Loss, Scale, Values


@dataclass(frozen=True)
class Squared(Loss):
    """Squared loss ℓ_i = ½‖f_i - y_i‖², so L = ‖f - y‖²/(2 s) (paper, section 3).

    The theory's sum is `Squared("sum")`, half the mean of squares over samples `Squared("mean")`, the mean of squares
    over all n c entries `Squared(n * c / 2)`.

    Example:
        >>> Squared(3.5).scale_of(100, 1), Squared("mean").scale_of(100, 1)
        (3.5, 100.0)
    """

    scale: Scale = "mean"
    name = "squared"
    curvature = 1.0

    def _per_sample(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        return 0.5 * jnp.sum(jnp.square(f - y), axis=1)

    def _total(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        return 0.5 * jnp.sum(jnp.square(f - y))

    def _gradient(self, f: Any, y: Any) -> Any:
        return f - y

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return 2 ℓ_i twice."""
        del c
        return 2 * values, 2 * values
