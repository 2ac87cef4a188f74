"""Probes of what the kernel takes for granted: finite inputs, a deterministic function, one sample behind each output.

A kernel of a function that breaks these is a number without a meaning, so each probe raises instead.
"""

import functools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from lplr_jax.checks import shown
from lplr_jax.linalg import UntrustedError
from lplr_jax.ntk.trees import Static, arrays_of, is_array, joined

ApplyFn = Callable[[Any, Any], Any]

# Samples that the coupling probe looks at together.
_PROBE = 4


def inputs(params: Any, x: Any) -> None:
    """Checks parameters and samples.

    Args:
        params: Pytree of parameters.
        x: Array (n, ...) or pytree of such arrays.

    Raises:
        ValueError: If x has no arrays, no samples or leading axes that differ, if x or params hold NaN or infinity, or
            params no floating array.
        TypeError: If a parameter is complex, a leaf of x is no array, or an array holds text or objects.
    """
    for name, tree in (("x", x), ("params", params)):
        for path, leaf in tree_flatten_with_path(tree)[0]:
            if is_array(leaf) and getattr(leaf.dtype, "kind", "") in tuple("OUSMm"):
                raise TypeError(f"{name}{keystr(path)} must hold numbers, got dtype {leaf.dtype}; convert it")
    if not any(jnp.issubdtype(leaf.dtype, jnp.inexact) for leaf in arrays_of(params)):
        raise ValueError(
            "params hold no floating array, so there is nothing to differentiate by; pass the pytree that apply_fn "
            f"takes first, got {shown(params)}"
        )
    leaves = tree_flatten_with_path(x)[0]
    if not leaves:
        raise ValueError("x holds no arrays; pass an array (n, ...) or a pytree of arrays with one leading axis n")
    sizes = {}
    for path, leaf in leaves:
        if not is_array(leaf):
            raise TypeError(f"x{keystr(path)} must be an array, got {shown(leaf)}; convert it with jnp.asarray")
        if leaf.ndim == 0:
            raise ValueError(f"x{keystr(path)} is a scalar; every array in x needs a leading axis of samples")
        sizes[f"x{keystr(path)}"] = leaf.shape[0]
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"all arrays in x must have the same number of samples in front, but {listed}")
    if 0 in sizes.values():
        raise ValueError("x holds no samples (leading axis 0); the kernel needs at least one")
    for name, tree in (("x", x), ("params", params)):
        for path, leaf in tree_flatten_with_path(tree)[0]:
            _check_finite(f"{name}{keystr(path)}", leaf, is_param=name == "params")


def alike(x1: Any, x2: Any) -> None:
    """Checks that two sets of samples differ in their number alone.

    Raises:
        ValueError: If their structures or the shapes of one sample differ.
    """
    if jax.tree.structure(x1) != jax.tree.structure(x2):
        raise ValueError(
            f"x1 and x2 must have the same tree structure, got {jax.tree.structure(x1)} and {jax.tree.structure(x2)}"
        )
    for (path, one), two in zip(tree_flatten_with_path(x1)[0], jax.tree.leaves(x2), strict=True):
        if one.shape[1:] != two.shape[1:]:
            raise ValueError(
                f"a sample must have the same shape in x1{keystr(path)} and x2{keystr(path)}, "
                f"got {one.shape} and {two.shape}"
            )


def deterministic(apply_fn: ApplyFn, params: Any, x: Any) -> None:
    """Traces the function twice and evaluates it twice on one sample, and refuses any difference.

    Raises:
        UntrustedError: If a result is not finite.
        ValueError: If the two results differ, or the function asks for a random key it was not given.
    """
    probe = probe_of(apply_fn, params, x)
    first, second = (_explained(probe.one, params, x) for _ in range(2))
    if not (np.all(np.isfinite(first)) and np.all(np.isfinite(second))):
        raise UntrustedError(
            "apply_fn gives NaN or infinite outputs for the first sample; check params and the scale of x"
        )
    if not np.array_equal(first, second) or not _explained(probe.traced_alike, params, x):
        raise ValueError(
            "apply_fn gave two different outputs for the same params and x, so its kernel is not defined; switch "
            "dropout and other noise off (train=False, deterministic=True), or fix the random key inside apply_fn"
        )


def sample_coupling(apply_fn: ApplyFn, params: Any, x: Any) -> None:
    """Refuses a function whose output for one sample depends on another sample.

    On up to four samples: the derivative of the other outputs along a change of one sample must be exactly zero (only
    zeros enter it, so no rounding can disturb this); and when one sample is replaced by another, or a sample stands
    alone, the other outputs must stay, up to rounding. Dependence below the rounding level of the outputs is not seen.

    Raises:
        ValueError: If outputs are coupled, or do not have one row for each sample.
    """
    found = _explained(probe_of(apply_fn, params, x).coupling, params, x)
    whole = found.whole
    # Evaluations differ in the order of summation at most: 1e4 roundings leave room for sums of 1e8 terms.
    tolerance = 1e4 * float(np.finfo(whole.dtype).eps) * _scale(whole, found.nearby)
    # Both ends are moved, since a causal model couples in one direction only.
    others = (slice(1, None), slice(0, -1))
    if any(np.any(np.nan_to_num(moved[rest]) != 0) for moved, rest in zip(found.tangents, others, strict=True)):
        raise ValueError(_coupled("its derivative with respect to another sample is not zero"))
    if any(_differ(whole[rest], new[rest], tolerance) for new, rest in zip(found.replaced, others, strict=True)):
        raise ValueError(_coupled("it changes when another sample is replaced"))
    if _differ(whole[:1], found.alone, tolerance):
        raise ValueError(_coupled("it changes when the sample is evaluated alone"))


class Coupling(NamedTuple):
    """What a function gives for a few samples, shape (k, c) or (k,) each, and for changes of the first and the last."""

    whole: Any
    nearby: Any
    """The same at parameters moved by some 10 %."""
    tangents: Any
    """Derivatives along a change of the first and of the last sample, (2, k, c)."""
    replaced: Any
    """Outputs with the first replaced by the last, and the other way round, (2, k, c)."""
    alone: Any
    """Output for the first sample alone."""


class Probe:
    """A function on a few samples, compiled once: evaluated operation by operation, its first call takes seconds."""

    def __init__(self, apply_fn: ApplyFn, treedef: Any, static: tuple[Any, ...], xdef: Any) -> None:
        self._treedef, self._static, self._xdef = treedef, static, xdef
        self._apply_fn = apply_fn
        self._one = jax.jit(self._evaluate_one)
        self._coupling = jax.jit(self._evaluate_coupling)
        self._alike: set[Any] = set()

    def one(self, params: Any, x: Any) -> np.ndarray:
        """Evaluate the first sample."""
        return np.asarray(self._one(*_arrays(params, x)))

    def coupling(self, params: Any, x: Any) -> Coupling:
        """Evaluate the first few samples and their changes."""
        return jax.tree.map(np.asarray, self._coupling(*_arrays(params, x)))

    def traced_alike(self, params: Any, x: Any) -> bool:
        """Whether tracing the function once more gives the same program, or at least one with the same outputs."""
        arrays = _arrays(params, x)
        shapes = tuple((a.shape, a.dtype) for a in jax.tree.leaves(arrays))
        if shapes in self._alike:
            return True
        # Each trace is of a function of its own: JAX would remember that of one it has seen.
        first, second = (jax.make_jaxpr(lambda a, b: self._evaluate_one(a, b))(*arrays) for _ in range(2))
        alike = _text(first) == _text(second) and all(
            np.array_equal(a, b, equal_nan=True) for a, b in zip(first.consts, second.consts, strict=True)
        )
        if not alike:
            again = np.asarray(jax.jit(lambda a, b: self._evaluate_one(a, b))(*arrays))
            alike = np.array_equal(again, self.one(params, x), equal_nan=True)
        if alike:
            self._alike.add(shapes)
        return alike

    def _call(self, arrays: list[Any], samples: list[Any]) -> Any:
        params = joined(self._treedef, self._static, arrays)
        out = self._apply_fn(params, jax.tree.unflatten(self._xdef, samples))
        if not is_array(out):
            raise ValueError(f"apply_fn must return one array (n, c) or (n,), got {type(out).__name__}")
        if not jnp.issubdtype(out.dtype, jnp.floating):
            raise ValueError(f"apply_fn must return real floating-point outputs, got dtype {out.dtype}; cast them")
        count = samples[0].shape[0]
        if out.ndim not in (1, 2) or out.shape[0] != count:
            raise ValueError(f"apply_fn must return (n, c) or (n,); for {count} samples it gave shape {out.shape}")
        return out

    def _evaluate_one(self, arrays: list[Any], samples: list[Any]) -> Any:
        return self._call(arrays, [a[:1] for a in samples])

    def _evaluate_coupling(self, arrays: list[Any], samples: list[Any]) -> Coupling:
        n = samples[0].shape[0]
        batch = [a[:_PROBE] for a in samples] if n > 1 else [_with_neighbour(a) for a in samples]
        floats = [i for i, leaf in enumerate(batch) if _is_float(leaf)]

        def outputs(moving: list[Any], other: list[Any]) -> Any:
            every = list(other)
            for i, value in zip(floats, moving, strict=True):
                every[i] = value
            return self._call(arrays, every)

        def along(variant: list[Any], direction: list[Any]) -> tuple[Any, Any]:
            moving = [variant[i] for i in floats]
            if not moving:
                out = outputs([], variant)
                return out, jnp.zeros_like(out)
            return jax.jvp(lambda values: outputs(values, variant), (moving,), (direction,))

        # A direction without symmetry: a constant shift would be invisible to normalisations that subtract a mean.
        drawn = [_uneven(batch[i].shape[1:], batch[i].dtype, number) for number, i in enumerate(floats)]
        moved = [
            [jnp.zeros_like(batch[i]).at[row].set(d) for i, d in zip(floats, drawn, strict=True)] for row in (0, -1)
        ]
        still = [jnp.zeros_like(batch[i]) for i in floats]
        replaced = [[a.at[row].set(a[-1 - row]) for a in batch] for row in (0, -1)]
        stack = functools.partial(jax.tree.map, lambda *parts: jnp.stack(parts))
        values, tangents = jax.vmap(along)(stack(batch, batch, *replaced), stack(*moved, still, still))
        return Coupling(
            values[0],
            self._call(_nearby(arrays), batch),
            tangents[:2],
            values[2:],
            self._call(arrays, [a[:1] for a in batch]),
        )


def probe_of(apply_fn: ApplyFn, params: Any, x: Any) -> Probe:
    """Return the compiled probe of a function, the one made before where there is one."""
    leaves, treedef = jax.tree.flatten(params)
    key = (apply_fn, treedef, tuple(None if is_array(leaf) else Static(leaf) for leaf in leaves))
    xdef = jax.tree.structure(x)
    try:
        return _remembered(*key, xdef)
    except TypeError:  # something that cannot be hashed
        return Probe(*key, xdef)


_remembered = functools.lru_cache(maxsize=64)(Probe)


def _arrays(params: Any, x: Any) -> tuple[list[Any], list[Any]]:
    return arrays_of(params), list(jax.tree.leaves(x))


def _text(closed: Any) -> str:
    """A program as text, without the addresses of functions in it."""
    return re.sub(r"0x[0-9a-f]+", "", str(closed))


def _coupled(how: str) -> str:
    return (
        f"the output of apply_fn for one sample depends on the other samples of the batch ({how}), so Θ between "
        "samples is not defined; evaluate batch normalisation with its running averages (use_running_average=True, "
        "train=False)"
    )


def on_host(leaf: Any) -> bool:
    """Whether an array is NumPy's, or a concrete one of JAX that lies in the host's memory."""
    if not isinstance(leaf, jax.Array):
        return True
    return not isinstance(leaf, jax.core.Tracer) and all(device.platform == "cpu" for device in leaf.devices())


def _check_finite(name: str, leaf: Any, *, is_param: bool) -> None:
    if not is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return
    if is_param and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"{name} is complex; J Jᵀ is defined for real parameters: keep real and imaginary parts apart")
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
        return
    # On the host there is nothing to compile for every shape.
    finite = np.isfinite(np.asarray(leaf)) if on_host(leaf) else jnp.isfinite(leaf)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise UntrustedError(
            f"{name} has {bad} NaN or infinite entries of {leaf.size}; clean the data or check the training run"
        )


def _with_neighbour(leaf: Any) -> jax.Array:
    """The single sample and, as a second one, a copy moved by one unit in its first entry (integers are kept valid)."""
    leaf = jnp.asarray(leaf)
    other = (
        leaf * jnp.asarray(0.5, leaf.dtype) + jnp.asarray(1, leaf.dtype) if _is_float(leaf) else jnp.zeros_like(leaf)
    )
    return jnp.concatenate([leaf, other])


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)


def _explained(evaluate: Callable[[Any, Any], Any], params: Any, x: Any) -> Any:
    try:
        return evaluate(params, x)
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("apply_fn must return"):
            raise
        if "InvalidRngError" in type(error).__name__ or "needs PRNG for" in str(error):
            raise ValueError(
                f"apply_fn asks for a random key that it is not given ({error}); switch dropout off "
                "(deterministic=True, train=False): the kernel is that of a deterministic function"
            ) from error
        shapes = ", ".join(str((1, *np.shape(leaf)[1:])) for leaf in jax.tree.leaves(x))
        raise ValueError(
            f"apply_fn fails on samples of shape {shapes} ({type(error).__name__}: {error}); x needs the shape "
            "(n, ...) that apply_fn expects, and a single sample needs a leading axis: x[None]"
        ) from error


def _nearby(params: list[Any]) -> list[Any]:
    """Parameters moved by some 10 %: outputs that cancel at `params`, as in a paired network, do not cancel there."""

    def move(number: int, leaf: Any) -> Any:
        if not (is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        return leaf + jnp.asarray(0.1, leaf.dtype) * leaf * _uneven(leaf.shape, leaf.dtype, number)

    return [move(number, leaf) for number, leaf in enumerate(params)]


def _uneven(shape: tuple[int, ...], dtype: Any, number: int) -> jax.Array:
    """Numbers in [-1, 1] without a pattern that a network could share; random ones take seconds to compile."""
    count = jnp.arange(math.prod(shape), dtype=jnp.float32)
    return jnp.cos(count * jnp.float32(1.618034) + jnp.float32(number)).astype(dtype).reshape(shape)


def _scale(*outputs: np.ndarray) -> float:
    """The largest finite modulus, which rounding errors are relative to."""
    sizes = [np.max(np.abs(np.nan_to_num(out, posinf=0.0, neginf=0.0)), initial=0.0) for out in outputs]
    return max(float(np.max(sizes)), float(np.finfo(outputs[0].dtype).tiny))


def _differ(one: np.ndarray, two: np.ndarray, tolerance: float) -> bool:
    return bool(np.max(np.abs(one - two), initial=0.0) > tolerance)
