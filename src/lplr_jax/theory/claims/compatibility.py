"""Claim `compatibility`: the kernel's motion over the region stays below its least eigenvalue."""

import math

import numpy as np

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.claims.ntk_lipschitz import directions
from lplr_jax.theory.evidence import KERNEL_UNITS, Evidence
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, at_least, at_most, factor


def compatibility(evidence: Evidence) -> Verdict:
    """Assumption 5.1 (c): L_Θ r < λ_0, with r the trajectory's largest drift.

    "refuted" where the lower estimate along the trajectory breaks it: then for every region that contains the run.
    "proved" where the upper bound on the ball of radius r satisfies it and that ball is known to hold the run: every
    iterate was seen, or L_Θ = 0 everywhere.
    """
    reference, budget, r = "Assumption 5.1 (c)", evidence.budget, evidence.radius
    low, high = evidence.ratio.value, evidence.lipschitz_upper
    if budget is None or not math.isfinite(low):
        note = "λ_0 or the shift of the kernel was not measured"
        return Verdict("compatibility", reference, "undecided", note=note)
    # The upper end of a subset's or averaged kernel bounds λ_0 from above all the same.
    refuted = low * r >= max(budget.upper, 0.0) and low * r > 0
    proved = high * evidence.proof_radius * (1 + 8 * UNIT_64) < budget.lower and budget.certified
    proved = proved and (evidence.whole or evidence.affine)
    outcome: Outcome = "refuted" if refuted else "proved" if proved else "not refuted"
    if not (refuted or budget.lower > 0):
        outcome = "undecided"
    excess = low * r / budget.value if budget.value > 0 else math.inf
    if refuted:
        note = f"L_Θ r exceeds λ_0 by the factor {excess:.2g}, on every region that contains the run"
    elif outcome == "proved" and evidence.affine:
        note = "L_Θ = 0"
    elif outcome == "proved":
        note = f"the upper bound gives L_Θ r <= {at_most(high * evidence.proof_radius, 3)}"
    elif outcome == "undecided":
        note = "λ_0 is not known to be positive"
    else:
        note = "the lower estimate satisfies it, which proves nothing"
    verdict = Verdict(
        "compatibility",
        reference,
        outcome,
        measured=low * r,
        bound=budget.value,
        margin=factor(low * r, budget.value),
        units=KERNEL_UNITS,
        note=note,
    )
    return verdict.with_parts(*_on_the_ball(evidence), *_certified_radius(evidence))


def _on_the_ball(evidence: Evidence) -> tuple[Verdict, ...]:
    budget, parts = evidence.budget, directions(evidence)
    if budget is None or not parts:
        return ()
    product = parts[0].measured * evidence.radius
    part = Verdict(
        "ball",
        "Assumption 5.1 (c)",
        "refuted" if product >= max(budget.upper, 0.0) and product > 0 else "not refuted",
        measured=product,
        bound=budget.value,
        margin=factor(product, budget.value),
        units=KERNEL_UNITS,
        note="the same on the whole ball of the run, with the worst direction found",
    )
    return (part,)


def _certified_radius(evidence: Evidence) -> tuple[Verdict, ...]:
    certified, r = evidence.number("radius_certified"), evidence.radius
    if math.isnan(certified):
        return ()
    gradient = float(np.sqrt(evidence.series("grad_sq_norm")[0])) if evidence.end else NAN
    step, spacing = evidence.eta * gradient, evidence.number("parameter_spacing")
    note = f"R* = {at_least(certified, 3)}: the theorem is proved inside"
    if math.isfinite(step):
        note += f"; η ‖∇L(θ_0)‖ = {step:.3g}"
    if math.isfinite(spacing):
        note += f", the float32 spacing of θ_0 {spacing:.3g}"
    part = Verdict(
        "radius",
        "Theorem 5.4",
        "proved" if evidence.whole and certified > evidence.proof_radius else "undecided",
        measured=r,
        bound=certified,
        margin=factor(r, certified),
        units="parameter",
        note=note,
    )
    return (part,)


COMPATIBILITY = Claim(
    id="compatibility",
    reference="Assumption 5.1 (c)",
    statement="Over the radius of the run the kernel moves by less than its least eigenvalue.",
    latex=r"L_\Theta\, r < \lambda_0",
    needs=("probe_epoch", "ntk_min_eig", "ntk_shift"),
    rests_on=Rests(kernels=("",)),
    check=compatibility,
    example=linear_regression,
)
