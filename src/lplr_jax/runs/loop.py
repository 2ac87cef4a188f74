"""Our own loop: steps in compiled chunks, probes and checkpoints between chunks, everything into one record."""

import hashlib
import itertools
import math
import operator
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lplr_jax import checks, theory
from lplr_jax.measurement.noise import Batches
from lplr_jax.records import Record
from lplr_jax.runs import folder as run_folder
from lplr_jax.runs import interrupt
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.environment import command_line, describe_environment, peak_memory_bytes
from lplr_jax.runs.problem import MOST, Probes, Problem, kernel_probe, key_data, without_places
from lplr_jax.runs.recorder import Closing, Probe, Recorder
from lplr_jax.runs.session import Observer, Say
from lplr_jax.theory import Verdict
from lplr_jax.training import BatchSteps, Metrics, State, StepRule, batches_of, evaluate, init_state, train_epochs
from lplr_jax.training.batches import Sampling, partition_of
from lplr_jax.training.rules import check_loss, rule_numbers
from lplr_jax.types import Params

Advance = Callable[[Any, int], tuple[Any, Any]]
"""From a state and a number of epochs to the state after them and the metrics before each."""


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


@dataclass(frozen=True)
class RunResult:
    """What the loop measured.

    Attributes:
        arrays: series and probes by record name; NaN from the epoch at which the run diverged.
        params: the last parameters.
        seconds: wall-clock time spent in training, in probes and in checkpoints, earlier processes included.
        resumed_at: steps from which later processes went on.
    """

    arrays: dict[str, np.ndarray]
    params: Params
    seconds: dict[str, float]
    resumed_at: tuple[int, ...] = ()


def run_training(
    state: Any,
    *,
    probes_at: Sequence[int],
    advance: Advance,
    evaluate: Callable[[Params], Metrics],
    probe: Probe,
    observer: Observer | None = None,
    measured: Callable[[np.ndarray], np.ndarray] | None = None,
    dense: bool = True,
    checkpoints: Checkpoints | None = None,
    judge: Callable[[Mapping[str, np.ndarray]], Sequence[Verdict]] | None = None,
) -> RunResult:
    """Train from probe to probe, and measure every step and every probe.

    Args:
        state: the state at step 0; donated to `advance`.
        probes_at: steps to probe, ascending, from 0 to the last one.
        advance: runs a number of steps and returns the metrics before each; everything that changes from step to step
            (keys, the place in a schedule) is in the state, or it is `Replaying`.
        evaluate: the metrics at given parameters, for the parameters after the last step.
        probe: what to measure at a probe; one that remembers is `Remembering`.
        observer: told of every chunk and probe, once they are saved.
        measured: from steps to whether `advance` measures there, beside the first of every chunk; its metrics are NaN
            at the others. None for all.
        dense: whether steps that are not measured have an entry all the same.
        checkpoints: where the state is saved after every probe, and from where it goes on; None saves nothing.
        judge: from what was measured so far, by record name, to verdicts, for an observer that is `Judging`.

    Returns:
        The measurements. A metric or parameter that is not finite ends the run at its step; series and probes from
        there on are NaN.

    Raises:
        Interrupted: on SIGTERM or SIGINT, once the chunk at hand is saved; on a second one, at once.
        OSError: if a checkpoint cannot be written or read.
    """
    last = probes_at[-1]
    recorder = Recorder(probe, observer=observer, checkpoints=checkpoints, judge=judge)
    saved = recorder.resume(state, lambda one: one.params)
    start = 0
    if saved is not None:
        if saved.epoch not in probes_at:
            raise ValueError(f"the checkpoint is of epoch {saved.epoch}, at which this run has no probe")
        state, start = saved.state, probes_at.index(saved.epoch) + 1
        if isinstance(advance, Replaying):
            advance.resume(saved.epoch)
    for index, step in enumerate(probes_at[start:], start):
        with interrupt.deferred(f"epoch {step} of {last} is saved") if checkpoints else nullcontext():
            if index:
                before = probes_at[index - 1]
                with recorder.timed("training"):
                    state, metrics = advance(state, step - before)
                    steps, metrics = np.arange(before, step), jax.device_get(metrics)
                    seen = np.ones(steps.size, bool) if measured is None else measured(steps) | (steps == before)
                    kept = slice(None) if dense else np.flatnonzero(seen)
                    recorder.extend(steps[kept], jax.tree.map(operator.itemgetter(kept), metrics), seen[kept])
            recorder.extend([step], jax.device_get(evaluate(state.params)))
            if recorder.diverged(step, state.params):
                break
            recorder.reach(step, state.params, state)
    arrays = recorder.arrays(range(last + 1) if dense else None, probes_at)
    return RunResult(arrays, state.params, recorder.seconds, recorder.resumed_at)


def run_and_record(
    problem: Problem,
    state: State,
    *,
    probe: Closing,
    probes_at: Sequence[int],
    advance: Advance,
    evaluate: Callable[[Params], Metrics],
    numbers: Mapping[str, np.ndarray],
    config: Mapping[str, Any],
    judged_as: Mapping[str, Any] | None = None,
    provenance: Callable[[], Mapping[str, Any]] = dict,
    search_steps: int = 0,
    seed: int = 0,
    observer: Observer | None = None,
    measured: Callable[[np.ndarray], np.ndarray] | None = None,
    dense: bool = True,
    checkpoints: Checkpoints | None = None,
) -> Record:
    """Train, measure, close and judge one run: what every experiment and `train` have in common.

    Args:
        problem: what is trained.
        state: the state at step 0; donated.
        probe: what is measured at a probe, and after the last one.
        probes_at: steps to probe, ascending, from 0 to the last one.
        advance: see `run_training`.
        evaluate: see `run_training`.
        numbers: what the record holds beside the measurements, by record name.
        config: everything that decides the numbers.
        judged_as: the config that the judge sees while the run goes on, where it differs.
        provenance: asked at the end for what the record says beside versions, device, seconds and memory; `seconds`
            in it is joined to ours.
        search_steps: power iterations of the search for L_Θ; 0 for none.
        seed: of that search.
        observer: told of every chunk and probe.
        measured: see `run_training`.
        dense: see `run_training`.
        checkpoints: see `run_training`.

    Returns:
        The record; one whose loss stops being finite is NaN from that step on.
    """
    began = time.perf_counter()

    def judge(so_far: Mapping[str, np.ndarray]) -> Sequence[Verdict]:
        arrays = {**so_far, **numbers}
        shown = config if judged_as is None else judged_as
        return theory.verify(_record(problem, arrays, shown, {"untrusted": probe.untrusted}))

    result = run_training(
        state,
        probes_at=probes_at,
        advance=advance,
        evaluate=evaluate,
        probe=probe,
        observer=observer,
        measured=measured,
        dense=dense,
        checkpoints=checkpoints,
        judge=judge,
    )
    closing_began = time.perf_counter()
    closing = probe.close(result.arrays, search_steps=search_steps, seed=seed)
    closing_seconds = time.perf_counter() - closing_began
    asked = dict(provenance())
    spent = {**result.seconds, **asked.pop("seconds", {}), "closing": closing_seconds}
    arrays = {**result.arrays, **closing, **numbers}
    return judged(
        _record(
            problem,
            arrays,
            config,
            {
                **describe_environment(),
                **asked,
                "seconds": {**spent, "total": time.perf_counter() - began},
                "resumed_at": list(result.resumed_at),
                "peak_memory_bytes": peak_memory_bytes(),
                **({"command": command} if (command := command_line()) else {}),
                **({"untrusted": probe.untrusted} if probe.untrusted else {}),
            },
        )
    )


def _record(
    problem: Problem, arrays: Mapping[str, np.ndarray], config: Mapping[str, Any], provenance: Mapping[str, Any]
) -> Record:
    return Record(problem.name, arrays, config, provenance, loss=problem.loss.name)


def judged(record: Record) -> Record:
    """Return a record with the verdicts on it in its provenance."""
    return replace(record, provenance={**record.provenance, "verdicts": theory.as_json(theory.verify(record))})


def train(
    problem: Problem,
    optimizer: optax.GradientTransformation,
    *,
    steps: int,
    batch_size: int | None = None,
    sampling: Sampling = "reshuffle",
    seed: int = 0,
    probes: Probes = Probes(),  # noqa: B008  # a frozen value
    out: str | Path | None = None,
    observer: Observer | None = None,
    learning_rate: float = math.nan,
    config: Mapping[str, Any] | None = None,
    force: bool = False,
    say: Say = lambda line: None,
) -> Record:
    """Train a problem with any optax transformation, and record it.

    Args:
        problem: what is trained, and from where.
        optimizer: an optax transformation; `optax.sgd(η)` is gradient descent.
        steps: how many.
        batch_size: samples of a shuffled mini-batch; None, or n, for all data in every step. With mini-batches loss
            and gradient of all data are measured at the first step of every pass, and at the one after it.
        sampling: "reshuffle" for passes in which every sample comes once; "independent" for batches that are each
            drawn anew without replacement; "partition" for steps that each draw one of the n/b blocks of a partition.
            The statements on noise are about the latter two.
        seed: of the order of mini-batches.
        probes: what is measured at probes, and when.
        out: folder in which the run survives, and is resumed bit for bit by the same call.
        observer: told of every chunk and probe.
        learning_rate: η as the record is to say it; NaN leaves it to what is measured.
        config: what else the record is to say of how it was made; part of the run's identity.
        force: start afresh; the run that is in the folder is kept aside under another name.
        say: told one line at a time what becomes of the folder.

    Returns:
        The record; the one that is in the folder, where this run has finished there.

    Raises:
        ValueError: for settings out of range, or a folder that holds another run.
        TypeError: for what is no problem or no optax transformation.

    Example:
        >>> import jax.numpy as jnp, optax
        >>> problem = Problem(lambda w, x: x @ w, jnp.zeros((3, 1)), jnp.eye(3), jnp.ones((3, 1)))
        >>> record = train(problem, optax.sgd(0.5), steps=4, probes=Probes(search=0))
        >>> record["epoch"].tolist(), round(float(record["step_size"][0]), 6)
        ([0, 1, 2, 3, 4], 0.5)
    """
    checks.instance("problem", problem, Problem, "as lplr_jax.Problem makes one")
    checks.instance("probes", probes, Probes, "as lplr_jax.Probes makes one")
    checks.whole("steps", steps, least=1, most=MOST["epochs"])
    check_loss(optimizer, problem.loss.name)
    size = problem.n if batch_size is None else checks.whole("batch_size", batch_size, least=1, most=problem.n, of="n")
    whole = batches_of(problem.n, size) == 1
    checks.one_of("sampling", sampling, get_args(Sampling))
    settings = {"steps": steps, "seed": seed, "batch_size": None if whole else size}
    if not whole and sampling != "reshuffle":
        settings["sampling"] = sampling
    rate = rule_numbers(optimizer).get("learning_rate", np.asarray(learning_rate))
    drawn = {} if whole else {"batch_size": size, "batches_independent": int(sampling != "reshuffle")}
    if not whole and sampling == "partition":
        drawn["batches_fixed"] = 1
    drawn = {name: np.asarray(value) for name, value in drawn.items()}
    whole_config = {
        **(config or {}),
        **settings,
        "loss": problem.loss.name,
        "probes": probes.plain(),
        "optimizer_checksum": optimizer_digest(optimizer, problem.reduced.params),
        **problem.digest(),
    }
    problem, at = problem.reduced, probes.steps(steps)
    objective, initial, batch = problem.objective, problem.params, problem.data
    state = init_state(initial, optimizer, seed=seed)
    blocks = np.asarray(partition_of(state.key, problem.n, size)) if "batches_fixed" in drawn else None
    batches = None if whole else Batches(size, float(rate), seed, blocks)

    def make(checkpoints: Checkpoints | None) -> Record:
        of_all = float(rate) if whole else math.nan
        probe, samples = kernel_probe(problem, probes, steps=at, batches=batches, learning_rate=of_all)
        common = {"objective": objective, "optimizer": optimizer}
        if whole:
            pieces = _lengths(at)
            advance = lambda state, count: _in_pieces(  # noqa: E731
                state, pieces(count), lambda one, k: train_epochs(one, batch, initial, epochs=k, **common)
            )
            at_point = partial(evaluate, batch=batch, initial=initial, objective=objective)
            where = {}
        else:
            stepper = BatchSteps(batch, initial, batch_size=size, sampling=sampling, **common)
            advance, at_point = stepper.advance, stepper.evaluate
            where = {"measured": stepper.measured, "dense": False}
        return run_and_record(
            problem,
            state,
            probe=probe,
            probes_at=at,
            advance=advance,
            evaluate=at_point,
            numbers={**samples, **problem.numbers(learning_rate), **rule_numbers(optimizer), **drawn},
            config=whole_config,
            search_steps=probes.search,
            seed=probes.seed,
            observer=observer,
            checkpoints=checkpoints,
            **where,
        )

    if out is None:
        return make(None)
    path = checks.folder("out", Path(out))
    with run_folder.claimed(path, problem.name, whole_config, force=force, say=say) as lock:
        return run_folder.read_or_make(path, problem.name, whole_config, make, check=lock.check, say=say)


def optimizer_digest(optimizer: optax.GradientTransformation, params: Params) -> str:
    """Return the SHA-256 of what an optimiser does, its jaxpr, and of the state it begins with."""
    checks.instance("optimizer", optimizer, optax.GradientTransformation, "such as optax.sgd(0.1)")
    state, update = optimizer.init(params), optimizer.update
    if isinstance(optimizer, StepRule):  # any loss will do: what is told apart is the rule
        seen = {"value": jnp.zeros(()), "value_fn": lambda q: optax.tree.norm(q, squared=True)}
        losses = {"losses_fn": lambda q: jnp.zeros(1)} if optimizer.losses else {}
        update = lambda g, s, q: optimizer.update(g, s, q, grad=g, **seen, **losses)  # noqa: E731
    closed = jax.make_jaxpr(update)(params, state, params)
    text = hashlib.sha256(without_places(f"{closed.jaxpr}").encode())
    for leaf in [*jax.tree.leaves(state), *closed.consts]:
        text.update(np.asarray(key_data(leaf)).tobytes())
    return f"sha256:{text.hexdigest()}"


MOST_PROGRAMS = 3
"""Lengths of chunks for which a program each is compiled; where there are more, powers of two are put together."""


def _lengths(at: Sequence[int]) -> Callable[[int], Sequence[int]]:
    """Return the rule by which a chunk is cut, so that few programs are compiled; it moves no bit of the run."""
    if len({b - a for a, b in itertools.pairwise(at)}) <= MOST_PROGRAMS:
        return lambda count: (count,)
    return lambda count: [1 << bit for bit in range(count.bit_length() - 1, -1, -1) if count >> bit & 1]


def _in_pieces(
    state: State, pieces: Sequence[int], advance: Callable[[State, int], tuple[State, Metrics]]
) -> tuple[State, Metrics]:
    parts = []
    for count in pieces:
        state, metrics = advance(state, count)
        parts.append(jax.device_get(metrics))
    return state, jax.tree.map(lambda *fields: np.concatenate(fields), *parts)


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
