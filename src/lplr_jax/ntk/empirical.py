"""The public kernel function: checks, precision, and the choice between the engine and its peer."""

import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from lplr_jax import parameters, programs
from lplr_jax.checks import function, instance, one_of, whole
from lplr_jax.ntk import checks, engine, neural_tangents
from lplr_jax.ntk.coupling import on_host
from lplr_jax.ntk.explain import Explanation
from lplr_jax.parameters import Parameters, Trainable
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


class NarrowingWarning(UserWarning):
    """A function rounds to a narrower type inside than was asked for."""


def check_kernel_name(kernel: str) -> None:
    """Raise ValueError for a name that is not in `KERNELS`."""
    one_of("kernel", kernel, KERNELS)


def precision_name(dtype: Any) -> str:
    """Return "float32" or "float64" for a name or a dtype.

    Raises:
        ValueError: for any other.
    """
    try:
        name = np.dtype(dtype).name if dtype is not None and not isinstance(dtype, str) else dtype
    except TypeError:
        name = dtype
    return one_of("dtype", name, get_args(Precision))


@contextmanager
def precision_scope(dtype: Precision | DTypeLike) -> Iterator[None]:
    """Enter the scope in which arrays of `dtype` exist, whatever the caller's global float64 flag, and leave it alone.

    TPUs have no IEEE float64, so there a float64 scope places its work on the CPU backend.
    """
    dtype = precision_name(dtype)
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


def cast_floating(tree: Any, dtype: Precision | DTypeLike) -> Any:
    """Return the pytree with every floating array as a JAX array of `dtype`; other leaves pass, in native byte order.

    Call inside `precision_scope(dtype)`. Float32 values are exact in float64, so the point does not move.
    """
    leaves, treedef = jax.tree.flatten(tree)
    return jax.tree.unflatten(treedef, _cast(leaves, dtype))


def cast_parameters(params: Parameters, dtype: Precision | DTypeLike) -> Parameters:
    """Return parameters that were taken apart with every floating array in `dtype`, as `cast_floating` does."""
    return replace(params, arrays=tuple(_cast(params.arrays, dtype)))


def _cast(leaves: Sequence[Any], dtype: Precision | DTypeLike) -> list[Any]:
    name = precision_name(dtype)
    off_tpu = name == "float64" and jax.default_backend() == "tpu"
    every, places = list(leaves), []
    for i, leaf in enumerate(leaves):
        if not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
            swapped = isinstance(leaf, np.ndarray | np.generic) and not leaf.dtype.isnative
            every[i] = leaf.astype(leaf.dtype.newbyteorder("=")) if swapped else leaf
        elif not off_tpu and _is_cast(leaf, name):
            continue
        elif off_tpu or on_host(leaf):
            # NumPy casts what lies on the host: a program for every shape would have to be compiled.
            every[i] = np.asarray(leaf).astype(name)
            places.append(i)
        else:
            every[i] = jnp.asarray(leaf, dtype=name)
    # All at once, as every transfer by itself costs what a small network's kernel does.
    moved = jax.device_put([every[i] for i in places]) if places else []
    for i, leaf in zip(places, moved, strict=True):
        every[i] = leaf
    return every


def _is_cast(leaf: Any, name: str) -> bool:
    """Whether it is an array of this dtype that goes to any device; a committed one would take all others along."""
    return isinstance(leaf, jax.Array) and leaf.dtype == name and not (leaf.committed or leaf.weak_type)


class Point(NamedTuple):
    """A function at its parameters and samples, checked, cast and traced.

    Attributes:
        params: the parameters, taken apart.
        x: the samples.
        traced: the function as a program of one sample.
    """

    params: Parameters
    x: Any
    traced: engine.Traced


def point(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    dtype: Precision | DTypeLike,
    trainable: Trainable = None,
    coupling: bool = True,
) -> Point:
    """Check, cast and trace what every function of (apply_fn, params, x) needs; call it inside `precision_scope`.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,).
        params: pytree of parameters.
        x: inputs with leading axis n.
        dtype: what floating leaves are cast to.
        trainable: as for `parameters.split`.
        coupling: whether outputs may not depend on other samples.

    Raises:
        TypeError: for inputs that are no arrays of numbers, or that JAX is tracing.
        ValueError: for an unfit input or function; see `checks`.
    """
    # JAX sees no value in what it traces, and a filter may.
    programs.refuse_tracers(jax.tree.leaves((params, x)))
    split = cast_parameters(checks.inputs(parameters.split(params, trainable), x), dtype)
    x = cast_floating(x, dtype)
    return Point(split, x, checks.function(apply_fn, split, x, coupling=coupling))


@dataclass(frozen=True)
class OfTheta:
    """A function of (θ, x), θ a list of arrays; equal to any other that computes the same.

    Attributes:
        function: from (consts, θ, x) to outputs, the same object for the same program.
        digests: what the captured arrays, and those that the parameters carry along, hold.
        consts: the captured arrays.
        carried: the arrays that the parameters carry along.
    """

    function: Callable[..., Any]
    digests: tuple[Hashable, ...]
    consts: Sequence[Any] = field(compare=False, repr=False)
    carried: Sequence[Any] = field(compare=False, repr=False)

    def __call__(self, theta: Sequence[Any], x: Any) -> Any:
        """Evaluate."""
        return self.function(self.consts, theta, self.carried, x)


def of_theta(apply_fn: ApplyFn, params: Parameters, x: Any) -> tuple[OfTheta, list[Any]]:
    """Trace a function at its samples, and return it as one of θ alone, with θ.

    Fit for a static argument of `jax.jit`: compiled code is found again where the function computes the same, and
    nowhere else.
    """
    told_by = (apply_fn, params.told_by)
    found = programs.find(parameters.on_theta(apply_fn, params), params.values, params.carried, x, told_by=told_by)
    digests = tuple(programs.digest(array) for array in (*found.consts, *params.carried))
    return OfTheta(found.function, digests, found.consts, params.carried), params.values


def without_gradient(at: Point) -> None:
    """Warn of leaves of θ that no gradient step seems to move."""
    parameters.warn_of_statistics(at.params)
    parameters.warn_of_unused(at.traced.unused)


def check_settings(
    apply_fn: ApplyFn, *, outputs: str = "full", kernel: str = "auto", memory_budget: int | None = None
) -> None:
    """Check what does not depend on parameters or samples.

    Raises:
        TypeError: for an `apply_fn` that is no function.
        ValueError: for an unknown name, or a budget that is no positive integer.
    """
    check_kernel_name(kernel)
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
    dtype: Precision | DTypeLike = "float64",
    memory_budget: int | None = None,
    trainable: Trainable = None,
) -> Explanation:
    """Tell leaf by leaf which rule of the engine serves it, at what cost, and why; nothing is computed.

    Args:
        apply_fn: as for `empirical_ntk`.
        params: as for `empirical_ntk`.
        x: as `x1` for `empirical_ntk`.
        outputs: as for `empirical_ntk`; the choice of rules depends on it.
        dtype: as for `empirical_ntk`.
        memory_budget: as for `empirical_ntk`.
        trainable: as for `empirical_ntk`.

    Returns:
        The explanation; print it for a table of rules, multiply-adds and bytes, of the leaves that are not θ, and of
        where the function rounds more coarsely than `dtype`.

    Raises:
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers.
        ValueError: as for `empirical_ntk`.
    """
    check_settings(apply_fn, outputs=outputs, memory_budget=memory_budget)
    with precision_scope(dtype):
        at = point(apply_fn, params, x, dtype=dtype, trainable=trainable, coupling=False)
        return engine.explain(at.traced, at.params, at.x, outputs=outputs, memory_budget=memory_budget)


def empirical_ntk(
    apply_fn: ApplyFn,
    params: Params,
    x1: Any,
    x2: Any = None,
    *,
    kernel: str = "auto",
    outputs: Outputs = "full",
    dtype: Precision | DTypeLike = "float64",
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
    trainable: Trainable = None,
) -> Float[Array, "..."]:
    """Compute the empirical neural tangent kernel Θ(θ) = J Jᵀ (paper, section 3), never divided by anything.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,).
        params: pytree of parameters; which of its leaves are θ is said in `parameters`, and by `explain`.
        x1: inputs with leading axis n1.
        x2: inputs with leading axis n2; None stands for x1 and makes the full and trace kernels exactly symmetric.
        kernel: one of `KERNELS`.
        outputs: "full" for all pairs of samples and outputs, "trace" for the sum over outputs, "diagonal" for
            Θ_oo(x_i, x_i) alone.
        dtype: precision of the computation, float32 or float64; parameters and inputs are cast to it, and the kernel
            is returned in it. λ_min of a badly conditioned kernel is noise in "float32", and so it is where the
            function rounds to a narrower type inside, of which a `NarrowingWarning` tells.
        memory_budget: bytes that may be used beside the result; None lets the kernel choose. The result does not
            depend on it.
        mesh: devices over which the engine shards the rows; None takes all where there are several.
        trainable: pytree of booleans or function of a leaf's path that says which floating leaves are θ; None for what
            the container says, or else for all. Leaves that nothing seems to train get an `UntrainedLeafWarning`.

    Returns:
        (n1 c, n2 c) with rows i c + o (sample-major) for "full", (n1, n2) for "trace", (n1, c) for "diagonal". A
        float64 result should be handed to NumPy (`np.asarray`) unless `jax.enable_x64` is on: JAX truncates it
        otherwise.

    Raises:
        ValueError: for an unknown name, empty, non-finite or mismatched inputs, or an `apply_fn` that is not a
            deterministic function of each sample alone.
        UntrustedError: for a kernel that is not finite, with the samples that make it so; it is a ValueError.
        TypeError: for an `apply_fn` that is no function, or inputs that are no arrays of numbers or traced by JAX.
        ImportError: when neural-tangents is asked for and cannot be imported.

    Example:
        >>> import jax.numpy as jnp
        >>> x = jnp.array([[1.0, 0.0], [0.0, 2.0]])
        >>> empirical_ntk(lambda w, x: x @ w, jnp.ones((2, 1)), x).tolist()
        [[1.0, 0.0], [0.0, 4.0]]
    """
    check_settings(apply_fn, outputs=outputs, kernel=kernel, memory_budget=memory_budget)
    if outputs == "diagonal" and x2 is not None:
        raise ValueError('outputs="diagonal" compares each sample with itself; leave x2 out')
    if mesh is not None:
        instance("mesh", mesh, Mesh, "as jax.make_mesh gives one")
    if mesh is not None and kernel not in ("auto", "engine"):
        raise ValueError(f'mesh is for kernel="engine"; {kernel!r} runs on one device, so leave one of the two out')
    with precision_scope(dtype):
        if x2 is not None:
            programs.refuse_tracers(jax.tree.leaves(x2))
            checks.inputs(parameters.split(params, trainable), x2)
            checks.alike(x1, x2)
        at = point(apply_fn, params, x1, dtype=dtype, trainable=trainable)
        if trainable is None:
            without_gradient(at)
        if at.traced.narrow is not None:
            warnings.warn(engine.widening(at.traced.narrow), NarrowingWarning, stacklevel=2)
        return at_point(
            apply_fn,
            at,
            None if x2 is None else cast_floating(x2, dtype),
            kernel=kernel,
            outputs=outputs,
            memory_budget=memory_budget,
            mesh=mesh,
        )


def at_point(
    apply_fn: ApplyFn,
    at: Point,
    x2: Any = None,
    *,
    kernel: str = "auto",
    outputs: Outputs = "full",
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
) -> Float[Array, "..."]:
    """Compute the kernel of a function that has been checked; arguments as for `empirical_ntk`, in the same scope."""
    settings: dict[str, Any] = {"outputs": outputs, "memory_budget": memory_budget}
    if kernel in ("auto", "engine"):
        theta = engine.evaluate(at.traced, at.params, at.x, x2, mesh=mesh, **settings)
    else:
        implementation = kernel.partition(":")[2] or "structured"
        theta = neural_tangents.kernel(apply_fn, at.params, at.x, x2, implementation=implementation, **settings)
    checks.kernel(theta, at.traced.c if outputs == "full" else 1, outputs, symmetric=x2 is None)
    return theta
