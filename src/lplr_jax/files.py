"""Files written whole or not at all."""

import errno
import os
import tempfile
from pathlib import Path

HALF = ".half-"
"""Part of the name of every file and directory that is not whole yet."""


class atomic_write:  # noqa: N801 - reads as a function at every call
    """Context with a temporary path beside `path`, moved there and flushed to disk when the body succeeds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self._path.stem}{HALF}"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=self._path.suffix, dir=self._path.parent)
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                _sync(self._temporary)
                # mkstemp makes files that only their owner can read; a record is an ordinary file.
                umask = os.umask(0)
                os.umask(umask)
                self._temporary.chmod(0o666 & ~umask)
                self._temporary.replace(self._path)
                sync_directory(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


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
