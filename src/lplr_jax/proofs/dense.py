"""A chain of dense layers evaluated in float64 with bounds of its rounding, row by row.

Θ = K Kᵀ with K = [K_1 … K_L] the Jacobian: row (i, o) of K_l is [h, 1] ⊗ δ, h the layer's input for sample i and δ the
derivative of output o by the layer's pre-activations. `evaluate` takes h and δ on the host with NumPy, bounds the
2-norms of their errors row by row, and `DenseNetwork.assembly` forms Θ again from them. That gives two numbers:

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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax.certificates import UNIT, gamma
from lplr_jax.proofs.rounding import (
    IDENTITY,
    INFLATE,
    UNDERFLOW,
    Activation,
    AssemblyBound,
    frobenius_bound,
    row_norms,
    spectral_norm_bound,
)

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
        pre: its pre-activations, (n, m).
        pre_error: bound on the 2-norm of their errors, (n,).
    """

    h: np.ndarray
    delta: np.ndarray
    h_error: np.ndarray
    delta_error: np.ndarray
    bias: bool
    pre: np.ndarray
    pre_error: np.ndarray


@dataclass(frozen=True)
class DenseLayer:
    """A dense layer in float64 and what follows it.

    Attributes:
        weight: (k, m).
        bias: (1, m), None where there is none.
        activation: σ.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    activation: Activation

    @property
    def bend(self) -> float:
        """sup|σ''|, infinite for a relu."""
        return math.inf if self.activation.name == "relu" else self.activation.bend


@dataclass(frozen=True)
class DenseNetwork:
    """A fully connected network at one point, evaluated in float64 on the host.

    Attributes:
        layers: first to last.
        norms: upper bounds of ‖W_l‖₂.
        factors: h and δ of every layer with bounds of their row errors, first to last: Θ is the sum over layers of
            (h hᵀ + 1) ∘ (δ δᵀ), rows of h repeated for each output, the 1 where there is a bias.
        outputs: f̂, (n, c).
        output_error: bounds on ‖f̂_i - f_i‖, for any evaluation in float64 whose sums are taken in any order, (n,).
    """

    layers: tuple[DenseLayer, ...]
    norms: tuple[float, ...]
    factors: tuple[Factor, ...]
    outputs: np.ndarray
    output_error: np.ndarray

    @cached_property
    def factor_error(self) -> float:
        """Bound on ‖K̂ - K‖_F, from the row errors."""
        c, squared = self.outputs.shape[1], 0.0
        for part in self.factors:
            h, delta = np.repeat(np.square(row_norms(part.h)) + part.bias, c), row_norms(part.delta)
            distance = np.sqrt(h) * part.delta_error + np.repeat(part.h_error, c) * (delta + part.delta_error)
            squared += float(np.square(distance * INFLATE).sum()) * INFLATE
        return math.sqrt(squared) * INFLATE

    @cached_property
    def trace_upper(self) -> float:
        """Upper bound of tr Θ = ‖K‖_F², and so of λ_max(Θ), for which no kernel is formed."""
        c, squared = self.outputs.shape[1], 0.0
        for part in self.factors:
            h = np.repeat(np.square(row_norms(part.h)) + part.bias, c)
            squared += float((h * np.square(row_norms(part.delta))).sum()) * INFLATE
        return (math.sqrt(squared) * INFLATE + self.factor_error) ** 2 * INFLATE

    def assembly(self, theta: Any) -> AssemblyBound:
        """Return how far a computed kernel may be from the exact one: (n c, n c) in float64, or what gives its rows."""
        return AssemblyBound(
            assembly_error=_compare(self.factors, self.outputs.shape[1], theta), factor_error=self.factor_error
        )


@dataclass(frozen=True)
class _Values:
    """What a forward sweep gives: inputs of every layer and the outputs, pre-activations, and row errors of both."""

    hidden: list[np.ndarray]
    errors: list[np.ndarray]
    pre: list[np.ndarray]
    pre_errors: list[np.ndarray]
    norms: list[tuple[float, float]]


def evaluate(layers: Sequence[DenseLayer], x: Float[np.ndarray, "n d"]) -> DenseNetwork | None:
    """Evaluate a network and its derivatives; None where a relu is within its error of the kink."""
    values = _forward(layers, x)
    if values is None:
        return None
    factors = _propagate(layers, values, values.hidden[-1].shape[1])
    norms = tuple(spectral for spectral, _ in values.norms)
    return DenseNetwork(tuple(layers), norms, factors, values.hidden[-1], values.errors[-1])


def output_with_error(
    layers: Sequence[DenseLayer], x: Float[np.ndarray, "n d"]
) -> tuple[Float[np.ndarray, "n c"], Float[np.ndarray, " n"]] | None:
    """Return what `evaluate` has as `outputs` and `output_error`, without the derivatives."""
    values = _forward(layers, x)
    return None if values is None else (values.hidden[-1], values.errors[-1])


def _forward(layers: Sequence[DenseLayer], x: np.ndarray) -> _Values | None:
    """Evaluate the network with row errors; None where a relu is within its error of the kink."""
    n = x.shape[0]
    norms = [(spectral_norm_bound(layer.weight), frobenius_bound(layer.weight)) for layer in layers]
    hidden, errors, pre, pre_errors = [x], [np.zeros(n)], [], []
    for layer, (spectral, frobenius) in zip(layers, norms, strict=True):
        weight = layer.weight
        z = hidden[-1] @ weight
        if layer.bias is not None:
            z = z + layer.bias
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


def _propagate(layers: Sequence[DenseLayer], values: _Values, c: int) -> tuple[Factor, ...]:
    """Return the factors of K̂ with their row errors, first layer first."""
    hidden, errors, pre, pre_errors = values.hidden, values.errors, values.pre, values.pre_errors
    n = hidden[0].shape[0]
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
        biased = layer.bias is not None
        rows.append(Factor(hidden[at], delta, errors[at], delta_error, biased, pre[at], pre_errors[at]))
        if at:
            weight, (spectral, frobenius) = layer.weight, values.norms[at]
            rounding = gamma(weight.shape[1]) * frobenius * row_norms(delta)
            delta_error = (delta_error * spectral + rounding) * INFLATE + UNDERFLOW
            delta = delta @ weight.T
    return tuple(reversed(rows))


def _compare(rows: Sequence[Factor], c: int, theta: Any) -> float:
    """Bound ‖Θ - K̂ K̂ᵀ‖₂, by comparing the kernel with the one formed here."""
    rounding, largest = 0.0, 1.0
    for part in rows:
        h = np.repeat(np.square(row_norms(part.h)) + part.bias, c)
        delta = row_norms(part.delta)
        # |Θ̂ - K̂ K̂ᵀ| <= Σ γ |K̂_l||K̂_l|ᵀ entry by entry, in spectral norm at most Σ γ ‖K̂_l‖_F²: two inner products, the 1
        # of the bias, their product, the sum over layers.
        roundings = part.h.shape[1] + part.delta.shape[1] + 2 + len(rows)
        rounding += gamma(roundings) * float((h * np.square(delta)).sum()) * INFLATE
        largest = max(largest, float(h.max()), float(np.square(delta).max()))
    rounding += theta.shape[0] * UNDERFLOW * largest * largest
    return (rounding + _distance(rows, c, theta) * INFLATE) * INFLATE


def _distance(rows: Sequence[Factor], c: int, theta: Any) -> float:
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
