"""Uses of one leaf put together: gradients of the same entries of a leaf add up as if they were more positions.

A loop that slices the leaf joins the batch axis of its uses, for its steps act on entries of their own; one that takes
the leaf whole joins their positions. Two uses belong together where they reach the same entries in the same order
(b, k, m), or with k and m exchanged, as x W and h Wᵀ do; where they reach no common entry they are strangers.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lplr_jax.ntk.geometry import IN_PLACE, Geometry, geometry, moved
from lplr_jax.ntk.jaxpr import Program
from lplr_jax.ntk.walk import Apply, Enter, Use

PLAIN, LOOKUP, SWAPPED, ROUTED = "plain", "lookup", "swapped", "routed"
KINDS = (PLAIN, LOOKUP, SWAPPED, ROUTED)


@dataclass(frozen=True, eq=False)
class Placed:
    """A use with its form, its loops joined to batch entries b and positions s.

    Attributes:
        program: Program that it is a use in.
        use: The use.
        form: Its form in one step of its loops.
        kind: "plain", "lookup" for rows of a table, "swapped" where its k and m are m and k of the others, or "routed"
            where every position takes a matrix of its own choice.
    """

    program: Program
    use: Use
    form: Geometry
    kind: str

    @property
    def b(self) -> int:
        """Batch entries, and steps of loops that slice the leaf."""
        return self.form.b * prod(self.program.lengths[loop.loop] for loop in self.use.loops if loop.sliced)

    @property
    def s(self) -> int:
        """Positions, and steps of loops that take the leaf whole."""
        return self.form.s * prod(self.program.lengths[loop.loop] for loop in self.use.loops if not loop.sliced)

    @property
    def shares(self) -> Hashable:
        """What the cotangent in this form depends on."""
        form, loops = self.form, tuple(loop.sliced for loop in self.use.loops)
        return self.use.cut, tuple(map(id, self.use.back)), form.layout, form.b, form.s, form.m, loops

    def operand(self, env: Mapping[int, Any]) -> jax.Array:
        """Operand h (b, s, k), or row numbers (b, s)."""
        return self._joined(self.use.operand(self.program, env, self.form.operand), 0)

    def row(self, env: Mapping[int, Any]) -> jax.Array:
        """Number (b, s) of the matrix that each position takes."""
        if self.form.row is None:
            raise ValueError("only a routed use has matrices to choose from")
        return self._joined(self.use.operand(self.program, env, self.form.row), 0)

    def cotangent(self, env: Mapping[int, Any], deltas: Mapping[int, Any]) -> jax.Array:
        """Cotangent δ (c, b, s, m)."""
        take = lambda delta: self.use.cotangent_in(self.program, env, delta, self.form.cotangent)  # noqa: E731
        return self._joined(jax.vmap(take)(deltas[self.use.cut]), 1)

    def _joined(self, array: jax.Array, before: int) -> jax.Array:
        """Axes (before, loops, b, s, ...) -> (before, loops that slice and b, other loops and s, ...)."""
        loops = self.use.loops
        if not loops:
            return array
        sliced = [before + i for i, loop in enumerate(loops) if loop.sliced]
        whole = [before + i for i, loop in enumerate(loops) if not loop.sliced]
        b = before + len(loops)
        rest = range(b + 2, array.ndim)
        array = jnp.transpose(array, (*range(before), *sliced, b, *whole, b + 1, *rest))
        return array.reshape(*array.shape[:before], self.b, self.s, *array.shape[b + 2 :])


@dataclass(frozen=True, eq=False)
class Bundle:
    """Uses of the same entries of a leaf."""

    uses: tuple[Placed, ...]
    b: int
    k: int
    m: int

    def of_kind(self, kind: str) -> tuple[Placed, ...]:
        """The uses of one kind."""
        return tuple(use for use in self.uses if use.kind == kind)

    def positions(self, kind: str) -> int:
        """Positions of the uses of one kind together."""
        return sum(use.s for use in self.of_kind(kind))

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of uses that there are."""
        return tuple(kind for kind in KINDS if self.of_kind(kind))

    @property
    def size(self) -> int:
        """Entries of the leaf that are reached."""
        return self.b * self.k * self.m * self.uses[0].form.rows

    def once(self, c: int) -> int:
        """Multiply-adds of the gradients of one sample."""
        dense = self.positions(PLAIN) + self.positions(SWAPPED) + self.positions(ROUTED)
        return c * self.b * (dense * self.k * self.m + self.positions(LOOKUP) * self.m)

    def kept(self, c: int) -> int:
        """Entries of the operands and cotangents of one sample."""
        plain, lookup, swapped, routed = (self.positions(kind) for kind in KINDS)
        k, m = self.k, self.m
        return self.b * (plain * (k + c * m) + lookup * (1 + c * m) + swapped * (m + c * k) + routed * (k + 1 + c * m))

    def pair(self, outputs: str, c: int) -> int:
        """Multiply-adds of pairs of positions, for one pair of samples."""
        o, blocks = (c * c, c * c) if outputs == "full" else (c, 1)
        plain, lookup, swapped, routed = (self.positions(kind) for kind in KINDS)
        k, m = self.k, self.m
        alike = plain**2 * (k + o * m + blocks) + lookup**2 * (o * m + blocks) + swapped**2 * (m + o * k + blocks)
        alike += routed**2 * (k + 1 + o * m + blocks)
        mixed = 2 * plain * lookup * (1 + o * m + blocks)
        crossed = 2 * swapped * (plain * (c * k + c * m + o) + lookup * (c + c * m + o))
        return self.b * (alike + mixed + crossed)


def bundles(program: Program, uses: Sequence[Use], *, by_input: bool = False) -> tuple[Bundle, ...] | None:
    """Put uses together that reach the same entries of their leaf.

    Args:
        program: The program.
        uses: Uses of one leaf.
        by_input: As for `geometry`.

    Returns:
        Bundles that have no entry in common; None if a use has no form, or uses reach some common entries in no common
        order.
    """
    placed = []
    for use in uses:
        form = geometry(program, use, by_input=by_input)
        if form is None or (form.row is not None and len(uses) > 1):
            return None
        kind = LOOKUP if form.lookup else PLAIN if form.row is None else ROUTED
        placed.append(Placed(program, use, form, kind))
    if len(placed) == 1:
        return (_bundle(placed, placed[0]),)
    same: dict[Hashable, list[Placed]] = {}
    for one in placed:
        same.setdefault(_way(one), []).append(one)
    if len(same) == 1:
        return (_bundle(placed, placed[0]),)
    shape = program.avals[uses[0].source].shape
    numbers = np.arange(prod(shape), dtype=np.int64).reshape(shape)
    found: list[tuple[np.ndarray, list[Placed]]] = []
    for group in sorted(same.values(), key=lambda group: group[0].kind != LOOKUP):
        entries = _entries(program, group[0], numbers)
        for base, members in found:
            if _equal(base, entries):
                members += group
                break
            if group[0].kind == PLAIN and _equal(base, entries.swapaxes(1, 2)):
                members += [replace(one, kind=SWAPPED) for one in group]
                break
        else:
            found.append((entries, group))
    if len(found) > 1 and not _strangers([entries for entries, _ in found], numbers):
        return None
    return tuple(_bundle(members, members[0]) for _, members in found)


def _equal(one: np.ndarray, two: np.ndarray) -> bool:
    """Whether entries are the same in the same order; views of one array tell it by how they are laid out."""
    if one.shape != two.shape:
        return False
    start = [array.__array_interface__["data"][0] for array in (one, two)]
    return (start[0] == start[1] and one.strides == two.strides) or np.array_equal(one, two)


def _strangers(arrays: Sequence[np.ndarray], numbers: np.ndarray) -> bool:
    """Whether no entry is in two of the arrays; views of the numbers that lie apart tell it without a look."""
    views = all(np.may_share_memory(array, numbers) for array in arrays)
    if views and not any(np.may_share_memory(one, two) for one, two in combinations(arrays, 2)):
        return True
    seen = np.zeros(numbers.size, np.int8)
    for entries in arrays:
        if np.any(seen[entries]):
            return False
        seen[entries] = 1
    return True


def _bundle(uses: Sequence[Placed], first: Placed) -> Bundle:
    return Bundle(tuple(uses), first.b, first.form.k, first.form.m)


def _way(placed: Placed) -> Hashable:
    """What decides which entries of the leaf are reached, and in which order."""
    parts: list[Hashable] = []
    for step in placed.use.chain:
        if isinstance(step, Enter):
            parts.append((placed.program.lengths[step.loop], step.sliced))
        elif step.op.name not in IN_PLACE:
            parts.append((step.op.name, str(sorted(step.op.params.items(), key=lambda item: item[0]))))
    form, op = placed.form, placed.use.op
    shape = placed.program.avals[op.ins[placed.use.position]].shape
    return tuple(parts), shape, str(op.params.get("dimension_numbers")), form.layout, form.b, form.k, form.m


def _entries(program: Program, placed: Placed, numbers: np.ndarray) -> np.ndarray:
    """Numbers of the entries of the leaf that a use reaches, (b, k, m)."""

    def walk(array: np.ndarray, steps: Sequence[Apply | Enter]) -> np.ndarray:
        for number, step in enumerate(steps):
            if isinstance(step, Enter):
                rest = steps[number + 1 :]
                return np.stack([walk(part, rest) for part in array]) if step.sliced else walk(array, rest)
            if step is placed.use.merge:
                break
            array = moved(program, step.op, array)
        return placed.form.entries(array)

    return walk(numbers, placed.use.chain).reshape(placed.b, placed.form.k, placed.form.m)


def joined(parts: Sequence[jax.Array], axis: int) -> jax.Array:
    """Positions of several uses one behind the other."""
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=axis)
