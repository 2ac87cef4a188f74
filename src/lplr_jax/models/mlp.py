"""The fully connected network and its initialisations."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lplr_jax import checks
from lplr_jax.models.parts import ACTIVATIONS, OUTPUT_INITS, check_floating, he_normal, output_initialiser

INITS = ("he", "scaled-output", "antisymmetric")
"""Initialisations of `MLP` by name."""

BIAS_INITS = ("zero", "uniform")
"""Initial biases of `MLP`: zero, or uniform within 1/√fan_in, PyTorch's default."""

PARAMETRISATIONS = ("standard", "ntk")
"""Parametrisations of `MLP` by name."""


def _uniform_bias(fan_in: int) -> Callable[..., Array]:
    bound = fan_in**-0.5
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, -bound, bound)


def _scaled_output(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    return he_normal(key, shape, dtype) / np.asarray(shape[0], dtype) ** 0.5


def _paired_columns(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    half = he_normal(key, (shape[0], shape[1] // 2), dtype)
    return jnp.concatenate([half, half], axis=1)


def _paired_blocks(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    # Drawn with the full fan-in, so that every entry has the variance of "he".
    a, b = jnp.split(he_normal(key, (shape[0], shape[1] // 2), dtype), 2)
    return jnp.block([[a, b], [b, a]])


def _opposed_rows(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    half, _ = jnp.split(he_normal(key, shape, dtype), 2)
    return jnp.concatenate([half, -half])


def _divided(init: Callable[..., Array], scale: float) -> Callable[..., Array]:
    """Return an initialiser whose weights, multiplied by a scale, are those of another."""
    return lambda key, shape, dtype: init(key, shape, dtype) / np.asarray(scale, dtype)


def _kernel_init(initialisation: str, output_init: str, *, first: bool, last: bool) -> Callable[..., Array]:
    """Return the initialiser of one layer's kernel (inputs, outputs)."""
    if initialisation == "he" and last:
        return output_initialiser(output_init)
    if initialisation == "scaled-output" and last:
        return _scaled_output
    if initialisation == "antisymmetric":
        return _paired_columns if first else _opposed_rows if last else _paired_blocks
    return he_normal


class MLP(nn.Module):
    """Fully connected network: zero biases and He-normal weights unless another initialisation is named.

    Initialisations. "he": normal of variance 2/fan_in. "scaled-output": the output layer is divided by sqrt(m),
    variance 2/m², as in the maximal update parametrisation (Yang and Hu 2021): outputs and hidden gradients start
    small.
    "antisymmetric": f(θ_0) = 0 up to rounding, by pairing every layer: in the convention W h, the first is [A; A], the
    hidden ones [[A, B], [B, A]], the output [a; -a], with A, B and a drawn as "he". Both halves of every hidden layer
    agree and their cotangents are opposite, (A - B)ᵀ of those above, so every layer has a gradient. Pairing the last
    hidden layer alone would be A = B there, which ends the gradient of all layers below.

    Parametrisations. "standard": z = W h + b. "ntk": z = √(2/fan_in) W h + b, W of unit variance where "standard" has
    2/fan_in (Jacot et al. 2018; Lee et al. 2019 with σ_w² = 2): the same function of the same seed, whose kernel has a
    limit as m grows where that of "standard" grows like m.

    With 784 inputs, depth 5 and one output it has p = 3 m² + 789 m + 1 parameters (the paper's model, section 6.1).

    Attributes:
        width: units m of every hidden layer.
        depth: number of affine layers, the output layer included.
        activation: "softplus", "tanh" or "relu", after every layer but the last.
        outputs: outputs c per sample.
        dtype: type of the computation; None takes that of parameters and inputs, so that one model serves float32
            training and float64 kernels.
        param_dtype: type in which the parameters are initialised.
        initialisation: "he", "scaled-output" or "antisymmetric"; the number of parameters is the same.
        parametrisation: "standard" or "ntk".
        output_init: "he", "lecun", "small" or "zero", the variance of the output layer's weights (`OUTPUT_INITS`);
            other than "he" with the initialisation "he" alone.
        bias_init: "zero" or "uniform", the initial biases (`BIAS_INITS`); the latter with "he" alone.
    """

    width: int = 128
    depth: int = 5
    activation: str = "softplus"
    outputs: int = 1
    dtype: Any = None
    param_dtype: Any = jnp.float32
    initialisation: str = "he"
    parametrisation: str = "standard"
    output_init: str = "he"
    bias_init: str = "zero"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "outputs"):
            checks.whole(name, getattr(self, name), least=1)
        checks.one_of("activation", self.activation, sorted(ACTIVATIONS))
        checks.one_of("initialisation", self.initialisation, INITS)
        checks.one_of("parametrisation", self.parametrisation, PARAMETRISATIONS)
        checks.one_of("output_init", self.output_init, OUTPUT_INITS)
        checks.one_of("bias_init", self.bias_init, BIAS_INITS)
        if self.initialisation != "he" and (self.output_init, self.bias_init) != ("he", "zero"):
            raise ValueError(
                f"output_init {self.output_init!r} and bias_init {self.bias_init!r} go with the initialisation 'he'; "
                f"{self.initialisation!r} sets output layer and biases itself"
            )
        if self.dtype is not None:
            check_floating("dtype", self.dtype)
        check_floating("param_dtype", self.param_dtype)
        if self.initialisation == "antisymmetric" and (self.width % 2 or self.depth < 2):
            raise ValueError(
                "the antisymmetric initialisation pairs hidden units: it needs an even width and depth >= 2, "
                f"got width {self.width} and depth {self.depth}"
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "n ..."]) -> Float[Array, "n c"]:
        """Map inputs (n, ...), flattened per sample, to outputs (n, c)."""
        if not (hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.number) and x.shape and all(x.shape[1:])):
            raise ValueError(f"x must be an array of numbers (n, ...), at least one a sample, got {checks.shown(x)}")
        h = jnp.reshape(x, (x.shape[0], -1))
        there = self.variables.get("params", {}).get("dense_0")
        if there is not None and there["kernel"].shape[0] != h.shape[1]:
            raise ValueError(
                f"x has {h.shape[1]} features a sample, shape {x.shape}, but the parameters were made for "
                f"{there['kernel'].shape[0]}; initialise with inputs of the same shape"
            )
        for layer in range(self.depth):
            last = layer == self.depth - 1
            init = _kernel_init(self.initialisation, self.output_init, first=layer == 0, last=last)
            fan_in = h.shape[1]
            if self.parametrisation == "ntk":
                scale = (2 / fan_in) ** 0.5
                h, init = h * scale, _divided(init, scale)
            h = nn.Dense(
                self.outputs if last else self.width,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=init,
                bias_init=_uniform_bias(fan_in) if self.bias_init == "uniform" else nn.initializers.zeros_init(),
                name=f"dense_{layer}",
            )(h)
            if not last:
                h = ACTIVATIONS[self.activation](h)
        return h
