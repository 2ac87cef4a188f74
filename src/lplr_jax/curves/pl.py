"""The Polyak-Łojasiewicz ratio along a run: what is known of it when L* is not, and what rounding may open."""

import numpy as np
from jaxtyping import Float

from lplr_jax import checks

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
