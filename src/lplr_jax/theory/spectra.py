"""Spectra of the probes and the energy of the residual along them, as the claims read them."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True)
class Spectra:
    """The probes that keep a spectrum, eigenvalues descending: column k - 1 is of the top k eigenvectors.

    Of a large kernel only the top ones are kept; one last column then has λ_min for all the others and their energy.

    ½‖∇L‖² >= (rate_k / s) (L - floor_k) at each of them. With E_k the energy past the k-th eigenvector over 2 s, of the
    kernel as it was computed, δ its error: rᵀΘr >= λ_k (‖r‖² - 2 s E_k) - δ ‖r‖², so that rate = λ_k - δ and
    floor = E_k λ_k / (λ_k - δ), both of them for the exact kernel.

    Attributes:
        epochs: step numbers.
        at: positions in the series.
        loss: L of the probe.
        error: δ.
        eigenvalues: λ_k.
        energy: ⟨v_k, r⟩² / (2 s), in units of L.
        rate: (λ_k - δ)_+.
        floor: E_k λ_k / (λ_k - δ); L where λ_k <= δ, and nothing is known.
        size: rows of the kernel.
    """

    epochs: Int[np.ndarray, " k"]
    at: Int[np.ndarray, " k"]
    loss: Float[np.ndarray, " k"]
    error: Float[np.ndarray, " k"]
    eigenvalues: Float[np.ndarray, "k m"]
    energy: Float[np.ndarray, "k m"]
    rate: Float[np.ndarray, "k m"]
    floor: Float[np.ndarray, "k m"]
    size: int

    def rows(self, k: int) -> int:
        """Return how many eigenvectors the first k columns stand for: all of them where the last column is theirs."""
        return self.size if k == self.eigenvalues.shape[1] else k


def rest_of(arrays: Mapping[str, np.ndarray], name: str, count: int) -> Float[np.ndarray, " k"]:
    """Return what a record of `count` probes keeps of `name` past its largest entries, summed; 0 where it keeps all."""
    if "spectrum_rest" not in arrays:
        return np.zeros(count)
    return np.asarray(arrays.get(f"{name}_rest", np.full(count, np.nan)), np.float64)


def read_spectra(
    arrays: Mapping[str, np.ndarray],
    epochs: Int[np.ndarray, " k"],
    at: Int[np.ndarray, " k"],
    loss: Float[np.ndarray, " k"],
    error: Float[np.ndarray, " k"],
    size: int,
) -> Spectra | None:
    """Return the spectra of a record under the squared loss; None where no probe keeps one with its energy.

    Args:
        arrays: of the record, probes in order.
        epochs: step numbers of the probes.
        at: their positions in the series.
        loss: L of each probe.
        error: of each kernel in spectral norm.
        size: rows of the kernel.
    """
    named = ("spectrum", "residual_energy")
    if not all(name in arrays for name in named):
        return None
    values, shares = (np.asarray(arrays[name], np.float64)[:, ::-1] for name in named)
    rest = rest_of(arrays, "residual_energy", epochs.size)
    # The residual of an exact fit has no direction.
    shares, rest = np.where((loss == 0)[:, None], 0.0, shares), np.where(loss == 0, 0.0, rest)
    kept = np.isfinite(values).all(axis=1) & np.isfinite(shares).all(axis=1) & np.isfinite(rest + loss + error)
    if not kept.any():
        return None
    values, shares, loss, error = values[kept], shares[kept], loss[kept], error[kept]
    energy = loss[:, None] * shares
    if "spectrum_rest" in arrays:
        least = np.asarray(arrays.get("ntk_min_eig", np.full(epochs.size, np.nan)), np.float64)[kept]
        energy = np.column_stack([energy, loss * rest[kept]])
        values = np.column_stack([values, np.fmin(least, values[:, -1])])
    past = np.zeros_like(energy)
    past[:, :-1] = np.cumsum(energy[:, :0:-1], axis=1)[:, ::-1]
    rate = np.maximum(values - error[:, None], 0.0)
    floor = np.divide(past * values, rate, out=np.repeat(loss[:, None], values.shape[1], axis=1), where=rate > 0)
    return Spectra(epochs[kept], at[kept], loss, error, values, energy, rate, floor, size)
