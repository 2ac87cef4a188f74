"""The smallest eigenvalue of the empirical kernel, for notebooks and for runs."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lplr_jax import checks, linalg
from lplr_jax.ntk.empirical import empirical_ntk
from lplr_jax.proofs.assembly import assembly_bound
from lplr_jax.types import ApplyFn, Params


def empirical_ntk_min_eig(
    apply_fn: ApplyFn, params: Params, x: Any, *, kernel: str = "auto", memory_budget: int | None = None
) -> linalg.MinEig:
    """Compute λ_min of the full (n c, n c) empirical kernel in float64, whatever the global float64 flag.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,).
        params: pytree of floating arrays.
        x: inputs with leading axis n.
        kernel: one of `lplr_jax.ntk.KERNELS`.
        memory_budget: bytes for the assembly beside the kernel itself.

    Returns:
        The eigenvalue, in squared units of the output per squared unit of the parameters, with its interval; see
        `certified_min_eig` for what the interval covers.

    Raises:
        ValueError: for empty, non-finite or wrongly shaped input, or an `apply_fn` that is not a deterministic
            function of each sample alone.

    Example:
        >>> import jax.numpy as jnp
        >>> float(empirical_ntk_min_eig(lambda w, x: x @ w, jnp.ones((2, 1)), jnp.array([[1.0, 0.0], [0.0, 2.0]])))
        1.0
    """
    theta = empirical_ntk(apply_fn, params, x, kernel=kernel, memory_budget=memory_budget)
    return certified_min_eig(apply_fn, params, x, np.asarray(theta))


def certified_min_eig(apply_fn: ApplyFn, params: Params, x: Any, theta: Float[np.ndarray, "nc nc"]) -> linalg.MinEig:
    """Compute λ_min of an assembled kernel, in an interval that holds that of the exact kernel where one is known.

    Args:
        apply_fn: the function whose kernel it is.
        params: pytree of floating arrays.
        x: inputs with leading axis n.
        theta: its full kernel, (n c, n c), in float64.

    Returns:
        For networks of dense and convolutional layers, average pooling and softplus, tanh or relu, a proved interval
        for the exact kernel. For any other the interval is about the computed kernel alone: `proved` is False and
        `reason` says so.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    if linalg.as_symmetric(theta).shape[0] % n:
        raise ValueError(f"theta must be the full kernel, ({n} c, {n} c) for {n} samples, got shape {theta.shape}")
    bound = assembly_bound(apply_fn, params, x, theta)
    if bound is not None:
        return linalg.min_eig(theta, **vars(bound))
    alone = linalg.min_eig(theta)
    reason = "no bound on the assembly of this network's kernel is known, so the interval is about the computed kernel"
    return replace(alone, proved=False, assumptions=(), reason="; ".join(filter(None, (reason, alone.reason))))


def effective_rank(theta: Float[np.ndarray, "nc nc"]) -> float:
    """Return (tr Θ)² / ‖Θ‖_F², a count of the directions that carry a kernel: 1 for rank one, n c for the identity.

    Raises:
        ValueError: for a kernel that is zero.
    """
    scale = float(np.abs(theta).max())
    if not scale > 0:
        raise ValueError("the kernel is zero, so its effective rank is undefined")
    scaled = theta / scale
    return float(np.trace(scaled) ** 2 / np.square(scaled).sum())


def stratified_ids(y: Float[np.ndarray, "n c"], size: int) -> Int[np.ndarray, " k"]:
    """Return a fixed subset with equal shares of all classes: the first samples of each, dealt one a class in turn.

    Args:
        y: one-hot targets, shape (n, c).
        size: samples of the subset; a class that has run out leaves its share to the others.

    Returns:
        Sorted sample numbers, shape (size,).

    Raises:
        ValueError: for a size below one or above n.
    """
    y = checks.real_array("y", y, axes="n c")
    if not 1 <= checks.whole("subset_size", size) <= len(y):
        raise ValueError(f"subset_size must be 1 to n_train = {len(y)}, got {size}")
    labels = np.argmax(y, axis=1)
    rank = np.zeros(len(y), np.int64)
    for label in np.unique(labels):
        rank[labels == label] = np.arange(int((labels == label).sum()))
    return np.sort(np.lexsort((labels, rank))[:size]).astype(np.int64)


def subset_ids(n: int, size: int, *, seed: int) -> Int[np.ndarray, " k"]:
    """Draw the fixed random subset on which the paper measures λ_min: sorted sample numbers, shape (min(size, n),)."""
    checks.whole("n", n, least=1)
    checks.whole("subset_size", size, least=1)
    checks.whole("seed", seed, least=0)
    return np.sort(np.random.default_rng(seed).permutation(n)[:size]).astype(np.int64)


def principal_block(
    theta: Float[np.ndarray, "nc nc"], ids: Int[np.ndarray, " k"], c: int
) -> Float[np.ndarray, "kc kc"]:
    """Return the rows and columns of a full kernel that belong to the samples `ids`.

    By Cauchy interlacing its smallest eigenvalue is an upper bound of that of the full kernel.

    Raises:
        ValueError: for a kernel that is not square, or whose rows are not c a sample, or for ids that are no samples.
    """
    checks.whole("c", c, least=1)
    theta = checks.real_array("theta", theta, axes="nc nc")
    if theta.shape[0] != theta.shape[1] or theta.shape[0] % c:
        raise ValueError(f"theta must be the full kernel, (n c, n c) with c = {c}, got shape {theta.shape}")
    n = theta.shape[0] // c
    found = checks.as_array(ids)
    if found is None or found.ndim != 1 or found.dtype.kind not in "iu" or not found.size:
        raise ValueError(f"ids must be an array (k,) of sample numbers 0 to {n - 1}, got {checks.shown(ids)}")
    if found.min() < 0 or found.max() >= n:
        raise ValueError(f"ids must lie in 0 to {n - 1}, got {found.min()} to {found.max()}")
    ids = found
    rows = (ids[:, None] * c + np.arange(c)).reshape(-1)
    return theta[np.ix_(rows, rows)]
