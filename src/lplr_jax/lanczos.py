"""Extreme eigenvalues of a symmetric operator that is known by its products alone.

Ritz values lie inside the spectrum: the least one is an upper bound of λ_min, the largest a lower bound of λ_max. They
come with residuals and prove nothing beyond that.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float
from matfree import decomp

from lplr_jax import checks

Matvec = Callable[..., Any]
"""(vector, *args) -> product, vector and product pytrees of the same structure; `args` are traced, never captured."""


@dataclass(frozen=True)
class Ritz:
    """Both ends of the spectrum as Lanczos sees them.

    Attributes:
        least: least Ritz value, an upper bound of λ_min up to rounding.
        largest: largest Ritz value, a lower bound of λ_max up to rounding.
        least_residual: ‖A x - λ x‖ of the least pair, x of unit length, with k ε ‖A‖ for the rounding of k products
            and sums; some eigenvalue lies this close to `least`.
        largest_residual: the same of the largest pair.
        converged: whether both residuals, rounding left out, are at most the tolerance times max(|least|, |largest|).
        num_matvecs: operator products used.
        least_vector: unit Ritz vector, shape (p,), on the host.
        largest_vector: the same of the largest pair.
    """

    least: float
    largest: float
    least_residual: float
    largest_residual: float
    converged: bool
    num_matvecs: int
    least_vector: Float[np.ndarray, " p"] = field(repr=False, compare=False)
    largest_vector: Float[np.ndarray, " p"] = field(repr=False, compare=False)


@partial(jax.jit, static_argnames=("matvec", "num_matvecs"))
def _tridiagonalise(matvec: Matvec, num_matvecs: int, vector: Any, args: tuple[Any, ...]) -> tuple[Any, Any, Any, Any]:
    # matfree mixes ranks and weak types, which strict settings refuse.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        lanczos = decomp.tridiag_sym(num_matvecs, materialize=False, reortho="full", custom_vjp=False)
        result = lanczos(matvec, vector, *args)
        diagonal, offdiagonal = result.J_small
        last = jnp.linalg.norm(ravel_pytree(result.residual)[0])
    return result.Q_tall, diagonal, offdiagonal, last


@jax.jit
def _combine(basis: Any, weights: Float[Array, "r k"]) -> Float[Array, "r p"]:
    """Return weighted sums of the basis vectors, flat and of unit length."""
    # Vectors behind an exhausted subspace are no numbers, and no part of the sums.
    used = jnp.any(weights != 0, axis=0)
    basis = jax.tree.map(lambda q: jnp.where(used.reshape(-1, *[1] * (q.ndim - 1)), q, jnp.zeros_like(q)), basis)
    sums = jax.vmap(lambda w: ravel_pytree(jax.tree.map(lambda q: jnp.tensordot(w, q, 1), basis))[0])(weights)
    return sums / jnp.linalg.norm(sums, axis=1, keepdims=True)


def _projected_pairs(
    diagonal: np.ndarray, offdiagonal: np.ndarray, last: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return Ritz values, residuals and coefficients at both ends; None if the operator produced no finite number."""
    k = diagonal.shape[0]
    betas = np.append(offdiagonal[: k - 1], last)
    known = np.flatnonzero(~np.isfinite(diagonal))
    size = int(known[0]) if known.size else k
    if size == 0:
        return None
    scale = max(np.abs(diagonal[:size]).max(), np.abs(betas[: size - 1]).max(initial=0.0))
    # An invariant subspace is exhausted where the next vector is rounding noise; what follows means nothing.
    noise = 100.0 * k * np.finfo(diagonal.dtype).eps * scale
    small = np.flatnonzero(~(betas[:size] > noise))
    if small.size:
        size = int(small[0]) + 1
    try:
        values, vectors = scipy.linalg.eigh_tridiagonal(diagonal[:size], betas[: size - 1])
    except scipy.linalg.LinAlgError:
        return None
    ends = [0, -1]
    coefficients = np.zeros((2, k), diagonal.dtype)
    coefficients[:, :size] = vectors[:, ends].T
    # A next vector that overflowed says nothing about how far off the pairs are; that of a zero operator is 0 / 0.
    beta = betas[size - 1] if scale > 0 else 0.0
    residuals = np.abs(beta * vectors[-1, ends]) if np.isfinite(beta) else np.full(2, np.inf)
    return values[ends], residuals, coefficients


def _better(
    found: tuple[float, float, np.ndarray], best: tuple[float, float, np.ndarray], sign: float
) -> tuple[float, float, np.ndarray]:
    """Return the pair farther out; a restart may resolve one end worse than the cycle before it did."""
    outwards = not sign * found[0] <= sign * best[0]
    same = abs(found[0] - best[0]) <= best[1] and found[1] < best[1]
    return found if outwards or same else best


def extreme_ritz(
    matvec: Matvec,
    like: Any,
    *args: Any,
    num_matvecs: int = 24,
    max_matvecs: int = 240,
    tolerance: float = 1e-6,
    seed: int = 0,
    start: Ritz | None = None,
) -> Ritz:
    """Find both ends of a symmetric operator's spectrum by restarted Lanczos with full reorthogonalisation.

    Runs in the precision of `like`; enter a float64 scope for float64. Memory is about twice `num_matvecs` vectors.

    Args:
        matvec: the operator; the same function object is compiled once.
        like: pytree of arrays that says the shape of a vector.
        *args: arrays that the operator needs.
        num_matvecs: products per cycle, the dimension of the Krylov space.
        max_matvecs: products after which the search gives up; a cycle is never cut short.
        tolerance: relative residual at which it stops.
        seed: of the random start vector.
        start: an earlier result on a nearby operator, whose vectors enter the start vector.

    Raises:
        ValueError: for settings out of range.
    """
    checks.whole("num_matvecs", num_matvecs, least=2)
    if checks.whole("max_matvecs", max_matvecs) < num_matvecs:
        raise ValueError(f"max_matvecs must be >= num_matvecs = {num_matvecs}, got {max_matvecs}")
    checks.number("tolerance", tolerance, above=0)
    checks.whole("seed", seed, least=0)
    if start is not None:
        checks.instance("start", start, Ritz, "an earlier result")
    flat, unravel = ravel_pytree(like)
    p, dtype = flat.size, flat.dtype
    if p == 0:
        raise ValueError("the operator acts on an empty vector; it has no spectrum")
    k = min(num_matvecs, p)
    vector = np.random.default_rng(seed).standard_normal(p)
    vector /= np.linalg.norm(vector)
    # Vectors of a result that is no number would make every later one like it.
    if start is not None and np.isfinite(start.least_vector).all() and np.isfinite(start.largest_vector).all():
        if start.least_vector.shape != (p,):
            raise ValueError(f"start holds vectors of shape {start.least_vector.shape}, but the operator needs ({p},)")
        # A random part stays, or directions orthogonal to the old vectors would never be seen.
        vector = start.least_vector + start.largest_vector + 0.1 * vector
    best: list[tuple[float, float, np.ndarray]] = [(np.nan, np.inf, np.full(p, np.nan))] * 2
    used, converged = 0, False
    while not converged and used + k <= max_matvecs:
        basis, diagonal, offdiagonal, last = _tridiagonalise(matvec, k, unravel(jnp.asarray(vector, dtype)), args)
        used += k
        pairs = _projected_pairs(np.asarray(diagonal), np.asarray(offdiagonal), float(last))
        if pairs is None:
            break
        values, residuals, coefficients = pairs
        vectors = np.asarray(_combine(basis, jnp.asarray(coefficients, dtype)))
        del basis
        found = [(float(values[i]), float(residuals[i]), vectors[i]) for i in (0, 1)]
        best = [_better(found[i], best[i], sign) for i, sign in ((0, -1.0), (1, 1.0))]
        scale = max(abs(best[0][0]), abs(best[1][0]))
        converged = all(residual <= tolerance * scale for _, residual, _ in best)
        vector = best[0][2] + best[1][2]
    (least, least_residual, least_vector), (largest, largest_residual, largest_vector) = best
    rounding = k * float(jnp.finfo(dtype).eps) * max(abs(least), abs(largest))
    least_residual, largest_residual = least_residual + rounding, largest_residual + rounding
    return Ritz(
        least=least,
        largest=largest,
        least_residual=least_residual,
        largest_residual=largest_residual,
        converged=converged,
        num_matvecs=used,
        least_vector=least_vector,
        largest_vector=largest_vector,
    )
