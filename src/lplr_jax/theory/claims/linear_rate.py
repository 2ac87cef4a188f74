"""Claim `linear_rate`: the linear rate of Theorem 5.7."""

import math
from dataclasses import replace

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.curves.summary import gradient_law
from lplr_jax.theory.claims.claim import Claim, Rests, not_stated
from lplr_jax.theory.claims.descent import descent
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.claims.heavy_ball import heavy_ball_rate
from lplr_jax.theory.claims.held import held
from lplr_jax.theory.claims.local_pl import mu_lower
from lplr_jax.theory.claims.loss_bridge import MARGINS
from lplr_jax.theory.claims.loss_scaled import loss_scaled, loss_scaled_rate
from lplr_jax.theory.claims.moving_step import moving_rate
from lplr_jax.theory.evidence import HESSIAN_ERROR, Evidence
from lplr_jax.theory.method import NOT_SEEN
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, at_most, factor, weakest


def linear_rate(evidence: Evidence) -> Verdict:
    """Theorem 5.7: L_t <= (1 - η μ)^t L_0 where μ > 0, η <= 1/β and every iterate stays in the region.

    The method is read off the steps of the run: "not applicable" where they are not along -∇L, and where a hypothesis
    is refuted; "undecided" where no step was seen; "refuted" where the descent lemma or the bound fails on the run.
    "proved" needs every step seen. `measured` and `bound` belong to the bound that decides.

    Where η_t moves, a product of ours stands for the power: L_T <= L_0 Π (1 - 2 a_t η_t μ_t)_+ with the a_t of
    `descent` and μ_t = λ_min(θ_t)/s; "not applicable" where a loss rises, or where a budget of the path decided steps.
    Where the η_t are those of a cosine, the part `cosine` has their sum.

    Where ‖θ_{t+1} - θ_t + η ∇L_t‖ is one share γ of the step before, the run is heavy ball, and the Lyapunov function
    V = L + A ‖θ_t - θ_{t-1}‖² is held to fall by 1 - cημ a step. On logistic loss and cross-entropy of classes nothing
    is said of a fixed step; where the steps grow as L falls it is L_{t+1} <= (1 - .2786 γλ_t/(n B_t)) L_t that is held.
    """
    reference, method = "Theorem 5.7", evidence.method
    if evidence.loss != "squared":
        if loss_scaled(evidence):
            return loss_scaled_rate(evidence)
        return not_stated("linear_rate", reference, ("squared",), evidence, _otherwise)
    note = "the theorem is about gradient descent with a fixed step; "
    if not method.total:
        return Verdict("linear_rate", reference, "not applicable", note=f"{note}no step was taken")
    if method.kind == "other":
        ball = heavy_ball_rate(evidence, mu_lower(evidence) / evidence.s, _containment(evidence), _law(evidence))
        if ball is not None:
            return ball
        return Verdict("linear_rate", reference, "not applicable", note=note + method.note)
    mu = mu_lower(evidence)
    if method.kind == "gradient descent" and not method.fixed:
        return moving_rate(evidence, mu / evidence.s, _containment(evidence), _law(evidence))
    step, lemma = _step_size(evidence), descent(evidence)
    bounds = tuple(_capped(part, evidence) for part in _bounds(evidence, mu / evidence.s))
    parts = (step, lemma, *_containment(evidence), *bounds, _law(evidence))
    theorem = next((part for part in bounds if part.claim == "bound_theorem"), None)
    pointwise = next((part for part in bounds if part.claim == "bound_pointwise"), None)
    condition = evidence.verdict("compatibility")
    if method.kind == "unseen":
        outcome, shown, note = (
            "undecided",
            theorem or lemma,
            f"{method.note}, so whether it is gradient descent is open",
        )
    elif lemma.outcome == "refuted":
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


def _capped(part: Verdict, evidence: Evidence) -> Verdict:
    """Return a rate held against the run, for no more than the steps that were seen allow."""
    method = evidence.method
    if method.kind == "unseen":
        return replace(part, outcome="undecided", note=f"{method.note}; {part.note}")
    if part.outcome == "proved" and not (method.everywhere and evidence.whole):
        return replace(part, outcome="not refuted", note=f"{part.note}; not proved, as {method.coverage}")
    return part


def _step_size(evidence: Evidence) -> Verdict:
    sharp, eta, upper = evidence.probe("sharpness"), evidence.eta, evidence.number("smoothness_upper")
    known = np.isfinite(sharp)
    worst = int(np.nanargmax(sharp)) if known.any() else None
    measured = eta * float(sharp[worst]) if worst is not None else NAN
    outcome: Outcome = "undecided"
    note = "the sharpness was not measured" if math.isfinite(eta) else NOT_SEEN
    if math.isfinite(measured):
        note = f"η β >= {measured:.3g} from {int(known.sum())} probes, which bound β from below"
        outcome = "refuted" if measured > 1 + HESSIAN_ERROR else "not refuted"
    if 0 < upper < math.inf and eta * upper * (1 + 1e-15) <= 1:
        outcome, note = "proved", f"η β <= {at_most(eta * upper, 6)} on the ball of the run"
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


def _containment(evidence: Evidence) -> tuple[Verdict, ...]:
    certified = evidence.number("radius_certified")
    if math.isnan(certified):
        return ()
    at = np.flatnonzero(evidence.seen)
    inside = evidence.series("drift")[at] < certified
    left = int(np.argmin(inside)) if not inside.all() else None
    outcome: Outcome = "undecided"
    if left is not None:
        outcome = "refuted"
        note = f"{left} of {inside.size} epochs lie in the ball of radius R*"
    elif not evidence.whole:
        note = f"{inside.size} of {evidence.total + 1} epochs were seen, all in the ball of radius R*"
    else:
        outcome = "proved" if certified > evidence.proof_radius else "undecided"
        note = "every epoch stays in the ball of radius R*"
    part = Verdict(
        "containment",
        "Theorem 5.7",
        outcome,
        measured=evidence.radius,
        bound=certified,
        margin=factor(evidence.radius, certified),
        step=None if left is None else int(evidence.steps[at[left]]),
        units="parameter",
        note=note,
    )
    return (part,)


def _bounds(evidence: Evidence, theorem: float) -> tuple[Verdict, ...]:
    """Return L_t <= Π (1 - η μ) L_0 for the μ of the theorem, of the kernel at probes, of the envelope, and ours."""
    loss, eta, regime = evidence.series("loss"), evidence.eta, evidence.summary.regime
    at = np.flatnonzero(evidence.seen)
    if at.size < 2 or at[0] != 0 or not math.isfinite(eta):
        return ()
    parts = []

    def power(mu: float, positions: Int[np.ndarray, " k"]) -> Float[np.ndarray, " k"]:
        steps = evidence.steps[positions] - evidence.steps[positions[0]]
        return max(1 - eta * mu, 0.0) ** steps * loss[positions[0]]

    seen = f" at all {at.size - 1} seen epochs (of {evidence.total})"
    if theorem > 0:
        note = f"L_t <= (1 - η μ)^t L_0{seen} with μ = {theorem:.4g} in units of L"
        note += f", {theorem * evidence.s:.4g} for the sum loss"
        parts.append(held(evidence, "bound_theorem", power(theorem, at), at, True, note))
    least = evidence.probe("ntk_min_eig") / evidence.probe_scale
    pointwise = float(np.nanmin(least)) if np.isfinite(least).any() else NAN
    if pointwise > 0:
        note = f"L_t <= (1 - η μ)^t L_0 with the least λ_min(θ_t)/s of the probes, {pointwise:.4g} in units of L"
        parts.append(held(evidence, "bound_pointwise", power(pointwise, at), at, False, note))
    envelope = evidence.summary.envelope[0]
    inside = at[(at >= regime.start) & (at < regime.stop)] if regime.stop else at[:0]
    if inside.size and envelope > 0:
        note = f"the same form on the regime with the measured envelope, {envelope:.4g} in units of L"
        parts.append(held(evidence, "bound_envelope", power(envelope, inside), inside, False, note))
    return (*parts, *_refined(evidence, theorem, pointwise))


def _refined(evidence: Evidence, theorem: float, pointwise: float) -> tuple[Verdict, ...]:
    """Return our own rate: each iterate's PL ratio is the residual-weighted mean of the kernel's spectrum, over s.

    It multiplies over every step, so it reaches as far as no step is missing.
    """
    # Where the step from position i is the i-th one seen, all before it were.
    unbroken = int(np.sum(evidence.seen_steps == np.arange(evidence.seen_steps.size)))
    if not unbroken:
        return ()
    loss, eta, at = evidence.series("loss"), evidence.eta, np.arange(unbroken + 1)
    ratio = np.nan_to_num(evidence.summary.bracket[0][:unbroken], posinf=0.0)
    curve = np.concatenate([[1.0], np.cumprod(np.maximum(1 - eta * ratio, 0.0))]) * loss[0]
    mean = 1 - (curve[-1] / curve[0]) ** (1 / unbroken) if curve[0] > 0 else NAN
    papers = theorem if theorem > 0 else pointwise
    against = f" against {1 - eta * papers:.8f} from the kernel's least eigenvalue" if papers > 0 else ""
    note = (
        f"ours, not the paper's: L_t <= Π (1 - η ρ_t/s) L_0, ρ_t = rᵀΘr/‖r‖² the residual-weighted spectrum; "
        f"{1 - mean:.8f} per epoch in the mean{against}; along this run alone"
    )
    return (held(evidence, "refined", curve, at, False, note),)


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


def _otherwise(evidence: Evidence) -> str:
    """Say why a loss that never reaches its infimum has no linear rate under a fixed step."""
    if evidence.loss not in ("logistic", "softmax_cross_entropy", "exponential"):
        return ""
    slope = gradient_law(evidence.record, 0.0).slope
    seen = f"; the measured slope of log ‖∇L‖² on log L is {slope:.3g}, 2 where L is of exponent 1 and 1 under PL"
    return "as L goes to 0 so does ‖g‖²/L: a fixed step gives 1/t and no linear rate" + (
        seen if math.isfinite(slope) else ""
    )


LINEAR_RATE = Claim(
    id="linear_rate",
    reference="Theorem 5.7",
    statement="Gradient descent with a fixed step below 1/β that stays in the region converges linearly.",
    latex=r"L(\theta_t) \le (1 - \eta\mu)^t L(\theta_0) \quad \text{where } \mu > 0,\ \eta \le 1/\beta",
    needs=("step_size", "step_deviation", "step_rounding"),
    rests_on=Rests(kernels=("", "bound_pointwise", "bound_cosine", "lyapunov"), hessians=("", "step_size", "lyapunov")),
    loss=("squared", *MARGINS),
    otherwise=_otherwise,
    check=linear_rate,
    example=linear_regression,
)
