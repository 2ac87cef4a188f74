"""The peer kernel: neural-tangents 0.6.5, made to run on current JAX.

Its last release asks JAX for names that are gone. Its files stay as they are: what its import needs is put into JAX
while it is being imported and taken out again, and what it looks up later is set in the namespace of its own module
`neural_tangents._src.empirical`. So JAX is the same before, during and after every call. All of it is here, and
neural-tangents is not imported before a kernel is asked for.

Source: Novak, Sohl-Dickstein and Schoenholz, "Fast Finite Width Neural Tangent Kernel" (2022), arXiv 2206.08720.
"""

import contextlib
import functools
import importlib
import math
import sys
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.api_util
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.extend import core as extend_core
from jax.extend import linear_util
from jax.interpreters import ad
from jaxtyping import Array, Float, PyTree

from lplr_jax import parameters, programs
from lplr_jax.ntk import engine
from lplr_jax.parameters import Parameters

IMPLEMENTATIONS = ("jacobian", "ntvp", "structured", "auto")
"""Jacobian contraction, NTK-vector products, structured derivatives, and the cheapest of the three."""

DEFAULT_MEMORY_BUDGET = 2**31
"""Bytes that one block may take when no budget is given (calibrated: 1,000 images and the width-128 MLP in float64 are
one block of 0.11 GB with structured derivatives and of 1.7 GB with Jacobian contraction)."""

_MEMBERS = {
    "jacobian": "JACOBIAN_CONTRACTION",
    "ntvp": "NTK_VECTOR_PRODUCTS",
    "structured": "STRUCTURED_DERIVATIVES",
    "auto": "AUTO",
}
_INSTALL = "`pip install --no-deps neural-tangents==0.6.5 frozendict`, or the [nt] extra of lplr-jax, installs it"
_LOCK = threading.Lock()
_MAX_CACHED = 16
_kept = programs.Kept(_MAX_CACHED)


def available() -> str | None:
    """Try to import neural-tangents; never raises.

    Returns:
        None when it is usable, else the reason in one sentence.
    """
    try:
        _load()
    except ImportError as error:
        return str(error)
    return None


def kernel(
    apply_fn: Callable[[Any, Any], Any],
    params: PyTree,
    x1: PyTree,
    x2: PyTree | None = None,
    *,
    implementation: str = "structured",
    outputs: str = "full",
    memory_budget: int | None = None,
) -> Float[Array, "rows columns"]:
    """Compute the empirical NTK Θ = J(x1) J(x2)ᵀ with neural-tangents, divided by nothing.

    The precision is that of `params` and the inputs; matrix products ask for the highest that the device has. Compiled
    kernels are kept for the last few programs, so that probes of one model compile once.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c) or (n,), each sample on its own.
        params: pytree of parameters, or `Parameters`.
        x1: inputs of the rows, an array (n1, ...) or a pytree of such arrays.
        x2: inputs of the columns, likewise (n2, ...); None stands for x1 and makes full and trace kernels exactly
            symmetric.
        implementation: one of `IMPLEMENTATIONS`. "auto" compiles all three and takes the one with the fewest
            floating-point operations by the compiler's count, which says little about time on CPUs and GPUs.
        outputs: "full", "trace" or "diagonal".
        memory_budget: bytes that one block of the kernel and the temporaries behind it may take, by the compiler's
            count; arguments and result come on top. Samples are blocked to keep it. None: `DEFAULT_MEMORY_BUDGET`,
            exceeded where one pair of samples needs more.

    Returns:
        "full": (n1 c, n2 c), rows i c + o (sample-major). "trace": (n1, n2), the sum over outputs of Θ_oo. "diagonal":
        (n1, c), Θ_oo(x_i, x_i).

    Raises:
        ImportError: neural-tangents cannot be imported.
        NotImplementedError: the implementation does not know an operation in `apply_fn`.
        ValueError: an unknown name, x2 beside "diagonal", outputs of another shape, or a budget that one pair of
            samples exceeds.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation must be one of {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")
    if outputs not in ("full", "trace", "diagonal"):
        raise ValueError(f"outputs must be one of full, trace, diagonal, got {outputs!r}")
    if outputs == "diagonal" and x2 is not None:
        raise ValueError('outputs="diagonal" compares each sample with itself; leave x2 out')
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget must be a positive number of bytes or None, got {memory_budget}")
    split = parameters.split(params)
    n = _length(x1)
    # Layers promote dtypes and ranks silently (Flax's GroupNorm does), which the caller may have forbidden.
    with (
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.default_matmul_precision("highest"),
    ):
        shape = jax.eval_shape(lambda arrays, x: apply_fn(split.join(arrays), x), list(split.arrays), x1).shape
        if len(shape) not in (1, 2) or shape[0] != n:
            raise ValueError(f"apply_fn must return outputs (n, c) or (n,) with n = {n}, got shape {shape}")
        traced = engine.trace(apply_fn, split, x1)
        sizes = (n, x2 is None or _length(x2), memory_budget)
        function = _jitted(apply_fn, split, traced, sizes, implementation, outputs)
        settings = {"diagonal": outputs == "diagonal", "budget": memory_budget}
        return _in_blocks(function, list(split.arrays), x1, x2, **settings)


# Evaluation: one jitted function per model and kind of kernel, whole or block by block.


def _length(x: Any) -> int:
    return int(np.shape(jax.tree.leaves(x)[0])[0])


def _jitted(
    apply_fn: Any, split: Parameters, traced: engine.Traced, sizes: Any, implementation: str, outputs: str
) -> Any:
    """Return the jitted kernel (arrays, x1, x2) -> block, the one made before where the same program was traced."""
    # It is traced for blocks of these sizes alone, hence within the call that makes it.
    consts = tuple(programs.digest(value) for value in traced.consts)
    key = (traced.key, consts, split.theta, sizes, implementation, outputs)
    neural_tangents = _load()
    with _LOCK:
        return _kept.get(
            key, lambda: jax.jit(_kernel_function(neural_tangents, apply_fn, split, implementation, outputs))
        )


def _kernel_function(neural_tangents: Any, apply_fn: Any, split: Parameters, implementation: str, outputs: str) -> Any:
    """Wrap neural-tangents' kernel function in this module's conventions."""
    # Outputs have axes (sample, output); the diagonal kernel is taken one sample at a time.
    axes = {
        "full": {"trace_axes": (), "diagonal_axes": ()},
        "trace": {"trace_axes": (1,), "diagonal_axes": ()},
        "diagonal": {"trace_axes": (), "diagonal_axes": (1,)},
    }[outputs]
    structure = split.structure

    def function(arrays: Any, x1: Any, x2: Any) -> Any:
        theta = tuple(arrays[i] for i in structure.theta)
        # A list: neural-tangents splits a keyword argument that is a pair between x1 and x2.
        fixed = [leaf for i, leaf in enumerate(arrays) if i not in structure.theta]

        def two_axes(theta: Any, x: Any, fixed: Any) -> Any:
            return apply_fn(structure.with_theta(theta, fixed), x).reshape(_length(x), -1)

        ntk = neural_tangents.empirical_ntk_fn(
            two_axes,
            vmap_axes=0,
            implementation=neural_tangents.NtkImplementation[_MEMBERS[implementation]],
            **axes,
        )
        try:
            if outputs == "diagonal":
                return jax.vmap(lambda x: ntk(jax.tree.map(lambda a: a[None], x), None, theta, fixed=fixed)[0, 0])(x1)
            block = ntk(x1, x2, theta, fixed=fixed)
        except Exception as error:
            if implementation == "jacobian":
                raise
            raise NotImplementedError(
                f'neural-tangents\' implementation "{implementation}" cannot treat an operation in apply_fn '
                f'({type(error).__name__}: {error}); "jacobian" differentiates whatever JAX does'
            ) from error
        if outputs == "trace":
            # neural-tangents divides a trace by its size.
            return block * jax.eval_shape(two_axes, theta, x1, fixed).shape[1]
        n1, n2, c, _ = block.shape
        return block.transpose(0, 2, 1, 3).reshape(n1 * c, n2 * c)

    function.__name__ = f"neural_tangents_{implementation}_{outputs}"
    return function


def _bytes_needed(function: Any, *args: Any) -> int:
    """Return the bytes of temporaries and result, by the compiler's count; a call then finds it compiled."""
    stats = function.lower(*args).compile().memory_analysis()
    return 0 if stats is None else stats.temp_size_in_bytes + stats.output_size_in_bytes


def _in_blocks(function: Any, params: Any, x1: Any, x2: Any, *, diagonal: bool, budget: int | None) -> Any:
    """Evaluate a jitted kernel whole where the budget allows it, else in overlapping blocks of one shape."""
    limit = DEFAULT_MEMORY_BUDGET if budget is None else budget
    symmetric = x2 is None and not diagonal
    needed = _bytes_needed(function, params, x1, x2)
    if needed <= limit:
        whole = function(params, x1, x2)
        return _symmetrised(whole) if symmetric else whole

    columns = x1 if x2 is None else x2
    n1, n2 = _length(x1), 1 if diagonal else _length(columns)
    size, width1, width2 = max(n1, n2), n1, n2
    while needed > limit and size > 1:
        size = max(1, min(size // 2, size * limit // needed))
        width1, width2 = (math.ceil(n / math.ceil(n / size)) for n in (n1, n2))
        needed = _bytes_needed(function, params, _rows(x1, 0, width1), None if diagonal else _rows(columns, 0, width2))
    if needed > limit and budget is not None:
        raise ValueError(f"memory_budget of {budget} bytes is below the {needed} that one pair of samples needs")

    starts1, starts2 = ([min(i, n - w) for i in range(0, n, w)] for n, w in ((n1, width1), (n2, width2)))
    theta = None
    for i in starts1:
        rows = _rows(x1, i, width1)
        for j in starts2:
            if symmetric and j > i:
                break
            other = None if diagonal else _rows(columns, j, width2)
            # Waiting for each block keeps two of them from being in memory at once.
            block = jax.block_until_ready(function(params, rows, other))
            c1, c2 = block.shape[0] // width1, block.shape[1] // width2
            if theta is None:
                theta = jnp.zeros((n1 * c1, n2 * c2), block.dtype)
            theta = _insert(theta, block, (i * c1, j * c2))
            if symmetric and j < i:
                theta = _insert(theta, block.T, (j * c2, i * c1))
    return _symmetrised(theta) if symmetric else theta


def _rows(x: Any, start: int, size: int) -> Any:
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, start, size), x)


_insert = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


@jax.jit
def _symmetrised(theta: Any) -> Any:
    return (theta + theta.T) / 2


# The shim: neural-tangents on current JAX.


def _load() -> Any:
    """Import and adapt neural-tangents, once; ImportError with the way out where that fails."""
    with _LOCK:
        return _imported()


@functools.cache
def _imported() -> Any:
    before = set(sys.modules)
    try:
        with _removed_names_put_back():
            neural_tangents = importlib.import_module("neural_tangents")
            empirical = importlib.import_module("neural_tangents._src.empirical")
        _adapt(empirical)
    except Exception as error:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "neural_tangents":
                del sys.modules[name]
        raise ImportError(f"neural-tangents cannot be used ({' '.join(str(error).split())}): {_INSTALL}") from error
    return neural_tangents


@contextlib.contextmanager
def _removed_names_put_back() -> Iterator[None]:
    """Give JAX, where it lacks them, the names that neural-tangents imports, and take them out again."""
    util = types.ModuleType("jax.util")
    vars(util).update(
        safe_map=lambda f, *xs: [f(*x) for x in zip(*xs, strict=True)],
        safe_zip=lambda *xs: list(zip(*xs, strict=True)),
    )
    # The bridge to TensorFlow, which no kernel needs and which takes seconds to import where TensorFlow is there.
    bridge = types.ModuleType("neural_tangents.experimental")
    wanted: list[tuple[dict[str, Any], str, Any]] = [
        *(
            (jax.core.__dict__, name, getattr(extend_core, name))
            for name in ("Jaxpr", "JaxprEqn", "Literal", "Primitive", "Var")
        ),
        (ad.__dict__, "zeros_like_p", extend_core.Primitive("zeros_like")),
        (sys.modules, "jax.util", util),
        (sys.modules, bridge.__name__, bridge),
    ]
    missing = [(namespace, name, value) for namespace, name, value in wanted if name not in namespace]
    for namespace, name, value in missing:
        namespace[name] = value
    try:
        yield
    finally:
        for namespace, name, _ in missing:
            del namespace[name]
        parent = sys.modules.get("neural_tangents")
        if getattr(parent, "experimental", None) is bridge:
            del vars(parent)["experimental"]


def _adapt(empirical: types.ModuleType) -> None:
    """Set, in neural-tangents' own namespace, what its kernels look up while they are traced."""

    def with_names(module: types.ModuleType, **names: Any) -> types.SimpleNamespace:
        return types.SimpleNamespace(**{**vars(module), **names})

    vars(empirical).update(
        ad=with_names(
            ad,
            linearize=_linearize,
            config=types.SimpleNamespace(jax_enable_checks=False),
            source_info_util=types.SimpleNamespace(transform_name_stack=lambda name: contextlib.nullcontext()),
        ),
        core=with_names(jax.core, Var=extend_core.Var, DShapedArray=type("DShapedArray", (), {})),
        lu=with_names(linear_util, wrap_init=_wrap_init),
        jnp=with_names(jnp, size=np.size),  # jnp.size no longer takes shapes without arrays
        _eqn_vjp_fn=_transpose_equation,
        _get_flops=_flops,
        print=lambda *args: None,  # "auto" prints its choice
        warnings=types.SimpleNamespace(warn=lambda message: None),  # that a slower, equally exact rule is taken
    )


def _wrap_init(f: Any) -> Any:
    return linear_util.wrap_init(f, debug_info=jax.api_util.debug_info("neural_tangents", f, (), {}))


def _linearize(f: Any, *primals: Any, has_aux: bool) -> Any:
    """Return what `ad.linearize` returned once: outputs, their partial values, the linear jaxpr and its constants."""
    del has_aux
    out, linear = jax.linearize(f.call_wrapped, *primals)
    closed = jax.make_jaxpr(linear)(*primals)
    return out, [types.SimpleNamespace(is_known=lambda: False)] * len(out), closed.jaxpr, closed.consts


def _transpose_equation(eqn: Any, cotangent: Any, *operands: Any) -> Any:
    """Transpose one equation of a linear jaxpr in its linear operands; None stands beside the others."""
    if eqn is None:
        return (cotangent,)
    linear = [i for i, operand in enumerate(operands) if ad.is_undefined_primal(operand)]
    if isinstance(cotangent, ad.Zero):
        return [ad.Zero(operand.aval) if i in linear else None for i, operand in enumerate(operands)]

    def equation(*values: Any) -> Any:
        merged = dict(zip(linear, values, strict=True))
        out = eqn.primitive.bind(*(merged.get(i, operand) for i, operand in enumerate(operands)), **eqn.params)
        return out[0] if eqn.primitive.multiple_results else out

    transposed = jax.linear_transpose(equation, *(operands[i].aval for i in linear))(cotangent)
    cotangents = dict(zip(linear, transposed, strict=True))
    return [cotangents.get(i) for i in range(len(operands))]


def _flops(f: Any, optimize: bool, *args: Any, **kwargs: Any) -> float:
    """Count the floating-point operations of a compiled function, from the shapes of its arguments."""
    del optimize
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), (args, kwargs))
    costs = jax.jit(f).lower(*shapes[0], **shapes[1]).compile().cost_analysis()
    return (costs or {}).get("flops", 0.0)
