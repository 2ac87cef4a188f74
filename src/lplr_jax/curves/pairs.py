"""What pairs of probes say of L_Θ, and the errors of their kernels."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

UNIT_64 = 2.0**-53


UNIT_32 = 2.0**-24


@dataclass(frozen=True)
class Ratio:
    """A lower estimate of L_Θ from the pair of epochs (s, t)."""

    value: float
    s: int | None
    t: int | None


def kernel_error(
    bound: Float[np.ndarray, " k"], max_eig: Float[np.ndarray, " k"], size: int, unit: float = UNIT_64
) -> Float[np.ndarray, " k"]:
    """Return the bound on the error of each kernel; size · u · λ_max where there is none, 0 where that is unknown."""
    return np.where(np.isfinite(bound), bound, np.nan_to_num(size * unit * max_eig, nan=0.0))


def proof_radius(drift: Float[np.ndarray, " t"], p: int) -> float:
    """Return the radius of a ball that holds a run, given drifts that were summed over p squares in float32.

    The sum and its root lose γ/2 with γ = k u / (1 - k u), k = p + 4, which is at most k u where k u <= 1/4. A square
    that underflows loses at most 2⁻¹²⁶, and the root of p of them is added.
    """
    loss = (p + 4) * UNIT_32
    if loss <= 0.25:
        factor = 1 + loss
    else:
        factor = math.sqrt((1 - loss) / (1 - 2 * loss)) * (1 + UNIT_32) if loss < 0.5 else math.inf
    return float(np.nanmax(drift)) * factor + math.sqrt(p) * 2.0**-63 * (1 + UNIT_32)


def pair_ratio(
    shift: Float[np.ndarray, "k k"],
    distance: Float[np.ndarray, "k k"],
    error: Float[np.ndarray, " k"],
    epochs: Int[np.ndarray, " k"],
) -> Ratio:
    """Return the largest lower estimate of L_Θ over pairs of probes; shifts within the kernels' error are dropped."""
    clear = shift - error[:, None] - error[None, :]
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.where((clear > 0) & (distance > 0), clear / distance, np.nan)
    if not np.isfinite(ratios).any():
        known = np.isfinite(shift).any()
        return Ratio(0.0 if known else math.nan, None, None)
    i, j = np.unravel_index(int(np.nanargmax(ratios)), ratios.shape)
    s, t = sorted((int(epochs[i]), int(epochs[j])))
    return Ratio(float(ratios[i, j]), s, t)
