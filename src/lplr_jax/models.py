"""Networks as pure functions: Flax linen modules and their initialisers.

The only module that knows a layer. Everything downstream sees `apply_fn(params, x)`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

Params = Any
"""A pytree of parameter arrays."""

ApplyFn = Callable[[Params, Any], Any]
"""A pure function from parameters and inputs (n, ...) to outputs (n, c)."""

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"softplus": nn.softplus, "tanh": nn.tanh, "relu": nn.relu}
"""Activations by name."""

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He initialisation: normal of variance 2 / fan_in, not truncated (He et al. 2015, eq. 10)."""


class MLP(nn.Module):
    """Fully connected network with zero biases and He-normal weights at initialisation.

    With 784 inputs, depth 5 and one output it has p = 3 m² + 789 m + 1 parameters (the paper's model, section 6.1).

    Attributes:
        width: units m of every hidden layer.
        depth: number of affine layers, the output layer included.
        activation: "softplus", "tanh" or "relu", after every layer but the last.
        outputs: outputs c per sample.
        dtype: type of the computation; None takes that of parameters and inputs, so that one model serves float32
            training and float64 kernels.
        param_dtype: type in which the parameters are initialised.
    """

    width: int = 128
    depth: int = 5
    activation: str = "softplus"
    outputs: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("width", "depth", "outputs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(sorted(ACTIVATIONS))}, got {self.activation!r}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "n ..."]) -> Float[Array, "n c"]:
        """Map inputs (n, ...), flattened per sample, to outputs (n, c)."""
        h = jnp.reshape(x, (x.shape[0], -1))
        for layer in range(self.depth):
            last = layer == self.depth - 1
            h = nn.Dense(
                self.outputs if last else self.width,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=he_normal,
                bias_init=nn.initializers.zeros_init(),
                name=f"dense_{layer}",
            )(h)
            if not last:
                h = ACTIVATIONS[self.activation](h)
        return h


def count_parameters(params: Params) -> int:
    """Return p, the number of scalars in a pytree of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
