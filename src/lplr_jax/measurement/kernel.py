"""What a probe measures of a full kernel, and of loss and gradient beside it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax import certificates, diagnostics, linalg
from lplr_jax.diagnostics.kernel import certified_min_eig, min_eig_within
from lplr_jax.parameters import count_parameters
from lplr_jax.proofs.rounding import AssemblyBound
from lplr_jax.types import ApplyFn, Params


def min_eig_with_assembly(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    theta: Float[np.ndarray, "nc nc"],
    *,
    bound: AssemblyBound | None = None,
) -> tuple[linalg.MinEig, float]:
    """Return λ_min of a computed kernel with an interval that includes its assembly error, and that error.

    Args:
        apply_fn: the function whose kernel it is.
        params: its parameters.
        x: inputs.
        theta: the kernel.
        bound: the error of its assembly, where it is at hand; None for one that costs no more than a kernel.

    Returns:
        The eigenvalue; and a bound on ‖Θ_computed - Θ‖₂, NaN where none is known: then the interval is relative to the
        computed kernel.
    """
    if bound is not None:
        least = min_eig_within(theta, bound, count_parameters(params))
    else:
        least = certified_min_eig(apply_fn, params, x, theta, proof="never")
    if not least.proved:
        return least, math.nan
    return least, AssemblyBound(least.assembly_error, least.factor_error).kernel_error(theta)


WHOLE = 1024
"""Rows of a kernel up to which a record keeps its whole spectrum. Calibrated: 41 probes are below a megabyte."""
LARGEST = 200
"""Eigenvalues that a record keeps of a larger kernel, beside the sum of the others. Calibrated."""


def max_eig_upper(theta: Float[np.ndarray, "nc nc"], error: float, largest: float | None = None) -> float:
    """Return a proved upper bound of λ_max of every symmetric matrix within `error` of the given one; NaN for NaN.

    Args:
        theta: the matrix.
        error: of the matrix, in spectral norm.
        largest: an estimate of λ_max; None has it computed.
    """
    if math.isnan(error):
        return math.nan
    bound = certificates.row_sum_bound(theta)
    # A tighter one where a Cholesky factorisation of shift - Θ succeeds; a tenth of a per cent of room is for rounding.
    shift = (linalg.max_eig(theta) if largest is None else largest) * (1 + 1e-3)
    if 2.0**-300 < shift < bound and certificates.cholesky_test(-theta, -shift, np.empty(theta.shape, order="F")):
        bound = shift
    return certificates.up(bound + error)


def spectrum_and_energy(
    theta: Float[np.ndarray, "nc nc"], gradient: Float[np.ndarray, "n c"]
) -> tuple[Float[np.ndarray, " nc"], Float[np.ndarray, " nc"]]:
    """Return the eigenvalues of a kernel, ascending, and the share of ‖g‖² along each eigenvector.

    Raises:
        ValueError: for more than `linalg.EIGH_ROWS` rows.
        linalg.UntrustedError: if LAPACK returns numbers that are not finite.
    """
    if theta.shape[0] > linalg.EIGH_ROWS:
        raise ValueError(
            f"a kernel of {theta.shape[0]} rows has no dense eigendecomposition: LAPACK counts its workspace in 32 "
            f"bits, enough for {linalg.EIGH_ROWS} rows; λ_min and λ_max are enclosed all the same, and a subset of "
            "the samples has a spectrum"
        )
    values, vectors = np.linalg.eigh(theta)
    if not (np.isfinite(values).all() and np.isfinite(vectors).all()):
        raise linalg.UntrustedError("LAPACK's eigensolver returned numbers that are not finite")
    flat = gradient.reshape(-1)
    energy = np.square(flat @ vectors)
    total = energy.sum()
    return values, energy / total if total > 0 else np.full_like(energy, np.nan)


def recorded_spectra(spectra: Sequence[tuple[np.ndarray, np.ndarray] | None]) -> dict[str, np.ndarray]:
    """Return what a record keeps of the spectra and energies of its probes, by record name; None for none of a probe.

    Kernels of more than `WHOLE` rows leave their `LARGEST` eigenvalues and the sums of the others.
    """
    size = next(values.size for values, _ in filter(None, spectra))
    kept = size if size <= WHOLE else LARGEST
    found = {name: np.full((len(spectra), kept), np.nan) for name in ("spectrum", "residual_energy")}
    rest = {name: np.full(len(spectra), np.nan) for name in ("spectrum_rest", "residual_energy_rest")}
    for place, one in enumerate(spectra):
        if one is not None:
            for name, values in zip(("spectrum", "residual_energy"), one, strict=True):
                found[name][place], rest[f"{name}_rest"][place] = values[size - kept :], values[: size - kept].sum()
    return found if kept == size else {**found, **rest}


def kernel_values(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    theta: Float[np.ndarray, "nc nc"],
    point: diagnostics.PointDiagnostics,
    *,
    bound: AssemblyBound | None = None,
) -> dict[str, float]:
    """Return what a probe measures of a full kernel and of loss and gradient at the same point, by record name.

    Raises:
        linalg.UntrustedError: if a number is lost: it is not finite, or no solver gives one.
    """
    least, error = min_eig_with_assembly(apply_fn, params, x, theta, bound=bound)
    values = {
        "ntk_min_eig": least.value,
        "ntk_max_eig": linalg.max_eig(theta),
        "probe_loss": point.loss,
        "probe_grad_sq_norm": point.grad_sq_norm,
    }
    if point.gradient.any():  # g has no direction where it is zero
        values["ntk_rayleigh"] = point.rayleigh(theta)
    lost = [f"{name} = {value}" for name, value in values.items() if not math.isfinite(value)]
    if lost:
        raise linalg.UntrustedError(f"not finite: {', '.join(lost)}")
    return {
        "ntk_rayleigh": math.nan,
        **values,
        "ntk_min_eig_lower": least.lower,
        "ntk_min_eig_upper": least.upper,
        "ntk_assembly_error": error,
        "ntk_max_eig_upper": max_eig_upper(theta, error, values["ntk_max_eig"]),
    }
