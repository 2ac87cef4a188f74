"""SIGTERM and Ctrl-C: the first one waits for the piece of work at hand, the second does not, the third kills."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """The process was asked to stop, and what it says is saved."""


class _Requests:
    """What was asked of this process; signals are a matter of the process, so there is one of these."""

    def __init__(self) -> None:
        self.waiting = False
        self.pending = False
        self.raised = ""

    def handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.waiting and not self.pending:
            self.pending = True
            return
        if self.pending:
            for each in SIGNALS:
                signal.signal(each, signal.SIG_DFL)
        self.pending = False
        self.raised = f"interrupted by {signal.Signals(number).name}; what was saved before is intact"
        raise Interrupted(self.raised)


_REQUESTS = _Requests()


@contextmanager
def handled() -> Iterator[None]:
    """Turn SIGTERM and SIGINT into `Interrupted` while the body runs; outside the main thread, do nothing.

    A signal that the caller has this process ignore, as shells do for background jobs, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _REQUESTS.waiting = _REQUESTS.pending = False
    _REQUESTS.raised = ""
    heeded = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, _REQUESTS.handle) for number in heeded}
    hook = sys.unraisablehook
    # One that arrives while an object is being removed is dropped by Python, which would say so; `check` finds it.
    sys.unraisablehook = lambda lost: None if lost.exc_type is Interrupted else hook(lost)
    try:
        yield
    finally:
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)


def raised() -> Interrupted | None:
    """Return the interrupt that was raised since `handled` began, whatever became of it; None without one."""
    return Interrupted(_REQUESTS.raised) if _REQUESTS.raised else None


def check() -> None:
    """Raise an interrupt that somebody else caught, as what is being imported may do."""
    if (found := raised()) is not None:
        raise found


@contextmanager
def deferred(saved: str) -> Iterator[None]:
    """Let the body finish before a first signal ends the run; a second one ends it at once.

    Args:
        saved: what is saved once the body is done, for the message.

    Raises:
        Interrupted: after the body, if a signal came while it ran.
    """
    _REQUESTS.waiting = True
    try:
        yield
    finally:
        _REQUESTS.waiting = False
    if _REQUESTS.pending:
        _REQUESTS.pending = False
        raise Interrupted(f"interrupted; {saved}")
