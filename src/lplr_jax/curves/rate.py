"""How fast a loss falls, by which law, and how much of the answer is made by the proxy for L*."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from lplr_jax import checks
from lplr_jax.curves.pl import loss_floor

Law = Literal["exponential", "power law", "undecided"]
Window = Callable[..., slice]
"""A rule that picks the entries of a loss curve to look at: from losses, and `steps` where these are given."""

PROXY_INFLATION = 2.0
"""Largest factor by which the proxy may inflate the PL ratio in the stable regime. Calibrated on the width-128 run."""
STEADINESS = 2.0
"""Largest factor between a local rate and the median rate of what follows, past the transient. Calibrated likewise."""
PROXY_SPREAD = 0.2
"""Rates that differ by more than this share are called set by the proxy."""
LAW_MARGIN = 0.005
"""Least difference in R² for which one law is said to fit better. Calibrated likewise."""
MIN_ENTRIES = 3
"""Fewest entries of a series that make a regime; a line through two points has no residual."""

EMPTY = slice(0, 0)


def _smoothing(length: int) -> int:
    return max(1, length // 100)


def step_numbers(steps: Int[np.ndarray, " t"] | None, size: int) -> Int[np.ndarray, " t"]:
    """Return the step number of every entry of a series: 0, 1, ... where none are given.

    Raises:
        ValueError: if `steps` are not as many strictly ascending integers >= 0.
    """
    if steps is None:
        return np.arange(size)
    found = checks.as_array(steps)
    if found is None or found.dtype.kind not in "iu" or found.shape != (size,):
        raise ValueError(f"steps must be {size} integers, one for each entry of the series, got {checks.shown(steps)}")
    found = found.astype(np.int64)
    if size and (found[0] < 0 or (np.diff(found) <= 0).any()):
        raise ValueError(f"steps must be strictly ascending and >= 0, got {found[:3].tolist()} ... {found[-1]}")
    return found


def leading_finite(values: Float[np.ndarray, " t"]) -> int:
    """Return how many values are finite before the first that is not."""
    finite = np.isfinite(values)
    return values.size if finite.all() else int(finite.argmin())


def check_regime(
    recorded: int, start: int | None, stop: int | None, *, steps: Int[np.ndarray, " t"] | None = None
) -> None:
    """Raise ValueError if start and stop do not name, in order, steps of a run of which `recorded` entries are known.

    Their step numbers are `steps`; None stands for 0, 1, ...
    """
    for name, value in (("start", start), ("stop", stop)):
        if value is not None:
            checks.whole(f"regime_{name}", value)
    last = recorded - 1 if steps is None or not steps.size else int(steps[-1])
    if (start is not None and not 0 <= start <= last) or (stop is not None and not 0 < stop <= last + 1):
        raise ValueError(f"regime start {start} and stop {stop} must lie in the run's steps 0 to {last}")
    if start is not None and stop is not None:
        inside = stop - start if steps is None else int(np.diff(np.searchsorted(steps, [start, stop]))[0])
        if inside < MIN_ENTRIES:
            raise ValueError(f"a regime needs at least {MIN_ENTRIES} recorded steps, got start {start} and stop {stop}")


def stable_regime(
    loss: Float[np.ndarray, " t"],
    *,
    floor: float | None = None,
    start: int | None = None,
    stop: int | None = None,
    steps: Int[np.ndarray, " t"] | None = None,
) -> slice:
    """Find the entries past the transient and before the proxy decides the value of the PL ratio.

    The rule. Tail: an entry counts as decided by the proxy when L - floor < L / 2, that is when the two ends of the PL
    bracket differ by more than a factor of 2; the regime stops after the last entry that is not. Transient: the regime
    starts at the first entry whose local rate (log-decrease per step, over 1 % of the entries) is within a factor of 2
    of the median local rate from there to the stop, and whose loss is at most L_0. Where that leaves fewer than 3
    entries the slice is empty.

    Args:
        loss: L at every recorded step from 0, shape (t,); NaN after a run that ended early.
        floor: the proxy for L*; None takes the least recorded loss.
        start: first step, instead of the rule for the transient.
        stop: first step past the regime, instead of the rule for the tail.
        steps: step number of each loss, shape (t,), ascending; None for 0, 1, ...

    Returns:
        A slice over the positions in `loss`, empty when the run has no such regime.

    Raises:
        ValueError: if start and stop do not name steps of the run in order, or `steps` does not fit `loss`.

    Example:
        >>> loss = 0.9 ** np.arange(0.0, 100.0, 2.0)
        >>> stable_regime(loss, start=10, stop=50, steps=np.arange(0, 100, 2))
        slice(5, 25, None)
    """
    loss = checks.real_array("loss", loss, axes="t")
    if floor is not None:
        checks.number("floor", floor, least=0)
    recorded = leading_finite(loss)
    loss, steps = loss[:recorded], step_numbers(steps, loss.size)[:recorded]
    check_regime(recorded, start, stop, steps=steps)
    if recorded < MIN_ENTRIES:
        return EMPTY
    if stop is None:
        end = proxy_decides_from(loss, loss_floor(loss) if floor is None else floor)
    else:
        end = int(np.searchsorted(steps, stop))
    begin = _past_transient(loss, steps, end) if start is None else int(np.searchsorted(steps, start))
    return slice(begin, end) if end - begin >= MIN_ENTRIES else EMPTY


def proxy_decides_from(loss: Float[np.ndarray, " t"], floor: float) -> int:
    """Return the position from which on the proxy decides the value of the PL ratio (see `stable_regime`)."""
    clear = np.flatnonzero(loss - floor >= loss / PROXY_INFLATION)
    return int(clear[-1]) + 1 if clear.size else 0


def _past_transient(loss: np.ndarray, steps: np.ndarray, stop: int) -> int:
    width = _smoothing(loss.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(loss)
        rate = (log[:-width] - log[width:]) / (steps[width:] - steps[:-width])
    known = min(stop, rate.size)
    rate = rate[:known]
    middle = _suffix_medians(rate)
    steady = (middle > 0) & (middle / STEADINESS <= rate) & (rate <= STEADINESS * middle) & (loss[:known] <= loss[0])
    first = np.flatnonzero(steady[: max(0, known - MIN_ENTRIES + 1)])
    return int(first[0]) if first.size else stop


def _suffix_medians(values: np.ndarray) -> np.ndarray:
    """Return the median of values[k:] for every k, in k log k: a long run that never settles must not take for ever."""
    low, high = [], []  # the lower half, negated, and the upper half; both heaps, the lower one longer by one at most
    medians = np.empty(values.size)
    for k in range(values.size - 1, -1, -1):
        value = float(values[k])
        if math.isnan(value):
            medians[: k + 1] = np.nan
            break
        heapq.heappush(high, -heapq.heappushpop(low, -value))
        if len(high) > len(low):
            heapq.heappush(low, -heapq.heappop(high))
        medians[k] = -low[0] if len(low) > len(high) else 0.5 * (high[0] - low[0])
    return medians


def middle_half(loss: Float[np.ndarray, " t"], *, steps: Int[np.ndarray, " t"] | None = None) -> slice:
    """Return the entries of the middle half of the run, where a straight line in the gap is usually read off.

    Args:
        loss: L at every recorded step from 0, shape (t,).
        steps: step number of each loss, shape (t,), ascending; None for 0, 1, ...
    """
    loss = checks.real_array("loss", loss, axes="t", empty=True)
    known = np.flatnonzero(np.isfinite(loss))
    steps = step_numbers(steps, loss.size)
    last = int(steps[known[-1]]) if known.size else -1
    if last < 2 * MIN_ENTRIES:
        return EMPTY
    start, stop = np.searchsorted(steps, [last // 4, 3 * last // 4 + 1])
    return slice(int(start), int(stop)) if stop - start >= MIN_ENTRIES else EMPTY


@dataclass(frozen=True)
class Decay:
    """Two laws fitted to one gap curve over one window.

    Attributes:
        floor: what was taken for L*, in units of the loss.
        rate: exponential rate per step, from least squares on log gap against the step number.
        factor: contraction factor per step, exp(-rate); float(d) is this.
        exponential_r2: share of the variance of log gap that the exponential explains.
        exponent: a of the power law gap ~ t^(-a), from least squares on log gap against log t, t >= 1.
        power_r2: share of the variance of log gap that the power law explains, over the same epochs.
        law: which of the two explains more, "undecided" within 0.005.
        local_factors: least and largest factor per step over stretches of 1 % of the entries within the window.
        epochs: how many entries of the series entered; those with gap <= 0 cannot.
    """

    floor: float
    rate: float
    factor: float
    exponential_r2: float
    exponent: float
    power_r2: float
    law: Law
    local_factors: tuple[float, float]
    epochs: int

    def __float__(self) -> float:
        return self.factor


UNKNOWN_DECAY = Decay(np.nan, np.nan, np.nan, np.nan, np.nan, np.nan, "undecided", (np.nan, np.nan), 0)


def _line(t: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Return slope and R² of the least-squares line through (t, y)."""
    t, y = t - t.mean(), y - y.mean()
    slope = float(t @ y / (t @ t))
    total = float(y @ y)
    return slope, 1.0 - float(np.sum((y - slope * t) ** 2)) / total if total > 0 else 1.0


def contraction_factor(
    gap: Float[np.ndarray, " t"], regime: slice, *, floor: float = 0.0, steps: Int[np.ndarray, " t"] | None = None
) -> Decay:
    """Fit an exponential and a power law to a gap curve over a regime.

    Args:
        gap: L_t - L* at every recorded step from 0, shape (t,).
        regime: positions to fit, such as `stable_regime` returns.
        floor: what was subtracted, kept for the record.
        steps: step number of each entry, shape (t,), ascending; None for 0, 1, ...

    Returns:
        The fits; all NaN with law "undecided" when fewer than 3 entries with a positive gap are in the regime.

    Example:
        >>> round(float(contraction_factor(0.9 ** np.arange(50.0), slice(5, 40))), 12)
        0.9
    """
    gap = checks.real_array("gap", gap, axes="t", empty=True)
    checks.instance("regime", regime, slice, "such as stable_regime returns")
    numbers = step_numbers(steps, gap.size)
    inside = np.arange(gap.size)[regime]
    inside = inside[(numbers[inside] >= 1) & np.isfinite(gap[inside]) & (gap[inside] > 0)]
    if inside.size < MIN_ENTRIES:
        return UNKNOWN_DECAY
    t, log = numbers[inside].astype(float), np.log(gap[inside])
    slope, exponential_r2 = _line(t, log)
    power, power_r2 = _line(np.log(t), log)
    margin = exponential_r2 - power_r2
    law: Law = "undecided" if abs(margin) < LAW_MARGIN else "exponential" if margin > 0 else "power law"
    width = min(_smoothing(gap.size), inside.size - 1)
    local = np.exp((log[width:] - log[:-width]) / (t[width:] - t[:-width]))
    return Decay(
        floor=floor,
        rate=-slope,
        factor=float(np.exp(slope)),
        exponential_r2=exponential_r2,
        exponent=-power,
        power_r2=power_r2,
        law=law,
        local_factors=(float(local.min()), float(local.max())),
        epochs=int(inside.size),
    )


@dataclass(frozen=True)
class RateReport:
    """The rate of one run, with L* = 0, with the proxy, and with the proxy of the same run stopped earlier.

    Attributes:
        window: the positions looked at.
        zero: the decay of L itself.
        proxy: the decay of L less the run's floor.
        refits: (T', decay) of the gap when the run is stopped at step T', the last one recorded up to T/2 and 3T/4,
            the window found anew by the same rule.
        spread: largest rate of all these over the least, less one; inf if one is not positive, NaN if one is unknown.
        set_by_proxy: whether the spread is above 20 %: the number is made by the proxy, not by the loss. None if
            unknown.
    """

    window: slice
    zero: Decay
    proxy: Decay
    refits: tuple[tuple[int, Decay], ...]
    spread: float
    set_by_proxy: bool | None


def rate_report(
    loss: Float[np.ndarray, " t"], *, window: Window = stable_regime, steps: Int[np.ndarray, " t"] | None = None
) -> RateReport:
    """Fit the decay of L and of its gap to the proxy, and refit the gap with T/2 and 3T/4 as terminal steps.

    Args:
        loss: L at every recorded step from 0, shape (t,); NaN after a run that ended early.
        window: rule that picks the positions of a curve, applied to the whole run and to each shorter one; called as
            window(losses), and as window(losses, steps=...) where `steps` are given.
        steps: step number of each loss, shape (t,), ascending; None for 0, 1, ...
    """
    loss = checks.real_array("loss", loss, axes="t")
    checks.function("window", window, "from losses (t,) to a slice, such as stable_regime")
    numbers = step_numbers(steps, loss.size)
    last = int(np.isfinite(loss).sum()) - 1

    def look(curve: np.ndarray) -> slice:
        return window(curve) if steps is None else window(curve, steps=numbers[: curve.size])

    def gap_decay(curve: np.ndarray, regime: slice) -> Decay:
        floor = loss_floor(curve)
        return contraction_factor(curve - floor, regime, floor=floor, steps=numbers[: curve.size])

    regime = look(loss)
    zero, proxy = contraction_factor(loss, regime, steps=numbers), gap_decay(loss, regime)
    ends = [numbers[last] * share // 4 for share in (2, 3)]
    curves = [loss[: max(1, int(np.searchsorted(numbers, end, side="right")))] for end in ends]
    refits = tuple((int(numbers[curve.size - 1]), gap_decay(curve, look(curve))) for curve in curves)
    rates = np.array([zero.rate, proxy.rate, *(decay.rate for _, decay in refits)])
    known = rates[np.isfinite(rates)]
    if not np.isfinite(rates[:2]).all():
        spread = float("nan")
    else:
        spread = float(known.max() / known.min() - 1) if known.min() > 0 else float("inf")
    return RateReport(regime, zero, proxy, refits, spread, None if np.isnan(spread) else spread > PROXY_SPREAD)
