"""Losses of several runs of several methods."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lplr_jax.plotting.style import blank, styled


def losses(
    curves: Mapping[str, Sequence[tuple[np.ndarray, np.ndarray]]], levels: Mapping[str, float], *, title: str = ""
) -> Figure:
    """Draw the loss of every run against its step on a log scale, and a level a method where there is one.

    Args:
        curves: from a method to steps and losses of each of its runs; what is not finite is left out.
        levels: from a method to a predicted level, whose label has the method's name up to a colon.
        title: of the figure.

    Raises:
        ValueError: where there is no curve, or a level is of no method.
    """
    if not curves or not set(levels) <= set(curves):
        raise ValueError(f"curves must hold every method that has a level, got {sorted(curves)} and {sorted(levels)}")
    with styled():
        figure = blank(7.0, 4.2)
        ax = figure.subplots()
        for index, (name, runs) in enumerate(curves.items()):
            for place, (steps, loss) in enumerate(runs):
                known = np.isfinite(loss) & (loss > 0)
                style = {"color": f"C{index}", "linewidth": 0.8, "alpha": 0.8}
                ax.plot(steps[known], loss[known], **style, label=name if not place else None)
            if name in levels:
                short = name.partition(":")[0]
                ax.axhline(levels[name], color=f"C{index}", linestyle=":", label=f"{short}: predicted ball")
        ax.set_yscale("log")
        ax.set_xlabel("step")
        ax.set_ylabel("L   [units of L]")
        ax.set_title(title)
        ax.legend()
    return figure
