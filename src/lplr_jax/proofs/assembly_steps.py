"""The steps of a feed-forward convolutional network, read off its program: values, cotangents and their error bounds.

The bounds are derived in `assembly_conv`.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from lplr_jax.certificates import UNIT, gamma
from lplr_jax.ntk.jaxpr import Op, Program
from lplr_jax.proofs.incidence import Contraction, Incidence, Rows, convolution, matrix_product, windows
from lplr_jax.proofs.rounding import (
    INFLATE,
    UNDERFLOW,
    Activation,
    frobenius_bound,
    in_float64,
    match_activation,
    row_norms,
    spectral_norm_bound,
)

_MOVES = frozenset({"reshape", "transpose", "squeeze", "broadcast_in_dim", "slice", "rev", "convert_element_type"})
# Entries of patches, and of K̂, that are held at a time.
_PATCH_ENTRIES = 2**22
_FACTOR_ENTRIES = 2**24
# `UNDERFLOW` covers this many operations on one sample.
_MAX_OPERATIONS = 2**30


@dataclass(frozen=True)
class Part:
    """The columns of K̂ that belong to one leaf.

    Attributes:
        leaf: position among the array leaves.
        error: bound on the 2-norm of the error of each row, (n c,).
        blocks: function that makes (indices in the flat leaf, columns of K̂ (n c, b)), block by block.
        product: h (n, k), δ (n c, m) and the indices (k, m), where row (i, o) is the exact product h_i ⊗ δ_io; then no
            blocks.
    """

    leaf: int
    error: np.ndarray
    blocks: Callable[[], Iterator[tuple[np.ndarray, np.ndarray]]]
    product: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True)
class Count:
    """A move, a sum over windows or a sum over axes."""

    sources: tuple[int]
    out: int
    map: Incidence

    def forward(self, h: Rows) -> Rows:
        """Return the computed result with its row errors."""
        return self.map.apply(h)

    def backward(self, delta: Rows, _: Rows) -> Rows:
        """Return the cotangent of the input with its row errors."""
        return self.map.pull(delta)


@dataclass(frozen=True)
class Scale:
    """Multiplication or division by a constant; `factor` is at least the modulus of what it multiplies by."""

    sources: tuple[int]
    out: int
    factor: float
    times: Callable[[np.ndarray], np.ndarray]

    def forward(self, h: Rows) -> Rows:
        """Return the computed result with its row errors."""
        value = self.times(h.value)
        return Rows(value, (h.error * self.factor + UNIT * row_norms(value)) * INFLATE + UNDERFLOW, h.live)

    def backward(self, delta: Rows, _: Rows) -> Rows:
        """Return the cotangent of the input with its row errors."""
        return self.forward(delta)


@dataclass(frozen=True)
class Activate:
    """An activation, entry by entry."""

    sources: tuple[int]
    out: int
    activation: Activation

    @property
    def has_kink(self) -> bool:
        """Whether the slope jumps at zero."""
        return self.activation.name == "relu"

    def crosses_kink(self, z: Rows) -> bool:
        """Return whether a pre-activation may lie on the other side of zero than computed."""
        near = np.abs(z.value) <= z.error[:, None]
        return self.has_kink and bool((near if z.live is None else near & z.live).any())

    def forward(self, z: Rows) -> Rows:
        """Return the computed result with its row errors."""
        value = self.activation.value(z.value)
        # A relu within its error of zero has been refused, so what is not positive is an exact zero.
        live = {"relu": value > 0.0, "tanh": z.live}.get(self.activation.name, np.ones(value.shape, bool))
        error = (z.error + self.activation.value_error * row_norms(value)) * INFLATE + UNDERFLOW
        return Rows(value, error, None if z.live is None else live)

    def backward(self, delta: Rows, z: Rows) -> Rows:
        """Return the cotangent of the input with its row errors."""
        c = delta.value.shape[0] // z.value.shape[0]
        value = delta.value * np.repeat(self.activation.slope(z.value), c, axis=0)
        error = (
            delta.error
            + np.abs(delta.value).max(axis=1) * self.activation.bend * np.repeat(z.error, c)
            + self.activation.slope_error * delta.norms
            + UNIT * row_norms(value)
        )
        return Rows(value, error * INFLATE + UNDERFLOW)


@dataclass(frozen=True)
class Add:
    """The sum of two branches."""

    sources: tuple[int, int]
    out: int

    def forward(self, one: Rows, two: Rows) -> Rows:
        """Return the computed result with its row errors."""
        return one.plus(two)

    def backward(self, delta: Rows, *_: Rows) -> Rows:
        """Return the cotangent of an input, which is that of the sum."""
        return delta


@dataclass(frozen=True)
class Bias:
    """A leaf added to every position: `spread` maps it to the shape of z."""

    sources: tuple[int]
    out: int
    leaf: int
    value: np.ndarray
    spread: Incidence

    def forward(self, z: Rows) -> Rows:
        """Return the computed result with its row errors."""
        bias = self.spread.values(self.value.reshape(1, -1))
        value = z.value + bias
        live = None if z.live is None else z.live | (bias != 0.0)
        return Rows(value, (z.error + UNIT * row_norms(value)) * INFLATE + UNDERFLOW, live)

    def backward(self, delta: Rows, _: Rows) -> Rows:
        """Return the cotangent of an input, which is that of the sum."""
        return delta

    def part(self, delta: Rows, _: Rows) -> Part:
        """Return the columns of K̂ of the leaf."""
        rows = self.spread.pull(delta)
        return Part(self.leaf, rows.error, lambda: iter([(np.arange(self.value.size), rows.value)]))


@dataclass(frozen=True)
class Contract:
    """A convolution or dense layer: `entries` are the indices (g, k, m) in the flat leaf of `weight`."""

    sources: tuple[int]
    out: int
    leaf: int
    entries: np.ndarray
    weight: np.ndarray
    map: Contraction

    @cached_property
    def _norms(self) -> tuple[float, float]:
        """‖W‖₂ and ‖W‖_F of the group where each is largest."""
        return max(map(spectral_norm_bound, self.weight)), max(map(frobenius_bound, self.weight))

    def _chunks(self, rows: int) -> Iterator[slice]:
        groups, k, m = self.weight.shape
        size = max(1, _PATCH_ENTRIES // (groups * self.map.positions * max(k, m)))
        return (slice(i, min(i + size, rows)) for i in range(0, rows, size))

    def _patches(self, h: np.ndarray) -> np.ndarray:
        groups, k, _ = self.weight.shape
        return self.map.patches.values(h).reshape(h.shape[0], groups, self.map.positions, k)

    def forward(self, h: Rows) -> Rows:
        """Return the computed result with its row errors."""
        groups, k, m = self.weight.shape
        spectral, frobenius = self._norms
        value = np.empty((h.value.shape[0], groups * self.map.positions * m))
        live = None if h.live is None else np.empty(value.shape, bool)
        for chunk in self._chunks(value.shape[0]):
            z = _times(self._patches(h.value[chunk]), self.weight)
            value[chunk] = self.map.order.values(z.reshape(z.shape[0], -1))
            if h.live is not None and live is not None:
                reached = self.map.patches.reaches(h.live[chunk]).reshape(-1, k).any(axis=1)
                wide = np.repeat(reached, m).reshape(z.shape[0], -1)
                live[chunk] = self.map.order.reaches(wide)
        norm = self.map.patches.norm
        error = norm * (spectral * h.error + gamma(k) * frobenius * h.norms)
        return Rows(value, error * INFLATE + UNDERFLOW, live)

    def backward(self, delta: Rows, _: Rows) -> Rows:
        """Return the cotangent of the input with its row errors."""
        groups, _k, m = self.weight.shape
        spectral, frobenius = self._norms
        parts, sums = [], []
        turned = self.weight.transpose(0, 2, 1)
        for chunk in self._chunks(delta.value.shape[0]):
            cotangent = self.map.order.transposed_values(delta.value[chunk])
            q = _times(cotangent.reshape(-1, groups, self.map.positions, m), turned).reshape(cotangent.shape[0], -1)
            pulled = self.map.patches.pull(Rows(q, np.zeros(q.shape[0])))
            parts.append(pulled.value)
            sums.append(pulled.error)
        norm = self.map.patches.norm
        error = norm * (spectral * delta.error + gamma(m) * frobenius * delta.norms) + np.concatenate(sums)
        return Rows(np.concatenate(parts), error * INFLATE + UNDERFLOW)

    def part(self, delta: Rows, h: Rows) -> Part:
        """Return the columns of K̂ of the leaf."""
        groups, k, _m = self.weight.shape
        norm, positions = self.map.patches.norm, self.map.positions
        c = delta.value.shape[0] // h.value.shape[0]
        size, moved = np.repeat(norm * h.norms, c), np.repeat(norm * h.error, c)
        error = size * delta.error + moved * (delta.norms + delta.error)
        if positions == groups == 1:
            cotangent = self.map.order.transposed_values(delta.value)
            product = (self._patches(h.value).reshape(-1, k), cotangent, self.entries[0])
            return Part(self.leaf, error * INFLATE + UNDERFLOW, lambda: iter(()), product)
        error = (error + gamma(positions) * size * delta.norms) * INFLATE + UNDERFLOW
        return Part(self.leaf, error, lambda: self._gradients(delta.value, h.value))

    def _gradients(self, delta: np.ndarray, h: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield X̂ᵀ δ̂ of all rows for a few output channels at a time."""
        groups, k, m = self.weight.shape
        c = delta.shape[0] // h.shape[0]
        width = max(1, _FACTOR_ENTRIES // (delta.shape[0] * groups * k))
        for start in range(0, m, width):
            channels = slice(start, min(start + width, m))
            entries = self.entries[:, :, channels]
            rows = np.empty((delta.shape[0], entries.size))
            for chunk in self._chunks(h.shape[0]):
                wide = slice(chunk.start * c, chunk.stop * c)
                cotangent = self.map.order.transposed_values(delta[wide])
                cotangent = cotangent.reshape(-1, c, groups, self.map.positions, m)[..., channels]
                patches = self._patches(h[chunk]).transpose(0, 1, 3, 2)[:, None]
                rows[wide] = np.matmul(patches, cotangent).reshape(wide.stop - wide.start, -1)
            yield entries.reshape(-1), rows


Step = Count | Scale | Activate | Add | Bias | Contract


def _times(patches: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return (n, g, positions, k) times (g, k, m)."""
    n, groups, positions, k = patches.shape
    out = np.empty((n, groups, positions, weight.shape[2]))
    for g in range(groups):
        out[:, g] = (patches[:, g].reshape(-1, k) @ weight[g]).reshape(n, positions, -1)
    return out


def read_steps(program: Program, leaves: list[np.ndarray]) -> list[Step] | None:
    """Return the steps of the program in order; None if it does anything else than the module lists."""
    if len(program.inputs) != 1 or program.consts or program.output not in program.on_x or not in_float64(program):
        return None
    # For every slot that holds entries of one leaf: the leaf, and where in it the entries lie.
    held = {
        slot: (i, np.arange(leaf.size).reshape(leaf.shape))
        for i, (slot, leaf) in enumerate(zip(program.params, leaves, strict=True))
    }
    steps: list[Step] = []
    for op in program.ops:
        slots = [atom for atom in op.ins if isinstance(atom, int)]
        if any(slot in held and len(program.uses[slot]) != 1 for slot in slots):
            return None
        if op.name in _MOVES and len(op.ins) == 1 and slots and slots[0] in held:
            leaf, at = held[slots[0]]
            held[op.outs[0]] = (leaf, _moved(op, at))
            continue
        step = _read_step(program, op, leaves, held)
        if step is None:
            return None
        steps.append(step)
    return steps


def _moved(op: Op, index: np.ndarray) -> np.ndarray:
    """Return where the entries of the result of a move come from."""
    # A conversion from float64 to float64 leaves integers integers.
    if op.name == "convert_element_type":
        return index
    return np.asarray(op.evaluate([jnp.asarray(index, jnp.int32)])[0]).astype(np.int64)


def _read_step(
    program: Program, op: Op, leaves: list[np.ndarray], held: dict[int, tuple[int, np.ndarray]]
) -> Step | None:
    out, result = op.outs[0], program.avals[op.outs[0]].shape
    live = [atom for atom in op.ins if isinstance(atom, int) and atom in program.on_x]
    if not live or len(op.ins) not in (1, 2):
        return None
    first = live[0]
    shape = program.avals[first].shape
    x_first = op.ins[0] == first
    other = op.ins[1 if x_first else 0] if len(op.ins) == 2 else None
    if len(op.ins) == 1:
        index = _count_index(op, shape)
        if index is not None:
            return Count((first,), out, Incidence(index, math.prod(shape)))
    elif len(live) == 2:
        same = op.name == "add" and program.avals[live[1]].shape == shape
        return Add((live[0], live[1]), out) if same else None
    elif isinstance(other, int):
        if other not in held:
            return None
        leaf, at = held[other]
        if op.name == "add" and result == shape and len(at.shape) == len(shape):
            spread = np.broadcast_to(at, shape).reshape(-1, 1)
            return Bias((first,), out, leaf, leaves[leaf], Incidence(spread, leaves[leaf].size))
        contraction = _contraction(op, shape, at.shape, x_first=x_first)
        whole = np.array_equal(np.sort(at, axis=None), np.arange(leaves[leaf].size))
        if contraction is None or not whole:
            return None
        entries = at.reshape(-1)[contraction.weight]
        if entries.size * contraction.positions > _MAX_OPERATIONS:
            return None
        return Contract((first,), out, leaf, entries, leaves[leaf].reshape(-1)[entries], contraction)
    elif other is not None and np.ndim(other.val) == 0:
        constant = float(other.val)
        if op.name == "mul":
            return Scale((first,), out, abs(constant), lambda h: h * constant)
        if op.name == "div" and x_first and constant != 0.0:
            return Scale((first,), out, INFLATE / abs(constant), lambda h: h / constant)
    activation = match_activation(op, program) if x_first else None
    return None if activation is None else Activate((first,), out, activation)


def _count_index(op: Op, shape: tuple[int, ...]) -> np.ndarray | None:
    """Return the inputs (outputs, terms) of each output of a map of counts, or None."""
    index = np.arange(math.prod(shape)).reshape(shape)
    if op.name in _MOVES:
        return _moved(op, index).reshape(-1, 1)
    if op.name == "reduce_sum":
        axes = op.params["axes"]
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        return index.transpose(*kept, *axes).reshape(math.prod(shape[axis] for axis in kept), -1)
    if op.name == "reduce_window_sum":
        names = ("window_dimensions", "window_strides", "padding", "base_dilation", "window_dilation")
        return windows(shape, *(op.params[name] for name in names))[0]
    return None


def _contraction(op: Op, x: tuple[int, ...], w: tuple[int, ...], *, x_first: bool) -> Contraction | None:
    if op.name == "conv_general_dilated" and x_first and op.params["batch_group_count"] == 1:
        return convolution(x, w, op.params)
    if op.name == "dot_general":
        (left, right), (left_batch, right_batch) = op.params["dimension_numbers"]
        if not left_batch and not right_batch and left:
            return matrix_product(x, w, *((left, right) if x_first else (right, left)), x_first=x_first)
    return None
