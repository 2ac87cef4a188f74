"""Lower estimates of L_Θ: over pairs of kernels, and by a search for bad directions in a ball.

A ratio ‖Θ(θ) - Θ(θ')‖₂ / ‖θ - θ'‖ of two points of a region bounds L_Θ from below. So does every unit vector u in place
of the norm: nothing here can prove an upper bound.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Float

from lplr_jax import linalg
from lplr_jax.measurement.flat import FlatNetwork
from lplr_jax.ntk import precision_scope
from lplr_jax.shifts import arpack
from lplr_jax.types import ApplyFn, Params

LANCZOS_STEPS = 20
"""Lanczos steps for the norms of all pairs; kernels differ along few directions, so this is plenty. Calibrated."""
RANDOM_DIRECTIONS = 2
"""Random directions of the search. Calibrated."""


def pair_shifts(kernels: Sequence[Float[np.ndarray, "nc nc"]]) -> Float[np.ndarray, "k k"]:
    """Return ‖Θ_s - Θ_t‖₂ for every pair, from below: Lanczos for all pairs at once, no difference is ever formed.

    Args:
        kernels: k symmetric matrices of one shape.

    Returns:
        A symmetric matrix with zero diagonal; entries are Ritz values, at most the norms up to rounding.
    """
    k = len(kernels)
    shifts = np.zeros((k, k))
    rows, columns = np.triu_indices(k, 1)
    if not rows.size:
        return shifts
    n, steps = kernels[0].shape[0], min(LANCZOS_STEPS, kernels[0].shape[0])
    members = [np.flatnonzero((rows == i) | (columns == i)) for i in range(k)]
    vectors = np.repeat(np.random.default_rng(0).standard_normal((n, 1)), rows.size, axis=1)
    vectors /= np.linalg.norm(vectors, axis=0)
    previous, off = np.zeros_like(vectors), np.zeros(rows.size)
    tridiagonal = np.zeros((rows.size, steps, steps))
    for step in range(steps):
        image = np.zeros_like(vectors)
        for i, pairs in enumerate(members):
            sign = np.where(rows[pairs] == i, 1.0, -1.0)
            image[:, pairs] += (kernels[i] @ vectors[:, pairs]) * sign
        diagonal = np.einsum("ij,ij->j", vectors, image)
        tridiagonal[:, step, step] = diagonal
        image -= vectors * diagonal + previous * off
        off = np.linalg.norm(image, axis=0)
        if step + 1 == steps:
            break
        # Rounding alone must not continue a chain that has ended.
        off = np.where(off > 1e-13 * np.abs(tridiagonal).max(axis=(1, 2)), off, 0.0)
        tridiagonal[:, step, step + 1] = tridiagonal[:, step + 1, step] = off
        previous = vectors
        vectors = np.divide(image, off, out=np.zeros_like(image), where=off > 0)
    norms = np.abs(np.linalg.eigvalsh(tridiagonal)).max(axis=1)
    if not np.isfinite(norms).all():
        raise linalg.UntrustedError("a distance between two kernels is not finite")
    shifts[rows, columns] = shifts[columns, rows] = norms
    return shifts


@partial(jax.jit, static_argnames=("apply_fn",))
def _form_gradient(params: Params, x: Any, u: Array, *, apply_fn: ApplyFn) -> Params:
    """Return ∇_θ uᵀΘ(θ)u = ∇_θ ‖Jᵀu‖²: the direction in which the kernel grows fastest along u."""

    def form(q: Params) -> Array:
        gradient = jax.grad(lambda point: jnp.sum(apply_fn(point, x) * u))(q)
        return sum((jnp.sum(jnp.square(leaf)) for leaf in jax.tree.leaves(gradient)), start=jnp.zeros((), u.dtype))

    return jax.grad(form)(params)


@dataclass(frozen=True)
class Search:
    """Largest ratios found in the ball, each a lower estimate of L_Θ.

    Attributes:
        random: over random directions.
        gradient: along the loss gradient at θ_0.
        power: by power iteration on the derivative of the kernel.
    """

    random: float
    gradient: float
    power: float


class _Ball(FlatNetwork):
    """Kernels along lines in the ball of one radius around θ_0."""

    def __init__(self, apply_fn: ApplyFn, params: Params, x: Any, radius: float, kernel: str, error: float) -> None:
        super().__init__(apply_fn, params, x, kernel)
        self.radius, self._error = radius, error
        with precision_scope("float64"):
            self._shape = jax.eval_shape(apply_fn, self.unravel(jnp.asarray(self.centre)), self.x).shape

    def ratio(self, first: np.ndarray, second: np.ndarray) -> tuple[float, np.ndarray]:
        """Return ‖ΔΘ‖₂/‖Δθ‖ less the error of both kernels, and the eigenvector that attains the norm."""
        difference = linalg.as_symmetric(self.kernel(first) - self.kernel(second))
        n = difference.shape[0]
        # ARPACK refuses a zero matrix, and is no gain where a dense solver is quick.
        if n > 400 and difference.any():
            values, vectors = arpack(difference, which="LM")
        else:
            values, vectors = np.linalg.eigh(difference)
        if not np.isfinite(values).all():
            raise linalg.UntrustedError("the eigenvalues of a difference of two kernels are not finite")
        at = int(np.argmax(np.abs(values)))
        norm = max(abs(float(values[at])) - 2 * self._error, 0.0)
        return norm / float(np.linalg.norm(first - second)), vectors[:, at]

    def along(self, direction: np.ndarray) -> tuple[float, np.ndarray]:
        """Return the largest ratio on the diameter: the whole of it and a short piece at either end."""
        v = direction / np.linalg.norm(direction)
        at = [self.centre + t * self.radius * v for t in (-1.0, -0.9, 0.9, 1.0)]
        return max((self.ratio(at[i], at[j]) for i, j in ((0, 3), (2, 3), (0, 1))), key=lambda found: found[0])

    def growth(self, theta: np.ndarray, u: np.ndarray) -> np.ndarray:
        """Return the direction in which uᵀΘu grows fastest at θ."""
        with precision_scope("float64"):
            params, u = self.unravel(jnp.asarray(theta)), np.reshape(u, self._shape)
            gradient = _form_gradient(params, self.x, jnp.asarray(u), apply_fn=self.apply_fn)
            return np.asarray(ravel_pytree(gradient)[0])


def search_ball(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    radius: float,
    gradient: Float[np.ndarray, " p"],
    error: float,
    steps: int,
    kernel: str = "auto",
    seed: int = 0,
) -> Search:
    """Search a ball for pairs of points whose kernels differ much.

    Power iteration alternates u, the eigenvector of the largest change of Θ along v, and v, the direction in which uᵀΘu
    grows fastest; each maximises uᵀ DΘ[v] u over one of the two. It starts from the gradient's direction, runs at θ_0,
    and then near the end of the diameter that it found.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: θ_0.
        x: inputs (n, ...).
        radius: of the ball, > 0.
        gradient: ∇L(θ_0), flat.
        error: bound or estimate of the error of one kernel in spectral norm; subtracted from every difference.
        steps: of the power iteration.
        kernel: one of `lplr_jax.ntk.KERNELS`.
        seed: of the random directions.

    Returns:
        The largest ratio for each kind of direction. The work is fixed by `steps`, not by a clock, so runs repeat.

    Raises:
        ValueError: for a radius that is not a positive number.
    """
    if not (np.isfinite(radius) and radius > 0):
        raise ValueError(f"radius must be a finite number > 0, got {radius}")
    ball = _Ball(apply_fn, params, x, radius, kernel, error)
    generator = np.random.default_rng(seed)
    random = max(ball.along(generator.standard_normal(ball.centre.size))[0] for _ in range(RANDOM_DIRECTIONS))
    direction = gradient if np.linalg.norm(gradient) > 0 else generator.standard_normal(ball.centre.size)
    down, u = ball.along(direction)
    power, theta, reach = 0.0, ball.centre, 0.01 * radius
    for step in range(steps):
        v = ball.growth(theta, u)
        if not np.linalg.norm(v) > 0:
            break
        v = v / np.linalg.norm(v)
        if step == steps // 2:
            theta = ball.centre + (radius - reach) * v
        found, u = ball.ratio(theta + reach * v, theta - reach * v)
        power = max(power, found)
    return Search(random=random, gradient=down, power=power)
