"""The state of a run, one pure step, and its scan over steps on all data.

Each quantity of a step is taken from the gradient that the step needs anyway.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lplr_jax import checks
from lplr_jax.losses import Objective
from lplr_jax.training.rules import StepRule
from lplr_jax.types import Params

_OPTAX = "such as optax.sgd(0.1)"
OBJECTIVE = "made of a function and a loss scale"


class State(NamedTuple):
    """What steps change, and what decides their order: all that is needed to go on from here."""

    params: Params
    opt_state: optax.OptState
    key: Int[Array, "..."]
    """Data of the seed's random key; the order of a pass over the data comes from this key and `step` alone."""
    step: Int[Array, "..."]
    """Steps done; where a pass over shuffled mini-batches is one step of the record, passes done."""


TrainState = ShuffledState = State


class Metrics(NamedTuple):
    """Diagnostics of one step, at the parameters before it; leading axes run over steps."""

    loss: Float[Array | np.ndarray, "*steps"]
    """L(θ_t), in units of the loss with its scale s."""
    grad_sq_norm: Float[Array | np.ndarray, "*steps"]
    """‖∇L(θ_t)‖², of all data."""
    drift: Float[Array | np.ndarray, "*steps"]
    """‖θ_t - θ_0‖."""
    step_size: Float[Array | np.ndarray, "*steps"]
    """η_t = ⟨θ_t - θ_{t+1}, ∇L_t⟩/‖∇L_t‖²; NaN where the step is not known."""
    step_deviation: Float[Array | np.ndarray, "*steps"]
    """‖θ_t - θ_{t+1} - η_t ∇L_t‖/‖θ_t - θ_{t+1}‖; 0 along the gradient, NaN where the step is not known."""
    step_rounding: Float[Array | np.ndarray, "*steps"]
    """What rounding of the parameters alone may leave of the deviation; inf where θ did not move."""
    accuracy: Float[Array | np.ndarray, "*steps"] | None = None
    """Share of samples whose largest output is that of their class; of equal sign where there is one output."""
    batch_grad_sq_norm: Float[Array | np.ndarray, "*steps"] | None = None
    """‖g_B‖², g_B the gradient of the batch that the step takes."""
    batch_step_size: Float[Array | np.ndarray, "*steps"] | None = None
    """⟨θ_t - θ_{t+1}, g_B⟩/‖g_B‖²; NaN where the step is not known, as the two that follow."""
    batch_step_deviation: Float[Array | np.ndarray, "*steps"] | None = None
    """`step_deviation` with g_B in the place of ∇L_t: 0 for a step of stochastic gradient descent."""
    batch_step_rounding: Float[Array | np.ndarray, "*steps"] | None = None
    """`step_rounding` of it."""


EpochMetrics = ExactMetrics = Metrics


def init_state(params: Params, optimizer: optax.GradientTransformation, *, seed: int = 0) -> State:
    """Return the state before the first step; it holds copies, so that donating it leaves `params` usable.

    Args:
        params: θ_0.
        optimizer: an optax transformation.
        seed: of the order of mini-batches; steps on all data draw nothing from it.

    Raises:
        TypeError: for what is no optax transformation.
        ValueError: for a seed out of range.
    """
    checks.instance("optimizer", optimizer, optax.GradientTransformation, _OPTAX)
    checks.whole("seed", seed, least=0, most=2**32 - 1)
    key = jax.random.key_data(jax.random.key(seed))
    return State(jax.tree.map(jnp.copy, params), optimizer.init(params), key, jnp.zeros((), jnp.int32))


def init_shuffled(params: Params, optimizer: optax.GradientTransformation, *, seed: int) -> State:
    """Return the state before the first pass over shuffled mini-batches: `init_state` of a seed."""
    return init_state(params, optimizer, seed=seed)


class StepMeasures(NamedTuple):
    """How a step lies to the gradient of all data, as in `Metrics`."""

    step_size: Float[Array, ""]
    step_deviation: Float[Array, ""]
    step_rounding: Float[Array, ""]


def measure_step(params: Params, gradient: Params, after: Params) -> StepMeasures:
    """Measure a step θ_t -> θ_{t+1} against ∇L_t, whatever made it.

    An entry of θ_{t+1} is rounded once, by half its spacing at most; the product and the difference before it add a
    few u ‖θ_t - θ_{t+1}‖. So plain gradient descent leaves a deviation of at most `step_rounding`.

    Args:
        params: θ_t.
        gradient: ∇L(θ_t), shaped like it.
        after: θ_{t+1}.
    """
    with jax.numpy_dtype_promotion("standard"):  # a gradient in float64 is wider than float32, which strict refuses
        wide = jnp.result_type(*jax.tree.leaves(gradient), jnp.float32)
    moved = jax.tree.map(lambda a, b: a.astype(wide) - b.astype(wide), params, after)
    gradient = jax.tree.map(lambda leaf: leaf.astype(wide), gradient)
    length, steepness = optax.tree.norm(moved), optax.tree.norm(gradient, squared=True)
    size = jnp.asarray(optax.tree.vdot(moved, gradient) / steepness)
    off = optax.tree.norm(jax.tree.map(lambda a, g: a - size * g, moved, gradient))
    spacing = optax.tree.norm(jax.tree.map(lambda leaf: _spacing(leaf).astype(wide), after))
    unit = max(float(jnp.finfo(leaf.dtype).eps) / 2 for leaf in jax.tree.leaves(after))
    still = length == 0
    safe = jnp.where(still, jnp.ones_like(length), length)
    rounding = jnp.where(still, jnp.full_like(length, jnp.inf), 0.5 * spacing / safe + 4 * unit)
    return StepMeasures(size, off / safe, rounding)


def _spacing(leaf: Array) -> Array:
    """Return the distance of each entry to the next number of its type."""
    size = jnp.abs(leaf)
    return jnp.nextafter(size, jnp.full_like(size, jnp.inf)) - size


def metrics_of(
    loss: Array, gradient: Params, params: Params, initial: Params, step: StepMeasures | None = None
) -> Metrics:
    """Return the metrics of a step from loss and gradient at θ_t; of a step that is not known its measures are NaN."""
    drift = optax.tree.norm(jax.tree.map(jnp.subtract, params, initial))
    unknown = jnp.full_like(drift, jnp.nan)
    return Metrics(
        loss, optax.tree.norm(gradient, squared=True), drift, *(step or StepMeasures(unknown, unknown, unknown))
    )


def train_step(
    state: State,
    batch: tuple[Any, Any],
    initial: Params,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
) -> tuple[State, Metrics]:
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
    checks.instance("objective", objective, Objective, OBJECTIVE)
    checks.instance("optimizer", optimizer, optax.GradientTransformation, _OPTAX)
    loss, gradient = objective.value_and_gradient(state.params, *batch)
    seen = {"value": loss, "value_fn": lambda q: objective.value(q, *batch)}
    losses_fn = lambda q: objective.loss.per_sample(*objective.rows(q, *batch))  # noqa: E731
    params, opt_state = descend(state.params, state.opt_state, gradient, optimizer, **seen, losses_fn=losses_fn)
    metrics = metrics_of(loss, gradient, state.params, initial, measure_step(state.params, gradient, params))
    return State(params, opt_state, state.key, state.step + 1), metrics


def descend(
    params: Params,
    opt_state: optax.OptState,
    gradient: Params,
    optimizer: optax.GradientTransformation,
    *,
    value: Array,
    value_fn: Callable[[Params], Array],
    losses_fn: Callable[[Params], Array],
) -> tuple[Params, optax.OptState]:
    """Return parameters and optimiser state after one update.

    Args:
        params: θ.
        opt_state: the optimiser's state.
        gradient: ∇L(θ), or that of a batch.
        optimizer: an optax transformation; one with extra arguments is handed `value`, `grad` and `value_fn`.
        value: the loss at θ, of the same samples.
        value_fn: from θ to that loss; costs nothing where the optimiser does not call it.
        losses_fn: from θ to the losses of these samples, for a `StepRule` that asks for them.
    """
    extra: dict[str, Any] = {}
    if isinstance(optimizer, optax.GradientTransformationExtraArgs):
        extra = {"value": value, "grad": gradient, "value_fn": value_fn}
        if isinstance(optimizer, StepRule) and optimizer.losses:
            extra["losses_fn"] = losses_fn
    with jax.default_matmul_precision("highest"):
        updates, opt_state = optimizer.update(gradient, opt_state, params, **extra)
    return optax.apply_updates(params, updates), opt_state


@partial(jax.jit, static_argnames=("objective", "optimizer", "epochs"), donate_argnames=("state",))
def train_epochs(
    state: State,
    batch: tuple[Any, Any],
    initial: Params,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    epochs: int,
) -> tuple[State, Metrics]:
    """Run full-batch epochs in one `lax.scan`; the state's buffers are donated.

    Returns:
        The state after `epochs` steps and the metrics before each of them, every field of shape (epochs,).
    """
    checks.whole("epochs", epochs, least=1)

    def body(carry: State, _: None) -> tuple[State, Metrics]:
        return train_step(carry, batch, initial, objective=objective, optimizer=optimizer)

    return jax.lax.scan(body, state, length=epochs)


@partial(jax.jit, static_argnames=("objective",))
def evaluate(params: Params, batch: tuple[Any, Any], initial: Params, *, objective: Objective) -> Metrics:
    """Return the metrics at `params` without a step: those of the epoch after the last one."""
    checks.instance("objective", objective, Objective, OBJECTIVE)
    loss, gradient = objective.value_and_gradient(params, *batch)
    return metrics_of(loss, gradient, params, initial)
