"""Networks as pure functions: Flax linen modules and their initialisers, one file a network.

The only room that knows a layer. Everything downstream sees `apply_fn(params, x)`.
"""

from typing import Any

from lplr_jax import rooms
from lplr_jax.models.mlp import INITS, MLP
from lplr_jax.models.parts import ACTIVATIONS, he_normal
from lplr_jax.models.resnet import ResNet
from lplr_jax.models.transformer import Transformer

__all__ = ["ACTIVATIONS", "INITS", "MLP", "ResNet", "Transformer", "he_normal"]


def __getattr__(name: str) -> Any:
    """Give out a name that lives elsewhere now."""
    return rooms.through_door(__name__, name)
