"""What the searches for an interval of λ_min share, however the matrix is kept: a vector, and a shift below λ_min."""

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float

from lplr_jax import certificates

DENSE_MAX = 400
"""Rows up to which a dense solver for one eigenpair is cheaper than Cholesky with inverse iteration, on two cores."""


@runtime_checkable
class Shifted(Protocol):
    """A symmetric matrix (n, n) that is tested at shifts."""

    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Return the diagonal."""
        ...

    def product(self) -> Any:
        """Return what ARPACK multiplies by: the matrix, or a `LinearOperator`."""
        ...

    def test(self, shift: float, *, scaled: bool = False) -> bool:
        """Prove λ_min >= shift by one Cholesky factorisation and leave its factor, or fail to."""
        ...


def arpack(a: Any, **settings: Any) -> Any:
    """Return one eigenpair by SciPy's `eigsh`, start and restarts drawn from a fixed seed: same matrix, same bits.

    Args:
        a: symmetric, (n, n): an array, or what multiplies vectors as `LinearOperator` does.
        **settings: as `scipy.sparse.linalg.eigsh` takes them.

    Raises:
        scipy.sparse.linalg.ArpackError: if it does not converge.
    """
    return scipy.sparse.linalg.eigsh(a, k=1, v0=start(a.shape[0]), rng=np.random.default_rng(0), **settings)


def start(n: int) -> Float[np.ndarray, " n"]:
    """Return a vector from a fixed seed."""
    return np.random.default_rng(0).standard_normal(n)


def inverse_iteration(
    solve: Callable[[np.ndarray], np.ndarray], vector: Float[np.ndarray, " n"], *, steps: int
) -> Float[np.ndarray, " n"]:
    """Return a vector after some solves with the factor that a test left; as it came where one is not finite."""
    for _ in range(steps):
        image = solve(vector)
        size = float(np.abs(image).max())
        if not (math.isfinite(size) and size > 0.0):
            return vector
        vector = image / size
    return vector


def along(diagonal: Float[np.ndarray, " n"], vector: Float[np.ndarray, " n"], shift: float, *, scaled: bool) -> float:
    """Return what the error bound of the test costs along a vector: Σ c_i v_i² / Σ v_i²."""
    weight = np.square(vector)
    return float(certificates.cholesky_error(diagonal, shift, scaled=scaled) @ weight / weight.sum())


def factor_below(matrix: Shifted, bound: float, *, tries: int) -> float | None:
    """Leave the factor of A - shift I for a proved shift below λ_min, near zero where A is positive.

    Args:
        matrix: A.
        bound: of ‖A‖₂.
        tries: how often an indefinite matrix is tested farther and farther below its Ritz value.

    Returns:
        The shift; None where no factorisation succeeds.
    """
    noise = float(certificates.cholesky_error(matrix.diagonal(), -bound).max())
    for shift in (0.0, -4.0 * noise):
        if matrix.test(shift):
            return shift
    # Indefinite: a Ritz value places the shift, and the distance grows until it lies below the spectrum.
    try:
        least = float(arpack(matrix.product(), which="SA", tol=1e-3, maxiter=20, return_eigenvectors=False)[0])
    except scipy.sparse.linalg.ArpackError:
        least = 0.0
    distance = 0.05 * abs(least) + 8.0 * noise
    for _ in range(tries):
        if least - distance <= -bound:
            break
        if matrix.test(least - distance):
            return least - distance
        distance *= 4.0
    shift = -bound - 8.0 * noise
    return shift if matrix.test(shift) else None


def dense_least_vector(a: Float[np.ndarray, "n n"]) -> tuple[Float[np.ndarray, " n"], str]:
    """Return an eigenvector of λ_min by LAPACK, and what went wrong."""
    try:
        _, vectors = scipy.linalg.eigh(a, subset_by_index=[0, 0], check_finite=False)
    except scipy.linalg.LinAlgError as error:
        return np.full(a.shape[0], np.nan), f"LAPACK's eigensolver failed: {error}"
    return vectors[:, 0], ""
