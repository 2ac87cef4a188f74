"""A curve that rises to a limit: closed forms, another optimiser, and where there is no limit."""

import numpy as np
import pytest
import scipy.optimize
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax.curves.saturation import Saturation, saturation

WIDTHS = np.array([16.0, 32, 64, 128, 256, 512])


@given(limit=st.floats(1e-6, 1e6), half=st.floats(1.0, 2000.0), start=st.floats(-0.9, 0.9))
def test_a_curve_of_the_family_is_found(limit, half, start):
    """g(0) = start times the limit, half of the way done at `half`."""
    true = Saturation(limit * (start - 1), half, limit * start)
    fit = saturation(WIDTHS, true.at(WIDTHS))
    # b is found to 1e-8 of itself at best, where the squares are flat; the limit moves by as much and b over the range.
    np.testing.assert_allclose(fit.at(WIDTHS), true.at(WIDTHS), rtol=0, atol=1e-8 * limit)
    assert fit.limit == pytest.approx(limit, rel=1e-4)
    assert fit.b == pytest.approx(half, rel=1e-3)


def test_least_squares_are_those_of_another_optimiser():
    values = np.array([1.0, 1.9, 3.3, 3.9, 4.6, 4.4])
    fit = saturation(WIDTHS, values)
    (a, b, c), _ = scipy.optimize.curve_fit(lambda m, a, b, c: c - a * m / (b + m), WIDTHS, values, p0=(-4, 30, 0))
    assert (fit.a, fit.b, fit.c) == (pytest.approx(a, rel=1e-4), pytest.approx(b, rel=1e-4), pytest.approx(c, abs=1e-3))


def test_where_a_share_of_the_limit_is_reached():
    fit = Saturation(-5.0, 3.0, 0.0)
    assert fit.reaches(0.9) == pytest.approx(27)
    assert fit.at(np.array([27.0]))[0] == pytest.approx(0.9 * fit.limit)
    h = 1e-5
    numeric = (fit.at(np.array([27 + h])) - fit.at(np.array([27 - h])))[0] / (2 * h)
    assert fit.slope(27.0) == pytest.approx(numeric, rel=1e-6)
    # The slope there, in units of the data: (1 - share)² limit²/(-a b).
    assert fit.slope(27.0) == pytest.approx(0.1**2 * 25 / 15)
    assert Saturation(-1.0, 3.0, 20.0).reaches(0.9) == 0.0, "it starts above"
    assert np.isnan(Saturation(1.0, 3.0, 2.0).reaches(0.9)), "it falls"
    assert np.isnan(Saturation(-1.0, 3.0, -2.0).reaches(0.9)), "its limit is not positive"


def test_what_grows_like_the_width_has_no_limit_within_it():
    fit = saturation(WIDTHS, 3 * WIDTHS)
    assert fit.reaches(0.9) > 100 * WIDTHS[-1]
    np.testing.assert_allclose(fit.at(WIDTHS), 3 * WIDTHS, rtol=1e-2)


@pytest.mark.usefixtures("without_type_checks")
def test_too_few_points_have_no_curve():
    assert saturation(WIDTHS[:2], np.ones(2)) is None
    assert saturation(WIDTHS, np.array([1.0, 2.0, np.nan, np.nan, np.nan, np.nan])) is None
    with pytest.raises(ValueError, match=r"same shape \(k,\), got \(6,\) and \(2,\)"):
        saturation(WIDTHS, np.ones(2))
