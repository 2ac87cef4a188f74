"""Parameters as arrays and what is beside them: functions, text and Python numbers among the leaves of a pytree."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np


@dataclass(frozen=True)
class Static:
    """A leaf that is no array."""

    value: Any


def is_array(leaf: Any) -> bool:
    """Whether a leaf is an array of JAX or NumPy."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def arrays_of(tree: Any) -> list[Any]:
    """The leaves that are arrays, in order."""
    return [leaf for leaf in jax.tree.leaves(tree) if is_array(leaf)]


def joined(treedef: Any, leaves: Sequence[Any], arrays: Sequence[Any]) -> Any:
    """Put a pytree together again.

    Args:
        treedef: Its structure.
        leaves: For each leaf a `Static`, or anything else where an array goes.
        arrays: The arrays, in order.
    """
    left = iter(arrays)
    return jax.tree.unflatten(treedef, [leaf.value if isinstance(leaf, Static) else next(left) for leaf in leaves])
