"""The method of a run, read off its steps and nothing else: whether they go along -∇L, how far, how many were seen.

Write Δ = θ_t - θ_{t+1} and G for the recorded gradient. If the update is Δ = η G' + e, where G' is another evaluation
of the same gradient, ‖G' - G‖ <= 2 ε, and e the rounding of θ_{t+1}, then `step_deviation` = ‖Δ - η_t G‖ / ‖Δ‖ is at
most `step_rounding` + 2 ε / ‖G‖, and η_t is off by as much, to first order. Two inner products of p terms add 2 √p u.

Of mini-batches the same is read off the steps and the gradient g_B that each was taken on: whether they are those of
stochastic gradient descent, and of which η.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float

if TYPE_CHECKING:
    from lplr_jax.theory.evidence import Evidence

UNRESOLVED = 0.1
"""Share of a step that rounding may make up from which on its direction and length are not read off it. Calibrated."""

Kind = Literal["unseen", "gradient descent", "other"]
NOT_SEEN = "the update was not seen"


@dataclass(frozen=True)
class Method:
    """What the steps of a run show of its method.

    Attributes:
        kind: "gradient descent" where every resolved step is along -∇L to rounding; "other" where one is not; "unseen"
            where there is none.
        note: what was measured, in words.
        fixed: whether one η explains every resolved step.
        eta: median η_t of the resolved steps, in parameter² / L; NaN where there is none.
        sizes: η_t of each entry, NaN where the step is not resolved.
        allowed: what rounding may leave of |η_t/η - 1| and of the deviation, NaN likewise.
        updates: steps whose update was seen.
        total: steps that the run took.
    """

    kind: Kind
    note: str
    fixed: bool
    eta: float
    sizes: Float[np.ndarray, " t"]
    allowed: Float[np.ndarray, " t"]
    updates: int
    total: int

    @property
    def plain(self) -> bool:
        """Whether the run was seen to be gradient descent with a fixed step."""
        return self.kind == "gradient descent" and self.fixed

    @property
    def everywhere(self) -> bool:
        """Whether every step of the run was seen and resolved."""
        return int(np.isfinite(self.sizes).sum()) == self.total

    @property
    def coverage(self) -> str:
        """How much was seen, in words."""
        resolved = int(np.isfinite(self.sizes).sum())
        short = f", {self.updates - resolved} too short to be told from rounding" if resolved < self.updates else ""
        return f"the update was seen at {self.updates} of {self.total} steps{short}"


def measure(evidence: "Evidence") -> Method:
    """Read the method of a run off `step_size`, `step_deviation`, `step_rounding` of its record."""
    return _read(evidence, "step", evidence.series("grad_sq_norm"), evidence.gradient_error, "∇L")


def measure_batches(evidence: "Evidence") -> Method:
    """Read the method of mini-batch steps off the same measures against the gradient of each step's own batch.

    Its rounding is that of the full gradient times √(n/b), as if all samples were alike.
    """
    share = np.sqrt(evidence.number("n") / evidence.number("batch_size"))
    return _read(evidence, "batch_step", evidence.series("batch_grad_sq_norm"), share * evidence.gradient_error, "g_B")


def _read(
    evidence: "Evidence",
    names: str,
    squared: Float[np.ndarray, " t"],
    error: Float[np.ndarray, " t"],
    word: str,
) -> Method:
    """Read a method off the measures that begin with `names`, against gradients of known squares and errors."""
    size, deviation, rounding = (evidence.series(f"{names}_{name}") for name in ("size", "deviation", "rounding"))
    follows = np.diff(evidence.record["epoch"][: evidence.end + 1], append=-1)[: evidence.end] == 1
    total = evidence.total + (evidence.diverged_at is not None)
    seen = follows & evidence.seen & np.isfinite(size) & ~np.isnan(rounding)
    length = np.sqrt(squared)
    sums = 2 * np.sqrt(evidence.number("p")) * evidence.unit
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient = 2 * error / length + sums
    allowed = rounding + gradient
    resolved = seen & (allowed < UNRESOLVED) & np.isfinite(deviation)

    def method(kind: Kind, note: str, *, fixed: bool = False) -> Method:
        eta = float(np.median(size[resolved])) if resolved.any() else float("nan")
        told = [np.where(resolved, values, np.nan) for values in (size, allowed)]
        return Method(kind, note, fixed, eta, *told, updates=int(seen.sum()), total=total)

    if not seen.any():
        return method("unseen", NOT_SEEN)
    if not resolved.any():
        return method("unseen", f"{NOT_SEEN}: all {int(seen.sum())} steps are too short to be told from rounding")

    def at(where: Bool[np.ndarray, " t"], by: Float[np.ndarray, " t"]) -> tuple[float, int]:
        worst = int(np.argmax(np.where(where, by, -np.inf)))
        return float(by[worst]), int(evidence.steps[worst])

    aside = resolved & (deviation > allowed)
    if aside.any():
        worst, step = at(aside, deviation)
        return method("other", f"the update is not along -{word}: deviation {worst:.2g} at step {step}")
    if (resolved & (size <= 0)).any():
        worst, step = at(resolved & (size <= 0), -size)
        return method("other", f"the update is along +{word}: η = {-worst:.3g} at step {step}")
    still = seen & np.isinf(rounding) & ~_spent(evidence, np.where(resolved, size, 0.0) * length)
    stays = _stays(still, resolved, size, length, rounding, gradient)
    if stays.any():
        _, step = at(stays, length)
        return method("other", f"θ does not move at step {step}, where {word} is not 0")
    places = np.flatnonzero(resolved)
    low, high = size[places] * (1 - allowed[places]), size[places] / (1 - allowed[places])
    if low.max() <= high.min():
        return method("gradient descent", f"every resolved step is -η {word} with one η", fixed=True)
    first, last = sorted((int(places[np.argmax(low)]), int(places[np.argmin(high)])))
    moved = f"η moved from {size[first]:.4g} at step {evidence.steps[first]} to "
    return method("gradient descent", f"{moved}{size[last]:.4g} at step {evidence.steps[last]}")


def _spent(evidence: "Evidence", lengths: Float[np.ndarray, " t"]) -> Bool[np.ndarray, " t"]:
    """Return where a budget of the path that the steps were to keep is used up, to a thousandth."""
    budget = evidence.number("path_budget")
    return np.cumsum(lengths) >= (1 - 1e-3) * budget if np.isfinite(budget) else np.zeros(lengths.size, bool)


def _stays(
    still: Bool[np.ndarray, " t"],
    resolved: Bool[np.ndarray, " t"],
    size: Float[np.ndarray, " t"],
    length: Float[np.ndarray, " t"],
    rounding: Float[np.ndarray, " t"],
    gradient: Float[np.ndarray, " t"],
) -> Bool[np.ndarray, " t"]:
    """Return where θ stays though a step of the usual η would be resolved, as in accumulated gradients."""
    # ½‖spacing(θ)‖ is the rounding of a step times its length.
    spacing = float((rounding[resolved] * size[resolved] * length[resolved]).max())
    usual = float(np.median(size[resolved])) * length
    with np.errstate(divide="ignore", invalid="ignore"):
        return still & (spacing / usual + gradient < UNRESOLVED)
