"""Result tables from one source: on screen, and as Markdown, CSV and LaTeX (booktabs)."""

import csv
import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import rich.table
from rich.cells import cell_len

from lplr_jax.files import atomic_write
from lplr_jax.printing import printable
from lplr_jax.reports.text import safe, safe_markdown

MISSING = "-"


@dataclass(frozen=True)
class Quantity:
    """A line of a table: its name in files, its label on screen and in LaTeX, and what it is, with units."""

    key: str
    label: str
    latex: str
    meaning: str


@dataclass(frozen=True)
class Measured:
    """A number, with its standard deviation over seeds where there are several."""

    value: float
    deviation: float | None = None


Cell = Measured | int | str | None
"""Numbers are rounded to four digits for readers and kept whole in CSV; integers are exact; None is missing."""


@dataclass(frozen=True)
class Table:
    """Quantities by arms.

    Attributes:
        title: what the table shows.
        arms: heads of the columns.
        quantities: the lines.
        cells: for each quantity's key, one cell an arm.
        notes: printed below.
    """

    title: str
    arms: tuple[str, ...]
    quantities: tuple[Quantity, ...]
    cells: Mapping[str, Sequence[Cell]]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for quantity in self.quantities:
            if quantity.key not in self.cells:
                raise ValueError(f"the table names {quantity.key!r} but holds no cells for it")
            if len(self.cells[quantity.key]) != len(self.arms):
                found = len(self.cells[quantity.key])
                raise ValueError(f"{quantity.key} must have one cell for each of {len(self.arms)} arms, got {found}")


def mean_of(values: Sequence[float]) -> Cell:
    """Return the mean with the sample standard deviation of what is finite; None where nothing is."""
    finite = [float(value) for value in values if math.isfinite(value)]
    if not finite:
        infinite = {value for value in values if math.isinf(value)}
        return Measured(infinite.pop()) if len(infinite) == 1 else None
    mean = math.fsum(finite) / len(finite)
    if len(finite) < 2:
        return Measured(mean)
    return Measured(mean, math.sqrt(math.fsum((value - mean) ** 2 for value in finite) / (len(finite) - 1)))


def last_finite(values: np.ndarray) -> float:
    """Return the last value of a series that is finite, NaN where none is."""
    finite = values[np.isfinite(values)]
    return float(finite[-1]) if finite.size else math.nan


def _number(value: float) -> str:
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    # A factor per epoch is told by its distance to one.
    return f"{value:.6f}" if 0.99 < value < 1 else f"{value:.4g}"


def as_text(cell: Cell) -> str:
    """Return a cell for readers."""
    if cell is None:
        return MISSING
    if isinstance(cell, str):
        return cell
    if isinstance(cell, int):
        return f"{cell:,}"
    spread = "" if cell.deviation is None else f" ± {cell.deviation:.2g}"
    return _number(cell.value) + spread


_LATEX = {
    "β": r"$\beta$",
    "η": r"$\eta$",
    "λ": r"$\lambda$",
    "Θ": r"$\Theta$",
    "θ": r"$\theta$",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "±": r"$\pm$",
    "×": r"$\times$",
    "∞": r"$\infty$",
    "∇": r"$\nabla$",
    "‖": r"$\|$",
    "½": r"$\frac{1}{2}$",
    "²": r"$^2$",
    "₂": r"$_2$",
    "$": r"\$",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "&": r"\&",
    "%": r"\%",
    "_": r"\_",
    "#": r"\#",
    "^": r"\^{}",
    "\\": r"\textbackslash{}",
}


def as_latex_text(text: str) -> str:
    """Return text with LaTeX's special characters and this project's symbols spelt out."""
    text = printable(text)
    text = re.sub(r"(-?\d(?:\.\d+)?)e([+-]\d+)", lambda m: f"{m[1]}×10^{int(m[2])}", text)
    marked = re.split(r"×10\^(-?\d+)", text)
    spelt = ["".join(_LATEX.get(character, character) for character in part) for part in marked[::2]]
    powers = [rf"$\times 10^{{{power}}}$" for power in marked[1::2]]
    return "".join(a + b for a, b in zip(spelt, [*powers, ""], strict=True))


def to_markdown(table: Table) -> str:
    """Return a Markdown table with its title and notes."""
    rows = [["", *table.arms], ["---", *("---:" for _ in table.arms)]]
    rows += [[q.label, *map(as_text, table.cells[q.key])] for q in table.quantities]
    lines = ["| " + " | ".join(map(safe_markdown, row)) + " |" for row in rows]
    meanings = [f"- {safe_markdown(q.label)}: {safe_markdown(q.meaning)}" for q in table.quantities if q.meaning]
    notes = [part for note in table.notes for part in ("", safe_markdown(note))]
    return "\n".join([f"**{safe_markdown(table.title)}**", "", *lines, *notes, "", *meanings]) + "\n"


def to_csv(table: Table) -> str:
    """Return one line an arm, numbers in full precision, deviations in columns of their own where there are any."""
    deviating = {
        q.key for q in table.quantities if any(getattr(c, "deviation", None) is not None for c in table.cells[q.key])
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["arm"]
    for quantity in table.quantities:
        head += [quantity.key, *([f"{quantity.key}_deviation"] if quantity.key in deviating else [])]
    writer.writerow(head)
    for index, arm in enumerate(table.arms):
        row: list[object] = [printable(arm)]
        for quantity in table.quantities:
            cell = table.cells[quantity.key][index]
            measured = isinstance(cell, Measured)
            row.append("" if cell is None else repr(cell.value) if measured else printable(cell))
            if quantity.key in deviating:
                row.append("" if not measured or cell.deviation is None else repr(cell.deviation))
        writer.writerow(row)
    return out.getvalue()


def to_latex(table: Table) -> str:
    """Return a booktabs tabular; the preamble needs `booktabs` alone."""
    lines = [r"% \usepackage{booktabs}", rf"\begin{{tabular}}{{l{'r' * len(table.arms)}}}", r"\toprule"]
    lines.append(" & ".join(["", *map(as_latex_text, table.arms)]) + r" \\")
    lines.append(r"\midrule")
    for quantity in table.quantities:
        cells = [as_latex_text(as_text(cell)) for cell in table.cells[quantity.key]]
        lines.append(" & ".join([quantity.latex, *cells]) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}"]
    return "\n".join([*lines, *(f"% {printable(note)}" for note in table.notes)]) + "\n"


def to_rich(table: Table) -> rich.table.Table:
    """Return the table for the screen."""
    shown = rich.table.Table(title=safe(table.title), title_justify="left", caption_justify="left")
    shown.caption = "\n".join(map(safe, table.notes)) or None
    shown.add_column("")
    for arm in table.arms:
        shown.add_column(safe(arm), justify="right")
    for quantity in table.quantities:
        shown.add_row(safe(quantity.label), *(safe(as_text(cell)) for cell in table.cells[quantity.key]))
    return shown


def blocks(table: Table, width: int) -> list[Table]:
    """Return the table as tables of as many arms as `width` columns of a screen hold, at least one; notes go last."""

    def wide(texts: Sequence[str]) -> int:
        return max(map(cell_len, map(printable, texts)), default=0) + 3

    labels = 1 + wide([quantity.label for quantity in table.quantities])
    taken, found = width + 1, []
    for index, arm in enumerate(table.arms):
        needed = wide([arm, *(as_text(table.cells[q.key][index]) for q in table.quantities)])
        if taken + needed > width:
            found.append([])
            taken = labels
        found[-1].append(index)
        taken += needed
    return [
        replace(
            table,
            arms=tuple(table.arms[index] for index in chosen),
            cells={key: [cells[index] for index in chosen] for key, cells in table.cells.items()},
            notes=table.notes if chosen is found[-1] else (),
        )
        for chosen in found
    ]


def save(table: Table, stem: Path) -> tuple[Path, ...]:
    """Write STEM.md, STEM.csv and STEM.tex, each whole or not at all."""
    written = []
    for suffix, text in ((".md", to_markdown(table)), (".csv", to_csv(table)), (".tex", to_latex(table))):
        target = stem.with_suffix(suffix)
        with atomic_write(target) as temporary:
            temporary.write_text(text, encoding="utf-8")
        written.append(target)
    return tuple(written)
