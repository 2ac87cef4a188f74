"""Where the gradient lies in a spectrum, against sums by hand."""

import numpy as np
import pytest

from builders import make
from lplr_jax.curves.position import position_of

SPECTRUM = np.array([[1.0, 4.0, 10.0, 20.0]])
ENERGY = np.array([[0.4, 0.3, 0.2, 0.1]])
RHO = 0.4 * 1 + 0.3 * 4 + 0.2 * 10 + 0.1 * 20


def record(**changes):
    arrays = {"spectrum": SPECTRUM, "residual_energy": ENERGY, "ntk_rayleigh": [RHO], "ntk_min_eig": [1.0], **changes}
    arrays = {name: value if value is None else np.asarray(value) for name, value in arrays.items()}
    return make(0, 1, **arrays)


def test_shares_are_those_of_the_sums():
    found = position_of(record())
    assert found.steps.tolist() == [0]
    assert found.above.tolist() == [0.5], "10 and 20 are at least ρ = 5.6"
    assert found.least_share[0] == pytest.approx(1 / RHO)
    # λ_k A_k: 20 0.1, 10 0.3, 4 0.6, 1 1.0.
    assert found.floor_share[0] == pytest.approx(3 / RHO)
    assert found.best.tolist() == [2]


def test_the_share_is_one_where_the_gradient_lies_in_the_largest_eigenvalue():
    found = position_of(record(residual_energy=[[0.0, 0.0, 0.0, 1.0]], ntk_rayleigh=[20.0]))
    assert found.floor_share.tolist() == [1.0]
    assert found.above.tolist() == [0.25]


def test_of_a_cut_spectrum_nothing_is_said_of_what_it_leaves_out():
    cut = {
        "spectrum": SPECTRUM[:, 2:], "residual_energy": ENERGY[:, 2:], "spectrum_rest": [5.0],
        "residual_energy_rest": [0.7],
    }  # fmt: skip
    found = position_of(record(**cut))
    assert np.isnan(found.above).all(), "ρ is below all that is kept"
    assert found.floor_share[0] == pytest.approx(3 / RHO)
    assert position_of(record(**cut, ntk_rayleigh=[15.0])).above.tolist() == [0.25]


def test_a_probe_without_a_direction_or_a_trusted_value_is_left_out():
    assert position_of(record(ntk_rayleigh=[np.nan])) is None
    assert position_of(record(spectrum=None)) is None
    assert position_of(record(ntk_min_eig=[-1e-9])).least_share.tolist() == [0.0]
