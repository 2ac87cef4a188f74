"""Certificates in half a matrix against exact arithmetic, the dense certificate and closed forms."""

import math
import subprocess
import sys
import tracemalloc

import flint
import mpmath
import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import lapack

from lplr_jax import certificates, linalg, packed
from lplr_jax.linalg import Blocks, min_eig
from lplr_jax.packed import Packed
from matrices import definiteness, hard_matrix, holds_exactly, symmetric, with_spectrum

U = 2.0**-53


def rows_of(a, size=7):
    return Blocks(len(a), lambda: ((i, 0, a[i : i + size]) for i in range(0, len(a), size)))


@given(st.integers(1, 14), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_blocks_of_any_size_are_read_back(n, size, seed):
    a = symmetric(np.random.default_rng(seed).standard_normal((n, n)))
    b = Packed(n)
    for i in range(0, n, size):
        for j in range(0, n, size):  # those above the diagonal are passed over
            b.add(i, j, a[i : i + size, j : j + size])
    np.testing.assert_array_equal(b[:], a)
    np.testing.assert_array_equal(b[n // 3 : n // 3 + size], a[n // 3 : n // 3 + size])
    np.testing.assert_array_equal(b.diagonal(), a.diagonal())
    np.testing.assert_allclose(b @ a[0], a @ a[0], atol=n * U * 16 * np.abs(a).max() ** 2)
    assert b.flat.size == n * (n + 1) // 2


def test_blocks_at_one_place_are_added_up():
    a = symmetric(np.random.default_rng(0).integers(-9, 9, (6, 6)).astype(float))
    b = Blocks(6, lambda: [(0, 0, a), (2, 0, a[2:4]), (2, 0, -a[2:4])])
    np.testing.assert_array_equal(b.matrix()[:], a)


@pytest.mark.parametrize("n", [1, 2, 5, 6, 41])
def test_the_format_is_lapacks(n):
    a = with_spectrum(np.random.default_rng(n), np.linspace(1.0, 2.0, n))
    b = rows_of(a).matrix()
    vector, info = lapack.dtrttf(a, uplo="L")  # pyright: ignore[reportAttributeAccessIssue]  # made by f2py
    assert info == 0
    np.testing.assert_array_equal(b.flat, vector)


def check_hard(count, seed):
    rng = np.random.default_rng(seed)
    misleading, wide = 0, 0
    for index in range(count):
        a = hard_matrix(rng)
        m, dense = min_eig(rows_of(a)), min_eig(a)
        assert m.proved
        assert m.lower <= m.value <= m.upper
        assert holds_exactly(a, m), f"matrix {index} of seed {seed}: {m}"
        assert m.lower <= dense.upper
        assert dense.lower <= m.upper
        misleading += definiteness(a, scipy.linalg.eigvalsh(a)[0]) == "neither"
        wide += m.upper - m.lower > 2e-8 * abs(m.value) + 20 * (dense.upper - dense.lower)
    assert misleading > count / 10
    assert wide <= count / 40  # graded matrices whose vector the dense solver lost


def test_interval_holds_the_truth_for_hard_matrices():
    check_hard(60, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 5))
def test_interval_holds_the_truth_for_three_thousand_hard_matrices(seed):
    check_hard(1000, seed=seed)


@pytest.mark.parametrize("n", [2, 31, 500, 901])
def test_second_difference_matrix(n):
    a = 2.0 * np.eye(n) - np.eye(n, k=1) - np.eye(n, k=-1)
    with mpmath.workdps(40):
        truth = 4 * mpmath.sin(mpmath.pi / (2 * (n + 1))) ** 2
        m = min_eig(rows_of(a, 200))
        assert mpmath.mpf(m.lower) <= truth <= mpmath.mpf(m.upper)
    # What the test loses, (n + 5) n u by Rump's bound, 1.1 of it, and as much for the Rayleigh quotient.
    assert m.upper - m.lower <= 4 * (n + 4) * (n + 5) * U + 2e-9 * m.value
    assert m.sign == 1


def test_ball_arithmetic_agrees():
    rng = np.random.default_rng(3)
    for n in (5, 20, 49):
        a = with_spectrum(rng, np.geomspace(1.0, 1e-9, n))
        with flint.ctx.workprec(300):
            balls = flint.arb_mat(a.tolist()).eig(nonstop=False)
            least = min((ball.real for ball in balls), key=lambda ball: float(ball.mid()))
            m = min_eig(rows_of(a))
            assert flint.arb(m.lower) <= least
            assert least <= flint.arb(m.upper)


def counted(a, size=100):
    """Return blocks of a matrix, and the list of times that they were made."""
    made = []

    def make():
        made.append(1)
        return ((i, 0, a[i : i + size]) for i in range(0, len(a), size))

    return Blocks(len(a), make), made


def test_a_positive_matrix_is_made_twice():
    a = with_spectrum(np.random.default_rng(0), np.r_[1e-3, np.linspace(0.1, 1.0, 449)])
    blocks, made = counted(a)
    m, dense = min_eig(blocks), min_eig(a)
    assert len(made) == 2
    assert m.sign == 1
    assert m.value == pytest.approx(dense.value, rel=1e-10)
    assert m.upper - m.lower <= 4 * (dense.upper - dense.lower) + 2e-9 * m.value
    assert m.assumptions == (*certificates.ASSUMPTIONS, *packed.ASSUMPTIONS)


@pytest.mark.parametrize("n", [60, 700])
def test_singular_and_indefinite_matrices_of_low_rank(n):
    x = np.random.default_rng(n).integers(-5, 6, (n, n // 3)).astype(float)
    gram = x @ x.T  # integers below 2**53: exact, and exactly singular
    blocks, made = counted(gram)
    m = min_eig(blocks)
    assert m.lower <= 0.0 <= m.upper
    assert m.sign == 0
    assert m.upper - m.lower < 1e-6 * n  # rounding of a trace of about 3 n²
    assert len(made) <= 12
    shifted = min_eig(rows_of(gram - 2.0 * np.eye(n)))
    assert shifted.lower <= -2.0 <= shifted.upper
    assert shifted.sign == -1
    assert shifted.upper - shifted.lower < 1e-3


def test_clustered_indefinite_matrix_beyond_the_dense_solver():
    a = with_spectrum(np.random.default_rng(0), np.geomspace(1.0, 1e-9, 500)) - 0.3 * np.eye(500)
    m, dense = min_eig(rows_of(a)), min_eig(a)
    assert m.lower <= dense.upper
    assert dense.lower <= m.upper
    assert m.upper - m.lower < 1e-3


def test_no_shift_above_the_spectrum_is_ever_proved():
    rng = np.random.default_rng(7)
    for n in (1, 2, 7, 30):
        a = symmetric(rng.integers(-50, 50, (n, n)).astype(float))
        blocks = rows_of(a)
        # Exact eigenvalues by ball arithmetic; every shift above the least one must be turned down.
        with flint.ctx.workprec(200):
            balls = flint.arb_mat(a.tolist()).eig(nonstop=False) if n > 1 else [flint.acb(a[0, 0])]
        least = min(float(ball.real.mid()) for ball in balls)
        for above in (1e-13, 1e-6, 1.0):
            assert not blocks.test(least + above * max(1.0, abs(least)))
            assert not blocks.test(least + above * max(1.0, abs(least)), scaled=True)
        assert blocks.test(least - 1e-9 * max(1.0, abs(least)) - 1e-9)


def test_a_test_that_is_a_proof_needs_its_constant(monkeypatch):
    # At a shift of exactly λ_min the exact matrix is singular: without its error term the test would prove too much.
    a = with_spectrum(np.random.default_rng(2), np.r_[1.0, np.linspace(2.0, 3.0, 60)])
    top = next(shift for shift in 1.0 + np.arange(0, 4000, 2) * U if definiteness(a, shift) == "neither")
    assert not rows_of(a).test(float(top))
    monkeypatch.setattr(certificates, "cholesky_error", lambda diagonal, shift, scaled=False: 0 * diagonal - 1e-11)
    assert rows_of(a).test(float(top))


@pytest.mark.parametrize("power", [-480, 480])
def test_scaling_by_powers_scales_the_interval(power):
    a = with_spectrum(np.random.default_rng(5), np.geomspace(1.0, 1e-6, 20))
    reference, m = min_eig(rows_of(a)), min_eig(rows_of(np.ldexp(a, power)))
    assert math.ldexp(m.lower, -power) == pytest.approx(reference.lower, rel=1e-9)
    assert math.ldexp(m.upper, -power) == pytest.approx(reference.upper, rel=1e-9)
    assert m.sign == 1


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="at most 65535 rows, got 65536"):
        Blocks(65536, list)
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        Blocks(0, list)
    with pytest.raises(linalg.UntrustedError, match="2 entries that are NaN"):
        min_eig(Blocks(3, lambda: [(0, 0, np.diag([np.nan, np.inf, 1.0]))]))
    with pytest.raises(ValueError, match=r"a block of shape \(2, 2\) at \(2, 0\)"):
        min_eig(Blocks(3, lambda: [(2, 0, np.eye(2))]))
    drawn = np.random.default_rng(0)
    blocks = Blocks(3, lambda: [(0, 0, np.eye(3) + np.diag(drawn.uniform(size=3)))])
    assert blocks.test(0.5)
    with pytest.raises(ValueError, match="must be the same each time"):
        blocks.matrix()


def test_memory_is_half_a_matrix():
    n, size = 1500, 64
    one = np.ones(n)

    def make():
        for i in range(0, n, size):
            block = 0.01 * np.outer(one[i : i + size], one)
            block[np.arange(len(block)), np.arange(i, i + len(block))] += 1.0
            yield i, 0, block

    tracemalloc.start()
    m = min_eig(Blocks(n, make))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert m.lower <= 1.0 <= m.upper
    assert m.sign == 1
    # Beside the packed matrix: blocks of 2**20 entries as rows are read and multiplied, and a few vectors.
    assert peak < 4 * n * (n + 1) + 5 * 8 * 2**20 / 2


@pytest.mark.slow
def test_resident_memory_is_half_a_matrix():
    code = """
import resource
import numpy as np
from lplr_jax.linalg import Blocks, min_eig
n, size = 6000, 64
def make():
    for i in range(0, n, size):
        block = np.full((min(size, n - i), n), 0.01)
        block[np.arange(len(block)), np.arange(i, i + len(block))] += 1.0
        yield i, 0, block
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
min_eig(Blocks(450, lambda: [(0, 0, np.eye(450))]))
before = peak()
m = min_eig(Blocks(n, make))
assert m.lower <= 1.0 <= m.upper and m.sign == 1
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1.1 * 4 * 6000 * 6001 + 100e6
