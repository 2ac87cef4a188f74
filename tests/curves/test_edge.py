"""What a record says of the edge of stability, on series that are written down."""

import dataclasses

import numpy as np
import pytest

from builders import make
from lplr_jax import plotting
from lplr_jax.curves.edge import HOVER, edge_of


def run(shares, loss=None, eta=0.01, **changes):
    """A run with one probe every two steps, sharpness as shares of 2/η."""
    k = len(shares)
    loss = np.exp(-0.1 * np.arange(2 * k - 1.0)) if loss is None else np.asarray(loss, float)
    arrays = {
        "sharpness": np.asarray(shares) * 2 / eta,
        "critical_step": eta / np.asarray(shares),
        "learning_rate": np.array(eta),
        "probe_epoch": np.arange(k) * 2,
        "ntk_min_eig": None,
        **changes,
    }
    return make(2 * k - 2, k, loss=loss, **arrays)


def test_before_and_there():
    loss = [8.0, 7, 6, 5, 4, 5, 3, 4, 2]
    bounds = {
        "probe_decrease_lower": np.array([0.9, 0.9, -0.2, 0.1, np.nan]),
        "probe_decrease_upper": np.array([1.0, 1.0, -0.1, 0.2, np.nan]),
    }
    found = edge_of(run([0.4, 0.8, 1.0, 1.2, 0.9], loss, **bounds))
    assert (found.threshold, found.sharpness_0, found.largest) == (200, 80, pytest.approx(240))
    assert (found.reached, found.probes, found.hovers) == (4, 3, True)
    assert (found.mean, found.least, found.most) == tuple(map(pytest.approx, (3.1 / 3, 0.9, 1.2)))
    assert (found.critical_before, found.critical) == (pytest.approx(0.6), pytest.approx(3.1 / 3))
    assert (found.rises_before, found.rises) == (0.0, 0.5), "two of the four steps from epoch 4 on"
    assert (found.raised, found.lowered) == ("1 of 2", "1 of 2")
    assert (found.loss_0, found.loss_reached, found.loss_t) == (8, 4, 2)


@pytest.mark.parametrize("end", [0, 1])
def test_to_hover_is_to_stay_within_the_band(end):
    inside, outside = (HOVER[end] + off for off in ((0.01, -0.01) if end == 0 else (-0.01, 0.01)))
    assert edge_of(run([0.5, 1.0, 1.0, inside])).hovers
    assert not edge_of(run([0.5, 1.0, 1.0, outside])).hovers
    assert not edge_of(run([0.5, 0.5, 1.0, 1.0])).hovers, "two probes are too few"


def test_what_was_not_reached_is_said_so():
    found = edge_of(run([0.4, 0.8, 0.99]))
    assert (found.reached, found.probes, found.hovers) == (None, 0, False)
    assert np.isnan(found.mean)
    assert np.isnan(found.loss_reached)
    assert found.critical_before == pytest.approx(2.19 / 3)


def test_it_takes_a_step_size_and_a_sharpness():
    record = run([0.4, 1.0])
    for name, value in (("learning_rate", np.array(np.nan)), ("sharpness", np.full(2, np.nan))):
        with pytest.raises(ValueError, match="asks for η and for the sharpness"):
            edge_of(dataclasses.replace(record, arrays={**record.arrays, name: value}))


def test_the_figure_shows_both_curvatures_and_the_edge():
    figure = plotting.edge(run([0.4, 0.8, 1.0, 1.2, 0.9]))
    top, bottom = figure.axes
    drawn = {line.get_label(): line.get_ydata() for line in top.lines}
    np.testing.assert_allclose(drawn["2/η = 200"], [200, 200])
    for label, values in drawn.items():
        if label.startswith(("sharpness", "critical")):
            np.testing.assert_allclose(values, [80, 160, 200, 240, 180])
    assert bottom.get_yscale() == "log"
