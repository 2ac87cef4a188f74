"""Proofs about the spectrum of one symmetric matrix, in floating-point arithmetic with derived constants.

Notation: u = 2⁻⁵³ is the unit roundoff, γ_k = k u / (1 - k u), η = 2⁻¹⁰²² the smallest normal number. η bounds the
absolute error of an operation that underflows, whether the processor underflows gradually or flushes to zero, so no
proof here depends on that setting.
"""

import math
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float
from scipy.linalg.lapack import dpotrf, dpotrs  # pyright: ignore[reportAttributeAccessIssue]  # made by f2py

UNIT = 2.0**-53
TINY = 2.0**-1022
# Covers up to 2¹¹ roundings of a formula over non-negative numbers; costs 1e-12 of a bound.
SLACK = 1.0 + 2.0**-40
# Entries within this range of one, so that squares and factors neither overflow nor lose to η.
MAX_EXPONENT = 400

ARITHMETIC = (
    "IEEE 754 double precision with rounding to nearest",
    "underflow loses at most 2^-1022 per operation (gradual or flushed to zero)",
    "matrix products of BLAS are conventional inner products in any order, with or without FMA: |error| <= γ_n |A||B|",
)
ASSUMPTIONS = (
    *ARITHMETIC,
    "LAPACK dpotrf is substitution in any order or blocking; a pivot may be inverted first, a block may not",
)


@runtime_checkable
class Rows(Protocol):
    """A symmetric matrix (n, n) that is read in rows, `a[i:j]`, and multiplies, `a @ v`: an array, or packed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Rows and columns."""
        ...

    def __getitem__(self, rows: slice, /) -> Any:
        """Return some rows as an array."""
        ...

    def __matmul__(self, vector: Any, /) -> Any:
        """Return the product with a vector, each entry an inner product of n terms in some order."""
        ...


def arithmetic_holds() -> bool:
    """Return whether doubles round to nearest, ties to even, as the proofs assume; a spot check, not a proof."""
    one, half_ulp = np.float64(1.0), np.float64(UNIT)
    above = one + 2 * half_ulp
    to_even = one + half_ulp == one and above + half_ulp == one + 4 * half_ulp
    nearest = one + np.float64(1.5) * half_ulp == above and one - np.float64(0.75) * half_ulp == one - half_ulp
    signed = -one - np.float64(1.5) * half_ulp == -above and np.float64(1 / 3) * 3 == one
    return bool(to_even and nearest and signed)


def gamma(k: int) -> float:
    """Return an upper bound of γ_k = k u / (1 - k u), the relative error of k roundings (Higham 2002, lemma 3.1)."""
    return math.nextafter(k * UNIT / (1.0 - k * UNIT), math.inf)


def up(x: float) -> float:
    """Return the next double above x."""
    return math.nextafter(x, math.inf)


def down(x: float) -> float:
    """Return the next double below x."""
    return math.nextafter(x, -math.inf)


def any_denormal(array: np.ndarray) -> bool:
    """Return whether an entry is neither zero nor a normal number, read off its bits: comparisons may flush it."""
    flat = np.ascontiguousarray(array, np.float64).reshape(-1).view(np.uint64)
    one, most = np.uint64(1), np.uint64(2**53 - 1)
    return any(bool((((bits << one) - one) < most).any()) for bits in np.split(flat, range(2**20, flat.size, 2**20)))


def sum_up(terms: np.ndarray) -> float:
    """Return an upper bound of a sum of exact doubles; `fsum` rounds once."""
    return up(math.fsum(terms.tolist()))


def cholesky_error(diagonal: Float[np.ndarray, " n"], shift: float, *, scaled: bool = False) -> Float[np.ndarray, " n"]:
    """Bound the backward error of a floating-point Cholesky factorisation by a diagonal matrix C.

    Let B be symmetric with b_jj <= a_jj - shift, and let `dpotrf` run to completion on B with factor R. Then
    B + C ≽ RᵀR ≽ 0 in exact arithmetic, after Rump (2006), "Verification of positive definiteness", BIT 46.

    Derivation. For i <= j the entry r_ij comes from b_ij - Σ_{k<i} r_ki r_kj, i - 1 products subtracted in any order
    and blocking, with FMA or without, then either divided by r_ii or multiplied by a rounded 1 / r_ii. Every term
    passes through at most i + 1 roundings, and we count i + 2, so |B - RᵀR|_ij <= γ_{i+2} Σ_k |r_ki||r_kj|
    (Higham 2002, lemma 8.4 and theorem 10.3) <= γ_{i+2} ‖r_i‖ ‖r_j‖ for the columns of R. The diagonal, with its square
    root, obeys the same bound: ‖r_j‖² (1 - γ_{j+2}) <= b_jj. Since γ_min(i,j) <= √(γ_i γ_j), |B - RᵀR|_ij <= g_i g_j
    with g_j² = φ_j h_j, φ_j = γ_{j+2} / (1 - γ_{j+2}), h_j = max(a_jj - shift, 0). By Cauchy-Schwarz
    (Σ g_i |x_i|)² <= Σ (g_i² / w_i) Σ w_i x_i² for any positive weights, so C may be Σ φ_j h_j I (w = 1, Rump's trace
    bound) or (Σ φ_j) diag(h) (w = h), which follows the grading of the matrix. Underflow: an entry takes at most
    2 i + 4 operations, each losing at most η max(1, r_ii) with r_ii < 2²⁵¹ by the range of the entries, carried through
    at most a factor 2; the spectral norm of such a matrix is at most n times its largest entry.

    Args:
        diagonal: a_jj of a matrix whose entries are below 2⁴⁰⁰.
        shift: the shift s that the test is about, in the matrix's units.
        scaled: whether to take w = h instead of w = 1.

    Returns:
        The diagonal of C, rounded up, shape (n,).
    """
    n = diagonal.shape[0]
    roundings = np.arange(3, n + 3) * UNIT
    # γ / (1 - γ) = k u / (1 - 2 k u)
    phi = roundings / (1.0 - 2.0 * roundings) * SLACK
    head = np.maximum(np.nextafter(diagonal - shift, np.inf), 0.0)
    underflow = n * (4.0 * n + 16.0) * TINY * 2.0**251 * SLACK
    error = sum_up(phi) * head if scaled else np.full(n, sum_up(phi * head))
    return (error * SLACK + underflow) * SLACK


def cholesky_test(
    matrix: Float[np.ndarray, "n n"], shift: float, out: Float[np.ndarray, "n n"], *, scaled: bool = False
) -> bool:
    """Prove λ_min(A) >= shift by one floating-point Cholesky factorisation, or fail to.

    B = A - diag(t) is factorised, where t_j >= shift + c_j is rounded up, c from `cholesky_error`, and b_jj is rounded
    down. Success proves A ≽ B + diag(t) ≽ diag(t - c) ≽ shift · I.

    Args:
        matrix: symmetric A; one triangle is read.
        shift: the bound to prove, in the matrix's units.
        out: Fortran-ordered work array; holds the lower factor of B in its lower triangle afterwards.
        scaled: which of the two error bounds to use; see `cholesky_error`.

    Returns:
        True if λ_min(A) >= shift is proved; False says nothing about A.
    """
    n = matrix.shape[0]
    diagonal = matrix.diagonal()
    if not math.isfinite(shift) or shift >= float(diagonal.min()):
        return False
    np.copyto(out, matrix if matrix.flags.f_contiguous else matrix.T)
    moved = np.nextafter(shift + cholesky_error(diagonal, shift, scaled=scaled), np.inf)
    index = np.arange(n)
    out[index, index] = np.nextafter(diagonal - moved, -np.inf)
    _, info = dpotrf(out, lower=1, clean=0, overwrite_a=1)
    pivots = out.diagonal()
    # A NaN or infinity anywhere in row i of the factor reaches pivot i, which not every dpotrf checks.
    return info == 0 and bool(np.isfinite(pivots).all() and (pivots > 0.0).all())


def solve(factor: Float[np.ndarray, "n n"], vector: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Solve B x = vector with the factor that `cholesky_test` left."""
    solution, _ = dpotrs(factor, vector[:, None], lower=1)
    return solution[:, 0]


def absolute_form(matrix: Rows, vector: Float[np.ndarray, " n"]) -> float:
    """Return an upper bound of |v|ᵀ |A| |v|, reading A in blocks of rows."""
    n = matrix.shape[0]
    size = np.abs(vector)
    rows = max(1, 2**20 // n)
    parts = [size[i : i + rows] @ (np.abs(matrix[i : i + rows]) @ size) for i in range(0, n, rows)]
    return math.fsum(parts) * (1.0 + 4.0 * gamma(n + 4)) * SLACK + 4.0 * n * (n + 4.0) * TINY


def rayleigh(matrix: Rows, vector: Float[np.ndarray, " n"]) -> tuple[float, float]:
    """Return the Rayleigh quotient of A at a vector, and a proved upper bound of it, hence of λ_min(A).

    For every v ≠ 0, λ_min(A) <= vᵀAv / vᵀv. The product ŵ = A v obeys |ŵ - A v| <= γ_n |A||v| in any order of
    summation; the outer sums are rounded once by `fsum`, with one rounding per product; an operation that underflows
    loses at most η.

    Args:
        matrix: symmetric A with entries below 2⁴⁰⁰.
        vector: v, finite; any length.

    Returns:
        (vᵀAv / vᵀv as computed, upper bound), or infinities where v is zero or not finite.
    """
    n = matrix.shape[0]
    largest = float(np.abs(vector).max())
    if not (math.isfinite(largest) and largest > 0.0):
        return math.inf, math.inf
    # Entries of size at most one: a power of two keeps them exact.
    v = vector * 2.0 ** -max(min(math.frexp(largest)[1], 1000), -1000)
    squares = v * v
    length = math.fsum(squares.tolist())
    if not 2.0**-8 <= length <= 2.0 * n:
        return math.inf, math.inf
    terms = v * (matrix @ v)
    form = math.fsum(terms.tolist())
    error = (
        2.0 * UNIT * sum_up(np.abs(terms))
        + gamma(n) * absolute_form(matrix, v)
        + UNIT * abs(form)
        + 4.0 * n * (n + 4.0) * TINY
    ) * SLACK
    bound = up(form + error)
    slack = 4.0 * UNIT + n * TINY
    bound = up(bound / (length * (1.0 - slack if bound > 0.0 else 1.0 + slack)))
    return form / length, up(bound + abs(bound) * 4.0 * UNIT)


def row_sum_bound(matrix: Rows) -> float:
    """Return an upper bound of max_i Σ_j |a_ij| >= ‖A‖₂ for a symmetric matrix, reading it in blocks of rows."""
    n = matrix.shape[0]
    rows = max(1, 2**20 // n)
    largest = max(float(np.abs(matrix[i : i + rows]).sum(axis=1).max()) for i in range(0, n, rows))
    return largest * (1.0 + 2.0 * gamma(n)) * SLACK
