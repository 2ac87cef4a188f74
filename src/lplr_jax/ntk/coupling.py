"""A function on a few samples: its outputs, and how they depend on the other samples and on the place in the batch."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from lplr_jax import layouts, programs
from lplr_jax.ntk.traced import Traced, trace
from lplr_jax.parameters import Parameters, is_array

ApplyFn = Callable[[Any, Any], Any]

FEW = 4
"""Samples that are looked at together."""


class Coupling(NamedTuple):
    """What a function gives for a few samples, shape (k, c) or (k,) each, and for changes of the first and the last."""

    whole: Any
    nearby: Any
    """The same at parameters moved by some 10 %."""
    influence: Any
    """Derivatives of outputs of some samples along inputs of others; None where the function has none."""
    replaced: Any
    """Outputs with the first replaced by the last, and the other way round, (2, k, c)."""
    alone: Any
    """Outputs for each sample alone."""


class Probe:
    """A function on a few samples, compiled once: evaluated operation by operation, its first call takes seconds."""

    def __init__(self, apply_fn: ApplyFn, params: Parameters, x: Any, traced: Traced) -> None:
        again = trace(apply_fn, params, x, anew=True)
        self.unlike = again.key != traced.key or any(
            programs.digest(one) != programs.digest(two) for one, two in zip(again.consts, traced.consts, strict=True)
        )
        self._outputs: Any = None
        self._coupling: Any = None

    def outputs(self, few: "Few", arrays: list[Any], first: list[Any]) -> np.ndarray:
        """Evaluate the first few samples."""
        if self._outputs is None:
            self._outputs = _compiled(few.outputs, arrays, first)
        return np.asarray(self._outputs(arrays, first))

    def coupling(self, few: "Few", arrays: list[Any], first: list[Any]) -> Coupling:
        """Evaluate the first few samples and their changes."""
        if self._coupling is None:
            self._coupling = few.compile_coupling(arrays, first)
        return jax.tree.map(np.asarray, self._coupling(arrays, first))

    @staticmethod
    def repeats(evaluate: Callable[[], Any]) -> bool:
        """Whether two evaluations agree to the last bit."""
        one, two = jax.tree.leaves(evaluate()), jax.tree.leaves(evaluate())
        return all(np.array_equal(a, b, equal_nan=True) for a, b in zip(one, two, strict=True))


class Few:
    """A function of the arrays of parameters and of a few samples."""

    def __init__(self, apply_fn: ApplyFn, params: Parameters, xdef: Any) -> None:
        self._apply_fn, self._params, self._xdef = apply_fn, params, xdef

    def compile_coupling(self, arrays: list[Any], first: list[Any]) -> Any:
        """Compile what is evaluated of the function and its derivative across samples."""
        # A program may have a derivative in one mode only: forward through a loop, reverse by a rule of its own.
        failed: Exception | None = None
        for mode in (self._forward, self._reverse, None):
            try:
                return _compiled(functools.partial(self._coupling, mode), arrays, first)
            except Exception as error:  # JAX says in several ways that a derivative is missing
                failed = failed or error
        raise failed or AssertionError

    def outputs(self, arrays: list[Any], samples: list[Any]) -> Any:
        """Evaluate the function."""
        out = self._apply_fn(self._params.join(arrays), jax.tree.unflatten(self._xdef, samples))
        if not is_array(out):
            raise ValueError(f"apply_fn must return one array (n, c) or (n,), got {type(out).__name__}")
        count = samples[0].shape[0]
        if out.ndim not in (1, 2) or out.shape[0] != count:
            raise ValueError(f"apply_fn must return (n, c) or (n,); for {count} samples it gave shape {out.shape}")
        return out

    def _coupling(self, mode: Any, arrays: list[Any], samples: list[Any]) -> Coupling:
        batch = samples if samples[0].shape[0] > 1 else [_with_neighbour(a) for a in samples]
        replaced = [[a.at[row].set(a[-1 - row]) for a in batch] for row in (0, -1)]
        variants = jax.tree.map(lambda *parts: jnp.stack(parts), batch, *replaced)
        values = jax.vmap(lambda variant: self.outputs(arrays, variant))(variants)
        alone = jax.vmap(lambda sample: self.outputs(arrays, [a[None] for a in sample])[0])(batch)
        moved = [leaf for leaf in batch if is_float(leaf)]
        influence = None if mode is None or not moved else mode(arrays, batch)
        moving = [_nearby(number, a) if is_float(a) else a for number, a in enumerate(arrays)]
        return Coupling(values[0], self.outputs(moving, batch), influence, values[1:], alone)

    def _of_floats(self, arrays: list[Any], batch: list[Any]) -> tuple[Callable[..., Any], list[Any]]:
        floats = [i for i, leaf in enumerate(batch) if is_float(leaf)]

        def outputs(moving: list[Any]) -> Any:
            every = list(batch)
            for i, value in zip(floats, moving, strict=True):
                every[i] = value
            return self.outputs(arrays, every)

        return outputs, [batch[i] for i in floats]

    def _forward(self, arrays: list[Any], batch: list[Any]) -> list[Any]:
        """Derivatives of the other outputs along a change of the first sample, and of the last."""
        outputs, moving = self._of_floats(arrays, batch)
        # Infinite entries are switches, not numbers to be moved.
        drawn = [jnp.where(jnp.isfinite(a), _uneven(a.shape, a.dtype, number), 0) for number, a in enumerate(moving)]
        ends = [[jnp.zeros_like(d).at[row].set(d[row]) for d in drawn] for row in (0, -1)]
        stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *ends)
        tangents = jax.vmap(lambda direction: jax.jvp(outputs, (moving,), (direction,))[1])(stacked)
        return [tangents[0, 1:], tangents[1, :-1]]

    def _reverse(self, arrays: list[Any], batch: list[Any]) -> list[Any]:
        """Derivatives by the first sample of a weighted sum of the other outputs, and the same of the last."""
        outputs, moving = self._of_floats(arrays, batch)
        out, pull = jax.vjp(outputs, moving)
        weight = _uneven(out.shape, out.dtype, 0)
        first, last = (pull(weight.at[row].set(0))[0] for row in (0, -1))
        return [leaf[0] for leaf in first] + [leaf[-1] for leaf in last]


def first_of(x: Any) -> list[Any]:
    """The first few samples of every array."""
    return [leaf if leaf.shape[0] <= FEW else _sliced(leaf) for leaf in jax.tree.leaves(x)]


def _sliced(leaf: Any) -> Any:
    # NumPy needs no program to cut what lies on the host.
    numbers = on_host(leaf) and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return (np.asarray(leaf) if numbers else leaf)[:FEW]


def on_host(leaf: Any) -> bool:
    """Whether an array is NumPy's, or a concrete one of JAX that lies in the host's memory."""
    if not isinstance(leaf, jax.Array):
        return True
    return not isinstance(leaf, jax.core.Tracer) and all(device.platform == "cpu" for device in leaf.devices())


def _compiled(function: Callable[..., Any], *args: Any) -> Callable[..., Any]:
    """Trace a function and compile what was traced."""
    with jax.default_matmul_precision("highest"):
        closed, out = jax.make_jaxpr(function, return_shape=True)(*args)
    programs.refuse_missing_mode(closed)
    tree = jax.tree.structure(out)
    run = jax.jit(lambda *flat: layouts.evaluate(closed, flat))
    return lambda *values: jax.tree.unflatten(tree, run(*jax.tree.leaves(values)))


def _with_neighbour(leaf: Any) -> jax.Array:
    """The single sample and, as a second one, a copy moved by one unit in its first entry (integers are kept valid)."""
    leaf = jnp.asarray(leaf)
    other = leaf * jnp.asarray(0.5, leaf.dtype) + jnp.asarray(1, leaf.dtype) if is_float(leaf) else jnp.zeros_like(leaf)
    return jnp.concatenate([leaf, other])


def is_float(leaf: Any) -> bool:
    """Return whether an array holds real floating-point numbers."""
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _nearby(number: int, leaf: Any) -> Any:
    """Parameters moved by some 10 %: outputs that cancel at `params`, as in a paired network, do not cancel there."""
    return leaf + jnp.asarray(0.1, leaf.dtype) * leaf * _uneven(leaf.shape, leaf.dtype, number)


def _uneven(shape: tuple[int, ...], dtype: Any, number: int) -> jax.Array:
    """Numbers in [-1, 1] without a pattern that a network could share; random ones take seconds to compile."""
    count = jnp.arange(math.prod(shape), dtype=jnp.float32)
    return jnp.cos(count * jnp.float32(1.618034) + jnp.float32(number)).astype(dtype).reshape(shape)
