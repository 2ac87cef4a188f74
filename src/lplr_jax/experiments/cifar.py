"""CIFAR-10, five classes: a residual network, mini-batch SGD, several seeds, and its kernel (paper, section 6.3)."""

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lplr_jax import checks, data, diagnostics, theory
from lplr_jax.checks import integers
from lplr_jax.experiments.minibatch import MiniBatches, Schedule, momentum_sgd
from lplr_jax.losses import LossScale, Objective
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.models import ResNet
from lplr_jax.ntk.empirical import check_kernel_name
from lplr_jax.parameters import count_parameters
from lplr_jax.records import Record
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.environment import describe_environment, peak_memory_bytes
from lplr_jax.runs.folder import kept
from lplr_jax.runs.loop import (
    MOST,
    Advance,
    check_learning_rate,
    check_memory,
    probe_epochs,
    replay,
    run_training,
    spread,
)
from lplr_jax.runs.session import Follow, Observer, Say, unfollowed
from lplr_jax.training import batches_of, init_shuffled
from lplr_jax.types import Params


@dataclass(frozen=True)
class CifarConfig:
    """Everything that decides the numbers of the runs, and where they go."""

    width: int = 16
    """Channels w of the first stage; the others have 2w and 4w. Calibrated: 64 in the preset "paper"."""
    stages: int = 3
    """Stages, each at half the resolution of the one before (paper, section 6.3)."""
    blocks: int = 2
    """Residual blocks of every stage (paper, section 6.3)."""
    groups: int = 8
    """Groups of every GroupNorm. Calibrated: the paper's number is not known to us."""
    activation: Literal["relu", "softplus", "tanh"] = "relu"
    """Activation. Calibrated: the paper's is not known to us."""
    epochs: int = 40
    """Passes over the images. Calibrated: 100 in the preset "paper"."""
    learning_rate: float = 0.002
    """η at the first step, in squared parameters per unit of loss. Calibrated: at 0.005 two of the seeds drift off."""
    momentum: float = 0.9
    """Heavy-ball momentum (paper, section 6.3: SGD with momentum); 0 for none. The value is calibrated."""
    schedule: Schedule = "cosine"
    """How the step size falls: "cosine" to zero at the end (paper, section 6.3), or "constant"."""
    batch_size: int = 16
    """Images of a batch; the last one of an epoch holds what is left. Calibrated: 128 in the preset "paper"."""
    micro_batch: int | None = None
    """Images at a time of the exact diagnostics, which bounds memory [default: as `batch_size`]."""
    diagnostics_every: int = 1
    """Epochs between exact diagnostics; every probe has its own."""
    loss_scale: LossScale = "mean"
    """Scale s of the loss ‖r‖²/(2s): "mean" for s = n, "sum" for s = 1."""
    probe_every: int | None = None
    """Epochs between kernel probes; both ends are always probed [default: a tenth of the run]. Calibrated."""
    spectrum_probes: int = 9
    """Probes, evenly spread with both ends, at which the whole spectrum is kept; 0 for none. Calibrated."""
    search_steps: int = 0
    """Power iterations of the search for a lower estimate of L_Θ on the subset; 0 for none. Calibrated."""
    n_train: int = 500
    """Training images, the first ones of each class in equal shares. Calibrated: 5,000 in the preset "paper"."""
    subset_size: int = 40
    """Images of the fixed subset whose kernel is tracked, in equal shares of the classes. Calibrated."""
    seeds: str = "0,1,2"
    """Seeds of initialisation and order, with commas (paper: three)."""
    kernel: str = "auto"
    """Kernel implementation: auto, engine, neural-tangents, or neural-tangents:NAME."""
    source: Literal["auto", "files", "tfds"] = "auto"
    """Where the images come from."""
    data: Path | None = None
    """File or folder with the images; no copy of CIFAR-10 is in this package."""
    out: Path | None = None
    """Folder for one folder a seed, and the table [default: runs/cifar, or runs/cifar-PRESET]."""
    save_probes: bool = False
    """Keep the parameters of every probe: 11 MB a probe at width 64."""
    force: bool = False
    """Start afresh; what is in the folder is kept aside under another name."""


PRESETS: dict[str, CifarConfig] = {
    "smoke": CifarConfig(
        width=8, epochs=4, batch_size=32, n_train=100, subset_size=10, probe_every=2, spectrum_probes=2, seeds="0,1"
    ),
    "cpu": CifarConfig(),
    "paper": CifarConfig(width=64, epochs=100, batch_size=128, n_train=5000),
}
"""Named sets of defaults: a run of seconds, one for two CPU cores, and one of the paper's size for an accelerator."""

PLACES = ("data", "out", "save_probes", "force", "seeds")
"""Config fields that decide no number of one seed's run."""


def preset(name: str) -> CifarConfig:
    """Return a preset; "default" is that of the machine: "cpu" without an accelerator, "paper" with one."""
    return PRESETS[default_preset() if name == "default" else name]


def default_preset() -> str:
    """Return the name of the preset that "default" stands for here."""
    return "cpu" if jax.default_backend() == "cpu" else "paper"


_MOST = {**MOST, "stages": 10, "blocks": 1_000}


def resolve(config: CifarConfig) -> CifarConfig:
    """Fill in the fields that follow from others.

    Raises:
        ValueError: for the first field whose value cannot be run.
    """
    checks.instance("config", config, CifarConfig, "as in cifar.PRESETS")
    for name in ("width", "stages", "blocks", "groups", "epochs", "n_train", "batch_size", "diagnostics_every"):
        checks.whole(name, getattr(config, name), least=1, most=_MOST.get(name))
    micro = min(config.batch_size, config.n_train) if config.micro_batch is None else config.micro_batch
    every = max(1, config.epochs // 10) if config.probe_every is None else config.probe_every
    for name, value, most, of in (
        ("batch_size", config.batch_size, config.n_train, "n_train"),
        ("micro_batch", micro, config.n_train, "n_train"),
        ("probe_every", every, config.epochs, "epochs"),
        ("diagnostics_every", config.diagnostics_every, config.epochs, "epochs"),
        ("subset_size", config.subset_size, config.n_train, "n_train"),
    ):
        checks.whole(name, value, least=1, most=most, of=of)
    probe_epochs(config.epochs, every)
    check_learning_rate("learning_rate", config.learning_rate)
    if checks.number("momentum", config.momentum, least=0) >= 1:
        raise ValueError(f"momentum must be at least 0 and below 1, got {config.momentum}")
    checks.one_of("schedule", config.schedule, get_args(Schedule))
    checks.one_of("loss_scale", config.loss_scale, get_args(LossScale))
    for name in ("spectrum_probes", "search_steps"):
        checks.whole(name, getattr(config, name), least=0)
    for seed in seeds_of(config):
        checks.whole("seeds", seed, most=MOST["seed"])
    check_kernel_name(config.kernel)
    _model(config, 1)
    return replace(config, micro_batch=micro, probe_every=every)


def seeds_of(config: CifarConfig) -> tuple[int, ...]:
    """Return the seeds of a config.

    Raises:
        ValueError: for text that names none.
    """
    return integers("seeds", config.seeds, least=0)


# Compiled code is found again by the identity of the model: one object for each setting.
_network = lru_cache(maxsize=16)(ResNet)


def _model(config: CifarConfig, outputs: int) -> ResNet:
    return _network(config.width, config.stages, config.blocks, config.groups, outputs, config.activation)


class Problem(NamedTuple):
    """What all seeds share: images and network."""

    dataset: data.Dataset
    x: Array
    y: Array
    model: ResNet


def set_up(config: CifarConfig) -> Problem:
    """Load the images of a config, on the device.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config = resolve(config)
    try:
        dataset = data.load("cifar10", source=config.source, data_dir=config.data, n_train=config.n_train)
    except data.DataError as error:
        way = "name the folder or file with `make cifar DATA=path` or `lplr cifar --data path`"
        raise data.DataError(f"{error} Where this says data_dir, {way}.") from error
    x, model = jnp.asarray(dataset.x), _model(config, dataset.c)
    check_memory(jax.eval_shape(model.init, jax.random.key(0), x[:1]), config.width)
    return Problem(dataset, x, jnp.asarray(dataset.y), model)


def identity(config: CifarConfig, dataset: data.Dataset) -> dict[str, Any]:
    """Return what decides the numbers of all seeds: fields, how the images were scaled, and their checksum."""
    fields = {name: value for name, value in asdict(resolve(config)).items() if name not in PLACES}
    means, deviations = dataset.standardisation or ((), ())
    standardisation = {"mean": list(means), "deviation": list(deviations)}
    return {**fields, "standardisation": standardisation, "data_checksum": dataset.checksum}


def identity_of_seed(config: CifarConfig, seed: int, dataset: data.Dataset) -> dict[str, Any]:
    """Return what decides the numbers of one seed's run, as its record keeps it."""
    return {**identity(config, dataset), "seed": seed}


def _initial(problem: Problem, seed: int) -> Params:
    return problem.model.init(jax.random.key(seed), problem.x[:1])


def _optimizer(config: CifarConfig, problem: Problem) -> optax.GradientTransformation:
    steps = config.epochs * batches_of(problem.dataset.n, config.batch_size)
    return momentum_sgd(config.learning_rate, config.momentum, schedule=config.schedule, steps=steps)


def _trainer(config: CifarConfig, problem: Problem, initial: Params, *, together: bool = False) -> MiniBatches:
    assert config.micro_batch is not None
    return MiniBatches(
        (problem.x, problem.y),
        initial,
        objective=Objective(problem.model.apply, config.loss_scale),
        optimizer=_optimizer(config, problem),
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        every=config.diagnostics_every,
        together=together,
    )


def run(
    config: CifarConfig,
    seed: int,
    problem: Problem,
    *,
    observer: Observer | None = None,
    probe_dir: Path | None = None,
    advance: Advance | None = None,
    checkpoints: Checkpoints | None = None,
) -> Record:
    """Train one seed, measure every epoch and every probe, and return the record.

    Args:
        config: what to run; `out` and `seeds` are for the caller, nothing is written to it here.
        seed: of initialisation and order.
        problem: what `set_up` made of the config.
        observer: told of every chunk and probe.
        probe_dir: where to save the parameters of every probe; None saves none.
        advance: runs a number of epochs, for seeds that were trained together; None trains this one alone.
        checkpoints: where the state is saved after every probe, and from where it goes on; None saves nothing.

    Returns:
        The record; one whose loss stops being finite is NaN from that epoch on.
    """
    config, began = resolve(config), time.perf_counter()
    assert config.probe_every is not None
    dataset, x, _, model = problem
    subset = diagnostics.stratified_ids(dataset.y, config.subset_size)
    initial = _initial(problem, seed)
    trainer = _trainer(config, problem, initial)
    probes_at = probe_epochs(config.epochs, config.probe_every)
    objective = Objective(model.apply, config.loss_scale)
    probe = KernelProbe(
        objective,
        x[subset],
        dataset.y[subset],
        subset=None,
        kernel=config.kernel,
        spectrum_epochs=spread(probes_at, config.spectrum_probes),
        save_to=probe_dir,
    )
    scalars = {
        "subset_ids": subset,
        "kernel_samples": np.int64(subset.size),
        "loss_scale": np.float64(objective.scale(dataset.n)),
        "learning_rate": np.float64(config.learning_rate),
        "n": np.int64(dataset.n),
        "c": np.int64(dataset.c),
        "p": np.int64(count_parameters(initial)),
    }
    numbers = {name: np.asarray(value) for name, value in scalars.items()}
    recorded = identity_of_seed(config, seed, dataset)

    def judge(so_far: Mapping[str, np.ndarray]) -> tuple[theory.Verdict, ...]:
        return theory.verify(Record("cifar", {**so_far, **numbers}, recorded, {"untrusted": probe.untrusted}))

    result = run_training(
        init_shuffled(initial, _optimizer(config, problem), seed=seed),
        probes_at=probes_at,
        advance=advance or trainer.advance,
        evaluate=trainer.evaluate,
        probe=probe,
        observer=observer,
        measured_every=config.diagnostics_every,
        checkpoints=checkpoints,
        judge=judge,
    )
    closing_began = time.perf_counter()
    closing = probe.close(result.arrays, search_steps=config.search_steps, seed=seed)
    closing_seconds = time.perf_counter() - closing_began
    passes = trainer.passes()._asdict()
    provenance = {
        **describe_environment(),
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "checksum": dataset.checksum,
            "location": str(config.data) if config.data else None,
        },
        "seconds": {
            **result.seconds,
            **{f"{kind}_pass": None if math.isnan(value) else value for kind, value in passes.items()},
            "closing": closing_seconds,
            "total": time.perf_counter() - began,
        },
        "resumed_at": list(result.resumed_at),
        "peak_memory_bytes": peak_memory_bytes(),
        **({"untrusted": probe.untrusted} if probe.untrusted else {}),
    }
    record = Record("cifar", {**result.arrays, **closing, **numbers}, recorded, provenance)
    return replace(record, provenance={**provenance, "verdicts": theory.as_json(theory.verify(record))})


def train_together(config: CifarConfig, seeds: Sequence[int], problem: Problem) -> list[Advance]:
    """Train seeds as one program, by vmap, and return for each what replays its part."""
    config = resolve(config)
    assert config.probe_every is not None

    def stack(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    initials = [_initial(problem, seed) for seed in seeds]
    optimizer = _optimizer(config, problem)
    states = stack([init_shuffled(one, optimizer, seed=seed) for one, seed in zip(initials, seeds, strict=True)])
    trainer = _trainer(config, problem, stack(initials), together=True)
    ends = probe_epochs(config.epochs, config.probe_every)
    return replay(states, [b - a for a, b in itertools.pairwise(ends)], trainer.advance, count=len(seeds))


def run_all(
    config: CifarConfig,
    folder: Path,
    problem: Problem,
    *,
    say: Say = lambda line: None,
    follow: Follow = unfollowed,
    check: Callable[[], None] = lambda: None,
    together: bool | None = None,
) -> Mapping[int, Record]:
    """Train and record every seed; seeds whose record is there are read instead.

    Args:
        config: what to run; `out` and `force` are for the caller.
        folder: where every seed gets a folder of its own.
        problem: what `set_up` made of the config.
        say: told one line at a time what is done.
        follow: from name and number of epochs to a context with an observer for one seed.
        check: called before every write; raises where nothing must be written any more.
        together: train the seeds in one program; None does so on accelerators (on a CPU vmap is slower). After an
            interruption all of them are trained again, and probes go on where they stopped.

    Returns:
        Records by seed, in the order asked for.

    Raises:
        ValueError: for a field out of range, or a seed of another config in the folder.
    """
    seeds, dataset = seeds_of(config), problem.dataset
    say(f"{dataset.n:,} images of {dataset.c} classes from {dataset.source}")
    missing = [seed for seed in seeds if not (folder / f"seed{seed}" / "record.npz").exists()]
    together = jax.default_backend() != "cpu" if together is None else together
    advances: dict[int, Advance] = {}
    if together and missing and len(seeds) > 1:
        advances = dict(zip(seeds, train_together(config, seeds, problem), strict=True))
    return {
        seed: _run_seed(config, seed, folder, problem, say=say, follow=follow, check=check, advance=advances.get(seed))
        for seed in seeds
    }


def _run_seed(
    config: CifarConfig,
    seed: int,
    folder: Path,
    problem: Problem,
    *,
    say: Say,
    follow: Follow,
    check: Callable[[], None],
    advance: Advance | None,
) -> Record:
    place = folder / f"seed{seed}"

    def make(checkpoints: Checkpoints) -> Record:
        say(f"seed {seed}")
        with follow(place.name, config.epochs) as observer:
            record = run(
                config,
                seed,
                problem,
                observer=observer,
                probe_dir=place / "probes" if config.save_probes else None,
                advance=advance,
                checkpoints=checkpoints,
            )
        say(f"seed {seed}: {cost(record)}")
        return record

    config_of_seed = identity_of_seed(config, seed, problem.dataset)
    return kept(place, "cifar", config_of_seed, make, check=check, say=lambda line: say(f"seed {seed}: {line}"))


def cost(record: Record) -> str:
    """Say what training, diagnostics and probes of one seed took."""
    seconds = record.provenance["seconds"]
    words = f"{seconds['total']:.0f} s, of which kernel probes {seconds['probes']:.0f} s"
    training, diagnosing = seconds.get("training_pass"), seconds.get("diagnostics_pass")
    if training and diagnosing:
        words += (
            f"; a training pass {training:.2f} s, exact diagnostics {diagnosing:.2f} s: "
            f"{diagnosing / training:.2f} times a pass (medians of this run)"
        )
    return words
