"""Records and verdicts as HTML, for notebooks and for the page; all text in it is escaped by the templates."""

import dataclasses
import math
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from lplr_jax.printing import printable
from lplr_jax.records import Record, facts
from lplr_jax.theory import Verdict

TEMPLATES = Path(__file__).with_name("templates")
BRIEF = 110
"""Letters of a reason that stand where its details are closed."""


@cache
def environment() -> jinja2.Environment:
    """Return the templates: every text is made printable and then escaped, unless it is markup of ours."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) or not isinstance(value, str) else printable(value),
        keep_trailing_newline=True,
    )
    made.filters |= {"digits": _digits, "brief": _brief, "shown_parts": _shown_parts}
    return made


def style(name: str = "style.css") -> Markup:
    """Return a style sheet of ours, as it stands between style tags."""
    return Markup((TEMPLATES / name).read_text(encoding="utf-8").strip())


def _digits(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.3g}"


def _brief(note: str) -> str:
    return note if len(note) <= BRIEF else f"{note[: BRIEF - 1]}…"


def _shown_parts(verdict: Verdict) -> list[Verdict]:
    """Return the parts that are shown: those of `consistency` only where they fail."""
    return [part for part in verdict.parts if verdict.claim != "consistency" or part.outcome == "refuted"]


def _in_notebook(macro: str, *arguments: Any) -> str:
    macros = environment().get_template("macros.html").module
    return f'<div class="lplr"><style>{style()}</style>{getattr(macros, macro)(*arguments)}</div>'


def record_html(record: Record) -> str:
    """Return a record as a small table: what it is, steps, probes, how it ended, loss, λ_0."""
    return _in_notebook("pairs", f"Record {record.experiment}", facts(record))


def numbers_html(title: str, result: Any) -> str:
    """Return the fields of a result that are numbers or short texts as a small table; vectors are left out."""
    rows = []
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, float | int | str | bool) and value != "":
            rows.append((field.name.replace("_", " "), f"{value:.12g}" if isinstance(value, float) else str(value)))
    return _in_notebook("pairs", title, rows)


def verdict_html(verdicts: Iterable[Verdict], *, parts: bool = True) -> str:
    """Return verdicts as a table: a row for each claim, and one for each of its parts where these are wanted.

    The parts of `consistency` are shown only where they fail.
    """
    caption = "hypotheses and conclusions of the theory (arXiv 2507.21429), and what is ours"
    return _in_notebook("verdict_table", caption, list(verdicts), parts)
