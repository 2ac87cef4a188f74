"""Spectra of symmetric matrices on the host, in float64, with their quality. Knows no networks.

The proofs behind `min_eig` are in `certificates`, the searches that feed them in `unpacked`, `packed` and
`factors`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float

from lplr_jax import certificates, checks, factors, packed, rooms, unpacked
from lplr_jax.factors import Cholesky
from lplr_jax.packed import MAX_ROWS as MAX_ROWS
from lplr_jax.packed import Blocks
from lplr_jax.shifts import DENSE_MAX, arpack

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
    matrix: Any,
    *,
    assembly_error: float = 0.0,
    factor_error: float = 0.0,
    assumptions: tuple[str, ...] = (),
    cholesky: Cholesky | None = None,
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
        cholesky: what factorises A - s I instead of LAPACK, such as several GPUs: `factors.Cholesky`. It is not
            trusted: the host bounds ‖A - s I - L Lᵀ‖₂ from its factor, so a sloppy one costs width alone.

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
    if cholesky is not None:
        checks.function("cholesky", cholesky, "(matrix, shift) -> lower factor")
        if isinstance(matrix, Blocks):
            raise ValueError("cholesky is for a full matrix and Blocks are factorised in place; leave one of them out")
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
        value, lower, upper, reason = packed.interval(matrix, exponent)
        assumptions = (*packed.ASSUMPTIONS, *assumptions)
    else:
        # In two steps, as 2**-exponent itself may overflow.
        half = exponent // 2
        a = (entries * 2.0**-half) * 2.0 ** (half - exponent) if exponent else entries
        slack = n * asymmetry * certificates.SLACK
        found = unpacked.interval(a, slack) if cholesky is None else factors.interval(a, slack, cholesky)
        value, lower, upper, reason = found
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
    granted = certificates.ASSUMPTIONS if cholesky is None else certificates.ARITHMETIC
    return MinEig(
        value=value,
        lower=lower,
        upper=upper,
        proved=proved,
        converged=not reason,
        assembly_error=float(assembly_error),
        factor_error=float(factor_error),
        assumptions=(*granted, *assumptions) if proved else (),
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


def _krylov(a: Float[np.ndarray, "n n"], which: str, tolerance: float = 0.0) -> float | None:
    """Return one end of the spectrum of a large matrix by Lanczos, None where the dense solver has to take over."""
    # Products of entries this far from one overflow in a Krylov method; LAPACK scales the matrix itself.
    if a.shape[0] <= DENSE_MAX or abs(_exponent(a)) > certificates.MAX_EXPONENT:
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
    return (min_eig(a).value, max_eig(a)) if a.shape[0] > DENSE_MAX else _dense_ends(a)


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
