"""Which rule serves which leaf, chosen by counted multiply-adds."""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lplr_jax.ntk.geometry import Geometry, geometry, row_lookup
from lplr_jax.ntk.jaxpr import Program
from lplr_jax.ntk.rules import Outer, Positions, Rows, Term
from lplr_jax.ntk.walk import Use, before_while, follow
from lplr_jax.programs import widest

# Leaves with at most this many entries share one matrix of per-example gradients: fewer, larger products.
_SMALL = 8192


@dataclass(frozen=True)
class Workload:
    """What is asked for: "full", "trace" or "diagonal", outputs c, samples n1 + n2 and pairs of samples."""

    outputs: str
    c: int
    samples: int
    pairs: int

    def cost(self, once: int, pair: int) -> int:
        """Multiply-adds of a rule that needs `once` for each sample and `pair` for each pair."""
        return self.samples * once + self.pairs * pair


@dataclass(frozen=True)
class Assignment:
    """How one leaf is served: the rule's name, its multiply-adds, its bytes for each sample, why it fell back."""

    leaf: int
    rule: str
    multiply_adds: int
    bytes_per_sample: int
    reason: str


@dataclass(frozen=True, eq=False)
class Plan:
    """Terms of Θ with what they need from one evaluation of the program.

    Attributes:
        terms: Terms, each with the cut slots at which it reads cotangents.
        cuts: Cut slots of each term.
        needs: Slots whose values each term reads.
        reverse: Leaves that each term differentiates in reverse mode as a whole.
        forward: Leaves that each term differentiates in forward mode (they enter a while loop).
        leaves: How each differentiable leaf is served.
    """

    terms: tuple[Term, ...]
    cuts: tuple[tuple[int, ...], ...]
    needs: tuple[tuple[int, ...], ...]
    reverse: tuple[tuple[int, ...], ...]
    forward: tuple[tuple[int, ...], ...]
    leaves: tuple[Assignment, ...]


@dataclass(frozen=True, eq=False)
class _Part:
    """A leaf's choice before terms are put together."""

    leaf: int
    kind: str
    use: Use | None
    form: Geometry | None
    assignment: Assignment


def make_plan(program: Program, leaves: tuple[int, ...], work: Workload) -> Plan:
    """Choose a rule for each leaf and put terms together.

    Args:
        program: Flat program of one sample.
        leaves: Indices of the differentiable leaves among `program.params`.
        work: What is asked for.

    Returns:
        The plan.
    """
    blocked = before_while(program)
    parts = [_choose(program, leaf, work, blocked) for leaf in leaves]
    builder = _Builder(program)
    for part in parts:
        builder.add(part)
    return builder.finish(tuple(part.assignment for part in parts))


def _choose(program: Program, leaf: int, work: Workload, blocked: frozenset[int]) -> _Part:
    slot = program.params[leaf]
    aval = program.avals[slot]
    size, item = prod(aval.shape), jnp.dtype(aval.dtype).itemsize
    c = work.c
    pair_rows = {"full": c * c * size, "trace": c * size, "diagonal": c * size}[work.outputs]

    def part(
        kind: str, rule: str, cost: int, kept: int, use: Use | None, form: Geometry | None, why: str = ""
    ) -> _Part:
        return _Part(leaf, kind, use, form, Assignment(leaf, rule, cost, kept * item, why))

    use = follow(program, slot)
    if use is None:
        return part("unused", "none: the output does not depend on it", 0, 0, None, None)
    if slot in blocked:
        why = use if isinstance(use, str) else "feeds a while loop"
        return part("forward", "Jacobian (forward mode)", work.cost(0, pair_rows), c * size, None, None, why)
    if isinstance(use, str):
        return part("reverse", "Jacobian (reverse mode)", work.cost(0, pair_rows), c * size, None, None, use)
    if use.cut in blocked:
        why = "its cotangent would pass a while loop"
        return part("forward", "Jacobian (forward mode)", work.cost(0, pair_rows), c * size, None, None, why)

    name = use.op.name
    form = geometry(program, use) if use.isometric else None
    if form is not None:
        b, s, k, m = form.b, form.s, form.k, form.m
        if b * s == 1:
            pair = k + {"full": c * c, "trace": c, "diagonal": c}[work.outputs] * m + 1
            kind = "dense" if name == "dot_general" else "convolution"
            return part("outer", f"{kind}: (h hᵀ) ∘ (δ δᵀ)", work.cost(0, pair), k + c * m, use, form)
        rows = work.cost(c * b * s * k * m, pair_rows)
        positions = work.cost(0, _pair_positions(work, b, s, k, m))
        kind = "matrix product" if name == "dot_general" else "convolution"
        if positions < rows and work.outputs != "diagonal":
            return part("positions", f"{kind}: pairs of positions", positions, b * s * (k + c * m), use, form)
        return part("rows", f"{kind}: per-example gradients", rows, c * size, use, form)
    if (
        name in ("add", "add_any", "sub")
        and use.isometric
        and not use.factors
        and size == _size(program, use.op.outs[0])
    ):
        pair = {"full": c * c, "trace": c, "diagonal": c}[work.outputs] * size
        return part("outer", "bias: δ δᵀ", work.cost(0, pair), c * size, use, None)
    result = _size(program, use.op.outs[0])
    if name == "gather":
        lookup = row_lookup(program, use) if use.isometric and not use.factors and not use.chain else None
        if lookup is not None:
            m = size // aval.shape[0]
            s = result // max(m, 1)
            positions = work.cost(0, _pair_positions(work, 1, s, 0, m))
            if positions < work.cost(c * result, pair_rows) and work.outputs != "diagonal":
                form = Geometry(1, s, 0, m, lookup, lambda delta: delta.reshape(1, s, m))
                return part("lookup", "embedding: pairs of equal ids", positions, s + c * s * m, use, form)
        return part("rows", "embedding: per-example gradients", work.cost(c * result, pair_rows), c * size, use, None)
    rule = {"mul": "scale", "div": "scale", "add": "bias", "add_any": "bias", "sub": "bias"}.get(name, "linear")
    if name == "dot_general":
        rule = "matrix product"
    elif name == "conv_general_dilated":
        rule = "convolution"
    return part("rows", f"{rule}: per-example gradients", work.cost(c * result, pair_rows), c * size, use, None)


def _pair_positions(work: Workload, b: int, s: int, k: int, m: int) -> int:
    outputs = {"full": work.c**2, "trace": work.c, "diagonal": work.c}[work.outputs]
    blocks = work.c**2 if work.outputs == "full" else 1
    return b * s * s * (k + outputs * m + blocks)


def _size(program: Program, slot: int) -> int:
    return prod(program.avals[slot].shape)


class _Builder:
    """Groups the choices into terms: leaves that share a cotangent, and small leaves whose gradients share a matrix."""

    def __init__(self, program: Program):
        self.program = program
        self.terms: list[tuple[Term, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        self.shared: dict[int, list[_Part]] = {}
        self.rows: list[_Part] = []

    def add(self, part: _Part) -> None:
        if part.kind == "outer" and part.use is not None:
            self.shared.setdefault(part.use.cut, []).append(part)
        elif part.kind in ("positions", "lookup"):
            self._positions(part)
        elif part.kind != "unused":
            self.rows.append(part)

    def finish(self, assignments: tuple[Assignment, ...]) -> Plan:
        for cut, parts in self.shared.items():
            self._outer(cut, parts)
        small: list[_Part] = []
        for part in self.rows:
            if _size(self.program, self.program.params[part.leaf]) <= _SMALL:
                small.append(part)
            else:
                self._rows([part])
        if small:
            self._rows(small)
        columns = list(zip(*self.terms, strict=True)) or [(), (), (), (), ()]
        return Plan(*(tuple(column) for column in columns), leaves=assignments)

    def _outer(self, cut: int, parts: list[_Part]) -> None:
        operands, ones, needs = [], 0, set()
        for part in parts:
            if part.form is None:
                ones += 1
            elif part.use is not None:
                operands.append(_scaled_operand(part.use, part.form))
                needs |= part.use.needs()
        leaves = tuple(part.leaf for part in parts)
        term = Outer(leaves, tuple(operands), ones, lambda deltas: deltas[cut], cut == self.program.output)
        self.terms.append((term, (cut,), tuple(sorted(needs)), (), ()))

    def _positions(self, part: _Part) -> None:
        use, form = part.use, part.form
        if use is None or form is None:
            return
        lookup = part.kind == "lookup"
        operand = (lambda env: form.operand(use.operand(env))) if lookup else _scaled_operand(use, form)

        def cotangent(env: Any, deltas: Any) -> jax.Array:
            del env
            return jax.vmap(lambda delta: form.cotangent(use.cotangent(self.program, delta)))(deltas[use.cut])

        term = Positions((part.leaf,), operand, cotangent, lookup, form.s, form.b)
        self.terms.append((term, (use.cut,), tuple(sorted(use.needs())), (), ()))

    def _rows(self, parts: list[_Part]) -> None:
        makers, cuts, needs, reverse, forward = [], set(), set(), [], []
        for part in parts:
            if part.use is None:
                (forward if part.kind == "forward" else reverse).append(part.leaf)
                makers.append(_ready(part.leaf))
            else:
                makers.append(_row_maker(self.program, part.use, part.form))
                cuts.add(part.use.cut)
                needs |= part.use.needs()
        term = Rows(tuple(part.leaf for part in parts), tuple(makers))
        self.terms.append((term, tuple(sorted(cuts)), tuple(sorted(needs)), tuple(reverse), tuple(forward)))


def _scaled_operand(use: Use, form: Geometry) -> Callable[[Any], jax.Array]:
    def operand(env: Any) -> jax.Array:
        h = form.operand(use.operand(env))
        scale = use.scale(env)
        return h if scale is None else h * jnp.broadcast_to(scale.astype(h.dtype), h.shape)

    return operand


def _ready(leaf: int) -> Callable[..., jax.Array]:
    def take(env: Any, deltas: Any, gradients: Any) -> jax.Array:
        del env, deltas
        return gradients[leaf]

    return take


def _row_maker(program: Program, use: Use, form: Geometry | None) -> Callable[..., jax.Array]:
    if form is None:
        return lambda env, deltas, _: jax.vmap(lambda one: use.gradient(program, env, one))(deltas[use.cut])

    def product(env: Any, deltas: Any, gradients: Any) -> jax.Array:
        del gradients
        delta = deltas[use.cut]
        h = _scaled_operand(use, form)(env)  # (b, s, k)
        delta = jax.vmap(lambda one: form.cotangent(use.cotangent(program, one)))(delta)  # (c, b, s, m)
        # What a narrow function rounds is multiplied in the width of the leaf.
        wide = widest(program.avals[use.source].dtype, h.dtype, delta.dtype)
        h, delta = h.astype(wide), delta.astype(wide)
        # Outputs and free entries lead the product, whose rows are those of the gradients: nothing is moved behind it.
        return jnp.einsum("obsm,bsk->bomk", delta, h, precision=jax.lax.Precision.HIGHEST).swapaxes(0, 1)

    return product
