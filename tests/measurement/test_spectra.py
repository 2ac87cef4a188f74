"""What a record keeps of the spectra of its probes: all of a small kernel, the largest and two sums of a large one."""

import numpy as np
import pytest

from lplr_jax import linalg
from lplr_jax.measurement import kernel
from lplr_jax.measurement.kernel import max_eig_upper, recorded_spectra, spectrum_and_energy

RNG = np.random.default_rng(0)
ROOTS = [RNG.standard_normal((9, 9)) for _ in range(2)]
KERNELS = [root @ root.T for root in ROOTS]
GRADIENT = RNG.standard_normal((9, 1))


def found(which=(0, None, 1)):
    return [None if one is None else spectrum_and_energy(KERNELS[one], GRADIENT) for one in which]


def test_a_small_kernel_leaves_all_of_it():
    kept = recorded_spectra(found())
    assert set(kept) == {"spectrum", "residual_energy"}
    np.testing.assert_allclose(kept["spectrum"][2], np.square(np.linalg.svd(ROOTS[1])[1])[::-1], rtol=1e-10)
    assert np.isnan(kept["spectrum"][1]).all()
    assert np.isnan(kept["residual_energy"][1]).all()
    np.testing.assert_allclose(kept["residual_energy"][[0, 2]].sum(axis=1), 1.0, rtol=1e-12)


@pytest.mark.parametrize("limit", [8, 9])
def test_a_large_kernel_leaves_the_largest_and_the_sums_of_the_others(monkeypatch, limit):
    monkeypatch.setattr(kernel, "WHOLE", limit)
    monkeypatch.setattr(kernel, "LARGEST", 3)
    kept = recorded_spectra(found())
    if limit == 9:
        assert kept["spectrum"].shape == (3, 9)
        return
    assert kept["spectrum"].shape == kept["residual_energy"].shape == (3, 3)
    np.testing.assert_allclose(kept["spectrum"][0], np.square(np.linalg.svd(ROOTS[0])[1])[2::-1], rtol=1e-10)
    trace = kept["spectrum"].sum(axis=1) + kept["spectrum_rest"]
    np.testing.assert_allclose(trace[[0, 2]], [np.trace(theta) for theta in KERNELS], rtol=1e-12)
    share = kept["residual_energy"].sum(axis=1) + kept["residual_energy_rest"]
    np.testing.assert_allclose(share[[0, 2]], 1.0, rtol=1e-12)
    assert np.isnan(trace[1])
    assert np.isnan(share[1])


def test_an_estimate_of_the_largest_eigenvalue_decides_no_bound():
    largest = np.linalg.eigvalsh(KERNELS[0])[-1]
    right = max_eig_upper(KERNELS[0], 0.0)
    assert largest <= right <= 1.002 * largest
    # Too small an estimate fails the test, and row sums are left; too large a one is a looser bound.
    for estimate in (0.9 * largest, 1e-3, 1.1 * largest, np.abs(KERNELS[0]).sum()):
        assert max_eig_upper(KERNELS[0], 0.0, estimate) >= largest


def test_more_rows_than_lapack_counts_are_refused():
    wide = np.broadcast_to(np.float64(1.0), (32767, 32767))  # one number, no memory
    with pytest.raises(ValueError, match="32767 rows has no dense eigendecomposition"):
        spectrum_and_energy(wide, np.ones((32767, 1)))
    n = linalg.EIGH_ROWS
    assert 1 + 6 * n + 2 * n**2 < 2**31 <= 1 + 6 * (n + 1) + 2 * (n + 1) ** 2
