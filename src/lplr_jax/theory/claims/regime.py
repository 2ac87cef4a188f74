"""Claim `regime`: when the run leaves the local regime, and what breaks first."""

import numpy as np

from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.descent import descent, descent_breaks
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import KERNEL_UNITS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor


def regime(evidence: Evidence) -> Verdict:
    """When the run is out of the local regime, and which claim broke first.

    Three things end it: ‖Θ_t - Θ_0‖₂ reaches λ_0, which breaks (c) for every region that contains the run so far; λ_min
    is no longer known to be positive; a step breaks the descent lemma, which is asked of runs that were seen to be
    gradient descent. Kernels are known at probes alone, so the first two are dated "by" a probe.
    """
    events = _events(evidence)
    if not events:
        whole = evidence.verdict("compatibility")
        outcome: Outcome = whole.outcome if whole.met else "undecided"
        note = "nothing breaks along the run" if whole.met else whole.note
        if outcome == "proved" and evidence.method.kind != "other" and not evidence.method.everywhere:
            outcome, note = "not refuted", f"{note}; {evidence.method.coverage}"
        return Verdict("regime", "section 5", outcome, note=note).with_parts(*_phases(evidence))
    events.sort(key=lambda event: event[:2])
    epoch, _, claim, words = events[0]
    others = "; ".join(f"{other} {text}" for _, _, other, text in events[1:])
    verdict = Verdict(
        "regime",
        "section 5",
        "refuted",
        measured=float(epoch),
        bound=float(evidence.record["epoch"][-1]),
        step=epoch,
        units="epochs",
        note=f"{claim} breaks first, {words}" + (f"; then {others}" if others else ""),
    )
    return verdict.with_parts(*_phases(evidence))


def _kernel_exit(evidence: Evidence) -> int | None:
    """Return the first probe at which the kernel has moved by λ_0 or more, whatever L_Θ is."""
    budget = evidence.budget
    if budget is None or not evidence.has("ntk_shift"):
        return None
    moved = evidence.probe("ntk_shift") - evidence.kernel_error - evidence.kernel_error[0]
    out = np.flatnonzero((moved >= max(budget.upper, 0.0)) & (moved > 0))
    return int(evidence.epochs[out[0]]) if out.size else None


def _events(evidence: Evidence) -> list[tuple[int, int, str, str]]:
    events = []
    left = _kernel_exit(evidence)
    if left is not None:
        events.append((left, 2, "compatibility", f"by epoch {left}"))
    elif evidence.verdict("compatibility").outcome == "refuted":
        events.append((int(evidence.steps[-1]), 2, "compatibility", "over the run as a whole"))
    intervals = [evidence.interval(k) for k in range(evidence.epochs.size)]
    lost = [int(t) for t, i in zip(evidence.epochs, intervals, strict=True) if i.lower <= 0]
    if lost:
        events.append((lost[0], 1, "ntk_positive", f"by epoch {lost[0]}"))
    if evidence.method.kind == "gradient descent":
        breaks = descent_breaks(evidence)
        if breaks.size:
            at, back = int(evidence.steps[breaks[0]]), int(evidence.steps[breaks[-1]]) + 1
            words = f"with the step from epoch {at} (the loss does not descend as η <= 1/β implies)"
            words += f", in order again from epoch {back}" if back < evidence.record["epoch"][-1] else ""
            events.append((at, 0, "linear_rate", words))
    if evidence.diverged_at is not None:
        events.append((evidence.diverged_at, 3, "run", f"diverged at epoch {evidence.diverged_at}"))
    return events


def _phases(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return the two regimes apart: that of the theorem, and that in which the loss descends."""
    parts = []
    budget, left = evidence.budget, _kernel_exit(evidence)
    if budget is not None and evidence.has("ntk_shift"):
        at = -1 if left is None else int(np.flatnonzero(evidence.epochs == left)[0])
        shift = float(evidence.probe("ntk_shift")[at])
        condition = evidence.verdict("compatibility")
        parts.append(
            Verdict(
                "theorem",
                "Assumption 5.1 (c)",
                "refuted" if left is not None else condition.outcome if condition.met else "undecided",
                measured=shift,
                bound=budget.value,
                margin=factor(shift, budget.value),
                step=int(evidence.epochs[at]),
                units=KERNEL_UNITS,
                note="‖Θ_t - Θ_0‖₂ against λ_0"
                + ("" if left is None else f", out of the theorem's reach by epoch {left}"),
            )
        )
    if evidence.method.kind == "gradient descent":
        parts.append(descent(evidence))
    return tuple(parts)


REGIME = Claim(
    id="regime",
    reference="section 5",
    statement="The run stays where the hypotheses hold and every step descends.",
    latex=r"\|\Theta_t - \Theta_0\|_2 < \lambda_0, \quad \lambda_{\min}(\theta_t) > 0,"
    r" \quad L_{t+1} \le L_t - \tfrac{\eta}{2}\|\nabla L_t\|^2",
    needs=("probe_epoch", "ntk_min_eig", "ntk_shift"),
    rests_on=Rests(every_kernel=("",), kernels=("theorem",)),
    check=regime,
    example=linear_regression,
)
