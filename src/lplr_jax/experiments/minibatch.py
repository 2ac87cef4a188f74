"""Mini-batch epochs with exact diagnostics between them: what the one loop advances and evaluates."""

import time
from functools import lru_cache, partial
from statistics import median
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lplr_jax.losses import Objective
from lplr_jax.training import ExactMetrics, ShuffledState, evaluate_exactly, shuffled_epoch
from lplr_jax.types import Params

Schedule = Literal["cosine", "constant"]


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
    """Advances a `ShuffledState` by epochs and measures between them; holds no state of the run but timings."""

    def __init__(
        self,
        data: tuple[Any, Array],
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
        epoch = partial(shuffled_epoch, objective=objective, optimizer=optimizer, batch_size=batch_size)
        exact = partial(evaluate_exactly, objective=objective, micro_batch=micro_batch)
        if together:
            epoch = jax.jit(jax.vmap(epoch, in_axes=(0, None)), donate_argnums=0)
            exact = jax.vmap(exact, in_axes=(0, None, 0))
        self._epoch, self._exact = epoch, exact
        self._data, self._initial, self._every = data, initial, every
        self._last: tuple[Any, ExactMetrics] | None = None
        self.seconds: dict[str, list[float]] = {"training": [], "diagnostics": []}

    def evaluate(self, params: Params) -> ExactMetrics:
        """Return the exact metrics at one point, on the host; those of the last point are remembered."""
        first = jax.tree.leaves(params)[0]
        if self._last is None or self._last[0] is not first:
            began = time.perf_counter()
            metrics = jax.device_get(self._exact(params, self._data, self._initial))
            self.seconds["diagnostics"].append(time.perf_counter() - began)
            self._last = first, metrics
        return self._last[1]

    def advance(self, state: ShuffledState, epochs: int) -> tuple[ShuffledState, ExactMetrics]:
        """Run a number of epochs.

        Returns:
            The state after them, and the metrics before each along the last axis, NaN where none were wanted.
        """
        metrics: list[ExactMetrics] = []
        start = int(np.min(state.epoch))
        for epoch in range(start, start + epochs):
            # The state is donated, so what is measured before it goes on is taken to the host first.
            known = self.evaluate(state.params) if epoch % self._every == 0 or not metrics else None
            metrics.append(known or ExactMetrics(*(np.full_like(field, np.nan) for field in metrics[0])))
            began = time.perf_counter()
            state = jax.block_until_ready(self._epoch(state, self._data))
            self.seconds["training"].append(time.perf_counter() - began)
        return state, ExactMetrics(*(np.stack(fields, axis=-1) for fields in zip(*metrics, strict=True)))

    def passes(self) -> Pass:
        """Return the seconds of one pass of each kind, NaN where there was none."""
        return Pass(*(median(spent) if spent else float("nan") for spent in self.seconds.values()))
