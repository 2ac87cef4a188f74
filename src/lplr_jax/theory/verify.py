"""All claims on one record, or at one point."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from lplr_jax.curves.summary import check_record
from lplr_jax.records import Record
from lplr_jax.schema import HESSIAN_LOST, KERNEL_LOST
from lplr_jax.theory.conclusions import linear_rate, local_pl
from lplr_jax.theory.consistency import consistency
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.hypotheses import compatibility, ntk_lipschitz, ntk_positive, weyl
from lplr_jax.theory.landscape import lqcr, regime
from lplr_jax.theory.verdict import CLAIMS, Verdict

_CHECKS: tuple[Callable[[Evidence], Verdict], ...] = (
    consistency,
    ntk_positive,
    ntk_lipschitz,
    compatibility,
    weyl,
    local_pl,
    linear_rate,
    lqcr,
    regime,
)


def verify(record: Record) -> tuple[Verdict, ...]:
    """Hold every claim of the theory against a record; no model and no data are needed.

    Args:
        record: a run, such as `lplr mnist` leaves behind. What it did not measure makes the claim undecided.

    Returns:
        One verdict for each of `CLAIMS`, in that order. Where `consistency` fails the others are undecided: nothing can
        be read off a record that contradicts itself. All are undecided for a run that diverged at epoch 0.

    Raises:
        TypeError: for what is no record.
        ValueError: if arrays of probes differ in length.
    """
    check_record(record)
    if record.diverged_at == 0:
        note = "diverged at epoch 0: loss, gradient or parameters are not finite at the initialisation"
        return tuple(Verdict(claim, "", "undecided", note=note) for claim in CLAIMS)
    evidence = Evidence(record)
    first = _doubted(consistency(evidence), evidence)
    if first.inconsistent:
        note = "not evaluated: the record contradicts itself"
        return (first, *(Verdict(claim, "", "undecided", note=note) for claim in CLAIMS[1:]))
    return (first, *(_doubted(check(evidence), evidence) for check in _CHECKS[1:]))


# What a claim that rests on all probes comes to where some of them are lost: nothing that holds may be said of the
# rest. What epoch 0 alone proves stays, and so does what the remaining probes refute.
_EVERY_PROBE = frozenset({"consistency", "ntk_positive.probes", "weyl", "local_pl.pointwise", "regime"})
_LOWER_ESTIMATES = frozenset(
    {
        "ntk_lipschitz",
        "compatibility",
        "local_pl",
        "local_pl.envelope",
        "linear_rate",
        "linear_rate.bound_pointwise",
        "lqcr",
        "lqcr.descent",
        "regime.theorem",
    }
)
_CURVATURE = frozenset({"linear_rate", "linear_rate.step_size", "lqcr", "lqcr.curvature"})


def _doubted(verdict: Verdict, evidence: Evidence) -> Verdict:
    """Return the verdict, undecided with the reason where it would hold but for probes that could not be trusted."""
    kernel, hessian = evidence.doubt(KERNEL_LOST), evidence.doubt(HESSIAN_LOST)
    parts = tuple(_doubted(part, evidence) for part in verdict.parts)
    verdict, claim = replace(verdict, parts=parts), verdict.claim
    lost = [kernel] if kernel and verdict.met and claim in _EVERY_PROBE else []
    if verdict.outcome == "not refuted":
        lost += [kernel] if kernel and claim in _LOWER_ESTIMATES else []
        lost += [hessian] if hessian and claim in _CURVATURE else []
    if not lost and not (verdict.outcome == "undecided" and kernel):
        return verdict
    note = f"could not be trusted ({'; '.join(lost or [kernel])}); of the rest: {verdict.note}"
    return replace(verdict, outcome="undecided", note=note)


def reading(verdicts: Sequence[Verdict]) -> str:
    """Say in two sentences what the verdicts mean together, and what they do not."""
    by = {verdict.claim: verdict for verdict in verdicts}
    if by["consistency"].inconsistent or by["weyl"].inconsistent:
        return (
            "The record contradicts a statement that holds for every network, so the record or this package is wrong. "
            "Nothing about the theory follows from it."
        )
    condition, theorem, rate = by["compatibility"], by["local_pl"], by["linear_rate"]
    if theorem.outcome == "proved":
        return (
            f"The hypotheses of Theorem 5.4 are proved here, so PL holds with μ/s >= {theorem.bound:.3g}."
            f" The linear rate of Theorem 5.7 is {rate.outcome} on this run; neither is said of other regions."
        )
    if condition.outcome == "refuted":
        size = condition.measured / condition.bound if condition.bound > 0 else math.inf
        means = (
            f"On every region that contains this run L_Θ r exceeds λ_0 by the factor {size:.1e}, so the theorem is "
            "silent about the run: it is not false, and it explains nothing here."
        )
        if theorem.measured > 0:
            return (
                f"{means} The PL ratio nevertheless stays at or above {theorem.measured:.3g} (units of L) at every "
                "epoch, for reasons that the worst-case hypothesis does not see."
            )
        return f"{means} The PL ratio falls to zero on the run."
    if condition.outcome == "undecided":
        return (
            f"Whether the hypotheses hold is undecided: {condition.note}. A measurement within its own error supports "
            "neither side."
        )
    return (
        "No measurement refutes the hypotheses, and none proves them: L_Θ is known from below only. "
        "The theorem applies if its constant is as small as the run suggests."
    )
