"""Kernel regression of a linear model is its solution of least norm of the step, by the pseudo-inverse."""

import numpy as np
import pytest

from lplr_jax import linalg
from lplr_jax.measurement.linearised import held_out_loss

RNG = np.random.default_rng(5)


@pytest.mark.parametrize("c", [1, 2])
def test_a_linear_model(c):
    x, held_x = RNG.normal(size=(4, 7)), RNG.normal(size=(3, 7))
    w, y, held_y = RNG.normal(size=(7, c)), RNG.normal(size=(4, c)), RNG.normal(size=(3, c))
    trained = w + np.linalg.pinv(x) @ (y - x @ w)
    expected = np.square(held_x @ trained - held_y).sum() / 6
    found = held_out_loss(lambda w, x: x @ w, w, x, y, held_x, held_y)
    assert found == pytest.approx(expected, rel=1e-10)


def test_a_kernel_that_is_not_definite_has_no_regression():
    x = np.ones((2, 3))
    with pytest.raises(linalg.UntrustedError, match="kernel regression"):
        held_out_loss(lambda w, x: x @ w, np.ones((3, 1)), x, np.array([[0.0], [1.0]]), x, np.zeros((2, 1)))
