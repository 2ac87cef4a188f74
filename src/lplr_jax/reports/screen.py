"""The screen of the command line."""

import logging
import os
import sys

from rich.console import Console

from lplr_jax.printing import printable


class Screen(Console):
    """A console that falls silent when nobody reads it any more: who stops reading (`| head`) stops no run."""

    def on_broken_pipe(self) -> None:
        """Go on in silence."""
        self.quiet = True
        write_nowhere()


def open_streams() -> None:
    """Have the standard streams that this process was started without go nowhere: no file may take their numbers."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                nowhere = os.open(os.devnull, os.O_RDWR)
                if nowhere != number:
                    os.dup2(nowhere, number)
                    os.close(nowhere)
                setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def flush() -> None:
    """Write out what is held back; if nobody reads it, it and all that comes goes nowhere."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        write_nowhere()


def write_nowhere() -> None:
    """Send what comes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


# Files and pipes have no width of their own; 80 columns break every row of the table.
CONSOLE = Screen() if sys.stdout is not None and sys.stdout.isatty() else Screen(width=130)


def say(line: str) -> None:
    """Show one line; what names of files and folders hold beside plain text is written as escapes."""
    CONSOLE.print(printable(line), highlight=False, soft_wrap=True, markup=False)


class OneLine(logging.Formatter):
    """Formats a message as one line of plain text: it may name files, and quote what was found in them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        return printable(super().format(record))
