"""What every room calls a parameter tree and a network."""

from collections.abc import Callable
from typing import Any

from lplr_jax import rooms

Params = Any
"""A pytree of parameter arrays."""


ApplyFn = Callable[[Params, Any], Any]
"""A pure function from parameters and inputs (n, ...) to outputs (n, c), or (n,) for (n, 1)."""


def __getattr__(name: str) -> Any:
    """Give out a name that lives elsewhere now."""
    return rooms.through_door(__name__, name)
