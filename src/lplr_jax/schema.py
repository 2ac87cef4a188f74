"""Every name, unit and meaning of a record's arrays."""

from typing import NamedTuple


class Entry(NamedTuple):
    """What one array of a record is."""

    dims: tuple[str, ...]
    units: str
    meaning: str


LOSS = "units of L"


KERNEL = "output² / parameter²"


LIPSCHITZ = "output² / parameter³"


SCHEMA: dict[str, Entry] = {
    "epoch": Entry(("epoch",), "epochs", "epoch t; 0 is the initialisation"),
    "loss": Entry(("epoch",), LOSS, "L(θ_t) on all training data, in training precision"),
    "grad_sq_norm": Entry(("epoch",), "L² / parameter²", "‖∇L(θ_t)‖², in training precision"),
    "drift": Entry(("epoch",), "parameter", "‖θ_t - θ_0‖₂"),
    "accuracy": Entry(("epoch",), "1", "share of training samples whose largest output is that of their class"),
    "probe_epoch": Entry(("probe",), "epochs", "epoch of each kernel probe"),
    "probe_loss": Entry(("probe",), LOSS, "L(θ_t) evaluated in float64"),
    "probe_grad_sq_norm": Entry(("probe",), "L² / parameter²", "‖∇L(θ_t)‖² evaluated in float64"),
    "ntk_min_eig": Entry(("probe",), KERNEL, "λ_min of the full (n c, n c) kernel"),
    "ntk_min_eig_lower": Entry(("probe",), KERNEL, "proved lower bound on λ_min"),
    "ntk_min_eig_upper": Entry(("probe",), KERNEL, "proved upper bound on λ_min"),
    "ntk_max_eig": Entry(("probe",), KERNEL, "λ_max of the full kernel"),
    "ntk_min_eig_subset": Entry(("probe",), KERNEL, "λ_min on the subset, an upper bound of that on all"),
    "ntk_rayleigh": Entry(("probe",), KERNEL, "gᵀΘg / ‖g‖² at g = ∂ℓ/∂f of the probe, r for squared loss"),
    "ntk_effective_rank": Entry(("probe",), "1", "(tr Θ)² / ‖Θ‖_F², between 1 and the number of rows"),
    "ntk_shift": Entry(("probe",), KERNEL, "‖Θ_t - Θ_0‖₂"),
    "sharpness": Entry(("probe",), "L / parameter²", "largest eigenvalue of the Hessian of L; NaN where not measured"),
    "curvature_min": Entry(
        ("probe",), "L / parameter²", "least eigenvalue of the Hessian of L; NaN where not measured"
    ),
    "lqcr_inner": Entry(("probe",), LOSS, "⟨∇L(θ_t), θ_t - θ_T⟩, T the last probe"),
    "ntk_assembly_error": Entry(
        ("probe",), KERNEL, "bound on the assembly error of Θ in spectral norm; finite where the interval includes it"
    ),
    "probe_untrusted": Entry(
        ("probe",),
        "1",
        "1: the kernel's values of this probe are NaN as the arithmetic lost them, 2: the Hessian's, 3: both",
    ),
    "spectrum": Entry(("probe", "eigenvalue"), KERNEL, "eigenvalues of Θ_t, ascending; NaN where not measured"),
    "residual_energy": Entry(
        ("probe", "eigenvalue"), "1", "share of ‖g‖² along each eigenvector of Θ_t; NaN where not measured"
    ),
    "ntk_pair_shift": Entry(("probe", "other_probe"), KERNEL, "‖Θ_s - Θ_t‖₂ for every pair of probes, from below"),
    "param_pair_distance": Entry(("probe", "other_probe"), "parameter", "‖θ_s - θ_t‖₂ for every pair of probes"),
    "ntk_lipschitz_lower": Entry((), LIPSCHITZ, "largest ‖Θ_s - Θ_t‖₂/‖θ_s - θ_t‖ over pairs of probes, less errors"),
    "ntk_lipschitz_random": Entry((), LIPSCHITZ, "lower estimate of L_Θ on the ball of the run, random directions"),
    "ntk_lipschitz_gradient": Entry((), LIPSCHITZ, "the same, along the gradient at θ_0"),
    "ntk_lipschitz_power": Entry((), LIPSCHITZ, "the same, by power iteration on the derivative of the kernel"),
    "ntk_lipschitz_upper": Entry((), LIPSCHITZ, "proved upper bound of L_Θ on the ball of the run; NaN where none"),
    "smoothness_upper": Entry((), "L / parameter²", "proved upper bound of β on the ball of the run; NaN where none"),
    "radius_certified": Entry((), "parameter", "R*: proved that L_Θ(R) R < λ_0 for R < R*; NaN where none"),
    "parameter_spacing": Entry((), "parameter", "2-norm of the spacings of θ_0, each in its own dtype"),
    "parameter_eps": Entry((), "1", "coarsest spacing of 1 among the dtypes of θ; absent: 2^-23, float32"),
    "affine_in_parameters": Entry((), "1", "1 where the program is affine in its parameters, read off its jaxpr"),
    "kernel_samples": Entry((), "samples", "samples of every probe's kernel, loss and gradient; absent: all n"),
    "kernel_trace": Entry((), "1", "1 where the probes hold the output-averaged kernel, (1/c) Σ_o Θ_oo"),
    "subset_ids": Entry(("subset",), "sample numbers", "training samples of the subset"),
    "loss_scale": Entry((), "1", "the number s in L = (1/s) Σ ℓ_i; ‖r‖² / (2 s) for the squared loss"),
    "probe_loss_scale": Entry((), "1", "the number s of the probes' own loss, where the kernel is of a subset"),
    "learning_rate": Entry((), "parameter² / L", "step size η"),
    "n": Entry((), "samples", "training samples"),
    "c": Entry((), "outputs", "outputs per sample"),
    "p": Entry((), "parameters", "parameters"),
}
"""Every array a record may hold. What was not measured is absent."""


REQUIRED = ("epoch", "loss", "grad_sq_norm", "drift", "loss_scale", "learning_rate", "n", "c", "p")


KERNEL_LOST, HESSIAN_LOST = 1, 2
"""Flags of `probe_untrusted`."""
