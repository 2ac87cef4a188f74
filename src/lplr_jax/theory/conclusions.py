"""Claims about the loss: the PL inequality of Theorem 5.4 and the linear rate of Theorem 5.7."""

import math

import numpy as np
from jaxtyping import Float

from lplr_jax.theory.evidence import HESSIAN_ERROR, Evidence
from lplr_jax.theory.hypotheses import compatibility, lipschitz_upper, ntk_positive
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, factor, weakest

LOSS_UNITS = "units of L"
TOP = 10
"""Leading eigenvectors whose share of the residual is told."""


def mu_lower(evidence: Evidence) -> float:
    """Return a proved lower bound of μ = λ_0 - L_Θ r for the sum loss, NaN where none is proved."""
    budget, upper = evidence.budget, lipschitz_upper(evidence)
    if budget is None or not budget.certified or math.isnan(upper):
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
    condition, positive = compatibility(evidence), ntk_positive(evidence)
    outcome, bound, inconsistent = "undecided", NAN, False
    if budget is None:
        note = "λ_0 was not measured"
    elif condition.outcome == "refuted" or positive.outcome == "refuted":
        bound = (budget.value - condition.measured) / s
        outcome = "not applicable"
        note = f"μ <= λ_0 - L_Θ r = {bound * s:.3g} (sum loss), not positive: the theorem is silent, not false"
    elif mu > 0:
        bound, outcome = mu / s, "proved"
        note = f"μ >= {mu:.6g} for the sum loss, {bound:.6g} in units of L"
        loss, gradient = evidence.series("loss"), evidence.series("grad_sq_norm")
        short = bound * (loss - evidence.loss_noise) - 0.5 * (gradient + evidence.gradient_noise)
        if (short > 0).any():
            outcome, inconsistent = "refuted", True
            note += "; the run breaks it, which a proved inequality cannot"
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
        step=worst,
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
        slack = evidence.kernel_error / s + 1e-9 * ratio
        looseness = np.where(guaranteed > 0, ratio / guaranteed, np.inf)
    kept = evidence.probe("probe_loss") > 0
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
    inside = (evidence.epochs >= regime.start) & (evidence.epochs < regime.stop)
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
        step=int(regime.start),
        units=LOSS_UNITS,
        note=f"epochs {regime.start} to {regime.stop - 1}: {low:.3g} for L* = 0, {high:.3g} with the proxy"
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
    form = energy[last] * spectrum[last]
    return (
        f"; {k} of {energy.shape[1]} eigenvectors hold {', '.join(shares)} of ‖r‖²"
        f" and {form[-k:].sum() / form.sum():.1%} of rᵀΘr"
    )


def linear_rate(evidence: Evidence) -> Verdict:
    """Theorem 5.7: L_t <= (1 - η μ)^t L_0 where μ > 0, η <= 1/β and every iterate stays in the region.

    "refuted" where the descent lemma or the bound fails on the run; "not applicable" under momentum, mini-batches or a
    schedule, and where a hypothesis is refuted. `measured` and `bound` belong to the bound that decides.
    """
    reference, other = "Theorem 5.7", other_method(evidence)
    if other:
        note = f"the theorem is about gradient descent with all data and a fixed step; {other}"
        return Verdict("linear_rate", reference, "not applicable", note=note)
    mu = mu_lower(evidence)
    step, lemma = _step_size(evidence), descent(evidence)
    bounds = _bounds(evidence, mu / evidence.s)
    parts = (step, lemma, *_containment(evidence), *bounds, _law(evidence))
    theorem = next((part for part in bounds if part.claim == "bound_theorem"), None)
    pointwise = next((part for part in bounds if part.claim == "bound_pointwise"), None)
    condition = compatibility(evidence)
    if lemma.outcome == "refuted":
        outcome, shown = "refuted", lemma
        note = lemma.note
    elif theorem is not None and theorem.outcome == "refuted":
        outcome, shown, note = "refuted", theorem, "the bound fails"
    elif condition.outcome == "refuted" or step.outcome == "refuted":
        outcome, shown = "not applicable", pointwise or step
        failed = [name for name, part in (("L_Θ r < λ_0", condition), ("η <= 1/β", step)) if part.outcome == "refuted"]
        note = (
            f"{' and '.join(failed)} refuted, so the theorem promises nothing; the parts tell what holds all the same"
        )
    elif theorem is not None:
        outcome, shown = weakest((step.outcome, lemma.outcome, theorem.outcome)), theorem
        if step.outcome == "proved" and lemma.met:
            outcome = theorem.outcome  # the lemma follows from η <= 1/β
        note = theorem.note
    else:
        outcome, shown = weakest((condition.outcome, step.outcome, lemma.outcome, "not refuted")), lemma
        note = "no positive μ is proved; nothing contradicts the rate"
    contradiction = outcome == "refuted" and mu > 0 and step.outcome == "proved"
    verdict = shown.standing_for("linear_rate", reference, outcome, note, inconsistent=contradiction)
    return verdict.with_parts(*parts)


def other_method(evidence: Evidence) -> str:
    """Return, in words, what sets the run apart from gradient descent with a fixed step; empty where nothing does."""
    config, n = evidence.record.config, int(evidence.number("n"))
    if not math.isfinite(evidence.eta):
        return "no step was taken"
    if config.get("momentum"):
        return f"momentum = {config['momentum']}"
    batch = config.get("batch_size")
    if batch is not None and int(batch) < n:
        return f"batch_size = {batch} of {n}"
    schedule = config.get("schedule")
    if schedule not in (None, "constant", "none"):
        return f"schedule = {schedule}"
    return ""


def _step_size(evidence: Evidence) -> Verdict:
    sharp, eta, upper = evidence.probe("sharpness"), evidence.eta, evidence.number("smoothness_upper")
    known = np.isfinite(sharp)
    worst = int(np.nanargmax(sharp)) if known.any() else None
    measured = eta * float(sharp[worst]) if worst is not None else NAN
    outcome: Outcome = "undecided"
    note = "the sharpness was not measured"
    if worst is not None:
        note = f"η β >= {measured:.3g} from {int(known.sum())} probes, which bound β from below"
        outcome = "refuted" if measured > 1 + HESSIAN_ERROR else "not refuted"
    if math.isfinite(upper) and eta * upper * (1 + 1e-15) <= 1:
        outcome, note = "proved", f"η β <= {eta * upper:.6g} on the ball of the run"
        measured = measured if math.isfinite(measured) else eta * upper
    return Verdict(
        "step_size",
        "Theorem 5.7",
        outcome,
        measured=measured,
        bound=1.0,
        margin=factor(measured, 1.0),
        step=None if worst is None else int(evidence.epochs[worst]),
        units="1",
        note=note,
    )


def descent_breaks(evidence: Evidence) -> np.ndarray:
    """Return the epochs t whose step breaks L_{t+1} <= L_t - (η/2)‖∇L_t‖² by more than rounding."""
    loss, gradient, noise = evidence.series("loss"), evidence.series("grad_sq_norm"), evidence.loss_noise
    # θ_{t+1} is itself rounded, which moves the loss by the gradient times the spacing of the parameters.
    spacing = np.nan_to_num(evidence.number("parameter_spacing"), nan=0.0)
    slack = noise[1:] + noise[:-1] + np.sqrt(gradient[1:]) * spacing
    gained = loss[:-1] - 0.5 * evidence.eta * (gradient[:-1] - evidence.gradient_noise[:-1]) - loss[1:]
    breaks = np.flatnonzero(gained < -slack)
    if evidence.record.diverged_at is not None and evidence.end:
        breaks = np.append(breaks, evidence.end - 1)
    return np.unique(breaks)


def descent(evidence: Evidence) -> Verdict:
    """Hold every step against the descent lemma, which η <= 1/β implies."""
    breaks, steps = descent_breaks(evidence), evidence.record["loss"].size - 1
    loss, gradient = evidence.series("loss"), evidence.series("grad_sq_norm")
    outcome: Outcome = "refuted" if breaks.size else "not refuted" if steps else "undecided"
    at = int(breaks[0]) if breaks.size else 0
    after = float(loss[at + 1]) if at + 1 < loss.size else (math.inf if breaks.size else NAN)
    promised = float(loss[at] - 0.5 * evidence.eta * gradient[at]) if loss.size else NAN
    if breaks.size:
        last = int(breaks[-1]) + 1
        again = f", holds again from epoch {last}" if last < loss.size - 1 else ""
        note = f"the step from epoch {at} breaks the descent lemma, so η <= 1/β fails there"
        note += f" ({breaks.size} of {steps} steps{again})"
    else:
        note = f"the descent lemma holds at all {steps} steps, to rounding"
    return Verdict(
        "descent",
        "Theorem 5.7",
        outcome,
        measured=after,
        bound=promised,
        margin=factor(after, promised),
        step=at if steps else None,
        units=LOSS_UNITS,
        note=note,
    )


def _containment(evidence: Evidence) -> tuple[Verdict, ...]:
    certified = evidence.number("radius_certified")
    if math.isnan(certified):
        return ()
    inside = evidence.series("drift") < certified
    left = int(np.argmin(inside)) if not inside.all() else None
    part = Verdict(
        "containment",
        "Theorem 5.7",
        "refuted" if left is not None else "proved" if certified > evidence.proof_radius else "undecided",
        measured=evidence.radius,
        bound=certified,
        margin=factor(evidence.radius, certified),
        step=left,
        units="parameter",
        note="every epoch stays in the ball of radius R*"
        if left is None
        else f"{left} of {inside.size} epochs lie in the ball of radius R*",
    )
    return (part,)


def _held(evidence: Evidence, name: str, bound: Float[np.ndarray, " t"], start: int, proof: bool, note: str) -> Verdict:
    """Hold the losses from `start` on against a curve; the closest epoch is shown."""
    loss, noise = evidence.series("loss"), evidence.loss_noise
    curve = loss[start : start + bound.size]
    broken = np.flatnonzero(curve > bound + 2 * noise[start : start + bound.size] + 2 * noise[start])
    at = int(broken[0]) if broken.size else bound.size - 1
    outcome: Outcome = "refuted" if broken.size else "proved" if proof else "not refuted"
    return Verdict(
        name,
        "Theorem 5.7",
        outcome,
        measured=float(curve[at]),
        bound=float(bound[at]),
        margin=factor(float(curve[at]), float(bound[at])),
        step=start + at,
        units=LOSS_UNITS,
        note=note,
    )


def _bounds(evidence: Evidence, theorem: float) -> tuple[Verdict, ...]:
    """Return L_t <= Π (1 - η μ) L_0 for the μ of the theorem, of the kernel at probes, of the envelope, and ours."""
    loss, eta, regime = evidence.series("loss"), evidence.eta, evidence.summary.regime
    t = np.arange(loss.size)
    parts = []

    def power(mu: float, epochs: np.ndarray) -> np.ndarray:
        return max(1 - eta * mu, 0.0) ** epochs

    if theorem > 0 and loss.size > 1:
        note = (
            f"L_t <= (1 - η μ)^t L_0 with μ = {theorem:.4g} in units of L, {theorem * evidence.s:.4g} for the sum loss"
        )
        parts.append(_held(evidence, "bound_theorem", power(theorem, t) * loss[0], 0, True, note))
    least = evidence.probe("ntk_min_eig") / evidence.probe_scale
    pointwise = float(np.nanmin(least)) if np.isfinite(least).any() else NAN
    if pointwise > 0 and loss.size > 1:
        note = f"L_t <= (1 - η μ)^t L_0 with the least λ_min(θ_t)/s of the probes, {pointwise:.4g} in units of L"
        parts.append(_held(evidence, "bound_pointwise", power(pointwise, t) * loss[0], 0, False, note))
    envelope = evidence.summary.envelope[0]
    if regime.stop and envelope > 0:
        inside = np.arange(min(regime.stop, loss.size) - regime.start)
        note = f"the same form on the regime with the measured envelope, {envelope:.4g} in units of L"
        bound = power(envelope, inside) * loss[regime.start]
        parts.append(_held(evidence, "bound_envelope", bound, regime.start, False, note))
    if loss.size > 1:
        parts.append(_refined(evidence, theorem, pointwise))
    return tuple(parts)


def _refined(evidence: Evidence, theorem: float, pointwise: float) -> Verdict:
    """Return our own rate: each iterate's PL ratio is the residual-weighted mean of the kernel's spectrum, over s."""
    loss, eta = evidence.series("loss"), evidence.eta
    ratio = np.nan_to_num(evidence.summary.bracket[0][: loss.size], posinf=0.0)
    curve = np.concatenate([[1.0], np.cumprod(np.maximum(1 - eta * ratio[:-1], 0.0))]) * loss[0]
    mean = 1 - (curve[-1] / curve[0]) ** (1 / (loss.size - 1)) if curve[0] > 0 else NAN
    papers = theorem if theorem > 0 else pointwise
    against = f" against {1 - eta * papers:.8f} from the kernel's least eigenvalue" if papers > 0 else ""
    note = (
        f"ours, not the paper's: L_t <= Π (1 - η ρ_t/s) L_0, ρ_t = rᵀΘr/‖r‖² the residual-weighted spectrum; "
        f"{1 - mean:.8f} per epoch in the mean{against}; along this run alone"
    )
    return _held(evidence, "refined", curve, 0, False, note)


def _law(evidence: Evidence) -> Verdict:
    report = evidence.summary.regime_rate
    outcomes: dict[str, Outcome] = {"exponential": "not refuted", "power law": "refuted", "undecided": "undecided"}
    outcome = outcomes[report.zero.law] if report.zero.epochs else "undecided"
    if not report.zero.epochs:
        note = "no regime to fit"
    else:
        note = f"on the regime L itself: {report.zero.law}; the gap to the proxy: {report.proxy.law}"
        note += f", {report.proxy.factor:.6f} per epoch" + (", set by the proxy" if report.set_by_proxy else "")
    middle = evidence.summary.middle_rate
    if middle.zero.epochs:
        note += f"; on the middle half L: {middle.zero.law}, gap: {middle.proxy.law}"
    return Verdict(
        "law",
        "Theorem 5.7",
        outcome,
        measured=report.zero.exponential_r2,
        bound=report.zero.power_r2,
        margin=factor(report.zero.power_r2, report.zero.exponential_r2),
        units="R² of the exponential, of the power law",
        note=note,
    )
