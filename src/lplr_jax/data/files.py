"""Images in files: IDX, CIFAR-10 binary batches, npz. No file is trusted."""

from __future__ import annotations

import gzip
import math
import os
import re
import struct
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from lplr_jax import archives
from lplr_jax.data.own import open_own
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
            own = problem.takes_own and path.name not in problem.npz
            return open_own(problem, path) if own else _open_npz(problem, path)
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
    return in_memory(images, checked_labels(labels, beside[0]), "IDX files", path, (path, beside[0]))


def _read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Read an IDX file of unsigned bytes whose items have the given shape; memory grows with what is really there."""
    with reading(path, "an IDX file"), archives.open_regular(path) as raw, ExitStack() as stack:
        file = stack.enter_context(gzip.open(raw)) if path.suffix == ".gz" else raw
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
        with reading(path, "a CIFAR-10 binary batch"), archives.open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0 or size % 3073 or size > 3073 * CIFAR10.largest:
                expected = f"1 to {CIFAR10.largest:,} records of 3,073 bytes (one label, 3,072 pixels)"
                raise damaged(path, expected, f"{size:,} bytes")
            records = np.frombuffer(file.read(size), np.uint8).reshape(-1, 3073)
        images.append(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(checked_labels(records[:, 0], path))
    source = "CIFAR-10 binary batches " + ", ".join(path.stem.removeprefix("data_batch_") for path in paths)
    location = paths[0] if len(paths) == 1 else paths[0].parent
    return in_memory(np.concatenate(images), np.concatenate(labels), source, location, paths)


def _open_npz(problem: Problem, path: Path) -> Pool:
    """Read x_train and y_train of an npz that must hold images of the problem."""
    way = "Use an intact copy, or name another data_dir."
    if problem.takes_own:
        way += f" Samples of your own are read from an npz of any name but {' and '.join(problem.npz)}: rename it."
    kinds = {"x_train": ("uint8",), "y_train": ("uint8", "int8", "int16", "int32", "int64")}
    items = {"x_train": problem.shape, "y_train": ()}

    def admit(headers: Mapping[str, archives.Header]) -> None:
        if not kinds.keys() <= headers.keys():
            raise damaged(path, "members x_train and y_train", ", ".join(headers) or "none", way)
        for name, allowed in kinds.items():
            shape, dtype = headers[name].shape, headers[name].dtype
            if dtype.name not in allowed or len(shape) != 1 + len(items[name]) or shape[1:] != items[name]:
                expected = f"{name}.npy as {allowed[0]} of shape {('N', *items[name])}"
                raise damaged(path, expected, f"{dtype.name} of shape {shape}", way)
        images, labels = headers["x_train"].shape[0], headers["y_train"].shape[0]
        if images != labels:
            raise damaged(path, f"{images:,} labels in y_train, as x_train has images", f"{labels:,}")

    bound = problem.largest * (math.prod(problem.shape) + 8) + 65_536
    with reading(path, "an npz file"):
        arrays = archives.read_npz(path, most_bytes=bound, admit=admit, only=("x_train", "y_train"))
    labels = checked_labels(arrays["y_train"], path)
    return in_memory(arrays["x_train"], labels, f"npz file {path.name}", path, (path,))
