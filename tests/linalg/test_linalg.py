"""Certified eigenvalues against exact integer arithmetic, ball arithmetic, multiprecision and closed forms."""

import ctypes
import math
import platform
import sys
from fractions import Fraction

import flint
import mpmath
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax import certificates, linalg, unpacked
from lplr_jax.linalg import MinEig, extremes, max_eig, min_eig, spectral_norm
from matrices import definiteness, hard_matrix, holds_exactly, symmetric, with_spectrum

U = 2.0**-53


def check_hard(count, seed):
    rng = np.random.default_rng(seed)
    misleading = 0
    for index in range(count):
        a = hard_matrix(rng)
        m = min_eig(a)
        assert m.proved
        assert m.lower <= m.value <= m.upper
        assert holds_exactly(a, m), f"matrix {index} of seed {seed}: {m}"
        misleading += definiteness(a, scipy.linalg.eigvalsh(a)[0]) == "neither"
    # The oracle can tell: LAPACK's value is above the truth for a good part of them.
    assert misleading > count / 10


def test_interval_holds_the_truth_for_hard_matrices():
    check_hard(500, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_interval_holds_the_truth_for_ten_thousand_hard_matrices(seed):
    check_hard(1000, seed=seed)


@given(st.integers(1, 8), st.integers(0, 2**32 - 1), st.floats(0.0, 1.0))
def test_assembly_error_covers_every_matrix_within_it(n, seed, error):
    rng = np.random.default_rng(seed)
    a = symmetric(rng.standard_normal((n, n)))
    m = min_eig(a, assembly_error=error)
    # A rank-one change of norm slightly below the error moves λ_min by as much as it may.
    _, vectors = np.linalg.eigh(a)
    for sign in (-1.0, 1.0):
        moved = symmetric(a + sign * error * (1 - 1e-12) * np.outer(vectors[:, 0], vectors[:, 0]))
        exact = min_eig(moved)
        assert m.lower <= exact.upper
        assert exact.lower <= m.upper
    assert m.upper - m.lower >= 2 * error
    assert m.assembly_error == error


@given(st.integers(1, 6), st.integers(0, 2**32 - 1), st.sampled_from([1e-9, 1e-3, 1.0, 10.0]))
def test_factor_error_covers_every_gram_matrix_of_a_factor_within_it(n, seed, error):
    rng = np.random.default_rng(seed)
    k = rng.standard_normal((n, n + 2))
    gram = symmetric(k @ k.T)
    rounding = (n + 4) * U * np.trace(gram)  # of forming the Gram matrix
    m = min_eig(gram, assembly_error=rounding, factor_error=error)
    left, values, right = np.linalg.svd(k, full_matrices=False)
    for sign in (-1.0, 1.0):
        # The change that moves the least singular value by as much as it may.
        moved = k + sign * error * (1 - 1e-9) * np.outer(left[:, -1], right[-1])
        exact = min_eig(symmetric(moved @ moved.T), assembly_error=(n + 4) * U * np.sum(moved**2))
        assert m.lower <= exact.upper
        assert exact.lower <= m.upper
    assert m.factor_error == error
    least = values[-1]
    assert m.upper == pytest.approx((least + error) ** 2, rel=1e-6, abs=4 * n * rounding)
    assert m.lower == pytest.approx(max(least - error, 0.0) ** 2, rel=1e-6, abs=4 * n * rounding)


@pytest.mark.parametrize("n", [2, 30, 500, 900])
def test_second_difference_matrix(n):
    a = 2.0 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    with mpmath.workdps(40):
        truth = 4 * mpmath.sin(mpmath.pi / (2 * (n + 1))) ** 2
        m = min_eig(a)
        assert mpmath.mpf(m.lower) <= truth <= mpmath.mpf(m.upper)
    # Rump's bound is Σ γ_{j+2} a_jj, here (n + 5) n u; the search may end at 1.5 times bound plus Rayleigh error.
    assert m.upper - m.lower <= 4 * (n + 4) * (n + 5) * U
    assert m.sign == 1


@pytest.mark.parametrize("distance", [1e-2, 1e-3, 1e-4])
def test_near_duplicate_pairs(distance):
    # 50 pairs with kernel [[1, 1 - δ], [1 - δ, 1]] among 1,000 points, plus 64 everywhere: (1, -1) has eigenvalue δ.
    n, delta = 1000, 2.0 ** round(math.log2(distance**2))
    rng = np.random.default_rng(0)
    a = 64.0 * np.ones((n, n)) + np.diag(rng.integers(1, 9, n).astype(float))
    for i in range(0, 100, 2):
        a[i : i + 2, i : i + 2] = 64.0 + np.array([[1.0, 1.0 - delta], [1.0 - delta, 1.0]])
    order = rng.permutation(n)
    m = min_eig(a[np.ix_(order, order)])
    assert m.lower <= delta <= m.upper
    assert m.sign == 1
    # (n + 5) n / 2 u of the mean diagonal, about 69, for the proof, as much for the quotient, and the search's factor.
    assert m.upper - m.lower <= 4 * 69 * n * (n + 5) / 2 * U


def test_ball_arithmetic_agrees():
    rng = np.random.default_rng(3)
    for n in (5, 20, 50):
        a = with_spectrum(rng, np.geomspace(1.0, 1e-9, n))
        with flint.ctx.workprec(300):
            balls = flint.arb_mat(a.tolist()).eig(nonstop=False)
            least = min((ball.real for ball in balls), key=lambda ball: float(ball.mid()))
            m = min_eig(a)
            assert flint.arb(m.lower) <= least
            assert least <= flint.arb(m.upper)


def test_hilbert_matrix_in_multiprecision():
    a = scipy.linalg.hilbert(9)
    with mpmath.workdps(60):
        truth = min(mpmath.eigsy(mpmath.matrix(a.tolist()), eigvals_only=True))
        m = min_eig(a)
        assert mpmath.mpf(m.lower) <= truth <= mpmath.mpf(m.upper)


def test_graded_matrix_is_resolved_far_below_the_rounding_of_its_norm():
    d = np.geomspace(1.0, 1e-8, 12)
    a = (np.eye(12) + 0.05) * np.outer(d, d)  # condition about 1e16; λ_min near 1e-16
    m = min_eig(a)
    assert holds_exactly(a, m)
    assert m.lower > 0
    assert m.upper - m.lower < 1e-12 * m.value


@pytest.mark.parametrize("power", [-150, 0, 150])
def test_scaling_by_powers_scales_the_interval(power):
    rng = np.random.default_rng(5)
    a = with_spectrum(rng, np.geomspace(1.0, 1e-6, 20))
    exponent = round(power / math.log10(2))
    reference, m = min_eig(a), min_eig(np.ldexp(a, exponent))
    # Powers of two are exact, so only the outward rounding of the final scaling differs.
    assert math.ldexp(m.lower, -exponent) == pytest.approx(reference.lower, rel=4 * U)
    assert math.ldexp(m.upper, -exponent) == pytest.approx(reference.upper, rel=4 * U)
    assert m.sign == 1


def test_assembly_error_of_a_scaled_matrix_is_scaled():
    a = np.diag([1e150, 3e150])
    m = min_eig(a, assembly_error=5e149)
    assert m.lower == pytest.approx(5e149, rel=1e-12)
    assert m.upper == pytest.approx(1.5e150, rel=1e-12)


@pytest.mark.parametrize("n", [3, 60, 700])
def test_singular_and_indefinite_matrices_of_low_rank(n):
    x = np.random.default_rng(n).integers(-5, 6, (n, n // 3)).astype(float)
    gram = x @ x.T  # integers below 2**53: exact, and exactly singular
    m = min_eig(gram)
    assert m.lower <= 0.0 <= m.upper
    assert m.sign == 0
    shifted = min_eig(gram - 2.0 * np.eye(n))
    assert shifted.lower <= -2.0 <= shifted.upper
    assert shifted.sign == -1


@pytest.mark.parametrize(
    ("a", "truth"),
    [
        ([[3.5]], 3.5),
        ([[-3.5]], -3.5),
        ([[0.0]], 0.0),
        ([[5e-324]], 5e-324),
        ([[1.7e308]], 1.7e308),
        (np.zeros((4, 4)), 0.0),
        (np.diag([4.0, -1.0, 2.0]), -1.0),
        (np.diag([1.0, 1e-16, 1e16]), 1e-16),
        (np.diag([1.0, 0.0]), 0.0),
        (np.eye(3), 1.0),
        ([[0.0, 1.0], [1.0, 0.0]], -1.0),
        (np.diag([1, 2]), 1.0),
    ],
)
def test_small_closed_forms(a, truth):
    m = min_eig(a)
    assert m.lower <= truth <= m.upper
    assert m.sign in (0, np.sign(truth))
    assert m.proved
    assert m.converged
    assert float(m) == m.value == pytest.approx(truth, rel=1e-12, abs=1e-300)


def test_asymmetry_at_rounding_level_widens_the_interval():
    a = np.array([[1.0, 0.5], [0.5, 1.0]])
    b = a.copy()
    b[0, 1] += 1e-9
    m = min_eig(b)
    # Symmetric matrices with either triangle of b have λ_min 0.5 and 0.5 - 1e-9.
    assert m.lower <= 0.5 - 1e-9
    assert m.upper >= 0.5


@pytest.mark.parametrize(
    ("a", "error", "message"),
    [
        (np.zeros((0, 0)), ValueError, r"n >= 1, got shape \(0, 0\)"),
        (np.ones(3), ValueError, r"got shape \(3,\)"),
        (np.ones((2, 3)), ValueError, r"got shape \(2, 3\)"),
        ([[1.0, 2.0], [0.0, 1.0]], ValueError, "not symmetric: largest .* is 2"),
        ([[1.0, math.nan], [math.nan, 1.0]], ValueError, "2 entries that are NaN or infinite"),
        ([[math.inf]], ValueError, "1 entries that are NaN"),
        ([[1.0 + 1j]], TypeError, r"real matrix of shape \(n, n\), got .*dtype complex128"),
    ],
)
def test_bad_matrices_are_refused(a, error, message):
    for function in (min_eig, max_eig, extremes, spectral_norm, linalg.as_symmetric):
        with pytest.raises(error, match=message):
            function(a)


@pytest.mark.parametrize("error", [-1.0, math.nan])
@pytest.mark.parametrize("name", ["assembly_error", "factor_error"])
def test_bad_error_bounds_are_refused(name, error):
    with pytest.raises(ValueError, match=f"{name} must be a number >= 0, got"):
        min_eig(np.eye(2), **{name: error})


def test_infinite_assembly_error_proves_nothing_and_says_so():
    m = min_eig(np.eye(2), assembly_error=math.inf)
    assert (m.lower, m.upper, m.sign) == (-math.inf, math.inf, 0)


@pytest.mark.parametrize("n", [6, 402])
def test_failing_solver_is_reported_and_the_interval_still_holds(monkeypatch, n):
    def fail(*_args, **_kwargs):
        raise scipy.linalg.LinAlgError("no convergence")

    def give_up(*_args, **_kwargs):
        raise scipy.sparse.linalg.ArpackError(-9999)

    monkeypatch.setattr(scipy.linalg, "eigh", fail)
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", give_up)
    a = 2.0 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    m = min_eig(a)
    assert not m.converged
    assert "eigensolver failed" in m.reason or "Lanczos" in m.reason
    assert m.lower <= 4 * math.sin(math.pi / (2 * (n + 1))) ** 2 <= m.upper


def test_solver_that_returns_nan_leaves_a_valid_interval(monkeypatch):
    monkeypatch.setattr(scipy.linalg, "eigh", lambda a, **_: (np.full(1, np.nan), np.full((len(a), 1), np.nan)))
    m = min_eig(np.array([[2.0, 1.0], [1.0, 2.0]]))
    assert not m.converged
    assert "no finite vector" in m.reason
    assert m.lower <= 1.0 <= m.upper


def test_cholesky_that_never_succeeds_or_returns_nan_proves_no_more_than_the_row_sums(monkeypatch):
    a = np.array([[2.0, 1.0], [1.0, 2.0]])
    for info, fill in ((1, 1.0), (0, np.nan), (0, -1.0)):

        def broken(out, *, info=info, fill=fill, **_kwargs):
            out[...] = fill
            return out, info

        monkeypatch.setattr(certificates, "dpotrf", broken)
        m = min_eig(a)
        assert m.lower == pytest.approx(-3.0)
        assert m.upper >= 1.0
        assert m.sign == 0


def test_large_path_with_one_shift(monkeypatch):
    monkeypatch.setattr(unpacked, "_BISECTION_MAX", 500)
    n = 600
    a = 2.0 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    truth = 4 * math.sin(math.pi / (2 * (n + 1))) ** 2
    m = min_eig(a)
    assert m.lower <= truth <= m.upper
    assert m.upper - m.lower <= 1e-4 * truth
    assert m.converged


def test_extremes_and_norm_above_the_dense_size():
    n = 450
    a = 2.0 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    edge = 2 * math.cos(math.pi / (n + 1))
    # ARPACK stops at machine precision relative to the norm.
    assert extremes(a) == pytest.approx((2 - edge, 2 + edge), abs=1e-12)
    assert spectral_norm(a - 3.0 * np.eye(n)) == pytest.approx(1 + edge, abs=1e-12)
    assert spectral_norm(np.diag([-3.0, 2.0])) == 3.0
    # A Ritz value with a residual of a tenth of its own: below the norm, and no further than that.
    assert 0.9 * (1 + edge) <= spectral_norm(a - 3.0 * np.eye(n), tolerance=0.1) <= (1 + edge) * (1 + 1e-14)


def test_extremes_fall_back_to_the_dense_solver(monkeypatch):
    def give_up(*_args, **_kwargs):
        raise scipy.sparse.linalg.ArpackError(-9999)

    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", give_up)
    a = np.diag(np.arange(-3.0, 447.0))
    assert extremes(a) == pytest.approx((-3.0, 446.0))
    assert max_eig(a) == pytest.approx(446.0)
    assert spectral_norm(a) == pytest.approx(446.0)


def test_result_is_frozen_and_reads_as_a_float():
    m = MinEig(value=1.0, lower=0.5, upper=1.5, proved=True, converged=True)
    assert float(m) == 1.0
    assert m.sign == 1
    assert MinEig(value=0.0, lower=-1.0, upper=1.0, proved=False, converged=True).sign == 0
    with pytest.raises(AttributeError):
        m.value = 2.0  # pyright: ignore[reportAttributeAccessIssue]


# The assumptions of the proofs, where they can be checked.


def test_assumptions_are_listed_with_every_proof():
    m = min_eig(np.eye(2))
    assert m.assumptions == certificates.ASSUMPTIONS
    assert any("rounding to nearest" in text for text in m.assumptions)


def test_doubles_are_ieee_and_underflow_is_gradual():
    assert sys.float_info.mant_dig == 53
    assert certificates.arithmetic_holds()
    assert np.float64(2.0**-1022) / 2 > 0.0
    a = np.array([[2.0**-1030]])
    assert (a @ np.array([[0.5]])).item() == 2.0**-1031


@pytest.mark.skipif(platform.system() != "Linux" or platform.machine() != "x86_64", reason="sets the x86 rounding mode")
@pytest.mark.parametrize("mode", [0x400, 0x800, 0xC00])
def test_other_rounding_modes_are_noticed(mode):
    libm = ctypes.CDLL("libm.so.6")
    try:
        assert libm.fesetround(mode) == 0
        holds, m = certificates.arithmetic_holds(), min_eig(np.eye(2))
    finally:
        libm.fesetround(0)
    assert not holds
    assert not m.proved
    assert m.assumptions == ()
    assert "round doubles to nearest" in m.reason


@pytest.mark.parametrize("n", [7, 200])
def test_matrix_product_obeys_the_order_independent_bound(n):
    # With FMA or without: the bound is the same, and exact integers say whether this BLAS keeps it.
    rng = np.random.default_rng(n)
    a, b = (rng.standard_normal((n, n)) * 2.0 ** rng.integers(-20, 20, (n, n)) for _ in range(2))
    exact = [flint.fmpz_mat([[int(Fraction(x) * 2**120) for x in row] for row in m.tolist()]) for m in (a, b)]
    product = (exact[0] * exact[1]).tolist()
    computed = a @ b
    bound = certificates.gamma(n) * (np.abs(a) @ np.abs(b))
    worst = max(
        abs(Fraction(int(product[i][j]), 2**240) - Fraction(float(computed[i, j]))) / Fraction(float(bound[i, j]))
        for i in range(n)
        for j in range(n)
    )
    assert 0 < worst < 1


@pytest.mark.parametrize("n", [5, 200])
def test_cholesky_obeys_its_error_bound(n):
    rng = np.random.default_rng(n)
    a = with_spectrum(rng, np.geomspace(1.0, 1e-10, n))
    work = np.empty((n, n), order="F")
    assert certificates.cholesky_test(a, 0.0, work)
    moved = np.tril(a, -1) + np.diag(
        np.nextafter(a.diagonal() - np.nextafter(certificates.cholesky_error(a.diagonal(), 0.0), np.inf), -np.inf)
    )
    factor = flint.fmpz_mat([[int(Fraction(x) * 2**200) for x in row] for row in np.tril(work).tolist()])
    product = (factor * factor.transpose()).tolist()
    g = [math.sqrt(certificates.gamma(j + 3) * a[j, j]) for j in range(n)]
    worst = max(
        float(abs(Fraction(int(product[i][j]), 2**400) - Fraction(float(moved[i, j])))) / (g[i] * g[j])
        for i in range(n)
        for j in range(i + 1)
    )
    assert 0 < worst < 1


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.floats(-1e3, 1e3))
def test_cholesky_error_is_the_derived_formula_rounded_up(diagonal, shift):
    # Rational arithmetic: φ_j = γ_{j+2} / (1 - γ_{j+2}), γ_k = k u / (1 - k u), h_j = max(a_jj - s, 0).
    gammas = [Fraction(k, 2**53) / (1 - Fraction(k, 2**53)) for k in range(3, len(diagonal) + 3)]
    phi = [g / (1 - g) for g in gammas]
    head = [max(Fraction(a) - Fraction(shift), Fraction(0)) for a in diagonal]
    trace = sum((f * h for f, h in zip(phi, head, strict=True)), Fraction(0))
    for scaled, exact in ((False, [trace] * len(head)), (True, [sum(phi) * h for h in head])):
        computed = certificates.cholesky_error(np.array(diagonal), shift, scaled=scaled)
        for value, truth in zip(computed.tolist(), exact, strict=True):
            assert truth < Fraction(value) <= truth * (1 + Fraction(1, 10**9)) + Fraction(1, 10**200)


@given(st.integers(1, 8), st.integers(0, 2**32 - 1))
def test_rayleigh_bound_is_above_the_exact_quotient_by_its_rounding(n, seed):
    rng = np.random.default_rng(seed)
    a = symmetric(rng.standard_normal((n, n)) * 10.0 ** rng.integers(-6, 6, (n, n)))
    v = rng.standard_normal(n)
    exact = [Fraction(x) for x in v.tolist()]
    form = sum((exact[i] * Fraction(a[i, j].item()) * exact[j] for i in range(n) for j in range(n)), Fraction(0))
    quotient = form / sum((x * x for x in exact), Fraction(0))
    _, bound = certificates.rayleigh(a, v)
    size = np.abs(v) @ np.abs(a) @ np.abs(v) / (v @ v)
    assert quotient < Fraction(bound)
    # γ_n |v|ᵀ|A||v| for the product, less than as much again for what follows it, and a few roundings of the quotient.
    assert float(Fraction(bound) - quotient) <= (3 * n + 24) * U * size


@given(st.integers(0, 2**32 - 1))
def test_rayleigh_bound_covers_the_cancellation_in_the_product(seed):
    # A = 1e8 w wᵀ + I and v orthogonal to w up to rounding: A v is 1e8 times smaller than |A||v|.
    rng = np.random.default_rng(seed)
    w = rng.standard_normal(8)
    a = symmetric(1e8 * np.outer(w, w) + np.eye(8))
    v = np.linalg.svd(w[None])[2][1]
    exact = [Fraction(x) for x in v.tolist()]
    form = sum((exact[i] * Fraction(a[i, j].item()) * exact[j] for i in range(8) for j in range(8)), Fraction(0))
    assert form / sum((x * x for x in exact), Fraction(0)) < Fraction(certificates.rayleigh(a, v)[1])


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=12), st.floats(-1e3, 1e3))
def test_rounded_bounds_are_on_the_right_side(values, shift):
    exact = sum(map(Fraction, values), Fraction(0))
    assert Fraction(certificates.sum_up(np.array(values))) > exact
    assert certificates.down(shift) < shift < certificates.up(shift)
    k = len(values)
    assert Fraction(certificates.gamma(k)) > Fraction(k, 2**53) / (1 - Fraction(k, 2**53))


def test_rayleigh_of_useless_vectors_is_infinite():
    for vector in (np.zeros(2), np.array([np.nan, 1.0]), np.array([np.inf, 1.0])):
        assert certificates.rayleigh(np.eye(2), vector) == (math.inf, math.inf)
