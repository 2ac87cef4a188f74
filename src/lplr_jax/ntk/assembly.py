"""A proved bound on the distance between a computed kernel and the exact kernel of a fully connected network.

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

The constants of the activations follow from 4 ulp (8 u) for exp, log1p and tanh.

* softplus = max(z, 0) + log1p(exp(-|z|)): both terms are non-negative and log1p has condition at most 1, so the value
  has 8 u + 8 u + u < 20 u relative; the slope, 1 / (1 + e) or e / (1 + e), has 8 u + 5 u + u < 20 u.
* tanh: 8 u relative; the slope 1 - t² loses 2 · 8 u + 3 u < 20 u absolute.
* relu is exact, and so is its slope unless a pre-activation lies within ζ of zero; then there is no bound.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lplr_jax import certificates, linalg
from lplr_jax.certificates import TINY, UNIT, gamma
from lplr_jax.models import ApplyFn, Params
from lplr_jax.ntk import engine
from lplr_jax.ntk.jaxpr import Op, Program, flatten

ASSUMPTIONS = (
    "exp, log1p and tanh of NumPy are within 4 units in the last place",
    "the network is the one read off its program: dense layers with softplus, tanh, relu or identity between them",
)

# Norms and sums here have at most 2³² non-negative terms, added in any order: 2³² u < 1e-6.
_INFLATE = 1.0 + 1e-6
# What underflow may take from a row: 2³⁰ operations lose η each, and squares below η spoil a norm by √(2³⁰ η).
_UNDERFLOW = 2.0**20 * math.sqrt(TINY)
# Entries of the kernel that are formed at a time, so that memory stays small beside it.
_BLOCK_ENTRIES = 2**22


@dataclass(frozen=True)
class AssemblyBound:
    """How far a kernel matrix may be from the exact one; `linalg.min_eig` takes the fields by the same names.

    Attributes:
        assembly_error: bound on ‖Θ - K̂ K̂ᵀ‖₂, in the kernel's units.
        factor_error: bound on ‖K̂ - K‖₂, in the square root of the kernel's units.
        assumptions: what the bound takes for granted.
    """

    assembly_error: float
    factor_error: float
    assumptions: tuple[str, ...] = ASSUMPTIONS


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
class _Activation:
    """Value and derivative with relative error `value_error` and absolute error `slope_error`; sup|σ''| = `bend`."""

    name: str
    reference: Callable[[Any], Any]
    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]
    bend: float
    value_error: float
    slope_error: float


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))


def _logistic(z: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0.0, 1.0, e) / (1.0 + e)


_IDENTITY = _Activation("identity", lambda z: z, lambda z: z, np.ones_like, 0.0, 0.0, 0.0)
_ACTIVATIONS = (
    _Activation("softplus", jax.nn.softplus, _softplus, _logistic, 0.25, 20 * UNIT, 20 * UNIT),
    # sup|tanh''| = 4 / (3 √3) = 0.7698
    _Activation("tanh", jax.numpy.tanh, np.tanh, lambda z: 1.0 - np.square(np.tanh(z)), 0.77, 8 * UNIT, 20 * UNIT),
    _Activation(
        "relu", jax.nn.relu, lambda z: np.maximum(z, 0.0), lambda z: (z > 0.0).astype(np.float64), 0.0, 0.0, 0.0
    ),
)


@dataclass(frozen=True)
class _Layer:
    """A dense layer: positions of its leaves among the array leaves, and what follows it."""

    weight: int
    bias: int | None
    activation: _Activation


def assembly_bound(
    apply_fn: ApplyFn, params: Params, x: Any, theta: Float[np.ndarray, "nc nc"]
) -> AssemblyBound | None:
    """Bound the distance between a computed kernel and the exact kernel of a fully connected network.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: pytree of arrays; the kernel is that of their values in float64.
        x: inputs (n, ...), taken in float64.
        theta: the computed full kernel, (n c, n c), sample-major, in float64.

    Returns:
        The bound; None where the program has a step without one (anything but dense layers, biases, softplus, tanh and
        relu), where a relu is within rounding of its kink, or where a number overflows.
    """
    with np.errstate(all="ignore"):  # a number that overflows gives no bound, below
        rows = kernel_factors(apply_fn, params, x)
        if rows is None:
            return None
        bound = _compare(rows, rows[0].delta.shape[0] // rows[0].h.shape[0], theta)
    return bound if math.isfinite(bound.assembly_error) and math.isfinite(bound.factor_error) else None


def kernel_factors(apply_fn: ApplyFn, params: Params, x: Any) -> list[Factor] | None:
    """Return h and δ of every layer in float64 with bounds of their row errors, last layer first.

    Θ is the sum over layers of (h hᵀ + 1) ∘ (δ δᵀ), rows of h repeated for each output, the 1 where there is a bias.

    Returns:
        The factors; None where `assembly_bound` has no bound because of the program or a relu.
    """
    read = _read(apply_fn, params, x)
    return None if read is None else _propagate(*read)


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


def _read(apply_fn: ApplyFn, params: Params, x: Any) -> tuple[list[_Layer], list[np.ndarray], np.ndarray, int] | None:
    """Return layers, leaves and inputs (n, d) in float64, and c; None where the program is not fully connected."""
    if not all(_is_floating(leaf) for leaf in (x, *jax.tree.leaves(params))):
        return None
    with jax.enable_x64(True):
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(params)]
        wide = jax.tree.unflatten(jax.tree.structure(params), leaves)
        inputs = np.asarray(x, np.float64)
        traced = engine.trace(apply_fn, wide, inputs)
        layers = _read_layers(traced.program)
    return None if layers is None else (layers, leaves, inputs.reshape(inputs.shape[0], -1), traced.c)


def _is_floating(leaf: Any) -> bool:
    return hasattr(leaf, "shape") and jax.numpy.issubdtype(leaf.dtype, np.floating)


def _read_layers(program: Program) -> list[_Layer] | None:
    """Return the dense layers of the program in order, or None if it does anything else."""
    if len(program.inputs) != 1 or program.consts:
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
            layers.append(_Layer(place.pop(op.ins[1]), None, _IDENTITY))
            open_for_bias = True
        elif op.name == "add" and open_for_bias and _bias_of(program, op, now) in place:
            layers[-1] = _Layer(layers[-1].weight, place.pop(_bias_of(program, op, now)), _IDENTITY)
            open_for_bias = False
        elif layers and layers[-1].activation is _IDENTITY and first == now and width:
            activation = _match(op, program)
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


def _signature(op: Op) -> tuple[Any, ...]:
    """Return what an operation does: its name, its printed settings, its literal operands."""
    settings = {key: str(value) for key, value in op.params.items() if not callable(value)}
    literals = tuple(None if isinstance(atom, int) else float(atom.val) for atom in op.ins)
    return op.name, tuple(sorted(settings.items())), literals


def _match(op: Op, program: Program) -> _Activation | None:
    spec = program.avals[op.outs[0]]
    for activation in _ACTIVATIONS:
        reference = flatten(jax.make_jaxpr(activation.reference)(spec), 0)
        if len(reference.ops) == 1 and _signature(reference.ops[0]) == _signature(op):
            return activation
    return None


def _norms(a: np.ndarray) -> np.ndarray:
    """Return upper bounds of the 2-norms of rows, shape (n,)."""
    return np.sqrt(np.einsum("ij,ij->i", a, a)) * _INFLATE + _UNDERFLOW


def spectral_norm_bound(w: Float[np.ndarray, "k m"]) -> float:
    """Return an upper bound of ‖W‖₂, from λ_max of the smaller Gram matrix by a Cholesky test, or else ‖W‖_F.

    The Gram matrix is formed with error at most γ_k ‖W‖_F² in spectral norm.
    """
    small = w if w.shape[0] <= w.shape[1] else w.T
    gram = small @ small.T
    frobenius = float(np.einsum("ij,ij->", w, w)) * _INFLATE + _UNDERFLOW
    limit = frobenius
    if math.isfinite(frobenius) and 2.0**-300 < frobenius < 2.0**300:
        # An estimate with one per cent to spare; the test decides whether it is a bound.
        shift = 1.01 * linalg.spectral_norm(0.5 * (gram + gram.T))
        # One triangle is read; it differs from the exact product by no more than γ_k ‖W‖_F².
        if shift < frobenius and certificates.cholesky_test(-gram, -shift, np.empty(gram.shape, order="F")):
            limit = shift
    return math.sqrt(limit + 2.0 * gamma(small.shape[1]) * frobenius) * _INFLATE


def _propagate(layers: list[_Layer], leaves: list[np.ndarray], x: np.ndarray, c: int) -> list[Factor] | None:
    """Return the factors of K̂ with their row errors; None where a relu is within its error of the kink."""
    n = x.shape[0]
    weights = [leaves[layer.weight] for layer in layers]
    norms = [(spectral_norm_bound(weight), _frobenius(weight)) for weight in weights]
    hidden, errors, pre, pre_errors = [x], [np.zeros(n)], [], []
    for layer, (spectral, frobenius) in zip(layers, norms, strict=True):
        weight = leaves[layer.weight]
        z = hidden[-1] @ weight
        if layer.bias is not None:
            z = z + leaves[layer.bias].reshape(1, -1)
        rounding = gamma(weight.shape[0]) * frobenius * _norms(hidden[-1]) + UNIT * _norms(z)
        zeta = (errors[-1] * spectral + rounding) * _INFLATE + _UNDERFLOW
        if layer.activation.name == "relu" and bool((np.abs(z) <= zeta[:, None]).any()):
            return None
        h = layer.activation.value(z)
        pre.append(z)
        pre_errors.append(zeta)
        hidden.append(h)
        errors.append((zeta + layer.activation.value_error * _norms(h)) * _INFLATE + _UNDERFLOW)
    delta = np.tile(np.eye(c), (n, 1))
    delta_error = np.zeros(n * c)
    rows: list[Factor] = []
    for at in reversed(range(len(layers))):
        layer = layers[at]
        # δ so far is by the layer's output; the activation takes it to the pre-activation.
        if layer.activation is not _IDENTITY:
            slope = np.repeat(layer.activation.slope(pre[at]), c, axis=0)
            moved = delta * slope
            delta_error = (
                delta_error
                + np.abs(delta).max(axis=1) * layer.activation.bend * np.repeat(pre_errors[at], c)
                + layer.activation.slope_error * _norms(delta)
                + UNIT * _norms(moved)
            ) * _INFLATE + _UNDERFLOW
            delta = moved
        rows.append(Factor(hidden[at], delta, errors[at], delta_error, layer.bias is not None))
        if at:
            weight, (spectral, frobenius) = leaves[layer.weight], norms[at]
            rounding = gamma(weight.shape[1]) * frobenius * _norms(delta)
            delta_error = (delta_error * spectral + rounding) * _INFLATE + _UNDERFLOW
            delta = delta @ weight.T
    return rows


def _frobenius(w: np.ndarray) -> float:
    return float(np.linalg.norm(w)) * _INFLATE + _UNDERFLOW


def _compare(rows: list[Factor], c: int, theta: np.ndarray) -> AssemblyBound:
    """Return both errors: of the factors, from their row errors; of the kernel, against the one formed here."""
    squared_distance, rounding, largest = 0.0, 0.0, 1.0
    for part in rows:
        h = np.repeat(np.square(_norms(part.h)) + part.bias, c)
        delta = _norms(part.delta)
        distance = np.sqrt(h) * part.delta_error + np.repeat(part.h_error, c) * (delta + part.delta_error)
        squared_distance += float(np.square(distance * _INFLATE).sum()) * _INFLATE
        # |Θ̂ - K̂ K̂ᵀ| <= Σ γ |K̂_l||K̂_l|ᵀ entry by entry, in spectral norm at most Σ γ ‖K̂_l‖_F²: two inner products, the 1
        # of the bias, their product, the sum over layers.
        roundings = part.h.shape[1] + part.delta.shape[1] + 2 + len(rows)
        rounding += gamma(roundings) * float((h * np.square(delta)).sum()) * _INFLATE
        largest = max(largest, float(h.max()), float(np.square(delta).max()))
    rounding += theta.shape[0] * _UNDERFLOW * largest**2
    distance = _distance(rows, c, theta) * _INFLATE
    return AssemblyBound(
        assembly_error=(rounding + distance) * _INFLATE, factor_error=math.sqrt(squared_distance) * _INFLATE
    )


def _distance(rows: list[Factor], c: int, theta: np.ndarray) -> float:
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
    return math.sqrt(total) * _INFLATE + n * c * _UNDERFLOW
