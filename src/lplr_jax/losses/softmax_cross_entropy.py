"""Softmax cross-entropy of several outputs, with classes or distributions as targets."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax import checks
from lplr_jax.losses.base import Loss, Scale, Values
from lplr_jax.losses.logistic import logistic_of


@dataclass(frozen=True)
class SoftmaxCrossEntropy(Loss):
    """Softmax cross-entropy ℓ_i = log Σ_k exp(f_ik) - Σ_k τ_ik f_ik of at least two outputs.

    Targets are one-hot rows (n, c), or labels 0 to c - 1 as integers (n,) or (n, 1): τ_i is one-hot, or smoothed, with
    a share α of it spread over all classes. Or they are any distributions (n, c), τ_i itself. Where τ_i is not one-hot
    the infimum of ℓ_i is its entropy H(τ_i), which is known: see `least`.

    Attributes:
        smoothing: α in [0, 1): τ_i = (1 - α) onehot_i + α/c.
        soft: whether targets are distributions.

    Example:
        >>> float(SoftmaxCrossEntropy().per_sample(np.zeros((1, 2), np.float32), np.array([1]))[0])  # log 2
        0.6931471824645996
        >>> SoftmaxCrossEntropy(smoothing=0.1).name, SoftmaxCrossEntropy(soft=True).name
        ('softmax_cross_entropy(0.1)', 'soft_cross_entropy')
    """

    scale: Scale = "mean"
    smoothing: float = field(default=0.0, kw_only=True)
    soft: bool = field(default=False, kw_only=True)
    name: str = field(init=False, repr=False, compare=False)
    curvature = 0.5
    margin_slope: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        alpha = checks.number("smoothing", self.smoothing, least=0)
        if not alpha < 1:
            raise ValueError(f"smoothing must be in [0, 1), got {alpha:g}")
        if self.soft and alpha:
            raise ValueError(
                f"smoothing is of labels and soft targets are distributions already; got smoothing = {alpha:g} and "
                "soft = True: mix the targets with 1/c by hand, or leave soft out"
            )
        object.__setattr__(self, "smoothing", alpha)
        smooth = f"softmax_cross_entropy({alpha!r})" if alpha else "softmax_cross_entropy"
        object.__setattr__(self, "name", "soft_cross_entropy" if self.soft else smooth)
        object.__setattr__(self, "margin_slope", math.sqrt(2) if self.hard else 0.0)

    @property
    def hard(self) -> bool:
        """Whether every τ_i is one-hot."""
        return not (self.soft or self.smoothing)

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
        narrow, y = y.dtype, y.astype(np.float64)
        if self.soft:
            wrong = np.flatnonzero(~self._is_distribution(y, narrow))
            must = f"distributions over {y.shape[1]} classes, >= 0 and of sum 1"
        else:
            wrong = np.flatnonzero(~(np.isin(y, (0, 1)).all(axis=1) & (y.sum(axis=1) == 1)))
            must = f"one-hot rows, or integer labels 0 to {y.shape[1] - 1}"
            proper = wrong.size and self._is_distribution(y[wrong[:1]], narrow).all()
            must += " (soft=True takes distributions, smoothing=α smooths labels)" if proper else ""
        if wrong.size:
            raise ValueError(
                f"targets of softmax cross-entropy must be {must}; "
                f"that of sample {wrong[0]} becomes the row {checks.shown(y[wrong[0]].tolist())}"
            )

    @staticmethod
    def _is_distribution(y: Any, dtype: Any) -> Any:
        """Return which rows are >= 0 and sum up to 1, to rounding in the type that they came in, float32 at the least.

        What is measured in float64 has targets of float32 as they are, with the rounding of float32.
        """
        eps = max(float(np.finfo(kind).eps) for kind in (dtype, np.float32)) if np.dtype(dtype).kind == "f" else 0.0
        return (y >= 0).all(axis=1) & (abs(y.sum(axis=1) - 1) <= y.shape[1] * eps)

    def distributions(self, y: Any) -> Any:
        """Return τ (n, c) of targets (n, c) as `targets` returns them, and whether each is one, (n, 1)."""
        import jax.numpy as jnp

        if self.soft:  # divided by what rounding made of 1, so that gradients sum up to 0
            return y / jnp.sum(y, axis=1, keepdims=True), self._is_distribution(y, y.dtype)[:, None]
        valid = jnp.all((y == 0) | (y == 1), axis=1, keepdims=True) & (jnp.sum(y, axis=1, keepdims=True) == 1)
        return (1 - self.smoothing) * y + self.smoothing / y.shape[1] if self.smoothing else y, valid

    def least(self, y: Any) -> np.ndarray:
        """Return the infimum of each ℓ_i over its outputs, H(τ_i) in nats, shape (n,).

        Args:
            y: targets (n, c) as `targets` returns them.
        """
        tau = np.asarray(y, np.float64)
        tau = (
            tau / tau.sum(axis=1, keepdims=True)
            if self.soft
            else (1 - self.smoothing) * tau + self.smoothing / tau.shape[1]
        )
        return -np.sum(tau * np.log(np.where(tau > 0, tau, 1.0)), axis=1)

    def margins(self, f: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " n"]:
        """Return f_j - log Σ_{k≠j} exp(f_k), j the class of a sample: ℓ_i = log(1 + exp(-m_i)).

        Raises:
            NotImplementedError: where τ_i is not one-hot.
        """
        if not self.hard:
            return super().margins(f, y)
        own = np.asarray(y) > 0.5
        apart = f - np.where(own, f, 0.0).sum(axis=1, keepdims=True)
        return -np.logaddexp.reduce(np.where(own, -np.inf, apart), axis=1)

    def _parts(self, f: Any, own: Any) -> tuple[Any, Any]:
        """Return f_k - f_j (n, c) for the one j of each row, and -log Σ_{k≠j} exp(f_k - f_j) (n, 1)."""
        import jax
        import jax.numpy as jnp

        # Of differences: no digit is lost where outputs are large and margins are not, nor where ℓ_i is tiny.
        apart = f - jnp.sum(jnp.where(own, f, jnp.zeros_like(f)), axis=1, keepdims=True)
        others = jnp.where(own, jnp.full_like(f, -jnp.inf), apart)
        return apart, -jax.nn.logsumexp(others, axis=1, keepdims=True)

    def _centre(self, f: Any, y: Any) -> Any:
        """Return which entry of each row the others are told against: its class, or its largest output."""
        import jax.numpy as jnp

        return y > 0.5 if self.hard else jnp.argmax(f, axis=1, keepdims=True) == jnp.arange(f.shape[1])[None, :]

    def _per_sample(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        apart, margin = self._parts(f, self._centre(f, y))
        value, _ = logistic_of(margin)
        tau, valid = self.distributions(y)
        if not self.hard:
            # -log p_k = value - apart_k, of two terms >= 0; a class that τ leaves out adds nothing, however far it is.
            value = jnp.sum(jnp.where(tau > 0, tau * (value - apart), jnp.zeros_like(apart)), axis=1, keepdims=True)
        return jnp.where(valid, value, jnp.full_like(value, jnp.nan))[:, 0]

    def _gradient(self, f: Any, y: Any) -> Any:
        import jax.numpy as jnp

        own = self._centre(f, y)
        apart, margin = self._parts(f, own)
        value, share = logistic_of(margin)
        tau, valid = self.distributions(y)
        found = jnp.where(own, -share, jnp.exp(apart - value)) if self.hard else jnp.exp(apart - value) - tau
        return jnp.where(valid, found, jnp.full_like(f, jnp.nan))

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return c/(c - 1) and 2 times (1 - exp(-ℓ_i))²: the rest spread over all other classes, or on one of them.

        Where τ_i is not one-hot: 0, as ℓ_i alone does not tell, and min(2, ℓ_i) by Pinsker's inequality, as ½‖p - τ‖₁²
        is at most KL(τ‖p) <= ℓ_i and ‖v‖₂² <= ½‖v‖₁² for every v of sum 0.
        """
        if not self.hard:
            return np.zeros_like(values), np.minimum(2.0, values)
        square = np.expm1(-values) ** 2
        return c / (c - 1) * square, 2 * square


def smoothed(smoothing: float = 0.0, *, scale: Scale = "mean") -> SoftmaxCrossEntropy:
    """Return the loss that softmax_cross_entropy, with α in parentheses, names."""
    return SoftmaxCrossEntropy(scale, smoothing=smoothing)


def of_distributions(*, scale: Scale = "mean") -> SoftmaxCrossEntropy:
    """Return the loss that soft_cross_entropy names."""
    return SoftmaxCrossEntropy(scale, soft=True)
