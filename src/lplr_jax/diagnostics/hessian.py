"""Extreme eigenvalues of the full-data Hessian, and of a kernel too large to assemble, by products alone."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, get_args

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lplr_jax import checks, parameters, programs, rooms
from lplr_jax.lanczos import Matvec, Ritz, extreme_ritz
from lplr_jax.narrowing import narrowing
from lplr_jax.ntk.empirical import Precision, cast_floating, cast_parameters, point, precision_scope
from lplr_jax.parameters import Trainable
from lplr_jax.types import ApplyFn, Params

Loss = Callable[..., Any]
"""(θ, carried, *data) -> scalar, θ and carried lists of arrays."""

Reduction = Literal["sum", "mean"]

DEFAULT_BUDGET = 2 * 2**30
"""Bytes for the intermediate values of one Hessian-vector product where the caller names none."""


_SMALL = 2**26
"""Bytes for a single product whatever the budget."""


@dataclass(frozen=True)
class Extremes(Ritz):
    """Least and largest algebraic eigenvalue of a Hessian, measured: `largest` bounds β from below only.

    Attributes:
        units: units of both eigenvalues and their residuals.
        batch_size: samples per micro-batch of the products.
    """

    units: str = "loss per squared parameter"
    batch_size: int | None = None

    def __repr__(self) -> str:
        word = "converged" if self.converged else f"not converged in {self.num_matvecs} products"
        least = f"least {self.least:.6g} ± {self.least_residual:.1g}"
        return f"Extremes({least}, largest {self.largest:.6g} ± {self.largest_residual:.1g}, {self.units}, {word})"

    def _repr_html_(self) -> str:
        """Return a small table for a notebook."""
        # Reports stand above, so this door is opened when somebody goes through.
        return rooms.through_door("lplr_jax.linalg", "numbers_html")("extreme eigenvalues", self)


def _hessian_product(loss: Loss) -> Matvec:
    """Return (v, θ, carried, data) -> ∇²L v."""

    def product(vector: Any, theta: Any, carried: Any, data: tuple[Any, ...]) -> Any:
        gradient = jax.grad(lambda q: loss(q, carried, *data))
        return jax.jvp(gradient, (theta,), (vector,))[1]

    return product


def _over_batches(function: Callable[..., Any], reduction: str, batch_size: int) -> Callable[..., Any]:
    """Return a function of (..., data) as its sum or mean over micro-batches; the last one may be smaller."""

    def accumulated(*args: Any) -> Any:
        *rest_of, data = args
        n = jax.tree.leaves(data)[0].shape[0]
        full, rest = divmod(n, batch_size)

        def add(total: Any, batch: tuple[Any, ...], samples: int) -> Any:
            weight = samples / n if reduction == "mean" else 1.0
            return jax.tree.map(lambda t, h: t + weight * h, total, function(*rest_of, batch))

        def body(total: Any, index: Any) -> tuple[Any, None]:
            start = index * batch_size
            batch = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, start, batch_size), data)
            return add(total, batch, batch_size), None

        first = jax.tree.map(lambda leaf: leaf[:batch_size], data)
        zeros = jax.tree.map(lambda like: jnp.zeros(like.shape, like.dtype), jax.eval_shape(function, *rest_of, first))
        total, _ = jax.lax.scan(body, zeros, jnp.arange(full))
        return add(total, jax.tree.map(lambda leaf: leaf[full * batch_size :], data), rest) if rest else total

    return accumulated


def _intermediate_bytes(jaxpr: Any) -> int:
    """Return the size of every value that a jaxpr computes: what it needs if nothing is freed or fused."""
    total = 0
    for eqn in jaxpr.eqns:
        total += sum(var.aval.size * var.aval.dtype.itemsize for var in eqn.outvars if hasattr(var.aval, "dtype"))
        total += sum(_intermediate_bytes(getattr(body, "jaxpr", body)) for body in jex.jaxprs_in_params(eqn.params))
    return total


def _batch_size(loss_fn: Callable[..., Any], theta: Any, data: tuple[Any, ...], budget: int) -> int | None:
    """Return the samples whose product fits into the budget, or None if all do; `loss_fn` is one of (θ, *data)."""
    n = jax.tree.leaves(data)[0].shape[0]
    product = _hessian_product(lambda q, _, *part: loss_fn(q, *part))

    def size(batch: int) -> int:
        part = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), data)
        return _intermediate_bytes(jax.make_jaxpr(product)(theta, theta, (), part).jaxpr)

    if n < 2:
        return None
    batch = max(1, budget // max(1, size(2) - size(1)))
    return None if batch >= n else batch


def _check_reduction(
    loss: Loss, theta: Any, carried: Any, data: tuple[Any, ...], reduction: str, batch_size: int, budget: int
) -> None:
    """Raise where the loss over micro-batches, or its second derivative, is not that of all data.

    Loss, slope and curvature along one random direction are taken of both: forward over forward, which keeps no
    activations; of a loss without a forward mode, one product, where all data do not need too much memory for it.
    """
    rng = np.random.default_rng(0)
    direction = [jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype) for leaf in theta]

    def along(theta: Any, carried: Any, data: tuple[Any, ...]) -> Any:
        def slope(q: Any) -> tuple[Any, Any]:
            return jax.jvp(lambda r: loss(r, carried, *data), (q,), (direction,))

        (value, first), (_, second) = jax.jvp(slope, (theta,), (direction,))
        return {"the loss": value, "its slope along a direction": first, "its curvature along a direction": second}

    def product(theta: Any, carried: Any, data: tuple[Any, ...]) -> Any:
        image = _hessian_product(loss)(direction, theta, carried, data)
        form = sum(jnp.vdot(v, h) for v, h in zip(direction, image, strict=True))
        return {"the loss": loss(theta, carried, *data), "its curvature along a direction": form}

    def values(theta: Any, carried: Any, data: tuple[Any, ...]) -> Any:
        return {"the loss": loss(theta, carried, *data)}

    whole, closed = None, None
    for function in (along, product, values):
        try:
            closed = jax.make_jaxpr(function)(theta, carried, data)
            programs.refuse_missing_mode(closed)
        except Exception:  # JAX says in several ways that a mode is missing
            continue
        if function is product and _intermediate_bytes(closed.jaxpr) > max(16 * budget, _SMALL):
            continue
        whole = function
        break
    if whole is None or closed is None:
        return
    moduli = _over_batches(lambda *args: jax.tree.map(jnp.abs, whole(*args)), reduction, batch_size)
    found, parts, scale = (
        jax.device_get(jax.jit(function)(theta, carried, data))
        for function in (whole, _over_batches(whole, reduction, batch_size), moduli)
    )
    narrow = narrowing(closed, [True] * len(closed.jaxpr.invars), theta[0].dtype)
    eps = max(float(jnp.finfo(theta[0].dtype).eps), 0.0 if narrow is None else narrow.eps)
    for name, value in found.items():
        # Roundings of sums in another order; 1e4 leave room for sums of 1e8 terms.
        if not abs(value - parts[name]) <= min(1e4 * eps, 0.1) * scale[name]:
            raise ValueError(
                f'reduction="{reduction}" does not describe the loss: over micro-batches of {batch_size} samples '
                f"{name} is {float(parts[name]):.6g}, of all data {float(value):.6g} (weights, masks or labels "
                "normalised over the batch, or a penalty that each batch repeats, make them differ); declare the right "
                "one, move such parts out of the loss, or leave reduction out to take all data at once"
            )


def _checked(loss: Loss) -> Loss:
    """Return the loss with a word about what it raises and returns."""

    def scalar(theta: Any, carried: Any, *data: Any) -> Any:
        try:
            value = loss(theta, carried, *data)
        except Exception as error:  # whatever the caller's function raises
            raise ValueError(
                f"loss_fn fails on these parameters and data ({type(error).__name__}: {error}); it must take "
                "(params, *data) and return a scalar"
            ) from error
        shape = getattr(value, "shape", None)
        if shape != ():
            found = type(value).__name__ if shape is None else f"shape {shape}"
            raise ValueError(f"loss_fn must return a scalar, got {found}")
        return value

    return scalar


def hessian_extremes(
    loss_fn: Callable[..., Any],
    params: Params,
    *data: Any,
    reduction: str | None = None,
    memory_budget: int = DEFAULT_BUDGET,
    dtype: Precision | DTypeLike = "float64",
    num_matvecs: int = 24,
    max_matvecs: int = 240,
    tolerance: float = 1e-6,
    seed: int = 0,
    start: Extremes | None = None,
    trainable: Trainable = None,
) -> Extremes:
    """Measure the least and the largest algebraic eigenvalue of the full-data Hessian ∇²L(θ).

    Lanczos with full reorthogonalisation on forward-over-reverse products. Ritz values lie inside the spectrum: the
    sharpness is under-estimated and the curvature's least value over-estimated until the residuals say otherwise.

    Args:
        loss_fn: (params, *data) -> scalar.
        params: pytree of parameters; which of its leaves are θ is said in `parameters`.
        *data: pytrees of arrays; with `reduction`, all with the samples on the leading axis.
        reduction: "sum" or "mean" if the loss is that of a per-sample loss over the leading axis of the data; products
            are then accumulated over micro-batches, whose loss and curvature along one direction are first held
            against those of all data. None takes all data at once.
        memory_budget: bytes for the intermediate values of a product; sets the micro-batch where `reduction` is given.
        dtype: precision, in a local scope; parameters and data are cast to it.
        num_matvecs: products per Lanczos cycle; about twice as many vectors of p numbers are held.
        max_matvecs: products after which it stops unconverged.
        tolerance: residual at which it stops, relative to the larger eigenvalue's modulus.
        seed: of the start vector.
        start: result at a nearby θ, to start from its eigenvectors.
        trainable: as for `ntk.empirical_ntk`.

    Returns:
        Both eigenvalues with residuals, in units of the loss per squared parameter; NaN and unconverged where a product
        is not finite.

    Raises:
        TypeError: for parameters that are complex, or anything that JAX is tracing.
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
    programs.refuse_tracers(jax.tree.leaves((params, data)))
    split = parameters.split(params, trainable)
    for name, leaves in (("params", split.values), ("data", jax.tree.leaves(data))):
        for leaf in leaves:
            array = checks.as_array(leaf)
            if array is None or array.dtype.kind in "OUSMm":
                raise TypeError(f"{name} must hold arrays of numbers, got a leaf {checks.shown(leaf)}")
            if jnp.issubdtype(array.dtype, np.inexact) and not np.isfinite(array).all():
                raise ValueError(f"{name} must be finite, got {checks.shown(array)} with NaN or infinity; clean it")
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(data)}
    if reduction is not None and (len(lengths) != 1 or lengths <= {(), (0,)}):
        raise ValueError(
            f"with reduction, all data must share their leading axis of samples; the leading axes are {sorted(lengths)}"
        )
    with precision_scope(dtype):
        split, data = cast_parameters(split, dtype), cast_floating(data, dtype)
        loss, theta, carried = _checked(parameters.on_theta(loss_fn, split)), split.values, split.carried
        batch_size = None
        product = _hessian_product(loss)
        if reduction is not None:
            batch_size = _batch_size(lambda q, *part: loss(q, carried, *part), theta, data, memory_budget)
            if batch_size is not None:
                _check_reduction(loss, theta, carried, data, reduction, batch_size, memory_budget)

                def with_vector_last(theta: Any, carried: Any, vector: Any, data: Any) -> Any:
                    return _hessian_product(loss)(vector, theta, carried, data)

                summed = _over_batches(with_vector_last, reduction, batch_size)

                def product(vector: Any, theta: Any, carried: Any, data: Any) -> Any:
                    return summed(theta, carried, vector, data)

        ritz = _extremes(
            product,
            theta,
            (theta, carried, data),
            ("Hessian", loss_fn, split.told_by, reduction, batch_size),
            num_matvecs=num_matvecs,
            max_matvecs=max_matvecs,
            tolerance=tolerance,
            seed=seed,
            start=start,
        )
    return Extremes(**vars(ritz), batch_size=batch_size)


def _extremes(product: Matvec, like: Any, args: tuple[Any, ...], told_by: Any, **settings: Any) -> Ritz:
    """Search both ends of an operator's spectrum; compiled code is found again where the product is the same."""
    with jax.default_matmul_precision("highest"):
        function, consts, _ = programs.find(product, like, *args, told_by=told_by)
    return extreme_ritz(_with_consts_behind(function), like, consts, *args, **settings)


@lru_cache(maxsize=64)
def _with_consts_behind(function: Callable[..., Any]) -> Matvec:
    return lambda vector, consts, *args: function(consts, vector, *args)


def _kernel_product(outputs_of: Callable[..., Any], theta: Any, carried: Any, x: Any) -> tuple[Matvec, Any]:
    """Return (v, θ, carried, x) -> J (Jᵀ v), and what v looks like."""

    def forward(vector: Any, theta: Any, carried: Any, x: Any) -> Any:
        outputs, pull = jax.vjp(lambda q: outputs_of(q, carried, x), theta)
        del outputs
        return jax.jvp(lambda q: outputs_of(q, carried, x), (theta,), pull(vector))[1]

    def reverse(vector: Any, theta: Any, carried: Any, x: Any) -> Any:
        # J u is the derivative of v -> ⟨Jᵀ v, u⟩: reverse mode twice, for functions that have no other.
        pull = jax.vjp(lambda q: outputs_of(q, carried, x), theta)[1]
        (cotangent,), again = jax.vjp(pull, jnp.zeros_like(vector))
        del cotangent
        return again(pull(vector))[0]

    like = jax.eval_shape(outputs_of, theta, carried, x)
    zeros, failed = jnp.zeros(like.shape, like.dtype), None
    for product in (forward, reverse):
        try:
            programs.refuse_missing_mode(jax.make_jaxpr(product)(zeros, theta, carried, x))
        except Exception as error:  # JAX says in several ways that a mode is missing
            failed = error
        else:
            return product, zeros
    raise ValueError(
        f"apply_fn has no derivative in reverse mode ({type(failed).__name__}: {failed}), which products with its "
        "kernel need; `ntk.empirical_ntk` assembles the kernel in forward mode"
    ) from failed


def ntk_extremes(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    dtype: Precision | DTypeLike = "float64",
    num_matvecs: int = 24,
    max_matvecs: int = 240,
    tolerance: float = 1e-6,
    seed: int = 0,
    trainable: Trainable = None,
) -> Ritz:
    """Estimate both ends of the kernel's spectrum from products Θ v = J (Jᵀ v), for kernels too large to assemble.

    `least` is an UPPER bound of λ_min(Θ) and approaches it slowly where the kernel is badly conditioned: it can refute
    a spectral budget λ_0, never support one. `linalg.min_eig` of the assembled kernel is the way to a proof.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,).
        params: pytree of parameters; which of its leaves are θ is said in `parameters`.
        x: inputs with leading axis n; one product holds the activations of all of them.
        dtype: precision, in a local scope.
        num_matvecs: products per Lanczos cycle.
        max_matvecs: products after which it stops unconverged.
        tolerance: residual at which it stops, relative to λ_max.
        seed: of the start vector.
        trainable: as for `ntk.empirical_ntk`.

    Returns:
        The Ritz values at both ends with their residuals.

    Raises:
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers.
        ValueError: for a setting out of range, or empty, non-finite or wrongly shaped inputs.
    """
    checks.function("apply_fn", apply_fn, "(params, x) -> outputs (n, c)")
    with precision_scope(dtype):
        at = point(apply_fn, params, x, dtype=dtype, trainable=trainable, coupling=False)
        theta, carried = at.params.values, at.params.carried
        product, like = _kernel_product(parameters.on_theta(apply_fn, at.params), theta, carried, at.x)
        return _extremes(
            product,
            like,
            (theta, carried, at.x),
            ("kernel", apply_fn, at.params.told_by),
            num_matvecs=num_matvecs,
            max_matvecs=max_matvecs,
            tolerance=tolerance,
            seed=seed,
        )
