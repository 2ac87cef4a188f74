"""Next-token prediction as a problem: its loss, the rows whose kernel is measured, and the floor of its loss."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array

from lplr_jax.data import Text
from lplr_jax.losses import Loss
from lplr_jax.types import ApplyFn, Params

LossName = Literal["squared", "softmax_cross_entropy"]


# Compiled code is found again by the identity of a function: one object for each model.
@lru_cache(maxsize=16)
def all_outputs(model: nn.Module) -> ApplyFn:
    """Return the network as a function with outputs (n, T V)."""

    def outputs(params: Params, x: Array) -> Array:
        return jnp.reshape(jnp.asarray(model.apply(params, x)), (x.shape[0], -1))

    return outputs


@lru_cache(maxsize=16)
def chosen_outputs(model: nn.Module, loss: LossName) -> ApplyFn:
    """Return the network as a function of {"tokens" (m, T), "position" (m,), "class" (m,)} with those outputs (m, 1).

    Under cross-entropy a row has no gradient of its own, so all classes of a position are its outputs (m, V).
    """

    def outputs(params: Params, x: Mapping[str, Array]) -> Array:
        found = jnp.asarray(model.apply(params, x["tokens"]))
        found = jnp.take_along_axis(found, x["position"][:, None, None], axis=1)[:, 0]
        return jnp.take_along_axis(found, x["class"][:, None], axis=1) if loss == "squared" else found

    return outputs


@dataclass(frozen=True)
class EachPosition(Loss):
    """A loss of every position of a sequence, summed over them: outputs and targets (n, T V)."""

    scale: Any
    each: Loss
    classes: int
    name = "each_position"

    def _per_sample(self, f: Any, y: Any) -> Any:
        of = self.each.per_sample(f.reshape(-1, self.classes), y.reshape(-1, self.classes))
        return jnp.sum(of.reshape(f.shape[0], -1), axis=1)

    def _total(self, f: Any, y: Any) -> Any:
        return self.each.total(f.reshape(-1, self.classes), y.reshape(-1, self.classes))


class Rows(NamedTuple):
    """Outputs of a network, each of one sequence, position and class, whose kernel is measured."""

    ids: np.ndarray
    """Their numbers, ascending: (sequence T + position) V + class; without the class where all of them are taken."""
    x: Mapping[str, np.ndarray]
    """"tokens" (m, T), 0 past the position; "position" (m,), "class" (m,)."""
    y: np.ndarray
    """Targets (m, 1): 1 where the class is that of the next token; one-hot (m, V) where all classes are taken."""


def draw_rows(text: Text, size: int, *, loss: LossName, seed: int) -> Rows:
    """Draw rows: of positions drawn at random the class that follows and one other, or all classes.

    Args:
        text: sequences.
        size: rows, even; under cross-entropy, whose gradient at one class depends on all, at most as many.
        loss: of a position.
        seed: of the draw.

    Raises:
        ValueError: for fewer rows than a position has.
    """
    rng, v, length, after = np.random.default_rng(seed), text.c, text.length, text.y.reshape(-1)
    squared = loss == "squared"
    count = size // (2 if squared else v)
    if not count:
        raise ValueError(f"subset_size must be at least {v}, all classes of one position, got {size}")
    places = np.sort(rng.choice(after.size, min(count, after.size), replace=False))
    ids, classes, y = places, np.zeros(places.size, np.int64), np.eye(v, dtype=np.float32)[after[places]]
    if squared:
        other = (after[places] + rng.integers(1, v, places.size)) % v
        ids = np.sort(np.concatenate([places * v + after[places], places * v + other]))
        places, classes = ids // v, ids % v
        y = (classes == after[places]).astype(np.float32)[:, None]
    position, chosen = (places % length).astype(np.int32), classes.astype(np.int32)
    # What a position does not see is 0, so that equal contexts are equal inputs.
    tokens = np.where(np.arange(length) <= position[:, None], text.x[places // length], 0).astype(np.int32)
    return Rows(ids, {"tokens": tokens, "position": position, "class": chosen}, y)


def causal_floor(text: Text, loss: LossName) -> float:
    """Return the least mean loss of any function of the text up to a position: equal contexts have unlike next tokens.

    Of m equal contexts with m_k times token k next, the best squared output is m_k/m and leaves ½ (m - Σ m_k²/m); the
    best of cross-entropy leaves -Σ m_k log(m_k/m).
    """
    contexts = text.contexts()
    counts = np.zeros((int(contexts.max()) + 1, text.c))
    np.add.at(counts, (contexts, text.y.reshape(-1)), 1)
    of = counts.sum(axis=1, keepdims=True)
    if loss == "squared":
        return float((of[:, 0] - (counts**2 / of).sum(axis=1)).sum() / (2 * contexts.size))
    return float(-np.sum(counts * np.log(np.maximum(counts, 1) / of)) / contexts.size)
