"""λ_min of a symmetric matrix in half the memory: blocks written into LAPACK's rectangular full packed format.

Of a matrix (n, n) its lower triangle is kept, 4 n² bytes, and factorised in place; what the factor overwrites is asked
for again. So a certificate costs one buffer, two fillings and two factorisations, and no full matrix ever.

The format ("N", "L" in LAPACK's words): with n1 = ⌈n/2⌉, n2 = ⌊n/2⌋ and A = [[A11, ·], [A21, A22]], a Fortran-ordered
rectangle V of n1 columns holds tril(A11) and A21 below its diagonal, and tril(A22)ᵀ in what is left above.
"""

import math
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import scipy.linalg
import scipy.sparse.linalg
from jaxtyping import Float
from scipy.linalg.lapack import dpftrf, dpftrs  # pyright: ignore[reportAttributeAccessIssue]  # made by f2py

from lplr_jax import certificates, checks, shifts

MAX_ROWS = 65535
"""Beyond, n (n + 1) / 2 entries overflow LAPACK's 32-bit integers."""

ASSUMPTIONS = (
    "LAPACK dpftrf is dpotrf, BLAS dtrsm, BLAS dsyrk and dpotrf on the blocks of two halves",
    "BLAS dtrsm is substitution in any order or blocking; a pivot may be inverted first, a block may not",
)

_CHUNK = 2**20
_TRIES = 12
_STEPS = 5

Block = tuple[int, int, np.ndarray]
"""First row, first column, and entries that are added there; those above the diagonal are passed over."""


class Packed:
    """The lower triangle of a symmetric matrix; reads like an array in rows, `a[i:j]`, and multiplies, `a @ v`.

    Args:
        n: rows.
    """

    def __init__(self, n: int) -> None:
        self.shape = (n, n)
        self.flat = np.zeros(n * (n + 1) // 2)
        self._half, self._even = n - n // 2, 1 - n % 2
        view = self.flat.reshape((n + self._even, self._half), order="F")
        self._lower = view[self._even :]
        # Transposed: entry (c, r) is that of row n1 + r and column n1 + c, c <= r.
        self._corner = view[: n // 2, 1 - self._even :]

    def add(self, row: int, col: int, block: Float[np.ndarray, "r c"]) -> None:
        """Add a block whose first entry is at (row, col)."""
        half, stop, end = self._half, row + block.shape[0], col + block.shape[1]
        if not (row >= 0 and col >= 0 and max(stop, end) <= self.shape[0]):
            raise ValueError(
                f"a block of shape {block.shape} at ({row}, {col}) does not lie in a matrix of shape {self.shape}"
            )
        # Zeros take the place of entries above the diagonal: what they are added to belongs to the other half.
        value = np.tril(block, row - col) if end - 1 > row else block
        if col < half:
            left = min(end, half)
            self._lower[row:stop, col:left] += value[:, : left - col]
        if end > half and stop > half:
            top, first = max(row, half), max(col, half)
            corner = self._corner[first - half : end - half, top - half : stop - half]
            corner += value[top - row :, first - col :].T

    def __getitem__(self, rows: slice) -> Float[np.ndarray, "r n"]:
        start, stop, _ = rows.indices(self.shape[0])
        n, half = self.shape[0], self._half
        found = np.empty((max(stop - start, 0), n))
        if start < half:
            end = min(stop, half)
            upper = found[: end - start]
            upper[:, :start] = self._lower[start:end, :start]
            upper[:, start:] = self._lower[start:, start:end].T
            upper[:, start:end] = _mirrored(self._lower[start:end, start:end])
        if stop > half:
            first = max(start, half)
            lower, a, b = found[first - start :], first - half, stop - half
            lower[:, :half] = self._lower[first:stop]
            lower[:, half:first] = self._corner[:a, a:b].T
            lower[:, first:] = self._corner[a:b, a:]
            lower[:, first:stop] = _mirrored(self._corner[a:b, a:b].T)
        return found

    def __matmul__(self, vector: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        size = max(1, _CHUNK // self.shape[0])
        return np.concatenate([self[i : i + size] @ vector for i in range(0, self.shape[0], size)])

    def diagonal(self) -> Float[np.ndarray, " n"]:
        """Return the diagonal."""
        return np.concatenate([self._lower.diagonal(), self._corner.diagonal()])

    def set_diagonal(self, values: Float[np.ndarray, " n"]) -> None:
        """Replace the diagonal."""
        for part, value in ((self._lower, values[: self._half]), (self._corner, values[self._half :])):
            index = np.arange(value.shape[0])
            part[index, index] = value


def _mirrored(block: np.ndarray) -> np.ndarray:
    return np.tril(block) + np.tril(block, -1).T


class Blocks:
    """A symmetric matrix that is made in blocks whenever it is asked for, the same bits each time.

    Args:
        n: rows, at most 65,535.
        make: returns the blocks (first row, first column, entries (r, c)); where several lie at one place they are
            added up. Only entries on and below the diagonal count, so rows may be handed over whole or up to it.

    Raises:
        ValueError: for a number of rows that LAPACK cannot count.

    Example:
        >>> a = np.array([[2.0, 1.0], [1.0, 2.0]])
        >>> Blocks(2, lambda: ((i, 0, a[i : i + 1]) for i in range(2))).matrix()[0:2].tolist()
        [[2.0, 1.0], [1.0, 2.0]]
    """

    def __init__(self, n: int, make: Callable[[], Iterable[Block]]) -> None:
        checks.whole("n", n, least=1)
        if n > MAX_ROWS:
            raise ValueError(
                f"a packed matrix has at most {MAX_ROWS} rows, got {n}: LAPACK counts its entries in 32 bits; take "
                "fewer samples"
            )
        self.n, self._make = n, make
        self._held: Packed | None = None
        self._intact = False
        self._checksum: int | None = None

    def matrix(self) -> Packed:
        """Return the matrix; made again where a factorisation took its place.

        Raises:
            ArithmeticError: for entries that are not finite.
            ValueError: for blocks that do not fit, or that are not those of the time before.
        """
        if self._held is not None and self._intact:
            return self._held
        held = self._held = Packed(self.n) if self._held is None else self._held
        held.flat[:] = 0.0
        for row, col, block in self._make():
            held.add(row, col, np.asarray(block, np.float64))
        chunks = range(0, held.flat.size, _CHUNK)
        bad = sum(int((~np.isfinite(held.flat[i : i + _CHUNK])).sum()) for i in chunks)
        if bad:
            raise ArithmeticError(f"the matrix has {bad} entries that are NaN or infinite; its spectrum is undefined")
        checksum = zlib.crc32(held.flat)  # pyright: ignore[reportArgumentType]
        if self._checksum not in (None, checksum):
            raise ValueError("the blocks of the matrix differ from those made before; they must be the same each time")
        self._checksum, self._intact = checksum, True
        return held

    def test(self, shift: float, exponent: int = 0, *, scaled: bool = False) -> bool:
        """Prove λ_min(A 2^-exponent) >= shift by one Cholesky factorisation in place, or fail to.

        B = A - diag(t) as in `certificates.cholesky_test`, and the constants are those of
        `certificates.cholesky_error`. Derivation for `dpftrf`, lower: L11 = chol(B11) by `dpotrf`;
        L21 from L21 L11ᵀ = B21 by `dtrsm`; S = B22 - L21 L21ᵀ by `dsyrk`; L22 = chol(S) by `dpotrf`. With i <= j the
        entry l_ji comes from b_ji - Σ_{k<i} l_jk l_ik:

        * i, j <= n1: as in `dpotrf`.
        * i <= n1 < j: by `dtrsm`, i - 1 products subtracted in any order, then divided by l_ii or multiplied by a
          rounded 1 / l_ii.
        * n1 < i: the first n1 products are summed and subtracted by `dsyrk` (its factors -1 and 1 are exact), the other
          i - 1 - n1 by `dpotrf`.

        In every case b_ji and the i - 1 products are the leaves of one tree of additions, so a term passes at most
        i - 1 of them, one rounding as a product, and two as it is divided: i + 2, which is what is counted there. The
        square roots are those of `dpotrf`, and no entry takes more than 2 i + 4 operations, so the bound on underflow
        holds as it stands.
        """
        a = self.scaled(exponent)
        diagonal = a.diagonal()
        if not math.isfinite(shift) or shift >= float(diagonal.min()):
            return False
        error = certificates.cholesky_error(diagonal, shift, scaled=scaled)
        self._intact = False
        a.set_diagonal(np.nextafter(diagonal - np.nextafter(shift + error, np.inf), -np.inf))
        factor, info = dpftrf(self.n, a.flat, uplo="L", overwrite_a=1)
        if factor is not a.flat and not np.shares_memory(factor, a.flat):
            raise MemoryError("LAPACK's wrapper copied the packed matrix instead of factorising it in place")
        pivots = a.diagonal()
        # Row i of the factor enters pivot i, so a NaN or infinity shows there.
        return info == 0 and bool(np.isfinite(pivots).all() and (pivots > 0.0).all())

    def scaled(self, exponent: int) -> Packed:
        """Return the matrix times 2^-exponent; what is made again afterwards is unscaled."""
        a = self.matrix()
        if exponent:
            half = exponent // 2
            a.flat *= 2.0**-half  # in two steps, as 2**-exponent itself may overflow
            a.flat *= 2.0 ** (half - exponent)
            self._intact = False
        return a

    def solve(self, vector: Float[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
        """Solve with the factor that a successful `test` left."""
        assert self._held is not None
        solution, _ = dpftrs(self.n, self._held.flat, vector.reshape(-1, 1), uplo="L")
        return solution[:, 0]


def interval(blocks: Blocks, exponent: int = 0) -> tuple[float, float, float, str]:
    """Enclose λ_min(A 2^-exponent): value, proved lower and upper bound, and what went wrong in words.

    The first factorisation, at a shift near zero for a positive matrix, gives a vector by inverse Lanczos; the second
    is a test just below its Rayleigh quotient. An indefinite matrix takes a few more.

    Args:
        blocks: the matrix, with entries below 2⁴⁰⁰ after scaling.
        exponent: power of two by which the matrix is divided.
    """
    vector, floor, reason = _least_vector(_Scaled(blocks, exponent))
    a = blocks.scaled(exponent)
    value, upper = certificates.rayleigh(a, vector)
    if not math.isfinite(upper):
        reason = reason or "the eigensolver returned no finite vector"
        vector = np.zeros(blocks.n)
        vector[int(np.argmin(a.diagonal()))] = 1.0
        value, upper = certificates.rayleigh(a, vector)
    lower, failed, best, diagonal = floor, 0, vector, a.diagonal()
    for _ in range(_TRIES):
        cost, scaled = _cost(diagonal, best, value)
        # What the test must lose, what the value may be off, and room for a vector that has not converged.
        noise = 1.1 * cost + 2.0 * (upper - value) + 1e-9 * abs(value)
        shift = value - noise * 16.0**failed
        if shift <= lower:
            break
        if not blocks.test(shift, exponent, scaled=scaled):
            failed += 1
            continue
        lower = shift
        if upper - lower <= 4.0 * cost + 1e-8 * abs(value):
            break
        # The vector was off: the factor of a nearer shift turns it, and the quotient is taken again.
        vector, failed = shifts.inverse_iteration(blocks.solve, best, steps=_STEPS), 0
        a = blocks.scaled(exponent)
        refined, bound = certificates.rayleigh(a, vector)
        if bound < upper:
            value, upper, best = refined, bound, vector
        else:
            break
    return min(max(value, lower), upper), lower, upper, reason


def _cost(diagonal: Float[np.ndarray, " n"], vector: Float[np.ndarray, " n"], value: float) -> tuple[float, bool]:
    """Return what the test loses along a vector, and by which of the two error bounds."""
    costs = [shifts.along(diagonal, vector, value, scaled=scaled) for scaled in (False, True)]
    return min(costs), costs[1] < costs[0]


class _Scaled:
    """The matrix times 2^-exponent, tested at shifts."""

    def __init__(self, blocks: Blocks, exponent: int) -> None:
        self.blocks, self._exponent = blocks, exponent

    def rows(self) -> Packed:
        return self.blocks.scaled(self._exponent)

    def diagonal(self) -> Float[np.ndarray, " n"]:
        return self.rows().diagonal()

    def product(self) -> Any:
        a = self.rows()
        return scipy.sparse.linalg.LinearOperator(shape=a.shape, matvec=a.__matmul__, dtype=np.float64)  # pyright: ignore

    def test(self, shift: float, *, scaled: bool = False) -> bool:
        return self.blocks.test(shift, self._exponent, scaled=scaled)


def _least_vector(matrix: _Scaled) -> tuple[Float[np.ndarray, " n"], float, str]:
    """Return an approximate eigenvector of λ_min, a proved lower bound, and what went wrong."""
    blocks, a = matrix.blocks, matrix.rows()
    n, bound = blocks.n, certificates.row_sum_bound(a)
    if n <= shifts.DENSE_MAX:
        vector, reason = shifts.dense_least_vector(a[:])
        return vector, -bound, reason
    shift = shifts.factor_below(matrix, bound, tries=_TRIES)
    if shift is None:
        return np.full(n, np.nan), -bound, "no Cholesky factorisation of the shifted matrix succeeded"
    inverse = scipy.sparse.linalg.LinearOperator(shape=(n, n), matvec=blocks.solve, dtype=np.float64)  # pyright: ignore
    try:
        _, vectors = shifts.arpack(inverse, which="LA", ncv=12, tol=1e-7, maxiter=50)
    except scipy.sparse.linalg.ArpackError as error:
        turned = shifts.inverse_iteration(blocks.solve, shifts.start(n), steps=_STEPS)
        return turned, shift, f"Lanczos on the inverse: {error}"
    return vectors[:, 0], shift, ""
