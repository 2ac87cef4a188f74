"""What a run shows on screen: progress while it goes on, a short table at its end."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lplr_jax.printing import printable
from lplr_jax.records import Record
from lplr_jax.reports.rows import summary_rows
from lplr_jax.reports.text import safe
from lplr_jax.runs.session import Observer
from lplr_jax.theory import Outcome, Verdict


def in_short(verdicts: Sequence[Verdict]) -> str:
    """Return in one line which claims are refuted, and which undecided."""
    by = {word: [v.claim for v in verdicts if v.outcome == word] for word in ("refuted", "undecided")}
    wrong = [verdict.claim for verdict in verdicts if verdict.inconsistent]
    found = {"inconsistent": wrong} if wrong else by
    return "; ".join(f"{word} {', '.join(claims)}" for word, claims in found.items() if claims) or "all claims hold"


class _Plain:
    """One line per probe, for logs and pipes."""

    def __init__(self, console: Console, epochs: int) -> None:
        self._console, self._epochs, self._loss, self._began = console, epochs, np.nan, time.monotonic()
        self._first, self._standing = 0, ""

    def resume(self, epoch: int) -> None:
        """Say where the run goes on; the time left is told from the epochs after it."""
        self._first, self._began = epoch, time.monotonic()
        self._console.print(f"goes on from epoch {epoch} of {self._epochs}, which was saved", highlight=False)

    def chunk(self, epoch: int, loss: float) -> None:
        """Keep the loss for the line that the probe writes."""
        self._loss = loss

    def standing(self, epoch: int, verdicts: Sequence[Verdict]) -> None:
        """Keep the verdicts for the line that the probe writes."""
        self._standing = in_short(verdicts)

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        """Write the line."""
        spent = time.monotonic() - self._began
        new = epoch - self._first
        left = f"{spent / new * (self._epochs - epoch):.0f} s left" if new > 0 else "time left unknown"
        line = f"epoch {epoch}/{self._epochs}  loss {self._loss:.6g}  λ_min {_min_eig(values)}  {left}"
        line += f"  so far: {self._standing}" if self._standing else ""
        self._console.print(line, highlight=False, soft_wrap=True)


class _Bar:
    """A live bar, for terminals."""

    def __init__(self, progress: Progress, epochs: int) -> None:
        self._progress = progress
        self._task = progress.add_task("training", total=epochs, loss="-", min_eig="-", standing="")

    def resume(self, epoch: int) -> None:
        """Start the bar where the run goes on."""
        self._progress.reset(self._task, completed=epoch)
        self._progress.console.print(f"goes on from epoch {epoch}, which was saved", highlight=False)

    def chunk(self, epoch: int, loss: float) -> None:
        """Move the bar."""
        self._progress.update(self._task, completed=epoch, loss=f"{loss:.5g}")

    def standing(self, epoch: int, verdicts: Sequence[Verdict]) -> None:
        """Show the verdicts."""
        self._progress.update(self._task, standing=in_short(verdicts))

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show λ_min."""
        self._progress.update(self._task, min_eig=_min_eig(values))


def _min_eig(values: Mapping[str, float]) -> str:
    value = values.get("ntk_min_eig", np.nan)
    return "-" if np.isnan(value) else f"{value:.4g}"


@contextmanager
def progress(console: Console, epochs: int) -> Iterator[Observer]:
    """Yield an observer that shows epoch, loss, λ_min and time left: a bar on a terminal, plain lines elsewhere."""
    if not console.is_terminal:
        yield _Plain(console, epochs)
        return
    columns = (
        TextColumn("epoch"),
        MofNCompleteColumn(),
        BarColumn(),
        TextColumn("loss {task.fields[loss]}  λ_min {task.fields[min_eig]}"),
        TimeRemainingColumn(),
        TextColumn("left  {task.fields[standing]}"),
    )
    with Progress(*columns, console=console) as bar:
        yield _Bar(bar, epochs)


def summary_table(record: Record) -> Table:
    """Return the short table at the end of a run: what the record says, with units; what it lacks is left out."""
    title = safe(f"{record.experiment}: what the run says")
    table = Table("quantity", "value", "what it says", title=title, title_justify="left")
    for row in summary_rows(record):
        table.add_row(*map(safe, row))
    return table


COLOURS: dict[Outcome, str] = {
    "proved": "green",
    "not refuted": "cyan",
    "refuted": "red",
    "undecided": "yellow",
    "not applicable": "bright_black",
}


def outcome_text(verdict: Verdict) -> Text:
    """Return the outcome in its colour, and that it shows an inconsistency."""
    word = f"{verdict.outcome} (inconsistent)" if verdict.inconsistent else verdict.outcome
    return Text(word, style=COLOURS[verdict.outcome])


def first_to_break(verdicts: Sequence[Verdict]) -> str:
    """Return what is said of the hypothesis that breaks first along a run."""
    return next((verdict for verdict in verdicts if verdict.claim == "regime"), verdicts[-1]).note


def verdict_table(verdicts: Sequence[Verdict], *, parts: bool = True) -> Table:
    """Return the table of the theory's claims: a row for each, and one for each of its parts where these are wanted.

    The parts of `consistency` are shown only where they fail.
    """
    table = Table("claim", "outcome", "measured", "against", "margin", "epoch", title_justify="left")
    table.title = "hypotheses and conclusions of the theory (arXiv 2507.21429), and what is ours"
    table.add_column("what it rests on", ratio=1)
    for verdict in verdicts:
        table.add_row(*_verdict_cells(verdict, verdict.claim, f"{verdict.reference}: {verdict.note}"))
        for part in verdict.parts if parts else ():
            if verdict.claim == "consistency" and part.outcome != "refuted":
                continue
            table.add_row(*_verdict_cells(part, f"  {part.claim.partition('.')[2]}", part.note), style="dim")
        table.add_section()
    return table


def _verdict_cells(verdict: Verdict, name: str, note: str) -> Iterator[Text]:
    yield Text(printable(name))
    yield outcome_text(verdict)
    for value in (verdict.measured, verdict.bound, verdict.margin):
        yield Text("" if np.isnan(value) else f"{value:.3g}")
    yield Text("" if verdict.step is None else str(verdict.step))
    yield Text.assemble(printable(note), (f"  [{verdict.units}]" if verdict.units else "", "dim"))


def verdict_matrix(arms: Mapping[str, Sequence[Verdict]]) -> Table:
    """Return one table for several runs: a row for each claim with its outcome in every run, and what broke first."""
    table = Table(
        "claim", *map(safe, arms), title="hypotheses and conclusions of the theory, run by run", title_justify="left"
    )
    for row in zip(*arms.values(), strict=True):
        table.add_row(row[0].claim, *map(outcome_text, row))
    table.add_section()
    table.add_row("first to break", *(Text(printable(first_to_break(verdicts))) for verdicts in arms.values()))
    return table
