"""Steps on shuffled mini-batches, and loss and gradient of all data between them.

The latter are a pass of their own, summed over micro-batches in float64.
"""

import time
from collections.abc import Callable
from functools import lru_cache, partial
from statistics import median
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lplr_jax import checks
from lplr_jax.layouts import plain_convolutions
from lplr_jax.losses import Objective
from lplr_jax.training.steps import OBJECTIVE, Metrics, State, StepMeasures, descend, measure_step
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
        return _evaluate_exactly(params, data, initial, objective=objective, micro_batch=micro_batch)[0]


@partial(jax.jit, static_argnames=("objective", "micro_batch"))
def _evaluate_exactly(
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


class Pass(NamedTuple):
    """Seconds of one pass over the data: the median over the run, which the first, compiling one does not move."""

    training: float
    diagnostics: float


class MiniBatches:
    """Advances a `State` by epochs of mini-batches and measures between them; of the run it holds timings alone."""

    def __init__(
        self,
        data: tuple[Any, Any],
        initial: Params,
        *,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        batch_size: int,
        micro_batch: int,
        every: int = 1,
        together: bool = False,
    ) -> None:
        """Set up.

        Args:
            data: inputs (n, ...) and targets (n, c), on the device.
            initial: θ_0.
            objective: what is minimised.
            optimizer: updated once a batch.
            batch_size: samples of a training batch.
            micro_batch: samples at a time of the exact diagnostics.
            every: epochs between diagnostics.
            together: states and `initial` hold several seeds along a leading axis, trained in one program.
        """
        checks.instance("objective", objective, Objective, OBJECTIVE)
        epoch = partial(shuffled_epoch, objective=objective, optimizer=optimizer, batch_size=batch_size)
        exact = partial(_evaluate_exactly, objective=objective, micro_batch=micro_batch)
        measure = measure_step
        if together:
            epoch = jax.jit(jax.vmap(epoch, in_axes=(0, None)), donate_argnums=0)
            exact = jax.vmap(exact, in_axes=(0, None, 0))
            measure = jax.vmap(measure)
        self._epoch, self._exact, self._measure = epoch, exact, jax.jit(measure)
        self._data, self._initial, self._every = data, initial, every
        self._last: tuple[Any, Metrics, Params] | None = None
        self.seconds: dict[str, list[float]] = {"training": [], "diagnostics": []}

    def evaluate(self, params: Params) -> Metrics:
        """Return the exact metrics at one point, on the host; those of the last point are remembered."""
        first = jax.tree.leaves(params)[0]
        if self._last is None or self._last[0] is not first:
            began = time.perf_counter()
            with jax.enable_x64(True):
                metrics, gradient = self._exact(params, self._data, self._initial)
                metrics = jax.device_get(metrics)
            self.seconds["diagnostics"].append(time.perf_counter() - began)
            self._last = first, metrics, gradient
        return self._last[1]

    def _step(self, before: Params, after: Params) -> StepMeasures:
        """Measure the change over an epoch that began at the point evaluated last."""
        assert self._last is not None
        with jax.enable_x64(True):
            return jax.device_get(self._measure(before, self._last[2], after))

    def advance(self, state: State, epochs: int) -> tuple[State, Metrics]:
        """Run a number of epochs.

        Returns:
            The state after them, and the metrics before each along the last axis, NaN where none were wanted. A step
            of the record is an epoch: its update is that of all batches together.
        """
        metrics: list[Metrics] = []
        start = int(np.min(state.step))
        for epoch in range(start, start + epochs):
            # The state is donated, so what is measured before it goes on is taken to the host first.
            known = self.evaluate(state.params) if epoch % self._every == 0 or not metrics else None
            before = jax.tree.map(jnp.copy, state.params) if known else None
            began = time.perf_counter()
            state = jax.block_until_ready(self._epoch(state, self._data))
            self.seconds["training"].append(time.perf_counter() - began)
            if known:
                known = known._replace(**self._step(before, state.params)._asdict())
            metrics.append(known or jax.tree.map(lambda field: np.full_like(field, np.nan), metrics[0]))
        return state, jax.tree.map(lambda *fields: np.stack(fields, axis=-1), *metrics)

    def passes(self) -> Pass:
        """Return the seconds of one pass of each kind, NaN where there was none."""
        return Pass(*(median(spent) if spent else float("nan") for spent in self.seconds.values()))


class BatchSteps:
    """Advances a `State` by single steps on mini-batches; all data is measured at the first two steps of every pass."""

    def __init__(
        self,
        data: tuple[Any, Any],
        initial: Params,
        *,
        objective: Objective,
        optimizer: optax.GradientTransformation,
        batch_size: int,
        micro_batch: int | None = None,
        sampling: Sampling = "reshuffle",
    ) -> None:
        """Set up; see `MiniBatches` and `train_batches`."""
        n = data[1].shape[0]
        self._count = batches_of(n, batch_size)
        settings = {"objective": objective, "optimizer": optimizer, "batch_size": batch_size, "sampling": sampling}
        self._train = partial(train_batches, data=data, **settings)
        self._exact = partial(
            _evaluate_exactly, data=data, initial=initial, objective=objective, micro_batch=micro_batch or min(n, 1024)
        )
        self._measure = jax.jit(measure_step)
        # What a step of passes that use every sample once is taken on, no statement asks for.
        self._gradient = None
        if sampling != "reshuffle":
            settings = {"objective": objective, "batch_size": batch_size, "sampling": sampling}
            self._gradient = partial(next_gradient, data=data, **settings)

    def measured(self, steps: np.ndarray) -> np.ndarray:
        """Return for steps whether all data is measured there."""
        return steps % self._count <= 1

    def _at(self, params: Params) -> tuple[Metrics, Params]:
        with jax.enable_x64(True):
            metrics, gradient = self._exact(params)
            return jax.device_get(metrics)._replace(accuracy=None), gradient

    def evaluate(self, params: Params) -> Metrics:
        """Return the exact metrics at one point, on the host."""
        return self._at(params)[0]

    def advance(self, state: State, steps: int) -> tuple[State, Metrics]:
        """Take steps.

        Returns:
            The state after them, and the metrics before each, NaN where none were wanted.
        """
        start = int(state.step)
        columns: dict[str, np.ndarray] = {}
        at = start
        while at < start + steps:
            end = min(start + steps, (at // self._count + 1) * self._count)
            if at == start or at % self._count <= 1:
                state, told = self._seen(state)
                for name, value in told.items():
                    columns.setdefault(name, np.full(steps, np.nan))[at - start] = value
                at += 1
                continue
            length = 1 << ((end - at).bit_length() - 1)  # powers of two, so that few programs are compiled
            state, at = self._train(state, steps=length), at + length
        return state, Metrics(**columns)

    def _seen(self, state: State) -> tuple[State, dict[str, Any]]:
        """Take one step; return the state after it, and what is measured before it and of it."""
        metrics, gradient = self._at(state.params)
        own = None if self._gradient is None else self._gradient(state)
        before = jax.tree.map(jnp.copy, state.params)
        state = self._train(state, steps=1)
        told = {name: value for name, value in metrics._asdict().items() if value is not None}
        with jax.enable_x64(True):
            told |= jax.device_get(self._measure(before, gradient, state.params))._asdict()
            if own is not None:
                own = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), own)
                found = jax.device_get((self._measure(before, own, state.params), optax.tree.norm(own, squared=True)))
                told |= {f"batch_{name}": value for name, value in found[0]._asdict().items()}
                told["batch_grad_sq_norm"] = found[1]
        return state, told
