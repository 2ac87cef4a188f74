"""Claim `noise`: what mini-batches do to the linear rate. Ours, not the paper's.

With G_i = (n/s) ∇ℓ_i and S² = (1/n) Σ ‖G_i‖² - ‖∇L‖², a batch of b drawn without replacement has
σ_b² = E‖g_B - ∇L‖² = (S²/b) (n - b)/(n - 1), exactly. As ‖g_i‖² <= k ℓ_i, with k = 2 for the squared loss,

    σ_b² <= v L,   v = k (n/s) max_i λ_max(Θ_ii) (n - b) / (b (n - 1)),

so the noise goes with the loss. Where a batch is one of the n/b blocks of a fixed partition, each as likely,
σ_b² = (b/n) Σ_B ‖g_B‖² - ‖∇L‖², and the same holds with v = k n max_B λ_max(Θ_BB)/(s b). Where β bounds the curvature
on the segments of all batches,

    E L(θ - η g_B) <= L - η (1 - ηβ/2) ‖∇L‖² + η² β σ_b² / 2 <= (1 - q) L,   q = 2ημ (1 - ηβ/2) - η² β v / 2.

If that holds at every step, Y_t = L_t / Π (1 - q_k) is a non-negative supermartingale, and P(sup Y_t >= L_0/δ) <= δ.
With ‖∇L‖² <= 2 Λ L, Λ = λ_max(Θ)/s, E‖g_B‖ <= √((2Λ + v) L), so where q > 0 the path up to the exit of a ball is at
most C = η √((2Λ + v) L_0) / (1 - √(1 - q)) <= 2 η √((2Λ + v) L_0) / q in the mean, and by Markov's inequality
P(ever leave B(θ_0, R)) <= C/R. One run proves nothing of an expectation, but may refute it.

Steps are rounded. A step that is off by κ at most has E L_{t+1} <= (1 - q + δ_t) L_t with

    δ_t = (1 + ηβ) κ √((2Λ + v)/L_t) + βκ²/(2 L_t),

as ‖∇L‖ + β‖η g_B‖ is at most (1 + ηβ) √((2Λ + v) L) in the mean: nothing is promised once L is at the level of
rounding, where δ_t > q. With a share h of q for it, δ_t L <= h q L + (1 - h) q F where
F = (((1 + ηβ) κ)² (2Λ + v)/(4 h q) + βκ²/2)/((1 - h) q). So the mean of L_t is at most (1 - (1 - h) q)^t L_0 + F, and
(1 - h) q stands for q in C, which grows by κ + η √((2Λ + v) F) a step.

Whether the steps are -η g_B with one η is measured, on those that were seen; of others nothing is said.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax.records import Record
from lplr_jax.schema import INTERVAL_LEVEL
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import EIGENVALUES, ETA, linear_regression
from lplr_jax.theory.evidence import GROWTH, HESSIAN_ERROR, LOSS_UNITS, SUMS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor, weakest

REFERENCE = "ours (noise)"
LEVEL = 0.01
"""Probability below which the hypothesis is refuted by a run. Calibrated."""
SHARE = 1e-3
"""h, the share of q that is given to rounding. Calibrated."""


def noise(evidence: Evidence) -> Verdict:
    """Hold the noise of mini-batches against its growth bound, one step against its expectation, and the run.

    "not applicable" where every step uses all data. Parts: `growth` σ_b² <= v L at every probe, a theorem, so that
    "refuted" is a contradiction; `one_step` the mean decrease of one step, as an average over batches with its
    interval, against the bound with the measured sharpness; `supermartingale` the largest L_t/(L_0 Π (1 - q_k)) with
    q_k from the probe before, refuted at level p = 1/e, never proved; `containment` the largest drift against the
    radius C/p that a run leaves with probability p at most, refuted where p is below its level. Their constants are
    measured at the probes and not proved. Both are about steps -η g_B with one η: "not applicable" to others, such as
    those of momentum or a schedule, and "undecided" where no step was seen. A pass in which every sample comes once is
    outside both theorems, as its batches after the first are not drawn without regard to those before.
    """
    b, n = evidence.number("batch_size"), evidence.number("n")
    if math.isnan(b) or b >= n:
        return Verdict("noise", REFERENCE, "not applicable", note="every step uses all data, as far as is recorded")
    if evidence.partial:
        return Verdict("noise", REFERENCE, "undecided", note=f"{evidence.partial}: the noise is that of all samples")
    found = noise_of(evidence)
    parts = (
        _growth(evidence, found),
        *_one_step(evidence, found),
        _supermartingale(evidence, found.growth),
        _containment(evidence, found.growth),
    )
    outcome = weakest(part.outcome for part in parts)
    worst = next((part for part in parts if part.outcome == outcome), parts[0])
    note = "; ".join(f"{part.claim}: {part.note}" for part in parts)
    return worst.standing_for("noise", REFERENCE, outcome, note).with_parts(*parts)


@dataclass(frozen=True)
class Noise:
    """The noise of a batch at every probe.

    Attributes:
        variance: σ_b², in L² / parameter².
        growth: v with σ_b² <= v L.
        error: how far rounding may move σ_b².
    """

    variance: Float[np.ndarray, " k"]
    growth: Float[np.ndarray, " k"]
    error: Float[np.ndarray, " k"]


def noise_of(evidence: Evidence) -> Noise:
    """Read the noise off the probes: of b samples drawn without replacement, or of the blocks of a partition."""
    b, n, slope = evidence.number("batch_size"), evidence.number("n"), evidence.probe("probe_grad_sq_norm")
    if evidence.number("batches_fixed") == 1:
        squares = evidence.probe("block_grad_sq_norm")
        growth = evidence.growth * n / (evidence.s * b) * evidence.probe("block_kernel_max")
        return Noise(squares - slope, growth, SUMS * squares)
    share = (n - b) / (b * (n - 1)) if n > 1 else 0.0
    squares = evidence.probe("sample_grad_sq_norm")
    growth = evidence.growth * (n / evidence.s) * evidence.probe("sample_kernel_max") * share
    return Noise((squares - slope) * share, growth, SUMS * squares * share)


def _growth(evidence: Evidence, found: Noise) -> Verdict:
    """Hold 0 <= σ_b² <= v L at every probe."""
    variance, off = found.variance, found.error
    bound = found.growth * evidence.probe("probe_loss")
    known = np.isfinite(variance) & np.isfinite(bound)
    if not known.any():
        return Verdict("growth", REFERENCE, "undecided", note="the gradients of samples were not measured")
    broken = known & ((variance > bound + off) | (variance < -off))
    ratio = np.where(known & (bound > 0), variance / np.where(bound > 0, bound, 1.0), -np.inf)
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmax(ratio))
    note = f"σ_b² <= v L at {int(known.sum())} probes, σ_b² at most {ratio.max():.3g} of v L"
    if evidence.number("batches_fixed") == 1:
        note += f"; of the {evidence.number('n') / evidence.number('batch_size'):.0f} blocks of a partition"
    if broken.any():
        note = f"σ_b² = {variance[worst]:.4g} is not in [0, v L = {bound[worst]:.4g}]"
    outcome: Outcome = "refuted" if broken.any() else "not refuted"
    return Verdict(
        "growth", REFERENCE, outcome, measured=float(variance[worst]), bound=float(bound[worst]),
        margin=factor(float(variance[worst]), float(bound[worst])), step=int(evidence.epochs[worst]),
        units="L² / parameter²", note=note, inconsistent=outcome == "refuted",
    )  # fmt: skip


def _one_step(evidence: Evidence, found: Noise) -> tuple[Verdict, ...]:
    """Hold the mean of L(θ - η g_B) - L over batches against what the sharpness at the probe promises."""
    slope, variance = evidence.probe("probe_grad_sq_norm"), found.variance
    eta, beta = evidence.eta, evidence.probe("sharpness") * (1 + HESSIAN_ERROR)
    mean, off = evidence.probe("batch_decrease"), evidence.probe("batch_decrease_error")
    bound = -eta * (1 - eta * beta / 2) * slope + eta**2 * beta * variance / 2
    slack = off + SUMS * (evidence.probe("probe_loss") + np.abs(bound))
    known = np.isfinite(mean) & np.isfinite(bound) & np.isfinite(slack)
    if not known.any():
        return ()
    # All of several intervals hold but for LEVEL: one grows by no more than the logarithm of its probability does.
    slack += off * max(math.log(4 * known.sum() / LEVEL) / math.log(4 / INTERVAL_LEVEL) - 1, 0.0)
    over = np.where(known, mean - bound - slack, -np.inf)
    worst = int(np.argmax(over))
    outcome: Outcome = "refuted" if over[worst] > 0 else "not refuted"
    falls = int(np.sum(known & (bound < 0)))
    exact = "exactly" if (off[known] == 0).all() else "to its interval"
    note = f"the mean step of {int(known.sum())} probes, {exact}; a fall is promised at {falls}"
    if outcome == "refuted":
        note += f"; β at step {evidence.epochs[worst]} does not bound the curvature along the steps"
    part = Verdict(
        "one_step", REFERENCE, outcome, measured=float(mean[worst]), bound=float(bound[worst]),
        step=int(evidence.epochs[worst]), units=LOSS_UNITS, note=note,
    )  # fmt: skip
    return (part,)


def _outside(evidence: Evidence, name: str) -> Verdict | None:
    """Return the part on the run as a whole where nothing is stated of it, None where something is."""
    method = evidence.batch_method
    outcome: Outcome = "not applicable"
    if evidence.number("batches_independent") != 1:
        note = "outside the theorem: a pass uses every sample once, so its batches are not independent"
    elif evidence.loss != "squared":
        note = "the rate asks for ‖∇L‖² >= 2 μ L, of squared loss"
    elif method.kind == "unseen":
        outcome, note = "undecided", f"{method.note} beside the gradient of its batch"
    elif not method.plain:
        note = f"it is about steps -η g_B with one η; {method.note}"
    else:
        return None
    return Verdict(name, REFERENCE, outcome, note=note)


@dataclass(frozen=True)
class Constants:
    """What the probes say along the run, NaN where one of them is not known, and η and κ.

    Attributes:
        eta: η, as the steps show it.
        least: μ.
        largest: Λ.
        beta: β, with its error.
        growth: v.
        rounding: κ, by how much a step may be off -η g_B.
    """

    eta: float
    least: Float[np.ndarray, " k"]
    largest: Float[np.ndarray, " k"]
    beta: Float[np.ndarray, " k"]
    growth: Float[np.ndarray, " k"]
    rounding: float

    @property
    def rate(self) -> Float[np.ndarray, " k"]:
        """The q of every probe."""
        return rate(self.eta, self.beta, self.least, self.largest, self.growth)

    @property
    def worst(self) -> "Constants | None":
        """One set for the whole way, of arrays of length 1; None where one of them is not known at all."""
        known = [values[np.isfinite(values)] for values in (self.least, self.largest, self.beta, self.growth)]
        if not all(values.size for values in known):
            return None
        least, largest, beta, growth = known
        ends = (least.min(), largest.max(), beta.max(), growth.max())
        least, largest, beta, growth = (np.array([end]) for end in ends)
        return Constants(self.eta, least, largest, beta, growth, self.rounding)


def _constants(evidence: Evidence, growth: Float[np.ndarray, " k"]) -> Constants:
    least, largest = (evidence.probe(name) / evidence.probe_scale for name in ("ntk_min_eig", "ntk_max_eig"))
    beta, eta = evidence.probe("sharpness") * (1 + HESSIAN_ERROR), evidence.batch_method.eta
    # A batch of like samples has √(n/b) times the relative rounding of all.
    of_gradient = math.sqrt(evidence.number("n") / evidence.number("batch_size")) * evidence.gradient_error
    with np.errstate(invalid="ignore"):  # a step of length 0 has no relative rounding
        of_step = evidence.series("batch_step_rounding") * eta * np.sqrt(evidence.series("batch_grad_sq_norm"))
    seen = of_step[np.isfinite(of_step)]
    rounding = eta * float(of_gradient[evidence.seen].max(initial=0.0)) + float(seen.max(initial=0.0))
    return Constants(eta, np.maximum(least, 0.0), largest, beta, growth, rounding)


def rate(eta: float, beta: Any, least: Any, largest: Any, growth: Any) -> Any:
    """Return q of E L_{t+1} <= (1 - q) L_t, for numbers or arrays of them.

    Args:
        eta: η.
        beta: β, the curvature along the steps at most.
        least: μ, with 2 μ L <= ‖∇L‖².
        largest: Λ, with ‖∇L‖² <= 2 Λ L, which a full step beyond 2/β calls for.
        growth: v.
    """
    left = 1 - eta * beta / 2
    return 2 * eta * np.where(left >= 0, least, largest) * left - eta**2 * beta * growth / 2


def _containment(evidence: Evidence, growth: Float[np.ndarray, " k"]) -> Verdict:
    """Hold the largest drift against the radius that a run leaves with small probability."""
    name = "containment"
    if outside := _outside(evidence, name):
        return outside
    if not (evidence.end and evidence.epochs.size and evidence.epochs[0] == 0 and evidence.seen[0]):
        return Verdict(name, REFERENCE, "undecided", note="it asks for a probe at step 0")
    found = _constants(evidence, growth)
    worst = found.worst
    if worst is None or not math.isfinite(found.rounding):
        return Verdict(name, REFERENCE, "undecided", note="q asks for kernel, sharpness and noise at the probes")
    q, eta = float(worst.rate[0]), worst.eta
    if not q > 0:
        note = f"promises nothing: q = {q:.3g} with the worst μ, β and v of the probes is not above 0"
        return Verdict(name, REFERENCE, "not applicable", measured=evidence.radius, units="parameter", note=note)
    steep, beta = 2 * float(worst.largest[0]) + float(worst.growth[0]), float(worst.beta[0])
    left = (1 - SHARE) * min(q, 1.0)
    level = ((1 + eta * beta) * found.rounding) ** 2 * steep / (4 * SHARE * q) + beta * found.rounding**2 / 2
    a_step = found.rounding + eta * math.sqrt(steep * level / left)
    first = float(evidence.series("loss")[0] + evidence.loss_noise[0])
    mean = eta * math.sqrt(steep * first) / (1 - math.sqrt(1 - left)) + evidence.total * a_step
    drift, radius = evidence.radius, mean / LEVEL
    p = min(1.0, mean / drift) if drift > 0 else 1.0
    outcome: Outcome = "refuted" if p <= LEVEL else "not refuted"
    told = f"a drift of {drift:.4g} or more has probability {p:.2g} at most"
    told += ", so it is refuted at this level" if outcome == "refuted" else ", which says nothing" if p == 1 else ""
    probes = int(np.isfinite(found.beta).sum())
    note = f"{told}; q = {q:.3g} with the worst μ, Λ, β and v of {probes} probes, not proved"
    note += f"; the mean path is {mean:.4g} at most, and a ball of R = {radius:.4g} is left with probability {LEVEL:g}"
    return Verdict(
        name, REFERENCE, outcome, measured=drift, bound=radius, margin=factor(drift, radius), units="parameter",
        note=f"{note}; {evidence.batch_method.coverage}",
    )  # fmt: skip


def _supermartingale(evidence: Evidence, growth: Float[np.ndarray, " k"]) -> Verdict:
    """Hold sup L_t / (L_0 Π (1 - q_k + δ_k)) against what Ville's inequality allows."""
    name = "supermartingale"
    if outside := _outside(evidence, name):
        return outside
    found = _constants(evidence, growth)
    q = found.rate
    known = np.isfinite(q) & (q < 1)
    if not known.any() or evidence.epochs[int(np.argmax(known))] != 0 or not evidence.seen[0]:
        return Verdict(name, REFERENCE, "undecided", note="q asks for kernel, sharpness and noise at step 0")
    noise = evidence.loss_noise[evidence.seen]
    if not (math.isfinite(found.rounding) and np.isfinite(noise).all()):
        return Verdict(name, REFERENCE, "undecided", note="the rounding of losses and gradients has no estimate")
    at, q = evidence.epochs[known], q[known]
    steep, beta = (2 * found.largest + found.growth)[known], found.beta[known]
    steps, loss = (values[evidence.seen] for values in (evidence.steps, evidence.series("loss")))
    # From one step that was seen to the next: q of the last probe before, δ at the lesser loss of the two.
    place = np.searchsorted(at, steps[:-1], side="right") - 1
    lower = np.minimum(loss[1:] - noise[1:], loss[:-1] - noise[:-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        each = (1 + found.eta * beta[place]) * found.rounding * np.sqrt(steep[place] / np.maximum(lower, 0.0))
        each += beta[place] * found.rounding**2 / (2 * np.maximum(lower, 0.0))
        each = np.where(lower > 0, each, np.inf)
        falls = np.concatenate([[0.0], np.cumsum(np.diff(steps) * np.log1p(each - q[place]))])
        logs = np.log(np.maximum(loss - noise, 0.0)) - np.log(loss[0] + noise[0]) - falls
    logs = np.where(np.isnan(logs), -np.inf, logs)
    worst = int(np.argmax(logs))
    e = math.exp(min(float(logs[worst]), 700.0))
    p = min(1.0, 1 / e) if e > 0 else 1.0
    outcome: Outcome = "refuted" if p <= LEVEL else "not refuted"
    told = f"refuted at level p = {p:.2g}" if outcome == "refuted" else f"not refuted, p <= {p:.2g}"
    promised = "a fall is promised" if (q > 0).all() else f"q > 0 at {int((q > 0).sum())} of {q.size} probes"
    note = f"{told}; e = {e:.4g} with μ, β and v of the probe before each step; {promised}"
    level = np.flatnonzero((each > np.abs(q[place])) & (np.diff(steps) > 0))
    if level.size:
        note += f"; from step {steps[level[0]]} on rounding may outweigh q"
    return Verdict(
        name, REFERENCE, outcome, measured=e, bound=1 / LEVEL, margin=factor(e, 1 / LEVEL), step=int(steps[worst]),
        units="1", note=f"{note}; {evidence.batch_method.coverage}",
    )  # fmt: skip


def example() -> Record:
    """Return the regression of `linear_regression` as batches of two would see it: Θ is diagonal, so is each sample."""
    record = linear_regression()
    n = int(record["n"])
    squares = n * np.asarray(record["probe_grad_sq_norm"])  # Σ ‖∇ℓ_i‖² = ‖∇L‖² for orthogonal rows, G_i = n ∇ℓ_i
    # A sample is in a batch of 2 with probability 2/n, and has weight ½ there: E g_B² = (2/n) G²/4 along its own row.
    modes = 2 * record["residual_energy"] * record["probe_loss"][:, None]
    curved = (modes * EIGENVALUES**2).sum(axis=1) * n / 2
    more = {
        "batch_decrease": -ETA * record["probe_grad_sq_norm"] + ETA**2 / 2 * curved,
        "batch_decrease_error": np.zeros(squares.size),
        "sample_grad_sq_norm": squares,
        "sample_kernel_max": np.full(squares.size, float(record["ntk_max_eig"][0])),
        # Of a batch of 2 E‖g_B‖² = ‖∇L‖² + σ_b² = (n/2) ‖∇L‖².
        "batch_grad_sq_norm": record["grad_sq_norm"] * n / 2,
        "batch_step_size": record["step_size"],
        "batch_step_deviation": record["step_deviation"],
        "batch_step_rounding": record["step_rounding"],
        "batch_size": np.asarray(2),
        "batches_independent": np.asarray(1),
    }
    return Record(record.experiment, {**record.arrays, **more}, record.config)


NOISE = Claim(
    id="noise",
    reference=REFERENCE,
    statement="The noise of mini-batches goes with the loss, and the loss falls on average.",
    latex=r"\sigma_b^2 \le v\,L(\theta_t), \qquad \mathbb{E}\,L(\theta_{t+1}) \le (1 - q)\,L(\theta_t)",
    needs=("sample_grad_sq_norm", "sample_kernel_max"),
    rests_on=Rests(
        kernels=("", "growth", "one_step", "supermartingale", "containment"),
        hessians=("one_step", "supermartingale", "containment"),
    ),
    loss=tuple(GROWTH),
    check=noise,
    example=example,
)
