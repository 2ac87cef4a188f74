"""A run, or the arms of an experiment, as one page of HTML that needs nothing else: no script, no file, no network."""

import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

from lplr_jax import __version__, arms, checks, theory
from lplr_jax.files import atomic_write
from lplr_jax.plotting.style import styled
from lplr_jax.printing import printable
from lplr_jax.records import Record, facts
from lplr_jax.reports.html import environment, style
from lplr_jax.reports.output import figure_of
from lplr_jax.reports.rows import rival_rows, summary_rows
from lplr_jax.schema import SCHEMA
from lplr_jax.theory import Verdicts
from lplr_jax.theory.claims import REGISTRY

NAME = "report.html"
"""The page's file where only a folder is named."""
LONGEST = 20_000
"""Entries of an array that the page still embeds. Calibrated: the default run's series and probes are below."""


def report(
    source: Record | Mapping[str, Record] | str | os.PathLike[str], path: str | os.PathLike[str] | None = None
) -> Path:
    """Write one self-contained page: the story of the run, verdicts, intervals, figure, what was seen, and how.

    Args:
        source: a record; records by name; or the path of an npz file, of a run's folder, or of a folder of arms.
        path: file or folder to write to; None for report.html in the folder of the source, or in the current one.

    Returns:
        The path of the page.

    Raises:
        TypeError: for what is none of these.
        RecordError: if there is no record, or one that cannot be read.

    Example:
        >>> from lplr_jax.theory.claims.example import linear_regression
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report(linear_regression(), folder).name
        'report.html'
    """
    found: Record | Mapping[str, Record]
    if isinstance(source, Record | Mapping):
        found, beside = source, Path()
    else:
        place = checks.path("source", source)
        found, beside = arms.load(place), place if place.is_dir() else place.parent
    if isinstance(found, Mapping) and not found:
        raise ValueError("there is no record to report; name a record, or a folder that holds some")
    for name, record in found.items() if isinstance(found, Mapping) else (("", found),):
        checks.instance(f"source[{name!r}]" if name else "source", record, Record, "as records.load returns one")
    target = beside / NAME if path is None else checks.path("path", path)
    if target.is_dir():
        target = target / NAME
    title = "" if isinstance(source, Record | Mapping) else beside.resolve().name
    return write(page(found if isinstance(found, Mapping) else {"": found}, title=title), target)


def write(text: str, target: Path) -> Path:
    """Write a page, whole or not at all, and return its path."""
    with atomic_write(target) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return target


def page(
    records: Mapping[str, Record],
    verdicts: Mapping[str, Verdicts] | None = None,
    figure: Figure | str | None = None,
    *,
    title: str = "",
) -> str:
    """Return the page as text.

    Args:
        records: by the name of the run; that of a single one may be "".
        verdicts: by the same names; None has them judged.
        figure: what was drawn of them, a text that says why there is none, or None to have it drawn.
        title: of several runs; that of one is its experiment, and so is an empty one.
    """
    judged = {name: theory.verify(record) for name, record in records.items()} if verdicts is None else verdicts
    if figure is None:
        figure = _figure(records)
    several = len(records) > 1
    first = next(iter(records.values()))
    title = printable(title if several and title else first.experiment)
    runs = [_run(name or title, record, judged[name], number) for number, (name, record) in enumerate(records.items())]
    return (
        environment()
        .get_template("page.html")
        .render(
            title=title,
            runs=runs,
            several=several,
            level=3 if several else 2,
            claims=[verdict.claim for verdict in next(iter(judged.values()))],
            statements={claim.id: claim.statement for claim in REGISTRY.values()},
            figure=_inline(figure, f"figure of {title}") if isinstance(figure, Figure) else "",
            style=Markup(f"{style()}\n{style('page.css')}"),
            version=__version__,
        )
    )


def _figure(records: Mapping[str, Record]) -> Figure | str:
    known = {name: record for name, record in records.items() if np.isfinite(record["loss"]).any()}
    if not known:
        return "no run has a finite loss"
    try:
        return figure_of(known if len(records) > 1 else {"": next(iter(known.values()))})[0]
    except ValueError as error:  # arms that no figure fits
        return str(error)


def _inline(figure: Figure, label: str) -> Markup:
    """Return a figure as an element of the page; the same figure gives the same text."""
    drawn = io.StringIO()
    with styled(), mpl.rc_context({"svg.hashsalt": label, "svg.fonttype": "path"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<!--.*?-->\s*", "", svg, flags=re.DOTALL)  # each text of the figure stands there as a comment
    # Hundredths of a point are finer than any screen; the scales of letters keep their digits.
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\d\.\d{2})\d+", r"\1", path[0]), svg)
    named = f'<svg role="img" aria-label="{Markup.escape(printable(label))}"'
    return Markup(svg.replace("<svg", named, 1))


def _run(name: str, record: Record, verdicts: Verdicts, number: int) -> dict[str, Any]:
    """Return what the page says of one run."""
    finite = bool(np.isfinite(record["loss"]).any())
    provenance = {key: value for key, value in record.provenance.items() if key not in ("verdicts", "command")}
    return {
        "name": name,
        "story": theory.story(verdicts, record) if finite else ("The loss is not finite from the start.",),
        "verdicts": verdicts,
        "by": {verdict.claim: verdict for verdict in verdicts},
        "reading": theory.reading(verdicts),
        "intervals": list(_intervals(record)),
        "rows": list(summary_rows(record)),
        "rivals": list(rival_rows(record)),
        "seen": facts(record),
        "absent": [(key, entry.meaning) for key, entry in SCHEMA.items() if key not in record],
        "command": record.provenance.get("command", ""),
        "config": _flat(record.config),
        "provenance": [("checksum of the record", record.checksum()), *_flat(provenance)],
        "block": f"numbers-{number}",
        "json": _block(record),
    }


def _intervals(record: Record) -> Iterator[tuple[str, ...]]:
    """Yield step, λ_min, both ends, and whether they are proved of the exact kernel."""
    if "probe_epoch" not in record or "ntk_min_eig" not in record:
        return
    count = record["probe_epoch"].size
    columns = [record.arrays.get(f"ntk_min_eig{end}", np.full(count, np.nan)) for end in ("", "_lower", "_upper")]
    error = record.arrays.get("ntk_assembly_error", np.full(count, np.nan))
    for k in np.argsort(record["probe_epoch"], kind="stable"):
        value, low, high = (float(column[k]) for column in columns)
        if math.isfinite(value):
            shown = (f"{value:.6g}", *("" if math.isnan(end) else f"{end:.12g}" for end in (low, high)))
            yield (str(int(record["probe_epoch"][k])), *shown, "yes" if math.isfinite(error[k]) else "no")


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return nested settings as rows."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        label = f"{before}{key}"
        if isinstance(value, Mapping):
            rows += _flat(value, f"{label}: ")
        else:
            rows.append((label, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def _block(record: Record) -> Markup:
    """Return the numbers of a record as JSON that cannot end the element that holds it."""

    def plain(value: float | int) -> float | int | str | None:
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
        return value

    arrays = {
        name: {
            "units": SCHEMA[name].units,
            "values": plain(array.item()) if array.ndim == 0 else [plain(value) for value in array.tolist()],
        }
        for name, array in record.arrays.items()
        if array.ndim < 2 and array.size <= LONGEST
    }
    content = {"experiment": record.experiment, "loss": record.loss, "checksum": record.checksum(), "arrays": arrays}
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)
