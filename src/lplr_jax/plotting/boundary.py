"""The step-size boundary against width."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from lplr_jax import checks
from lplr_jax.curves.stability import power_law
from lplr_jax.plotting.style import blank, styled


def boundary(
    widths: Sequence[int],
    predicted: Sequence[float] | Float[np.ndarray, " k"],
    descends: Sequence[float] | Float[np.ndarray, " k"],
    fails: Sequence[float] | Float[np.ndarray, " k"],
    *,
    critical: Sequence[float] | Float[np.ndarray, " k"] | None = None,
) -> Figure:
    """Draw the measured boundary beside 2/β, with fitted exponents, and their ratio.

    Args:
        widths: m of every point.
        predicted: 2/β at initialisation.
        descends: largest η seen to descend.
        fails: least η seen not to.
        critical: η_c at initialisation, up to which one step descends; NaN where it is not known.

    Returns:
        The figure; `save` writes it.

    Raises:
        ValueError: if the four do not agree in length, hold fewer than two points, or numbers that are not positive.
    """
    named = {"widths": widths, "predicted": predicted, "descends": descends, "fails": fails}
    columns = {name: checks.real_array(name, column, axes="k") for name, column in named.items()}
    lengths = [len(column) for column in columns.values()]
    if len(set(lengths)) > 1 or lengths[0] < 2:
        raise ValueError(f"widths, predicted, descends and fails must be as long and at least two, got {lengths}")
    for name, column in columns.items():
        if not (np.isfinite(column) & (column > 0)).all():
            raise ValueError(f"{name} must hold finite numbers > 0, got {column.tolist()}")
    once = None if critical is None else checks.real_array("critical", critical, axes="k")
    if once is not None and once.size != lengths[0]:
        raise ValueError(f"critical must have one entry for each of {lengths[0]} widths, got {once.size}")
    m, two_over_beta, low, high = columns.values()
    measured = np.sqrt(low * high)
    with styled():
        figure = blank(6.4, 6.2)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(2.2, 1))
        errors = np.stack([measured - low, high - measured])
        for values, style, label in (
            (two_over_beta, {"color": "C1", "marker": "s", "linestyle": "--"}, "2/β at initialisation"),
            (measured, {"color": "C0", "marker": "o", "linestyle": "-"}, "measured: largest η that descends"),
        ):
            law = power_law(m, values)
            text = f"{label}:  exponent {law.slope:.2f} ± {law.stderr:.2f}"
            top.plot(m, values, **{**style, "linestyle": "none"}, label=text)
            top.plot(m, law.at(m), color=style["color"], linestyle=style["linestyle"], linewidth=1)
        if once is not None and np.isfinite(once).any():
            label = r"$\eta_c$ at initialisation: one step descends"
            top.plot(m, once, color="C2", marker="^", linestyle=":", linewidth=1, label=label)
        top.errorbar(m, measured, errors, fmt="none", ecolor="C0")
        top.set_xscale("log")
        top.set_yscale("log")
        top.set_ylabel("step size η   [parameter² / L]")
        top.set_title("step-size boundary against width, and power laws fitted to it")
        top.legend(loc="lower left")
        ratio = measured / two_over_beta
        bottom.axhline(1.0, color="C1", linestyle="--", linewidth=1, label="2/β")
        bottom.axhline(0.5, color="0.5", linestyle=":", linewidth=1, label="1/β")
        bottom.plot(m, ratio, color="C0", marker="o", label="measured / (2/β)")
        for x, value in zip(m, ratio, strict=True):
            bottom.annotate(f"{value:.2f}", (x, value), (0, 6), textcoords="offset points", ha="center", fontsize=8)
        bottom.set_ylim(0, max(1.3, float(ratio.max()) * 1.2))
        bottom.set_xticks(m)
        bottom.xaxis.set_major_formatter(ScalarFormatter())
        bottom.xaxis.set_minor_formatter(NullFormatter())
        bottom.set_xlabel("width m")
        bottom.set_ylabel("measured / (2/β)")
        bottom.legend(loc="lower left", ncol=3)
    return figure
