"""The linear rate of heavy ball by a Lyapunov function. Ours, not the paper's.

Let d_{t+1} = θ_{t+1} - θ_t, d_0 = 0, and ‖d_{t+1} + η ∇L_t‖ <= γ ‖d_t‖ at every step, as d_{t+1} = γ d_t - η ∇L_t gives
it. Let β bound the curvature along the steps, ηβ < 2 (1 - γ), and ‖∇L_t‖² >= 2 μ L_t at every iterate. With

    γ/2 + c γ² = (1 - c η μ) (1 - ηβ/2 - γ/2 - c),   c its smaller root,   A = (1 - ηβ/2 - γ/2 - c)/η,

V_t = L_t + A ‖d_t‖² has V_{t+1} <= (1 - c η μ) V_t, and so L_t <= (1 - c η μ)^t L_0.

*Proof*: let w = d₊ + η∇L. Smoothness and ⟨∇L, d₊⟩ = (⟨w, d₊⟩ - ‖d₊‖²)/η with ‖w‖ <= γ‖d‖ give
L₊ <= L + (γ/2η) ‖d‖² - ((1 - γ/2 - ηβ/2)/η) ‖d₊‖². From ‖η∇L‖² = ‖w - d₊‖² <= 2γ²‖d‖² + 2‖d₊‖² and PL,
-‖d₊‖² <= γ²‖d‖² - η²μ L; take (c/η) times this: V₊ <= (1 - cημ) L + ((γ/2 + cγ²)/η) ‖d‖².

Only the length of w enters, and a record tells it: with η_t and the deviation sin φ_t of the step from t,
‖w_t‖² = ‖∇L_t‖² ((η_t - η)² + η_t² tan² φ_t), and ‖d_{t+1}‖ = |η_t| ‖∇L_t‖ / cos φ_t.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.theory.claims.held import diverges, held
from lplr_jax.theory.evidence import HESSIAN_ERROR, SUMS, Evidence
from lplr_jax.theory.method import UNRESOLVED
from lplr_jax.theory.verdict import MET, Outcome, Verdict, at_most, factor, weakest

REFERENCE = "ours (heavy ball)"


@dataclass(frozen=True)
class HeavyBall:
    """What the steps show of a method with ‖d_{t+1} + η ∇L_t‖ = γ ‖d_t‖.

    Attributes:
        eta: η, that of the first step.
        low: the least γ that explains every pair of steps that was resolved.
        high: the largest.
        pairs: how many these are.
        at: positions t of the steps.
        length: ‖d_{t+1}‖ of each.
        error: how far rounding may move it.
    """

    eta: float
    low: float
    high: float
    pairs: int
    at: Int[np.ndarray, " k"]
    length: Float[np.ndarray, " k"]
    error: Float[np.ndarray, " k"]


def heavy_ball_of(evidence: Evidence) -> HeavyBall | None:
    """Read η and γ off the steps; None where these are not those of one heavy ball, or do not show it."""
    method, at = evidence.method, evidence.seen_steps
    size, deviation, rounding = (evidence.series(f"step_{name}")[at] for name in ("size", "deviation", "rounding"))
    if not at.size or at[0] != 0 or not np.isfinite(method.sizes[0]) or not deviation[0] <= method.allowed[0]:
        return None
    eta, sums = float(size[0]), 2 * math.sqrt(evidence.number("p")) * evidence.unit
    slope = np.sqrt(evidence.series("grad_sq_norm")[at])
    with np.errstate(divide="ignore", invalid="ignore"):
        cosine = np.sqrt(np.maximum(1 - deviation**2, 0.0))
        length = np.abs(size) * slope / cosine
        error = length * (rounding + sums) + np.abs(size) * slope * sums / cosine**3
        rest = slope * np.hypot(size - eta, size * deviation / cosine)
        off = error + eta * (2 * evidence.gradient_error[at] + slope * (sums + method.allowed[0]))
        low = (rest[1:] - off[1:]) / (length[:-1] + error[:-1])
        high = (rest[1:] + off[1:]) / (length[:-1] - error[:-1])
        clear = (off[1:] < UNRESOLVED * rest[1:]) & (error[:-1] < UNRESOLVED * length[:-1])
    clear &= (np.diff(at) == 1) & np.isfinite(low + high)
    # One pair would be explained by some γ whatever the method.
    if eta <= 0 or clear.sum() < 2:
        return None
    ends = float(low[clear].max()), float(high[clear].min())
    if not 0 < ends[0] <= ends[1] < 1:
        return None
    return HeavyBall(eta, *ends, int(clear.sum()), at, length, error)


def smaller_root(eta: float, beta: float, mu: float, gamma: float) -> float:
    """Return c, the smaller root of ημ c² - (1 + ημ k + γ²) c + k - γ/2 = 0 with k = 1 - ηβ/2 - γ/2.

    It is positive where ηβ < 2 (1 - γ), and has A >= 0 and cημ <= 1; the larger one has neither.
    """
    k, x = 1 - eta * beta / 2 - gamma / 2, eta * mu
    middle = 1 + x * k + gamma**2
    return 2 * (k - gamma / 2) / (middle + math.sqrt(middle**2 - 4 * x * (k - gamma / 2)))


def heavy_ball_rate(
    evidence: Evidence, theorem: float, containment: tuple[Verdict, ...], law: Verdict
) -> Verdict | None:
    """Hold V_{t+1} <= (1 - cημ) V_t and V_t <= (1 - cημ)^t L_0; None where the steps are not those of a heavy ball.

    Args:
        evidence: of a run whose steps are not along the gradient.
        theorem: μ of the region in units of L, proved; not positive where none is.
        containment: parts on the ball that the proof is made for.
        law: the part on the kind of decay.
    """
    ball = heavy_ball_of(evidence)
    if ball is None:
        return None
    seen = Verdict(
        "heavy_ball", REFERENCE, "not refuted", measured=ball.low, bound=ball.high, units="1",
        note=f"‖d_(t+1) + η ∇L_t‖ = γ ‖d_t‖ with η = {ball.eta:.4g} and one γ in [{ball.low:.6g}, {ball.high:.6g}] at "
        f"all {ball.pairs} pairs of steps that rounding leaves resolved; {evidence.method.coverage}",
    )  # fmt: skip
    head = f"Theorem 5.7 is about gradient descent with a fixed step; this is heavy ball, γ = {_near_one(ball.high)}"
    upper, sharp = evidence.number("smoothness_upper"), evidence.probe("sharpness")
    measured = float(np.nanmax(sharp)) * (1 + HESSIAN_ERROR) if np.isfinite(sharp).any() else math.nan
    proved = theorem > 0 and 0 < upper < math.inf
    mu, name, told = theorem, "bound_theorem", "proved on the ball of the run"
    beta = upper if proved else measured
    if not proved:
        least = evidence.probe("ntk_min_eig") / evidence.probe_scale
        known = np.isfinite(least).any() and not evidence.partial
        mu, name = float(np.nanmin(least)) if known else math.nan, "bound_pointwise"
        told = "of the probes, not checked between"
    step = _step_size(ball, beta, proved=proved)
    parts: tuple[Verdict, ...] = (seen, step, *containment)
    outcome: Outcome = "undecided"
    shown = step
    if step.outcome == "refuted":
        outcome, note = "not applicable", f"{head}; ηβ < 2 (1 - γ) refuted, so nothing is promised"
    elif not (mu > 0 and math.isfinite(beta)):
        note = f"{head}; no positive μ or no β is known"
    else:
        c = smaller_root(ball.eta, beta, mu, ball.high)
        rate = 1 - c * ball.eta * mu
        words = f"c = {c:.4g}, μ = {mu:.4g} and β = {beta:.4g} in units of L {told}: 1 - cημ = {at_most(rate, 10)}"
        weight = (1 - ball.eta * beta / 2 - ball.high / 2 - c) / ball.eta
        lyapunov = _lyapunov(evidence, ball, weight, rate)
        # Nobody knows that a step which was not seen was one of this method.
        last = int(np.sum(evidence.seen_steps == np.arange(evidence.seen_steps.size)))
        at = np.arange(last + 1)
        curve = float(evidence.series("loss")[0]) * rate ** at.astype(np.float64)
        told = f"L_t <= (1 - cημ)^t L_0 over {last} steps; {words}"
        if last < evidence.method.total:
            told += f"; held to step {evidence.steps[last]}, as {evidence.method.coverage}"
        bound = held(evidence, name, curve, at, False, told, reference=REFERENCE)
        parts = (*parts, lyapunov, bound)
        outcome, shown = weakest((lyapunov.outcome, bound.outcome)), bound
        note = f"{head}; {bound.note if lyapunov.outcome in MET else lyapunov.note}"
    verdict = shown.standing_for("linear_rate", REFERENCE, outcome, note)
    return verdict.with_parts(*parts, law)


def _near_one(gamma: float) -> str:
    return f"{gamma:.4g}" if gamma < 0.9999 else f"1 - {1 - gamma:.2g}"


def _step_size(ball: HeavyBall, beta: float, *, proved: bool) -> Verdict:
    most = 2 * (1 - ball.high)
    outcome: Outcome = "undecided"
    note = "neither the sharpness nor a bound of it is known"
    if math.isfinite(beta):
        where = "on the ball of the run, proved" if proved else "from the probes, which bound β from below"
        note = f"ηβ = {ball.eta * beta:.4g} against 2 (1 - γ) = {most:.4g}, β {where}"
        outcome = "not refuted" if ball.eta * beta < most else "refuted"
    return Verdict(
        "step_size", REFERENCE, outcome, measured=ball.eta * beta, bound=most, margin=factor(ball.eta * beta, most),
        units="1", note=note,
    )  # fmt: skip


def _lyapunov(evidence: Evidence, ball: HeavyBall, weight: float, rate: float) -> Verdict:
    """Hold V_{t+1} <= (1 - cημ) V_t from every iterate at which the step before was seen as well."""
    loss, noise = evidence.series("loss"), evidence.loss_noise
    squared = np.zeros(evidence.end)
    slack = np.zeros(evidence.end)
    known = np.zeros(evidence.end, bool)
    known[0] = evidence.seen[0]  # d_0 = 0
    squared[ball.at + 1] = ball.length**2
    slack[ball.at + 1] = 2 * ball.length * ball.error + ball.error**2
    known[ball.at + 1] = np.isfinite(ball.length)
    value = loss + weight * squared
    off = noise + weight * slack + SUMS * value
    at = np.flatnonzero(known[:-1] & known[1:] & (np.diff(evidence.steps) == 1))
    over = value[at + 1] - rate * value[at] - off[at + 1] - rate * off[at]
    judged = np.isfinite(over)
    if (leaves := diverges(evidence)) is not None:
        outcome: Outcome = "refuted" if leaves.seen else "undecided"
        return Verdict(
            "lyapunov", REFERENCE, outcome, measured=math.inf, bound=rate, step=leaves.step, units="1", note=leaves.note
        )
    if not judged.any():
        return Verdict("lyapunov", REFERENCE, "undecided", note="no two steps in a row can be judged")
    breaks = judged & (over > 0)
    worst = int(np.argmax(np.where(judged, over, -np.inf)))
    outcome = "refuted" if breaks.any() else "not refuted"
    told = f"V = L + A ‖d‖², A = {weight:.4g}, falls by 1 - cημ at all {int(judged.sum())} steps that were seen"
    if breaks.any():
        told = f"V = L + A ‖d‖² does not fall by 1 - cημ at {int(breaks.sum())} of {int(judged.sum())} steps"
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = float(value[at + 1][worst] / value[at][worst])
    return Verdict(
        "lyapunov", REFERENCE, outcome, measured=ratio, bound=rate, margin=factor(ratio, rate),
        step=int(evidence.steps[at[worst]]), units="1", note=told,
    )  # fmt: skip
