"""Section 6.1: what the paper says of one run on binary MNIST."""

import math

import numpy as np

from lplr_jax.curves.rate import MIN_ENTRIES, contraction_factor
from lplr_jax.curves.stability import DRIFT_ROUNDING
from lplr_jax.curves.summary import Summary, summarise
from lplr_jax.records import Record
from lplr_jax.statements.statement import Finding, Runs, Statement, found, measured, middle_regime

EARLY_SHARE = 0.25
"""Share of the run within which what happens is early."""
LEAST_DROP = 0.01
"""Share of λ_0 by which λ_min must fall to have dropped."""
PLATEAU = 0.1
"""Largest range of λ_min over the second half of the run, as a share of its mean there, that is a plateau."""
SMALL_CHANGE = 0.25
"""Largest |λ_T - λ_0|/λ_0 that is a small share."""
OSCILLATION_SHARE = 0.1
"""Share of the run within which the drift may fall."""
SLOW = 1.1
"""Largest factor by which a slowly varying PL ratio moves within 1 % of the run."""
END_FACTOR = 2.0
"""Factor by which an end differs from the middle to be an artefact."""
FAR = 10.0
"""Factor that is far above."""
NEAR_ZERO = 0.01
"""Share of L_0 below which L_T is near zero."""
STRAIGHT = 0.99
"""Least R² of a line through log gap."""


def _run(runs: Runs) -> Record:
    assert runs.mnist is not None
    return runs.mnist


def _lambda_positive(runs: Runs) -> Finding:
    _, eigs = measured(_run(runs), "ntk_min_eig_subset")
    return found(eigs.min() > 0, f"least of {eigs.size} probes {eigs.min():.3g}")


def _lambda_plateau(runs: Runs) -> Finding:
    at, eigs = measured(_run(runs), "ntk_min_eig_subset")
    drop = 1 - eigs[at <= EARLY_SHARE].min() / eigs[0]
    late = eigs[at >= 0.5]
    spread = np.ptp(late) / abs(late.mean())
    words = f"largest fall in the first quarter {drop:.1%} of λ_0; range over the second half {spread:.0%} of its mean"
    return found(drop >= LEAST_DROP and spread <= PLATEAU, words)


def _lambda_change(runs: Runs) -> Finding:
    at, eigs = measured(_run(runs), "ntk_min_eig_subset")
    total = eigs[-1] / eigs[0] - 1
    early = eigs[at <= EARLY_SHARE][-1] / eigs[0] - 1
    words = f"λ_T/λ_0 = {1 + total:.3g}, {1 + early:.3g} of λ_0 after a quarter of the run"
    return found(abs(total) <= SMALL_CHANGE and abs(early) >= 0.5 * abs(total), words)


def falls(record: Record) -> tuple[int, int]:
    """Return in how many steps the drift falls by more than rounding within the first tenth of a run, and after it."""
    at, drift = measured(record, "drift")
    down = drift[1:] < drift[:-1] * (1 - DRIFT_ROUNDING)
    first = at[1:] <= OSCILLATION_SHARE
    return int(np.sum(down & first)), int(np.sum(down & ~first))


def _drift(runs: Runs) -> Finding:
    early, late = falls(_run(runs))
    return found(early > 0 and late == 0, f"falls in {early} steps of the first tenth of the run, in {late} after it")


def _middle(summary: Summary) -> np.ndarray:
    ratio = summary.bracket[1][middle_regime(summary)]
    return ratio[np.isfinite(ratio)]  # where the proxy itself is attained the ratio is infinite


def _pl_bounded(runs: Runs) -> Finding:
    record = _run(runs)
    summary = summarise(record)
    ratio = _middle(summary)
    if ratio.size < 2:
        return Finding("not reproduced", "no middle regime")
    width = min(max(1, record["epoch"].size // 100), ratio.size - 1)
    if not ratio.min() > 0:
        return Finding("not reproduced", "the ratio reaches 0 on the middle regime")
    moved = float(np.exp(np.abs(np.log(ratio[width:] / ratio[:-width])).max()))
    start, stop = summary.steps(middle_regime(summary))
    kind = "middle half" if middle_regime(summary) == summary.middle else "stable regime"
    words = f"least {ratio.min():.3g} in steps {start} to {stop} ({kind}); "
    return found(
        ratio.min() > 0 and moved <= SLOW, words + f"moves by at most {moved:.3f} within 1 % of the run", moved
    )


def _pl_ends(runs: Runs) -> Finding:
    summary = summarise(_run(runs))
    if not _middle(summary).size or not np.isfinite(summary.bracket[1]).any():
        return Finding("not reproduced", "no middle regime")
    middle = float(np.median(_middle(summary)))
    first = summary.bracket[1][: max(1, middle_regime(summary).start)]
    known = first[np.isfinite(first)]
    start = float(np.exp(np.abs(np.log(known / middle)).max())) if known.size else math.nan
    low, high = (end[np.isfinite(summary.bracket[1])][-1] for end in summary.bracket)
    end = float(high / low)
    words = f"before the regime off its median by a factor of {start:.3g}; at the end the proxy inflates by {end:.3g}"
    return found(start >= END_FACTOR and end >= END_FACTOR, words, start)


def _pl_above(runs: Runs) -> Finding:
    record = _run(runs)
    summary = summarise(record)
    _, eigs = measured(record, "ntk_min_eig_subset")
    bound = eigs.max() / float(record["loss_scale"])
    excess = float(np.nanmin(summary.bracket[0][middle_regime(summary)], initial=np.inf)) / bound
    return found(excess >= FAR, f"least ratio with L* = 0 is {excess:.3g} times the largest subset λ_min/s", excess)


def _loss_left(runs: Runs) -> Finding:
    _, loss = measured(_run(runs), "loss")
    share = loss[-1] / loss[0]
    return found(share >= NEAR_ZERO, f"L_T = {loss[-1]:.3g}, {share:.1%} of L_0")


def _phases(runs: Runs) -> Finding:
    record = _run(runs)
    summary = summarise(record)
    gap = record["loss"] - summary.floor
    fit = contraction_factor(gap, summary.middle, steps=summary.step_numbers)
    with np.errstate(divide="ignore", invalid="ignore"):
        steps = -np.diff(np.log(gap)) / np.diff(summary.step_numbers)
    edge = max(MIN_ENTRIES, steps.size // 20)
    first, last = (np.nanmax(np.where(np.isfinite(part), part, np.nan)) for part in (steps[:edge], steps[-edge:]))
    words = (
        f"log gap falls by at most {first:.2g} a step in the first twentieth of the run, {fit.rate:.2g} on the middle "
        f"half (R² {fit.exponential_r2:.4f}), at most {last:.2g} in the last twentieth"
    )
    phases = min(first, last) >= END_FACTOR * fit.rate > 0
    return found(phases and fit.exponential_r2 >= STRAIGHT, words, float(first), fit.rate, float(last))


def _one(id_: str, sentence: str, rule: str, judge: object) -> Statement:
    return Statement(id_, "6.1", sentence, rule, ("mnist",), judge)  # pyright: ignore[reportArgumentType]


MNIST = (
    _one("lambda_positive", "λ_min of the subset's kernel is positive throughout.", "least of all probes > 0",
         _lambda_positive),
    _one("lambda_plateau", "λ_min drops early, and then stays on a plateau.",
         f"a fall of {LEAST_DROP:.0%} of λ_0 within the first quarter; range over the second half at most "
         f"{PLATEAU:.0%} of its mean", _lambda_plateau),
    _one("lambda_change", "The total change of λ_min is a small share of λ_0, and most of it is early.",
         f"|λ_T - λ_0| at most {SMALL_CHANGE:.0%} of λ_0, half of it within the first quarter", _lambda_change),
    _one("drift_smooth", "The drift oscillates at first, and then grows smoothly and monotonically.",
         "falls by more than rounding in the first tenth of the run, and never after it", _drift),
    _one("pl_bounded", "The PL ratio is bounded below on the middle regime, and varies slowly there.",
         f"past the first twentieth of the run the proxy's ratio is > 0 on the middle regime, and moves by a factor "
         f"of at most {SLOW:g} within 1 % of the run",
         _pl_bounded),
    _one("pl_ends", "Both ends of the PL ratio are artefacts.",
         f"off the regime's median by {END_FACTOR:g} before it; at the end the proxy inflates by {END_FACTOR:g}",
         _pl_ends),
    _one("pl_above", "The PL ratio is far above the kernel's bound.",
         f"least ratio with L* = 0 at least {FAR:g} times the largest subset λ_min/s", _pl_above),
    _one("loss_left", "The final loss is not near zero.", f"L_T at least {NEAR_ZERO:.0%} of L_0", _loss_left),
    _one("gap_phases", "The gap has three phases on a log axis: transient, a long line, an artefact of the proxy.",
         f"a step in either twentieth at the ends at least {END_FACTOR:g} times as large as the middle half's mean, "
         f"whose line has R² >= {STRAIGHT:g}",
         _phases),
)  # fmt: skip
"""The statements of section 6.1."""
