"""The causal transformer."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from lplr_jax import checks
from lplr_jax.models.parts import check_floating

_normal = nn.initializers.variance_scaling(1.0, "fan_in", "normal")
# An embedding's rows are vectors of `width` entries: its fan-in is the number of columns.
_normal_rows = nn.initializers.variance_scaling(1.0, "fan_in", "normal", in_axis=1, out_axis=0)


class Transformer(nn.Module):
    """Causal transformer with normalisation before each branch, learned positions and its layers under one scan.

    h = E[x] + P; for each layer h ← h + attention(norm(h)), h ← h + V gelu(U norm(h)); outputs = norm(h) W (Vaswani et
    al. 2017; the norms before the branches and their initialisation as in GPT-2, Radford et al. 2019). U has 4 width
    rows; gelu is in its tanh form, as there. Position t sees positions 0 to t, so its outputs are those of the text up
    to t alone. Weights are normal of variance 1/fan_in, those that end a branch divided by sqrt(2 layers), and biases
    zero. With d = width it has p = layers (12 d² + 13 d) + (2 + length) d + k d vocabulary parameters, k = 1 where the
    head is tied and 2 otherwise.

    Attributes:
        vocabulary: tokens V, numbered from 0.
        width: entries d of the vector of a position; a multiple of `heads`.
        layers: attention and feed-forward pairs; their parameters are stacked along a first axis.
        heads: attention heads of a layer, d/heads entries each.
        length: most positions T of a sequence.
        tied: whether the head's matrix W is the embedding's, Eᵀ/sqrt(d).
        dtype: type of the computation; None takes that of parameters.
        param_dtype: type in which the parameters are initialised.

    Example:
        >>> model = Transformer(5, width=8, layers=1, heads=2, length=4)
        >>> params = model.init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
        >>> model.apply(params, jnp.array([[0, 1, 2, 3], [4, 3, 2, 1]])).shape
        (2, 4, 5)
    """

    vocabulary: int
    width: int = 64
    layers: int = 2
    heads: int = 4
    length: int = 64
    tied: bool = False
    dtype: Any = None
    param_dtype: Any = jnp.float32

    def __post_init__(self) -> None:
        for name in ("vocabulary", "width", "layers", "heads", "length"):
            checks.whole(name, getattr(self, name), least=1)
        if self.dtype is not None:
            check_floating("dtype", self.dtype)
        check_floating("param_dtype", self.param_dtype)
        if self.width % self.heads:
            raise ValueError(f"width must be a multiple of heads = {self.heads}, got {self.width}")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Int[Array | np.ndarray, "n t"]) -> Float[Array, "n t v"]:
        """Map tokens (n, t), t at most `length`, to outputs (n, t, vocabulary), those of the next token at each."""
        if not (hasattr(x, "shape") and jnp.issubdtype(x.dtype, jnp.integer) and len(x.shape) == 2 and x.shape[1]):
            raise ValueError(f"x must be an array of tokens (n, t), integers, got {checks.shown(x)}")
        if x.shape[1] > self.length:
            raise ValueError(f"x has {x.shape[1]} positions, the network {self.length}: shape {x.shape}")
        shared = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        embedding = nn.Embed(self.vocabulary, self.width, embedding_init=_normal_rows, name="embedding", **shared)
        positions = nn.Embed(self.length, self.width, embedding_init=_normal_rows, name="positions", **shared)
        h = embedding(jnp.asarray(x)) + positions(jnp.arange(x.shape[1]))[None]
        layers = nn.scan(_Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
        h, _ = layers(self.heads, self.layers, name="layers", **shared)(h, None)
        h = _norm(h, "norm", self.dtype)
        if self.tied:
            return embedding.attend(h * np.asarray(self.width**-0.5, h.dtype))
        small = nn.initializers.variance_scaling(1 / self.width, "fan_in", "normal")
        return nn.Dense(self.vocabulary, use_bias=False, kernel_init=small, name="head", **shared)(h)


class _Layer(nn.Module):
    """One layer: attention, then two dense layers at each position, each added to what it was given."""

    heads: int
    layers: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, h: Float[Array, "n t d"], _: None) -> tuple[Float[Array, "n t d"], None]:
        n, t, d = h.shape
        # Two branches a layer add up in h: so its variance stays of order one (GPT-2).
        ends = nn.initializers.variance_scaling(1 / (2 * self.layers), "fan_in", "normal")

        def dense(h: Array, outputs: int, name: str, init: Any = _normal) -> Array:
            return nn.Dense(outputs, kernel_init=init, name=name, dtype=self.dtype, param_dtype=self.param_dtype)(h)

        split = dense(_norm(h, "norm_attention", self.dtype), 3 * d, "query_key_value").reshape(n, t, 3, self.heads, -1)
        query, key, value = split[:, :, 0], split[:, :, 1], split[:, :, 2]
        scores = jnp.einsum("nihe,njhe->nhij", query, key) * np.asarray((d // self.heads) ** -0.5, h.dtype)
        past = jnp.tril(jnp.ones((t, t), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(past, scores, jnp.full_like(scores, jnp.finfo(scores.dtype).min)), axis=-1)
        mixed = jnp.einsum("nhij,njhe->nihe", weights, value).reshape(n, t, d)
        h = h + dense(mixed, d, "mixed", ends)
        wide = nn.gelu(dense(_norm(h, "norm_dense", self.dtype), 4 * d, "wide"), approximate=True)
        return h + dense(wide, d, "narrow", ends), None


def _norm(h: Float[Array, "n t d"], name: str, dtype: Any) -> Float[Array, "n t d"]:
    # The two-pass variance does not cancel. Scale and bias are cast to the norm's own parameter type, which follows the
    # computation, so that a float64 kernel is one throughout.
    return nn.LayerNorm(
        dtype=dtype, param_dtype=h.dtype, use_fast_variance=False, force_float32_reductions=False, name=name
    )(h)
