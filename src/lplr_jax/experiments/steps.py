"""Step rules against width: which of them keep drift, kernel and PL ratio stable without a tuned η (limitation 4)."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from matplotlib.figure import Figure

from lplr_jax import checks, plotting
from lplr_jax.curves.stability import observe
from lplr_jax.experiments import mnist, step_size
from lplr_jax.experiments.experiment import Experiment, record_of
from lplr_jax.experiments.parts import DataPart, FolderPart, LossPart, ProbePart, SeedPart, WidthsPart, decisive, shared
from lplr_jax.experiments.step_size import known_sharpness, sharpness_of_all, three_digits, write_predictions
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.records import Record
from lplr_jax.reports.exit_codes import OK
from lplr_jax.reports.tables import Cell, Measured, Quantity, Table, last_finite
from lplr_jax.runs.session import Follow, Say, unfollowed
from lplr_jax.training import rules


@dataclass(frozen=True)
class StepsConfig(ArmsPart, FolderPart, DataPart, ProbePart, LossPart, SeedPart, WidthsPart):
    """Everything that decides the arms, and where they go."""

    PROBES: ClassVar[int] = 2

    rules: str = "fixed,sharpness:1,armijo:0.5,polyak:1,budget:1,decay:0.5"
    """Step rules, with commas; "fixed" alone is η = 1/β at θ_0 of the narrowest, one for all."""
    widths: str = "128,256,512"
    """Widths m, with commas."""
    epochs: int = 600
    """Full-batch gradient steps of every run. Calibrated."""
    probe_every: int | None = None
    """Epochs between kernel probes; both ends are always probed [default: half the run]. Calibrated."""

    def each_rule(self) -> tuple[str, ...]:
        """Return the rules in one form each, in the order asked for."""
        texts = [part.strip() for part in self.rules.split(",")] if isinstance(self.rules, str) else [""]
        found = tuple(text if text == "fixed" else rules.parse(text).text for text in texts)
        if len(set(found)) != len(found):
            raise ValueError(f"rules must be distinct, got {checks.shown(self.rules)}")
        return found

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        for rule in self.each_rule():
            for width in self.each_width():
                mnist.resolve(_base(self, width, None if rule == "fixed" else rule))


PRESETS: dict[str, StepsConfig] = {
    "smoke": StepsConfig(widths="16,32", epochs=40, n_train=60),
    "default": StepsConfig(),
    "paper": StepsConfig(widths="128,256,512,1024", epochs=2000),
}
"""Named sets of defaults. All calibrated."""


@dataclass(frozen=True)
class Arm:
    """One run: a rule at a width."""

    rule: str
    width: int
    config: mnist.MnistConfig

    @property
    def name(self) -> str:
        """Name of its folder."""
        return _name(self.rule, self.width)


def _name(rule: str, width: int) -> str:
    return f"{rule.replace(':', '-')}-m{width}"


def _base(config: StepsConfig, width: int, rule: str | None) -> mnist.MnistConfig:
    own = {
        "width": width,
        "step_rule": rule,
        "probe_every": config.spacing(),
        "hessian_probes": 2,
        "hessian_precision": "float32",
        "spectrum_probes": 2,
        "search_steps": 0,
    }
    return mnist.MnistConfig(**shared(config, mnist.MnistConfig) | own)


def identity(config: StepsConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of the arms.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    checksum = mnist.load_data(_base(config, config.each_width()[0], None)).checksum
    return {**decisive(config), "rules": ",".join(config.each_rule()), "data_checksum": checksum}


def run(
    config: StepsConfig,
    folder: Path,
    *,
    say: Say = lambda line: None,
    follow: Follow = unfollowed,
    check: Callable[[], None] = lambda: None,
) -> tuple[tuple[Arm, Record], ...]:
    """Train every width under every rule; arms whose record is there are read instead.

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
    asked, widths = config.each_rule(), config.each_width()
    common = ""
    if "fixed" in asked:
        narrowest = _base(config, widths[0], None)
        (beta,) = sharpness_of_all([narrowest], folder, say=say)
        eta = three_digits(1 / beta)
        common = f"fixed:{eta!r}"
        words = f"fixed: η = {eta:g} = 1/β at θ_0 of width {widths[0]}, for all widths"
        say(words)
        check()
        write_predictions(
            words, [(step_size.Arm("fixed", "common", replace(narrowest, learning_rate=eta)), beta)], folder
        )
    checksum = mnist.load_data(_base(config, widths[0], None)).checksum
    done = []
    for rule, width in itertools.product(asked, widths):
        arm = Arm(rule, width, _base(config, width, common if rule == "fixed" else rule))
        if not config.takes(arm.name):
            continue
        done.append((arm, _run_arm(arm, folder, checksum, say=say, follow=follow, check=check)))
    return tuple(done)


def _run_arm(arm: Arm, folder: Path, checksum: str, *, say: Say, follow: Follow, check: Callable[[], None]) -> Record:
    record = record_of(
        folder / arm.name,
        "mnist",
        {**mnist.decisive(arm.config), "data_checksum": checksum},
        lambda observer, checkpoints: mnist.run(arm.config, observer=observer, checkpoints=checkpoints),
        run=arm.name,
        epochs=arm.config.epochs,
        say=lambda line: say(f"{arm.name}: {line}"),
        follow=follow,
        check=check,
    )
    seen = observe(record["loss"], record["drift"])
    say(f"{arm.name}: {seen.outcome}, L_T = {last_finite(record['loss']):.4g}, drift {_drift(record):.4g}")
    return record


def _unless_diverged(record: Record, value: float) -> float:
    return math.inf if record.diverged_at is not None else value


def _drift(record: Record) -> float:
    return _unless_diverged(record, last_finite(record["drift"]))


def _shift(record: Record) -> float:
    return _unless_diverged(record, last_finite(record["ntk_shift"]) / float(record["ntk_max_eig"][0]))


def _envelope(record: Record) -> float:
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.nanmin(0.5 * record["grad_sq_norm"] / record["loss"]))


MEASURES: dict[str, tuple[str, str, str, Callable[[Record], float]]] = {
    "loss": ("L_T", "$L_T$", "last training loss, units of L", lambda r: _unless_diverged(r, last_finite(r["loss"]))),
    "drift": ("drift", r"$\|\theta_T-\theta_0\|$", "‖θ_T - θ_0‖₂", _drift),
    "shift": ("NTK shift", r"$\|\Theta_T-\Theta_0\|/\|\Theta_0\|$", "‖Θ_T - Θ_0‖₂/λ_max(Θ_0)", _shift),
    "envelope": ("PL envelope", r"$\min_t\mu_t$", "least ½‖∇L‖²/L of the whole run, units of L", _envelope),
    "eta": ("η_0", r"$\eta_0$", "first step as measured", lambda r: float(r["step_size"][0])),
    "eta_last": ("η_T", r"$\eta_T$", "last step as measured", lambda r: last_finite(r["step_size"])),
}
"""What the table and the figure show: label, LaTeX, meaning, and how it is read off a record."""
STABLE = ("drift", "shift", "envelope")
"""Measures whose spread over the widths is shown: the largest over the least."""


def spread(values: Sequence[float]) -> float:
    """Return the largest over the least, infinite where a run diverged."""
    return max(values) / min(values) if min(values) > 0 else math.inf


def by_rule(done: Sequence[tuple[Arm, Record]], measure: str) -> dict[str, list[float]]:
    """Return a measure of every rule, by ascending width."""
    found: dict[str, list[float]] = {}
    for arm, record in done:
        found.setdefault(arm.rule, []).append(MEASURES[measure][3](record))
    return found


def table(done: Sequence[tuple[Arm, Record]]) -> Table:
    """Return one column a rule: every measure at every width, and the spreads."""
    shown: list[Quantity] = []
    cells: dict[str, list[Cell]] = {}
    names = tuple(dict.fromkeys(arm.rule for arm, _ in done))
    widths = list(dict.fromkeys(arm.width for arm, _ in done))
    for key, (label, latex, meaning, _) in MEASURES.items():
        columns = by_rule(done, key)
        for index, width in enumerate(widths):
            shown.append(Quantity(f"{key}_m{width}", f"{label}, m = {width}", f"{latex}, $m={width}$", meaning))
            cells[shown[-1].key] = [Measured(columns[name][index]) for name in names]
        if key in STABLE:
            words = f"the largest of the widths over the least: {meaning}"
            shown.append(Quantity(f"{key}_spread", f"{label}, spread", f"{latex}, spread", words))
            cells[shown[-1].key] = [Measured(spread(columns[name])) for name in names]
    shown.append(Quantity("rises", "steps that rise", "steps that rise", "epochs in which the loss rises, by width"))
    rises = {name: [_rises(record) for arm, record in done if arm.rule == name] for name in names}
    cells["rises"] = [" / ".join(map(str, rises[name])) for name in names]
    notes = (
        '"fixed" is 1/β at θ_0 of the narrowest network, kept for all widths; no η is tuned.',
        "Ours, not the paper's. Units: s = n unless --loss-scale sum. ∞: the run diverged.",
    )
    return Table("Step rules against width", names, tuple(shown), cells, notes)


def _rises(record: Record) -> int:
    loss = record["loss"][np.isfinite(record["loss"])]
    return int(np.sum(np.diff(loss) > 1e-5 * loss[:-1]))  # above what float32 leaves open


def figure(done: Sequence[tuple[Arm, Record]]) -> Figure:
    """Return drift, shift, envelope and last loss against width, one curve a rule."""
    widths = list(dict.fromkeys(arm.width for arm, _ in done))
    panels = {f"{MEASURES[key][2]}": by_rule(done, key) for key in (*STABLE, "loss")}
    return plotting.against_width(widths, panels, title="step rules against width")


EXPERIMENT = Experiment(
    name="steps",
    config=StepsConfig,
    presets=PRESETS,
    prepare=lambda config, folder: None if config.force else known_sharpness(folder),
    identity=lambda config, given: identity(config),
    run=lambda config, folder, given, /, **told: run(config, folder, **told),
    records=lambda done: {arm.name: record for arm, record in done},
    table=lambda done, config: table(done),
    figure=lambda done, config: figure(done),
    diverged=OK,
    arms=lambda config: [_name(*one) for one in itertools.product(config.each_rule(), config.each_width())],
)
