"""The Polyak-Łojasiewicz ratio: what is known of it when L* is not, and its identity with the kernel."""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lplr_jax import checks
from lplr_jax.curves.pl import pl_bracket
from lplr_jax.losses import LossScale, Objective
from lplr_jax.ntk import checks as probes
from lplr_jax.ntk.empirical import cast_floating, cast_parameters, of_theta, precision_scope
from lplr_jax.types import ApplyFn, Params


@dataclass(frozen=True)
class PointDiagnostics:
    """Loss, gradient and residual at one point, evaluated in float64.

    Attributes:
        loss: L(θ).
        grad_sq_norm: ‖∇L(θ)‖², in units of L² per squared parameter.
        residual: f(θ) - y, shape (n, c).
        loss_scale: the number s.
    """

    loss: float
    grad_sq_norm: float
    residual: Float[np.ndarray, "n c"]
    loss_scale: float

    @property
    def pl_ratio(self) -> float:
        """½‖∇L‖² / L, in units of L: the left side of the PL identity."""
        return float(pl_bracket(self.loss, self.grad_sq_norm, 0.0)[0])

    def rayleigh(self, theta: Float[np.ndarray, "nc nc"]) -> float:
        """Return rᵀΘr / ‖r‖², the Rayleigh quotient of the kernel at the residual; divided by s it is the PL ratio.

        Args:
            theta: full kernel, shape (n c, n c), sample-major.

        Raises:
            ValueError: if the kernel is not of this residual's size.
        """
        r = self.residual.reshape(-1)
        if theta.shape != (r.size, r.size):
            raise ValueError(
                f"the kernel has shape {theta.shape} but the residual has {r.size} entries; pass the full kernel"
            )
        r = r / np.linalg.norm(r)
        return float(r @ theta @ r)


@partial(jax.jit, static_argnames=("objective",))
def _at_point(params: Params, x: Any, y: Array, *, objective: Objective) -> tuple[Array, Array, Array]:
    (loss, gradient), residual = objective.value_and_gradient(params, x, y), objective.residual(params, x, y)
    return loss, sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)), residual  # pyright: ignore[reportReturnType]


def evaluate_point(apply_fn: ApplyFn, params: Params, x: Any, y: Any, *, loss_scale: LossScale) -> PointDiagnostics:
    """Evaluate loss, gradient norm and residual in float64, whatever the precision of training.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c).
        params: pytree of floating arrays; cast to float64, which is exact.
        x: inputs (n, ...).
        y: targets (n, c).
        loss_scale: "sum" for s = 1 or "mean" for s = n.

    Returns:
        The values on the host.

    Raises:
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers.
        ValueError: for empty, non-finite or wrongly shaped inputs, or an unknown loss scale.
    """
    objective = Objective(apply_fn, loss_scale)
    if not (hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.number) and np.isfinite(np.asarray(y)).all()):
        raise ValueError(f"y must be an array (n, c) of finite numbers, got {checks.shown(y)}")
    with precision_scope("float64"):
        split = cast_parameters(probes.inputs(params, x), "float64")
        x, y = cast_floating((x, y), "float64")
        probes.deterministic(apply_fn, split, x)
        apply_fn, params = of_theta(apply_fn, split, x)
        objective = replace(objective, apply_fn=apply_fn)
        loss, grad_sq_norm, residual = jax.device_get(_at_point(params, x, y, objective=objective))
    return PointDiagnostics(float(loss), float(grad_sq_norm), residual, float(objective.scale(residual.shape[0])))
