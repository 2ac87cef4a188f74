"""A run followed while it goes on: on screen, as lines of JSON in a file, as scalars for TensorBoard."""

import errno
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console

from lplr_jax import archives, checks
from lplr_jax.reports import report
from lplr_jax.runs.session import Judging, Observer
from lplr_jax.theory import Verdict


@dataclass(frozen=True)
class FollowConfig:
    """How, and where else than on screen, a run shows itself; it decides no number."""

    log: Path | None = None
    """File of JSON lines, one a chunk, a probe and a state of the verdicts; a run that goes on appends to it."""
    tensorboard: Path | None = None
    """Folder for TensorBoard's scalars, readable while the run goes on; needs the package tensorboardX."""
    verbose: bool = False
    """Show summary and verdicts in full at the end, numbers, parts and reasons; the report has them in any case."""


_START = b'{"time": "'
"""How every line of a log begins."""

SCREEN_ALONE = FollowConfig()


class JsonLines:
    """A file to which every event is one line of strict JSON, written at once; NaN is null.

    Args:
        path: the file; one that is there is appended to, less a last line that a killed process left half-written. It
            is tried here and opened for good by the first event: until then --force may move its folder away.

    Raises:
        ValueError: if there is a file that is no such log.
        OSError: if it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._handle = checks.path("--log", path), -1
        checks.folder("the folder of --log", self._path.parent)
        self._open()
        self.close()

    def _open(self) -> None:
        path = self._path
        self._fresh = [place for place in (path, *path.parents) if not place.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = archives.open_to_write(path, links=True, flags=os.O_APPEND)
        try:
            # A last line without its end is cut off below, so this must be a log and no other JSON.
            if not _START.startswith(os.pread(self._handle, len(_START), 0)):
                raise ValueError(f"--log {path} is a file of another kind, which is left alone; name another one")
            os.ftruncate(self._handle, _whole_lines(self._handle))
        except BaseException:
            self.close()
            raise

    def write(self, event: str, run: str, **fields: Any) -> None:
        """Append one event."""
        if self._handle < 0:
            self._open()
        line = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "event": event, "run": run, **fields}
        content = (json.dumps(_plain(line), ensure_ascii=False, allow_nan=False) + "\n").encode()
        written = os.write(self._handle, content)
        if written < len(content):  # the disk is full, which no error says before the next write
            os.ftruncate(self._handle, os.fstat(self._handle).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))

    def close(self) -> None:
        """Close the file; one that was made here and holds nothing goes, with its folder: no run came to pass."""
        if self._handle < 0:
            return
        bare = os.fstat(self._handle).st_size == 0
        os.close(self._handle)
        self._handle = -1
        for place in self._fresh if bare else ():
            try:
                place.rmdir() if place.is_dir() else place.unlink(missing_ok=True)
            except OSError:
                break  # something else is in it by now


def _whole_lines(handle: int) -> int:
    """Return how many bytes of a file are whole lines, reading from its end."""
    end = os.fstat(handle).st_size
    while end:
        start = max(0, end - 65536)
        found = os.pread(handle, end - start, start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _plain(value: Any) -> Any:
    """Return what strict JSON can carry: a number that is not finite is null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    return float(value) if math.isfinite(value) else None


def outcomes(verdicts: Sequence[Verdict]) -> dict[str, str]:
    """Return the outcome of every claim."""
    return {verdict.claim: verdict.outcome for verdict in verdicts}


class _Logged:
    """An observer that writes JSON lines."""

    def __init__(self, lines: JsonLines, run: str) -> None:
        self._lines, self._run = lines, run

    def resume(self, epoch: int) -> None:
        self._lines.write("resume", self._run, epoch=epoch)

    def chunk(self, epoch: int, loss: float) -> None:
        self._lines.write("chunk", self._run, epoch=epoch, loss=loss)

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        self._lines.write("probe", self._run, epoch=epoch, values=values)

    def standing(self, epoch: int, verdicts: Sequence[Verdict]) -> None:
        self._lines.write("verdict", self._run, epoch=epoch, final=False, outcomes=outcomes(verdicts))


class _Scalars:
    """An observer that writes scalars for TensorBoard; what a killed process wrote past its last save is purged."""

    def __init__(self, make: Callable[..., Any], folder: Path) -> None:
        self._make, self._folder, self._writer, self._purge = make, folder, None, None

    def _add(self, scalars: Mapping[str, float], epoch: int) -> None:
        if self._writer is None:
            self._writer = self._make(logdir=str(self._folder), purge_step=self._purge)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, epoch)
        self._writer.flush()

    def resume(self, epoch: int) -> None:
        self._purge = epoch + 1

    def chunk(self, epoch: int, loss: float) -> None:
        self._add({"loss": loss}, epoch)

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        self._add(values, epoch)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _Several:
    """One observer that stands for several."""

    def __init__(self, observers: Sequence[Observer]) -> None:
        self._observers = observers

    def resume(self, epoch: int) -> None:
        for observer in self._observers:
            observer.resume(epoch)

    def chunk(self, epoch: int, loss: float) -> None:
        for observer in self._observers:
            observer.chunk(epoch, loss)

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        for observer in self._observers:
            observer.probe(epoch, values)

    def standing(self, epoch: int, verdicts: Sequence[Verdict]) -> None:
        for observer in self._observers:
            if isinstance(observer, Judging):
                observer.standing(epoch, verdicts)


def _summary_writer() -> Callable[..., Any]:
    try:
        from tensorboardX import SummaryWriter  # pyright: ignore[reportMissingImports] # an extra
    except ImportError as error:
        raise ImportError(
            "--tensorboard needs the package tensorboardX, which is not installed: pip install tensorboardX "
            "(or lplr-jax[tensorboard]); --log FILE needs nothing"
        ) from error
    return SummaryWriter


class Following:
    """Everything that shows the runs of one command; a context, which opens the log before anything is computed.

    Args:
        console: the screen.
        config: where else.

    Raises:
        ImportError: if TensorBoard's writer is asked for and not installed.
        ValueError: if the log names a file of another kind.
        OSError: if the log cannot be written.
    """

    def __init__(self, console: Console, config: FollowConfig) -> None:
        self._console, self._folder = console, config.tensorboard
        self.verbose = config.verbose
        self._make = None if config.tensorboard is None else _summary_writer()
        self._lines = None if config.log is None else JsonLines(config.log)

    def __enter__(self) -> "Following":
        return self

    def __exit__(self, *_: object) -> None:
        if self._lines is not None:
            self._lines.close()

    @contextmanager
    def __call__(self, run: str, epochs: int) -> Iterator[Observer]:
        """Yield the observer of one run.

        Args:
            run: its name, unlike that of the command's other runs.
            epochs: how long it is.
        """
        with ExitStack() as stack:
            observers: list[Observer] = [stack.enter_context(report.progress(self._console, epochs))]
            if self._lines is not None:
                observers.append(_Logged(self._lines, run))
            if self._make is not None and self._folder is not None:
                scalars = _Scalars(self._make, self._folder / run)
                stack.callback(scalars.close)
                observers.append(scalars)
            yield _Several(observers)

    def finished(self, run: str, verdicts: Sequence[Verdict], *, diverged_at: int | None) -> None:
        """Log what a run came to."""
        if self._lines is not None:
            self._lines.write("verdict", run, final=True, diverged_at=diverged_at, outcomes=outcomes(verdicts))
