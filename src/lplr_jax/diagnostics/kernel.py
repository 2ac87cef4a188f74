"""The smallest eigenvalue of the empirical kernel, for notebooks and for runs."""

import math
from dataclasses import replace
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Float, Int

from lplr_jax import certificates, checks, linalg, parameters
from lplr_jax.factors import Cholesky
from lplr_jax.narrowing import Narrow
from lplr_jax.ntk import engine
from lplr_jax.ntk.empirical import (
    Point,
    at_point,
    cast_floating,
    cast_parameters,
    check_settings,
    point,
    precision_scope,
    without_gradient,
)
from lplr_jax.ntk.memory import budget
from lplr_jax.parameters import Trainable
from lplr_jax.proofs.assembly import Proof, bound_or_reason, check_proof
from lplr_jax.proofs.rounding import AssemblyBound
from lplr_jax.types import ApplyFn, Params

Storage = Literal["auto", "full", "packed"]
"""How a kernel is kept while its smallest eigenvalue is enclosed."""

_ENGINE = ("auto", "engine")


def empirical_ntk_min_eig(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    kernel: str = "auto",
    memory_budget: int | None = None,
    trainable: Trainable = None,
    storage: str = "auto",
    cholesky: Cholesky | None = None,
    proof: str = "auto",
) -> linalg.MinEig:
    """Compute λ_min of the full (n c, n c) empirical kernel in float64, whatever the global float64 flag.

    Where there are more rows n c than parameters, λ_min = 0 by counting, and no kernel is formed.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,).
        params: pytree of parameters; which of its leaves are θ is said in `parameters`.
        x: inputs with leading axis n.
        kernel: one of `lplr_jax.ntk.KERNELS`.
        memory_budget: bytes for the assembly beside the kernel itself.
        trainable: as for `ntk.empirical_ntk`.
        storage: "full" keeps the kernel and its factor, 16 bytes an entry; "packed" keeps half of one matrix, 4 bytes
            an entry, makes the kernel twice, and its interval is that of `linalg.Blocks`; "auto" is packed where the
            full one does not fit `memory_budget`, or a quarter of the memory if that is None or less.
        cholesky: what factorises the kernel instead of LAPACK, as for `linalg.min_eig`; the kernel is kept whole then.
        proof: as for `certified_min_eig`.

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
    check_settings(apply_fn, kernel=kernel, memory_budget=memory_budget)
    checks.one_of("storage", storage, get_args(Storage))
    kind = check_proof(proof)
    if storage == "packed" and kernel not in _ENGINE:
        raise ValueError(f'storage="packed" is for kernel="engine"; {kernel!r} gives full kernels, so leave one out')
    if cholesky is not None:
        checks.function("cholesky", cholesky, "(matrix, shift) -> lower factor")
        if storage == "packed":
            raise ValueError('cholesky is for a kernel that is kept whole; leave storage="packed" or cholesky out')
        storage = "full"
    with precision_scope("float64"):
        at = point(apply_fn, params, x, dtype="float64", trainable=trainable)
        if trainable is None:
            without_gradient(at)
        rows = jax.tree.leaves(at.x)[0].shape[0] * at.traced.c
        if rows > at.params.size:
            return by_counting(rows, at.params.size)
        if storage == "packed" or (storage == "auto" and kernel in _ENGINE and _too_large(rows, memory_budget)):
            return _certified_packed(apply_fn, at, x, memory_budget)
        theta = np.asarray(at_point(apply_fn, at, kernel=kernel, memory_budget=memory_budget))
        return _certified(apply_fn, at, x, theta, cholesky=cholesky, proof=kind)


def certified_min_eig(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    theta: Float[np.ndarray, "nc nc"],
    *,
    trainable: Trainable = None,
    proof: str = "auto",
) -> linalg.MinEig:
    """Compute λ_min of an assembled kernel, in an interval that holds that of the exact kernel where one is known.

    Args:
        apply_fn: the function whose kernel it is.
        params: pytree of parameters.
        x: inputs with leading axis n.
        theta: its full kernel, (n c, n c), in float64.
        trainable: as for `ntk.empirical_ntk`.
        proof: which networks are enclosed. Those of dense and convolutional layers, average pooling and softplus, tanh
            or relu always are, at the cost of a kernel. For any other the Jacobian is evaluated anew with more digits,
            sample by sample (`proofs.jacobian`): seconds a sample for a residual network of 13 convolutions, tenths of
            one for a small transformer. "auto" does it where that is about a minute of two cores at most, "always"
            whatever it takes, "never" not.

    Returns:
        A proved interval for the exact kernel. Where there is no bound on its assembly, the interval is about the
        computed kernel alone: `proved` is False and `reason` says why. Where the function rounds to a narrower type
        than float64 inside, the interval is widened by an estimate of what that does to the kernel, and `reason` names
        the operation. With more rows than parameters the exact λ_min is 0, proved, whatever the function.
    """
    kind = check_proof(proof)
    n = jax.tree.leaves(x)[0].shape[0]
    if linalg.as_symmetric(theta).shape[0] % n:
        raise ValueError(f"theta must be the full kernel, ({n} c, {n} c) for {n} samples, got shape {theta.shape}")
    with precision_scope("float64"):
        split = cast_parameters(parameters.split(params, trainable), "float64")
        wide = cast_floating(x, "float64")
        return _certified(apply_fn, Point(split, wide, engine.trace(apply_fn, split, wide)), x, theta, proof=kind)


def _too_large(rows: int, memory_budget: int | None) -> bool:
    """Return whether a kernel and its factor do not fit; a budget given for the assembly alone may be smaller."""
    return 16 * rows**2 > max(memory_budget or 0, budget(None))


def _certified_packed(apply_fn: ApplyFn, at: Point, x: Any, memory_budget: int | None) -> linalg.MinEig:
    """Compute λ_min from blocks of the kernel that are made anew after every factorisation."""
    n = jax.tree.leaves(at.x)[0].shape[0]
    blocks = linalg.Blocks(
        n * at.traced.c, lambda: engine.lower_blocks(at.traced, at.params, at.x, memory_budget=memory_budget)
    )
    return certified_from_blocks(apply_fn, at, x, blocks)


def certified_from_blocks(apply_fn: ApplyFn, at: Point, x: Any, blocks: linalg.Blocks) -> linalg.MinEig:
    """Compute λ_min from blocks of the kernel of a function that was checked; `x` as the caller gave it.

    Raises:
        linalg.UntrustedError: if the kernel is not finite.
    """
    try:
        theta = blocks.matrix()
    except ArithmeticError as error:
        raise linalg.UntrustedError(f"the kernel is not finite: {error}") from error
    return _certified(apply_fn, at, x, theta, blocks)


def _certified(
    apply_fn: ApplyFn,
    at: Point,
    x: Any,
    theta: Any,
    blocks: linalg.Blocks | None = None,
    cholesky: Cholesky | None = None,
    proof: Proof = "auto",
) -> linalg.MinEig:
    """Compute λ_min of a kernel (n c, n c), an array, or rows of `blocks`, which then take its place."""
    matrix = theta if blocks is None else blocks
    counted = theta.shape[0] > at.params.size
    bound, why = bound_or_reason(apply_fn, at.params, x, theta, proof="never" if counted else proof)
    if bound is not None or counted:
        return min_eig_within(theta, bound, at.params.size, blocks, cholesky)
    reason = f"no bound on the assembly of this kernel is known, so the interval is about the computed kernel: {why}"
    narrow, error = at.traced.narrow, 0.0
    if narrow is not None:
        error = _narrowing_error(narrow, theta)
        reason = f"{engine.widening(narrow)}; the interval is widened by an estimate of that rounding"
    found = linalg.min_eig(matrix, assembly_error=error, cholesky=cholesky)
    return replace(found, proved=False, assumptions=(), reason="; ".join(filter(None, (reason, found.reason))))


def min_eig_within(
    theta: Any,
    bound: AssemblyBound | None,
    p: int,
    blocks: linalg.Blocks | None = None,
    cholesky: Cholesky | None = None,
) -> linalg.MinEig:
    """Return λ_min of the exact kernel of p parameters, whose distance from a computed one is bounded.

    The computed kernel is an array (n c, n c), or rows of blocks, which then take its place.

    It is 0 where there are more rows than parameters, whatever the bound; else there must be one.
    """
    if theta.shape[0] > p:
        known = {} if bound is None else {"assembly_error": bound.assembly_error, "factor_error": bound.factor_error}
        return replace(by_counting(theta.shape[0], p), **known)
    assert bound is not None
    return linalg.min_eig(theta if blocks is None else blocks, **vars(bound), cholesky=cholesky)


def by_counting(rows: int, p: int) -> linalg.MinEig:
    """λ_min of a kernel with more rows than parameters."""
    counted = f"the kernel is J Jᵀ with J of shape ({rows}, {p}): more rows than parameters, so its rank is at most {p}"
    return linalg.MinEig(
        value=0.0, lower=0.0, upper=0.0, proved=True, converged=True, assembly_error=math.inf, assumptions=(counted,)
    )


def _narrowing_error(narrow: Narrow, theta: Float[np.ndarray, "nc nc"]) -> float:
    """Estimate what rounding inside a function does to its kernel, in spectral norm.

    Each of k roundings on the way to the outputs, and as many on the way back, moves the rows of J by ε relative to
    their size, to first order and for steps that do not amplify: J by 2 k ε ‖J‖, Θ by 4 k ε ‖Θ‖.
    """
    return 4.0 * narrow.roundings * narrow.eps * certificates.row_sum_bound(theta)


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
