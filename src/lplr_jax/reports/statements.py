"""The paper's statements with what was found: for a page, as Markdown, CSV and LaTeX, and the table of a search."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from lplr_jax.files import atomic_write
from lplr_jax.printing import printable
from lplr_jax.reports.tables import as_latex_text
from lplr_jax.reports.text import safe_markdown
from lplr_jax.statements import STATEMENTS, Finding

BEGIN, END = "<!-- statements -->", "<!-- end of statements -->"
"""Lines of a page between which the table is written."""

_MARKS = {"reproduced": "1", "not reproduced": "0", "cannot be decided": ""}

Row = tuple[str, Mapping[str, Finding], Mapping[str, float]]
"""A set-up by its name, what was found there, and further numbers."""

Shares = Mapping[str, tuple[int, int]]
"""For the id of a statement: set-ups of a search in which it is reproduced, and in which it is decided."""


def _share(shares: Shares, id_: str) -> str:
    holds, decided = shares.get(id_, (0, 0))
    return f"{holds} of {decided}" if decided else "-"


def counts(findings: Mapping[str, Finding]) -> str:
    """Say how many statements are reproduced, are not, and cannot be decided."""
    outcomes = [finding.outcome for finding in findings.values()]
    parts = (f"{outcomes.count(outcome)} {outcome}" for outcome in _MARKS)
    return f"{len(outcomes)} statements: {', '.join(parts)}."


def to_markdown(findings: Mapping[str, Finding], shares: Shares) -> str:
    """Return the table, and below it the rule of every statement."""
    head = ["§", "statement", "outcome", "numbers", "set-ups"]
    rows = [head, ["---"] * len(head)]
    for one in STATEMENTS:
        finding = findings[one.id]
        rows.append([one.section, one.sentence, finding.outcome, finding.numbers, _share(shares, one.id)])
    lines = ["| " + " | ".join(map(safe_markdown, row)) + " |" for row in rows]
    rules = [
        f"- **{safe_markdown(one.sentence)}** {safe_markdown(one.rule[0].upper() + one.rule[1:])}."
        for one in STATEMENTS
    ]
    words = (
        "Rules and thresholds are ours. The middle regime is the stable one past the first twentieth, else the middle "
        "half. The last column says in how many set-ups of the search one holds, of those that decide it."
    )
    return "\n".join([counts(findings), words, "", *lines, "", "The rules:", "", *rules]) + "\n"


def to_csv(findings: Mapping[str, Finding], shares: Shares) -> str:
    """Return one line a statement."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["id", "section", "sentence", "rule", "outcome", "numbers", "set_ups_holding", "set_ups_decided"])
    for one in STATEMENTS:
        finding = findings[one.id]
        words = map(printable, (one.sentence, one.rule, finding.outcome, finding.numbers))
        writer.writerow([one.id, one.section, *words, *shares.get(one.id, (0, 0))])
    return out.getvalue()


def to_latex(findings: Mapping[str, Finding], shares: Shares) -> str:
    """Return a booktabs tabular; the preamble needs `booktabs` and `array`."""
    columns = r"{l>{\raggedright}p{.33\linewidth}l>{\raggedright}p{.33\linewidth}r}"
    lines = [r"% \usepackage{array,booktabs}", rf"\begin{{tabular}}{columns}", r"\toprule"]
    lines += [r"section & statement & outcome & numbers & set-ups \\", r"\midrule"]
    for one in STATEMENTS:
        finding = findings[one.id]
        cells = (one.section, one.sentence, finding.outcome, finding.numbers, _share(shares, one.id))
        lines.append(" & ".join(map(as_latex_text, cells)) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


def save(findings: Mapping[str, Finding], shares: Shares, stem: Path) -> tuple[Path, ...]:
    """Write STEM.md, STEM.csv and STEM.tex, each whole or not at all."""
    written = []
    for suffix, make in ((".md", to_markdown), (".csv", to_csv), (".tex", to_latex)):
        target = stem.with_suffix(suffix)
        with atomic_write(target) as temporary:
            temporary.write_text(make(findings, shares), encoding="utf-8")
        written.append(target)
    return tuple(written)


def put(page: Path, text: str) -> None:
    """Put text between the two marks of a page, in place of what is there.

    Raises:
        ValueError: if the page does not hold the marks, in order.
    """
    content = page.read_text(encoding="utf-8") if page.is_file() else ""
    before, begin, rest = content.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} must hold the lines {BEGIN} and {END}; the table goes between them")
    with atomic_write(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def searched_csv(rows: Sequence[Row]) -> str:
    """Return one line a set-up: its name, its score, further numbers, and 1, 0 or nothing for every statement."""
    names = list(dict.fromkeys(name for _, _, numbers in rows for name in numbers))
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["set_up", "reproduced", "decided", *names, *(one.id for one in STATEMENTS)])
    for set_up, findings, numbers in rows:
        marks = [_MARKS[findings[one.id].outcome] for one in STATEMENTS]
        values = [f"{numbers[name]:.4g}" if name in numbers else "" for name in names]
        writer.writerow([set_up, marks.count("1"), len(marks) - marks.count(""), *values, *marks])
    return out.getvalue()


def shares_of(text: str) -> dict[str, tuple[int, int]]:
    """Return the shares that the table of a search gives.

    Raises:
        ValueError: if it is no such table.
    """
    rows = list(csv.DictReader(io.StringIO(text)))
    if rows and "set_up" not in rows[0]:
        raise ValueError("the table of a search has a column set_up; `lplr reproduce --search` writes one")
    found = {}
    for one in STATEMENTS:
        marks = [row.get(one.id) for row in rows]
        found[one.id] = marks.count("1"), marks.count("1") + marks.count("0")
    return found
