"""What the paper leaves open about its data: how pixels are scaled, and which numbers stand for two classes."""

from dataclasses import replace
from typing import Literal, get_args

import numpy as np

from lplr_jax import checks
from lplr_jax.data.problem import DataError, Dataset

Pixels = Literal["unit", "standardised", "normalised"]
"""Inputs as they are (pixel / 255), with mean 0 and deviation 1 over all of them, or every sample of norm 1."""
Labels = Literal["signs", "bits"]
"""Targets -1 and 1 of two classes, or 0 and 1."""


def recode(dataset: Dataset, *, pixels: Pixels = "unit", labels: Labels = "signs") -> Dataset:
    """Return a data set with its inputs scaled and its targets coded otherwise; the checksum follows.

    Args:
        dataset: x of shape (n, ...), y of shape (n, c).
        pixels: "unit" for x as it is, "standardised" for (x - mean) / deviation over all entries, "normalised" for
            x_i / ‖x_i‖₂.
        labels: "signs" for y as it is, "bits" for (y + 1) / 2, which is 0 and 1 where y is -1 and 1.

    Raises:
        DataError: for inputs that cannot be scaled so, or other targets than -1 and 1 that are to be "bits".
        ValueError: for a name that there is not.

    Example:
        >>> ones = Dataset(np.ones((2, 4), np.float32), np.float32([[-1], [1]]), "own", "an example")
        >>> halves = recode(ones, pixels="normalised", labels="bits")
        >>> halves.x[0].tolist(), halves.y.ravel().tolist()
        ([0.5, 0.5, 0.5, 0.5], [0.0, 1.0])
    """
    checks.one_of("pixels", pixels, get_args(Pixels))
    checks.one_of("labels", labels, get_args(Labels))
    x, y, words = dataset.x, dataset.y, {}
    if pixels != "unit":
        wide = x.astype(np.float64)
        flat = wide.reshape(len(x), -1)
        if pixels == "standardised":
            scale, shift, how = flat.std(), flat.mean(), "mean 0 and deviation 1 over all inputs"
        else:
            scale, shift, how = np.linalg.norm(flat, axis=1).reshape(-1, *[1] * (x.ndim - 1)), 0.0, "norm 1 a sample"
        if not np.all(scale):
            raise DataError(f"pixels={pixels!r} divides by zero: the inputs are constant, or a sample is zero")
        x = ((wide - shift) / scale).astype(np.float32)
        words["inputs"] = f"{dataset.inputs}; then {how}" if dataset.inputs else how
    if labels == "bits":
        if not np.isin(y, (-1, 1)).all():
            raise DataError("labels='bits' codes targets -1 and 1 as 0 and 1, and these targets are others")
        y = (y + 1) / 2
        words["targets"] = f"{dataset.targets}; then 0 for -1, 1 for +1" if dataset.targets else "0 and 1"
    return replace(dataset, x=x, y=y, **words) if words else dataset
