"""The table of four precisions: its emulation, its inputs and what it shows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax.experiments.trust import TrustRow, as_markdown, measure, near_duplicates, round_to_tf32, tf32_kernel
from lplr_jax.linalg import MinEig
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk


@given(st.floats(-(2.0**100), 2.0**100, width=32).filter(lambda x: x == 0 or abs(x) > 2.0**-100))
def test_tf32_rounds_to_the_nearest_of_ten_bits(x):
    rounded = float(round_to_tf32(np.array([x]))[0])
    assert abs(rounded - x) <= 2.0**-11 * abs(x)
    mantissa, _ = np.frexp(rounded)
    assert float(mantissa * 2.0**11).is_integer()


def test_tf32_breaks_ties_to_even():
    ulp = 2.0**-10
    x = np.array([1 + 0.5 * ulp, 1 + 1.5 * ulp, 1 + 0.51 * ulp, -1 - 1.5 * ulp])
    assert round_to_tf32(x).tolist() == [1.0, 1 + 2 * ulp, 1 + ulp, -1 - 2 * ulp]


def test_tf32_kernel_is_the_kernel_to_ten_bits():
    model = MLP(width=6, depth=3)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 4)), jnp.float32)
    params = model.init(jax.random.key(0), x)
    theta = np.asarray(empirical_ntk(model.apply, params, x))
    size = np.sqrt(np.outer(theta.diagonal(), theta.diagonal()))
    error = np.abs(tf32_kernel(model.apply, params, x) - theta)
    # Four operands a term, each off by at most 2^-11 of itself; entries are bounded by the diagonal.
    assert error.max() > 0
    assert (error <= 4.1 * 2.0**-11 * size).all()
    with pytest.raises(ValueError, match="this program has another step"):
        tf32_kernel(lambda p, x: jnp.sin(x @ p), jnp.ones((4, 1)), x)


def test_near_duplicates_are_where_they_should_be():
    x = np.random.default_rng(0).standard_normal((10, 7))
    y = near_duplicates(x, 1e-3, pairs=3)
    assert np.array_equal(y[:7], x[:7])
    assert np.linalg.norm(y[7:] - x[:3], axis=1) == pytest.approx([1e-3] * 3, rel=1e-9)
    with pytest.raises(ValueError, match="between 1 and half of the 10 samples, got 6"):
        near_duplicates(x, 1e-3, pairs=6)


def test_table_says_the_sign():
    rows = [
        TrustRow(0.1, -1.0, -2.0, 3.0, MinEig(3.0, lower, upper, proved=True, converged=True))
        for lower, upper in ((2.0, 4.0), (-1.0, 4.0), (-4.0, -1.0))
    ]
    lines = as_markdown(rows).splitlines()
    assert len({line.count("|") for line in lines}) == 1
    assert [line.split("|")[-2].strip() for line in lines[2:]] == ["proved positive", "undecided", "proved negative"]
    assert lines[2].startswith("| 0.1 | -2 | -1 | 3 | [2, 4] |")


@pytest.mark.slow
def test_small_measurement_is_consistent():
    rows = measure(n=20, pairs=2, width=4, distances=(0.1, 0.01))
    assert [row.distance for row in rows] == [0.1, 0.01]
    for row in rows:
        # LAPACK's eigenvalue is good to n u ‖Θ‖, well below 1e-9 here.
        assert row.certified.lower - 1e-9 <= row.float64 <= row.certified.upper + 1e-9
        assert row.certified.proved
    # λ_min of near-duplicates falls with the square of their distance.
    assert rows[0].float64 / rows[1].float64 == pytest.approx(100, rel=0.3)


@pytest.mark.slow
def test_only_float64_tells_near_duplicates_apart():
    rows = measure()
    assert rows[0].certified.sign == 1
    assert rows[1].certified.sign == 1
    for row in rows:
        assert row.float32 < 0
        assert row.tf32 < 0
