"""Proved intervals where the processor takes numbers below 2⁻¹⁰²² for zero."""

import ctypes
import ctypes.util
import platform
from contextlib import contextmanager
from fractions import Fraction

import numpy as np
import pytest

from lplr_jax import certificates, linalg


@contextmanager
def flush_to_zero():
    """Set flush-to-zero and denormals-are-zero in the control word of SSE, as code compiled with -ffast-math does."""
    library = ctypes.util.find_library("m")
    if platform.machine() != "x86_64" or platform.system() != "Linux" or library is None:
        pytest.skip("sets the control word of an x86-64 processor through glibc")
    libm = ctypes.CDLL(library)
    before, flushed = (ctypes.c_uint32 * 8)(), (ctypes.c_uint32 * 8)()
    libm.fegetenv(before)
    ctypes.memmove(flushed, before, ctypes.sizeof(before))
    flushed[7] |= 0x8040
    libm.fesetenv(flushed)
    try:
        yield
    finally:
        libm.fesetenv(before)


MATRICES = (
    ([[1e-310]], Fraction(1e-310)),
    ([[-1e-310]], Fraction(-1e-310)),
    ([[3e-308, 0.0], [0.0, 1e-309]], Fraction(1e-309)),
    ([[3e-300, 0.0], [0.0, 1e-300]], Fraction(1e-300)),
    ([[3e-300, 0.0], [0.0, -1e-312]], Fraction(-1e-312)),
    ([[1.0, 0.0], [0.0, 1e-310]], Fraction(1e-310)),
    ([[1e200, 0.0], [0.0, 1e-310]], Fraction(1e-310)),
    ([[2.5e-308]], Fraction(2.5e-308)),
)


@pytest.mark.parametrize("flush", [False, True])
@pytest.mark.parametrize("place", range(len(MATRICES)))
def test_intervals_hold_whatever_becomes_of_denormal_numbers(place, flush):
    rows, exact = MATRICES[place]
    matrix = np.array(rows)
    if flush:
        with flush_to_zero():
            vanished = not np.any(np.array([1e-310]) * np.ones(1))
            found = linalg.min_eig(matrix)
        assert vanished
    else:
        found = linalg.min_eig(matrix)
    assert found.proved
    assert Fraction(found.lower) <= exact <= Fraction(found.upper)


def test_what_flushing_costs_is_seen_below_the_normal_numbers_alone():
    normal = linalg.min_eig([[3e-300, 0.0], [0.0, 1e-300]])
    assert normal.upper - normal.lower < 1e-7 * 1e-300
    # n η for the entries, η for the result, and the spacing of the search.
    denormal = linalg.min_eig([[1e-310]])
    assert 2 * certificates.TINY <= denormal.upper - denormal.lower < 8 * certificates.TINY


@pytest.mark.parametrize(
    ("value", "denormal"),
    [(0.0, False), (-0.0, False), (5e-324, True), (-1e-310, True), (2.0**-1022, False), (1.0, False), (np.inf, False)],
)
def test_denormal_numbers_are_told_by_their_bits(value, denormal):
    assert certificates.any_denormal(np.array([[1.0, value]])) is denormal
    with flush_to_zero():
        assert certificates.any_denormal(np.array([[1.0, value]])) is denormal
