"""Small records whose numbers are known: gradient descent on a diagonal linear and a diagonal logistic regression."""

import numpy as np

from lplr_jax.records import Record

EIGENVALUES = np.array([0.5, 1.0, 2.0])
"""Eigenvalues of the kernel."""
ETA = 0.2
EPOCHS = 20
PROBES = np.array([0, 10, 20])


def linear_regression() -> Record:
    """Return the record of gradient descent on L = ½ Σ (√λ_i θ_i - 1)² from θ = 0, where Θ = diag(λ) for every θ.

    Every mode of the residual contracts by 1 - η λ_i a step, so that L_Θ = 0, β = λ_max and μ = λ_min.
    """
    least, largest, n = EIGENVALUES[0], EIGENVALUES[-1], EIGENVALUES.size
    epoch = np.arange(EPOCHS + 1)
    modes = (1 - ETA * EIGENVALUES) ** epoch[:, None]
    theta = (1 - modes) / np.sqrt(EIGENVALUES)
    gradient = -np.sqrt(EIGENVALUES) * modes
    eps = float(np.finfo(np.float64).eps)
    length = ETA * np.linalg.norm(gradient, axis=1)
    unknown_last = np.where(epoch < EPOCHS, 1.0, np.nan)
    at, k = PROBES, PROBES.size
    error = 4 * n * eps * largest
    rayleigh = (modes**2 @ EIGENVALUES / (modes**2).sum(axis=1))[at]
    way = theta[at] - theta[at[-1]]
    series = {
        "epoch": epoch,
        "loss": 0.5 * (modes**2).sum(axis=1),
        "grad_sq_norm": (gradient**2).sum(axis=1),
        "drift": np.linalg.norm(theta, axis=1),
        "step_size": ETA * unknown_last,
        "step_deviation": 0.0 * unknown_last,
        "step_rounding": (np.linalg.norm(np.spacing(theta[-1])) / length + 4 * eps) * unknown_last,
        "seen": np.ones(epoch.size, np.int64),
    }
    probes = {
        "probe_epoch": at,
        "probe_loss": series["loss"][at],
        "probe_grad_sq_norm": series["grad_sq_norm"][at],
        "ntk_min_eig": np.full(k, least),
        "ntk_min_eig_lower": np.full(k, least - error),
        "ntk_min_eig_upper": np.full(k, least + error),
        "ntk_max_eig": np.full(k, largest),
        "ntk_rayleigh": rayleigh,
        "ntk_shift": np.zeros(k),
        "ntk_assembly_error": np.full(k, error),
        "sharpness": np.full(k, largest),
        "curvature_min": np.full(k, least),
        "lqcr_inner": (gradient[at] * way).sum(axis=1),
        "spectrum": np.tile(EIGENVALUES, (k, 1)),
        "residual_energy": modes[at] ** 2 / (modes[at] ** 2).sum(axis=1, keepdims=True),
        "ntk_pair_shift": np.zeros((k, k)),
        "param_pair_distance": np.linalg.norm(theta[at][:, None] - theta[at][None], axis=2),
    }
    numbers = {
        "ntk_lipschitz_lower": 0.0,
        "ntk_lipschitz_upper": 0.0,
        "jacobian_lipschitz_upper": 0.0,
        "smoothness_upper": largest * (1 + 1e-3),
        "radius_certified": np.inf,
        "parameter_spacing": 0.0,
        "parameter_eps": eps,
        "affine_in_parameters": 1,
        "loss_floor_lower": 0.0,
        "interpolant_residual": 0.0,
        "interpolant_min_eig_lower": least - error,
        "interpolant_jacobian_lipschitz": 0.0,
        "interpolant_ball": 0.0,
        "interpolant_distance": np.linalg.norm(1 / np.sqrt(EIGENVALUES)) * (1 + 4 * eps),
        "interpolant_stationarity": 0.0,
        "interpolant_steps": 1,
        "loss_scale": 1.0,
        "learning_rate": ETA,
        "n": n,
        "c": 1,
        "p": n,
    }
    arrays = {**series, **probes, **{name: np.asarray(value) for name, value in numbers.items()}}
    return Record("example", arrays, {})


def logistic_regression() -> Record:
    """Return the record of gradient descent on the mean of log(1 + exp(-√λ_i θ_i)) from θ = 0, in float64.

    Every sample has a parameter of its own, so Θ = diag(λ), and L falls as 1/t for ever.
    """
    n, root = EIGENVALUES.size, np.sqrt(EIGENVALUES)
    theta = np.zeros((EPOCHS + 1, n))
    for t in range(EPOCHS):
        theta[t + 1] = theta[t] + ETA * root / (1 + np.exp(root * theta[t])) / n
    values = np.log1p(np.exp(-root * theta))
    g = -1 / (1 + np.exp(root * theta))
    squared = linear_regression()
    at, size = PROBES, (g**2).sum(axis=1)
    slope = (g**2 * EIGENVALUES).sum(axis=1) / n**2
    gradient, way = root * g / n, theta[at] - theta[at[-1]]
    arrays = {
        **{name: array for name, array in squared.arrays.items() if not name.startswith(("interpolant", "loss_floor"))},
        "loss": values.mean(axis=1),
        "grad_sq_norm": slope,
        "drift": np.linalg.norm(theta, axis=1),
        "step_rounding": squared["step_rounding"] + 1e-12,
        "probe_loss": values.mean(axis=1)[at],
        "probe_grad_sq_norm": slope[at],
        "ntk_rayleigh": ((g**2 @ EIGENVALUES) / size)[at],
        "sharpness": (EIGENVALUES * -g * (1 + g)).max(axis=1)[at] / n,
        "curvature_min": (EIGENVALUES * -g * (1 + g)).min(axis=1)[at] / n,
        "lqcr_inner": (gradient[at] * way).sum(axis=1),
        "residual_energy": g[at] ** 2 / size[at][:, None],
        "param_pair_distance": np.linalg.norm(theta[at][:, None] - theta[at][None], axis=2),
        "smoothness_upper": np.asarray(EIGENVALUES[-1] / 4 / n * (1 + 1e-3)),
        "loss_scale": np.asarray(float(n)),
        "output_grad_norm": np.sqrt(size)[at],
        "output_norm": np.linalg.norm(root * theta, axis=1)[at],
        "sample_bound_sum": size[at],
        "samples_beyond": (values > np.log(2)).sum(axis=1)[at].astype(float),
        "margin_max": np.asarray(0.0),
        "margin_slope_upper": np.asarray(root[-1] * (1 + 1e-9)),
    }
    return Record("example", arrays, {}, loss="logistic")
