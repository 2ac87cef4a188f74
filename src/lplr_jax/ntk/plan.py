"""Which rule serves which leaf, chosen by counted multiply-adds."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from lplr_jax.ntk.bundles import LOOKUP, PLAIN, ROUTED, Bundle, Placed, bundles, joined
from lplr_jax.ntk.concatenated import divide
from lplr_jax.ntk.demand import narrow
from lplr_jax.ntk.geometry import dilated, geometry
from lplr_jax.ntk.jaxpr import Program
from lplr_jax.ntk.loops import enter
from lplr_jax.ntk.rules import Outer, Positions, Rows, Side, Term
from lplr_jax.ntk.unroll import unroll
from lplr_jax.ntk.walk import AFFINE, Enter, Use, before_while, follow
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

    def rows(self, size: int) -> int:
        """Multiply-adds of products of gradients with `size` entries, for one pair of samples."""
        return (self.c**2 if self.outputs == "full" else self.c) * size


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
        program: The program, its loops entered.
        terms: Terms, each with the cut slots at which it reads cotangents.
        cuts: Cut slots of each term.
        needs: Slots whose values each term reads.
        reverse: Leaves that each term differentiates in reverse mode as a whole.
        forward: Leaves that each term differentiates in forward mode (they enter a while loop).
        leaves: How each differentiable leaf is served.
    """

    program: Program
    terms: tuple[Term, ...]
    cuts: tuple[tuple[int, ...], ...]
    needs: tuple[tuple[int, ...], ...]
    reverse: tuple[tuple[int, ...], ...]
    forward: tuple[tuple[int, ...], ...]
    leaves: tuple[Assignment, ...]


@dataclass(frozen=True, eq=False)
class _Part:
    """The share of a leaf, or of a bundle of its uses, before terms are put together."""

    leaf: int
    kind: str
    uses: tuple[Use, ...] = ()
    bundle: Bundle | None = None


@dataclass(frozen=True)
class _Choice:
    """How a share is served."""

    part: _Part
    rule: str
    multiply_adds: int
    kept: int


def make_plan(program: Program, leaves: tuple[int, ...], work: Workload) -> Plan:
    """Choose a rule for each leaf and put terms together.

    Args:
        program: Flat program of one sample.
        leaves: Indices of the differentiable leaves among `program.params`.
        work: What is asked for.

    Returns:
        The plan.
    """
    program = enter(narrow(divide(unroll(program, work.samples))))
    blocked = before_while(program)
    builder, assignments = _Builder(program), []
    for leaf in leaves:
        choices, reason = _choose(program, leaf, work, blocked)
        for choice in choices:
            builder.add(choice.part)
        aval = program.avals[program.params[leaf]]
        assignments.append(
            Assignment(
                leaf,
                "; ".join(dict.fromkeys(choice.rule for choice in choices)),
                sum(choice.multiply_adds for choice in choices),
                sum(choice.kept for choice in choices) * jnp.dtype(aval.dtype).itemsize,
                reason,
            )
        )
    return builder.finish(tuple(assignments))


def _choose(program: Program, leaf: int, work: Workload, blocked: frozenset[int]) -> tuple[list[_Choice], str]:
    """Choose for one leaf; the reason says why it fell back to its Jacobian."""
    slot, c = program.params[leaf], work.c
    size = prod(program.avals[slot].shape)
    jacobian = work.cost(0, work.rows(size))
    uses = follow(program, slot)
    if not uses:
        return [_Choice(_Part(leaf, "unused"), "none: the output does not depend on it", 0, 0)], ""
    if slot in blocked:
        why = uses if isinstance(uses, str) else "feeds a while loop"
        return [_Choice(_Part(leaf, "forward"), "Jacobian (forward mode)", jacobian, c * size)], why
    if isinstance(uses, str):
        return [_Choice(_Part(leaf, "reverse"), "Jacobian (reverse mode)", jacobian, c * size)], uses
    if any(use.cut in blocked for use in uses):
        why = "its cotangent would pass a while loop"
        return [_Choice(_Part(leaf, "forward"), "Jacobian (forward mode)", jacobian, c * size)], why
    found = bundles(program, uses)
    for routing in (False, True):  # further on, a cotangent is smaller
        further = follow(program, slot, merging=True, routing=routing)
        if isinstance(further, str) or {use.op for use in further} == {use.op for use in uses}:
            continue
        if not any(use.cut in blocked for use in further):
            beyond = bundles(program, further)
            if beyond is not None:
                found, uses = beyond, further
    if found is not None:
        choices = [_of_bundle(program, leaf, bundle, work) for bundle in found]
        patches = bundles(program, uses, by_input=True) if any(map(dilated, uses)) else None
        others = [_of_bundle(program, leaf, bundle, work, " of patches of δ") for bundle in patches or ()]
        return min((choices, others or choices), key=lambda ways: sum(way.multiply_adds for way in ways)), ""
    once = c * sum(_steps(program, use) * _size(program, use.op.outs[0]) for use in uses)
    rule = f"{_name(program, uses)}: per-example gradients"
    return [_Choice(_Part(leaf, "rows", uses), rule, work.cost(once, work.rows(size)), c * size)], ""


def _of_bundle(program: Program, leaf: int, bundle: Bundle, work: Workload, how: str = "") -> _Choice:
    c, size = work.c, bundle.size
    uses = tuple(placed.use for placed in bundle.uses)
    name, part = _name(program, uses) + how, lambda kind: _Part(leaf, kind, uses, bundle)
    kept = bundle.kept(c)
    if _is_bias(bundle):
        return _Choice(part("bias"), "bias: δ δᵀ", work.cost(0, work.rows(size)), c * size)
    if bundle.kinds == (PLAIN,) and bundle.b * bundle.positions(PLAIN) == 1 and uses[0].merge is None:
        cost = work.cost(0, bundle.k + work.rows(bundle.m) + 1)
        return _Choice(part("outer"), f"{name}: (h hᵀ) ∘ (δ δᵀ)", cost, kept)
    rows = work.cost(bundle.once(c), work.rows(size))
    positions = work.cost(0, bundle.pair(work.outputs, c))
    if positions < rows:
        pairs = "pairs of equal ids" if bundle.kinds == (LOOKUP,) else "pairs of positions"
        return _Choice(part("positions"), f"{name}: {pairs}", positions, kept)
    return _Choice(part("rows"), f"{name}: per-example gradients", rows, c * size)


def _is_bias(bundle: Bundle) -> bool:
    """Whether every entry is added to one entry of the result, in one step: the cotangent is the gradient."""
    return len(bundle.uses) == 1 and bundle.uses[0].use.op.name in AFFINE and bundle.uses[0].s == 1


def _steps(program: Program, use: Use) -> int:
    return prod(program.lengths[loop.loop] for loop in use.loops)


_NAMES = {
    "dot_general": "matrix product",
    "conv_general_dilated": "convolution",
    "gather": "embedding",
    "mul": "scale",
    "div": "scale",
    **dict.fromkeys(AFFINE, "bias"),
}


def _name(program: Program, uses: tuple[Use, ...]) -> str:
    """What a leaf does: the operations that it enters, how often, and in which loops."""
    names = []
    for use in uses:
        kind = "merged " if use.merge else "routed " if use.route else "transposed " if dilated(use) else ""
        kind += "complex " if jnp.issubdtype(program.avals[use.op.outs[0]].dtype, jnp.complexfloating) else ""
        name = kind + _NAMES.get(use.op.name, "linear")
        if name == "matrix product" and len(uses) == 1 and not use.loops:
            form = geometry(program, use)
            name = "dense" if form is not None and form.b * form.s == 1 else name
        names.append(name + "".join(_loop(program, loop) for loop in use.loops))
    return ", ".join(
        f"{names.count(name)} × {name}" if names.count(name) > 1 else name for name in dict.fromkeys(names)
    )


def _loop(program: Program, loop: Enter) -> str:
    return f" in {program.lengths[loop.loop]} steps" + (" of its own slices" if loop.sliced else "")


def _size(program: Program, slot: int) -> int:
    return prod(program.avals[slot].shape)


class _Builder:
    """Groups the choices into terms: leaves that share a cotangent, and small leaves whose gradients share a matrix."""

    def __init__(self, program: Program):
        self.program = program
        self.terms: list[tuple[Term, tuple[int, ...], tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = []
        self.outer: dict[int, list[_Part]] = {}
        self.positions: dict[Hashable, list[_Part]] = {}
        self.rows: list[_Part] = []

    def add(self, part: _Part) -> None:
        if part.kind in ("outer", "bias"):
            self.outer.setdefault(part.uses[0].cut, []).append(part)
        elif part.kind == "positions" and part.bundle is not None:
            plain = part.bundle.kinds == (PLAIN,)
            key = tuple(placed.shares for placed in _in_order(part.bundle)) if plain else part.leaf
            self.positions.setdefault((key, part.bundle.b), []).append(part)
        elif part.kind != "unused":
            self.rows.append(part)

    def finish(self, assignments: tuple[Assignment, ...]) -> Plan:
        for parts in self.positions.values():
            self._positions(parts)
        for cut, parts in self.outer.items():
            if parts:
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
        return Plan(self.program, *(tuple(column) for column in columns), leaves=assignments)

    def _outer(self, cut: int, parts: list[_Part]) -> None:
        operands, ones, needs = [], 0, set()
        for part in parts:
            if part.kind == "bias":
                ones += 1
            elif part.bundle is not None:
                operands.append(part.bundle.uses[0].operand)
                needs |= part.uses[0].needs(in_form=True)
        leaves = tuple(part.leaf for part in parts)
        term = Outer(leaves, tuple(operands), ones, lambda deltas: deltas[cut], cut == self.program.output)
        self.terms.append((term, (cut,), tuple(sorted(needs)), (), ()))

    def _positions(self, parts: list[_Part]) -> None:
        bundles = [part.bundle for part in parts if part.bundle is not None]
        first, leaves, ones = bundles[0], [part.leaf for part in parts], 0
        cuts = {placed.use.cut for placed in first.uses}
        if first.kinds == (PLAIN,) and first.positions(PLAIN) == 1 and first.uses[0].use.merge is None:
            # One position each: a bias behind has the cotangent itself for its gradient.
            (cut,) = cuts
            biases = [part for part in self.outer.get(cut, ()) if part.kind == "bias"]
            self.outer[cut] = [part for part in self.outer.get(cut, ()) if part.kind != "bias"]
            leaves, ones = leaves + [part.leaf for part in biases], len(biases)
        sides = tuple(
            Side(
                kind,
                first.positions(kind),
                (_operand(first, kind), _row(first)) if kind == ROUTED else tuple(_operand(b, kind) for b in bundles),
                _cotangent(first, kind),
            )
            for kind in first.kinds
        )
        needs = {slot for part in parts for use in part.uses for slot in use.needs(in_form=True)}
        term = Positions(tuple(leaves), sides, first.b, ones)
        self.terms.append((term, tuple(sorted(cuts)), tuple(sorted(needs)), (), ()))

    def _rows(self, parts: list[_Part]) -> None:
        makers, cuts, needs, reverse, forward = [], set(), set(), [], []
        for part in parts:
            if not part.uses:
                (forward if part.kind == "forward" else reverse).append(part.leaf)
                makers.append(_ready(part.leaf))
                continue
            leaf = self.program.avals[self.program.params[part.leaf]]
            plain = part.bundle if part.bundle is not None and part.bundle.kinds == (PLAIN,) else None
            makers.append(_gradients(self.program, part.uses) if plain is None else _product(plain, leaf.dtype))
            cuts |= {use.cut for use in part.uses}
            needs |= {slot for use in part.uses for slot in use.needs(in_form=plain is not None)}
        term = Rows(tuple(part.leaf for part in parts), tuple(makers))
        self.terms.append((term, tuple(sorted(cuts)), tuple(sorted(needs)), tuple(reverse), tuple(forward)))


def _in_order(bundle: Bundle, kind: str = PLAIN) -> list[Placed]:
    """Uses of one kind, in the order of what their cotangents depend on: that of every leaf that shares these."""
    return sorted(bundle.of_kind(kind), key=lambda placed: str(placed.shares))


def _operand(bundle: Bundle, kind: str) -> Callable[[Any], jax.Array]:
    uses = _in_order(bundle, kind)
    return lambda env: joined([placed.operand(env) for placed in uses], 1)


def _row(bundle: Bundle) -> Callable[[Any], jax.Array]:
    (use,) = bundle.uses
    return use.row


def _cotangent(bundle: Bundle, kind: str) -> Callable[[Any, Any], jax.Array]:
    uses = _in_order(bundle, kind)
    return lambda env, deltas: joined([placed.cotangent(env, deltas) for placed in uses], 2)


def _ready(leaf: int) -> Callable[..., jax.Array]:
    def take(env: Any, deltas: Any, gradients: Any) -> jax.Array:
        del env, deltas
        return gradients[leaf]

    return take


def _gradients(program: Program, uses: tuple[Use, ...]) -> Callable[..., jax.Array]:
    """Gradients of the leaf as it is, added up over its uses."""

    def add_up(env: Any, deltas: Any, gradients: Any) -> jax.Array:
        del gradients
        total = None
        for use in uses:
            part = jax.vmap(lambda one, use=use: use.gradient(program, env, one))(deltas[use.cut])
            total = part if total is None else total + part
        return jnp.asarray(total)

    return add_up


def _product(bundle: Bundle, leaf: Any) -> Callable[..., jax.Array]:
    """Gradients as products of operands and cotangents at all positions; the order of their entries is the bundle's."""
    operand, cotangent = _operand(bundle, PLAIN), _cotangent(bundle, PLAIN)

    def product(env: Any, deltas: Any, gradients: Any) -> jax.Array:
        del gradients
        h, delta = operand(env), cotangent(env, deltas)  # (b, s, k), (c, b, s, m)
        # What a narrow function rounds is multiplied in the width of the leaf.
        wide = widest(leaf, h.dtype, delta.dtype)
        h, delta = h.astype(wide), delta.astype(wide)
        # Outputs and free entries lead the product, whose rows are those of the gradients: nothing is moved behind it.
        return jnp.einsum("obsm,bsk->bomk", delta, h, precision=jax.lax.Precision.HIGHEST).swapaxes(0, 1)

    return product
