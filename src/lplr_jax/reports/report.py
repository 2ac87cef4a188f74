"""What a run shows on screen: progress while it goes on, a short table at its end."""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lplr_jax.curves.rate import Decay, RateReport
from lplr_jax.curves.summary import summarise
from lplr_jax.records import Record
from lplr_jax.runs.session import Observer
from lplr_jax.theory import Outcome, Verdict, reading


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
        line = f"epoch {epoch}/{self._epochs}  loss {self._loss:.6g}  λ_min {values['ntk_min_eig']:.4g}  {left}"
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
        self._progress.update(self._task, min_eig=f"{values['ntk_min_eig']:.4g}")


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
    """Return the short table at the end of a run: what the record says, with units."""
    table = Table(
        "quantity", "value", "what it says", title=f"{record.experiment}: what the run says", title_justify="left"
    )
    if record.diverged_at is not None:
        words = "loss, gradient or parameters are not finite from there on"
        table.add_row("diverged", f"at epoch {record.diverged_at}", words)
    for where, reason in record.provenance.get("untrusted", {}).items():
        table.add_row("untrusted", f"epoch {where}" if where.isdecimal() else where, Text(f"left out: {reason}"))
    if record.diverged_at == 0:
        return table
    summary = summarise(record)
    last = int(np.flatnonzero(np.isfinite(record["loss"]))[-1])
    if "ntk_min_eig" in record:
        for row in _kernel_rows(record):
            table.add_row(*row)
    for row in _curvature_rows(record):
        table.add_row(*row)
    drift = record["drift"]
    table.add_row(
        "drift ‖θ_T - θ_0‖", f"{drift[last]:.4g}", f"largest {np.nanmax(drift):.4g}, in units of the parameters"
    )
    table.add_row(
        "L_T",
        f"{record['loss'][last]:.5g}",
        f"epoch {last}; L_0 = {record['loss'][0]:.5g}, s = {float(record['loss_scale']):g}",
    )
    regime = summary.regime
    if regime.stop:
        span = f"epochs {regime.start} to {regime.stop - 1}"
        table.add_row("stable regime", span, "past the transient, before the proxy decides the PL ratio")
        low, high = summary.envelope
        table.add_row(
            "PL envelope", f"{low:.4g} (L* = 0)", f"{high:.4g} with the proxy L* = {summary.floor:.4g}; units of L"
        )
        if "ntk_min_eig" in record:
            inside = (record["probe_epoch"] >= regime.start) & (record["probe_epoch"] < regime.stop)
            pointwise = record["ntk_min_eig"][inside] / float(record["loss_scale"])
            pointwise = pointwise[np.isfinite(pointwise)]
            if pointwise.size and pointwise.min() > 0:
                factor = low / pointwise.min()
                table.add_row(
                    "envelope / (λ_min/s)",
                    f"{factor:.3g}",
                    "how far the guaranteed PL constant lies below the measured one",
                )
    else:
        table.add_row("stable regime", "none", "no epochs past the transient are clear of the proxy for L*")
    for name, report in (("stable regime", summary.regime_rate), ("middle half", summary.middle_rate)):
        for row in _rate_rows(name, report):
            table.add_row(*row)
    return table


def _kernel_rows(record: Record) -> Iterator[tuple[str, str, str]]:
    min_eig, epochs = record["ntk_min_eig"], record["probe_epoch"]
    measured = np.flatnonzero(np.isfinite(min_eig))
    if not measured.size:
        return
    end = measured[-1]
    least = measured[np.argmin(min_eig[measured])]
    yield (
        "λ_0",
        f"{min_eig[0]:.4g}",
        f"λ_min of the full kernel at epoch 0; λ_max / λ_min = {record['ntk_max_eig'][0] / min_eig[0]:.2g}",
    )
    yield (
        "λ_T",
        f"{min_eig[end]:.4g}",
        f"epoch {epochs[end]}; least at any probe {min_eig[least]:.4g} (epoch {epochs[least]})",
    )
    if not np.isfinite(min_eig[0]):  # Θ_0 could not be trusted, and there is nothing to compare with it
        return
    if "ntk_min_eig_subset" in record:
        subset = record["ntk_min_eig_subset"]
        flattery = (
            f"{subset[0] / min_eig[0]:.3g} times the full one at epoch 0" if min_eig[0] > 0 else "above the full one"
        )
        yield (
            "λ_min, subset",
            f"{subset[0]:.4g}, {subset[end]:.4g}",
            f"{record['subset_ids'].size} images, both ends; {flattery}",
        )
    if "ntk_shift" in record:
        shift = record["ntk_shift"][end]
        yield "‖Θ_T - Θ_0‖₂", f"{shift:.3g}", f"{shift / abs(min_eig[0]):.2g} times |λ_0|: L_Θ r(R) is at least this"


def _curvature_rows(record: Record) -> Iterator[tuple[str, str, str]]:
    if "sharpness" not in record or not np.isfinite(record["sharpness"]).any():
        return
    epochs, eta = record["probe_epoch"], float(record["learning_rate"])
    measured = np.flatnonzero(np.isfinite(record["sharpness"]))
    sharpness, curvature = record["sharpness"][measured], record["curvature_min"][measured]
    top, bottom = epochs[measured[int(np.argmax(sharpness))]], epochs[measured[int(np.argmin(curvature))]]
    largest = f"largest measured β = {sharpness.max():.4g} (epoch {top})"
    yield "2/β", f"{2 / sharpness[0]:.4g}", f"β = λ_max(∇²L) at epoch {epochs[measured[0]]}; {largest}; units of η"
    yield "η β", f"{eta * sharpness[0]:.3g}, {eta * sharpness[-1]:.3g}", "both ends; the descent lemma wants at most 1"
    yield "least curvature", f"{curvature.min():.4g}", f"λ_min(∇²L), least at any probe (epoch {bottom})"


def _rate_rows(name: str, report: RateReport) -> Iterator[tuple[str, str, str]]:
    if report.zero.epochs == 0:
        return
    yield f"{name}, L* = 0", *_decay_cells(report.zero)
    yield f"{name}, proxy", *_decay_cells(report.proxy)
    cuts = ", ".join(f"{decay.factor:.6f} (T = {cut})" for cut, decay in report.refits if decay.epochs)
    words = {
        True: f"set by the proxy: rates differ by {report.spread:.0%}",
        False: f"rates differ by {report.spread:.0%}",
        None: "a rate is missing",
    }
    yield f"{name}, cut earlier", cuts or "none", words[report.set_by_proxy]


def _decay_cells(decay: Decay) -> tuple[str, str]:
    low, high = decay.local_factors
    better = {"undecided": "exponential and power law fit alike"}.get(decay.law, f"{decay.law} fits better")
    return (
        f"{decay.factor:.6f} per epoch",
        f"{better} (R² {decay.exponential_r2:.3f} against {decay.power_r2:.3f}); local factors {low:.5f} to {high:.5f}",
    )


COLOURS: dict[Outcome, str] = {
    "proved": "green",
    "not refuted": "cyan",
    "refuted": "red",
    "undecided": "yellow",
    "not applicable": "bright_black",
}


def verdict_table(verdicts: Sequence[Verdict], *, parts: bool = True) -> Table:
    """Return the table of the theory's claims: a row for each, and one for each of its parts where these are wanted.

    The parts of `consistency` are shown only where they fail.
    """
    table = Table("claim", "outcome", "measured", "against", "margin", "epoch", title_justify="left")
    table.title = "hypotheses and conclusions of the theory (arXiv 2507.21429)"
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
    yield Text(name)
    word = f"{verdict.outcome} (inconsistent)" if verdict.inconsistent else verdict.outcome
    yield Text(word, style=COLOURS[verdict.outcome])
    for value in (verdict.measured, verdict.bound, verdict.margin):
        yield Text("" if np.isnan(value) else f"{value:.3g}")
    yield Text("" if verdict.step is None else str(verdict.step))
    yield Text.assemble(note, (f"  [{verdict.units}]" if verdict.units else "", "dim"))


def verdict_matrix(arms: Mapping[str, Sequence[Verdict]]) -> Table:
    """Return one table for several runs: a row for each claim with its outcome in every run, and what broke first."""
    table = Table("claim", *arms, title="hypotheses and conclusions of the theory, run by run", title_justify="left")
    for row in zip(*arms.values(), strict=True):
        words = [f"{v.outcome} (inconsistent)" if v.inconsistent else v.outcome for v in row]
        table.add_row(row[0].claim, *(Text(word, style=COLOURS[v.outcome]) for word, v in zip(words, row, strict=True)))
    table.add_section()
    last = [verdicts[-1] for verdicts in arms.values()]
    table.add_row("first to break", *(Text(verdict.note) for verdict in last))
    return table


def print_verdicts(console: Console, verdicts: Sequence[Verdict]) -> None:
    """Print the table of claims, and two sentences on what it means."""
    console.print(verdict_table(verdicts))
    console.print(reading(verdicts), highlight=False, markup=False)


def judge(console: Console, verdicts: Mapping[str, Sequence[Verdict]], *, first_in_full: bool = False) -> None:
    """Print the verdicts on one run in full, those on several side by side.

    Args:
        console: the screen.
        verdicts: by the name of the run.
        first_in_full: print those on the first of several runs in full as well.
    """
    several = len(verdicts) > 1
    if several:
        console.print(verdict_matrix(verdicts))
    for name, of_first in list(verdicts.items())[: 0 if several and not first_in_full else 1]:
        if several:
            console.print(f"{name}:", highlight=False, markup=False)
        print_verdicts(console, of_first)
