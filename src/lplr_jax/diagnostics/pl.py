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
from lplr_jax.losses import Loss, Objective, Scale, as_loss
from lplr_jax.ntk import checks as probes
from lplr_jax.ntk.empirical import cast_floating, cast_parameters, of_theta, precision_scope
from lplr_jax.types import ApplyFn, Params


@dataclass(frozen=True)
class PointDiagnostics:
    """Loss and gradients at one point, evaluated in float64.

    Attributes:
        loss: L(θ) = (1/s) Σ ℓ_i.
        grad_sq_norm: ‖∇L(θ)‖², in units of L² per squared parameter.
        residual: f(θ) - y, shape (n, c).
        gradient: g = ∂ℓ/∂f, undivided by s, shape (n, c); the residual for the squared loss.
        loss_scale: the number s.
        losses: ℓ_i, shape (n,).
        outputs: f(θ), shape (n, c).
        targets: y as the loss has them, shape (n, c): classes are rows.
    """

    loss: float
    grad_sq_norm: float
    residual: Float[np.ndarray, "n c"]
    gradient: Float[np.ndarray, "n c"]
    loss_scale: float
    losses: Float[np.ndarray, " n"]
    outputs: Float[np.ndarray, "n c"]
    targets: Float[np.ndarray, "n c"]

    @property
    def pl_ratio(self) -> float:
        """½‖∇L‖² / L, in units of L: for the squared loss the left side of the PL identity."""
        return float(pl_bracket(self.loss, self.grad_sq_norm, 0.0)[0])

    def rayleigh(self, theta: Float[np.ndarray, "nc nc"]) -> float:
        """Return ρ = gᵀΘg / ‖g‖², the Rayleigh quotient of the kernel at the gradient in the outputs.

        For every loss ½‖∇L‖² = ρ‖g‖²/(2 s²); for the squared loss ρ/s is the PL ratio.

        Args:
            theta: full kernel, shape (n c, n c), sample-major.

        Raises:
            ValueError: if the kernel is not of this gradient's size.
        """
        g = self.gradient.reshape(-1)
        if theta.shape != (g.size, g.size):
            raise ValueError(
                f"the kernel has shape {theta.shape} but there are {g.size} outputs, n c; pass the full kernel"
            )
        g = g / np.linalg.norm(g)
        return float(g @ theta @ g)


@partial(jax.jit, static_argnames=("objective",))
def _at_point(params: Params, x: Any, y: Array, *, objective: Objective) -> dict[str, Array]:
    loss, gradient = objective.value_and_gradient(params, x, y)
    outputs, y = objective.rows(params, x, y)
    return {
        "loss": loss,
        "grad_sq_norm": jnp.asarray(sum(jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient))),
        "residual": outputs - y,
        "gradient": objective.loss.gradient(outputs, y),
        "losses": objective.loss.per_sample(outputs, y),
        "outputs": outputs,
        "targets": y,
    }


def evaluate_point(
    apply_fn: ApplyFn, params: Params, x: Any, y: Any, *, loss_scale: Scale | None = None, loss: Loss | None = None
) -> PointDiagnostics:
    """Evaluate loss, gradients and residual in float64, whatever the precision of training.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c), or (n,) for (n, 1).
        params: pytree of floating arrays; cast to float64, which is exact.
        x: inputs (n, ...).
        y: targets (n, c), or (n,) for (n, 1); for softmax cross-entropy labels (n,) as well.
        loss_scale: of the squared loss: "sum" for s = 1, "mean" for s = n, or the number s.
        loss: any other loss; give one of the two.

    Returns:
        The values on the host.

    Raises:
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers.
        ValueError: for empty, non-finite or wrongly shaped inputs, targets that the loss is not defined for, an unknown
            scale, or if not one of `loss_scale` and `loss` is given.
    """
    objective = Objective(apply_fn, as_loss(loss, loss_scale=loss_scale))
    if not (hasattr(y, "dtype") and jnp.issubdtype(y.dtype, jnp.number) and np.isfinite(np.asarray(y)).all()):
        raise ValueError(f"y must be an array (n, c) of finite numbers, got {checks.shown(y)}")
    with precision_scope("float64"):
        split = cast_parameters(probes.inputs(params, x), "float64")
        x, y = cast_floating((x, y), "float64")
        probes.deterministic(apply_fn, split, x)
        apply_fn, theta = of_theta(apply_fn, split, x)
        outputs = jax.eval_shape(apply_fn, theta, x)
        y = objective.loss.targets(y, outputs.shape, outputs.dtype)
        objective = replace(objective, apply_fn=apply_fn)
        found = jax.device_get(_at_point(theta, x, y, objective=objective))
    return PointDiagnostics(
        loss=float(found["loss"]),
        grad_sq_norm=float(found["grad_sq_norm"]),
        residual=found["residual"],
        gradient=found["gradient"],
        loss_scale=objective.scale(*found["gradient"].shape),
        losses=found["losses"],
        outputs=found["outputs"],
        targets=found["targets"],
    )
