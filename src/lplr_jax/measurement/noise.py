"""The noise of mini-batch gradients at one point: exact from diagonal blocks of Θ, and what one step does on average.

With G_i = (n/s) ∇ℓ_i, so that ∇L is their mean, ‖G_i‖² = (n/s)² g_iᵀ Θ_ii g_i asks for the c × c block of its sample
alone. The gradient of b samples drawn without replacement has E‖g_B - ∇L‖² = (S²/b) (n - b)/(n - 1), where
S² = (1/n) Σ ‖G_i‖² - ‖∇L‖². Where batches are the blocks of one partition, each drawn with probability b/n, it is the
variance over the blocks, (b/n) Σ_B ‖g_B‖² - ‖∇L‖², with ‖g_B‖² = (n/(s b))² g_Bᵀ Θ_BB g_B.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import scipy.linalg
from jaxtyping import Float, Int

from lplr_jax.losses import Objective
from lplr_jax.schema import INTERVAL_LEVEL
from lplr_jax.types import Params

DRAWS = 64
"""Random batches over which the step from a probe is averaged. Calibrated."""
ALWAYS = ("sample_grad_sq_norm", "sample_kernel_max", "batch_decrease", "batch_decrease_error")
"""Names in the record of what is measured of mini-batches."""
OF_BLOCKS = ("block_grad_sq_norm", "block_kernel_max")
"""Names of what is measured as well where they are the blocks of a partition."""


@dataclass(frozen=True)
class Batches:
    """The batches whose noise is measured.

    Attributes:
        size: b.
        learning_rate: η of the step that is averaged; NaN for none.
        seed: of the batches that are drawn for the average.
        blocks: rows of every batch that may be drawn, each as likely, where these are the blocks of a partition; None
            where any b samples may be.
    """

    size: int
    learning_rate: float = math.nan
    seed: int = 0
    blocks: Int[np.ndarray, "k b"] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names in the record of what is measured of them."""
        return (*ALWAYS, *(() if self.blocks is None else OF_BLOCKS))


def sample_noise(
    theta: Float[np.ndarray, "nc nc"], gradient: Float[np.ndarray, "n c"], scale: float
) -> dict[str, float]:
    """Return (1/n) Σ ‖G_i‖² and max_i λ_max(Θ_ii), by record name.

    Args:
        theta: the full kernel, sample-major.
        gradient: g = ∂ℓ/∂f.
        scale: s.
    """
    n, c = gradient.shape
    blocks = theta.reshape(n, c, n, c)[np.arange(n), :, np.arange(n), :]
    squares = np.einsum("ia,iab,ib->i", gradient, blocks, gradient) * (n / scale) ** 2
    return {
        "sample_grad_sq_norm": float(squares.mean()),
        "sample_kernel_max": float(np.linalg.eigvalsh(blocks)[:, -1].max()),
    }


def block_noise(
    theta: Float[np.ndarray, "nc nc"],
    gradient: Float[np.ndarray, "n c"],
    scale: float,
    blocks: Int[np.ndarray, "k b"],
) -> dict[str, float]:
    """Return the mean of ‖g_B‖² over blocks of one size b, and max_B λ_max(Θ_BB), by record name.

    Args:
        theta: the full kernel, sample-major.
        gradient: g = ∂ℓ/∂f.
        scale: s.
        blocks: rows of every block; together they hold every sample once.
    """
    n, c = gradient.shape
    squares, largest = [], []
    for rows in blocks:
        at = (rows[:, None] * c + np.arange(c)).ravel()
        kernel, part = theta[np.ix_(at, at)], gradient[rows].ravel()
        squares.append(float(part @ kernel @ part))
        last = at.size - 1
        largest.append(float(scipy.linalg.eigh(kernel, eigvals_only=True, subset_by_index=(last, last))[0]))
    weight = (n / (scale * blocks.shape[1])) ** 2
    return {"block_grad_sq_norm": weight * float(np.mean(squares)), "block_kernel_max": max(largest)}


def batch_decrease(objective: Objective, params: Params, x: Any, y: Any, batches: Batches) -> dict[str, float]:
    """Return the mean of L(θ - η g_B) - L(θ) over batches B in float64, and how far off it may be, by record name.

    For b = 1, and for the blocks of a partition, every batch is tried and the mean is exact. Otherwise E g_B = ∇L
    leaves the mean of the remainder L(θ - η g_B) - L + η ⟨∇L, g_B⟩ to be estimated from random batches, with the
    empirical Bernstein interval of Maurer and Pontil 2009 (two sides), the range of the remainder being taken from the
    batches that were drawn.
    """
    n, b, eta = y.shape[0], batches.size, batches.learning_rate
    rng = np.random.default_rng(batches.seed)
    every = b == 1 or batches.blocks is not None
    if batches.blocks is not None:
        rows = batches.blocks
    else:
        rows = np.arange(n)[:, None] if every else np.stack([rng.permutation(n)[:b] for _ in range(DRAWS)])
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.asarray(a, jnp.float64) if jnp.issubdtype(jnp.asarray(a).dtype, jnp.floating) else a,
            (params, x, jnp.asarray(y)),
        )
        tried = _tried(*wide, jnp.asarray(rows), jnp.asarray(eta, jnp.float64), objective=objective)
        remainders, falls, slope = map(np.asarray, tried)
    if every:
        return {"batch_decrease": float(falls.mean()), "batch_decrease_error": 0.0}
    count, spread = remainders.size, float(np.ptp(remainders))
    log = math.log(4 / INTERVAL_LEVEL)
    off = math.sqrt(2 * float(remainders.var(ddof=1)) * log / count) + 7 * spread * log / (3 * (count - 1))
    return {"batch_decrease": float(remainders.mean()) - eta * float(slope), "batch_decrease_error": off}


@partial(jax.jit, static_argnames=("objective",))
def _tried(
    params: Params, x: Any, y: Any, rows: Any, eta: Any, *, objective: Objective
) -> tuple[Float[Any, " k"], Float[Any, " k"], Float[Any, ""]]:
    """Return the remainder and L(θ - η g_B) - L for every batch, and ‖∇L‖²."""
    value, gradient = objective.value_and_gradient(params, x, y)

    def one(batch: Any) -> tuple[Any, Any]:
        inputs, weights = jax.tree.map(lambda a: a[batch], x), jnp.ones(batch.shape[0], eta.dtype)
        with jax.default_matmul_precision("highest"):
            noisy = jax.grad(objective.batch_value)(params, inputs, y[batch], weights, n=y.shape[0])
            fall = objective.value(jax.tree.map(lambda a, g: a - eta * g, params, noisy), x, y) - value
        return fall + eta * optax.tree.vdot(gradient, noisy), fall

    return (*jax.lax.map(one, rows), optax.tree.norm(gradient, squared=True))
