"""What the losses of a margin y f share: one output, and labels ±1."""

from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float

from lplr_jax.losses.base import Loss


class MarginLoss(Loss):
    """A loss φ(m_i) of the margin m_i = y_i f_i of one output, labels y_i = ±1.

    A subclass defines φ, and φ' where it is known to more digits than a trace gives.

    Attributes:
        TITLE: what errors call it.
    """

    TITLE: ClassVar[str]
    margin_slope = 1.0

    def _encode(self, y: Any, shape: tuple[int, ...]) -> Any:
        if shape[1:] != (1,):
            raise ValueError(
                f"the {self.TITLE} loss is of one output a sample, got outputs of shape {shape}; "
                "SoftmaxCrossEntropy is for several"
            )
        return super()._encode(y, shape)

    def _check(self, y: np.ndarray) -> None:
        wrong = np.flatnonzero(np.abs(y.astype(np.float64)) != 1)
        if wrong.size:
            raise ValueError(
                f"labels of the {self.TITLE} loss must be -1 or 1, got {float(y.reshape(-1)[wrong[0]]):g} for sample "
                f"{wrong[0]}; labels 0 and 1 become 2 * y - 1"
            )

    def margins(self, f: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " n"]:
        """Return y_i f_i."""
        return (np.asarray(y) * np.asarray(f))[:, 0]

    @abstractmethod
    def _value(self, margin: Any) -> Any:
        """Return φ(m)."""

    @abstractmethod
    def _slope(self, margin: Any) -> Any:
        """Return -φ'(m) >= 0."""

    def _per_sample(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        value = self._value((y * f)[:, 0])
        return jnp.where(jnp.abs(y[:, 0]) == 1, value, jnp.full_like(value, jnp.nan))

    def _gradient(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        slope = self._slope(y * f)
        return jnp.where(jnp.abs(y) == 1, -y * slope, jnp.full_like(slope, jnp.nan))
