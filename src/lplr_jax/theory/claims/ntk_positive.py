"""Claim `ntk_positive`: λ_0 > 0."""

import math

from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import KERNEL_UNITS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, at_least, factor, weakest


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
    elif not budget.lower > 0:
        outcome, note = "undecided", f"the interval [{budget.lower:.3g}, {budget.upper:.3g}] holds zero"
    elif budget.certified:
        outcome, note = "proved", f"λ_0 >= {at_least(budget.lower, 6)}, error of assembly included"
    elif evidence.partial:
        outcome, note = "not refuted", f"{evidence.partial}: an upper bound of λ_0, which cannot support it"
    else:
        outcome, note = "not refuted", f"λ_0 >= {at_least(budget.lower, 6)} relative to the computed kernel"
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


NTK_POSITIVE = Claim(
    id="ntk_positive",
    reference="Assumption 5.1 (a)",
    statement="The least eigenvalue of the kernel at the initialisation is positive.",
    latex=r"\lambda_0 = \lambda_{\min}(\Theta(\theta_0)) > 0",
    needs=("probe_epoch", "ntk_min_eig"),
    rests_on=Rests(every_kernel=("probes",)),
    check=ntk_positive,
    example=linear_regression,
)
