"""What a hypothesis or a conclusion of the theory comes to on one run."""

import decimal
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from lplr_jax import rooms
from lplr_jax.printing import printable

Outcome = Literal["proved", "not refuted", "refuted", "undecided", "not applicable"]
"""What a claim comes to."""

MET: tuple[Outcome, ...] = ("proved", "not refuted")
"""Outcomes that are at least "not refuted"."""

NAN = float("nan")


@dataclass(frozen=True)
class Verdict:
    """One claim held against one run.

    Attributes:
        claim: id of the claim, one of `lplr_jax.theory.CLAIMS`; a part of one is named "claim.part".
        reference: where the statement stands in arXiv 2507.21429 v3.
        outcome: "proved"; "not refuted" by a measurement that could have refuted it; "refuted"; "undecided" where the
            measurement is missing or within its own error; "not applicable" where the theory says nothing.
        measured: what was measured.
        bound: what it was held against.
        margin: factor by which `measured` keeps clear of `bound`: above 1 on the safe side, below 1 where the claim
            fails, NaN where there is no such factor.
        step: step number (entry of `epoch`) that the numbers belong to; None where they belong to the whole run.
        units: units of `measured` and `bound`.
        note: what the outcome rests on, in words.
        inconsistent: whether the outcome shows that the record or this package is wrong, not the theory's hypothesis.
        parts: the separate statements behind the outcome.
    """

    claim: str
    reference: str
    outcome: Outcome
    measured: float = NAN
    bound: float = NAN
    margin: float = NAN
    step: int | None = None
    units: str = ""
    note: str = ""
    inconsistent: bool = False
    parts: tuple["Verdict", ...] = ()

    @property
    def met(self) -> bool:
        """Whether the claim is at least "not refuted"."""
        return self.outcome in MET

    def with_parts(self, *parts: "Verdict") -> "Verdict":
        """Return the verdict with parts named under it; a part that shows an inconsistency makes the whole show it."""
        named = tuple(replace(part, claim=f"{self.claim}.{part.claim}") for part in parts)
        return replace(self, parts=named, inconsistent=self.inconsistent or any(p.inconsistent for p in named))

    def standing_for(
        self, claim: str, reference: str, outcome: Outcome, note: str, *, inconsistent: bool = False
    ) -> "Verdict":
        """Return a claim whose numbers are those of this part, which decides it."""
        told = {"claim": claim, "reference": reference, "outcome": outcome, "note": note}
        return replace(self, **told, inconsistent=inconsistent, parts=())

    def part(self, name: str) -> "Verdict":
        """Return the part called `name`.

        Raises:
            KeyError: if the verdict has no such part.
        """
        for part in self.parts:
            if part.claim == f"{self.claim}.{name}":
                return part
        raise KeyError(f"{self.claim} has no part {name!r}; it has {[p.claim for p in self.parts]}")


class Verdicts(tuple[Verdict, ...]):
    """The verdicts on one run, in the order of `CLAIMS`: a tuple that also finds a verdict by its claim.

    Example:
        >>> Verdicts([Verdict("weyl", "Lemma 5.3", "not refuted")])["weyl"].outcome
        'not refuted'
    """

    __slots__ = ()

    def __getitem__(self, key: Any) -> Any:
        """Return a verdict by its claim or its place, or several by a slice.

        Raises:
            KeyError: for a claim that there is none of.
            IndexError: for a place that there is none at.
        """
        if not isinstance(key, str):
            return super().__getitem__(key)
        for verdict in self:
            if verdict.claim == key:
                return verdict
        raise KeyError(f"there is no verdict on {key!r}; there are {', '.join(verdict.claim for verdict in self)}")

    def __repr__(self) -> str:
        width = max((len(verdict.claim) for verdict in self), default=0)
        lines = (f"  {verdict.claim:{width}}  {verdict.outcome:14}  {_cut(verdict.note)}" for verdict in self)
        return "\n".join(["<Verdicts", *(line.rstrip() for line in lines)]) + ">"

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        # Reports stand above verdicts, so this door is opened when somebody goes through.
        return rooms.through_door("lplr_jax.theory", "verdict_html")(self)


def _cut(text: str) -> str:
    line = printable(" ".join(text.split()))
    return line if len(line) <= 90 else f"{line[:89]}…"


def at_least(bound: float, digits: int) -> str:
    """Return a lower bound to some digits, rounded down, so that what is shown holds as well.

    Example:
        >>> at_least(0.02468, 3), at_most(2.41452, 3), at_least(-0.02461, 3)
        ('0.0246', '2.42', '-0.0247')
    """
    return _directed(bound, digits, decimal.ROUND_FLOOR)


def at_most(bound: float, digits: int) -> str:
    """Return an upper bound to some digits, rounded up."""
    return _directed(bound, digits, decimal.ROUND_CEILING)


def _directed(bound: float, digits: int, rounding: str) -> str:
    if math.isfinite(bound):
        bound = float(decimal.Context(prec=digits, rounding=rounding).create_decimal_from_float(float(bound)))
    return f"{bound:.{digits}g}"


def factor(small: float, large: float) -> float:
    """Return large / small for a claim `small <= large`: above 1 where it holds; NaN where a ratio says nothing."""
    if math.isnan(small) or math.isnan(large) or large < 0 or small < 0:
        return NAN
    if small == 0:
        return math.inf if large > 0 else NAN
    return large / small


def weakest(outcomes: Iterable[Outcome]) -> Outcome:
    """Return the outcome of a conjunction: refuted before undecided before not refuted before proved."""
    found = set(outcomes) - {"not applicable"}
    for outcome in ("refuted", "undecided", "not refuted", "proved"):
        if outcome in found:
            return outcome
    return "not applicable"


def flatten(verdicts: Iterable[Verdict]) -> Iterator[Verdict]:
    """Yield every verdict followed by its parts."""
    for verdict in verdicts:
        yield verdict
        yield from verdict.parts


def any_inconsistent(verdicts: Iterable[Verdict]) -> bool:
    """Return whether any verdict shows that the record or this package is wrong."""
    return any(verdict.inconsistent for verdict in verdicts)


def _number(value: float) -> float | str | None:
    """Return a number that strict JSON can carry: null for NaN, a word for an infinity."""
    if math.isnan(value):
        return None
    return value if math.isfinite(value) else ("Infinity" if value > 0 else "-Infinity")


def as_json(verdicts: Sequence[Verdict]) -> list[dict[str, Any]]:
    """Return the verdicts as lists, dicts, strings and numbers; NaN is None, an infinity is "Infinity"."""
    return [
        {
            "claim": v.claim,
            "reference": v.reference,
            "outcome": v.outcome,
            "measured": _number(v.measured),
            "bound": _number(v.bound),
            "margin": _number(v.margin),
            "step": v.step,
            "units": v.units,
            "note": v.note,
            "inconsistent": v.inconsistent,
            "parts": as_json(v.parts),
        }
        for v in verdicts
    ]
