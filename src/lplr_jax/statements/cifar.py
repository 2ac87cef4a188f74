"""Section 6.3: what the paper says of the seeds on CIFAR-10."""

import math
from collections.abc import Callable

import numpy as np

from lplr_jax.curves.rate import contraction_factor
from lplr_jax.curves.stability import DRIFT_ROUNDING
from lplr_jax.curves.summary import Summary, summarise
from lplr_jax.records import Record
from lplr_jax.statements.statement import Finding, Runs, Statement, found, measured

ORDERS = 3.5
"""Least fall of the gap, in powers of ten, that is about four."""
STRAIGHT = 0.98
"""Least R² of a line through log gap, over the middle half of the run."""
BAND = 0.3
"""Largest standard deviation over seeds of log10 of the gap, in the mean over the middle half of the run."""
TAIL_SHARE = 0.9
"""Share of the run from which on is its end."""
ACCELERATION = 1.5
"""Factor by which the gap falls faster than L at the end where the proxy makes the difference."""
SATURATED = 0.1
"""Largest share of the final drift that comes in the last quarter of the run."""
SPREAD = 0.1
"""Largest standard deviation of the final drift over seeds, as a share of its mean, that is reproducible."""


LEAST_SEEDS = 2
"""Seeds below which nothing is said of every seed; the paper has three."""


def _of_seeds(judge: Callable[[Runs], Finding]) -> Callable[[Runs], Finding]:
    """Return a rule that decides nothing where there are too few seeds."""

    def rule(runs: Runs) -> Finding:
        if len(runs.seeds) < LEAST_SEEDS:
            return Finding("cannot be decided", f"{len(runs.seeds)} seed alone; there: {judge(runs).numbers}")
        return judge(runs)

    return rule


def _each(runs: Runs) -> dict[str, tuple[Record, Summary]]:
    return {name: (record, summarise(record)) for name, record in runs.seeds.items()}


def _gap(runs: Runs) -> Finding:
    orders, straight, curves = [], [], []
    for record, summary in _each(runs).values():
        gap = record["loss"] - summary.floor
        positive = gap[np.isfinite(gap) & (gap > 0)]
        orders.append(math.log10(gap[0] / positive[-1]) if positive.size and gap[0] > 0 else 0.0)
        straight.append(contraction_factor(gap, summary.middle, steps=summary.step_numbers).exponential_r2)
        curves.append(np.log10(np.where(gap > 0, gap, np.nan))[summary.middle])
    size = min(map(len, curves))
    band = float(np.nanmean(np.nanstd([curve[:size] for curve in curves], axis=0, ddof=1))) if len(curves) > 1 else 0.0
    words = (
        f"orders of ten {', '.join(f'{one:.1f}' for one in orders)}; R² of the middle half "
        f"{', '.join(f'{one:.3f}' for one in straight)}; deviation over seeds {band:.2f} of log10"
    )
    return found(min(orders) >= ORDERS and min(straight) >= STRAIGHT and band <= BAND, words, *straight, band)


def _acceleration(runs: Runs) -> Finding:
    factors = []
    for record, summary in _each(runs).values():
        at, loss = measured(record, "loss")
        gap = loss - summary.floor
        inside = np.flatnonzero((at >= TAIL_SHARE) & (gap > 0))
        if inside.size < 2:
            return Finding("cannot be decided", "fewer than two epochs of the last tenth are above the proxy")
        falls = [math.log(curve[inside[0]] / curve[inside[-1]]) for curve in (gap, loss)]
        factors.append(falls[0] / falls[1] if falls[1] > 0 else math.inf)
    words = f"over the last tenth log gap falls {', '.join(f'{one:.3g}' for one in factors)} times as far as log L"
    return Finding("reproduced" if min(factors) >= ACCELERATION else "not reproduced", words)


def _envelope(runs: Runs) -> Finding:
    found_, words = [], []
    for name, (_, summary) in _each(runs).items():
        if summary.regime.stop:
            first, last = summary.steps(summary.regime)
            words.append(f"{name}: {summary.envelope[0]:.3g} to {summary.envelope[1]:.3g} (epochs {first} to {last})")
            found_.append(summary.envelope[0] > 0)
        else:
            words.append(f"{name}: no stable regime")
            found_.append(False)
    return found(all(found_), "; ".join(words))


def _drift(runs: Runs) -> Finding:
    falls, late, ends = [], [], []
    for record in runs.seeds.values():
        at, drift = measured(record, "drift")
        falls.append(int(np.sum(drift[1:] < drift[:-1] * (1 - DRIFT_ROUNDING))))
        late.append(1 - drift[at <= 0.75][-1] / drift[-1])
        ends.append(drift[-1])
    spread = float(np.std(ends, ddof=1) / np.mean(ends)) if len(ends) > 1 else math.nan
    words = (
        f"falls in {', '.join(map(str, falls))} epochs; last quarter adds {', '.join(f'{one:.1%}' for one in late)}; "
        f"ends at {', '.join(f'{one:.3g}' for one in ends)}, deviation {spread:.0%}"
    )
    return found(not any(falls) and max(late) <= SATURATED and spread <= SPREAD, words, spread)


def _one(id_: str, sentence: str, rule: str, judge: Callable[[Runs], Finding]) -> Statement:
    return Statement(id_, "6.3", sentence, rule, ("seeds",), _of_seeds(judge))


CIFAR = (
    _one("seeds_gap", "The gap falls on a line over about four orders of ten, in a narrow band over seeds.",
         f"at least {ORDERS:g} orders and R² >= {STRAIGHT:g} on every seed; mean deviation over seeds at most {BAND:g} "
         "of log10, over the middle half of the run", _gap),
    _one("seeds_end", "Its acceleration at the end is the proxy's.",
         f"over the last tenth log gap falls at least {ACCELERATION:g} times as far as log L, on every seed",
         _acceleration),
    _one("seeds_pl", "The PL ratio has a positive envelope on the stable regime of every seed.",
         "every seed has a stable regime, on which the least ratio with L* = 0 is > 0", _envelope),
    _one("seeds_drift", "The drift is monotone, saturates, and is reproducible.",
         f"it falls in no epoch by more than rounding, the last quarter adds at most {SATURATED:.0%}, and its "
         f"deviation over seeds is at most {SPREAD:.0%}", _drift),
)  # fmt: skip
"""The statements of section 6.3."""
