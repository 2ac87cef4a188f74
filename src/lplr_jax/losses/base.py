"""What a loss is: values of samples, the gradient in their outputs, and the number s by which the sum is divided."""

import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Num

from lplr_jax import checks

# JAX is imported where it is needed: a reader of records asks a loss for its name, floor and bounds, and has no JAX.

LossScale = Literal["sum", "mean"]
"""The named scales: s = 1, and s = n."""

Scale = LossScale | float | int
"""A named scale, or the number s itself."""

SCALES = '"sum" (s = 1), "mean" (s = n), or the number s itself, finite and > 0'
"""What a scale may be, in words."""

Rows = Num[Any, "n ..."]
"""Outputs or targets of n samples: (n, c), or (n,) for (n, 1)."""

Values = Float[np.ndarray, "..."]


class Loss(ABC):
    """A loss ℓ_i of a sample's outputs f_i and targets y_i, and the number s by which the sum over samples is divided.

    A subclass is a frozen dataclass, so that equal losses share compiled code, with a field `scale` and a line in
    `LOSSES`. It defines `_per_sample`; the other underscored methods where there is something better than the default.

    Attributes:
        name: how a record calls it; `by_name` gives it back.
        scale: "sum" for s = 1, "mean" for s = n, or the number s.
        floor: a lower bound of L over all outputs.
        curvature: upper bound of the largest eigenvalue of ∂²ℓ_i/∂f_i² over all outputs; infinite where none is known.
        margin_slope: Lipschitz constant in f_i of what `margins` returns; 0 for a loss of no margin.
    """

    name: str
    scale: Scale
    floor: float = 0.0
    curvature: float = math.inf
    margin_slope: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.scale, str):
            object.__setattr__(self, "scale", _number(self.scale))
        elif self.scale not in ("sum", "mean"):
            raise _not_a_scale(self.scale)

    @property
    def reduction(self) -> LossScale:
        """How the losses of batches make that of all samples: as their "sum", or as their "mean"."""
        return "mean" if self.scale == "mean" else "sum"

    def scale_of(self, n: int, c: int) -> float:
        """Return the number s for n samples of c outputs each."""
        del c
        return {"sum": 1.0, "mean": float(n)}[self.scale] if isinstance(self.scale, str) else self.scale

    def gradient_sq_range(self, values: Values, c: int) -> tuple[Values, Values]:
        """Return the least and the largest ‖∂ℓ_i/∂f_i‖² that go with values ℓ_i of samples with c outputs.

        Both ends are attained, up to rounding; 0 and infinity stand for "not known".
        """
        del c
        return np.zeros_like(values), np.full_like(values, np.inf)

    def least(self, y: np.ndarray) -> Float[np.ndarray, " n"]:
        """Return the infimum of each ℓ_i over its outputs, where it is known: 0, unless a loss says otherwise.

        Args:
            y: targets (n, c) as `targets` returns them.
        """
        return np.zeros(len(y))

    def margins(self, f: np.ndarray, y: np.ndarray) -> Float[np.ndarray, " n"]:
        """Return m_i, of which ℓ_i is a decreasing function, where there is such a number for every sample.

        Args:
            f: outputs (n, c).
            y: targets (n, c) as `targets` returns them.

        Raises:
            NotImplementedError: for a loss of no margin.
        """
        raise NotImplementedError(f"the loss {self.name} is no function of a margin")

    def per_sample(self, outputs: Rows, y: Rows) -> Float[Any, " n"]:
        """Return ℓ_i, shape (n,).

        Args:
            outputs: f, shape (n, c), or (n,) for (n, 1).
            y: targets, shape (n, c), or (n,) for (n, 1).

        Raises:
            TypeError: for what is no array of numbers.
            ValueError: for shapes that do not fit, or targets that the loss is not defined for; where values are traced
                and cannot be looked at, the loss of such a sample is NaN.
        """
        return self._per_sample(*self.rows(outputs, y))

    def total(self, outputs: Rows, y: Rows) -> Float[Any, ""]:
        """Return Σ ℓ_i; arguments and errors as for `per_sample`."""
        return self._total(*self.rows(outputs, y))

    def gradient(self, outputs: Rows, y: Rows) -> Float[Any, "n ..."]:
        """Return g = ∂ℓ/∂f, shaped like the outputs and undivided by s; arguments and errors as for `per_sample`."""
        return self._gradient(*self.rows(outputs, y)).reshape(outputs.shape)

    def rows(self, outputs: Rows, y: Rows) -> tuple[Float[Any, "n c"], Float[Any, "n c"]]:
        """Return outputs and targets as (n, c); arguments and errors as for `per_sample`."""
        _check_numbers("apply_fn must return one", outputs)
        y = self.targets(y, outputs.shape, outputs.dtype)
        return outputs.reshape(y.shape), y

    def targets(self, y: Rows, shape: tuple[int, ...], dtype: Any) -> Float[Any, "n c"]:
        """Return targets as (n, c).

        Args:
            y: targets, as for `per_sample`.
            shape: that of the outputs.
            dtype: that of the outputs; integers are cast to it.

        Raises:
            TypeError: as for `per_sample`.
            ValueError: as for `per_sample`.
        """
        import jax.core

        _check_numbers("y must be", y)
        if not y.size:
            raise ValueError(f"y has no samples, or no outputs; it must be (n, c) with both >= 1, got shape {y.shape}")
        rows = shape if len(shape) == 2 else (*shape, 1)
        found = self._encode(y, rows)
        if len(rows) != 2 or found.shape != rows:
            raise ValueError(
                f"apply_fn returns shape {tuple(shape)} but y has shape {y.shape}; both must be (n, c), or (n,) for "
                "one output"
            )
        if not isinstance(y, jax.core.Tracer):
            self._check(np.asarray(found))
        # An integer takes the dtype of the outputs, as it does in ordinary promotion, under strict promotion too.
        return found.astype(dtype) if np.dtype(found.dtype).kind in "iu" else found

    def _encode(self, y: Any, shape: tuple[int, ...]) -> Any:
        """Return targets in the shape (n, c) of the outputs where that is what they mean."""
        del shape
        return y.reshape(-1, 1) if y.ndim == 1 else y

    def _check(self, y: np.ndarray) -> None:  # noqa: B027  # most losses take any number
        """Raise ValueError for targets (n, c) that the loss is not defined for."""

    @abstractmethod
    def _per_sample(self, f: Any, y: Any) -> Any:
        """Return ℓ_i (n,) from outputs and targets (n, c)."""

    def _total(self, f: Any, y: Any) -> Any:
        """Return Σ ℓ_i."""
        import jax.numpy as jnp

        return jnp.sum(self._per_sample(f, y))

    def _gradient(self, f: Any, y: Any) -> Any:
        """Return ∂ℓ/∂f (n, c)."""
        import jax

        return jax.grad(lambda outputs: self._total(outputs, y))(f)


def _check_numbers(what: str, array: Any) -> None:
    import jax.numpy as jnp

    if not (hasattr(array, "shape") and jnp.issubdtype(array.dtype, jnp.number)):
        raise TypeError(f"{what} array (n, c) of numbers, got {checks.shown(array)}")


def _number(value: Any) -> float:
    try:
        return checks.number("loss_scale", value, above=0)
    except ValueError:
        raise _not_a_scale(value) from None


def _not_a_scale(value: Any) -> ValueError:
    return ValueError(f"loss_scale must be {SCALES}; got {value if isinstance(value, float) else checks.shown(value)}")
