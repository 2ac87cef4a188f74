"""λ_min by a factorisation from elsewhere: whatever it returns, the interval holds the truth."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
from scipy.linalg import lapack

from lplr_jax import certificates, factors
from lplr_jax.factors import residual_bound
from lplr_jax.linalg import Blocks, min_eig
from matrices import hard_matrix, holds_exactly, symmetric, with_spectrum


def shifted(a, shift):
    return a - shift * np.eye(len(a))


def exact(a, shift):
    return scipy.linalg.cholesky(shifted(a, shift), lower=True)


def single(a, shift):
    """Float32, with the upper triangle left as it lies."""
    factor, info = lapack.spotrf(shifted(a, shift).astype(np.float32), lower=1, clean=0)
    return factor if not info else None


def device(a, shift):
    return jnp.linalg.cholesky(jnp.asarray(a, jnp.float32) - jnp.float32(shift) * jnp.eye(len(a), dtype=jnp.float32))


def lie(a, shift):
    """A perfect factor of another matrix, of which everything would be proved."""
    return exact(a, min(-1.0, 2.0 * np.linalg.eigvalsh(a)[0] - 1.0)) + 0.0 * shift


def near_lie(a, shift):
    """A factor where there is none: negative pivots are made positive, as a modified Cholesky does."""
    values, vectors = np.linalg.eigh(shifted(a, shift))
    return np.linalg.qr((vectors * np.sqrt(np.abs(values))).T)[1].T


def noise(a, shift):
    return np.random.default_rng(0).standard_normal(a.shape) * abs(shift)


def huge(a, shift):
    return np.full(a.shape, 1e200) + shift


def nothing(a, shift):
    return np.full(a.shape, np.nan)


ENGINES = (exact, single, device, lie, near_lie, noise, huge, nothing)


def cover(count, seed, *, engines):
    rng = np.random.default_rng(seed)
    for index in range(count):
        a = hard_matrix(rng)
        for engine in engines:
            m = min_eig(a, cholesky=engine)
            assert m.proved
            assert m.lower <= m.value <= m.upper
            assert holds_exactly(a, m), f"matrix {index} of seed {seed} by {engine.__name__}: {m}"


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_engine_gives_a_false_proof():
    cover(25, 1, engines=[engine for engine in ENGINES if engine is not device])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(2, 8))
def test_no_engine_gives_a_false_proof_of_a_thousand_matrices(seed):
    cover(200, seed, engines=[engine for engine in ENGINES if engine is not device])


@pytest.fixture(scope="module")
def large():
    """A positive matrix beyond the dense solver, λ_min = 0.01 up to rounding."""
    return with_spectrum(np.random.default_rng(0), np.r_[0.01, np.linspace(0.02, 1.0, 449)])


@pytest.mark.parametrize(("engine", "width"), [(exact, 1e-7), (single, 1e-4), (device, 1e-4)])
def test_width_is_what_the_engine_rounds(large, engine, width):
    m = min_eig(large, cholesky=engine)
    assert m.converged
    assert m.lower <= min_eig(large).upper
    assert min_eig(large).lower <= m.upper
    assert m.sign == 1
    assert m.upper - m.lower <= width * abs(m.value) * 10
    assert certificates.ASSUMPTIONS[-1] not in m.assumptions  # LAPACK took no part


@pytest.mark.parametrize("engine", [lie, noise, huge, nothing])
def test_a_useless_engine_is_told_and_its_interval_holds(large, engine):
    m = min_eig(large, cholesky=engine)
    assert m.lower <= 0.01 <= m.upper + 1e-15
    assert not m.converged
    assert "cholesky" in m.reason or "Lanczos" in m.reason
    assert m.sign == 0


def test_an_indefinite_matrix_beyond_the_dense_solver(large):
    a = symmetric(large - 0.5 * np.eye(len(large)))
    m = min_eig(a, cholesky=exact)
    assert m.sign == -1
    assert m.lower <= -0.49 <= m.upper + 1e-15
    assert m.upper - m.lower < 1e-6


@pytest.mark.parametrize("block", [7, 512])
def test_residual_bound_is_above_the_residual_and_near_it(monkeypatch, block):
    monkeypatch.setattr(factors, "_BLOCK", block)
    rng = np.random.default_rng(3)
    for n in (1, 2, 13, 40):
        a = symmetric(rng.standard_normal((n, n)))
        factor = rng.standard_normal((n, n))
        low = np.tril(factor)
        residual = np.abs(np.linalg.eigvalsh(shifted(a, 0.3) - low @ low.T)).max()
        bound = residual_bound(a, factor, 0.3)
        assert residual * (1 - 1e-12) <= bound <= residual * math.sqrt(n) * (1 + 1e-11)


def test_rounding_of_the_residual_is_in_the_bound():
    # A is the rounded L Lᵀ: nothing is left of the residual as computed, and the true one is not zero.
    n = 300
    factor = np.tril(np.random.default_rng(4).standard_normal((n, n)))
    a = factor @ factor.T
    a = np.tril(a) + np.tril(a, -1).T
    wide = factor.astype(np.longdouble)
    truth = float(np.linalg.norm((a - wide @ wide.T).astype(np.float64), 2))
    bound = residual_bound(a, factor, 0.0)
    mass = np.square(factor).sum()
    assert truth > 0.0
    assert max(truth, 0.9 * n * 2.0**-53 * min(mass, (np.abs(factor) @ np.abs(factor).T).sum(1).max())) <= bound
    assert bound <= 3.0 * n * 2.0**-53 * mass


def test_mistakes_are_named(large):
    def scribbles(a, shift):
        a.setflags(write=True)
        a[0, 0] = 3.0

    with pytest.raises(ValueError, match="cholesky wrote to the matrix"):
        min_eig(np.array(large), cholesky=scribbles)
    with pytest.raises(TypeError, match=r"lower factor of shape \(2, 2\)"):
        min_eig(np.eye(2), cholesky=lambda a, s: np.ones(2))
    with pytest.raises(TypeError, match="real lower factor"):
        min_eig(np.eye(2), cholesky=lambda a, s: np.eye(2) + 1j)
    with pytest.raises(TypeError, match="cholesky must be a function"):
        min_eig(np.eye(2), cholesky="jaxmg")
    with pytest.raises(ValueError, match="leave one of them out"):
        min_eig(Blocks(2, lambda: [(0, 0, np.eye(2))]), cholesky=exact)
