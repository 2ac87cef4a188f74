"""Initialisations side by side at one η, for the figures of the paper's earlier version."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from matplotlib.figure import Figure

from lplr_jax import checks, plotting, records
from lplr_jax.experiments import mnist
from lplr_jax.experiments.ablation import run_arm
from lplr_jax.experiments.experiment import Experiment
from lplr_jax.experiments.parts import (
    DECIDES_NOTHING,
    DataPart,
    FolderPart,
    LayersPart,
    LossPart,
    ProbePart,
    SeedPart,
    decisive,
    shared,
)
from lplr_jax.experiments.quantities import cell, quantities, row
from lplr_jax.experiments.step_size import Arm, known_sharpness, sharpness_of_all, three_digits, write_predictions
from lplr_jax.records import Record
from lplr_jax.reports.exit_codes import OK
from lplr_jax.reports.tables import Table
from lplr_jax.runs.session import Follow, Say, unfollowed

Init = Literal["he", "scaled-output", "antisymmetric"]

PAPER_SLOPE = 1.14
"""Log-log slope of ‖∇L‖² against the gap in the paper's earlier version (v2, MNIST, smoothed)."""


@dataclass(frozen=True)
class InitialisationConfig(FolderPart, DataPart, ProbePart, LossPart, SeedPart, LayersPart):
    """Everything that decides the arms, and where they go."""

    PROBES: ClassVar[int] = 8

    inits: str = "he,scaled-output,antisymmetric"
    """Initialisations, with commas; the "enhanced" one of the paper's earlier version is not known to us."""
    width: int = 128
    """Units of every hidden layer."""
    share: float = 0.4
    """η of all arms, as a share of the least 2/β at initialisation; below 0.5 is below 1/β for all. Calibrated."""
    learning_rate: float | None = None
    """η of all arms, instead of the rule."""
    probe_every: int | None = None
    """Epochs between kernel probes; both ends are always probed [default: an eighth of the run]. Calibrated."""
    ablation: Path | None = field(default=None, metadata=DECIDES_NOTHING)
    """Folder of a width ablation, for the loss against width [default: runs/ablation, or that of the preset]."""
    loss_epoch: int = field(default=250, metadata=DECIDES_NOTHING)
    """Epoch at which the loss is shown against width (paper, v2: 250)."""

    def each_init(self) -> tuple[str, ...]:
        """Return the initialisations, in the order asked for."""
        names = tuple(part.strip() for part in self.inits.split(",")) if isinstance(self.inits, str) else ("",)
        unknown = [name for name in names if name not in get_args(Init)]
        if unknown or len(set(names)) != len(names):
            raise ValueError(
                f"inits must be distinct names among {', '.join(get_args(Init))}, got {checks.shown(self.inits)}"
            )
        return names

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        checks.number("share", self.share, above=0)
        checks.whole("loss_epoch", self.loss_epoch, least=0)
        for name in self.each_init():
            mnist.resolve(_base(self, name, 1.0 if self.learning_rate is None else self.learning_rate))


PRESETS: dict[str, InitialisationConfig] = {
    "smoke": InitialisationConfig(
        width=32, epochs=60, n_train=200, loss_epoch=50, ablation=Path("runs/ablation-smoke")
    ),
    "default": InitialisationConfig(),
    "paper": InitialisationConfig(epochs=10_000, ablation=Path("runs/ablation-paper")),
}
"""Named sets of defaults. All calibrated."""


def identity(config: InitialisationConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of the arms.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    names = config.each_init()
    checksum = mnist.load_data(_base(config, names[0], 1.0)).checksum
    return {**decisive(config), "inits": ",".join(names), "data_checksum": checksum}


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
    config.check()
    names = config.each_init()
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
    own = {
        "init": init,
        "learning_rate": learning_rate,
        "probe_every": config.spacing(),
        "hessian_probes": 2,
        "hessian_precision": "float32",
        "search_steps": 0,
        "certify_floor": 0.0,
    }
    return mnist.MnistConfig(**shared(config, mnist.MnistConfig) | own)


def widths_of(folder: Path) -> tuple[Record, ...]:
    """Return the records of an ablation that share its common η, none where there is no ablation."""
    found = []
    for path in sorted(folder.glob("m*-seed*/record.npz")):
        if "-smaller-" not in path.parent.name:
            found.append(records.load(path))
    return tuple(found)


SHOWN = (
    *(
        "learning_rate",
        "eta_beta",
        "critical_step",
        "p",
        "loss_0",
        "loss_t",
        "lambda_0",
        "lambda_t",
        "drift_t",
        "factor_zero",
    ),
    *("factor_proxy", "slope_proxy", "slope_zero", "slope_range", "predicted", "observed", "diverged", "verdict"),
)
"""Quantities of the table."""


def table(done: Sequence[tuple[Arm, Record]]) -> Table:
    """Return one column an initialisation."""
    columns = [row(record, SHOWN) for _, record in done]
    return Table(
        f"Initialisations at one η, width {done[0][0].config.width}",
        tuple(arm.name for arm, _ in done),
        quantities(SHOWN),
        {key: [cell(column[key]) for column in columns] for key in SHOWN},
        (f"The paper's earlier version fits a slope of {PAPER_SLOPE} (smoothed, another set-up).",),
    )


Done = tuple[tuple[tuple[Arm, Record], ...], tuple[Record, ...]]
"""Arms with their records, and the records of the ablation beside them."""


def _beside(config: InitialisationConfig) -> Path:
    return config.ablation or Path("runs/ablation")


def _prepare(config: InitialisationConfig, folder: Path) -> tuple[Record, ...]:
    # Read first: a bad record beside must not be found after the training.
    widths = widths_of(_beside(config))
    if not config.force:
        known_sharpness(folder)
    return widths


def figure(done: Done, config: InitialisationConfig) -> Figure:
    """Return the panels of every initialisation, and the loss against width where an ablation is there."""
    arms, widths = done
    return plotting.initialisation({arm.name: record for arm, record in arms}, widths, epoch=config.loss_epoch)


def notes(done: Done, config: InitialisationConfig) -> tuple[str, ...]:
    """Say so where there is no ablation."""
    where = f"no width ablation at {_beside(config)}"
    return () if done[1] else (f"{where}: the panel of loss against width is left out (`lplr ablation` makes one)",)


EXPERIMENT = Experiment(
    name="initialisation",
    config=InitialisationConfig,
    presets=PRESETS,
    prepare=_prepare,
    identity=lambda config, widths: identity(config),
    run=lambda config, folder, widths, /, **told: (run(config, folder, **told), widths),
    records=lambda done: {arm.name: record for arm, record in done[0]},
    table=lambda done, config: table(done[0]),
    figure=figure,
    notes=notes,
    diverged=OK,
)
