"""What a claim is: one object that says what is stated, what it needs, and how it is held against a record."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from lplr_jax.records import Record
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import Verdict


@dataclass(frozen=True)
class Rests:
    """What a claim and its parts rest on, so what the loss of a probe costs them; "" names the claim itself.

    Attributes:
        every_kernel: nothing that holds may be said where the kernel of any probe was lost.
        kernels: an estimate over the probes, "not refuted" at best: undecided where the kernel of any was lost.
        hessians: the same for probes whose Hessian was lost.
    """

    every_kernel: tuple[str, ...] = ()
    kernels: tuple[str, ...] = ()
    hessians: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """One statement of the theory, held against a run.

    Attributes:
        id: its name at the command line and in tables.
        reference: where the statement stands in arXiv 2507.21429 v3.
        statement: the statement in one line of plain text.
        latex: the same as a formula.
        needs: arrays of a record without which the claim is undecided; those that compare probes are needed from two
            probes on.
        rests_on: what a lost kernel or Hessian does to the claim and its parts.
        loss: "any", or the names of the losses it is stated for; not applicable to others. A name that ends in "(" is
            that of a loss with numbers, whatever they are.
        otherwise: says of a run whose loss it is not stated for what can be expected instead; None for nothing.
        on_failure: "finding" where "refuted" says something of the run, "inconsistent" where it says that the record
            or this package is wrong.
        check: holds the claim against the evidence. Arrays that are absent read as NaN, and must lead to no failure.
        example: returns a small record on which the claim is met.
    """

    id: str
    reference: str
    statement: str
    latex: str
    check: Callable[[Evidence], Verdict]
    example: Callable[[], Record]
    needs: tuple[str, ...] = ()
    rests_on: Rests = field(default_factory=Rests)
    loss: Literal["any"] | tuple[str, ...] = "any"
    otherwise: Callable[[Evidence], str] | None = None
    on_failure: Literal["finding", "inconsistent"] = "finding"

    def covers(self, loss: str) -> bool:
        """Return whether it is stated for a loss, by the name that a record has."""
        kind, numbers, _ = loss.partition("(")
        return self.loss == "any" or kind + numbers in self.loss

    @property
    def losses(self) -> tuple[str, ...]:
        """The losses it is stated for, in words."""
        return ("any",) if self.loss == "any" else tuple(f"{x}...)" if x.endswith("(") else x for x in self.loss)


def not_stated(
    id_: str,
    reference: str,
    losses: tuple[str, ...],
    evidence: Evidence,
    otherwise: Callable[[Evidence], str] | None,
) -> Verdict:
    """Return the verdict on a run whose loss is none of those that a statement is about."""
    note = f"stated for the loss {' or '.join(losses)}; that of this run is {evidence.loss}"
    more = otherwise(evidence) if otherwise else ""
    return Verdict(id_, reference, "not applicable", note=f"{note}; {more}" if more else note)
