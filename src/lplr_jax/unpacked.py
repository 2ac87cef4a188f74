"""λ_min of a symmetric matrix that is kept whole, enclosed: a vector, its Rayleigh quotient, and a shift below it."""

import math
from typing import Any

import numpy as np
import scipy.sparse.linalg
from jaxtyping import Float

from lplr_jax import certificates, shifts

# Up to here the shift is found by bisection; above, one factorisation at a shift from the a-priori error bound.
_BISECTION_MAX = 4000
_BISECTION_STEPS = 60
# Fourfold steps of that number lead from rounding to beyond any spectrum.
_TRIES = 64


class _Unpacked:
    """A matrix and the factor of its last test."""

    def __init__(self, a: Float[np.ndarray, "n n"]) -> None:
        self.a, self._work = a, np.empty(a.shape, order="F")

    def diagonal(self) -> Float[np.ndarray, " n"]:
        return self.a.diagonal()

    def product(self) -> Any:
        return self.a

    def test(self, shift: float, *, scaled: bool = False) -> bool:
        return certificates.cholesky_test(self.a, shift, self._work, scaled=scaled)

    def solve(self, vector: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        return certificates.solve(self._work, vector)


def interval(a: Float[np.ndarray, "n n"], asymmetry: float) -> tuple[float, float, float, str]:
    """Return value, proved lower, proved upper, and what went wrong, for a matrix with entries in the safe range."""
    n, matrix = a.shape[0], _Unpacked(a)
    vector, floor, reason = _least_vector(matrix)
    value, upper = certificates.rayleigh(a, vector)
    if not math.isfinite(upper):
        reason = reason or "the eigensolver returned no finite vector"
        vector = np.zeros(n)
        vector[int(np.argmin(a.diagonal()))] = 1.0
        value, upper = certificates.rayleigh(a, vector)
    if n <= _BISECTION_MAX:
        lower, vector = _bisect(matrix, vector, value, upper, floor)
        refined, bound = certificates.rayleigh(a, vector)
        if bound < upper:
            value, upper = refined, bound
    else:
        lower = _one_shift(matrix, vector, value, upper, floor)
    # The factorisation read one triangle: A and that matrix differ by at most n max |a - aᵀ| in spectral norm.
    if asymmetry:
        lower = certificates.down(lower - certificates.up(asymmetry))
        upper = certificates.up(upper + certificates.up(asymmetry))
    return min(max(value, lower), upper), lower, upper, reason


def _least_vector(matrix: _Unpacked) -> tuple[Float[np.ndarray, " n"], float, str]:
    """Return an approximate eigenvector of λ_min, a proved lower bound, and what went wrong."""
    a = matrix.a
    n = a.shape[0]
    bound = certificates.row_sum_bound(a)
    if n <= shifts.DENSE_MAX:
        vector, reason = shifts.dense_least_vector(a)
        return vector, -bound, reason
    shift = shifts.factor_below(matrix, bound, tries=_TRIES)
    if shift is None:
        return np.full(n, np.nan), -bound, "no Cholesky factorisation of the shifted matrix succeeded"
    inverse = scipy.sparse.linalg.LinearOperator(
        shape=(n, n),
        matvec=matrix.solve,  # pyright: ignore[reportCallIssue]
        dtype=a.dtype,
    )
    try:
        _, vectors = shifts.arpack(a, sigma=shift, OPinv=inverse, ncv=12, tol=1e-7, maxiter=50)
    except scipy.sparse.linalg.ArpackError as error:
        return shifts.inverse_iteration(matrix.solve, shifts.start(n), steps=3), shift, f"shift-invert Lanczos: {error}"
    return vectors[:, 0], shift, ""


def _bisect(
    matrix: _Unpacked,
    vector: Float[np.ndarray, " n"],
    value: float,
    upper: float,
    floor: float,
) -> tuple[float, Float[np.ndarray, " n"]]:
    """Return the largest shift that the Cholesky test proves, and the vector refined with its factor."""
    lower, ceiling, step, diagonal = floor, math.inf, 0.0, matrix.diagonal()
    for attempt in range(_BISECTION_STEPS):
        costs = [shifts.along(diagonal, vector, value, scaled=scaled) for scaled in (False, True)]
        # What the test must lose, what the value is likely to be off, and the spacing of doubles.
        noise = 1.05 * min(costs) + 0.1 * max(upper - value, 0.0) + 4.0 * certificates.UNIT * abs(value)
        top = min(ceiling, value)
        if attempt and top - lower <= 1.5 * noise:
            break
        if ceiling < math.inf and lower > floor:
            shift = 0.5 * (lower + ceiling)
        else:
            step = max(4.0 * step, noise) if ceiling < math.inf else noise
            shift = value - step
        if shift <= lower:
            break
        order = (False, True) if costs[0] <= costs[1] else (True, False)
        if not any(matrix.test(shift, scaled=scaled) for scaled in order):
            ceiling = shift
            continue
        lower = shift
        candidate = shifts.inverse_iteration(matrix.solve, vector, steps=2)
        refined, bound = certificates.rayleigh(matrix.a, candidate)
        if bound < upper:
            vector, value, upper = candidate, refined, bound
    return lower, vector


def _one_shift(
    matrix: _Unpacked,
    vector: Float[np.ndarray, " n"],
    value: float,
    upper: float,
    floor: float,
) -> float:
    """Return a proved lower bound from one factorisation just below the value; a second, farther one if that fails."""
    noise = (
        1.1 * shifts.along(matrix.diagonal(), vector, value, scaled=False) + 2.0 * (upper - value) + 1e-9 * abs(value)
    )
    for shift in (value - noise, value - 64.0 * noise):
        if shift > floor and matrix.test(shift):
            return shift
    return floor
