"""What is measured at a probe that forms no kernel: sharpness, critical sharpness, and what one exact step does.

For runs whose kernel is too large, or of no interest: n c rows are never formed, and everything is a product, a forward
pass or a backward pass.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from lplr_jax import diagnostics, linalg
from lplr_jax.losses import Objective, Squared
from lplr_jax.measurement.enclosed import enclose
from lplr_jax.measurement.gradients import gradient_at
from lplr_jax.measurement.rivals import critical_step
from lplr_jax.ntk.empirical import Precision, cast_floating, precision_scope
from lplr_jax.proofs.assembly import dense_network
from lplr_jax.proofs.rounding import AssemblyBound
from lplr_jax.schema import HESSIAN_LOST
from lplr_jax.types import Params

_LOG = logging.getLogger(__name__)

ENCLOSED = ("probe_loss_lower", "probe_loss_upper", "probe_decrease_lower", "probe_decrease_upper")
"""Names in the record of what is proved without a kernel."""


class CurvatureProbe:
    """Measures the curvature of the loss of all samples at one point; remembers the last eigenvector.

    The sharpness is a Ritz value of one Lanczos cycle, below the eigenvalue by no more than its residual.
    """

    def __init__(
        self,
        objective: Objective,
        x: Any,
        y: Any,
        *,
        matvecs: int,
        precision: Precision = "float32",
        learning_rate: float = math.nan,
    ) -> None:
        """Set up.

        Args:
            objective: what is trained.
            x: inputs.
            y: targets.
            matvecs: products with the Hessian a probe; the first one takes three times as many.
            precision: of these products.
            learning_rate: η of the exact step whose decrease is enclosed; NaN for none.
        """
        self._objective, self._x, self._y = objective, x, y
        self._matvecs, self._precision, self._learning_rate = matvecs, precision, learning_rate
        self._extremes: diagnostics.Extremes | None = None
        self.untrusted: dict[str, str] = {}

    def __call__(self, params: Params, epoch: int) -> Mapping[str, float]:
        """Return the values of one probe by their names in the record."""
        objective, data = self._objective, (self._x, self._y)
        slope = float(np.square(gradient_at(objective, params, *data)).sum())
        with precision_scope("float64"):
            value = float(objective.value(*cast_floating((params, *data), "float64")))
        values = {"probe_loss": value, "probe_grad_sq_norm": slope, "sharpness": math.nan, "critical_step": math.nan}
        try:
            values["sharpness"] = self._sharpness(params)
        except linalg.FAILURES as error:
            values["probe_untrusted"] = HESSIAN_LOST
            self.untrusted[str(epoch)] = f"Hessian: {error}"
            _LOG.warning("epoch %s: cannot be trusted and is left out: Hessian: %s", epoch, error)
        guess = 2 / values["sharpness"] if values["sharpness"] > 0 else math.nan
        values["critical_step"] = critical_step(objective, params, *data, guess=guess)
        if isinstance(objective.loss, Squared) and math.isfinite(self._learning_rate):
            values |= self._enclosed(params)
        return values

    def _sharpness(self, params: Params) -> float:
        cycle = self._matvecs if self._extremes is not None else 3 * self._matvecs
        found = diagnostics.hessian_extremes(
            self._objective.value,
            params,
            self._x,
            self._y,
            reduction=self._objective.reduction,
            dtype=self._precision,
            num_matvecs=cycle,
            max_matvecs=cycle,
            start=self._extremes,
        )
        if not math.isfinite(found.largest):
            raise linalg.UntrustedError("a product with the Hessian is not finite")
        self._extremes = found
        return found.largest

    def _enclosed(self, params: Params) -> dict[str, float]:
        """Return proved bounds of the loss and of what one exact step takes of it; NaN where there are none."""
        values: dict[str, float] = dict.fromkeys(ENCLOSED, math.nan)
        network = dense_network(self._objective.apply_fn, params, self._x)
        if network is None:
            return values
        n, c = network.outputs.shape
        y = np.asarray(self._y, np.float64).reshape(n, c)
        found = enclose(
            network,
            AssemblyBound(math.inf, network.factor_error),  # no kernel was assembled
            y,
            scale=self._objective.scale(n, c),
            min_eig_lower=math.nan,
            max_eig_upper=network.trace_upper,
            learning_rate=self._learning_rate,
        )
        return {name: found[name] for name in ENCLOSED}

    def remembered(self, epoch: int) -> Mapping[str, np.ndarray]:
        """Return what the probe of an epoch keeps for later ones, as arrays by name."""
        kept = {}
        if self._extremes is not None:
            kept = {"least": self._extremes.least_vector, "largest": self._extremes.largest_vector}
        if str(epoch) in self.untrusted:
            kept["untrusted"] = np.array(self.untrusted[str(epoch)])
        return kept

    def recall(self, epoch: int, arrays: Mapping[str, np.ndarray], like: Params) -> None:
        """Take back what the probe of an epoch kept."""
        if "untrusted" in arrays:
            self.untrusted[str(epoch)] = str(arrays["untrusted"])
        if "largest" in arrays:
            numbers = dict.fromkeys(("least", "largest", "least_residual", "largest_residual"), math.nan)
            self._extremes = diagnostics.Extremes(
                **numbers,
                converged=False,
                num_matvecs=0,
                least_vector=arrays["least"],
                largest_vector=arrays["largest"],
            )

    def forget(self, epoch: int) -> None:
        """Drop what the probes from an epoch on kept."""
        self.untrusted = {at: why for at, why in self.untrusted.items() if int(at) < epoch}

    def close(self, arrays: Mapping[str, np.ndarray], *, search_steps: int, seed: int) -> dict[str, np.ndarray]:
        """Return nothing: what only the whole run can tell hangs on kernels."""
        del arrays, search_steps, seed
        return {}
