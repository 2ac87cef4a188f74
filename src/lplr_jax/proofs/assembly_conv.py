"""A proved bound on the distance between a computed kernel and the exact one of a feed-forward convolutional network.

As in `assembly`, the bound goes through the Jacobian factor: `factor_error` >= ‖K̂ - K‖₂ and `assembly_error` >=
‖Θ_given - K̂ K̂ᵀ‖₂, where row (i, o) of K̂ holds the derivatives of output o at sample i by all parameters. The program is
walked step by step on the host. A vector stands for all positions and channels of one sample; its error is bounded in
the 2-norm. The steps are

* contractions: convolutions of any stride, padding, dilation and groups, and dense layers at every position: patches,
  then a product with a matrix W (k, m) (`incidence`); s is the number of patches that share an input entry;
* biases, added at every position; sums of two branches; multiplication or division by a constant;
* maps of counts: moves of entries, sums over windows or axes;
* softplus, tanh, relu.

Row bounds, with X the patches of a sample as rows, ‖X̂‖_F <= √s ‖ĥ‖, and ‖A‖₂ <= √s ‖W‖₂ for the contraction A:

* ẑ = fl(X̂ W):            ‖ẑ - z‖ <= √s ‖W‖₂ ‖ĥ - h‖ + γ_k √s ‖ĥ‖ ‖W‖_F; groups take the largest norms.
* ẑ' = fl(ẑ + b):          adds u ‖ẑ'‖.
* ĥ' = fl(σ(ẑ)):           adds ε ‖ĥ'‖, as |σ'| <= 1.
* sum map B, t terms:      ‖B‖₂ times the error, plus γ_{t-1} ‖B‖₂ ‖ĥ‖.
* ĝ = fl(Aᵀ δ̂), q̂ = fl(δ̂ Wᵀ): ‖ĝ - g‖ <= √s (‖W‖₂ ‖δ̂ - δ‖ + γ_m ‖δ̂‖ ‖W‖_F) + γ_{s-1} √s ‖q̂‖.
* δ̂' = fl(ĝ ∘ σ'(ẑ)):     ‖ĝ - g‖ + max|ĝ| sup|σ''| ‖ẑ - z‖ + ε' ‖ĝ‖ + u ‖δ̂'‖.
* row of K̂ - K for W:      Ĝ = fl(X̂ᵀ δ̂) over P positions, ‖Ĝ - G‖_F <= √s ‖ĥ‖ (‖δ̂ - δ‖ + γ_P ‖δ̂‖) + √s ‖ĥ - h‖
  (‖δ̂‖ + ‖δ̂ - δ‖); one position and one group need no sum, so K̂ is then the exact product of ĥ and δ̂.
* row of K̂ - K for b:      the transpose of the map that spreads b over positions, a sum map.

A relu whose pre-activation lies within its error of zero has no bound, unless it is exactly zero because everything it
is made of is: black corners of an image under a zero bias. There the slope is 0, as it is for JAX.

Memory beside the values of every step, n times their size: one matrix of the kernel's size, cotangents of the outputs
at one step (n c rows), and blocks of patches and of K̂ of a fixed size. Products of counts with numbers are exact, so
SciPy's sparse products are sums.
"""

import math
from collections.abc import Iterator

import numpy as np

from lplr_jax.certificates import gamma
from lplr_jax.ntk.jaxpr import Program
from lplr_jax.proofs.assembly_steps import Activate, Bias, Contract, Part, Step, read_steps
from lplr_jax.proofs.incidence import Rows
from lplr_jax.proofs.rounding import INFLATE, UNDERFLOW, AssemblyBound, row_norms

# Entries of the kernel that are formed at a time.
_BLOCK_ENTRIES = 2**22
# Fewest terms of an inner product that are left to BLAS.
_INNER = 32


def conv_bound(program: Program, leaves: list[np.ndarray], x: np.ndarray, theta: np.ndarray) -> AssemblyBound | None:
    """Bound the distance between a computed kernel and the exact one; see `assembly.assembly_bound`.

    Args:
        program: the network for one sample, in float64.
        leaves: the array leaves in float64.
        x: inputs (n, d), flattened.
        theta: the computed kernel, (n c, n c).

    Returns:
        The bound, which is not finite where a number overflows; None where the program has a step without one.
    """
    steps = read_steps(program, leaves)
    if steps is None:
        return None
    values = forward(program, steps, x)
    return None if values is None else compare(backward(program, steps, values), theta)


def forward(program: Program, steps: list[Step], x: np.ndarray) -> dict[int, Rows] | None:
    """Return the value of every slot on the way, (n, d), with row errors; None where a relu may cross its kink."""
    relu = any(isinstance(step, Activate) and step.has_kink for step in steps)
    values = {program.inputs[0]: Rows(x, np.zeros(x.shape[0]), x != 0.0 if relu else None)}
    for step in steps:
        inputs = [values[slot] for slot in step.sources]
        if isinstance(step, Activate) and step.crosses_kink(inputs[0]):
            return None
        values[step.out] = step.forward(*inputs)
    return values


def backward(program: Program, steps: list[Step], values: dict[int, Rows]) -> Iterator[Part]:
    """Yield the parts of K̂, last step first; cotangents are dropped as soon as they have been passed on."""
    out = values[program.output]
    n, c = out.value.shape
    cotangents = {program.output: Rows(np.tile(np.eye(c), (n, 1)), np.zeros(n * c))}
    learned: set[int] = set()
    for step in steps:
        if isinstance(step, Bias | Contract) or learned.intersection(step.sources):
            learned.add(step.out)
    for step in reversed(steps):
        if step.out not in learned or step.out not in cotangents:
            continue
        delta = cotangents.pop(step.out)
        inputs = [values[slot] for slot in step.sources]
        if isinstance(step, Bias | Contract):
            yield step.part(delta, inputs[0])
        for slot in step.sources:
            if slot in learned:
                pulled = step.backward(delta, *inputs)
                cotangents[slot] = cotangents[slot].plus(pulled) if slot in cotangents else pulled


def compare(parts: Iterator[Part], theta: np.ndarray) -> AssemblyBound:
    """Return both errors of a kernel whose factor K̂ is known in parts.

    That of K̂ follows from its row errors; that of the kernel from the one formed here.
    """
    rows = theta.shape[0]
    formed = np.zeros(theta.shape)
    squared_distance, additions, largest = 0.0, 0, 1.0
    inner: list[tuple[int, float]] = []
    for part in parts:
        squared_distance += float(np.square(part.error * INFLATE).sum()) * INFLATE
        if part.product is not None:
            h, delta, _ = part.product
            c = rows // h.shape[0]
            squares = np.square(np.repeat(row_norms(h), c) * row_norms(delta)) * INFLATE
            inner.append((_terms(h) + _terms(delta) + 1, float(squares.sum()) * INFLATE))
            largest = max(largest, float(np.square(row_norms(h)).max()), float(np.square(row_norms(delta)).max()))
            wide = np.repeat(h, c, axis=0)
            for block in _row_blocks(rows):
                formed[block] += _gram(wide, block) * _gram(delta, block)
            additions += 1
        for _, columns in part.blocks():
            squares = np.square(row_norms(columns))
            inner.append((_terms(columns), float(squares.sum()) * INFLATE))
            largest = max(largest, float(squares.max()))
            for block in _row_blocks(rows):
                formed[block] += _gram(columns, block)
            additions += 1
    # |Θ̂ - K̂ K̂ᵀ| <= Σ γ |K̂_l||K̂_l|ᵀ entry by entry, in spectral norm at most Σ γ ‖K̂_l‖_F²: the inner products of a
    # piece, the sum over pieces of a block, and the sum over blocks.
    rounding = sum(gamma(terms + additions) * square for terms, square in inner) * INFLATE
    rounding += rows * UNDERFLOW * largest * largest
    formed -= theta
    distance = math.sqrt(float(np.einsum("ij,ij->", formed, formed))) * INFLATE + rows * UNDERFLOW
    return AssemblyBound(
        assembly_error=(rounding + distance * INFLATE) * INFLATE, factor_error=math.sqrt(squared_distance) * INFLATE
    )


def _row_blocks(rows: int) -> Iterator[slice]:
    size = max(1, _BLOCK_ENTRIES // rows)
    return (slice(i, min(i + size, rows)) for i in range(0, rows, size))


def _piece(x: np.ndarray) -> int:
    """Return the terms of a piece of the inner products of rows: as many as pieces, so that few roundings meet."""
    return max(_INNER, math.isqrt(x.shape[1]))


def _gram(x: np.ndarray, block: slice) -> np.ndarray:
    """Return rows of x xᵀ, summed over pieces of the inner products."""
    total = np.zeros((block.stop - block.start, x.shape[0]))
    for start in range(0, x.shape[1], _piece(x)):
        piece = x[:, start : start + _piece(x)]
        total += piece[block] @ piece.T
    return total


def _terms(x: np.ndarray) -> int:
    """Return how many roundings an entry of `_gram` passes through."""
    return _piece(x) + -(-x.shape[1] // _piece(x))
