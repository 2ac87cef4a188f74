"""The objective, one pure training step, and its scan over epochs.

Every quantity of an epoch is taken from the gradient that the step needs anyway, so diagnostics cost next to nothing.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lplr_jax import checks
from lplr_jax.models import ApplyFn, Params

LossScale = Literal["sum", "mean"]

_OPTAX = "such as optax.sgd(0.1)"
_OBJECTIVE = "made of a function and a loss scale"


@dataclass(frozen=True)
class Objective:
    """Squared loss L(θ) = ‖f(θ) - y‖² / (2 s) of a pure function (paper, section 3).

    Attributes:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c).
        loss_scale: "sum" for s = 1, the theory's loss, or "mean" for s = n.

    Example:
        >>> import jax.numpy as jnp
        >>> objective = Objective(lambda w, x: x @ w, "sum")
        >>> float(objective.value(jnp.ones((1, 1)), jnp.ones((2, 1)), jnp.zeros((2, 1))))
        1.0
    """

    apply_fn: ApplyFn
    loss_scale: LossScale

    def __post_init__(self) -> None:
        checks.function("apply_fn", self.apply_fn, "(params, x) -> outputs (n, c)")
        if not isinstance(self.loss_scale, str) or self.loss_scale not in ("sum", "mean"):
            raise ValueError(f'loss_scale must be "sum" (s = 1) or "mean" (s = n), got {self.loss_scale!r}')

    def scale(self, n: int) -> int:
        """Return the number s for n samples."""
        return n if self.loss_scale == "mean" else 1

    def residual(self, params: Params, x: Any, y: Float[Array, "n c"]) -> Float[Array, "n c"]:
        """Return r = f(θ) - y, shape (n, c)."""
        # GPUs take TF32 and TPUs bfloat16 passes unless told; loss and gradient feed verdicts.
        with jax.default_matmul_precision("highest"):
            outputs = self.apply_fn(params, x)
        for name, array in (("y", y), ("apply_fn", outputs)):
            if not (hasattr(array, "shape") and jnp.issubdtype(array.dtype, jnp.number)):
                verb = "must be" if name == "y" else "must return one"
                raise TypeError(f"{name} {verb} array (n, c) of numbers, got {checks.shown(array)}")
        if not y.size:
            raise ValueError(f"y has no samples, or no outputs; it must be (n, c) with both >= 1, got shape {y.shape}")
        if outputs.shape != y.shape:
            raise ValueError(f"apply_fn returns shape {outputs.shape} but y has shape {y.shape}; both must be (n, c)")
        return outputs - y

    def value(self, params: Params, x: Any, y: Float[Array, "n c"]) -> Float[Array, ""]:
        """Return L(θ)."""
        return 0.5 * jnp.sum(jnp.square(self.residual(params, x, y))) / self.scale(y.shape[0])

    def value_and_gradient(self, params: Params, x: Any, y: Float[Array, "n c"]) -> tuple[Float[Array, ""], Params]:
        """Return L(θ) and ∇L(θ), the latter shaped like the parameters."""
        with jax.default_matmul_precision("highest"):
            return jax.value_and_grad(self.value)(params, x, y)


class TrainState(NamedTuple):
    """What a step changes."""

    params: Params
    opt_state: optax.OptState


class EpochMetrics(NamedTuple):
    """Diagnostics of one epoch, all at the parameters before its step."""

    loss: Float[Array, "*epochs"]
    """L(θ_t), in units of the loss with its scale s."""
    grad_sq_norm: Float[Array, "*epochs"]
    """‖∇L(θ_t)‖²."""
    drift: Float[Array, "*epochs"]
    """‖θ_t - θ_0‖."""


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step; it holds copies, so that donating it leaves `params` usable.

    Raises:
        TypeError: for what is no optax transformation.
    """
    checks.instance("optimizer", optimizer, optax.GradientTransformation, _OPTAX)
    return TrainState(jax.tree.map(jnp.copy, params), optimizer.init(params))


def _metrics(loss: Array, gradient: Params, params: Params, initial: Params) -> EpochMetrics:
    drift = optax.tree.norm(jax.tree.map(jnp.subtract, params, initial))
    return EpochMetrics(loss, optax.tree.norm(gradient, squared=True), drift)


def train_step(
    state: TrainState,
    batch: tuple[Any, Array],
    initial: Params,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[TrainState, EpochMetrics]:
    """Take one step on a batch.

    Args:
        state: parameters and optimiser state.
        batch: inputs (n, ...) and targets (n, c).
        initial: θ_0, from which drift is measured.
        objective: what is minimised.
        optimizer: an optax transformation; `optax.sgd(η)` is gradient descent when the batch is all data.

    Returns:
        The next state, and the metrics at the parameters that came in.
    """
    checks.instance("objective", objective, Objective, _OBJECTIVE)
    checks.instance("optimizer", optimizer, optax.GradientTransformation, _OPTAX)
    loss, gradient = objective.value_and_gradient(state.params, *batch)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return TrainState(params, opt_state), _metrics(loss, gradient, state.params, initial)


@partial(jax.jit, static_argnames=("objective", "optimizer", "epochs"), donate_argnames=("state",))
def train_epochs(
    state: TrainState,
    batch: tuple[Any, Array],
    initial: Params,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    epochs: int,
) -> tuple[TrainState, EpochMetrics]:
    """Run full-batch epochs in one `lax.scan`; the state's buffers are donated.

    Returns:
        The state after `epochs` steps and the metrics before each of them, every field of shape (epochs,).
    """
    checks.whole("epochs", epochs, least=1)

    def body(carry: TrainState, _: None) -> tuple[TrainState, EpochMetrics]:
        return train_step(carry, batch, initial, objective=objective, optimizer=optimizer)

    return jax.lax.scan(body, state, length=epochs)


@partial(jax.jit, static_argnames=("objective",))
def evaluate(params: Params, batch: tuple[Any, Array], initial: Params, *, objective: Objective) -> EpochMetrics:
    """Return the metrics at `params` without a step: those of the epoch after the last one."""
    checks.instance("objective", objective, Objective, _OBJECTIVE)
    loss, gradient = objective.value_and_gradient(params, *batch)
    return _metrics(loss, gradient, params, initial)
