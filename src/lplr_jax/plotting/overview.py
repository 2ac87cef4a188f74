"""What the paper's experiments gave, in one picture made of the tables that are committed with the documents."""

import math
import re
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

from lplr_jax.plotting.style import blank, plain, styled

COLUMNS = ("run", "excess", "floor", "min", "k", "drift", "zero", "silent", "command")
"""Columns of the table of runs: its name; L_Θ r/λ_0; percent of the decrease of log L by PL with a floor, and by λ_min,
with the k of the former; how far the run drifted, and within what distance zero loss is proved; why PL with a floor is
silent, where it is; the command that makes the run. What a run does not tell is empty."""
SECTIONS = {"6.1": "§ 6.1 digits", "6.2": "§ 6.2 widths", "6.3": "§ 6.3 CIFAR-10", "v2": "version 2"}
"""Sections of the paper, as the panel of its sentences calls them."""
OUTCOMES = ("reproduced", "not reproduced", "cannot be decided")
_ROW = re.compile(r"^\| (\S+) \| .+? \| (reproduced|not reproduced|cannot be decided) \|", re.MULTILINE)
_GREEN, _ORANGE, _BLUE = "#009E73", "#D55E00", "#0072B2"


def sentences(page: str) -> dict[str, list[str]]:
    """Return what became of the paper's sentences, by section, from the table of `lplr reproduce` on a page.

    Raises:
        ValueError: where the page has no such table, or names a section that is not known.
    """
    found: dict[str, list[str]] = {section: [] for section in SECTIONS}
    for section, outcome in _ROW.findall(page):
        if section not in found:
            raise ValueError(f"the section of a sentence must be one of {', '.join(SECTIONS)}, got {section!r}")
        found[section].append(outcome)
    if not any(found.values()):
        raise ValueError("page must hold the table that lplr reproduce --page writes, found none of its rows")
    return found


def overview(rows: Sequence[Mapping[str, str]], page: str) -> Figure:
    """Draw the picture that opens the README: the paper's condition, what accounts for the decrease, L*, the sentences.

    Args:
        rows: lines of docs/overview.csv, with the `COLUMNS`.
        page: text of docs/reproduction.md.

    Returns:
        Four panels, of which the first two share their rows.

    Raises:
        ValueError: for rows without these columns, none at all, a cell that is no number, or a page without its table.
    """
    if not rows or set(rows[0]) != set(COLUMNS):
        raise ValueError(f"rows must have the columns {', '.join(COLUMNS)}, got {sorted(rows[0]) if rows else 'none'}")
    outcomes = sentences(page)
    with styled():
        figure = blank(9.6, 6.4)
        grid = figure.add_gridspec(2, 2, height_ratios=(1.15, 1))
        first = figure.add_subplot(grid[0, 0])
        _condition(first, rows)
        _accounts(figure.add_subplot(grid[0, 1], sharey=first), rows)
        _certificate(figure.add_subplot(grid[1, 0]), rows)
        _statements(figure.add_subplot(grid[1, 1]), outcomes)
    return figure


def _number(row: Mapping[str, str], name: str) -> float:
    try:
        return float(row[name]) if row[name] else float("nan")
    except ValueError as error:
        raise ValueError(f"{name} of {row['run']!r} must be a number or empty, got {row[name]!r}") from error


def _heading(ax: Axes, finding: str) -> None:
    ax.set_title(finding, fontsize=10, fontweight="bold")


def _power(value: float, _: int | None = None) -> str:
    """Return a power of ten as figures have it: 1, 10, else with its exponent."""
    return f"{value:g}" if 1e-4 < value < 1e3 else f"$10^{{{round(math.log10(value))}}}$"


def _condition(ax: Axes, rows: Sequence[Mapping[str, str]]) -> None:
    """Show by what factor each run misses the theorem's condition."""
    for place, row in enumerate(rows):
        value = _number(row, "excess")
        if value == value:
            ax.plot([1, value], [place, place], color=_ORANGE, linewidth=2)
            ax.plot(value, place, "X", color=_ORANGE, markersize=8)
            ax.annotate(row["excess"], (value, place), (7, 0), textcoords="offset points", va="center", fontsize=9)
    ax.set_xscale("log")
    ax.set_xlim(1e-2, 1e10)
    ax.axvspan(1e-2, 1, color=_GREEN, alpha=0.15, linewidth=0)
    ax.set_yticks(range(len(rows)), [plain(row["run"]) for row in rows], fontsize=9)
    ax.set_ylim(len(rows) - 0.4, -1.25)
    ax.text(0.1, -0.78, "theorem\nspeaks", ha="center", va="center", fontsize=8.5, color="#00664b")
    ax.text(2, -0.78, "theorem is silent", va="center", fontsize=8.5, color=_ORANGE)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_formatter(FuncFormatter(_power))
    ax.set_xlabel(r"$L_\Theta r\,/\,\lambda_0$: the theorem asks for less than 1")
    _heading(ax, "The paper's condition is refuted on every run")


def _accounts(ax: Axes, rows: Sequence[Mapping[str, str]]) -> None:
    """Show how much of the decrease each bound accounts for."""
    for place, row in enumerate(rows):
        low, high = _number(row, "min"), _number(row, "floor")
        if high == high:
            ax.plot([low, high], [place, place], color="0.8", linewidth=2, zorder=1)
            ax.plot(low, place, "o", color=_BLUE, markersize=7)
            ax.plot(high, place, "D", color=_GREEN, markersize=7)
            ax.annotate(f"{row['floor']} %", (high, place), (8, 0), textcoords="offset points", va="center", fontsize=9)
            ax.annotate(
                row["min"], (low, place), (-8, 0), textcoords="offset points", va="center", ha="right", fontsize=9
            )
        elif row["silent"]:
            ax.text(6e-5, place, f"silent: {row['silent']}", va="center", fontsize=8.5, color="0.35", style="italic")
    ax.plot([], [], "o", color=_BLUE, label=r"$\lambda_{\min}$ alone")
    ax.plot([], [], "D", color=_GREEN, label="PL with a floor (ours)")
    ax.legend(loc="upper left", ncols=2, fontsize=8.5, handletextpad=0.1, columnspacing=1.2, borderpad=0.1)
    ax.set_xscale("log")
    ax.set_xlim(3e-5, 1.5e3)
    ax.set_xticks([1e-3, 1e-2, 1e-1, 1, 10, 100])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.tick_params(axis="y", labelleft=False)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_formatter(FuncFormatter(_power))
    ax.set_xlabel("% of the decrease of log L")
    _heading(ax, "What accounts for the decrease")


def _certificate(ax: Axes, rows: Sequence[Mapping[str, str]]) -> None:
    """Show how far the run with a certificate went, and from where on L* = 0 is a theorem."""
    known = [row for row in rows if row["zero"] and row["drift"]]
    if not known:
        ax.set_axis_off()
        return
    row = known[0]
    drift, zero = _number(row, "drift"), _number(row, "zero")
    end = 1.4 * zero
    ax.axvspan(zero, end, color=_GREEN, alpha=0.15, linewidth=0)
    ax.plot([0, drift], [0, 0], color=_ORANGE, linewidth=4, solid_capstyle="butt")
    ax.plot(drift, 0, "s", color=_ORANGE, markersize=8)
    ax.plot(0, 0, "o", color="0.1", markersize=8)
    ax.plot(zero, 0, "*", color=_GREEN, markersize=18)
    ax.text(0, -0.35, r"$\theta_0$", fontsize=11, ha="center", va="center")
    ax.text(drift, 0.33, f"the run ends\nat {row['drift']}", ha="center", va="bottom", fontsize=9)
    ax.text(zero, -0.35, f"a network of\nzero loss within\n{row['zero']}", ha="center", va="top", fontsize=9)
    ax.text(0.5 * (zero + end), 0.75, "L* = 0\nproved", ha="center", va="center", fontsize=10, color="#00664b")
    ax.text(0.5 * (drift + zero) + 0.1 * zero, 0.75, "L* not known", ha="center", va="center", fontsize=9, color="0.35")
    ax.set_xlim(-0.06 * zero, end)
    ax.set_ylim(-1.3, 1.1)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_xlabel(f"distance from the initialisation ({plain(row['run'])})")
    _heading(ax, "A network of zero loss is proved to exist")


def _statements(ax: Axes, outcomes: Mapping[str, Sequence[str]]) -> None:
    """Show each sentence as one square."""
    marks = {"reproduced": (_BLUE, ""), "not reproduced": ("white", "×"), "cannot be decided": ("0.85", "?")}
    widest = max(map(len, outcomes.values()))
    for place, found in enumerate(outcomes.values()):
        for at, outcome in enumerate(sorted(found, key=OUTCOMES.index)):
            colour, sign = marks[outcome]
            edge = "0.5" if outcome == "cannot be decided" else _BLUE if not sign else _ORANGE
            ax.barh(place, 0.8, left=at, height=0.62, facecolor=colour, edgecolor=edge, linewidth=1.2)
            ax.text(at + 0.4, place, sign, ha="center", va="center", color=edge, fontsize=10)
        holds = found.count("reproduced")
        ax.text(widest + 0.3, place, f"{holds} of {len(found)}", va="center", fontsize=9)
    ax.set_yticks(range(len(outcomes)), [SECTIONS[section] for section in outcomes], fontsize=9)
    ax.set_xlim(0, widest + 2.6)
    ax.set_ylim(len(outcomes) - 0.4, -0.6)
    ax.set_xticks([])
    ax.grid(visible=False)
    for side in ("left", "bottom"):
        ax.spines[side].set_visible(False)
    ax.tick_params(axis="y", length=0)
    total = [outcome for found in outcomes.values() for outcome in found]
    ax.set_xlabel("one square a sentence, × where it is not reproduced")
    _heading(ax, f"{total.count('reproduced')} of the paper's {len(total)} sentences reproduced")
