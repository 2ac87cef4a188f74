"""What other accounts of fast training ask for, from the same kernel and a few forward passes."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from lplr_jax.losses import Objective
from lplr_jax.measurement.gradients import loss_and_gradient
from lplr_jax.ntk.empirical import cast_floating, precision_scope
from lplr_jax.types import Params

PASSES = 14
"""Losses that a search for the critical step may ask for; they bring it within 4 % of itself. Calibrated: with a guess
within 10 % four are enough, and a guess may be off by a factor of 100."""
_NARROW = 1.04
_NEAR = 1.1


def kernel_rivals(
    theta: Float[np.ndarray, "nc nc"], gradient: Float[np.ndarray, "n c"], scale: float
) -> dict[str, float]:
    """Return the cosine of restricted strong convexity and the Gauss-Newton curvature along the step, by record name.

    cos = |1ᵀΘg|/√(1ᵀΘ1 gᵀΘg) is the cosine between ∇L and the gradient of the mean output (Banerjee et al.,
    arXiv 2209.15106); gᵀΘ²g/(s gᵀΘg) the second derivative of ½‖r‖²/s along ∇L of the linearised network, which is its
    share of κ_t. NaN where a denominator vanishes.

    Args:
        theta: the full kernel, sample-major.
        gradient: g = ∂ℓ/∂f.
        scale: s.
    """
    g, ones = gradient.reshape(-1), np.ones(gradient.size)
    image, whole = theta @ g, theta @ ones
    along, across = float(g @ image), float(ones @ whole)
    cosine = abs(float(ones @ image)) / math.sqrt(along * across) if along > 0 and across > 0 else math.nan
    return {
        "rsc_cosine": min(cosine, 1.0),  # NaN stays
        "gauss_newton_curvature": float(image @ image) / (scale * along) if along > 0 else math.nan,
    }


@partial(jax.jit, static_argnames=("objective",))
def _after(params: Params, gradient: Params, eta: Any, x: Any, y: Any, *, objective: Objective) -> Any:
    return objective.value(jax.tree.map(lambda p, g: p - eta * g, params, gradient), x, y)


def critical_step(objective: Objective, params: Params, x: Any, y: Any, *, guess: float) -> float:
    """Return the step along -∇L from which on the loss rises, η_c; 2/η_c is the critical sharpness.

    Steps are enlarged or shrunk from a guess until the loss turns from falling to rising, then bisected (Kalra et al.,
    arXiv 2601.16979, definition 2.1: the least step that raises the loss). On a quadratic there is one such turn, and
    2/η_c = GᵀHG/‖G‖² <= β; where a loss turns several times along the line it is one of the turns.

    Args:
        objective: what is minimised.
        params: θ.
        x: inputs.
        y: targets.
        guess: a step to start from, such as 2 over the curvature along ∇L.

    Returns:
        η_c within 4 %, from below; NaN where `PASSES` losses do not find it, or the gradient vanishes.
    """
    with precision_scope("float64"):
        wide = cast_floating((params, x, y), "float64")
        value, gradient = loss_and_gradient(*wide, objective=objective)
        value = float(value)
        if not (guess > 0 and math.isfinite(guess) and any(np.any(np.asarray(g)) for g in jax.tree.leaves(gradient))):
            return math.nan

        def falls(eta: float) -> bool:
            after = _after(wide[0], gradient, jnp.asarray(eta), *wide[1:], objective=objective)
            return float(after) <= value

        low, high, eta, factor = 0.0, math.inf, guess, _NEAR
        for _ in range(PASSES):
            if falls(eta):
                low = eta
            else:
                high = eta
            if low > 0 and high <= low * _NARROW:
                break
            if low > 0 and math.isfinite(high):
                eta = math.sqrt(low * high)
            else:  # a good guess is bracketed by its neighbours, another by doubling
                eta, factor = eta * factor if low > 0 else eta / factor, 2.0
        return low if low > 0 and math.isfinite(high) else math.nan
