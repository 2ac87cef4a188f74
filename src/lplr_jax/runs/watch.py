"""Any loop becomes a record: it hands over its parameters step by step, and what is due is measured."""

import itertools
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lplr_jax import checks
from lplr_jax.measurement.gradients import loss_and_gradient
from lplr_jax.parameters import still, strong
from lplr_jax.records import Record
from lplr_jax.runs import entries, handed_over, interrupt
from lplr_jax.runs import folder as run_folder
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.environment import describe_environment, peak_memory_bytes
from lplr_jax.runs.loop import judged
from lplr_jax.runs.problem import Probes, Problem, kernel_probe
from lplr_jax.runs.recorder import Recorder
from lplr_jax.runs.session import Observer
from lplr_jax.training import Metrics, StepMeasures
from lplr_jax.types import Params
from lplr_jax.values import LARGEST_INTEGER

_LOG = logging.getLogger(__name__)

BUFFER = 256
"""Entries of the series that wait on the device, so that a loop is not held up by each. Calibrated."""


class Watch:
    """Watches a loop: call it with every step's parameters, and `close` it; see `lplr_jax.watch`.

    Attributes:
        record: what was left behind, once it is closed.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        probes: Probes = Probes(),  # noqa: B008  # a frozen value
        out: str | Path | None = None,
        every: int = 1,
        observer: Observer | None = None,
        config: Mapping[str, Any] | None = None,
        learning_rate: float = math.nan,
        last: int | None = None,
        force: bool = False,
    ) -> None:
        checks.instance("problem", problem, Problem, "as lplr_jax.Problem makes one")
        checks.instance("probes", probes, Probes, "as lplr_jax.Probes makes one")
        self._whole, self._problem = problem, problem.reduced
        self._probes, self._every = probes, checks.whole("every", every, least=1)
        self._initial, self._learning_rate = self._problem.params, learning_rate
        self._form = handed_over.form(problem.params)
        self._config = {
            "every": every,
            "loss": problem.loss.name,
            "probes": probes.plain(),
            **problem.digest(),
            **(config or {}),
        }
        self._length = last
        self._recorder: Recorder | None = None
        self._observer = observer
        self._taken: set[int] = set()
        self._buffer: list[entries.Entry] = []
        self._kept: entries.Kept | None = None
        self._latest: tuple[int, Params] | None = None
        self._last = -1
        self._ending = False
        self._diverged: int | None = None
        self._told: list[str] = []
        self._record: Record | None = None
        self._stack = ExitStack()
        self._folder = None if out is None else checks.folder("out", Path(out))
        self._checkpoints: Checkpoints | None = None
        if self._folder is not None:
            self._open(self._folder, force)

    def _open(self, folder: Path, force: bool) -> None:
        if not force and (folder / "record.npz").exists():
            run_folder.check_config(folder, self._problem.name, self._config)
            raise ValueError(
                f"{folder} holds the finished record of this run: read it with lplr_jax.load, or name another folder"
            )
        lock = self._stack.enter_context(run_folder.claimed(folder, self._problem.name, self._config, force=force))
        identity = run_folder.identity_of(self._problem.name, self._config)
        self._checkpoints = Checkpoints(folder / run_folder.CHECKPOINTS, check=lock.check, identity=identity)

    @property
    def record(self) -> Record:
        """The record, once the watch is closed.

        Raises:
            RuntimeError: before.
        """
        if self._record is None:
            raise RuntimeError("the watch is still open: call close(), or leave its `with` block, and then read record")
        return self._record

    def __enter__(self) -> "Watch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._abandon()

    def _abandon(self) -> None:
        """Keep what there is of a loop that failed: nothing more is measured."""
        try:
            if self._record is None and self._folder is None and self._last >= 0:
                self._record = self._make(search=0, ended=False)
        finally:
            self._stack.close()

    # What a loop calls -------------------------------------------------------------------------------------------

    def __call__(self, step: int, params: Params, *, loss: Any = None, grads: Params | None = None) -> None:
        """Hand over the parameters of a step, before they are moved or donated.

        Nothing happens where nothing is due. What is kept is copied.

        Args:
            step: t >= 0, ascending from call to call; 0 is the initialisation, the parameters of the problem.
            params: θ_t.
            loss: L(θ_t) of all data, if the loop has it anyway, with `grads`.
            grads: ∇L(θ_t) of all data, shaped like the parameters. Both must belong to the same parameters as `params`;
                they are held against the watch's own at every probe.

        Raises:
            TypeError: inside a transformation of JAX, or if one of loss and grads is missing.
            ValueError: for a step out of order, buffers that were deleted, or parameters of other shapes than before.
            RuntimeError: if the watch is closed.
        """
        if self._record is not None:
            raise RuntimeError("the watch is closed; make another one")
        if self._diverged is not None:
            return
        if type(step) is not int or not 0 <= step < LARGEST_INTEGER:  # ints are let through at once
            step = checks.whole("step", step, least=0, most=LARGEST_INTEGER - 1)
        if step <= self._last:
            raise ValueError(f"steps must ascend: got step {step} after step {self._last}")
        probing = self._is_probe(step)
        if not (probing or step % self._every == 0 or self._follows(step) or self._recorder is None):
            # This must cost next to nothing, so arrays of JAX are not copied, which nobody can move in place.
            self._latest, self._last = (step, still(params)), step
            return
        handed_over.check(step, params, self._form)
        if (loss is None) != (grads is None):
            raise TypeError("loss and grads belong together: hand over both, or neither")
        # JAX may read an array of NumPy after this call, when the loop has moved it.
        params, loss, grads = self._whole.theta(still(params)), still(loss), still(grads)
        grads = None if grads is None else handed_over.gradient(grads, self._initial, self._whole)
        if self._recorder is None:
            self._begin(step, params)
        self._latest, self._last = (step, params), step
        self._observe(step, params, loss, grads, probing)
        if probing and self._diverged is None:
            self._probe(step, params)

    def chunks(self, steps: int) -> Iterator[tuple[int, int]]:
        """Yield (start, length) of the chunks of a loop that scans a known number of steps: they end at probes.

        Call the watch with the parameters of `start` before each, `extend` after it, and the watch once more at the
        end.

        Args:
            steps: steps of the loop; the last parameters are those of step `steps`.
        """
        checks.whole("steps", steps, least=1)
        if self._recorder is not None:
            raise RuntimeError("chunks decides where the probes are, so it must come before the first step")
        self._length = steps
        at = self._probes.steps(steps)
        for start, end in itertools.pairwise(at):
            yield start, end - start

    def extend(self, start: int, series: Metrics) -> None:
        """Take the series of a scanned chunk, as `lplr_jax.series` gives its entries.

        Args:
            start: the step of the first entry, which the watch was called with.
            series: every field of shape (length,).

        Raises:
            ValueError: if the chunk does not begin at the step of the last call.
        """
        checks.instance("series", series, Metrics, "as lplr_jax.series returns it, stacked by lax.scan")
        if self._recorder is None or start != self._last:
            raise ValueError(f"the chunk begins at step {start}, but the watch was last called at step {self._last}")
        if self._diverged is not None:
            return
        self._flush()
        fields = jax.device_get(series)
        length = np.atleast_1d(fields.loss).size
        self._recorder.extend(np.arange(start, start + length), fields)
        self._kept, self._last = None, start + length - 1

    def close(self) -> Record:
        """Probe the last step, measure what needs the whole run, and return the record.

        With a folder, the record is written to it.

        Raises:
            ValueError: if no step was handed over.
        """
        if self._record is None:
            if self._last < 0:
                raise ValueError("no step was handed over: call the watch with step 0 and its parameters first")
            try:
                self._end()
                self._record = self._make(search=self._probes.search)
                if self._folder is not None and self._checkpoints is not None:
                    self._record.save(self._folder / "record.npz")
                    self._checkpoints.clear()
            finally:
                self._stack.close()
        return self._record

    # What is due -------------------------------------------------------------------------------------------------

    def _is_probe(self, step: int) -> bool:
        return step in self._known if self._length is not None else self._probes.due(step)

    @cached_property
    def _known(self) -> frozenset[int]:
        """The steps that are probed, where the length of the run is known."""
        assert self._length is not None
        return frozenset(self._probes.steps(self._length))

    def _follows(self, step: int) -> bool:
        """Return whether the step before was kept, so that this one tells where it led."""
        return self._kept is not None and self._kept.step == step - 1

    def _begin(self, step: int, params: Params) -> None:
        """Make the recorder; go on from what was saved, or see to it that step 0 has an entry."""
        steps = None if self._length is None else self._probes.steps(self._length)
        probe, self._samples = kernel_probe(
            self._problem,
            self._probes,
            steps=steps,
            taken=self._taken,
            ending=lambda: self._ending,
            learning_rate=self._learning_rate,
        )
        self._kernel_probe = probe
        self._recorder = Recorder(probe, observer=self._observer, checkpoints=self._checkpoints)
        kept = jax.tree.map(jnp.asarray, params)
        saved = self._recorder.resume((kept, kept), lambda state: state[0])
        if saved is not None:
            self._go_on(step, saved.epoch, saved.state)
        elif step > 0:
            self._tell(f"the first step handed over is {step}; step 0 is measured at the problem's own parameters")
            self._observe(0, self._initial, None, None, True)
            self._probe(0, self._initial)
            self._kept = None
        elif any(
            not np.array_equal(a, b, equal_nan=True)
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(self._initial), strict=True)
        ):
            raise ValueError(
                "step 0 is the initialisation, but the parameters handed over are not those of the problem: make the "
                "problem from them, or count the steps from 1"
            )

    def _go_on(self, step: int, saved: int, state: tuple[Params, Params]) -> None:
        assert self._recorder is not None
        if step <= saved:
            self._recorder.forget(step)
            self._tell(f"what was saved up to step {saved} is cut off from step {step} on, where the loop goes on")
        elif step == saved + 1:
            self._kept = entries.Kept(saved, *state)
            self._tell(f"goes on from step {saved}, which was saved")
        else:
            self._tell(
                f"the steps from {saved + 1} to {step - 1} were not seen: saved up to {saved}, goes on at {step}"
            )
        self._taken |= set(self._recorder.probes)

    def _tell(self, line: str) -> None:
        self._told.append(line)
        _LOG.warning("%s: %s", self._problem.name, line)

    # Measuring ---------------------------------------------------------------------------------------------------

    def _observe(self, step: int, params: Params, loss: Any, grads: Params | None, probing: bool) -> None:
        """Put the entry of a step into the series, and tell the entry before it where its step led."""
        assert self._recorder is not None
        if self._kept is not None and self._kept.step == step - 1 and self._buffer:
            measures = entries.measure_step(self._kept.params, self._kept.gradient, params)
            self._buffer[-1] = self._buffer[-1]._replace(measures=measures)
        elif self._kept is not None and self._kept.step == step - 1:  # taken up from a checkpoint
            steps, columns = self._recorder.series.arrays()
            measures = jax.device_get(entries.measure_step(self._kept.params, self._kept.gradient, params))
            entry = {name: values[-1:] for name, values in columns.items()}
            self._recorder.series.put(
                steps[-1:], {**entry, **{name: np.atleast_1d(value) for name, value in measures._asdict().items()}}
            )
        own = None
        if loss is None or probing:
            own = loss_and_gradient(params, *self._problem.data, objective=self._problem.objective)
        if loss is None:
            assert own is not None
            loss, grads = own
        elif own is not None:
            self._hold(step, (loss, grads), own)
        values = entries.measures(loss, grads, params, self._initial)
        self._buffer.append(entries.Entry(step, values, None))
        self._kept = None
        if step % self._every == 0 or probing:
            self._kept = entries.Kept(step, *jax.tree.map(jnp.copy, (params, grads)))
        if len(self._buffer) >= BUFFER or probing:
            self._flush()
            if self._recorder.diverged(step, params):
                self._diverge()

    def _hold(self, step: int, handed: tuple[Any, Params], own: tuple[Any, Params]) -> None:
        """Say so where loss or gradient that were handed over are not those of these parameters."""
        before = None
        if self._kept is not None and self._kept.step == step - 1:
            problem = self._problem
            before = loss_and_gradient(self._kept.params, *problem.data, objective=problem.objective)
        for words in handed_over.differences(step, handed, own, before):
            self._tell(f"{words}; the problem's loss is {self._problem.loss!r}")

    def _flush(self) -> None:
        if not self._buffer:
            return
        assert self._recorder is not None
        waiting, self._buffer = jax.device_get(self._buffer), []
        unknown = StepMeasures(np.nan, np.nan, np.nan)  # pyright: ignore[reportArgumentType]
        rows = [(*values, *(measures or unknown)) for _, values, measures in waiting]
        self._recorder.extend([step for step, _, _ in waiting], Metrics(*np.array(rows, np.float64).T))

    def _diverge(self) -> None:
        assert self._recorder is not None
        steps, columns = self._recorder.series.arrays()
        self._diverged = int(steps[int(np.isfinite(columns["loss"]).argmin())])
        self._kept = None
        self._tell(
            f"loss, gradient or parameters are not finite from step {self._diverged} on; nothing more is measured"
        )

    def _probe(self, step: int, params: Params) -> None:
        assert self._recorder is not None
        kept = self._kept
        state = (kept.params, kept.gradient) if kept is not None else (params, params)
        with interrupt.deferred(f"step {step} is saved"):
            self._recorder.reach(step, params, state)
        self._taken.add(step)

    def _end(self) -> None:
        """Probe the last step that there are parameters of."""
        assert self._recorder is not None
        if self._diverged is None and self._latest is not None and self._latest[0] not in self._taken:
            step, params = self._latest
            alive = not any(isinstance(a, jax.Array) and a.is_deleted() for a in jax.tree.leaves(params))
            if alive:  # what was handed over between two points of the record was not looked at
                same = jax.tree.structure(params) == jax.tree.structure(self._initial)
                params = strong(params) if same else self._whole.theta(params)
            if not alive and self._kept is not None:
                step, params, _ = self._kept
                self._tell(f"the last parameters were deleted by the step that took them; the run ends at step {step}")
            if alive or self._kept is not None:
                if not (self._buffer and self._buffer[-1].step == step) and self._recorder.series.last < step:
                    self._observe(step, params, None, None, True)
                self._flush()
                if self._recorder.diverged(step, params):
                    self._diverge()
                elif step not in self._taken:
                    self._ending = True
                    self._probe(step, params)
        self._flush()
        if self._diverged is None and self._recorder.diverged(*(self._recorder.series.last, ())):
            self._diverge()

    def _make(self, *, search: int, ended: bool = True) -> Record:
        assert self._recorder is not None
        self._flush()
        arrays = self._recorder.arrays()
        closing = self._kernel_probe.close(arrays, search_steps=search, seed=self._probes.seed, whole=ended)
        numbers = {**self._samples, **self._problem.numbers(self._learning_rate)}
        provenance = {
            **describe_environment(),
            "seconds": self._recorder.seconds,
            "resumed_at": list(self._recorder.resumed_at),
            "peak_memory_bytes": peak_memory_bytes(),
            **({"told": self._told} if self._told else {}),
            **({"untrusted": self._kernel_probe.untrusted} if self._kernel_probe.untrusted else {}),
        }
        whole = {**arrays, **closing, **numbers}
        return judged(Record(self._problem.name, whole, self._config, provenance, loss=self._problem.loss.name))


def watch(
    problem: Problem,
    *,
    probes: Probes = Probes(),  # noqa: B008  # a frozen value
    out: str | Path | None = None,
    every: int = 1,
    force: bool = False,
) -> Watch:
    """Watch a loop of your own: any framework, any optimiser, any schedule.

    Args:
        problem: what is trained; its parameters are θ_0.
        probes: what is measured at probes, and when.
        out: folder in which the run survives: what was measured is saved at every probe, and the record at the end.
        every: steps between entries of the series; with k > 1 the step after each is seen too, so that the update is
            measured.
        force: start afresh; what is in the folder is kept aside under another name.

    Returns:
        The watch: call it with (step, params) before the step that moves or donates them, and `close` it, or use it as
        a context.

    Raises:
        ValueError: for settings out of range, or a folder that holds another run, or this one finished.
        DirectoryInUseError: if another process writes to the folder.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> x, y = jnp.eye(3), jnp.ones((3, 1))
        >>> problem = Problem(lambda w, x: x @ w, jnp.zeros((3, 1)), x, y)
        >>> w = problem.params
        >>> with watch(problem, probes=Probes(search=0)) as watching:
        ...     for step in range(9):
        ...         watching(step, w)
        ...         w = w - 0.1 * jax.grad(problem.objective.value)(w, x, y)
        >>> watching.record["probe_epoch"].tolist()
        [0, 1, 2, 3, 4, 6, 8]
    """
    return Watch(problem, probes=probes, out=out, every=every, force=force)
