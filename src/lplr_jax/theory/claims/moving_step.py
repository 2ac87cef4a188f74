"""The linear rate where η_t moves: a product in place of a power. Ours, not the paper's.

By the definition of a_t, L_{t+1} = L_t - a_t η_t ‖∇L_t‖², and ‖∇L_t‖² >= 2 μ_t L_t with μ_t = λ_min(Θ_t)/s. So with
a_t >= 0 at every step L_T <= L_0 Π (1 - 2 a_t η_t μ_t)_+, for steps chosen by any rule: a share of 1/β, a line search,
Polyak's, a decaying one. No smoothness enters; at probes alone μ_t is not checked between them.

Of a cosine, η_t = η_0 (1 + cos(π t/T))/2 for t < T, the sum is Σ η_t = η_0 (T + 1)/2 exactly: cos(π t/T) of t and T - t
cancel, and that of t = 0 is left. So L_T <= L_0 exp(-a μ η_0 (T + 1)) with the least a_t and μ_t, as 1 - x <= e^{-x}.
"""

import math

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.schema import PATH_SHARE
from lplr_jax.theory.claims.decrease import Decrease, decrease_of
from lplr_jax.theory.claims.held import diverges, held
from lplr_jax.theory.evidence import SUMS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor

REFERENCE = "ours (moving step)"
COSINE = 1e-2
"""Distance from η_0 (1 + cos(π t/T))/2, in units of η_0, within which steps count as a cosine's. Calibrated."""
BINDS = 1e-3
"""Relative distance from the largest step that a path's budget allows within which it decides the step. Calibrated."""


def moving_rate(evidence: Evidence, theorem: float, containment: tuple[Verdict, ...], law: Verdict) -> Verdict:
    """Hold L_t <= L_0 Π (1 - 2 a_t η_t μ_t)_+ from step 0 up to the first step that was not seen and resolved.

    Args:
        evidence: of a run whose steps are along the gradient, with η_t that moves.
        theorem: μ of the region in units of L, proved; not positive where none is.
        containment: parts on the ball that the proof is made for.
        law: the part on the kind of decay.
    """
    found, method = decrease_of(evidence), evidence.method
    head = f"Theorem 5.7 is about gradient descent with a fixed step; {method.note}; ours: a product for the power"
    last = int(np.sum(found.at == np.arange(found.at.size)))
    leaves = diverges(evidence)
    bounds = () if found.rises.any() or leaves else _products(evidence, found, last, theorem)
    budget = _budget(evidence)
    parts = (*budget, *containment, *bounds, *_cosine(evidence, found, bounds), law)
    binds = next((part.note for part in budget if part.outcome != "refuted" and "binds" in part.note), "")
    broken = next((part for part in budget if part.outcome == "refuted"), None)
    outcome: Outcome = "undecided"
    if broken is not None:
        outcome, note = "refuted", f"{head}; {broken.note}"
    elif found.rises.any():
        rises, first = int(found.rises.sum()), int(evidence.steps[found.at[int(np.argmax(found.rises))]])
        outcome, note = "not applicable", f"{head}; it asks for a_t >= 0, and the loss rises at {rises} steps"
        note += f", first from step {first}"
    elif leaves:
        outcome, note = "not applicable", f"{head}; it asks for a_t >= 0, and {leaves.note}"
    elif binds:
        outcome, note = "not applicable", f"{head}; {binds}: the rate theorem is not in force"
    elif not bounds:
        note = f"{head}; no positive μ is known" if last else f"{head}; the step from 0 was not seen"
    else:
        outcome, note = bounds[0].outcome, f"{head}; {bounds[0].note}"
        if outcome == "not refuted" and last < method.total:
            note += f"; held to step {evidence.steps[last]}, as {method.coverage}"
    shown = broken or (bounds[0] if bounds else Verdict("none", REFERENCE, outcome))
    contradiction = outcome == "refuted" and (broken is not None or shown.claim == "bound_theorem")
    verdict = shown.standing_for("linear_rate", REFERENCE, outcome, note, inconsistent=contradiction)
    return verdict.with_parts(*parts)


def _products(evidence: Evidence, found: Decrease, last: int, theorem: float) -> tuple[Verdict, ...]:
    """Return the products with the μ of the region, and with those of the probes, up to the position `last`."""
    if not last:
        return ()
    # What rounding leaves open of a_t is taken off it, so that a_t η_t ‖∇L_t‖² is at most what the loss fell by.
    least = np.nan_to_num(np.maximum(found.value[:last] - found.noise[:last], 0.0))
    at, first = np.arange(last + 1), float(evidence.series("loss")[0])
    time = float(np.sum(least * found.size[:last]))
    spent = f"Σ a_t η_t = {time:.4g} over {last} steps"

    def curve(mu: float | Float[np.ndarray, " k"]) -> Float[np.ndarray, " t"]:
        factors = np.maximum(1 - 2 * least * found.size[:last] * mu, 0.0)
        return first * np.concatenate([[1.0], np.cumprod(factors)])

    parts = []
    if theorem > 0:
        note = f"L_t <= L_0 Π (1 - 2 a_t η_t μ)_+ with μ = {theorem:.4g} in units of L, proved; {spent}"
        parts.append(held(evidence, "bound_theorem", curve(theorem), at, False, note, reference=REFERENCE))
    mu, everywhere = _pointwise(evidence, last)
    if (mu > 0).any():
        where = "at every iterate" if everywhere else "the least of the probes on either side, not checked between"
        note = f"L_t <= L_0 Π (1 - 2 a_t η_t μ_t)_+ with μ_t = λ_min/s {where}; {spent}"
        parts.append(held(evidence, "bound_pointwise", curve(mu), at, False, note, reference=REFERENCE))
    return tuple(parts)


def _pointwise(evidence: Evidence, last: int) -> tuple[Float[np.ndarray, " k"], bool]:
    """Return μ_t of the steps before a position, 0 where none is known, and whether each is of a probe of its own."""
    value = evidence.probe("ntk_min_eig") / evidence.probe_scale
    known = np.isfinite(value) & (not evidence.partial)
    at, value = evidence.at[known], np.maximum(value[known], 0.0)
    if not at.size:
        return np.zeros(last), False
    steps: Int[np.ndarray, " k"] = np.arange(last)
    after = np.searchsorted(at, steps)  # the first probe at the step or behind it
    own = at[np.minimum(after, at.size - 1)] == steps
    right = np.where(after < at.size, value[np.minimum(after, at.size - 1)], 0.0)
    left = np.where(after > 0, value[np.maximum(after - 1, 0)], 0.0)
    return np.where(own, right, np.minimum(left, right)), bool(own.all())


def _cosine(evidence: Evidence, found: Decrease, bounds: tuple[Verdict, ...]) -> tuple[Verdict, ...]:
    """Return what half a cosine has for a sum, where the steps are near one, and what follows for the last loss."""
    method = evidence.method
    count = method.total
    if not (evidence.whole and method.everywhere and found.covers(0, count)) or count < 2:
        return ()
    first, sizes = float(method.sizes[0]), method.sizes[:count]
    if np.abs(sizes - first * (1 + np.cos(np.pi * np.arange(count) / count)) / 2).max() > COSINE * first:
        return ()
    total, closed = float(sizes.sum()), first * (count + 1) / 2
    off = float((sizes * method.allowed[:count]).sum()) + closed * float(method.allowed[0])
    outcome: Outcome = "not refuted" if abs(total - closed) <= off else "refuted"
    note = f"Σ η_t = {total:.6g} over {count} steps, η_0 (T + 1)/2 = {closed:.6g} of half a cosine, ± {off:.1g}"
    if outcome == "refuted":
        note += ": the steps are near a cosine and not those of one"
    part = Verdict("cosine", REFERENCE, outcome, measured=total, bound=closed, units="parameter² / L", note=note)
    least = float(np.nan_to_num(found.value - found.noise).min())
    mu = float(_pointwise(evidence, count)[0].min())
    if outcome == "refuted" or not (bounds and least > 0 and mu > 0):
        return (part,)
    closing = np.array([1.0, math.exp(-2 * least * mu * (closed - off))]) * float(evidence.series("loss")[0])
    told = f"L_T <= L_0 exp(-a μ η_0 (T + 1)), a = {least:.4g}, μ = {mu:.4g} in units of L at the least of the probes"
    return part, held(evidence, "bound_cosine", closing, np.array([0, count]), False, told, reference=REFERENCE)


def _budget(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return the length of the path against the budget that the steps were to keep, and where it decided them."""
    radius = evidence.number("path_budget")
    if math.isnan(radius):
        return ()
    size, gradient = evidence.method.sizes, np.sqrt(evidence.series("grad_sq_norm"))
    lengths = np.nan_to_num(size * gradient)
    before = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    path = float(lengths.sum())
    off = float(np.nansum(lengths * np.nan_to_num(evidence.method.allowed))) + SUMS * radius
    longest = max(path, evidence.radius)
    outcome: Outcome = "refuted" if longest > radius + off else "not refuted"
    binding = np.flatnonzero((lengths > 0) & (lengths >= (1 - BINDS) * PATH_SHARE * (radius - before) - off))
    note = f"the path of {path:.4g} stays below the budget R = {radius:.4g}, and so does the drift"
    if outcome == "refuted":
        note = f"the path of {path:.4g} or the drift of {evidence.radius:.4g} exceeds the budget R = {radius:.4g}"
    elif binding.size:
        note += f"; the budget binds at {binding.size} steps, first from step {evidence.steps[binding[0]]}"
    part = Verdict(
        "budget", REFERENCE, outcome, measured=longest, bound=radius, margin=factor(longest, radius), units="parameter",
        note=note, inconsistent=outcome == "refuted",
    )  # fmt: skip
    return (part,)
