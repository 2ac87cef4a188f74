"""Tables and HTML survive whatever a record lacks, and text from files steers neither terminal, page nor table."""

import csv
import dataclasses
import html.parser
import io
import json
import logging
import re
import unicodedata

import numpy as np
import pytest
from matplotlib.text import Text
from rich.console import Console
from rich.logging import RichHandler

from builders import make
from lplr_jax import plotting, records, schema, theory
from lplr_jax.reports import ending, exit_codes, report, tables
from lplr_jax.reports.html import record_html, verdict_html
from lplr_jax.reports.screen import OneLine, say
from lplr_jax.reports.text import safe, safe_html, safe_json, safe_markdown
from lplr_jax.runs.errors import DirectoryInUseError
from lplr_jax.theory import Verdict, Verdicts

NAN = np.nan
EVIL = "\x1b[2J[red]a[/red] <script>alert(1)</script> \u202egnp.exe\n| `x` [b](javascript:1) & \\"


def shown(renderable):
    console = Console(file=io.StringIO(), width=200, force_terminal=True, color_system="truecolor")
    console.print(renderable)
    return console.file.getvalue()


def full():
    """A record with every array that the tables read."""
    probes = {name: np.full(3, 0.5) for name, entry in schema.SCHEMA.items() if entry.dims == ("probe",)}
    probes |= {"probe_epoch": np.array([0, 3, 6]), "probe_untrusted": np.array([0.0, 0.0, NAN])}
    return make(**probes, subset_ids=np.array([0, 2]))


@pytest.mark.parametrize("absent", [name for name in full().arrays if name not in schema.REQUIRED])
def test_the_summary_survives_any_missing_array(absent):
    record = full()
    before = shown(report.summary_table(record))
    arrays = {name: array for name, array in record.arrays.items() if name != absent}
    after = shown(report.summary_table(dataclasses.replace(record, arrays=arrays)))
    assert "L_T" in after
    assert "λ_T" in before
    if absent in ("probe_epoch", "ntk_min_eig"):
        assert "λ_T" not in after
    assert "nan" not in after


def test_the_summary_of_series_alone():
    bare = make(probe_epoch=None, ntk_min_eig=None, learning_rate=np.array(NAN))
    text = shown(report.summary_table(bare))
    assert "step 6; L_0 = 1, s = 4" in text
    assert "λ" not in text.replace("λ_min/s", "")
    unseen = make(grad_sq_norm=np.full(7, NAN), drift=np.full(7, NAN), probe_epoch=None, ntk_min_eig=None)
    text = shown(report.summary_table(unseen))
    assert "PL envelope" not in text
    assert "drift" not in text
    dead = make(loss=np.full(7, NAN))
    assert "diverged" in shown(report.summary_table(dead))
    assert "at step 0" in shown(report.summary_table(dead))


def test_steps_are_told_by_their_numbers():
    steps = np.array([0, 1, 2, 5, 10, 20, 50])
    text = shown(report.summary_table(make(epoch=steps, loss=np.exp(-0.1 * steps), probe_epoch=np.array([0, 5, 50]))))
    assert "step 50; L_0 = 1" in text
    # L - L_T >= L / 2 up to 50 - 10 log 2 = 43.
    assert "steps 0 to 20" in text
    assert "0.904837 per step" in text, "e^(-1/10)"


def test_text_from_files_steers_no_terminal():
    record = dataclasses.replace(full(), provenance={"untrusted": {EVIL: EVIL, "3": "[bold]no reason[/bold]"}})
    verdict = Verdict("weyl", EVIL, "refuted", note=EVIL, parts=(Verdict("weyl.x", "", "undecided", note=EVIL),))
    tabled = tables.Table(EVIL, (EVIL,), (tables.Quantity("k", EVIL, "k", EVIL),), {"k": [EVIL]}, (EVIL,))
    for renderable in (
        report.summary_table(record),
        report.verdict_table([verdict]),
        report.verdict_matrix({EVIL: [verdict]}),
        tables.to_rich(tabled),
    ):
        text = shown(renderable)
        assert "\x1b[2J" not in text
        assert "\u202e" not in text
        assert "[red]" in text.replace("\n", ""), "markup is shown, not followed"
    for words in ([], 3, "x", [1]):
        assert shown(report.summary_table(dataclasses.replace(full(), provenance={"untrusted": words})))


class Page(html.parser.HTMLParser):
    """The tags and the text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words, self.open = [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


ALLOWED = {"div", "style", "table", "caption", "thead", "tbody", "tr", "th", "td"}


def test_html_holds_text_and_no_tags_of_it():
    evil = Verdict(
        "weyl", EVIL, "refuted", 1.0, 2.0, 0.5, 7, EVIL, EVIL, parts=(Verdict(f"weyl.{EVIL}", "", "proved"),)
    )
    page = Page(verdict_html([evil, Verdict("lqcr", "a", "undecided")]))
    assert set(page.tags) <= ALLOWED
    assert not page.open
    said = "".join(page.words)
    assert "<script>alert(1)</script>" in said
    assert "\x1b" not in said
    assert page.tags.count("tr") == 4, "heads, two claims, one part"
    assert "nan" not in said
    record = dataclasses.replace(full(), loss="a + b")
    page = Page(record_html(record))
    assert set(page.tags) <= ALLOWED
    assert record._repr_html_() == record_html(record)
    for label, text in records.facts(record):
        assert label in page.words
        assert text in page.words


def test_html_of_all_verdicts_of_a_run():
    verdicts = theory.verify(make())
    page = Page(verdict_html(verdicts))
    for verdict in verdicts:
        assert verdict.claim in page.words
        assert any(word.startswith(verdict.outcome) for word in page.words)
    shorter = Page(verdict_html(verdicts, parts=False))
    assert shorter.tags.count("tr") == 1 + len(verdicts)


def test_tables_in_files_hold_text_alone():
    tabled = tables.Table(EVIL, (EVIL,), (tables.Quantity("k", EVIL, "k", EVIL),), {"k": [EVIL]}, (EVIL,))
    lines = tables.to_markdown(tabled).splitlines()
    (row,) = [line for line in lines if line.startswith("|") and "1b" in line and "---" not in line][1:]
    unescaped = row.replace(r"\\", "").replace(r"\|", "")
    assert unescaped.count("|") == 3, "one label, one cell"
    assert "<" not in row
    latex = tables.to_latex(dataclasses.replace(tabled, arms=("a_b $x$ {y} ~",)))
    assert r"a\_b \$x\$ \{y\} \textasciitilde{}" in latex
    assert all(not line or line[0] in "\\% k" for line in latex.splitlines()), "a note stays a comment"


def test_safe_text():
    assert safe("a\\").endswith("\\ "), "a backslash at the end would escape what comes after it"
    assert safe_html("<a href='x'>") == "&lt;a href=&#x27;x&#x27;&gt;"
    assert safe_markdown("a|b") == r"a\|b"
    assert safe(3) == "3"


def steers(text):
    """The characters of a text that steer a terminal: controls, C1 and right-to-left marks among them."""
    return [letter for letter in text if letter != "\n" and unicodedata.category(letter) in ("Cc", "Cf", "Zl", "Zp")]


HOSTILE = EVIL + "\x9b2J\u2028\u2066[link=http://x]b[/link] **b** _i_ ~s~ $x^{"


def test_a_hostile_name_is_one_plain_line_on_screen(capsys, tmp_path):
    """What is said, logged, and said of an error; a name that holds line ends makes no second line."""
    say(f"record   {tmp_path / HOSTILE}")
    for error in (ValueError(HOSTILE), KeyError(HOSTILE), OSError(28, "full", HOSTILE), DirectoryInUseError(HOSTILE)):
        capsys.readouterr()
        say(HOSTILE)
        out = capsys.readouterr().out
        assert not steers(out)
        assert out.count("\n") == 1
        assert "[red]a[/red]" in out
        assert "[link=http://x]" in out
        said = exit_codes.outcome(error)[1]
        assert not steers(said)
        assert "\n" not in said
        assert "[red]a[/red]" in said
    console = Console(file=io.StringIO(), width=1000, force_terminal=True, color_system=None)
    handler = RichHandler(console=console, show_time=False, show_path=False)
    handler.setFormatter(OneLine("%(message)s"))
    handler.emit(logging.LogRecord("lplr_jax", logging.WARNING, "", 0, "%s is not taken", (HOSTILE,), None))
    text = console.file.getvalue()
    assert "\x1b[2J" not in text
    assert not {"\u202e", "\x9b", "\u2028"} & set(text)
    assert "[red]a[/red]" in text
    verdicts = theory.verify(make())
    both = {HOSTILE: verdicts, "b": verdicts}, {HOSTILE: make(), "b": make()}
    ending.show(console, *both, first=True)
    ending.show(console, *both, verbose=True)
    console.width = 40
    ending.show(console, *both, first=True)
    assert not {"\u202e", "\x9b", "\u2028"} & set(console.file.getvalue())


def test_verdicts_as_text_and_as_json_steer_nothing():
    verdicts = Verdicts([Verdict("weyl", HOSTILE, "undecided", note=HOSTILE)])
    assert not steers(repr(verdicts))
    content = {HOSTILE: theory.as_json(verdicts), "λ": "Łojasiewicz", "astral": "\U000e0001"}
    text = safe_json(content)
    assert not steers(text)
    assert "Łojasiewicz" in text, "letters stay letters"
    assert json.loads(text) == json.loads(json.dumps(content))


def test_hostile_cells_stay_cells():
    tabled = tables.Table(HOSTILE, (HOSTILE,), (tables.Quantity("k", HOSTILE, "k", HOSTILE),), {"k": [HOSTILE]})
    markdown = tables.to_markdown(tabled)
    assert not steers(markdown)
    for open_ in ("**b", "~s", "`x", "<script", "[link"):
        assert open_ not in markdown.replace("\\" + open_[0], "").replace(r"\*\*", "")
    assert safe_markdown("λ_min of L_T, _i_") == r"λ_min of L_T, \_i\_"
    latex = tables.to_latex(tabled)
    assert not steers(latex)
    body = re.sub(r"\\(textbackslash|textasciitilde|\^)\{\}|\\[$&%_#{}]", "", latex.split(r"\midrule")[1])
    assert body.count("&") == 1, "one label, one cell"
    assert not re.search(r"(?<!\$)\^|[#%~]", body)
    rows = list(csv.reader(io.StringIO(tables.to_csv(tabled))))
    assert len(rows) == 2
    assert not steers("".join(rows[1]))


def test_a_hostile_name_in_a_figure_is_text(tmp_path):
    record = full()
    record = dataclasses.replace(record, provenance={"data": {"source": HOSTILE}}, config={"width": 8, "init": HOSTILE})
    for figure in (plotting.four_panel(record), plotting.initialisation({HOSTILE: record, "b": record})):
        texts = [text.get_text() for text in figure.findobj(Text)]
        assert any("[red]a[/red]" in text for text in texts)
        assert not steers("".join(texts))
        plotting.save(figure, tmp_path / "a.png")  # mathtext of it would not parse
