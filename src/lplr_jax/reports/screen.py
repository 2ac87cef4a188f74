"""The screen of the command line."""

import os
import sys

from rich.console import Console


class Screen(Console):
    """A console that falls silent when nobody reads it any more: who stops reading (`| head`) stops no run."""

    def on_broken_pipe(self) -> None:
        """Go on in silence."""
        self.quiet = True
        write_nowhere()


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
CONSOLE = Screen() if sys.stdout.isatty() else Screen(width=130)


def say(line: str) -> None:
    """Show a line as it is."""
    CONSOLE.print(line, highlight=False, soft_wrap=True, markup=False)
