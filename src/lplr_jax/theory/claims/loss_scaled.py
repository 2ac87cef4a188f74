"""The linear rate of loss-scaled steps on logistic loss and cross-entropy. Ours, not the paper's.

Let s = n, q̄ = mean(1 - e^{-ℓ_i}), K >= ‖∇f_ik‖ and S >= ‖Σ u_k ∇²f_ik‖ for unit u, and B = K² + S for logistic loss,
2K² + √2 S for softmax. Then ‖∇²L‖ <= B q̄. With η_t = ln 2/(B q̄_t) margins move by at most ln 2 along the step, as
‖∇L‖ <= K' q̄ with K'² <= B, so that q̄ grows by a factor of at most 2^u on a share u of it, and

    L_{t+1} <= L_t - η_t ‖∇L_t‖² (1 - ln 2 ∫ (1 - u) 2^u du) = L_t - a η_t ‖∇L_t‖²,   a = 2 - 1/ln 2 = .557.

‖∇L‖² >= (γλ/n) q̄² for every ℓ, and q̄ >= L/(2 ln 2) where no ℓ_i is beyond ln 2 (1 - e^{-x} lies above its chord):

    L_{t+1} <= (1 - (1 - 1/(2 ln 2)) γλ_t/(n B_t)) L_t.

Of a run B_t = ln 2/(η_t q̄_t) is what the step shows, and q̄_t >= L_t/(2 ln 2) bounds it by 2 ln² 2/(η_t L_t), no more
than 2 ln 2 times what it is. No K, S or β enters then, and a_t is measured: what is held is a product that holds for
any steps, and falls linearly where they grow like 1/L.
"""

import math

import numpy as np

from lplr_jax.schema import LOSS_SCALED_DECREASE
from lplr_jax.theory.claims.decrease import decrease_of
from lplr_jax.theory.claims.held import diverges, held
from lplr_jax.theory.claims.loss_bridge import MARGINS, chain_of, window_of
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, at_least, at_most, factor

REFERENCE = "ours (loss-scaled step)"


def loss_scaled(evidence: Evidence) -> bool:
    """Return whether the steps were seen to grow as L falls, as those of the rule do, and of others that follow β."""
    method = evidence.method
    if evidence.loss not in MARGINS or method.kind != "gradient descent" or method.fixed:
        return False
    loss = evidence.series("loss")
    with np.errstate(divide="ignore", invalid="ignore"):
        sizes, losses = np.log(method.sizes), np.log(loss)
    known = np.isfinite(sizes + losses)
    sizes, losses = sizes[known] - np.mean(sizes[known]), losses[known] - np.mean(losses[known])
    return bool(np.sum(sizes * losses) < 0)


def loss_scaled_rate(evidence: Evidence) -> Verdict:
    """Hold L_{t+1} <= (1 - .2786 γλ_t/(n B_t)) L_t from the first probe on from which no sample is beyond ln 2."""
    head = f"Theorem 5.7 is about the squared loss; {evidence.method.note}; ours: steps that grow as L falls"
    if leaves := diverges(evidence):
        return Verdict("linear_rate", REFERENCE, "not applicable", note=f"{head}; {leaves.note}")
    chain = chain_of(evidence)
    window = window_of(evidence, chain, whole=False)
    if isinstance(window, str):
        return Verdict("linear_rate", REFERENCE, "undecided", note=f"{head}; {window}")
    found, loss = decrease_of(evidence), evidence.series("loss")
    inside = (found.at >= window.start) & (found.at < window.stop)
    if found.rises[inside].any():
        rises = f"the loss rises at {int(found.rises[inside].sum())} steps of the window"
        return Verdict("linear_rate", REFERENCE, "not applicable", note=f"{head}; {rises}")
    least = np.nan_to_num(np.maximum(found.value[inside] - found.noise[inside], 0.0))
    kept = np.minimum(least, LOSS_SCALED_DECREASE) / LOSS_SCALED_DECREASE
    size = window.size * (1 - np.nan_to_num(evidence.method.allowed[window.at], nan=1.0))
    most = 2 * math.log(2) ** 2 / (size * loss[window.at])  # of B_t
    falls = (1 - 1 / (2 * math.log(2))) * kept * window.rate / most
    curve = float(loss[window.start]) * np.concatenate([[1.0], np.cumprod(np.maximum(1 - falls, 0.0))])
    at = np.arange(window.start, window.stop + 1)
    note = f"L_(t+1) <= (1 - .2786 γλ_t/(n B_t)) L_t over {window.at.size} steps from epoch {evidence.steps[at[0]]} on"
    note += f", with k = 0 and λ at {window.probes} probes and not checked between; B_t <= {at_most(most.max(), 4)} as "
    note += (
        f"the steps show it, measured and not proved; L falls by {at_least(float(falls.min()), 3)} of itself or more"
    )
    if window.stop < evidence.at[-1]:
        note += f"; held to step {evidence.steps[window.stop]}, as {evidence.method.coverage}"
    bound = held(evidence, "bound_pointwise", curve, at, False, note, reference=REFERENCE)
    parts = (_decrease(evidence, inside), bound)
    return bound.standing_for("linear_rate", REFERENCE, bound.outcome, f"{head}; {note}").with_parts(*parts)


def _decrease(evidence: Evidence, inside: np.ndarray) -> Verdict:
    """Hold a_t >= .557, which B >= ‖∇²L‖/q̄ implies for η_t = ln 2/(B q̄_t)."""
    found = decrease_of(evidence)
    value, noise = found.value[inside], found.noise[inside]
    short = value < LOSS_SCALED_DECREASE - noise
    known = np.flatnonzero(np.isfinite(value + noise))
    worst = int(known[np.argmin(value[known])]) if known.size else None
    outcome: Outcome = "undecided" if worst is None else "refuted" if short.any() else "not refuted"
    note = f"a_t >= 2 - 1/ln 2 = {LOSS_SCALED_DECREASE:.4f} at {int(value.size - short.sum())} of {value.size} steps"
    if short.any():
        note += ": B is too small there, and the measured a_t stands in the bound"
    least = float(value[worst]) if worst is not None else math.nan
    return Verdict(
        "decrease", REFERENCE, outcome, measured=least, bound=LOSS_SCALED_DECREASE,
        margin=factor(LOSS_SCALED_DECREASE, least),
        step=None if worst is None else int(evidence.steps[found.at[inside][worst]]), units="1", note=note,
    )  # fmt: skip
