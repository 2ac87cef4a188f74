"""Mini-batches of several sizes and seeds on the MNIST problem: a noise ball, or none where the network interpolates.

With σ_b² of the last probe and the mean ‖∇L‖² of the second half of a run, the loss falls on average while
R = ηβσ_b² / ((2 - ηβ) ‖∇L‖²) is below 1; where ‖∇L‖² goes with L a ball would lie at R L. As σ_b² goes with L too,
there is none where R stays below 1. An estimate, no bound; whether there is a ball is measured as well, by how far the
mean loss of the last quarter of a run is below that of the quarter before. Ours.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import optax
from matplotlib.figure import Figure

from lplr_jax import checks, plotting, theory
from lplr_jax.checks import integers
from lplr_jax.experiments import mnist, step_size
from lplr_jax.experiments.experiment import Experiment, record_of
from lplr_jax.experiments.parts import DataPart, FolderPart, LayersPart, LossPart, SeedsPart, decisive, shared
from lplr_jax.experiments.step_size import known_sharpness, sharpness_of_all, three_digits, write_predictions
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.records import Record
from lplr_jax.reports.exit_codes import OK
from lplr_jax.reports.tables import Cell, Measured, Quantity, Table, last_finite, mean_of
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.loop import train
from lplr_jax.runs.problem import MOST, Probes
from lplr_jax.runs.session import Follow, Observer, Say, unfollowed


@dataclass(frozen=True)
class NoiseConfig(ArmsPart, FolderPart, DataPart, LossPart, SeedsPart, LayersPart):
    """Everything that decides the runs, and where they go."""

    width: int = 128
    """Units of every hidden layer."""
    steps: int = 600
    """Steps of every run, whatever its batches. Calibrated."""
    batch_sizes: str = "10,50,200,1000"
    """Samples of a batch, with commas; n for all data in every step. Calibrated."""
    share: float = 0.2
    """η of all runs, as a share of 2/β at initialisation. Calibrated."""
    seeds: str = "0,1,2,3,4"
    """Seeds of the batches, with commas; the initialisation is that of the first."""

    def each_size(self) -> tuple[int, ...]:
        """Return the batch sizes, ascending."""
        sizes = tuple(sorted(integers("batch_sizes", self.batch_sizes, least=1)))
        checks.whole("batch_sizes", sizes[-1], most=self.n_train, of="n_train")
        return sizes

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        checks.whole("steps", self.steps, least=2, most=MOST["epochs"])
        checks.number("share", self.share, above=0)
        self.each_size()
        mnist.resolve(_base(self))


PRESETS: dict[str, NoiseConfig] = {
    "smoke": NoiseConfig(width=16, steps=40, n_train=60, batch_sizes="6,60", seeds="0,1"),
    "default": NoiseConfig(),
    "paper": NoiseConfig(steps=6000),
}
"""Named sets of defaults. All calibrated."""


def _base(config: NoiseConfig) -> mnist.MnistConfig:
    own = {"epochs": config.steps, "seed": config.each_seed()[0], "hessian_precision": "float32"}
    return mnist.MnistConfig(**shared(config, mnist.MnistConfig) | own)


def identity(config: NoiseConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of the runs.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    texts = {"batch_sizes": ",".join(map(str, config.each_size())), "seeds": ",".join(map(str, config.each_seed()))}
    return {**decisive(config), **texts, "data_checksum": mnist.load_data(_base(config)).checksum}


Done = Mapping[tuple[int, int], Record]
"""The record of each batch size and seed."""


def run(
    config: NoiseConfig,
    folder: Path,
    *,
    say: Say = lambda line: None,
    follow: Follow = unfollowed,
    check: Callable[[], None] = lambda: None,
) -> Done:
    """Train from one initialisation with batches of every size and seed; what is there is read instead.

    Args:
        config: what to run; `out` and `force` are for the caller.
        folder: where every run gets a folder of its own.
        say: told one line at a time what is done.
        follow: from name and number of steps to a context with an observer for one run.
        check: called before every write; raises where nothing must be written any more.

    Raises:
        ValueError: for a field out of range, data that cannot be had, or runs of another config in the folder.
    """
    config.check()
    base = _base(config)
    (beta,) = sharpness_of_all([base], folder, say=say)
    eta = three_digits(config.share * 2 / beta)
    words = f"η = {eta:g} is {config.share:g} of 2/β = {2 / beta:.4g} at θ_0, for every batch size"
    say(words)
    check()
    write_predictions(words, [(step_size.Arm("noise", "common", replace(base, learning_rate=eta)), beta)], folder)
    problem = mnist.set_up(base)
    probes = Probes(
        max(1, config.steps // 2), hessian=3, hessian_precision="float32", spectrum=0, search=0, seed=base.seed
    )
    common = {key: value for key, value in identity(config).items() if key not in ("seeds", "batch_sizes")}
    common["initial_seed"] = base.seed
    done: dict[tuple[int, int], Record] = {}
    for size, seed in _arms(config):
        name = _name(size, seed)
        if not config.takes(name):
            continue
        decides = {**common, "batch_size": size, "seed": seed, "learning_rate": eta}

        def make(
            observer: Observer | None, checkpoints: Checkpoints, size: int = size, seed: int = seed, told: Any = decides
        ) -> Record:
            del checkpoints  # a run of seconds, which starts afresh where it was stopped
            settings = {"batch_size": size, "sampling": "independent", "seed": seed, "learning_rate": eta}
            record = train(problem, optax.sgd(eta), steps=config.steps, probes=probes, observer=observer, **settings)
            return replace(record, config=told)

        done[size, seed] = record_of(
            folder / name,
            "mnist",
            decides,
            make,
            run=name,
            epochs=config.steps,
            say=lambda line, name=name: say(f"{name}: {line}"),
            follow=follow,
            check=check,
        )
        say(
            f"{name}: L_T = {last_finite(done[size, seed]['loss']):.4g}, R = {_of_probe(done[size, seed])['ratio']:.3g}"
        )
    return done


def _arms(config: NoiseConfig) -> list[tuple[int, int]]:
    """Return size of the batches and seed of every run."""
    # All data in every step: no seed decides anything.
    return [
        (size, seed)
        for size, seed in itertools.product(config.each_size(), config.each_seed())
        if size != config.n_train or seed == config.each_seed()[0]
    ]


def _name(size: int, seed: int) -> str:
    return f"b{size}-seed{seed}"


def _of_probe(record: Record) -> dict[str, float]:
    """Return what the last probe that has all of it says of the noise; NaN where none has."""
    names = ("probe_loss", "probe_grad_sq_norm", "sharpness")
    loss, slope, beta = (np.asarray(record[name], np.float64) for name in names)
    n, b = int(record["n"]), int(record["batch_size"]) if "batch_size" in record else int(record["n"])
    squares = record["sample_grad_sq_norm"] if b < n else slope
    share = (n - b) / (b * (n - 1))
    eta = float(record["learning_rate"])
    variance = (squares - slope) * share
    # An iterate that happens to lie low in a steep direction has a small gradient: averages over the second half tell.
    late = record["epoch"] >= record["epoch"][-1] / 2
    mean_slope, mean_loss = (float(np.nanmean(record[name][late])) for name in ("grad_sq_norm", "loss"))
    ratio = eta * beta * variance / ((2 - eta * beta) * mean_slope)
    growth = 2 * (n / float(record["loss_scale"])) * record["sample_kernel_max"] * share if b < n else np.nan * loss
    mean = record["batch_decrease"] if b < n else np.nan * loss
    predicted = -eta * (1 - eta * beta / 2) * slope + eta**2 * beta * variance / 2
    known = np.flatnonzero(np.isfinite(ratio))
    values = {
        "variance": variance, "loose": variance / (growth * loss), "ratio": ratio, "ball": ratio * mean_loss,
        "step": mean, "step_bound": predicted,
    }  # fmt: skip
    return {name: float(value[known[-1]]) if known.size else math.nan for name, value in values.items()}


def _fall(record: Record) -> float:
    """Return the mean loss of the last quarter over that of the quarter before: near 1 in a ball, less on the way."""
    place, loss = record["epoch"] / record["epoch"][-1], record["loss"]
    before, last = (float(np.nanmean(loss[(place >= low) & (place <= high)])) for low, high in ((0.5, 0.75), (0.75, 1)))
    return last / before


def _martingale(record: Record) -> float:
    for part in theory.verify(record)["noise"].parts:
        if part.claim == "noise.supermartingale":
            return min(1.0, 1 / part.measured) if part.measured > 0 else math.nan
    return math.nan


_QUANTITIES = (
    Quantity("loss", "L_T", "$L_T$", "last training loss, mean ± deviation over seeds, units of L"),
    Quantity("variance", "σ_b²", r"$\sigma_b^2$", "variance of the gradient of a batch at θ_T"),
    Quantity("loose", "σ_b²/(v L)", r"$\sigma_b^2/(vL)$", "the same over its growth bound"),
    Quantity(
        "ratio", "R", "$R$", "ηβσ_b²/((2 - ηβ)‖∇L‖²), ‖∇L‖² the mean of the second half: below 1 the loss still falls"
    ),
    Quantity(
        "ball",
        "noise ball at",
        "noise ball at",
        "R times the mean loss of the second half where R >= 1; none where R is below 1",
    ),
    Quantity(
        "fall",
        "last quarter / before",
        "last quarter / before",
        "mean loss of the last quarter over that of the quarter before: 1 in a ball, below 1 where L still falls",
    ),
    Quantity("step", "mean step", "mean step", "mean of L(θ_T - ηg_B) - L(θ_T) over batches"),
    Quantity("step_bound", "mean step, bound", "mean step, bound", "what the sharpness at θ_T promises"),
    Quantity("p", "p", "$p$", "least p over seeds of the test along the run (claim noise)"),
)


def table(done: Done) -> Table:
    """Return one column a batch size."""
    sizes = list(dict.fromkeys(size for size, _ in done))
    cells: dict[str, list[Cell]] = {one.key: [] for one in _QUANTITIES}
    for size in sizes:
        found = [record for (b, _), record in done.items() if b == size]
        values = [_of_probe(record) for record in found]
        cells["loss"].append(mean_of([last_finite(record["loss"]) for record in found]))
        for key in ("variance", "loose", "ratio", "step", "step_bound"):
            cells[key].append(mean_of([value[key] for value in values]))
        cells["fall"].append(mean_of([_fall(record) for record in found]))
        balls = [value["ball"] for value in values if value["ratio"] >= 1]
        cells["ball"].append(mean_of(balls) if balls else "none")
        tested = [p for p in map(_martingale, found) if math.isfinite(p)]
        cells["p"].append(Measured(min(tested)) if tested else "-")
    notes = (
        "Independent batches, one initialisation, one η. At the last probe; ours, not the paper's.",
        "A p above 0.01 is not refuted; one run never proves an expectation.",
    )
    return Table("Mini-batches: noise ball or none", tuple(f"b = {size}" for size in sizes), _QUANTITIES, cells, notes)


def figure(done: Done) -> Figure:
    """Return the loss of every batch size, and the balls that are predicted where R >= 1."""
    curves: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    levels: dict[str, float] = {}
    for size in dict.fromkeys(size for size, _ in done):
        runs = [record for (b, _), record in done.items() if b == size]
        name = f"b = {size}: last quarter / before {np.mean([_fall(record) for record in runs]):.3f}"
        curves[name] = [(record["epoch"], record["loss"]) for record in runs]
        balls = [found["ball"] for found in map(_of_probe, runs) if found["ratio"] >= 1]
        if balls:
            levels[name] = float(np.mean(balls))
    return plotting.losses(curves, levels, title="mini-batches: the loss, and the noise ball where one is predicted")


EXPERIMENT = Experiment(
    name="noise",
    config=NoiseConfig,
    presets=PRESETS,
    prepare=lambda config, folder: None if config.force else known_sharpness(folder),
    identity=lambda config, given: identity(config),
    run=lambda config, folder, given, /, **told: run(config, folder, **told),
    records=lambda done: {_name(*key): record for key, record in done.items()},
    table=lambda done, config: table(done),
    figure=lambda done, config: figure(done),
    diverged=OK,
    arms=lambda config: [_name(*one) for one in _arms(config)],
)
