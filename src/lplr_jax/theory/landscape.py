"""Claims about the landscape and the run as a whole: the LQCR constants, and when the run leaves the local regime."""

import math

import numpy as np

from lplr_jax.theory.conclusions import descent, descent_breaks, other_method
from lplr_jax.theory.evidence import KERNEL_UNITS, Evidence
from lplr_jax.theory.hypotheses import compatibility
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, factor, weakest


def lqcr(evidence: Evidence) -> Verdict:
    """Definition 4.2 with the sign of Remark 4.3: a curvature bound -ε, and ⟨∇L(θ), θ - θ'⟩ >= a ‖θ - θ'‖².

    The second is measured along the run with θ' = θ_T, whose constant bounds every constant from above. A model affine
    in its parameters with p > n c has none on any ball: a displacement in the null space of J changes neither loss nor
    gradient.
    """
    curvature, slope = _curvature(evidence), _descent_condition(evidence)
    parts = tuple(part for part in (curvature, slope) if part is not None)
    if not parts:
        note = "neither curvature nor ⟨∇L, θ_t - θ_T⟩ was measured"
        return Verdict("lqcr", "Definition 4.2", "undecided", note=note)
    shown = slope or curvature
    assert shown is not None
    outcome = weakest(part.outcome for part in parts) if slope is not None else "undecided"
    note = "; ".join(part.note for part in (slope, curvature) if part is not None)
    note += f" ({evidence.partial}: of its own loss)" if evidence.partial else ""
    return shown.standing_for("lqcr", "Definition 4.2", outcome, note).with_parts(*parts)


def _curvature(evidence: Evidence) -> Verdict | None:
    least = evidence.probe("curvature_min")
    if evidence.affine:
        note = "ε = 0: the loss of a model affine in its parameters is convex"
        value, step, outcome = float(np.nanmin(least, initial=0.0)), None, "proved"
    elif np.isfinite(least).any():
        worst = int(np.nanargmin(least))
        value, step, outcome = float(least[worst]), int(evidence.epochs[worst]), "not refuted"
        note = f"ε >= {max(-value, 0.0):.3g}, from {int(np.isfinite(least).sum())} probes"
    else:
        return None
    return Verdict(
        "curvature", "Definition 4.2 (1)", outcome, measured=value, step=step, units="L / parameter²", note=note
    )


def _descent_condition(evidence: Evidence) -> Verdict | None:
    reference, rank = "Definition 4.2 (2)", int(evidence.number("n") * evidence.number("c"))
    units = "L / parameter²"
    hopeless = evidence.affine and evidence.number("p") > rank
    if not (evidence.has("lqcr_inner") and evidence.has("param_pair_distance")):
        if not hopeless:
            return None
        inner, distance, kept = np.zeros(0), np.zeros(0), np.zeros(0, bool)
    else:
        # θ_T is the last probe; L(θ) > L(θ') is the definition's own condition.
        distance = np.asarray(evidence.arrays["param_pair_distance"], np.float64)[:, -1]
        inner, loss = evidence.probe("lqcr_inner"), evidence.probe("probe_loss")
        kept = np.isfinite(inner) & np.isfinite(distance) & (distance > 0) & (loss > loss[-1])
    note, value, per_length, step, outcome = "no probe lies above the last one", NAN, NAN, None, "undecided"
    if kept.any():
        constants = np.where(kept, inner, np.inf) / np.where(kept, distance, 1.0) ** 2
        worst = int(np.argmin(constants))
        value, step = float(constants[worst]), int(evidence.epochs[worst])
        per_length = float((inner[kept] / distance[kept]).min())
        # The inner product is a sum in float64 of p products.
        size = math.sqrt(float(evidence.probe("probe_grad_sq_norm")[worst])) * distance[worst]
        noise = 1e-9 * size
        outcome = "not refuted" if inner[worst] > noise else "refuted" if inner[worst] < -noise else "undecided"
        note = f"no constant above {value:.3g} (distance squared), {per_length:.3g} (distance) holds on this run"
        if outcome == "refuted":
            note = f"⟨∇L, θ_t - θ_T⟩ < 0 at epoch {step}: no positive constant holds"
    if hopeless:
        outcome = "refuted"
        note = f"no positive constant on any ball: affine in p = {int(evidence.number('p'))} > n c = {rank} parameters"
    return Verdict(
        "descent",
        reference,
        outcome,
        measured=value,
        bound=0.0,
        margin=NAN if math.isnan(value) else (math.inf if value > 0 else 0.0),
        step=step,
        units=units,
        note=note,
    )


def regime(evidence: Evidence) -> Verdict:
    """When the run is out of the local regime, and which claim broke first.

    Three things end it: ‖Θ_t - Θ_0‖₂ reaches λ_0, which breaks (c) for every region that contains the run so far; λ_min
    is no longer known to be positive; a step breaks the descent lemma. Kernels are known at probes alone, so the first
    two are dated "by" a probe.
    """
    events = _events(evidence)
    if not events:
        whole = compatibility(evidence)
        outcome: Outcome = whole.outcome if whole.met else "undecided"
        note = "nothing breaks along the run" if whole.met else whole.note
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
    elif compatibility(evidence).outcome == "refuted":
        events.append((evidence.end - 1, 2, "compatibility", "over the run as a whole"))
    intervals = [evidence.interval(k) for k in range(evidence.epochs.size)]
    lost = [int(t) for t, i in zip(evidence.epochs, intervals, strict=True) if not i.lower > 0]
    if lost:
        events.append((lost[0], 1, "ntk_positive", f"by epoch {lost[0]}"))
    if not other_method(evidence):
        breaks = descent_breaks(evidence)
        if breaks.size:
            at = int(breaks[0])
            words = f"with the step from epoch {at} (the loss does not descend as η <= 1/β implies)"
            back = int(breaks[-1]) + 1
            words += f", in order again from epoch {back}" if back < evidence.record["epoch"].size - 1 else ""
            events.append((at, 0, "linear_rate", words))
    if evidence.record.diverged_at is not None:
        events.append((evidence.end, 3, "run", f"diverged at epoch {evidence.end}"))
    return events


def _phases(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return the two regimes apart: that of the theorem, and that in which the loss descends."""
    parts = []
    budget, left = evidence.budget, _kernel_exit(evidence)
    if budget is not None and evidence.has("ntk_shift"):
        at = -1 if left is None else int(np.flatnonzero(evidence.epochs == left)[0])
        shift = float(evidence.probe("ntk_shift")[at])
        condition = compatibility(evidence)
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
    if not other_method(evidence):
        parts.append(descent(evidence))
    return tuple(parts)
