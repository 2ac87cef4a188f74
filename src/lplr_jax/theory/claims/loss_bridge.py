"""Claim `loss_bridge`: what the kernel says of losses that are not squared. Ours, not the paper's.

For every loss ½‖∇L‖² = ρ‖g‖²/(2 s²), g = ∂ℓ/∂f, and so

    ½‖∇L‖² >= λ‖g‖²/(2 s²) >= λ Σψ(ℓ_i)/(2 s²) >= λ B(L)/(2 s²),

with λ = λ_min(Θ), or for softmax λ_⊥ >= λ_min(Θ), as its gradients are orthogonal to the ones in every sample. For
logistic loss and cross-entropy of classes ψ(x) = γ (1 - e^{-x})², γ = 1 and c/(c - 1), which is convex up to ln 2
alone: where no ℓ_i is beyond, B(L) = γ n (1 - e^{-S/n})² by Jensen's inequality, S = s L; where k are, these alone give
B(L) = γ k/4. For L -> 0 that is of the order L², a Łojasiewicz inequality of exponent 1: L falls as 1/t.

From a step with k = 0 on, s = n and every a_t > 0: with τ = Σ a_t η_t γ λ_t/n

    L_T <= log(1 + (e^{L_0} - 1)/(1 + (1 - e^{-L_0}) τ)),
    Σ η_t ‖∇L_t‖ <= (1/a) √(n/(γ λ)) log((e^{L_0} - 1)/(e^{L_T} - 1)).

*Proof*: v = e^L - 1 has dv = e^L dL <= -(1 + v) (v/(1 + v))² dτ <= -v²/(1 + v_0) dτ, and the decrease of each step,
a left Riemann sum of a decreasing function, is no smaller; the path is (1/a) ∫ dL/√(2ψ), with
∫ dL/(1 - e^{-L}) = log(e^L - 1).
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.curves.summary import gradient_law
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.decrease import decrease_of, not_descending
from lplr_jax.theory.claims.example import logistic_regression
from lplr_jax.theory.evidence import LOSS_UNITS, SUMS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, at_least, at_most, factor, weakest

REFERENCE = "ours (loss bridge)"
MARGINS = ("logistic", "softmax_cross_entropy")
"""Losses log(1 + e^{-m}) of a margin m."""


def loss_bridge(evidence: Evidence) -> Verdict:
    """Hold the chain from the gradient to the loss at every probe, and what follows from it along the run.

    `measured` is the least ratio of the two ends of the chain, how far ½‖∇L‖² is above what λ and L alone give. Parts:
    `chain` with the slack of each link, a theorem, so that "refuted" is a contradiction; `eigenvalue` λ or λ_⊥ > 0,
    proved where its interval includes the error of assembly; `envelope` and `length` the 1/t bound and that of the
    path, from the first probe with no sample beyond ln 2 on, not checked between probes, for logistic loss and
    cross-entropy; `floor` the proved lower bound of L* on the ball of the run, never 0 there; `infimum` what is left
    above a known infimum; `exponent` the slope of log ‖∇L‖² on log L, 2 where L is of exponent 1; `phase` of Huber's
    loss.
    """
    if not (evidence.epochs.size and evidence.has("output_grad_norm")):
        return Verdict("loss_bridge", REFERENCE, "undecided", note="‖g‖ was not measured at a probe")
    chain = chain_of(evidence)
    parts = (
        _chain(evidence, chain),
        _eigenvalue(evidence, chain),
        *_along(evidence, chain),
        *_floor(evidence),
        *_infimum(evidence),
        *_phase(evidence),
        *_exponent(evidence),
    )
    decisive = [part for part in parts if not part.claim.startswith(("exponent", "phase", "infimum"))]
    outcome = weakest(part.outcome for part in decisive)
    note = "; ".join(f"{part.claim}: {part.note}" for part in parts)
    return parts[0].standing_for("loss_bridge", REFERENCE, outcome, note).with_parts(*parts)


@dataclass(frozen=True)
class Chain:
    """The links at every probe, each in units of ‖g‖²: ρ‖g‖²/λ is not among them, as λ may be 0.

    Attributes:
        gradient: s²‖∇L‖²/‖g‖², which is ρ.
        eigenvalue: λ or λ_⊥.
        square: ‖g‖².
        samples: Σψ(ℓ_i).
        bound: B(L).
        gamma: γ of softmax, 1 of others.
        beyond: k.
    """

    gradient: Float[np.ndarray, " k"]
    eigenvalue: Float[np.ndarray, " k"]
    square: Float[np.ndarray, " k"]
    samples: Float[np.ndarray, " k"]
    bound: Float[np.ndarray, " k"]
    gamma: float
    beyond: Float[np.ndarray, " k"]


def chain_of(evidence: Evidence) -> Chain:
    """Read the chain off the probes."""
    s, n, c = evidence.probe_scale, evidence.kernel_samples, evidence.number("c")
    square, beyond = evidence.probe("output_grad_norm") ** 2, evidence.probe("samples_beyond")
    total = s * evidence.probe("probe_loss")
    kind, gamma = evidence.loss.partition("(")[0], 1.0
    softmax = kind in ("softmax_cross_entropy", "soft_cross_entropy")
    if evidence.loss in MARGINS:
        gamma = c / (c - 1) if softmax else 1.0
        bound = gamma * np.where(beyond > 0, beyond / 4, n * np.expm1(-total / n) ** 2)
    elif softmax:
        excess = np.maximum(total - s * np.nan_to_num(evidence.number("loss_infimum"), nan=0.0), 0.0)
        bound = 2 * evidence.probe("sample_least_share") * excess
    elif kind == "huber":
        bound = np.minimum(2 * total, _delta(evidence) ** 2)
    elif kind == "squared_hinge":
        bound = 2 * total
    elif kind == "exponential":
        bound = total**2 / n
    else:
        bound = np.full_like(total, np.nan)
    least = evidence.probe("ntk_class_min_eig" if softmax else "ntk_min_eig")
    with np.errstate(divide="ignore", invalid="ignore"):
        gradient = evidence.probe("probe_grad_sq_norm") * s**2 / square
    return Chain(gradient, least, square, evidence.probe("sample_bound_sum"), bound, gamma, beyond)


def _delta(evidence: Evidence) -> float:
    return float(evidence.loss.partition("(")[2].removesuffix(")"))


def _chain(evidence: Evidence, chain: Chain) -> Verdict:
    """Hold ρ >= λ and ‖g‖² >= Σψ(ℓ_i) >= B(L), the links that no arithmetic can break."""
    known = np.isfinite(chain.gradient + chain.eigenvalue + chain.square)
    if not known.any():
        return Verdict("chain", REFERENCE, "undecided", note="no probe has a gradient and an eigenvalue")
    rounding = evidence.kernel_error + evidence.kernel_size * evidence.probe_unit * evidence.probe("ntk_max_eig")
    rounding = rounding + SUMS * np.abs(chain.gradient)
    # ψ is steepest where it is least, so a sum of it is off by no more than the sum of the losses, relatively.
    sums = SUMS * chain.square
    with np.errstate(divide="ignore", invalid="ignore"):
        slacks = {
            "ρ/λ": np.where(chain.eigenvalue > rounding, chain.gradient / chain.eigenvalue, np.nan),
            "‖g‖²/Σψ": chain.square / chain.samples,
            "Σψ/B": chain.samples / chain.bound,
        }
        ratio = slacks["ρ/λ"] * chain.square / chain.bound
    broken = known & (chain.gradient < chain.eigenvalue - rounding)
    broken |= (chain.square < chain.samples - sums) | (chain.samples < chain.bound - sums)
    clear = known & np.isfinite(ratio)  # where λ is above its error
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmin(np.where(clear, ratio, np.inf)))
    least = float(ratio[worst]) if clear[worst] else math.nan
    told = ", ".join(f"{name} {np.nanmin(slack[known]):.3g} to {np.nanmax(slack[known]):.3g}"
                     for name, slack in slacks.items() if np.isfinite(slack[known]).any())  # fmt: skip
    beyond = chain.beyond[np.isfinite(chain.beyond)]
    line = ""
    if beyond.size and evidence.loss in MARGINS:
        line = f"; k = {beyond[0]:.0f} samples beyond ln 2 at first, {beyond[-1]:.0f} at last"
    note = f"at {int(known.sum())} probes {told}{line}"
    if broken.any():
        note = f"broken at epoch {evidence.epochs[worst]}; {note}"
    outcome: Outcome = "refuted" if broken.any() else "not refuted"
    return Verdict(
        "chain", REFERENCE, outcome, measured=least, bound=1.0, margin=least,
        step=int(evidence.epochs[worst]), units="1", note=note, inconsistent=bool(broken.any()),
    )  # fmt: skip


def _eigenvalue(evidence: Evidence, chain: Chain) -> Verdict:
    """Hold λ > 0, or λ_⊥ > 0, at every probe."""
    softmax = evidence.has("ntk_class_min_eig")
    name = "λ_⊥" if softmax else "λ_min"
    lower = evidence.probe("ntk_class_min_eig_lower" if softmax else "ntk_min_eig_lower")
    proved = np.isfinite(lower) & (evidence.certified | softmax) & (not evidence.partial)
    value = np.where(proved, lower, chain.eigenvalue)
    if not np.isfinite(value).any():
        return Verdict("eigenvalue", REFERENCE, "undecided", note=f"{name} was not measured")
    worst = int(np.nanargmin(value))
    off = 0.0 if proved[worst] else float(np.nan_to_num(evidence.kernel_error[worst], nan=0.0))
    least = float(value[worst]) - off
    every = bool(proved.all())
    outcome: Outcome = "undecided" if not least > 0 else "proved" if every else "not refuted"
    note = (
        f"{name} >= {at_least(float(value[worst]), 4)} at every probe"
        if least > 0
        else f"{name} = {least:.3g} at the least"
    )
    note += f" ({evidence.partial})" if evidence.partial else ""
    return Verdict(
        "eigenvalue", REFERENCE, outcome, measured=float(value[worst]), bound=0.0, step=int(evidence.epochs[worst]),
        units="output² / parameter²", note=note,
    )  # fmt: skip


@dataclass(frozen=True)
class Window:
    """The steps from the first probe on from which no sample is beyond ln 2 at any.

    Attributes:
        start: position of that probe.
        stop: position of the last one.
        probes: how many there are.
        at: positions of the steps.
        a: a_t of them.
        size: η_t.
        rate: γ λ_t/n, of the two probes around a step the lesser.
    """

    start: int
    stop: int
    probes: int
    at: Int[np.ndarray, " k"]
    a: Float[np.ndarray, " k"]
    size: Float[np.ndarray, " k"]
    rate: Float[np.ndarray, " k"]


def window_of(evidence: Evidence, chain: Chain, *, whole: bool = True) -> Window | str:
    """Return the window in which the bounds along the run hold, or why there is none.

    Args:
        evidence: of a run of gradient descent.
        chain: its probes.
        whole: whether it must reach the last probe with every a_t > 0, or ends before the first step that was not seen.
    """
    n = evidence.number("n")
    if evidence.partial:
        return f"{evidence.partial}: k and λ are not those of all data"
    if evidence.s != n:
        return f"stated for the mean, s = n = {n:.0f}; s is {evidence.s:g}"
    clear = np.flatnonzero(chain.beyond != 0)
    first = int(clear[-1]) + 1 if clear.size else 0
    if first + 1 >= evidence.epochs.size:
        return f"k = {chain.beyond[-1]:.0f} samples lie beyond ln 2 at the last probe: no 1/t bound holds yet"
    start, stop, found = int(evidence.at[first]), int(evidence.at[-1]), decrease_of(evidence)
    if whole and not found.covers(start, stop):
        return "not every step of the window was seen"
    inside = (found.at >= start) & (found.at < stop)
    if not whole:
        stop = start + int(np.sum(found.at[inside] == start + np.arange(inside.sum())))
        inside &= found.at < stop
        if stop == start:
            return f"the step from epoch {evidence.steps[start]} was not seen, or rounding hides it"
    elif not (found.value[inside] > 0).all():
        return "the loss rises within the window, or does not move"
    least = chain.eigenvalue[first:] - np.nan_to_num(evidence.kernel_error[first:], nan=math.inf)
    if not (least > 0).all():
        return "λ is not above its error at every probe of the window"
    at = found.at[inside]
    place = np.searchsorted(evidence.at[first:], at, side="right") - 1
    rate = np.minimum(least[place], least[np.minimum(place + 1, least.size - 1)]) * chain.gamma / n
    return Window(start, stop, least.size, at, found.value[inside], found.size[inside], rate)


def _along(evidence: Evidence, chain: Chain) -> tuple[Verdict, ...]:
    """Return the 1/t envelope and the bound of the path."""
    if evidence.loss not in MARGINS:
        return ()
    names = ("envelope", "length")
    stopped = not_descending(evidence)
    if stopped:
        return tuple(Verdict(name, REFERENCE, stopped[0], note=stopped[1]) for name in names)
    window = window_of(evidence, chain)
    if isinstance(window, str):
        return tuple(Verdict(name, REFERENCE, "undecided", note=window) for name in names)
    loss, gradient = evidence.series("loss"), evidence.series("grad_sq_norm")
    begin, end = float(loss[window.start]), float(loss[window.stop])
    tau = float(np.sum(window.a * window.size * window.rate))
    bound = math.log1p(math.expm1(begin) / (1 - math.expm1(-begin) * tau))
    slack = 2 * float(np.nan_to_num(evidence.loss_noise[[window.start, window.stop]], nan=math.inf).sum())
    words = f"epoch {evidence.steps[window.start]} to {evidence.steps[window.stop]}"
    outcome: Outcome = "refuted" if end > bound + slack else "undecided" if not math.isfinite(slack) else "not refuted"
    note = f"{words}, k = 0 at its {window.probes} probes: L from {begin:.4g} to {end:.4g} <= {at_most(bound, 4)} (1/t)"
    envelope = Verdict(
        "envelope", REFERENCE, outcome, measured=end, bound=bound, margin=factor(end, bound),
        step=int(evidence.steps[window.stop]), units=LOSS_UNITS, note=note,
    )  # fmt: skip
    a, mu = float(window.a.min()), float(window.rate.min())
    length = float(np.sum(window.size * np.sqrt(gradient[window.at])))
    limit = math.log(math.expm1(begin) / math.expm1(end)) / (a * math.sqrt(mu)) if end > 0 else math.inf
    outcome = "refuted" if length > limit * (1 + SUMS) + math.sqrt(slack) else "not refuted"
    note = f"{words}: Σ η_t ‖∇L_t‖ = {length:.4g} <= {at_most(limit, 4)}, a = {a:.3g}"
    path = Verdict(
        "length", REFERENCE, outcome, measured=length, bound=limit, margin=factor(length, limit), units="parameter",
        note=note,
    )  # fmt: skip
    return envelope, path


def _floor(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return the lower bound of L* on the ball of the run: every margin is at most m + K R there."""
    margin, slope = evidence.number("margin_max"), evidence.number("margin_slope_upper")
    if evidence.loss not in (*MARGINS, "exponential") or not math.isfinite(margin + slope):
        return ()
    reach = margin + slope * evidence.proof_radius
    # Every sample whose margin was looked at has at least that loss, the others 0; s divides their sum.
    share = math.log(evidence.kernel_samples / evidence.s)
    small = math.exp(-min(reach, 700.0))
    value = small if evidence.loss == "exponential" else math.log1p(small)
    floor = value * evidence.kernel_samples / evidence.s if reach < 700 else 0.0
    least = float(evidence.series("loss")[evidence.seen].min(initial=math.inf))
    broken = floor * (1 - SUMS) > least + _largest_noise(evidence)
    note = f"every margin is at most {at_most(reach, 4)} on the ball of radius {evidence.proof_radius:.4g}: L* >= "
    note += at_least(floor, 4) if floor > 0 else f"e^{at_least(share - reach, 4)}, above 0 though no number holds it"
    note += f", where the run reached {least:.4g}"
    outcome: Outcome = "refuted" if broken else "proved"
    return (
        Verdict(
            "floor", REFERENCE, outcome, measured=least, bound=floor, margin=factor(floor, least), units=LOSS_UNITS,
            note=note, inconsistent=broken,
        ),
    )  # fmt: skip


def _infimum(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return what is left of L above its known infimum."""
    infimum = evidence.number("loss_infimum")
    if not infimum > 0:
        return ()
    # Of a subset's kernel the infimum is that of the subset's own loss.
    loss = evidence.probe("probe_loss") if evidence.partial else evidence.series("loss")[evidence.seen]
    left = loss - infimum
    broken = bool(left.min(initial=math.inf) < -4 * _largest_noise(evidence))
    outcome: Outcome = "refuted" if broken else "not refuted"
    note = f"L >= {at_least(infimum, 6)}, the mean entropy of the targets: no proxy; {left[-1]:.4g} is left above it"
    return (
        Verdict(
            "infimum", REFERENCE, outcome, measured=float(left[-1]), bound=0.0, units=LOSS_UNITS, note=note,
            inconsistent=broken,
        ),
    )  # fmt: skip


def _largest_noise(evidence: Evidence) -> float:
    return float(np.nan_to_num(evidence.loss_noise, nan=math.inf).max(initial=0.0))


def _phase(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return from where on the bound of Huber's loss is that of the squared loss."""
    if not evidence.loss.startswith("huber("):
        return ()
    total, delta = evidence.probe_scale * evidence.probe("probe_loss"), _delta(evidence)
    inner = np.flatnonzero(2 * total <= delta**2)
    note = f"2 s L is above δ² = {delta**2:.3g} at every probe: ‖g‖² >= δ² alone, L falls by a constant a step"
    if inner.size:
        note = f"2 s L <= δ² from epoch {evidence.epochs[inner[0]]} on: PL as for the squared loss"
    return (
        Verdict(
            "phase", REFERENCE, "not refuted", measured=float(2 * total[-1]), bound=delta**2, units="output²", note=note
        ),
    )


def _exponent(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return the slope of log ‖∇L‖² on log L, or on the log of what is above a known infimum."""
    infimum = np.nan_to_num(evidence.number("loss_infimum"), nan=0.0)
    slope = gradient_law(evidence.record, float(infimum)).slope
    if not math.isfinite(slope):
        return ()
    expected = 2.0 if evidence.loss in (*MARGINS, "exponential") else 1.0
    note = f"log ‖∇L‖² on log L has slope {slope:.3g} ({expected:g} is expected: {'1/t' if expected == 2 else 'PL'})"
    return (Verdict("exponent", REFERENCE, "not refuted", measured=slope, bound=expected, units="1", note=note),)


LOSS_BRIDGE = Claim(
    id="loss_bridge",
    reference=REFERENCE,
    statement="Where the loss is not squared, the kernel bounds the gradient through the losses of the samples.",
    latex=r"\tfrac12\|\nabla L\|^2 = \frac{\rho\|g\|^2}{2s^2} \ge \frac{\lambda\|g\|^2}{2s^2}"
    r" \ge \frac{\lambda}{2s^2}\sum_i \psi(\ell_i) \ge \frac{\lambda}{2s^2} B(L)",
    needs=("output_grad_norm", "sample_bound_sum", "samples_beyond"),
    rests_on=Rests(kernels=("", "chain", "eigenvalue", "envelope", "length")),
    loss=(
        *("logistic", "softmax_cross_entropy", "softmax_cross_entropy(", "soft_cross_entropy", "huber("),
        *("squared_hinge", "exponential"),
    ),
    check=loss_bridge,
    example=logistic_regression,
)
