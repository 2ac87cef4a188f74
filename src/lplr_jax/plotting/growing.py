"""λ_0 against width, with the curve that is fitted to it and where it stops growing."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from lplr_jax import checks
from lplr_jax.curves.saturation import Saturation
from lplr_jax.plotting.style import blank, styled


class Growing(NamedTuple):
    """One curve of the figure.

    Attributes:
        widths: m, ascending, (k,).
        values: λ_0, (k, seeds).
        losses: held-out losses, (k, seeds); NaN where there are none.
        fit: the saturating curve, if there is one.
        stops: width at which it stops growing, NaN for none.
    """

    widths: Float[np.ndarray, " k"]
    values: Float[np.ndarray, "k s"]
    losses: Float[np.ndarray, "k s"]
    fit: Saturation | None
    stops: float


def growing(curves: Mapping[str, Growing], *, share: float) -> Figure:
    """Draw λ_0 against width, one column of panels a parametrisation, and the held-out loss below it.

    Args:
        curves: by the name of the parametrisation.
        share: of the fitted limit, at which λ_0 counts as grown.

    Raises:
        ValueError: without a curve, or for one without a value for each width.
    """
    if not curves:
        raise ValueError("curves must hold at least one parametrisation, got none")
    for name, curve in curves.items():
        for what in ("values", "losses"):
            found = checks.real_array(f"{what} of {name}", getattr(curve, what), axes="k s")
            if len(found) != len(curve.widths):
                raise ValueError(f"{what} of {name} must have one row for each of {len(curve.widths)} widths")
    lossy = any(np.isfinite(curve.losses).any() for curve in curves.values())
    with styled():
        figure = blank(5.2 * len(curves), 6.0 if lossy else 3.6)
        axes = figure.subplots(2 if lossy else 1, len(curves), squeeze=False, sharex="col")
        for column, (name, curve) in enumerate(curves.items()):
            top = axes[0, column]
            _points(top, curve.widths, curve.values, "C0", "λ_0: mean, and one dot a seed")
            if curve.fit is not None:
                dense = np.geomspace(curve.widths[0], curve.widths[-1], 200)
                label = f"fit c - a m/(b + m), limit {curve.fit.limit:.3g}"
                top.plot(dense, curve.fit.at(dense), color="C1", linestyle="--", linewidth=1.1, label=label)
            top.set_yscale("log")
            top.set_title(f"{name} parametrisation")
            top.set_ylabel(r"$\lambda_{\min}(\Theta_0)$   [output² / parameter²]")
            if lossy:
                label = "held-out loss of the linearised network"
                _points(axes[1, column], curve.widths, curve.losses, "C2", label)
                axes[1, column].set_ylabel(r"$\|f-y\|^2/(2n)$")
            for ax in axes[:, column]:
                if np.isfinite(curve.stops):
                    label = f"{share:.0%} of the limit: m = {curve.stops:.0f}"
                    ax.axvline(curve.stops, color="C3", linestyle=":", linewidth=1.2, label=label)
                ax.set_xscale("log")
                ax.set_xticks(curve.widths)
                ax.xaxis.set_major_formatter(ScalarFormatter())
                ax.xaxis.set_minor_formatter(NullFormatter())
                ax.legend(fontsize=7)
            axes[-1, column].set_xlabel("width m")
        figure.suptitle("smallest eigenvalue of the kernel at initialisation against width")
    return figure


def _points(ax: Axes, widths: np.ndarray, values: np.ndarray, colour: str, label: str) -> None:
    for seed in range(values.shape[1]):
        ax.plot(widths, values[:, seed], color=colour, marker=".", linestyle="none", alpha=0.5)
    known = np.isfinite(values).any(axis=1)
    mean = np.full(len(values), np.nan)
    mean[known] = np.nanmean(values[known], axis=1)
    ax.plot(widths, mean, color=colour, marker="o", markersize=4, label=label)
