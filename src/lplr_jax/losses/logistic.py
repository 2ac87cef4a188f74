"""The logistic loss of one output."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lplr_jax.losses.base import Loss, Scale, Values


def logistic_of(margin: Any) -> tuple[Any, Any]:
    """Return log(1 + e^-m) and 1/(1 + e^m), each to full relative precision at both ends."""
    import jax.numpy as jnp

    small = jnp.exp(-jnp.abs(margin))
    return jnp.logaddexp(-margin, jnp.zeros_like(margin)), jnp.where(margin >= 0, small, jnp.ones_like(small)) / (
        1 + small
    )


@dataclass(frozen=True)
class Logistic(Loss):
    """Logistic loss ℓ_i = log(1 + exp(-y_i f_i)) of one output, labels y_i = ±1.

    Example:
        >>> float(Logistic().per_sample(np.zeros(1, np.float32), np.ones(1, np.float32))[0])  # log 2
        0.6931471824645996
    """

    scale: Scale = "mean"
    name = "logistic"
    curvature = 0.25

    def _encode(self, y: Any, shape: tuple[int, ...]) -> Any:
        if shape[1:] != (1,):
            raise ValueError(
                f"the logistic loss is of one output a sample, got outputs of shape {shape}; "
                "SoftmaxCrossEntropy is for several"
            )
        return super()._encode(y, shape)

    def _check(self, y: np.ndarray) -> None:
        wrong = np.flatnonzero(np.abs(y.astype(np.float64)) != 1)
        if wrong.size:
            raise ValueError(
                f"labels of the logistic loss must be -1 or 1, got {float(y.reshape(-1)[wrong[0]]):g} for sample "
                f"{wrong[0]}; labels 0 and 1 become 2 * y - 1"
            )

    def _per_sample(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        value, _ = logistic_of((y * f)[:, 0])
        return jnp.where(jnp.abs(y[:, 0]) == 1, value, jnp.full_like(value, jnp.nan))

    def _gradient(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        _, share = logistic_of(y * f)
        return jnp.where(jnp.abs(y) == 1, -y * share, jnp.full_like(share, jnp.nan))

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return (1 - exp(-ℓ_i))² twice."""
        del c
        return np.expm1(-values) ** 2, np.expm1(-values) ** 2
