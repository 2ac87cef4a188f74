"""What a record says in a few numbers, worked out once for tables, figures and verdicts."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lplr_jax import checks
from lplr_jax.diagnostics import (
    PowerLaw,
    RateReport,
    loss_floor,
    middle_half,
    pl_bracket,
    power_law,
    rate_report,
    stable_regime,
)
from lplr_jax.diagnostics.rate import EMPTY, MIN_EPOCHS, check_regime
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


def summarise(record: Record) -> Summary:
    """Derive the summary of a record, with the regime that its config overrides, if it does.

    Raises:
        ValueError: if the record's loss has no finite value, or its config names a regime outside the run.
    """
    check_record(record)
    loss, last = record["loss"], record["epoch"].size - 1
    named = {name: record.config.get(f"regime_{name}") for name in ("start", "stop")}
    # Held against the whole run, so that a record with a regime outside it is refused, not bent.
    check_regime(last + 1, **named)

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
    regime = window(loss)
    envelope = tuple(float(end[regime].min()) if end[regime].size else float("nan") for end in bracket)
    return Summary(
        floor=floor,
        regime=regime,
        bracket=bracket,
        envelope=(envelope[0], envelope[1]),
        regime_rate=rate_report(loss, window=window),
        middle_rate=rate_report(loss, window=middle_half),
    )


def gradient_law(record: Record, floor: float) -> PowerLaw:
    """Fit ‖∇L‖² = a (L - floor)^slope over the stable regime, or the middle half of a run that has none.

    A PL inequality that is tight with a constant has slope 1. The standard error takes epochs for independent, which
    they are not.

    Args:
        record: a run.
        floor: what is taken for L*: 0, or the least recorded loss.
    """
    window = summarise(record).regime
    window = window if window.stop else middle_half(record["loss"])
    return power_law((record["loss"] - floor)[window], record["grad_sq_norm"][window])
