"""Matrices that are hard on eigensolvers, and what is exactly true of them."""

from fractions import Fraction

import flint
import numpy as np


def shifted_integers(a, shift):
    """Return (A - shift I) times a power of two as exact integers."""
    entries = [[Fraction(float(x)) for x in row] for row in a]
    for i in range(len(entries)):
        entries[i][i] -= Fraction(float(shift))
    denominator = max(x.denominator for row in entries for x in row)  # all are powers of two
    return flint.fmpz_mat([[int(x * denominator) for x in row] for row in entries])


def definiteness(a, shift):
    """Return "positive", "semidefinite" or "neither" for A - shift I, exactly.

    All roots of the characteristic polynomial are real, so by Descartes' rule none is negative if and only if the
    coefficients alternate weakly in sign, and none is zero if and only if the constant one does not vanish.
    """
    n = len(a)
    coefficients = shifted_integers(a, shift).charpoly().coeffs()
    signed = [c if (n - i) % 2 == 0 else -c for i, c in enumerate(coefficients)]
    if any(c < 0 for c in signed):
        return "neither"
    return "positive" if signed[0] > 0 else "semidefinite"


def holds_exactly(a, m):
    """Return whether lower <= λ_min(A) <= upper, exactly."""
    return definiteness(a, m.lower) != "neither" and definiteness(a, m.upper) != "positive"


def symmetric(a):
    return np.tril(a) + np.tril(a, -1).T


def with_spectrum(rng, values):
    q, _ = np.linalg.qr(rng.standard_normal((len(values), len(values))))
    return symmetric((q * values) @ q.T)


def hard_matrix(rng):
    """Return a random symmetric matrix, n <= 60, of condition 1 to 1e18, from eight families."""
    n = int(min(60, 1 + rng.geometric(0.07)))
    condition = 10.0 ** rng.uniform(0, 18)
    family = int(rng.integers(8))
    if family == 0:
        a = with_spectrum(rng, np.geomspace(1.0, 1.0 / condition, n))
    elif family == 1:  # one small eigenvalue, the rest together
        a = with_spectrum(rng, np.r_[1.0 / condition, np.ones(n - 1)])
    elif family == 2:  # indefinite or barely so
        a = with_spectrum(rng, np.r_[-1.0 / condition, rng.uniform(0, 1, n - 1)])
    elif family == 3:  # graded
        d = np.geomspace(1.0, condition**-0.5, n)
        a = symmetric(with_spectrum(rng, np.linspace(0.5, 1.5, n)) * np.outer(d, d))
    elif family == 4:  # near-duplicate inputs
        x = rng.standard_normal((n, n + 3))
        x[n // 2 :] = x[: n - n // 2] + condition**-0.5 * rng.standard_normal((n - n // 2, n + 3))
        a = symmetric(x @ x.T)
    elif family == 5:  # exactly singular: integers of low rank
        x = rng.integers(-9, 10, (n, max(1, n // 2))).astype(float)
        a = x @ x.T
    elif family == 6:  # many eigenvalues at the bottom
        a = with_spectrum(rng, np.r_[np.full(n - n // 2, 1.0 / condition), rng.uniform(0, 1, n // 2)])
    else:  # indefinite without structure
        a = symmetric(rng.standard_normal((n, n)))
    return a * 2.0 ** int(rng.integers(-490, 490)) if rng.random() < 0.3 else a
