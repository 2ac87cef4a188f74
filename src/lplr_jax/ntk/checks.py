"""Probes of what the kernel takes for granted: finite inputs, a deterministic function, one sample behind each output.

A kernel of a function that breaks these is a number without a meaning, so each probe raises instead.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.tree_util import keystr, tree_flatten_with_path

from lplr_jax import parameters, programs
from lplr_jax.checks import shown
from lplr_jax.linalg import UntrustedError
from lplr_jax.ntk.coupling import FEW, Coupling, Few, Probe, first_of, is_float, on_host
from lplr_jax.ntk.separation import look
from lplr_jax.ntk.traced import Traced, trace
from lplr_jax.parameters import Parameters, is_array

ApplyFn = Callable[[Any, Any], Any]

_probes = programs.Kept(64)


def inputs(params: Any, x: Any) -> Parameters:
    """Check parameters and samples.

    Args:
        params: pytree of parameters, or `Parameters`.
        x: array (n, ...) or pytree of such arrays. Infinite entries are data, as those of an additive mask.

    Returns:
        The parameters, taken apart.

    Raises:
        ValueError: if x has no arrays, no samples or leading axes that differ, if x holds NaN, θ NaN or infinity, or
            there is no θ.
        TypeError: If a parameter is complex, a leaf of x is no array, an array holds text or objects, or JAX is
            tracing one of them.
    """
    programs.refuse_tracers(jax.tree.leaves((params.arrays if isinstance(params, Parameters) else params, x)))
    split = parameters.split(params)
    leaves = tree_flatten_with_path(x)[0]
    if not leaves:
        raise ValueError("x holds no arrays; pass an array (n, ...) or a pytree of arrays with one leading axis n")
    sizes = {}
    for path, leaf in leaves:
        if not is_array(leaf):
            raise TypeError(f"x{keystr(path)} must be an array, got {shown(leaf)}; convert it with jnp.asarray")
        if getattr(leaf.dtype, "kind", "") in tuple("OUSMm"):
            raise TypeError(f"x{keystr(path)} must hold numbers, got dtype {leaf.dtype}; convert it")
        if leaf.ndim == 0:
            raise ValueError(f"x{keystr(path)} is a scalar; every array in x needs a leading axis of samples")
        sizes[f"x{keystr(path)}"] = leaf.shape[0]
    if len(set(sizes.values())) > 1:
        listed = ", ".join(f"{name} has {size}" for name, size in sizes.items())
        raise ValueError(f"all arrays in x must have the same number of samples in front, but {listed}")
    if 0 in sizes.values():
        raise ValueError("x holds no samples (leading axis 0); the kernel needs at least one")
    for path, leaf in leaves:
        sample_values(f"x{keystr(path)}", leaf)
    for i in split.theta:
        _check_finite(f"params{split.paths[i]}", split.arrays[i])
    return split


def alike(x1: Any, x2: Any) -> None:
    """Check that two sets of samples differ in their number alone.

    Raises:
        ValueError: if their structures or the shapes of one sample differ.
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


def function(apply_fn: ApplyFn, params: Parameters, x: Any, *, coupling: bool) -> Traced:
    """Trace a function, and refuse one that is no deterministic function of each sample alone.

    Two traces must agree, and two evaluations where the program calls back into Python; outputs must be finite. With
    `coupling`, the program of all samples must show that it treats them apart (`separation`). Where it does not, that
    is tried, on up to four samples: the derivative of the other outputs along a change of one sample must be exactly
    zero (only zeros enter it, so no rounding can disturb this); and when one sample is replaced by another, or a sample
    stands alone, outputs must stay, up to rounding. Dependence below the rounding level of the outputs is not seen.

    Args:
        apply_fn: The function.
        params: Parameters, in the precision of the computation.
        x: Samples, likewise.
        coupling: Whether a sample's output may not depend on the other samples.

    Returns:
        The function as a program.

    Raises:
        UntrustedError: If the output for the first samples is not finite.
        ValueError: if outputs differ or are coupled, do not have one row for each sample, or the function asks for a
            random key that it was not given.
    """
    traced = explained(lambda: trace(apply_fn, params, x), x)
    first = first_of(x)
    seen = look(apply_fn, params, x, traced, FEW)
    # What the program itself shows need not be tried: that takes longer to compile than the kernel.
    coupling = coupling and not seen.apart
    name = (traced.key, tuple(programs.digest(value) for value in traced.consts), seen.key, len(first[0]))
    probe = _probes.get(name, lambda: explained(lambda: Probe(apply_fn, params, x, traced), x))

    def evaluate() -> Coupling | np.ndarray:
        few = Few(apply_fn, params.structure, jax.tree.structure(x))
        return (probe.coupling if coupling else probe.outputs)(few, list(params.arrays), first)

    found = explained(evaluate, x)
    outputs = (found.whole if isinstance(found, Coupling) else found)[: len(first[0])]
    finite(outputs, x)
    if probe.unlike or (traced.has_callbacks and not probe.repeats(evaluate)):
        raise ValueError(
            "apply_fn gave two different outputs for the same params and x, so its kernel is not defined; switch "
            "dropout and other noise off (train=False, deterministic=True), or fix the random key inside apply_fn"
        )
    if isinstance(found, Coupling):
        _refuse_coupled(found, traced)
    return traced


def deterministic(apply_fn: ApplyFn, params: Any, x: Any) -> Traced:
    """Check that a function is deterministic and finite; samples may depend on each other, `params` be any pytree."""
    split = parameters.split(params)
    return function(apply_fn, split, x, coupling=False)


def sample_coupling(apply_fn: ApplyFn, params: Any, x: Any) -> Traced:
    """Check that a function is one of each sample alone, besides; see `function`."""
    split = parameters.split(params)
    return function(apply_fn, split, x, coupling=True)


def finite(outputs: np.ndarray, x: Any) -> None:
    """Refuse outputs of the first samples that are not finite.

    Raises:
        UntrustedError: If there are any; it names the samples.
    """
    if np.isfinite(outputs).all():
        return
    bad = np.flatnonzero(~np.isfinite(outputs.reshape(len(outputs), -1)).all(axis=1))
    infinite = any(np.isinf(np.asarray(leaf[:FEW])).any() for leaf in jax.tree.leaves(x) if is_float(leaf))
    raise UntrustedError(
        f"apply_fn gives NaN or infinite outputs for {samples(bad)}; check params and the scale of x"
        + ("; x holds infinite entries: clean them, or mask them so that the outputs are finite" if infinite else "")
    )


def samples(numbers: Any) -> str:
    """Name samples by their numbers, the first few of many."""
    listed = ", ".join(str(int(i)) for i in numbers[:8]) + (", ..." if len(numbers) > 8 else "")
    return f"sample{'s' * (len(numbers) != 1)} {listed}"


def _refuse_coupled(found: Coupling, traced: Traced) -> None:
    whole = found.whole
    # Evaluations differ in the order of summation at most: 1e4 roundings leave room for sums of 1e8 terms. Where the
    # function rounds to half precision inside, a quarter is all that can be asked for.
    eps = max(float(jnp.finfo(whole.dtype).eps), 0.0 if traced.coarse is None else traced.coarse.eps)
    tolerance = min(1e4 * eps, 0.25) * _scale(whole, found.nearby)
    # Both ends are moved, since a causal model couples in one direction only.
    others = (slice(1, None), slice(0, -1))
    if found.influence is not None and np.any(np.nan_to_num(found.influence) != 0):
        raise ValueError(_coupled("its derivative with respect to another sample is not zero"))
    if any(_differ(whole[rest], new[rest], tolerance) for new, rest in zip(found.replaced, others, strict=True)):
        raise ValueError(_coupled("it changes when another sample is replaced"))
    if _differ(whole[:1], found.alone[:1], tolerance):
        raise ValueError(_coupled("it changes when the sample is evaluated alone"))
    if _differ(whole[1:], found.alone[1:], tolerance):
        raise ValueError(
            "the output of apply_fn for one sample depends on its place in the batch, as under dropout or noise with a "
            "fixed key, so Θ between samples is not defined; switch noise off (train=False, deterministic=True)"
        )


def kernel(theta: Any, rows: int, outputs: str, *, symmetric: bool) -> None:
    """Refuse a kernel that is not finite; the features of a sample stand on its diagonal, or in its row or column.

    Args:
        theta: The kernel.
        rows: Its rows for each sample.
        outputs: "full", "trace" or "diagonal".
        symmetric: Whether its columns are the samples of its rows.

    Raises:
        UntrustedError: If there are such entries; it names the samples.
    """
    if isinstance(theta, jax.core.Tracer) or not getattr(theta, "is_fully_addressable", True):
        return
    if on_host(theta):
        theta = np.asarray(theta)
    if outputs == "diagonal":
        parts = {"sample": theta}
    elif symmetric:
        parts = {"sample": theta.diagonal()}
    else:
        parts = {"sample of x1": theta[:, :1], "sample of x2": theta[:1].T}
    if all(bool(np.isfinite(np.asarray(part)).all()) for part in parts.values()):
        return
    bad = [np.isfinite(np.asarray(theta))] if not symmetric else [np.isfinite(np.asarray(parts["sample"]))]
    if symmetric:
        named = [samples(_rows_of(np.atleast_1d(~bad[0].reshape(len(bad[0]), -1).all(axis=1)), rows))]
    else:
        # A sample that is lost loses its whole row or column.
        lost = tuple(np.atleast_1d(~bad[0].any(axis=axis)) for axis in (1, 0))
        names = zip(("x1", "x2"), lost, strict=True)
        named = [f"{samples(_rows_of(flags, rows))} of {name}" for name, flags in names if flags.any()]
    raise UntrustedError(
        f"the kernel is NaN or infinite at {' and '.join(named) or 'some pairs of samples'}: the derivative of "
        "apply_fn by its parameters is not finite there, or too large; look for a square root, norm or division at zero"
    )


def _rows_of(flags: Any, rows: int) -> np.ndarray:
    return np.unique(np.flatnonzero(flags) // rows)


def _coupled(how: str) -> str:
    return (
        f"the output of apply_fn for one sample depends on the other samples of the batch ({how}), so Θ between "
        "samples is not defined; evaluate batch normalisation with its running averages (use_running_average=True, "
        "train=False)"
    )


def sample_values(name: str, leaf: Any) -> None:
    """Refuse samples with NaN; infinite entries are data, as those of an additive mask.

    Raises:
        UntrustedError: If there are any.
    """
    if not is_float(leaf):
        return
    bad = np.isnan(np.asarray(leaf)) if on_host(leaf) else jnp.isnan(leaf)
    if bool(bad.any()):
        bad = ~np.isfinite(np.asarray(leaf))
        rows = np.flatnonzero(bad.reshape(leaf.shape[0], -1).any(axis=1))
        raise UntrustedError(
            f"{name} has {int(bad.sum())} NaN or infinite entries of {leaf.size}, in {samples(rows)}; clean the data"
        )


def _check_finite(name: str, leaf: Any) -> None:
    # On the host there is nothing to compile for every shape.
    finite = np.isfinite(np.asarray(leaf)) if on_host(leaf) else jnp.isfinite(leaf)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise UntrustedError(
            f"{name} has {bad} NaN or infinite entries of {leaf.size}; check the training run it comes from"
        )


# What functions say of arguments whose shapes do not fit.
_OF_SHAPES = re.compile(r"shape|dimension|rank|broadcast|contract|axis|axes|size|incompatible", re.IGNORECASE)


def explained(evaluate: Callable[[], Any], x: Any) -> Any:
    """Evaluate, and say of what the user's function raises where it comes from.

    Raises:
        ValueError: With the function's error as its cause, and the way out where the function asks for a random key or
            the shapes of x do not fit.
    """
    try:
        return evaluate()
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith("apply_fn must return"):
            raise
        if isinstance(error, TypeError) and str(error).startswith("kernels and spectra are"):
            raise
        if "InvalidRngError" in type(error).__name__ or "needs PRNG for" in str(error):
            raise ValueError(
                f"apply_fn asks for a random key that it is not given ({error}); switch dropout off "
                "(deterministic=True, train=False): the kernel is that of a deterministic function"
            ) from error
        shapes = ", ".join(str((1, *np.shape(leaf)[1:])) for leaf in jax.tree.leaves(x))
        if "sharding" in str(error).lower():
            raise ValueError(
                f"apply_fn constrains the sharding of its arrays, which one sample of shape {shapes} cannot meet "
                f"({type(error).__name__}: {error}); leave with_sharding_constraint out of it: mesh= shards the rows"
            ) from error
        about_shapes = isinstance(error, TypeError | ValueError | IndexError) or "Shape" in type(error).__name__
        if about_shapes and _OF_SHAPES.search(f"{type(error).__name__} {error}"):
            raise ValueError(
                f"apply_fn fails on samples of shape {shapes} ({type(error).__name__}: {error}); x needs the shape "
                "(n, ...) that apply_fn expects, and a single sample needs a leading axis: x[None]"
            ) from error
        raise ValueError(
            f"apply_fn fails on samples of shape {shapes} with an error of its own ({type(error).__name__}: {error})"
        ) from error


def _scale(*outputs: np.ndarray) -> float:
    """The largest finite modulus, which rounding errors are relative to."""
    sizes = [np.max(np.abs(np.nan_to_num(out, posinf=0.0, neginf=0.0)), initial=0.0) for out in outputs]
    return max(float(np.max(sizes)), float(jnp.finfo(outputs[0].dtype).tiny))


def _differ(one: np.ndarray, two: np.ndarray, tolerance: float) -> bool:
    return bool(np.max(np.abs(one.astype(np.float64) - two.astype(np.float64)), initial=0.0) > tolerance)
