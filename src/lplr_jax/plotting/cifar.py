"""Several seeds of one stochastic run: gap, PL ratio, drift and the kernel of a subset, from records alone."""

import textwrap
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from lplr_jax import theory
from lplr_jax.curves.rate import proxy_decides_from
from lplr_jax.curves.summary import Summary, check_records, step_word, steps_of, summarise
from lplr_jax.plotting.panels import BELOW, HATCH, SHADE, grid, known
from lplr_jax.plotting.style import numbers_of, set_title, setting, source_of, styled
from lplr_jax.records import Record

LINES = ("-", "--", "-.", ":")
SEEDS = ("C0", "C1", "C2", "C3", "C4", "C5")

SCOPE = (
    "A robustness check, as in the paper: momentum, mini-batches and a schedule are outside Theorem 5.7, and the "
    "kernel of a subset bounds λ_min of the full one from above, so it cannot establish λ_0 > 0."
)
"""What figure and summary say of the reach of these runs."""


def scope_note(records: Sequence[Record]) -> str:
    """Return the scope of these runs in words, and which claims are refuted on how many of them."""
    refuted: dict[str, int] = {}
    for record in records:
        for verdict in theory.verify(record):
            if verdict.outcome == "refuted":
                refuted[verdict.claim] = refuted.get(verdict.claim, 0) + 1
    said = ", ".join(f"{claim} ({count} of {len(records)} seeds)" for claim, count in refuted.items())
    return f"{SCOPE} Refuted on the runs shown: {said or 'nothing'}."


def cifar(records: Sequence[Record]) -> Figure:
    """Draw gap and loss, PL bracket, drift and λ_min of the subset's kernel over seeds (paper, Figure 2, and λ_min).

    Bands are one sample standard deviation to each side of the mean over seeds.

    A panel whose arrays some record lacks is left out, and the others take its place.

    Args:
        records: one a seed, of one config.

    Returns:
        The figure; `save` writes it.

    Raises:
        TypeError: for what is no sequence of records.
        ValueError: without records, for runs of different lengths or probes, or for a run without a finite loss.
    """
    check_records(records)
    for name in ("epoch", "probe_epoch"):
        of = [record.arrays.get(name, np.zeros(0)) for record in records]
        if any(not np.array_equal(one, of[0]) for one in of):
            raise ValueError(f"the records differ in {name}, so there is no mean over them; draw runs of one config")
    summaries = [summarise(record) for record in records]
    drawn: list[tuple[bool, Callable[[Axes], None]]] = [
        (True, lambda axes: _gap_panel(axes, records, summaries)),
        (
            any(np.isfinite(summary.bracket[0]).any() for summary in summaries),
            lambda axes: _pl_panel(axes, records, summaries),
        ),
        (any(known(record, "drift") for record in records), lambda axes: _drift_panel(axes, records)),
        (
            all(known(record, "probe_epoch", "ntk_min_eig") for record in records),
            lambda axes: _kernel_panel(axes, records),
        ),
    ]
    wanted = [draw for there, draw in drawn if there]
    with styled():
        figure, panels = grid(len(wanted), 11, 8.8)
        for axes, draw, letter in zip(panels, wanted, "abcd", strict=False):
            draw(axes)
            axes.set_title(f"({letter})  {axes.get_title(loc='left')}")
            axes.set_xlabel(step_word(records[0]))
            axes.set_xlim(0, max(1, int(records[0]["epoch"][-1])))
        set_title(figure, _title(records))
        note = "\n".join(textwrap.wrap(scope_note(records), 170))
        figure.supxlabel(note, fontsize=7.5, color="0.3")
    return figure


def _title(records: Sequence[Record]) -> str:
    record = records[0]
    width, schedule, momentum, batch = (
        setting(record, name) for name in ("width", "schedule", "momentum", "batch_size")
    )
    seeds = ", ".join(seed for seed in (setting(one, "seed") for one in records) if seed)
    if record.experiment == "cifar" and width and schedule and momentum and batch:
        size = f"width {width}, p = {int(record['p']):,}, n = {int(record['n']):,}"
        sgd = f"SGD, η = {float(record['learning_rate']):.3g} ({schedule}), momentum {momentum}"
        head = f"CIFAR-10, {int(record['c'])} classes: residual network, {size}"
        tail = [f"{sgd}, batch {batch}"]
    else:
        head = f"{record.experiment}: {', '.join([*([f'width {width}'] if width else []), *numbers_of(record)])}"
        settings = (("schedule", schedule), ("momentum", momentum), ("batch", batch))
        tail = [", ".join(f"{name} {value}" for name, value in settings if value)]
    tail += [f"seeds {seeds}" if seeds else f"{len(records)} runs" if len(records) > 1 else "", source_of(record)]
    return f"{head}\n{'; '.join(part for part in tail if part)}"


def _name(record: Record, index: int) -> str:
    """Return what a legend calls one of the runs: its seed, or its number where it has none."""
    seed = setting(record, "seed")
    return f"seed {seed}" if seed else f"run {index + 1}"


def mean_and_deviation(
    curves: Sequence[Float[np.ndarray, " t"]],
) -> tuple[Float[np.ndarray, " t"], Float[np.ndarray, " t"]]:
    """Return the mean over seeds and the sample standard deviation, 0 for one seed; NaN where a seed has none."""
    stacked = np.stack(curves)
    deviation = stacked.std(axis=0, ddof=1) if len(curves) > 1 else np.zeros(stacked.shape[1])
    return stacked.mean(axis=0), deviation


def _band(axes: Axes, x: np.ndarray, curves: Sequence[np.ndarray], *, colour: str, label: str, line: str = "-") -> None:
    mean, deviation = mean_and_deviation(curves)
    known = np.isfinite(mean)
    x, mean, deviation = x[known], mean[known], deviation[known]
    axes.plot(x, mean, color=colour, linestyle=line, label=label)
    if len(curves) > 1:
        axes.fill_between(x, mean - deviation, mean + deviation, color=colour, alpha=0.2, linewidth=0)


def _gap_panel(axes: Axes, records: Sequence[Record], summaries: Sequence[Summary]) -> None:
    epoch, losses = records[0]["epoch"], [record["loss"] for record in records]
    gaps = [loss - summary.floor for loss, summary in zip(losses, summaries, strict=True)]
    ends = " ± one deviation" if len(records) > 1 else ""
    _band(axes, epoch, losses, colour="C0", label=f"loss $L_t$, mean{ends}")
    _band(axes, epoch, gaps, colour="C1", label=f"gap to the proxy, mean{ends}", line="--")
    axes.set_yscale("log")
    mean = mean_and_deviation(gaps)[0]
    shown = mean[np.isfinite(mean) & (mean > 0)]
    highest = max(float(np.nanmax(loss)) for loss in losses)
    if shown.size:
        axes.set_ylim(max(float(np.min(shown)) / 2, highest * 1e-5), highest * 2)
    axes.set_ylabel("loss   [units of L]")
    axes.set_title("exact training loss, and its gap to the least loss of the run")
    _shade(axes, records, summaries, columns=2)


def _pl_panel(axes: Axes, records: Sequence[Record], summaries: Sequence[Summary]) -> None:
    for index, (record, summary) in enumerate(zip(records, summaries, strict=True)):
        colour, line = SEEDS[index % len(SEEDS)], LINES[index % len(LINES)]
        low, high = (np.where(np.isfinite(end) & (end > 0), end, np.nan) for end in summary.bracket)
        known = np.isfinite(low)
        epoch, low, high = record["epoch"][known], low[known], high[known]
        axes.fill_between(epoch, low, high, color=colour, alpha=0.13, linewidth=0)
        label = f"{_name(record, index)}: $L^*=0$"
        if summary.regime.stop:
            label += f", least on the regime {summary.envelope[0]:.3g} (proxy: {summary.envelope[1]:.3g})"
        else:
            label += ", no stable regime"
        axes.plot(epoch, low, color=colour, linestyle=line, label=label)
        axes.plot(epoch, high, color=colour, linestyle=line, linewidth=0.7)
    axes.set_yscale("log")
    axes.set_ylabel("PL ratio   [units of L]")
    axes.set_title("PL ratio: from $L^*=0$ (thick) to the proxy (thin)")
    _shade(axes, records, summaries, columns=1)


def _drift_panel(axes: Axes, records: Sequence[Record]) -> None:
    epoch, curves = records[0]["epoch"], [record["drift"] for record in records]
    for index, curve in enumerate(curves):
        known = np.isfinite(curve)
        line = LINES[index % len(LINES)]
        axes.plot(epoch[known], curve[known], color=SEEDS[index % len(SEEDS)], linestyle=line, linewidth=0.8)
    _band(axes, epoch, curves, colour="C6", label="mean ± one deviation; thin: seeds")
    axes.set_ylim(bottom=0)
    axes.set_ylabel(r"$\|\theta_t-\theta_0\|_2$   [parameter]")
    axes.set_title("drift from the initialisation")
    axes.legend(loc="lower right")


def _kernel_panel(axes: Axes, records: Sequence[Record]) -> None:
    epoch, curves = records[0]["probe_epoch"], [record["ntk_min_eig"] for record in records]
    for index, (record, curve) in enumerate(zip(records, curves, strict=True)):
        colour, line = SEEDS[index % len(SEEDS)], LINES[index % len(LINES)]
        label = _name(record, index)
        axes.plot(epoch, curve, color=colour, linestyle=line, linewidth=0.8, marker="o", markersize=3, label=label)
    _band(axes, epoch, curves, colour="C6", label="mean ± one deviation")
    if min(float(np.nanmin(curve)) for curve in curves) > 0:
        axes.set_yscale("log")
    images = int(records[0].arrays.get("kernel_samples", records[0]["n"]))
    rows = images * int(records[0]["c"])
    axes.set_ylabel(r"$\lambda_{\min}$   [output² / parameter²]")
    whose = f"the full {rows}×{rows} kernel"
    part = f" of {images} samples: an upper bound" if images < int(records[0]["n"]) else ""
    axes.set_title(f"$\\lambda_{{\\min}}$ of {whose}{part}")
    axes.legend(loc="best")


def _shade(axes: Axes, records: Sequence[Record], summaries: Sequence[Summary], *, columns: int) -> None:
    """Shade the steps that lie in the regime of every seed that has one, and hatch those decided by some proxy."""
    regimes = [summary.regime for summary in summaries if summary.regime.stop]
    steps = steps_of(records[0])
    handles, labels = axes.get_legend_handles_labels()
    start, stop = max((one.start for one in regimes), default=0), min((one.stop for one in regimes), default=0) - 1
    if start < stop:
        axes.axvspan(steps[start], steps[stop], zorder=0, **SHADE)
        handles.append(Patch(**SHADE))
        whose = "all seeds" if len(regimes) == len(records) else f"{len(regimes)} of {len(records)} seeds"
        labels.append(f"stable regime of {whose}")
    pairs = zip(records, summaries, strict=True)
    decided = min(proxy_decides_from(record["loss"], summary.floor) for record, summary in pairs) - 1
    if decided < steps.size - 1:
        axes.axvspan(steps[max(decided, 0)], steps[-1], zorder=0, **HATCH)
        handles.append(Patch(**{**HATCH, "edgecolor": "0.6"}))
        labels.append("the proxy for L* decides" if len(records) == 1 else "the proxy for L* decides for some seed")
    axes.legend(handles, labels, **{**BELOW, "ncol": columns})
