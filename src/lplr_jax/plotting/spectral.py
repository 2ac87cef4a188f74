"""Loss, PL ratio, spectrum and shares of several methods, one colour a method and one curve a run."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lplr_jax.curves.position import position_of
from lplr_jax.curves.summary import check_records, step_word
from lplr_jax.plotting.style import LONGEST_NAME, blank, plain, set_title, styled
from lplr_jax.records import Record

LEAST_SHARE = 1e-9
"""Shares below it are drawn there: λ_min may be 0, which a log scale has no place for."""

Line = Literal["-", "--", ":"]

Curves = tuple[tuple[str, Line, Callable[[Record], tuple[np.ndarray, np.ndarray]]], ...]
"""What is drawn of a record in one panel: label, line style, and steps with values."""


def spectral(runs: Mapping[str, Sequence[Record]], *, floor: float | None = None, title: str = "") -> Figure:
    """Draw what the gradient has to do with the kernel's spectrum along the runs of several methods.

    Panels: loss; PL ratio ½‖∇L‖²/(L - L*), L* = 0 and the floor; λ_max, ρ = gᵀΘg/‖g‖² and λ_min with its interval; and
    as shares of one the eigenvalues at least ρ, how much of ½‖∇L‖² the best bound by the top k eigenvectors accounts
    for, and that by λ_min.

    Args:
        runs: from a method to the records of its runs, all of which keep spectra.
        floor: a level below which no loss can fall, in units of L.
        title: of the figure.

    Returns:
        The figure; `save` writes it.

    Raises:
        ValueError: without records, or for one whose probes keep no spectrum.
    """
    several = [record for records in runs.values() for record in records]
    check_records(several)
    if any(position_of(record) is None for record in several):
        raise ValueError("every record must hold spectrum, residual_energy, ntk_rayleigh and ntk_min_eig of a probe")
    levels = [0.0] if floor is None or floor <= 0 else [0.0, floor]
    panels: tuple[tuple[str, str, Curves], ...] = (
        ("training loss, all positions", "L   [units of L]", (("", "-", _loss),)),
        (
            r"PL ratio $\frac{1}{2}\|\nabla L\|^2/(L-L^*)$",
            "PL ratio   [units of L]",
            tuple(
                (f"$L^*={level:.3g}$", line, partial(_pl_ratio, level=level))
                for level, line in zip(levels, ("-", "--"), strict=False)
            ),
        ),
        (
            _of_rows(several[0]),
            "output² / parameter²",
            (
                (r"$\lambda_{\max}$", "--", lambda record: (record["probe_epoch"], record["ntk_max_eig"])),
                (r"$\rho=g^T\Theta g/\|g\|^2$", "-", lambda record: (record["probe_epoch"], record["ntk_rayleigh"])),
                (r"$\lambda_{\min}$, with its interval", ":", _least),
            ),
        ),
        (
            r"shares: where the gradient lies, and what bounds account for",
            "share",
            (
                (r"eigenvalues $\geq\rho$, of all", "--", lambda record: _position(record, "above")),
                (r"of $\frac{1}{2}\|\nabla L\|^2$: best $k$ ($\mathtt{floor\_pl}$)", "-", _floor_share),
                (r"of $\frac{1}{2}\|\nabla L\|^2$: $\lambda_{\min}$", ":", _least_share),
            ),
        ),
    )
    with styled():
        figure = blank(11, 8.2)
        for (head, unit, curves), axes, letter in zip(panels, figure.subplots(2, 2).ravel(), "abcd", strict=True):
            _panel(axes, runs, curves)
            axes.set_title(f"({letter})  {head}")
            axes.set_ylabel(unit)
            axes.set_xlabel(step_word(several[0]))
        first, _, spectrum, _ = figure.axes
        for index, records in enumerate(runs.values()):
            for record in records:
                _interval(spectrum, record, f"C{index}")
        colours = [
            Line2D(
                [],
                [],
                color=f"C{index}",
                label=f"{plain(name, LONGEST_NAME)}, {len(records)} run{'s' * (len(records) > 1)}",
            )
            for index, (name, records) in enumerate(runs.items())
        ]
        if floor is not None and floor > 0:
            colours.append(first.axhline(floor, color="0.4", linestyle=":", label="floor of every causal function"))
        first.legend(handles=colours)
        set_title(figure, title)
    return figure


def _panel(axes: Axes, runs: Mapping[str, Sequence[Record]], curves: Curves) -> None:
    for _, line, of in curves:
        for index, records in enumerate(runs.values()):
            for record in records:
                steps, values = of(record)
                known = np.isfinite(values) & (values > 0)
                marker = "o" if line == "-" and steps.size < 100 else None
                style = {"color": f"C{index}", "linestyle": line, "linewidth": 0.9, "marker": marker, "markersize": 2.5}
                axes.plot(steps[known], values[known], **style)
    axes.set_yscale("log")
    if curves[0][0]:
        axes.legend(handles=[Line2D([], [], color="0.3", linestyle=line, label=label) for label, line, _ in curves])


def _loss(record: Record) -> tuple[np.ndarray, np.ndarray]:
    return record["epoch"], record["loss"]


def _pl_ratio(record: Record, level: float) -> tuple[np.ndarray, np.ndarray]:
    with np.errstate(divide="ignore", invalid="ignore"):
        return record["epoch"], 0.5 * record["grad_sq_norm"] / (record["loss"] - level)


def _least(record: Record) -> tuple[np.ndarray, np.ndarray]:
    return record["probe_epoch"], record["ntk_min_eig"]


def _interval(axes: Axes, record: Record, colour: str) -> None:
    ends = [np.asarray(record[name], np.float64) for name in ("ntk_min_eig_lower", "ntk_min_eig_upper")]
    known = np.isfinite(ends[0]) & np.isfinite(ends[1]) & (ends[1] > 0)
    low = np.maximum(ends[0][known], ends[1][known] * 1e-3)  # an end at or below 0 goes off the log scale's foot
    axes.vlines(record["probe_epoch"][known], low, ends[1][known], color=colour, linewidth=2.2, alpha=0.5)


def _position(record: Record, name: str) -> tuple[np.ndarray, np.ndarray]:
    found = position_of(record)
    assert found is not None
    return found.steps, getattr(found, name)


def _floor_share(record: Record) -> tuple[np.ndarray, np.ndarray]:
    return _position(record, "floor_share")


def _least_share(record: Record) -> tuple[np.ndarray, np.ndarray]:
    steps, share = _position(record, "least_share")
    return steps, np.maximum(share, LEAST_SHARE)


def _of_rows(record: Record) -> str:
    samples = int(record["kernel_samples"] if "kernel_samples" in record else record["n"])
    rows = samples * int(record["c"])
    part = f"{rows} rows of {int(record['n']) * int(record['c']):,}" if samples < int(record["n"]) else f"{rows} rows"
    return f"spectrum of the kernel of {part}"
