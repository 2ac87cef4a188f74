"""Claim `lqcr`: the curvature bound and the descent condition of Definition 4.2."""

import math

import numpy as np

from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import SUMS, Evidence
from lplr_jax.theory.verdict import NAN, Verdict, weakest

CONVEX = ("squared",)
"""Losses known to be convex in the outputs."""


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
    if evidence.affine and evidence.loss in CONVEX:
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
        inner, distance, size, kept = np.zeros(0), np.zeros(0), np.zeros(0), np.zeros(0, bool)
    else:
        # θ_T is the last probe; L(θ) > L(θ') is the definition's own condition.
        distance = np.asarray(evidence.arrays["param_pair_distance"], np.float64)[:, -1]
        inner, loss = evidence.probe("lqcr_inner"), evidence.probe("probe_loss")
        # The size of the inner product's rounding; without it no sign is read.
        size = np.sqrt(evidence.probe("probe_grad_sq_norm")) * distance
        kept = np.isfinite(inner) & np.isfinite(distance) & (distance > 0) & (loss > loss[-1])
    note, value, per_length, step, outcome = "no probe lies above the last one", NAN, NAN, None, "undecided"
    if kept.any():
        constants = np.where(kept, inner, np.inf) / np.where(kept, distance, 1.0) ** 2
        worst = int(np.argmin(constants))
        value, step = float(constants[worst]), int(evidence.epochs[worst])
        per_length = float((inner[kept] / distance[kept]).min())
        # The inner product is a sum in float64 of p products.
        noise = SUMS * float(size[worst])
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


LQCR = Claim(
    id="lqcr",
    reference="Definition 4.2",
    statement="The curvature is bounded from below, and the gradient points away from the end of the run.",
    latex=r"\nabla^2 L \succeq -\varepsilon I, \quad"
    r" \langle \nabla L(\theta), \theta - \theta' \rangle \ge a \|\theta - \theta'\|^2",
    needs=("probe_epoch", "probe_loss", "probe_grad_sq_norm", "lqcr_inner", "param_pair_distance"),
    rests_on=Rests(kernels=("", "descent"), hessians=("", "curvature")),
    check=lqcr,
    example=linear_regression,
)
