"""What the network linearised at θ says where it was not trained: kernel regression, in closed form."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lplr_jax import linalg
from lplr_jax.ntk.empirical import cast_floating, empirical_ntk, precision_scope
from lplr_jax.types import ApplyFn, Params


def held_out_loss(
    apply_fn: ApplyFn, params: Params, x: Any, y: Any, held_x: Any, held_y: Any, *, kernel: str = "auto"
) -> float:
    """Return ‖f - y‖²/(2n) on held-out samples, of the linearisation at θ after training on x, y to zero loss.

    The linearisation that gradient descent on the squared loss reaches from θ is f(x*) = f_θ(x*) + Θ(x*, x)
    Θ(x, x)⁻¹ (y - f_θ(x)) (Lee et al. 2019, section 2.2): no step is taken.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: θ.
        x: training inputs.
        y: their targets, (n, c).
        held_x: other inputs.
        held_y: their targets.
        kernel: one of `lplr_jax.ntk.KERNELS`.

    Raises:
        linalg.UntrustedError: if Θ(x, x) is not positive definite in floating point.
    """
    theta = np.asarray(empirical_ntk(apply_fn, params, x, kernel=kernel))
    across = np.asarray(empirical_ntk(apply_fn, params, held_x, x, kernel=kernel))
    with precision_scope("float64"):
        wide = cast_floating((params, x, held_x), "float64")
        known, unknown = (np.asarray(apply_fn(wide[0], jnp.asarray(inputs))) for inputs in wide[1:])
    residual = np.asarray(y, np.float64).reshape(-1) - known.reshape(-1)
    try:
        weights = scipy.linalg.cho_solve(scipy.linalg.cho_factor(theta), residual)
    except (scipy.linalg.LinAlgError, ValueError) as error:
        raise linalg.UntrustedError(f"kernel regression: {error}") from error
    error = unknown.reshape(-1) + across @ weights - np.asarray(held_y, np.float64).reshape(-1)
    return float(error @ error) / (2 * len(held_y))
