"""Every name, unit and meaning of a record's arrays."""

import math
from typing import NamedTuple

from lplr_jax.values import ANY, COUNT, FLAG, NON_NEGATIVE, PLACE, POSITIVE, SHARE, Values


class Entry(NamedTuple):
    """What one array of a record is: its axes, its units, its meaning, and what its numbers may be."""

    dims: tuple[str, ...]
    units: str
    meaning: str
    values: Values = ANY


LOSS = "units of L"


KERNEL = "output² / parameter²"


LIPSCHITZ = "output² / parameter³"


JACOBIAN = "output / parameter"


JACOBIAN_SLOPE = "output / parameter²"


SCHEMA: dict[str, Entry] = {
    "epoch": Entry(
        ("epoch",),
        "steps",
        "step number t of each entry, ascending from 0, the initialisation; steps that are missing were not seen; "
        "an experiment that counts epochs calls an epoch a step",
        PLACE,
    ),
    "loss": Entry(("epoch",), LOSS, "L(θ_t) on all training data, in training precision"),
    "grad_sq_norm": Entry(("epoch",), "L² / parameter²", "‖∇L(θ_t)‖², in training precision", NON_NEGATIVE),
    "drift": Entry(("epoch",), "parameter", "‖θ_t - θ_0‖₂", NON_NEGATIVE),
    "accuracy": Entry(("epoch",), "1", "share of training samples whose largest output is that of their class", SHARE),
    "seen": Entry(
        ("epoch",),
        "1",
        "1 where loss, gradient and drift of the entry were measured; absent: wherever the loss is finite",
        FLAG,
    ),
    "step_size": Entry(
        ("epoch",),
        "parameter² / L",
        "η_t = ⟨θ_t - θ_{t+1}, ∇L_t⟩ / ‖∇L_t‖²; NaN where θ_t, ∇L_t or θ_{t+1} was not seen",
    ),
    "step_deviation": Entry(
        ("epoch",),
        "1",
        "‖θ_t - θ_{t+1} - η_t ∇L_t‖ / ‖θ_t - θ_{t+1}‖: 0 along the gradient; NaN like step_size",
        NON_NEGATIVE,
    ),
    "step_rounding": Entry(
        ("epoch",),
        "1",
        "what rounding of the parameters alone may leave of step_deviation; inf where θ did not move; NaN like "
        "step_size",
        NON_NEGATIVE,
    ),
    "batch_grad_sq_norm": Entry(
        ("epoch",), "L² / parameter²", "‖g_B‖², g_B the gradient of the batch that the step takes", NON_NEGATIVE
    ),
    "batch_step_size": Entry(
        ("epoch",), "parameter² / L", "⟨θ_t - θ_{t+1}, g_B⟩ / ‖g_B‖²; NaN where the step was not seen"
    ),
    "batch_step_deviation": Entry(
        ("epoch",),
        "1",
        "‖θ_t - θ_{t+1} - batch_step_size g_B‖ / ‖θ_t - θ_{t+1}‖: 0 for a step of stochastic gradient descent",
        NON_NEGATIVE,
    ),
    "batch_step_rounding": Entry(
        ("epoch",), "1", "what rounding of the parameters alone may leave of batch_step_deviation", NON_NEGATIVE
    ),
    "probe_epoch": Entry(("probe",), "steps", "step number of each kernel probe, one of `epoch`", PLACE),
    "probe_loss": Entry(("probe",), LOSS, "L(θ_t) evaluated in float64"),
    "probe_grad_sq_norm": Entry(("probe",), "L² / parameter²", "‖∇L(θ_t)‖² evaluated in float64", NON_NEGATIVE),
    "ntk_min_eig": Entry(("probe",), KERNEL, "λ_min of the full (n c, n c) kernel"),
    "ntk_min_eig_lower": Entry(("probe",), KERNEL, "proved lower bound on λ_min"),
    "ntk_min_eig_upper": Entry(("probe",), KERNEL, "proved upper bound on λ_min"),
    "ntk_max_eig": Entry(("probe",), KERNEL, "λ_max of the full kernel"),
    "ntk_max_eig_upper": Entry(
        ("probe",), KERNEL, "proved upper bound on λ_max; NaN where the error of assembly is not known", NON_NEGATIVE
    ),
    "ntk_min_eig_subset": Entry(("probe",), KERNEL, "λ_min on the subset, an upper bound of that on all"),
    "ntk_rayleigh": Entry(("probe",), KERNEL, "gᵀΘg / ‖g‖² at g = ∂ℓ/∂f of the probe, r for squared loss"),
    "ntk_effective_rank": Entry(("probe",), "1", "(tr Θ)² / ‖Θ‖_F², between 1 and the number of rows", NON_NEGATIVE),
    "ntk_shift": Entry(("probe",), KERNEL, "‖Θ_t - Θ_0‖₂", NON_NEGATIVE),
    "sharpness": Entry(("probe",), "L / parameter²", "largest eigenvalue of the Hessian of L; NaN where not measured"),
    "curvature_min": Entry(
        ("probe",), "L / parameter²", "least eigenvalue of the Hessian of L; NaN where not measured"
    ),
    "lqcr_inner": Entry(("probe",), LOSS, "⟨∇L(θ_t), θ_t - θ_T⟩, T the last probe"),
    "ntk_assembly_error": Entry(
        ("probe",),
        KERNEL,
        "bound on the assembly error of Θ in spectral norm; finite where the interval includes it",
        NON_NEGATIVE,
    ),
    "ntk_peer_difference": Entry(
        ("probe",),
        "1",
        "largest |Θ_ij - Θ'_ij| over the largest |Θ_ij|, on samples of the subset or of all, at most some 200 rows; Θ' "
        "is of neural-tangents, of the engine where Θ is of neural-tangents; at the first and the last probe, NaN "
        "elsewhere",
        NON_NEGATIVE,
    ),
    "probe_untrusted": Entry(
        ("probe",),
        "1",
        "1: the kernel's values of this probe are NaN as the arithmetic lost them, 2: the Hessian's, 3: both",
        Values(among=(0, 1, 2, 3)),
    ),
    "spectrum": Entry(
        ("probe", "eigenvalue"),
        KERNEL,
        "eigenvalues of Θ_t, ascending, all of them or the largest; NaN where not measured",
    ),
    "residual_energy": Entry(
        ("probe", "eigenvalue"),
        "1",
        "share of ‖g‖² along each of these eigenvectors of Θ_t; NaN where not measured",
        NON_NEGATIVE,
    ),
    "spectrum_rest": Entry(
        ("probe",), KERNEL, "sum of the eigenvalues of Θ_t that `spectrum` leaves out; absent: it holds all of them"
    ),
    "residual_energy_rest": Entry(
        ("probe",), "1", "share of ‖g‖² along the eigenvectors that `spectrum` leaves out", NON_NEGATIVE
    ),
    "ntk_pair_shift": Entry(
        ("probe", "other_probe"), KERNEL, "‖Θ_s - Θ_t‖₂ for every pair of probes, from below", NON_NEGATIVE
    ),
    "param_pair_distance": Entry(
        ("probe", "other_probe"), "parameter", "‖θ_s - θ_t‖₂ for every pair of probes", NON_NEGATIVE
    ),
    "ntk_lipschitz_lower": Entry(
        (), LIPSCHITZ, "largest ‖Θ_s - Θ_t‖₂/‖θ_s - θ_t‖ over pairs of probes, less errors", NON_NEGATIVE
    ),
    "ntk_lipschitz_random": Entry(
        (), LIPSCHITZ, "lower estimate of L_Θ on the ball of the run, random directions", NON_NEGATIVE
    ),
    "ntk_lipschitz_gradient": Entry((), LIPSCHITZ, "the same, along the gradient at θ_0", NON_NEGATIVE),
    "ntk_lipschitz_power": Entry(
        (), LIPSCHITZ, "the same, by power iteration on the derivative of the kernel", NON_NEGATIVE
    ),
    "ntk_lipschitz_upper": Entry(
        (),
        LIPSCHITZ,
        "proved upper bound of L_Θ on the ball of the run; NaN where none, inf where it overflowed",
        NON_NEGATIVE,
    ),
    "smoothness_upper": Entry(
        (),
        "L / parameter²",
        "proved upper bound of β on the ball of the run; NaN where none, inf where it overflowed",
        POSITIVE,
    ),
    "radius_certified": Entry(
        (),
        "parameter",
        "R*: proved that L_Θ(R) R < λ_0 for R < R*; NaN where none, inf only where L_Θ = 0",
        NON_NEGATIVE,
    ),
    "parameter_spacing": Entry((), "parameter", "2-norm of the spacings of θ_0, each in its own dtype", NON_NEGATIVE),
    "parameter_eps": Entry(
        (),
        "1",
        "coarsest spacing of 1 among the dtypes of θ and of what the loss is computed in; absent: float32",
        Values(least=0.0, above=True, most=1.0, nan=False),
    ),
    "probe_loss_lower": Entry(("probe",), LOSS, "proved lower bound of L(θ_t)", NON_NEGATIVE),
    "probe_loss_upper": Entry(("probe",), LOSS, "proved upper bound of L(θ_t)", NON_NEGATIVE),
    "probe_decrease_lower": Entry(
        ("probe",), "1", "proved lower bound of a = (L(θ_t) - L(θ_t - η∇L)) / (η ‖∇L‖²), η the learning rate"
    ),
    "probe_decrease_upper": Entry(("probe",), "1", "proved upper bound of the same"),
    "restart_ratio": Entry(
        ("probe",), "1", "4 L_J ‖r_t‖/λ_min(Θ_t), L_J proved on the ball of restart_radius around θ_t", NON_NEGATIVE
    ),
    "restart_radius": Entry(("probe",), "parameter", "4 ‖r_t‖/√λ_min(Θ_t), rounded up", NON_NEGATIVE),
    "restart_smoothness": Entry(("probe",), "L / parameter²", "proved bound of β on that ball", NON_NEGATIVE),
    "rsc_cosine": Entry(
        ("probe",), "1", "|1ᵀΘg|/√(1ᵀΘ1 gᵀΘg), the cosine of ∇L and the gradient of the mean output", SHARE
    ),
    "gauss_newton_curvature": Entry(
        ("probe",),
        "L / parameter²",
        "gᵀΘ²g/(s gᵀΘg), the curvature of the linearised loss along ∇L",
        NON_NEGATIVE,
    ),
    "critical_step": Entry(
        ("probe",),
        "parameter² / L",
        "η_c, the step along -∇L beyond which the loss of the probe's samples rises, within 4 %, by forward passes; "
        "2/η_c is the critical sharpness, at most that of the Hessian where L is quadratic",
        NON_NEGATIVE,
    ),
    "aiming_inner": Entry(("probe",), LOSS, "⟨∇L(θ_t), θ_t - θ̃⟩, θ̃ the point beside which zero loss is certified"),
    "jacobian_lipschitz_upper": Entry(
        (), JACOBIAN_SLOPE, "proved bound of the Lipschitz constant of J on the ball of the run", NON_NEGATIVE
    ),
    "target_norm": Entry((), "output", "‖y‖ of the squared loss: f may be far larger than f - y", NON_NEGATIVE),
    "loss_floor_lower": Entry(
        (),
        LOSS,
        "lower bound of the squared loss of any function of each sample alone: equal inputs with unlike targets",
        NON_NEGATIVE,
    ),
    "interpolant_residual": Entry((), "output", "upper bound of ‖f(θ̃) - y‖ at a polished θ̃", NON_NEGATIVE),
    "interpolant_min_eig_lower": Entry((), KERNEL, "proved lower bound of λ_min(Θ(θ̃)); NaN where none is known"),
    "interpolant_jacobian_lipschitz": Entry(
        (), JACOBIAN_SLOPE, "proved L_J on the ball around θ̃; NaN where none is known", NON_NEGATIVE
    ),
    "interpolant_ball": Entry((), "parameter", "radius of that ball", NON_NEGATIVE),
    "interpolant_distance": Entry((), "parameter", "upper bound of ‖θ̃ - θ_0‖", NON_NEGATIVE),
    "interpolant_stationarity": Entry(
        (),
        "1",
        "‖P (θ̃ - θ_0)‖/‖θ̃ - θ_0‖, P onto the kernel of J: 0 where no zero of f - y nearby is nearer to θ_0",
        NON_NEGATIVE,
    ),
    "interpolant_steps": Entry((), "steps", "kernels that were factorised to find θ̃", PLACE),
    "probe_eps": Entry(
        (),
        "1",
        "coarsest spacing of 1 in what the probes compute in, 2^-52 unless the network rounds inside; absent: 2^-52",
        Values(least=0.0, above=True, most=1.0, nan=False),
    ),
    "affine_in_parameters": Entry((), "1", "1 where the program is affine in its parameters, read off its jaxpr", FLAG),
    "held_out_loss": Entry(
        (),
        "output²",
        "‖f - y‖²/(2n) on held-out samples, of the network linearised at θ_0 and trained to zero loss",
        NON_NEGATIVE,
    ),
    "kernel_samples": Entry((), "samples", "samples of every probe's kernel, loss and gradient; absent: all n", COUNT),
    "kernel_trace": Entry((), "1", "1 where the probes hold the output-averaged kernel, (1/c) Σ_o Θ_oo", FLAG),
    "subset_ids": Entry(("subset",), "sample numbers", "training samples of the subset, distinct", PLACE),
    "loss_scale": Entry(
        (),
        "1",
        "the number s by which the sum of the losses of all samples is divided: L = ‖r‖² / (2 s) for squared",
        Values(least=0.0, above=True, finite=True, nan=False),
    ),
    "probe_loss_scale": Entry(
        (),
        "1",
        "the number s of the probes' own loss, where the kernel is of a subset",
        Values(least=0.0, above=True, finite=True, nan=False),
    ),
    "learning_rate": Entry(
        (),
        "parameter² / L",
        "step size η, of the first step where it moves; NaN where unknown",
        Values(least=0.0, above=True, finite=True),
    ),
    "sample_grad_sq_norm": Entry(
        ("probe",),
        "L² / parameter²",
        "(1/n) Σ ‖G_i‖² with G_i = (n/s) ∇ℓ_i, the gradients whose mean is ∇L, from diagonal blocks of Θ in float64",
        NON_NEGATIVE,
    ),
    "sample_kernel_max": Entry(("probe",), KERNEL, "largest λ_max of the c × c blocks Θ_ii", NON_NEGATIVE),
    "block_grad_sq_norm": Entry(
        ("probe",),
        "L² / parameter²",
        "mean of ‖g_B‖² over the blocks B of the partition that batches are drawn from, g_B the mean of G_i over B",
        NON_NEGATIVE,
    ),
    "block_kernel_max": Entry(("probe",), KERNEL, "largest λ_max of the kernels Θ_BB of these blocks", NON_NEGATIVE),
    "output_grad_norm": Entry(("probe",), "L s / output", "‖g‖₂ at g = ∂ℓ/∂f, in float64", NON_NEGATIVE),
    "output_norm": Entry(("probe",), "output", "‖f(θ_t)‖₂ over all samples, in float64", NON_NEGATIVE),
    "sample_bound_sum": Entry(
        ("probe",),
        "(L s / output)²",
        "Σ ψ(ℓ_i), a lower bound of ‖g‖² by the losses of the samples alone, or by their excess over H(τ_i)",
        NON_NEGATIVE,
    ),
    "samples_beyond": Entry(
        ("probe",), "samples", "k, the samples with ℓ_i > ln 2, beyond which (1 - e^-x)² is not convex", NON_NEGATIVE
    ),
    "probe_accuracy": Entry(
        ("probe",),
        "1",
        "share of the probe's samples whose largest output is that of their class, or of equal sign for one output",
        SHARE,
    ),
    "sample_least_share": Entry(
        ("probe",), "1", "least min(p_ik, τ_ik) of all samples and classes, where targets are distributions", SHARE
    ),
    "ntk_class_min_eig": Entry(
        ("probe",), KERNEL, "λ_⊥ of softmax: λ_min of Θ on the vectors whose outputs sum up to 0 in every sample"
    ),
    "ntk_class_min_eig_lower": Entry(("probe",), KERNEL, "proved lower bound of λ_⊥; NaN where none is known"),
    "ntk_class_min_eig_upper": Entry(("probe",), KERNEL, "proved upper bound of λ_⊥; NaN where none is known"),
    "loss_infimum": Entry(
        (), LOSS, "infimum of L over all outputs, the mean entropy of the targets; absent: 0", NON_NEGATIVE
    ),
    "margin_max": Entry((), "output", "largest margin of a sample at θ_0: ℓ_i is a decreasing function of it"),
    "margin_slope_upper": Entry(
        (),
        JACOBIAN,
        "proved bound of the Lipschitz constant in θ of every margin on the ball of the run",
        NON_NEGATIVE,
    ),
    "batch_decrease": Entry(
        ("probe",), LOSS, "mean of L(θ_t - η g_B) - L(θ_t) over the batches B that may be drawn, in float64"
    ),
    "batch_decrease_error": Entry(
        ("probe",),
        LOSS,
        "half the width of an empirical Bernstein interval at 95 % around it; 0 where every batch was tried",
        NON_NEGATIVE,
    ),
    "batch_size": Entry((), "samples", "samples of a mini-batch; absent: all data in every step", COUNT),
    "batches_independent": Entry(
        (), "1", "1 where each batch was drawn anew, 0 where a pass over the data uses every sample once", FLAG
    ),
    "batches_fixed": Entry(
        (), "1", "1 where a batch is one of the blocks of a partition of the samples, each as likely; absent: 0", FLAG
    ),
    "path_budget": Entry(
        (),
        "parameter",
        "R, below which the step rule was to hold the length of the path Σ η_t ‖∇L_t‖; absent: no budget",
        Values(least=0.0, above=True, finite=True),
    ),
    "n": Entry((), "samples", "training samples", COUNT),
    "c": Entry((), "outputs", "outputs per sample", COUNT),
    "p": Entry((), "parameters", "parameters", COUNT),
}
"""Every array a record may hold. What was not measured is absent."""


SINCE_2 = frozenset(
    {
        "seen",
        "step_size",
        "step_deviation",
        "step_rounding",
        "parameter_eps",
        "probe_eps",
        "probe_loss_lower",
        "probe_loss_upper",
        "probe_decrease_lower",
        "probe_decrease_upper",
        "restart_ratio",
        "restart_radius",
        "restart_smoothness",
        "rsc_cosine",
        "gauss_newton_curvature",
        "critical_step",
        "held_out_loss",
        "aiming_inner",
        "jacobian_lipschitz_upper",
        "target_norm",
        "loss_floor_lower",
        "interpolant_residual",
        "interpolant_min_eig_lower",
        "interpolant_jacobian_lipschitz",
        "interpolant_ball",
        "interpolant_distance",
        "interpolant_stationarity",
        "interpolant_steps",
        "probe_loss_scale",
        "ntk_peer_difference",
        "ntk_max_eig_upper",
        "spectrum_rest",
        "residual_energy_rest",
        "path_budget",
        "sample_grad_sq_norm",
        "sample_kernel_max",
        "output_grad_norm",
        "output_norm",
        "sample_bound_sum",
        "samples_beyond",
        "sample_least_share",
        "ntk_class_min_eig",
        "ntk_class_min_eig_lower",
        "ntk_class_min_eig_upper",
        "loss_infimum",
        "margin_max",
        "margin_slope_upper",
        "batch_decrease",
        "batch_decrease_error",
        "batch_size",
        "batches_independent",
        "batches_fixed",
        "batch_grad_sq_norm",
        "batch_step_size",
        "batch_step_deviation",
        "batch_step_rounding",
        "probe_accuracy",
        "block_grad_sq_norm",
        "block_kernel_max",
    }
)
"""Arrays that files of schema 1 do not hold."""


PATH_SHARE = 0.5
"""Share of what is left of `path_budget` that one step may use up."""


INTERVAL_LEVEL = 0.05
"""Probability with which one interval of `batch_decrease` fails to hold the mean, at most."""


LOSS_SCALED_DECREASE = 2 - 1 / math.log(2)
"""a of the loss-scaled step: (D) holds with it, .557, where B bounds ‖∇²L‖ / q̄."""


INTEGERS = ("epoch", "probe_epoch", "subset_ids", "seen")
"""Arrays whose dtype is one of integers: they count, or index."""


REQUIRED = ("epoch", "loss", "grad_sq_norm", "drift", "loss_scale", "learning_rate", "n", "c", "p")


KERNEL_LOST, HESSIAN_LOST = 1, 2
"""Flags of `probe_untrusted`."""
