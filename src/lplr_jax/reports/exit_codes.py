"""Exit codes of the command line, and what is said of an error."""

from lplr_jax.files import NO_ROOM
from lplr_jax.printing import printable
from lplr_jax.runs.errors import DirectoryInUseError

OK, UNMET, BAD_INPUT, INCONSISTENT, DIVERGED, IO_FAILED, IN_USE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 130


def of_process(code: int) -> int:
    """Return the exit code of a command that ran in a process of its own: what a signal ended has failed."""
    return code if code >= 0 else IO_FAILED


def _sentence(error: BaseException) -> str:
    """Return what an error says as one line that a terminal can show; a KeyError's text is its argument."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return printable(" ".join(text.split()) or type(error).__name__)


def outcome(error: BaseException) -> tuple[int, str]:
    """Return the exit code of an error and what is said of it."""
    said = _sentence(error)
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED, f"{said}; the same command goes on from there"
        case DirectoryInUseError():
            return IN_USE, said
        case ValueError() | TypeError() | KeyError() | ImportError():
            return BAD_INPUT, said
        case OSError(errno=number, filename=None) if number in NO_ROOM:
            # Every writer of files names the file; what is left is the screen.
            return IO_FAILED, f"standard output cannot be written to ({error.strerror}); send it elsewhere"
        case OSError(errno=number) if number in NO_ROOM:
            what = f"{_sentence(OSError(str(error.filename)))} cannot be written ({error.strerror})"
            way = "make room: what was saved before is intact, and the same command goes on from there"
            return IO_FAILED, f"{what}; {way}"
        case OSError():
            return IO_FAILED, said
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
        return BAD_INPUT, f"out of memory ({said}); lower --width, --n-train or --epochs"
    return INCONSISTENT, f"a fault of lplr-jax, {type(error).__name__}: {said}; try --debug"
