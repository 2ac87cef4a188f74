"""Probes of what the kernel takes for granted: finite inputs, a deterministic function, one sample behind each output.

A kernel of a function that breaks these is a number without a meaning, so each probe raises instead.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from lplr_jax.checks import shown

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
            if _is_array(leaf) and leaf.dtype.kind in "OUSMm":
                raise TypeError(f"{name}{keystr(path)} must hold numbers, got dtype {leaf.dtype}; convert it")
    inexact = [leaf for leaf in jax.tree.leaves(params) if _is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)]
    if not inexact:
        raise ValueError(
            "params hold no floating array, so there is nothing to differentiate by; pass the pytree that apply_fn "
            f"takes first, got {shown(params)}"
        )
    leaves = tree_flatten_with_path(x)[0]
    if not leaves:
        raise ValueError("x holds no arrays; pass an array (n, ...) or a pytree of arrays with one leading axis n")
    sizes = {}
    for path, leaf in leaves:
        if not _is_array(leaf):
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
    """Evaluates the function twice on one sample and refuses any difference.

    Raises:
        ValueError: If the two results differ, are not finite, or the function asks for a random key it was not given.
    """
    one = _take(x, slice(0, 1))
    first, second = _evaluate(apply_fn, params, one), _evaluate(apply_fn, params, one)
    if first.shape != second.shape or not np.array_equal(first, second, equal_nan=True):
        raise ValueError(
            "apply_fn gave two different outputs for the same params and x, so its kernel is not defined; switch "
            "dropout and other noise off (train=False, deterministic=True), or fix the random key inside apply_fn"
        )
    if not np.all(np.isfinite(first)):
        raise ValueError("apply_fn gives NaN or infinite outputs for the first sample; check params and the scale of x")


def sample_coupling(apply_fn: ApplyFn, params: Any, x: Any) -> None:
    """Refuses a function whose output for one sample depends on another sample.

    On up to four samples: the derivative of the other outputs along a change of one sample must be exactly zero (only
    zeros enter it, so no rounding can disturb this); and when one sample is replaced by another, or a sample stands
    alone, the other outputs must stay, up to rounding. Dependence below the rounding level of the outputs is not seen.

    Raises:
        ValueError: If outputs are coupled, or do not have one row for each sample.
    """
    n = jax.tree.leaves(x)[0].shape[0]
    batch = _take(x, slice(0, min(n, _PROBE))) if n > 1 else jax.tree.map(_with_neighbour, x)
    count = jax.tree.leaves(batch)[0].shape[0]
    whole = _evaluate(apply_fn, params, batch)
    if whole.ndim not in (1, 2) or whole.shape[0] != count:
        raise ValueError(f"apply_fn must return (n, c) or (n,); for {count} samples it gave shape {whole.shape}")
    ends = ((0, slice(1, None)), (count - 1, slice(0, -1)))  # both, since a causal model couples in one direction only
    if any(_tangent_leaks(apply_fn, params, batch, moved, others) for moved, others in ends):
        raise ValueError(_coupled("its derivative with respect to another sample is not zero"))
    # Evaluations differ in the order of summation at most: 1e4 roundings leave room for sums of 1e8 terms.
    tolerance = 1e4 * float(np.finfo(whole.dtype).eps) * _scale(whole, _evaluate(apply_fn, _nearby(params), batch))
    for moved, others in ends:
        replaced = jax.tree.map(functools.partial(_replace, row=moved, by=count - 1 - moved), batch)
        if _differ(whole[others], _evaluate(apply_fn, params, replaced)[others], tolerance):
            raise ValueError(_coupled("it changes when another sample is replaced"))
    alone = _evaluate(apply_fn, params, _take(batch, slice(0, 1)))
    if _differ(whole[:1], alone, tolerance):
        raise ValueError(_coupled("it changes when the sample is evaluated alone"))


def _coupled(how: str) -> str:
    return (
        f"the output of apply_fn for one sample depends on the other samples of the batch ({how}), so Θ between "
        "samples is not defined; evaluate batch normalisation with its running averages (use_running_average=True, "
        "train=False)"
    )


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _check_finite(name: str, leaf: Any, *, is_param: bool) -> None:
    if not _is_array(leaf) or jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
        return
    if is_param and jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        raise TypeError(f"{name} is complex; J Jᵀ is defined for real parameters: keep real and imaginary parts apart")
    if jnp.issubdtype(leaf.dtype, jnp.inexact) and not bool(jnp.isfinite(jnp.asarray(leaf)).all()):
        bad = int((~jnp.isfinite(jnp.asarray(leaf))).sum())
        raise ValueError(
            f"{name} has {bad} NaN or infinite entries of {leaf.size}; clean the data or check the training run"
        )


def _take(x: Any, rows: slice) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a)[rows], x)


def _with_neighbour(leaf: Any) -> jax.Array:
    """The single sample and, as a second one, a copy moved by one unit in its first entry (integers are kept valid)."""
    leaf = jnp.asarray(leaf)
    other = (
        leaf * jnp.asarray(0.5, leaf.dtype) + jnp.asarray(1, leaf.dtype) if _is_float(leaf) else jnp.zeros_like(leaf)
    )
    return jnp.concatenate([leaf, other])


def _is_float(leaf: Any) -> bool:
    return jnp.issubdtype(jnp.asarray(leaf).dtype, jnp.floating)


def _evaluate(apply_fn: ApplyFn, params: Any, x: Any) -> np.ndarray:
    try:
        out = apply_fn(params, x)
    except Exception as error:
        if "InvalidRngError" in type(error).__name__ or "needs PRNG for" in str(error):
            raise ValueError(
                f"apply_fn asks for a random key that it is not given ({error}); switch dropout off "
                "(deterministic=True, train=False): the kernel is that of a deterministic function"
            ) from error
        shapes = ", ".join(str(np.shape(leaf)) for leaf in jax.tree.leaves(x))
        what = "one sample" if jax.tree.leaves(x)[0].shape[0] == 1 else "a few samples"
        raise ValueError(
            f"apply_fn fails on {what} of shape {shapes} ({type(error).__name__}: {error}); x needs the shape (n, ...) "
            "that apply_fn expects, and a single sample needs a leading axis: x[None]"
        ) from error
    if not _is_array(out):
        raise ValueError(f"apply_fn must return one array (n, c) or (n,), got {type(out).__name__}")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"apply_fn must return real floating-point outputs, got dtype {out.dtype}; cast them")
    return np.asarray(out)


def _replace(leaf: Any, row: int, by: int) -> jax.Array:
    leaf = jnp.asarray(leaf)
    return leaf.at[row].set(leaf[by])


def _tangent_leaks(apply_fn: ApplyFn, params: Any, x: Any, row: int, others: slice) -> bool:
    """Whether moving one sample moves the outputs of others to first order."""
    leaves, treedef = jax.tree.flatten(x)
    moving = [i for i, leaf in enumerate(leaves) if _is_float(leaf)]
    if not moving:
        return False

    def outputs(values: list[jax.Array]) -> jax.Array:
        every = list(leaves)
        for i, value in zip(moving, values, strict=True):
            every[i] = value
        return apply_fn(params, jax.tree.unflatten(treedef, every))

    values = [jnp.asarray(leaves[i]) for i in moving]
    # A direction without symmetry: a constant shift would be invisible to normalisations that subtract a mean.
    keys = jax.random.split(jax.random.key(0), len(values))
    tangents = [
        jnp.zeros_like(v).at[row].set(jax.random.normal(k, v.shape[1:], v.dtype))
        for k, v in zip(keys, values, strict=True)
    ]
    moved = np.asarray(jax.jvp(outputs, (values,), (tangents,))[1])
    return bool(np.any(np.nan_to_num(moved[others]) != 0))


def _nearby(params: Any) -> Any:
    """Parameters moved by some 10 %: outputs that cancel at `params`, as in a paired network, do not cancel there."""
    leaves, treedef = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), max(1, len(leaves)))

    def move(key: jax.Array, leaf: Any) -> Any:
        if not (_is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)):
            return leaf
        leaf = jnp.asarray(leaf)
        return leaf + jnp.asarray(0.1, leaf.dtype) * leaf * jax.random.normal(key, leaf.shape, leaf.dtype)

    return jax.tree.unflatten(treedef, [move(key, leaf) for key, leaf in zip(keys, leaves, strict=False)])


def _scale(*outputs: np.ndarray) -> float:
    """The largest finite modulus, which rounding errors are relative to."""
    sizes = [np.max(np.abs(np.nan_to_num(out, posinf=0.0, neginf=0.0)), initial=0.0) for out in outputs]
    return max(float(np.max(sizes)), float(np.finfo(outputs[0].dtype).tiny))


def _differ(one: np.ndarray, two: np.ndarray, tolerance: float) -> bool:
    return bool(np.max(np.abs(one - two), initial=0.0) > tolerance)
