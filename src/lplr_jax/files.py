"""Files written whole or not at all."""

import errno
import os
import re
import tempfile
from pathlib import Path

HALF = ".half-"
"""Part of the name of every file and directory that is not whole yet."""
_TEMPORARY = re.compile(rf"\.(?P<stem>[^/]+){re.escape(HALF)}[a-z0-9_]{{8}}(?P<suffix>\.[^./]+)?")
NO_ROOM = (errno.ENOSPC, errno.EDQUOT)


def target_of(name: str) -> str | None:
    """Return the name that a temporary file or directory was to get, None for a name that is not one of these.

    Example:
        >>> target_of(".record.half-x3_9kd2a.npz"), target_of(".thesis.half-done")
        ('record.npz', None)
    """
    match = _TEMPORARY.fullmatch(name)
    return f"{match['stem']}{match['suffix'] or ''}" if match else None


class atomic_write:  # noqa: N801 - reads as a function at every call
    """Context with a temporary path beside `path`, moved there and flushed to disk when the body succeeds.

    An error of the operating system that names no file, as that of a full disk, is given the name of `path`.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self._path.stem}{HALF}"
        try:
            handle, name = tempfile.mkstemp(prefix=prefix, suffix=self._path.suffix, dir=self._path.parent)
        except OSError as error:
            name_file(error, self._path)
            raise
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, *_: object) -> None:
        try:
            if isinstance(error, OSError):
                name_file(error, self._path)
            if kind is None:
                self._finish()
        except OSError as late:
            name_file(late, self._path)
            raise
        finally:
            self._temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        _sync(self._temporary)
        # mkstemp makes files that only their owner can read; a record is an ordinary file.
        umask = os.umask(0)
        os.umask(umask)
        self._temporary.chmod(0o666 & ~umask)
        self._temporary.replace(self._path)
        sync_directory(self._path.parent)


def name_file(error: OSError, path: Path) -> None:
    """Give an error that a disk is full the name of the file that found no room, unless it has one."""
    if error.errno in NO_ROOM and (error.filename is None or target_of(Path(os.fsdecode(error.filename)).name)):
        error.filename = str(path)


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a directory are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(folder: Path) -> None:
    """Wait until the names in a directory are on disk; some file systems know no such thing, which is no error."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise


def sync_tree(folder: Path) -> None:
    """Wait until every file of a tree is on disk, and the names of them all."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            _sync(path)
    sync_directory(folder)
