"""Lower bounds of λ_min without the Jacobian, one for each layer of a fully connected network.

The kernel is a sum over layers of (H Hᵀ + 11ᵀ) ∘ Δ, H the inputs of a layer as rows, the 1 where it has a bias, Δ the
Gram matrix of the cotangents at its pre-activations. Each part is positive semidefinite, so any subset of them bounds
λ_min from below, and their bounds add up. For one of them Schur's product theorem gives

    λ_min((H Hᵀ + 11ᵀ) ⊗ 1 ∘ Δ) >= λ_min(H Hᵀ + 11ᵀ) · min_i λ_min(Δ_ii),

Δ_ii the c × c block of sample i: H Hᵀ + 11ᵀ - λ I is positive semidefinite, so is its product with Δ, and what is left
is λ times the blocks Δ_ii.
"""

from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax import linalg
from lplr_jax.certificates import UNIT, gamma
from lplr_jax.proofs.assembly import dense_network
from lplr_jax.proofs.rounding import INFLATE, UNDERFLOW, row_norms
from lplr_jax.types import ApplyFn, Params


def layer_lower_bounds(apply_fn: ApplyFn, params: Params, x: Any) -> Float[np.ndarray, " layers"]:
    """Bound λ_min of the kernel from below by each layer of a fully connected network, first to last.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: pytree of parameters.
        x: inputs (n, ...).

    Returns:
        Proved lower bounds, rounding included, in the kernel's units: of each layer's own kernel, so that their sum is
        one of λ_min. 0 for a layer with fewer inputs (and its bias) than samples, and where rounding leaves no more.

    Raises:
        ValueError: for a network that is not fully connected with softplus, tanh or relu; for any other the leaves of
            one layer give such a bound, `empirical_ntk_min_eig(..., trainable=...)`.

    Example:
        >>> import jax.numpy as jnp
        >>> layer_lower_bounds(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [0.0, 2.0]])).round(6)
        array([1.])
    """
    network = dense_network(apply_fn, params, x)
    if network is None:
        raise ValueError(
            "apply_fn is no fully connected network with softplus, tanh or relu, or a relu is within rounding of its "
            "kink: for any network, empirical_ntk_min_eig(..., trainable=...) with the leaves of one layer is a lower "
            "bound of λ_min"
        )
    n, c = network.outputs.shape
    found = []
    for part in network.factors:
        if n > part.h.shape[1] + part.bias:
            found.append(0.0)
            continue
        gram = part.h @ part.h.T + float(part.bias)
        # Inner products of k terms and the 1; entries of the symmetric part.
        lengths = row_norms(part.h)
        rounding = (gamma(part.h.shape[1] + 2) * float(np.square(lengths).sum() + n * part.bias)) * INFLATE + UNDERFLOW
        moved = float(np.linalg.norm(part.h_error)) * INFLATE
        least = linalg.min_eig(0.5 * (gram + gram.T), assembly_error=rounding, factor_error=moved).lower
        found.append(max(least, 0.0) * _least_block(part.delta.reshape(n, c, -1), part.delta_error.reshape(n, c)))
    return np.array(found) * (1 - 8 * UNIT)


def _least_block(delta: np.ndarray, error: np.ndarray) -> float:
    """Bound min_i λ_min(δ_i δ_iᵀ) from below, δ_i (c, m) with row errors (c,)."""
    c, m = delta.shape[1:]
    if m < c:
        return 0.0
    moved = np.linalg.norm(error, axis=1) * INFLATE
    if c == 1:
        length = np.sqrt(np.einsum("ijk,ijk->i", delta, delta)) * (1 - gamma(m + 4)) - UNDERFLOW - moved
        return float(np.square(np.maximum(length, 0.0)).min()) * (1 - 4 * UNIT)
    least = np.inf
    for rows, off in zip(delta, moved, strict=True):
        rounding = gamma(m) * float(np.square(row_norms(rows)).sum()) * INFLATE + UNDERFLOW
        gram = rows @ rows.T
        found = linalg.min_eig(0.5 * (gram + gram.T), assembly_error=rounding, factor_error=float(off)).lower
        least = min(least, max(found, 0.0))
    return float(least)
