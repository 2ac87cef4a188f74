"""Where the gradient lies in the spectrum of the kernel, probe by probe."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.records import Record


@dataclass(frozen=True)
class Position:
    """The Rayleigh quotient ρ = gᵀΘg/‖g‖² of the probes that keep a spectrum, against that spectrum.

    ½‖∇L‖² = ρ‖g‖²/(2 s²), so ρ is what λ_min stands for in the bound by λ_min, and λ_k A_k in that by the top k
    eigenvectors, A_k the share of ‖g‖² along them: the shares say how much of ½‖∇L‖² each bound accounts for.

    Attributes:
        steps: step numbers of these probes.
        rayleigh: ρ.
        above: eigenvalues that are at least ρ, as a share of all; NaN where the record keeps too few to tell.
        least_share: λ_min/ρ, at least 0.
        floor_share: the largest λ_k A_k/ρ over k.
        best: the k of it.
    """

    steps: Int[np.ndarray, " k"]
    rayleigh: Float[np.ndarray, " k"]
    above: Float[np.ndarray, " k"]
    least_share: Float[np.ndarray, " k"]
    floor_share: Float[np.ndarray, " k"]
    best: Int[np.ndarray, " k"]


def position_of(record: Record) -> Position | None:
    """Return where the gradient lies in the spectra of a record; None where no probe keeps one.

    Of a spectrum that keeps the largest eigenvalues alone, the best k is one of theirs.
    """
    names = ("spectrum", "residual_energy", "ntk_rayleigh", "ntk_min_eig")
    if not all(name in record for name in names):
        return None
    values, shares = (np.asarray(record[name], np.float64)[:, ::-1] for name in names[:2])
    rayleigh, least = (np.asarray(record[name], np.float64) for name in names[2:])
    kept = np.isfinite(values).all(axis=1) & np.isfinite(shares).all(axis=1) & (rayleigh > 0) & np.isfinite(least)
    if not kept.any():
        return None
    values, shares, rayleigh, least = values[kept], shares[kept], rayleigh[kept], least[kept]
    samples = int(record["kernel_samples"] if "kernel_samples" in record else record["n"])
    trace = "kernel_trace" in record and float(record["kernel_trace"]) == 1
    rows = samples if trace else samples * int(record["c"])
    above = np.sum(values >= rayleigh[:, None], axis=1)
    hidden = (above == values.shape[1]) & (values.shape[1] < rows)
    bounds = np.maximum(values, 0.0) * np.cumsum(shares, axis=1) / rayleigh[:, None]
    best = np.argmax(bounds, axis=1)
    return Position(
        np.asarray(record["probe_epoch"])[kept].astype(np.int64),
        rayleigh,
        np.where(hidden, np.nan, above / rows),
        np.maximum(least, 0.0) / rayleigh,
        bounds[np.arange(best.size), best],
        best + 1,
    )
