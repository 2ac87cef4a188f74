"""What the networks share: activations, an initialiser, and the check of a type."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

from lplr_jax import checks

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"softplus": nn.softplus, "tanh": nn.tanh, "relu": nn.relu}
"""Activations by name."""

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He initialisation: normal of variance 2 / fan_in, not truncated (He et al. 2015, eq. 10)."""


OUTPUT_INITS = {"he": 2.0, "lecun": 1.0, "small": 1 / 3, "zero": 0.0}
"""Variance of the output layer's weights times fan_in, by name; "small" is that of PyTorch's uniform default."""


def output_initialiser(name: str) -> Callable[..., Array]:
    """Return the initialiser of an output layer, normal with the variance of `OUTPUT_INITS`."""
    variance = OUTPUT_INITS[name]
    return nn.initializers.variance_scaling(variance, "fan_in", "normal") if variance else nn.initializers.zeros_init()


def check_floating(name: str, value: Any) -> None:
    """Raise ValueError for what is no floating type."""
    try:
        floating = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{name} must be a floating type such as float32, got {checks.shown(value)}")
