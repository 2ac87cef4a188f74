"""Claim `local_pl`: the PL inequality of Theorem 5.4."""

import math

import numpy as np

from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import LOSS_UNITS, SUMS, Evidence
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, at_least, factor

TOP = 10
"""Leading eigenvectors whose share of the residual is told."""


def mu_lower(evidence: Evidence) -> float:
    """Return a proved lower bound of μ = λ_0 - L_Θ r for the sum loss, NaN where none is proved.

    r is the largest drift, which is known where every iterate was seen.
    """
    budget, upper = evidence.budget, evidence.lipschitz_upper
    known = evidence.whole or upper == 0
    if budget is None or not budget.certified or math.isnan(upper) or not known:
        return NAN
    return budget.lower - upper * evidence.proof_radius


def local_pl(evidence: Evidence) -> Verdict:
    """Theorem 5.4: ½‖∇L‖² >= (μ/s) L on the region, with μ = λ_0 - L_Θ r, where μ > 0; the theorem is silent otherwise.

    `measured` is the least ratio ½‖∇L‖²/L of the run. Parts: the pointwise form at every probe, the measured envelope.
    """
    reference, budget, s = "Theorem 5.4", evidence.budget, evidence.s
    ratio = evidence.summary.bracket[0][: evidence.end]
    worst = int(np.nanargmin(ratio)) if np.isfinite(ratio).any() else 0
    measured, mu = float(ratio[worst]), mu_lower(evidence)
    condition, positive = evidence.verdict("compatibility"), evidence.verdict("ntk_positive")
    outcome, bound, inconsistent = "undecided", NAN, False
    if budget is None:
        note = "λ_0 was not measured"
    elif condition.outcome == "refuted" or positive.outcome == "refuted":
        bound = (budget.value - condition.measured) / s
        outcome = "not applicable"
        note = f"μ <= λ_0 - L_Θ r = {bound * s:.3g} (sum loss), not positive: the theorem is silent, not false"
    elif mu > 0:
        bound, outcome = mu / s, "proved"
        note = f"μ >= {at_least(mu, 6)} for the sum loss, {at_least(bound, 6)} in units of L"
        loss, gradient = evidence.series("loss"), evidence.series("grad_sq_norm")
        short = bound * (loss - evidence.loss_noise) - 0.5 * (gradient + evidence.gradient_noise)
        short = short[evidence.seen]
        if (short > 0).any():
            outcome, inconsistent = "refuted", True
            note += "; the run breaks it, which a proved inequality cannot"
        elif not np.isfinite(short).all():
            outcome, note = "undecided", f"{note}; rounding has no finite bound, so the run cannot be held against it"
    elif condition.met:
        bound = (budget.value - condition.measured) / s
        outcome = "not refuted"
        note = f"μ <= {bound * s:.4g} for the sum loss, {bound:.4g} in units of L; L_Θ is not bounded from above"
    else:
        note = condition.note
    verdict = Verdict(
        "local_pl",
        reference,
        outcome,
        measured=measured,
        bound=bound,
        margin=factor(bound, measured),
        step=int(evidence.steps[worst]),
        units=LOSS_UNITS,
        note=note,
        inconsistent=inconsistent,
    )
    return verdict.with_parts(*_pointwise(evidence), *_envelope(evidence))


def _pointwise(evidence: Evidence) -> tuple[Verdict, ...]:
    needed = ("probe_loss", "probe_grad_sq_norm", "ntk_min_eig")
    if evidence.trace or not all(evidence.has(name) for name in needed):
        return ()
    s = evidence.probe_scale
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = 0.5 * evidence.probe("probe_grad_sq_norm") / evidence.probe("probe_loss")
        guaranteed = evidence.probe("ntk_min_eig") / s
        # The kernel's error, and that of loss and gradient in float64.
        slack = evidence.kernel_error / s + SUMS * ratio
        looseness = np.where(guaranteed > 0, ratio / guaranteed, np.inf)
    kept = (evidence.probe("probe_loss") > 0) & np.isfinite(slack)
    broken = kept & ~(ratio >= guaranteed - slack)
    if not kept.any():
        return ()
    places = np.flatnonzero(broken) if broken.any() else np.flatnonzero(kept)
    worst = int(places[np.argmin(looseness[places])])
    outcome: Outcome = "proved" if evidence.certified.all() else "not refuted"
    part = Verdict(
        "pointwise",
        "Theorem 5.4 at one point",
        "refuted" if broken.any() else outcome,
        measured=float(ratio[worst]),
        bound=float(guaranteed[worst]),
        margin=float(looseness[worst]),
        step=int(evidence.epochs[worst]),
        units=LOSS_UNITS,
        note=f"½‖∇L‖² >= (λ_min(θ_t)/s) L at {int(kept.sum())} probes; here it is closest"
        + (f" ({evidence.partial}, with its own loss and gradient)" if evidence.partial else ""),
        inconsistent=bool(broken.any()),
    )
    return (part,)


def _envelope(evidence: Evidence) -> tuple[Verdict, ...]:
    regime, (low, high) = evidence.summary.regime, evidence.summary.envelope
    if not regime.stop:
        return ()
    inside = (evidence.at >= regime.start) & (evidence.at < regime.stop)
    first, last = evidence.steps[[regime.start, min(regime.stop, evidence.end) - 1]]
    # The envelope is of all data. λ_min of a partial kernel over the scale of all data is at least what the full kernel
    # guarantees, so an envelope above it is above the guarantee, and one below it decides nothing.
    least = evidence.probe("ntk_min_eig")[inside] / evidence.s
    guaranteed = float(np.nanmin(least)) if np.isfinite(least).any() else NAN
    below: Outcome = "undecided" if evidence.partial else "refuted"
    part = Verdict(
        "envelope",
        "Definition 4.1",
        "undecided" if math.isnan(guaranteed) else "not refuted" if low >= guaranteed else below,
        measured=low,
        bound=guaranteed,
        margin=factor(guaranteed, low),
        step=int(first),
        units=LOSS_UNITS,
        note=f"epochs {first} to {last}: {low:.3g} for L* = 0, {high:.3g} with the proxy"
        + (f"; against an upper bound of the full kernel's guarantee ({evidence.partial})" if evidence.partial else "")
        + _energy(evidence),
    )
    return (part,)


def _energy(evidence: Evidence) -> str:
    """Say how much of the residual lies along the leading eigenvectors, which is why the envelope exceeds λ_min/s."""
    if not (evidence.has("residual_energy") and evidence.has("spectrum")):
        return ""
    energy, spectrum = (np.asarray(evidence.arrays[name]) for name in ("residual_energy", "spectrum"))
    known = np.flatnonzero(np.isfinite(energy).all(axis=1))
    first, last = known[0], known[-1]
    k = min(TOP, energy.shape[1])
    shares = [f"{energy[i, -k:].sum():.1%} at epoch {evidence.epochs[i]}" for i in dict.fromkeys((first, last))]
    form, rayleigh = energy[last] * spectrum[last], evidence.probe("ntk_rayleigh")[last]
    whole = rayleigh if "spectrum_rest" in evidence.arrays and np.isfinite(rayleigh) else form.sum()
    return (
        f"; {k} of {evidence.kernel_size} eigenvectors hold {', '.join(shares)} of ‖r‖²"
        f" and {form[-k:].sum() / whole:.1%} of rᵀΘr"
    )


LOCAL_PL = Claim(
    id="local_pl",
    reference="Theorem 5.4",
    statement="On the region the squared gradient is at least a multiple of the loss.",
    latex=r"\tfrac12\|\nabla L\|^2 \ge \tfrac{\mu}{s} L, \quad \mu = \lambda_0 - L_\Theta\, r > 0",
    needs=("probe_epoch", "ntk_min_eig", "ntk_shift"),
    rests_on=Rests(every_kernel=("pointwise",), kernels=("", "envelope")),
    loss=("squared",),
    check=local_pl,
    example=linear_regression,
)
