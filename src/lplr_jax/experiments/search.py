"""The search for the paper's set-up: short width ablations, one factor at a time and then in pairs, all told."""

import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lplr_jax import checks, statements
from lplr_jax.experiments import ablation
from lplr_jax.experiments.ablation import AblationConfig, NoStepSizeError
from lplr_jax.records import Record
from lplr_jax.runs.session import Say, unfollowed
from lplr_jax.statements import Finding, Runs

SHORT = AblationConfig(widths="32,64,128,256", epochs=300, n_train=200, probe_every=60, hessian_probes=1)
"""The set-up from which the factors depart: the default one, smaller and shorter, so that one takes a minute of CPU.
Calibrated."""

MNIST_WIDTH = 128
"""Width whose run stands for that of section 6.1."""

FACTORS: Mapping[str, tuple[Any, ...]] = {
    "pixels": ("standardised", "normalised"),
    "labels": ("bits",),
    "loss_scale": ("sum",),
    "output_init": ("lecun", "small", "zero"),
    "bias_init": ("uniform",),
    "place": (0.2, 0.8),
    "restore": (0.2, 0.1),
    "epochs": (60, 1200),
    "n_train": (100, 400),
    "subset_size": (10,),
    "seeds": ("1",),
}
"""What is varied, and to which levels. η moves by `place` and `restore`, in units of 2/β, so that it follows whatever
else is varied; the factor ½ of the loss moves nothing then, and has no level: L, β and the PL ratio double, η halves,
and every statement is about quotients."""


@dataclass(frozen=True)
class SetUp:
    """One set-up of the search.

    Attributes:
        levels: the factors that depart from `SHORT`, and to what.
    """

    levels: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """Name of its folder and of its line in the table."""
        return "+".join(f"{factor}={level}" for factor, level in self.levels) or "default"

    @classmethod
    def of(cls, name: str, factors: Mapping[str, Sequence[Any]]) -> "SetUp":
        """Return the set-up of a name, of any number of levels that there are.

        Raises:
            ValueError: for a name of another level.
        """
        levels = {f"{factor}={level}": (factor, level) for factor, each in factors.items() for level in each}
        parts = [] if name == "default" else name.split("+")
        if unknown := [part for part in parts if part not in levels]:
            raise ValueError(f"{checks.shown(unknown[0])} is no level of the search; there are {', '.join(levels)}")
        return cls(tuple(levels[part] for part in parts))

    def config(self, base: AblationConfig) -> AblationConfig:
        """Return what is run; epochs between probes go with the epochs."""
        found = replace(base, **dict(self.levels))
        return replace(found, probe_every=max(1, found.epochs // 5))


@dataclass(frozen=True)
class Scored:
    """A set-up with what the statements say of it.

    Attributes:
        set_up: what was run.
        findings: by the id of the statement; those that need other runs are not decided.
        numbers: further numbers, by name.
        seconds: wall-clock time.
    """

    set_up: SetUp
    findings: Mapping[str, Finding]
    numbers: Mapping[str, float]
    seconds: float

    @property
    def score(self) -> tuple[int, int]:
        """Statements that are reproduced, and statements that are decided."""
        outcomes = [finding.outcome for finding in self.findings.values()]
        return outcomes.count("reproduced"), sum(outcome != "cannot be decided" for outcome in outcomes)


def runs_of(found: Mapping[str, Record], *, mnist_width: int | None = None) -> Runs:
    """Return the records of an ablation, by their arms, as the statements take them; of several seeds the first."""
    common: dict[int, Record] = {}
    smaller: Record | None = None
    for name, record in sorted(found.items(), key=lambda item: (item[1].config["seed"], item[0])):
        if "-smaller-" not in name:
            common.setdefault(int(record.config["width"]), record)
        elif smaller is None:
            smaller = record
    return Runs(widths=common, smaller=smaller, mnist=common.get(mnist_width or -1))


def run_one(set_up: SetUp, folder: Path, *, base: AblationConfig, say: Say, check: Callable[[], None]) -> Scored:
    """Run a set-up, or read what is there of it, and judge it."""
    start = time.monotonic()
    config = set_up.config(base)
    try:
        done = ablation.run(config, folder / set_up.name, say=lambda line: None, follow=unfollowed, check=check)
    except NoStepSizeError as error:  # a set-up that the rule of η does not cover is a result as well
        nothing = Finding("cannot be decided", str(error))
        findings = {statement.id: nothing for statement in statements.STATEMENTS}
        scored = Scored(set_up, findings, {}, time.monotonic() - start)
    else:
        scored = judged(set_up, {arm.name: record for arm, record in done}, time.monotonic() - start)
    say(f"{set_up.name}: {scored.score[0]} of {scored.score[1]} statements, {scored.seconds:.0f} s")
    return scored


def take_one(set_up: SetUp, folder: Path, *, base: AblationConfig, say: Say, check: Callable[[], None]) -> Scored:
    """Run a set-up, and mark it as done."""
    scored = run_one(set_up, folder, base=base, say=say, check=check)
    (folder / set_up.name / "done").touch()
    return scored


def judged(set_up: SetUp, found: Mapping[str, Record], seconds: float = math.nan) -> Scored:
    """Judge the records of a set-up."""
    runs = runs_of(found, mnist_width=MNIST_WIDTH)
    assert runs.smaller is not None
    numbers = {
        "drift_wide": float(runs.wide["drift"][-1]),
        "drift_smaller": float(runs.smaller["drift"][-1]),
        "lambda_0": float(runs.widths[min(runs.widths)]["ntk_min_eig"][0]),
    }
    return Scored(set_up, statements.judge(runs), numbers, seconds)


def one_at_a_time(factors: Mapping[str, Sequence[Any]] = FACTORS) -> list[SetUp]:
    """Return the default, and every level of every factor alone, the short runs first."""
    alone = [SetUp(((factor, level),)) for factor, levels in factors.items() for level in levels]

    def cost(set_up: SetUp) -> int:
        config = set_up.config(SHORT)
        return config.epochs * config.n_train

    return [SetUp(), *sorted(alone, key=cost)]


def best_pairs(scored: Iterable[Scored], count: int) -> list[SetUp]:
    """Return the pairs of the levels that score best alone, of different factors.

    Args:
        scored: what has been run.
        count: levels of which the pairs are made; of a factor the best one, seeds and sizes of the sample excepted.
    """
    best: dict[str, Scored] = {}
    for one in scored:
        if len(one.set_up.levels) == 1 and one.set_up.levels[0][0] not in ("seeds", "n_train", "subset_size"):
            factor = one.set_up.levels[0][0]
            if factor not in best or _share(one) > _share(best[factor]):
                best[factor] = one
    ranked = sorted(best.values(), key=_share, reverse=True)[:count]
    pairs = itertools.combinations([one.set_up for one in ranked], 2)
    return [SetUp(a.levels + b.levels) for a, b in pairs]


def _share(scored: Scored) -> float:
    reproduced, decided = scored.score
    return reproduced / decided if decided else 0.0


def search(
    folder: Path,
    *,
    minutes: float,
    say: Say,
    check: Callable[[], None] = lambda: None,
    base: AblationConfig = SHORT,
    factors: Mapping[str, Sequence[Any]] = FACTORS,
    pairs_of: int = 4,
) -> list[Scored]:
    """Run every set-up that there is time for; what is there already is read, and costs none.

    Args:
        folder: where every set-up has a folder of its own.
        minutes: no set-up is begun later than this.
        say: told one line a set-up.
        check: called before every write.
        base: what the factors depart from.
        factors: levels of every factor.
        pairs_of: levels of which pairs are made.

    Returns:
        What was run, in order.
    """
    end, done, left = time.monotonic() + 60 * minutes, [], 0

    def take(set_ups: Iterable[SetUp]) -> None:
        nonlocal left
        for set_up in set_ups:
            if time.monotonic() > end and not (folder / set_up.name / "done").exists():
                left += 1
                continue
            done.append(take_one(set_up, folder, base=base, say=say, check=check))

    take(one_at_a_time(factors))
    take(best_pairs(done, pairs_of))
    if left:
        say(f"{left} set-ups are left for want of time; the same command goes on with them")
    return done


def search_elsewhere(
    folder: Path,
    run: Callable[[Sequence[str]], int],
    *,
    base: AblationConfig = SHORT,
    factors: Mapping[str, Sequence[Any]] = FACTORS,
    pairs_of: int = 4,
) -> int:
    """Have set-ups that are not there run by others, all single levels and then the best pairs of them.

    Args:
        folder: as for `search`, which reads what came of it.
        run: runs set-ups by their names, several at a time, and returns the worst exit code.
        base: as for `search`.
        factors: as for `search`.
        pairs_of: as for `search`.

    Returns:
        The worst exit code.
    """

    def missing(set_ups: Iterable[SetUp]) -> list[str]:
        return [one.name for one in set_ups if not (folder / one.name / "done").exists()]

    singles, worst = one_at_a_time(factors), 0
    if names := missing(singles):
        worst = run(names)
    there = [one for one in singles if not missing([one])]
    nothing = {"say": lambda line: None, "check": lambda: None}
    pairs = best_pairs([run_one(one, folder, base=base, **nothing) for one in there], pairs_of)
    if names := missing(pairs):
        worst = run(names) or worst
    return worst
