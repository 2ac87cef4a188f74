"""What is measured at a probe: the kernel, the point in float64, and the Hessian's extremes."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lplr_jax import diagnostics, linalg
from lplr_jax.models import Params
from lplr_jax.ntk.empirical import empirical_ntk
from lplr_jax.records import atomic_write
from lplr_jax.training import Objective


class KernelProbe:
    """Measures one point of a run; remembers Θ_0 for the shift and the last Hessian eigenvectors for the next start."""

    def __init__(
        self,
        objective: Objective,
        x: Any,
        y: np.ndarray,
        *,
        subset: np.ndarray,
        kernel: str,
        hessian_epochs: Collection[int] = (),
        save_to: Path | None = None,
    ) -> None:
        self._objective, self._x, self._y = objective, x, y
        self._subset, self._kernel, self._hessian_epochs, self._save_to = subset, kernel, hessian_epochs, save_to
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
        least = linalg.min_eig(theta)
        subset = diagnostics.principal_block(theta, self._subset, self._y.shape[1])
        values = {
            "ntk_min_eig": least.value,
            "ntk_min_eig_lower": least.lower,
            "ntk_min_eig_upper": least.upper,
            "ntk_max_eig": linalg.extremes(theta)[1],
            "ntk_min_eig_subset": linalg.min_eig(subset).value,
            "ntk_rayleigh": point.rayleigh(theta),
            "ntk_shift": 0.0 if theta is self._initial else linalg.spectral_norm(theta - self._initial),
            "probe_loss": point.loss,
            "probe_grad_sq_norm": point.grad_sq_norm,
        }
        if epoch in self._hessian_epochs:
            self._extremes = diagnostics.hessian_extremes(
                self._objective.value, params, self._x, self._y, reduction=scale, start=self._extremes
            )
            values |= {"sharpness": self._extremes.largest, "curvature_min": self._extremes.least}
        return values


def save_params(params: Params, path: Path) -> None:
    """Write the leaves of a pytree as one npz file, named by their paths in the tree."""
    name_of = partial(jax.tree_util.keystr, simple=True, separator=".")
    leaves = {name_of(key): np.asarray(leaf) for key, leaf in jax.tree.leaves_with_path(params)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **leaves)
