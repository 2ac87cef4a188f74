"""How a command ends: every line once, within the width of the terminal, and the counts are those of the verdicts."""

import dataclasses
import io
import re

import numpy as np
import pytest
from rich.cells import cell_len
from rich.console import Console

from lplr_jax import theory
from lplr_jax.reports import ending, tables
from lplr_jax.theory.claims.example import linear_regression

WIDTHS = (40, 80, 120)


def printed(width, *arguments, **settings):
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    ending.show(console, *arguments, **settings)
    lines = console.file.getvalue().splitlines()
    assert all(cell_len(line) <= width for line in lines)
    return lines


@pytest.fixture(scope="module")
def record():
    return linear_regression()


@pytest.fixture(scope="module")
def verdicts(record):
    return theory.verify(record)


@pytest.mark.parametrize("width", WIDTHS)
def test_one_run_ends_with_its_story_and_one_line_a_claim(width, record, verdicts):
    lines = printed(width, {"": verdicts}, {"": record})
    filled = [line for line in lines if line.strip()]
    assert len(filled) == len(set(filled)), "no line twice"
    blank = lines.index("")
    assert " ".join(line.strip() for line in lines[:blank]) == " ".join(theory.story(verdicts, record))
    claims = lines[blank + 1 :]
    assert [line.split()[0] for line in claims] == list(theory.CLAIMS)
    for line, verdict in zip(claims, verdicts, strict=True):
        assert line.partition(" ")[2].strip().startswith(verdict.outcome)
    if width >= 80:
        assert len(lines) <= 36, "a screen, with the four lines that name files"


def test_the_long_table_comes_when_asked_for(record, verdicts):
    lines = "\n".join(printed(120, {"": verdicts}, {"": record}, verbose=True))
    assert "what it rests on" in lines
    assert "what the run says" in lines
    assert not re.search("^consistency ", lines, re.MULTILINE)


def test_what_the_run_lost_is_told_first(record):
    loss = record["loss"].copy()
    loss[9:] = np.nan
    arrays = {**record.arrays, "loss": loss}
    broken = dataclasses.replace(record, arrays=arrays, provenance={"untrusted": {"3": "it was NaN"}})
    lines = printed(120, {"": theory.verify(broken)}, {"": broken})
    assert (
        lines[0] == f"diverged at step {record['epoch'][9]}: loss, gradient or parameters are not finite from there on"
    )
    assert lines[1] == "untrusted step 3: left out: it was NaN"
    for count, last in ((2, "untrusted step 1: "), (40, "untrusted: 38 more, which --verbose names")):
        many = dataclasses.replace(broken, provenance={"untrusted": {str(k): "it was NaN" for k in range(count)}})
        lines = printed(120, {"": theory.verify(many)}, {"": many})
        assert lines[min(count, 3)].startswith(last)


def many(record, verdicts, count):
    """Runs that differ: every third is refuted on its first claim of the theory, the last one is inconsistent."""
    broken = [dataclasses.replace(v, outcome="refuted") if v.claim == "ntk_positive" else v for v in verdicts]
    wrong = [dataclasses.replace(v, inconsistent=True) if v.claim == "weyl" else v for v in verdicts]
    arms = {f"width{2 ** (k % 5)}-eta{k}-seed{k}": broken if k % 3 == 0 else verdicts for k in range(count - 1)}
    arms["the-last-arm-which-has-a-name-longer-than-any-screen-is-wide"] = wrong
    return arms, dict.fromkeys(arms, record)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("count", [12, 200])
def test_many_runs_are_counted_first_and_then_take_one_row_each(width, count, record, verdicts):
    arms, records = many(record, verdicts, count)
    lines = printed(width, arms, records)
    start = next(k for k, line in enumerate(lines) if line.split()[:1] == ["run"])
    head, rows = lines[:start], lines[start + 1 :]
    assert len(rows) == count
    (counted,) = [line.split() for line in head if "ntk_positive" in line]
    refuted = len(range(0, count - 1, 3))
    assert counted[1:] == ["ntk_positive", str(count - refuted), str(refuted)], "proved, then refuted"
    for line, of_run in zip(rows, arms.values(), strict=True):
        signs = "".join("!" if v.inconsistent else ending.LETTERS[v.outcome] for v in of_run)
        assert f"  {signs}" in line
    assert rows[0].startswith("width1-e"), "a name is cut in its middle"
    assert rows[-1].startswith("the-last")
    assert "is-wide" in rows[-1]


def test_a_few_runs_stand_side_by_side_where_they_fit(record, verdicts):
    both = {"narrow": verdicts, "wide": verdicts}
    records = dict.fromkeys(both, record)
    wide = "\n".join(printed(80, both, records))
    assert "run by run" in wide
    assert "N not refuted" in "\n".join(printed(40, both, records))
    # The rule: claim, and for each run its longest outcome with three signs of the frame.
    for width in range(40, 60):
        shown = "\n".join(printed(width, both, records))
        if "run by run" in shown:
            assert all(word in shown for word in {v.outcome for v in verdicts}), "no outcome is broken"


@pytest.mark.parametrize("width", WIDTHS)
def test_a_table_of_many_arms_is_shown_in_blocks_that_fit(width):
    quantity = tables.Quantity("k", "a quantity", "k", "")
    arms, cells = tuple(f"arm-{k}" for k in range(50)), [tables.Measured(k / 7) for k in range(50)]
    blocks = tables.blocks(tables.Table("t", arms, (quantity,), {"k": cells}, ("a note",)), width)
    assert tuple(arm for block in blocks for arm in block.arms) == arms
    assert [cell for block in blocks for cell in block.cells["k"]] == cells
    assert [block.notes for block in blocks[-2:]] == [(), ("a note",)]
    console = Console(file=io.StringIO(), width=width, force_terminal=False)
    for block in blocks:
        console.print(tables.to_rich(block))
    text = console.file.getvalue()
    assert all(arm in text for arm in arms), "no head is broken"
    # A frame, the label, and nine cells at most of six or seven letters, each with three signs of the frame.
    assert len(blocks) <= -(-50 // ((width - 14) // 10))


def test_an_empty_table_and_one_arm_wider_than_the_screen():
    assert tables.blocks(tables.Table("t", (), (), {}), 40) == []
    wide = tables.Table("t", ("a" * 60,), (), {})
    assert tables.blocks(wide, 40) == [wide]
