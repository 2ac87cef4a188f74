"""The figure of where the gradient lies: what is drawn of records that are known, and when it is chosen."""

import dataclasses

import numpy as np
import pytest

from builders import make
from lplr_jax import plotting

SPECTRUM = np.array([[1.0, 4.0, 10.0, 20.0]] * 3)
ENERGY = np.array([[0.4, 0.3, 0.2, 0.1]] * 3)


def record(optimizer, least=1.0):
    arrays = {
        "spectrum": SPECTRUM, "residual_energy": ENERGY, "ntk_rayleigh": np.full(3, 5.6),
        "ntk_max_eig": np.full(3, 20.0),
        "ntk_min_eig": np.full(3, least), "ntk_min_eig_lower": np.full(3, least - 0.1),
        "ntk_min_eig_upper": np.full(3, least + 0.1),
    }  # fmt: skip
    return dataclasses.replace(make(**arrays), config={"optimizer": optimizer}, experiment="mine")


def test_every_run_is_drawn_in_the_colour_of_its_method():
    runs = {"sgd": [record("sgd")], "adam": [record("adam"), record("adam", least=-0.05)]}
    loss, ratio, spectrum, shares = plotting.spectral(runs, floor=0.01, title="mine").axes
    assert [line.get_color() for line in loss.lines[:3]] == ["C0", "C1", "C1"]
    np.testing.assert_array_equal(loss.lines[3].get_ydata(), [0.01, 0.01])
    np.testing.assert_allclose(ratio.lines[0].get_ydata(), 0.25 / runs["sgd"][0]["loss"])
    np.testing.assert_allclose(ratio.lines[3].get_ydata(), 0.25 / (runs["sgd"][0]["loss"] - 0.01))
    np.testing.assert_array_equal(spectrum.lines[3].get_ydata(), np.full(3, 5.6))
    assert spectrum.lines[8].get_ydata().size == 0, "a negative λ_min has no place on a log scale, its interval has"
    assert len(spectrum.collections) == 3
    np.testing.assert_allclose(shares.lines[3].get_ydata(), np.full(3, 3 / 5.6))
    np.testing.assert_allclose(shares.lines[6].get_ydata(), np.full(3, 1 / 5.6))
    np.testing.assert_allclose(shares.lines[8].get_ydata(), np.full(3, 1e-9))
    labels = [text.get_text() for text in loss.get_legend().get_texts()]
    assert labels == ["sgd, 1 run", "adam, 2 runs", "floor of every causal function"]


def test_it_is_chosen_where_the_records_name_several_optimisers_and_keep_spectra():
    several = [record("sgd"), record("adam"), record("adam")]
    assert plotting.plot(several).axes[3].get_title(loc="left").startswith("(d)  shares")
    without = dataclasses.replace(several[0], arrays={k: v for k, v in several[0].arrays.items() if k != "spectrum"})
    assert "shares" not in "".join(axes.get_title(loc="left") for axes in plotting.plot([without, several[1]]).axes)
    with pytest.raises(ValueError, match="every record must hold spectrum"):
        plotting.spectral({"sgd": [without]})
