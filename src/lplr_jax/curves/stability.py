"""The step-size boundary 2/β: what η β promises before a run, and what loss and drift say after it."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from jaxtyping import Float, Int

from lplr_jax import checks
from lplr_jax.curves.rate import step_numbers

Fraction = Literal["below 1/β", "between 1/β and 2/β", "above 2/β"]
"""Which fraction of 2/β a step size η is: up to one half, up to all of it, or more."""
Outcome = Literal["monotone descent", "oscillation", "catapult", "divergence"]

EXPECTED: dict[Fraction, tuple[Outcome, ...]] = {
    "below 1/β": ("monotone descent",),
    "between 1/β and 2/β": ("oscillation",),
    "above 2/β": ("catapult", "divergence"),
}
"""Outcomes that each fraction of 2/β promises. On a quadratic the iterate nears the minimum along the sharpest
direction from one side, from alternating sides, or not at all; a network may flatten on its way and come back, the
catapult of Lewkowycz et al. 2020."""

EARLY = 20
"""Steps over which drift is watched for overshooting. Calibrated."""
ROUNDINGS = 64
"""Unit roundoffs that two losses may differ by without meaning it. Calibrated: 20 times what a width-128 run shows."""
DRIFT_ROUNDING = 1e-5
"""Relative fall of a float32 drift that means nothing: its rounding with a margin of ten. Calibrated."""


def place_of(eta_beta: float) -> Fraction:
    """Return which fraction of 2/β the step size η is, from the product η β.

    Raises:
        ValueError: if the product is not a finite number > 0.

    Example:
        >>> place_of(1.4)
        'between 1/β and 2/β'
    """
    checks.number("η β", eta_beta, above=0)
    return "below 1/β" if eta_beta < 1 else "between 1/β and 2/β" if eta_beta < 2 else "above 2/β"


def rounding_allowance(loss: Any, scale: Any, unit_roundoff: float) -> Any:
    """Return how far a loss may rise by rounding alone: γ (L + sqrt(L S)) + γ² S with γ = 64 u, in units of L.

    With S = ‖f‖²/(2s) an error of γ ‖f‖ in the outputs moves L = ‖r‖²/(2s) by 2 γ sqrt(L S) + γ² S at most.

    Args:
        loss: L(θ_t).
        scale: S, or what is of its order: ‖y‖²/(2s), or L(θ_0) of a run that does not start beside a minimiser.
        unit_roundoff: u of the precision of the loss.
    """
    gamma = ROUNDINGS * unit_roundoff
    return gamma * (loss + (loss * scale) ** 0.5) + gamma**2 * scale


@dataclass(frozen=True)
class Observation:
    """What a run did, by a rule on loss and drift.

    Attributes:
        outcome: "divergence" if the loss stops being finite or ends at or above L_0; "catapult" if it passes above L_0
            and ends below; "oscillation" if it rises in some step by more than rounding, or the drift falls in some of
            the first 20 steps (the iterate overshoots the minimum along the sharpest direction); "monotone descent"
            otherwise.
        rises: entries whose loss is above that of the entry before by more than rounding.
        first_rise: step number of the first of them, None without any.
        peak: largest L_t over L_0; inf where the loss stops being finite.
        overshoots: entries among the first 20 steps whose drift is below that of the entry before.
    """

    outcome: Outcome
    rises: int
    first_rise: int | None
    peak: float
    overshoots: int


def observe(
    loss: Float[np.ndarray, " t"],
    drift: Float[np.ndarray, " t"],
    *,
    unit_roundoff: float = 2.0**-24,
    steps: Int[np.ndarray, " t"] | None = None,
) -> Observation:
    """Classify a run by its loss and drift at every recorded step.

    Args:
        loss: L(θ_t) from step 0, shape (t,); NaN from the step at which the run diverged. NaN between finite values
            is a gap: that step was not measured.
        drift: ‖θ_t - θ_0‖, same shape.
        unit_roundoff: u of the precision in which both were computed.
        steps: step number of each entry, shape (t,), ascending; None for 0, 1, ...

    Raises:
        ValueError: if the first loss is not finite.
    """
    loss, drift = (checks.real_array(name, a, axes="t") for name, a in (("loss", loss), ("drift", drift)))
    checks.number("unit_roundoff", unit_roundoff, above=0)
    if loss.shape != drift.shape:
        raise ValueError(f"loss and drift must have one entry a step, got shapes {loss.shape} and {drift.shape}")
    if not np.isfinite(loss[0]):
        raise ValueError("the loss at step 0 is not finite, so there is nothing to compare the run with")
    numbers, measured = step_numbers(steps, loss.size), np.isfinite(loss)
    diverged = not measured[-1]
    seen, numbers, drift = loss[measured], numbers[measured], drift[measured]
    rising = np.flatnonzero(seen[1:] > seen[:-1] + rounding_allowance(seen[:-1], seen[0], unit_roundoff))
    early = drift[numbers <= EARLY]
    overshoots = int(np.sum(early[1:] < early[:-1] * (1 - DRIFT_ROUNDING)))
    above = seen.max() > seen[0] + rounding_allowance(seen[0], seen[0], unit_roundoff)
    if diverged or (seen.size > 1 and seen[-1] >= seen[0]):
        outcome: Outcome = "divergence"
    elif above:
        outcome = "catapult"
    else:
        outcome = "oscillation" if rising.size or overshoots else "monotone descent"
    peak = float("inf") if diverged else float(seen.max() / seen[0])
    first_rise = int(numbers[rising[0] + 1]) if rising.size else None
    return Observation(outcome, int(rising.size), first_rise, peak, overshoots)


@dataclass(frozen=True)
class PowerLaw:
    """A line through log y against log x by least squares.

    Attributes:
        slope: exponent; float(law) is this.
        stderr: its standard error for independent residuals; NaN for two points. Steps of one run are not independent,
            so there it is too small.
        intercept: log y at x = 1.
        range: least and largest x of the fit.
        points: how many entered.
    """

    slope: float
    stderr: float
    intercept: float
    range: tuple[float, float]
    points: int

    def __float__(self) -> float:
        return self.slope

    def at(self, x: Float[np.ndarray, "*k"]) -> Float[np.ndarray, "*k"]:
        """Return the fitted y at x."""
        return np.exp(self.intercept + self.slope * np.log(x))


def power_law(x: Float[np.ndarray, " k"], y: Float[np.ndarray, " k"]) -> PowerLaw:
    """Fit log y = a + b log x; points that are not finite and positive in both do not enter.

    Args:
        x: abscissae, such as widths or gaps.
        y: ordinates, such as boundaries or squared gradient norms.

    Returns:
        The fit; NaN where fewer than two distinct points remain.

    Example:
        >>> law = power_law(np.array([1.0, 2.0, 4.0]), np.array([3.0, 12.0, 48.0]))
        >>> round(law.slope, 12), law.points
        (2.0, 3)
    """
    x, y = (checks.real_array(name, a, axes="k", empty=True) for name, a in (("x", x), ("y", y)))
    if x.shape != y.shape:
        raise ValueError(f"x and y must have the same shape (k,), got {x.shape} and {y.shape}")
    keep = np.isfinite(x) & np.isfinite(y) & (x > 0) & (y > 0)
    t, z = np.log(x[keep]), np.log(y[keep])
    if t.size < 2 or np.ptp(t) == 0:
        return PowerLaw(np.nan, np.nan, np.nan, (np.nan, np.nan), int(t.size))
    centred = t - t.mean()
    slope = float(centred @ z / (centred @ centred))
    residual = z - z.mean() - slope * centred
    degrees = t.size - 2
    stderr = float(np.sqrt(residual @ residual / degrees / (centred @ centred))) if degrees else float("nan")
    span = (float(np.exp(t.min())), float(np.exp(t.max())))
    return PowerLaw(slope, stderr, float(z.mean() - slope * t.mean()), span, int(t.size))
