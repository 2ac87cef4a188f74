"""Extreme eigenvalues of the full-data Hessian, and of a kernel too large to assemble, by products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np

from lplr_jax import checks
from lplr_jax.lanczos import Matvec, Ritz, extreme_ritz
from lplr_jax.ntk import checks as probes
from lplr_jax.ntk.empirical import Precision, cast_floating, precision_scope
from lplr_jax.types import ApplyFn, Params

Reduction = Literal["sum", "mean"]

DEFAULT_BUDGET = 2 * 2**30
"""Bytes for the intermediate values of one Hessian-vector product where the caller names none."""


@dataclass(frozen=True)
class Extremes(Ritz):
    """Least and largest algebraic eigenvalue of a Hessian, measured: `largest` bounds β from below only.

    Attributes:
        units: units of both eigenvalues and their residuals.
        batch_size: samples per micro-batch of the products.
    """

    units: str = "loss per squared parameter"
    batch_size: int | None = None


@lru_cache(maxsize=64)
def _hessian_product(loss_fn: Callable[..., Any]) -> Matvec:
    """Return (v, params, data) -> ∇²L v; one object per loss, so that compiled code is found again."""

    def product(vector: Params, params: Params, data: tuple[Any, ...]) -> Params:
        gradient = jax.grad(lambda q: loss_fn(q, *data))
        return jax.jvp(gradient, (params,), (vector,))[1]

    return product


@lru_cache(maxsize=64)
def _accumulated_product(loss_fn: Callable[..., Any], reduction: str, batch_size: int) -> Matvec:
    """Return the same product as a sum over micro-batches; the last one may be smaller."""
    product = _hessian_product(loss_fn)

    def accumulated(vector: Params, params: Params, data: tuple[Any, ...]) -> Params:
        n = jax.tree.leaves(data)[0].shape[0]
        full, rest = divmod(n, batch_size)

        def add(total: Params, batch: tuple[Any, ...], samples: int) -> Params:
            weight = samples / n if reduction == "mean" else 1.0
            return jax.tree.map(lambda t, h: t + weight * h, total, product(vector, params, batch))

        def body(total: Params, index: Any) -> tuple[Params, None]:
            start = index * batch_size
            batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), data)
            return add(total, batch, batch_size), None

        total, _ = jax.lax.scan(body, jax.tree.map(jnp.zeros_like, vector), jnp.arange(full))
        return add(total, jax.tree.map(lambda leaf: leaf[full * batch_size :], data), rest) if rest else total

    return accumulated


def _intermediate_bytes(jaxpr: Any) -> int:
    """Return the size of every value that a jaxpr computes: what it needs if nothing is freed or fused."""
    total = 0
    for eqn in jaxpr.eqns:
        total += sum(var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars if hasattr(var.aval, "dtype"))
        total += sum(_intermediate_bytes(getattr(body, "jaxpr", body)) for body in jex.jaxprs_in_params(eqn.params))
    return total


def _batch_size(loss_fn: Callable[..., Any], params: Params, data: tuple[Any, ...], budget: int) -> int | None:
    """Return the samples whose product fits into the budget, or None if all do."""
    n = jax.tree.leaves(data)[0].shape[0]

    def size(batch: int) -> int:
        part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), data)
        return _intermediate_bytes(jax.make_jaxpr(_hessian_product(loss_fn))(params, params, part).jaxpr)

    if n < 2:
        return None
    batch = max(1, budget // max(1, size(2) - size(1)))
    return None if batch >= n else batch


def _check_reduction(
    loss_fn: Callable[..., Any], params: Params, data: tuple[Any, ...], reduction: str, batch_size: int
) -> None:
    """Raise where the loss of two batches is not the sum or the mean that the caller declared."""
    n = jax.tree.leaves(data)[0].shape[0]
    half = min(batch_size, n // 2)
    first, second, both = (
        float(loss_fn(params, *jax.tree.map(lambda leaf, a=a, b=b: leaf[a:b], data)))
        for a, b in ((0, half), (half, 2 * half), (0, 2 * half))
    )
    expected = first + second if reduction == "sum" else 0.5 * (first + second)
    # Rounding of three losses, generously; a wrong declaration is off by a factor of about two.
    if abs(both - expected) > 1e-3 * (abs(first) + abs(second)):
        raise ValueError(
            f'reduction="{reduction}" does not describe the loss: on two batches it gives {first:.6g} and '
            f"{second:.6g}, on both together {both:.6g}; declare the right one, or leave it out to take all at once"
        )


def _check_scalar(loss_fn: Callable[..., Any], params: Params, data: tuple[Any, ...]) -> None:
    try:
        value = jax.eval_shape(loss_fn, params, *data)
    except Exception as error:  # whatever the caller's function raises
        raise ValueError(
            f"loss_fn fails on these parameters and data ({type(error).__name__}: {error}); it must take "
            "(params, *data) and return a scalar"
        ) from error
    shape = getattr(value, "shape", None)
    if shape != ():
        found = type(value).__name__ if shape is None else f"shape {shape}"
        raise ValueError(f"loss_fn must return a scalar, got {found}")


def hessian_extremes(
    loss_fn: Callable[..., Any],
    params: Params,
    *data: Any,
    reduction: str | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    dtype: Precision = "float64",
    num_matvecs: int = 24,
    max_matvecs: int = 240,
    tolerance: float = 1e-6,
    seed: int = 0,
    start: Extremes | None = None,
) -> Extremes:
    """Measure the least and the largest algebraic eigenvalue of the full-data Hessian ∇²L(θ).

    Lanczos with full reorthogonalisation on forward-over-reverse products. Ritz values lie inside the spectrum: the
    sharpness is under-estimated and the curvature's least value over-estimated until the residuals say otherwise.

    Args:
        loss_fn: (params, *data) -> scalar; pass the same function object again to reuse compiled code.
        params: θ, a pytree of floating arrays.
        *data: pytrees of arrays; with `reduction`, all with the samples on the leading axis.
        reduction: "sum" or "mean" if the loss is that of a per-sample loss over the leading axis of the data; products
            are then accumulated over micro-batches. None takes all data at once.
        memory_budget: bytes for the intermediate values of a product; sets the micro-batch where `reduction` is given.
        dtype: precision, in a local scope; parameters and data are cast to it.
        num_matvecs: products per Lanczos cycle; about twice as many vectors of p numbers are held.
        max_matvecs: products after which it stops unconverged.
        tolerance: residual at which it stops, relative to the larger eigenvalue's modulus.
        seed: of the start vector.
        start: result at a nearby θ, to start from its eigenvectors.

    Returns:
        Both eigenvalues with residuals, in units of the loss per squared parameter; NaN and unconverged where a product
        is not finite.

    Raises:
        TypeError: for parameters that are not floating.
        ValueError: for a setting out of range, a loss that is no scalar or not what `reduction` declares.

    Example:
        >>> import jax.numpy as jnp
        >>> result = hessian_extremes(lambda w, d: 0.5 * jnp.sum(d * w * w), jnp.ones(3), jnp.array([-1.0, 2.0, 3.0]))
        >>> round(result.least, 6), round(result.largest, 6)
        (-1.0, 3.0)
    """
    checks.function("loss_fn", loss_fn, "(params, *data) -> scalar")
    if reduction is not None:
        checks.one_of("reduction", reduction, get_args(Reduction))
    checks.whole("memory_budget", memory_budget, least=1)
    for name, tree in (("params", params), ("data", data)):
        for leaf in jax.tree.leaves(tree):
            array = checks.as_array(leaf)
            if array is None or array.dtype.kind in "OUSMm":
                raise TypeError(f"{name} must hold arrays of numbers, got a leaf {checks.shown(leaf)}")
            if np.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite, got {checks.shown(array)} with NaN or infinity; clean it")
    for leaf in jax.tree.leaves(params):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            raise TypeError(f"parameters must be floating arrays, got a leaf of dtype {jnp.result_type(leaf)}")
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if reduction is not None and (len(lengths) != 1 or lengths <= {(), (0,)}):
        raise ValueError(
            f"with reduction, all data must share their leading axis of samples; the leading axes are {sorted(lengths)}"
        )
    with precision_scope(dtype):
        params, data = cast_floating((params, data), dtype)
        _check_scalar(loss_fn, params, data)
        batch_size = None
        matvec = _hessian_product(loss_fn)
        if reduction is not None:
            batch_size = _batch_size(loss_fn, params, data, memory_budget)
            if batch_size is not None:
                _check_reduction(loss_fn, params, data, reduction, batch_size)
                matvec = _accumulated_product(loss_fn, reduction, batch_size)
        ritz = extreme_ritz(
            matvec,
            params,
            params,
            data,
            num_matvecs=num_matvecs,
            max_matvecs=max_matvecs,
            tolerance=tolerance,
            seed=seed,
            start=start,
        )
    return Extremes(**vars(ritz), batch_size=batch_size)


@lru_cache(maxsize=64)
def _kernel_product(apply_fn: ApplyFn) -> Matvec:
    def product(vector: Any, params: Params, x: Any) -> Any:
        def outputs(q: Params) -> Any:
            return apply_fn(q, x)

        (cotangent,) = jax.vjp(outputs, params)[1](vector)
        return jax.jvp(outputs, (params,), (cotangent,))[1]

    return product


def ntk_extremes(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    dtype: Precision = "float64",
    num_matvecs: int = 24,
    max_matvecs: int = 240,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> Ritz:
    """Estimate both ends of the kernel's spectrum from products Θ v = J (Jᵀ v), for kernels too large to assemble.

    `least` is an UPPER bound of λ_min(Θ) and approaches it slowly where the kernel is badly conditioned: it can refute
    a spectral budget λ_0, never support one. `linalg.min_eig` of the assembled kernel is the way to a proof.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,).
        params: pytree of floating arrays.
        x: inputs with leading axis n; one product holds the activations of all of them.
        dtype: precision, in a local scope.
        num_matvecs: products per Lanczos cycle.
        max_matvecs: products after which it stops unconverged.
        tolerance: residual at which it stops, relative to λ_max.
        seed: of the start vector.

    Returns:
        The Ritz values at both ends with their residuals.

    Raises:
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers.
        ValueError: for a setting out of range, or empty, non-finite or wrongly shaped inputs.
    """
    checks.function("apply_fn", apply_fn, "(params, x) -> outputs (n, c)")
    with precision_scope(dtype):
        probes.inputs(params, x)
        params, x = cast_floating((params, x), dtype)
        probes.deterministic(apply_fn, params, x)
        like = jax.eval_shape(apply_fn, params, x)
        zeros = jnp.zeros(like.shape, like.dtype)
        return extreme_ritz(
            _kernel_product(apply_fn),
            zeros,
            params,
            x,
            num_matvecs=num_matvecs,
            max_matvecs=max_matvecs,
            tolerance=tolerance,
            seed=seed,
        )
