"""The width ablation, and the figures of the paper's earlier version, from records alone."""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator, ScalarFormatter

from lplr_jax import checks
from lplr_jax.curves.stability import power_law
from lplr_jax.curves.summary import check_records, gradient_law, observed, step_word, summarise
from lplr_jax.plotting.panels import grid, known
from lplr_jax.plotting.style import LONGEST_NAME, blank, plain, styled
from lplr_jax.records import Record

MARKERS = "osD^vPX"
"""One marker a width, so that the figure reads without colour."""
COLOURS = ("C0", "C1", "C2", "C3", "C4", "C5")
FIRST = 20
"""Last step of the inset that shows how an arm starts: a catapult is over by then. Calibrated."""


def ablation(records: Sequence[Record]) -> Figure:
    """Draw λ_min, drift, PL bracket and gap of all arms: one colour a width, unstable arms dashed.

    An arm is unstable when its loss passes above its first value (`diagnostics.observe`: catapult or divergence).
    Runs whose configs do not all name a width get a colour each. A panel that no arm has arrays for is left out.

    Args:
        records: one an arm.

    Returns:
        The figure; `save` writes it.

    Raises:
        TypeError: for what is no sequence of records.
        ValueError: without records, for a width or a seed that is no integer, or for a run without a finite loss.
    """
    check_records(records)
    widths = [_integer(record, "width", least=1) for record in records]
    arms = [_Arm(record, width, index) for index, (record, width) in enumerate(zip(records, widths, strict=True))]
    by_width = None not in widths
    if by_width:
        arms.sort(key=lambda arm: (arm.group, -float(np.nan_to_num(arm.record["learning_rate"]))))
    groups = sorted({arm.group if by_width else arm.index for arm in arms})
    word = step_word(records[0])
    drawn = [panel for panel in _PANELS if panel.has(arms)]
    with styled():
        # A map whose lightness rises steadily keeps the widths apart in grey; its lightest end is left out.
        colours = dict(zip(groups, mpl.colormaps["viridis"](np.linspace(0, 0.8, len(groups))), strict=True))
        figure, panels = grid(len(drawn), 11, 8.6)
        handles = []
        for arm in arms:
            group = arm.group if by_width else arm.index
            style = {"color": colours[group], "linestyle": "--" if arm.unstable else "-"}
            marker = MARKERS[groups.index(group) % len(MARKERS)]
            for axes, panel in zip(panels, drawn, strict=True):
                panel.draw(axes, arm, style, marker)
            handles.append(Line2D([], [], **style, marker=marker, markersize=4, label=arm.label(word)))
        for axes, panel, letter in zip(panels, drawn, "abcd", strict=False):
            axes.set_title(f"({letter})  {panel.title}")
            axes.set_ylabel(panel.unit)
            axes.set_xlabel(word)
            axes.set_xlim(0, max(1, *(int(record["epoch"][-1]) for record in records)))
            panel.finish(axes, arms)
        _starts(panels[-1], arms, handles, word)
        figure.legend(handles=handles, loc="outside lower center", ncol=min(3, len(handles)), fontsize=8)
    return figure


class _Arm:
    """One run of several: its record, what follows from it, and its width where its config names one."""

    def __init__(self, record: Record, width: int | None, index: int) -> None:
        self.record, self.width, self.index = record, width, index
        self.group = width if width is not None else index
        self.summary = summarise(record)
        self.outcome = observed(record).outcome if np.isfinite(record["loss"][0]) else "divergence"
        self.unstable = self.outcome in ("catapult", "divergence")

    def label(self, word: str) -> str:
        """What the legend says of it."""
        record, eta = self.record, float(self.record["learning_rate"])
        at = record.diverged_at
        what = self.outcome if at is None else f"diverged at {word} {at}"
        name = f"m = {self.width}" if self.width is not None else f"{record.experiment}, run {self.index + 1}"
        seed = _integer(record, "seed", least=0)
        return name + (f", η = {eta:.3g}" if eta == eta else "") + f": {what}" + (f" (seed {seed})" if seed else "")


def _integer(record: Record, name: str, *, least: int) -> int | None:
    """Return an integer of a record's config, None where it has none of this name."""
    if record.config.get(name) is None:
        return None
    return checks.whole(f"{name} in the config of a {record.experiment} record", record.config[name], least=least)


def _positive(values: np.ndarray) -> np.ndarray:
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _every(size: int) -> int:
    return max(1, size // 8)


def _draw_min_eig(axes: Axes, arm: _Arm, style: dict[str, Any], marker: str) -> None:
    if known(arm.record, "probe_epoch", "ntk_min_eig"):
        probes, values = arm.record["probe_epoch"], _positive(arm.record["ntk_min_eig"])
        axes.plot(probes, values, marker=marker, markersize=4, markevery=_every(probes.size), **style)


def _draw_drift(axes: Axes, arm: _Arm, style: dict[str, Any], marker: str) -> None:
    epoch = arm.record["epoch"]
    axes.plot(epoch, arm.record["drift"], marker=marker, markersize=4, markevery=_every(epoch.size), **style)


def _draw_ratio(axes: Axes, arm: _Arm, style: dict[str, Any], marker: str) -> None:
    epoch = arm.record["epoch"]
    lower, upper = (_positive(end) for end in arm.summary.bracket)
    axes.fill_between(epoch, lower, upper, color=style["color"], alpha=0.08, linewidth=0)
    axes.plot(epoch, upper, linewidth=0.8, alpha=0.8, **style)
    axes.plot(epoch, lower, marker=marker, markersize=4, markevery=_every(epoch.size), **style)


def _draw_gap(axes: Axes, arm: _Arm, style: dict[str, Any], marker: str) -> None:
    epoch, loss = arm.record["epoch"], arm.record["loss"]
    gap = _positive(loss - arm.summary.floor)
    axes.plot(epoch, gap, marker=marker, markersize=4, markevery=_every(epoch.size), **style)
    axes.plot(epoch, _positive(loss), linewidth=0.8, alpha=0.8, **style)


def _log(axes: Axes, arms: Sequence[_Arm]) -> None:
    axes.set_yscale("log")


def _from_zero(axes: Axes, arms: Sequence[_Arm]) -> None:
    axes.set_ylim(bottom=0)


def _settled(axes: Axes, arms: Sequence[_Arm]) -> None:
    """Leave out the first steps and the proxy's own zero at the end, which would squeeze the rest into a line."""
    axes.set_yscale("log")
    curves = [_positive(arm.summary.bracket[0])[arm.record["epoch"].size // 100 + 1 :] for arm in arms]
    values = np.concatenate(curves)
    if np.isfinite(values).any():
        axes.set_ylim(float(np.nanmin(values)) / 2, float(np.nanmax(values)) * 10)


def _roomy(axes: Axes, arms: Sequence[_Arm]) -> None:
    """Leave room for the inset above the curves of the arms that stay below their first loss."""
    axes.set_yscale("log")
    low, high = _span([arm.record["loss"] - arm.summary.floor for arm in arms]) or axes.get_ylim()
    typical = float(np.nanmedian(np.concatenate([arm.record["loss"] for arm in arms])))
    axes.set_ylim(low, max(high, 1e3 * typical))


class _Panel(NamedTuple):
    """One panel: what it shows, which arms have it, what draws an arm, and what is done when all are drawn."""

    title: str
    unit: str
    has: Callable[[Sequence[_Arm]], bool]
    draw: Callable[[Axes, _Arm, dict[str, Any], str], None]
    finish: Callable[[Axes, Sequence[_Arm]], None]


_PANELS = (
    _Panel(
        "smallest eigenvalue of the empirical NTK, all samples",
        r"$\lambda_{\min}$   [output² / parameter²]",
        lambda arms: any(known(arm.record, "probe_epoch", "ntk_min_eig") for arm in arms),
        _draw_min_eig,
        _log,
    ),
    _Panel(
        "drift from the initialisation",
        r"$\|\theta_t-\theta_0\|_2$   [parameter]",
        lambda arms: any(known(arm.record, "drift") for arm in arms),
        _draw_drift,
        _from_zero,
    ),
    _Panel(
        "PL ratio: L* = 0 (line) to the proxy (thin line)",
        "PL ratio   [units of L]",
        lambda arms: any(np.isfinite(arm.summary.bracket[0]).any() for arm in arms),
        _draw_ratio,
        _settled,
    ),
    _Panel(
        "gap to the proxy (line) and loss itself (thin)",
        "loss   [units of L]",
        lambda arms: True,
        _draw_gap,
        _roomy,
    ),
)


def _starts(axes: Axes, arms: Sequence[_Arm], handles: Sequence[Line2D], word: str) -> None:
    """Draw in an inset how the arms start; not where too few of the first steps were seen."""
    firsts = [arm.record["epoch"] <= FIRST for arm in arms]
    if max(int(first.sum()) for first in firsts) < 3:
        return
    start = axes.inset_axes((0.5, 0.61, 0.47, 0.3))
    for arm, first, handle in zip(arms, firsts, handles, strict=True):
        loss = arm.record["loss"][first] / arm.record["loss"][0]
        look = {"color": handle.get_color(), "linestyle": handle.get_linestyle()}
        start.plot(arm.record["epoch"][first], _positive(loss), linewidth=1, **look)
    start.set_yscale("log")
    start.set_title(rf"$L_t/L_0$, first {FIRST} {word}s", fontsize=7.5)
    start.tick_params(labelsize=7)


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
        epoch: step at which the loss is shown against width; runs whose loss was not measured there do not enter.

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
    for record in widths:
        if _integer(record, "width", least=1) is None:
            raise ValueError(f"a {record.experiment} record without width in its config is no arm of a width ablation")
    widths = [record for record in widths if np.isfinite(_loss_at(record, epoch))]
    word = step_word(next(iter(records.values())))
    with styled():
        figure = blank(14 if widths else 9.5, 4.6)
        left, middle, *rest = figure.subplots(1, 3 if widths else 2)
        gaps = []
        named = [(plain(name, LONGEST_NAME), record) for name, record in records.items()]
        looks = zip(itertools.cycle(COLOURS), itertools.cycle(("-", "--", "-.", ":")), strict=False)
        for (name, record), (colour, line) in zip(named, looks, strict=False):
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
            if not np.isfinite(law.slope):
                middle.plot([], [], color=colour, linewidth=4, alpha=0.35, label=f"{name}: too few points for a fit")
                continue
            x = np.array(law.range)
            text = f"{name}: slope {law.slope:.2f} ± {law.stderr:.2f}, gap {x[0]:.2g} to {x[1]:.2g}"
            middle.plot(x, law.at(x), color=colour, linewidth=4, alpha=0.35, label=text)
        left.set_yscale("log")
        left.set_ylim(_span(gaps))
        left.set_title("(a)  gap and loss by initialisation")
        left.set_xlabel(word)
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


def _loss_at(record: Record, step: int) -> float:
    """Return the loss at a step, NaN where it was not measured."""
    place = int(np.searchsorted(record["epoch"], step))
    there = place < record["epoch"].size and int(record["epoch"][place]) == step
    return float(record["loss"][place]) if there else float("nan")


def _loss_against_width(axes: Axes, records: Sequence[Record], step: int) -> None:
    m = np.array([_integer(record, "width", least=1) for record in records], np.float64)
    loss = np.array([_loss_at(record, step) for record in records])
    calm = np.array([observed(record).outcome not in ("catapult", "divergence") for record in records])
    law = power_law(m[calm], loss[calm])
    slope = f": slope {law.slope:.2f} ± {law.stderr:.2f}" if np.isfinite(law.slope) else ""
    axes.plot(m[calm], loss[calm], "o", color="C0", label=f"stable{slope}")
    axes.plot(m[~calm], loss[~calm], "X", color="C1", label="catapult or divergence, not in the fit")
    axes.plot(np.unique(m), law.at(np.unique(m)), color="C0", linewidth=1)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(np.unique(m), [f"{width:g}" for width in np.unique(m)], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(ScalarFormatter())
    axes.set_xlabel("width m")
    word, eta = step_word(records[0]), float(records[0]["learning_rate"])
    axes.set_ylabel(f"loss after {step} {word}s   [units of L]")
    axes.set_title(f"(c)  loss after {step} {word}s" + (f", η = {eta:.3g}" if eta == eta else ""))
    axes.legend()
