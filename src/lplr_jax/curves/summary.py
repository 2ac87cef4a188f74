"""What a record says in a few numbers, worked out once for tables, figures and verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lplr_jax import checks
from lplr_jax.curves.pl import loss_floor, pl_bracket
from lplr_jax.curves.rate import EMPTY, MIN_EPOCHS, RateReport, check_regime, middle_half, rate_report, stable_regime
from lplr_jax.curves.stability import PowerLaw, power_law
from lplr_jax.records import Record


@dataclass(frozen=True)
class Summary:
    """Quantities derived from a record.

    Attributes:
        floor: proxy for L*, the least recorded loss, in units of L.
        regime: the stable regime, empty when there is none.
        bracket: lower and upper end of the PL ratio at every epoch, in units of L.
        envelope: least lower and least upper end over the regime, (NaN, NaN) when there is none.
        regime_rate: the decay over the regime.
        middle_rate: the decay over the middle half of the run, where the linear rate is usually read off.
    """

    floor: float
    regime: slice
    bracket: tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]
    envelope: tuple[float, float]
    regime_rate: RateReport
    middle_rate: RateReport


def check_record(record: Record, name: str = "record") -> None:
    """Raise TypeError for what is no record."""
    checks.instance(name, record, Record, "as records.load returns one")


def check_records(records: Sequence[Record], name: str = "records") -> None:
    """Raise TypeError for what is no sequence of records, ValueError for an empty one."""
    if isinstance(records, str | Record) or not isinstance(records, Sequence):
        raise TypeError(f"{name} must be a sequence of records, got {checks.shown(records)}; put one in a list")
    for index, record in enumerate(records):
        check_record(record, f"{name}[{index}]")
    if not records:
        raise ValueError("there is no record to draw; `lplr ablation` makes some")


def summarise(record: Record) -> Summary:
    """Derive the summary of a record, with the regime that its config overrides, if it does.

    Where only some epochs were measured, the loss between them is interpolated for regime and rates; bracket and
    envelope are of measured epochs alone.

    Raises:
        ValueError: if the record's loss has no finite value, or its config names a regime outside the run.
    """
    check_record(record)
    loss, last = record["loss"], record["epoch"].size - 1
    named = {name: record.config.get(f"regime_{name}") for name in ("start", "stop")}
    # Held against the whole run, so that a record with a regime outside it is refused, not bent.
    check_regime(last + 1, **named)
    whole = _interpolated(record)

    def window(curve: Float[np.ndarray, " t"]) -> slice:
        # An override is given in epochs of the whole run; the same share of a shorter one is meant.
        share = (curve.size - 1) / last if last else 1.0
        ends = {name: round(end * share) for name, end in named.items() if end is not None}
        # A run that diverged, or one cut short, may have too few epochs left in the regime that was named.
        recorded = int(np.isfinite(curve).argmin()) if not np.isfinite(curve).all() else curve.size
        if "stop" in ends:
            ends["stop"] = min(ends["stop"], recorded)
        if min(ends.get("stop", recorded), recorded) - ends.get("start", 0) < MIN_EPOCHS:
            return EMPTY
        return stable_regime(curve, **ends)

    floor = loss_floor(loss)
    bracket = pl_bracket(loss, record["grad_sq_norm"], floor)
    regime = window(whole)
    envelope = tuple(_least(end[regime]) for end in bracket)
    return Summary(
        floor=floor,
        regime=regime,
        bracket=bracket,
        envelope=(envelope[0], envelope[1]),
        regime_rate=rate_report(whole, window=window),
        middle_rate=rate_report(whole, window=middle_half),
    )


def _interpolated(record: Record) -> Float[np.ndarray, " t"]:
    loss, epoch, end = record["loss"], record["epoch"], record.diverged_at
    measured = np.isfinite(loss)
    if not measured.any():
        return loss
    return np.where(
        epoch < (epoch.size if end is None else end), np.interp(epoch, epoch[measured], loss[measured]), loss
    )


def _least(values: Float[np.ndarray, " k"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.min()) if known.size else float("nan")


def gradient_law(record: Record, floor: float, *, smoothing: int = 1, whole: bool = False) -> PowerLaw:
    """Fit ‖∇L‖² = a (L - floor)^slope over the stable regime, or the middle half of a run that has none.

    A PL inequality that is tight with a constant has slope 1. The standard error takes epochs for independent, which
    they are not.

    Args:
        record: a run.
        floor: what is taken for L*: 0, or the least recorded loss.
        smoothing: measured epochs over which the logarithms of both are averaged first, a running mean.
        whole: fit over the whole run instead.
    """
    window = summarise(record).regime
    window = slice(None) if whole else window if window.stop else middle_half(record["loss"])
    gap, gradient = (record["loss"] - floor)[window], record["grad_sq_norm"][window]
    if smoothing > 1:
        kept = np.isfinite(gap) & np.isfinite(gradient) & (gap > 0) & (gradient > 0)
        mean = np.full(smoothing, 1 / smoothing)
        gap, gradient = (np.exp(np.convolve(np.log(curve[kept]), mean, "valid")) for curve in (gap, gradient))
    return power_law(gap, gradient)
