"""The arrays of a record that holds one point and no step."""

import math
from typing import Any

import numpy as np

from lplr_jax import diagnostics, linalg
from lplr_jax.losses import Loss, Objective, Scale, as_loss
from lplr_jax.measurement.kernel import kernel_values, spectrum_and_energy
from lplr_jax.measurement.spacing import parameter_eps, parameter_spacing, probe_eps
from lplr_jax.ntk import empirical_ntk
from lplr_jax.parameters import count_parameters
from lplr_jax.proofs.affine import is_affine
from lplr_jax.schema import KERNEL_LOST
from lplr_jax.types import ApplyFn, Params


def point_arrays(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    *,
    loss_scale: Scale | None = None,
    loss: Loss | None = None,
    kernel: str = "auto",
    memory_budget: int | None = None,
) -> tuple[dict[str, np.ndarray], str]:
    """Return the arrays of a record that holds one point and no step, and why its kernel is untrusted, if it is."""
    point = diagnostics.evaluate_point(apply_fn, params, x, y, loss_scale=loss_scale, loss=loss)
    n, c = point.gradient.shape
    probe: dict[str, float] = {"probe_epoch": 0}
    whole: dict[str, np.ndarray] = {}
    lost = ""
    try:
        theta = np.asarray(empirical_ntk(apply_fn, params, x, kernel=kernel, memory_budget=memory_budget))
        linalg.as_symmetric(theta)  # or there is nothing to be read off it
        probe |= {**kernel_values(apply_fn, params, x, theta, point), "ntk_shift": 0.0}
        values, energy = spectrum_and_energy(theta, point.gradient)
        whole = {"spectrum": values[None], "residual_energy": energy[None]}
    except linalg.FAILURES as error:
        lost = f"kernel: {error}"
        probe = {"probe_epoch": 0, "probe_untrusted": KERNEL_LOST}
    scalars = {
        "loss_scale": point.loss_scale,
        "learning_rate": math.nan,
        "n": n,
        "c": c,
        "p": count_parameters(params),
        "parameter_spacing": parameter_spacing(params),
        "parameter_eps": parameter_eps(params),
        "probe_eps": probe_eps(Objective(apply_fn, as_loss(loss, loss_scale=loss_scale)), params, x, y),
        "affine_in_parameters": int(is_affine(apply_fn, params, x)),
    }
    series = {"epoch": [0], "loss": [point.loss], "grad_sq_norm": [point.grad_sq_norm], "drift": [0.0]}
    arrays = {
        **{name: np.asarray(value) for name, value in series.items()},
        **{name: np.asarray([value]) for name, value in probe.items()},
        **{name: np.asarray(value) for name, value in scalars.items()},
        **whole,
    }
    return arrays, lost
