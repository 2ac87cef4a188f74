"""The width ablation, and the figures of the paper's earlier version, from records alone."""

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, ScalarFormatter

from lplr_jax import checks
from lplr_jax.curves.stability import observe, power_law
from lplr_jax.curves.summary import Summary, check_records, gradient_law, summarise
from lplr_jax.plotting.style import STYLE, plain
from lplr_jax.records import Record

MARKERS = "osD^vPX"
"""One marker a width, so that the figure reads without colour."""
COLOURS = ("C0", "C1", "C2", "C3")
FIRST = 20
"""Last epoch of the inset that shows how an arm starts: a catapult is over by then. Calibrated."""


def ablation(records: Sequence[Record]) -> Figure:
    """Draw λ_min, drift, PL bracket and gap of all arms: one colour a width, unstable arms dashed.

    An arm is unstable when its loss passes above its first value (`diagnostics.observe`: catapult or divergence).

    Args:
        records: one an arm, with kernel probes.

    Returns:
        The figure; `save` writes it.

    Raises:
        TypeError: for what is no sequence of records.
        ValueError: without records, or for records of another kind of run.
        KeyError: for records without kernel probes.
    """
    check_records(records)
    widths = sorted({_integer(record, "width", least=1) for record in records})
    with mpl.rc_context(fname=STYLE):
        # A map whose lightness rises steadily keeps the widths apart in grey; its lightest end is left out.
        colours = dict(zip(widths, mpl.colormaps["viridis"](np.linspace(0, 0.8, len(widths))), strict=True))
        figure = Figure(figsize=(11, 8.6))
        FigureCanvasAgg(figure)
        (a, b), (c, d) = figure.subplots(2, 2)
        start = d.inset_axes((0.5, 0.61, 0.47, 0.3))
        handles = []
        for record in sorted(records, key=lambda one: (_integer(one, "width", least=1), -float(one["learning_rate"]))):
            width = _integer(record, "width", least=1)
            outcome = observe(record["loss"], record["drift"]).outcome
            unstable = outcome in ("catapult", "divergence")
            style = {"color": colours[width], "linestyle": "--" if unstable else "-"}
            marker = MARKERS[widths.index(width) % len(MARKERS)]
            _draw_arm((a, b, c, d), record, summarise(record), style, marker)
            first = slice(min(FIRST + 1, record["epoch"].size))
            start.plot(record["epoch"][first], record["loss"][first] / record["loss"][0], **style, linewidth=1)
            what = outcome if record.diverged_at is None else f"diverged at epoch {record.diverged_at}"
            label = f"m = {width}, η = {float(record['learning_rate']):.3g}: {what}"
            if seed := _integer(record, "seed", least=0):
                label += f" (seed {seed})"
            handles.append(Line2D([], [], **style, marker=marker, markersize=4, label=label))
        for axes, title, unit in (
            (
                a,
                "(a)  smallest eigenvalue of the empirical NTK, all samples",
                r"$\lambda_{\min}$   [output² / parameter²]",
            ),
            (b, "(b)  drift from the initialisation", r"$\|\theta_t-\theta_0\|_2$   [parameter]"),
            (c, "(c)  PL ratio: L* = 0 (line) to the proxy (thin line)", "PL ratio   [units of L]"),
            (d, "(d)  gap to the proxy (line) and loss itself (thin)", "loss   [units of L]"),
        ):
            axes.set_title(title)
            axes.set_ylabel(unit)
            axes.set_xlabel("epoch")
            axes.set_xlim(0, max(int(record["epoch"][-1]) for record in records))
            if axes is not b:
                axes.set_yscale("log")
        b.set_ylim(bottom=0)
        # The first steps and the proxy's own zero at the end would squeeze the rest into a line.
        settled = [_positive(summarise(record).bracket[0])[record["epoch"].size // 100 + 1 :] for record in records]
        values = np.concatenate(settled)
        if np.isfinite(values).any():
            c.set_ylim(float(np.nanmin(values)) / 2, float(np.nanmax(values)) * 10)
        low, high = _span([record["loss"] - summarise(record).floor for record in records]) or d.get_ylim()
        # Room for the inset above the curves of the arms that stay below their first loss.
        d.set_ylim(low, max(high, 1e3 * float(np.nanmedian(np.concatenate([r["loss"] for r in records])))))
        start.set_yscale("log")
        start.set_title(rf"$L_t/L_0$, first {FIRST} epochs", fontsize=7.5)
        start.tick_params(labelsize=7)
        figure.legend(handles=handles, loc="outside lower center", ncol=min(3, len(handles)), fontsize=8)
    return figure


def _integer(record: Record, name: str, *, least: int) -> int:
    """Return an integer of a record's config, which another kind of run may lack."""
    if name not in record.config:
        raise ValueError(f"a {record.experiment} record without {name} in its config is no arm of a width ablation")
    return checks.whole(f"{name} in the config of a {record.experiment} record", record.config[name], least=least)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _draw_arm(
    panels: tuple[Axes, Axes, Axes, Axes], record: Record, summary: Summary, style: dict[str, Any], marker: str
) -> None:
    a, b, c, d = panels
    epoch, every = record["epoch"], max(1, record["epoch"].size // 8)
    probes = record["probe_epoch"]
    sparse = max(1, probes.size // 8)
    a.plot(probes, _positive(record["ntk_min_eig"]), marker=marker, markersize=4, markevery=sparse, **style)
    b.plot(epoch, record["drift"], marker=marker, markersize=4, markevery=every, **style)
    lower, upper = (_positive(end) for end in summary.bracket)
    c.fill_between(epoch, lower, upper, color=style["color"], alpha=0.08, linewidth=0)
    c.plot(epoch, upper, linewidth=0.8, alpha=0.8, **style)
    c.plot(epoch, lower, marker=marker, markersize=4, markevery=every, **style)
    d.plot(epoch, _positive(record["loss"] - summary.floor), marker=marker, markersize=4, markevery=every, **style)
    d.plot(epoch, _positive(record["loss"]), linewidth=0.8, alpha=0.8, **style)


def _span(gaps: Sequence[np.ndarray]) -> tuple[float, float] | None:
    """Limits of a log axis, without the last points, where a gap falls to the proxy's own zero; None without a gap."""
    values = np.concatenate([gap[np.isfinite(gap) & (gap > 0)] for gap in gaps])
    if not values.size:
        return None
    # The median, not the largest: a catapult passes a hundred times above everything else.
    return max(float(values.min()), float(np.median(values)) * 1e-2), float(values.max()) * 1.5


def initialisation(records: Mapping[str, Record], widths: Sequence[Record] = (), *, epoch: int = 250) -> Figure:
    """Draw what the paper's earlier version showed: gaps by initialisation, ‖∇L‖² against the gap, loss against width.

    Args:
        records: one a name of an initialisation.
        widths: records of several widths at one η; without them there is no third panel.
        epoch: at which the loss is shown against width; runs that end before it do not enter.

    Returns:
        The figure; `save` writes it.

    Raises:
        TypeError: for what is no mapping of records.
        ValueError: without records, for an epoch below 0, or for widths of another kind of run.
    """
    if not isinstance(records, Mapping):
        raise TypeError(f"records must be a mapping from names to records, got {checks.shown(records)}")
    check_records(list(records.values()))
    if len(widths):
        check_records(widths, "widths")
    checks.whole("epoch", epoch, least=0)
    widths = [record for record in widths if record["loss"].size > epoch and np.isfinite(record["loss"][epoch])]
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(14 if widths else 9.5, 4.6))
        FigureCanvasAgg(figure)
        left, middle, *rest = figure.subplots(1, 3 if widths else 2)
        gaps = []
        named = [(plain(name), record) for name, record in records.items()]
        for (name, record), colour, line in zip(named, COLOURS, ("-", "--", "-.", ":"), strict=False):
            summary = summarise(record)
            gaps.append(record["loss"] - summary.floor)
            left.plot(
                record["epoch"], _positive(gaps[-1]), color=colour, linestyle=line, label=f"{name}: gap to the proxy"
            )
            left.plot(
                record["epoch"],
                _positive(record["loss"]),
                color=colour,
                linestyle=line,
                linewidth=0.8,
                label=f"{name}: loss",
            )
            law = gradient_law(record, summary.floor)
            middle.plot(_positive(gaps[-1]), record["grad_sq_norm"], color=colour, linestyle=line, linewidth=1)
            x = np.array(law.range)
            text = f"{name}: slope {law.slope:.2f} ± {law.stderr:.2f}, gap {x[0]:.2g} to {x[1]:.2g}"
            middle.plot(x, law.at(x), color=colour, linewidth=4, alpha=0.35, label=text)
        left.set_yscale("log")
        left.set_ylim(_span(gaps))
        left.set_title("(a)  gap and loss by initialisation")
        left.set_xlabel("epoch")
        left.set_ylabel("loss   [units of L]")
        left.legend()
        middle.set_xscale("log")
        middle.set_yscale("log")
        middle.set_xlim(_span(gaps))
        middle.set_title("(b)  squared gradient norm against the gap")
        middle.set_xlabel("gap to the proxy   [units of L]")
        middle.set_ylabel(r"$\|\nabla L\|^2$   [L² / parameter²]")
        middle.legend(title="power law on the stable regime ± standard error", title_fontsize=7.5)
        if rest:
            _loss_against_width(rest[0], widths, epoch)
    return figure


def _loss_against_width(axes: Axes, records: Sequence[Record], epoch: int) -> None:
    m = np.array([_integer(record, "width", least=1) for record in records], np.float64)
    loss = np.array([record["loss"][epoch] for record in records])
    calm = np.array([observe(r["loss"], r["drift"]).outcome not in ("catapult", "divergence") for r in records])
    law = power_law(m[calm], loss[calm])
    axes.plot(m[calm], loss[calm], "o", color="C0", label=f"stable: slope {law.slope:.2f} ± {law.stderr:.2f}")
    axes.plot(m[~calm], loss[~calm], "X", color="C1", label="catapult or divergence, not in the fit")
    axes.plot(np.unique(m), law.at(np.unique(m)), color="C0", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(np.unique(m), [f"{width:g}" for width in np.unique(m)], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("width m")
    axes.set_ylabel(f"loss after {epoch} epochs   [units of L]")
    axes.set_title(f"(c)  loss after {epoch} epochs, η = {float(records[0]['learning_rate']):.3g}")
    axes.legend()
