"""Runs on mini-batches: what advances a state, by whole passes or step by step, and measures all data between."""

import time
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lplr_jax import checks
from lplr_jax.losses import Objective
from lplr_jax.training.batches import (
    Sampling,
    batches_of,
    exact_metrics,
    next_gradient,
    shuffled_epoch,
    train_batches,
)
from lplr_jax.training.steps import OBJECTIVE, Metrics, State, StepMeasures, measure_step
from lplr_jax.types import Params


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
        exact = partial(exact_metrics, objective=objective, micro_batch=micro_batch)
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
            exact_metrics, data=data, initial=initial, objective=objective, micro_batch=micro_batch or min(n, 1024)
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
