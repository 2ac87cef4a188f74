"""Where a parameter leaf enters a program: the one operation that consumes it, and where its cotangent is read off.

A leaf may first pass through operations that are linear in it and do not depend on x (reshape, transpose, broadcast,
scaling by a constant). The operation behind them is linear in the leaf too when its primitive is one of `LINEAR`; then
the gradient of an output with respect to the leaf is a function of that operation's other operand and of the cotangent
at its result.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lplr_jax.ntk.jaxpr import Op, Program, contains, read
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
_RESHAPES = frozenset({"reshape", "transpose", "squeeze", "expand_dims", "copy", "copy_p", "rev"})
_UNARY = _RESHAPES | {"broadcast_in_dim", "convert_element_type", "slice", "neg"}


@dataclass(frozen=True, eq=False)
class Use:
    """The single place where a leaf enters the program.

    Attributes:
        source: Slot of the leaf.
        chain: Operations on the leaf alone, in order, linear in it and independent of x; each with the leaf's position.
        op: The operation that combines it with something else.
        position: Which operand of `op` it is.
        cut: Slot at which the cotangent is taken. It lies behind `op` when only additions and reshapes follow, so that
            leaves which share a cotangent (a weight and its bias) share the slot.
        back: The reshapes between the result of `op` and `cut`.
        isometric: Whether `chain` only moves entries and scales all of them by the product of `factors`.
    """

    source: int
    chain: tuple[tuple[Op, int], ...]
    op: Op
    position: int
    cut: int
    back: tuple[Op, ...]
    isometric: bool
    factors: tuple[tuple[Any, bool], ...]

    @property
    def steps(self) -> tuple[tuple[Op, int], ...]:
        """The chain and the consuming operation."""
        return (*self.chain, (self.op, self.position))

    def needs(self) -> set[int]:
        """Slots whose values the gradient depends on."""
        others = [atom for op, at in self.steps for place, atom in enumerate(op.ins) if place != at]
        return {atom for atom in others if isinstance(atom, int)}

    def operand(self, env: Mapping[int, Any]) -> Any:
        """The other operand of `op`."""
        return read(env, self.op.ins[1 - self.position])

    def scale(self, env: Mapping[int, Any]) -> Any:
        """Factor by which an isometric chain scales the leaf; None for 1."""
        scale = None
        for atom, inverted in self.factors:
            value = jnp.asarray(read(env, atom)).reshape(())
            value = 1 / value if inverted else value
            scale = value if scale is None else scale * value.astype(scale.dtype)
        return scale

    def cotangent(self, program: Program, delta: Any) -> Any:
        """Take the cotangent at `cut` back to the result of `op`."""
        if not self.back:
            return delta

        def forward(value: Any) -> Any:
            for op in self.back:
                (value,) = op.evaluate([value])
            return value

        (start,) = self.op.outs
        return jax.linear_transpose(forward, program.avals[start])(delta)[0]

    def gradient(self, program: Program, env: Mapping[int, Any], delta: Any) -> Any:
        """Gradient with respect to the leaf for a cotangent at `cut`."""
        delta = self.cotangent(program, delta)
        op, at = self.op, self.position
        affine = op.name in ("add", "add_any", "sub")  # then only the sign and the broadcast matter
        grad = -delta if op.name == "sub" and at == 1 else delta

        def forward(leaf: Any) -> Any:
            for step, place in self.chain if affine else self.steps:
                operands = [leaf if p == place else read(env, atom) for p, atom in enumerate(step.ins)]
                (leaf,) = step.evaluate(operands)
            return jnp.broadcast_to(leaf, grad.shape) if affine else leaf

        return jax.linear_transpose(forward, program.avals[self.source])(grad)[0]


def follow(program: Program, source: int) -> Use | str | None:
    """Follow a leaf to the operation that consumes it.

    Args:
        program: The flat program.
        source: Slot of the leaf.

    Returns:
        The use; or, in words, why there is no rule for the leaf; or None if the output does not depend on it.
    """
    slot = source
    chain: list[tuple[Op, int]] = []
    while True:
        readers = list(program.uses.get(slot, ()))
        if slot == program.output:
            return "is itself the output"
        if not readers:
            return None
        if len(readers) > 1:
            return f"is used {len(readers)} times"
        op, at = readers[0]
        if not _is_chain_step(program, op, at):
            break
        chain.append((op, at))
        (slot,) = op.outs
    if at not in LINEAR.get(op.name, ()):
        return f"enters `{op.name}`, which has no rule"
    if op.name == "conv_general_dilated" and op.params["batch_group_count"] != 1:
        return "enters a convolution with batch groups, which has no rule"
    if not jnp.issubdtype(program.avals[op.outs[0]].dtype, jnp.inexact):
        return f"enters `{op.name}` of dtype {program.avals[op.outs[0]].dtype}, which has no rule"
    cut, back = _settle(program, op.outs[0])
    isometric, factors = _isometry(program, chain)
    return Use(source, tuple(chain), op, at, cut, back, isometric, factors)


def _is_chain_step(program: Program, op: Op, at: int) -> bool:
    """Whether the operation is linear in operand `at`, maps the leaf alone and does not depend on x."""
    if op.name in _UNARY:
        return len(op.ins) == 1 and jnp.issubdtype(program.avals[op.outs[0]].dtype, jnp.floating)
    if op.name == "mul" or (op.name == "div" and at == 0):
        other = op.ins[1 - at]
        return not isinstance(other, int) or other not in program.on_x
    return False


def _size(program: Program, atom: Any) -> int:
    return math.prod(program.avals[atom].shape if isinstance(atom, int) else jnp.shape(atom.val))


def _isometry(program: Program, chain: list[tuple[Op, int]]) -> tuple[bool, tuple[tuple[Any, bool], ...]]:
    """Whether the chain keeps inner products of gradients up to one factor, and the scalars that make up the factor."""
    made_by = {slot: op for op in program.ops for slot in op.outs}
    factors: list[tuple[Any, bool]] = []
    for op, at in chain:
        before, after = _size(program, op.ins[at]), _size(program, op.outs[0])
        if op.name in ("mul", "div"):
            other = op.ins[1 - at]
            while isinstance(other, int) and _size(program, other) != 1 and other in made_by:
                maker = made_by[other]
                if maker.name != "broadcast_in_dim" or len(maker.ins) != 1:
                    break
                other = maker.ins[0]
            if _size(program, other) != 1 or before != after:
                return False, ()
            factors.append((other, op.name == "div"))
        elif op.name == "broadcast_in_dim" and before != after:
            return False, ()
    return True, tuple(factors)


def _settle(program: Program, slot: int) -> tuple[int, tuple[Op, ...]]:
    """Move the cut from the result of an operation downstream, past additions and reshapes."""
    back: list[Op] = []
    while slot != program.output and len(program.uses.get(slot, ())) == 1:
        op, at = program.uses[slot][0]
        here, there = program.avals[slot], program.avals[op.outs[0]]
        same = here.shape == there.shape and here.dtype == there.dtype
        if same and (op.name in ("add", "add_any") or (op.name == "sub" and at == 0)):
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
    """Slots on which a `while` loop depends that reverse mode cannot pass, so they have no cotangents."""
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
