"""Claim `interpolation`: a network of zero loss exists near the run, so that L* is no proxy. Ours, not the paper's.

Newton-Kantorovich at a polished point θ̃ (`measurement.interpolation` has the proof): with h = L_J ‖r̃‖/λ <= ½, L_J on
the closed ball of radius t* = (√λ/L_J)(1 - √(1 - 2h)) around θ̃, a zero of f - y lies within t*. So L*_R = 0, the
infimum of the loss over B(θ_0, R), for every R >= R_0 = ‖θ̃ - θ_0‖ + t*.
"""

import math
from dataclasses import dataclass

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.theory.claims.claim import Claim
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import LOSS_UNITS, Evidence
from lplr_jax.theory.verdict import Verdict, at_least, at_most, factor

REFERENCE = "ours (Newton-Kantorovich)"
NEAREST = 1e-2
"""Stationarity from which on the note does not call the point the nearest one nearby: the square of it is the share of
the distance that Newton's method would still gain, 1e-4."""


def _up(value: float) -> float:
    """Round up what a few operations gave."""
    return value * (1 + 32 * UNIT_64)


@dataclass(frozen=True)
class Certificate:
    """What the recorded numbers of θ̃ certify.

    Attributes:
        h: L_J ‖r̃‖/λ, rounded up.
        reach: t*, rounded up; infinite where h > ½.
        radius: R_0, rounded up; infinite where nothing is certified.
        reason: why nothing is certified; empty where it is.
    """

    h: float
    reach: float
    radius: float
    reason: str


def certificate_of(evidence: Evidence) -> Certificate | None:
    """Return what is certified; None where no point was polished."""
    named = ("residual", "min_eig_lower", "jacobian_lipschitz", "ball", "distance")
    if not all(f"interpolant_{name}" in evidence.arrays for name in named):
        return None
    residual, least, bend, ball, distance = (evidence.number(f"interpolant_{name}") for name in named)
    nothing = math.inf
    if evidence.partial:
        return Certificate(nothing, nothing, nothing, f"the point is one of the {evidence.partial}")
    if not math.isfinite(residual + least):
        return Certificate(nothing, nothing, nothing, "the rounding of this network has no bound")
    if not least > 0:
        return Certificate(nothing, nothing, nothing, "λ_min(Θ(θ̃)) > 0 is not proved")
    if not math.isfinite(bend):
        return Certificate(nothing, nothing, nothing, "the Jacobian of this network has no proved Lipschitz constant")
    h = _up(bend * residual / least)
    if not h <= 0.5:
        return Certificate(h, nothing, nothing, f"h = {h:.3g} > ½")
    # (√λ/L_J)(1 - √(1 - 2h)) = 2 ‖r̃‖/√λ / (1 + √(1 - 2h)), which does not cancel.
    reach = _up(2 * residual / math.sqrt(least) / (1 + math.sqrt(max(1 - 2 * h, 0.0))))
    if not reach <= ball:
        return Certificate(
            h, nothing, nothing, f"t* = {reach:.3g} leaves the ball of radius {ball:.3g} that L_J holds on"
        )
    return Certificate(h, reach, _up(distance + reach), "")


def interpolation(evidence: Evidence) -> Verdict:
    """Hold h = L_J ‖r̃‖/λ_min(Θ(θ̃)) <= ½, formed anew and rounded up, from the recorded bounds of its three numbers.

    `measured` is h, the margin how many times ½ exceeds it. "proved" where it holds and t* stays in the ball that L_J
    was bounded on: L* = 0 is then a theorem on every ball around θ_0 of radius R_0, which the note has beside the
    drift; below R_0 nothing is said. "refuted" where equal inputs with unlike targets bound every loss away from 0: no
    function of each sample alone attains zero loss. Else "undecided".
    """
    floor, found = evidence.number("loss_floor_lower"), certificate_of(evidence)
    if floor > 0:
        contradiction = found is not None and not found.reason
        note = f"equal inputs have unlike targets: L >= {at_least(floor, 6)} for every function of each sample alone"
        least = float(evidence.series("loss").min(initial=math.inf))
        return Verdict(
            "interpolation", REFERENCE, "refuted", measured=least, bound=floor, margin=factor(floor, least),
            units=LOSS_UNITS, note=note, inconsistent=contradiction,
        )  # fmt: skip
    if found is None:
        note = "no point of zero loss was sought or reached (certify_floor)"
        return Verdict("interpolation", REFERENCE, "undecided", note=note)
    if found.reason:
        return Verdict(
            "interpolation", REFERENCE, "undecided", measured=found.h, bound=0.5, units="1", note=found.reason
        )
    drift = evidence.radius
    near = evidence.number("interpolant_stationarity") <= NEAREST
    how = "no zero of f - y nearby is nearer to θ_0, to first order" if near else "found on the way, not the nearest"
    where = f"zero loss is attained within R_0 = {at_most(found.radius, 6)} of θ_0, where the run drifted {drift:.4g}"
    note = f"{where}; L* = 0 on every ball from R_0 on, below it open; t* = {found.reach:.2g}: {how}"
    return Verdict(
        "interpolation", REFERENCE, "proved", measured=found.h, bound=0.5, margin=factor(found.h, 0.5), units="1",
        note=note,
    )  # fmt: skip


INTERPOLATION = Claim(
    id="interpolation",
    reference=REFERENCE,
    statement="A network of zero loss exists at a known distance from the initialisation.",
    latex=r"h = L_J \|\tilde r\| / \lambda_{\min}(\Theta(\tilde\theta)) \le \tfrac12 \;\Rightarrow\;"
    r" \min_{B(\theta_0, R)} L = 0 \ \text{ for } R \ge \|\tilde\theta - \theta_0\|"
    r" + \tfrac{\sigma}{L_J}\bigl(1 - \sqrt{1 - 2h}\bigr)",
    needs=("interpolant_residual",),
    loss=("squared",),
    check=interpolation,
    example=linear_regression,
)
