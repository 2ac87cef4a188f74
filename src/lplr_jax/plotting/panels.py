"""The four panels of one run."""

import matplotlib as mpl
import numpy as np
from jaxtyping import Float
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea
from matplotlib.patches import Patch

from lplr_jax import theory
from lplr_jax.curves.rate import Decay, middle_half
from lplr_jax.curves.summary import Summary, summarise
from lplr_jax.plotting.style import STYLE, plain, source_of
from lplr_jax.records import Record

BLUE, VERMILION, GREEN, PURPLE, BLACK = "C0", "C1", "C2", "C3", "C6"
MARKS: dict[theory.Outcome, tuple[str, str]] = {
    "proved": ("✓", "#009E73"),
    "not refuted": ("○", "#0072B2"),
    "refuted": ("✗", "#D55E00"),
    "undecided": ("?", "#8a6d00"),
    "not applicable": ("·", "0.45"),
}
SHADE = {"color": "#56B4E9", "alpha": 0.13, "linewidth": 0}
HATCH = {"facecolor": "none", "edgecolor": "0.9", "hatch": "//", "linewidth": 0}
BELOW = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.13), "ncol": 2, "columnspacing": 1.2, "handlelength": 2.2}


def four_panel(record: Record) -> Figure:
    """Draw λ_min, drift, PL bracket and loss along a run (paper, Figure 1), and a strip of the theory's verdicts.

    Args:
        record: a run with kernel probes, such as `lplr mnist` writes.

    Returns:
        The figure; `save` writes it.

    Raises:
        TypeError: for what is no record.
        KeyError: if the record has no kernel probes.
        ValueError: if its loss has no finite value.
    """
    summary = summarise(record)
    with mpl.rc_context(fname=STYLE):
        figure = Figure(figsize=(11, 9))
        FigureCanvasAgg(figure)
        (top_left, top_right), (bottom_left, bottom_right) = figure.subplots(2, 2)
        _min_eig_panel(top_left, record)
        _drift_panel(top_right, record, summary)
        _pl_panel(bottom_left, record, summary)
        _loss_panel(bottom_right, record, summary)
        for axes in figure.axes:
            _mark_epochs(axes, record, summary)
        figure.suptitle(_title(record, summary), fontsize=10)
        _verdict_strip(figure, theory.verify(record))
    return figure


def _verdict_strip(figure: Figure, verdicts: tuple[theory.Verdict, ...]) -> None:
    """Write the claims in one line below the panels, each with the mark and the colour of its outcome."""
    size = {"size": 7.5}
    words: list[Artist] = [
        TextArea(f"{MARKS[v.outcome][0]} {v.claim}", textprops={**size, "color": MARKS[v.outcome][1]}) for v in verdicts
    ]
    key = "   ".join(f"{mark} {outcome}" for outcome, (mark, _) in MARKS.items())
    words.append(TextArea(f"[{key}]", textprops={**size, "color": "0.45"}))
    strip = AnchoredOffsetbox(
        "lower center",
        child=HPacker(children=words, sep=7, pad=0),
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=figure.transFigure,
        frameon=False,
    )
    figure.add_artist(strip)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        engine.set(rect=(0, 0.028, 1, 0.972))


def _title(record: Record, summary: Summary) -> str:
    config, where = record.config, source_of(record)
    name = (
        f"{record.experiment}: {config.get('depth')}-layer {config.get('activation')} MLP, width {config.get('width')}"
    )
    eta, s = float(record["learning_rate"]), float(record["loss_scale"])
    numbers = f"η = {eta:.3g},  n = {int(record['n']):,},  s = {s:g},  p = {int(record['p']):,}"
    end = "" if record.diverged_at is None else f",  diverged at epoch {record.diverged_at}"
    return plain(f"{name},  {numbers},  {where}{end}")


def _mark_epochs(axes: Axes, record: Record, summary: Summary) -> None:
    last = int(record["epoch"][-1])
    axes.set_xlim(0, last)
    axes.set_xlabel("epoch")
    regime = summary.regime
    if regime.stop:
        axes.axvspan(regime.start, regime.stop - 1, zorder=0, **SHADE)
        axes.axvspan(regime.stop - 1, last, zorder=0, **HATCH)


def _min_eig_panel(axes: Axes, record: Record) -> None:
    epoch, n = record["probe_epoch"], int(record["n"])
    k = record["subset_ids"].size if "subset_ids" in record else None
    axes.plot(epoch, record["ntk_min_eig"], color=BLUE, marker="o", markersize=3, label=f"all n = {n:,}")
    if "ntk_min_eig_lower" in record:
        axes.fill_between(
            epoch,
            record["ntk_min_eig_lower"],
            record["ntk_min_eig_upper"],
            color=BLUE,
            alpha=0.3,
            label="certified interval",
        )
    if "ntk_min_eig_subset" in record:
        label = f"random subset of {k}: an upper bound"
        axes.plot(epoch, record["ntk_min_eig_subset"], color=VERMILION, marker="s", markersize=3, label=label)
    shown = np.concatenate([record[name] for name in ("ntk_min_eig", "ntk_min_eig_subset") if name in record])
    if np.isfinite(shown).any() and np.nanmin(shown) > 0:
        axes.set_yscale("log")
    else:
        axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_ylabel(r"$\lambda_{\min}(\Theta_t)$   [output² / parameter²]")
    axes.set_title("(a)  smallest eigenvalue of the empirical NTK")
    axes.legend(loc="best")


def _drift_panel(axes: Axes, record: Record, summary: Summary) -> None:
    axes.plot(record["epoch"], record["drift"], color=BLUE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(r"$\|\theta_t-\theta_0\|_2$   [parameter]")
    axes.set_title("(b)  drift from the initialisation")
    if summary.regime.stop:
        shades = [Patch(label=f"stable regime, epochs {summary.regime.start} to {summary.regime.stop - 1}", **SHADE)]
        shades.append(Patch(label="the proxy for L* decides the PL ratio", **{**HATCH, "edgecolor": "0.6"}))
        axes.legend(handles=shades, loc="lower right")


def _pl_panel(axes: Axes, record: Record, summary: Summary) -> None:
    epoch, (lower, upper) = record["epoch"], summary.bracket
    shown = np.where(np.isfinite(upper), upper, np.nan)
    axes.fill_between(epoch, lower, shown, color=BLUE, alpha=0.25, linewidth=0, label="bracket of the PL ratio")
    axes.plot(epoch, lower, color=BLUE, label=r"$\frac{1}{2}\|\nabla L\|^2/L$:  $L^*=0$")
    axes.plot(epoch, shown, color=VERMILION, linestyle="--", linewidth=1.2, label=r"$L^*=\min_t L_t$, the proxy")
    if summary.regime.stop:
        x = [summary.regime.start, summary.regime.stop - 1]
        for value, colour, name in zip(summary.envelope, (BLUE, VERMILION), ("$L^*=0$", "proxy"), strict=True):
            axes.plot(
                x,
                [value, value],
                color=colour,
                linewidth=2.6,
                alpha=0.75,
                solid_capstyle="butt",
                label=f"envelope, {name}: {value:.3g}",
            )
    floor = record["ntk_min_eig"] / float(record["loss_scale"])
    axes.plot(
        record["probe_epoch"],
        np.where(floor > 0, floor, np.nan),
        color=GREEN,
        marker=".",
        markersize=4,
        label=r"$\lambda_{\min}(\Theta_t)/s$, the guaranteed value",
    )
    axes.set_yscale("log")
    axes.set_ylabel("PL ratio   [units of L]")
    axes.set_title("(c)  PL ratio for every admissible L*")
    axes.legend(**BELOW)


def _loss_panel(axes: Axes, record: Record, summary: Summary) -> None:
    epoch, loss = record["epoch"], record["loss"]
    report = summary.middle_rate
    axes.plot(epoch, loss, color=BLUE, label=r"$L_t$  ($L^*=0$)")
    _gap(axes, epoch, loss - summary.floor, color=VERMILION, linewidth=1.5, label=r"$L_t-\min L$, the proxy gap")
    for (cut, decay), alpha in zip(report.refits, (0.45, 0.7), strict=True):
        label = "the same, run stopped at T/2 and 3T/4" if cut == report.refits[0][0] else None
        _gap(
            axes,
            epoch[: cut + 1],
            loss[: cut + 1] - decay.floor,
            color=VERMILION,
            linewidth=0.9,
            alpha=alpha,
            label=label,
        )
    limits = _positive_limits(loss, loss - summary.floor)
    window = middle_half(loss)
    for decay, offset, colour in ((report.zero, 0.0, BLUE), (report.proxy, summary.floor, VERMILION)):
        _fits(axes, epoch, loss - offset, window, decay, colour)
    axes.plot([], [], color=BLACK, linestyle="--", linewidth=1, label="exponential fits, middle half of the run")
    axes.plot([], [], color=BLACK, linestyle=":", linewidth=1.4, label="power-law fits, middle half")
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.set_ylabel("loss   [units of L]")
    axes.set_title("(d)  loss and its gap to the proxy")
    axes.legend(**BELOW)
    axes.text(
        0.985,
        0.98,
        _rates_text(summary),
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=7.5,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none"},
    )


def _gap(axes: Axes, epoch: np.ndarray, gap: np.ndarray, **style: object) -> None:
    axes.plot(epoch, np.where(gap > 0, gap, np.nan), **style)  # pyright: ignore[reportArgumentType]


def _fits(
    axes: Axes, epoch: np.ndarray, gap: Float[np.ndarray, " t"], window: slice, decay: Decay, colour: str
) -> None:
    if decay.epochs == 0:
        return
    inside = gap[window]
    t = np.asarray(epoch[window], float)
    keep = (inside > 0) & (t > 0)
    centre = np.log(inside[keep]).mean()
    everywhere = np.asarray(epoch[1:], float)
    exponential = np.exp(centre - decay.rate * (everywhere - t[keep].mean()))
    power = np.exp(centre - decay.exponent * (np.log(everywhere) - np.log(t[keep]).mean()))
    axes.plot(everywhere, exponential, color=colour, linestyle="--", linewidth=1, alpha=0.9)
    axes.plot(everywhere, power, color=colour, linestyle=":", linewidth=1.4, alpha=0.9)


def _rates_text(summary: Summary) -> str:
    lines = ["rate per epoch:  L* = 0 | proxy | run cut at T/2, 3T/4"]
    for name, report in (("regime", summary.regime_rate), ("middle half", summary.middle_rate)):
        cuts = ", ".join(f"{decay.rate:.2g}" for _, decay in report.refits)
        lines.append(f"{name}:  {report.zero.rate:.2g} | {report.proxy.rate:.2g} | {cuts}")
        lines.append(
            f"    better law:  L {report.zero.law}, gap {report.proxy.law}"
            + ("  (set by the proxy)" if report.set_by_proxy else "")
        )
    return "\n".join(lines)


def _positive_limits(*curves: np.ndarray) -> tuple[float, float]:
    values = np.concatenate(curves)
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 1.0
    # The last points of the gap fall to the proxy's own zero and would stretch the axis by decades; the table wants
    # room above.
    return max(float(values.min()), float(values.max()) * 1e-4) * 0.7, float(values.max()) * 12
