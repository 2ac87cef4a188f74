"""What the tables of the experiments say of a record: every quantity once, with how it is read off."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from lplr_jax.curves.stability import Observation, observe
from lplr_jax.curves.summary import Summary, gradient_law, summarise
from lplr_jax.experiments.step_size import judged
from lplr_jax.records import Record
from lplr_jax.reports.tables import Cell, Measured, Quantity, last_finite

Value = float | int | str | Measured


class Reading(NamedTuple):
    """A quantity, and the function that reads it off a record and its summary."""

    quantity: Quantity
    value: Callable[[Record, Summary], Value]


def _reading(key: str, label: str, latex: str, meaning: str, value: Callable[[Record, Summary], Value]) -> Reading:
    return Reading(Quantity(key, label, latex, meaning), value)


def _first(name: str) -> Callable[[Record, Summary], float]:
    return lambda record, summary: float(record[name][0])


def _last(name: str) -> Callable[[Record, Summary], float]:
    return lambda record, summary: last_finite(record[name])


def _unless_diverged(value: Callable[[np.ndarray], float], name: str) -> Callable[[Record, Summary], float]:
    return lambda record, summary: math.inf if record.diverged_at is not None else value(record[name])


def _drift_of(name: str) -> Callable[[Record, Summary], float]:
    return lambda record, summary: float(abs(last_finite(record[name]) - record[name][0]) / abs(record[name][0]))


def _excess(record: Record, summary: Summary) -> float:
    eigs, regime = record["ntk_min_eig"], summary.regime
    inside = (record["probe_epoch"] >= regime.start) & (record["probe_epoch"] < regime.stop)
    guaranteed = eigs[inside & np.isfinite(eigs)].min(initial=math.inf) / float(record["loss_scale"])
    return summary.envelope[0] / guaranteed if 0 < guaranteed < math.inf else math.nan


def _median(end: int) -> Callable[[Record, Summary], float]:
    def value(record: Record, summary: Summary) -> float:
        inside = summary.bracket[end][summary.regime]
        inside = inside[~np.isnan(inside)]
        return float(np.median(inside)) if inside.size else math.nan

    return value


def _falls(record: Record, summary: Summary) -> str:
    drift = record["drift"][np.isfinite(record["drift"])]
    # A drift summed in float64 from float32 parameters is exact to their spacing.
    falls = int(np.sum(np.diff(drift) < -1e-6 * drift[:-1])) if drift.size else 0
    return f"{falls} of {max(drift.size - 1, 0)}"


def _regime(record: Record, summary: Summary) -> str:
    return f"{summary.regime.start} to {summary.regime.stop - 1}" if summary.regime.stop else "none"


def _slope(floor: float | None) -> Callable[[Record, Summary], Measured]:
    def value(record: Record, summary: Summary) -> Measured:
        law = gradient_law(record, summary.floor if floor is None else floor)
        return Measured(law.slope, law.stderr)

    return value


def _fitted(record: Record, summary: Summary) -> str:
    least, largest = gradient_law(record, summary.floor).range
    return f"{least:.2g} to {largest:.2g}"


def _smoothed_slope(record: Record, summary: Summary) -> float:
    width = max(1, record["epoch"].size // 10)
    return gradient_law(record, summary.floor, smoothing=width, whole=True).slope


def _observed(record: Record) -> Observation:
    return observe(record["loss"], record["drift"])


_READINGS = (
    _reading("learning_rate", "η (calibrated)", r"$\eta$ (calibrated)", "step size",
             lambda record, summary: float(record["learning_rate"])),
    _reading("p", "p", "$p$", "parameters", lambda record, summary: int(record["p"])),
    _reading("lambda_0", "λ_0", r"$\lambda_0$", "λ_min of the full kernel at epoch 0, output²/parameter²",
             _first("ntk_min_eig")),
    _reading("lambda_t", "λ_T", r"$\lambda_T$", "the same at the last probe of the run", _last("ntk_min_eig")),
    _reading("lambda_t_lower", "λ_T ≥ (proved)", r"$\lambda_T \geq$ (proved)", "proved lower bound of λ_T",
             _last("ntk_min_eig_lower")),
    _reading("lambda_least", "λ least", r"$\min_t\lambda$", "the least at any probe",
             lambda record, summary: float(np.nanmin(record["ntk_min_eig"]))),
    _reading("ntk_drift_subset", "NTK drift, subset", r"$|\lambda_T-\lambda_0|/\lambda_0$, subset",
             "|λ_T - λ_0|/λ_0 on the random subset, as in the paper", _drift_of("ntk_min_eig_subset")),
    _reading("ntk_drift", "NTK drift, all", r"$|\lambda_T-\lambda_0|/\lambda_0$", "the same on the full kernel",
             _drift_of("ntk_min_eig")),
    _reading("max_0", "λ_max, 0", r"$\lambda_{\max}$, $0$", "λ_max of the same kernel at epoch 0",
             _first("ntk_max_eig")),
    _reading("max_t", "λ_max, T", r"$\lambda_{\max}$, $T$", "the same at the end", _last("ntk_max_eig")),
    _reading("rank_0", "effective rank, 0", "effective rank, $0$", "(tr Θ)²/‖Θ‖_F² at epoch 0",
             _first("ntk_effective_rank")),
    _reading("rank_t", "effective rank, T", "effective rank, $T$", "the same at the end", _last("ntk_effective_rank")),
    _reading("rayleigh_0", "rᵀΘr/‖r‖², 0", r"$r^T\Theta r/\|r\|^2$, $0$", "at the subset's residual, epoch 0",
             _first("ntk_rayleigh")),
    _reading("rayleigh_t", "rᵀΘr/‖r‖², T", r"$r^T\Theta r/\|r\|^2$, $T$", "the same at the end",
             _last("ntk_rayleigh")),
    _reading("shift_t", "‖Θ_T - Θ_0‖₂", r"$\|\Theta_T-\Theta_0\|_2$", "shift of the subset's kernel",
             _last("ntk_shift")),
    _reading("loss_0", "L_0", "$L_0$", "training loss at initialisation, units of L with scale s", _first("loss")),
    _reading("loss_t", "L_T", "$L_T$", "last training loss, units of L with scale s",
             _unless_diverged(last_finite, "loss")),
    _reading("accuracy_t", "accuracy, T", "accuracy, $T$", "training accuracy at the end", _last("accuracy")),
    _reading("drift_t", "drift, final", r"$\|\theta_T-\theta_0\|$", "‖θ_T - θ_0‖₂",
             _unless_diverged(last_finite, "drift")),
    _reading("drift_max", "drift, largest", r"$\max_t\|\theta_t-\theta_0\|$", "largest ‖θ_t - θ_0‖₂",
             _unless_diverged(lambda drift: float(np.nanmax(drift)), "drift")),
    _reading("drift_falls", "drift, falls", "drift, falls", "epochs in which the drift falls, of all measured", _falls),
    _reading("regime", "stable regime", "stable regime", "epochs, by the rule of diagnostics.stable_regime", _regime),
    _reading("pl_zero", "least PL ratio, L* = 0", r"least PL ratio, $L^*=0$",
             "least ½‖∇L‖²/L over the stable regime, units of L", lambda record, summary: summary.envelope[0]),
    _reading("pl_zero_median", "median PL ratio, L* = 0", r"median PL ratio, $L^*=0$", "the median there", _median(0)),
    _reading("pl_proxy", "least PL ratio, proxy", "least PL ratio, proxy",
             "least ½‖∇L‖² over the gap of L to its least recorded value", lambda record, summary: summary.envelope[1]),
    _reading("pl_proxy_median", "median PL ratio, proxy", "median PL ratio, proxy", "the median there", _median(1)),
    _reading("pl_excess", "PL ratio / (λ_min/s)", r"PL ratio$/(\lambda_{\min}/s)$",
             "least PL ratio with L* = 0 over the least λ_min/s in the regime: how loose the kernel's guarantee is",
             _excess),
    _reading("factor_zero", "factor/epoch, L* = 0", r"factor/epoch, $L^*=0$", "contraction, middle half of the run",
             lambda record, summary: summary.middle_rate.zero.factor),
    _reading("factor_proxy", "factor/epoch, proxy", "factor/epoch, proxy", "the same for the gap to the proxy",
             lambda record, summary: summary.middle_rate.proxy.factor),
    _reading("law_zero", "law of L", "law of $L$", "which law fits L better over the middle half",
             lambda record, summary: summary.middle_rate.zero.law),
    _reading("law_proxy", "law of the gap", "law of the gap", "the same for the gap to the proxy",
             lambda record, summary: summary.middle_rate.proxy.law),
    _reading("slope_proxy", "slope of ‖∇L‖² in the gap", r"slope of $\|\nabla L\|^2$ in the gap",
             "log-log, proxy for L*, stable regime (middle half without one); ± standard error of independent epochs",
             _slope(None)),
    _reading("slope_zero", "slope of ‖∇L‖² in L", r"slope of $\|\nabla L\|^2$ in $L$", "the same with L* = 0",
             _slope(0.0)),
    _reading("slope_range", "gaps fitted", "gaps fitted", "least and largest gap to the proxy in the fit", _fitted),
    _reading("slope", "slope of ‖∇L‖² in the gap", r"slope of $\|\nabla L\|^2$ in the gap",
             "log-log, both smoothed over a tenth of the run (calibrated), proxy for L*, whole run", _smoothed_slope),
    _reading("slope_raw", "the same, not smoothed", "the same, not smoothed", "without smoothing",
             lambda record, summary: gradient_law(record, summary.floor, whole=True).slope),
    _reading("boundary", "2/β at θ_0", r"$2/\beta$ at $\theta_0$", "β = λ_max(∇²L(θ_0)), float32 products",
             lambda record, summary: 2 / float(record["sharpness"][0])),
    _reading("critical_step", "η_c at θ_0", r"$\eta_c$ at $\theta_0$",
             "the step along -∇L beyond which L rises, by forward passes; 2/η_c is the critical sharpness",
             lambda record, summary: float(record.arrays.get("critical_step", np.full(1, np.nan))[0])),
    _reading("eta_critical_t", "2η/η_c at θ_T", r"$2\eta/\eta_c$ at $\theta_T$",
             "η times the critical sharpness at the last probe, beside η β",
             lambda record, summary: 2 * float(record["learning_rate"])
             / last_finite(record.arrays.get("critical_step", np.full(1, np.nan)))),
    _reading("eta_beta", "η β at θ_0", r"$\eta\beta$ at $\theta_0$", "descent lemma: at most 1; boundary: 2",
             lambda record, summary: float(record["learning_rate"]) * float(record["sharpness"][0])),
    _reading("eta_beta_t", "η β at θ_T", r"$\eta\beta$ at $\theta_T$", "the same at the last probe",
             lambda record, summary: float(record["learning_rate"]) * last_finite(record["sharpness"])),
    _reading("predicted", "predicted", "predicted", "before the first step, from η β at θ_0",
             lambda record, summary: judged(record, _observed(record).outcome)[0]),
    _reading("observed", "observed", "observed", "by the rule of diagnostics.observe on loss and drift",
             lambda record, summary: _observed(record).outcome),
    _reading("diverged", "diverged", "diverged", "epoch from which loss, gradient or parameters are not finite",
             lambda record, summary: "no" if record.diverged_at is None else f"at epoch {record.diverged_at}"),
    _reading("verdict", "prediction", "prediction", "whether the observed outcome was among the predicted ones",
             lambda record, summary: judged(record, _observed(record).outcome)[1]),
)  # fmt: skip

READINGS = {one.quantity.key: one for one in _READINGS}
"""Every quantity by its key; one that is added here can be named in any table."""


def quantities(keys: Iterable[str]) -> tuple[Quantity, ...]:
    """Return the quantities of a table by their keys."""
    return tuple(READINGS[key].quantity for key in keys)


def row(record: Record, keys: Iterable[str]) -> dict[str, Value]:
    """Read quantities off a record, by their keys."""
    summary = summarise(record)
    return {key: READINGS[key].value(record, summary) for key in keys}


def cell(value: Value) -> Cell:
    """Return a value as the cell of a table."""
    return Measured(value) if isinstance(value, float) else value
