"""Other accounts of fast training, read off the same record: for a table, no verdicts hang on them."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from lplr_jax.curves.summary import check_record, gradient_law
from lplr_jax.records import Record


class Rival(NamedTuple):
    """What one account asks for, as the run shows it.

    Attributes:
        name: the quantity.
        says: what the account makes of it.
        first: at the first probe that has it.
        last: at the last one.
        least: over the probes.
        most: over the probes.
    """

    name: str
    says: str
    first: float
    last: float
    least: float
    most: float


def rivals(record: Record) -> tuple[Rival, ...]:
    """Return the rivals that the record has the numbers for, probes in order of their steps.

    Raises:
        TypeError: for what is no record.
    """
    check_record(record)
    rows: list[Rival] = []
    if "probe_epoch" in record:
        order = np.argsort(record["probe_epoch"], kind="stable")

        def probe(name: str) -> Float[np.ndarray, " k"]:
            return np.asarray(record.arrays.get(name, np.full(order.size, np.nan)), np.float64)[order]

        with np.errstate(divide="ignore", invalid="ignore"):
            aiming, critical = probe("aiming_inner") / probe("probe_loss"), 2 / probe("critical_step")
        gauss_newton = probe("gauss_newton_curvature")
        series = (
            ("restricted strong convexity: cosine", "> 0 asks ∇L to move the mean output", probe("rsc_cosine")),
            ("aiming ⟨∇L, θ - θ̃⟩/L", "> 0 aims at the certified zero θ̃; 2 for a linear model", aiming),
            ("Gauss-Newton curvature gᵀΘ²g/(s gᵀΘg)", "below 2/η at a stable step", gauss_newton),
            ("critical sharpness 2/η_c", "below 2/η where the next step descends", critical),
            ("sharpness λ_max(∇²L)", "below 2/η where the loss is quadratic", probe("sharpness")),
        )
        for name, says, values in series:
            known = values[np.isfinite(values)]
            if known.size:
                ends = (float(known[0]), float(known[-1]), float(known.min()), float(known.max()))
                rows.append(Rival(name, says, *ends))
    law = gradient_law(record, 0.0) if np.isfinite(record["loss"]).any() else None
    if law is not None and np.isfinite(law.slope):
        says = "slope of log ‖∇L‖² on log L: 1 for PL with L* = 0, 2 for a 1/t rate"
        rows.append(Rival("Kurdyka-Łojasiewicz slope", says, law.slope, law.slope, law.slope, law.slope))
    return tuple(rows)
