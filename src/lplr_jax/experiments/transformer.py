"""A causal transformer on real text, by SGD and by Adam: its kernel on fixed rows, and where the gradient lies in it.

The paper's limitations 3 and 5: an architecture of today, and the conditioning of its kernel. Ours, not the paper's.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lplr_jax import checks, data, plotting
from lplr_jax.curves.position import position_of
from lplr_jax.experiments.experiment import Experiment, record_of
from lplr_jax.experiments.parts import DECIDES_NOTHING, ArmsFolderPart, ProbePart, SeedsPart, decisive
from lplr_jax.experiments.quantities import quantities, row
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.losses import Loss, Objective, Squared, by_name
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
from lplr_jax.types import ApplyFn, Params

LossName = Literal["squared", "softmax_cross_entropy"]
Optimizer = Literal["sgd", "adam"]
ROWS_SEED = 0
"""Seed of the rows whose kernel is measured: one set for all runs."""


@dataclass(frozen=True)
class TransformerConfig(ArmsPart, ArmsFolderPart, ProbePart, SeedsPart):
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
    optimizers: str = "sgd,adam"
    """What trains, with commas: "sgd" is plain gradient descent, "adam" has the usual β_1 and β_2."""
    learning_rate: float = 0.1
    """η of SGD, in squared parameters per unit of loss. Calibrated."""
    adam_learning_rate: float = 0.001
    """Step of Adam, in parameters. Calibrated."""
    batch_size: int | None = None
    """Sequences of a batch [default: all of them in every step]."""
    epochs: int = 1000
    """Steps of every run. Calibrated."""
    probe_every: int | None = None
    """Steps between kernel probes; both ends are always probed [default: an eighth of the run]. Calibrated."""
    subset_size: int = 256
    """Rows of the kernel, each a (sequence, position, class): positions are drawn at random, and of each the class that
    follows and one other; under cross-entropy, all classes of as many positions as make at most so many rows."""
    hessian_probes: int = 3
    """Probes, evenly spread with both ends, at which the Hessian of the loss of all data is measured; 0 for none."""
    seeds: str = field(default="0,1,2", metadata=DECIDES_NOTHING)  # of one seed's run
    """Seeds of initialisation and order, with commas."""
    data: Path | None = field(default=None, metadata=DECIDES_NOTHING)
    """A file with a text of your own; without it, descriptions of data sets that scikit-learn ships (BSD-3-Clause)."""

    def each_optimizer(self) -> tuple[Optimizer, ...]:
        """Return the optimisers, in the order asked for."""
        names = [part.strip() for part in self.optimizers.split(",")] if isinstance(self.optimizers, str) else [""]
        found = tuple(checks.one_of("optimizers", name, get_args(Optimizer)) for name in names)
        if len(set(found)) != len(found):
            raise ValueError(f"optimizers must be distinct, got {checks.shown(self.optimizers)}")
        return found

    def rate_of(self, optimizer: Optimizer) -> float:
        """Return the step of an optimiser."""
        return self.learning_rate if optimizer == "sgd" else self.adam_learning_rate

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("n_train", least=1)
        self._check_counts("hessian_probes", least=0)
        if self.batch_size is not None:
            checks.whole("batch_size", self.batch_size, least=1, most=self.n_train, of="n_train")
        checks.one_of("loss", self.loss, get_args(LossName))
        self.each_optimizer()
        for name in ("learning_rate", "adam_learning_rate"):
            check_learning_rate(name, getattr(self, name))
        positions = self.n_train * checks.whole("length", self.length, least=1)
        most = checks.whole("subset_size", self.subset_size, least=2, most=2 * positions, of="2 n_train length")
        if most % 2:
            raise ValueError(f"subset_size must be even, two rows a position, got {most}")
        _model(self, 2)


PRESETS: dict[str, TransformerConfig] = {
    "smoke": TransformerConfig(
        width=16, layers=1, heads=2, length=16, n_train=16, epochs=40, probe_every=20, subset_size=64,
        hessian_probes=2, seeds="0",
    ),
    "default": TransformerConfig(),
    "paper": TransformerConfig(
        width=256, layers=6, heads=8, length=64, n_train=400, epochs=5000, subset_size=2048, hessian_probes=5
    ),
}  # fmt: skip
"""Named sets of defaults: a run of seconds, one for two CPU cores, and one for an accelerator. All calibrated."""


# Compiled code is found again by the identity of model, function and optimiser: one object for each setting.
_network = lru_cache(maxsize=16)(Transformer)
_OPTIMIZERS = {"sgd": lru_cache(maxsize=16)(optax.sgd), "adam": lru_cache(maxsize=16)(optax.adam)}


def _model(config: TransformerConfig, vocabulary: int) -> Transformer:
    return _network(vocabulary, config.width, config.layers, config.heads, config.length, config.tied)


@lru_cache(maxsize=16)
def _all_outputs(model: Transformer) -> ApplyFn:
    """Return the network as a function with outputs (n, T V)."""
    return lambda params, x: jnp.reshape(model.apply(params, x), (x.shape[0], -1))


@lru_cache(maxsize=16)
def _chosen_outputs(model: Transformer, loss: LossName) -> ApplyFn:
    """Return the network as a function of {"tokens" (m, T), "position" (m,), "class" (m,)} with those outputs (m, 1).

    Under cross-entropy a row has no gradient of its own, so all classes of a position are its outputs (m, V).
    """

    def outputs(params: Params, x: Mapping[str, Array]) -> Array:
        found = model.apply(params, x["tokens"])
        assert isinstance(found, jax.Array)
        found = jnp.take_along_axis(found, x["position"][:, None, None], axis=1)[:, 0]
        return jnp.take_along_axis(found, x["class"][:, None], axis=1) if loss == "squared" else found

    return outputs


@dataclass(frozen=True)
class _EachPosition(Loss):
    """A loss of every position of a sequence, summed over them: outputs and targets (n, T V)."""

    scale: Any
    each: Loss
    classes: int
    name = "each_position"

    def _per_sample(self, f: Any, y: Any) -> Any:
        of = self.each.per_sample(f.reshape(-1, self.classes), y.reshape(-1, self.classes))
        return jnp.sum(of.reshape(f.shape[0], -1), axis=1)

    def _total(self, f: Any, y: Any) -> Any:
        return self.each.total(f.reshape(-1, self.classes), y.reshape(-1, self.classes))


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
    ids: np.ndarray
    """Numbers of the rows: (sequence T + position) V + class, without the class under cross-entropy."""
    rows: Objective
    """The loss of the rows alone, their mean."""
    rows_x: Mapping[str, np.ndarray]
    rows_y: np.ndarray


def set_up(config: TransformerConfig) -> Setting:
    """Load the text of a config, and draw the rows whose kernel is measured.

    Raises:
        ValueError: for a field out of range or a text that cannot be had.
    """
    checks.instance("config", config, TransformerConfig, "as in transformer.PRESETS")
    config.check()
    text = data.load_text(n=config.n_train, length=config.length, data=config.data)
    model, v, after = _model(config, text.c), text.c, text.y.reshape(-1)
    check_memory(jax.eval_shape(model.init, jax.random.key(0), text.x[:1]), config.width)
    rng, squared = np.random.default_rng(ROWS_SEED), config.loss == "squared"
    count = config.subset_size // (2 if squared else v)
    if not count:
        raise ValueError(f"subset_size must be at least {v}, all classes of one position, got {config.subset_size}")
    places = np.sort(rng.choice(after.size, min(count, after.size), replace=False))
    classes = np.zeros(places.size, np.int64)
    if squared:
        other = (after[places] + rng.integers(1, v, places.size)) % v
        ids = np.sort(np.concatenate([places * v + after[places], places * v + other]))
        places, classes = ids // v, ids % v
        rows_y = (classes == after[places]).astype(np.float32)[:, None]
    else:
        ids, rows_y = places, np.eye(v, dtype=np.float32)[after[places]]
    rows_x = {
        "tokens": text.x[places // config.length],
        "position": (places % config.length).astype(np.int32),
        "class": classes.astype(np.int32),
    }
    loss = _EachPosition(float(after.size), by_name(config.loss, "sum"), v)
    return Setting(
        text,
        model,
        jnp.asarray(text.x),
        jax.nn.one_hot(text.y, v).reshape(text.n, -1),
        Objective(_all_outputs(model), loss),
        ids,
        Objective(_chosen_outputs(model, config.loss), by_name(config.loss)),
        rows_x,
        rows_y,
    )


def identity(config: TransformerConfig, setting: Setting) -> dict[str, Any]:
    """Return what decides the numbers of all runs."""
    names = ",".join(config.each_optimizer())
    return {**decisive(config), "optimizers": names, "data_checksum": setting.text.checksum}


def identity_of_run(config: TransformerConfig, optimizer: Optimizer, seed: int, setting: Setting) -> dict[str, Any]:
    """Return what decides the numbers of one run, as its record keeps it."""
    found = {**identity(config, setting), "optimizer": optimizer, "seed": seed}
    found["learning_rate"] = config.rate_of(optimizer)
    for name in ("optimizers", "adam_learning_rate"):
        del found[name]
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
        "subset_ids": setting.ids,
        "kernel_samples": np.int64(setting.ids.size),
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
    transformation = _OPTIMIZERS[optimizer](config.rate_of(optimizer))
    probes_at = probe_epochs(config.epochs, config.spacing())
    probe = KernelProbe(
        setting.rows,
        setting.rows_x,
        setting.rows_y,
        subset=None,
        kernel=config.kernel,
        hessian_epochs=spread(probes_at, config.hessian_probes),
        hessian_precision="float32",
        hessian_of=(objective, *batch),
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
    loss = setting.rows.loss
    return run_and_record(
        Problem(setting.rows.apply_fn, initial, setting.rows_x, setting.rows_y, loss=loss, name="transformer"),
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
