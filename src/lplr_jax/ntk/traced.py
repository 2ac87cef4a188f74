"""A function of parameters and samples as a program of one sample: what the engine, the checks and the proofs read."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lplr_jax import narrowing, parameters, programs
from lplr_jax.ntk.jaxpr import Program, contains, flatten
from lplr_jax.parameters import Parameters

_traces = programs.Kept(32)


@dataclass(frozen=True, eq=False)
class Traced:
    """A function of one sample as a program, with the positions of its parameters.

    Attributes:
        program: Flat program; its parameters are the array leaves.
        leaves: Indices among the array leaves of those that are θ.
        c: Outputs per sample.
        dtype: Dtype in which the kernel is formed: that of the outputs or of θ, whichever is wider, at least float32.
        paths: Name of each array leaf.
        narrow: What the program rounds to a narrower type than that of θ, None where it does not.
        coarse: The same for all that depends on θ or x.
        has_callbacks: Whether it calls back into Python, which may give another answer each time.
        key: What the program computes; compiled code is found again by it.
    """

    program: Program
    leaves: tuple[int, ...]
    c: int
    dtype: np.dtype
    paths: tuple[str, ...]
    narrow: narrowing.Narrow | None
    coarse: narrowing.Narrow | None
    has_callbacks: bool
    key: Hashable

    @property
    def consts(self) -> list[Any]:
        """Arrays that the function captures."""
        return [value for _, value in self.program.consts]

    @cached_property
    def unused(self) -> tuple[str, ...]:
        """Paths of the leaves of θ by which the output has no gradient."""
        slots, reached = {self.program.output}, set()
        for op in reversed(self.program.ops):
            if slots.intersection(op.outs) and op.name != "stop_gradient":
                slots.update(atom for atom in op.ins if isinstance(atom, int))
        reached = {i for i in self.leaves if self.program.params[i] in slots}
        return tuple(self.paths[i] for i in self.leaves if i not in reached)


def widening(narrow: narrowing.Narrow) -> str:
    """Say in one sentence where a function rounds, and how to have it computed in full."""
    return (
        f"apply_fn rounds to a unit of {narrow.eps:.1g} inside, first in {narrow.operation}, whatever dtype is asked "
        "for: the kernel is exact up to that rounding alone; give the network the wider type (dtype=None or float64 in "
        "its layers, no astype or preferred_element_type to a narrower one)"
    )


def trace(apply_fn: Callable[[Any, Any], Any], params: Any, x: Any, *, anew: bool = False) -> Traced:
    """Trace `apply_fn` for one sample of x, or find it traced.

    It is found only where all that it reads beside its arguments is known not to have changed.

    Args:
        apply_fn: As for `kernel`.
        params: As for `kernel`.
        x: As `x1` for `kernel`.
        anew: Whether to trace in any case.

    Raises:
        TypeError: If it captures a value that JAX is tracing.
        ValueError: If the output for one sample is not an array (1,) or (1, c).
    """
    split = parameters.split(params)

    def name() -> Hashable | None:
        samples = [jax.ShapeDtypeStruct(np.shape(a)[1:], jnp.result_type(a)) for a in jax.tree.leaves(x)]
        places = (programs.identity(split.treedef), split.theta, jax.tree.structure(x))
        known = programs.name_of((apply_fn, split.static), list(split.arrays), samples)
        return known and (known, places)

    before = None if anew else name()
    if before in _traces:
        return _traces[before]
    traced = _trace(apply_fn, split, x)
    # What the function itself has written, such as a count of its calls, is no change from outside.
    after = name()
    if after is not None:
        _traces.put(after, traced)
    return traced


def at_samples(apply_fn: Callable[[Any, Any], Any], params: Parameters, x: Any, count: int) -> tuple[Any, Any]:
    """Trace a function of the arrays of its parameters and of the leaves of x, in full precision.

    Args:
        apply_fn: The function.
        params: Its parameters.
        x: Samples, of which only the shapes matter.
        count: How many of them are traced.

    Returns:
        The closed jaxpr, and what the output looks like.
    """
    specs = [jax.ShapeDtypeStruct(np.shape(a), jnp.result_type(a)) for a in params.arrays]
    samples, xdef = jax.tree.flatten(x)
    xs = [jax.ShapeDtypeStruct((count, *np.shape(a)[1:]), jnp.result_type(a)) for a in samples]

    def flat(values: list[Any], inputs: list[Any]) -> Any:
        return apply_fn(params.join(values), jax.tree.unflatten(xdef, inputs))

    with jax.default_matmul_precision("highest"):
        return jax.make_jaxpr(flat, return_shape=True)(specs, xs)


def _trace(apply_fn: Callable[[Any, Any], Any], split: Parameters, x: Any) -> Traced:
    closed, out = at_samples(apply_fn, split, x, 1)
    programs.refuse_tracers(closed.consts)
    if not isinstance(out, jax.ShapeDtypeStruct):
        raise ValueError(f"apply_fn must return one array (n, c) or (n,), got {jax.tree.structure(out)}")
    if out.shape[:1] != (1,) or len(out.shape) > 2:
        raise ValueError(f"apply_fn must return (n, c) or (n,), one row per sample; for one sample it gave {out.shape}")
    if not jnp.issubdtype(out.dtype, jnp.floating):
        raise ValueError(f"apply_fn must return real floating-point outputs, got dtype {out.dtype}; cast them")
    c = 1 if len(out.shape) == 1 else out.shape[1]
    wide = programs.widest(*(closed.in_avals[i].dtype for i in split.theta))
    of_theta = [i in split.theta for i in range(len(closed.in_avals))]
    program = flatten(closed, len(split.arrays))
    return Traced(
        program=program,
        leaves=split.theta,
        c=c,
        dtype=programs.widest(out.dtype, wide, np.float32),
        paths=split.paths,
        narrow=narrowing.narrowing(closed, of_theta, wide),
        coarse=narrowing.narrowing(closed, [True] * len(of_theta), wide),
        has_callbacks=any(contains(op.eqn, "callback") for op in program.ops),
        key=programs.Key(program.key()),
    )
