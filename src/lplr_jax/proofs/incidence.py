"""Linear maps whose matrix entries are counts: moves of entries, sums over windows, the patches of a convolution.

A convolution is such a map and then one matrix product: the patches (im2col), one for each output position, times the
kernel as a matrix (k, m), where k runs over input channels of a group and kernel positions.

For a non-negative matrix A, ‖A‖₂ <= √(‖A‖₁ ‖A‖_∞) (Schur), the largest column sum by the largest row sum. Each entry of
a patch is one input entry or padding, so the rows of the patch map sum to at most 1 and ‖patches‖₂ <= √s, s the largest
number of patches in which an input entry appears. Hence ‖convolution‖₂ <= √s max_g ‖W_g‖₂ over the groups g.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

from lplr_jax.certificates import UNIT, gamma
from lplr_jax.proofs.rounding import INFLATE, UNDERFLOW, row_norms


@dataclass(frozen=True)
class Rows:
    """Computed vectors as rows, with bounds of their errors.

    Attributes:
        value: (n, d).
        error: bound on the 2-norm of each row's error, (n,).
        live: entries that are not known to be exact zeros, (n, d); None where nobody asks.
    """

    value: np.ndarray
    error: np.ndarray
    live: np.ndarray | None = None

    @cached_property
    def norms(self) -> np.ndarray:
        """Upper bounds of the 2-norms of the computed rows, (n,)."""
        return row_norms(self.value)

    def plus(self, other: "Rows") -> "Rows":
        """Return the rounded sum."""
        total = self.value + other.value
        live = None if self.live is None or other.live is None else self.live | other.live
        return Rows(total, (self.error + other.error + UNIT * row_norms(total)) * INFLATE + UNDERFLOW, live)


class Incidence:
    """The map out_i = Σ_t in_{index[i, t]}, and its transpose; an index of -1 is a zero.

    Attributes:
        fan_in: most inputs of an output.
        fan_out: most outputs of an input.
        norm: upper bound of the spectral norm.
    """

    def __init__(self, index: Int[np.ndarray, "i t"], inputs: int):
        present = index >= 0
        outputs = np.nonzero(present)[0]
        ones = np.ones(outputs.shape[0])
        self._matrix = sparse.csr_array((ones, (outputs, index[present])), shape=(index.shape[0], inputs))
        self._transpose = sparse.csr_array(self._matrix.T)
        self.fan_in = int(np.max(self._matrix.sum(axis=1), initial=0.0))
        self.fan_out = int(np.max(self._transpose.sum(axis=1), initial=0.0))
        self.norm = math.sqrt(self.fan_in * self.fan_out) * INFLATE

    def values(self, x: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n i"]:
        """Return the map of each row, rounded where entries are added."""
        return _product(self._matrix, self.fan_in, x)

    def transposed_values(self, x: Float[np.ndarray, "n i"]) -> Float[np.ndarray, "n d"]:
        """Return the transposed map of each row, rounded where entries are added."""
        return _product(self._transpose, self.fan_out, x)

    def reaches(self, live: Bool[np.ndarray, "n d"]) -> Bool[np.ndarray, "n i"]:
        """Return the outputs that have an input among the live ones."""
        return _product(self._matrix, self.fan_in, live.astype(np.float64)) > 0.0

    def apply(self, x: Rows) -> Rows:
        """Return the map of each row with its error."""
        live = None if x.live is None else self.reaches(x.live)
        return replace(self._moved(self.values(x.value), x, self.fan_in), live=live)

    def pull(self, x: Rows) -> Rows:
        """Return the transposed map of each row with its error."""
        return self._moved(self.transposed_values(x.value), x, self.fan_out)

    def _moved(self, value: np.ndarray, x: Rows, fan: int) -> Rows:
        # Entry by entry |error| <= γ Σ|x|, a map of the same norm; a single term is exact.
        rounding = gamma(fan - 1) * x.norms + UNDERFLOW if fan > 1 else 0.0
        return Rows(value, (x.error + rounding) * self.norm * INFLATE)


def _product(matrix: Any, fan: int, x: np.ndarray) -> np.ndarray:
    if fan > 1:
        return np.ascontiguousarray((matrix @ x.T).T)
    if matrix.nnz == matrix.shape[0]:
        same = matrix.shape[0] == matrix.shape[1] and bool((matrix.indices == np.arange(matrix.shape[1])).all())
        return x if same else x[:, matrix.indices]
    moved = np.zeros((x.shape[0], matrix.shape[0]))
    moved[:, np.flatnonzero(np.diff(matrix.indptr))] = x[:, matrix.indices]
    return moved


def windows(
    shape: Sequence[int],
    window: Sequence[int],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    base_dilation: Sequence[int],
    window_dilation: Sequence[int],
) -> tuple[Int[np.ndarray, "o w"], tuple[int, ...]]:
    """Return the flat index of each entry of each window of an array, -1 in padding and holes, and the output shape."""
    total = np.zeros((1, 1), np.int64)
    sizes: list[int] = []
    for size, width, stride, (low, high), base, spread in zip(
        shape, window, strides, padding, base_dilation, window_dilation, strict=True
    ):
        dilated = (size - 1) * base + 1
        count = (dilated + low + high - (width - 1) * spread - 1) // stride + 1
        at = stride * np.arange(count)[:, None] + spread * np.arange(width)[None, :] - low
        axis = np.where((at >= 0) & (at < dilated) & (at % base == 0), at // base, -1)
        left, right = total[:, None, :, None], axis[None, :, None, :]
        total = np.where((left >= 0) & (right >= 0), left * size + right, -1)
        total = total.reshape(total.shape[0] * count, -1)
        sizes.append(count)
    return total, tuple(sizes)


@dataclass(frozen=True)
class Contraction:
    """A product of patches with a matrix: out = (patches W for each group), its entries moved.

    Attributes:
        patches: map from the flat input to patches (g, positions, k).
        weight: flat index in the weight array of each entry of W, (g, k, m).
        positions: patches of one group.
        order: map from (g, positions, m) to the flat output.
    """

    patches: Incidence
    weight: Int[np.ndarray, "g k m"]
    positions: int
    order: Incidence


def convolution(lhs: tuple[int, ...], rhs: tuple[int, ...], params: dict[str, Any]) -> Contraction:
    """Return `lax.conv_general_dilated` of arrays of these shapes as a contraction; `batch_group_count` must be 1."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    image = np.arange(math.prod(lhs)).reshape(lhs).transpose(numbers.lhs_spec)
    kernel = np.arange(math.prod(rhs)).reshape(rhs).transpose(numbers.rhs_spec)
    batch, channels, *sizes = image.shape
    features, width = kernel.shape[0], kernel.shape[2:]
    at, out = windows(
        sizes, width, params["window_strides"], params["padding"], params["lhs_dilation"], params["rhs_dilation"]
    )
    image = image.reshape(batch, groups, channels // groups, -1)
    # (batch, g, depth, positions, kernel positions) -> (g, batch, positions, depth, kernel positions)
    index = np.where(at >= 0, image[..., np.maximum(at, 0)], -1).transpose(1, 0, 3, 2, 4)
    per_group = features // groups
    weight = kernel.reshape(groups, per_group, -1).transpose(0, 2, 1)
    moved = np.arange(batch * features * at.shape[0]).reshape(groups, batch, at.shape[0], per_group)
    moved = moved.transpose(1, 0, 3, 2).reshape(batch, features, *out).transpose(np.argsort(numbers.out_spec))
    return Contraction(
        Incidence(index.reshape(-1, 1), math.prod(lhs)),
        weight,
        batch * at.shape[0],
        Incidence(moved.reshape(-1, 1), moved.size),
    )


def matrix_product(
    x: tuple[int, ...], w: tuple[int, ...], x_axes: Sequence[int], w_axes: Sequence[int], *, x_first: bool
) -> Contraction:
    """Return `lax.dot_general` without batch dimensions, contracting these axes, as a contraction of one group."""
    free = [axis for axis in range(len(x)) if axis not in x_axes]
    columns = [axis for axis in range(len(w)) if axis not in w_axes]
    k = math.prod(w[axis] for axis in w_axes)
    index = np.arange(math.prod(x)).reshape(x).transpose(*free, *x_axes)
    weight = np.arange(math.prod(w)).reshape(w).transpose(*w_axes, *columns).reshape(1, k, -1)
    positions, m = index.size // k, weight.shape[2]
    moved = np.arange(positions * m).reshape(positions, m)
    return Contraction(
        Incidence(index.reshape(-1, 1), index.size),
        weight,
        positions,
        Incidence((moved if x_first else moved.T).reshape(-1, 1), moved.size),
    )
