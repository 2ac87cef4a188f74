"""Records and verdicts as HTML, for notebooks and for the report; all text in it is escaped."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

from lplr_jax.records import Record, facts
from lplr_jax.reports.text import safe_html
from lplr_jax.theory import Outcome, Verdict

COLOURS: dict[Outcome, str] = {
    "proved": "#00795a",
    "not refuted": "#0072b2",
    "refuted": "#b84d00",
    "undecided": "#7a5f00",
    "not applicable": "#666666",
}
"""Colours of the outcomes, dark enough to be read on white (contrast 4.5 and more)."""


def record_html(record: Record) -> str:
    """Return a record as a small table: what it is, steps, probes, how it ended, loss, λ_0."""
    rows = [_row([f"<th scope='row' style='text-align:left'>{safe_html(label)}</th>", _cell(text)])
            for label, text in facts(record)]  # fmt: skip
    return _table(f"Record {record.experiment}", [], rows)


def numbers_html(title: str, result: Any) -> str:
    """Return the fields of a result that are numbers or short texts as a small table; vectors are left out."""
    rows = []
    for field in dataclasses.fields(result):
        value = getattr(result, field.name)
        if isinstance(value, float | int | str | bool) and value != "":
            shown = f"{value:.12g}" if isinstance(value, float) else str(value)
            head = f"<th scope='row' style='text-align:left'>{safe_html(field.name.replace('_', ' '))}</th>"
            rows.append(_row([head, _cell(shown)]))
    return _table(title, [], rows)


def verdict_html(verdicts: Iterable[Verdict], *, parts: bool = True) -> str:
    """Return verdicts as a table: a row for each claim, and one for each of its parts where these are wanted.

    The parts of `consistency` are shown only where they fail.
    """
    rows = []
    for verdict in verdicts:
        rows.append(_verdict_row(verdict, verdict.claim, f"{verdict.reference}: {verdict.note}"))
        for part in verdict.parts if parts else ():
            if verdict.claim == "consistency" and part.outcome != "refuted":
                continue
            rows.append(_verdict_row(part, f"... {part.claim.partition('.')[2]}", part.note))
    heads = ["claim", "outcome", "measured", "against", "margin", "step", "what it rests on"]
    return _table("hypotheses and conclusions of the theory (arXiv 2507.21429)", heads, rows)


def _verdict_row(verdict: Verdict, name: str, note: str) -> str:
    word = f"{verdict.outcome} (inconsistent)" if verdict.inconsistent else verdict.outcome
    colour = COLOURS.get(verdict.outcome, "#000000")
    numbers = [
        "" if math.isnan(value) else f"{value:.3g}" for value in (verdict.measured, verdict.bound, verdict.margin)
    ]
    step = "" if verdict.step is None else str(verdict.step)
    cells = [_cell(name), f"<td style='color:{colour};text-align:left'>{safe_html(word)}</td>"]
    cells += [_cell(number, "right") for number in (*numbers, step)]
    return _row([*cells, _cell(f"{note}  [{verdict.units}]" if verdict.units else note)])


def _cell(text: str, align: str = "left") -> str:
    return f"<td style='text-align:{align}'>{safe_html(text)}</td>"


def _row(cells: Sequence[str]) -> str:
    return f"<tr>{''.join(cells)}</tr>"


def _table(caption: str, heads: Sequence[str], rows: Sequence[str]) -> str:
    head = _row([f"<th scope='col' style='text-align:left'>{safe_html(name)}</th>" for name in heads])
    return (
        f"<table><caption style='text-align:left'>{safe_html(caption)}</caption>"
        + (f"<thead>{head}</thead>" if heads else "")
        + f"<tbody>{''.join(rows)}</tbody></table>"
    )
