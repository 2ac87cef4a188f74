"""Claim `weyl`: the least eigenvalue moves by no more than the kernel does."""

import math

import numpy as np
from jaxtyping import Int

from lplr_jax.curves.pairs import UNIT_64, proof_radius
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.claims.ntk_lipschitz import AFFINE
from lplr_jax.theory.evidence import KERNEL_UNITS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, at_most, factor

NORM_ERROR = 1e-6
"""Relative amount by which a measured ‖Θ_t - Θ_0‖₂ may stay below the norm."""


def weyl(evidence: Evidence) -> Verdict:
    """Lemma 5.3: |λ_min(θ_t) - λ_0| <= ‖Θ_t - Θ_0‖₂ at every probe.

    It holds for any two symmetric matrices, so a failure is the tool's. The part `from_below`, ours, has what follows
    for λ_min(θ_t) from below, the larger of λ_0 - ‖Θ_t - Θ_0‖₂ and (√λ_0 - L_J ‖θ_t - θ_0‖)_+² with a proved L_J:
    neither is always the better one, and the second alone is proved, as the norm of the first is measured.
    """
    reference, budget = "Lemma 5.3", evidence.budget
    moved = evidence.epochs > 0
    if budget is None or not evidence.has("ntk_shift") or not moved.any():
        return Verdict("weyl", reference, "undecided", note="no kernel after epoch 0 was measured")
    at, shift = evidence.epochs[moved], evidence.probe("ntk_shift")[moved]
    error = evidence.kernel_error[moved] + evidence.kernel_error[0]
    others = [evidence.interval(int(k)) for k in np.flatnonzero(moved)]
    least = np.array([max(i.lower - budget.upper, budget.lower - i.upper, 0.0) for i in others])
    most = np.array([max(i.upper - budget.lower, budget.upper - i.lower) for i in others])
    change = np.abs(np.array([i.value for i in others]) - budget.value)
    known = np.isfinite(least) & np.isfinite(shift + error)
    broken = known & (least > shift * (1 + NORM_ERROR) + error)
    # A Ritz value is at most the norm, up to the rounding of its Rayleigh quotient.
    held = most <= shift * (1 - 8 * evidence.kernel_size * UNIT_64) - error
    certified = budget.certified and all(interval.certified for interval in others)
    outcome: Outcome = "refuted" if broken.any() else "not refuted" if known.all() else "undecided"
    if outcome == "not refuted" and certified and (held.all() or evidence.affine):
        outcome = "proved"
    with np.errstate(divide="ignore", invalid="ignore"):
        looseness = np.where(change > 0, shift / change, np.inf)
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmin(looseness))
    if broken.any():
        note = "the kernel or its spectrum is wrong: no two symmetric matrices do this"
    elif outcome == "undecided":
        note = "the error of a kernel or its motion is not known"
    elif evidence.affine:
        note = f"Θ is constant: {AFFINE}"
    else:
        finite = looseness[np.isfinite(looseness)]
        middle = float(np.median(finite)) if finite.size else math.inf
        note = (
            f"holds at {at.size} probes; loose by the factor {looseness[worst]:.2g} at best, {middle:.2g} in the median"
        )
    return Verdict(
        "weyl",
        reference,
        outcome,
        measured=float(change[worst]),
        bound=float(shift[worst]),
        margin=factor(float(change[worst]), float(shift[worst])),
        step=int(at[worst]),
        units=KERNEL_UNITS,
        note=note,
        inconsistent=bool(broken.any()),
    ).with_parts(*_from_below(evidence, np.flatnonzero(moved)))


def _from_below(evidence: Evidence, probes: Int[np.ndarray, " k"]) -> tuple[Verdict, ...]:
    """Return what the motion of Θ and that of J leave of λ_min, at the probe where it is closest to what is there."""
    slope, budget = evidence.number("jacobian_lipschitz_upper"), evidence.budget
    if budget is None or evidence.partial or not (math.isfinite(slope) and budget.lower > 0):
        return ()
    shift = (evidence.probe("ntk_shift") * (1 + NORM_ERROR) + evidence.kernel_error + evidence.kernel_error[0])[probes]
    p = int(evidence.number("p"))
    reach = np.array([proof_radius(evidence.series("drift")[at : at + 1], p) for at in evidence.at[probes]])
    kernel = budget.lower - shift
    moved = slope * reach * (1 + 4 * UNIT_64) if slope else np.zeros_like(reach)  # a radius may be infinite
    jacobian = np.square(np.maximum(math.sqrt(budget.lower) * (1 - 4 * UNIT_64) - moved, 0.0))
    jacobian = jacobian * (1 - 4 * UNIT_64)
    bound, found = np.fmax(kernel, jacobian), [evidence.interval(int(k)) for k in probes]
    upper = np.array([interval.upper for interval in found])
    known = np.isfinite(bound) & np.isfinite(upper)
    if not known.any():
        return ()
    broken = known & (bound > upper)
    gap = np.where(known, upper - bound, np.inf)
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmin(gap))
    certified = budget.certified and all(interval.certified for interval in found) and bool(known.all())
    certified = certified and bool((kernel <= np.fmax(jacobian, 0.0)).all())
    larger = "the kernel's" if kernel[worst] >= jacobian[worst] else "the Jacobian's"
    note = f"λ_min from below: {kernel[worst]:.4g} by the motion of the kernel, {jacobian[worst]:.4g} by that of the "
    note += f"Jacobian, L_J <= {at_most(slope, 3)} (ours); {larger} is the larger; {int((bound[known] > 0).sum())} of "
    note += f"{int(known.sum())} probes keep it above 0"
    return (
        Verdict(
            "from_below", "Lemma 5.3; ours", "refuted" if broken.any() else "proved" if certified else "not refuted",
            measured=float(upper[worst]), bound=float(bound[worst]), units=KERNEL_UNITS, note=note,
            margin=factor(float(bound[worst]), float(upper[worst])), step=int(evidence.epochs[probes[worst]]),
            inconsistent=bool(broken.any()),
        ),
    )  # fmt: skip


WEYL = Claim(
    id="weyl",
    reference="Lemma 5.3",
    statement="The least eigenvalue of the kernel moves by no more than the kernel itself.",
    latex=r"|\lambda_{\min}(\theta_t) - \lambda_0| \le \|\Theta_t - \Theta_0\|_2",
    needs=("probe_epoch", "ntk_min_eig", "ntk_shift"),
    rests_on=Rests(every_kernel=("",)),
    on_failure="inconsistent",
    check=weyl,
    example=linear_regression,
)
