"""The public kernel function: checks, precision, and the choice between the engine and its peer."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float

from lplr_jax.checks import function, instance, one_of, whole
from lplr_jax.ntk import checks, engine, neural_tangents
from lplr_jax.ntk.explain import Explanation
from lplr_jax.types import ApplyFn, Params

Outputs = Literal["full", "trace", "diagonal"]
Precision = Literal["float32", "float64"]

KERNELS = (
    "auto",
    "engine",
    "neural-tangents",
    *(f"neural-tangents:{name}" for name in neural_tangents.IMPLEMENTATIONS),
)
"""Names that `kernel=` takes; "auto" is the engine, "neural-tangents" its structured implementation."""


def check_kernel_name(kernel: str) -> None:
    """Raise ValueError for a name that is not in `KERNELS`."""
    one_of("kernel", kernel, KERNELS)


@contextmanager
def precision_scope(dtype: Precision) -> Iterator[None]:
    """Enter the scope in which arrays of `dtype` exist, whatever the caller's global float64 flag, and leave it alone.

    TPUs have no IEEE float64, so there a float64 scope places its work on the CPU backend.
    """
    one_of("dtype", dtype, get_args(Precision))
    with jax.default_matmul_precision("highest"):
        if dtype == "float32":
            yield
            return
        with jax.enable_x64(True):
            if jax.default_backend() == "tpu":
                with jax.default_device(jax.devices("cpu")[0]):
                    yield
            else:
                yield


def cast_floating(tree: Any, dtype: Precision) -> Any:
    """Return the pytree with every floating leaf as a JAX array of `dtype`; other leaves pass.

    Call inside `precision_scope(dtype)`. Float32 values are exact in float64, so the point does not move.
    """
    off_tpu = dtype == "float64" and jax.default_backend() == "tpu"

    def cast(leaf: Any) -> Any:
        # A Python float among the parameters is a setting, such as a dropout rate, and no parameter.
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        # NumPy casts what lies on the host: a program for every shape would have to be compiled.
        host = off_tpu or checks.on_host(leaf)
        return jnp.asarray(np.asarray(leaf).astype(dtype) if host else leaf, dtype=dtype)

    return jax.tree.map(cast, tree)


def _check_settings(apply_fn: ApplyFn, outputs: str, memory_budget: int | None) -> None:
    function("apply_fn", apply_fn, "(params, x) -> outputs (n, c)")
    one_of("outputs", outputs, get_args(Outputs))
    if memory_budget is not None:
        whole("memory_budget", memory_budget, least=1)


def explain(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    outputs: Outputs = "full",
    dtype: Precision = "float64",
    memory_budget: int | None = None,
) -> Explanation:
    """Tell leaf by leaf which rule of the engine serves it, at what cost, and why; nothing is computed.

    Args:
        apply_fn: as for `empirical_ntk`.
        params: as for `empirical_ntk`.
        x: as `x1` for `empirical_ntk`.
        outputs: as for `empirical_ntk`; the choice of rules depends on it.
        dtype: as for `empirical_ntk`.
        memory_budget: as for `empirical_ntk`.

    Returns:
        The explanation; print it for a table of rules, multiply-adds and bytes.

    Raises:
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers.
        ValueError: as for `empirical_ntk`.
    """
    _check_settings(apply_fn, outputs, memory_budget)
    with precision_scope(dtype):
        checks.inputs(params, x)
        params, x = cast_floating((params, x), dtype)
        checks.deterministic(apply_fn, params, x)
        return engine.explain(apply_fn, params, x, outputs=outputs, memory_budget=memory_budget)


def empirical_ntk(
    apply_fn: ApplyFn,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    kernel: str = "auto",
    outputs: Outputs = "full",
    dtype: Precision = "float64",
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "..."]:
    """Compute the empirical neural tangent kernel Θ(θ) = J Jᵀ (paper, section 3), never divided by anything.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,).
        params: pytree; floating leaves are θ, others are passed through.
        x1: inputs with leading axis n1.
        x2: inputs with leading axis n2; None stands for x1 and makes the full and trace kernels exactly symmetric.
        kernel: one of `KERNELS`.
        outputs: "full" for all pairs of samples and outputs, "trace" for the sum over outputs, "diagonal" for
            Θ_oo(x_i, x_i) alone.
        dtype: precision of the computation; parameters and inputs are cast to it. λ_min of a badly conditioned kernel
            is noise in "float32".
        memory_budget: bytes that may be used beside the result; None lets the kernel choose. The result does not
            depend on it.
        mesh: devices over which the engine shards the rows; None takes all where there are several.

    Returns:
        (n1 c, n2 c) with rows i c + o (sample-major) for "full", (n1, n2) for "trace", (n1, c) for "diagonal". A
        float64 result should be handed to NumPy (`np.asarray`) unless `jax.enable_x64` is on: JAX truncates it
        otherwise.

    Raises:
        ValueError: for an unknown name, empty, non-finite or mismatched inputs, or an `apply_fn` that is not a
            deterministic function of each sample alone.
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers.
        ImportError: when neural-tangents is asked for and cannot be imported.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> empirical_ntk(lambda w, x: x @ w, jnp.ones((2, 1)), x).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    check_kernel_name(kernel)
    _check_settings(apply_fn, outputs, memory_budget)
    if outputs == "diagonal" and x2 is not None:
        raise ValueError('outputs="diagonal" compares each sample with itself; leave x2 out')
    if mesh is not None:
        instance("mesh", mesh, Mesh, "as jax.make_mesh gives one")
    if mesh is not None and kernel not in ("auto", "engine"):
        raise ValueError(f'mesh is for kernel="engine"; {kernel!r} runs on one device, so leave one of the two out')
    with precision_scope(dtype):
        checks.inputs(params, x1)
        if x2 is not None:
            checks.inputs(params, x2)
            checks.alike(x1, x2)
        params, x1, x2 = cast_floating((params, x1, x2), dtype)
        checks.deterministic(apply_fn, params, x1)
        checks.sample_coupling(apply_fn, params, x1)
        if kernel in ("auto", "engine"):
            return engine.kernel(apply_fn, params, x1, x2, outputs=outputs, memory_budget=memory_budget, mesh=mesh)
        implementation = kernel.partition(":")[2] or "structured"
        return neural_tangents.kernel(
            apply_fn, params, x1, x2, implementation=implementation, outputs=outputs, memory_budget=memory_budget
        )
