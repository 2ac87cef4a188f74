"""What is minimised: a loss of every sample's outputs, and the objective that it makes of a network.

L(θ) = (1/s) Σ ℓ_i(f_i), g = ∂ℓ/∂f stacked over samples, undivided by s, and ∇L = Jᵀg/s. So ½‖∇L‖² = gᵀΘg/(2 s²).
A new loss is one file with its class, and its line in `LOSSES`.
"""

from lplr_jax.losses.base import Loss, LossScale, Scale
from lplr_jax.losses.exponential import Exponential
from lplr_jax.losses.huber import Huber
from lplr_jax.losses.logistic import Logistic
from lplr_jax.losses.objective import Objective
from lplr_jax.losses.registry import LOSSES, as_loss, by_name, parse
from lplr_jax.losses.softmax_cross_entropy import SoftmaxCrossEntropy
from lplr_jax.losses.squared import Squared
from lplr_jax.losses.squared_hinge import SquaredHinge

__all__ = [
    "LOSSES",
    "Exponential",
    "Huber",
    "Logistic",
    "Loss",
    "LossScale",
    "Objective",
    "Scale",
    "SoftmaxCrossEntropy",
    "Squared",
    "SquaredHinge",
    "as_loss",
    "by_name",
    "parse",
]
