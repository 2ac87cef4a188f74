"""How a command ends on screen: the story of a run and one line a claim, or the outcomes of several runs."""

from collections import Counter
from collections.abc import Mapping, Sequence

from rich.cells import cell_len, set_cell_size
from rich.console import Console
from rich.text import Text

from lplr_jax.printing import printable
from lplr_jax.records import Record
from lplr_jax.reports.report import COLOURS, first_to_break, summary_table, verdict_matrix, verdict_table
from lplr_jax.reports.rows import summary_rows
from lplr_jax.theory import Outcome, Verdict, reading, story

LETTERS: dict[Outcome, str] = {
    "proved": "P",
    "not refuted": "N",
    "refuted": "R",
    "undecided": "U",
    "not applicable": "-",
}
"""How an outcome is shown where many runs share a screen."""
INCONSISTENT = "!"
_GAP = 2
# Lines on what was lost that leave the rest on one screen.
_LOST = 3
# The longest outcome, and spaces up to the reason.
_WORD = max(map(len, LETTERS)) + _GAP


def show(
    console: Console,
    verdicts: Mapping[str, Sequence[Verdict]],
    records: Mapping[str, Record],
    *,
    verbose: bool = False,
    first: bool = False,
) -> None:
    """Print what the verdicts come to: of one run the story and a line a claim, of several a table of outcomes.

    Args:
        console: the screen; every line is made for its width.
        verdicts: by the name of the run.
        records: the runs, by the same names.
        verbose: print summary and verdicts of every run in full instead.
        first: of several runs, tell the story of the first as well.
    """
    several = len(verdicts) > 1
    if several:
        console.print(arms_table(verdicts, console))
    for number, (name, of_run) in enumerate(verdicts.items()):
        if several and not verbose and not (first and number == 0):
            continue
        if several:
            console.print(Text(printable(f"{name}:")))
        if verbose:
            console.print(summary_table(records[name]))
        for line in (*(() if verbose else lost(records[name])), *story(of_run, records[name])):
            console.print(Text(printable(line)))
        if verbose:
            console.print(verdict_table(of_run))
            console.print(Text(printable(reading(of_run))))
        elif not several:
            console.print()
            console.print(claim_lines(of_run, console.width))


def lost(record: Record) -> list[str]:
    """Return what says where the run stopped being finite, and which probes could not be trusted, in a few lines."""
    rows = (row for row in summary_rows(record) if row[0] in ("diverged", "untrusted"))
    told = [f"{quantity} {value}: {words}" for quantity, value, words in rows]
    more = len(told) - _LOST
    return told if more <= 0 else [*told[:_LOST], f"untrusted: {more} more, which --verbose names"]


def claim_lines(verdicts: Sequence[Verdict], width: int) -> Text:
    """Return one line a claim: its name, its outcome, and what this rests on as far as the width allows."""
    names = max((cell_len(verdict.claim) for verdict in verdicts), default=0) + _GAP
    lines = []
    for verdict in verdicts:
        word = "INCONSISTENT" if verdict.inconsistent else verdict.outcome
        line = Text.assemble(verdict.claim.ljust(names), (word.ljust(_WORD), COLOURS[verdict.outcome]))
        left = width - names - _WORD
        if left >= _WORD:
            line.append(cut(_shown(verdict.note), left))
        lines.append(line)
    return Text("\n", no_wrap=True).join(lines)


def arms_table(verdicts: Mapping[str, Sequence[Verdict]], console: Console) -> object:
    """Return the outcomes of several runs: a column a run where these fit the screen, else counts and a row a run."""
    matrix = verdict_matrix(verdicts)
    names = max(len(verdict.claim) for verdict in next(iter(verdicts.values())))
    # A column holds the longest outcome and two spaces, and is parted from the next by a line.
    columns = [max(_WORD - _GAP, cell_len(printable(name))) + 3 for name in verdicts]
    if names + 4 + sum(columns) <= console.width:
        return matrix
    return turned(verdicts, console.width)


def turned(verdicts: Mapping[str, Sequence[Verdict]], width: int) -> Text:
    """Return how often each claim has each outcome, then one row a run, in lines of at most `width`."""
    claims = [verdict.claim for verdict in next(iter(verdicts.values()))]
    by_claim = list(zip(*verdicts.values(), strict=True))
    inconsistent = any(verdict.inconsistent for row in by_claim for verdict in row)
    signs = [*LETTERS.values(), *([INCONSISTENT] if inconsistent else [])]
    meaning = ", ".join(f"{sign} {word}" for word, sign in LETTERS.items())
    digits, claim_width = max(3, len(str(len(verdicts)))), max(map(len, claims))
    lines = [Text(f"hypotheses and conclusions of the theory on {len(verdicts)} runs")]
    lines.append(Text(meaning + (f", {INCONSISTENT} inconsistent" if inconsistent else "")))
    lines += [Text(), Text("    " + "claim".ljust(claim_width) + "".join(sign.rjust(digits + 1) for sign in signs))]
    for number, (claim, row) in enumerate(zip(claims, by_claim, strict=True), 1):
        counts, line = Counter(map(_sign, row)), Text(f"{number:2}  {claim.ljust(claim_width)}")
        for sign in signs:
            line.append(f"{counts[sign] or '':>{digits + 1}}", _style(sign))
        lines.append(line)
    # Numbers of the claims stand upright over the columns: tens, then ones.
    numbers = [str(number).rjust(2) for number in range(1, len(claims) + 1)]
    room = width - len(claims) - _GAP
    longest = max(8, *(cell_len(printable(name)) for name in verdicts))
    name_width = min(longest, room if room < longest + 20 else room - 20)
    lines.append(Text())
    lines += [
        Text((head.ljust(name_width) + " " * _GAP + "".join(number[place] for number in numbers)).rstrip())
        for head, place in (("", 0), ("run", 1))
    ]
    for name, of_run in verdicts.items():
        line = Text(set_cell_size(cut_middle(printable(name), name_width), name_width) + " " * _GAP)
        for verdict in of_run:
            line.append(_sign(verdict), _style(_sign(verdict)))
        left = width - line.cell_len - _GAP
        if left >= 20:
            line.append(" " * _GAP + cut(_shown(first_to_break(of_run)), left))
        lines.append(line)
    return Text("\n").join(lines)


def _sign(verdict: Verdict) -> str:
    return INCONSISTENT if verdict.inconsistent else LETTERS[verdict.outcome]


def _style(sign: str) -> str:
    return next((COLOURS[word] for word, letter in LETTERS.items() if letter == sign), "bold red")


def _shown(text: str) -> str:
    return printable(" ".join(text.split()))


def cut(text: str, width: int) -> str:
    """Return a text that is too wide up to its last whole word, and that it goes on.

    Example:
        >>> cut("one two three", 9), cut("one two", 9)
        ('one two…', 'one two')
    """
    if cell_len(text) <= width:
        return text
    head = set_cell_size(text, max(width - 1, 0)).rstrip()
    space = head.rfind(" ")
    whole = text[len(head) : len(head) + 1] == " "
    return (head if whole or space < len(head) // 2 else head[:space].rstrip()) + "…"


def cut_middle(text: str, width: int) -> str:
    """Return a text that is too wide without its middle: names of runs often differ at either end.

    Example:
        >>> cut_middle("width128-seed0", 9)
        'widt…eed0'
    """
    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    head = width - 1 - tail
    return set_cell_size(text, head).rstrip() + "…" + (text[-tail:] if cell_len(text[-tail:]) <= tail else "")
