"""Scaling of inputs and coding of targets against NumPy by hand."""

import numpy as np
import pytest

from lplr_jax import data
from lplr_jax.data import Dataset


@pytest.fixture
def digits():
    rng = np.random.default_rng(0)
    x = rng.uniform(0, 1, (6, 10)).astype(np.float32)
    return Dataset(
        x, np.float32([-1, -1, -1, 1, 1, 1])[:, None], "mnist", "here", inputs="pixel / 255", targets="signs"
    )


def test_as_it_is_nothing_changes(digits):
    assert data.recode(digits) is digits


def test_inputs_are_scaled(digits):
    wide = digits.x.astype(np.float64)
    standard = data.recode(digits, pixels="standardised")
    # One rounding to float32 of numbers of order one.
    np.testing.assert_allclose(standard.x, (wide - wide.mean()) / wide.std(), atol=1e-6)
    unit = data.recode(digits, pixels="normalised")
    np.testing.assert_allclose(np.linalg.norm(unit.x.astype(np.float64), axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit.x[2] / unit.x[2].max(), wide[2] / wide[2].max(), rtol=1e-6)
    assert len({digits.checksum, standard.checksum, unit.checksum}) == 3
    assert standard.inputs == "pixel / 255; then mean 0 and deviation 1 over all inputs"


def test_targets_are_bits(digits):
    bits = data.recode(digits, labels="bits")
    assert bits.y.ravel().tolist() == [0, 0, 0, 1, 1, 1]
    assert bits.y.dtype == np.float32
    assert bits.targets == "signs; then 0 for -1, 1 for +1"
    assert np.array_equal(bits.x, digits.x)
    with pytest.raises(data.DataError, match="these targets are others"):
        data.recode(bits, labels="bits")


def test_what_cannot_be_scaled_is_refused(digits):
    empty = Dataset(np.zeros((2, 3), np.float32), np.float32([[-1], [1]]), "own", "here")
    for pixels in ("standardised", "normalised"):
        with pytest.raises(data.DataError, match=f"pixels='{pixels}' divides by zero"):
            data.recode(empty, pixels=pixels)


@pytest.mark.usefixtures("without_type_checks")
def test_unknown_names_are_refused(digits):
    with pytest.raises(ValueError, match=r"pixels must be one of .*, got 'raw'"):
        data.recode(digits, pixels="raw")
    with pytest.raises(ValueError, match=r"labels must be one of .*, got 'names'"):
        data.recode(digits, labels="names")
