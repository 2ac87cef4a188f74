"""Networks as pure functions: Flax linen modules and their initialisers, one file a network.

The only room that knows a layer. Everything downstream sees `apply_fn(params, x)`.
"""

from typing import Any

from lplr_jax import rooms
from lplr_jax.models.mlp import BIAS_INITS as BIAS_INITS
from lplr_jax.models.mlp import INITS as INITS
from lplr_jax.models.mlp import MLP
from lplr_jax.models.mlp import PARAMETRISATIONS as PARAMETRISATIONS
from lplr_jax.models.parts import ACTIVATIONS as ACTIVATIONS
from lplr_jax.models.parts import OUTPUT_INITS as OUTPUT_INITS
from lplr_jax.models.parts import he_normal as he_normal
from lplr_jax.models.resnet import ResNet
from lplr_jax.models.transformer import Transformer

__all__ = ["MLP", "ResNet", "Transformer"]


def __getattr__(name: str) -> Any:
    """Give out a name that lives elsewhere now."""
    return rooms.through_door(__name__, name)
