"""The bounds of panel (d): drawn where spectra are recorded, above the loss, with the numbers of the claim."""

import dataclasses

import matplotlib.pyplot as plt
import numpy as np
import pytest

from lplr_jax import plotting, theory
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.claims.floor_pl import curves

BOUND, LEAST, PREDICTED = "PL with a floor, one window (ours)", r"the same for $\lambda_{\min}$ alone", "linearised"


def panel(record):
    figure = plotting.plot(record)
    (axes,) = [axes for axes in figure.axes if axes.get_ylabel().startswith("loss")]
    return figure, axes


def line(axes, label):
    found = [line for line in axes.lines if str(line.get_label()).startswith(label)]
    return found[0] if found else None


def test_the_bounds_lie_above_the_loss():
    record = linear_regression()
    figure, axes = panel(record)
    found = curves(record)
    bound, least, predicted = (line(axes, label) for label in (BOUND, LEAST, PREDICTED))
    for drawn, values in ((bound, found.envelope), (least, found.all), (predicted, found.linearised)):
        np.testing.assert_array_equal(drawn.get_xdata(), found.steps)
        np.testing.assert_array_equal(drawn.get_ydata(), values)
    loss = np.interp(found.steps, record["epoch"], record["loss"])
    assert (bound.get_ydata() >= loss * (1 - 1e-12)).all()
    assert (least.get_linestyle(), predicted.get_linestyle()) == (":", "--")
    assert bound.get_ydata()[-1] == pytest.approx(theory.verify(record)["floor_pl"].bound, rel=1e-12)
    plt.close(figure)


@pytest.mark.parametrize("names", [("spectrum", "residual_energy"), ("step_size", "step_deviation", "step_rounding")])
def test_without_spectra_or_steps_there_is_no_bound(names):
    record = linear_regression()
    arrays = {name: array for name, array in record.arrays.items() if name not in names}
    figure, axes = panel(dataclasses.replace(record, arrays=arrays))
    assert all(line(axes, label) is None for label in (BOUND, LEAST, PREDICTED))
    plt.close(figure)
