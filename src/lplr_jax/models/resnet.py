"""The residual network for small images."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from lplr_jax import checks
from lplr_jax.models.parts import ACTIVATIONS, OUTPUT_INITS, check_floating, he_normal, output_initialiser


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
            check_floating("dtype", self.dtype)
        check_floating("param_dtype", self.param_dtype)
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
        last = nn.Dense(self.outputs, kernel_init=output_initialiser(self.output_init), name="dense", **shared)
        return last(jnp.mean(h, axis=(1, 2)))
