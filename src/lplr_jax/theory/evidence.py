"""What several claims take from a record: probes in order of epoch, intervals, errors, radii."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.curves.pairs import UNIT_32, UNIT_64, Ratio, kernel_error, pair_ratio, proof_radius
from lplr_jax.curves.summary import Summary, summarise
from lplr_jax.records import Record, RecordError
from lplr_jax.schema import HESSIAN_LOST, KERNEL_LOST, SCHEMA

HESSIAN_ERROR = 1e-3
"""Relative error allowed to measured Hessian eigenvalues; ten times the residual that float32 products leave."""


KERNEL_UNITS = SCHEMA["ntk_min_eig"].units
LIPSCHITZ_UNITS = SCHEMA["ntk_lipschitz_lower"].units


@dataclass(frozen=True)
class Interval:
    """λ_min at one probe: [lower, upper] holds it, `certified` where that includes the error of assembly."""

    value: float
    lower: float
    upper: float
    certified: bool


@dataclass(frozen=True)
class Evidence:
    """A record read for the claims: probes in order of epoch, up to a divergence, without those that are untrusted."""

    record: Record

    @cached_property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The record's arrays, probes sorted by epoch, cut at the divergence, less those of no trusted kernel."""
        arrays = dict(self.record.arrays)
        epochs = arrays.get("probe_epoch")
        if epochs is None:
            return arrays
        order = np.argsort(epochs, kind="stable")
        order = order[(epochs[order] < self.end) & ~self._lost(KERNEL_LOST)[order]]
        for name, array in self.record.arrays.items():
            for axis, dim in enumerate(SCHEMA[name].dims):
                if dim in ("probe", "other_probe"):
                    if array.shape[axis] != epochs.size:
                        raise RecordError(f"{name} has {array.shape[axis]} entries for {epochs.size} probes")
                    arrays[name] = np.take(arrays[name], order, axis=axis)
        return arrays

    def _lost(self, what: int) -> np.ndarray:
        """Return for each recorded probe whether its kernel or its Hessian could not be trusted."""
        flags = self.record.arrays.get("probe_untrusted", np.zeros(self.record["probe_epoch"].size))
        return np.isin(flags, (what, KERNEL_LOST + HESSIAN_LOST))

    def doubt(self, what: int) -> str:
        """Return, in words, which probes could not be trusted and why; empty where all could."""
        if "probe_epoch" not in self.record or "probe_untrusted" not in self.record:
            return ""
        lost = self._lost(what) & (self.record["probe_epoch"] < self.end)
        reasons = self.record.provenance.get("untrusted")
        reasons = reasons if isinstance(reasons, dict) else {}
        epochs = [int(epoch) for epoch in self.record["probe_epoch"][lost]]
        return "; ".join(f"epoch {epoch}: {reasons.get(str(epoch), 'no reason recorded')}" for epoch in epochs)

    @cached_property
    def end(self) -> int:
        """Number of epochs with a finite loss, counted from the initialisation."""
        loss = self.record["loss"]
        at = self.record.diverged_at
        return loss.size if at is None else at

    @cached_property
    def measured(self) -> np.ndarray:
        """For each epoch up to the divergence whether loss and gradient were to be measured there."""
        kept = np.arange(self.end) % int(self.record.config.get("diagnostics_every", 1)) == 0
        kept[self.epochs] = True
        return kept

    def has(self, name: str) -> bool:
        """Whether the record holds at least one number under this name."""
        return name in self.arrays and bool(np.isfinite(self.arrays[name]).any())

    def probe(self, name: str) -> Float[np.ndarray, " k"]:
        """Return an array of probes, NaN where the record has none."""
        if name in self.arrays:
            return np.asarray(self.arrays[name], np.float64)
        return np.full(self.epochs.size, np.nan)

    def number(self, name: str) -> float:
        """Return a scalar, NaN where the record has none."""
        return float(self.arrays[name]) if name in self.arrays else math.nan

    def series(self, name: str) -> Float[np.ndarray, " t"]:
        """Return a series over epochs up to the divergence."""
        return np.asarray(self.arrays[name][: self.end], np.float64)

    @cached_property
    def epochs(self) -> Int[np.ndarray, " k"]:
        """Epochs of the probes, ascending."""
        return np.asarray(self.arrays.get("probe_epoch", np.zeros(0)), np.int64)

    @cached_property
    def s(self) -> float:
        """The scale s of the loss."""
        return self.number("loss_scale")

    @cached_property
    def eta(self) -> float:
        """The step size η."""
        return self.number("learning_rate")

    @cached_property
    def probe_scale(self) -> float:
        """The scale of the loss of the probes, which is that of their samples where the kernel is of a subset."""
        n = self.number("n")
        return self.s * self.kernel_samples / n if self.s == n else self.s

    @cached_property
    def kernel_samples(self) -> int:
        """Samples of the probes' kernel."""
        return int(self.number("kernel_samples" if "kernel_samples" in self.arrays else "n"))

    @cached_property
    def trace(self) -> bool:
        """Whether the probes hold the output-averaged kernel."""
        return self.number("kernel_trace") == 1

    @cached_property
    def partial(self) -> str:
        """In words, what the kernel leaves out; empty where it is the full one."""
        left = []
        if self.kernel_samples < int(self.number("n")):
            left.append(f"kernel of {self.kernel_samples} of {int(self.number('n'))} samples")
        if self.trace:
            left.append("output-averaged kernel")
        return ", ".join(left)

    @cached_property
    def kernel_size(self) -> int:
        """Rows of the kernel."""
        return self.kernel_samples * (1 if self.trace else int(self.number("c")))

    @cached_property
    def affine(self) -> bool:
        """Whether the program was found to be affine in its parameters, so that the Jacobian does not depend on θ."""
        return self.number("affine_in_parameters") == 1

    @cached_property
    def summary(self) -> Summary:
        """Regime, bracket and rates."""
        return summarise(self.record)

    @cached_property
    def certified(self) -> np.ndarray:
        """For each probe whether its interval includes the error of assembly and is of the full kernel."""
        return np.isfinite(self.probe("ntk_assembly_error")) & (not self.partial)

    @cached_property
    def kernel_error(self) -> Float[np.ndarray, " k"]:
        """Error of the kernel in spectral norm: the recorded bound, or size · u · λ_max as an estimate of rounding."""
        return kernel_error(self.probe("ntk_assembly_error"), self.probe("ntk_max_eig"), self.kernel_size)

    def interval(self, k: int) -> Interval:
        """Return λ_min at the k-th probe with its bounds."""
        value, error = float(self.probe("ntk_min_eig")[k]), float(self.kernel_error[k])
        if not self.has("ntk_min_eig_lower"):
            return Interval(value, value - error, value + error, False)
        lower, upper = (float(self.probe(f"ntk_min_eig_{end}")[k]) for end in ("lower", "upper"))
        if not np.isfinite(self.probe("ntk_assembly_error")[k]):
            lower, upper = lower - error, upper + error
        return Interval(value, lower, upper, bool(self.certified[k]))

    @cached_property
    def budget(self) -> Interval | None:
        """λ_0 with its bounds; None where there is no probe at epoch 0."""
        if not (self.epochs.size and self.epochs[0] == 0 and np.isfinite(self.probe("ntk_min_eig")[0])):
            return None
        return self.interval(0)

    @cached_property
    def radius(self) -> float:
        """The trajectory's largest drift, as recorded: the least radius of a ball around θ_0 that holds the run."""
        return float(np.nanmax(self.series("drift")))

    @cached_property
    def ratio(self) -> Ratio:
        """Largest ‖Θ_s - Θ_t‖₂ / ‖θ_s - θ_t‖ over pairs of probes, less the error of both kernels."""
        if self.has("ntk_pair_shift") and self.has("param_pair_distance"):
            return pair_ratio(
                self.arrays["ntk_pair_shift"], self.arrays["param_pair_distance"], self.kernel_error, self.epochs
            )
        if not self.has("ntk_shift"):
            return Ratio(math.nan, None, None)
        # Without pairs, those with the initialisation are left.
        shift, distance = np.full((2, self.epochs.size, self.epochs.size), np.nan)
        shift[0], distance[0] = self.probe("ntk_shift"), self.series("drift")[self.epochs]
        return pair_ratio(shift, distance, self.kernel_error, self.epochs)

    @property
    def proof_radius(self) -> float:
        """Radius that proofs are made for."""
        return proof_radius(self.series("drift"), int(self.number("p")))

    def rounding(self, *, single: bool = True) -> float:
        """Return the relative error γ of sums in loss and gradient: in training precision, or in float64.

        Σ of the fan-ins of D equal dense layers, forward and backward, is 2 √(D p), at most 8 √p up to depth 16;
        γ = √k u is the probabilistic bound for sums of k terms (Higham and Mary 2019).
        """
        double = not single or self.record.config.get("dtype", "float32") == "float64"
        terms = self.number("n") * self.number("c") + 8 * math.sqrt(self.number("p"))
        return math.sqrt(terms) * (UNIT_64 if double else UNIT_32)

    @cached_property
    def loss_noise(self) -> Float[np.ndarray, " t"]:
        """Rounding of the recorded loss: outputs of the size of the largest residual, each off by γ."""
        loss, gamma = self.series("loss"), self.rounding()
        largest = float(loss[:1].max()) if loss.size else 0.0
        return 2 * gamma * np.sqrt(loss * np.maximum(largest, loss)) + gamma**2 * np.maximum(largest, loss)

    @cached_property
    def gradient_noise(self) -> Float[np.ndarray, " t"]:
        """Rounding of the recorded ‖∇L‖²: a residual off by γ moves the gradient by √λ_max times as much, over s."""
        largest = np.sqrt(2 * self.s * np.maximum(self.series("loss")[:1], self.series("loss")))
        steepest = float(np.nanmax(self.probe("ntk_max_eig"), initial=0.0))
        off = 4 * self.rounding() * math.sqrt(max(steepest, 0.0)) * largest / self.s
        return 2 * np.sqrt(self.series("grad_sq_norm")) * off + off**2
