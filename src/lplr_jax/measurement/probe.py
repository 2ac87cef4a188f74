"""What is measured at a probe: the kernel, the point in float64, and the Hessian's extremes.

Kernel, loss and gradients are those of the samples that a probe is given, be they all data or a subset of them.
"""

import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Num

from lplr_jax import diagnostics, linalg
from lplr_jax.files import atomic_write
from lplr_jax.losses import Objective, Squared
from lplr_jax.measurement import bridge
from lplr_jax.measurement.closing import closing_arrays
from lplr_jax.measurement.enclosed import NAMES as ENCLOSED
from lplr_jax.measurement.enclosed import enclose
from lplr_jax.measurement.gradients import flat_parameters, gradient_at
from lplr_jax.measurement.interpolation import duplicate_floor, find_interpolant
from lplr_jax.measurement.kept import KeptKernels
from lplr_jax.measurement.kernel import kernel_values, recorded_spectra, spectrum_and_energy
from lplr_jax.measurement.noise import Batches, batch_decrease, block_noise, sample_noise
from lplr_jax.measurement.peer import peer_difference, peer_samples
from lplr_jax.measurement.rivals import critical_step, kernel_rivals
from lplr_jax.ntk.empirical import Precision, empirical_ntk
from lplr_jax.parameters import count_parameters
from lplr_jax.proofs.assembly import Proof, assembly_bound, dense_network
from lplr_jax.schema import HESSIAN_LOST, KERNEL_LOST
from lplr_jax.types import Params

_LOG = logging.getLogger(__name__)

HESSIAN_TOLERANCE: dict[Precision, float] = {"float64": 1e-6, "float32": 1e-4}
"""Residual of the Hessian's eigenpairs over the larger eigenvalue; rounding of float32 products leaves some 2e-5."""


KERNEL_VALUES = (
    "ntk_min_eig",
    "ntk_min_eig_lower",
    "ntk_min_eig_upper",
    "ntk_assembly_error",
    "ntk_max_eig",
    "ntk_max_eig_upper",
    "ntk_effective_rank",
    "ntk_rayleigh",
    "ntk_shift",
    "probe_loss",
    "probe_grad_sq_norm",
    "rsc_cosine",
    "gauss_newton_curvature",
    "critical_step",
)
"""Names in the record of what is measured of the kernel, and of loss and gradient beside it."""


Epochs = Collection[int] | Callable[[int], bool]
"""At which of the probes something is measured: step numbers, or a function of one; asked once a probe, in order."""


def _among(epoch: int, epochs: Epochs) -> bool:
    return bool(epochs(epoch)) if callable(epochs) else epoch in epochs


class KernelProbe:
    """Measures one point of a run; remembers Θ_0 for the shift and the last Hessian eigenvectors for the next start.

    A number that the arithmetic loses (NaN from a device, a solver that fails) does not end the run: what hangs on it
    is NaN, flagged in `probe_untrusted`, its reason is announced and kept in `untrusted`.
    """

    def __init__(
        self,
        objective: Objective,
        x: Any,
        y: Num[Any, "n ..."],
        *,
        subset: np.ndarray | None,
        kernel: str,
        hessian_epochs: Epochs = (),
        hessian_precision: Precision = "float64",
        spectrum_epochs: Epochs = (),
        save_to: Path | None = None,
        most_bytes: int | None = None,
        batches: Batches | None = None,
        certify_floor: float = 0.0,
        learning_rate: float = math.nan,
        hessian_of: tuple[Objective, Any, Any] | None = None,
        second_opinion: bool = True,
        proof: Proof = "never",
    ) -> None:
        """Set up.

        Args:
            objective: what is trained.
            x: inputs of the samples that are measured.
            y: their targets.
            subset: those of them whose λ_min stands beside that of all; None for none.
            kernel: one of `lplr_jax.ntk.KERNELS`.
            hessian_epochs: at which probes the Hessian's extremes are measured.
            hessian_precision: of the products for them.
            spectrum_epochs: at which probes the whole spectrum is kept.
            save_to: where to keep the parameters of every probe.
            most_bytes: of kernels that are kept in memory for the pairs of probes, before others go to disk; None for
                a third of the machine's.
            batches: mini-batches whose noise is measured; None for none.
            certify_floor: seconds of two cores for a certificate of zero loss after the last probe; 0 for none.
            learning_rate: η of the exact step whose decrease is enclosed; NaN for none.
            hessian_of: function of the same θ, inputs and targets whose Hessian is measured; None for that of the
                kernel.
            second_opinion: whether the first and the last kernel are held against those of another implementation.
            proof: whether λ_min of networks that are not only dense and convolutional is proved: "auto" at step 0
                where that takes a minute at most, "always" at every probe, "never".
        """
        self._proof: Proof = proof
        self._peer = second_opinion
        self._curved_by = hessian_of or (objective, x, y)
        self._learning_rate, self._encloses = learning_rate, isinstance(objective.loss, Squared)
        self._certify_floor = certify_floor
        self._batches = batches
        self._objective, self._x, self._y = objective, x, y
        self._subset, self._kernel, self._hessian_epochs, self._save_to = subset, kernel, hessian_epochs, save_to
        self._hessian_precision: Precision = hessian_precision
        self._spectrum_epochs = spectrum_epochs
        self._points: dict[int, Params] = {}
        self._kernels = KeptKernels(most_bytes)
        self._spectra: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._initial: np.ndarray | None = None
        self._extremes: diagnostics.Extremes | None = None
        self._curved: int | None = None
        self.untrusted: dict[str, str] = {}

    def __call__(self, params: Params, epoch: int) -> Mapping[str, float]:
        """Return the values of one probe by their names in the record."""
        if self._save_to is not None:
            save_params(params, self._save_to / f"epoch_{epoch:06d}.npz")
        values: dict[str, float] = dict.fromkeys(KERNEL_VALUES, math.nan)
        if self._subset is not None:
            values["ntk_min_eig_subset"] = math.nan
        if self._batches is not None:
            values |= dict.fromkeys(self._batches.names, math.nan)
        if self._encloses:
            values |= dict.fromkeys(ENCLOSED, math.nan)
        if not isinstance(self._objective.loss, Squared):
            values |= dict.fromkeys(bridge.names(self._objective.loss), math.nan)
        with self._losing("kernel", KERNEL_LOST, epoch, values):
            values |= self._measure_kernel(params, epoch)
        if _among(epoch, self._hessian_epochs):
            self._curved = epoch
            values |= dict.fromkeys(("sharpness", "curvature_min"), math.nan)
            with self._losing("Hessian", HESSIAN_LOST, epoch, values):
                self._extremes = self._measure_hessian(params)
                values |= {"sharpness": self._extremes.largest, "curvature_min": self._extremes.least}
        return values

    @contextmanager
    def _losing(self, what: str, flag: int, epoch: int, values: dict[str, float]) -> Iterator[None]:
        """Go on without what the body measures where the arithmetic loses its number, and say so."""
        try:
            yield
        except linalg.FAILURES as error:
            values["probe_untrusted"] = values.get("probe_untrusted", 0) + flag
            self._lose(str(epoch), f"{what}: {error}")

    def _lose(self, where: str, reason: str) -> None:
        self.untrusted[where] = "; ".join(filter(None, (self.untrusted.get(where, ""), reason)))
        at = f"epoch {where}" if where.isdecimal() else where
        _LOG.warning("%s: cannot be trusted and is left out: %s", at, reason)

    def _measure_kernel(self, params: Params, epoch: int) -> dict[str, float]:
        apply_fn = self._objective.apply_fn
        theta = linalg.as_symmetric(np.asarray(empirical_ntk(apply_fn, params, self._x, kernel=self._kernel)))
        point = diagnostics.evaluate_point(apply_fn, params, self._x, self._y, loss=self._objective.loss)
        network = dense_network(apply_fn, params, self._x)
        bound = None if network is None or not (found := network.assembly(theta)).finite else found
        if network is None and (self._proof == "always" or epoch == 0):
            bound = assembly_bound(apply_fn, params, self._x, theta, proof=self._proof)
        values = kernel_values(apply_fn, params, self._x, theta, point, bound=bound)
        if network is not None and bound is not None and self._encloses:
            values |= enclose(
                network,
                bound,
                np.asarray(self._y, np.float64).reshape(network.outputs.shape),
                scale=point.loss_scale,
                min_eig_lower=values["ntk_min_eig_lower"],
                max_eig_upper=values["ntk_max_eig_upper"],
                learning_rate=self._learning_rate,
            )
        values |= kernel_rivals(theta, point.gradient, point.loss_scale)
        if not isinstance(self._objective.loss, Squared):
            p = count_parameters(params)
            values |= bridge.bridge_values(theta, point, self._objective.loss, p, bound=bound)
        curvature = values["gauss_newton_curvature"]
        guess = 2 / curvature if curvature > 0 else math.nan
        objective, x, y = self._curved_by
        values["critical_step"] = critical_step(objective, params, x, y, guess=guess)
        if self._batches is not None:
            values |= sample_noise(theta, point.gradient, point.loss_scale)
            if self._batches.blocks is not None:
                values |= block_noise(theta, point.gradient, point.loss_scale, self._batches.blocks)
            if math.isfinite(self._batches.learning_rate):
                values |= batch_decrease(self._objective, params, self._x, self._y, self._batches)
        values["ntk_effective_rank"] = diagnostics.effective_rank(theta)
        if self._subset is not None:
            block = diagnostics.principal_block(theta, self._subset, point.gradient.shape[1])
            values["ntk_min_eig_subset"] = linalg.min_eig(block).value
        initial = theta if epoch == 0 else self._initial
        values["ntk_shift"] = math.nan
        if initial is not None:
            values["ntk_shift"] = 0.0 if initial is theta else linalg.spectral_norm(theta - initial)
        if _among(epoch, self._spectrum_epochs) and theta.shape[0] > linalg.EIGH_ROWS:
            _LOG.warning("epoch %s: no spectrum, as LAPACK decomposes at most %d rows", epoch, linalg.EIGH_ROWS)
        elif _among(epoch, self._spectrum_epochs):
            self._spectra[epoch] = spectrum_and_energy(theta, point.gradient)
        # Last, so that a probe is remembered whole or not at all.
        self._initial = initial
        if self._kernels.keep(epoch, theta):
            self._points[epoch] = jax.device_get(params)
        return values

    def _measure_hessian(self, params: Params) -> diagnostics.Extremes:
        objective, x, y = self._curved_by
        found = diagnostics.hessian_extremes(
            objective.value,
            params,
            x,
            y,
            reduction=objective.reduction,
            dtype=self._hessian_precision,
            tolerance=HESSIAN_TOLERANCE[self._hessian_precision],
            start=self._extremes,
        )
        if not math.isfinite(found.least + found.largest):
            raise linalg.UntrustedError("a product with the Hessian is not finite")
        return found

    def remembered(self, epoch: int) -> Mapping[str, np.ndarray]:
        """Return what the probe of an epoch keeps for later ones and for `close`, as arrays by name."""
        kept: dict[str, np.ndarray] = {}
        if epoch in self._kernels:
            kept = {f"point-{i}": np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(self._points[epoch]))}
            kept["kernel"] = self._kernels[epoch]
        if str(epoch) in self.untrusted:
            kept["untrusted"] = np.array(self.untrusted[str(epoch)])
        if epoch in self._spectra:
            kept["spectrum"], kept["residual_energy"] = self._spectra[epoch]
        if self._extremes is not None and epoch == self._curved:
            kept["hessian_least"], kept["hessian_largest"] = self._extremes.least_vector, self._extremes.largest_vector
            numbers = ("least", "largest", "least_residual", "largest_residual")
            kept["hessian"] = np.array([getattr(self._extremes, name) for name in numbers])
        return kept

    def recall(self, epoch: int, arrays: Mapping[str, np.ndarray], like: Params) -> None:
        """Take back what the probe of an epoch kept."""
        if "kernel" in arrays and epoch == 0:
            self._initial = arrays["kernel"]
        if "kernel" in arrays and self._kernels.keep(epoch, arrays["kernel"]):
            structure = jax.tree.structure(like)
            leaves = [arrays[f"point-{i}"] for i in range(structure.num_leaves)]
            self._points[epoch] = jax.tree.unflatten(structure, leaves)
        if "untrusted" in arrays:
            self.untrusted[str(epoch)] = str(arrays["untrusted"])
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

    def forget(self, epoch: int) -> None:
        """Drop what the probes from an epoch on kept."""
        for kept in (self._points, self._kernels, self._spectra):
            for later in [at for at in kept if at >= epoch]:
                del kept[later]
        self.untrusted = {at: why for at, why in self.untrusted.items() if not at.isdecimal() or int(at) < epoch}

    def close(
        self, arrays: Mapping[str, np.ndarray], *, search_steps: int, seed: int, whole: bool = True
    ) -> dict[str, np.ndarray]:
        """Return what only the whole run can tell, by names in the record.

        Spectra, pairs of probes, bounds of L_Θ, R*, and what certifies zero loss nearby.

        Args:
            arrays: what the run measured, by record name.
            search_steps: steps of the search for L_Θ; 0 for none.
            seed: of the search's random directions.
            whole: whether the run has ended, so that zero loss is worth certifying.
        """
        if search_steps:
            _LOG.info("after the last epoch: pairs of probes, and L_Θ from below and above")
        closing = closing_arrays(
            self._objective,
            self._x,
            self._y,
            points=self._points,
            kernels=self._kernels,
            arrays=arrays,
            search_steps=search_steps,
            kernel=self._kernel,
            seed=seed,
            lose=partial(self._lose, "closing"),
        )
        if self._kernels:
            n = len(self._y)
            rows = next(iter(self._kernels.values())).shape[0]
            closing["probe_loss_scale"] = np.asarray(self._objective.scale(n, rows // n))
            if self._peer:
                closing |= self._second_opinion(arrays["probe_epoch"], rows // n, seed)
            if isinstance(self._objective.loss, Squared):
                closing["loss_floor_lower"] = np.asarray(
                    duplicate_floor(self._x, np.reshape(self._y, (n, -1)), float(closing["probe_loss_scale"]))
                )
                if whole and self._certify_floor > 0:
                    closing |= self._interpolant(arrays["probe_epoch"])
        if self._spectra:
            closing |= recorded_spectra([self._spectra.get(int(epoch)) for epoch in arrays["probe_epoch"]])
        return closing

    def _interpolant(self, epochs: np.ndarray) -> dict[str, np.ndarray]:
        """Return what certifies a network of zero loss near the last probe; nothing where none is reached."""
        first, last = min(self._points), max(self._points)
        if first != 0:
            return {}
        _LOG.info("zero loss near the end of the run: a point of it, and its certificate")
        try:
            found = find_interpolant(
                self._objective,
                self._points[last],
                self._x,
                self._y,
                initial=self._points[0],
                seconds=self._certify_floor,
                kernel=self._kernel,
            )
        except linalg.FAILURES as error:
            self._lose("closing", f"certificate of zero loss: {error}")
            return {}
        if found is None:
            return {}
        if self._save_to is not None:
            save_params(found.params, self._save_to / "interpolant.npz")
        aims = np.full(epochs.size, np.nan)
        end = flat_parameters(found.params)
        for place, epoch in enumerate(epochs):
            if int(epoch) in self._points:
                point = self._points[int(epoch)]
                aims[place] = gradient_at(self._objective, point, self._x, self._y) @ (flat_parameters(point) - end)
        return {**found.arrays(), "aiming_inner": aims}

    def _second_opinion(self, epochs: np.ndarray, outputs: int, seed: int) -> dict[str, np.ndarray]:
        """Return how far the first and the last kernel are from those of another implementation; nothing without it."""
        samples = peer_samples(len(self._y), outputs, self._subset, seed)
        differences = np.full(epochs.size, np.nan)
        known = [place for place, epoch in enumerate(epochs) if int(epoch) in self._kernels]
        for place in sorted({known[0], known[-1]}):
            epoch = int(epochs[place])
            point, theta = self._points[epoch], self._kernels[epoch]
            found = peer_difference(self._objective.apply_fn, point, self._x, theta, samples, kernel=self._kernel)
            if found is None:
                return {}
            differences[place] = found
        return {"ntk_peer_difference": differences}


def save_params(params: Params, path: Path) -> None:
    """Write the leaves of a pytree as one npz file, named by their paths in the tree."""
    name_of = partial(jax.tree_util.keystr, simple=True, separator=".")
    leaves = {name_of(key): np.asarray(leaf) for key, leaf in jax.tree.leaves_with_path(params)}
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        np.savez(file, allow_pickle=False, **leaves)
