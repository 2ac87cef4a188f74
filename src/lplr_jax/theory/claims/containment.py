"""Claim `containment`: derived from θ_0, where the paper assumes that the run stays. Ours, not the paper's.

Squared loss, σ_0 = √λ_0, h = L_J ‖r_0‖/λ_0, J Lipschitz with L_J on the ball of radius R* = (σ_0/L_J)(1 - √(1 - 2h/a)).
With the decrease test for one a on all steps, ‖r_t‖ - ‖r_{t+1}‖ >= a σ_min(J_t) Δℓ >= a (σ_0 - L_J ℓ_t) Δℓ for the
length ℓ of the path; summed, a decreasing function of ℓ lies above its integral, so that h < a/2 keeps ℓ below R*.
Where J is constant, L_J -> 0 gives R* = ‖r_0‖/(a σ_0).

All iterates would lie where L_J ℓ < σ_0, so one ‖J_t - J_0‖₂ >= σ_0 refutes it. The mean of (J_t - J_0)(J_t + J_0)ᵀ and
its transpose is Θ_t - Θ_0, hence ‖J_t - J_0‖₂ >= ‖Θ_t - Θ_0‖₂/(√λ_max(Θ_t) + √λ_max(Θ_0)): what every record holds.
"""

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.schema import JACOBIAN
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.decrease import decrease_of, not_descending
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import SUMS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, at_least, at_most, factor

REFERENCE = "ours (containment)"


def jacobian_shift(evidence: Evidence) -> Float[np.ndarray, " k"]:
    """Return a lower bound of ‖J_t - J_0‖₂ at every probe, less the errors of both kernels; NaN where there is none."""
    size = evidence.kernel_size
    upper = evidence.probe("ntk_max_eig_upper")
    if "spectrum" in evidence.arrays and not evidence.trace:
        top = np.asarray(evidence.arrays["spectrum"], np.float64)[:, -1]
        # LAPACK's eigenvalues are off by a small multiple of size · u · λ_max.
        upper = np.where(np.isfinite(upper), upper, top * (1 + 16 * size * UNIT_64) + evidence.kernel_error)
    if not (evidence.epochs.size and evidence.epochs[0] == 0):
        return np.full(evidence.epochs.size, np.nan)
    error = evidence.kernel_error
    # A Ritz value is at most the norm, up to the rounding of its Rayleigh quotient.
    shift = evidence.probe("ntk_shift") * (1 - 8 * size * UNIT_64) - error - error[0]
    roots = (np.sqrt(np.maximum(upper, 0.0)) + math.sqrt(max(float(upper[0]), 0.0))) * (1 + 8 * UNIT_64)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(roots > 0, np.maximum(shift, 0.0) / roots, 0.0 * roots)


def containment(evidence: Evidence) -> Verdict:
    """Hold h = L_J ‖r_0‖/λ_0 < a/2, with the decrease test for a on all steps, against what the run shows.

    "refuted" where one ‖J_t - J_0‖₂, bounded from below by kernels, reaches σ_0: for every a and L_J one of the two
    fails; and where every step before t was seen, with a_τ > 0 beyond rounding, h < a/2 itself fails for every a up to
    the least of them, which the note says. "proved" where every step is seen to be gradient descent with η <= 1/β for a
    proved β, and J is constant with λ_0 > 0 proved, or the proved L_J of the ball gives h < ¼. Else "not refuted": a
    proved L_J is an upper bound, so that h < a/2 stays open.
    """
    verdict, restart = _from_the_start(evidence), _restart(evidence)
    proof = next((part for part in restart if part.outcome == "proved" and part.step == 0), None)
    if proof is not None and verdict.outcome in ("not refuted", "undecided"):
        verdict = replace(proof, claim="containment")
    return verdict.with_parts(*restart)


def _from_the_start(evidence: Evidence) -> Verdict:
    stopped = not_descending(evidence)
    if stopped:
        return Verdict("containment", REFERENCE, stopped[0], note=stopped[1])
    budget, moved = evidence.budget, evidence.epochs > 0
    if evidence.trace:
        note = "an output-averaged kernel says nothing of the Jacobian"
        return Verdict("containment", REFERENCE, "not applicable", note=note)
    if budget is None or not moved.any():
        return Verdict(
            "containment", REFERENCE, "undecided", note="no kernel after epoch 0 was measured, or none there"
        )
    if evidence.affine:
        return _constant(evidence)
    shift, limit = jacobian_shift(evidence), math.sqrt(max(budget.upper, 0.0)) * (1 + 8 * UNIT_64)
    known = np.isfinite(shift) & moved
    if not known.any():
        note = "no upper bound of λ_max is recorded, nor a spectrum, so the Jacobian's motion has no lower bound"
        return Verdict("containment", REFERENCE, "undecided", note=note)
    broken = np.flatnonzero(known & (shift >= limit) & (shift > 0))
    worst = int(np.argmax(np.where(known, shift, -np.inf)))
    outcome: Outcome = "refuted" if broken.size else "not refuted"
    of = f" ({evidence.partial}: λ_0 of all is no larger)" if evidence.partial else ""
    note = (
        f"‖J_t - J_0‖₂ >= {at_least(shift[worst], 3)} at epoch {evidence.epochs[worst]} against σ_0 = {limit:.3g}{of}"
    )
    if broken.size:
        first = int(broken[0])
        note += f"; reached by epoch {evidence.epochs[first]}: {_refuted(evidence, first)}"
    else:
        note += "; no proved L_J is small enough, so h < a/2 stays open"
        outcome = "not refuted" if budget.lower > 0 else "undecided"
    return Verdict(
        "containment", REFERENCE, outcome, measured=float(shift[worst]), bound=limit,
        margin=factor(float(shift[worst]), limit), step=int(evidence.epochs[worst]), units=JACOBIAN, note=note,
    )  # fmt: skip


def _restart(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return whether the theorem, with a probe's θ_t as its centre and a = ½, proves all that comes after it."""
    ratio, smooth = evidence.probe("restart_ratio"), evidence.probe("restart_smoothness")
    known = np.flatnonzero(np.isfinite(ratio) & np.isfinite(smooth)) if not evidence.partial else np.zeros(0, int)
    if not known.size or not_descending(evidence):
        return ()
    method, eta = evidence.method, evidence.eta * (1 + 8 * UNIT_64)
    holds = known[(ratio[known] < 1) & (eta * smooth[known] <= 1)]
    at = int(holds[0]) if holds.size else int(known[np.argmin(ratio[known])])
    plain = method.plain and method.everywhere
    outcome: Outcome = "proved" if holds.size and plain else "undecided"
    note = f"4 L_J ‖r_t‖/λ_min(Θ_t) = {ratio[at]:.3g} at epoch {evidence.epochs[at]}, 1 is needed"
    if holds.size:
        reach = evidence.probe("restart_radius")[at]
        note += f": exact gradient descent stays within {at_most(reach, 3)} of θ_t and its loss falls linearly to 0"
        note += "" if plain else "; but not every step was seen to be one of it"
    elif (ratio[known] < 1).any():
        note += "; η <= 1/β is not proved there"
    return (
        Verdict(
            "restart", REFERENCE, outcome, measured=float(ratio[at]), bound=1.0, margin=factor(float(ratio[at]), 1.0),
            step=int(evidence.epochs[at]), units="1", note=note,
        ),
    )  # fmt: skip


def _refuted(evidence: Evidence, first: int) -> str:
    """Return what a Jacobian that moved by σ_0 by a probe refutes: h < a/2 itself, or that together with the test."""
    found, stop = decrease_of(evidence), int(evidence.at[first])
    before = found.at < stop
    least = (found.value - found.noise)[before]
    if found.covers(0, stop) and least.size and bool((least > 0).all()):
        return f"h < a/2 fails for every a up to {least.min():.3g}, the least a_t before, whatever L_J is"
    return "for every a and L_J, h < a/2 fails or the decrease test does"


def _constant(evidence: Evidence) -> Verdict:
    """Return the verdict where J does not depend on θ, so that h = 0: the path is at most ‖r_0‖/(a σ_0)."""
    budget, method = evidence.budget, evidence.method
    assert budget is not None
    steep = evidence.eta * evidence.number("smoothness_upper") * (1 + 8 * UNIT_64)
    reasons = [
        *([] if budget.lower > 0 and budget.certified else ["λ_0 > 0 is not proved"]),
        *([] if steep <= 1 else ["η <= 1/β is not proved"]),
        *([] if method.plain and method.everywhere and evidence.whole else ["not every step was seen to be one of it"]),
    ]
    if reasons:
        return Verdict("containment", REFERENCE, "undecided", note=f"J is constant, h = 0; but {', '.join(reasons)}")
    a, loss = 1 - steep / 2, float(evidence.series("loss")[0] + evidence.loss_noise[0])
    bound = math.sqrt(2 * evidence.s * loss) / (a * math.sqrt(budget.lower)) * (1 + SUMS)
    broken = evidence.radius > bound
    note = f"J is constant, h = 0: the path is at most ‖r_0‖/(a σ_0), a = {a:.3g}"
    return Verdict(
        "containment", REFERENCE, "refuted" if broken else "proved", measured=evidence.radius, bound=bound,
        margin=factor(evidence.radius, bound), units="parameter", note=note, inconsistent=broken,
    )  # fmt: skip


CONTAINMENT = Claim(
    id="containment",
    reference=REFERENCE,
    statement="The residual is so small beside the kernel that the run cannot leave a ball around its start.",
    latex=r"h = L_J \|r_0\| / \lambda_0 < a/2 \;\Rightarrow\;"
    r" \ell \le \tfrac{\sigma_0}{L_J}\bigl(1 - \sqrt{1 - 2h/a}\bigr), \quad"
    r" \|J_t - J_0\|_2 \ge \tfrac{\|\Theta_t - \Theta_0\|_2}{\sqrt{\lambda_{\max}(\Theta_t)}"
    r" + \sqrt{\lambda_{\max}(\Theta_0)}}",
    needs=("probe_epoch", "ntk_min_eig", "ntk_shift", "step_size", "step_deviation", "step_rounding"),
    rests_on=Rests(kernels=("",)),
    loss=("squared",),
    check=containment,
    example=linear_regression,
)
