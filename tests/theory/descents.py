"""Gradient descent in closed form as records, with any η_t: diagonal regression, a catapult, a kernel that stalls."""

import numpy as np

from lplr_jax.records import Record

EPS = 2.0**-52


def record_of(loss, gradient, sizes, drift, *, spectra, energies, probes, p, scale=1.0, **more):
    """A record of series and spectra; steps are along the gradient, to rounding in float64."""
    epoch, last = np.arange(loss.size), np.full(loss.size - 1, 4 * EPS)
    spectra, energies = np.asarray(spectra, float), np.asarray(energies, float)
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = energies / energies.sum(axis=1, keepdims=True)
    arrays = {
        "epoch": epoch,
        "loss": loss,
        "grad_sq_norm": gradient,
        "drift": drift,
        "step_size": np.append(sizes, np.nan),
        "step_deviation": np.append(0 * last, np.nan),
        "step_rounding": np.append(last, np.nan),
        "seen": np.ones(epoch.size, np.int64),
        "probe_epoch": np.asarray(probes),
        "probe_loss": loss[probes],
        "probe_grad_sq_norm": gradient[probes],
        "ntk_min_eig": spectra[:, 0],
        "ntk_max_eig": spectra[:, -1],
        "ntk_assembly_error": np.full(len(probes), 1e-13),
        "spectrum": spectra,
        "residual_energy": shares,
        "parameter_eps": EPS,
        "parameter_spacing": 0.0,
        "loss_scale": scale,
        "learning_rate": sizes[0],
        "n": spectra.shape[1],
        "c": 1,
        "p": p,
        **more,
    }
    return Record("closed-form", {name: np.asarray(array) for name, array in arrays.items()}, {})


def regression(eigenvalues, weights, sizes, probes, scale=1.0):
    """Gradient descent on ‖r‖²/(2 s), r_j(0) = -weights_j along the j-th eigenvector: r_j shrinks by 1 - η_t λ_j/s."""
    eigenvalues, weights, sizes = (np.asarray(a, float) for a in (eigenvalues, weights, sizes))
    steps = 1 - sizes[:, None] * eigenvalues / scale
    modes = -weights * np.concatenate([np.ones((1, weights.size)), np.cumprod(steps, axis=0)])
    theta = (modes + weights) / np.sqrt(eigenvalues)
    return record_of(
        (modes**2).sum(axis=1) / (2 * scale),
        (modes**2 @ eigenvalues) / scale**2,
        sizes,
        np.linalg.norm(theta, axis=1),
        spectra=np.tile(eigenvalues, (len(probes), 1)),
        energies=modes[probes] ** 2,
        probes=probes,
        p=weights.size,
        scale=scale,
    )


def catapult(eta=2.8, steps=20):
    """f = u v with target 0 from (1, 0.01), where Θ = u² + v²: the loss rises while ηΘ > 2, and falls to 0 after."""
    way = [np.array([1.0, 0.01])]
    for _ in range(steps):
        u, v = way[-1]
        way.append(way[-1] - eta * u * v * np.array([v, u]))
    u, v = np.array(way).T
    kernel, probes = u**2 + v**2, [0, steps]
    return record_of(
        0.5 * (u * v) ** 2,
        (u * v) ** 2 * kernel,
        np.full(steps, eta),
        np.linalg.norm(np.array(way) - way[0], axis=1),
        spectra=kernel[probes, None],
        energies=np.ones((2, 1)),
        probes=probes,
        p=2,
    )


def stalled(steps=20, eta=0.1, rate=4.0):
    """One mode whose kernel is 4 at every probe, and 1e-4 between them: the loss falls by less than the probes say."""
    probes = np.array([0, steps // 2, steps])
    kernel = np.full(steps + 1, 1e-4)
    kernel[probes] = rate
    residual = np.concatenate([[1.0], np.cumprod(1 - eta * kernel[:-1])])
    gradient = residual**2 * kernel
    return record_of(
        residual**2 / 2,
        gradient,
        np.full(steps, eta),
        np.concatenate([[0.0], np.cumsum(eta * np.sqrt(gradient[:-1]))]),
        spectra=np.full((3, 1), rate),
        energies=np.ones((3, 1)),
        probes=probes,
        p=1,
    )
