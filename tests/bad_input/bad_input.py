"""What a bad input is held against: the errors it may raise, and words that name the value and the way out."""

import contextlib
import os
import re
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = int(os.environ.get("BAD_INPUT_SECONDS", "300"))
"""Longest that any one case may take; a case that waits for a pipe would take for ever."""


@dataclass(frozen=True)
class Case:
    """A call of the library in a folder of its own, and what must come of it."""

    name: str
    call: Callable[[Path], Any]
    errors: tuple[type[BaseException], ...]
    message: str


@dataclass(frozen=True)
class Command:
    """A command line in a folder of its own; `arguments` may prepare files there."""

    name: str
    arguments: Callable[[Path], list[str]]
    message: str
    code: int = 2


def name_of(case: Case | Command) -> str:
    """Return the name of a case without addresses, which differ from process to process."""
    return re.sub(r" at 0x[0-9a-f]*", "", case.name)


def tree(folder: Path) -> dict[str, Any]:
    """Return every name below a folder with its kind, size and time of change."""
    found = {}
    for path in sorted(folder.rglob("*")):
        state = path.lstat()
        found[str(path.relative_to(folder))] = (state.st_mode, state.st_size, state.st_mtime_ns)
    return found


class Overdue(BaseException):
    """A case that took too long; no handler for ordinary exceptions catches it."""


@contextlib.contextmanager
def deadline():
    """End a case that takes longer than `SECONDS`."""

    def stop(*_: object) -> None:
        raise Overdue(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def assert_refused(case: Case, folder: Path) -> None:
    """Assert that a call raises one of its errors, in words that match."""
    try:
        with deadline():
            result = case.call(folder)
    except case.errors as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    else:
        raise AssertionError(f"accepted, with result {str(result)[:200]}")
    assert re.search(case.message, text, re.DOTALL)
    assert len(text) <= 3000


def is_one_message(said: str) -> bool:
    """Return whether a text is one line, or one box of the parser of the command line."""
    lines = said.strip().splitlines()
    boxed = (
        len(lines) > 3 and set(lines[1].strip()) == {"-"} and sum("For full helptext" in line for line in lines) == 1
    )
    return boxed or len(lines) == 1
