"""What an empirical statement of the paper is: a sentence, a rule on records, and what the rule finds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from jaxtyping import Float

from lplr_jax.curves.rate import MIN_ENTRIES
from lplr_jax.curves.summary import Summary
from lplr_jax.records import Record

Outcome = Literal["reproduced", "not reproduced", "cannot be decided"]


@dataclass(frozen=True)
class Runs:
    """The records that the statements are judged by; what is missing is None or empty.

    Attributes:
        mnist: binary MNIST, one run (section 6.1).
        widths: the width ablation at its common η, by width (section 6.2).
        smaller: the widest network at the smaller η.
        inits: one run from each initialisation, by its name (v2).
        seeds: CIFAR-10, by the name of the seed (section 6.3).
        starts: λ_0 of the full kernel by seed and then by width, output²/parameter².
    """

    mnist: Record | None = None
    widths: Mapping[int, Record] = field(default_factory=dict)
    smaller: Record | None = None
    inits: Mapping[str, Record] = field(default_factory=dict)
    seeds: Mapping[str, Record] = field(default_factory=dict)
    starts: Mapping[int, Mapping[int, float]] = field(default_factory=dict)

    @property
    def narrow(self) -> dict[int, Record]:
        """All widths but the widest, ascending."""
        return {width: self.widths[width] for width in sorted(self.widths)[:-1]}

    @property
    def wide(self) -> Record:
        """The widest network at the common η."""
        return self.widths[max(self.widths)]

    def records(self, need: str) -> dict[str, Record]:
        """Return the records of one of the fields above, by what a message calls them."""
        there = getattr(self, need)
        if isinstance(there, Record):
            return {need: there}
        return {} if there is None or need == "starts" else {f"{need} {name}": one for name, one in there.items()}


@dataclass(frozen=True)
class Finding:
    """What the rule of a statement found.

    Attributes:
        outcome: "reproduced", "not reproduced" or "cannot be decided".
        numbers: what was measured, or why nothing was, in one line.
    """

    outcome: Outcome
    numbers: str


@dataclass(frozen=True)
class Statement:
    """One empirical statement of the paper.

    Attributes:
        id: its name in tables.
        section: where it stands; "v2" is the paper's earlier version.
        sentence: what it says, in our words.
        rule: what is held against which threshold; all thresholds are ours.
        needs: fields of `Runs` without which it cannot be decided.
        judge: the rule.
    """

    id: str
    section: str
    sentence: str
    rule: str
    needs: tuple[str, ...]
    judge: Callable[[Runs], Finding]

    def find(self, runs: Runs) -> Finding:
        """Judge records; a run that is missing, or an array that was not measured, leaves it undecided.

        A run that diverged does not show what the paper's runs show, so there the statement is not reproduced.
        """
        for need in self.needs:
            if not getattr(runs, need):
                return Finding("cannot be decided", f"no record of {need}")
            for name, record in runs.records(need).items():
                if record.diverged_at is not None:
                    return Finding("not reproduced", f"{name} diverged at step {record.diverged_at}")
        try:
            return self.judge(runs)
        except KeyError as error:
            return Finding("cannot be decided", str(error.args[0]).partition(";")[0])


def found(holds: bool | np.bool_, numbers: str, *values: float) -> Finding:
    """Return a finding; it cannot be decided where one of the values that the rule looked at is not finite."""
    if not all(map(math.isfinite, values)):
        return Finding("cannot be decided", f"{numbers}: not all of it is known")
    return Finding("reproduced" if holds else "not reproduced", numbers)


def measured(record: Record, name: str) -> tuple[Float[np.ndarray, " k"], Float[np.ndarray, " k"]]:
    """Return the steps at which an array was measured, as shares of the run, and its values there.

    Raises:
        KeyError: if it was not measured at two steps at least.
    """
    values = record[name]
    steps = record["probe_epoch" if values.size == record.arrays.get("probe_epoch", np.empty(0)).size else "epoch"]
    known = np.isfinite(values)
    if known.sum() < 2:
        raise KeyError(f"{name} was measured at fewer than two steps")
    return steps[known] / max(1, record["epoch"][-1]), values[known].astype(float)


def middle_regime(summary: Summary) -> slice:
    """Return the positions of the stable regime past the first twentieth of the run, else of its middle half.

    The rule of the stable regime starts within the transient of some runs, and ends there on others.
    """
    start = int(np.searchsorted(summary.step_numbers, summary.step_numbers[-1] / 20))
    regime = slice(max(summary.regime.start, start), summary.regime.stop)
    return regime if regime.stop - regime.start >= MIN_ENTRIES else summary.middle


def listed(values: Mapping[Any, float]) -> str:
    """Return numbers by their names, in one line."""
    return ", ".join(f"{name}: {value:.3g}" for name, value in values.items())
