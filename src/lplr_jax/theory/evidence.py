"""What several claims take from a record: what was seen, the method, probes in order, intervals, errors, radii.

Series are indexed by position; `steps` holds the step number of each position, and `at` the positions of the probes.
"""

import importlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float, Int

from lplr_jax.curves.pairs import UNIT_32, UNIT_64, Ratio, kernel_error, pair_ratio, proof_radius
from lplr_jax.curves.summary import Summary, summarise
from lplr_jax.records import Record, RecordError
from lplr_jax.schema import HESSIAN_LOST, KERNEL_LOST, SCHEMA
from lplr_jax.theory.method import Method, measure, measure_batches
from lplr_jax.theory.spectra import Spectra, read_spectra
from lplr_jax.theory.verdict import Verdict

HESSIAN_ERROR = 1e-3
"""Relative error allowed to measured Hessian eigenvalues; ten times the residual that float32 products leave."""
SUMS = 1e-9
"""Relative error allowed to sums and norms formed twice in float64."""
GROWTH = {
    "squared": 2.0,
    "squared_hinge": 2.0,
    "huber(": 2.0,
    "logistic": 0.40727,
    "softmax_cross_entropy": 0.81454,
    "softmax_cross_entropy(": 1.0,
    "soft_cross_entropy": 1.0,
}
"""k with ‖∂ℓ_i/∂f_i‖² <= k ℓ_i, rounded up, by the loss's name, or by what stands before its numbers.

sup (1 - e^{-x})²/x = .407265 for logistic loss, twice that for cross-entropy of classes; of other distributions
‖p - τ‖₂² <= ½‖p - τ‖₁² <= KL(τ‖p) <= ℓ_i.
"""


KERNEL_UNITS = SCHEMA["ntk_min_eig"].units
LIPSCHITZ_UNITS = SCHEMA["ntk_lipschitz_lower"].units
LOSS_UNITS = SCHEMA["loss"].units


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
    def _verdicts(self) -> dict[str, Verdict]:
        return {}

    def verdict(self, claim: str) -> Verdict:
        """Return the verdict on a claim, by its id; each is judged once.

        Raises:
            KeyError: for a name that is no claim's.
        """
        if claim not in self._verdicts:
            # The registry stands above the evidence, which no claim but asks for another one's verdict.
            judge = importlib.import_module("lplr_jax.theory.claims").judge
            self._verdicts[claim] = judge(claim, self)
        return self._verdicts[claim]

    @cached_property
    def loss(self) -> str:
        """Name of the loss."""
        return getattr(self.record, "loss", "squared")

    @cached_property
    def growth(self) -> float:
        """The k with ‖∂ℓ_i/∂f_i‖² <= k ℓ_i; NaN for a loss that has none, or is not known here."""
        return GROWTH.get(self.loss, GROWTH.get(f"{self.loss.partition('(')[0]}(", math.nan))

    @cached_property
    def arrays(self) -> Mapping[str, np.ndarray]:
        """The record's arrays, probes sorted by epoch, cut at the divergence, less those of no trusted kernel."""
        arrays = dict(self.record.arrays)
        of_probes = {name: axes for name in arrays if (axes := _probe_axes(name))}
        if "probe_epoch" not in arrays:  # nobody can say where they belong
            return {name: array for name, array in arrays.items() if name not in of_probes}
        epochs = arrays["probe_epoch"]
        order = np.argsort(epochs, kind="stable")
        last = int(self.steps[-1]) if self.end else -1
        order = order[(epochs[order] <= last) & ~self._lost(KERNEL_LOST)[order]]
        for name, axes in of_probes.items():
            for axis in axes:
                if arrays[name].shape[axis] != epochs.size:
                    raise RecordError(f"{name} has {arrays[name].shape[axis]} entries for {epochs.size} probes")
            for axis in axes:
                arrays[name] = np.take(arrays[name], order, axis=axis)
        return arrays

    def _lost(self, what: int) -> np.ndarray:
        """Return for each recorded probe whether its kernel or its Hessian could not be trusted."""
        flags = self.record.arrays.get("probe_untrusted", np.zeros(self.record["probe_epoch"].size))
        return np.isin(flags, (what, KERNEL_LOST + HESSIAN_LOST))

    def doubt(self, what: int) -> str:
        """Return, in words, which probes could not be trusted and why; empty where all could."""
        if not (self.end and "probe_epoch" in self.record and "probe_untrusted" in self.record):
            return ""
        lost = self._lost(what) & (self.record["probe_epoch"] <= self.steps[-1])
        reasons = self.record.provenance.get("untrusted")
        reasons = reasons if isinstance(reasons, dict) else {}
        epochs = [int(epoch) for epoch in self.record["probe_epoch"][lost]]
        return "; ".join(f"epoch {epoch}: {reasons.get(str(epoch), 'no reason recorded')}" for epoch in epochs)

    def missing(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return which of the arrays the record lacks; those that compare probes are missed from two probes on."""
        several = self.epochs.size > 1
        return tuple(
            name
            for name in names
            if name not in self.arrays and (several or not (name == "ntk_shift" or "other_probe" in SCHEMA[name].dims))
        )

    @cached_property
    def end(self) -> int:
        """Number of entries of the series up to the last finite loss, counted from the initialisation."""
        finite = np.flatnonzero(np.isfinite(self.record["loss"]))
        return int(finite[-1]) + 1 if finite.size else 0

    @cached_property
    def steps(self) -> Int[np.ndarray, " t"]:
        """Step number of each entry of the series, up to the divergence."""
        return np.asarray(self.record["epoch"][: self.end], np.int64)

    @cached_property
    def diverged_at(self) -> int | None:
        """Step number from which on nothing is finite, None where the run stayed finite."""
        if self.record.diverged_at is None or self.end >= self.record["epoch"].size:
            return None
        return int(self.record["epoch"][self.end])

    @cached_property
    def claimed(self) -> Bool[np.ndarray, " t"]:
        """For each entry whether the record says that loss, gradient and drift were measured there."""
        flags = self.record.arrays.get("seen")
        return np.isfinite(self.series("loss")) if flags is None else np.asarray(flags[: self.end]) == 1

    @cached_property
    def seen(self) -> Bool[np.ndarray, " t"]:
        """For each entry whether loss, gradient and drift are known there."""
        known = [np.isfinite(self.series(name)) for name in ("loss", "grad_sq_norm", "drift")]
        return self.claimed & np.logical_and.reduce(known)

    @cached_property
    def seen_steps(self) -> Int[np.ndarray, " k"]:
        """Positions t from which a step was seen: t and t + 1 are both entries, and both are seen."""
        return np.flatnonzero((np.diff(self.steps) == 1) & self.seen[:-1] & self.seen[1:])

    @cached_property
    def total(self) -> int:
        """Number of steps that the run took, up to the divergence."""
        return int(self.steps[-1] - self.steps[0]) if self.end else 0

    @cached_property
    def whole(self) -> bool:
        """Whether every iterate was seen, so that the largest drift is that of the run."""
        return bool(self.seen.all()) and self.total == self.end - 1

    @cached_property
    def method(self) -> Method:
        """The method of the run, as its steps show it."""
        return measure(self)

    @cached_property
    def batch_method(self) -> Method:
        """The method of mini-batch steps, as they lie to the gradients of their batches."""
        return measure_batches(self)

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
        """Return a series up to the divergence, NaN where the record has none."""
        if name not in self.record:
            return np.full(self.end, np.nan)
        return np.asarray(self.record[name][: self.end], np.float64)

    @cached_property
    def epochs(self) -> Int[np.ndarray, " k"]:
        """Step numbers of the probes, ascending."""
        return np.asarray(self.arrays.get("probe_epoch", np.zeros(0)), np.int64)

    @cached_property
    def at(self) -> Int[np.ndarray, " k"]:
        """Positions of the probes in the series."""
        return np.minimum(np.searchsorted(self.steps, self.epochs), max(self.end - 1, 0))

    @cached_property
    def s(self) -> float:
        """The scale s of the loss."""
        return self.number("loss_scale")

    @cached_property
    def eta(self) -> float:
        """The step size η: as recorded, or the median of the measured ones where it is not."""
        recorded = self.number("learning_rate")
        return recorded if math.isfinite(recorded) else self.method.eta

    @cached_property
    def probe_scale(self) -> float:
        """The scale of the loss of the probes, which is that of their samples where the kernel is of a subset."""
        recorded, n = self.number("probe_loss_scale"), self.number("n")
        if math.isfinite(recorded):
            return recorded
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
    def certified(self) -> Bool[np.ndarray, " k"]:
        """For each probe whether its interval includes the error of assembly and is of the full kernel."""
        return np.isfinite(self.probe("ntk_assembly_error")) & (not self.partial)

    @cached_property
    def kernel_error(self) -> Float[np.ndarray, " k"]:
        """Error of the kernel in spectral norm: the recorded bound, or size · u · λ_max as an estimate of rounding.

        NaN where neither is known.
        """
        bound, largest = self.probe("ntk_assembly_error"), self.probe("ntk_max_eig")
        known = np.isfinite(bound) | np.isfinite(largest)
        return np.where(known, kernel_error(bound, largest, self.kernel_size, self.probe_unit), np.nan)

    def interval(self, k: int) -> Interval:
        """Return λ_min at the k-th probe with its bounds; an end that was not recorded is the value's own error off."""
        value, error = float(self.probe("ntk_min_eig")[k]), float(self.kernel_error[k])
        lower, upper = (float(self.probe(f"ntk_min_eig_{end}")[k]) for end in ("lower", "upper"))
        certified = bool(self.certified[k]) and not math.isnan(lower + upper)
        if not certified:
            off = 0.0 if np.isfinite(self.probe("ntk_assembly_error")[k]) else error
            lower = value - error if math.isnan(lower) else lower - off
            upper = value + error if math.isnan(upper) else upper + off
        return Interval(value, lower, upper, certified)

    @cached_property
    def spectra(self) -> Spectra | None:
        """Spectrum and energy of the residual at the probes that keep both; None where none does, or L is not squared.

        Those of an output-averaged kernel are none: the residual has no coordinates along its eigenvectors.
        """
        if self.loss != "squared" or self.trace:
            return None
        loss = self.probe("probe_loss")
        if not self.partial:  # the series has no loss of a subset
            loss = np.where(np.isfinite(loss), loss, self.series("loss")[self.at])
        return read_spectra(self.arrays, self.epochs, self.at, loss, self.kernel_error, self.kernel_size)

    @cached_property
    def budget(self) -> Interval | None:
        """λ_0 with its bounds; None where there is no probe at epoch 0."""
        if not (self.epochs.size and self.epochs[0] == 0 and np.isfinite(self.probe("ntk_min_eig")[0])):
            return None
        return self.interval(0)

    @cached_property
    def radius(self) -> float:
        """The largest drift that was seen: the least radius of a ball around θ_0 that holds what was seen."""
        return float(np.max(self.series("drift")[self.seen], initial=0.0))

    @cached_property
    def ratio(self) -> Ratio:
        """Largest ‖Θ_s - Θ_t‖₂ / ‖θ_s - θ_t‖ over pairs of probes, less the error of both kernels."""
        if not np.isfinite(self.kernel_error).any():
            return Ratio(math.nan, None, None)
        if self.has("ntk_pair_shift") and self.has("param_pair_distance"):
            return pair_ratio(
                self.arrays["ntk_pair_shift"], self.arrays["param_pair_distance"], self.kernel_error, self.epochs
            )
        if not self.has("ntk_shift"):
            return Ratio(math.nan, None, None)
        # Without pairs, those with the initialisation are left.
        shift, distance = np.full((2, self.epochs.size, self.epochs.size), np.nan)
        shift[0], distance[0] = self.probe("ntk_shift"), self.series("drift")[self.at]
        return pair_ratio(shift, distance, self.kernel_error, self.epochs)

    @property
    def proof_radius(self) -> float:
        """Radius that proofs are made for: that of a ball which holds every iterate that was seen."""
        return proof_radius(self.series("drift")[self.seen], int(self.number("p"))) if self.seen.any() else math.nan

    @cached_property
    def lipschitz_upper(self) -> float:
        """The proved upper bound of L_Θ on the ball of what was seen, NaN where there is none."""
        return 0.0 if self.affine else self.number("ntk_lipschitz_upper")

    @cached_property
    def unit(self) -> float:
        """Unit roundoff of the loss and the parameters, the coarsest of their types."""
        eps = self.number("parameter_eps")
        return eps / 2 if math.isfinite(eps) else UNIT_32

    @cached_property
    def probe_unit(self) -> float:
        """Unit roundoff of what the probes measure: that of float64, or of what the network rounds to inside."""
        eps = self.number("probe_eps")
        return max(eps / 2, UNIT_64) if math.isfinite(eps) else UNIT_64

    @cached_property
    def rounding(self) -> float:
        """The relative error γ of sums in loss and gradient, in the precision of the parameters.

        Σ of the fan-ins of D equal dense layers, forward and backward, is 2 √(D p), at most 8 √p up to depth 16;
        γ = √k u is the probabilistic bound for sums of k terms (Higham and Mary 2019).
        """
        terms = self.number("n") * self.number("c") + 8 * math.sqrt(self.number("p"))
        return math.sqrt(terms) * max(self.unit, UNIT_64)

    @cached_property
    def output_gradient(self) -> Float[np.ndarray, " t"]:
        """‖g‖₂, g the gradient of s L in the outputs, or an upper bound of it; NaN where the loss tells none."""
        loss = self.series("loss")
        if self.loss != "squared":
            loss = np.where(loss >= 0, loss, np.nan)
        if self.loss == "exponential":  # ‖g‖² = Σ ℓ_i² <= (Σ ℓ_i)²
            return self.s * loss
        return math.sqrt(self.growth * self.s) * np.sqrt(loss)

    @cached_property
    def output_size(self) -> Float[np.ndarray, " t"]:
        """Size of the outputs: that of g, at the start or where it stands, or of the targets if they are larger.

        Of another loss than the squared one the largest of the probes, as if those left out of a subset were like it.
        """
        size = self.output_gradient
        if self.loss != "squared":
            largest = float(np.nanmax(self.probe("output_norm"), initial=-math.inf))
            return np.fmax(size, largest * self._left_out) if largest >= 0 else np.full(self.end, np.nan)
        return np.fmax(np.fmax(size[:1], size), np.nan_to_num(self.number("target_norm"), nan=0.0))

    @cached_property
    def loss_noise(self) -> Float[np.ndarray, " t"]:
        """Rounding of the recorded loss: outputs, each off by γ."""
        size, gamma, largest = self.output_gradient, self.rounding, self.output_size
        # s L moves by g times the change of f; roots are multiplied last, so that no square overflows.
        # The second derivative is 1 at most, but for the exponential loss, where it is ℓ_i.
        bend = np.fmax(size, 1.0) if self.loss == "exponential" else 1.0
        noise = (2 * size + bend * gamma * largest) * (gamma / (2 * self.s)) * largest
        return noise if self.loss == "squared" else noise + gamma * np.abs(self.series("loss"))

    @property
    def _left_out(self) -> float:
        """√(n/m) of a kernel of m samples: λ_max of n/m blocks like it is at most n/m times its own."""
        return math.sqrt(self.number("n") / self.kernel_samples)

    @cached_property
    def steepest(self) -> float:
        """√λ_max, by which the Jacobian lengthens a vector at most; where no full kernel was measured, ‖Jᵀg‖ / ‖g‖.

        Of another loss than the squared one that of the subset, as if those left out were like it.
        """
        root = math.sqrt(max(float(np.nanmax(self.probe("ntk_max_eig"), initial=0.0)), 0.0))
        if root > 0 and not self.partial:
            return root
        if self.loss != "squared":  # of ‖g‖ an upper bound alone is known
            return root * self._left_out if root > 0 else math.nan
        size = self.output_gradient
        clear = self.seen & (size > 0) & (self.series("loss") > self.loss_noise)
        seen = self.s * np.sqrt(self.series("grad_sq_norm")[clear]) / size[clear]
        return max(root, float(seen.max(initial=0.0)))

    @cached_property
    def gradient_error(self) -> Float[np.ndarray, " t"]:
        """Rounding of ∇L in 2-norm: g off by γ moves the gradient by √λ_max times as much, over s."""
        return 4 * self.rounding * self.steepest * self.output_size / self.s

    @cached_property
    def gradient_noise(self) -> Float[np.ndarray, " t"]:
        """Rounding of the recorded ‖∇L‖²."""
        off = self.gradient_error
        return 2 * np.sqrt(self.series("grad_sq_norm")) * off + off**2


def _probe_axes(name: str) -> tuple[int, ...]:
    return tuple(axis for axis, dim in enumerate(SCHEMA[name].dims) if dim in ("probe", "other_probe"))
