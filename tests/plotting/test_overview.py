"""The picture that opens the README shows what the committed tables hold."""

import csv
import itertools
import re
from pathlib import Path

import pytest

from lplr_jax import plotting
from lplr_jax.plotting.overview import COLUMNS, sentences

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "reproduction.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def rows():
    with (DOCS / "overview.csv").open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def figure(rows):
    found = plotting.overview(rows, PAGE)
    found.canvas.draw()
    return found


def test_the_page_has_the_table(rows):
    for row in rows:
        assert re.fullmatch(r"lplr [a-z]+( --preset [a-z-]+)?", row["command"])
        cells = [*(row[name] for name in COLUMNS[:-1]), f"`{row['command']}`"]
        assert "| " + " | ".join(cells).replace("|  |", "| |").replace("|  |", "| |") + " |\n" in PAGE


def test_every_number_is_drawn_where_it_belongs(figure, rows):
    condition, decrease, certificate, _ = figure.axes
    marked = {(line.get_xdata()[-1], line.get_ydata()[-1]) for line in condition.lines}
    assert marked == {(float(row["excess"]), place) for place, row in enumerate(rows)}
    marked = {(line.get_xdata()[0], line.get_ydata()[0]) for line in decrease.lines if len(line.get_xdata()) == 1}
    shares = [(place, row) for place, row in enumerate(rows) if row["floor"]]
    assert shares
    assert marked == {(float(row[name]), place) for place, row in shares for name in ("floor", "min")}
    marked = {line.get_xdata()[-1] for line in certificate.lines}
    assert marked == {0, float(rows[0]["drift"]), float(rows[0]["zero"])}


def test_every_sentence_has_a_square(figure):
    total, holds = map(int, re.search(r"(\d+) statements: (\d+) reproduced", PAGE).groups())
    found = list(itertools.chain(*sentences(PAGE).values()))
    assert (len(found), found.count("reproduced")) == (total, holds)
    squares = figure.axes[3]
    assert len(squares.patches) == total
    assert sum(text.get_text() == "×" for text in squares.texts) == found.count("not reproduced")
    assert squares.get_title("left") == f"{holds} of the paper's {total} sentences reproduced"


def test_no_text_lies_on_another_or_outside(figure):
    renderer = figure.canvas.get_renderer()
    for axes in figure.axes:
        labels = [*axes.texts, axes.title, axes._left_title, axes.xaxis.label, *axes.get_yticklabels()]
        shown = [text for text in labels if text.get_visible() and text.get_text()]
        boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in shown]
        for (one, first), (other, second) in itertools.combinations(boxes, 2):
            assert not first.overlaps(second), f"{one!r} lies on {other!r}"
        for text, box in boxes:
            inside = figure.bbox
            assert inside.x0 <= box.x0 < box.x1 <= inside.x1, text
            assert inside.y0 <= box.y0 < box.y1 <= inside.y1, text


def test_a_run_without_a_certificate_leaves_its_panel_empty(rows):
    shown = plotting.overview([{**row, "zero": ""} for row in rows], PAGE)
    assert not shown.axes[2].axison


def test_tables_that_are_none_are_refused(rows):
    with pytest.raises(ValueError, match="rows must have the columns run, excess"):
        plotting.overview([], PAGE)
    with pytest.raises(ValueError, match="rows must have the columns"):
        plotting.overview([{"run": "a"}], PAGE)
    with pytest.raises(ValueError, match="excess of 'digits, width 128' must be a number or empty, got 'many'"):
        plotting.overview([{**rows[0], "excess": "many"}], PAGE)
    with pytest.raises(ValueError, match="page must hold the table that lplr reproduce --page writes"):
        plotting.overview(rows, "no table")
    with pytest.raises(ValueError, match=r"section of a sentence must be one of 6\.1"):
        plotting.overview(rows, "| 7.7 | a | reproduced | 1 | - |")
