"""All claims on one record, and what they mean together."""

import math
from collections.abc import Sequence

from lplr_jax.curves.summary import check_record
from lplr_jax.records import Record
from lplr_jax.theory.claims import CLAIMS, REGISTRY
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import Verdict, Verdicts, at_least


def verify(record: Record) -> Verdicts:
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
    evidence = Evidence(record)
    if not evidence.end:
        note = "diverged at epoch 0: loss, gradient or parameters are not finite at the initialisation"
        return Verdicts(_undecided(CLAIMS, note))
    first = evidence.verdict("consistency")
    if first.inconsistent:
        return Verdicts((first, *_undecided(CLAIMS[1:], "not evaluated: the record contradicts itself")))
    return Verdicts(evidence.verdict(claim) for claim in CLAIMS)


def _undecided(claims: Sequence[str], note: str) -> tuple[Verdict, ...]:
    return tuple(Verdict(claim, REGISTRY[claim].reference, "undecided", note=note) for claim in claims)


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
            f"The hypotheses of Theorem 5.4 are proved here, so PL holds with μ/s >= {at_least(theorem.bound, 3)}."
            f" The linear rate of Theorem 5.7 is {rate.outcome} on this run; neither is said of other regions."
        )
    if condition.outcome == "refuted":
        size = condition.measured / condition.bound if condition.bound > 0 else math.inf
        means = (
            f"On every region that contains this run L_Θ r exceeds λ_0 by the factor {size:.2g}, so the theorem is "
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
