"""Losses of a run against a curve that bounds them."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.theory.evidence import LOSS_UNITS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor


@dataclass(frozen=True)
class Leaving:
    """The step that leads out of what is finite.

    Attributes:
        step: from where.
        seen: whether the step itself was.
        note: both in words.
    """

    step: int
    seen: bool
    note: str


def diverges(evidence: Evidence) -> Leaving | None:
    """Return the step by which a run leaves what is finite, where no bound of its loss holds; None where none does."""
    if evidence.diverged_at is None or not evidence.end:
        return None
    step, seen = int(evidence.steps[-1]), bool(np.isfinite(evidence.series("step_size")[-1]))
    note = f"the step from epoch {step} leads out of what is finite"
    return Leaving(step, seen, note if seen else f"the run leaves what is finite by epoch {evidence.diverged_at}")


def held(
    evidence: Evidence,
    name: str,
    bound: Float[np.ndarray, " k"],
    at: Int[np.ndarray, " k"],
    proof: bool,
    note: str,
    *,
    reference: str = "Theorem 5.7",
) -> Verdict:
    """Hold the losses at the positions `at` against a curve; the first that breaks it is shown, or the last."""
    loss, noise = evidence.series("loss")[at], evidence.loss_noise[at]
    slack = 2 * noise + 2 * noise[0]
    broken, open_ = np.flatnonzero(loss > bound + slack), ~np.isfinite(bound + slack)
    worst = int(broken[0]) if broken.size else bound.size - 1
    outcome: Outcome = (
        "refuted" if broken.size else "undecided" if open_.any() else "proved" if proof else "not refuted"
    )
    return Verdict(
        name,
        reference,
        outcome,
        measured=float(loss[worst]),
        bound=float(bound[worst]),
        margin=factor(float(loss[worst]), float(bound[worst])),
        step=int(evidence.steps[at[worst]]),
        units=LOSS_UNITS,
        note=note,
    )
