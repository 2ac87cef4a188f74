"""Files from elsewhere, opened and read with distrust: no pipe is waited for, no size is believed, nothing is run.

An npz file is a zip of npy members. NumPy's own loader allocates what a header declares and keeps the last of two
members of one name; here the zip directory and all headers are read and held against each other first.
"""

import errno
import hashlib
import json
import math
import os
import re
import stat
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

_DIRECTORY_BYTES = 2**20
"""Largest zip directory that is read; a record has some fifty members of about a hundred bytes each."""
_CHUNK = 2**20
_TEXTS = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_OUTSIDE = re.compile(r"[\[\]{}]")
_DAMAGE = (struct.error, zlib.error, zipfile.BadZipFile)


class ArchiveError(ValueError):
    """A file that cannot be read, or that lies about itself; the message names it and says what was found."""


@dataclass(frozen=True)
class Header:
    """What one npy member declares; its size agrees with that in the zip directory."""

    shape: tuple[int, ...]
    dtype: np.dtype
    fortran: bool
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return prod(self.shape) * self.dtype.itemsize


@contextmanager
def open_regular(path: Path) -> Iterator[BinaryIO]:
    """Open an ordinary file for reading; a pipe, a device or a folder is refused without waiting for it.

    Raises:
        ArchiveError: if the file is missing, unreadable or no ordinary file.
    """
    try:
        # A pipe without a writer would block in open(), so it is opened without blocking and then looked at.
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:  # ValueError: a name that holds a NUL
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ArchiveError(f"{str(path)!r} cannot be read ({reason}); name a file that can") from error
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device"}
        raise ArchiveError(f"{path} is {kinds.get(stat.S_IFMT(mode), 'no file')}; name an ordinary file")
    with os.fdopen(handle, "rb") as file:
        yield file


def open_to_write(path: Path, *, links: bool, flags: int = 0) -> int:
    """Open an ordinary file for reading and writing, made where it is missing, and return its descriptor.

    Args:
        path: the file.
        links: whether a link in its place is followed.
        flags: more flags of `os.open`.

    Raises:
        ArchiveError: if a folder, a pipe, a device, or a link that is not followed, stands in its place.
        OSError: if it cannot be made or written to.
    """
    flags |= os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | (0 if links else os.O_NOFOLLOW)
    refusal = ArchiveError(
        f"{path} must be an ordinary file, not a link, folder, pipe or device; delete it or name another"
    )
    try:
        handle = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise refusal from error
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refusal
    return handle


def read_text(path: Path, *, most_bytes: int) -> str:
    """Read an ordinary file of UTF-8 text.

    Raises:
        ArchiveError: if it is none, or longer than `most_bytes`.
    """
    with open_regular(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise _refused(path, f"at most {most_bytes:,} bytes", "more")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise _refused(path, "UTF-8 text", str(error)) from error


def read_json(path: Path, *, most_bytes: int, most_depth: int = 32) -> Any:
    """Read an ordinary file of JSON.

    Args:
        path: the file.
        most_bytes: its largest size.
        most_depth: how many lists and objects may lie within each other.

    Raises:
        ArchiveError: if it is no ordinary file, too long or too deep, no JSON, has a key twice in one object, or holds
            a number that is not finite in float64.
    """
    text = read_text(path, most_bytes=most_bytes)
    try:
        return parse_json(text, most_depth=most_depth)
    except ValueError as error:
        raise _refused(path, "JSON", str(error)) from error


def parse_json(text: str, *, most_depth: int = 32) -> Any:
    """Return what a text of JSON holds, under the same bounds as `read_json`.

    Raises:
        ValueError: saying what was found instead.

    Example:
        >>> parse_json('{"epoch": 3}')
        {'epoch': 3}
    """
    depth = deepest = 0
    for bracket in _OUTSIDE.finditer(_TEXTS.sub("", text)):
        depth += 1 if bracket[0] in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > most_depth:
        raise ValueError(f"{deepest:,} lists and objects within each other, at most {most_depth} are read")
    return json.loads(text, parse_constant=_no_number, parse_float=_finite, object_pairs_hook=_distinct)


def _no_number(word: str) -> float:
    raise ValueError(f"{word}, which is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]}, too large for float64")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} twice in one object")
        found[key] = value
    return found


def sha256(path: Path, *, size: int | None = None) -> str:
    """Return the SHA-256 of an ordinary file, in hexadecimal digits.

    Args:
        path: the file.
        size: bytes that it must have; another size is refused before anything is read.

    Raises:
        ArchiveError: if it is no ordinary file that can be read, or of another size.
    """
    with open_regular(path) as file:
        there = os.fstat(file.fileno()).st_size
        if size is not None and there != size:
            raise _refused(path, f"{size:,} bytes", f"{there:,}")
        digest = hashlib.sha256()
        try:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        except OSError as error:
            raise ArchiveError(f"{path} cannot be read ({error.strerror}); use an intact copy") from error
    return digest.hexdigest()


def read_npz(
    path: Path,
    *,
    most_bytes: int,
    admit: Callable[[Mapping[str, Header]], object],
    only: tuple[str, ...] | None = None,
    directory_bytes: int = _DIRECTORY_BYTES,
) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file.

    Everything that can be told from the zip directory and the headers is told before an array is allocated: plain and
    distinct names, members that are stored or deflated, no objects, declared sizes that agree and that stay below
    `most_bytes` for each and for those to be read together. A member that unpacks to more than it declares is not read
    to its end.

    Args:
        path: the file.
        most_bytes: bytes that all members may unpack to.
        admit: sees the headers by name and raises for what it does not want.
        only: names to read; None reads all.
        directory_bytes: largest zip directory that is read; a member takes some hundred bytes of it.

    Raises:
        ArchiveError: for a file that is none of this.
    """
    with open_regular(path) as file, ExitStack() as stack:
        with _decoding(path):
            _check_directory(path, file, directory_bytes)
            archive = stack.enter_context(zipfile.ZipFile(file))
            infos = _members(path, archive, most_bytes)
            headers = {name: _header(path, archive, info) for name, info in infos.items()}
        admit(headers)
        wanted = headers if only is None else {name: headers[name] for name in only}
        total = sum(header.nbytes for header in wanted.values())
        if total > most_bytes:
            raise _refused(path, f"at most {most_bytes:,} bytes in all members", f"{total:,} declared")
        with _decoding(path):
            return {name: _array(path, archive, infos[name], header) for name, header in wanted.items()}


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn every way in which a damaged zip makes its decoders fail into an ArchiveError that names the file."""
    try:
        yield
    except ArchiveError:
        raise
    # RuntimeError asks for a password; NotImplementedError, a kind of it, is a method that zipfile does not know.
    except (OSError, EOFError, ValueError, RuntimeError, MemoryError, OverflowError, *_DAMAGE) as error:
        raise _refused(path, "an npz file", f"{type(error).__name__}: {error}") from error


def _refused(path: Path, expected: str, found: str) -> ArchiveError:
    return ArchiveError(f"{path}: expected {expected}, found {found}. Use an intact copy.")


def _check_directory(path: Path, file: BinaryIO, most_bytes: int) -> None:
    """Hold the size of the zip directory against a bound before it is read; 46 bytes of it cost 600 in memory."""
    size = file.seek(0, os.SEEK_END)
    tail_at = max(0, size - 22 - 65_535)
    file.seek(tail_at)
    tail = file.read(22 + 65_535)
    at = len(tail) - 22 if tail[-22:-18] == b"PK\x05\x06" and tail[-2:] == b"\0\0" else tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        raise _refused(path, "an npz file", f"BadZipFile: File is not a zip file ({size:,} bytes)")
    (directory,) = struct.unpack("<I", tail[at + 12 : at + 16])
    if tail[max(0, at - 20) : at].startswith(b"PK\x06\x07"):
        # A locator: zipfile looks for the larger record right before it, whatever place the locator names.
        file.seek(max(0, tail_at + at - 20 - 56))
        record = file.read(56)
        if record.startswith(b"PK\x06\x06"):
            (directory,) = struct.unpack("<Q", record[40:48])
    if directory > most_bytes:
        raise _refused(path, f"a zip directory of at most {most_bytes:,} bytes", f"{directory:,}")
    file.seek(0)


def _members(path: Path, archive: zipfile.ZipFile, most_bytes: int) -> dict[str, zipfile.ZipInfo]:
    """Return the members by their names without ".npy"."""
    found: dict[str, zipfile.ZipInfo] = {}
    for info in archive.infolist():
        # What zipfile shows as `filename` is already cut at a NUL.
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", info.orig_filename):
            raise _refused(path, "members with plain names", repr(info.orig_filename))
        if not info.filename.endswith(".npy"):
            raise _refused(path, "members that are npy arrays", repr(info.filename))
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(path, "members stored or deflated", f"{info.filename} with method {info.compress_type}")
        if info.flag_bits & 1:
            raise _refused(path, "members without a password", f"{info.filename} encrypted")
        if info.file_size > most_bytes:
            raise _refused(
                path, f"members of at most {most_bytes:,} bytes", f"{info.filename} with {info.file_size:,} declared"
            )
        name = info.filename.removesuffix(".npy")
        if name in found:
            raise _refused(path, "members with different names", f"a name twice, {name!r}")
        found[name] = info
    return found


def _header(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Header:
    with archive.open(info) as member:
        start = member.read(12)
        if start[:6] != b"\x93NUMPY":
            raise _refused(path, f"{info.filename} to start as an npy array", repr(start[:6]))
        if start[6:8] not in (b"\x01\x00", b"\x02\x00"):
            raise _refused(path, f"{info.filename} in format 1.0 or 2.0", ".".join(map(str, start[6:8])) or "nothing")
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                shape, fortran, dtype = read(member)
        # It evaluates a literal and builds a dtype from it, which can fail in any way; zipfile's own errors pass.
        except (zipfile.BadZipFile, zlib.error, OSError):
            raise
        except Exception as error:
            raise _refused(path, f"a header in {info.filename}", f"{type(error).__name__}: {error}") from error
        header = Header(shape, fortran=fortran, dtype=dtype, offset=member.tell())
    if dtype.hasobject:
        raise _refused(path, f"{info.filename} to hold numbers", "pickled objects, which are never loaded")
    if any(not 0 <= side < 2**63 for side in shape):
        raise _refused(path, f"{info.filename} with sides >= 0", f"shape {shape}")
    if header.offset + header.nbytes != info.file_size:
        there = info.file_size - header.offset
        raise _refused(path, f"{header.nbytes:,} bytes in {info.filename}, as its header declares", f"{there:,}")
    return header


def _array(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo, header: Header) -> np.ndarray:
    body = bytearray()
    with archive.open(info) as member:
        member.read(header.offset)
        # In chunks: asked for everything, zipfile unpacks up to 2 GiB before it looks at the declared size.
        while chunk := member.read(_CHUNK):
            body += chunk
    if len(body) != header.nbytes:
        raise _refused(path, f"{header.nbytes:,} bytes in {info.filename}", f"{len(body):,}")
    array = np.frombuffer(body, header.dtype)
    return array.reshape(header.shape, order="F" if header.fortran else "C")
