"""The one loop: epochs in compiled chunks, probes between chunks, everything into one record."""

import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lplr_jax.models import Params
from lplr_jax.training import EpochMetrics, ExactMetrics, ShuffledState, TrainState

Probe = Callable[[Params, int], Mapping[str, float]]
"""Measures at one epoch: parameters and epoch to values by record name."""


State = TrainState | ShuffledState
Metrics = EpochMetrics | ExactMetrics
Advance = Callable[[Any, int], tuple[Any, Any]]
"""From a state and a number of epochs to the state after them and the metrics before each."""


@runtime_checkable
class Observer(Protocol):
    """Follows a run while it goes on."""

    def chunk(self, epoch: int, loss: float) -> None:
        """Be told that `epoch` is reached, with its loss."""

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        """Be told what a probe measured."""


class Silent:
    """An observer that shows nothing."""

    def chunk(self, epoch: int, loss: float) -> None:
        """Show nothing."""

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show nothing."""


def check_at_least_one(name: str, value: int) -> None:
    """Raise ValueError for a count below one."""
    if value < 1:
        raise ValueError(f"{name} must be >= 1, got {value}")


def probe_epochs(epochs: int, every: int) -> tuple[int, ...]:
    """Return the epochs at which the kernel is probed: every `every` epochs and both ends.

    Raises:
        ValueError: if there is no epoch to run, or the interval is not positive.
    """
    check_at_least_one("epochs", epochs)
    check_at_least_one("probe_every", every)
    return tuple(sorted({*range(0, epochs + 1, every), epochs}))


def spread(epochs: Sequence[int], count: int) -> frozenset[int]:
    """Return `count` of the epochs, evenly spread with both ends; all of them where there are fewer."""
    places = np.linspace(0, len(epochs) - 1, min(count, len(epochs))).round().astype(int)
    return frozenset(epochs[place] for place in places)


@dataclass(frozen=True)
class RunResult:
    """What the loop measured.

    Attributes:
        arrays: series and probes by record name; NaN from the epoch at which the run diverged.
        params: the last parameters.
        seconds: wall-clock time spent in training and in probes.
    """

    arrays: dict[str, np.ndarray]
    params: Params
    seconds: dict[str, float]


def run_training(
    state: State,
    *,
    probes_at: Sequence[int],
    advance: Advance,
    evaluate: Callable[[Params], Metrics],
    probe: Probe,
    observer: Observer | None = None,
    measured_every: int = 1,
) -> RunResult:
    """Train from probe to probe, and measure every epoch and every probe.

    Args:
        state: the state at epoch 0; donated to `advance`.
        probes_at: epochs to probe, ascending, from 0 to the last epoch.
        advance: runs a number of epochs and returns the metrics before each.
        evaluate: the metrics at given parameters, for the epoch after the last step.
        probe: what to measure at a probe.
        observer: told of every chunk and probe.
        measured_every: epochs between those at which `advance` measures; its metrics are NaN at the others.

    Returns:
        The measurements. A measured loss that is not finite ends the run at its epoch; series and probes from there on
        are NaN.
    """
    observer = observer or Silent()
    last = probes_at[-1]
    series: dict[str, np.ndarray] = {}
    unmeasured = np.arange(last + 1) % measured_every > 0
    unmeasured[list(probes_at)] = False
    probes: dict[str, np.ndarray] = {}
    seconds = {"training": 0.0, "probes": 0.0}

    def store(start: int, metrics: Metrics) -> None:
        for name, values in metrics._asdict().items():
            values = np.atleast_1d(np.asarray(values, np.float64))
            series.setdefault(name, np.full(last + 1, np.nan))[start : start + values.size] = values

    for index, epoch in enumerate(probes_at):
        if index:
            began = time.perf_counter()
            before = probes_at[index - 1]
            state, metrics = advance(state, epoch - before)
            store(before, jax.device_get(metrics))
            seconds["training"] += time.perf_counter() - began
        store(epoch, jax.device_get(evaluate(state.params)))
        diverged = np.flatnonzero(~(np.isfinite(series["loss"]) | unmeasured)[: epoch + 1])
        if diverged.size:
            for values in series.values():
                values[diverged[0] :] = np.nan
            break
        observer.chunk(epoch, float(series["loss"][epoch]))
        began = time.perf_counter()
        values = probe(state.params, epoch)
        seconds["probes"] += time.perf_counter() - began
        for name, value in values.items():
            probes.setdefault(name, np.full(len(probes_at), np.nan))[index] = value
        observer.probe(epoch, values)
    arrays = {"epoch": np.arange(last + 1), "probe_epoch": np.asarray(probes_at, np.int64), **series, **probes}
    return RunResult(arrays, state.params, seconds)


def replay(states: Any, chunks: Sequence[int], advance: Advance, *, count: int) -> list[Advance]:
    """Train several runs as one program, and return for each what replays its part to `run_training`.

    The states at every probe are kept on the host: probes times p numbers a run.

    Args:
        states: the states at epoch 0, every leaf with a leading axis of `count` runs.
        chunks: epochs from probe to probe.
        advance: runs a number of epochs for all, on and to such states and metrics.
        count: number of runs.
    """
    done: list[Any] = []
    for epochs in chunks:
        states, metrics = advance(states, epochs)
        done.append(jax.device_get((states, metrics)))

    def part(index: int) -> Advance:
        left = iter(done)

        def next_chunk(state: Any, epochs: int) -> tuple[Any, Any]:
            del state, epochs
            return jax.tree.map(lambda leaf: leaf[index], next(left))

        return next_chunk

    return [part(index) for index in range(count)]


def describe_environment() -> dict[str, Any]:
    """Return versions, device, machine and revision of the code, for a record's provenance."""
    versions = {"python": platform.python_version()}
    for package in ("lplr-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matfree", "neural-tangents"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    device = jax.devices()[0]
    return {
        "versions": versions,
        "device": f"{device.platform} ({device.device_kind}) x {jax.device_count()}",
        "platform": platform.platform(),
        "git_revision": _git_revision(),
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git_revision() -> str:
    here = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in here.parents[:4]):
        return "not a checkout"
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
