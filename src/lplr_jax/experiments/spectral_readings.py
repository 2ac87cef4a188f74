"""What a table says of a run whose probes keep spectra, and how each number is read off its record."""

from collections.abc import Callable

import numpy as np

from lplr_jax.curves.position import position_of
from lplr_jax.records import Record
from lplr_jax.reports.tables import Quantity, last_finite


def _position(record: Record, name: str, place: int) -> float:
    found = position_of(record)
    return np.nan if found is None else float(getattr(found, name)[place])


def pl_ratio(record: Record, floor: float = 0.0) -> np.ndarray:
    """Return ½‖∇L‖²/(L - floor) of every step, in units of L."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return 0.5 * np.asarray(record["grad_sq_norm"], np.float64) / (np.asarray(record["loss"], np.float64) - floor)


def _interval(record: Record) -> float:
    value, lower, upper = (record[f"ntk_min_eig{end}"] for end in ("", "_lower", "_upper"))
    return float(np.nanmax((upper - lower) / np.abs(value)))


def _first(name: str) -> Callable[[Record], float]:
    return lambda record: float(record[name][0]) if name in record else float("nan")


def _last(name: str) -> Callable[[Record], float]:
    return lambda record: last_finite(record[name]) if name in record else float("nan")


READINGS: tuple[tuple[str, str, str, str, Callable[[Record], float]], ...] = (
    ("loss_0", "L_0", "$L_0$", "training loss of all positions at initialisation, units of L", _first("loss")),
    ("loss_t", "L_T", "$L_T$", "last training loss", _last("loss")),
    ("gradient_t", "‖∇L_T‖²", r"$\|\nabla L_T\|^2$", "exact, of all positions", _last("grad_sq_norm")),
    ("pl_0", "PL ratio, 0", "PL ratio, $0$", "½‖∇L‖²/L with L* = 0, units of L", lambda r: float(pl_ratio(r)[0])),
    ("pl_t", "PL ratio, T", "PL ratio, $T$", "the same at the end", lambda r: last_finite(pl_ratio(r))),
    ("pl_least", "PL ratio, least", "PL ratio, least", "the least of all steps",
     lambda r: float(np.nanmin(pl_ratio(r)))),
    ("drift_t", "drift", r"$\|\theta_T-\theta_0\|$", "‖θ_T - θ_0‖₂", _last("drift")),
    ("sharpness_0", "β, 0", r"$\beta$, $0$", "largest eigenvalue of the Hessian of L, all positions",
     _first("sharpness")),
    ("sharpness_t", "β, T", r"$\beta$, $T$", "the same at the last probe", _last("sharpness")),
    ("lambda_0", "λ_min, 0", r"$\lambda_{\min}$, $0$", "least eigenvalue of the rows' kernel, output²/parameter²",
     _first("ntk_min_eig")),
    ("lambda_t", "λ_min, T", r"$\lambda_{\min}$, $T$", "the same at the last probe", _last("ntk_min_eig")),
    ("lambda_least", "λ_min, least", r"$\lambda_{\min}$, least", "the least at any probe",
     lambda r: float(np.nanmin(r["ntk_min_eig"]))),
    ("interval", "interval of λ_min", r"interval of $\lambda_{\min}$", "its largest width over λ_min, of all probes",
     _interval),
    ("max_0", "λ_max, 0", r"$\lambda_{\max}$, $0$", "largest eigenvalue of the same kernel", _first("ntk_max_eig")),
    ("max_t", "λ_max, T", r"$\lambda_{\max}$, $T$", "the same at the last probe", _last("ntk_max_eig")),
    ("rank_0", "effective rank, 0", "effective rank, $0$", "(tr Θ)²/‖Θ‖_F²", _first("ntk_effective_rank")),
    ("rank_t", "effective rank, T", "effective rank, $T$", "the same at the last probe", _last("ntk_effective_rank")),
    ("rayleigh_0", "ρ, 0", r"$\rho$, $0$", "gᵀΘg/‖g‖² at the rows' own gradient in f", _first("ntk_rayleigh")),
    ("rayleigh_t", "ρ, T", r"$\rho$, $T$", "the same at the last probe", _last("ntk_rayleigh")),
    ("above_0", "eigenvalues ≥ ρ, 0", r"eigenvalues $\geq\rho$, $0$", "as a share of all: where the gradient lies",
     lambda r: _position(r, "above", 0)),
    ("above_t", "eigenvalues ≥ ρ, T", r"eigenvalues $\geq\rho$, $T$", "the same at the last probe",
     lambda r: _position(r, "above", -1)),
    ("floor_share_0", "share by best k, 0", "share by best $k$, $0$", "λ_k A_k/ρ: how much of ½‖∇L‖² floor_pl gives",
     lambda r: _position(r, "floor_share", 0)),
    ("floor_share_t", "share by best k, T", "share by best $k$, $T$", "the same at the last probe",
     lambda r: _position(r, "floor_share", -1)),
    ("best_t", "best k, T", "best $k$, $T$", "the k of it", lambda r: _position(r, "best", -1)),
    ("least_share_0", "share by λ_min, 0", r"share by $\lambda_{\min}$, $0$", "λ_min/ρ: what the paper's bound gives",
     lambda r: _position(r, "least_share", 0)),
    ("least_share_t", "share by λ_min, T", r"share by $\lambda_{\min}$, $T$", "the same at the last probe",
     lambda r: _position(r, "least_share", -1)),
    ("shift_t", "‖Θ_T - Θ_0‖₂/λ_max", r"$\|\Theta_T-\Theta_0\|_2/\lambda_{\max}$", "shift over λ_max(Θ_0), of the rows",
     lambda r: last_finite(r["ntk_shift"]) / float(r["ntk_max_eig"][0])),
)  # fmt: skip
"""Key, label, LaTeX, meaning, and how it is read off a record."""
FLOOR = Quantity("pl_floor", "PL ratio, floor", "PL ratio, floor", "the least with L* the floor of causal functions")
"""The one that needs a level beside the record."""
