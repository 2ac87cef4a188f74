"""Sharpness against 2/η along a run, and the loss below it."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lplr_jax.curves.edge import edge_of
from lplr_jax.curves.summary import step_word, steps_of
from lplr_jax.plotting.style import blank, numbers_of, set_title, source_of, styled
from lplr_jax.records import Record


def edge(record: Record) -> Figure:
    """Draw the sharpness of the Hessian and the critical sharpness against 2/η, and the loss, along a run.

    Args:
        record: a run with its sharpness at some probes, such as `lplr edge` writes.

    Raises:
        TypeError: for what is no record.
        ValueError: if it lacks η or a sharpness.
    """
    found = edge_of(record)
    steps = steps_of(record)
    with styled():
        figure = blank(7.2, 6.4)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.5, 1))
        top.axhline(found.threshold, color="0.3", linestyle="--", linewidth=1, label=f"2/η = {found.threshold:g}")
        _series(top, record, "sharpness", "C0", "o", r"sharpness $\lambda_{\max}(\nabla^2L)$")
        _series(top, record, "critical_step", "C1", "s", r"critical sharpness $2/\eta_c$, by forward passes")
        _proved(top, record)
        top.set_ylim(bottom=0)
        top.set_ylabel("curvature   [L / parameter²]")
        top.legend(loc="upper center", bbox_to_anchor=(0.5, -0.03), ncol=2, fontsize=8)
        bottom.plot(steps, record["loss"], color="C0", linewidth=0.8, label="$L_t$")
        bottom.set_yscale("log")
        bottom.set_ylabel("loss   [units of L]")
        bottom.set_xlabel(step_word(record))
        bottom.set_xlim(0, max(int(steps[-1]), 1))
        for axes in (top, bottom):
            if found.reached is not None:
                axes.axvspan(found.reached, int(steps[-1]), color="#56B4E9", alpha=0.13, linewidth=0, zorder=0)
        parts = ["edge of stability", *numbers_of(record), source_of(record)]
        set_title(figure, ",  ".join(part for part in parts if part))
    return figure


def _series(axes: Axes, record: Record, name: str, colour: str, marker: str, label: str) -> None:
    if name not in record:
        return
    values = record[name] if name == "sharpness" else 2 / record[name]
    order = np.argsort(record["probe_epoch"], kind="stable")
    order = order[np.isfinite(values[order])]
    axes.plot(record["probe_epoch"][order], values[order], color=colour, marker=marker, markersize=3.5, label=label)


def _proved(axes: Axes, record: Record) -> None:
    """Mark the probes at which one exact step of η is proved to raise the loss, or to lower it."""
    for name, marker, colour, word in (
        ("probe_decrease_upper", "^", "C3", "raise"),
        ("probe_decrease_lower", "v", "C2", "lower"),
    ):
        if name in record:
            values = record[name]
            at = record["probe_epoch"][values < 0 if word == "raise" else values > 0]
            label = f"one exact step is proved to {word} L ({at.size})"
            height = np.full(at.size, 0.03)
            style = {"color": colour, "marker": marker, "linestyle": "none", "markersize": 4, "label": label}
            axes.plot(at, height, transform=axes.get_xaxis_transform(), **style)
