"""Rows of a kernel on disk: each process of a job writes those of its devices, and one reads them all as blocks.

A file holds rows [start, stop) of the lower triangle, row i as its i + 1 entries one after the other, so all files
together take 4 n² bytes. A process names its files in a manifest once they are whole; a job has a number of its own, so
what an earlier one left is never taken for its own.
"""

import json
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lplr_jax.files import atomic_write

_ROWS = 256
_PAUSE_SECONDS = 0.1
SEEN_SECONDS = 60.0
"""Seconds until a file of one process must be there for another: network file systems remember a folder so long."""


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) of a lower triangle in a file, and the checksum of their entries."""

    file: str
    start: int
    stop: int
    checksum: int


@dataclass(frozen=True)
class Places:
    """The folder of a job, and the names in it.

    Attributes:
        folder: one that all processes see.
        job: the number of this job.
        processes: how many write.
    """

    folder: Path
    job: str
    processes: int

    def rows(self, start: int) -> Path:
        """Return the file of rows from `start` on."""
        return self.folder / f"{self.job}-rows-{start:06d}.f64"

    def manifest(self, process: int) -> Path:
        """Return what a process writes when its rows are whole, or when it failed."""
        return self.folder / f"{self.job}-process-{process}.json"

    def here(self, process: int) -> Path:
        """Return what a process writes to be seen by the others before there is anything to write."""
        return self.folder / f"{self.job}-here-{process}.json"

    def result(self) -> Path:
        """Return what process 0 writes when all is done."""
        return self.folder / f"{self.job}-result.json"


def write(places: Places, process: int, strips: Iterable[tuple[int, np.ndarray]]) -> None:
    """Write what one process holds, and then its manifest.

    Args:
        places: where.
        process: which one.
        strips: first row and rows (r, n) of Θ, with columns up to the diagonal at least, one file each.

    Raises:
        OSError: if the disk is full.
    """
    parts = []
    for start, rows in strips:
        checksum = 0
        with atomic_write(places.rows(start)) as temporary, temporary.open("wb") as file:
            for i, row in enumerate(rows, start):
                entries = np.ascontiguousarray(row[: i + 1], "<f8")
                checksum = zlib.crc32(entries, checksum)  # pyright: ignore[reportArgumentType]
                file.write(entries.data)
        parts.append(Part(places.rows(start).name, start, start + len(rows), checksum))
    say(places.manifest(process), {"parts": [asdict(part) for part in parts]})


def say(path: Path, what: dict[str, Any]) -> None:
    """Write a file of JSON, whole or not at all."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(what), encoding="utf-8")


def unseen(places: Places) -> list[int]:
    """Return which processes have written nothing that is seen here, after waiting for it."""
    until = time.monotonic() + SEEN_SECONDS
    while missing := [one for one in range(places.processes) if not places.here(one).exists()]:
        if time.monotonic() > until:
            break
        time.sleep(_PAUSE_SECONDS)
    return missing


def hear(path: Path) -> dict[str, Any]:
    """Wait for a file of JSON and return what it says; a process that is gone ends this one by JAX's heartbeats."""
    while not path.exists():
        time.sleep(_PAUSE_SECONDS)
    return json.loads(path.read_text(encoding="utf-8"))


def gather(places: Places, n: int) -> list[Part]:
    """Wait until every process has written its rows, and return all parts in order.

    Raises:
        RuntimeError: if a process failed, or the rows of all are not those of a matrix.
    """
    parts: list[Part] = []
    for process in range(places.processes):
        found = hear(places.manifest(process))
        if "failed" in found:
            raise RuntimeError(f"process {process} failed: {found['failed']}")
        parts += [Part(**part) for part in found["parts"]]
    parts.sort(key=lambda part: part.start)
    ends = [0, *(part.stop for part in parts)]
    if [part.start for part in parts] != ends[:-1] or ends[-1] != n:
        raise RuntimeError(f"rows {[(part.start, part.stop) for part in parts]} are not the {n} rows of the kernel")
    return parts


def blocks(places: Places, parts: Sequence[Part]) -> Callable[[], Iterator[tuple[int, int, np.ndarray]]]:
    """Return what makes the blocks of `linalg.Blocks` from the files, a few hundred rows at a time.

    The one it returns raises OSError for a file that is not what was written.
    """

    def make() -> Iterator[tuple[int, int, np.ndarray]]:
        for part in parts:
            checksum = 0
            with (places.folder / part.file).open("rb") as file:
                for first in range(part.start, part.stop, _ROWS):
                    last = min(first + _ROWS, part.stop)
                    size = (last * (last + 1) - first * (first + 1)) // 2
                    entries = np.fromfile(file, "<f8", size)
                    checksum = zlib.crc32(entries, checksum)  # pyright: ignore[reportArgumentType]
                    if entries.size == size:
                        block = np.zeros((last - first, last))
                        block[np.tri(last - first, last, first, dtype=bool)] = entries
                        yield first, 0, block
            if checksum != part.checksum:
                raise OSError(f"{places.folder / part.file} is not as it was written: its checksum differs")

    return make


def remove(places: Places) -> None:
    """Remove the rows of a job."""
    for path in places.folder.glob(f"{places.job}-rows-*.f64"):
        path.unlink(missing_ok=True)
