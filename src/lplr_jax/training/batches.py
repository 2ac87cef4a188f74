"""Steps on shuffled mini-batches, and loss and gradient of all data between them.

The latter are a pass of their own, summed over micro-batches in float64.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lplr_jax import checks
from lplr_jax.layouts import plain_convolutions
from lplr_jax.losses import Objective
from lplr_jax.training.steps import OBJECTIVE, Metrics, State, descend
from lplr_jax.types import Params


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
    state: State,
    data: tuple[Any, Any],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_size: int,
) -> State:
    """Run one epoch of mini-batches in one `lax.scan`; the state's buffers are donated.

    The order is a permutation drawn from the state's key and its epoch. Where `batch_size` does not divide n, the last
    batch holds the n mod batch_size samples that are left, and its gradient is the mean over those alone: every sample
    is used once an epoch, and counts for more in a short batch.

    A batch of all samples is one batch, in the order of the data and without weights.

    Args:
        state: parameters, optimiser state, key and passes done.
        data: inputs (n, ...) and targets (n, c), on the device.
        objective: what is minimised; a batch gives `Objective.batch_value`.
        optimizer: an optax transformation, updated once a batch.
        batch_size: samples of a batch.

    Returns:
        The state after the epoch.
    """
    x, y = data
    n = y.shape[0]
    if batches_of(n, batch_size) == 1:
        value, gradient = objective.value_and_gradient(state.params, x, y)
        params, opt_state = descend(
            *state[:2],
            gradient,
            optimizer,
            value=value,
            value_fn=lambda q: objective.value(q, x, y),
            losses_fn=lambda q: objective.loss.per_sample(*objective.rows(q, x, y)),
        )
        return State(params, opt_state, state.key, state.step + 1)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    body = _batch_step(data, objective=objective, optimizer=optimizer)
    batches = _filled(jax.random.permutation(key, n), batch_size)
    (params, opt_state), _ = jax.lax.scan(body, (state.params, state.opt_state), batches)
    return State(params, opt_state, state.key, state.step + 1)


Sampling = Literal["reshuffle", "independent", "partition"]
"""Passes in which every sample comes once; batches that are each drawn anew, without replacement within one; or the
blocks of one partition of the samples, of which every step draws one, each as likely as the others."""


def partition_of(key: Int[Array, "..."], n: int, size: int) -> Int[Array, "k b"]:
    """Return the rows of every block of the partition that `sampling="partition"` draws from, fixed over a run.

    Args:
        key: data of the seed's random key, as in `State`.
        n: samples.
        size: samples of a block.

    Raises:
        ValueError: for a size that does not divide n: the mean gradient of a short block counts its samples for more,
            and the expectation over blocks is not the gradient of all data.
    """
    count = batches_of(n, size)
    if n % size:
        raise ValueError(f"sampling partition wants batches of one size: {size} does not divide n = {n}")
    # Steps fold in their own number, which stays below 2^31.
    return jax.random.permutation(jax.random.fold_in(jax.random.wrap_key_data(key), 2**32 - 1), n).reshape(count, size)


@partial(
    jax.jit, static_argnames=("objective", "optimizer", "batch_size", "steps", "sampling"), donate_argnames=("state",)
)
def train_batches(
    state: State,
    data: tuple[Any, Any],
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    batch_size: int,
    steps: int,
    sampling: Sampling = "reshuffle",
) -> State:
    """Take steps on shuffled mini-batches, within one pass over the data; the state's buffers are donated.

    The batches of pass e, steps e k to (e + 1) k - 1 for k batches a pass, are those of `shuffled_epoch`.

    Args:
        state: parameters, optimiser state, key and steps done.
        data: inputs (n, ...) and targets (n, c), on the device.
        objective: what is minimised.
        optimizer: an optax transformation, updated once a batch.
        batch_size: samples of a batch.
        steps: how many; the caller sees to it that they do not pass the end of the pass.
        sampling: "independent" draws the batch of step t from the seed's key and t alone, b of n without replacement;
            "partition" likewise one of the blocks of `partition_of`.

    Returns:
        The state after them.
    """
    n = data[1].shape[0]
    count = batches_of(n, batch_size)
    whole_key = jax.random.wrap_key_data(state.key)
    body = _batch_step(data, objective=objective, optimizer=optimizer)
    if sampling != "reshuffle":
        rows_of = _rows_of(state.key, n, batch_size, sampling)

        def drawn(carry: tuple[Params, optax.OptState], step: Array) -> tuple[tuple[Params, optax.OptState], None]:
            return body(carry, (rows_of(step), jnp.ones(batch_size, jnp.float32)))

        places = state.step + jnp.arange(steps, dtype=state.step.dtype)
        (params, opt_state), _ = jax.lax.scan(drawn, (state.params, state.opt_state), places)
        return State(params, opt_state, state.key, state.step + steps)
    key = jax.random.fold_in(whole_key, state.step // count)
    order, weights = _filled(jax.random.permutation(key, n), batch_size)
    start = state.step % count
    cut = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=steps)
    batches = (cut(order), cut(weights))
    (params, opt_state), _ = jax.lax.scan(body, (state.params, state.opt_state), batches)
    return State(params, opt_state, state.key, state.step + steps)


def _rows_of(
    key: Int[Array, "..."], n: int, size: int, sampling: Sampling
) -> Callable[[Int[Array, ""]], Int[Array, " b"]]:
    """Return the function from a step to the samples of its batch, for batches that are drawn anew."""
    blocks = partition_of(key, n, size) if sampling == "partition" else None

    def rows(step: Int[Array, ""]) -> Int[Array, " b"]:
        own = jax.random.fold_in(jax.random.wrap_key_data(key), step)
        if blocks is None:
            return jax.random.choice(own, n, (size,), replace=False)
        return blocks[jax.random.randint(own, (), 0, blocks.shape[0])]

    return rows


@partial(jax.jit, static_argnames=("objective", "batch_size", "sampling"))
def next_gradient(
    state: State, data: tuple[Any, Any], *, objective: Objective, batch_size: int, sampling: Sampling
) -> Params:
    """Return the gradient of the batch that the next step of `train_batches` takes, for batches that are drawn anew."""
    n = data[1].shape[0]
    batch = _rows_of(state.key, n, batch_size, sampling)(state.step), jnp.ones(batch_size, jnp.float32)
    return _batch_gradient(data, objective=objective)(state.params, batch)[0][1]


def _batch_gradient(data: tuple[Any, Any], *, objective: Objective) -> Callable[..., Any]:
    """Return the function from parameters and a batch, rows and weights, to value and gradient, and its arguments."""
    x, y = data
    gradient_of = plain_convolutions(jax.value_and_grad(partial(objective.batch_value, n=y.shape[0])))

    def of(params: Params, batch: tuple[Array, Array]) -> Any:
        rows, weights = batch
        given = jax.tree.map(lambda a: a[rows], x), y[rows], weights.astype(y.dtype)
        with jax.default_matmul_precision("highest"):
            return gradient_of(params, *given), given

    return of


def _batch_step(
    data: tuple[Any, Any], *, objective: Objective, optimizer: optax.GradientTransformation
) -> Callable[[tuple[Params, optax.OptState], tuple[Array, Array]], tuple[tuple[Params, optax.OptState], None]]:
    """Return the body of a scan over batches: rows of the data, and their weights."""
    value_of = partial(objective.batch_value, n=data[1].shape[0])
    gradient_of = _batch_gradient(data, objective=objective)

    def body(
        carry: tuple[Params, optax.OptState], batch: tuple[Array, Array]
    ) -> tuple[tuple[Params, optax.OptState], None]:
        (value, gradient), given = gradient_of(carry[0], batch)
        return descend(
            *carry,
            gradient,
            optimizer,
            value=value,
            value_fn=lambda q: value_of(q, *given),
            # What fills a batch up repeats its first sample, which the mean of the losses can bear.
            losses_fn=lambda q: objective.loss.per_sample(*objective.rows(q, *given[:2])),
        ), None

    return body


def evaluate_exactly(
    params: Params, data: tuple[Any, Any], initial: Params, *, objective: Objective, micro_batch: int
) -> Metrics:
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
    checks.instance("objective", objective, Objective, OBJECTIVE)
    with jax.enable_x64(True):
        return exact_metrics(params, data, initial, objective=objective, micro_batch=micro_batch)[0]


@partial(jax.jit, static_argnames=("objective", "micro_batch"))
def exact_metrics(
    params: Params, data: tuple[Any, Any], initial: Params, *, objective: Objective, micro_batch: int
) -> tuple[Metrics, Params]:
    """Return the metrics, and the gradient in float64."""
    x, y = data
    n, wide = y.shape[0], jnp.float64

    def weighted(point: Params, inputs: Any, targets: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
        outputs, targets = objective.rows(point, inputs, targets)
        right = jnp.argmax(outputs, axis=1) == jnp.argmax(targets, axis=1)
        if targets.shape[1] == 1:
            right = (outputs[:, 0] > 0) == (targets[:, 0] > 0)
        exact = objective.loss.per_sample(outputs.astype(wide), targets.astype(wide))
        total = jnp.sum(weights.astype(wide) * exact)
        narrow = jnp.sum(weights * objective.loss.per_sample(outputs, targets))
        return narrow, (total, jnp.sum(weights.astype(wide) * right.astype(wide)))

    gradient_of = plain_convolutions(jax.grad(weighted, has_aux=True))

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
    unknown = jnp.full((), jnp.nan, wide)
    squared = optax.tree.norm(gradient, squared=True) / s**2
    metrics = Metrics(total / s, squared, optax.tree.norm(moved), unknown, unknown, unknown, right / n)
    return metrics, jax.tree.map(lambda leaf: leaf / s, gradient)


Schedule = Literal["cosine", "constant"]
"""How the step size goes over a run."""


@lru_cache(maxsize=16)
def momentum_sgd(
    learning_rate: float, momentum: float, *, schedule: Schedule, steps: int
) -> optax.GradientTransformation:
    """Return SGD with heavy-ball momentum, its step size fixed or falling to zero along half a cosine.

    Compiled code is found again by the identity of the optimiser: one object for each setting.

    Args:
        learning_rate: η at the first step.
        momentum: weight of the last update in the next one; 0 for none.
        schedule: "cosine" for η (1 + cos(π t / steps)) / 2 at step t, or "constant".
        steps: steps of the whole run.
    """
    rate: optax.ScalarOrSchedule = learning_rate
    if schedule == "cosine":
        cosine = optax.cosine_decay_schedule(learning_rate, steps)
        # A count in float32 is exact up to 2^24 steps, and nothing is promoted.
        rate = lambda count: jnp.asarray(cosine(jnp.asarray(count, jnp.float32)), jnp.float32)  # noqa: E731
    return optax.sgd(rate, momentum=momentum or None)
