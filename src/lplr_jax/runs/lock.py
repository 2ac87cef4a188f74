"""The right to write to a run folder: a lock file, held with flock, with a lease for holders on other hosts."""

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lplr_jax import archives
from lplr_jax.runs.errors import DirectoryInUseError

LOCK = ".lock"
BEAT_SECONDS = 30.0
"""Between two signs of life of a holder: its lock file is touched."""
LEASE_SECONDS = 600.0
"""Without a sign of life for this long, a holder on another host counts as gone."""
_BYTES = 4096
_PATIENCE_SECONDS = 5.0
"""How long one that is about to say who holds the lock, or about to let go of it, is waited for."""
_PAUSE_SECONDS = 0.01
_SHARED_TIMES = 20
"""How often a file must be found shared, and not held by one that has not written its name yet."""
_OTHERWISE = "name another folder with --out, or wait for it"
_NO_FLOCK = (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL)
_NOT_OURS = (errno.EACCES, errno.EPERM, errno.EROFS)


class Lock:
    """The right to write to a run folder, for the life of the process.

    The file is held with flock, which the kernel takes back from a dead process on this host. For a holder on another
    host its sign of life counts, the file's time: where it is older than `LEASE_SECONDS`, the folder is taken over, and
    the former holder, should it wake, finds another token in the file (see `check`).

    The folder above, where it is that of a run too, is held shared: a sweep, which holds its own folder exclusively,
    has the folders of its arms for itself, while single arms, started by themselves, share the folder of the sweep.

    Args:
        folder: the run folder.
        under_ours: whether the folder above is held by the caller, so that it is not asked for here.
        say: told whose folder was taken over.
    """

    def __init__(
        self, folder: Path, *, under_ours: bool = False, say: Callable[[str], None] = lambda line: None
    ) -> None:
        self._path, self._under_ours, self._say = folder / LOCK, under_ours, say
        self._handle = self._above = -1
        self._token = ""
        self._released, self._beating = threading.Event(), threading.Thread()
        self.made_folder = False

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._path.parent

    def acquire(self) -> None:
        """Take the lock; the folder is made where it is missing.

        Raises:
            DirectoryInUseError: if another process has it, or the folder above.
            OSError: if the directory cannot be made or written to.
        """
        above = self.folder.absolute().parent
        if not self._under_ours and _is_run_folder(above):
            self._above = _take_shared(above / LOCK)
        try:
            self._handle, former, self.made_folder = _take(self._path)
        except BaseException:
            self._let_go_of_above()
            raise
        try:
            self._token = secrets.token_hex(16)
            since = datetime.now(UTC).isoformat(timespec="seconds")
            text = json.dumps({**_us(), "since": since, "token": self._token}) + "\n"
            os.ftruncate(self._handle, 0)
            os.pwrite(self._handle, text.encode(), 0)
            os.fsync(self._handle)
        except BaseException:
            os.close(self._handle)
            self._handle = -1
            self._let_go_of_above()
            raise
        if former:
            self._say(
                f"lock     {self.folder} is taken over from {_named(former)}, which gave no sign of life for "
                f"{LEASE_SECONDS / 60:g} minutes"
            )
        self._released.clear()
        self._beating = threading.Thread(target=self._beat, daemon=True, name="sign of life")
        self._beating.start()

    def check(self) -> None:
        """Check that the folder is still there and still ours.

        Raises:
            OSError: if it is gone, another one stands in its place, or another process has taken it over.
        """
        if not _same_file(self._handle, self._path):
            raise OSError(
                errno.ENOENT,
                "the directory was removed or replaced while the run wrote to it; bring it back, or start again",
                str(self.folder),
            )
        holder = _read_holder(self._handle)
        if holder.get("token") != self._token:
            raise OSError(
                errno.ESTALE,
                f"the directory was taken over by {_named(holder)}, as this process gave no sign of life for "
                f"{LEASE_SECONDS / 60:g} minutes; it writes nothing more",
                str(self.folder),
            )

    def release(self) -> None:
        """Give the lock back."""
        if self._handle >= 0:
            self._released.set()
            self._beating.join()  # before the handle is closed, whose number another file may get
            try:
                self.check()
                self._path.unlink()
            except OSError:
                pass  # not ours any more, or read-only by now: it stays, as that of a dead process
            finally:
                handle, self._handle = self._handle, -1
                os.close(handle)
        self._let_go_of_above()

    def move(self, folder: Path) -> None:
        """Follow the directory to its new name."""
        self._path = folder / LOCK

    def _let_go_of_above(self) -> None:
        handle, self._above = self._above, -1
        if handle < 0:
            return
        path = self.folder.absolute().parent / LOCK
        try:
            # The last of those who share it removes the file; nobody else can have it while this succeeds.
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same_file(handle, path):
                path.unlink()
        except OSError:
            pass
        finally:
            os.close(handle)

    def _beat(self) -> None:
        while not self._released.wait(BEAT_SECONDS):
            # A file system that is away for a while is no reason to end a run.
            with contextlib.suppress(OSError):
                if _read_holder(self._handle).get("token") == self._token:
                    os.utime(self._handle)


@contextmanager
def shared(folder: Path) -> Iterator[None]:
    """Hold the folder of a sweep together with others that do so, none of whom holds it alone.

    Raises:
        DirectoryInUseError: if the sweep itself runs.
    """
    lock = Lock(folder / "arm")
    lock._above = _take_shared(folder / LOCK)
    try:
        yield
    finally:
        lock._let_go_of_above()


def _is_run_folder(folder: Path) -> bool:
    """Return whether a folder is that of a run, by what its config or its lock file holds."""
    for name, keys in (("config.json", {"experiment", "config"}), (LOCK, {"pid", "host", "token"})):
        with contextlib.suppress(ValueError):
            found = archives.read_json(folder / name, most_bytes=2**20)
            if isinstance(found, dict) and keys <= found.keys():
                return True
    return False


def _take(path: Path) -> tuple[int, Mapping[str, Any], bool]:
    """Return the handle of a lock file that is ours, whose lease had run out, and whether the folder was made.

    Raises:
        DirectoryInUseError: if another process has it.
    """
    deadline, made, seen_shared = time.monotonic() + _PATIENCE_SECONDS, False, 0
    while True:
        made |= _make_folder(path.parent, deadline)
        try:
            # A link would be followed to a file that is then overwritten.
            handle = archives.open_to_write(path, links=False)
        except FileNotFoundError:  # a run that failed at its start has removed the folder it made
            if time.monotonic() > deadline:
                raise
            continue
        with _closed_on_error(handle):
            taken, holder = _flock(handle, fcntl.LOCK_EX), _read_holder(handle)
            if _same_file(handle, path):
                if taken and not _elsewhere(holder):
                    return handle, {}, made
                if taken:
                    age = _age(handle, path.parent)
                    if age < LEASE_SECONDS:
                        raise DirectoryInUseError(_who(path, holder, LEASE_SECONDS - age))
                    return handle, holder, made
                if _can_hold(holder) or time.monotonic() > deadline:
                    raise DirectoryInUseError(_who(path, holder))
                seen_shared += _flock(handle, fcntl.LOCK_SH)
                if seen_shared > _SHARED_TIMES:
                    raise DirectoryInUseError(f"{path.parent} is in use: runs in folders of it go on; {_OTHERWISE}")
        # Its holder lets go of it, or has not yet written its name into it: look again.
        os.close(handle)
        time.sleep(_PAUSE_SECONDS)


def _take_shared(path: Path) -> int:
    """Return the handle of the lock file of a sweep's folder, shared with its other arms; -1 where it is not ours.

    Raises:
        DirectoryInUseError: if the sweep itself runs.
    """
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while True:
        try:
            handle = archives.open_to_write(path, links=False)
        except FileNotFoundError:  # the whole folder is gone
            return -1
        except OSError as error:
            if error.errno in _NOT_OURS:
                return -1
            raise
        with _closed_on_error(handle):
            taken, holder = _flock(handle, fcntl.LOCK_SH), _read_holder(handle)
            if _same_file(handle, path):
                if taken and _elsewhere(holder) and (age := _age(handle, path.parent)) < LEASE_SECONDS:
                    raise DirectoryInUseError(_who(path, holder, LEASE_SECONDS - age))
                if taken:
                    if holder and not _elsewhere(holder):
                        os.ftruncate(handle, 0)  # of a sweep that died: those who share the file write nothing into it
                    return handle
                if _can_hold(holder) or time.monotonic() > deadline:
                    raise DirectoryInUseError(_who(path, holder))
        os.close(handle)
        time.sleep(_PAUSE_SECONDS)


@contextmanager
def _closed_on_error(handle: int) -> Iterator[None]:
    try:
        yield
    except BaseException:
        os.close(handle)
        raise


def _make_folder(folder: Path, deadline: float) -> bool:
    """Make a folder where it is missing, while others may remove it; return whether it was made here."""
    while True:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError:
            if folder.is_dir():
                return False
            if os.path.lexists(folder) or not folder.parent.is_dir():
                raise
        except FileNotFoundError:
            if time.monotonic() > deadline:
                raise
        else:
            return True


def _flock(handle: int, how: int) -> bool:
    """Return whether the file is ours; file systems without flock are trusted to have one host, and its pid decides."""
    try:
        fcntl.flock(handle, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        holder = _read_holder(handle)
        return not (holder.get("host") == _us()["host"] and _lives(holder.get("pid")))
    return True


def _lives(pid: Any) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, TypeError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _us() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _read_holder(handle: int) -> dict[str, Any]:
    """Return what a holder wrote; one that died while it wrote, or anything else in the file, counts for nothing."""
    try:
        found = archives.parse_json(os.pread(handle, _BYTES, 0).decode(), most_depth=1)
    except ValueError:
        return {}
    kinds = {"pid": int, "host": str, "since": str, "token": str}
    if not isinstance(found, dict) or not isinstance(found.get("pid"), int) or not found["pid"] > 0:
        return {}
    return {key: value for key, value in found.items() if isinstance(value, kinds.get(key, ()))}


def _can_hold(holder: Mapping[str, Any]) -> bool:
    """Return whether a name in the file may be that of its holder; that of a dead process here was left behind."""
    return bool(holder) and (_elsewhere(holder) or _lives(holder["pid"]))


def _elsewhere(holder: Mapping[str, Any]) -> bool:
    return holder.get("host") not in (None, _us()["host"])


def _age(handle: int, folder: Path) -> float:
    """Return the seconds since a holder's last sign of life, both by the clock of the file system."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime - os.fstat(handle).st_mtime


def _named(holder: Mapping[str, Any]) -> str:
    return f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this host')}"


def _who(path: Path, holder: Mapping[str, Any], lease_left: float | None = None) -> str:
    way = _OTHERWISE
    since = f" since {holder['since']}" if "since" in holder else ""
    if lease_left is not None:
        minutes = max(1, round(lease_left / 60))
        way += (
            f"; if it is gone for certain, delete {path}: without a sign of life from there the same command takes "
            f"the folder over in {minutes} minutes"
        )
    return f"{path.parent} is in use: {_named(holder)} writes to it{since}; {way}"


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False
