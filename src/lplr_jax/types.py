"""What every room calls a parameter tree and a network."""

from collections.abc import Callable
from typing import Any

from lplr_jax import checks

Params = Any
"""A pytree of parameter arrays."""


ApplyFn = Callable[[Params, Any], Any]
"""A pure function from parameters and inputs (n, ...) to outputs (n, c), or (n,) for (n, 1)."""


def count_parameters(params: Params) -> int:
    """Return p, the number of scalars in a pytree of parameters.

    Raises:
        TypeError: if a leaf is no array.
    """
    import jax  # not before there are parameters: who reads a record needs no JAX

    leaves = jax.tree.leaves(params)
    for leaf in leaves:
        if not hasattr(leaf, "size"):
            raise TypeError(f"params must be a pytree of arrays, got a leaf {checks.shown(leaf)}")
    return sum(leaf.size for leaf in leaves)
