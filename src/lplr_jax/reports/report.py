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
from lplr_jax.curves.summary import Summary, step_word, summarise
from lplr_jax.printing import printable
from lplr_jax.records import Record
from lplr_jax.reports.text import safe
from lplr_jax.runs.session import Observer
from lplr_jax.theory import Outcome, Verdict, reading, story


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
    word = step_word(record)
    table = Table(
        "quantity", "value", "what it says", title=safe(f"{record.experiment}: what the run says"), title_justify="left"
    )
    if record.diverged_at is not None:
        words = "loss, gradient or parameters are not finite from there on"
        table.add_row("diverged", f"at {word} {record.diverged_at}", words)
    untrusted = record.provenance.get("untrusted")
    for where, reason in untrusted.items() if isinstance(untrusted, Mapping) else ():
        place = f"{word} {where}" if str(where).isdecimal() else where
        table.add_row("untrusted", safe(place), safe(f"left out: {reason}"))
    if not np.isfinite(record["loss"]).any():
        return table
    summary = summarise(record)
    for row in (
        *_kernel_rows(record, word),
        *_curvature_rows(record, word),
        *_series_rows(record, word),
        *_regime_rows(record, summary, word),
        *_rate_rows("stable regime", summary.regime_rate, word),
        *_rate_rows("middle half", summary.middle_rate, word),
    ):
        table.add_row(*row)
    return table


Row = tuple[str, str, str]


def _series_rows(record: Record, word: str) -> Iterator[Row]:
    epoch, loss, drift = record["epoch"], record["loss"], record["drift"]
    moved = np.flatnonzero(np.isfinite(drift))
    if moved.size:
        largest = f"largest {drift[moved].max():.4g}, in units of the parameters"
        yield "drift ‖θ_T - θ_0‖", f"{drift[moved[-1]]:.4g}", largest
    known = np.flatnonzero(np.isfinite(loss))
    first = f"L_{epoch[known[0]]} = {loss[known[0]]:.5g}"
    of = "" if record.loss == "squared" else f", {record.loss} loss"
    yield (
        "L_T",
        f"{loss[known[-1]]:.5g}",
        safe(f"{word} {epoch[known[-1]]}; {first}, s = {float(record['loss_scale']):g}{of}"),
    )


def _regime_rows(record: Record, summary: Summary, word: str) -> Iterator[Row]:
    if not summary.regime.stop:
        yield "stable regime", "none", f"no {word}s past the transient are clear of the proxy for L*"
        return
    start, end = summary.steps(summary.regime)
    yield "stable regime", f"{word}s {start} to {end}", "past the transient, before the proxy decides the PL ratio"
    low, high = summary.envelope
    if not np.isfinite(low):
        return
    yield "PL envelope", f"{low:.4g} (L* = 0)", f"{high:.4g} with the proxy L* = {summary.floor:.4g}; units of L"
    if "ntk_min_eig" in record and "probe_epoch" in record:
        inside = (record["probe_epoch"] >= start) & (record["probe_epoch"] <= end)
        pointwise = record["ntk_min_eig"][inside] / float(record["loss_scale"])
        pointwise = pointwise[np.isfinite(pointwise)]
        if pointwise.size and pointwise.min() > 0:
            factor = low / pointwise.min()
            words = "how far the guaranteed PL constant lies below the measured one"
            yield "envelope / (λ_min/s)", f"{factor:.3g}", words


def _kernel_rows(record: Record, word: str) -> Iterator[Row]:
    if "ntk_min_eig" not in record or "probe_epoch" not in record:
        return
    min_eig, epochs = record["ntk_min_eig"], record["probe_epoch"]
    measured = np.flatnonzero(np.isfinite(min_eig))
    if not measured.size:
        return
    measured = measured[np.argsort(epochs[measured])]
    end, least = measured[-1], measured[np.argmin(min_eig[measured])]
    (start,) = np.flatnonzero(epochs == 0) if (epochs == 0).any() else (None,)
    # Θ_0 may be missing, or could not be trusted: then there is nothing to compare the others with.
    begins = start is not None and np.isfinite(min_eig[start])
    if begins:
        words = f"λ_min of the full kernel at {word} 0"
        if "ntk_max_eig" in record:
            words += f"; λ_max / λ_min = {record['ntk_max_eig'][start] / min_eig[start]:.2g}"
        yield "λ_0", f"{min_eig[start]:.4g}", words
    words = f"{word} {epochs[end]}; least at any probe {min_eig[least]:.4g} ({word} {epochs[least]})"
    yield "λ_T", f"{min_eig[end]:.4g}", words
    if not begins:
        return
    if "ntk_min_eig_subset" in record:
        subset, flattery = record["ntk_min_eig_subset"], "above the full one"
        if min_eig[start] > 0:
            flattery = f"{subset[start] / min_eig[start]:.3g} times the full one at {word} 0"
        size = f"{record['subset_ids'].size} samples, " if "subset_ids" in record else ""
        yield "λ_min, subset", f"{subset[start]:.4g}, {subset[end]:.4g}", f"{size}both ends; {flattery}"
    if "ntk_shift" in record and np.isfinite(record["ntk_shift"][end]):
        shift = record["ntk_shift"][end]
        share = shift / abs(min_eig[start]) if min_eig[start] else np.inf
        yield "‖Θ_T - Θ_0‖₂", f"{shift:.3g}", f"{share:.2g} times |λ_0|: L_Θ r(R) is at least this"


def _curvature_rows(record: Record, word: str) -> Iterator[Row]:
    epochs = record.arrays.get("probe_epoch")
    if epochs is None:
        return
    for name, rows in (("sharpness", _sharpness_rows), ("curvature_min", _least_curvature_rows)):
        values = record.arrays.get(name, np.full(epochs.size, np.nan))
        measured = np.flatnonzero(np.isfinite(values))
        if measured.size:
            measured = measured[np.argsort(epochs[measured])]
            yield from rows(record, word, values[measured], epochs[measured])


def _sharpness_rows(record: Record, word: str, sharpness: np.ndarray, epochs: np.ndarray) -> Iterator[Row]:
    eta, top = float(record["learning_rate"]), int(np.argmax(sharpness))
    if sharpness[0] > 0:
        largest = f"largest measured β = {sharpness[top]:.4g} ({word} {epochs[top]})"
        yield "2/β", f"{2 / sharpness[0]:.4g}", f"β = λ_max(∇²L) at {word} {epochs[0]}; {largest}; units of η"
    if np.isfinite(eta):
        ends = f"{eta * sharpness[0]:.3g}, {eta * sharpness[-1]:.3g}"
        yield "η β", ends, "both ends; the descent lemma wants at most 1"


def _least_curvature_rows(record: Record, word: str, curvature: np.ndarray, epochs: np.ndarray) -> Iterator[Row]:
    bottom = int(np.argmin(curvature))
    yield (
        "least curvature",
        f"{curvature[bottom]:.4g}",
        f"λ_min(∇²L), least at any probe ({word} {epochs[bottom]})",
    )


def _rate_rows(name: str, report: RateReport, word: str) -> Iterator[Row]:
    if report.zero.epochs == 0:
        return
    yield f"{name}, L* = 0", *_decay_cells(report.zero, word)
    if report.proxy.epochs:
        yield f"{name}, proxy", *_decay_cells(report.proxy, word)
    cuts = ", ".join(f"{decay.factor:.6f} (T = {cut})" for cut, decay in report.refits if decay.epochs)
    words = {
        True: f"set by the proxy: rates differ by {report.spread:.0%}",
        False: f"rates differ by {report.spread:.0%}",
        None: "a rate is missing",
    }
    yield f"{name}, cut earlier", cuts or "none", words[report.set_by_proxy]


def _decay_cells(decay: Decay, word: str) -> tuple[str, str]:
    low, high = decay.local_factors
    better = {"undecided": "exponential and power law fit alike"}.get(decay.law, f"{decay.law} fits better")
    return (
        f"{decay.factor:.6f} per {word}",
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
    word = f"{verdict.outcome} (inconsistent)" if verdict.inconsistent else verdict.outcome
    yield Text(word, style=COLOURS[verdict.outcome])
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
        words = [f"{v.outcome} (inconsistent)" if v.inconsistent else v.outcome for v in row]
        table.add_row(row[0].claim, *(Text(word, style=COLOURS[v.outcome]) for word, v in zip(words, row, strict=True)))
    table.add_section()
    last = [next((v for v in verdicts if v.claim == "regime"), verdicts[-1]) for verdicts in arms.values()]
    table.add_row("first to break", *(Text(printable(verdict.note)) for verdict in last))
    return table


def print_verdicts(console: Console, verdicts: Sequence[Verdict], record: Record | None = None) -> None:
    """Print what the verdicts come to, where the record is given, the table of claims, and two sentences on it."""
    for line in story(verdicts, record) if record is not None else ():
        console.print(printable(line), highlight=False, markup=False)
    console.print(verdict_table(verdicts))
    console.print(printable(reading(verdicts)), highlight=False, markup=False)


def judge(
    console: Console,
    verdicts: Mapping[str, Sequence[Verdict]],
    records: Mapping[str, Record] | None = None,
    *,
    first_in_full: bool = False,
) -> None:
    """Print the verdicts on one run in full, those on several side by side.

    Args:
        console: the screen.
        verdicts: by the name of the run.
        records: the runs, by the same names: what the verdicts on one come to is told above its table.
        first_in_full: print those on the first of several runs in full as well.
    """
    several = len(verdicts) > 1
    if several:
        console.print(verdict_matrix(verdicts))
    for name, of_first in list(verdicts.items())[: 0 if several and not first_in_full else 1]:
        if several:
            console.print(printable(f"{name}:"), highlight=False, markup=False)
        print_verdicts(console, of_first, (records or {}).get(name))
