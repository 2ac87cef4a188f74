"""Network width from λ_min(Θ_0): λ_0 against width with proved intervals, and where it stops growing.

Sunada, Yamasaki and Maki (ICLR 2026) estimate the width beyond which the test loss no longer falls, before any
training: the least eigenvalue of the kernel at the initialisation, averaged over runs, is fitted by
g(m) = c - a m/(b + m), and the least width is taken at which g' falls below a threshold. Ours: every eigenvalue is
enclosed, the threshold is a share of the fitted limit, both parametrisations are measured, and the held-out loss is
that of the network linearised at θ_0, in closed form.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from lplr_jax import checks, data, diagnostics, linalg, plotting
from lplr_jax.curves.saturation import Saturation, saturation
from lplr_jax.experiments import mnist
from lplr_jax.experiments.experiment import Experiment, record_of
from lplr_jax.experiments.parts import (
    DECIDES_NOTHING,
    DataPart,
    FolderPart,
    LossPart,
    SeedsPart,
    WidthsPart,
    decisive,
    shared,
)
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.losses import Squared
from lplr_jax.measurement.linearised import held_out_loss
from lplr_jax.models import MLP, PARAMETRISATIONS
from lplr_jax.ntk.empirical import check_kernel_name
from lplr_jax.records import Record
from lplr_jax.reports.tables import Cell, Measured, Quantity, Table, mean_of
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.problem import Probes, Problem, check_memory
from lplr_jax.runs.session import Follow, Observer, Say, unfollowed
from lplr_jax.runs.snapshots import measure
from lplr_jax.theory.verdict import at_least, at_most


@dataclass(frozen=True)
class WidthConfig(ArmsPart, FolderPart, DataPart, LossPart, SeedsPart, WidthsPart):
    """Everything that decides λ_0 of every width, and where it goes."""

    widths: str = "16,32,64,128,256,512,1024"
    """Widths m, with commas."""
    seeds: str = "0,1,2,3,4"
    """Seeds of the initialisation, with commas (published: five runs)."""
    parametrisations: str = "ntk,standard"
    """Parametrisations, with commas: "ntk" (published), whose kernel has a limit, "standard", whose kernel grows."""
    n_train: int = 500
    """Training samples, n. Calibrated: with as many held out these are the digits at hand without any file."""
    held_out: int = 500
    """Samples beside them on which the linearised network is judged; 0 for none. Calibrated."""
    share: float = field(default=0.9, metadata=DECIDES_NOTHING)
    """Share of the fitted limit at which λ_0 counts as grown. Calibrated: the published threshold is unknown to us."""
    kernel: str = "auto"
    """Kernel implementation: auto, engine, neural-tangents, or neural-tangents:NAME."""

    def each_parametrisation(self) -> tuple[str, ...]:
        """Return the parametrisations, in the order asked for."""
        text = self.parametrisations
        names = tuple(part.strip() for part in text.split(",")) if isinstance(text, str) else ("",)
        if set(names) - set(PARAMETRISATIONS) or len(set(names)) != len(names):
            raise ValueError(
                f"parametrisations must be distinct names among {', '.join(PARAMETRISATIONS)}, got {checks.shown(text)}"
            )
        return names

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        self.each_parametrisation()
        checks.whole("held_out", self.held_out, least=0)
        if not 0 < checks.number("share", self.share, above=0) < 1:
            raise ValueError(f"share must lie between 0 and 1, got {checks.shown(self.share)}")
        check_kernel_name(self.kernel)
        for width in self.each_width():
            mnist.resolve(_data_config(self, width))


PRESETS: dict[str, WidthConfig] = {
    "smoke": WidthConfig(widths="8,16,32", seeds="0,1", n_train=40, held_out=40),
    "default": WidthConfig(),
    "paper": WidthConfig(widths="16,32,64,128,256,512,1024,2048,4096", n_train=1000, held_out=1000),
}
"""Named sets of defaults. All calibrated: the published networks and data sets are others."""


def _data_config(config: WidthConfig, width: int) -> mnist.MnistConfig:
    own: dict[str, Any] = {"width": width, "n_train": config.n_train + config.held_out}
    return mnist.MnistConfig(**shared(config, mnist.MnistConfig) | own)


class Samples(NamedTuple):
    """Training and held-out samples, and where they come from."""

    x: np.ndarray
    y: np.ndarray
    held_x: np.ndarray
    held_y: np.ndarray
    dataset: data.Dataset


def load_samples(config: WidthConfig) -> Samples:
    """Load the samples: the first ones of each class are trained on, in equal shares, the next ones are held out.

    Raises:
        ValueError: for data that cannot be had.
    """
    dataset = mnist.load_data(_data_config(config, config.each_width()[0]))
    if dataset.n <= config.n_train and config.held_out:
        raise data.DataError(
            f"{dataset.n} samples leave none of n_train = {config.n_train} to hold out; lower --n-train"
        )
    ids = np.arange(min(config.n_train, dataset.n))
    if dataset.classes:
        _, labels = np.unique(dataset.y, axis=0, return_inverse=True)
        ids = diagnostics.stratified_ids(np.eye(int(labels.max()) + 1)[labels.reshape(-1)], config.n_train)
    held = np.setdiff1d(np.arange(dataset.n), ids)
    return Samples(dataset.x[ids], dataset.y[ids], dataset.x[held], dataset.y[held], dataset)


class Arm(NamedTuple):
    """One initialisation."""

    parametrisation: str
    width: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.parametrisation}-m{self.width}-seed{self.seed}"


def arms_of(config: WidthConfig) -> list[Arm]:
    """Return the arms: widths ascending, all seeds of one before the next, as they share compiled code."""
    return [
        Arm(*one) for one in itertools.product(config.each_parametrisation(), config.each_width(), config.each_seed())
    ]


def identity(config: WidthConfig) -> dict[str, Any]:
    """Return everything that decides the numbers.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    lists = {
        "widths": config.each_width(),
        "seeds": config.each_seed(),
        "parametrisations": config.each_parametrisation(),
    }
    texts = {name: ",".join(map(str, values)) for name, values in lists.items()}
    return {**decisive(config), **texts, "data_checksum": load_samples(config).dataset.checksum}


_model = lru_cache(maxsize=64)(MLP)

Done = Mapping[Arm, Record]
"""The record of each initialisation, of one point and no step."""


def run(
    config: WidthConfig,
    folder: Path,
    *,
    say: Say = lambda line: None,
    follow: Follow = unfollowed,
    check: Callable[[], None] = lambda: None,
) -> Done:
    """Measure every width, parametrisation and seed at its initialisation; what is there is read instead.

    Args:
        config: what to run; `out` and `force` are for the caller.
        folder: where every arm gets a folder of its own.
        say: told one line at a time what is done.
        follow: from name and number of epochs to a context with an observer for one arm.
        check: called before every write; raises where nothing must be written any more.

    Raises:
        ValueError: for a field out of range, data that cannot be had, or arms of another config in the folder.
    """
    config.check()
    samples = load_samples(config)
    lists = ("widths", "seeds", "parametrisations")
    common = {key: value for key, value in identity(config).items() if key not in lists}
    done: dict[Arm, Record] = {}
    for arm in arms_of(config):
        if not config.takes(arm.name):
            continue
        decides = {**common, **arm._asdict()}

        def make(
            observer: Observer | None, checkpoints: Checkpoints, arm: Arm = arm, decides: Mapping[str, Any] = decides
        ) -> Record:
            del checkpoints, observer  # a point of seconds
            return replace(measure_arm(config, arm, samples), config=decides)

        done[arm] = record_of(
            folder / arm.name,
            "width",
            decides,
            make,
            run=arm.name,
            epochs=1,
            say=lambda line, arm=arm: say(f"{arm.name}: {line}"),
            follow=follow,
            check=check,
        )
        say(f"{arm.name}: λ_0 = {float(done[arm]['ntk_min_eig'][0]):.6g}")
    return done


def measure_arm(config: WidthConfig, arm: Arm, samples: Samples) -> Record:
    """Measure one initialisation: λ_0 with its proved interval, η_c, and what the linearised network says elsewhere."""
    model = _model(
        arm.width,
        config.depth,
        config.activation,
        samples.y.shape[1],
        initialisation=config.init,
        parametrisation=arm.parametrisation,
    )
    x, y = jnp.asarray(samples.x), jnp.asarray(samples.y)
    check_memory(jax.eval_shape(model.init, jax.random.key(arm.seed), x[:1]), arm.width)
    params = model.init(jax.random.key(arm.seed), x[:1])
    problem = Problem(model.apply, params, x, y, loss=Squared(config.loss_scale), name="width")
    probes = Probes(at=[0], hessian=0, spectrum=0, search=0, kernel=config.kernel, seed=arm.seed)
    record = measure(problem, {0: params}, probes=probes)
    loss = math.nan
    if len(samples.held_x):
        try:
            held = (jnp.asarray(samples.held_x), samples.held_y)
            loss = held_out_loss(model.apply, params, x, samples.y, *held, kernel=config.kernel)
        except linalg.FAILURES:
            pass  # λ_0 is not above its rounding, which the record says
    arrays = {**record.arrays, "held_out_loss": np.asarray(loss)}
    provenance = {**record.provenance, "data": samples.dataset.provenance(config.data)}
    return replace(record, arrays=arrays, provenance=provenance)


class Growth(NamedTuple):
    """λ_0 of one parametrisation against width.

    Attributes:
        widths: m, ascending.
        values: λ_0, (widths, seeds).
        lower: proved lower ends, the same shape.
        upper: proved upper ends.
        fit: the saturating curve through the means; None where there are fewer than three widths.
        stops: width at which it reaches the share of its limit; NaN where it does not within the widths.
    """

    widths: np.ndarray
    values: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    fit: Saturation | None
    stops: float

    def proved(self, place: int) -> tuple[float, float]:
        """Return an interval that holds the mean of λ_0 over the seeds, its own rounding included."""
        low, high = self.lower[place], self.upper[place]
        # A mean of k numbers is off by at most k + 1 roundings of the mean of their moduli.
        rounding = (low.size + 2) * 2.0**-52 * max(float(np.abs(low).mean()), float(np.abs(high).mean()))
        return float(low.mean()) - rounding, float(high.mean()) + rounding

    def gain(self, place: int) -> tuple[float, float, float]:
        """Return mean λ_0 at a width over that at the width before, and the proved interval of this ratio."""
        (low, high), (low_before, high_before) = self.proved(place), self.proved(place - 1)
        below = low / high_before * (1 - 2.0**-51) if low > 0 else math.nan
        above = high / low_before * (1 + 2.0**-51) if low_before > 0 else math.inf
        mean = self.values.mean(axis=1)
        return float(mean[place] / mean[place - 1]), below, above


def growth(done: Done, parametrisation: str, share: float) -> Growth:
    """Return λ_0 of a parametrisation against width, and where it stops growing."""
    widths = list(dict.fromkeys(arm.width for arm in done if arm.parametrisation == parametrisation))

    def column(name: str) -> np.ndarray:
        return np.array(
            [
                [float(record[name][0]) for arm, record in done.items() if arm[:2] == (parametrisation, width)]
                for width in widths
            ]
        )

    m, values = np.array(widths, np.float64), column("ntk_min_eig")
    fit = saturation(m, values.mean(axis=1))
    stops = math.nan if fit is None else fit.reaches(share)
    # A width that was not measured is no finding: beyond the last one the limit is an extrapolation.
    stops = max(stops, m[0]) if stops <= m[-1] else math.nan
    return Growth(m, values, column("ntk_min_eig_lower"), column("ntk_min_eig_upper"), fit, stops)


QUANTITIES = (
    Quantity("p", "p", "$p$", "parameters"),
    Quantity("lambda_0", "λ_0", r"$\lambda_0$", "λ_min of the full kernel at θ_0, output²/parameter², over seeds"),
    Quantity("lower", "mean λ_0 ≥ (proved)", r"mean $\lambda_0 \geq$ (proved)", "mean of the proved lower ends"),
    Quantity("upper", "mean λ_0 ≤ (proved)", r"mean $\lambda_0 \leq$ (proved)", "mean of the proved upper ends"),
    Quantity("gain", "gain", "gain", "mean λ_0 over that of the width before"),
    Quantity("gain_proved", "gain, proved", "gain, proved", "interval that holds this ratio, of these seeds"),
    Quantity("critical_step", "η_c at θ_0", r"$\eta_c$ at $\theta_0$", "the step along -∇L beyond which L rises"),
    Quantity("held_out", "held-out loss", "held-out loss", "‖f - y‖²/(2n) of the linearised network, trained to zero"),
)


def table(done: Done, config: WidthConfig) -> Table:
    """Return one column a width and parametrisation: λ_0, what is proved of it, and the linearised network's loss."""
    cells: dict[str, list[Cell]] = {one.key: [] for one in QUANTITIES}
    names, notes = [], []
    for parametrisation in config.each_parametrisation():
        found = growth(done, parametrisation, config.share)
        held = []
        for place, width in enumerate(found.widths):
            records = [record for arm, record in done.items() if arm[:2] == (parametrisation, int(width))]
            names.append(f"{parametrisation}, m = {int(width)}")
            cells["p"].append(int(records[0]["p"]))
            cells["lambda_0"].append(mean_of(list(found.values[place])))
            low, high = found.proved(place)
            cells["lower"].append(at_least(low, 6))
            cells["upper"].append(at_most(high, 6))
            gain, below, above = found.gain(place) if place else (math.nan, math.nan, math.nan)
            cells["gain"].append(Measured(gain) if place else None)
            cells["gain_proved"].append(f"[{at_least(below, 6)}, {at_most(above, 6)}]" if place else None)
            cells["critical_step"].append(mean_of([float(record["critical_step"][0]) for record in records]))
            held.append(mean_of([float(record["held_out_loss"]) for record in records]))
        cells["held_out"] += held
        notes.append(f"{parametrisation}: {_finding(found, config.share, held)}")
    notes += [
        "Published (Sunada, Yamasaki, Maki, ICLR 2026): λ_0 of the kernel at initialisation rises with the width and "
        "saturates, and at the width where its growth stops the test loss stops falling. Fit and averaging over runs "
        "as there; the share of the limit is ours, the published threshold of the slope is not known to us.",
        "Held-out loss: of the network linearised at θ_0 (ours); no network is trained here.",
    ]
    return Table("Width from λ_min(Θ_0)", tuple(names), QUANTITIES, cells, tuple(notes))


def _finding(found: Growth, share: float, held: Sequence[Cell]) -> str:
    """Say where λ_0 stops growing, what it gains at the end, and where the held-out loss is least."""
    last, words = found.widths.size - 1, ""
    if last:
        _, below, above = found.gain(last)
        widths = f"{int(found.widths[last - 1])} to {int(found.widths[last])}"
        words = f"; from width {widths} it gains a factor in [{at_least(below, 4)}, {at_most(above, 4)}], proved"
    losses = [cell.value if isinstance(cell, Measured) else math.inf for cell in held]
    least = int(np.argmin(losses))
    if math.isfinite(losses[last]) and losses[least] < math.inf:
        at = f"m = {int(found.widths[least])}, {losses[least]:.4g}"
        words += f"; the held-out loss is least at {at}, and {losses[last]:.4g} at the widest"
    if found.fit is None:
        return "fewer than three widths: no curve to fit" + words
    if math.isfinite(found.stops):
        return f"λ_0 reaches {share:.0%} of its limit {found.fit.limit:.4g} at m = {found.stops:.0f}" + words
    limit = "the fit does not rise to a limit"
    if found.fit.a < 0 < found.fit.limit:
        reached = float(found.fit.at(found.widths[-1:])[0]) / found.fit.limit
        limit = f"the fit has a limit of {found.fit.limit:.3g}, of which the widest has {reached:.0%}"
    return f"λ_0 does not reach {share:.0%} of a limit within these widths: {limit}" + words


def figure(done: Done, config: WidthConfig) -> Figure:
    """Return λ_0 against width with the fits, and the held-out loss below it."""
    curves = {}
    for name in config.each_parametrisation():
        found = growth(done, name, config.share)
        losses = [
            [float(record["held_out_loss"]) for arm, record in done.items() if arm[:2] == (name, int(width))]
            for width in found.widths
        ]
        curves[name] = plotting.Growing(found.widths, found.values, np.array(losses), found.fit, found.stops)
    return plotting.growing(curves, share=config.share)


EXPERIMENT = Experiment(
    name="width",
    config=WidthConfig,
    presets=PRESETS,
    identity=lambda config, given: identity(config),
    run=lambda config, folder, given, /, **told: run(config, folder, **told),
    records=lambda done: {arm.name: record for arm, record in done.items()},
    table=table,
    figure=figure,
    followed=False,
    arms=lambda config: [arm.name for arm in arms_of(config)],
)
