"""λ_min by a Cholesky factorisation from elsewhere, several GPUs for one, proved whatever it returns.

For any real L, L Lᵀ ≽ 0, so λ_min(A) >= s - ‖A - s I - L Lᵀ‖₂. The norm is bounded here, on the host, from A and L
alone: an engine that rounds coarsely, or lies, costs width of the interval and never its truth.
"""

import itertools
import math
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float

from lplr_jax import certificates, checks, shifts

Cholesky = Callable[[np.ndarray, float], Any]
"""From A, float64 (n, n), not to be written to, and a shift s to a lower factor L, (n, n), of A - s I = L Lᵀ, its upper
triangle ignored. A matrix that is not positive definite gives NaN, None, or a `LinAlgError`."""

_BLOCK = 512
_TRIES = 12
_STEPS = 5
_NO_FACTOR = "cholesky gave no factor of the shifted matrix"


def residual_bound(matrix: Float[np.ndarray, "n n"], factor: Float[np.ndarray, "n n"], shift: float) -> float:
    """Return a proved upper bound of ‖A - s I - L Lᵀ‖₂.

    Derivation. Let R = A - s I - L Lᵀ and R̂ what is computed, in the lower triangle, and mirrored. An entry of L Lᵀ is
    an inner product of at most n terms, in error by at most γ_n (|L||L|ᵀ)_ij; the two subtractions are in error by at
    most u times their results. So |R̂ - R| <= γ_n |L||L|ᵀ + u |R̂| + u diag|a_ii - s|, and an operation that underflows
    loses at most η, 2 n + 2 of them in an entry. ‖R̂‖₂ is at most its largest row sum, and at most ‖R̂‖_F; ‖ |L||L|ᵀ ‖₂
    at most its largest row sum, and at most ‖L‖_F². Costs n³ / 6 multiply-adds in products of blocks, as many as the
    factorisation itself.

    Args:
        matrix: A, of which the lower triangle is read; entries below 2⁴⁰⁰.
        factor: L, of which the lower triangle is read; any numbers.
        shift: s.

    Returns:
        The bound; infinity where an entry of L is not finite or the bound overflows.
    """
    n, cuts = matrix.shape[0], [*range(0, matrix.shape[0], _BLOCK), matrix.shape[0]]
    spans = [slice(a, b) for a, b in itertools.pairwise(cuts)]
    sums, squares, moved = np.zeros(n), [], 0.0
    size, through, mass = np.zeros(n), np.zeros(n), []
    with np.errstate(all="ignore"):
        for rows in spans:
            low = np.tril(factor[rows, : rows.stop], rows.start)
            size[: rows.stop] += np.abs(low).sum(axis=0)
            mass.append(float(np.square(low).sum()))
            for cols in spans[: spans.index(rows) + 1]:
                right = np.tril(factor[cols, : cols.stop], cols.start)
                value, same = np.array(matrix[rows, cols]), rows == cols
                if same:
                    index = np.arange(value.shape[0])
                    value[index, index] -= shift
                    moved = max(moved, float(np.abs(value[index, index]).max()))
                value -= low[:, : cols.stop] @ right.T
                value = np.abs(np.tril(value) + np.tril(value, -1).T if same else value)
                sums[rows] += value.sum(axis=1)
                squares.append(float(np.square(value).sum()) * (1.0 if same else 2.0))
                if not same:
                    sums[cols] += value.sum(axis=0)
        for rows in spans:
            through[rows] = np.abs(np.tril(factor[rows, : rows.stop], rows.start)) @ size[: rows.stop]
        found = float(sums.max()), float(through.max()), sum(squares), sum(mass)
    if not all(map(math.isfinite, found)):
        return math.inf
    # Sums of non-negative numbers, of at most n² terms whatever the order; a square that underflows loses η.
    slack = (1.0 + 2.0 * certificates.gamma(n * n + 2 * n)) * certificates.SLACK
    lost = 4.0 * n * n * certificates.TINY
    largest = min(found[0] * slack, certificates.up(math.sqrt((found[2] + lost) * slack)))
    products = min(found[1], found[3]) * slack + lost
    underflow = n * (2.0 * n + 2.0) * certificates.TINY
    rounding = (certificates.gamma(n) * products + certificates.UNIT * (largest + moved)) * certificates.SLACK
    return certificates.up((largest + rounding + underflow) * certificates.SLACK)


class _Engine:
    """An engine at a matrix, its last usable factor, and the best bound that followed."""

    def __init__(self, a: Float[np.ndarray, "n n"], cholesky: Cholesky, floor: float) -> None:
        self.a, self._cholesky, self.lower = a, cholesky, floor
        self._shown = a.view()
        self._shown.flags.writeable = False
        self._checksum = zlib.crc32(np.ascontiguousarray(a))  # pyright: ignore[reportArgumentType]
        self.factor: Any = None
        self.error = math.inf

    def at(self, shift: float) -> bool:
        """Return whether A - shift I got a factor of finite residual; `lower` is then what all of them prove."""
        if shift >= float(self.a.diagonal().min()):
            return False
        try:
            found = self._cholesky(self._shown, shift)
        except np.linalg.LinAlgError:
            return False
        if zlib.crc32(np.ascontiguousarray(self.a)) != self._checksum:  # pyright: ignore[reportArgumentType]
            raise ValueError("cholesky wrote to the matrix that it was given; let it work on a copy")
        if found is None:
            return False
        factor = checks.as_array(found)
        if factor is None or factor.shape != self.a.shape or not np.issubdtype(factor.dtype, np.floating):
            raise TypeError(
                f"cholesky must return a real lower factor of shape {self.a.shape}, None or NaN, "
                f"got {checks.shown(found)}"
            )
        # Whatever a wider type loses here, what is kept is what the bound is about.
        factor = factor.astype(np.float64, copy=False)
        error = residual_bound(self.a, factor, shift)
        if not math.isfinite(error):
            return False
        self.lower = max(self.lower, certificates.down(shift - error))
        self.error = min(self.error, error)
        if not factor.diagonal().all():  # proves what it proves, and solves nothing
            return False
        self.factor = factor
        return True

    def solve(self, vector: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        with np.errstate(all="ignore"):
            half = scipy.linalg.solve_triangular(self.factor, vector, lower=True, check_finite=False)
            return scipy.linalg.solve_triangular(self.factor, half, lower=True, trans=1, check_finite=False)


def interval(a: Float[np.ndarray, "n n"], asymmetry: float, cholesky: Cholesky) -> tuple[float, float, float, str]:
    """Return value, proved lower, proved upper, and what went wrong, by a factorisation from elsewhere.

    Args:
        a: symmetric, entries below 2⁴⁰⁰.
        asymmetry: bound on the spectral norm of A less its lower triangle mirrored.
        cholesky: the engine.

    Raises:
        TypeError: for a factor that is no real matrix (n, n).
        ValueError: for an engine that writes to the matrix.
    """
    bound = certificates.row_sum_bound(a)
    engine = _Engine(a, cholesky, -bound)
    vector, reason = _least_vector(engine, bound)
    value, upper = certificates.rayleigh(a, vector)
    if not math.isfinite(upper):
        reason = reason or "the eigensolver returned no finite vector"
        vector = np.zeros(a.shape[0])
        vector[int(np.argmin(a.diagonal()))] = 1.0
        value, upper = certificates.rayleigh(a, vector)
    diagonal, failed = a.diagonal(), 0
    for _ in range(_TRIES):
        noise = 1.1 * shifts.along(diagonal, vector, value, scaled=False) + 2.0 * (upper - value) + 1e-9 * abs(value)
        shift = value - noise * 16.0**failed
        if shift <= engine.lower:
            break
        if not engine.at(shift):
            failed += 1
            continue
        turned = shifts.inverse_iteration(engine.solve, vector, steps=_STEPS)
        refined, least = certificates.rayleigh(a, turned)
        if not least < upper - noise:
            value, upper = (refined, least) if least < upper else (value, upper)
            break
        # The vector was off: the next shift starts from a better one.
        vector, value, upper, failed = turned, refined, least, 0
    if math.isinf(engine.error):
        reason = reason or _NO_FACTOR
    elif engine.error > abs(value):
        reason = reason or f"the best factor of cholesky leaves a residual of {engine.error:.3g}, more than the value"
    lower = engine.lower
    if asymmetry:
        lower = certificates.down(lower - certificates.up(asymmetry))
        upper = certificates.up(upper + certificates.up(asymmetry))
    return min(max(value, lower), upper), lower, upper, reason


def _least_vector(engine: _Engine, bound: float) -> tuple[Float[np.ndarray, " n"], str]:
    """Return an approximate eigenvector of λ_min, and what went wrong."""
    a = engine.a
    n = a.shape[0]
    if n <= shifts.DENSE_MAX:
        return shifts.dense_least_vector(a)
    shift = _factor_below(engine, bound)
    if shift is None:
        return np.full(n, np.nan), _NO_FACTOR
    inverse = scipy.sparse.linalg.LinearOperator(shape=(n, n), matvec=engine.solve, dtype=a.dtype)  # pyright: ignore
    try:
        _, vectors = shifts.arpack(a, sigma=shift, OPinv=inverse, ncv=12, tol=1e-7, maxiter=50)
    except scipy.sparse.linalg.ArpackError as error:
        turned = shifts.inverse_iteration(engine.solve, shifts.start(n), steps=_STEPS)
        return turned, f"shift-invert Lanczos: {error}"
    return vectors[:, 0], ""


def _factor_below(engine: _Engine, bound: float) -> float | None:
    """Leave a factor of A - s I for a shift s below λ_min, zero where A is positive; None where there is none."""
    if engine.at(0.0):
        return 0.0
    try:
        least = float(shifts.arpack(engine.a, which="SA", tol=1e-3, maxiter=20, return_eigenvectors=False)[0])
    except scipy.sparse.linalg.ArpackError:
        least = 0.0
    noise = float(certificates.cholesky_error(engine.a.diagonal(), -bound).max())
    for k in range(_TRIES):
        shift = max(least - (0.05 * abs(least) + 8.0 * noise) * 16.0**k, -2.0 * bound)
        if engine.at(shift):
            return shift
        if shift <= -2.0 * bound:
            break
    return None
