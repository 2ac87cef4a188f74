"""What a record says in a few numbers, worked out once for tables, figures and verdicts."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lplr_jax import checks
from lplr_jax.curves.pl import loss_floor, pl_bracket
from lplr_jax.curves.rate import (
    EMPTY,
    MIN_ENTRIES,
    RateReport,
    check_regime,
    leading_finite,
    middle_half,
    rate_report,
    stable_regime,
)
from lplr_jax.curves.stability import Observation, PowerLaw, observe, power_law
from lplr_jax.records import Record


@dataclass(frozen=True)
class Summary:
    """Quantities derived from a record; series and regimes are by position, rates per step.

    Attributes:
        floor: proxy for L*, the least recorded loss, in units of L.
        regime: the stable regime, a slice of positions, empty when there is none.
        bracket: lower and upper end of the PL ratio at every entry, in units of L; NaN for a loss that falls below 0.
        envelope: least lower and least upper end over the regime, (NaN, NaN) when there is none.
        regime_rate: the decay over the regime.
        middle_rate: the decay over the middle half of the run, where the linear rate is usually read off.
        middle: the middle half, a slice of positions.
        step_numbers: step number of every entry.
    """

    floor: float
    regime: slice
    bracket: tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]
    envelope: tuple[float, float]
    regime_rate: RateReport
    middle_rate: RateReport
    middle: slice
    step_numbers: Int[np.ndarray, " t"]

    def steps(self, positions: slice) -> tuple[int, int]:
        """Return the step numbers of the first and the last entry of a slice of positions, such as `regime`.

        Raises:
            ValueError: if it holds no entry.
        """
        inside = self.step_numbers[positions]
        if not inside.size:
            raise ValueError(f"the slice {positions.start} to {positions.stop} holds no entry, so it has no steps")
        return int(inside[0]), int(inside[-1])


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


def step_word(record: Record) -> str:
    """Return what the record calls a step: "epoch" where its config counts epochs; only labels depend on it."""
    return "epoch" if "epochs" in record.config else "step"


def steps_of(record: Record) -> Int[np.ndarray, " t"]:
    """Return the step number of every entry of a record's series."""
    return record["epoch"].astype(np.int64)


def summarise(record: Record) -> Summary:
    """Derive the summary of a record, with the regime that its config overrides, if it does.

    Where an entry was not measured, the loss is interpolated between its neighbours, by their step numbers, for regime
    and rates; bracket and envelope are of measured entries alone. No probe is needed.

    Raises:
        ValueError: if the record's loss has no finite value, or its config names a regime outside the run.
    """
    check_record(record)
    loss, steps = record["loss"], steps_of(record)
    last = int(steps[-1])
    named = {name: record.config.get(f"regime_{name}") for name in ("start", "stop")}
    # Held against the whole run, so that a record with a regime outside it is refused, not bent.
    check_regime(steps.size, **named, steps=steps)
    whole = _interpolated(loss, steps)

    def window(curve: Float[np.ndarray, " t"], *, steps: Int[np.ndarray, " t"]) -> slice:
        # An override is given in steps of the whole run; the same share of a shorter one is meant.
        share = int(steps[-1]) / last if last else 1.0
        ends = {name: round(end * share) for name, end in named.items() if end is not None}
        # A run that diverged, or one cut short, may have too few entries left in the regime that was named.
        recorded = leading_finite(curve)
        if recorded and "stop" in ends:
            ends["stop"] = min(ends["stop"], int(steps[recorded - 1]) + 1)
        positions = {name: int(np.searchsorted(steps, end)) for name, end in ends.items()}
        if min(positions.get("stop", recorded), recorded) - positions.get("start", 0) < MIN_ENTRIES:
            return EMPTY
        return stable_regime(curve, **ends, steps=steps)

    floor = loss_floor(loss)
    # A loss that falls below 0 has an L* below 0, of which nothing is known here.
    unknown = np.full(loss.size, np.nan)
    bracket = pl_bracket(loss, record["grad_sq_norm"], floor) if floor >= 0 else (unknown, unknown)
    regime = window(whole, steps=steps)
    envelope = tuple(_least(end[regime]) for end in bracket)
    return Summary(
        floor=floor,
        regime=regime,
        bracket=bracket,
        envelope=(envelope[0], envelope[1]),
        regime_rate=rate_report(whole, window=window, steps=steps),
        middle_rate=rate_report(whole, window=middle_half, steps=steps),
        middle=middle_half(whole, steps=steps),
        step_numbers=steps,
    )


def observed(record: Record) -> Observation:
    """Classify a run by its record: see `observe`. Entries that `seen` calls unseen do not enter.

    Raises:
        ValueError: if the loss at step 0 is not finite.
    """
    kept = record["seen"] == 1 if "seen" in record else np.ones(record["loss"].size, bool)
    kept[0] = True
    return observe(record["loss"][kept], record["drift"][kept], steps=steps_of(record)[kept])


def _interpolated(loss: Float[np.ndarray, " t"], steps: Int[np.ndarray, " t"]) -> Float[np.ndarray, " t"]:
    """Fill gaps up to the last finite loss; what comes after it stays NaN, whether it diverged or was not seen."""
    measured = np.flatnonzero(np.isfinite(loss))
    if not measured.size:
        return loss
    between = np.interp(steps, steps[measured], loss[measured])
    return np.where(np.arange(loss.size) <= measured[-1], between, np.nan)


def _least(values: Float[np.ndarray, " k"]) -> float:
    known = values[~np.isnan(values)]
    return float(known.min()) if known.size else float("nan")


def gradient_law(record: Record, floor: float, *, smoothing: int = 1, whole: bool = False) -> PowerLaw:
    """Fit ‖∇L‖² = a (L - floor)^slope over the stable regime, or the middle half of a run that has none.

    A PL inequality that is tight with a constant has slope 1. The standard error takes steps for independent, which
    they are not.

    Args:
        record: a run.
        floor: what is taken for L*: 0, or the least recorded loss.
        smoothing: measured entries over which the logarithms of both are averaged first, a running mean.
        whole: fit over the whole run instead.
    """
    summary = summarise(record)
    window = slice(None) if whole else summary.regime if summary.regime.stop else summary.middle
    gap, gradient = (record["loss"] - floor)[window], record["grad_sq_norm"][window]
    if smoothing > 1:
        kept = np.isfinite(gap) & np.isfinite(gradient) & (gap > 0) & (gradient > 0)
        mean = np.full(smoothing, 1 / smoothing)
        gap, gradient = (np.exp(np.convolve(np.log(curve[kept]), mean, "valid")) for curve in (gap, gradient))
    return power_law(gap, gradient)
