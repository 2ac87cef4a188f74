"""The latent variables of local PL theory, at one point or along a run."""

from lplr_jax.curves.pl import loss_floor, pl_bracket, pl_identity_tolerance
from lplr_jax.curves.rate import Decay, RateReport, contraction_factor, middle_half, rate_report, stable_regime
from lplr_jax.curves.stability import EXPECTED, Observation, PowerLaw, observe, place_of, power_law, rounding_allowance
from lplr_jax.diagnostics.hessian import Extremes, hessian_extremes, ntk_extremes
from lplr_jax.diagnostics.kernel import (
    certified_min_eig,
    effective_rank,
    empirical_ntk_min_eig,
    principal_block,
    stratified_ids,
    subset_ids,
)
from lplr_jax.diagnostics.layers import layer_lower_bounds
from lplr_jax.diagnostics.pl import PointDiagnostics, evaluate_point
from lplr_jax.diagnostics.processes import ProcessLostError, distributed_ntk_min_eig

__all__ = [
    "EXPECTED",
    "Decay",
    "Extremes",
    "Observation",
    "PointDiagnostics",
    "PowerLaw",
    "ProcessLostError",
    "RateReport",
    "certified_min_eig",
    "contraction_factor",
    "distributed_ntk_min_eig",
    "effective_rank",
    "empirical_ntk_min_eig",
    "evaluate_point",
    "hessian_extremes",
    "layer_lower_bounds",
    "loss_floor",
    "middle_half",
    "ntk_extremes",
    "observe",
    "pl_bracket",
    "pl_identity_tolerance",
    "place_of",
    "power_law",
    "principal_block",
    "rate_report",
    "rounding_allowance",
    "stable_regime",
    "stratified_ids",
    "subset_ids",
]
