"""Where a parameter leaf enters a program: the operations that consume it, and where their cotangents are read off.

A leaf may first pass through operations that are linear in it and do not depend on x (reshape, transpose, broadcast,
scaling by a constant, the step from real to complex), and into loops. The operation behind them is linear in the leaf
too when its primitive is one of `LINEAR`; then the gradient of an output with respect to the leaf is a function of that
operation's other operand and of the cotangent at its result. A leaf that is used k times has the sum of the k
gradients.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplr_jax.ntk.jaxpr import Held, Op, Program, contains, read
from lplr_jax.programs import vjp_of_equation

# Primitives linear in one operand, with the positions at which a leaf may stand.
LINEAR: Mapping[str, tuple[int, ...]] = {
    "dot_general": (0, 1),
    "conv_general_dilated": (1,),
    "add": (0, 1),
    "add_any": (0, 1),
    "sub": (0, 1),
    "mul": (0, 1),
    "div": (0,),
    "gather": (0,),
}
# Those of them whose cotangent needs no operand.
AFFINE = frozenset({"add", "add_any", "sub"})
_RESHAPES = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p", "rev"})
_UNARY = _RESHAPES | {"broadcast_in_dim", "convert_element_type", "slice", "neg"}
# Those whose other operands are of no account for the derivative.
_SUMS = AFFINE | {"complex"}


# Ways in which a leaf is followed before it falls back: they double with every product of a leaf with itself.
_MOST_USES = 1024


@dataclass(frozen=True, eq=False)
class Apply:
    """Step of a leaf through an operation, with the operand that it stands at."""

    op: Op
    at: int


@dataclass(frozen=True)
class Enter:
    """Step of a leaf into a loop: the same in every step, or another slice along its leading axis in each."""

    loop: int
    sliced: bool


@dataclass(frozen=True, eq=False)
class Use:
    """One place where a leaf enters the program.

    Attributes:
        source: Slot of the leaf.
        chain: Its way: operations on the leaf alone, linear in it and independent of x, and loops around `op`.
        op: The operation that combines it with something else.
        position: Which operand of `op` it is.
        cut: Slot at which the cotangent is taken. It lies behind `op` when only additions and reshapes follow, so that
            leaves which share a cotangent (a weight and its bias) share the slot.
        back: The reshapes between the result of `op` and `cut`.
        isometric: Whether but for `merge` `chain` moves entries and scales all by the product of `factors`.
        factors: Slots (or literals) of scalars, and whether to divide by them.
        merge: The one matrix product with something else in `chain`, as that of a merged low-rank update, or None.
        route: The one lookup of rows in `chain`, as that of each position's expert, or None.
    """

    source: int
    chain: tuple[Apply | Enter, ...]
    op: Op
    position: int
    cut: int
    back: tuple[Op, ...]
    isometric: bool
    factors: tuple[tuple[Any, bool], ...]
    merge: Apply | None
    route: Apply | None = None

    @property
    def loops(self) -> tuple[Enter, ...]:
        """Loops around `op`, the outermost first, and whether the leaf is sliced along them."""
        return tuple(step for step in self.chain if isinstance(step, Enter))

    def needs(self, *, in_form: bool) -> set[int]:
        """Slots whose values are needed: by `operand` alone where a form is known, or by `gradient`."""
        passed = [step for step in (*self.chain, Apply(self.op, self.position)) if isinstance(step, Apply)]
        others = [
            atom for step in passed if step.op.name not in _SUMS for at, atom in enumerate(step.op.ins) if at != step.at
        ]
        atoms = self._operands if in_form else others
        return {atom for atom in atoms if isinstance(atom, int)}

    @property
    def _operands(self) -> tuple[Any, ...]:
        other = () if self.op.name in AFFINE else (self.op.ins[1 - self.position],)
        return (*other, *(atom for atom, _ in self.factors), *self._met)

    @property
    def _met(self) -> tuple[Any, ...]:
        return tuple(step.op.ins[1 - step.at] for step in (self.merge, self.route) if step is not None)

    def operand(self, program: Program, env: Mapping[int, Any], form: Callable[..., jax.Array]) -> jax.Array:
        """The other operand of `op` in some form, scaled as the leaf is, with the steps of the loops in front.

        `form` takes that operand, and what the leaf is merged with or looked up by if it is.
        """
        other = self.op.ins[1 - self.position]

        def scaled(values: Mapping[int, Any]) -> jax.Array:
            met = [read(values, atom) for atom in self._met]
            if self.op.name in AFFINE:
                return form(None, *met)
            h = jnp.asarray(read(values, other))
            for atom, inverted in self.factors:
                value = jnp.asarray(read(values, atom)).reshape(()).astype(h.dtype)
                h = h * jnp.broadcast_to(1 / value if inverted else value, h.shape)
            return form(h, *met)

        values = {slot: env[slot] for slot in self.needs(in_form=True)}
        return _in_loops(program, self.op.level, scaled, values)

    def cotangent_in(
        self, program: Program, env: Mapping[int, Any], delta: Any, form: Callable[..., jax.Array]
    ) -> jax.Array:
        """A cotangent at `cut` in some form, as `operand` gives its own."""

        def formed(values: Mapping[int, Any]) -> jax.Array:
            met = [read(values, atom) for atom in self._met]
            return form(self.cotangent(program, values[self.cut]), *met)

        met = {atom: env[atom] for atom in self._met if isinstance(atom, int)}
        return _in_loops(program, self.op.level, formed, {**met, self.cut: delta})

    def cotangent(self, program: Program, delta: Any) -> Any:
        """Take the cotangent at `cut` back to the result of `op`, in one step of its loops."""
        if not self.back:
            return delta

        def forward(value: Any) -> Any:
            for op in self.back:
                (value,) = op.evaluate([value])
            return value

        (start,) = self.op.outs
        return jax.linear_transpose(forward, program.avals[start])(delta)[0]

    def gradient(self, program: Program, env: Mapping[int, Any], delta: Any) -> Any:
        """Gradient with respect to the leaf for a cotangent at `cut`, of all steps of its loops."""
        take_back = lambda one: self.cotangent(program, one)  # noqa: E731
        for _ in self.loops:
            take_back = jax.vmap(take_back)
        grad = take_back(delta)

        def walk(leaf: Any, steps: tuple[Apply | Enter, ...], depth: int, values: dict[int, Any]) -> Any:
            for number, step in enumerate(steps):
                if isinstance(step, Enter):
                    here, outside = _split(program, values, depth)
                    rest = steps[number + 1 :]
                    inner = lambda leaf, here, rest=rest, outside=outside: walk(  # noqa: E731
                        leaf, rest, depth + 1, {**outside, **here}
                    )
                    axes = (0 if step.sliced else None, 0)
                    return jax.vmap(inner, in_axes=axes, axis_size=program.lengths[step.loop])(leaf, here)
                if step.op.name in AFFINE:  # only the sign and the broadcast matter
                    leaf = -leaf if step.op.name == "sub" and step.at == 1 else leaf
                    leaf = jnp.broadcast_to(leaf, program.avals[step.op.outs[0]].shape)
                    continue
                if step.op.name == "complex":
                    leaf = lax.complex(*((jnp.zeros_like(leaf), leaf) if step.at else (leaf, jnp.zeros_like(leaf))))
                    continue
                operands = [leaf if at == step.at else read(values, atom) for at, atom in enumerate(step.op.ins)]
                (leaf,) = step.op.evaluate(operands)
            return leaf

        values = {slot: env[slot] for slot in self.needs(in_form=False)}
        way = (*self.chain, Apply(self.op, self.position))
        return jax.linear_transpose(lambda leaf: walk(leaf, way, 0, values), program.avals[self.source])(grad)[0]


def _split(program: Program, values: Mapping[int, Any], depth: int) -> tuple[dict[int, Any], dict[int, Any]]:
    """Values inside the loop at some depth, and outside of it."""
    inside = {slot: value for slot, value in values.items() if len(program.level(slot)) > depth}
    return inside, {slot: value for slot, value in values.items() if slot not in inside}


def _in_loops(
    program: Program, level: tuple[int, ...], function: Callable[[Mapping[int, Any]], Any], values: Mapping[int, Any]
) -> Any:
    """Evaluate a function of the slots of one step in all steps of some loops, which come in front of the result."""

    def nest(depth: int, values: Mapping[int, Any]) -> Any:
        if depth == len(level):
            return function(values)
        here, outside = _split(program, values, depth)
        inner = lambda here: nest(depth + 1, {**outside, **here})  # noqa: E731
        # What no slot of the loop enters is the same in every step.
        return jax.vmap(inner, in_axes=(0 if here else None,), axis_size=program.lengths[level[depth]])(here)

    return nest(0, values)


def follow(program: Program, source: int, *, merging: bool = False, routing: bool = False) -> tuple[Use, ...] | str:
    """Follow a leaf to the operations that consume it.

    Args:
        program: The flat program.
        source: Slot of the leaf.
        merging: Whether to go on through sums and matrix products with what does not depend on x, as in W + A B.
        routing: Whether to go on through lookups of rows, each of which is a matrix.

    Returns:
        The uses, none if the output does not depend on the leaf; or, in words, why there is no rule for it.
    """
    uses: list[Use] = []
    reasons: list[str] = []
    ways: list[tuple[int, tuple[Apply | Enter, ...]]] = [(source, ())]
    while ways:
        slot, steps = ways.pop()
        if len(uses) + len(reasons) + len(ways) > _MOST_USES:
            return f"is used in more than {_MOST_USES} ways"
        if slot == program.output:
            reasons.append("is itself the output")
        for op, at in program.uses.get(slot, ()):
            way = (*steps, *(Enter(loop, False) for loop in op.level[len(program.level(slot)) :] if at >= 0))
            if op.loop is not None:
                slices = [inner for inner, _, place in op.loop.sliced if place == at]
                reasons += [] if slices else [f"is handed on in `{op.name}`, which has no rule"]
                ways += [(inner, (*way, Enter(op.loop.number, True))) for inner in slices]
            elif _is_constant(program, op):
                continue
            elif (
                _is_chain_step(program, op, at)
                or (merging and _is_merge(program, op, at))
                or (routing and at == 0 and op.name == "gather" and len(program.avals[slot].shape) > 2)
            ):
                ways.append((op.outs[0], (*way, Apply(op, at))))
            else:
                reason = _has_no_rule(program, op, at)
                reasons += [reason] if reason else []
                uses += [] if reason else [_use(program, source, way, op, at)]
    if reasons:
        count = len(uses) + len(reasons)
        return reasons[0] if count == 1 else f"is used {count} times, and {reasons[0]}"
    return tuple(uses[::-1])


def _use(program: Program, source: int, chain: tuple[Apply | Enter, ...], op: Op, at: int) -> Use:
    cut, back = _settle(program, op.outs[0])
    isometric, factors, merge, route = _isometry(program, [step for step in chain if isinstance(step, Apply)])
    return Use(source, chain, op, at, cut, back, isometric, factors, merge, route)


def _has_no_rule(program: Program, op: Op, at: int) -> str:
    if at not in LINEAR.get(op.name, ()):
        return f"enters `{op.name}`, which has no rule"
    if op.name == "conv_general_dilated" and op.params["batch_group_count"] != 1:
        return "enters a convolution with batch groups, which has no rule"
    if not jnp.issubdtype(program.avals[op.outs[0]].dtype, jnp.inexact):
        return f"enters `{op.name}` of dtype {program.avals[op.outs[0]].dtype}, which has no rule"
    return ""


def _is_constant(program: Program, op: Op) -> bool:
    """Whether the result has no derivative: comparisons, whole numbers, `stop_gradient`, or no entries."""
    if op.name == "stop_gradient" or all(0 in program.avals[slot].shape for slot in op.outs):
        return True
    return not any(jnp.issubdtype(program.avals[slot].dtype, jnp.inexact) for slot in op.outs)


def _is_chain_step(program: Program, op: Op, at: int) -> bool:
    """Whether the operation is linear in operand `at`, maps the leaf alone and does not depend on x."""
    if op.name in _UNARY:
        return len(op.ins) == 1 and jnp.issubdtype(program.avals[op.outs[0]].dtype, jnp.inexact)
    if op.name in ("mul", "complex") or (op.name == "div" and at == 0):
        other = op.ins[1 - at]
        return not isinstance(other, int) or other not in program.on_x
    return False


def _is_merge(program: Program, op: Op, at: int) -> bool:
    """Whether a sum or matrix product puts the leaf together with something that does not depend on x."""
    if op.name not in AFFINE and op.name != "dot_general":
        return False
    return not program.on_x.intersection(atom for atom in op.ins if isinstance(atom, int))


def _size(program: Program, atom: Any) -> int:
    return math.prod(program.avals[atom].shape if isinstance(atom, int) else jnp.shape(atom.val))


def _isometry(
    program: Program, chain: Iterable[Apply]
) -> tuple[bool, tuple[tuple[Any, bool], ...], Apply | None, Apply | None]:
    """Whether the chain keeps inner products of gradients up to one factor; that factor's scalars, merge and route."""
    factors: list[tuple[Any, bool]] = []
    merge = route = None
    for step in chain:
        op, at = step.op, step.at
        before, after = _size(program, op.ins[at]), _size(program, op.outs[0])
        if op.name == "dot_general" and merge is None:
            merge = step
        elif op.name == "gather" and route is None:
            route = step
        elif op.name == "complex":
            factors += [(Held(1j), False)] if at == 1 else []
        elif op.name in ("mul", "div"):
            other = op.ins[1 - at]
            while isinstance(other, int) and _size(program, other) != 1 and other in program.made_by:
                maker = program.made_by[other]
                if maker.name != "broadcast_in_dim" or len(maker.ins) != 1:
                    break
                other = maker.ins[0]
            if _size(program, other) != 1 or before != after:
                return False, (), None, None
            factors.append((other, op.name == "div"))
        elif op.name == "neg" or (op.name == "sub" and at == 1 and before == after):
            factors.append((Held(-1.0), False))
        elif op.name in ("dot_general", "gather") or (op.name in ("broadcast_in_dim", *AFFINE) and before != after):
            return False, (), None, None
    return True, tuple(factors), merge, route


def _settle(program: Program, slot: int) -> tuple[int, tuple[Op, ...]]:
    """Move the cut from the result of an operation downstream, past additions and reshapes."""
    back: list[Op] = []
    while slot != program.output and len(program.uses.get(slot, ())) == 1:
        op, _ = program.uses[slot][0]
        if op.loop is not None or op.level != program.level(slot):
            break
        here, there = program.avals[slot], program.avals[op.outs[0]]
        same = here.shape == there.shape and here.dtype == there.dtype
        if same and (op.name in ("add", "add_any") or (op.name == "sub" and program.uses[slot][0][1] == 0)):
            pass
        elif op.name in _RESHAPES or (
            op.name == "broadcast_in_dim" and math.prod(here.shape) == math.prod(there.shape)
        ):
            if len(op.ins) != 1:
                break
            back.append(op)
        else:
            break
        (slot,) = op.outs
    return slot, tuple(back)


def before_while(program: Program) -> frozenset[int]:
    """Slots outside of loops on which a `while` depends that reverse mode cannot pass, so they have no cotangents.

    They hold every leaf that acts inside of a scan before it.
    """
    slots: set[int] = set()
    for op in reversed(program.ops):
        if slots.intersection(op.outs) or _irreversible(op):
            slots.update(atom for atom in op.ins if isinstance(atom, int))
    return frozenset(slots)


def _irreversible(op: Op) -> bool:
    """Whether an operation holds a loop that has no reverse mode; a derivative rule of its own may provide one."""
    if not contains(op.eqn, "while"):
        return False
    try:
        vjp_of_equation(op.eqn)
    except Exception:  # JAX says it in several ways
        return True
    return False
