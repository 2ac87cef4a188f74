"""Claim `noise`: what mini-batches do to the linear rate. Ours, not the paper's.

With G_i = (n/s) ∇ℓ_i and S² = (1/n) Σ ‖G_i‖² - ‖∇L‖², a batch of b drawn without replacement has
σ_b² = E‖g_B - ∇L‖² = (S²/b) (n - b)/(n - 1), exactly. As ‖g_i‖² <= k ℓ_i, with k = 2 for the squared loss,

    σ_b² <= v L,   v = k (n/s) max_i λ_max(Θ_ii) (n - b) / (b (n - 1)),

so the noise goes with the loss. Where β bounds the curvature on the segments of all batches,

    E L(θ - η g_B) <= L - η (1 - ηβ/2) ‖∇L‖² + η² β σ_b² / 2 <= (1 - q) L,   q = 2ημ (1 - ηβ/2) - η² β v / 2.

If that holds at every step, Y_t = L_t / Π (1 - q_k) is a non-negative supermartingale, and P(sup Y_t >= L_0/δ) <= δ.
One run proves nothing of an expectation, but may refute it.
"""

import math

import numpy as np
from jaxtyping import Float

from lplr_jax.records import Record
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import EIGENVALUES, ETA, linear_regression
from lplr_jax.theory.evidence import GROWTH, HESSIAN_ERROR, LOSS_UNITS, SUMS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor, weakest

REFERENCE = "ours (noise)"
LEVEL = 0.01
"""Probability below which the hypothesis is refuted by a run. Calibrated."""


def noise(evidence: Evidence) -> Verdict:
    """Hold the noise of mini-batches against its growth bound, one step against its expectation, and the run.

    "not applicable" where every step uses all data. Parts: `growth` σ_b² <= v L at every probe, a theorem, so that
    "refuted" is a contradiction; `one_step` the mean decrease of one step, as an average over batches with its
    interval, against the bound with the measured sharpness; `supermartingale` the largest L_t/(L_0 Π (1 - q_k)) with
    q_k from the probe before, refuted at level p = 1/e, never proved. A pass in which every sample comes once is
    outside the theorem, as its batches after the first are not drawn without regard to those before.
    """
    b, n = evidence.number("batch_size"), evidence.number("n")
    if math.isnan(b) or b >= n:
        return Verdict("noise", REFERENCE, "not applicable", note="every step uses all data, as far as is recorded")
    if evidence.partial:
        return Verdict("noise", REFERENCE, "undecided", note=f"{evidence.partial}: the noise is that of all samples")
    share = (n - b) / (b * (n - 1)) if n > 1 else 0.0
    largest = evidence.probe("sample_kernel_max")
    growth = evidence.growth * (n / evidence.s) * largest * share
    slope = evidence.probe("probe_grad_sq_norm")
    variance = (evidence.probe("sample_grad_sq_norm") - slope) * share
    parts = (
        _growth(evidence, variance, growth, share),
        *_one_step(evidence, slope, variance),
        _supermartingale(evidence, growth),
    )
    outcome = weakest(part.outcome for part in parts)
    worst = next((part for part in parts if part.outcome == outcome), parts[0])
    note = "; ".join(f"{part.claim}: {part.note}" for part in parts)
    return worst.standing_for("noise", REFERENCE, outcome, note).with_parts(*parts)


def _growth(
    evidence: Evidence, variance: Float[np.ndarray, " k"], growth: Float[np.ndarray, " k"], share: float
) -> Verdict:
    """Hold 0 <= σ_b² <= v L at every probe."""
    bound = growth * evidence.probe("probe_loss")
    off = SUMS * evidence.probe("sample_grad_sq_norm") * share
    known = np.isfinite(variance) & np.isfinite(bound)
    if not known.any():
        return Verdict("growth", REFERENCE, "undecided", note="the gradients of samples were not measured")
    broken = known & ((variance > bound + off) | (variance < -off))
    ratio = np.where(known & (bound > 0), variance / np.where(bound > 0, bound, 1.0), -np.inf)
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmax(ratio))
    note = f"σ_b² <= v L at {int(known.sum())} probes, σ_b² at most {ratio.max():.3g} of v L"
    if broken.any():
        note = f"σ_b² = {variance[worst]:.4g} is not in [0, v L = {bound[worst]:.4g}]"
    outcome: Outcome = "refuted" if broken.any() else "not refuted"
    return Verdict(
        "growth", REFERENCE, outcome, measured=float(variance[worst]), bound=float(bound[worst]),
        margin=factor(float(variance[worst]), float(bound[worst])), step=int(evidence.epochs[worst]),
        units="L² / parameter²", note=note, inconsistent=outcome == "refuted",
    )  # fmt: skip


def _one_step(
    evidence: Evidence, slope: Float[np.ndarray, " k"], variance: Float[np.ndarray, " k"]
) -> tuple[Verdict, ...]:
    """Hold the mean of L(θ - η g_B) - L over batches against what the sharpness at the probe promises."""
    eta, beta = evidence.eta, evidence.probe("sharpness") * (1 + HESSIAN_ERROR)
    mean, off = evidence.probe("batch_decrease"), evidence.probe("batch_decrease_error")
    bound = -eta * (1 - eta * beta / 2) * slope + eta**2 * beta * variance / 2
    slack = off + SUMS * (evidence.probe("probe_loss") + np.abs(bound))
    known = np.isfinite(mean) & np.isfinite(bound) & np.isfinite(slack)
    if not known.any():
        return ()
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


def _supermartingale(evidence: Evidence, growth: Float[np.ndarray, " k"]) -> Verdict:
    """Hold sup L_t / (L_0 Π (1 - q_k)) against what Ville's inequality allows."""
    name = "supermartingale"
    if evidence.number("batches_independent") != 1:
        note = "outside the theorem: a pass uses every sample once, so its batches are not independent"
        return Verdict(name, REFERENCE, "not applicable", note=note)
    if evidence.loss != "squared":
        return Verdict(name, REFERENCE, "not applicable", note="the rate asks for ‖∇L‖² >= 2 μ L, of squared loss")
    eta, beta = evidence.eta, evidence.probe("sharpness")
    mu = np.maximum(evidence.probe("ntk_min_eig"), 0.0) / evidence.probe_scale
    q = 2 * eta * mu * (1 - eta * beta / 2) - eta**2 * beta * growth / 2
    known = np.isfinite(q) & (q < 1)
    if not known.any() or evidence.epochs[int(np.argmax(known))] != 0 or not evidence.seen[0]:
        return Verdict(name, REFERENCE, "undecided", note="q asks for kernel, sharpness and noise at step 0")
    at, q = evidence.epochs[known], q[known]
    steps = evidence.steps[evidence.seen]
    # log Π (1 - q_k) up to step t, q_k that of the last probe before.
    lengths = np.clip(steps[:, None] - at[None], 0, np.diff(at, append=np.iinfo(np.int64).max))
    falls = lengths.astype(np.float64) @ np.log1p(-q)
    loss = evidence.series("loss")[evidence.seen]
    with np.errstate(divide="ignore"):
        logs = np.log(loss) - math.log(loss[0]) - falls if loss[0] > 0 else np.zeros_like(loss)
    worst = int(np.argmax(logs))
    e = math.exp(min(float(logs[worst]), 700.0))
    p = min(1.0, 1 / e)
    outcome: Outcome = "refuted" if p <= LEVEL else "not refuted"
    told = f"refuted at level p = {p:.2g}" if outcome == "refuted" else f"not refuted, p <= {p:.2g}"
    promised = "a fall is promised" if (q > 0).all() else f"q > 0 at {int((q > 0).sum())} of {q.size} probes"
    note = f"{told}; e = {e:.4g} with μ, β and v of the probe before each step; {promised}"
    return Verdict(
        name, REFERENCE, outcome, measured=e, bound=1 / LEVEL, margin=factor(e, 1 / LEVEL), step=int(steps[worst]),
        units="1", note=note,
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
    rests_on=Rests(kernels=("", "growth", "one_step", "supermartingale"), hessians=("one_step", "supermartingale")),
    loss=tuple(dict.fromkeys(name.partition("(")[0] for name in GROWTH)),
    check=noise,
    example=example,
)
