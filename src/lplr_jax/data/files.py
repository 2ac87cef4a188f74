"""Images in files: IDX, CIFAR-10 binary batches, npz. No file is trusted."""

from __future__ import annotations

import gzip
import math
import re
import struct
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from lplr_jax.data.problem import (
    CIFAR10,
    MNIST,
    AbsentError,
    Pool,
    Problem,
    checked_labels,
    damaged,
    in_memory,
    reading,
)


def open_files(problem: Problem, path: Path) -> Pool:
    """The file `path`, or the first file in the folder `path`, that has one of the known names."""
    if path.is_file():
        if path.suffix == ".npz":
            return _open_npz(problem, path)
        if problem is CIFAR10 and re.fullmatch(r"data_batch_[1-5]\.bin", path.name):
            return _open_batches([path])
        if problem is MNIST and path.name in _IDX_IMAGES:
            return _open_idx(path)
    for place in (path / sub for sub in problem.folders):
        if problem is CIFAR10 and (batches := sorted(place.glob("data_batch_[1-5].bin"))):
            expected = [f"data_batch_{i}.bin" for i in range(1, 1 + len(batches))]
            if [batch.name for batch in batches] != expected:
                raise damaged(place, f"{', '.join(expected)} without a gap", ", ".join(b.name for b in batches))
            return _open_batches(batches)
        for name in (_IDX_IMAGES if problem is MNIST else ()) + problem.npz:
            if (place / name).is_file():
                return open_files(problem, place / name)
    places = " or ".join(str(path / sub) for sub in problem.folders) if path.is_dir() else f"place of {path.name}"
    raise AbsentError(f"{problem.files}, or {', '.join(problem.npz)} in {places}")


_IDX_IMAGES = tuple(f"train-images{dash}idx3-ubyte{gz}" for dash in "-." for gz in ("", ".gz"))


def _open_idx(path: Path) -> Pool:
    stem = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [file for file in (path.with_name(stem), path.with_name(f"{stem}.gz")) if file.is_file()]
    if not beside:
        raise damaged(path, f"its labels beside it as {stem} or {stem}.gz", "neither")
    images, labels = _read_idx(path, 0x803, MNIST.shape), _read_idx(beside[0], 0x801, ())
    if len(images) != len(labels):
        raise damaged(beside[0], f"{len(images):,} labels, as many as {path.name} has images", f"{len(labels):,}")
    return in_memory(images, checked_labels(labels, beside[0]), "IDX files", path)


def _read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes whose items have the given shape; memory grows with what is really there."""
    with reading(path, "an IDX file"), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        head = file.read(8 + 4 * len(shape))
        if len(head) < 8 + 4 * len(shape):
            raise damaged(path, f"an IDX header of {8 + 4 * len(shape)} bytes", f"{len(head)} bytes")
        found, n, *sides = struct.unpack(f">{len(head) // 4}I", head)
        if found != magic:
            raise damaged(path, f"magic number 0x{magic:08x}", f"0x{found:08x}")
        if tuple(sides) != shape:
            raise damaged(path, f"items of shape {shape}", f"{tuple(sides)}")
        if n > MNIST.largest:
            raise damaged(path, f"at most {MNIST.largest:,} items", f"{n:,} declared")
        size = n * math.prod(shape)
        body = bytearray()
        while chunk := file.read(min(1 << 20, size + 1 - len(body))):
            body += chunk
    if len(body) != size:
        more = "more" if len(body) > size else f"{len(body):,}"
        raise damaged(path, f"{size:,} bytes after the header, as {n:,} items need", more)
    return np.frombuffer(body, np.uint8).reshape(n, *shape)


def _open_batches(paths: Sequence[Path]) -> Pool:
    """CIFAR-10 binary batches: records of one label byte and 3 x 32 x 32 bytes, colour planes first."""
    images, labels = [], []
    for path in paths:
        with reading(path, "a CIFAR-10 binary batch"):
            size = path.stat().st_size
            if size == 0 or size % 3073 or size > 3073 * CIFAR10.largest:
                expected = f"1 to {CIFAR10.largest:,} records of 3,073 bytes (one label, 3,072 pixels)"
                raise damaged(path, expected, f"{size:,} bytes")
            records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        images.append(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(checked_labels(records[:, 0], path))
    source = "CIFAR-10 binary batches " + ", ".join(path.stem.removeprefix("data_batch_") for path in paths)
    location = paths[0] if len(paths) == 1 else paths[0].parent
    return in_memory(np.concatenate(images), np.concatenate(labels), source, location)


def _open_npz(problem: Problem, path: Path) -> Pool:
    """Reads x_train and y_train from an npz without NumPy's loader, which would allocate what a header declares."""
    bound = problem.largest * math.prod(problem.shape) + 65_536
    with reading(path, "an npz file"), zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise damaged(path, "members with different names", "a name twice")
        for name, info in members.items():
            if re.search(r"[/\\:]|^\.", name):
                raise damaged(path, "members with plain names", repr(name))
            if info.file_size > bound:
                raise damaged(path, f"members of at most {bound:,} bytes", f"{name} with {info.file_size:,} declared")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise damaged(path, "members stored or deflated", f"{name} with method {info.compress_type}")
        for name in ("x_train.npy", "y_train.npy"):
            if name not in members:
                raise damaged(path, "members x_train and y_train", ", ".join(members) or "none")
        images = _read_npy(archive, path, "x_train.npy", ("uint8",), problem.shape)
        labels = _read_npy(archive, path, "y_train.npy", ("uint8", "int8", "int16", "int32", "int64"), ())
    if len(images) != len(labels):
        raise damaged(path, f"{len(images):,} labels in y_train, as x_train has images", f"{len(labels):,}")
    return in_memory(images, checked_labels(labels, path), f"npz file {path.name}", path)


def _read_npy(
    archive: zipfile.ZipFile, path: Path, member: str, kinds: tuple[str, ...], item: tuple[int, ...]
) -> np.ndarray:
    """Reads one array of shape (N, *item); the member's declared size was checked, and zipfile reads no further."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise damaged(path, f"{member} in format 1.0 or 2.0", f"{version[0]}.{version[1]}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise damaged(path, f"{member} to hold numbers", "pickled objects, which are never loaded")
        if dtype.name not in kinds or len(shape) != 1 + len(item) or shape[1:] != item:
            raise damaged(path, f"{member} as {kinds[0]} of shape {('N', *item)}", f"{dtype.name} of shape {shape}")
        body = file.read()
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise damaged(path, f"{math.prod(shape) * dtype.itemsize:,} bytes in {member}", f"{len(body):,}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")
