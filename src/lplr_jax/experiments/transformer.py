"""A causal transformer on real text, by SGD and by Adam: its kernel on fixed rows, and where the gradient lies in it.

The paper's limitations 3 and 5: an architecture of today, and the conditioning of its kernel. Ours, not the paper's.
"""

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure

from lplr_jax import checks, data, plotting
from lplr_jax.experiments.experiment import Experiment, record_of
from lplr_jax.experiments.next_token import (
    EachPosition,
    LossName,
    Rows,
    all_outputs,
    causal_floor,
    chosen_outputs,
    draw_rows,
)
from lplr_jax.experiments.parts import DECIDES_NOTHING, ArmsFolderPart, ProbePart, ProofPart, SeedsPart, decisive
from lplr_jax.experiments.spectral_readings import FLOOR, READINGS, pl_ratio
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.losses import Objective, by_name
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.models import Transformer
from lplr_jax.parameters import count_parameters
from lplr_jax.records import Record
from lplr_jax.reports.exit_codes import OK
from lplr_jax.reports.tables import Cell, Quantity, Table, last_finite, mean_of
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.loop import run_and_record
from lplr_jax.runs.problem import MOST, Problem, check_learning_rate, check_memory, probe_epochs, spread
from lplr_jax.runs.session import Follow, Observer, Say, unfollowed
from lplr_jax.training import BatchSteps, batches_of, evaluate, init_state, train_epochs

Optimizer = Literal["sgd", "adam"]
_MOST = {"width": MOST["width"], "layers": 1_000, "heads": MOST["width"], "length": 2**24, "n_train": 2**24}
ROWS_SEED = 0
"""Seed of the rows whose kernel is measured: one set for all runs."""


@dataclass(frozen=True)
class TransformerConfig(ArmsPart, ArmsFolderPart, ProbePart, ProofPart, SeedsPart):
    """Everything that decides the numbers of the runs, and where they go."""

    PROBES: ClassVar[int] = 8

    width: int = 32
    """Entries d of the vector of a position. Calibrated: 256 in the preset "paper"."""
    layers: int = 2
    """Layers: attention, and two dense layers at each position. Calibrated."""
    heads: int = 4
    """Attention heads of a layer. Calibrated."""
    length: int = 32
    """Positions T of a sequence. Calibrated."""
    tied: bool = False
    """Whether the head's matrix is the embedding's."""
    n_train: int = 64
    """Sequences: the first n T + 1 bytes of the text. Calibrated."""
    loss: LossName = "squared"
    """Loss of a position: squared on the one-hot next byte, or softmax cross-entropy; L is the mean over positions."""
    optimizers: str = field(default="sgd,adam", metadata=DECIDES_NOTHING)  # of one run
    """What trains, with commas: "sgd" is plain gradient descent, "adam" has the usual β_1 and β_2."""
    learning_rate: float = 0.05
    """η of SGD, in squared parameters per unit of loss. Calibrated: 2/β at θ_0 is 0.0505 for seed 0."""
    adam_learning_rate: float = 0.002
    """Step of Adam, in parameters. Calibrated."""
    batch_size: int | None = None
    """Sequences of a batch [default: all of them in every step]."""
    epochs: int = 400
    """Steps of every run. Calibrated."""
    probe_every: int | None = None
    """Steps between kernel probes; both ends are always probed [default: an eighth of the run]. Calibrated."""
    subset_size: int = 256
    """Rows of the kernel, each a (sequence, position, class): positions are drawn at random, and of each the class that
    follows and one other; under cross-entropy, all classes of as many positions as make at most so many rows."""
    hessian_probes: int = 3
    """Probes, evenly spread with both ends, at which the Hessian of the loss of all data is measured; 0 for none."""
    second_opinion: bool = False
    """Hold the first and last kernel against those of neural-tangents, where it is there; it takes long to compile."""
    seeds: str = field(default="0,1,2", metadata=DECIDES_NOTHING)  # of one seed's run
    """Seeds of initialisation and order, with commas."""
    data: Path | None = field(default=None, metadata=DECIDES_NOTHING)
    """A file with a text of your own; without it, descriptions of data sets that scikit-learn ships (BSD-3-Clause)."""

    def each_optimizer(self) -> tuple[Optimizer, ...]:
        """Return the optimisers, in the order asked for."""
        names = [part.strip() for part in self.optimizers.split(",")] if isinstance(self.optimizers, str) else [""]
        found: tuple[Any, ...] = tuple(checks.one_of("optimizers", name, get_args(Optimizer)) for name in names)
        if len(set(found)) != len(found):
            raise ValueError(f"optimizers must be distinct, got {checks.shown(self.optimizers)}")
        return found

    def rate_of(self, optimizer: Optimizer) -> float:
        """Return the step of an optimiser."""
        return self.learning_rate if optimizer == "sgd" else self.adam_learning_rate

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        for name in ("n_train", "width", "layers", "heads", "length"):
            checks.whole(name, getattr(self, name), least=1, most=_MOST[name])
        self._check_counts("hessian_probes", least=0)
        if self.batch_size is not None:
            checks.whole("batch_size", self.batch_size, least=1, most=self.n_train, of="n_train")
        checks.one_of("loss", self.loss, get_args(LossName))
        self.each_optimizer()
        for name in ("learning_rate", "adam_learning_rate"):
            check_learning_rate(name, getattr(self, name))
        positions = self.n_train * self.length
        if checks.whole("subset_size", self.subset_size, least=2, most=2 * positions, of="2 n_train length") % 2:
            raise ValueError(f"subset_size must be even, two rows a position, got {self.subset_size}")
        _model(self, 2)


PRESETS: dict[str, TransformerConfig] = {
    "smoke": TransformerConfig(
        width=16, layers=1, heads=2, length=16, n_train=16, epochs=40, probe_every=20, subset_size=64,
        hessian_probes=0, seeds="0", proof="never",
    ),
    "default": TransformerConfig(),
    "paper": TransformerConfig(
        width=256, layers=6, heads=8, length=64, n_train=400, epochs=5000, subset_size=2048
    ),
}  # fmt: skip
"""Named sets of defaults: a run of seconds, one for two CPU cores, and one for an accelerator. All calibrated."""


# Compiled code is found again by the identity of model, function and optimiser: one object for each setting.
_network = lru_cache(maxsize=16)(Transformer)


@lru_cache(maxsize=16)
def _optimizer(name: Optimizer, rate: float) -> optax.GradientTransformation:
    if name == "sgd":
        return optax.sgd(rate)
    adam = optax.adam(rate)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"):  # its bias correction relies on it
            return adam.update(updates, state, params)

    return optax.GradientTransformation(adam.init, update)


def _model(config: TransformerConfig, vocabulary: int) -> Any:  # a type checker takes it for not hashable
    return _network(vocabulary, config.width, config.layers, config.heads, config.length, config.tied)


class Setting(NamedTuple):
    """What all runs share."""

    text: data.Text
    model: Transformer
    x: Array
    """Tokens (n, T)."""
    y: Array
    """The next token of each, one-hot, (n, T V)."""
    objective: Objective
    """L, the mean loss of all n T positions."""
    rows: Rows
    """Whose kernel is measured."""
    of_rows: Objective
    """The loss of the rows alone, their mean."""


def set_up(config: TransformerConfig) -> Setting:
    """Load the text of a config, and draw the rows whose kernel is measured.

    Raises:
        ValueError: for a field out of range or a text that cannot be had.
    """
    checks.instance("config", config, TransformerConfig, "as in transformer.PRESETS")
    config.check()
    text = data.load_text(n=config.n_train, length=config.length, data=config.data)
    model, v = _model(config, text.c), text.c
    check_memory(jax.eval_shape(model.init, jax.random.key(0), text.x[:1]), config.width)
    rows = draw_rows(text, config.subset_size, loss=config.loss, seed=ROWS_SEED)
    loss = EachPosition(float(text.y.size), by_name(config.loss, "sum"), v)
    return Setting(
        text,
        model,
        jnp.asarray(text.x),
        jax.nn.one_hot(text.y, v).reshape(text.n, -1),
        Objective(all_outputs(model), loss),
        rows,
        Objective(chosen_outputs(model, config.loss), by_name(config.loss)),
    )


def identity(config: TransformerConfig, setting: Setting) -> dict[str, Any]:
    """Return what decides the numbers of all runs."""
    return {**decisive(config), "probe_every": config.spacing(), "data_checksum": setting.text.checksum}


def identity_of_run(config: TransformerConfig, optimizer: Optimizer, seed: int, setting: Setting) -> dict[str, Any]:
    """Return what decides the numbers of one run, as its record keeps it."""
    found = {**identity(config, setting), "optimizer": optimizer, "seed": seed}
    found["learning_rate"] = config.rate_of(optimizer)
    del found["adam_learning_rate"]
    return found


def numbers(config: TransformerConfig, optimizer: Optimizer, setting: Setting, p: int) -> dict[str, np.ndarray]:
    """Return the scalars of a record, and which rows its kernel is of.

    A sample is a (sequence, position, class) with one output, as the rows are; under cross-entropy a (sequence,
    position) with all of them.
    """
    positions, squared = setting.text.y.size, config.loss == "squared"
    samples = positions * setting.text.c if squared else positions
    size = setting.text.n if config.batch_size is None else config.batch_size
    found = {
        "loss_scale": np.float64(positions),
        "learning_rate": np.float64(config.learning_rate if optimizer == "sgd" else np.nan),
        "n": np.int64(samples),
        "c": np.int64(1 if squared else setting.text.c),
        "p": np.int64(p),
        "subset_ids": setting.rows.ids,
        "kernel_samples": np.int64(setting.rows.ids.size),
        "probe_loss_scale": np.float64(setting.of_rows.scale(*setting.rows.y.shape)),
    }
    if squared:
        found["target_norm"] = np.sqrt(np.float64(positions))
    if batches_of(setting.text.n, size) > 1:
        found |= {"batch_size": np.int64(size * samples // setting.text.n), "batches_independent": np.int64(0)}
    return {name: np.asarray(value) for name, value in found.items()}


def run(
    config: TransformerConfig,
    optimizer: Optimizer,
    seed: int,
    setting: Setting,
    *,
    observer: Observer | None = None,
    probe_dir: Path | None = None,
    checkpoints: Checkpoints | None = None,
) -> Record:
    """Train one seed with one optimiser, measure every step and every probe, and return the record.

    Args:
        config: what to run; `out`, `seeds` and `optimizers` are for the caller, nothing is written to it here.
        optimizer: what trains.
        seed: of initialisation and order.
        setting: what `set_up` made of the config.
        observer: told of every chunk and probe.
        probe_dir: where to save the parameters of every probe; None saves none.
        checkpoints: where the state is saved after every probe, and from where it goes on; None saves nothing.

    Returns:
        The record; one whose loss stops being finite is NaN from that step on.
    """
    batch, objective = (setting.x, setting.y), setting.objective
    initial = jax.jit(setting.model.init)(jax.random.key(seed), setting.x[:1])
    transformation = _optimizer(optimizer, config.rate_of(optimizer))
    probes_at = probe_epochs(config.epochs, config.spacing())
    probe = KernelProbe(
        setting.of_rows,
        setting.rows.x,
        setting.rows.y,
        subset=None,
        kernel=config.kernel,
        hessian_epochs=spread(probes_at, config.hessian_probes),
        hessian_precision="float32",
        hessian_of=(objective, *batch),
        second_opinion=config.second_opinion,
        proof=config.proof,
        spectrum_epochs=frozenset(probes_at),
        save_to=probe_dir,
    )
    common = {"objective": objective, "optimizer": transformation}
    size = setting.text.n if config.batch_size is None else config.batch_size
    if batches_of(setting.text.n, size) == 1:
        advance = lambda state, count: train_epochs(state, batch, initial, epochs=count, **common)  # noqa: E731
        at_point, where = partial(evaluate, batch=batch, initial=initial, objective=objective), {}
    else:
        stepper = BatchSteps(batch, initial, batch_size=size, **common)
        advance, at_point, where = stepper.advance, stepper.evaluate, {"measured": stepper.measured, "dense": False}
    loss = setting.of_rows.loss
    return run_and_record(
        Problem(setting.of_rows.apply_fn, initial, setting.rows.x, setting.rows.y, loss=loss, name="transformer"),
        init_state(initial, transformation, seed=seed),
        probe=probe,
        probes_at=probes_at,
        advance=advance,
        evaluate=at_point,
        numbers=numbers(config, optimizer, setting, count_parameters(initial)),
        config=identity_of_run(config, optimizer, seed, setting),
        provenance=lambda: {"data": setting.text.provenance(config.data)},
        observer=observer,
        checkpoints=checkpoints,
        **where,
    )


Done = Mapping[tuple[Optimizer, int], Record]
"""The record of each optimiser and seed."""


def run_all(
    config: TransformerConfig,
    folder: Path,
    setting: Setting,
    *,
    say: Say = lambda line: None,
    follow: Follow = unfollowed,
    check: Callable[[], None] = lambda: None,
) -> Done:
    """Train and record every optimiser and seed; runs whose record is there are read instead.

    Args:
        config: what to run; `out` and `force` are for the caller.
        folder: where every run gets a folder of its own.
        setting: what `set_up` made of the config.
        say: told one line at a time what is done.
        follow: from name and number of steps to a context with an observer for one run.
        check: called before every write; raises where nothing must be written any more.

    Raises:
        ValueError: for a field out of range, or a run of another config in the folder.
    """
    text = setting.text
    say(f"{text.n} sequences of {text.length} bytes, {text.c} of them unlike, from {text.source}")
    done: dict[tuple[Optimizer, int], Record] = {}
    for optimizer, seed in _arms(config):
        name = _name(optimizer, seed)
        if not config.takes(name):
            continue
        probe_dir = folder / name / "probes" if config.save_probes else None

        def make(
            observer: Observer | None,
            checkpoints: Checkpoints,
            optimizer: Optimizer = optimizer,
            seed: int = seed,
            probe_dir: Path | None = probe_dir,
        ) -> Record:
            settings = {"observer": observer, "probe_dir": probe_dir, "checkpoints": checkpoints}
            return run(config, optimizer, seed, setting, **settings)

        record = record_of(
            folder / name,
            "transformer",
            identity_of_run(config, optimizer, seed, setting),
            make,
            run=name,
            epochs=config.epochs,
            say=lambda line, name=name: say(f"{name}: {line}"),
            follow=follow,
            check=check,
        )
        done[optimizer, seed] = record
        seconds = record.provenance["seconds"]
        words = f"L_T = {last_finite(record['loss']):.4g}, λ_T = {last_finite(record['ntk_min_eig']):.3g}"
        say(f"{name}: {words}; {seconds['total']:.0f} s, of which probes {seconds['probes']:.0f} s")
    return done


def _arms(config: TransformerConfig) -> list[tuple[Optimizer, int]]:
    return [(name, seed) for seed, name in itertools.product(config.each_seed(), config.each_optimizer())]


def _name(optimizer: Optimizer, seed: int) -> str:
    return f"{optimizer}-seed{seed}"


def table(done: Done, config: TransformerConfig) -> Table:
    """Return one column an optimiser, each number with its mean and deviation over seeds."""
    names: tuple[Optimizer, ...] = tuple(dict.fromkeys(optimizer for optimizer, _ in done))
    of = {name: [record for (optimizer, _), record in done.items() if optimizer == name] for name in names}
    first = next(iter(done.values()))
    n, c, p = (int(first[name]) for name in ("n", "c", "p"))
    rows, seeds = int(first["kernel_samples"]) * c, ", ".join(str(seed) for seed in dict.fromkeys(s for _, s in done))
    text = data.load_text(n=config.n_train, length=config.length, data=config.data)
    floor = causal_floor(text, config.loss)
    of_floor = FLOOR.key, lambda record: float(np.nanmin(pl_ratio(record, floor)))
    cells: dict[str, list[Cell]] = {
        key: [mean_of([read(record) for record in of[name]]) for name in names]
        for key, read in (*((key, read) for key, *_, read in READINGS), of_floor)
    }
    again = text.y.size - int(text.contexts().max()) - 1
    why = [f"p = {p:,} is below {n * c:,}"] * (p < n * c)
    why += [f"{again} of {text.y.size:,} positions see what another one sees"] * (again > 0)
    notes = (
        f"Mean ± sample standard deviation over seeds {seeds}. Kernel of {rows} of {n * c:,} rows, each a "
        f"(sequence, position, class): an upper bound of λ_min of all.",
        *([f"λ_min of all is 0 at every θ: {' and '.join(why)}."] if why else []),
        f"No causal function has a loss below {floor:.4g}: equal contexts go on unlike.",
        "η: " + ", ".join(f"{name} {config.rate_of(name):g}" for name in names) + ". Ours, not the paper's.",
    )
    shown = [Quantity(key, label, latex, meaning) for key, label, latex, meaning, _ in READINGS]
    shown.insert(1 + [one.key for one in shown].index("pl_least"), FLOOR)
    return Table(f"Transformer on text, {config.loss.replace('_', ' ')} loss", names, tuple(shown), cells, notes)


def figure(done: Done, config: TransformerConfig) -> Figure:
    """Return loss, PL ratio, spectrum and shares, one colour an optimiser and one curve a seed."""
    runs: dict[str, list[Record]] = {}
    for (optimizer, _), record in done.items():
        runs.setdefault(f"{optimizer}, η = {config.rate_of(optimizer):g}", []).append(record)
    text = data.load_text(n=config.n_train, length=config.length, data=config.data)
    size = f"width {config.width}, layers {config.layers}, heads {config.heads}, T = {config.length}"
    first = next(iter(done.values()))
    title = f"transformer, {size}, p = {int(first['p']):,}: {text.n} sequences of {text.source}"
    return plotting.spectral(runs, floor=causal_floor(text, config.loss), title=title)


EXPERIMENT = Experiment(
    name="transformer",
    config=TransformerConfig,
    presets=PRESETS,
    prepare=lambda config, folder: set_up(config),
    identity=identity,
    run=run_all,
    records=lambda done: {_name(*key): record for key, record in done.items()},
    table=table,
    figure=figure,
    diverged=OK,
    arms=lambda config: [_name(*one) for one in _arms(config)],
)
