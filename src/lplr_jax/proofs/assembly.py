"""A proved bound on the distance between a computed kernel and the exact kernel of a network.

`assembly_bound` is the entrance for every network. What follows is the bound for a chain of dense layers; a network
that is more than that, convolutional above all, goes to `assembly_conv`.

Θ = K Kᵀ with K = [K_1 … K_L] the Jacobian: row (i, o) of K_l is [h, 1] ⊗ δ, h the layer's input for sample i and δ the
derivative of output o by the layer's pre-activations. This module evaluates h and δ on the host with NumPy, bounds the
2-norms of their errors row by row, and forms Θ again from them. That gives two numbers:

* `factor_error` >= ‖K̂ - K‖₂, where K̂ is the matrix of the computed h and δ, taken exactly;
* `assembly_error` >= ‖Θ_given - K̂ K̂ᵀ‖₂, by comparing the given kernel with the one formed here.

λ_min(Θ) is σ_min(K)² and |σ_min(K̂) - σ_min(K)| <= ‖K̂ - K‖₂ (Weyl), so the errors that the network amplifies reach λ_min
multiplied by 2 √λ_min only, not by 2 √λ_max as a bound on ‖K̂ K̂ᵀ - K Kᵀ‖₂ would have it.

Row bounds, for exact float64 parameters and inputs, u = 2⁻⁵³, γ_k from `certificates.gamma` (inner products of BLAS in
any order, so no summation order is assumed), ‖W‖₂ from `spectral_norm_bound`:

* ẑ = fl(ĥ W + b):       ‖ẑ - z‖ <= ‖ĥ - h‖ ‖W‖₂ + γ_k ‖ĥ‖ ‖W‖_F + u ‖ẑ‖ =: ζ.
* ĥ' = fl(σ(ẑ)):         ‖ĥ' - h'‖ <= ζ + ε ‖ĥ'‖, as |σ'| <= 1; ε the relative error of the activation's formula.
* ĝ = fl(δ̂ Wᵀ):          ‖ĝ - g‖ <= ‖δ̂ - δ‖ ‖W‖₂ + γ_k ‖δ̂‖ ‖W‖_F.
* δ̂' = fl(ĝ ∘ σ'(ẑ)):    ‖δ̂' - δ'‖ <= ‖ĝ - g‖ + max|ĝ| sup|σ''| ζ + ε' ‖ĝ‖ + u ‖δ̂'‖, ε' the absolute error of σ'.
* row of K̂ - K:          <= √(‖ĥ‖² + 1) ‖δ̂ - δ‖ + ‖ĥ - h‖ (‖δ̂‖ + ‖δ̂ - δ‖).

The constants of the activations are derived in `rounding`. Where a relu's pre-activation lies within ζ of zero there is
no bound.
"""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from lplr_jax import parameters
from lplr_jax.certificates import UNIT, gamma
from lplr_jax.ntk import engine
from lplr_jax.ntk.jaxpr import Op, Program, flatten
from lplr_jax.parameters import Parameters, Static, Trainable, is_array
from lplr_jax.proofs.assembly_conv import conv_bound
from lplr_jax.proofs.rounding import (
    ASSUMPTIONS,
    IDENTITY,
    INFLATE,
    UNDERFLOW,
    Activation,
    AssemblyBound,
    frobenius_bound,
    in_float64,
    match_activation,
    row_norms,
    spectral_norm_bound,
)
from lplr_jax.types import ApplyFn, Params

__all__ = [
    "ASSUMPTIONS",
    "AssemblyBound",
    "DenseLayer",
    "Factor",
    "assembly_bound",
    "dense_layers",
    "kernel_factors",
    "spectral_norm_bound",
]

# Entries of the kernel that are formed at a time, so that memory stays small beside it.
_BLOCK_ENTRIES = 2**22


@dataclass(frozen=True)
class Factor:
    """One layer's part of K̂ = [h, 1] ⊗ δ, row by row, with bounds of the 2-norms of the row errors.

    Attributes:
        h: inputs of the layer, (n, k).
        delta: derivatives of the outputs by its pre-activations, (n c, m), sample-major.
        h_error: bound on ‖ĥ - h‖ for each row, (n,).
        delta_error: bound on ‖δ̂ - δ‖ for each row, (n c,).
        bias: whether the layer has a bias, the 1 beside h.
    """

    h: np.ndarray
    delta: np.ndarray
    h_error: np.ndarray
    delta_error: np.ndarray
    bias: bool


@dataclass(frozen=True)
class _Layer:
    """A dense layer: positions of its leaves among the array leaves, and what follows it."""

    weight: int
    bias: int | None
    activation: Activation


def assembly_bound(
    apply_fn: ApplyFn, params: Params, x: Any, theta: Any, *, trainable: Trainable = None
) -> AssemblyBound | None:
    """Bound the distance between a computed kernel and the exact kernel of a network.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: pytree of parameters; the kernel is that of the values of θ in float64.
        x: inputs (n, ...), taken in float64.
        theta: the computed full kernel, (n c, n c), sample-major, in float64; of a `linalg.Blocks` its `matrix()`,
            where layers are dense alone.
        trainable: as for `ntk.empirical_ntk`.

    Returns:
        The bound; None where the program has a step without one (anything but dense and convolutional layers, biases,
        moves and sums of entries, scaling by a constant, sums of branches, softplus, tanh and relu), where a relu is
        within rounding of its kink, or where a number overflows.
    """
    read = _trace(apply_fn, params, x, trainable)
    if read is None:
        return None
    program, leaves, inputs, c = read
    layers = _read_layers(program)
    with np.errstate(all="ignore"):  # a number that overflows gives no bound, below
        if layers is None:
            # That comparison forms a second full kernel, for which a packed one leaves no room.
            bound = conv_bound(program, leaves, inputs, theta) if isinstance(theta, np.ndarray) else None
        else:
            rows = _propagate(layers, leaves, inputs, c)
            bound = None if rows is None else _compare(rows, c, theta)
    if bound is None or not (math.isfinite(bound.assembly_error) and math.isfinite(bound.factor_error)):
        return None
    return bound


def kernel_factors(apply_fn: ApplyFn, params: Params, x: Any, *, trainable: Trainable = None) -> list[Factor] | None:
    """Return h and δ of every layer in float64 with bounds of their row errors, last layer first.

    Θ is the sum over layers of (h hᵀ + 1) ∘ (δ δᵀ), rows of h repeated for each output, the 1 where there is a bias.

    Returns:
        The factors; None where `assembly_bound` has no bound because of the program or a relu.
    """
    read = _read(apply_fn, params, x, trainable)
    return None if read is None else _propagate(*read)


def output_error(apply_fn: ApplyFn, params: Params, x: Any) -> float | None:
    """Bound ‖f̂ - f‖_F of the outputs of all samples, for any evaluation in float64 whose sums are taken in any order.

    Returns:
        The bound; None where the program is not fully connected, or a relu within rounding of its kink.
    """
    read = _read(apply_fn, params, x)
    if read is None:
        return None
    layers, leaves, inputs, _ = read
    values = _forward(layers, leaves, inputs)
    return None if values is None else float(np.linalg.norm(values.errors[-1])) * INFLATE


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer in float64 and what follows it.

    Attributes:
        weight: (k, m).
        biased: whether a bias is added.
        activation: "softplus", "tanh", "relu" or "identity".
        bend: sup|σ''|, infinite for a relu.
    """

    weight: np.ndarray
    biased: bool
    activation: str
    bend: float


def dense_layers(apply_fn: ApplyFn, params: Params, x: Any) -> list[DenseLayer] | None:
    """Return the layers of a fully connected network in order; None where the program has any other step."""
    read = _read(apply_fn, params, x)
    if read is None:
        return None
    layers, leaves, _, _ = read
    return [
        DenseLayer(
            leaves[layer.weight],
            layer.bias is not None,
            layer.activation.name,
            math.inf if layer.activation.name == "relu" else layer.activation.bend,
        )
        for layer in layers
    ]


def _read(
    apply_fn: ApplyFn, params: Params, x: Any, trainable: Trainable = None
) -> tuple[list[_Layer], list[np.ndarray], np.ndarray, int] | None:
    """Return layers, leaves and inputs (n, d) in float64, and c; None where the program is not fully connected."""
    read = _trace(apply_fn, params, x, trainable)
    if read is None:
        return None
    program, leaves, inputs, c = read
    layers = _read_layers(program)
    return None if layers is None else (layers, leaves, inputs, c)


def _trace(
    apply_fn: ApplyFn, params: Params, x: Any, trainable: Trainable = None
) -> tuple[Program, list[np.ndarray], np.ndarray, int] | None:
    """Return the program for one sample, leaves and inputs (n, d) in float64, and c.

    None unless x is one floating array and no array beside θ enters the program.
    """
    if not (is_array(x) and jax.numpy.issubdtype(x.dtype, np.floating)):
        return None
    split = parameters.split(params, trainable)
    with jax.enable_x64(True):
        wide = split.cast(lambda a: np.asarray(a, np.float64) if jax.numpy.issubdtype(a.dtype, np.floating) else a)
        inputs = np.asarray(x, np.float64)
        traced = engine.trace(apply_fn, wide, inputs)
        if _numbers_count(apply_fn, wide, inputs):
            return None
    program = traced.program
    beside = [slot for i, slot in enumerate(program.params) if i not in split.theta]
    if traced.narrow is not None or any(slot in program.uses or slot == program.output for slot in beside):
        return None
    program = replace(program, params=tuple(program.params[i] for i in split.theta))
    return program, wide.values, inputs.reshape(inputs.shape[0], -1), traced.c


def _numbers_count(apply_fn: ApplyFn, wide: Parameters, x: np.ndarray) -> bool:
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
            closed = jax.make_jaxpr(outputs)([np.asarray(number) for number in numbers], list(wide.arrays), x[:1])
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


@dataclass(frozen=True)
class _Values:
    """What a forward sweep gives: inputs of every layer and the outputs, pre-activations, and row errors of both."""

    hidden: list[np.ndarray]
    errors: list[np.ndarray]
    pre: list[np.ndarray]
    pre_errors: list[np.ndarray]
    norms: list[tuple[float, float]]


def _forward(layers: list[_Layer], leaves: list[np.ndarray], x: np.ndarray) -> _Values | None:
    """Evaluate the network with row errors; None where a relu is within its error of the kink."""
    n = x.shape[0]
    weights = [leaves[layer.weight] for layer in layers]
    norms = [(spectral_norm_bound(weight), frobenius_bound(weight)) for weight in weights]
    hidden, errors, pre, pre_errors = [x], [np.zeros(n)], [], []
    for layer, (spectral, frobenius) in zip(layers, norms, strict=True):
        weight = leaves[layer.weight]
        z = hidden[-1] @ weight
        if layer.bias is not None:
            z = z + leaves[layer.bias].reshape(1, -1)
        rounding = gamma(weight.shape[0]) * frobenius * row_norms(hidden[-1]) + UNIT * row_norms(z)
        zeta = (errors[-1] * spectral + rounding) * INFLATE + UNDERFLOW
        if layer.activation.name == "relu" and bool((np.abs(z) <= zeta[:, None]).any()):
            return None
        h = layer.activation.value(z)
        pre.append(z)
        pre_errors.append(zeta)
        hidden.append(h)
        errors.append((zeta + layer.activation.value_error * row_norms(h)) * INFLATE + UNDERFLOW)
    return _Values(hidden, errors, pre, pre_errors, norms)


def _propagate(layers: list[_Layer], leaves: list[np.ndarray], x: np.ndarray, c: int) -> list[Factor] | None:
    """Return the factors of K̂ with their row errors; None where a relu is within its error of the kink."""
    values = _forward(layers, leaves, x)
    if values is None:
        return None
    n, hidden, errors, pre, pre_errors = x.shape[0], values.hidden, values.errors, values.pre, values.pre_errors
    delta = np.tile(np.eye(c), (n, 1))
    delta_error = np.zeros(n * c)
    rows: list[Factor] = []
    for at in reversed(range(len(layers))):
        layer = layers[at]
        # δ so far is by the layer's output; the activation takes it to the pre-activation.
        if layer.activation is not IDENTITY:
            slope = np.repeat(layer.activation.slope(pre[at]), c, axis=0)
            moved = delta * slope
            delta_error = (
                delta_error
                + np.abs(delta).max(axis=1) * layer.activation.bend * np.repeat(pre_errors[at], c)
                + layer.activation.slope_error * row_norms(delta)
                + UNIT * row_norms(moved)
            ) * INFLATE + UNDERFLOW
            delta = moved
        rows.append(Factor(hidden[at], delta, errors[at], delta_error, layer.bias is not None))
        if at:
            weight, (spectral, frobenius) = leaves[layer.weight], values.norms[at]
            rounding = gamma(weight.shape[1]) * frobenius * row_norms(delta)
            delta_error = (delta_error * spectral + rounding) * INFLATE + UNDERFLOW
            delta = delta @ weight.T
    return rows


def _compare(rows: list[Factor], c: int, theta: Any) -> AssemblyBound:
    """Return both errors: of the factors, from their row errors; of the kernel, against the one formed here."""
    squared_distance, rounding, largest = 0.0, 0.0, 1.0
    for part in rows:
        h = np.repeat(np.square(row_norms(part.h)) + part.bias, c)
        delta = row_norms(part.delta)
        distance = np.sqrt(h) * part.delta_error + np.repeat(part.h_error, c) * (delta + part.delta_error)
        squared_distance += float(np.square(distance * INFLATE).sum()) * INFLATE
        # |Θ̂ - K̂ K̂ᵀ| <= Σ γ |K̂_l||K̂_l|ᵀ entry by entry, in spectral norm at most Σ γ ‖K̂_l‖_F²: two inner products, the 1
        # of the bias, their product, the sum over layers.
        roundings = part.h.shape[1] + part.delta.shape[1] + 2 + len(rows)
        rounding += gamma(roundings) * float((h * np.square(delta)).sum()) * INFLATE
        largest = max(largest, float(h.max()), float(np.square(delta).max()))
    rounding += theta.shape[0] * UNDERFLOW * largest * largest
    distance = _distance(rows, c, theta) * INFLATE
    return AssemblyBound(
        assembly_error=(rounding + distance) * INFLATE, factor_error=math.sqrt(squared_distance) * INFLATE
    )


def _distance(rows: list[Factor], c: int, theta: Any) -> float:
    """Return ‖Θ - Θ̂‖_F, forming Θ̂ in blocks of rows."""
    n = rows[0].h.shape[0]
    size = max(1, _BLOCK_ENTRIES // (n * c * c))
    total = 0.0
    for i in range(0, n, size):
        block = slice(i, min(i + size, n))
        wide = slice(block.start * c, block.stop * c)
        formed = np.zeros((wide.stop - wide.start, n * c))
        for part in rows:
            inner = part.h[block] @ part.h.T + float(part.bias)
            if c > 1:
                inner = np.repeat(np.repeat(inner, c, axis=0), c, axis=1)
            formed += inner * (part.delta[wide] @ part.delta.T)
        formed -= theta[wide]
        total += float(np.einsum("ij,ij->", formed, formed))
    return math.sqrt(total) * INFLATE + n * c * UNDERFLOW
