"""What a bad input is held against: a call, the errors it may raise, and words that name the value and the way out."""

import contextlib
import io
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
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
def _deadline():
    def stop(*_: object) -> None:
        raise Overdue(f"took more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fault_of_case(case: Case, folder: Path) -> str:
    """Return what is wrong with the library's answer to a case; empty where nothing is."""
    try:
        with _deadline(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            result = case.call(folder)
    except case.errors as error:
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        if not re.search(case.message, text, re.DOTALL):
            return f"{type(error).__name__}: {text}\n  does not match {case.message}"
        if len(text) > 3000:
            return f"a message of {len(text)} letters"
        return ""
    except BaseException as error:
        return f"{type(error).__name__} instead: {error}\n{''.join(traceback.format_exc(limit=-3))}"
    return f"accepted, with result {str(result)[:200]}"


def fault_of_command(command: Command, folder: Path) -> str:
    """Run a command line in this process, and return what is wrong with its answer; empty where nothing is."""
    from lplr_jax.cli import main

    home = Path.cwd()
    (folder / "cwd").mkdir()
    os.chdir(folder / "cwd")
    out, err = io.StringIO(), io.StringIO()
    try:
        arguments = command.arguments(folder)
        before = tree(folder)
        with _deadline(), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    except BaseException as error:
        return f"{type(error).__name__} escapes: {error}\n{''.join(traceback.format_exc(limit=-3))}"
    finally:
        os.chdir(home)
    shown, said = out.getvalue(), err.getvalue()
    faults = []
    if code != command.code:
        faults.append(f"code {code}")
    if not re.search(command.message, " ".join(re.sub(r"[│╭╮╰╯─]", " ", said).split())):
        faults.append(f"stderr does not match {command.message}")
    if "Traceback" in shown + said:
        faults.append("a traceback is shown")
    # The parser of the command line frames what it says; the library says one line.
    lines = said.strip().splitlines()
    boxed = (
        len(lines) > 3 and set(lines[1].strip()) == {"-"} and sum("For full helptext" in line for line in lines) == 1
    )
    if not boxed and len(lines) != 1:
        faults.append("stderr is not one message")
    if tree(folder) != before:
        faults.append(f"files changed: {sorted(set(tree(folder).items()) ^ set(before.items()))[:4]}")
    return f"{', '.join(faults)}\n--- out\n{shown[-1500:]}\n--- err\n{said[-2500:]}" if faults else ""


def run(cases: list[Case | Command], pattern: str = "") -> dict[str, dict[str, Any]]:
    """Run all cases whose name matches, each in an empty folder, and return fault and seconds by name."""
    found = {}
    for case in cases:
        if not re.search(pattern, case.name):
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="door-") as folder:
            check = fault_of_case if isinstance(case, Case) else fault_of_command
            fault = check(case, Path(folder))  # pyright: ignore[reportArgumentType]
        if fault and "--json" not in sys.argv:
            print(f"* {case.name} [{time.monotonic() - began:.1f} s]\n  {fault}\n", flush=True)
        found[case.name] = {"fault": fault, "seconds": time.monotonic() - began}
    return found


def main() -> None:
    """Run the table as users run the library: no run-time type checker stands in front of its own errors."""
    import bad_input_table

    results = run(bad_input_table.cases(), next((a for a in sys.argv[1:] if a != "--json"), ""))
    if "--json" in sys.argv:
        print(json.dumps(results))
    else:
        slow = sorted(results, key=lambda name: -results[name]["seconds"])[:12]
        print("slowest:", ", ".join(f"{name} {results[name]['seconds']:.1f}" for name in slow))
        print(len(results), "bad inputs,", sum(bool(r["fault"]) for r in results.values()), "faults")


if __name__ == "__main__":
    # By its name, so that the cases are instances of the classes that this module tests for.
    import bad_input

    bad_input.main()
