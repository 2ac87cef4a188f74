"""The edge of stability as published: sharpness rises to 2/η under full-batch gradient descent, and hovers there.

Cohen, Kaur, Li, Kolter and Talwalkar (ICLR 2021): a fully connected tanh network of two hidden layers of 200 units,
5,000 images of CIFAR-10, squared loss ‖f - y‖²/(2n) of one-hot targets, η = 0.01, PyTorch's default initialisation.
Ours: critical sharpness beside that of the Hessian, and a proof at every probe that one exact step of η raises or
lowers the loss. No kernel is formed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib.figure import Figure

from lplr_jax import checks, data, plotting
from lplr_jax.curves.edge import Edge, edge_of
from lplr_jax.experiments.experiment import Experiment, record_of
from lplr_jax.experiments.parts import (
    DECIDES_NOTHING,
    DataPart,
    FolderPart,
    LayersPart,
    LossPart,
    SeedPart,
    decisive,
)
from lplr_jax.losses import Squared
from lplr_jax.measurement.curvature import CurvatureProbe
from lplr_jax.models import MLP
from lplr_jax.records import Record
from lplr_jax.reports.exit_codes import OK
from lplr_jax.reports.tables import Cell, Measured, Quantity, Table
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.loop import run_and_record
from lplr_jax.runs.problem import Problem, check_learning_rate, check_memory, probe_epochs
from lplr_jax.runs.session import Follow, Observer, Say
from lplr_jax.training import evaluate, init_state, train_epochs
from lplr_jax.types import Params


@dataclass(frozen=True)
class EdgeConfig(FolderPart, DataPart, LossPart, SeedPart, LayersPart):
    """Everything that decides the numbers of the run, and where they go."""

    PROBES: ClassVar[int] = 20

    width: int = 200
    """Units of every hidden layer (published)."""
    depth: int = 3
    """Affine layers, the output layer included (published: two hidden layers)."""
    activation: Literal["softplus", "tanh", "relu"] = "tanh"
    """Activation of the hidden layers (published)."""
    epochs: int = 4000
    """Full-batch gradient steps. Calibrated: more than half of them at the edge; published: until accuracy 0.99."""
    learning_rate: float = 0.01
    """Step size η (published); 2/η is the edge."""
    probe_every: int | None = None
    """Epochs between probes; both ends are always probed [default: a twentieth of the run]. Calibrated."""
    hessian_matvecs: int = 10
    """Products with the Hessian a probe, from the last eigenvector on; three times as many at the first. Calibrated."""
    n_train: int = 5000
    """Training images (published), in equal shares of the classes; published: of ten classes, as in the preset
    "paper"."""
    source: Literal["auto", "files", "tfds"] = "auto"
    """Where the images come from."""
    data: Path | None = field(default=None, metadata=DECIDES_NOTHING)
    """File or folder with the images; no copy of CIFAR-10 is in this package."""

    def spacing(self) -> int:
        """Return the epochs between probes."""
        return max(1, self.epochs // self.PROBES) if self.probe_every is None else self.probe_every

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self._check_counts("width", "epochs", least=1)
        checks.whole("probe_every", self.spacing(), least=1, most=self.epochs, of="epochs")
        probe_epochs(self.epochs, self.spacing())
        checks.whole("hessian_matvecs", self.hessian_matvecs, least=2)
        check_learning_rate("learning_rate", self.learning_rate)


PRESETS: dict[str, EdgeConfig] = {
    "smoke": EdgeConfig(n_train=60, width=16, epochs=40),
    "default": EdgeConfig(),
    "paper": EdgeConfig(n_train=5000, classes="0,1,2,3,4,5,6,7,8,9", epochs=10_000),
}
"""Named sets of defaults; "paper" has the published images."""


class Setting(NamedTuple):
    """Images, and the problem made of them."""

    dataset: data.Dataset
    problem: Problem


_model = lru_cache(maxsize=16)(MLP)


def load_images(config: EdgeConfig) -> data.Dataset:
    """Load the images of a config.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    settings = {"source": config.source, "data_dir": config.data, "n_train": config.n_train}
    try:
        return data.load("cifar10", **settings, classes=config.each_class())
    except data.DataError as error:
        way = "name the folder or file with `make edge DATA=path` or `lplr edge --data path`"
        raise data.DataError(f"{error} Where this says data_dir, {way}.") from error


def standardised(images: np.ndarray) -> np.ndarray:
    """Return images (n, ...) flat, every pixel with mean 0 and deviation 1 over them (published: over all 50,000)."""
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    deviation = x.std(axis=0)
    return ((x - x.mean(axis=0)) / np.where(deviation > 0, deviation, 1.0)).astype(np.float32)


def initial(model: MLP, seed: int, x: Any) -> Params:
    """Return θ_0 as PyTorch draws that of its linear layers: weights and biases uniform on ±1/√fan_in."""
    params: Any = model.init(jax.random.key(seed), x[:1])["params"]
    keys = jax.random.split(jax.random.key(seed), 2 * len(params))
    drawn = {}
    for place, name in enumerate(sorted(params)):
        bound = params[name]["kernel"].shape[0] ** -0.5
        drawn[name] = {
            leaf: jax.random.uniform(keys[2 * place + at], params[name][leaf].shape, jnp.float32, -bound, bound)
            for at, leaf in enumerate(("kernel", "bias"))
        }
    return {"params": drawn}


def set_up(config: EdgeConfig) -> Setting:
    """Load the images and initialise the network of a config.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    dataset = load_images(config)
    x, y = jnp.asarray(standardised(dataset.x)), jnp.asarray(dataset.y)
    model = _model(config.width, config.depth, config.activation, dataset.c)
    check_memory(jax.eval_shape(model.init, jax.random.key(config.seed), x[:1]), config.width)
    params = initial(model, config.seed, x)
    return Setting(dataset, Problem(model.apply, params, x, y, loss=Squared(config.loss_scale), name="edge"))


def identity(config: EdgeConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of a run, as its record keeps it.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    checksum = load_images(config).checksum
    return {**decisive(config), "probe_every": config.spacing(), "data_checksum": checksum}


def run(
    config: EdgeConfig,
    *,
    observer: Observer | None = None,
    checkpoints: Checkpoints | None = None,
) -> Record:
    """Train, probe, and return the record.

    Args:
        config: what to run; `out` is for the caller, nothing is written to it here.
        observer: told of every chunk and probe.
        checkpoints: where the state is saved after every probe, and from where it goes on; None saves nothing.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    dataset, problem = set_up(config)
    optimizer, batch, params = _gradient_descent(config.learning_rate), problem.data, problem.params
    settings = {"objective": problem.objective, "optimizer": optimizer}
    probe = CurvatureProbe(
        problem.objective, *batch, matvecs=config.hessian_matvecs, learning_rate=config.learning_rate
    )
    return run_and_record(
        problem,
        init_state(params, optimizer),
        probe=probe,
        probes_at=probe_epochs(config.epochs, config.spacing()),
        advance=lambda state, k: train_epochs(state, batch, params, epochs=k, **settings),
        evaluate=partial(evaluate, batch=batch, initial=params, objective=problem.objective),
        numbers=problem.numbers(config.learning_rate),
        config=identity(config),
        provenance=lambda: {"data": dataset.provenance(config.data)},
        seed=config.seed,
        observer=observer,
        checkpoints=checkpoints,
    )


_gradient_descent = lru_cache(maxsize=16)(optax.sgd)


def run_in(
    config: EdgeConfig,
    folder: Path,
    identity: Mapping[str, Any],
    *,
    say: Say,
    follow: Follow,
    check: Callable[[], None],
) -> dict[str, Record]:
    """Run a config in a folder, or read the record that is there; see `lplr_jax.experiments.experiment.Run`."""

    def make(observer: Observer | None, checkpoints: Checkpoints) -> Record:
        return run(config, observer=observer, checkpoints=checkpoints)

    told = {"say": say, "follow": follow, "check": check}
    record = record_of(folder, "edge", identity, make, run="edge", epochs=config.epochs, **told)
    say(f"record   {folder / 'record.npz'}")
    return {"edge": record}


_QUANTITIES = (
    Quantity("threshold", "2/η", r"$2/\eta$", "the edge: above it gradient descent leaves a quadratic"),
    Quantity("sharpness_0", "sharpness, 0", "sharpness, $0$", "λ_max(∇²L(θ_0)), float32 products, from below"),
    Quantity("reached", "reached at epoch", "reached at epoch", "first probe whose sharpness is at least 2/η"),
    Quantity("mean", "sharpness / (2/η) there, mean", r"sharpness$/(2/\eta)$ there, mean", "probes from then on"),
    Quantity("least", "least", "least", "the least of these"),
    Quantity("most", "largest", "largest", "the largest of these"),
    Quantity("critical", "critical sharpness / (2/η), mean", r"critical sharpness$/(2/\eta)$, mean",
             "2/η_c by forward passes, probes from then on"),
    Quantity("critical_before", "the same before", "the same before", "its mean over the probes before"),
    Quantity("rises_before", "steps that rise before", "steps that rise before", "share of the steps up to then"),
    Quantity("rises", "steps that rise there", "steps that rise there", "share of the steps from then on"),
    Quantity("raised", "exact step raises, proved", "exact step raises, proved",
             "probes at which L(θ - η∇L) > L(θ) is proved, of those from then on"),
    Quantity("lowered", "exact step lowers, proved", "exact step lowers, proved", "probes where it is proved to fall"),
    Quantity("loss_0", "L_0", "$L_0$", "training loss at initialisation"),
    Quantity("loss_reached", "L there", "$L$ there", "training loss at the probe that reached 2/η"),
    Quantity("loss_t", "L_T", "$L_T$", "last training loss"),
)  # fmt: skip


def table(done: Mapping[str, Record], config: EdgeConfig) -> Table:
    """Return what the run says beside the published statement."""
    del config
    (record,) = done.values()
    found = edge_of(record)
    values: dict[str, Cell] = {
        one.key: value if isinstance(value := getattr(found, one.key), str | int) else _number(value)
        for one in _QUANTITIES
    }
    notes = (
        "Published (Cohen et al., ICLR 2021): the sharpness rises until it reaches 2/η and then hovers right at, or "
        "just above, this value; the loss is no longer monotone, and yet falls over long spans.",
        f"Here: {_finding(found)}.",
        "Differences: the images and classes at hand, pixels standardised over them and not over all 50,000, our draw "
        "of the initialisation. Critical sharpness: Kalra et al., arXiv 2601.16979.",
    )
    cells = {key: [value] for key, value in values.items()}
    return Table("Edge of stability", (f"η = {float(record['learning_rate']):g}",), _QUANTITIES, cells, notes)


def _number(value: float | None) -> Cell:
    return None if value is None or math.isnan(value) else Measured(value)


def _finding(found: Edge) -> str:
    if found.reached is None:
        share = found.largest / found.threshold
        return f"not reached: the sharpness is at most {share:.3g} of 2/η; more --epochs are needed"
    word = "hovers" if found.hovers else "does not hover"
    falls = "falls" if found.loss_t < found.loss_reached else "does not fall"
    return (
        f"2/η = {found.threshold:g} is reached at epoch {found.reached}; from there on the sharpness {word} "
        f"({found.least:.3g} to {found.most:.3g} of 2/η at {found.probes} probes), {found.rises:.0%} of the steps "
        f"raise the loss ({found.rises_before:.0%} before), and the loss {falls}, from {found.loss_reached:.4g} to "
        f"{found.loss_t:.4g}"
    )


def figure(done: Mapping[str, Record], config: EdgeConfig) -> Figure | str:
    """Return sharpness and loss along the run, or why there are none."""
    del config
    (record,) = done.values()
    return "the run diverged at epoch 0" if record.diverged_at == 0 else plotting.edge(record)


EXPERIMENT = Experiment(
    name="edge",
    config=EdgeConfig,
    presets=PRESETS,
    prepare=lambda config, folder: identity(config),
    identity=lambda config, given: given,
    run=run_in,
    records=lambda done: done,
    table=table,
    figure=figure,
    diverged=OK,
)
