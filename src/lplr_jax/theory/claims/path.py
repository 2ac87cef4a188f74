"""Claim `path`: the drift and the length of the path against the time budget. Ours, not the paper's.

Σ η_t ‖∇L_t‖ <= √(Σ η_t) √(Σ η_t ‖∇L_t‖²) by Cauchy-Schwarz, and Σ η_t ‖∇L_t‖² = (L_0 - L_T) / a_w by the definition of
a_w, so the run stays in the ball of radius √((L_0 - L_T) Σ η_t / a_w): no PL constant, kernel or smoothness enters, and
single steps may raise the loss.
"""

import math

import numpy as np

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.decrease import Decrease, decrease_of, not_descending
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.claims.local_pl import mu_lower
from lplr_jax.theory.evidence import SUMS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor

REFERENCE = "ours (time budget)"


def path(evidence: Evidence) -> Verdict:
    """Hold the largest drift against √((L_0 - L_T) Σ η_t / a_w), the time budget of gradient descent with any η_t.

    Every step must have been seen, and a_w be positive by more than its rounding. drift <= path <= budget holds then
    for every network, so "refuted" says that the record contradicts itself; the ratios in (0, 1] say how much of the
    drift the budget explains. Parts: the path against the budget, the drift against the path, and the path under PL
    where λ_min is positive at every probe.
    """
    stopped = not_descending(evidence)
    if stopped:
        return Verdict("path", REFERENCE, stopped[0], note=stopped[1])
    found, last = decrease_of(evidence), evidence.end - 1
    if not (evidence.whole and found.covers(0, last)):
        missed = evidence.method.total - found.at.size
        note = f"{missed} of {evidence.method.total} steps were not seen, so the length of the path is not known"
        return Verdict("path", REFERENCE, "undecided", note=note)
    if not last:
        return Verdict("path", REFERENCE, "undecided", note="the run diverged at its first step")
    if not abs(found.window) > found.window_noise:
        note = f"a_w = {found.window:.3g} ± {found.window_noise:.1g}: its sign is not known"
        return Verdict("path", REFERENCE, "undecided", note=note)
    if found.window < 0:
        note = f"a_w = {found.window:.3g}: the loss rose over the run, so there is no budget"
        return Verdict("path", REFERENCE, "not applicable", note=note)
    gradient = evidence.series("grad_sq_norm")[:last]
    # As measured on the step: where rounding hides its direction its length is that of the part along the gradient.
    size, aside = np.abs(evidence.series("step_size")[:last]), evidence.series("step_deviation")[:last]
    steps = size * np.sqrt(gradient)
    length, budget, drift = float(steps.sum()), float(np.sqrt(size.sum() * (size * gradient).sum())), evidence.radius
    # The part of a step that is not along the gradient, and what rounding leaves open of the lengths.
    along = np.sqrt(np.maximum(1 - np.nan_to_num(aside) ** 2, 0.0))
    with np.errstate(divide="ignore", invalid="ignore"):
        across = np.where(along > 0, steps / along - steps, np.inf)
    sums = 4 * math.sqrt(evidence.number("p")) * max(evidence.unit, UNIT_64)
    slack = float(across.sum() + (size * evidence.gradient_error[:last]).sum()) + sums * (drift + length)
    slack = math.inf if math.isnan(slack) else slack
    whole = _held("path", drift, budget, slack, f"path {length:.3g}, budget {budget:.3g}; of drift and budget ")
    parts = (
        _held("length", length, budget, SUMS * budget, "Σ η_t ‖∇L_t‖, "),
        _held("drift", drift, length, slack, "against Σ η_t ‖∇L_t‖, "),
        *_under_pl(evidence, found, length),
    )
    return whole.with_parts(*parts)


def _outcome(small: float, large: float, slack: float) -> Outcome:
    return "undecided" if not math.isfinite(slack) else "refuted" if small > large + slack else "not refuted"


def _held(name: str, small: float, large: float, slack: float, note: str) -> Verdict:
    outcome = _outcome(small, large, slack)
    note += f"the ratio is {small / large:.3g}" if large > 0 else "both are 0"
    return Verdict(
        name, REFERENCE, outcome, measured=small, bound=large, margin=factor(small, large), units="parameter",
        note=note, inconsistent=outcome == "refuted",
    )  # fmt: skip


def _under_pl(evidence: Evidence, found: Decrease, length: float) -> tuple[Verdict, ...]:
    """Return the path against (1/a) √(2/μ) (√L_0 - √L_T): η_t ‖∇L_t‖ <= (L_t - L_{t+1}) / (a ‖∇L_t‖) under PL."""
    proved, least = mu_lower(evidence) / evidence.s, evidence.probe("ntk_min_eig") / evidence.s
    mu, note = proved, "μ proved"
    if not mu > 0:
        mu = float(np.nanmin(least)) if np.isfinite(least).any() and not evidence.partial else math.nan
        note = "μ = λ_min/s at the probes, not checked between"
    a, ends = found.least, evidence.series("loss")[[0, -1]]
    first, last = map(float, ends)
    if evidence.loss != "squared" or not mu > 0 or found.rises.any() or not (a > 0 and first >= last >= 0):
        return ()
    bound = math.sqrt(2 / mu) * (math.sqrt(first) - math.sqrt(last)) / a
    # What the rounding of a loss does to its root.
    noise = evidence.loss_noise[[0, -1]]
    roots = np.sqrt(ends + noise) - np.sqrt(ends)
    slack = math.sqrt(2 / mu) * float(roots.sum()) / a
    outcome = _outcome(length, bound, slack)
    note = f"Σ η_t ‖∇L_t‖ <= (1/a) √(2/μ) (√L_0 - √L_T), a = {a:.3g}, μ = {mu:.4g} in units of L ({note})"
    part = Verdict(
        "pl", REFERENCE, outcome, measured=length, bound=bound, margin=factor(length, bound), units="parameter",
        note=note,
    )  # fmt: skip
    return (part,)


PATH = Claim(
    id="path",
    reference=REFERENCE,
    statement="The drift stays within the time budget that the decrease of the loss leaves.",
    latex=r"\|\theta_t - \theta_0\| \le \textstyle\sum_t \eta_t \|\nabla L_t\|"
    r" \le \sqrt{(L_0 - L_T) \sum_t \eta_t / a_w}",
    needs=("step_size", "step_deviation", "step_rounding"),
    rests_on=Rests(kernels=("pl",)),
    on_failure="inconsistent",
    check=path,
    example=linear_regression,
)
