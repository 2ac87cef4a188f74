"""Softmax cross-entropy of several outputs."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from lplr_jax import checks
from lplr_jax.losses.base import Loss, Scale, Values
from lplr_jax.losses.logistic import logistic_of


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """Softmax cross-entropy ℓ_i = log Σ_k exp(f_ik) - f_ij of a sample of class j, at least two outputs.

    Targets are one-hot rows (n, c), or labels 0 to c - 1 as integers (n,) or (n, 1). Smoothed labels are refused: their
    least loss is not 0.

    Example:
        >>> float(SoftmaxCrossEntropy().per_sample(np.zeros((1, 2), np.float32), np.array([1]))[0])  # log 2
        0.6931471824645996
    """

    scale: Scale = "mean"
    name = "softmax_cross_entropy"
    curvature = 0.5

    def _encode(self, y: Any, shape: tuple[int, ...]) -> Any:
        if len(shape) != 2 or shape[1] < 2:
            raise ValueError(
                f"softmax cross-entropy takes outputs (n, c) with c >= 2, got shape {shape}; Logistic is for one output"
            )
        if np.dtype(y.dtype).kind not in "iu" or y.shape not in ((shape[0],), (shape[0], 1)):
            return y
        labels = y.reshape(-1, 1)
        labels = labels.astype(np.int32) if np.dtype(y.dtype).itemsize < 4 else labels  # so that c - 1 fits
        # A label out of range makes a row of zeros, which is refused.
        return (labels == np.arange(shape[1], dtype=labels.dtype)[None, :]).astype(np.int8)

    def _check(self, y: np.ndarray) -> None:
        y = y.astype(np.float64)
        wrong = np.flatnonzero(~(np.isin(y, (0, 1)).all(axis=1) & (y.sum(axis=1) == 1)))
        if wrong.size:
            raise ValueError(
                f"targets of softmax cross-entropy must be one-hot rows, or integer labels 0 to {y.shape[1] - 1}; "
                f"that of sample {wrong[0]} becomes the row {checks.shown(y[wrong[0]].tolist())}"
            )

    def _margins(self, f: Any, y: Any) -> tuple[Any, Any, Any, Any]:
        """Return f_k - f_j (n, c), -log Σ_{k≠j} exp(f_k - f_j) (n, 1), which entries are j, and which rows one-hot."""
        import jax
        import jax.numpy as jnp

        own = y > 0.5
        # Of differences: no digit is lost where outputs are large and margins are not, nor where ℓ_i is tiny.
        apart = f - jnp.sum(jnp.where(own, f, jnp.zeros_like(f)), axis=1, keepdims=True)
        others = jnp.where(own, jnp.full_like(f, -jnp.inf), apart)
        margin = -jax.nn.logsumexp(others, axis=1, keepdims=True)
        valid = jnp.all((y == 0) | (y == 1), axis=1, keepdims=True) & (jnp.sum(y, axis=1, keepdims=True) == 1)
        return apart, margin, own, valid

    def _per_sample(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        _, margin, _, valid = self._margins(f, y)
        value, _ = logistic_of(margin)
        return jnp.where(valid, value, jnp.full_like(value, jnp.nan))[:, 0]

    def _gradient(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        apart, margin, own, valid = self._margins(f, y)
        value, share = logistic_of(margin)
        return jnp.where(valid, jnp.where(own, -share, jnp.exp(apart - value)), jnp.full_like(f, jnp.nan))

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return c/(c - 1) and 2 times (1 - exp(-ℓ_i))²: the rest spread over all other classes, or on one of them."""
        square = np.expm1(-values) ** 2
        return c / (c - 1) * square, 2 * square
