"""What is measured at a probe: the kernel, the point in float64, and the Hessian's extremes.

Kernel, loss and gradient are those of the samples that a probe is given, be they all data or a subset of them.
"""

import logging
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lplr_jax import diagnostics, linalg, theory
from lplr_jax.models import Params
from lplr_jax.ntk.empirical import Precision, empirical_ntk
from lplr_jax.records import atomic_write
from lplr_jax.training import Objective

_LOG = logging.getLogger(__name__)

HESSIAN_TOLERANCE: dict[Precision, float] = {"float64": 1e-6, "float32": 1e-4}
"""Residual of the Hessian's eigenpairs over the larger eigenvalue; rounding of float32 products leaves some 2e-5."""


class KernelProbe:
    """Measures one point of a run; remembers Θ_0 for the shift and the last Hessian eigenvectors for the next start."""

    def __init__(
        self,
        objective: Objective,
        x: Any,
        y: np.ndarray,
        *,
        subset: np.ndarray | None,
        kernel: str,
        hessian_epochs: Collection[int] = (),
        hessian_precision: Precision = "float64",
        spectrum_epochs: Collection[int] = (),
        save_to: Path | None = None,
    ) -> None:
        self._objective, self._x, self._y = objective, x, y
        self._subset, self._kernel, self._hessian_epochs, self._save_to = subset, kernel, hessian_epochs, save_to
        self._hessian_precision: Precision = hessian_precision
        self._spectrum_epochs = spectrum_epochs
        self._points: dict[int, Params] = {}
        self._kernels: dict[int, np.ndarray] = {}
        self._spectra: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._initial: np.ndarray | None = None
        self._extremes: diagnostics.Extremes | None = None

    def __call__(self, params: Params, epoch: int) -> Mapping[str, float]:
        """Return the values of one probe by their names in the record."""
        apply_fn, scale = self._objective.apply_fn, self._objective.loss_scale
        if self._save_to is not None:
            save_params(params, self._save_to / f"epoch_{epoch:06d}.npz")
        theta = np.asarray(empirical_ntk(apply_fn, params, self._x, kernel=self._kernel))
        if self._initial is None:
            self._initial = theta
        point = diagnostics.evaluate_point(apply_fn, params, self._x, self._y, loss_scale=scale)
        least, assembly_error = theory.min_eig_with_assembly(apply_fn, params, self._x, theta)
        self._points[epoch], self._kernels[epoch] = jax.device_get(params), theta
        if epoch in self._spectrum_epochs:
            self._spectra[epoch] = theory.spectrum_and_energy(theta, point.residual)
        values = {
            "ntk_min_eig": least.value,
            "ntk_min_eig_lower": least.lower,
            "ntk_min_eig_upper": least.upper,
            "ntk_assembly_error": assembly_error,
            "ntk_max_eig": linalg.max_eig(theta),
            "ntk_effective_rank": diagnostics.effective_rank(theta),
            "ntk_rayleigh": point.rayleigh(theta),
            "ntk_shift": 0.0 if theta is self._initial else linalg.spectral_norm(theta - self._initial),
            "probe_loss": point.loss,
            "probe_grad_sq_norm": point.grad_sq_norm,
        }
        if self._subset is not None:
            block = diagnostics.principal_block(theta, self._subset, self._y.shape[1])
            values["ntk_min_eig_subset"] = linalg.min_eig(block).value
        if epoch in self._hessian_epochs:
            self._extremes = diagnostics.hessian_extremes(
                self._objective.value,
                params,
                self._x,
                self._y,
                reduction=scale,
                dtype=self._hessian_precision,
                tolerance=HESSIAN_TOLERANCE[self._hessian_precision],
                start=self._extremes,
            )
            values |= {"sharpness": self._extremes.largest, "curvature_min": self._extremes.least}
        return values

    def remembered(self, epoch: int) -> Mapping[str, np.ndarray]:
        """Return what the probe of an epoch keeps for later ones and for `close`, as arrays by name."""
        leaves = {f"point-{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self._points[epoch]))}
        kept = {"kernel": self._kernels[epoch], **leaves}
        if epoch in self._spectra:
            kept["spectrum"], kept["residual_energy"] = self._spectra[epoch]
        if self._extremes is not None and epoch in self._hessian_epochs:
            kept["hessian_least"], kept["hessian_largest"] = self._extremes.least_vector, self._extremes.largest_vector
            numbers = ("least", "largest", "least_residual", "largest_residual")
            kept["hessian"] = np.array([getattr(self._extremes, name) for name in numbers])
        return kept

    def recall(self, epoch: int, arrays: Mapping[str, np.ndarray], like: Params) -> None:
        """Take back what the probe of an epoch kept."""
        self._kernels[epoch] = arrays["kernel"]
        if self._initial is None:
            self._initial = arrays["kernel"]
        structure = jax.tree.structure(like)
        leaves = [arrays[f"point-{i}"] for i in range(structure.num_leaves)]
        self._points[epoch] = jax.tree.unflatten(structure, leaves)
        if "spectrum" in arrays:
            self._spectra[epoch] = (arrays["spectrum"], arrays["residual_energy"])
        if "hessian" in arrays:
            numbers = ("least", "largest", "least_residual", "largest_residual")
            self._extremes = diagnostics.Extremes(
                **dict(zip(numbers, map(float, arrays["hessian"]), strict=True)),
                converged=False,
                num_matvecs=0,
                least_vector=arrays["hessian_least"],
                largest_vector=arrays["hessian_largest"],
            )

    def close(self, arrays: Mapping[str, np.ndarray], *, search_steps: int, seed: int) -> dict[str, np.ndarray]:
        """Return what only the whole run can tell, by names in the record: spectra, pairs of probes, bounds of L_Θ, R*.

        Args:
            arrays: what the run measured, by record name.
            search_steps: steps of the search for L_Θ; 0 for none.
            seed: of the search's random directions.
        """
        if search_steps:
            _LOG.info("after the last epoch: pairs of probes, and L_Θ from below and above")
        closing = theory.closing_arrays(
            self._objective,
            self._x,
            self._y,
            points=self._points,
            kernels=self._kernels,
            arrays=arrays,
            search_steps=search_steps,
            kernel=self._kernel,
            seed=seed,
        )
        if self._spectra:
            shape = (arrays["probe_epoch"].size, self._y.size)
            spectrum, energy = np.full(shape, np.nan), np.full(shape, np.nan)
            for k, epoch in enumerate(arrays["probe_epoch"]):
                if int(epoch) in self._spectra:
                    spectrum[k], energy[k] = self._spectra[int(epoch)]
            closing |= {"spectrum": spectrum, "residual_energy": energy}
        return closing


def save_params(params: Params, path: Path) -> None:
    """Write the leaves of a pytree as one npz file, named by their paths in the tree."""
    name_of = partial(jax.tree_util.keystr, simple=True, separator=".")
    leaves = {name_of(key): np.asarray(leaf) for key, leaf in jax.tree.leaves_with_path(params)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **leaves)
