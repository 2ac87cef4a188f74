"""The directory of a run: one writer at a time, one config for good, the old one kept aside when a new one starts."""

import errno
import fcntl
import itertools
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lplr_jax import archives, records
from lplr_jax.files import HALF, atomic_write, sync_directory
from lplr_jax.records import Record
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.errors import ConfigMismatchError, DirectoryInUseError

LOCK = ".lock"
CARD = "config.json"
CHECKPOINTS = "checkpoint"
_ABSENT = "absent"
_CARD_BYTES = 2**20


class Lock:
    """The right to write to a directory: a file in it, held with flock for the life of the process.

    The kernel lets go of the lock of a dead process on this host. What another host wrote into the file stands: whether
    its process lives cannot be told from here.
    """

    def __init__(self, folder: Path) -> None:
        self._path, self._handle = folder / LOCK, -1

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            DirectoryInUseError: if another process has it.
            OSError: if the directory cannot be made or written to.
        """
        self._path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            # A link would be followed to a file that is then overwritten.
            handle = archives.open_to_write(self._path, links=False)
            try:
                taken = _flock(handle)
                holder = _read_holder(self._path)
                if not taken or _elsewhere(holder):
                    raise DirectoryInUseError(_who(self._path, holder))
                if _same_file(handle, self._path):
                    break
            except BaseException:
                os.close(handle)
                raise
            # The holder let go of the file between our opening and our locking it: there is another file now.
            os.close(handle)
        try:
            text = json.dumps({**_us(), "since": datetime.now(UTC).isoformat(timespec="seconds")}) + "\n"
            os.ftruncate(handle, 0)
            os.pwrite(handle, text.encode(), 0)
            os.fsync(handle)
        except BaseException:
            os.close(handle)
            raise
        self._handle = handle

    def check(self) -> None:
        """Raise OSError if the directory is gone or another one has taken its place."""
        if not _same_file(self._handle, self._path):
            raise OSError(
                errno.ENOENT,
                "the directory was removed or replaced while the run wrote to it; bring it back, or start again",
                str(self._path.parent),
            )

    def release(self) -> None:
        """Give the lock back."""
        if self._handle < 0:
            return
        try:
            if _same_file(self._handle, self._path):
                self._path.unlink()
        except OSError:
            pass  # read-only by now: it stays, as that of a dead process
        finally:
            os.close(self._handle)
            self._handle = -1

    def move(self, folder: Path) -> None:
        """Follow the directory to its new name."""
        self._path = folder / LOCK


def _flock(handle: int) -> bool:
    """Return whether the file is ours; file systems without flock are trusted to have one host, and its pid decides."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.EINVAL):
            raise
        holder = _parse(os.pread(handle, 4096, 0))
        return not (holder.get("host") == _us()["host"] and _lives(holder.get("pid")))
    return True


def _lives(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError):
        return False
    except PermissionError:
        return True
    return True


def _us() -> dict[str, Any]:
    return {"pid": os.getpid(), "host": socket.gethostname()}


def _read_holder(path: Path) -> dict[str, Any]:
    try:
        return _parse(path.read_bytes()[:4096])
    except FileNotFoundError:
        return {}


def _parse(content: bytes) -> dict[str, Any]:
    """Read what a holder wrote; one that died while it wrote left nothing that counts."""
    try:
        found = json.loads(content)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _elsewhere(holder: Mapping[str, Any]) -> bool:
    return holder.get("host") not in (None, _us()["host"])


def _who(path: Path, holder: Mapping[str, Any]) -> str:
    who = f"process {holder.get('pid', 'unknown')} on {holder.get('host', 'this host')}"
    since = f" since {holder['since']}" if "since" in holder else ""
    way = f"name another folder with --out, or wait for it; if it is gone for certain, delete {path}"
    if not _elsewhere(holder):
        way = "name another folder with --out, or wait for it"
    return f"{path.parent} is in use: {who} writes to it{since}; {way}"


def _same_file(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except OSError:
        return False


@contextmanager
def claimed(
    folder: Path,
    experiment: str,
    config: Mapping[str, Any],
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Lock]:
    """Hold a directory for the run of one config while the body writes to it.

    Args:
        folder: the directory; made where it is missing.
        experiment: what runs in it.
        config: everything that decides its numbers.
        force: start afresh; what is there is kept aside under another name.
        say: told where the old one went.

    Yields:
        The lock, whose `check` tells whether the directory is still there.

    Raises:
        DirectoryInUseError: if another process writes to it.
        ConfigMismatchError: if it holds a run of another config, and `force` is off.
        OSError: if it cannot be written to.
    """
    if not force and folder.exists():
        agree(folder, experiment, config)  # before anything is written, a lock file included
    fresh, lock = not folder.exists(), Lock(folder)
    lock.acquire()
    try:
        if force and _holds_a_run(folder):
            aside = _set_aside(folder, lock)
            say(f"kept     {aside}, the run that was there")
        agree(folder, experiment, config)
        _sweep(folder)
        write_card(folder, experiment, config)
        yield lock
    finally:
        lock.release()
        if fresh:
            _remove_if_bare(folder)


def _remove_if_bare(folder: Path) -> None:
    """Remove a directory that a run which failed at its start has made."""
    try:
        if {path.name for path in folder.iterdir()} <= {CARD}:
            (folder / CARD).unlink(missing_ok=True)
            folder.rmdir()
    except OSError:
        pass  # another process came first, or it is gone


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CARD, "record.npz", CHECKPOINTS, "predictions.json"))


def _set_aside(folder: Path, lock: Lock) -> Path:
    """Rename the directory and lock a new one in its place."""
    here = Path.cwd()
    if here.is_relative_to(folder.resolve()):
        raise ValueError(f"--force would rename {folder}, in which this process works; name another folder with --out")
    aside = _free_name(folder, "old")
    folder.rename(aside)
    sync_directory(aside.parent)
    lock.move(aside)
    lock.release()
    fresh = Lock(folder)
    fresh.acquire()
    lock.__dict__.update(fresh.__dict__)
    return aside


def _sweep(folder: Path) -> None:
    """Remove what writers that were killed left half-written; the lock is ours, so nobody writes it now."""
    for leftover in folder.rglob(f".*{HALF}*"):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        else:
            leftover.unlink()


def read_card(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return experiment and config of the run in a directory, None where there is none."""
    path = folder / CARD
    try:
        if os.path.lexists(path):
            card = json.loads(archives.read_text(path, most_bytes=_CARD_BYTES))
            return str(card["experiment"]), dict(card["config"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(
            f"{path} is damaged ({error}); start afresh with --force, which keeps the folder aside"
        ) from error
    if (folder / "record.npz").exists():
        record = records.load(folder)
        return record.experiment, dict(record.config)
    return None


def write_card(folder: Path, experiment: str, config: Mapping[str, Any]) -> None:
    """Say in the directory whose run it holds, unless it says so already."""
    path = folder / CARD
    if path.exists():
        return
    content = {"experiment": experiment, "config": dict(config)}
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def agree(folder: Path, experiment: str, config: Mapping[str, Any]) -> None:
    """Check that a directory holds no run, or one of this config.

    Raises:
        ConfigMismatchError: with the fields that differ.
    """
    card = read_card(folder)
    if card is None:
        return
    name, there = card
    asked = json.loads(json.dumps(dict(config)))
    if name != experiment:
        differing = [f"experiment {name} there, {experiment} asked for"]
    else:
        fields = [field for field in {**asked, **there} if there.get(field, _ABSENT) != asked.get(field, _ABSENT)]
        differing = [f"{field} {_shown(there, field)} there, {_shown(asked, field)} asked for" for field in fields]
    if differing:
        raise ConfigMismatchError(
            f"{folder} holds the run of another config: {'; '.join(differing)}. Name another folder with --out "
            "(make: OUT=...), or start afresh with --force (make: ARGS=--force), which keeps the old one aside"
        )


def _whole(path: Path, say: Callable[[str], None]) -> Record | None:
    """Read a record; one that cannot be read is kept aside, and None says that it must be made again."""
    try:
        return records.load(path)
    except records.RecordError as error:
        aside = _free_name(path, "damaged")
        path.rename(aside)
        say(f"record   {path} is damaged and is made again; it is kept as {aside} ({error})")
        return None


def _free_name(path: Path, what: str) -> Path:
    """Return the first name of the kind PATH.what-1 that is not taken."""
    return next(
        name for number in itertools.count(1) if not (name := path.with_name(f"{path.name}.{what}-{number}")).exists()
    )


def kept(
    folder: Path,
    experiment: str,
    config: Mapping[str, Any],
    make: Callable[[Checkpoints], Record],
    *,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """Return the record of a run: the one that is there, or a new one, gone on with where it was interrupted.

    Args:
        folder: of the run; its record is FOLDER/record.npz.
        experiment: what runs in it.
        config: everything that decides the numbers, as the record keeps it.
        make: makes the record, with checkpoints to save to and to go on from.
        check: called before every write; raises where nothing must be written any more.
        say: told that the record is there.

    Raises:
        ConfigMismatchError: if the folder holds a run of another config.
        OSError: if something cannot be written or read.
    """
    agree(folder, experiment, config)
    path, checkpoints = folder / "record.npz", Checkpoints(folder / CHECKPOINTS, check=check)
    record = _whole(path, say) if path.exists() else None
    if record is not None:
        say(f"record   {path} is there, made with this config; --force makes it anew")
        checkpoints.clear()
        return record
    check()
    write_card(folder, experiment, config)
    record = make(checkpoints)
    check()
    record.save(path)
    checkpoints.clear()
    return record


def _shown(config: Mapping[str, Any], field: str) -> str:
    return str(config.get(field, _ABSENT))
