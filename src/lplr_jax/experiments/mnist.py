"""Binary MNIST: digits 3 against 8, full-batch gradient descent, every latent variable (paper, section 6.1)."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from lplr_jax import checks, data, diagnostics, plotting
from lplr_jax.curves.rate import check_regime
from lplr_jax.experiments import parts
from lplr_jax.experiments.experiment import Experiment, record_of
from lplr_jax.experiments.parts import (
    KEPT_AS,
    CodingPart,
    DataPart,
    FolderPart,
    LayersPart,
    LossPart,
    ProbePart,
    SeedPart,
    SpectrumPart,
)
from lplr_jax.losses import SoftmaxCrossEntropy, parse
from lplr_jax.losses.margins import MarginLoss
from lplr_jax.models import INITS, MLP
from lplr_jax.records import Record
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.loop import run_and_record
from lplr_jax.runs.problem import (
    Probes,
    Problem,
    check_learning_rate,
    check_memory,
    check_seconds,
    kernel_probe,
    probe_epochs,
)
from lplr_jax.runs.session import Follow, Observer, Say
from lplr_jax.training import EpochMetrics, TrainState, evaluate, init_state, rules, train_epochs
from lplr_jax.training.rules import check_loss, rule_numbers


def kept_rule(text: str | None) -> str | None:
    """Return what a record keeps of a step rule: one form for all ways to write it, nothing of none."""
    return None if text is None else rules.parse(text).text


def kept_loss(text: str) -> str | None:
    """Return what a record keeps of a loss: one form for all ways to write it, nothing of the squared one."""
    name = parse(text).name
    return None if name == "squared" else name


@dataclass(frozen=True)
class MnistConfig(FolderPart, DataPart, SpectrumPart, ProbePart, LossPart, SeedPart, CodingPart, LayersPart):
    """Everything that decides the numbers of a run, and where they go."""

    width: int = 128
    """Units of every hidden layer, m (paper, section 6.2: 128 to 1024)."""
    init: Literal["he", "scaled-output", "antisymmetric"] = "he"
    """Initialisation: "he", normal of variance 2/fan_in and zero biases (paper, section 6.1), or one of two others."""
    loss: str = field(default="squared", metadata={KEPT_AS: kept_loss})
    """squared, logistic, cross-entropy, cross-entropy:α with smoothed labels, huber:δ, squared-hinge or exponential."""
    kernel_images: int | None = field(default=None, metadata={KEPT_AS: lambda count: count})
    """Images whose kernel is measured, in equal shares of the classes [default: all; where the loss is not squared and
    there are several outputs, so many that the kernel has 1,000 rows]. Calibrated."""
    learning_rate: float = 8e-4
    """Step size η, in squared parameters per unit of loss. Calibrated."""
    step_rule: str | None = field(default=None, metadata={KEPT_AS: kept_rule})
    """Rule of the step size in place of η: fixed:η, sharpness:κ, armijo:σ, polyak:κ, budget:R or decay:α [default: η
    of --learning-rate]."""
    hessian_probes: int = 9
    """Probes, evenly spread with both ends, at which the Hessian's extremes are measured; 0 for none. Calibrated."""
    hessian_precision: Literal["float32", "float64"] = "float64"
    """Precision of the Hessian's products and eigenvalues; float32 agrees to about 1e-4 of the largest. Calibrated."""
    subset_size: int | None = None
    """Images of the random subset whose λ_min stands beside that of all [default: a fifth of them]. Calibrated."""
    certify_floor: float = 20.0
    """Seconds of two cores for a network of zero loss near the end and its certificate; 0 for none. Calibrated."""
    regime_start: int | None = None
    """First epoch of the stable regime, instead of the rule."""
    regime_stop: int | None = None
    """First epoch past the stable regime, instead of the rule."""

    def images_of_subset(self) -> int:
        """Return the number of images of the random subset."""
        return max(1, self.n_train // 5) if self.subset_size is None else self.subset_size

    def initialisation(self) -> dict[str, Any]:
        """Return the settings of the network's initialisation."""
        return {"initialisation": self.init, "output_init": self.output_init, "bias_init": self.bias_init}

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("width", least=1)
        self._check_counts("hessian_probes", least=0)
        checks.whole("subset_size", self.images_of_subset(), least=1, most=self.n_train, of="n_train")
        check_seconds("certify_floor", self.certify_floor)
        check_learning_rate("learning_rate", self.learning_rate)
        name = parse(self.loss, self.loss_scale).name
        if self.step_rule is not None:
            check_loss(rules.parse(self.step_rule), name)
        if name != "squared" and self.labels == "bits":
            raise ValueError(f"labels 0 and 1 are targets of the squared loss; {self.loss} has its own, leave them out")
        if self.kernel_images is not None:
            checks.whole("kernel_images", self.kernel_images, least=1, most=self.n_train, of="n_train")
        checks.one_of("init", self.init, INITS)
        MLP(self.width, self.depth, **self.initialisation())  # which has the last word on what goes together
        checks.one_of("hessian_precision", self.hessian_precision, ("float32", "float64"))
        for name, least in (("regime_start", 0), ("regime_stop", 1)):
            value = getattr(self, name)
            if value is not None and not least <= checks.whole(name, value) <= self.epochs + least:
                raise ValueError(
                    f"{name} must be an epoch of the run, {least} to {self.epochs + least}, got {checks.shown(value)}"
                )
        check_regime(self.epochs + 1, self.regime_start, self.regime_stop)


PRESETS: dict[str, MnistConfig] = {
    "smoke": MnistConfig(
        width=32, epochs=60, probe_every=10, n_train=200, hessian_probes=2, spectrum_probes=2, certify_floor=5.0
    ),
    "default": MnistConfig(),
    "paper": MnistConfig(epochs=10_000),
    "paper-like": MnistConfig(n_train=500, epochs=260, probe_every=26, learning_rate=8.59e-4, labels="bits"),
}
"""Named sets of defaults: a run of seconds, the standard one, and a longer one, all calibrated; and the nearest one
found to what the paper says of its runs, calibrated on the paper's sentences (docs/reproduction.md)."""


def resolve(config: MnistConfig) -> tuple[MnistConfig, int, int]:
    """Fill in the fields that follow from others; they are returned once more for those who count.

    Returns:
        The config, its `probe_every` and its `subset_size`.

    Raises:
        ValueError: for the first field whose value cannot be run.
    """
    checks.instance("config", config, MnistConfig, "as in mnist.PRESETS")
    config.check()
    probe_every, subset_size = config.spacing(), config.images_of_subset()
    return replace(config, probe_every=probe_every, subset_size=subset_size), probe_every, subset_size


# Compiled code is found again by the identity of model and optimiser: one object for each setting.
_model = lru_cache(maxsize=16)(MLP)
_gradient_descent = lru_cache(maxsize=16)(optax.sgd)


_LOADED: dict[tuple[Any, ...], tuple[data.Dataset, list[Any]]] = {}
"""The last samples that were loaded, by what was asked for, with the state of their files: identity, set-up and every
arm of a command ask for the same ones."""


def load_data(config: MnistConfig) -> data.Dataset:
    """Load the samples of a config, or return those that this process loaded last where they are the same.

    Raises:
        ValueError: for data that cannot be had.
    """
    place, classes = config.data, config.each_class()
    here = Path.cwd() if isinstance(place, str | Path) and not Path(place).is_absolute() else None
    coding: dict[str, Any] = {"pixels": config.pixels, "labels": config.labels}
    asked = (
        config.source,
        str(place),
        here,
        config.n_train,
        classes,
        os.environ.get("TFDS_DATA_DIR"),
        *coding.values(),
    )
    if asked in _LOADED:
        dataset, state = _LOADED[asked]
        if state == _state(dataset):
            return dataset
    _LOADED.clear()
    dataset = data.load("mnist", source=config.source, data_dir=place, n_train=config.n_train, classes=classes)
    dataset = data.recode(dataset, **coding)
    _LOADED[asked] = dataset, _state(dataset)
    return dataset


def _state(dataset: data.Dataset) -> list[Any]:
    """What tells that a file is no longer the one that was read."""
    found: list[Any] = []
    for file in dataset.files:
        try:
            status = file.stat()
        except OSError as error:
            found.append(error.errno)
        else:
            found.append((status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns))
    return found


@dataclass(frozen=True, eq=False)
class Digits(Problem):
    """What a config sets up: the problem, where its images come from, and what trains it."""

    dataset: data.Dataset = field(kw_only=True)
    optimizer: optax.GradientTransformation = field(kw_only=True)
    subset: np.ndarray | None = field(kw_only=True, default=None)


ROWS = 1000
"""Rows of the kernel of several outputs where the loss is not squared: 100 images of ten classes. Calibrated."""


def _targets(config: MnistConfig, dataset: data.Dataset) -> tuple[np.ndarray, int]:
    """Return targets as the loss of a config has them, and how many outputs that makes.

    Raises:
        ValueError: for samples that the loss is not of.
    """
    loss = parse(config.loss)
    if isinstance(loss, MarginLoss) and not (dataset.c == 1 and (np.abs(dataset.y) == 1).all()):
        raise ValueError(
            f"the {loss.TITLE} loss is of two classes, -1 and 1, got {len(dataset.classes) or 'no'} classes and "
            f"{dataset.c} outputs: name two with --classes 3,8, or take --loss cross-entropy"
        )
    if not isinstance(loss, SoftmaxCrossEntropy):
        return dataset.y, dataset.c
    if not dataset.classes:
        raise ValueError("cross-entropy is of classes, and the targets of these samples are numbers")
    labels = np.argmax(dataset.y, axis=1) if dataset.c > 1 else (dataset.y[:, 0] > 0).astype(np.int64)
    return np.eye(len(dataset.classes), dtype=np.float32)[labels], len(dataset.classes)


def _images(config: MnistConfig, y: np.ndarray, outputs: int) -> np.ndarray | None:
    """Return which images the kernel is of; None for all."""
    count = config.kernel_images
    if count is None and outputs > 1 and parse(config.loss).name != "squared":
        count = max(1, ROWS // outputs)
    if count is None or count >= len(y):
        return None
    return diagnostics.stratified_ids(y if y.shape[1] > 1 else np.stack([-y[:, 0], y[:, 0]], axis=1), count)


def set_up(config: MnistConfig) -> Digits:
    """Load the samples and initialise the network of a config.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config, _, _ = resolve(config)
    dataset = load_data(config)
    targets, outputs = _targets(config, dataset)
    x, y = jnp.asarray(dataset.x), jnp.asarray(targets)
    model = _model(config.width, config.depth, config.activation, outputs, **config.initialisation())
    check_memory(jax.eval_shape(model.init, jax.random.key(config.seed), x[:1]), config.width)
    params = model.init(jax.random.key(config.seed), x[:1])
    optimizer = _gradient_descent(config.learning_rate)
    if config.step_rule is not None:
        optimizer = rules.parse(config.step_rule)
    loss = parse(config.loss, config.loss_scale)
    settings = {"name": "mnist", "dataset": dataset, "optimizer": optimizer}
    return Digits(model.apply, params, x, y, loss=loss, subset=_images(config, targets, outputs), **settings)


def decisive(config: MnistConfig) -> dict[str, Any]:
    """Return the fields that decide the numbers of a run."""
    return parts.decisive(resolve(config)[0])


def identity(config: MnistConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of a run, as its record keeps it: fields and the data's checksum.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    fields, dataset = decisive(config), load_data(config)
    _targets(config, dataset)
    return {**fields, "data_checksum": dataset.checksum}


def run(
    config: MnistConfig,
    *,
    observer: Observer | None = None,
    probe_dir: Path | None = None,
    advance: Callable[[TrainState, int], tuple[TrainState, EpochMetrics]] | None = None,
    checkpoints: Checkpoints | None = None,
) -> Record:
    """Train, probe, and return the record.

    Args:
        config: what to run; `out` is for the caller, nothing is written to it here.
        observer: told of every chunk and probe.
        probe_dir: where to save the parameters of every probe; None saves none.
        advance: runs a number of epochs, for runs that were trained together with others; None trains this one alone.
        checkpoints: where the state is saved after every probe, and from where it goes on; None saves nothing.

    Returns:
        The record; one whose loss stops being finite is NaN from that epoch on.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config, probe_every, subset_size = resolve(config)
    problem = set_up(config)
    batch, params = problem.data, problem.params
    settings = {"objective": problem.objective, "optimizer": problem.optimizer}
    probes_at = probe_epochs(config.epochs, probe_every)
    measured = Probes(
        every=probe_every,
        subset=problem.subset,
        beside=subset_size if problem.subset is None else None,
        kernel=config.kernel,
        hessian=config.hessian_probes,
        hessian_precision=config.hessian_precision,
        spectrum=config.spectrum_probes,
        search=config.search_steps,
        certify_floor=config.certify_floor,
        seed=config.seed,
    )
    rate = config.learning_rate if config.step_rule is None else math.nan
    probe, samples = kernel_probe(problem, measured, steps=probes_at, save_to=probe_dir, learning_rate=rate)
    recorded = {**decisive(config), "data_checksum": problem.dataset.checksum}
    return run_and_record(
        problem,
        init_state(params, problem.optimizer),
        probe=probe,
        probes_at=probes_at,
        advance=advance or (lambda state, k: train_epochs(state, batch, params, epochs=k, **settings)),
        evaluate=partial(evaluate, batch=batch, initial=params, objective=problem.objective),
        numbers={**samples, **problem.numbers(rate), **rule_numbers(problem.optimizer)},
        config=recorded,
        # A regime that was named may lie beyond what is known of the run so far.
        judged_as={**recorded, "regime_start": None, "regime_stop": None},
        provenance=lambda: {"data": problem.dataset.provenance(config.data)},
        search_steps=config.search_steps,
        seed=config.seed,
        observer=observer,
        checkpoints=checkpoints,
    )


def run_in(
    config: MnistConfig,
    folder: Path,
    identity: Mapping[str, Any],
    *,
    say: Say,
    follow: Follow,
    check: Callable[[], None],
) -> dict[str, Record]:
    """Run a config in a folder, or read the record that is there; see `lplr_jax.experiments.experiment.Run`."""

    def make(observer: Observer | None, checkpoints: Checkpoints) -> Record:
        return run(config, observer=observer, probe_dir=folder / "probes", checkpoints=checkpoints)

    told = {"say": say, "follow": follow, "check": check}
    record = record_of(folder, "mnist", identity, make, run="mnist", epochs=config.epochs, **told)
    say(f"record   {folder / 'record.npz'}")
    return {"mnist": record}


def figure(done: Mapping[str, Record], config: MnistConfig) -> Figure | str:
    """Return the four panels, or why there are none."""
    del config
    (record,) = done.values()
    return "the run diverged at epoch 0" if record.diverged_at == 0 else plotting.four_panel(record)


EXPERIMENT = Experiment(
    name="mnist",
    config=MnistConfig,
    presets=PRESETS,
    prepare=lambda config, folder: identity(config),
    identity=lambda config, given: given,
    run=run_in,
    records=lambda done: done,
    figure=figure,
)
