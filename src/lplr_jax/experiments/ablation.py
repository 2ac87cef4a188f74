"""Width ablation: one η for all widths, predicted from 2/β at initialisation, then watched (paper, section 6.2)."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lplr_jax import checks, plotting
from lplr_jax.checks import integers
from lplr_jax.experiments import mnist
from lplr_jax.experiments.experiment import Experiment, record_of, trained_together
from lplr_jax.experiments.parts import (
    ArmsFolderPart,
    CodingPart,
    DataPart,
    LossPart,
    ProbePart,
    SeedsPart,
    WidthsPart,
    decisive,
    shared,
)
from lplr_jax.experiments.quantities import Value, quantities, row
from lplr_jax.experiments.step_size import (
    Arm,
    known_sharpness,
    observation,
    prediction,
    sharpness_of_all,
    three_digits,
    write_predictions,
)
from lplr_jax.experiments.sweep import ArmsPart
from lplr_jax.records import Record
from lplr_jax.reports.exit_codes import OK
from lplr_jax.reports.tables import Cell, Quantity, Table, mean_of
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.loop import Advance, replay
from lplr_jax.runs.problem import check_learning_rate, probe_epochs
from lplr_jax.runs.session import Follow, Observer, Say, unfollowed
from lplr_jax.training import EpochMetrics, TrainState, init_state, train_epochs

WIDE = 512
"""Width from which the Hessian is measured at both ends alone."""


@dataclass(frozen=True)
class AblationConfig(ArmsPart, ArmsFolderPart, DataPart, ProbePart, LossPart, SeedsPart, CodingPart, WidthsPart):
    """Everything that decides the arms, and where they go."""

    place: float = 0.5
    """Share of the way, on a log scale, from 2/β of the widest network (0) to the next's (1), for the common η."""
    restore: float = 0.4
    """The smaller η of the fifth arm, as a share of the widest network's 2/β; below 0.5 is below 1/β. Calibrated."""
    learning_rate: float | None = None
    """The common η, instead of the rule."""
    smaller_learning_rate: float | None = None
    """The smaller η, instead of the rule."""
    hessian_probes: int = 9
    """Probes with the Hessian's extremes at widths under 512; both ends alone from there on. Calibrated."""
    subset_size: int | None = None
    """Images of the subset on which the paper's NTK drift is measured [default: a fifth of them]. Calibrated."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        if len(self.each_width()) < 2:
            raise ValueError(f"widths must be at least two, got {self.widths!r}; η lies between two boundaries")
        if isinstance(self.place, str) or self.place is None or not 0 < self.place < 1:
            raise ValueError(f"place must lie between 0 and 1, got {checks.shown(self.place)}")
        checks.number("restore", self.restore, above=0)
        checks.whole("hessian_probes", self.hessian_probes, least=1)
        for name in ("learning_rate", "smaller_learning_rate"):
            value = getattr(self, name)
            if value is not None:
                check_learning_rate(name, value)
        for width, seed in itertools.product(self.each_width(), self.each_seed()):
            mnist.resolve(_base(self, width, seed, 1.0))


PRESETS: dict[str, AblationConfig] = {
    "smoke": AblationConfig(widths="16,32,64", epochs=60, probe_every=20, hessian_probes=2, n_train=200),
    "default": AblationConfig(),
    "paper": AblationConfig(seeds="0,1,2", epochs=10_000),
    "paper-like": AblationConfig(n_train=500, epochs=260, probe_every=26, labels="bits"),
}
"""Named sets of defaults: a run of seconds, the standard one, and a longer one for an accelerator, all calibrated; and
the nearest one found to the paper's sentences (docs/reproduction.md), calibrated on them."""


class NoStepSizeError(ValueError):
    """No η lies between the boundaries of the two widest networks."""


@dataclass(frozen=True)
class Rule:
    """The step sizes, and the sharpness at initialisation that decided them.

    Attributes:
        eta: η of all widths.
        smaller_eta: η that is to bring the widest network back.
        sharpness: β_0 = λ_max(∇²L(θ_0)) by (width, seed).
        words: how the two were chosen.
    """

    eta: float
    smaller_eta: float
    sharpness: dict[tuple[int, int], float]
    words: str


def choose(config: AblationConfig, sharpness: dict[tuple[int, int], float]) -> Rule:
    """Choose both step sizes from 2/β at initialisation of the first seed.

    Raises:
        NoStepSizeError: if the boundaries of the two widest networks are not in order.
        ValueError: if a step size is not positive.
    """
    *_, second, widest = config.each_width()
    low, high = (2 / sharpness[width, config.each_seed()[0]] for width in (widest, second))
    if config.learning_rate is None and low >= high:
        raise NoStepSizeError(
            f"2/β is {low:.4g} at width {widest} and {high:.4g} at width {second}: no η lies between the two; "
            "name one with --learning-rate"
        )
    eta = three_digits(low ** (1 - config.place) * high**config.place)
    smaller = three_digits(config.restore * low)
    words = [
        f"η = {eta:g} lies {config.place:g} of the way (log scale) from 2/β of width {widest} ({low:.4g}) "
        f"to that of width {second} ({high:.4g}), calibrated",
        f"the smaller η = {smaller:g} is {config.restore:g} of 2/β of width {widest}, calibrated",
    ]
    if config.learning_rate is not None:
        eta, words[0] = config.learning_rate, f"η = {config.learning_rate:g} as asked for"
    if config.smaller_learning_rate is not None:
        smaller = config.smaller_learning_rate
        words[1] = f"the smaller η = {smaller:g} as asked for"
    return Rule(eta, smaller, sharpness, "; ".join(words))


def _base(config: AblationConfig, width: int, seed: int, learning_rate: float) -> mnist.MnistConfig:
    own = {
        "width": width,
        "seed": seed,
        "learning_rate": learning_rate,
        "hessian_probes": config.hessian_probes if width < WIDE else min(2, config.hessian_probes),
        "hessian_precision": "float32",
        "search_steps": 0,
        "certify_floor": 0.0,
    }
    return mnist.MnistConfig(**shared(config, mnist.MnistConfig) | own)


def arms_of(config: AblationConfig, rule: Rule) -> tuple[tuple[Arm, ...], ...]:
    """Return the arms, grouped by what differs beside the seed: every width at η, and the widest at the smaller η."""
    widths = config.each_width()
    kinds: list[tuple[int, Literal["common", "smaller"], float]] = [(m, "common", rule.eta) for m in widths]
    kinds.append((widths[-1], "smaller", rule.smaller_eta))
    return tuple(
        tuple(
            Arm(f"m{m}{'-smaller' if kind == 'smaller' else ''}-seed{seed}", kind, _base(config, m, seed, eta))
            for seed in config.each_seed()
        )
        for m, kind, eta in kinds
    )


def identity(config: AblationConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of the arms.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    lists = {"widths": integers("widths", config.widths, least=1), "seeds": config.each_seed()}
    texts = {name: ",".join(map(str, values)) for name, values in lists.items()}
    base = _base(config, lists["widths"][0], 0, 1.0)
    return {**decisive(config), **texts, "data_checksum": mnist.load_data(base).checksum}


def train_together(configs: Sequence[mnist.MnistConfig]) -> list[Advance]:
    """Train arms that differ in the seed alone as one program, by vmap, and return for each what replays its part.

    The states at every probe are kept on the host: probes times p numbers an arm. An interrupted group is trained
    again as a whole, as last bits depend on how many there are: what takes time is the probes, which are not repeated.
    """
    problems = [mnist.set_up(config) for config in configs]
    first, (resolved, every, _) = problems[0], mnist.resolve(configs[0])
    stack = partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    initials = stack(*(problem.params for problem in problems))
    states = stack(*(init_state(problem.params, first.optimizer) for problem in problems))

    def advance(together: TrainState, epochs: int) -> tuple[TrainState, EpochMetrics]:
        one = partial(train_epochs, objective=first.objective, optimizer=first.optimizer, epochs=epochs)
        return jax.vmap(one, in_axes=(0, None, 0))(together, (first.x, first.y), initials)

    ends = probe_epochs(resolved.epochs, every)
    return replay(states, [b - a for a, b in itertools.pairwise(ends)], advance, count=len(configs))


def run_arm(
    arm: Arm,
    folder: Path,
    beta: float,
    *,
    checksum: str,
    save_probes: bool,
    say: Say,
    follow: Follow,
    check: Callable[[], None],
    advance: Advance | None = None,
) -> Record:
    """Say what is expected of an arm, run it unless its record is there, save it, and say what was observed."""
    say(prediction(arm, beta))
    probe_dir = folder / arm.name / "probes" if save_probes else None

    def make(observer: Observer | None, checkpoints: Checkpoints) -> Record:
        return mnist.run(arm.config, observer=observer, probe_dir=probe_dir, advance=advance, checkpoints=checkpoints)

    record = record_of(
        folder / arm.name,
        "mnist",
        {**mnist.decisive(arm.config), "data_checksum": checksum},
        make,
        run=arm.name,
        epochs=arm.config.epochs,
        say=lambda line: say(f"{arm.name}: {line}"),
        follow=follow,
        check=check,
    )
    say(observation(arm, record))
    return record


def run(
    config: AblationConfig,
    folder: Path,
    *,
    say: Say = lambda line: None,
    follow: Follow = unfollowed,
    check: Callable[[], None] = lambda: None,
    together: bool | None = None,
) -> tuple[tuple[Arm, Record], ...]:
    """Predict, train and record every arm; arms whose record is there are read instead.

    Args:
        config: what to run; `out` and `force` are for the caller.
        folder: where every arm gets a folder of its own; predictions.json is written before the first step.
        say: told one line at a time what is predicted and observed.
        follow: from name and number of epochs to a context with an observer for one arm.
        check: called before every write; raises where nothing must be written any more.
        together: train the seeds of one width in one program; None does so on accelerators (on a CPU vmap is slower).

    Returns:
        Arms and records, in the order of the table.

    Raises:
        ValueError: for a field out of range, data that cannot be had, or arms of another config in the folder.
    """
    config.check()
    keys = list(itertools.product(config.each_width(), config.each_seed()))
    bases = [_base(config, width, seed, 1.0) for width, seed in keys]
    betas = sharpness_of_all(bases, folder, say=say)
    rule = choose(config, dict(zip(keys, betas, strict=True)))
    groups = arms_of(config, rule)
    say(rule.words)
    pairs = [(arm, rule.sharpness[arm.config.width, arm.config.seed]) for group in groups for arm in group]
    check()
    write_predictions(rule.words, pairs, folder)
    checksum = mnist.load_data(groups[0][0].config).checksum
    done: list[tuple[Arm, Record]] = []
    for group in ([arm for arm in group if config.takes(arm.name)] for group in groups):
        train = partial(train_together, [arm.config for arm in group])
        advances = trained_together(folder, [arm.name for arm in group], train, together)
        for arm, advance in zip(group, advances, strict=True):
            record = run_arm(
                arm,
                folder,
                rule.sharpness[arm.config.width, arm.config.seed],
                checksum=checksum,
                save_probes=config.save_probes,
                say=say,
                follow=follow,
                check=check,
                advance=advance,
            )
            done.append((arm, record))
    return tuple(done)


PAPER_DRIFT = {"common": 1.870, "smaller": 0.158}
"""Final drift of the paper's two arms of width 1024 (Table 1); its η, epochs and scalings are not known to us."""

_PAPER = Quantity("drift_paper", "drift, final, paper", r"$\|\theta_T-\theta_0\|$, paper", "Table 1; another set-up")

BEFORE = (
    *("learning_rate", "p", "lambda_0", "lambda_t", "lambda_t_lower", "ntk_drift_subset", "ntk_drift"),
    *("loss_t", "drift_t", "drift_max"),
)
"""Quantities of Table 1 that stand above the paper's drift."""

BEHIND = (
    *("pl_zero", "pl_proxy", "pl_excess", "factor_zero", "factor_proxy", "law_zero", "law_proxy"),
    *("boundary", "critical_step", "eta_beta", "eta_beta_t", "eta_critical_t"),
    *("predicted", "observed", "diverged", "verdict"),
)
"""Those that stand below it."""


def _mean(values: Sequence[Any]) -> Cell:
    first = values[0]
    if isinstance(first, str):
        counts = {value: values.count(value) for value in dict.fromkeys(values)}
        return first if len(counts) == 1 else ", ".join(f"{count} {value}" for value, count in counts.items())
    if isinstance(first, int):
        return first
    # η is the same for all seeds by construction, and has no deviation.
    return mean_of([float(value) for value in (dict.fromkeys(values) if len(set(values)) == 1 else values)])


def table(done: Sequence[tuple[Arm, Record]]) -> Table:
    """Return Table 1: one column for each width and step size, mean ± deviation over seeds (paper, section 6.2)."""
    columns: dict[tuple[int, str], list[Mapping[str, Value]]] = {}
    for arm, record in done:
        paper = PAPER_DRIFT[arm.kind] if arm.config.width == 1024 else math.nan
        values = {**row(record, (*BEFORE, *BEHIND)), "drift_paper": paper}
        columns.setdefault((arm.config.width, arm.kind), []).append(values)
    verdicts = [values["verdict"] for column in columns.values() for values in column]
    seeds = len(next(iter(columns.values())))
    beside_paper = any(width == 1024 for width, _ in columns)
    shown = (*quantities(BEFORE), *((_PAPER,) if beside_paper else ()), *quantities(BEHIND))
    notes = [
        f"Predictions: {verdicts.count('hit')} of {len(verdicts)} hit, {verdicts.count('miss')} missed. "
        + ("One seed." if seeds == 1 else f"Mean ± standard deviation over {seeds} seeds."),
        "Units: s = n unless --loss-scale sum; PL ratios in units of L, kernels in output²/parameter².",
    ]
    if beside_paper:
        notes.append("The paper's drifts are of another set-up: its η, epochs and scalings are not known to us.")
    told = done[0][1].provenance.get("data")
    subject = told.get("subject", "digits 3 and 8") if isinstance(told, dict) else "digits 3 and 8"
    return Table(
        f"Width ablation: full-batch gradient descent on {subject}",
        tuple(f"m = {width}" + (", smaller η" if kind == "smaller" else "") for width, kind in columns),
        shown,
        {one.key: [_mean([values[one.key] for values in column]) for column in columns.values()] for one in shown},
        tuple(notes),
    )


EXPERIMENT = Experiment(
    name="ablation",
    config=AblationConfig,
    presets=PRESETS,
    prepare=lambda config, folder: None if config.force else known_sharpness(folder),
    identity=lambda config, given: identity(config),
    run=lambda config, folder, given, /, **told: run(config, folder, **told),
    records=lambda done: {arm.name: record for arm, record in done},
    table=lambda done, config: table(done),
    figure=lambda done, config: plotting.ablation([record for _, record in done]),
    diverged=OK,
    arms=lambda config: [arm.name for group in arms_of(config, Rule(1.0, 1.0, {}, "")) for arm in group],
)
