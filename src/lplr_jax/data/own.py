"""Samples of one's own: an npz with x_train of any shape and numeric type, and y_train as labels or as targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from lplr_jax import archives
from lplr_jax.data.problem import DataError, Pool, Problem, checked_labels, damaged, in_memory, reading

MOST_BYTES = 2**31
"""Bytes that a file may unpack to: a full batch and its kernel are out of reach long before."""

_SAVE = "Save it with numpy.savez(path, x_train=x, y_train=y), x of shape (n, ...) and y of shape (n,) or (n, c)."
_NUMBERS = "buif"


def open_own(problem: Problem, path: Path) -> Pool:
    """Read an npz: as images of the problem where they are such, with all its default classes, else as other samples.

    Raises:
        DataError: if it lacks x_train or y_train, their lengths differ, or they are no numbers.
    """

    def admit(headers: Mapping[str, archives.Header]) -> None:
        for name in ("x_train", "y_train"):
            if name not in headers:
                raise damaged(path, f"members x_train and y_train, of which {name} is not there", _list(headers), _SAVE)
            shape, dtype = headers[name].shape, headers[name].dtype
            if dtype.kind not in _NUMBERS:
                way = "Save it as integers or floats, such as float32."
                raise damaged(path, f"{name} as real numbers", f"dtype {dtype} of shape {shape}", way)
            if not shape or not all(shape):
                raise damaged(path, f"{name} of shape (n, ...) with an entry at least", f"shape {shape}", _SAVE)
        x, y = headers["x_train"], headers["y_train"]
        if x.shape[0] != y.shape[0]:
            expected = f"as many entries in y_train as x_train has samples, {x.shape[0]:,}"
            raise damaged(path, expected, f"{y.shape[0]:,}", "Save both in one order, one entry a sample.")
        labelled = y.dtype.kind != "f"
        if len(y.shape) > 2 or (labelled and y.shape[1:] not in ((), (1,))):
            expected = "y_train as integer labels of shape (n,), or float targets of shape (n,) or (n, c)"
            way = "Save one-hot or other targets as floats, labels as one integer a sample."
            raise damaged(path, expected, f"{y.dtype.name} of shape {y.shape}", way)

    with reading(path, "an npz file", "Or save it anew, x_train and y_train as arrays of numbers."):
        only = ("x_train", "y_train")
        arrays = archives.read_npz(path, most_bytes=MOST_BYTES, admit=admit, only=only)
    x, y = arrays["x_train"], arrays["y_train"]
    y = y.astype(np.uint8) if y.dtype.kind == "b" else y
    labels = y.reshape(-1) if y.dtype.kind != "f" else np.empty(0, np.int64)
    pool = in_memory(x, labels, f"npz file {path.name}", path, (path,))
    if x.dtype == np.uint8 and x.shape[1:] == problem.shape and _are_labels_of(problem, y):
        return replace(pool, labels=checked_labels(labels, path))
    return replace(pool, own=True, targets=y.reshape(len(y), -1) if y.dtype.kind == "f" else None)


def _list(names: Mapping[str, object]) -> str:
    shown = [*names][:20]
    return (", ".join(shown) + ", …" * (len(names) > len(shown))) or "none"


def _are_labels_of(problem: Problem, y: np.ndarray) -> bool:
    return y.dtype.kind in "ui" and y.ndim == 1 and set(problem.default) <= set(np.unique(y).tolist()) <= {*range(10)}


def to_float32(what: str, place: str, values: np.ndarray) -> np.ndarray:
    """Return values of a file in float32.

    Raises:
        DataError: for one that is not finite, or beyond the range of float32.
    """
    with np.errstate(over="ignore"):
        found = values.astype(np.float32)
    wrong = np.argwhere(~np.isfinite(found))
    if len(wrong):
        value = values[tuple(wrong[0])]
        why = "beyond the range of float32, 3.4e38" if np.isfinite(value) else "not finite"
        which = f"{value} in sample {wrong[0][0]:,} of those taken, {why} ({len(wrong):,} such entries)"
        which = f"{value} in sample {wrong[0][0]:,} of those taken, {why} ({len(wrong):,} such entries)"
        way = "Drop such samples, or scale them, and save it anew."
        raise DataError(f"{place}: expected finite numbers in {what}, found {which}. {way}")
    return found


def inputs_of(pool: Pool, rows: np.ndarray) -> tuple[np.ndarray, str]:
    """Return the inputs of some rows, one flat row a sample, shape (n, d), and how they follow from the file, in words.

    Raises:
        DataError: for a number that is not finite in float32.
    """
    taken = pool.images(rows).reshape(len(rows), -1)
    if taken.dtype == np.uint8:
        return (taken / np.float32(255)).astype(np.float32), "uint8 / 255"
    return to_float32("x_train", str(pool.location), taken), as_it_is(taken.dtype)


def as_it_is(dtype: np.dtype) -> str:
    """Say that numbers of a type were taken as they are, and cast to float32 where they are of another type."""
    return f"{dtype.name} as it is" + (", in float32" if dtype != np.float32 else "")
