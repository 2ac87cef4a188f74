"""Claims about the kernel: λ_0 > 0, its Lipschitz constant, their compatibility, and Weyl's inequality."""

import math

import numpy as np

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.theory.evidence import KERNEL_UNITS, LIPSCHITZ_UNITS, Evidence
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, factor, weakest

AFFINE = "the jaxpr shows that the Jacobian does not depend on θ"


def ntk_positive(evidence: Evidence) -> Verdict:
    """Assumption 5.1 (a): λ_0 > 0.

    "proved" by an interval for the full kernel that includes its assembly error; "refuted" by counting where the kernel
    has more rows than there are parameters; "undecided" where the interval holds zero.
    """
    reference, budget = "Assumption 5.1 (a)", evidence.budget
    if budget is None:
        return Verdict("ntk_positive", reference, "undecided", note="λ_min was not measured at epoch 0")
    outcome: Outcome
    if evidence.kernel_size > evidence.number("p"):
        outcome = "refuted"
        note = f"p = {int(evidence.number('p'))} is below the kernel's {evidence.kernel_size} rows, so λ_0 = 0"
    elif budget.upper <= 0:
        outcome, note = "refuted", "the interval of λ_0 ends at or below zero"
    elif budget.lower <= 0:
        outcome, note = "undecided", f"the interval [{budget.lower:.3g}, {budget.upper:.3g}] holds zero"
    elif budget.certified:
        outcome, note = "proved", f"λ_0 >= {budget.lower:.6g}, error of assembly included"
    elif evidence.partial:
        outcome, note = "not refuted", f"{evidence.partial}: an upper bound of λ_0, which cannot support it"
    else:
        outcome, note = "not refuted", f"λ_0 >= {budget.lower:.6g} relative to the computed kernel"
    spread = budget.value - budget.lower
    verdict = Verdict(
        "ntk_positive",
        reference,
        outcome,
        measured=budget.value,
        bound=0.0,
        margin=factor(spread, budget.value) if outcome != "refuted" else 0.0,
        step=0,
        units=KERNEL_UNITS,
        note=f"{note}; margin in units of its own error",
    )
    return verdict.with_parts(*_positive_along(evidence), *_flattery(evidence))


def _positive_along(evidence: Evidence) -> tuple[Verdict, ...]:
    intervals = [evidence.interval(k) for k in range(evidence.epochs.size)]
    if not intervals:
        return ()
    worst = min(range(len(intervals)), key=lambda k: intervals[k].lower)
    least = intervals[worst]
    outcomes: list[Outcome] = []
    for interval in intervals:
        if interval.upper <= 0 or evidence.kernel_size > evidence.number("p"):
            outcomes.append("refuted")
        elif not interval.lower > 0:
            outcomes.append("undecided")
        else:
            outcomes.append("proved" if interval.certified else "not refuted")
    part = Verdict(
        "probes",
        "Lemma 5.3",
        weakest(outcomes),
        measured=least.value,
        bound=0.0,
        margin=factor(least.value - least.lower, least.value),
        step=int(evidence.epochs[worst]),
        units=KERNEL_UNITS,
        note=f"least λ_min(θ_t) over {len(intervals)} probes",
    )
    return (part,)


def _flattery(evidence: Evidence) -> tuple[Verdict, ...]:
    budget = evidence.budget
    if budget is None or not evidence.has("ntk_min_eig_subset"):
        return ()
    subset = float(evidence.probe("ntk_min_eig_subset")[0])
    size = evidence.arrays["subset_ids"].size if "subset_ids" in evidence.arrays else 0
    flattering = subset / budget.value if budget.value > 0 else math.inf
    part = Verdict(
        "subset",
        "Cauchy interlacing",
        "not refuted" if subset > 0 else "undecided",
        measured=subset,
        bound=budget.value,
        margin=flattering,
        step=0,
        units=KERNEL_UNITS,
        note=f"{size} samples: an upper bound of λ_0 that flatters it by the factor {flattering:.3g}",
    )
    return (part,)


def ntk_lipschitz(evidence: Evidence) -> Verdict:
    """Assumption 5.1 (b): Θ is Lipschitz on the region, in spectral norm.

    `measured` is the largest ratio over pairs of probes, `bound` the proved upper bound on the ball of the run. Ratios
    are lower estimates: they can contradict an upper bound, and establish none.
    """
    reference, ratio, upper = "Assumption 5.1 (b)", evidence.ratio, evidence.number("ntk_lipschitz_upper")
    outcome: Outcome
    if evidence.affine:
        outcome, upper, note = "proved", 0.0, f"L_Θ = 0 everywhere: {AFFINE}"
    elif math.isfinite(upper):
        outcome, note = (
            "proved",
            f"L_Θ <= {upper:.3g} on the ball of radius {evidence.radius:.3g}, by recursion over layers",
        )
    elif math.isfinite(ratio.value):
        outcome, note = "not refuted", "lower estimates only; no upper bound is known for this model"
    else:
        return Verdict("ntk_lipschitz", reference, "undecided", note="the shift of the kernel was not measured")
    where = "" if ratio.s is None else f"; largest ratio between epochs {ratio.s} and {ratio.t}"
    verdict = Verdict(
        "ntk_lipschitz",
        reference,
        outcome,
        measured=ratio.value,
        bound=upper if not math.isnan(upper) else NAN,
        margin=factor(ratio.value, upper),
        units=LIPSCHITZ_UNITS,
        note=note + where,
    )
    return verdict.with_parts(*_directions(evidence))


def _directions(evidence: Evidence) -> tuple[Verdict, ...]:
    found = {name: evidence.number(f"ntk_lipschitz_{name}") for name in ("random", "gradient", "power")}
    found = {name: value for name, value in found.items() if math.isfinite(value)}
    if not found:
        return ()
    words = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    largest, ratio = max(found.values()), evidence.ratio.value
    note = f"search in the ball, lower estimates: {words}"
    if ratio > 0:
        note += f"; {largest / ratio:.3g} times the largest of the trajectory"
    part = Verdict(
        "search",
        "Assumption 5.1 (b)",
        "not refuted",
        measured=largest,
        bound=evidence.number("ntk_lipschitz_upper"),
        margin=factor(largest, evidence.number("ntk_lipschitz_upper")),
        units=LIPSCHITZ_UNITS,
        note=note,
    )
    return (part,)


def lipschitz_upper(evidence: Evidence) -> float:
    """Return the proved upper bound of L_Θ on the ball of the run, NaN where there is none."""
    return 0.0 if evidence.affine else evidence.number("ntk_lipschitz_upper")


def compatibility(evidence: Evidence) -> Verdict:
    """Assumption 5.1 (c): L_Θ r < λ_0, with r the trajectory's largest drift.

    "refuted" where the lower estimate along the trajectory breaks it: then for every region that contains the run.
    "proved" where the upper bound on the ball of radius r satisfies it.
    """
    reference, budget, r = "Assumption 5.1 (c)", evidence.budget, evidence.radius
    low, high = evidence.ratio.value, lipschitz_upper(evidence)
    if budget is None or not math.isfinite(low):
        note = "λ_0 or the shift of the kernel was not measured"
        return Verdict("compatibility", reference, "undecided", note=note)
    # The upper end of a subset's or averaged kernel bounds λ_0 from above all the same.
    refuted = low * r >= max(budget.upper, 0.0) and low * r > 0
    proved = high * evidence.proof_radius * (1 + 8 * UNIT_64) < budget.lower and budget.certified
    outcome: Outcome = "refuted" if refuted else "proved" if proved else "not refuted"
    if not refuted and budget.lower <= 0:
        outcome = "undecided"
    excess = low * r / budget.value if budget.value > 0 else math.inf
    if refuted:
        note = f"L_Θ r exceeds λ_0 by the factor {excess:.2g}, on every region that contains the run"
    elif outcome == "proved" and evidence.affine:
        note = "L_Θ = 0"
    elif outcome == "proved":
        note = f"the upper bound gives L_Θ r <= {high * evidence.proof_radius:.3g}"
    elif outcome == "undecided":
        note = "λ_0 is not known to be positive"
    else:
        note = "the lower estimate satisfies it, which proves nothing"
    verdict = Verdict(
        "compatibility",
        reference,
        outcome,
        measured=low * r,
        bound=budget.value,
        margin=factor(low * r, budget.value),
        units=KERNEL_UNITS,
        note=note,
    )
    return verdict.with_parts(*_on_the_ball(evidence), *_certified_radius(evidence))


def _on_the_ball(evidence: Evidence) -> tuple[Verdict, ...]:
    budget, parts = evidence.budget, _directions(evidence)
    if budget is None or not parts:
        return ()
    product = parts[0].measured * evidence.radius
    part = Verdict(
        "ball",
        "Assumption 5.1 (c)",
        "refuted" if product >= max(budget.upper, 0.0) and product > 0 else "not refuted",
        measured=product,
        bound=budget.value,
        margin=factor(product, budget.value),
        units=KERNEL_UNITS,
        note="the same on the whole ball of the run, with the worst direction found",
    )
    return (part,)


def _certified_radius(evidence: Evidence) -> tuple[Verdict, ...]:
    certified, r = evidence.number("radius_certified"), evidence.radius
    if math.isnan(certified):
        return ()
    gradient = float(np.sqrt(evidence.series("grad_sq_norm")[0])) if evidence.end else NAN
    step, spacing = evidence.eta * gradient, evidence.number("parameter_spacing")
    note = f"R* = {certified:.3g}: the theorem is proved inside; the first step is {step:.3g} long"
    if math.isfinite(spacing):
        note += f", the float32 spacing of θ_0 {spacing:.3g}"
    part = Verdict(
        "radius",
        "Theorem 5.4",
        "proved" if certified > evidence.proof_radius else "undecided",
        measured=r,
        bound=certified,
        margin=factor(r, certified),
        units="parameter",
        note=note,
    )
    return (part,)


def weyl(evidence: Evidence) -> Verdict:
    """Lemma 5.3: |λ_min(θ_t) - λ_0| <= ‖Θ_t - Θ_0‖₂ at every probe.

    It holds for any two symmetric matrices, so a failure is the tool's.
    """
    reference, budget = "Lemma 5.3", evidence.budget
    moved = evidence.epochs > 0
    if budget is None or not evidence.has("ntk_shift") or not moved.any():
        return Verdict("weyl", reference, "undecided", note="no kernel after epoch 0 was measured")
    at, shift = evidence.epochs[moved], evidence.probe("ntk_shift")[moved]
    error = evidence.kernel_error[moved] + evidence.kernel_error[0]
    others = [evidence.interval(int(k)) for k in np.flatnonzero(moved)]
    least = np.array([max(i.lower - budget.upper, budget.lower - i.upper, 0.0) for i in others])
    most = np.array([max(i.upper - budget.lower, budget.upper - i.lower) for i in others])
    change = np.abs(np.array([i.value for i in others]) - budget.value)
    broken = ~(least <= shift * (1 + 1e-6) + error)
    # A Ritz value is at most the norm, up to the rounding of its Rayleigh quotient.
    held = most <= shift * (1 - 8 * evidence.kernel_size * UNIT_64) - error
    certified = budget.certified and all(interval.certified for interval in others)
    outcome: Outcome = "refuted" if broken.any() else "not refuted"
    if not broken.any() and certified and (held.all() or evidence.affine):
        outcome = "proved"
    with np.errstate(divide="ignore", invalid="ignore"):
        looseness = np.where(change > 0, shift / change, np.inf)
    worst = int(np.argmax(broken)) if broken.any() else int(np.argmin(looseness))
    if broken.any():
        note = "the kernel or its spectrum is wrong: no two symmetric matrices do this"
    elif evidence.affine:
        note = f"Θ is constant: {AFFINE}"
    else:
        finite = looseness[np.isfinite(looseness)]
        middle = float(np.median(finite)) if finite.size else math.inf
        note = (
            f"holds at {at.size} probes; loose by the factor {looseness[worst]:.2g} at best, {middle:.2g} in the median"
        )
    return Verdict(
        "weyl",
        reference,
        outcome,
        measured=float(change[worst]),
        bound=float(shift[worst]),
        margin=factor(float(change[worst]), float(shift[worst])),
        step=int(at[worst]),
        units=KERNEL_UNITS,
        note=note,
        inconsistent=bool(broken.any()),
    )
