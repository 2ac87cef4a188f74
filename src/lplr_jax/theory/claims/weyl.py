"""Claim `weyl`: the least eigenvalue moves by no more than the kernel does."""

import math

import numpy as np

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.claims.ntk_lipschitz import AFFINE
from lplr_jax.theory.evidence import KERNEL_UNITS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor

NORM_ERROR = 1e-6
"""Relative amount by which a measured ‖Θ_t - Θ_0‖₂ may stay below the norm."""


def weyl(evidence: Evidence) -> Verdict:
    """Lemma 5.3: |λ_min(θ_t) - λ_0| <= ‖Θ_t - Θ_0‖₂ at every probe.

    It holds for any two symmetric matrices, so a failure is the tool's.
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
    )


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
