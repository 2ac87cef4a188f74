"""The Polyak-Łojasiewicz ratio: what is known of it when L* is not, and its identity with the kernel."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lplr_jax import checks
from lplr_jax.models import ApplyFn, Params
from lplr_jax.ntk import checks as probes
from lplr_jax.ntk.empirical import cast_floating, precision_scope
from lplr_jax.training import LossScale, Objective

UNIT_ROUNDOFF_32 = float(np.finfo(np.float32).eps) / 2


def pl_bracket(
    loss: Float[np.ndarray, "*t"] | float, grad_sq_norm: Float[np.ndarray, "*t"] | float, floor: float
) -> tuple[Float[np.ndarray, "*t"], Float[np.ndarray, "*t"]]:
    """Bracket the PL ratio ½‖∇L‖² / (L - L*) for every L* in [0, floor] (paper, Definition 4.1).

    The terminal-loss proxy L* = L_T can only inflate the ratio: L_T is the loss of an iterate, so L* <= L_T wherever
    that iterate lies in the region.

    Args:
        loss: L(θ_t) >= 0, any shape.
        grad_sq_norm: ‖∇L(θ_t)‖², same shape, same units of L.
        floor: the least loss recorded over the iterates in the region; 0 for a region in which no minimum is known.

    Returns:
        The ratio for L* = 0 and for L* = floor, in units of L (multiply by s for the sum loss). The upper end is +inf
        where L <= floor, and both are where L = 0: every constant holds there. NaN stays NaN.

    Raises:
        ValueError: if floor is negative or not finite, or the other two are no real arrays of one shape.

    Example:
        >>> low, high = pl_bracket(np.array([4.0, 1.0]), np.array([8.0, 1.0]), 1.0)
        >>> low.tolist(), high.tolist()
        ([1.0, 0.5], [1.3333333333333333, inf])
    """
    floor = checks.number("floor", floor, least=0)
    loss_ = checks.real_array("loss", loss, axes="...", empty=True)
    half = 0.5 * checks.real_array("grad_sq_norm", grad_sq_norm, axes="...", empty=True)
    if loss_.shape != half.shape:
        raise ValueError(f"loss and grad_sq_norm must have the same shape, got {loss_.shape} and {half.shape}")

    def ratio(gap: np.ndarray) -> np.ndarray:
        known = ~(np.isnan(gap) | np.isnan(half))
        above = known & (gap > 0)
        out = np.where(known, np.inf, np.nan)
        return np.divide(half, gap, out=out, where=above)

    return ratio(loss_), ratio(np.asarray(loss_ - floor))


def loss_floor(loss: Float[np.ndarray, " t"]) -> float:
    """Return the least recorded loss, the proxy for L* on the smallest ball around θ_0 that holds the run.

    It is L_T on a run that descends; a catapult or a stochastic run passes below L_T.
    """
    loss = checks.real_array("loss", loss, axes="t")
    finite = loss[np.isfinite(loss)]
    if finite.size == 0:
        raise ValueError("the loss has no finite value, so it has no floor")
    return float(finite.min())


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
        probes.inputs(params, x)
        probes.deterministic(apply_fn, *cast_floating((params, x), "float64"))
        params, x, y = cast_floating((params, x, y), "float64")
        loss, grad_sq_norm, residual = jax.device_get(_at_point(params, x, y, objective=objective))
    return PointDiagnostics(float(loss), float(grad_sq_norm), residual, float(objective.scale(residual.shape[0])))


def pl_identity_tolerance(
    *, max_eig: float, rayleigh: float, chain: int, unit_roundoff: float = UNIT_ROUNDOFF_32
) -> float:
    """Return the relative gap that rounding may open between ½‖∇L‖²/L and rᵀΘr/(s‖r‖²).

    A gradient computed with relative error γ in its products satisfies ‖ĝ - g‖ <= γ ‖J‖₂‖r‖ / s, and ‖g‖ =
    sqrt(ρ) ‖r‖ / s with ρ the Rayleigh quotient, so ‖ĝ‖² is off by at most the factor (1 + γ sqrt(λ_max/ρ))²; the loss
    adds 2γ of its own. γ = sqrt(chain) u is the probabilistic bound (Higham and Mary 2019) for sums over `chain` terms.

    Args:
        max_eig: λ_max(Θ).
        rayleigh: ρ = rᵀΘr/‖r‖².
        chain: terms on the longest chain of accumulations: Σ over layers of fan-in, forward and backward, plus n.
        unit_roundoff: u of the precision in which loss and gradient were computed.
    """
    gamma = np.sqrt(checks.whole("chain", chain, least=1)) * unit_roundoff
    return float((1 + gamma * np.sqrt(max(max_eig, rayleigh) / rayleigh)) ** 2 - 1 + 2 * gamma)
