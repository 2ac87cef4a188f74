"""Whether a run reached the edge of stability, and what it did there (Cohen et al. 2021)."""

import math
from dataclasses import dataclass

import numpy as np

from lplr_jax.curves.summary import check_record, steps_of
from lplr_jax.records import Record

HOVER = (0.8, 1.25)
"""Shares of 2/η between which a sharpness counts as hovering. Calibrated: published figures stay within them."""


@dataclass(frozen=True)
class Edge:
    """What a record says of the edge; shares are of 2/η, "there" is from the first probe at or above it on.

    Attributes:
        threshold: 2/η.
        sharpness_0: at the first probe.
        largest: at any probe.
        reached: step of the first probe with a sharpness of at least 2/η; None where there is none.
        probes: probes there.
        mean: mean share there.
        least: the least there.
        most: the largest there.
        hovers: whether there are at least three of them, all within `HOVER`.
        critical: mean of 2/η_c there, as a share.
        critical_before: the same before.
        rises: share of the steps there after which the loss is larger.
        rises_before: share of those before.
        raised: probes there at which one exact step of η is proved to raise the loss, and of how many.
        lowered: the same for lowering it.
        loss_0: L at the first step.
        loss_reached: L at the probe that reached 2/η.
        loss_t: the last finite L.
    """

    threshold: float
    sharpness_0: float
    largest: float
    reached: int | None
    probes: int
    mean: float
    least: float
    most: float
    hovers: bool
    critical: float
    critical_before: float
    rises: float
    rises_before: float
    raised: str
    lowered: str
    loss_0: float
    loss_reached: float
    loss_t: float


def edge_of(record: Record) -> Edge:
    """Read off a record whether its sharpness reached 2/η, and what it did there.

    Raises:
        TypeError: for what is no record.
        ValueError: for a record without η, or without a sharpness.
    """
    check_record(record)
    eta = float(record["learning_rate"])
    order = np.argsort(record.arrays.get("probe_epoch", np.zeros(0)), kind="stable")

    def probe(name: str) -> np.ndarray:
        return np.asarray(record.arrays.get(name, np.full(order.size, np.nan)), np.float64)[order]

    sharpness = probe("sharpness")
    if not (eta > 0 and np.isfinite(sharpness).any()):
        raise ValueError("the edge of stability asks for η and for the sharpness of at least one probe")
    steps, loss, at = steps_of(record), record["loss"], record["probe_epoch"][order]
    share = sharpness * eta / 2
    above = np.flatnonzero(share >= 1)
    first = int(above[0]) if above.size else order.size
    there = share[first:][np.isfinite(share[first:])]
    reached = int(at[first]) if above.size else None
    last = int(steps[-1]) + 1 if reached is None else reached
    # A rise belongs to the step that was taken; a difference over a gap is none.
    known = np.isfinite(loss[:-1]) & np.isfinite(loss[1:]) & (np.diff(steps) == 1)
    rising, early = loss[1:] > loss[:-1], steps[:-1] < last
    critical = eta / probe("critical_step")
    finite = loss[np.isfinite(loss)]
    low, high = probe("probe_decrease_lower")[first:], probe("probe_decrease_upper")[first:]
    enclosed = int((np.isfinite(low) & np.isfinite(high)).sum())
    return Edge(
        threshold=2 / eta,
        sharpness_0=float(sharpness[0]),
        largest=float(np.nanmax(sharpness)),
        reached=reached,
        probes=there.size,
        mean=_mean(there),
        least=float(there.min(initial=math.inf)) if there.size else math.nan,
        most=float(there.max(initial=-math.inf)) if there.size else math.nan,
        hovers=there.size >= 3 and bool(HOVER[0] <= there.min() and there.max() <= HOVER[1]),
        critical=_mean(critical[first:]),
        critical_before=_mean(critical[:first]),
        rises=_mean(rising[known & ~early]),
        rises_before=_mean(rising[known & early]),
        raised=f"{int((high < 0).sum())} of {enclosed}",
        lowered=f"{int((low > 0).sum())} of {enclosed}",
        loss_0=float(finite[0]) if finite.size else math.nan,
        loss_reached=math.nan if reached is None else float(loss[int(np.searchsorted(steps, reached))]),
        loss_t=float(finite[-1]) if finite.size else math.nan,
    )


def _mean(values: np.ndarray) -> float:
    values = np.asarray(values, np.float64)
    values = values[np.isfinite(values)]
    return float(values.mean()) if values.size else math.nan
