"""Spectra of which a record keeps the top alone: the same verdicts, no smaller bounds, no contradiction."""

import dataclasses

import numpy as np
import pytest
from controls import by_claim, replaced, tampered

from lplr_jax.theory.claims.floor_pl import curves, window_of
from lplr_jax.theory.evidence import Evidence


def cut(record, kept):
    """Keep the `kept` largest eigenvalues of every probe, and the sums of the others, as large kernels do."""
    arrays = dict(record.arrays)
    for name in ("spectrum", "residual_energy"):
        whole = arrays[name]
        arrays[name], arrays[f"{name}_rest"] = whole[:, -kept:], whole[:, :-kept].sum(axis=1)
    return dataclasses.replace(record, arrays=arrays)


@pytest.mark.parametrize("kept", [1, 3, 20, 39])
def test_bounds_of_a_cut_spectrum(digits, kept):
    whole, short = Evidence(digits), Evidence(cut(digits, kept))
    count = whole.spectra.floor.shape[1]
    np.testing.assert_allclose(short.spectra.floor[:, :kept], whole.spectra.floor[:, :kept], rtol=1e-9)
    np.testing.assert_array_equal(short.spectra.rate[:, :kept], whole.spectra.rate[:, :kept])
    # The last column is λ_min for all the others: nothing is left past it.
    np.testing.assert_allclose(short.spectra.floor[:, -1], whole.spectra.floor[:, -1], rtol=1e-6, atol=1e-12)
    assert short.spectra.rows(kept) == kept
    assert short.spectra.rows(kept + 1) == count
    ours, theirs = window_of(short), window_of(whole)
    assert ours.bound >= theirs.bound * (1 - 1e-9)
    assert ours.bound_all == pytest.approx(theirs.bound_all, rel=1e-6)
    if kept >= theirs.k:
        assert (ours.k, ours.bound) == (theirs.k, pytest.approx(theirs.bound, rel=1e-9))
    drawn, full = curves(cut(digits, kept)), curves(digits)
    assert (drawn.envelope >= full.envelope * (1 - 1e-9)).all()
    assert (drawn.linearised >= full.linearised * (1 - 1e-9)).all()


@pytest.mark.parametrize("kept", [1, 20])
def test_nothing_is_contradicted(digits, kept):
    found, whole = by_claim(cut(digits, kept)), by_claim(digits)
    assert found["consistency"].outcome == whole["consistency"].outcome
    assert found["floor_pl"].outcome == whole["floor_pl"].outcome


@pytest.mark.parametrize(
    ("part", "changes"),
    [
        ("energy", {"residual_energy_rest": replaced(0.5, 0)}),
        ("weighted_spectrum", {"ntk_rayleigh": lambda a: a * 1.5}),
        ("weighted_spectrum", {"ntk_rayleigh": lambda a: a * 0.5}),
        ("spectrum", {"ntk_min_eig": lambda a: a + 1e6}),
    ],
)
def test_forged_sums_are_noticed(digits, part, changes):
    record = tampered(cut(digits, 20), **changes)
    assert Evidence(record).verdict("consistency").part(part).inconsistent


def test_a_bound_below_a_loss_at_its_rounding_accounts_for_all_of_it(digits):
    window = window_of(Evidence(digits))
    assert dataclasses.replace(window, loss=(1.0, 1e-15), bound=1e-18).share() == 1.0
    assert dataclasses.replace(window, loss=(1.0, 0.0), bound=0.0).share() == 1.0
    assert dataclasses.replace(window, loss=(1.0, 0.01), bound=0.1).share() == pytest.approx(0.5)
