"""The descent lemma, held against every step that was seen."""

import math

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.theory.evidence import LOSS_UNITS, Evidence
from lplr_jax.theory.method import NOT_SEEN
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, factor


def step_sizes(evidence: Evidence) -> Float[np.ndarray, " t"]:
    """Return η of the step from each entry: the one η of a fixed step, else what was measured, NaN where it was not."""
    method = evidence.method
    fixed = method.fixed or method.kind == "unseen"
    return np.full(evidence.end, evidence.eta) if fixed else method.sizes


def loss_slack(evidence: Evidence, at: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
    """Return what rounding may add to L_{t+1} - L_t for the steps from the positions `at`, that of θ_{t+1} included."""
    gradient, noise = evidence.series("grad_sq_norm"), evidence.loss_noise
    # θ_{t+1} is itself rounded, which moves the loss by the gradient times the rounding of the parameters: as measured
    # on the step, or the spacing of θ_0.
    with np.errstate(invalid="ignore"):  # a step of length 0 has no relative rounding
        moved = evidence.series("step_rounding") * np.abs(evidence.series("step_size")) * np.sqrt(gradient)
    spacing = np.nan_to_num(evidence.number("parameter_spacing"), nan=0.0)
    rounded = np.where(np.isfinite(moved), moved, spacing)[at]
    return noise[at + 1] + noise[at] + np.sqrt(gradient[at + 1]) * rounded


def _judged(evidence: Evidence) -> tuple[Int[np.ndarray, " k"], Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return the positions of the steps that can be judged, by how much each falls short of the lemma, and the slack.

    A shortfall above the slack breaks L_{t+1} <= L_t - (η/2)‖∇L_t‖².
    """
    at, eta = evidence.seen_steps, step_sizes(evidence)
    if evidence.method.kind != "unseen":  # of a step that was not seen nobody knows that it was one of this method
        at = at[np.isfinite(evidence.series("step_size")[at])]
    loss, gradient = evidence.series("loss"), evidence.series("grad_sq_norm")
    slack = loss_slack(evidence, at)
    short = loss[at + 1] - loss[at] + 0.5 * eta[at] * (gradient[at] - evidence.gradient_noise[at])
    known = np.isfinite(short) & np.isfinite(slack)
    return at[known], short[known], slack[known]


def descent_breaks(evidence: Evidence) -> Int[np.ndarray, " k"]:
    """Return the positions t whose step breaks L_{t+1} <= L_t - (η/2)‖∇L_t‖² by more than rounding."""
    at, short, slack = _judged(evidence)
    breaks = at[short > slack]
    if evidence.diverged_at is not None and np.isfinite(evidence.method.sizes[-1:]).all():
        breaks = np.append(breaks, evidence.end - 1)  # the last step was seen, and led out of what is finite
    return np.unique(breaks)


def descent(evidence: Evidence) -> Verdict:
    """Hold every step that was seen against the descent lemma, which η <= 1/β implies for gradient descent."""
    judged, breaks = _judged(evidence)[0], descent_breaks(evidence)
    steps = int(np.union1d(judged, breaks).size)
    of = f"{steps} seen steps (of {evidence.method.total})"
    loss, gradient, eta = evidence.series("loss"), evidence.series("grad_sq_norm"), step_sizes(evidence)
    outcome: Outcome = "refuted" if breaks.size else "not refuted" if steps else "undecided"
    at = int(breaks[0]) if breaks.size else int(judged[0]) if judged.size else 0
    after = float(loss[at + 1]) if at + 1 < loss.size else (math.inf if breaks.size else NAN)
    promised = float(loss[at] - 0.5 * eta[at] * gradient[at])
    if breaks.size:
        last = int(evidence.steps[breaks[-1]]) + 1
        again = f", holds again from epoch {last}" if last < evidence.steps[-1] else ""
        note = f"the step from epoch {evidence.steps[at]} breaks the descent lemma, so η <= 1/β fails there"
        note += f" ({breaks.size} of {of}{again})"
    elif steps:
        note = f"the descent lemma holds at all {of}, to rounding"
    else:
        note = "no step can be judged"
    if evidence.method.kind == "unseen":
        held = f"L falls by (η/2)‖∇L‖² at {steps - breaks.size} of {of}"
        outcome, note = "undecided", f"{NOT_SEEN}; with the recorded η, {held}"
    return Verdict(
        "descent",
        "Theorem 5.7",
        outcome,
        measured=after,
        bound=promised,
        margin=factor(after, promised),
        step=int(evidence.steps[at]) if steps else None,
        units=LOSS_UNITS,
        note=note,
    )
