"""The exact empirical NTK of any pure function: Θ = Σ J_leaf J_leafᵀ over parameter leaves, block by block.

The function is traced once for one sample. Of each leaf only the features that its rule needs are kept (`rules`,
chosen in `plan`): operands h and cotangents δ come from one forward and c backward sweeps, without any weight gradient.
Blocks of Θ are formed from features of two blocks of samples; without x2 only those on and below the diagonal, which
are mirrored.
"""

import copy
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh
from jaxtyping import Array, Inexact

from lplr_jax import layouts, parameters, programs
from lplr_jax.ntk import sharded
from lplr_jax.ntk.explain import Explanation, LeafExplanation
from lplr_jax.ntk.memory import Group, budget, bytes_of, even, make_groups, sweep_bytes
from lplr_jax.ntk.plan import Plan, Workload, make_plan
from lplr_jax.ntk.result import AHEAD, DeviceResult, HostResult, Span, blocks, cut, result, symmetric
from lplr_jax.ntk.traced import Traced, trace, widening
from lplr_jax.parameters import Parameters

Outputs = Literal["full", "trace", "diagonal"]
_Where = tuple[list[jax.Array], list[jax.Array]]
"""Arrays of the parameters, and arrays that the function captures."""


def kernel(
    apply_fn: Callable[[Any, Any], Any],
    params: Any,
    x1: Any,
    x2: Any = None,
    *,
    outputs: Outputs = "full",
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
) -> Inexact[Array, "..."]:
    """The empirical NTK of `apply_fn` at `params`, undivided, in the wider of the dtypes of its outputs and of θ.

    Args:
        apply_fn: Pure function; `apply_fn(params, x)` has shape (n, c) or (n,), and row i depends on sample i alone.
        params: Pytree of parameters, or `Parameters`; leaves that are not θ are left out.
        x1: Samples: an array (n1, ...) or a pytree of such arrays.
        x2: Samples of the other axis, or None for x1; then the result is exactly symmetric.
        outputs: "full" for (n1 c, n2 c), sample-major; "trace" for (n1, n2), the sum over outputs; "diagonal" for
            (n1, c), the diagonal of the full kernel.
        memory_budget: Bytes to use beside the result; a quarter of the device's or machine's memory if None.
        mesh: Devices that share the work; all devices if None and there are several. Then the budget is that of each
            device, and the result is left sharded by rows where the devices divide them (`sharded`).

    Returns:
        The kernel.

    Raises:
        ValueError: If the output does not have one row for each sample, or the budget is too small for two samples.
    """
    split = parameters.split(params)
    traced = trace(apply_fn, split, x1)
    return evaluate(traced, split, x1, x2, outputs=outputs, memory_budget=memory_budget, mesh=mesh)


def evaluate(
    traced: Traced,
    params: Parameters,
    x1: Any,
    x2: Any = None,
    *,
    outputs: Outputs = "full",
    memory_budget: int | None = None,
    mesh: Mesh | None = None,
) -> Inexact[Array, "..."]:
    """The empirical NTK of a function that has been traced; arguments as for `kernel`."""
    first, xdef = jax.tree.flatten(x1)
    second, xdef2 = (first, xdef) if x2 is None else jax.tree.flatten(x2)
    if xdef2 != xdef:
        raise ValueError(f"x1 and x2 must have the same tree structure, got {xdef} and {xdef2}")
    n1 = int(np.shape(first[0])[0])
    n2 = n1 if x2 is None else int(np.shape(second[0])[0])
    if outputs == "diagonal" and n1 != n2:
        raise ValueError(f'outputs="diagonal" pairs sample i of x1 with sample i of x2; got {n1} and {n2} samples')
    call = _Call(
        key=(traced.key, traced.leaves, traced.dtype),
        n1=n1,
        n2=None if x2 is None else n2,
        outputs=outputs,
        budget=budget(memory_budget),
        mesh=sharded.default_mesh(min(n1, n2)) if mesh is None else mesh,
    )
    run = _runs.get(call, lambda: _Run(call, traced))
    arrays, consts = _on_device(params.arrays), _on_device(traced.consts)
    return run(arrays, consts, _on_device(first), None if x2 is None else _on_device(second))


def _on_device(leaves: Iterable[Any]) -> list[jax.Array]:
    # Asking JAX for an array that is one takes as long as a small kernel.
    return [leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in leaves]


def lower_blocks(
    traced: Traced, params: Parameters, x: Any, *, memory_budget: int | None = None
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Blocks of the full kernel (n c, n c) on and below its diagonal, for whom the whole is too large; on one device.

    Args:
        traced: The function.
        params: Its parameters.
        x: Samples.
        memory_budget: Bytes to use beside the blocks; as for `kernel`.

    Yields:
        First row, first column and entries. Several may lie at one place, a share of Θ each, to be added up. Entries
        above the diagonal are to be passed over.
    """
    first = _on_device(jax.tree.leaves(x))
    key = (traced.key, traced.leaves, traced.dtype)
    call = _Call(key, int(first[0].shape[0]), None, "full", budget(memory_budget), None)
    run = _runs.get(call, lambda: _Run(call, traced))
    where = _on_device(params.arrays), _on_device(traced.consts)
    waiting: deque[tuple[Span, Span, jax.Array]] = deque()

    def block(rows: Span, cols: Span, tile: jax.Array) -> tuple[int, int, np.ndarray]:
        rows, cols = run.entries(rows), run.entries(cols)
        return rows.own, cols.own, np.asarray(tile)[rows.own - rows.start :, cols.own - cols.start :]

    for group in run.groups:
        for found in run.tiles(group, where, first, None):
            waiting.append(found)
            if len(waiting) > AHEAD:
                yield block(*waiting.popleft())
    yield from (block(*found) for found in waiting)


def strips(
    traced: Traced, params: Parameters, x: Any, *, mesh: Mesh, memory_budget: int
) -> Iterator[tuple[int, np.ndarray]]:
    """First row, and rows (r, n c) of the full kernel on the host, of every device of this process.

    Args:
        traced: As for `evaluate`.
        params: As for `kernel`, the same in every process.
        x: As `x1` for `kernel`, the same in every process.
        mesh: Devices in a row, those of other processes among them.
        memory_budget: As for `kernel`, the same in every process: the program depends on it.
    """
    first = _on_device(jax.tree.leaves(x))
    key = (traced.key, traced.leaves, traced.dtype)
    call = _Call(key, int(first[0].shape[0]), None, "full", memory_budget, mesh)
    run = copy.copy(_runs.get(call, lambda: _Run(call, traced)))
    run.consts = _on_device(traced.consts)
    yield from sharded.strips(run, _on_device(params.arrays), first)


def explain(
    apply_fn: Callable[[Any, Any], Any] | Traced,
    params: Any,
    x: Any,
    *,
    outputs: Outputs = "full",
    memory_budget: int | None = None,
) -> Explanation:
    """Which rule serves each leaf, at what cost, and why a leaf fell back to its Jacobian; nothing is computed.

    Args:
        apply_fn: As for `kernel`, or the function as `trace` gave it.
        params: As for `kernel`.
        x: As `x1` for `kernel`.
        outputs: As for `kernel`; the choice of rules depends on it.
        memory_budget: As for `kernel`.

    Returns:
        The explanation; print it.
    """
    split = parameters.split(params)
    traced = apply_fn if isinstance(apply_fn, Traced) else trace(apply_fn, split, x)
    n = int(np.shape(jax.tree.leaves(x)[0])[0])
    plan, _, groups = prepare(traced, outputs, (n,), budget(memory_budget))
    leaves = []
    for part in plan.leaves:
        shape = traced.program.avals[traced.program.params[part.leaf]].shape
        path = traced.paths[part.leaf]
        cost, size = part.multiply_adds, part.bytes_per_sample * n
        leaves.append(LeafExplanation(path, shape, part.rule, cost, size, part.reason))
    return Explanation(
        leaves=tuple(leaves),
        outputs=outputs,
        n=n,
        c=traced.c,
        blocks=tuple(min(group.held * group.tile, n) for group in groups),
        carried=tuple((leaf.path, leaf.reason) for leaf in split.leaves if not leaf.is_theta),
        narrow="" if traced.narrow is None else widening(traced.narrow),
    )


def prepare(
    traced: Traced, outputs: str, sides: tuple[int, ...], memory_budget: int, mesh: Mesh | None = None
) -> tuple[Plan, "SampleFeatures", tuple[Group, ...]]:
    """Choose rules and block sizes for the kernel of one (n,) or two sets (n1, n2) of samples.

    Returns:
        Rules; the features of one sample, all terms; groups of terms that are worked on together.
    """
    held = sides if mesh is None else (sharded.share(sides[0], mesh), sharded.share(sides[-1], mesh))
    plan = make_plan(traced.program, traced.leaves, workload(outputs, traced.c, sides))
    features = SampleFeatures.trace(traced, plan, tuple(range(len(plan.terms))))
    groups = make_groups(
        plan.terms,
        [bytes_of(shape) for shape in features.shapes],
        sweep_bytes(plan.program, traced.c),
        outputs=outputs,
        c=traced.c,
        sides=held,
        item=traced.dtype.itemsize,
        memory_budget=memory_budget,
    )
    if mesh is not None and any(group.held * group.tile < max(held) for group in groups):
        raise ValueError(
            f"memory_budget = {memory_budget} bytes for each device does not hold the features that {max(held)} "
            "samples need for one leaf; use more devices or a larger budget"
        )
    return plan, features, groups


@dataclass(frozen=True)
class _Call:
    """All that a compiled kernel depends on."""

    key: Hashable
    n1: int
    n2: int | None
    outputs: Outputs
    budget: int
    mesh: Mesh | None


def sample_features(traced: Traced, plan: Plan, chosen: tuple[int, ...]) -> Callable[..., tuple[Any, ...]]:
    """Function (arrays, consts, one sample) -> features of the chosen terms."""
    program = plan.program
    cuts = sorted({slot for t in chosen for slot in plan.cuts[t]})
    needs = sorted({slot for t in chosen for slot in plan.needs[t]})
    reverse = sorted({leaf for t in chosen for leaf in plan.reverse[t]})
    forward = sorted({leaf for t in chosen for leaf in plan.forward[t]})

    def zero(slot: int) -> jax.Array:
        aval = program.avals[slot]
        return jnp.zeros((*program.steps(program.level(slot)), *aval.shape), aval.dtype)

    def features(arrays: list[Any], consts: list[Any], sample: list[Any]) -> tuple[Any, ...]:
        inputs = [value[None] for value in sample]

        def outputs(shifts: dict[int, Any], moving: dict[int, Any]) -> tuple[Any, Any]:
            values = [moving.get(i, array) for i, array in enumerate(arrays)]
            env = program.run(values, inputs, consts, shifts, frozenset(needs))
            out = env[program.output] if isinstance(program.output, int) else jnp.asarray(program.output.val)
            return out.reshape(traced.c), {slot: env[slot] for slot in needs}

        zeros = {slot: zero(slot) for slot in cuts}
        out, pull, env = jax.vjp(outputs, zeros, {leaf: arrays[leaf] for leaf in reverse}, has_aux=True)
        seed = jnp.eye(traced.c, dtype=out.dtype)
        # A mapped axis of length one would cost a copy of every cotangent.
        one = traced.c == 1
        deltas, gradients = jax.tree.map(lambda a: a[None], pull(seed[0])) if one else jax.vmap(pull)(seed)
        if forward:
            jacobian = jax.jacfwd(lambda moving: outputs({}, moving)[0])
            gradients = {**gradients, **jacobian({leaf: arrays[leaf] for leaf in forward})}
        found = tuple(plan.terms[t].features(env, deltas, gradients) for t in chosen)
        # What is narrow was rounded by the function; products of it are formed in full.
        return jax.tree.map(lambda a: a.astype(traced.dtype) if jnp.issubdtype(a.dtype, jnp.floating) else a, found)

    return features


@dataclass(frozen=True, eq=False)
class SampleFeatures:
    """The features of one sample as a program, traced once: its shapes are asked for before it is compiled.

    Attributes:
        terms: The terms whose features these are.
        shapes: Shapes of the features, term by term.
        program: From arrays, constants and the leaves of one sample to the features.
    """

    terms: tuple[int, ...]
    shapes: tuple[Any, ...]
    program: Any

    @classmethod
    def trace(cls, traced: Traced, plan: Plan, terms: tuple[int, ...]) -> "SampleFeatures":
        """Trace the features of some terms."""
        avals = traced.program.avals
        arrays = [avals[slot] for slot in traced.program.params]
        consts = [avals[slot] for slot, _ in traced.program.consts]
        sample = [jax.ShapeDtypeStruct(avals[slot].shape[1:], avals[slot].dtype) for slot in traced.program.inputs]
        function = sample_features(traced, plan, terms)
        closed, shapes = jax.make_jaxpr(function, return_shape=True)(arrays, consts, sample)
        return cls(terms, shapes, closed)

    def __call__(self, arrays: list[Any], consts: list[Any], sample: list[Any]) -> tuple[Any, ...]:
        """Features of one sample."""
        # Samples may be taken in a loop, where a CPU runs the convolutions of a gradient slower in their own layout.
        values = layouts.evaluate(self.program, [*arrays, *consts, *sample])
        return jax.tree.unflatten(jax.tree.structure(self.shapes), values)


class _Run:
    """A compiled kernel: traced once, called with arrays of the shapes it was made for."""

    def __init__(self, call: _Call, traced: Traced):
        self.call = call
        # Captured arrays are arguments of every call, and none of them is kept.
        self.consts: list[jax.Array] = []
        nothing = tuple((slot, None) for slot, _ in traced.program.consts)
        self.traced = replace(traced, program=replace(traced.program, consts=nothing))
        self.sides = (call.n1,) if call.n2 is None else (call.n1, call.n2)
        self.dtype = self.traced.dtype
        self.rows = self.traced.c if call.outputs == "full" else 1
        self.plan, self.whole_features, self.groups = prepare(
            self.traced, call.outputs, self.sides, call.budget, call.mesh
        )
        self.whole = None if call.mesh is None else sharded.compile_kernel(self)
        # One small program called for each tile: a loop inside the program takes longer to compile and to run. The
        # features of every block are arrays of their own, since a tile that cuts them from larger ones copies too much.
        self._features = jax.jit(self.features_of_block, static_argnums=(0, 1))
        self._tile = jax.jit(self.tile, static_argnums=0)
        self._diagonal = jax.jit(self.diagonal, static_argnums=0)
        self._at_once = jax.jit(self.block)

    def __call__(
        self, arrays: list[jax.Array], consts: list[jax.Array], first: list[jax.Array], second: list[jax.Array] | None
    ) -> jax.Array:
        if self.call.mesh is not None:
            bound = copy.copy(self)
            bound.consts = consts
            return sharded.kernel(bound, arrays, first, second)
        if self.call.outputs == "diagonal":
            return self._run_diagonal((arrays, consts), first, second)
        return self._run_tiles((arrays, consts), first, second)

    def features(self, group: Group, arrays: Any, consts: Any, samples: Any) -> Any:
        """Features of some samples, in chunks of the group's size."""
        one = self.whole_features
        if group.terms != one.terms:
            one = SampleFeatures.trace(self.traced, self.plan, group.terms)
        count = samples[0].shape[0]
        if group.chunk >= count:
            return jax.vmap(lambda sample: one(arrays, consts, sample))(samples)
        return lax.map(lambda sample: one(arrays, consts, sample), samples, batch_size=even(count, group.chunk))

    def features_of_block(self, group: Group, size: int, arrays: Any, consts: Any, samples: Any, start: Any) -> Any:
        """Features of the `size` samples from `start` on."""
        block = [lax.dynamic_slice_in_dim(a, start, size) if a.shape[0] > size else a for a in samples]
        return self.features(group, arrays, consts, block)

    def _run_tiles(self, where: _Where, first: list[jax.Array], second: list[jax.Array] | None) -> jax.Array:
        if len(self.groups) == 1 and self.groups[0].at_once and self.groups[0].tile >= max(self.sides):
            return self._at_once(*where, first, second, np.int32(0))
        shape = (self.sides[0] * self.rows, self.sides[-1] * self.rows)
        theta: HostResult | DeviceResult | None = None
        for number, group in enumerate(self.groups):
            for rows, cols, tile in self.tiles(group, where, first, second):
                theta = theta or result(shape, tile)
                theta.add(tile, self.entries(rows), self.entries(cols), mirror=second is None, first=number == 0)
        return jnp.zeros(shape, self.dtype) if theta is None else theta.finish()

    def block(self, arrays: Any, consts: Any, first: Any, second: Any, start: Any) -> jax.Array:
        """Θ where one tile is all of it: for small kernels a second program costs more than it computes."""
        (group,) = self.groups
        one = self.features(group, arrays, consts, first)
        if second is None:
            return symmetric(self.tile(group, one, one), start)
        return self.tile(group, one, self.features(group, arrays, consts, second))

    def tiles(
        self, group: Group, where: _Where, first: list[jax.Array], second: list[jax.Array] | None
    ) -> Iterator[tuple[Span, Span, jax.Array]]:
        """Rows, columns and tile of a group's share; without x2 those on and below the diagonal.

        All blocks are made at once where the budget allows; else blocks of rows are held while the blocks of columns
        pass by, once for all that are held.
        """
        mirror = second is None
        rows, cols = (list(blocks(side, group.tile)) for side in (self.sides[0], self.sides[-1]))

        def make(samples: list[jax.Array], span: Span) -> Any:
            size = span.stop - span.start
            return self._features(group, size, *where, samples, np.int32(span.start))

        if group.at_once:  # a CPU takes many samples on all its cores, and few on one
            held = cut(make(first, Span(0, 0, self.sides[0])), rows)
            passing = held if second is None else cut(make(second, Span(0, 0, self.sides[-1])), cols)
            for i, j in product(range(len(rows)), range(len(cols))):
                if not mirror or i >= j:
                    yield rows[i], cols[j], self._tile(group, held[i], passing[j])
            return
        for begin in range(0, len(rows), group.held):
            held, passing = {}, None  # the budget has no room for what was held before
            for i in range(begin, min(begin + group.held, len(rows))):
                held[i] = make(first, rows[i])
            for j in range(max(held) + 1 if mirror else len(cols)):
                passing = None
                passing = held[j] if mirror and j in held else make(first if second is None else second, cols[j])
                for i in held:
                    if not mirror or i >= j:
                        yield rows[i], cols[j], self._tile(group, held[i], passing)

    def entries(self, span: Span) -> Span:
        """Rows of Θ of some samples."""
        return Span(span.start * self.rows, span.own * self.rows, span.stop * self.rows)

    def _run_diagonal(self, where: _Where, first: list[jax.Array], second: list[jax.Array] | None) -> jax.Array:
        total = jnp.zeros((self.sides[0], self.traced.c), self.dtype)
        for group in self.groups:
            parts = []
            for span in blocks(self.sides[0], group.tile):
                size = span.stop - span.start
                one = self._features(group, size, *where, first, np.int32(span.start))
                two = one if second is None else self._features(group, size, *where, second, np.int32(span.start))
                parts.append(self._diagonal(group, one, two)[span.own - span.start :])
            total = total + jnp.concatenate(parts)
        return total

    def diagonal(self, group: Group, one: Any, two: Any) -> jax.Array:
        """Diagonal of the block of Θ between two blocks of samples, (n, c)."""
        parts = [self.plan.terms[t].diagonal(a, b) for t, a, b in zip(group.terms, one, two, strict=True)]
        return sum((part.astype(self.dtype) for part in parts[1:]), parts[0].astype(self.dtype))

    def tile(self, group: Group, one: Any, two: Any) -> jax.Array:
        """The group's share of the block of Θ between two blocks of samples."""
        total = None
        for t, first, second in zip(group.terms, one, two, strict=True):
            term = self.plan.terms[t]
            part = (term.full if self.call.outputs == "full" else term.trace)(first, second).astype(self.dtype)
            total = part if total is None else total + part
        return jnp.asarray(total)


_runs = programs.Kept(32)


def workload(outputs: str, c: int, sides: tuple[int, ...]) -> Workload:
    """Samples and pairs of samples that the kernel of one (n,) or two sets (n1, n2) of samples takes."""
    if outputs == "diagonal":
        return Workload(outputs, c, sum(sides), sides[0])
    pairs = sides[0] * (sides[0] + 1) // 2 if len(sides) == 1 else sides[0] * sides[1]
    return Workload(outputs, c, sum(sides), pairs)
