"""The objective, one pure training step, and its scan over epochs or over shuffled mini-batches.

With all data in every step, each quantity of an epoch is taken from the gradient that the step needs anyway. With
mini-batches, loss and gradient of all data are a pass of their own, summed over micro-batches in float64.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lplr_jax import checks, rooms
from lplr_jax.layouts import plain_convolutions
from lplr_jax.losses import Objective
from lplr_jax.types import Params

_OPTAX = "such as optax.sgd(0.1)"
_OBJECTIVE = "made of a function and a loss scale"


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
    moved = _descend(state.params, state.opt_state, gradient, optimizer)
    return TrainState(*moved), _metrics(loss, gradient, state.params, initial)


def _descend(
    params: Params, opt_state: optax.OptState, gradient: Params, optimizer: optax.GradientTransformation
) -> tuple[Params, optax.OptState]:
    updates, opt_state = optimizer.update(gradient, opt_state, params)
    return optax.apply_updates(params, updates), opt_state


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


class ShuffledState(NamedTuple):
    """What an epoch of mini-batches changes, and what decides its order: all that is needed to go on from here."""

    params: Params
    opt_state: optax.OptState
    key: Int[Array, "..."]
    """Data of the seed's random key; the order of epoch t comes from this key and t alone."""
    epoch: Int[Array, "..."]
    """Epochs done, t."""


def init_shuffled(params: Params, optimizer: optax.GradientTransformation, *, seed: int) -> ShuffledState:
    """Return the state before the first epoch; it holds copies, so that donating it leaves `params` usable."""
    checks.whole("seed", seed, least=0, most=2**32 - 1)
    key = jax.random.key_data(jax.random.key(seed))
    return ShuffledState(*init_state(params, optimizer), key, jnp.zeros((), jnp.int32))


def batches_of(n: int, size: int) -> int:
    """Return how many batches of at most `size` samples n samples make.

    Raises:
        ValueError: for a size below one or above n.
    """
    if not 1 <= checks.whole("the size of a batch", size) <= n:
        raise ValueError(f"a batch must hold 1 to n = {n} samples, got {size}")
    return -(-n // size)


def _filled(order: Int[Array, " n"], size: int) -> tuple[Int[Array, "k b"], Float[Array, "k b"]]:
    """Deal samples into batches of one size; what fills the last one up repeats its first sample with weight 0."""
    n, count = order.size, batches_of(order.size, size)
    place = jnp.arange(count * size).reshape(count, size)
    counts = place < n
    return order[jnp.where(counts, place, place[:, :1])], counts.astype(jnp.float32)


@partial(jax.jit, static_argnames=("objective", "optimizer", "batch_size"), donate_argnames=("state",))
def shuffled_epoch(
    state: ShuffledState,
    data: tuple[Any, Array],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> ShuffledState:
    """Run one epoch of mini-batches in one `lax.scan`; the state's buffers are donated.

    The order is a permutation drawn from the state's key and its epoch. Where `batch_size` does not divide n, the last
    batch holds the n mod batch_size samples that are left, and its gradient is the mean over those alone: every sample
    is used once an epoch, and counts for more in a short batch.

    Args:
        state: parameters, optimiser state, key and epoch.
        data: inputs (n, ...) and targets (n, c), on the device.
        objective: what is minimised; a batch gives `Objective.batch_value`.
        optimizer: an optax transformation, updated once a batch.
        batch_size: samples of a batch.

    Returns:
        The state after the epoch.
    """
    x, y = data
    n = y.shape[0]
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.epoch)
    gradient_of = plain_convolutions(jax.grad(partial(objective.batch_value, n=n)))

    def body(carry: tuple[Params, optax.OptState], batch: tuple[Array, Array]) -> tuple[Any, None]:
        rows, weights = batch
        with jax.default_matmul_precision("highest"):
            gradient = gradient_of(carry[0], jax.tree.map(lambda a: a[rows], x), y[rows], weights.astype(y.dtype))
        return _descend(*carry, gradient, optimizer), None

    batches = _filled(jax.random.permutation(key, n), batch_size)
    (params, opt_state), _ = jax.lax.scan(body, (state.params, state.opt_state), batches)
    return ShuffledState(params, opt_state, state.key, state.epoch + 1)


class ExactMetrics(NamedTuple):
    """Diagnostics at one point over all data, summed in float64 whatever the precision of the network."""

    loss: Float[Array | np.ndarray, "*epochs"]
    """L(θ_t), in units of the loss with its scale s."""
    grad_sq_norm: Float[Array | np.ndarray, "*epochs"]
    """‖∇L(θ_t)‖²."""
    drift: Float[Array | np.ndarray, "*epochs"]
    """‖θ_t - θ_0‖."""
    accuracy: Float[Array | np.ndarray, "*epochs"]
    """Share of samples whose largest output is that of their class; of equal sign where there is one output."""


def evaluate_exactly(
    params: Params, data: tuple[Any, Array], initial: Params, *, objective: Objective, micro_batch: int
) -> ExactMetrics:
    """Return loss, gradient norm, drift and accuracy over all data, from one scan over micro-batches.

    Outputs and per-batch gradients have the precision of the parameters; squares, sums over batches and norms are in
    float64, so that the size of a micro-batch moves results by no more than the rounding of its own sums.

    Args:
        params: θ.
        data: inputs (n, ...) and targets (n, c).
        initial: θ_0, from which drift is measured.
        objective: whose loss it is.
        micro_batch: samples at a time, which bounds memory; it need not divide n.

    Returns:
        Scalars in float64.

    Raises:
        ValueError: for a micro-batch below one or above n.
    """
    # Not placed on the host for a TPU's sake: there float64 sums run as pairs of float32, which is enough for sums.
    checks.instance("objective", objective, Objective, _OBJECTIVE)
    with jax.enable_x64(True):
        return _evaluate_exactly(params, data, initial, objective=objective, micro_batch=micro_batch)


@partial(jax.jit, static_argnames=("objective", "micro_batch"))
def _evaluate_exactly(
    params: Params, data: tuple[Any, Array], initial: Params, *, objective: Objective, micro_batch: int
) -> ExactMetrics:
    x, y = data
    n, wide = y.shape[0], jnp.float64

    def squares(point: Params, inputs: Any, targets: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
        residual = objective.residual(point, inputs, targets)
        outputs = residual + targets
        right = jnp.argmax(outputs, axis=1) == jnp.argmax(targets, axis=1)
        if targets.shape[1] == 1:
            right = (outputs[:, 0] > 0) == (targets[:, 0] > 0)
        total = jnp.sum(weights.astype(wide) * jnp.sum(jnp.square(residual.astype(wide)), axis=1))
        half = 0.5 * jnp.sum(weights * jnp.sum(jnp.square(residual), axis=1))
        return half, (total, jnp.sum(weights.astype(wide) * right.astype(wide)))

    gradient_of = plain_convolutions(jax.grad(squares, has_aux=True))

    def body(carry: tuple[Array, Array, Params], batch: tuple[Array, Array]) -> tuple[Any, None]:
        rows, weights = batch
        with jax.default_matmul_precision("highest"):
            gradient, (total, right) = gradient_of(
                params, jax.tree.map(lambda a: a[rows], x), y[rows], weights.astype(y.dtype)
            )
        summed = jax.tree.map(lambda a, b: a + b.astype(wide), carry[2], gradient)
        return (carry[0] + total, carry[1] + right, summed), None

    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, wide), params)
    start = (jnp.zeros((), wide), jnp.zeros((), wide), nothing)
    (total, right, gradient), _ = jax.lax.scan(body, start, _filled(jnp.arange(n), micro_batch))
    s = objective.scale(n)
    moved = jax.tree.map(lambda a, b: a.astype(wide) - b.astype(wide), params, initial)
    return ExactMetrics(
        0.5 * total / s, optax.tree.norm(gradient, squared=True) / s**2, optax.tree.norm(moved), right / n
    )


def __getattr__(name: str) -> Any:
    """Give out a name that lives elsewhere now."""
    return rooms.through_door(__name__, name)
