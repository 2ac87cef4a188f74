"""The one loop: epochs in compiled chunks, probes and checkpoints between chunks, everything into one record."""

import itertools
import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lplr_jax import checks
from lplr_jax.ntk.memory import bytes_of, total_memory
from lplr_jax.parameters import count_parameters
from lplr_jax.runs import interrupt
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.environment import describe_environment
from lplr_jax.runs.session import Judging, Observer, Silent
from lplr_jax.theory import Verdict
from lplr_jax.training import EpochMetrics, ExactMetrics, ShuffledState, TrainState
from lplr_jax.types import Params

_LOG = logging.getLogger(__name__)

MOST_PROBES = 10_000
"""Most kernel probes of a run; every pair of them is compared, so this is 800 MB. Calibrated."""

Probe = Callable[[Params, int], Mapping[str, float]]
"""Measures at one epoch: parameters and epoch to values by record name."""


State = TrainState | ShuffledState
Metrics = EpochMetrics | ExactMetrics
Advance = Callable[[Any, int], tuple[Any, Any]]
"""From a state and a number of epochs to the state after them and the metrics before each."""


@runtime_checkable
class Remembering(Protocol):
    """A probe whose earlier measurements decide later ones, so that a resumed run has to give them back."""

    def remembered(self, epoch: int) -> Mapping[str, np.ndarray]:
        """Return what the probe of `epoch` keeps, as arrays by name."""
        ...

    def recall(self, epoch: int, arrays: Mapping[str, np.ndarray], like: Params) -> None:
        """Take back what `remembered` returned, for every earlier epoch in order; `like` has the parameters' shapes."""


@runtime_checkable
class Replaying(Protocol):
    """An `advance` that has its steps from elsewhere, and has to be told where a resumed run goes on."""

    def __call__(self, state: Any, epochs: int) -> tuple[Any, Any]:
        """Return the state after a number of epochs, and the metrics before each."""
        ...

    def resume(self, epoch: int) -> None:
        """Be told that the run goes on from the saved `epoch`."""


class Replay:
    """The part of one run in a training of several, given out chunk by chunk; an `advance`."""

    def __init__(self, chunks: Mapping[int, tuple[Any, Any]], index: int) -> None:
        self._chunks, self._index, self._epoch = chunks, index, 0

    def resume(self, epoch: int) -> None:
        """Go on behind an epoch."""
        self._epoch = epoch

    def __call__(self, state: Any, epochs: int) -> tuple[Any, Any]:
        """Return the state after a number of epochs, and the metrics before each."""
        del state
        self._epoch += epochs
        return jax.tree.map(lambda leaf: leaf[self._index], self._chunks[self._epoch])


MOST = {"width": 10**6, "depth": 1_000, "epochs": 10**7, "seed": 2**32 - 1}
"""Largest values of some fields: beyond them nothing fits a machine, or two seeds would give the same keys."""


def check_learning_rate(name: str, value: float) -> None:
    """Raise ValueError for a step size that is not positive and finite in the precision of training."""
    tiny, largest = (float(getattr(np.finfo(np.float32), end)) for end in ("tiny", "max"))
    if not tiny <= checks.number(name, value, above=0) <= largest:
        raise ValueError(f"{name} must be a finite number > 0 in float32, {tiny:.2g} to {largest:.2g}, got {value}")


def check_memory(params: Params, width: int) -> None:
    """Raise ValueError where four copies of the parameters, as training needs, exceed the machine; shapes will do."""
    needed, there = 4 * bytes_of(params), total_memory()
    if needed > there:
        raise ValueError(
            f"width = {width} makes {count_parameters(params):,} parameters; training needs {needed / 2**30:,.0f} GiB, "
            f"this machine has {there / 2**30:,.0f}: lower --width"
        )


def probe_epochs(epochs: int, every: int) -> tuple[int, ...]:
    """Return the epochs at which the kernel is probed: every `every` epochs and both ends.

    Raises:
        ValueError: if there is no epoch to run, or the interval is not positive.
    """
    checks.whole("epochs", epochs, least=1)
    checks.whole("probe_every", every, least=1)
    if epochs // every > MOST_PROBES:
        raise ValueError(
            f"probe_every must be at least {-(-epochs // MOST_PROBES)} for epochs = {epochs}, "
            f"or there are more than {MOST_PROBES:,} probes; got {every}"
        )
    return tuple(sorted({*range(0, epochs + 1, every), epochs}))


def spread(epochs: Sequence[int], count: int) -> frozenset[int]:
    """Return `count` of the epochs, evenly spread with both ends; all of them where there are fewer."""
    checks.whole("count", count, least=0)
    places = np.linspace(0, len(epochs) - 1, min(count, len(epochs))).round().astype(int)
    return frozenset(epochs[place] for place in places)


@dataclass(frozen=True)
class RunResult:
    """What the loop measured.

    Attributes:
        arrays: series and probes by record name; NaN from the epoch at which the run diverged.
        params: the last parameters.
        seconds: wall-clock time spent in training, in probes and in checkpoints, earlier processes included.
        resumed_at: epochs from which later processes went on.
    """

    arrays: dict[str, np.ndarray]
    params: Params
    seconds: dict[str, float]
    resumed_at: tuple[int, ...] = ()


class _Progress:
    """How far a run is: its state, and what was measured up to there."""

    def __init__(self, state: State, probes_at: Sequence[int], measured_every: int) -> None:
        self.state, self._probes_at = state, probes_at
        self.series: dict[str, np.ndarray] = {}
        self._unmeasured = np.arange(probes_at[-1] + 1) % measured_every > 0
        self._unmeasured[list(probes_at)] = False
        self.probes: dict[str, np.ndarray] = {}
        self.seconds = {"training": 0.0, "probes": 0.0, "checkpoints": 0.0}
        self.resumed_at: tuple[int, ...] = ()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of the body to the seconds spent."""
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    def store(self, start: int, metrics: Metrics) -> None:
        """Put metrics in their places, from epoch `start` on."""
        for name, values in metrics._asdict().items():
            values = np.atleast_1d(np.asarray(values, np.float64))
            place = self.series.setdefault(name, np.full(self._probes_at[-1] + 1, np.nan))
            place[start : start + values.size] = values

    def store_probe(self, index: int, values: Mapping[str, float]) -> None:
        """Put what the probe of one place measured into the arrays of all."""
        for name, value in values.items():
            self.probes.setdefault(name, np.full(len(self._probes_at), np.nan))[index] = value

    def arrays(self, index: int) -> dict[str, np.ndarray]:
        """Return what was measured up to the probe of one place, by record name."""
        at = np.asarray(self._probes_at[: index + 1], np.int64)
        series = {name: values[: at[-1] + 1] for name, values in self.series.items()}
        probes = {name: values[: index + 1] for name, values in self.probes.items()}
        return {"epoch": np.arange(at[-1] + 1), "probe_epoch": at, **series, **probes}

    def cut_at_divergence(self, epoch: int) -> bool:
        """Return whether a metric up to `epoch` or a parameter is not finite; everything from there on becomes NaN."""
        finite = np.logical_and.reduce([np.isfinite(values[: epoch + 1]) for values in self.series.values()])
        finite |= self._unmeasured[: epoch + 1]
        finite[epoch] &= all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(self.state.params)))
        if finite.all():
            return False
        for values in self.series.values():
            values[int(finite.argmin()) :] = np.nan
        return True

    def save(self, checkpoints: Checkpoints, epoch: int, probe: Probe) -> None:
        """Write a checkpoint."""
        arrays = {f"{kind}-{name}": a for kind in ("series", "probes") for name, a in getattr(self, kind).items()}
        remembered = probe.remembered(epoch) if isinstance(probe, Remembering) else {}
        facts = {"seconds": self.seconds, "resumed_at": self.resumed_at, "environment": describe_environment()}
        checkpoints.save(epoch, self.state, arrays, remembered=remembered, facts=facts)

    def resume(self, checkpoints: Checkpoints, probe: Probe) -> int:
        """Take up the last saved state.

        Returns:
            The place among the probes with which to go on: 0 where nothing is saved.

        Raises:
            ValueError: if it was saved by a run with other probes.
        """
        saved = checkpoints.latest(self.state)
        if saved is None:
            return 0
        if saved.epoch not in self._probes_at:
            raise ValueError(f"the checkpoint is of epoch {saved.epoch}, at which this run has no probe")
        self.state = saved.state
        for name, array in saved.arrays.items():
            kind, _, key = name.partition("-")
            getattr(self, kind)[key] = array.copy()
        if isinstance(probe, Remembering):
            for epoch, arrays in saved.memory.items():
                probe.recall(epoch, arrays, self.state.params)
        self.seconds |= saved.facts["seconds"]
        self.resumed_at = (*saved.facts["resumed_at"], saved.epoch)
        _warn_of_changes(saved.facts["environment"])
        return self._probes_at.index(saved.epoch) + 1


def _warn_of_changes(before: Mapping[str, Any]) -> None:
    """Say what is no longer as it was when the checkpoint was written: then bits may differ."""
    now = json.loads(json.dumps(describe_environment()))
    names = [name for name in now if name in before and before[name] != now[name]]
    if names:
        changed = "; ".join(f"{name} {before[name]} then, {now[name]} now" for name in names)
        _LOG.warning("not as it was when the run was interrupted, so last digits may differ: %s", changed)


def run_training(
    state: State,
    *,
    probes_at: Sequence[int],
    advance: Advance,
    evaluate: Callable[[Params], Metrics],
    probe: Probe,
    observer: Observer | None = None,
    measured_every: int = 1,
    checkpoints: Checkpoints | None = None,
    judge: Callable[[Mapping[str, np.ndarray]], Sequence[Verdict]] | None = None,
) -> RunResult:
    """Train from probe to probe, and measure every epoch and every probe.

    Args:
        state: the state at epoch 0; donated to `advance`.
        probes_at: epochs to probe, ascending, from 0 to the last epoch.
        advance: runs a number of epochs and returns the metrics before each; everything that changes from step to step
            (keys, the place in a schedule) is in the state, or it is `Replaying`.
        evaluate: the metrics at given parameters, for the epoch after the last step.
        probe: what to measure at a probe; one that remembers is `Remembering`.
        observer: told of every chunk and probe, once they are saved.
        measured_every: epochs between those at which `advance` measures; its metrics are NaN at the others.
        checkpoints: where the state is saved after every probe, and from where it goes on; None saves nothing.
        judge: from what was measured so far, by record name, to verdicts, for an observer that is `Judging`.

    Returns:
        The measurements. A metric or parameter that is not finite ends the run at its epoch; series and probes from
        there on are NaN.

    Raises:
        Interrupted: on SIGTERM or SIGINT, once the chunk at hand is saved; on a second one, at once.
        OSError: if a checkpoint cannot be written or read.
    """
    observer = observer or Silent()
    last = probes_at[-1]
    so_far = _Progress(state, probes_at, measured_every)
    start = so_far.resume(checkpoints, probe) if checkpoints else 0
    if start:
        observer.resume(probes_at[start - 1])
        if isinstance(advance, Replaying):
            advance.resume(probes_at[start - 1])
    for index, epoch in enumerate(probes_at[start:], start):
        waits = interrupt.deferred(f"epoch {epoch} of {last} is saved") if checkpoints else nullcontext()
        with waits:
            if index:
                before = probes_at[index - 1]
                with so_far.timed("training"):
                    so_far.state, metrics = advance(so_far.state, epoch - before)
                    so_far.store(before, jax.device_get(metrics))
            so_far.store(epoch, jax.device_get(evaluate(so_far.state.params)))
            if so_far.cut_at_divergence(epoch):
                break
            observer.chunk(epoch, float(so_far.series["loss"][epoch]))
            with so_far.timed("probes"):
                values = probe(so_far.state.params, epoch)
            so_far.store_probe(index, values)
            if checkpoints:
                with so_far.timed("checkpoints"):
                    so_far.save(checkpoints, epoch, probe)
            if judge and isinstance(observer, Judging):
                observer.standing(epoch, judge(so_far.arrays(index)))
            observer.probe(epoch, values)
    return RunResult(so_far.arrays(len(probes_at) - 1), so_far.state.params, so_far.seconds, so_far.resumed_at)


def replay(states: Any, chunks: Sequence[int], advance: Advance, *, count: int) -> list[Advance]:
    """Train several runs as one program, and return for each what replays its part to `run_training`.

    The states at every probe are kept on the host: probes times p numbers a run.

    Args:
        states: the states at epoch 0, every leaf with a leading axis of `count` runs.
        chunks: epochs from probe to probe.
        advance: runs a number of epochs for all, on and to such states and metrics.
        count: number of runs.
    """
    done: dict[int, tuple[Any, Any]] = {}
    for epochs, end in zip(chunks, itertools.accumulate(chunks), strict=True):
        states, metrics = advance(states, epochs)
        done[end] = jax.device_get((states, metrics))
    return [Replay(done, index) for index in range(count)]
