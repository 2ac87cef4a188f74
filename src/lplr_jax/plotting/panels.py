"""The four panels of one run."""

from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.offsetbox import AnchoredOffsetbox, HPacker, TextArea, VPacker
from matplotlib.patches import Patch

from lplr_jax import theory
from lplr_jax.curves.rate import Decay
from lplr_jax.curves.summary import Summary, step_word, summarise
from lplr_jax.plotting.style import blank, numbers_of, set_title, setting, source_of, styled
from lplr_jax.records import Record
from lplr_jax.theory.claims.floor_pl import curves
from lplr_jax.theory.claims.interpolation import certificate_of
from lplr_jax.theory.claims.loss_bridge import MARGINS, chain_of
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import at_most

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


STRIP_LINE = 0.252
"""Height of a line of the verdict strip, in inches."""
STRIP_GAP = 7.0
"""Points between its words."""


def four_panel(record: Record) -> Figure:
    """Draw λ_min, drift, PL bracket and loss along a run (paper, Figure 1), and a strip of the theory's verdicts.

    A panel whose arrays the record lacks is left out, and the others take its place.

    Args:
        record: a run, such as `lplr mnist` writes.

    Returns:
        The figure; `save` writes it.

    Raises:
        TypeError: for what is no record.
        ValueError: if its loss has no finite value.
    """
    summary = summarise(record)
    drawn = [draw for has, draw in _PANELS if has(record, summary)]
    with styled():
        figure, panels = grid(len(drawn), 11, 9)
        for axes, draw, letter in zip(panels, drawn, "abcd", strict=False):
            draw(axes, record, summary)
            axes.set_title(f"({letter})  {axes.get_title(loc='left')}")
        for axes in figure.axes:
            _mark_steps(axes, record, summary)
        set_title(figure, _title(record))
        verdict_strip(figure, theory.verify(record))
    return figure


def grid(count: int, width: float | int, height: float | int) -> tuple[Figure, list[Axes]]:
    """Return a figure with one to four panels in reading order; four of them fill `width` by `height` inches."""
    if count == 1:
        figure = blank(0.65 * width, 0.6 * height)
        return figure, [figure.subplots()]
    layout = {2: "ab", 3: "ab;cc", 4: "ab;cd"}[count]
    figure = blank(width, height if ";" in layout else 0.55 * height)
    panels = figure.subplot_mosaic(layout)
    return figure, [panels[letter] for letter in "abcd"[:count]]


def known(record: Record, *names: str) -> bool:
    """Whether the record holds at least one finite number under each of these names."""
    return all(name in record and bool(np.isfinite(record[name]).any()) for name in names)


def verdict_strip(figure: Figure, verdicts: Sequence[theory.Verdict]) -> None:
    """Write the claims below the panels, in as many lines as they take, each with mark and colour of its outcome."""
    size = {"size": 7.5}
    words: list[TextArea] = [
        TextArea(f"{MARKS[v.outcome][0]} {v.claim}", textprops={**size, "color": MARKS[v.outcome][1]}) for v in verdicts
    ]
    key = "   ".join(f"{mark} {outcome}" for outcome, (mark, _) in MARKS.items())
    words.append(TextArea(f"[{key}]", textprops={**size, "color": "0.45"}))
    lines = _lines(figure, words)
    rows = [HPacker(children=[*line], sep=STRIP_GAP, pad=0) for line in lines]
    strip = AnchoredOffsetbox(
        "lower center",
        child=VPacker(children=[*rows], sep=3, pad=0, align="center"),
        bbox_to_anchor=(0.5, 0.0),
        bbox_transform=figure.transFigure,
        frameon=False,
    )
    figure.add_artist(strip)
    engine = figure.get_layout_engine()
    if isinstance(engine, ConstrainedLayoutEngine):
        below = STRIP_LINE * (1 + 0.6 * (len(lines) - 1)) / figure.get_figheight()
        engine.set(rect=(0, below, 1, 1 - below))


def _lines(figure: Figure, words: Sequence[TextArea]) -> list[list[TextArea]]:
    """Break words into lines that fit the figure."""
    renderer = figure.canvas.get_renderer()  # pyright: ignore[reportAttributeAccessIssue]
    gap = STRIP_GAP * figure.dpi / 72
    room = 0.97 * figure.bbox.width
    lines: list[list[TextArea]] = [[]]
    filled = 0.0
    for word in words:
        word.set_figure(figure)
        width = word.get_bbox(renderer).width
        if lines[-1] and filled + gap + width > room:
            lines.append([])
            filled = 0.0
        filled += width + (gap if lines[-1] else 0.0)
        lines[-1].append(word)
    return lines


def _title(record: Record) -> str:
    depth, activation, width = (setting(record, name) for name in ("depth", "activation", "width"))
    layers = f"{depth}-layer {activation} MLP, " if depth and activation and width else ""
    network = f"{layers}width {width}" if width else ""
    numbers = ",  ".join(numbers_of(record))
    end = "" if record.diverged_at is None else f"diverged at {step_word(record)} {record.diverged_at}"
    parts = [part for part in (network, numbers, source_of(record), end) if part]
    return f"{record.experiment}: {',  '.join(parts)}"


def _mark_steps(axes: Axes, record: Record, summary: Summary) -> None:
    last = int(record["epoch"][-1])
    axes.set_xlim(0, max(last, 1))
    axes.set_xlabel(step_word(record))
    if summary.regime.stop:
        first, end = summary.steps(summary.regime)
        axes.axvspan(first, end, zorder=0, **SHADE)
        axes.axvspan(end, last, zorder=0, **HATCH)


def _min_eig_panel(axes: Axes, record: Record, summary: Summary) -> None:
    epoch, n = record["probe_epoch"], int(record["n"])
    samples = int(record["kernel_samples"]) if "kernel_samples" in record else n
    label = f"all n = {n:,}" if samples == n else f"{samples:,} of n = {n:,} samples"
    axes.plot(epoch, record["ntk_min_eig"], color=BLUE, marker="o", markersize=3, label=label)
    if known(record, "ntk_min_eig_lower", "ntk_min_eig_upper"):
        axes.fill_between(
            epoch,
            record["ntk_min_eig_lower"],
            record["ntk_min_eig_upper"],
            color=BLUE,
            alpha=0.3,
            label="certified interval",
        )
    if known(record, "ntk_min_eig_subset"):
        size = f" of {record['subset_ids'].size}" if "subset_ids" in record else ""
        label = f"random subset{size}: an upper bound"
        axes.plot(epoch, record["ntk_min_eig_subset"], color=VERMILION, marker="s", markersize=3, label=label)
    shown = np.concatenate([record[name] for name in ("ntk_min_eig", "ntk_min_eig_subset") if name in record])
    if np.isfinite(shown).any() and np.nanmin(shown) > 0:
        axes.set_yscale("log")
    else:
        axes.axhline(0, color="0.4", linewidth=0.8)
    axes.set_ylabel(r"$\lambda_{\min}(\Theta_t)$   [output² / parameter²]")
    axes.set_title("smallest eigenvalue of the empirical NTK")
    axes.legend(loc="best")


def _drift_panel(axes: Axes, record: Record, summary: Summary) -> None:
    axes.plot(record["epoch"], record["drift"], color=BLUE)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(r"$\|\theta_t-\theta_0\|_2$   [parameter]")
    axes.set_title("drift from the initialisation")
    if summary.regime.stop:
        first, end = summary.steps(summary.regime)
        shades = [Patch(label=f"stable regime, {step_word(record)}s {first} to {end}", **SHADE)]
        shades.append(Patch(label="the proxy for L* decides the PL ratio", **{**HATCH, "edgecolor": "0.6"}))
        axes.legend(handles=shades, loc="lower right")


def _pl_panel(axes: Axes, record: Record, summary: Summary) -> None:
    epoch, (lower, upper) = record["epoch"], summary.bracket
    shown = np.where(np.isfinite(upper), upper, np.nan)
    axes.fill_between(epoch, lower, shown, color=BLUE, alpha=0.25, linewidth=0, label="bracket of the PL ratio")
    axes.plot(epoch, lower, color=BLUE, label=r"$\frac{1}{2}\|\nabla L\|^2/L$:  $L^*=0$" + _where(record))
    axes.plot(epoch, shown, color=VERMILION, linestyle="--", linewidth=1.2, label=r"$L^*=\min_t L_t$, the proxy")
    if summary.regime.stop:
        x = summary.steps(summary.regime)
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
    if record.loss == "squared" and known(record, "probe_epoch", "ntk_min_eig"):
        floor = record["ntk_min_eig"] / float(record["loss_scale"])
        axes.plot(
            record["probe_epoch"],
            np.where(floor > 0, floor, np.nan),
            color=GREEN,
            marker=".",
            markersize=4,
            label=r"$\lambda_{\min}(\Theta_t)/s$, the guaranteed value",
        )
    if record.loss in MARGINS:
        _lojasiewicz(axes, record)
    axes.set_yscale("log")
    axes.set_ylabel("PL ratio   [units of L]")
    axes.set_title("PL ratio for every admissible L*")
    axes.legend(**BELOW)


def _lojasiewicz(axes: Axes, record: Record) -> None:
    """Draw ‖∇L‖²/(1 - e^-L)² and what the kernel guarantees of it: the ratio that stays where PL's goes to 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = record["grad_sq_norm"] / np.expm1(-record["loss"]) ** 2
    label = r"$\|\nabla L\|^2/(1-e^{-L})^2$, the Łojasiewicz ratio"
    axes.plot(record["epoch"], ratio, color=PURPLE, linewidth=1.5, label=label)
    evidence = Evidence(record)
    if evidence.has("output_grad_norm") and not evidence.partial and evidence.s == evidence.number("n"):
        chain = chain_of(evidence)
        floor = np.where((chain.beyond == 0) & (chain.eigenvalue > 0), chain.gamma * chain.eigenvalue, np.nan)
        label = r"$\gamma\lambda/n$, guaranteed of it where no $\ell_i > \log 2$"
        if np.isfinite(floor).any():
            axes.plot(evidence.epochs, floor / evidence.s, color=PURPLE, marker=".", linestyle=":", label=label)


def _where(record: Record) -> str:
    """Say from which radius around θ_0 on L* = 0 is a theorem; nothing where it is none."""
    found = certificate_of(Evidence(record)) if record.loss == "squared" else None
    return f", a theorem from R = {at_most(found.radius, 3)} on" if found is not None and not found.reason else ""


def _loss_panel(axes: Axes, record: Record, summary: Summary) -> None:
    epoch, loss = record["epoch"], record["loss"]
    report = summary.middle_rate
    axes.plot(epoch, loss, color=BLUE, label=f"$L_t$  ($L^*=0${_where(record)})")
    _gap(axes, epoch, loss - summary.floor, color=VERMILION, linewidth=1.5, label=r"$L_t-\min L$, the proxy gap")
    label = "the same, run stopped at T/2 and 3T/4"
    for (cut, decay), alpha in zip(report.refits, (0.45, 0.7), strict=True):
        if not decay.epochs:
            continue
        upto = slice(0, int(np.searchsorted(summary.step_numbers, cut, side="right")))
        style = {"color": VERMILION, "linewidth": 0.9, "alpha": alpha, "label": label}
        _gap(axes, epoch[upto], loss[upto] - decay.floor, **style)
        label = None
    # The flat bound of λ_min lies above the loss, where the table would hide it.
    room = 50 if _bounds(axes, record) else 12
    limits = _positive_limits(loss, loss - summary.floor, room=room)
    fits = [(report.zero, 0.0, BLUE), (report.proxy, summary.floor, VERMILION)]
    for decay, offset, colour in fits:
        _fits(axes, epoch, loss - offset, summary.middle, decay, colour)
    if any(decay.epochs for decay, _, _ in fits):
        axes.plot([], [], color=BLACK, linestyle="--", linewidth=1, label="exponential fits, middle half of the run")
        axes.plot([], [], color=BLACK, linestyle=":", linewidth=1.4, label="power-law fits, middle half")
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    axes.set_ylabel("loss   [units of L]")
    axes.set_title("loss and its gap to the proxy")
    axes.legend(**BELOW)
    text = _rates_text(summary, step_word(record))
    if not text:
        return
    axes.text(
        0.985,
        0.98,
        text,
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=7.5,
        bbox={"facecolor": "white", "alpha": 0.85, "edgecolor": "none"},
    )


def _bounds(axes: Axes, record: Record) -> bool:
    """Draw what bounds and what predicts the loss (ours, not the paper's); return whether spectra are recorded."""
    found = curves(record)
    if found is None:
        return False
    axes.plot(found.steps, found.envelope, color=GREEN, linewidth=1.1, label="PL with a floor, one window (ours)")
    axes.plot(
        found.steps, found.all, color=GREEN, linestyle=":", linewidth=1.1, label=r"the same for $\lambda_{\min}$ alone"
    )
    label = "linearised at step 0, no bound"
    axes.plot(found.steps, found.linearised, color="0.45", linestyle="--", linewidth=1.0, label=label)
    return True


_ABOVE = 30.0
"""Logarithm of how far above the largest loss a fit is drawn. Calibrated."""


def _gap(axes: Axes, epoch: np.ndarray, gap: np.ndarray, **style: object) -> None:
    axes.plot(epoch, np.where(gap > 0, gap, np.nan), **style)  # pyright: ignore[reportArgumentType]


def _fits(
    axes: Axes, epoch: np.ndarray, gap: Float[np.ndarray, " t"], window: slice, decay: Decay, colour: str
) -> None:
    if decay.epochs == 0:
        return
    inside = gap[window]
    t = np.asarray(epoch[window], float)
    keep = (inside > 0) & (t > 0)  # a gap of the series is NaN, and does not enter
    if not keep.any():
        return
    centre = np.log(inside[keep]).mean()
    everywhere = np.asarray(epoch[1:], float)
    exponential = centre - decay.rate * (everywhere - t[keep].mean())
    power = centre - decay.exponent * (np.log(everywhere) - np.log(t[keep]).mean())
    # A fit to a loss that grew by orders may lie beyond what is finite at the other end of the run.
    most = np.log(np.nanmax(gap)) + _ABOVE
    exponential, power = (np.exp(np.where(line < most, line, np.nan)) for line in (exponential, power))
    axes.plot(everywhere, exponential, color=colour, linestyle="--", linewidth=1, alpha=0.9)
    axes.plot(everywhere, power, color=colour, linestyle=":", linewidth=1.4, alpha=0.9)


def _rates_text(summary: Summary, word: str) -> str:
    """Return the rates over regime and middle half in a few lines, empty where there are none."""
    lines = []
    for name, report in (("regime", summary.regime_rate), ("middle half", summary.middle_rate)):
        if not report.zero.epochs:
            continue
        cuts = ", ".join(_rate(decay) for _, decay in report.refits)
        lines.append(f"{name}:  {_rate(report.zero)} | {_rate(report.proxy)} | {cuts}")
        lines.append(
            f"    better law:  L {report.zero.law}, gap {report.proxy.law}"
            + ("  (set by the proxy)" if report.set_by_proxy else "")
        )
    return "\n".join([f"rate per {word}:  L* = 0 | proxy | run cut at T/2, 3T/4", *lines]) if lines else ""


def _rate(decay: Decay) -> str:
    return f"{decay.rate:.2g}" if decay.epochs else "unknown"


def _positive_limits(*curves: np.ndarray, room: int) -> tuple[float, float]:
    values = np.concatenate(curves)
    values = values[np.isfinite(values) & (values > 0)]
    if not values.size:
        return 0.1, 1.0
    # The last points of the gap fall to the proxy's own zero and would stretch the axis by decades; the table wants
    # room above.
    return max(float(values.min()), float(values.max()) * 1e-4) * 0.7, float(values.max()) * room


_PANELS: tuple[tuple[Callable[[Record, Summary], bool], Callable[[Axes, Record, Summary], None]], ...] = (
    (lambda record, summary: known(record, "probe_epoch", "ntk_min_eig"), _min_eig_panel),
    (lambda record, summary: known(record, "drift"), _drift_panel),
    (lambda record, summary: bool(np.isfinite(summary.bracket[0]).any()), _pl_panel),
    (lambda record, summary: True, _loss_panel),
)
"""For each panel, in reading order: whether the record holds what it shows, and what draws it."""
