"""Quantities against width, one curve a method."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from lplr_jax import checks
from lplr_jax.plotting.style import blank, styled


def against_width(
    widths: Sequence[int], panels: Mapping[str, Mapping[str, Sequence[float]]], *, title: str = ""
) -> Figure:
    """Draw each quantity in a panel of its own, on log scales; what is not finite and positive is left out.

    Args:
        widths: m of every point, ascending.
        panels: from what a quantity is called to its values at these widths, by method.
        title: of the whole.

    Raises:
        ValueError: where there is no panel, or a curve has not one value a width.
    """
    m = checks.real_array("widths", widths, axes="k")
    if not panels:
        raise ValueError("panels must hold at least one quantity, got none")
    lengths = {len(values) for curves in panels.values() for values in curves.values()}
    if lengths != {m.size}:
        raise ValueError(f"every curve must have one value for each of {m.size} widths, got {sorted(lengths)}")
    columns = 2 if len(panels) > 1 else 1
    with styled():
        figure = blank(4.6 * columns, 3.2 * -(-len(panels) // columns))
        axes = figure.subplots(-(-len(panels) // columns), columns, squeeze=False).ravel()
        for ax in axes[len(panels) :]:
            ax.remove()
        for ax, (label, curves) in zip(axes, panels.items(), strict=False):
            for index, (name, values) in enumerate(curves.items()):
                known = np.asarray(values, np.float64)
                known = np.where(np.isfinite(known) & (known > 0), known, np.nan)
                ax.plot(m, known, color=f"C{index}", marker="osv^Dx"[index % 6], markersize=4, label=name)
            ax.set_xscale("log")
            ax.set_yscale("log")
            ax.set_title(label, fontsize=9)
            ax.set_xticks(m)
            ax.xaxis.set_major_formatter(ScalarFormatter())
            ax.xaxis.set_minor_formatter(NullFormatter())
            ax.set_xlabel("width m")
        axes[0].legend(fontsize=7)
        figure.suptitle(title)
    return figure
