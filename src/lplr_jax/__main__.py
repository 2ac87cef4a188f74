"""The `lplr` command and `python -m lplr_jax`: light, so that Ctrl-C while modules are being imported is one line."""

import contextlib
import gc
import os
import signal
import sys
import threading
from types import FrameType


def _leave(number: int, frame: FrameType | None) -> None:
    """End the process: nothing was begun, and an exception might be caught by whatever is being imported."""
    del frame
    with contextlib.suppress(OSError):  # standard error may be closed
        os.write(2, f"lplr: interrupted by {signal.Signals(number).name}; nothing was begun\n".encode())
    os._exit(130)


def main() -> int:
    """Import the command line and run it; see `lplr_jax.cli.main` for the exit codes."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        heeded = [each for each in (signal.SIGINT, signal.SIGTERM) if signal.getsignal(each) != signal.SIG_IGN]
        before = {each: signal.signal(each, _leave) for each in heeded}
    try:
        from lplr_jax import cli
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    code = cli.main()
    gc.freeze()  # the last collection, as the process ends, would walk all that was imported: a fifth of a second
    return code


if __name__ == "__main__":
    sys.exit(main())
