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

from lplr_jax import checks, rooms

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"softplus": nn.softplus, "tanh": nn.tanh, "relu": nn.relu}
"""Activations by name."""

he_normal = nn.initializers.variance_scaling(2.0, "fan_in", "normal")
"""He initialisation: normal of variance 2 / fan_in, not truncated (He et al. 2015, eq. 10)."""


INITS = ("he", "scaled-output", "antisymmetric")
"""Initialisations of `MLP` by name."""

OUTPUT_INITS = {"he": 2.0, "lecun": 1.0, "small": 1 / 3, "zero": 0.0}
"""Variance of the output layer's weights times fan_in, by name; "small" is that of PyTorch's uniform default."""

BIAS_INITS = ("zero", "uniform")
"""Initial biases of `MLP`: zero, or uniform within 1/√fan_in, PyTorch's default."""


def _output_init(name: str) -> Callable[..., Array]:
    """Return the initialiser of an output layer, normal with the variance of `OUTPUT_INITS`."""
    variance = OUTPUT_INITS[name]
    return nn.initializers.variance_scaling(variance, "fan_in", "normal") if variance else nn.initializers.zeros_init()


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


def _kernel_init(initialisation: str, output_init: str, *, first: bool, last: bool) -> Callable[..., Array]:
    """Return the initialiser of one layer's kernel (inputs, outputs)."""
    if initialisation == "he" and last:
        return _output_init(output_init)
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
    output_init: str = "he"
    bias_init: str = "zero"

    def __post_init__(self) -> None:
        for name in ("width", "depth", "outputs"):
            checks.whole(name, getattr(self, name), least=1)
        checks.one_of("activation", self.activation, sorted(ACTIVATIONS))
        checks.one_of("initialisation", self.initialisation, INITS)
        checks.one_of("output_init", self.output_init, OUTPUT_INITS)
        checks.one_of("bias_init", self.bias_init, BIAS_INITS)
        if self.initialisation != "he" and (self.output_init, self.bias_init) != ("he", "zero"):
            raise ValueError(
                f"output_init {self.output_init!r} and bias_init {self.bias_init!r} go with the initialisation 'he'; "
                f"{self.initialisation!r} sets output layer and biases itself"
            )
        if self.dtype is not None:
            _check_floating("dtype", self.dtype)
        _check_floating("param_dtype", self.param_dtype)
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
            h = nn.Dense(
                self.outputs if last else self.width,
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                kernel_init=_kernel_init(self.initialisation, self.output_init, first=layer == 0, last=last),
                bias_init=_uniform_bias(h.shape[1]) if self.bias_init == "uniform" else nn.initializers.zeros_init(),
                name=f"dense_{layer}",
            )(h)
            if not last:
                h = ACTIVATIONS[self.activation](h)
        return h


class ResNet(nn.Module):
    """Residual network for small images: GroupNorm, basic blocks, He-normal weights (paper, section 6.3).

    A 3×3 stem, `stages` stages of `blocks` residual blocks with width, 2 width, 4 width, ... channels, the mean over
    pixels, and an affine output layer. A block is conv, norm, activation, conv, norm, added to its input and activated
    (He et al. 2016, figure 2); the first block of every stage but the first halves the resolution with stride 2, and
    where the shape changes the input passes a 1×1 convolution of the same stride and a norm. Convolutions have no
    bias, as a norm follows each. GroupNorm sees one sample at a time, so outputs never mix samples.

    With 3 stages, 2 blocks, 3 channels and 5 outputs it has p = 676 w² + 117 w + 5 parameters.

    Attributes:
        width: channels w of the first stage; a multiple of `groups`.
        stages: number of stages.
        blocks: residual blocks of every stage.
        groups: groups of every GroupNorm.
        outputs: outputs c per sample.
        activation: "relu", "softplus" or "tanh".
        dtype: type of the computation; None takes that of parameters and inputs.
        param_dtype: type in which the parameters are initialised.
        output_init: "he", "lecun", "small" or "zero", the variance of the output layer's weights (`OUTPUT_INITS`).
    """

    width: int = 64
    stages: int = 3
    blocks: int = 2
    groups: int = 8
    outputs: int = 5
    activation: str = "relu"
    dtype: Any = None
    param_dtype: Any = jnp.float32
    output_init: str = "he"

    def __post_init__(self) -> None:
        for name in ("width", "stages", "blocks", "groups", "outputs"):
            checks.whole(name, getattr(self, name), least=1)
        checks.one_of("activation", self.activation, sorted(ACTIVATIONS))
        checks.one_of("output_init", self.output_init, OUTPUT_INITS)
        if self.dtype is not None:
            _check_floating("dtype", self.dtype)
        _check_floating("param_dtype", self.param_dtype)
        if self.width % self.groups:
            raise ValueError(f"width must be a multiple of groups = {self.groups}, got {self.width}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Float[Array | np.ndarray, "n h w d"]) -> Float[Array, "n c"]:
        """Map images (n, height, width, channels) to outputs (n, c)."""
        if not (hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.number) and len(x.shape) == 4 and all(x.shape[1:])):
            raise ValueError(f"x must be an array of images (n, height, width, channels), got {checks.shown(x)}")
        activation, shared = ACTIVATIONS[self.activation], {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def conv(h: Array, channels: int, *, size: int, stride: int, name: str) -> Array:
            h = nn.Conv(
                channels, (size, size), stride, use_bias=False, kernel_init=he_normal, name=f"conv_{name}", **shared
            )(h)
            # The two-pass variance does not cancel. Scale and bias are cast to the norm's own parameter type, which
            # follows the computation, so that a float64 kernel is one throughout.
            return nn.GroupNorm(
                self.groups,
                dtype=self.dtype,
                param_dtype=h.dtype,
                use_fast_variance=False,
                force_float32_reductions=False,
                name=f"norm_{name}",
            )(h)

        h = activation(conv(jnp.asarray(x), self.width, size=3, stride=1, name="stem"))
        for stage in range(self.stages):
            channels = self.width * 2**stage
            for block in range(self.blocks):
                stride, name = 2 if stage and not block else 1, f"{stage}_{block}"
                branch = activation(conv(h, channels, size=3, stride=stride, name=f"{name}_first"))
                branch = conv(branch, channels, size=3, stride=1, name=f"{name}_second")
                if h.shape != branch.shape:
                    h = conv(h, channels, size=1, stride=stride, name=f"{name}_skip")
                h = activation(h + branch)
        last = nn.Dense(self.outputs, kernel_init=_output_init(self.output_init), name="dense", **shared)
        return last(jnp.mean(h, axis=(1, 2)))


def _check_floating(name: str, value: Any) -> None:
    try:
        floating = value is not None and jnp.issubdtype(jnp.dtype(value), jnp.floating)
    except TypeError:
        floating = False
    if not floating:
        raise ValueError(f"{name} must be a floating type such as float32, got {checks.shown(value)}")


def __getattr__(name: str) -> Any:
    """Give out a name that lives elsewhere now."""
    return rooms.through_door(__name__, name)
