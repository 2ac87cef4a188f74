"""What a loop hands over, held against what it must be: the form of its parameters, its loss and its gradient."""

from collections.abc import Iterator
from typing import Any

import jax
import jax.core
import numpy as np

from lplr_jax.runs.problem import Problem
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


def check(step: int, params: Params, expected: Any) -> None:
    """Hold parameters against what may be measured and kept.

    Args:
        step: t.
        params: what was handed over.
        expected: the form of the problem's parameters.

    Raises:
        TypeError: inside a transformation of JAX.
        ValueError: for buffers that were deleted, or parameters of another form.
    """
    leaves = jax.tree.leaves(params)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        raise TypeError(
            "the watch was called inside a transformation of JAX (jit, scan, grad, vmap), where there are no "
            "numbers to measure: call it from Python between steps, or lplr_jax.series inside and extend outside"
        )
    if any(isinstance(leaf, jax.Array) and leaf.is_deleted() for leaf in leaves):
        raise ValueError(
            f"the parameters of step {step} were deleted, as a step that donates them does: call the watch before "
            "the step that takes them"
        )
    if (found := form(params)) != expected:
        raise ValueError(
            f"the parameters of step {step} differ in structure, shape or dtype from those of the problem: "
            f"{difference(expected, found)}"
        )


def gradient(grads: Params, theta: Params, problem: Problem) -> Params:
    """Return a gradient in the form of θ: shaped like the parameters, or like those of them that train.

    Raises:
        ValueError: for any other.
    """
    leaves, structure = jax.tree.flatten(theta)
    found = jax.tree.leaves(grads)
    if len(found) != len(leaves):
        found = jax.tree.leaves(problem.theta(grads))
    if [np.shape(leaf) for leaf in found] != [np.shape(leaf) for leaf in leaves]:
        raise ValueError("grads must have the structure and the shapes of the parameters, as jax.grad gives them")
    return jax.tree.unflatten(structure, found)


def _flat(tree: Any) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(jax.device_get(tree))])


def _differ(a: np.ndarray, b: np.ndarray) -> bool:
    return not np.linalg.norm(a - b) <= HANDED_OVER * max(np.linalg.norm(a), np.linalg.norm(b))
