"""What a run leaves behind while it goes on: series by step, probes, checkpoints, and who is told of them."""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np

from lplr_jax.runs.checkpoint import Checkpoints, Saved
from lplr_jax.runs.environment import describe_environment
from lplr_jax.runs.session import Judging, Observer, Silent
from lplr_jax.theory import Verdict
from lplr_jax.training import Metrics
from lplr_jax.types import Params

_LOG = logging.getLogger(__name__)

Probe = Callable[[Params, int], Mapping[str, float]]
"""Measures at one step: parameters and step to values by record name."""

MUST_BE_FINITE = ("loss", "grad_sq_norm", "drift", "accuracy")
"""Series of which a number that is not finite ends a run: it diverged."""


@runtime_checkable
class Remembering(Protocol):
    """A probe whose earlier measurements decide later ones, so that a resumed run has to give them back."""

    def remembered(self, epoch: int) -> Mapping[str, np.ndarray]:
        """Return what the probe of `epoch` keeps, as arrays by name."""
        ...

    def recall(self, epoch: int, arrays: Mapping[str, np.ndarray], like: Params) -> None:
        """Take back what `remembered` returned, for every earlier epoch in order; `like` has the parameters' shapes."""

    def forget(self, epoch: int) -> None:
        """Drop what is remembered from an epoch on."""


@runtime_checkable
class Closing(Protocol):
    """A probe that has more to say once the run has ended."""

    untrusted: dict[str, str]
    """Why numbers were lost, by step."""

    def __call__(self, params: Params, epoch: int, /) -> Mapping[str, float]:
        """Return the values of one probe by their names in the record."""
        ...

    def close(self, arrays: Mapping[str, np.ndarray], *, search_steps: int, seed: int) -> dict[str, np.ndarray]:
        """Return what only the whole run can tell, by names in the record."""
        ...


class Series:
    """Columns of numbers by step, stored sparse: memory goes with the entries, not with the step numbers."""

    def __init__(self) -> None:
        self._blocks: list[tuple[np.ndarray, dict[str, np.ndarray]]] = []

    @property
    def last(self) -> int:
        """The last step that has an entry, -1 without any."""
        return int(self._blocks[-1][0][-1]) if self._blocks else -1

    def put(self, steps: Sequence[int] | np.ndarray, columns: Mapping[str, np.ndarray]) -> None:
        """Append entries of ascending steps; those that are there from the first of these steps on are replaced."""
        steps = np.asarray(steps, np.int64)
        if not steps.size:
            return
        self.cut(int(steps[0]))
        self._blocks.append((steps, {name: np.asarray(values, np.float64) for name, values in columns.items()}))

    def cut(self, step: int) -> int:
        """Drop the entries from a step on, and return how many there were."""
        dropped = 0
        while self._blocks and self._blocks[-1][0][-1] >= step:
            steps, columns = self._blocks.pop()
            kept = int(np.searchsorted(steps, step))
            dropped += steps.size - kept
            if kept:
                self._blocks.append((steps[:kept], {name: values[:kept] for name, values in columns.items()}))
        return dropped

    def arrays(self) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Return the steps, and every column along them, NaN where an entry lacks it."""
        if len(self._blocks) > 1:
            names = list(dict.fromkeys(name for _, columns in self._blocks for name in columns))
            steps = np.concatenate([steps for steps, _ in self._blocks])
            parts = {
                name: [columns.get(name, np.full(at.size, np.nan)) for at, columns in self._blocks] for name in names
            }
            self._blocks = [(steps, {name: np.concatenate(columns) for name, columns in parts.items()})]
        if not self._blocks:
            return np.zeros(0, np.int64), {}
        steps, columns = self._blocks[0]
        return steps, dict(columns)


class Recorder:
    """Keeps what a run measures, saves it, and tells who follows; it takes no step itself.

    Args:
        probe: what to measure at a probe; one that remembers is `Remembering`.
        observer: told of every chunk and probe, once they are saved.
        checkpoints: where the state is saved after every probe; None saves nothing.
        judge: from what was measured so far, by record name, to verdicts, for an observer that is `Judging`.
    """

    def __init__(
        self,
        probe: Probe,
        *,
        observer: Observer | None = None,
        checkpoints: Checkpoints | None = None,
        judge: Callable[[Mapping[str, np.ndarray]], Sequence[Verdict]] | None = None,
    ) -> None:
        self._probe, self._observer = probe, observer or Silent()
        self._checkpoints, self._judge = checkpoints, judge
        self.series = Series()
        self.probes: dict[int, Mapping[str, float]] = {}
        self.seconds = {"training": 0.0, "probes": 0.0, "checkpoints": 0.0}
        self.resumed_at: tuple[int, ...] = ()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Add the time of the body to the seconds spent."""
        began = time.perf_counter()
        yield
        self.seconds[what] += time.perf_counter() - began

    def extend(self, steps: Sequence[int] | np.ndarray, metrics: Metrics, seen: np.ndarray | None = None) -> None:
        """Put the metrics of consecutive entries into the series.

        Args:
            steps: step numbers, ascending; entries from the first of them on are replaced.
            metrics: one value a step in every field.
            seen: whether the entry was measured; None for all.
        """
        count = len(steps)
        columns = {
            name: np.atleast_1d(np.asarray(values, np.float64))
            for name, values in metrics._asdict().items()
            if values is not None
        }
        self.series.put(steps, {**columns, "seen": np.ones(count) if seen is None else seen})

    def diverged(self, step: int, params: Params) -> bool:
        """Return whether a metric or a parameter is not finite up to `step`; entries from there on become NaN."""
        steps, columns = self.series.arrays()
        measured = columns["seen"] > 0
        finite = np.logical_and.reduce([np.isfinite(columns[name]) for name in MUST_BE_FINITE if name in columns])
        finite |= ~measured
        at = int(np.searchsorted(steps, step))
        finite[at] &= all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(params)))
        if finite.all():
            return False
        first = int(finite.argmin())
        kept = {name: np.where(np.arange(steps.size) < first, values, np.nan) for name, values in columns.items()}
        self.series.put(steps, {**kept, "seen": columns["seen"]})
        return True

    def reach(self, step: int, params: Params, state: Any) -> None:
        """Measure and save the probe of a step whose metrics are in the series, and tell of both.

        Args:
            step: the step.
            params: θ there.
            state: what a checkpoint needs to go on from here, a pytree of arrays.
        """
        self._observer.chunk(step, self.value("loss"))
        with self.timed("probes"):
            values = self._probe(params, step)
        self.probes[step] = values
        if self._checkpoints:
            with self.timed("checkpoints"):
                self._save(self._checkpoints, step, state)
        if self._judge and isinstance(self._observer, Judging):
            self._observer.standing(step, self._judge(self.arrays()))
        self._observer.probe(step, values)

    def forget(self, step: int) -> None:
        """Drop entries and probes from a step on."""
        self.series.cut(step)
        self.probes = {at: values for at, values in self.probes.items() if at < step}
        if isinstance(self._probe, Remembering):
            self._probe.forget(step)

    def value(self, name: str) -> float:
        """Return the last entry of a series."""
        return float(self.series.arrays()[1][name][-1])

    def arrays(self, steps: Sequence[int] | None = None, probes: Sequence[int] | None = None) -> dict[str, np.ndarray]:
        """Return what was measured, by record name.

        Args:
            steps: the axis of the series; None for the entries there are. Others are NaN, and count as measured: what
                a run does not reach, it does not reach since it diverged.
            probes: the same for the probes; a run that has no entry where it did not reach has no probe there either.
        """
        there, columns = self.series.arrays()
        if steps is not None and len(steps) != there.size:
            at, length = np.searchsorted(steps, there), len(steps)
            for name, values in columns.items():
                columns[name] = np.full(length, 1.0 if name == "seen" else np.nan)
                columns[name][at] = values
            there = np.asarray(steps, np.int64)
        elif probes is not None:
            probes = [step for step in probes if step in there]
        if "seen" in columns:
            columns["seen"] = columns["seen"].astype(np.int64)
        at_probes = np.asarray(sorted(self.probes) if probes is None else probes, np.int64)
        names = list(dict.fromkeys(name for values in self.probes.values() for name in values))
        found = {
            name: np.array([self.probes.get(int(step), {}).get(name, np.nan) for step in at_probes], np.float64)
            for name in names
        }
        return {"epoch": there, "probe_epoch": at_probes, **columns, **found}

    def _save(self, checkpoints: Checkpoints, step: int, state: Any) -> None:
        steps, columns = self.series.arrays()
        arrays = {"series-step": steps, **{f"series-{name}": values for name, values in columns.items()}}
        at = sorted(self.probes)
        names = dict.fromkeys(name for values in self.probes.values() for name in values)
        arrays["probes-step"] = np.asarray(at, np.int64)
        for name in names:
            held = [(place, self.probes[one][name]) for place, one in enumerate(at) if name in self.probes[one]]
            # Where it is absent it must stay absent: NaN says that it was lost.
            arrays[f"probes-{name}"] = np.array([value for _, value in held], np.float64)
            arrays[f"places-{name}"] = np.array([place for place, _ in held], np.int64)
        remembered = self._probe.remembered(step) if isinstance(self._probe, Remembering) else {}
        facts = {"seconds": self.seconds, "resumed_at": self.resumed_at, "environment": describe_environment()}
        checkpoints.save(step, state, arrays, remembered=remembered, facts=facts)

    def resume(self, like: Any, params_of: Callable[[Any], Params]) -> Saved | None:
        """Take up the last saved state, and say so.

        Args:
            like: a state of the same structure, shapes and types as the saved one.
            params_of: from a state to its parameters.

        Returns:
            What was saved, None where nothing is.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it was saved by another run.
        """
        saved = self._checkpoints.latest(like) if self._checkpoints else None
        if saved is None:
            return None
        arrays = saved.arrays
        columns = {
            name.removeprefix("series-"): values for name, values in arrays.items() if name.startswith("series-")
        }
        self.series.put(columns.pop("step"), columns)
        at = [int(step) for step in arrays["probes-step"]]
        found: dict[int, dict[str, float]] = {step: {} for step in at}
        for key, values in arrays.items():
            name = key.removeprefix("probes-")
            if key != name and name != "step":
                for place, value in zip(arrays[f"places-{name}"], values, strict=True):
                    found[at[int(place)]][name] = float(value)
        self.probes |= found
        if isinstance(self._probe, Remembering):
            for step, kept in saved.memory.items():
                self._probe.recall(step, kept, params_of(saved.state))
        self.seconds |= saved.facts["seconds"]
        self.resumed_at = (*saved.facts["resumed_at"], saved.epoch)
        _warn_of_changes(saved.facts["environment"])
        self._observer.resume(saved.epoch)
        return saved


def _warn_of_changes(before: Mapping[str, Any]) -> None:
    """Say what is no longer as it was when the checkpoint was written: then bits may differ."""
    now = json.loads(json.dumps(describe_environment()))
    names = [name for name in now if name in before and before[name] != now[name]]
    if names:
        changed = "; ".join(f"{name} {before[name]} then, {now[name]} now" for name in names)
        _LOG.warning("not as it was when the run was interrupted, so last digits may differ: %s", changed)
