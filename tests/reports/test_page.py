"""The page about a run: whole in itself, valid, escaped, within its size, and a browser opens it."""

import dataclasses
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET

import html5lib
import numpy as np
import pytest

import lplr_jax
from builders import make
from lplr_jax import records, theory
from lplr_jax.arms import Arms
from lplr_jax.plotting.panels import four_panel
from lplr_jax.reports.page import page, report
from lplr_jax.theory.claims.example import linear_regression

EVIL = "</script><script>alert(1)</script> <img src=x onerror=alert(1)> {{ 7*7 }} \x1b[2J\u202e & \"'"
XHTML = "{http://www.w3.org/1999/xhtml}"


def parsed(text):
    """The page as a tree, by a parser of HTML5 that raises at the first mistake."""
    return html5lib.HTMLParser(strict=True).parse(text)


def words(tree):
    return " ".join("".join(tree.itertext()).split())


@pytest.fixture(scope="module")
def record():
    return linear_regression()


@pytest.fixture(scope="module")
def text(record):
    return page({"": record}, figure=four_panel(record))


def test_the_page_says_what_the_verdicts_say(record, text):
    tree = parsed(text)
    verdicts = theory.verify(record)
    said = words(tree)
    story = [item.text for item in tree.iter(f"{XHTML}li")]
    assert story == list(theory.story(verdicts, record))
    for verdict in verdicts:
        assert " ".join(verdict.note.split()) in said
    outcomes = [cell.text for cell in tree.iter(f"{XHTML}td") if "outcome" in cell.get("class", "")]
    assert outcomes == [verdict.outcome for verdict in verdicts]
    order = [
        said.index(head) for head in ("The story of the run", "Hypotheses and conclusions", "The least eigenvalue")
    ]
    assert order == sorted(order)


def test_nothing_is_fetched_and_nothing_runs(text):
    tree = parsed(text)
    for element in tree.iter():
        tag = str(element.tag).removeprefix(XHTML)
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
        assert not any(name.startswith("on") for name in element.keys())  # noqa: SIM118  # an element is no dict
        for name in ("src", "href", "{http://www.w3.org/1999/xlink}href"):
            assert element.get(name, "#").startswith("#")
        if tag == "script":
            assert element.get("type") == "application/json"
    assert not re.search(r"url\((?!#)|@import", text)


def test_ids_are_unique_and_heads_are_scoped(text):
    tree = parsed(text)
    ids = [element.get("id") for element in tree.iter() if element.get("id")]
    assert len(ids) == len(set(ids))
    for head in tree.iter(f"{XHTML}th"):
        assert head.get("scope") in ("row", "col")
    assert tree.get("lang") == "en" or next(tree.iter(f"{XHTML}html")).get("lang") == "en"
    labels = {element.get("aria-labelledby") for element in tree.iter()} - {None}
    assert labels <= set(ids)


def test_the_numbers_are_those_of_the_record(record, text):
    (block,) = list(parsed(text).iter(f"{XHTML}script"))
    held = json.loads(block.text)
    assert held["checksum"] == record.checksum()
    for name, array in record.arrays.items():
        if array.ndim < 2:
            values = np.array(held["arrays"][name]["values"], float)
            np.testing.assert_array_equal(values, np.asarray(array, float))
        else:
            assert name not in held["arrays"]


def test_a_figure_is_one_image_and_the_same_each_time(record, text):
    svg = text[text.index("<svg") : text.index("</svg>") + 6]
    root = ET.fromstring(svg)  # our own
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert "<!--" not in svg
    again = page({"": record}, figure=four_panel(record))
    assert again == text


def test_text_from_outside_is_text(record):
    config = {"width": 8, EVIL: EVIL, "nested": {EVIL: [EVIL]}}
    provenance = {"untrusted": {EVIL: EVIL}, "data": {"source": EVIL}, "command": EVIL}
    evil = dataclasses.replace(record, config=config, provenance=provenance)
    text = page({EVIL: evil, "b": record})
    tree = parsed(text)
    assert sum(1 for _ in tree.iter(f"{XHTML}script")) == 2
    assert not list(tree.iter(f"{XHTML}img"))
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "{{ 7*7 }}" in words(tree)
    assert "alert(1)" in words(tree)


def test_arms_get_a_column_each(record):
    diverged = make(loss=np.array([1.0, 2.0, *[np.nan] * 5]), seen=np.array([1, 1, 0, 0, 0, 0, 0]))
    text = page({"m8": record, "m16": diverged, "m32": record})
    tree = parsed(text)
    first = next(tree.iter(f"{XHTML}table"))
    heads = [head.text for head in first.iter(f"{XHTML}th") if head.get("scope") == "col"]
    assert heads == ["claim", "m8", "m16", "m32"]
    rows = list(first.iter(f"{XHTML}tr"))[1:]
    assert [row[0].text for row in rows] == list(theory.CLAIMS)
    assert all(len(row) == 4 for row in rows)


def test_a_run_without_a_finite_number_still_has_a_page():
    lost = make(loss=np.full(7, np.nan), seen=np.zeros(7, int))
    said = words(parsed(page({"": lost})))
    assert "not finite from the start" in said
    assert "diverged" in said


def test_report_takes_what_load_takes(tmp_path, record, monkeypatch):
    for arm in ("a", "b"):
        (tmp_path / "arms" / arm).mkdir(parents=True)
        record.save(tmp_path / "arms" / arm / "record.npz")
    assert report(tmp_path / "arms" / "a") == tmp_path / "arms" / "a" / "report.html"
    assert report(tmp_path / "arms" / "b" / "record.npz", tmp_path / "x.html") == tmp_path / "x.html"
    assert lplr_jax.report(str(tmp_path / "arms")) == tmp_path / "arms" / "report.html"
    assert words(parsed((tmp_path / "arms" / "report.html").read_text())).count("The story of the run") == 2
    monkeypatch.chdir(tmp_path)
    assert report(records.load(tmp_path / "arms" / "a")).resolve() == tmp_path / "report.html"
    with pytest.raises(ValueError, match="there is no record to report"):
        report(Arms())
    with pytest.raises(TypeError, match="source"):
        report({"a": 3})  # type: ignore[dict-item]
    with pytest.raises(records.RecordError):
        report(tmp_path / "nothing")


@pytest.mark.slow
def test_a_long_run_fits_a_page(record):
    """A run of 2,001 entries, 41 probes and 1,000 eigenvalues, the size of the default one, is below 1.5 MB."""
    rng = np.random.default_rng(0)
    long, probes = 2001, 41
    arrays = {}
    for name, array in record.arrays.items():
        dims = records.SCHEMA[name].dims
        sizes = [
            {"epoch": long, "probe": probes, "other_probe": probes, "eigenvalue": 1000}.get(dim, 3) for dim in dims
        ]
        arrays[name] = array if not dims else np.abs(rng.standard_normal(sizes)) + 0.1
    arrays |= {"epoch": np.arange(long), "probe_epoch": np.arange(0, long, 50), "n": np.array(1000)}
    arrays["drift"][0] = 0.0
    arrays.pop("seen", None)
    arrays.pop("subset_ids", None)
    big = dataclasses.replace(record, arrays=arrays)
    assert len(page({"": big}).encode()) < 1_500_000


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here, so no browser opens the page")
@pytest.mark.slow
def test_a_browser_opens_it(tmp_path, text):
    (tmp_path / "report.html").write_text(text)
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1600"]
    shot, address = tmp_path / "page.png", (tmp_path / "report.html").as_uri()
    subprocess.run([*command, f"--screenshot={shot}", address], check=True, capture_output=True, timeout=120)
    assert shot.stat().st_size > 20_000
    dumped = subprocess.run([*command, "--dump-dom", address], check=True, capture_output=True, text=True, timeout=120)
    assert "The story of the run" in dumped.stdout
