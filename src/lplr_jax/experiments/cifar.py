"""CIFAR-10, five classes: a residual network, mini-batch SGD, several seeds, and its kernel (paper, section 6.3)."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lplr_jax import checks, data, diagnostics, plotting
from lplr_jax.experiments.experiment import Experiment, record_of, trained_together
from lplr_jax.experiments.parts import (
    DECIDES_NOTHING,
    KEPT_AS,
    ArmsFolderPart,
    DataPart,
    LossPart,
    ProbePart,
    ProofPart,
    SeedsPart,
    SpectrumPart,
    decisive,
    unless,
)
from lplr_jax.experiments.quantities import cell, quantities, row
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.losses import Objective, Squared
from lplr_jax.models import OUTPUT_INITS, ResNet
from lplr_jax.records import Record
from lplr_jax.reports.tables import Cell, Table, mean_of
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.loop import Advance, replay, run_and_record
from lplr_jax.runs.problem import (
    MOST,
    Probes,
    Problem,
    check_learning_rate,
    check_memory,
    kernel_probe,
    probe_epochs,
)
from lplr_jax.runs.session import Follow, Observer, Say, unfollowed
from lplr_jax.training import MiniBatches, Schedule, batches_of, init_state, momentum_sgd
from lplr_jax.types import Params

_MOST = {**MOST, "stages": 10, "blocks": 1_000}


@dataclass(frozen=True)
class CifarConfig(ArmsPart, ArmsFolderPart, DataPart, SpectrumPart, ProbePart, ProofPart, LossPart, SeedsPart):
    """Everything that decides the numbers of the runs, and where they go."""

    PROBES: ClassVar[int] = 10

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
    output_init: Literal["he", "lecun", "small", "zero"] = field(default="zero", metadata={KEPT_AS: unless("he")})
    """Weights of the output layer at the start: zero, or normal of variance 2 (he), 1 (lecun) or 1/3 (small) over
    fan_in. Calibrated: with "he" the loss starts at 1.2 to 9.4 by seed, and η has to be 15 times smaller."""
    epochs: int = 60
    """Passes over the images. Calibrated: 100 in the preset "paper"."""
    learning_rate: float = 0.03
    """η at the first step, in squared parameters per unit of loss. Calibrated: every seed interpolates."""
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
    probe_every: int | None = None
    """Epochs between kernel probes; both ends are always probed [default: a tenth of the run]. Calibrated."""
    search_steps: int = 0
    """Power iterations of the search for a lower estimate of L_Θ on the subset; 0 for none. Calibrated."""
    n_train: int = 500
    """Training images, the first ones of each class in equal shares. Calibrated: 5,000 in the preset "paper"."""
    subset_size: int = 40
    """Images of the fixed subset whose kernel is tracked, in equal shares of the classes. Calibrated."""
    seeds: str = field(default="0,1,2", metadata=DECIDES_NOTHING)  # of one seed's run
    """Seeds of initialisation and order, with commas (paper: three)."""
    source: Literal["auto", "files", "tfds"] = "auto"
    """Where the images come from."""
    data: Path | None = field(default=None, metadata=DECIDES_NOTHING)
    """File or folder with the images; no copy of CIFAR-10 is in this package."""

    def samples_at_a_time(self) -> int:
        """Return the images at a time of the exact diagnostics."""
        return min(self.batch_size, self.n_train) if self.micro_batch is None else self.micro_batch

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        for name in ("width", "stages", "blocks", "groups", "batch_size", "diagnostics_every"):
            checks.whole(name, getattr(self, name), least=1, most=_MOST.get(name))
        for name, value, most, of in (
            ("batch_size", self.batch_size, self.n_train, "n_train"),
            ("micro_batch", self.samples_at_a_time(), self.n_train, "n_train"),
            ("diagnostics_every", self.diagnostics_every, self.epochs, "epochs"),
            ("subset_size", self.subset_size, self.n_train, "n_train"),
        ):
            checks.whole(name, value, least=1, most=most, of=of)
        check_learning_rate("learning_rate", self.learning_rate)
        if checks.number("momentum", self.momentum, least=0) >= 1:
            raise ValueError(f"momentum must be at least 0 and below 1, got {self.momentum}")
        checks.one_of("schedule", self.schedule, get_args(Schedule))
        checks.one_of("output_init", self.output_init, OUTPUT_INITS)
        _model(self, 1)


PRESETS: dict[str, CifarConfig] = {
    "smoke": CifarConfig(
        width=8,
        epochs=4,
        batch_size=32,
        n_train=100,
        subset_size=10,
        probe_every=2,
        spectrum_probes=2,
        seeds="0,1",
        proof="never",
    ),
    "cpu": CifarConfig(),
    "paper": CifarConfig(width=64, epochs=100, batch_size=128, n_train=5000),
}
"""Named sets of defaults: a run of seconds, one for two CPU cores, and one of the paper's size for an accelerator."""


def preset(name: str) -> CifarConfig:
    """Return a preset; "default" is that of the machine: "cpu" without an accelerator, "paper" with one."""
    return PRESETS[default_preset() if name == "default" else name]


def default_preset() -> str:
    """Return the name of the preset that "default" stands for here."""
    return "cpu" if jax.default_backend() == "cpu" else "paper"


def resolve(config: CifarConfig) -> CifarConfig:
    """Fill in the fields that follow from others.

    Raises:
        ValueError: for the first field whose value cannot be run.
    """
    checks.instance("config", config, CifarConfig, "as in cifar.PRESETS")
    config.check()
    return replace(config, micro_batch=config.samples_at_a_time(), probe_every=config.spacing())


# Compiled code is found again by the identity of the model: one object for each setting.
_network = lru_cache(maxsize=16)(ResNet)


def _model(config: CifarConfig, outputs: int) -> ResNet:
    settings = {"output_init": config.output_init}
    return _network(config.width, config.stages, config.blocks, config.groups, outputs, config.activation, **settings)


class Setting(NamedTuple):
    """What all seeds share: images and network."""

    dataset: data.Dataset
    x: Array
    y: Array
    model: ResNet


def set_up(config: CifarConfig) -> Setting:
    """Load the images of a config, on the device.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config = resolve(config)
    try:
        settings = {"source": config.source, "data_dir": config.data, "n_train": config.n_train}
        dataset = data.load("cifar10", **settings, classes=config.each_class())
    except data.DataError as error:
        way = "name the folder or file with `make cifar DATA=path` or `lplr cifar --data path`"
        raise data.DataError(f"{error} Where this says data_dir, {way}.") from error
    x, model = jnp.asarray(dataset.x), _model(config, dataset.c)
    check_memory(jax.eval_shape(model.init, jax.random.key(0), x[:1]), config.width)
    return Setting(dataset, x, jnp.asarray(dataset.y), model)


def identity(config: CifarConfig, dataset: data.Dataset) -> dict[str, Any]:
    """Return what decides the numbers of all seeds: fields, how the images were scaled, and their checksum."""
    means, deviations = dataset.standardisation or ((), ())
    standardisation = {"mean": list(means), "deviation": list(deviations)}
    return {**decisive(resolve(config)), "standardisation": standardisation, "data_checksum": dataset.checksum}


def identity_of_seed(config: CifarConfig, seed: int, dataset: data.Dataset) -> dict[str, Any]:
    """Return what decides the numbers of one seed's run, as its record keeps it."""
    return {**identity(config, dataset), "seed": seed}


def _initial(problem: Setting, seed: int) -> Params:
    return problem.model.init(jax.random.key(seed), problem.x[:1])


def _optimizer(config: CifarConfig, problem: Setting) -> optax.GradientTransformation:
    steps = config.epochs * batches_of(problem.dataset.n, config.batch_size)
    return momentum_sgd(config.learning_rate, config.momentum, schedule=config.schedule, steps=steps)


def _trainer(config: CifarConfig, problem: Setting, initial: Params, *, together: bool = False) -> MiniBatches:
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
    problem: Setting,
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
    config = resolve(config)
    assert config.probe_every is not None
    dataset, model = problem.dataset, problem.model
    initial = _initial(problem, seed)
    whole = Problem(model.apply, initial, problem.x, problem.y, loss=Squared(config.loss_scale), name="cifar")
    trainer = _trainer(config, problem, initial)
    probes_at = probe_epochs(config.epochs, config.probe_every)
    measured = Probes(
        every=config.probe_every,
        subset=diagnostics.stratified_ids(dataset.y, config.subset_size),
        kernel=config.kernel,
        hessian=0,
        spectrum=config.spectrum_probes,
        search=config.search_steps,
        seed=seed,
        proof=config.proof,
    )
    probe, samples = kernel_probe(whole, measured, steps=probes_at, save_to=probe_dir)

    whole_batch = config.batch_size >= dataset.n
    drawn = {} if whole_batch else {"batch_size": np.asarray(config.batch_size), "batches_independent": np.asarray(0)}

    def provenance() -> Mapping[str, Any]:
        passes = trainer.passes()._asdict().items()
        spent = {f"{kind}_pass": None if math.isnan(value) else value for kind, value in passes}
        return {"data": dataset.provenance(config.data), "seconds": spent}

    return run_and_record(
        whole,
        init_state(initial, _optimizer(config, problem), seed=seed),
        probe=probe,
        probes_at=probes_at,
        advance=advance or trainer.advance,
        evaluate=trainer.evaluate,
        numbers={**samples, **whole.numbers(config.learning_rate), **drawn},
        config=identity_of_seed(config, seed, dataset),
        provenance=provenance,
        search_steps=config.search_steps,
        seed=seed,
        observer=observer,
        measured=lambda steps: steps % config.diagnostics_every == 0,
        checkpoints=checkpoints,
    )


def train_together(config: CifarConfig, seeds: Sequence[int], problem: Setting) -> list[Advance]:
    """Train seeds as one program, by vmap, and return for each what replays its part."""
    config = resolve(config)
    assert config.probe_every is not None

    def stack(trees: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)

    initials = [_initial(problem, seed) for seed in seeds]
    optimizer = _optimizer(config, problem)
    states = stack([init_state(one, optimizer, seed=seed) for one, seed in zip(initials, seeds, strict=True)])
    trainer = _trainer(config, problem, stack(initials), together=True)
    ends = probe_epochs(config.epochs, config.probe_every)
    return replay(states, [b - a for a, b in itertools.pairwise(ends)], trainer.advance, count=len(seeds))


def run_all(
    config: CifarConfig,
    folder: Path,
    problem: Setting,
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
    dataset = problem.dataset
    seeds = [seed for seed in config.each_seed() if config.takes(f"seed{seed}")]
    say(f"{dataset.n:,} images of {dataset.c} classes from {dataset.source}")
    names = [f"seed{seed}" for seed in seeds]
    advances = trained_together(folder, names, lambda: train_together(config, seeds, problem), together)
    told = {"say": say, "follow": follow, "check": check}
    return {
        seed: _run_seed(config, seed, folder / name, problem, advance=advance, **told)
        for seed, name, advance in zip(seeds, names, advances, strict=True)
    }


def _run_seed(
    config: CifarConfig,
    seed: int,
    folder: Path,
    problem: Setting,
    *,
    advance: Advance | None,
    say: Say,
    follow: Follow,
    check: Callable[[], None],
) -> Record:
    probe_dir = folder / "probes" if config.save_probes else None

    def make(observer: Observer | None, checkpoints: Checkpoints) -> Record:
        say(f"seed {seed}")
        settings = {"observer": observer, "probe_dir": probe_dir, "advance": advance, "checkpoints": checkpoints}
        record = run(config, seed, problem, **settings)
        say(f"seed {seed}: {cost(record)}")
        return record

    return record_of(
        folder,
        "cifar",
        identity_of_seed(config, seed, problem.dataset),
        make,
        run=folder.name,
        epochs=config.epochs,
        say=lambda line: say(f"seed {seed}: {line}"),
        follow=follow,
        check=check,
    )


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


PAPER_SLOPE = 0.29
"""Smoothed log-log slope of ‖∇L‖² against the gap in the paper's earlier version (v2, CIFAR)."""

SHOWN = (
    *("loss_0", "loss_t", "accuracy_t", "drift_t", "drift_falls", "regime", "pl_zero", "pl_zero_median", "pl_proxy"),
    *("pl_proxy_median", "lambda_0", "lambda_t", "lambda_least", "max_0", "max_t", "rank_0", "rank_t", "rayleigh_0"),
    *("rayleigh_t", "shift_t", "slope", "slope_raw"),
)
"""Quantities of Table 2."""


def table(done: Mapping[int, Record]) -> Table:
    """Return Table 2: one column a seed, and the mean with its deviation over seeds (paper, section 6.3)."""
    rows = [row(record, SHOWN) for record in done.values()]
    cells: dict[str, list[Cell]] = {}
    for key in SHOWN:
        values = [one[key] for one in rows]
        numbers = [value for value in values if isinstance(value, float)]
        cells[key] = [*map(cell, values), mean_of(numbers) if numbers else None]
    first = next(iter(done.values()))
    shown = (
        replace(one, label=f"{one.label}, subset", latex=f"{one.latex}, subset") if "lambda" in one.key else one
        for one in quantities(SHOWN)
    )
    images, c = int(first.arrays.get("kernel_samples", first["n"])), int(first["c"])
    return Table(
        f"CIFAR-10, {c} classes: SGD with momentum {first.config['momentum']}, schedule {first.config['schedule']}",
        (*(f"seed {seed}" for seed in done), "mean"),
        tuple(shown),
        cells,
        (
            f"Mean ± sample standard deviation over {len(done)} seeds. Kernels are those of {images} images, "
            f"{images * c} × {images * c}; units of L with scale s = {float(first['loss_scale']):g}.",
            f"The paper's earlier version gives a smoothed slope of {PAPER_SLOPE}; its smoothing is not known to us.",
            plotting.scope_note(list(done.values())),
        ),
    )


EXPERIMENT = Experiment(
    name="cifar",
    config=CifarConfig,
    presets=PRESETS,
    default_preset=default_preset,
    prepare=lambda config, folder: set_up(config),
    identity=lambda config, problem: identity(config, problem.dataset),
    run=run_all,
    records=lambda done: {f"seed{seed}": record for seed, record in done.items()},
    table=lambda done, config: table(done),
    figure=lambda done, config: plotting.cifar(list(done.values())),
    notes=lambda done, config: (plotting.scope_note(list(done.values())),),
    first_told=True,
    arms=lambda config: [f"seed{seed}" for seed in config.each_seed()],
)
