"""One look for every figure, and how figures reach the disk."""

import io
import os
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_pdf import FigureCanvasPdf
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from lplr_jax import checks
from lplr_jax.files import atomic_write
from lplr_jax.printing import printable
from lplr_jax.records import SQUARED, Record

STYLE = Path(__file__).with_name("lplr.mplstyle")
TITLE_LETTERS = 13
"""Letters of a title that fit into an inch."""
DPI = 200
"""Pixels of an inch in a PNG."""
_NO_LOOK = frozenset({"backend", "backend_fallback", "interactive", "toolbar", "timezone", "date.epoch"})
"""Settings of matplotlib that are not of how a figure looks."""
MINOR_TICKS = 1e3
"""Quotient of the ends of a log axis up to which it has minor ticks."""
LONGEST = 120
"""Letters of one text from a record that a title shows."""
LONGEST_NAME = 40
"""Letters of a name that a legend shows, beside which the panel still has room."""


@contextmanager
def styled() -> Iterator[None]:
    """Context with the look of these figures alone; what the user set of matplotlib is put back, and not looked at."""
    # As `rcdefaults`, which reads all styles that matplotlib has.
    defaults: Any = {name: value for name, value in mpl.rcParamsDefault.items() if name not in _NO_LOOK}
    with mpl.rc_context(defaults):
        mpl.rc_file(STYLE, use_default_template=False)
        yield


class Picture(Figure):
    """A figure that a notebook shows as it is, whatever backend the notebook has set up, or none."""

    def _repr_png_(self) -> bytes:
        drawn = io.BytesIO()
        with styled():
            self.savefig(drawn, format="png", dpi=100)
        return drawn.getvalue()


def blank(width: float | int, height: float | int) -> Figure:
    """Return an empty figure on a canvas of its own, of a size in inches."""
    figure = Picture(figsize=(width, height))
    FigureCanvasAgg(figure)
    return figure


def plain(text: Any, most: int = LONGEST) -> str:
    """Return text from a record or a file name for a label: one line, no mathematics begins in it, not too long."""
    shown = printable(text)
    shown = shown if len(shown) <= most else f"{shown[: most - 4]} ..."
    return shown.replace("$", r"\$")


def source_of(record: Record) -> str:
    """Return where the data of a record came from, in words, empty where it does not say; it may hold anything."""
    found = record.provenance.get("data")
    source = found.get("source") if isinstance(found, Mapping) else None
    return "" if source is None else plain(source)


def setting(record: Record, name: str) -> str:
    """Return a setting of a record's config for a label, empty where it has none."""
    value = record.config.get(name)
    return "" if value is None else plain(value)


def numbers_of(record: Record) -> list[str]:
    """Return η, n, s, p and the loss of a record for a title, without what is not known."""
    eta = float(record["learning_rate"])
    found = [f"η = {eta:.3g}"] if eta == eta else []
    found += [f"n = {int(record['n']):,}", f"s = {float(record['loss_scale']):g}", f"p = {int(record['p']):,}"]
    return found + ([] if record.loss == SQUARED else [f"{plain(record.loss)} loss"])


def set_title(figure: Figure, title: str) -> None:
    """Write a title above a figure, in as many lines as it takes."""
    most = int(TITLE_LETTERS * figure.get_figwidth())
    lines = [part for line in title.split("\n") for part in textwrap.wrap(line, most)]
    figure.suptitle("\n".join(lines), fontsize=10)


def _thin(figure: Figure) -> None:
    """Leave out the minor ticks of log axes of many decades: a blur, and a tenth of the time of a figure."""
    for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = axis.get_view_interval()
        if axis.get_scale() == "log" and high > MINOR_TICKS * low:
            axis.set_minor_locator(NullLocator())


def save(figure: Figure, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a figure as PNG (200 dpi) and PDF beside each other, each whole or not at all.

    Args:
        figure: what to write.
        path: file name; its suffix is replaced.

    Returns:
        The two paths.

    Raises:
        TypeError: for what is no figure, or no path.
        ValueError: for a path without a file name.
    """
    checks.instance("figure", figure, Figure, "as four_panel returns one")
    stem = checks.path("path", path)
    if not stem.name:
        raise ValueError(f"path must be that of a file, whose suffix is replaced, got {str(path)!r}")
    written, layout, canvas, dpi = [], figure.get_layout_engine(), figure.canvas, figure.dpi
    # `savefig` draws everything twice for each file, once to lay it out; what it calls at last draws once.
    figure.set_dpi(DPI)
    _thin(figure)
    try:
        for suffix in (".png", ".pdf"):
            target = stem.with_suffix(suffix)
            # Drawn in memory: on a full disk the PDF writer leaves its file open.
            drawn = io.BytesIO()
            with styled():
                # No dates in the files: the same record gives the same bytes.
                if suffix == ".png":
                    FigureCanvasAgg(figure).print_png(drawn, metadata={"Software": None})
                else:
                    FigureCanvasPdf(figure).print_pdf(drawn, metadata={"CreationDate": None, "Producer": None})
            figure.set_layout_engine("none")  # laid out once, for both: it takes as long as drawing
            with atomic_write(target) as temporary:
                temporary.write_bytes(drawn.getvalue())
            written.append(target)
    finally:
        figure.set_layout_engine(layout)
        figure.set_dpi(dpi)
        figure.set_canvas(canvas)
    return written[0], written[1]
