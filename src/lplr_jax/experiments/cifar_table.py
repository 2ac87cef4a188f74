"""Table 2 of the stochastic runs, from records of several seeds (paper, section 6.3)."""

import math
from collections.abc import Mapping

import numpy as np

from lplr_jax.curves.summary import gradient_law, summarise
from lplr_jax.plotting.cifar import scope_note
from lplr_jax.records import Record
from lplr_jax.reports.tables import Cell, Measured, Quantity, Table, last_finite, mean_of

PAPER_SLOPE = 0.29
"""Smoothed log-log slope of ‖∇L‖² against the gap in the paper's earlier version (v2, CIFAR)."""

QUANTITIES = (
    Quantity("loss_0", "L_0", "$L_0$", "exact loss at initialisation, units of L with scale s"),
    Quantity("loss_t", "L_T", "$L_T$", "exact loss at the end"),
    Quantity("accuracy_t", "accuracy, T", "accuracy, $T$", "training accuracy at the end"),
    Quantity("drift_t", "drift, final", r"$\|\theta_T-\theta_0\|$", "‖θ_T - θ_0‖₂"),
    Quantity("drift_falls", "drift, falls", "drift, falls", "epochs in which the drift falls, of all measured"),
    Quantity("regime", "stable regime", "stable regime", "epochs, by the rule of diagnostics.stable_regime"),
    Quantity("pl_zero", "PL least, L* = 0", r"PL least, $L^*=0$", "least ½‖∇L‖²/L on the regime, units of L"),
    Quantity("pl_zero_median", "PL median, L* = 0", r"PL median, $L^*=0$", "the median there"),
    Quantity("pl_proxy", "PL least, proxy", "PL least, proxy", "least ½‖∇L‖²/(L - min L) on the regime"),
    Quantity("pl_proxy_median", "PL median, proxy", "PL median, proxy", "the median there"),
    Quantity("lambda_0", "λ_0, subset", r"$\lambda_0$, subset", "λ_min of the subset's full kernel at epoch 0"),
    Quantity("lambda_t", "λ_T, subset", r"$\lambda_T$, subset", "the same at the end"),
    Quantity("lambda_least", "λ least, subset", r"$\min_t\lambda$, subset", "the least at any probe"),
    Quantity("max_0", "λ_max, 0", r"$\lambda_{\max}$, $0$", "λ_max of the same kernel at epoch 0"),
    Quantity("max_t", "λ_max, T", r"$\lambda_{\max}$, $T$", "the same at the end"),
    Quantity("rank_0", "effective rank, 0", "effective rank, $0$", "(tr Θ)²/‖Θ‖_F² at epoch 0"),
    Quantity("rank_t", "effective rank, T", "effective rank, $T$", "the same at the end"),
    Quantity("rayleigh_0", "rᵀΘr/‖r‖², 0", r"$r^T\Theta r/\|r\|^2$, $0$", "at the subset's residual, epoch 0"),
    Quantity("rayleigh_t", "rᵀΘr/‖r‖², T", r"$r^T\Theta r/\|r\|^2$, $T$", "the same at the end"),
    Quantity("shift_t", "‖Θ_T - Θ_0‖₂", r"$\|\Theta_T-\Theta_0\|_2$", "shift of the subset's kernel"),
    Quantity(
        "slope",
        "slope of ‖∇L‖² in the gap",
        r"slope of $\|\nabla L\|^2$ in the gap",
        "log-log, both smoothed over a tenth of the run (calibrated), proxy for L*, whole run",
    ),
    Quantity("slope_raw", "the same, not smoothed", "the same, not smoothed", "without smoothing"),
)


def row(record: Record) -> dict[str, float | str]:
    """Return every quantity of one seed, by the keys of `QUANTITIES`."""
    summary, over = summarise(record), record.diverged_at is not None
    regime = summary.regime
    inside = [end[regime][~np.isnan(end[regime])] for end in summary.bracket]
    medians = [float(np.median(end)) if end.size else math.nan for end in inside]
    drift = record["drift"][np.isfinite(record["drift"])]
    # A drift summed in float64 from float32 parameters is exact to their spacing.
    falls = int(np.sum(np.diff(drift) < -1e-6 * drift[:-1])) if drift.size else 0
    width = max(1, record["epoch"].size // 10)
    return {
        "loss_0": float(record["loss"][0]),
        "loss_t": math.inf if over else last_finite(record["loss"]),
        "accuracy_t": last_finite(record["accuracy"]),
        "drift_t": math.inf if over else last_finite(record["drift"]),
        "drift_falls": f"{falls} of {max(drift.size - 1, 0)}",
        "regime": f"{regime.start} to {regime.stop - 1}" if regime.stop else "none",
        "pl_zero": summary.envelope[0],
        "pl_zero_median": medians[0],
        "pl_proxy": summary.envelope[1],
        "pl_proxy_median": medians[1],
        "lambda_0": float(record["ntk_min_eig"][0]),
        "lambda_t": last_finite(record["ntk_min_eig"]),
        "lambda_least": float(np.nanmin(record["ntk_min_eig"])),
        "max_0": float(record["ntk_max_eig"][0]),
        "max_t": last_finite(record["ntk_max_eig"]),
        "rank_0": float(record["ntk_effective_rank"][0]),
        "rank_t": last_finite(record["ntk_effective_rank"]),
        "rayleigh_0": float(record["ntk_rayleigh"][0]),
        "rayleigh_t": last_finite(record["ntk_rayleigh"]),
        "shift_t": last_finite(record["ntk_shift"]),
        "slope": gradient_law(record, summary.floor, smoothing=width, whole=True).slope,
        "slope_raw": gradient_law(record, summary.floor, whole=True).slope,
    }


def table(done: Mapping[int, Record]) -> Table:
    """Return Table 2: one column a seed, and the mean with its deviation over seeds."""
    rows = [row(record) for record in done.values()]
    cells: dict[str, list[Cell]] = {}
    for quantity in QUANTITIES:
        values = [one[quantity.key] for one in rows]
        numbers = [value for value in values if isinstance(value, float)]
        mean: Cell = mean_of(numbers) if numbers else None
        cells[quantity.key] = [*(Measured(v) if isinstance(v, float) else v for v in values), mean]
    first = next(iter(done.values()))
    images, c = int(first.arrays.get("kernel_samples", first["n"])), int(first["c"])
    return Table(
        f"CIFAR-10, {c} classes: SGD with momentum {first.config['momentum']}, schedule {first.config['schedule']}",
        (*(f"seed {seed}" for seed in done), "mean"),
        QUANTITIES,
        cells,
        (
            f"Mean ± sample standard deviation over {len(done)} seeds. Kernels are those of {images} images, "
            f"{images * c} × {images * c}; units of L with scale s = {float(first['loss_scale']):g}.",
            f"The paper's earlier version gives a smoothed slope of {PAPER_SLOPE}; its smoothing is not known to us.",
            scope_note(list(done.values())),
        ),
    )
