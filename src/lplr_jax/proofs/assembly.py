"""A proved bound on the distance between a computed kernel and the exact kernel of a network.

`bound_or_reason` is the entrance for every network. A chain of dense layers is evaluated by `dense`; feed-forward
convolutional networks go to `assembly_conv`, which both bound float64's own rounding at the cost of a kernel; any other
network goes to `jacobian`, which evaluates its derivative with more digits. This module reads programs.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import jax
import numpy as np
from jaxtyping import Float

from lplr_jax import checks, parameters
from lplr_jax.ntk import engine
from lplr_jax.ntk.jaxpr import Op, Program, flatten
from lplr_jax.parameters import Parameters, Static, Trainable, is_array
from lplr_jax.proofs.assembly_conv import conv_bound
from lplr_jax.proofs.dense import DenseLayer, DenseNetwork, evaluate
from lplr_jax.proofs.fixed import UndecidedError
from lplr_jax.proofs.jacobian import MOST_WORK, enclosed_bound
from lplr_jax.proofs.rounding import (
    ASSUMPTIONS,
    IDENTITY,
    Activation,
    AssemblyBound,
    in_float64,
    match_activation,
    spectral_norm_bound,
)
from lplr_jax.types import ApplyFn, Params

__all__ = [
    "ASSUMPTIONS",
    "AssemblyBound",
    "Proof",
    "assembly_bound",
    "bound_or_reason",
    "check_proof",
    "dense_layers",
    "dense_network",
    "spectral_norm_bound",
]


@dataclass(frozen=True)
class _Layer:
    """A dense layer: positions of its leaves among the array leaves, and what follows it."""

    weight: int
    bias: int | None
    activation: Activation

    def of(self, leaves: Sequence[np.ndarray]) -> DenseLayer:
        bias = None if self.bias is None else leaves[self.bias].reshape(1, -1)
        return DenseLayer(leaves[self.weight], bias, self.activation)


Proof = Literal["auto", "always", "never"]
"""Whether a bound that takes work of its own is made: where that is about a minute at most, in any case, in none."""


def check_proof(proof: Any) -> Proof:
    """Return a value of `Proof`.

    Raises:
        ValueError: for any other.
    """
    found: Any = checks.one_of("proof", proof, get_args(Proof))
    return found


def assembly_bound(
    apply_fn: ApplyFn, params: Params, x: Any, theta: Any, *, trainable: Trainable = None, proof: Proof = "auto"
) -> AssemblyBound | None:
    """Bound the distance between a computed kernel and the exact one; None for no bound. See `bound_or_reason`."""
    return bound_or_reason(apply_fn, params, x, theta, trainable=trainable, proof=proof)[0]


def bound_or_reason(
    apply_fn: ApplyFn, params: Params, x: Any, theta: Any, *, trainable: Trainable = None, proof: Proof = "auto"
) -> tuple[AssemblyBound | None, str]:
    """Bound the distance between a computed kernel and the exact kernel of a network, or say why there is no bound.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: pytree of parameters; the kernel is that of the values of θ in float64.
        x: inputs (n, ...), floats taken in float64.
        theta: the computed full kernel, (n c, n c), sample-major, in float64; of a `linalg.Blocks` its `matrix()`,
            where layers are dense alone.
        trainable: as for `ntk.empirical_ntk`.
        proof: "never" leaves it at networks of dense and convolutional layers, biases, moves and sums of entries,
            scaling by a constant, sums of branches, softplus, tanh and relu; "auto" encloses the Jacobian of any other
            where that is about a minute of two cores at most; "always" whatever it takes.

    Returns:
        The bound and "", or None and a reason: a relu within rounding of its kink, a step that has no rule, a number
        that overflows, more work or memory than there is.
    """
    read = _trace(apply_fn, params, x, trainable)
    bound = None
    if read is not None:
        program, leaves, inputs, _ = read
        layers = _read_layers(program)
        with np.errstate(all="ignore"):  # a number that overflows gives no bound, below
            if layers is None:
                # That comparison forms a second full kernel, for which a packed one leaves no room.
                bound = conv_bound(program, leaves, inputs, theta) if isinstance(theta, np.ndarray) else None
            else:
                network = evaluate([layer.of(leaves) for layer in layers], inputs)
                bound = None if network is None else network.assembly(theta)
    if bound is not None and bound.finite:
        return bound, ""
    if proof == "never":
        return None, 'its layers are not only dense and convolutional, and proof="never"'
    if not isinstance(theta, np.ndarray):
        return None, 'none can be formed beside a packed kernel (storage="full" may have it)'
    try:
        with jax.enable_x64(True), np.errstate(all="ignore"):
            split = parameters.split(params, trainable)
            wide, inputs = split.cast(_in_float64), jax.tree.map(_in_float64, x)
            if engine.trace(apply_fn, wide, inputs).narrow is not None:
                return None, "the function rounds inside"
            if _numbers_count(apply_fn, wide, inputs):
                return None, "whole numbers among the parameters enter the outputs"
            limit = MOST_WORK if proof == "auto" else math.inf
            return enclosed_bound(apply_fn, wide, inputs, theta, most_work=limit), ""
    except UndecidedError as error:
        return None, str(error)


def _in_float64(a: Any) -> Any:
    return np.asarray(a, np.float64) if jax.numpy.issubdtype(jax.numpy.result_type(a), jax.numpy.floating) else a


def dense_network(apply_fn: ApplyFn, params: Params, x: Any, *, trainable: Trainable = None) -> DenseNetwork | None:
    """Evaluate a fully connected network in float64 with bounds of its rounding.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: pytree of parameters.
        x: inputs (n, ...), taken in float64.
        trainable: as for `ntk.empirical_ntk`.

    Returns:
        The network; None where the program has any step beside dense layers with or without bias, softplus, tanh and
        relu, or where a relu is within rounding of its kink.
    """
    found = dense_layers(apply_fn, params, x, trainable=trainable)
    with np.errstate(all="ignore"):
        return None if found is None else evaluate(*found)


def dense_layers(
    apply_fn: ApplyFn, params: Params, x: Any, *, trainable: Trainable = None
) -> tuple[list[DenseLayer], Float[np.ndarray, "n d"]] | None:
    """Return the layers of a fully connected network in order, and its inputs; None where there is any other step."""
    read = _trace(apply_fn, params, x, trainable)
    if read is None:
        return None
    program, leaves, inputs, _ = read
    layers = _read_layers(program)
    return None if layers is None else ([layer.of(leaves) for layer in layers], inputs)


def _trace(
    apply_fn: ApplyFn, params: Params, x: Any, trainable: Trainable = None
) -> tuple[Program, list[np.ndarray], np.ndarray, int] | None:
    """Return the program for one sample, leaves and inputs (n, d) in float64, and c.

    None unless x is one floating array and no array beside θ enters the program, nor any without entries.
    """
    if not (is_array(x) and jax.numpy.issubdtype(x.dtype, np.floating)):
        return None
    split = parameters.split(params, trainable)
    with jax.enable_x64(True):
        wide = split.cast(_in_float64)
        inputs = np.asarray(x, np.float64)
        traced = engine.trace(apply_fn, wide, inputs)
        if _numbers_count(apply_fn, wide, inputs):
            return None
    program = traced.program
    if any(0 in aval.shape for aval in program.avals):
        return None
    beside = [slot for i, slot in enumerate(program.params) if i not in split.theta]
    if traced.narrow is not None or any(slot in program.uses or slot == program.output for slot in beside):
        return None
    program = replace(program, params=tuple(program.params[i] for i in split.theta))
    return program, wide.values, inputs.reshape(inputs.shape[0], -1), traced.c


def _numbers_count(apply_fn: ApplyFn, wide: Parameters, x: Any) -> bool:
    """Return whether integers that the tree carries along enter the outputs as numbers."""
    held = [leaf is not None and isinstance(leaf.value, int) for leaf in wide.static]
    if not any(held):
        return False
    numbers = [leaf.value for leaf, is_number in zip(wide.static, held, strict=True) if leaf and is_number]

    def outputs(values: list[Any], arrays: list[Any], x: Any) -> Any:
        left = iter(values)
        static = [Static(next(left)) if is_number else leaf for leaf, is_number in zip(wide.static, held, strict=True)]
        return apply_fn(replace(wide, static=tuple(static)).join(arrays), x)

    try:
        # An array does not promote as weakly as the number that it stands for.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            closed = jax.make_jaxpr(outputs)(
                [np.asarray(number) for number in numbers], list(wide.arrays), jax.tree.map(lambda a: a[:1], x)
            )
    except Exception:  # used as a size or in a branch: a setting of the program
        return False
    program = flatten(closed, len(numbers))
    return any(slot in program.uses for slot in program.params)


def _read_layers(program: Program) -> list[_Layer] | None:
    """Return the dense layers of the program in order, or None if it does anything else."""
    if len(program.inputs) != 1 or program.consts or not in_float64(program):
        return None
    place = {slot: i for i, slot in enumerate(program.params) if len(program.uses.get(slot, ())) == 1}
    now = program.inputs[0]
    layers: list[_Layer] = []
    open_for_bias = False
    for op in program.ops:
        first = op.ins[0]
        width = program.avals[now].shape[-1:] if isinstance(now, int) else ()
        if op.name in ("reshape", "broadcast_in_dim", "squeeze") and _keeps_entries(program, op):
            if first in place:
                place[op.outs[0]] = place.pop(first)
                continue
            if first == now:
                (now,) = op.outs
                continue
        if op.name == "dot_general" and _is_dense(program, op, now) and op.ins[1] in place:
            layers.append(_Layer(place.pop(op.ins[1]), None, IDENTITY))
            open_for_bias = True
        elif op.name == "add" and open_for_bias and _bias_of(program, op, now) in place:
            layers[-1] = _Layer(layers[-1].weight, place.pop(_bias_of(program, op, now)), IDENTITY)
            open_for_bias = False
        elif layers and layers[-1].activation is IDENTITY and first == now and width:
            activation = match_activation(op, program)
            if activation is None:
                return None
            layers[-1] = _Layer(layers[-1].weight, layers[-1].bias, activation)
            open_for_bias = False
        else:
            return None
        (now,) = op.outs
    return layers if layers and program.output == now else None


def _keeps_entries(program: Program, op: Op) -> bool:
    if len(op.ins) != 1 or not isinstance(op.ins[0], int):
        return False
    before, after = program.avals[op.ins[0]].shape, program.avals[op.outs[0]].shape
    permutes = op.name == "reshape" and op.params["dimensions"] is not None
    return math.prod(before) == math.prod(after) and not permutes


def _is_dense(program: Program, op: Op, now: int) -> bool:
    weight = op.ins[1]
    shape = program.avals[now].shape
    return (
        op.ins[0] == now
        and weight in program.params
        and len(shape) == 2
        and shape[0] == 1
        and len(program.avals[weight].shape) == 2
        and op.params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    )


def _bias_of(program: Program, op: Op, now: int) -> int:
    """Return the slot that is added to `now`, or -1."""
    others = [atom for atom in op.ins if atom != now]
    if len(others) != 1 or not isinstance(others[0], int):
        return -1
    return others[0] if program.avals[others[0]].shape == program.avals[now].shape else -1
