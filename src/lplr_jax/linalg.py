"""Spectra of symmetric matrices on the host, in float64, with their quality. Knows no networks.

The proofs behind `min_eig` are in `certificates`; here are the searches that feed them.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float

from lplr_jax import certificates, checks, packed, rooms
from lplr_jax.packed import Blocks

# Up to here a dense solver for one eigenpair is cheaper than Cholesky with inverse iteration (measured on two cores).
_DENSE_MAX = 400
# Up to here the shift is found by bisection; above, one factorisation at a shift from the a-priori error bound.
_BISECTION_MAX = 4000
_BISECTION_STEPS = 60


EIGH_ROWS = 32766
"""Rows up to which LAPACK's eigensolvers give vectors: its workspace, 1 + 6 n + 2 n², is counted in 32 bits."""


class UntrustedError(ArithmeticError, ValueError):
    """A number that the arithmetic lost: NaN or infinite entries, a solver that failed. Nothing may be read off it."""


FAILURES = (ArithmeticError, scipy.linalg.LinAlgError, scipy.sparse.linalg.ArpackError)
"""What a computation raises that lost its number, whoever ran it; mistakes of the caller are not among them."""


@dataclass(frozen=True)
class MinEig:
    """Smallest eigenvalue of a symmetric matrix, and how far it can be trusted.

    Attributes:
        value: the computed eigenvalue, in the matrix's units.
        lower: lower bound of λ_min of every symmetric matrix within `assembly_error` of the given one.
        upper: upper bound of the same.
        proved: whether both bounds are proved, given `assumptions`; a proof is about the given matrix and
            `assembly_error`, so it says nothing about a matrix whose assembly error is larger than stated.
        converged: whether the eigensolver reported success; the bounds hold either way.
        assembly_error: bound on the spectral norm of the error of the given matrix, in its units.
        factor_error: bound on the spectral norm of the error of its Gram factor, in the square root of its units.
        assumptions: what the proof takes for granted; empty where nothing is proved.
        reason: why the result is not proved or not converged; empty otherwise.
    """

    value: float
    lower: float
    upper: float
    proved: bool
    converged: bool
    assembly_error: float = 0.0
    factor_error: float = 0.0
    assumptions: tuple[str, ...] = ()
    reason: str = ""

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        word = "proved" if self.proved else f"not proved: {self.reason}" if self.reason else "not proved"
        return f"MinEig({self.value:.9g}, in [{self.lower:.9g}, {self.upper:.9g}], {word})"

    def _repr_html_(self) -> str:
        """Return a small table for a notebook."""
        # Reports stand above, so this door is opened when somebody goes through.
        return rooms.through_door("lplr_jax.linalg", "numbers_html")("smallest eigenvalue", self)

    @property
    def sign(self) -> int:
        """1 or -1 where the interval excludes zero, else 0: undecided."""
        return 1 if self.lower > 0 else -1 if self.upper < 0 else 0


def _checked(matrix: Any) -> tuple[Float[np.ndarray, "n n"], float]:
    """Return the matrix in float64 and its largest |a - aᵀ|; reads blocks of rows, so memory stays at one matrix."""
    a = checks.as_array(matrix)
    if a is None or not (np.issubdtype(a.dtype, np.floating) or np.issubdtype(a.dtype, np.integer)):
        raise TypeError(
            f"expected a real matrix of shape (n, n), got {checks.shown(matrix)}, "
            f"{'no array' if a is None else f'dtype {a.dtype}'}"
        )
    a = a.astype(np.float64, copy=False)
    if a.ndim != 2 or a.shape[0] != a.shape[1] or a.shape[0] == 0:
        raise ValueError(f"expected a square matrix of shape (n, n) with n >= 1, got shape {a.shape}")
    rows = max(1, 2**20 // a.shape[0])
    blocks = [slice(i, i + rows) for i in range(0, a.shape[0], rows)]
    bad = sum(int((~np.isfinite(a[block])).sum()) for block in blocks)
    if bad:
        raise UntrustedError(f"the matrix has {bad} entries that are NaN or infinite; its spectrum is undefined")
    scale = max(float(np.abs(a[block]).max()) for block in blocks)
    # Halved, so that entries near the largest double do not overflow.
    asymmetry = 2.0 * max(float(np.abs(0.5 * a[block] - 0.5 * a[:, block].T).max()) for block in blocks)
    if asymmetry > 1e-6 * scale:
        raise ValueError(
            f"the matrix is not symmetric: largest |a - aᵀ| is {asymmetry:.3g} at scale {scale:.3g}; pass (a + a.T) / 2"
        )
    return a, asymmetry


def as_symmetric(matrix: Any) -> Float[np.ndarray, "n n"]:
    """Return the matrix as a float64 NumPy array, or say why it is not a symmetric one.

    Raises:
        TypeError: for entries that are no real numbers.
        UntrustedError: for non-finite entries.
        ValueError: for a shape other than (n, n) with n >= 1, or asymmetry beyond rounding.
    """
    return _checked(matrix)[0]


def min_eig(
    matrix: Any, *, assembly_error: float = 0.0, factor_error: float = 0.0, assumptions: tuple[str, ...] = ()
) -> MinEig:
    """Compute the smallest eigenvalue of a symmetric matrix in float64, and prove an interval for it.

    `lower` comes from a floating-point Cholesky test in the manner of Rump (2006); its shift is bisected until it is as
    tight as rounding allows (above n = 4,000: one shift, placed by the a-priori error bound). `upper` is the Rayleigh
    quotient of the computed vector with its rounding bound. Where λ_min is within rounding of zero,
    lower <= 0 <= upper: undecided, never a wrong sign.

    Args:
        matrix: symmetric, shape (n, n). Asymmetry at rounding level is allowed and widens the interval. Or `Blocks`,
            which make it anew whenever it is asked for: the work is done in 4 n² bytes, with few shifts (one where
            the least eigenvalue is positive and apart), and the interval is some 1e-9 of the value wider.
        assembly_error: bound on the spectral norm of what was lost in forming the matrix, in its units.
        factor_error: where the matrix, up to `assembly_error`, is a Gram matrix K̂ K̂ᵀ and λ_min(K Kᵀ) is wanted: bound
            on ‖K̂ - K‖₂, in the square root of its units. Singular values move by no more, so λ_min moves by about
            2 √λ_min times this error (Weyl).
        assumptions: what these bounds take for granted; listed with the proof.

    Returns:
        The value, and bounds for every symmetric matrix within `assembly_error` of the given one, or for K Kᵀ.

    Raises:
        TypeError: if the entries are no real numbers.
        ValueError: if the matrix is no finite symmetric matrix, or an error bound is negative or NaN.

    Example:
        >>> m = min_eig([[2.0, 1.0], [1.0, 2.0]])
        >>> m.proved and m.lower <= 1.0 <= m.upper and m.upper - m.lower < 1e-14
        True
    """
    for name, error in (("assembly_error", assembly_error), ("factor_error", factor_error)):
        checks.number(name, error, least=0, finite=False)
    if not (isinstance(assumptions, tuple) and all(isinstance(text, str) for text in assumptions)):
        raise TypeError(f"assumptions must be a tuple of texts, got {checks.shown(assumptions)}")
    if isinstance(matrix, Blocks):
        try:
            entries, n, asymmetry = matrix.matrix().flat, matrix.n, 0.0
        except ArithmeticError as error:
            raise UntrustedError(str(error)) from error
    else:
        entries, asymmetry = _checked(matrix)
        n = entries.shape[0]
    exponent = _exponent(entries)
    # Denormal entries may be read as zeros, and a matrix of them as zero; that takes less than η from each.
    small = exponent < -certificates.MAX_EXPONENT or exponent == 0
    denormal = n * certificates.TINY if small and certificates.any_denormal(entries) else 0.0
    exponent = exponent if abs(exponent) > certificates.MAX_EXPONENT else 0
    scaled_error = certificates.up(_times_power(assembly_error, -exponent)) if assembly_error else 0.0
    if exponent:
        asymmetry = _times_power(asymmetry, -exponent) + 4.0 * certificates.TINY
        # Entries that underflow as they are scaled lose at most η each.
        scaled_error = certificates.up(scaled_error + 2.0 * n * certificates.TINY)
    if isinstance(matrix, Blocks):
        value, lower, upper, reason = packed.interval(matrix, arpack, exponent)
        assumptions = (*packed.ASSUMPTIONS, *assumptions)
    else:
        # In two steps, as 2**-exponent itself may overflow.
        half = exponent // 2
        a = (entries * 2.0**-half) * 2.0 ** (half - exponent) if exponent else entries
        value, lower, upper, reason = _interval(a, n * asymmetry * certificates.SLACK)
    if scaled_error:
        lower, upper = certificates.down(lower - scaled_error), certificates.up(upper + scaled_error)
    if exponent:
        value = _times_power(value, exponent)
        # The result is rounded once more, and what is below η may be lost.
        denormal += certificates.TINY
        lower = certificates.down(_times_power(lower, exponent))
        upper = certificates.up(_times_power(upper, exponent))
    if denormal:
        lower, upper = certificates.down(lower - denormal), certificates.up(upper + denormal)
    if factor_error:
        lower, upper = _with_factor_error(lower, upper, factor_error)
    proved = certificates.arithmetic_holds()
    return MinEig(
        value=value,
        lower=lower,
        upper=upper,
        proved=proved,
        converged=not reason,
        assembly_error=float(assembly_error),
        factor_error=float(factor_error),
        assumptions=(*certificates.ASSUMPTIONS, *assumptions) if proved else (),
        reason=reason
        if proved
        else "; ".join(filter(None, ["the processor does not round doubles to nearest", reason])),
    )


def _with_factor_error(lower: float, upper: float, error: float) -> tuple[float, float]:
    """Widen an interval for λ_min(K̂ K̂ᵀ) to one for λ_min(K Kᵀ), given ‖K̂ - K‖₂ <= error; lower <= 0 holds already."""
    if lower > 0.0:
        root = certificates.down(certificates.down(math.sqrt(lower)) - error)
        lower = certificates.down(root * root) if root > 0.0 else 0.0
    # A Gram matrix has no negative eigenvalue, so an upper bound below zero could only come from wrong error bounds.
    root = certificates.up(certificates.up(math.sqrt(max(upper, 0.0))) + error)
    return lower, certificates.up(root * root)


def _exponent(a: Float[np.ndarray, "..."]) -> int:
    largest = max(float(a.max()), -float(a.min()))
    return math.frexp(largest)[1] if largest else 0


def _times_power(x: float, exponent: int) -> float:
    try:
        return math.ldexp(x, exponent)
    except OverflowError:
        return math.copysign(math.inf, x)


def _interval(a: Float[np.ndarray, "n n"], asymmetry: float) -> tuple[float, float, float, str]:
    """Return value, proved lower, proved upper, and what went wrong, for a matrix with entries in the safe range."""
    n = a.shape[0]
    work = np.empty((n, n), order="F")
    vector, floor, reason = _least_vector(a, work)
    value, upper = certificates.rayleigh(a, vector)
    if not math.isfinite(upper):
        reason = reason or "the eigensolver returned no finite vector"
        vector = np.zeros(n)
        vector[int(np.argmin(a.diagonal()))] = 1.0
        value, upper = certificates.rayleigh(a, vector)
    if n <= _BISECTION_MAX:
        lower, vector = _bisect(a, vector, value, upper, floor, work)
        refined, bound = certificates.rayleigh(a, vector)
        if bound < upper:
            value, upper = refined, bound
    else:
        lower = _one_shift(a, vector, value, upper, floor, work)
    # The factorisation read one triangle: A and that matrix differ by at most n max |a - aᵀ| in spectral norm.
    if asymmetry:
        lower = certificates.down(lower - certificates.up(asymmetry))
        upper = certificates.up(upper + certificates.up(asymmetry))
    return min(max(value, lower), upper), lower, upper, reason


def _dense_least_vector(a: Float[np.ndarray, "n n"]) -> tuple[Float[np.ndarray, " n"], str]:
    try:
        _, vectors = scipy.linalg.eigh(a, subset_by_index=[0, 0], check_finite=False)
    except scipy.linalg.LinAlgError as error:
        return np.full(a.shape[0], np.nan), f"LAPACK's eigensolver failed: {error}"
    return vectors[:, 0], ""


def _least_vector(
    a: Float[np.ndarray, "n n"], work: Float[np.ndarray, "n n"]
) -> tuple[Float[np.ndarray, " n"], float, str]:
    """Return an approximate eigenvector of λ_min, a proved lower bound, and what went wrong."""
    n = a.shape[0]
    bound = certificates.row_sum_bound(a)
    if n <= _DENSE_MAX:
        vector, reason = _dense_least_vector(a)
        return vector, -bound, reason
    shift = _factor_below(a, bound, work)
    if shift is None:
        return np.full(n, np.nan), -bound, "no Cholesky factorisation of the shifted matrix succeeded"
    inverse = scipy.sparse.linalg.LinearOperator(
        shape=(n, n),
        matvec=lambda v: certificates.solve(work, v),  # pyright: ignore[reportCallIssue]
        dtype=a.dtype,
    )
    try:
        _, vectors = arpack(a, sigma=shift, OPinv=inverse, ncv=12, tol=1e-7, maxiter=50)
    except scipy.sparse.linalg.ArpackError as error:
        return _inverse_iteration(work, _start(n), steps=3), shift, f"shift-invert Lanczos: {error}"
    return vectors[:, 0], shift, ""


def arpack(a: Any, **settings: Any) -> Any:
    """Return one eigenpair by SciPy's `eigsh`, start and restarts drawn from a fixed seed: same matrix, same bits.

    Args:
        a: symmetric, (n, n): an array, or what multiplies vectors as `LinearOperator` does.
        **settings: as `scipy.sparse.linalg.eigsh` takes them.

    Raises:
        scipy.sparse.linalg.ArpackError: if it does not converge.
    """
    return scipy.sparse.linalg.eigsh(a, k=1, v0=_start(a.shape[0]), rng=np.random.default_rng(0), **settings)


def _start(n: int) -> Float[np.ndarray, " n"]:
    return np.random.default_rng(0).standard_normal(n)


def _inverse_iteration(
    factor: Float[np.ndarray, "n n"], vector: Float[np.ndarray, " n"], *, steps: int
) -> Float[np.ndarray, " n"]:
    for _ in range(steps):
        image = certificates.solve(factor, vector)
        size = float(np.abs(image).max())
        if not (math.isfinite(size) and size > 0.0):
            return vector
        vector = image / size
    return vector


def _factor_below(a: Float[np.ndarray, "n n"], bound: float, work: Float[np.ndarray, "n n"]) -> float | None:
    """Leave in `work` the factor of A - shift I for a proved shift below λ_min, near zero where A is positive."""
    noise = float(certificates.cholesky_error(a.diagonal(), -bound).max())
    for shift in (0.0, -4.0 * noise):
        if certificates.cholesky_test(a, shift, work):
            return shift
    # Indefinite: a Ritz value places the shift, and the distance grows until it lies below the spectrum.
    try:
        values = arpack(a, which="SA", tol=1e-3, maxiter=20, return_eigenvectors=False)
        least = float(values[0])
    except scipy.sparse.linalg.ArpackError:
        least = 0.0
    distance = 0.05 * abs(least) + 8.0 * noise
    while least - distance > -bound:
        if certificates.cholesky_test(a, least - distance, work):
            return least - distance
        distance *= 4.0
    shift = -bound - 8.0 * noise
    return shift if certificates.cholesky_test(a, shift, work) else None


def _along(a: Float[np.ndarray, "n n"], vector: Float[np.ndarray, " n"], shift: float, *, scaled: bool) -> float:
    """Return what the error bound of the test costs along a vector: Σ c_i v_i² / Σ v_i²."""
    weight = np.square(vector)
    return float(certificates.cholesky_error(a.diagonal(), shift, scaled=scaled) @ weight / weight.sum())


def _bisect(
    a: Float[np.ndarray, "n n"],
    vector: Float[np.ndarray, " n"],
    value: float,
    upper: float,
    floor: float,
    work: Float[np.ndarray, "n n"],
) -> tuple[float, Float[np.ndarray, " n"]]:
    """Return the largest shift that the Cholesky test proves, and the vector refined with its factor."""
    lower, ceiling, step = floor, math.inf, 0.0
    for attempt in range(_BISECTION_STEPS):
        costs = [_along(a, vector, value, scaled=scaled) for scaled in (False, True)]
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
        if not any(certificates.cholesky_test(a, shift, work, scaled=scaled) for scaled in order):
            ceiling = shift
            continue
        lower = shift
        candidate = _inverse_iteration(work, vector, steps=2)
        refined, bound = certificates.rayleigh(a, candidate)
        if bound < upper:
            vector, value, upper = candidate, refined, bound
    return lower, vector


def _one_shift(
    a: Float[np.ndarray, "n n"],
    vector: Float[np.ndarray, " n"],
    value: float,
    upper: float,
    floor: float,
    work: Float[np.ndarray, "n n"],
) -> float:
    """Return a proved lower bound from one factorisation just below the value; a second, farther one if that fails."""
    noise = 1.1 * _along(a, vector, value, scaled=False) + 2.0 * (upper - value) + 1e-9 * abs(value)
    for shift in (value - noise, value - 64.0 * noise):
        if shift > floor and certificates.cholesky_test(a, shift, work):
            return shift
    return floor


def _krylov(a: Float[np.ndarray, "n n"], which: str, tolerance: float = 0.0) -> float | None:
    """Return one end of the spectrum of a large matrix by Lanczos, None where the dense solver has to take over."""
    # Products of entries this far from one overflow in a Krylov method; LAPACK scales the matrix itself.
    if a.shape[0] <= _DENSE_MAX or abs(_exponent(a)) > certificates.MAX_EXPONENT:
        return None
    try:
        values = arpack(a, which=which, tol=tolerance, return_eigenvectors=False)
    except scipy.sparse.linalg.ArpackError:
        return None
    value = float(values[0])
    return value if math.isfinite(value) else None


def _dense_ends(a: Float[np.ndarray, "n n"]) -> tuple[float, float]:
    """Return both ends of the spectrum by LAPACK, whose failure must not pass for a number."""
    try:
        values = scipy.linalg.eigvalsh(a, check_finite=False)
    except scipy.linalg.LinAlgError as error:
        raise UntrustedError(f"LAPACK's eigensolver failed: {error}") from error
    low, high = float(values[0]), float(values[-1])
    if not (math.isfinite(low) and math.isfinite(high)):
        raise UntrustedError(f"LAPACK's eigensolver returned [{low}, {high}] for the ends of the spectrum")
    return low, high


def max_eig(matrix: Any) -> float:
    """Return the largest eigenvalue of a symmetric matrix, shape (n, n), as computed.

    Raises:
        UntrustedError: if the matrix is not finite or no solver gives a finite number.
    """
    a = as_symmetric(matrix)
    value = _krylov(a, "LA")
    return _dense_ends(a)[1] if value is None else value


def extremes(matrix: Any) -> tuple[float, float]:
    """Return the least and the largest eigenvalue of a symmetric matrix, shape (n, n), as computed.

    Raises:
        UntrustedError: if the matrix is not finite or no solver gives a finite number.
    """
    a = as_symmetric(matrix)
    return (min_eig(a).value, max_eig(a)) if a.shape[0] > _DENSE_MAX else _dense_ends(a)


def spectral_norm(matrix: Any, *, tolerance: float = 0.0) -> float:
    """Return ‖A‖₂ of a symmetric matrix, shape (n, n), as computed.

    Args:
        matrix: symmetric, (n, n).
        tolerance: residual over the value at which large matrices may stop, for an estimate; 0 for all digits.

    Raises:
        UntrustedError: if the matrix is not finite or no solver gives a finite number.
    """
    a = as_symmetric(matrix)
    value = _krylov(a, "LM", tolerance)
    return max(map(abs, _dense_ends(a))) if value is None else abs(value)
