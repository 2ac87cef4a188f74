"""How fast a loss falls, by which law, and how much of the answer is made by the proxy for L*."""

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float

from lplr_jax import checks
from lplr_jax.curves.pl import loss_floor

Law = Literal["exponential", "power law", "undecided"]
Window = Callable[[Float[np.ndarray, " t"]], slice]
"""A rule that picks the epochs of a loss curve to look at."""

PROXY_INFLATION = 2.0
"""Largest factor by which the proxy may inflate the PL ratio in the stable regime. Calibrated on the width-128 run."""
STEADINESS = 2.0
"""Largest factor between a local rate and the median rate of what follows, past the transient. Calibrated likewise."""
PROXY_SPREAD = 0.2
"""Rates that differ by more than this share are called set by the proxy."""
LAW_MARGIN = 0.005
"""Least difference in R² for which one law is said to fit better. Calibrated likewise."""
MIN_EPOCHS = 3
"""Fewest epochs that make a regime; a line through two points has no residual."""

EMPTY = slice(0, 0)


def _smoothing(length: int) -> int:
    return max(1, length // 100)


def check_regime(recorded: int, start: int | None, stop: int | None) -> None:
    """Raise ValueError if start and stop do not name, in order, epochs of a run of which `recorded` are known."""
    for name, value in (("start", start), ("stop", stop)):
        if value is not None:
            checks.whole(f"regime_{name}", value)
    if (start is not None and not 0 <= start < recorded) or (stop is not None and not 0 < stop <= recorded):
        raise ValueError(f"regime start {start} and stop {stop} must lie in the run's epochs 0 to {recorded - 1}")
    if start is not None and stop is not None and stop - start < MIN_EPOCHS:
        raise ValueError(f"a regime needs at least {MIN_EPOCHS} epochs, got start {start} and stop {stop}")


def stable_regime(
    loss: Float[np.ndarray, " t"], *, floor: float | None = None, start: int | None = None, stop: int | None = None
) -> slice:
    """Find the epochs past the transient and before the proxy decides the value of the PL ratio.

    The rule. Tail: an epoch counts as decided by the proxy when L - floor < L / 2, that is when the two ends of the PL
    bracket differ by more than a factor of 2; the regime stops after the last epoch that is not. Transient: the regime
    starts at the first epoch whose local rate (log-decrease per epoch, over 1 % of the run) is within a factor of 2 of
    the median local rate from there to the stop, and whose loss is at most L_0. Where that leaves fewer than 3 epochs
    the slice is empty.

    Args:
        loss: L at every epoch from 0, shape (T + 1,); NaN after a run that ended early.
        floor: the proxy for L*; None takes the least recorded loss.
        start: first epoch, instead of the rule for the transient.
        stop: first epoch past the regime, instead of the rule for the tail.

    Returns:
        A slice over epochs, empty when the run has no such regime.

    Raises:
        ValueError: if start and stop do not name epochs of the run in order.
    """
    loss = checks.real_array("loss", loss, axes="t")
    if floor is not None:
        checks.number("floor", floor, least=0)
    recorded = int(np.isfinite(loss).argmin()) if not np.isfinite(loss).all() else loss.size
    check_regime(recorded, start, stop)
    if recorded < MIN_EPOCHS:
        return EMPTY
    loss = loss[:recorded]
    if stop is None:
        stop = proxy_decides_from(loss, loss_floor(loss) if floor is None else floor)
    if start is None:
        start = _past_transient(loss, stop)
    return slice(start, stop) if stop - start >= MIN_EPOCHS else EMPTY


def proxy_decides_from(loss: Float[np.ndarray, " t"], floor: float) -> int:
    """Return the first epoch from which on the proxy decides the value of the PL ratio (see `stable_regime`)."""
    clear = np.flatnonzero(loss - floor >= loss / PROXY_INFLATION)
    return int(clear[-1]) + 1 if clear.size else 0


def _past_transient(loss: np.ndarray, stop: int) -> int:
    width = _smoothing(loss.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        log = np.log(loss)
        rate = (log[:-width] - log[width:]) / width
    known = min(stop, rate.size)
    rate = rate[:known]
    middle = _suffix_medians(rate)
    steady = (middle > 0) & (middle / STEADINESS <= rate) & (rate <= STEADINESS * middle) & (loss[:known] <= loss[0])
    first = np.flatnonzero(steady[: max(0, known - MIN_EPOCHS + 1)])
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


def middle_half(loss: Float[np.ndarray, " t"]) -> slice:
    """Return the middle half of the recorded epochs, where a straight line in the gap is usually read off."""
    last = int(np.isfinite(checks.real_array("loss", loss, axes="t", empty=True)).sum()) - 1
    return slice(last // 4, 3 * last // 4 + 1) if last >= 2 * MIN_EPOCHS else EMPTY


@dataclass(frozen=True)
class Decay:
    """Two laws fitted to one gap curve over one window.

    Attributes:
        floor: what was taken for L*, in units of the loss.
        rate: exponential rate per epoch, from least squares on log gap against epoch.
        factor: contraction factor per epoch, exp(-rate); float(d) is this.
        exponential_r2: share of the variance of log gap that the exponential explains.
        exponent: a of the power law gap ~ t^(-a), from least squares on log gap against log t, t >= 1.
        power_r2: share of the variance of log gap that the power law explains, over the same epochs.
        law: which of the two explains more, "undecided" within 0.005.
        local_factors: least and largest factor per epoch over stretches of 1 % of the run within the window.
        epochs: how many epochs entered; those with gap <= 0 cannot.
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


def contraction_factor(gap: Float[np.ndarray, " t"], regime: slice, *, floor: float = 0.0) -> Decay:
    """Fit an exponential and a power law to a gap curve over a regime.

    Args:
        gap: L_t - L* at every epoch from 0, shape (T + 1,).
        regime: epochs to fit, such as `stable_regime` returns.
        floor: what was subtracted, kept for the record.

    Returns:
        The fits; all NaN with law "undecided" when fewer than 3 epochs with a positive gap are in the regime.

    Example:
        >>> round(float(contraction_factor(0.9 ** np.arange(50.0), slice(5, 40))), 12)
        0.9
    """
    gap = checks.real_array("gap", gap, axes="t", empty=True)
    checks.instance("regime", regime, slice, "such as stable_regime returns")
    epochs = np.arange(gap.size)[regime]
    epochs = epochs[(epochs >= 1) & np.isfinite(gap[epochs]) & (gap[epochs] > 0)]
    if epochs.size < MIN_EPOCHS:
        return UNKNOWN_DECAY
    log = np.log(gap[epochs])
    slope, exponential_r2 = _line(epochs.astype(float), log)
    power, power_r2 = _line(np.log(epochs), log)
    margin = exponential_r2 - power_r2
    law: Law = "undecided" if abs(margin) < LAW_MARGIN else "exponential" if margin > 0 else "power law"
    width = min(_smoothing(gap.size), epochs.size - 1)
    local = np.exp((log[width:] - log[:-width]) / (epochs[width:] - epochs[:-width]))
    return Decay(
        floor=floor,
        rate=-slope,
        factor=float(np.exp(slope)),
        exponential_r2=exponential_r2,
        exponent=-power,
        power_r2=power_r2,
        law=law,
        local_factors=(float(local.min()), float(local.max())),
        epochs=int(epochs.size),
    )


@dataclass(frozen=True)
class RateReport:
    """The rate of one run, with L* = 0, with the proxy, and with the proxy of the same run stopped earlier.

    Attributes:
        window: the epochs looked at.
        zero: the decay of L itself.
        proxy: the decay of L less the run's floor.
        refits: (T', decay) of the gap when the run is stopped at T' = T/2 and 3T/4, the window found anew by the same
            rule.
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


def rate_report(loss: Float[np.ndarray, " t"], *, window: Window = stable_regime) -> RateReport:
    """Fit the decay of L and of its gap to the proxy, and refit the gap with T/2 and 3T/4 as terminal epochs.

    Args:
        loss: L at every epoch from 0, shape (T + 1,); NaN after a run that ended early.
        window: rule that picks the epochs of a curve, applied to the whole run and to each shorter one.
    """
    loss = checks.real_array("loss", loss, axes="t")
    checks.function("window", window, "from losses (t,) to a slice, such as stable_regime")
    last = int(np.isfinite(loss).sum()) - 1

    def gap_decay(curve: np.ndarray, regime: slice) -> Decay:
        floor = loss_floor(curve)
        return contraction_factor(curve - floor, regime, floor=floor)

    regime = window(loss)
    zero, proxy = contraction_factor(loss, regime), gap_decay(loss, regime)
    cuts = [(cut, loss[: cut + 1]) for cut in (last // 2, 3 * last // 4)]
    refits = tuple((cut, gap_decay(curve, window(curve))) for cut, curve in cuts)
    rates = np.array([zero.rate, proxy.rate, *(decay.rate for _, decay in refits)])
    known = rates[np.isfinite(rates)]
    if not np.isfinite(rates[:2]).all():
        spread = float("nan")
    else:
        spread = float(known.max() / known.min() - 1) if known.min() > 0 else float("inf")
    return RateReport(regime, zero, proxy, refits, spread, None if np.isnan(spread) else spread > PROXY_SPREAD)
