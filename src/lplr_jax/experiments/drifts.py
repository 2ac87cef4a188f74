"""Whether the paper's two drifts of width 1024 can be met together, and what moves them."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lplr_jax.experiments import mnist
from lplr_jax.experiments.experiment import record_of
from lplr_jax.experiments.step_size import Arm, sharpness_of_all, three_digits, write_predictions
from lplr_jax.records import Record
from lplr_jax.runs.session import Say, unfollowed
from lplr_jax.statements.widths import PAPER_DRIFTS

BASE = mnist.MnistConfig(
    width=1024,
    epochs=500,
    probe_every=500,
    n_train=200,
    hessian_probes=0,
    spectrum_probes=0,
    search_steps=0,
    certify_floor=0.0,
)
"""Loss and drift alone, on fewer images. Calibrated."""

LEVELS: tuple[tuple[str, Any], ...] = (
    ("seed", 0),
    ("output_init", "zero"),
    ("pixels", "normalised"),
    ("pixels", "standardised"),
    ("labels", "bits"),
    ("bias_init", "uniform"),
    ("seed", 1),
    ("n_train", 400),
)
"""What is varied, one at a time; seed 0 is the default itself."""

COMMON = (3.0, 3.6, 3.9)
"""The common η times β at θ_0 of width 1024; above 4 the quadratic picture of a catapult ends in divergence."""
SMALLER = 0.8
"""The smaller η times β, as in the ablation."""
WITHIN = 1.1
"""Factor within which a drift is met."""


@dataclass(frozen=True)
class Met:
    """How near a set-up comes to both drifts at once.

    Attributes:
        name: what was varied.
        eta_beta: the common η times β, of the nearest run.
        epoch: the epoch at which both are read off.
        common: drift at the common η there.
        smaller: drift at the smaller η there.
        off: the larger of the two factors by which they miss the paper's; inf where no run stayed finite.
        reach: drift at the last epoch for every common η, by η β; inf where it diverged.
    """

    name: str
    eta_beta: float
    epoch: int
    common: float
    smaller: float
    off: float
    reach: Mapping[float, float]

    @property
    def met(self) -> bool:
        """Whether both are met."""
        return self.off <= WITHIN


def nearest(name: str, common: Mapping[float, Record], smaller: Record) -> Met:
    """Find the common η and the epoch at which the drifts of two runs come nearest to the paper's, on a log scale.

    Args:
        name: what was varied.
        common: runs at the common η, by η β.
        smaller: the run at the smaller η, of the same epochs.
    """
    best = Met(name, math.nan, 0, math.nan, math.nan, math.inf, {})
    reach = {}
    slow = smaller["drift"][1:]
    for eta_beta, record in common.items():
        fast = record["drift"][1:]
        reach[eta_beta] = math.inf if record.diverged_at is not None else float(fast[-1])
        size = min(fast.size, slow.size)
        with np.errstate(divide="ignore", invalid="ignore"):
            misses = np.abs(np.log([fast[:size] / PAPER_DRIFTS[0], slow[:size] / PAPER_DRIFTS[1]])).max(axis=0)
        if record.diverged_at is None and np.isfinite(misses).any():
            at = int(np.nanargmin(misses))
            off = float(np.exp(misses[at]))
            if off < best.off:
                best = Met(name, eta_beta, at + 1, float(fast[at]), float(slow[at]), off, {})
    return replace(best, reach=reach)


def study(
    folder: Path,
    *,
    say: Say,
    check: Callable[[], None] = lambda: None,
    base: mnist.MnistConfig = BASE,
    levels: Sequence[tuple[str, Any]] = LEVELS,
) -> list[Met]:
    """Run width 1024 at several η for every level; runs that are there are read.

    Args:
        folder: where every level has a folder.
        say: told one line a level.
        check: called before every write.
        base: what the levels depart from.
        levels: names and values of what is varied.
    """
    found = []
    for factor, level in levels:
        name = f"{factor}={level}"
        here, config = folder / name, replace(base, **{factor: level})
        (beta,) = sharpness_of_all([config], here, say=lambda line: None)
        checksum = mnist.load_data(config).checksum
        check()
        write_predictions("η β is named", [(Arm("start", "common", config), beta)], here)
        done = {}
        for eta_beta in (*COMMON, SMALLER):
            arm = replace(config, learning_rate=three_digits(eta_beta / beta))
            done[eta_beta] = record_of(
                here / f"{eta_beta:g}",
                "mnist",
                {**mnist.decisive(arm), "data_checksum": checksum},
                lambda observer, checkpoints, arm=arm: mnist.run(arm, observer=observer, checkpoints=checkpoints),
                run=f"{name}-{eta_beta:g}",
                epochs=arm.epochs,
                say=lambda line: None,
                follow=unfollowed,
                check=check,
            )
        met = nearest(name, {eta_beta: done[eta_beta] for eta_beta in COMMON}, done[SMALLER])
        say(f"{name}: drifts {met.common:.3g} and {met.smaller:.3g} at epoch {met.epoch}, off by {met.off:.3g}")
        found.append(met)
    return found
