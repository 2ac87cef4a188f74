"""Claim `descent`: the decrease test at every step that was seen. Ours, not the paper's.

a_t = (L_t - L_{t+1}) / (η_t ‖∇L_t‖²) = 1 - η_t κ_t / 2, with κ_t = 2 (L_{t+1} - L_t + η_t ‖∇L_t‖²) / (η_t² ‖∇L_t‖²) the
secant curvature along the step. No smoothness, no region and no architecture enters. `descent.py` has the descent
lemma, which asks for a_t >= ½.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.theory.claims.claim import Claim
from lplr_jax.theory.claims.descent import loss_slack, step_sizes
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, at_least, at_most

REFERENCE = "ours (decrease test)"


@dataclass(frozen=True)
class Decrease:
    """The decrease L_t - L_{t+1} of the steps that were seen, as multiples a_t of η_t ‖∇L_t‖².

    Attributes:
        at: positions t of these steps.
        size: η_t, in parameter² / L.
        value: a_t; NaN where η_t ‖∇L_t‖² is 0.
        noise: by how much rounding may move a_t; NaN where it has no bound.
        window: a_w = Σ (L_t - L_{t+1}) / Σ η_t ‖∇L_t‖² over these steps.
        window_noise: by how much rounding may move a_w: the losses between two steps cancel, and where an unbroken row
            of steps begins or ends at a probe of all data, its loss in float64 is taken.
    """

    at: Int[np.ndarray, " k"]
    size: Float[np.ndarray, " k"]
    value: Float[np.ndarray, " k"]
    noise: Float[np.ndarray, " k"]
    window: float
    window_noise: float

    @property
    def resolved(self) -> Bool[np.ndarray, " k"]:
        """For each step whether the sign of a_t is known."""
        return np.abs(self.value) > self.noise

    @property
    def rises(self) -> Bool[np.ndarray, " k"]:
        """For each step whether a_t is below 0 by more than its noise."""
        return self.value < -self.noise

    @property
    def worst(self) -> int | None:
        """Which step has the least a_t whose sign is known; of all where no sign is; None where there is no a_t."""
        kept = self.resolved if self.resolved.any() else np.isfinite(self.value)
        return int(np.argmin(np.where(kept, self.value, np.inf))) if kept.any() else None

    @property
    def least(self) -> float:
        """The least a_t whose sign is known, NaN where there is none."""
        return float(self.value[self.worst]) if self.worst is not None and self.resolved.any() else NAN

    def covers(self, start: int, stop: int) -> bool:
        """Whether every step from position `start` up to `stop` is among them."""
        first, last = np.searchsorted(self.at, [start, stop])
        return int(last - first) == stop - start


def decrease_of(evidence: Evidence) -> Decrease:
    """Measure the decrease of every step that was seen to be one of this method."""
    at, sizes = evidence.seen_steps, step_sizes(evidence)
    at = at[np.isfinite(sizes[at]) & np.isfinite(evidence.series("step_size")[at])]
    size, loss, gradient = sizes[at], evidence.series("loss"), evidence.series("grad_sq_norm")
    asked, fall = size * gradient[at], loss[at] - loss[at + 1]
    # η_t itself is only as good as the step that it was measured on.
    relative = 0.0 if evidence.method.fixed else evidence.method.allowed[at]
    off, slack = size * evidence.gradient_noise[at], loss_slack(evidence, at)
    ends = np.flatnonzero(np.diff(at, prepend=-2, append=-2) != 1)
    edges = np.concatenate([at[ends[:-1]], at[ends[1:] - 1] + 1]) if at.size else at
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        value = np.where(asked > 0, fall / asked, np.nan)
        noise = (slack + np.abs(value) * off) / asked + np.abs(value) * relative
        total = float(asked.sum())
        ends_at, wide, wide_noise = edges.reshape(2, -1) if at.size else np.zeros((2, 0), int), *_wide_losses(evidence)
        window = float((wide[ends_at[0]] - wide[ends_at[1]]).sum()) / total if total > 0 else NAN
        lost = float(wide_noise[edges].sum() + np.sum(slack - _losses(evidence, at)))
        window_noise = (lost + abs(window) * float(off.sum())) / total if total > 0 else NAN
    return Decrease(at, size, value, noise, window, window_noise)


def _wide_losses(evidence: Evidence) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """Return the losses of the series with those of the probes in float64 in their place, and their noise."""
    loss, noise = evidence.series("loss").copy(), evidence.loss_noise.copy()
    found = evidence.probe("probe_loss")
    known = np.isfinite(found) & (not evidence.partial) if found.size else np.zeros(0, bool)
    places = evidence.at[known]
    loss[places] = found[known]
    noise[places] *= min(evidence.probe_unit / max(evidence.unit, UNIT_64), 1.0)
    return loss, noise


def _losses(evidence: Evidence, at: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Return the part of the slack that is the rounding of both recorded losses, which cancels along a window."""
    return evidence.loss_noise[at] + evidence.loss_noise[at + 1]


def not_descending(evidence: Evidence) -> tuple[Outcome, str] | None:
    """Return outcome and reason where nothing is said of a run, as it was not seen to be gradient descent."""
    method = evidence.method
    if not method.total:
        return "not applicable", "no step was taken"
    if method.kind == "other":
        return "not applicable", f"the steps are not along the gradient; {method.note}"
    if method.kind == "unseen":
        return "undecided", f"{method.note}, so whether it is gradient descent is open"
    return None


def decrease(evidence: Evidence) -> Verdict:
    """Hold L_{t+1} <= L_t - a_t η_t ‖∇L_t‖² with a_t > 0 at every step that was seen, for any η_t.

    `measured` is the least a_t whose sign rounding leaves known, `margin` how many times it exceeds its rounding.
    "refuted" where one is below 0 by more than that; at best "not refuted", as neither loss is enclosed. The part
    `window` has a_w, the decrease over all steps that were seen, which the noise of single steps does not reach.
    """
    stopped = not_descending(evidence)
    if stopped:
        return Verdict("descent", REFERENCE, stopped[0], note=stopped[1])
    found, total = decrease_of(evidence), evidence.method.total
    out = evidence.diverged_at is not None and bool(np.isfinite(evidence.method.sizes[-1:]).all())
    signs, rises = int(found.resolved.sum()), int(found.rises.sum())
    known = int(np.isfinite(found.value).sum())
    missed = total - found.at.size - out
    unseen = f"{missed} of {total} steps were not seen" if missed else f"all {total} steps were seen"
    worst = found.worst
    if worst is None and not out:
        return Verdict("descent", REFERENCE, "undecided", note=f"no step can be judged; {unseen}")
    outcome: Outcome = "refuted" if rises or out else "not refuted" if signs else "undecided"
    measured, step, margin, note = -math.inf, int(evidence.steps[-1]), NAN, ""
    if worst is not None:
        measured, noise = float(found.value[worst]), float(found.noise[worst])
        step = int(evidence.steps[found.at[worst]])
        margin = measured / noise if measured > 0 and noise > 0 else NAN
        note = f"least a_t = {measured:.4g} ± {noise:.1g}, median {np.nanmedian(found.value):.4g}"
        note += f", a_w = {found.window:.4g}; "
    if rises:
        note += f"a_t < 0 at {rises} of {known} steps; "
    elif not out and signs:
        note += "a_t > 0 wherever rounding leaves its sign known; "
    if out:
        note += f"the step from epoch {evidence.steps[-1]} leads out of what is finite; "
    if known > signs:
        note += f"rounding hides the sign at {known - signs} of {known}; "
    verdict = Verdict(
        "descent", REFERENCE, outcome, measured=measured, bound=0.0, margin=margin, step=step, units="1",
        note=note + unseen,
    )  # fmt: skip
    return verdict.with_parts(*_window(found), *_exact_steps(evidence))


def _window(found: Decrease) -> tuple[Verdict, ...]:
    if math.isnan(found.window):
        return ()
    clear = abs(found.window) > found.window_noise
    outcome: Outcome = "undecided" if not clear else "not refuted" if found.window > 0 else "refuted"
    note = f"a_w = Σ (L_t - L_(t+1)) / Σ η_t ‖∇L_t‖² over {found.at.size} steps, ± {found.window_noise:.1g}"
    return (Verdict("window", REFERENCE, outcome, measured=found.window, bound=0.0, units="1", note=note),)


def _exact_steps(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return what is proved of one step of exact gradient descent from every probe: a_t lies between two bounds."""
    lower, upper = (evidence.probe(f"probe_decrease_{end}") for end in ("lower", "upper"))
    known = np.flatnonzero(np.isfinite(lower) & np.isfinite(upper))
    if not known.size:
        return ()
    rises, falls = known[upper[known] < 0], known[lower[known] > 0]
    outcome: Outcome = "refuted" if rises.size else "proved" if falls.size == known.size else "undecided"
    worst = int(known[np.argmin(lower[known])])
    note = f"one exact step of η = {evidence.number('learning_rate'):.4g} from each of {known.size} probes: a_t > 0 is "
    note += f"proved at {falls.size}, a_t < 0 at {rises.size}; a_t in "
    note += f"[{at_least(lower[worst], 6)}, {at_most(upper[worst], 6)}] at the least, epoch {evidence.epochs[worst]}"
    return (
        Verdict(
            "exact_step", REFERENCE, outcome, measured=float(lower[worst]), bound=0.0, step=int(evidence.epochs[worst]),
            units="1", note=note,
        ),
    )  # fmt: skip


DESCENT = Claim(
    id="descent",
    reference=REFERENCE,
    statement="Every step along the gradient lowers the loss by a positive multiple of η_t ‖∇L_t‖².",
    latex=r"L_{t+1} = L_t - a_t\,\eta_t \|\nabla L_t\|^2 \quad \text{with } a_t > 0",
    needs=("step_size", "step_deviation", "step_rounding"),
    check=decrease,
    example=linear_regression,
)
