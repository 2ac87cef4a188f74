"""What a loop hands over, held against what it must be: the form of its parameters, its loss and its gradient."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from lplr_jax.types import Params

HANDED_OVER = 1e-3
"""Relative difference from which a loss or gradient that was handed over is called another one. Calibrated: a float32
sum over 10^4 samples with λ_max/λ_min = 10^7 stays a factor of ten below."""


def differences(
    step: int, handed: tuple[Any, Params], own: tuple[Any, Params], before: tuple[Any, Params] | None
) -> Iterator[str]:
    """Say where loss or gradient that were handed over are not those of the parameters that came with them.

    Args:
        step: t.
        handed: loss and gradient as they were handed over.
        own: those of all data at θ_t.
        before: those at θ_{t-1}, where it is known.
    """
    for place, name in enumerate(("loss", "gradient")):
        a, b = _flat(handed[place]), _flat(own[place])
        if not _differ(a, b):
            continue
        words = f"the {name} handed over at step {step} is not that of all data at these parameters"
        if before is not None and not _differ(a, _flat(before[place])):
            yield f"{words}: it is that of step {step - 1}"
        elif np.linalg.norm(b) > 0 and not _differ(a, (factor := float(a @ b / (b @ b))) * b):
            yield f"{words}: it is {factor:.6g} times as large"
        else:
            norms = f"{np.linalg.norm(a):.6g} against {np.linalg.norm(b):.6g}"
            yield f"{words}: {norms}, differing by {np.linalg.norm(a - b):.3g}"


def form(params: Params) -> tuple[Any, tuple[tuple[tuple[int, ...], Any], ...]]:
    """Return structure, shapes and types of a tree, which may not change along a run."""
    leaves, structure = jax.tree.flatten(params)
    return structure, tuple((np.shape(leaf), getattr(leaf, "dtype", type(leaf))) for leaf in leaves)


def difference(before: Any, now: Any) -> str:
    """Say where two forms differ."""
    if len(before[1]) != len(now[1]):
        return f"{len(before[1])} arrays there, {len(now[1])} here"
    for (shape, dtype), (other, kind) in zip(before[1], now[1], strict=True):
        if (shape, dtype) != (other, kind):
            return f"{dtype} of shape {shape} there, {kind} of shape {other} here"
    return "the same arrays in another tree"


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(jax.device_get(tree))])


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return not np.linalg.norm(a - b) <= HANDED_OVER * max(np.linalg.norm(a), np.linalg.norm(b))
