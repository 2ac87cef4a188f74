"""The claims, one file each: the registry. A new claim is a new file, one import and one line here."""

import inspect
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from lplr_jax.schema import HESSIAN_LOST, KERNEL_LOST
from lplr_jax.theory.claims.claim import Claim, Rests, not_stated
from lplr_jax.theory.claims.compatibility import COMPATIBILITY
from lplr_jax.theory.claims.consistency import CONSISTENCY
from lplr_jax.theory.claims.containment import CONTAINMENT
from lplr_jax.theory.claims.decrease import DESCENT
from lplr_jax.theory.claims.floor_pl import FLOOR_PL
from lplr_jax.theory.claims.interpolation import INTERPOLATION
from lplr_jax.theory.claims.linear_rate import LINEAR_RATE
from lplr_jax.theory.claims.local_pl import LOCAL_PL
from lplr_jax.theory.claims.loss_bridge import LOSS_BRIDGE
from lplr_jax.theory.claims.lqcr import LQCR
from lplr_jax.theory.claims.noise import NOISE
from lplr_jax.theory.claims.ntk_lipschitz import NTK_LIPSCHITZ
from lplr_jax.theory.claims.ntk_positive import NTK_POSITIVE
from lplr_jax.theory.claims.path import PATH
from lplr_jax.theory.claims.regime import REGIME
from lplr_jax.theory.claims.weyl import WEYL
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import MET, Verdict

__all__ = ["CLAIMS", "REGISTRY", "Claim", "ClaimId", "Rests", "judge", "page"]

_ALL = (
    CONSISTENCY,
    NTK_POSITIVE,
    NTK_LIPSCHITZ,
    COMPATIBILITY,
    WEYL,
    LOCAL_PL,
    LINEAR_RATE,
    LQCR,
    REGIME,
    DESCENT,
    PATH,
    FLOOR_PL,
    CONTAINMENT,
    INTERPOLATION,
    NOISE,
    LOSS_BRIDGE,
)

REGISTRY: Mapping[str, Claim] = {claim.id: claim for claim in _ALL}
"""The claims by id, in the order in which they build on each other."""

CLAIMS: tuple[str, ...] = tuple(REGISTRY)
"""Ids of the claims, in that order."""

if TYPE_CHECKING:
    ClaimId = str
else:
    ClaimId = Literal[CLAIMS]
    """One of `CLAIMS`, as a type that a command line can offer."""


def judge(name: str, evidence: Evidence) -> Verdict:
    """Hold one claim against a record: whether it is stated for the loss, what was lost, what was not measured.

    Raises:
        KeyError: for a name that is no claim's.
    """
    if name not in REGISTRY:
        raise KeyError(f"there is no claim {name!r}; there are {', '.join(CLAIMS)}")
    claim = REGISTRY[name]
    if not claim.covers(evidence.loss):
        return not_stated(claim.id, claim.reference, claim.losses, evidence, claim.otherwise)
    verdict = _doubted(claim.check(evidence), "", claim.rests_on, evidence)
    missing = evidence.missing(claim.needs)
    if missing and (verdict.met or verdict.outcome == "undecided"):
        note = f"not measured: {', '.join(missing)}" + (f"; of the rest: {verdict.note}" if verdict.note else "")
        verdict = replace(verdict, outcome="undecided", note=note)
    if verdict.outcome == "refuted" and claim.on_failure == "inconsistent":
        verdict = replace(verdict, inconsistent=True)
    return verdict


def _doubted(verdict: Verdict, part: str, rests: Rests, evidence: Evidence) -> Verdict:
    """Return the verdict, undecided with the reason where it would hold but for probes that could not be trusted.

    What epoch 0 alone proves stays, and so does what the remaining probes refute.
    """
    kernel, hessian = evidence.doubt(KERNEL_LOST), evidence.doubt(HESSIAN_LOST)
    parts = tuple(_doubted(p, p.claim.removeprefix(f"{verdict.claim}."), rests, evidence) for p in verdict.parts)
    verdict = replace(verdict, parts=parts)
    lost = [kernel] if kernel and verdict.outcome in MET and part in rests.every_kernel else []
    if verdict.outcome == "not refuted":
        lost += [kernel] if kernel and part in rests.kernels else []
        lost += [hessian] if hessian and part in rests.hessians else []
    if not lost and not (verdict.outcome == "undecided" and kernel):
        return verdict
    note = f"could not be trusted ({'; '.join(lost or [kernel])}); of the rest: {verdict.note}"
    return replace(verdict, outcome="undecided", note=note)


def page(name: str) -> str:
    """Return what the documentation says of a claim, in Markdown: its statement, its needs, and how it is held.

    Raises:
        KeyError: for a name that is no claim's.
    """
    claim = REGISTRY[name]
    losses = ", ".join(claim.losses)
    failure = "a finding about the run" if claim.on_failure == "finding" else "the record or this package is wrong"
    needs = ", ".join(f"`{need}`" for need in claim.needs)
    lines = (
        f"### `{claim.id}`",
        "",
        f"{claim.statement} ({claim.reference})",
        "",
        f"$${claim.latex}$$",
        "",
        inspect.cleandoc(claim.check.__doc__ or ""),
        "",
        f"- needs: {needs}",
        f"- loss: {losses}",
        f"- refuted means: {failure}",
        "",
    )
    return "\n".join(lines)
