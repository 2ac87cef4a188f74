"""One exact rule per kind of use: what is kept of each sample, and how two samples' features make their share of Θ.

With h the other operand of the operation a leaf enters and δ the cotangent at its result, written as h[b, s, k] and
δ[o, b, s, m] (b: batch or group, s: position, k: contracted, m: free, o: output), the gradient of output o is
G[o, b, k, m] = Σ_s h[b, s, k] δ[o, b, s, m]. Three orders of contraction give the same G Gᵀ:

- `Outer` (one position): (h hᵀ + 1) ∘ (δ δᵀ); the 1 is the bias added behind, which shares δ.
- `Positions`: Σ_b Σ_ss' (h_i[b, s] · h_j[b, s']) (δ_io[b, s] · δ_jq[b, s']); for an embedding h_i[s] · h_j[s'] is
  [id = id']. Uses of one leaf are more positions, and so are the steps of a loop (`bundles`).
- `Rows`: form G for each sample, then one product G Gᵀ.

A feature is a pytree of arrays with the sample as leading axis. Every term has the methods

- `features(env, deltas, gradients)`: features of one sample from slot values, cotangents (c, ...) at cuts and gradients
  (c, ...) of fallback leaves;
- `full`, `trace`, `diagonal`: blocks (n1 c, n2 c), (n1, n2) and (n, c) from the features of two blocks of samples;
- `temporaries(outputs)`: array elements that one pair of samples needs while a block is formed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from lplr_jax import programs

Env = Mapping[int, Any]
_HIGHEST = lax.Precision.HIGHEST


def gram(first: jax.Array, second: jax.Array) -> jax.Array:
    """Product (r1, k) × (r2, k) -> (r1, r2) at the highest precision."""
    return lax.dot_general(first, second, (((1,), (1,)), ((), ())), precision=_HIGHEST)


def _rows(array: jax.Array, count: int) -> jax.Array:
    """Merge the leading `count` axes, and all others."""
    return array.reshape(math.prod(array.shape[:count]), math.prod(array.shape[count:]))


@dataclass(frozen=True, eq=False)
class Rows:
    """Per-example gradients, one row for each sample and output."""

    leaves: tuple[int, ...]
    gradient_of: tuple[Callable[[Env, Env, Env], jax.Array], ...]

    def features(self, env: Env, deltas: Env, gradients: Env) -> jax.Array:
        """Gradients (c, p) of one sample."""
        parts = [make(env, deltas, gradients) for make in self.gradient_of]
        # A function may compute with leaves of several widths.
        wide = programs.widest(*(part.dtype for part in parts))
        parts = [_rows(part, 1).astype(wide) for part in parts]
        return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=1)

    def full(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """G Gᵀ."""
        return gram(_rows(first, 2), _rows(second, 2))

    def trace(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Σ_o G_o G_oᵀ."""
        return gram(_rows(first, 1), _rows(second, 1))

    def diagonal(self, first: jax.Array, second: jax.Array) -> jax.Array:
        """Squared norms of the rows."""
        return jnp.sum(first * second, axis=-1)

    def temporaries(self, outputs: int) -> int:
        """One block of the result."""
        return outputs**2


@dataclass(frozen=True, eq=False)
class Outer:
    """Gradients of rank one: weights that act at one position, and the biases that share their cotangent.

    `unit` says that δ is the identity: the leaves act on the output itself.
    """

    leaves: tuple[int, ...]
    operands: tuple[Callable[[Env], jax.Array], ...]
    ones: int
    delta_of: Callable[[Env], jax.Array]
    unit: bool

    def features(self, env: Env, deltas: Env, gradients: Env) -> tuple[tuple[jax.Array, ...], jax.Array]:
        """Operands (k,) and the cotangent (c, m) of one sample."""
        del gradients
        delta = self.delta_of(deltas)
        return tuple(make(env).reshape(-1) for make in self.operands), _rows(delta, 1)

    def full(self, first: Any, second: Any) -> jax.Array:
        """(Σ h hᵀ + 1) ∘ (δ δᵀ) for all pairs of outputs."""
        (n1, c1), (n2, c2) = first[1].shape[:2], second[1].shape[:2]
        weight = self._weight(first[0], second[0])
        if self.unit and c1 == 1 and weight is not None:
            return weight
        product = self._unit(n1, n2, c1, first[1].dtype) if self.unit else gram(_rows(first[1], 2), _rows(second[1], 2))
        if weight is None:
            return self._ones(product)
        if c1 == 1:
            return weight * product
        # Columns are repeated first, so that the product runs along contiguous rows of n2 · c entries.
        weight = jnp.broadcast_to(weight[:, :, None], (n1, n2, c2)).reshape(n1, 1, n2 * c2)
        weight = jnp.broadcast_to(weight, (n1, c1, n2 * c2))
        return (weight * product.reshape(n1, c1, n2 * c2)).reshape(n1 * c1, n2 * c2)

    def trace(self, first: Any, second: Any) -> jax.Array:
        """(Σ h hᵀ + 1) ∘ (δ δᵀ) with outputs contracted."""
        weight = self._weight(first[0], second[0])
        if self.unit and weight is not None:
            return weight * jnp.asarray(first[1].shape[1], weight.dtype)
        product = gram(_rows(first[1], 1), _rows(second[1], 1))
        return self._ones(product) if weight is None else weight * product

    def diagonal(self, first: Any, second: Any) -> jax.Array:
        """(Σ |h|² + 1) |δ_o|²."""
        product = jnp.sum(first[1] * second[1], axis=-1)
        if not self.operands:
            return self._ones(product)
        weight = sum(jnp.sum(h1 * h2, axis=-1) for h1, h2 in zip(first[0], second[0], strict=True))
        weight = jnp.asarray(weight) + jnp.asarray(self.ones, product.dtype)
        return jnp.broadcast_to(weight[:, None], product.shape) * product

    def temporaries(self, outputs: int) -> int:
        """Both Gram blocks."""
        return outputs**2 + 1

    def _weight(self, first: Sequence[jax.Array], second: Sequence[jax.Array]) -> jax.Array | None:
        weight = None
        for h1, h2 in zip(first, second, strict=True):
            part = gram(h1, h2)
            weight = part if weight is None else weight + part
        if weight is not None and self.ones:
            weight = weight + jnp.asarray(self.ones, weight.dtype)
        return weight

    def _unit(self, n1: int, n2: int, c: int, dtype: Any) -> jax.Array:
        eye = jnp.broadcast_to(jnp.eye(c, dtype=dtype)[None, :, None, :], (n1, c, n2, c))
        return eye.reshape(n1 * c, n2 * c)

    def _ones(self, product: jax.Array) -> jax.Array:
        return product if self.ones == 1 else product * jnp.asarray(self.ones, product.dtype)


@dataclass(frozen=True, eq=False)
class Side:
    """Uses of one kind (`bundles`): their operands, each of another leaf, and the cotangent that these share.

    `operands` give h (b, s, k), or row numbers (b, s) to be compared for lookups (−1 matches nothing); `cotangent`
    gives δ (c, b, s, m). Swapped uses have k and m exchanged: h (b, s, m) and δ (c, b, s, k). A routed use has two
    operands, h (b, s, k) and the number (b, s) of the matrix that each position takes: only equal ones meet.
    """

    kind: str
    positions: int
    operands: tuple[Callable[[Env], jax.Array], ...]
    cotangent: Callable[[Env, Env], jax.Array]


@dataclass(frozen=True, eq=False)
class Positions:
    """Pairs of positions: Gram matrices of operands and of cotangents at all positions, multiplied and summed.

    Attributes:
        leaves: Leaves that are served.
        sides: Uses, kind by kind; several operands or `ones` only where all uses are plain.
        batches: Batch entries b.
        ones: Biases that share the cotangent, of one position each.
    """

    leaves: tuple[int, ...]
    sides: tuple[Side, ...]
    batches: int
    ones: int = 0

    def features(self, env: Env, deltas: Env, gradients: Env) -> tuple[Any, ...]:
        """For each side its operands (b, s, k) and the cotangent (b, c, s, m) of one sample."""
        del gradients
        return tuple(
            (tuple(make(env) for make in side.operands), jnp.swapaxes(side.cotangent(env, deltas), 0, 1))
            for side in self.sides
        )

    def full(self, first: Any, second: Any) -> jax.Array:
        """Σ over positions for all pairs of outputs."""
        total = self._over_batches(first, second, trace=False)
        return _rows(total, 2)

    def trace(self, first: Any, second: Any) -> jax.Array:
        """Σ over positions, outputs contracted."""
        return self._over_batches(first, second, trace=True)

    def diagonal(self, first: Any, second: Any) -> jax.Array:
        """Σ over positions of a sample with itself, output by output."""

        def one(f1: Any, f2: Any) -> jax.Array:  # operands (1, b, s, k), cotangents (b, s, m)
            whole = [[(hs, delta[None, :, None]) for hs, delta in features] for features in (f1, f2)]
            return self.trace(*whole)[0, 0]

        def sample(f1: Any, f2: Any) -> jax.Array:
            pair = [[(tuple(h[None] for h in hs), delta) for hs, delta in features] for features in (f1, f2)]
            axes = [(tuple(None for _ in hs), 1) for hs, _ in f1]
            return jax.vmap(one, in_axes=(axes, axes))(*pair)

        return jax.vmap(sample)(list(first), list(second))

    def temporaries(self, outputs: int) -> int:
        """Gram blocks over positions, of one batch entry."""
        swapped = sum(side.positions for side in self.sides if side.kind == "swapped")
        others = sum(side.positions for side in self.sides) - swapped
        return max((outputs**2 + 1) * max(swapped, others) ** 2, 2 * outputs * swapped * others)

    def _over_batches(self, first: Any, second: Any, *, trace: bool) -> jax.Array:
        """Σ over batch entries, one at a time: only its Gram blocks are held."""

        def of_batch(one: Any, two: Any) -> jax.Array:
            total = None
            for side, features in zip(self.sides, one, strict=True):
                for other, others in zip(self.sides, two, strict=True):
                    part = self._pair((side.kind, other.kind), features, others, trace)
                    total = part if total is None else total + part
            return jnp.asarray(total)

        if self.batches == 1:
            return of_batch(*jax.tree.map(lambda a: a[:, 0], (first, second)))
        leading = jax.tree.map(lambda a: jnp.moveaxis(a, 1, 0), (first, second))
        total = jax.eval_shape(of_batch, *jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), leading))
        zero = jnp.zeros(total.shape, total.dtype)
        return lax.scan(lambda partial, pair: (partial + of_batch(*pair), None), zero, leading)[0]

    def _pair(self, kinds: tuple[str, str], first: Any, second: Any, trace: bool) -> jax.Array:
        if "swapped" not in kinds or kinds == ("swapped", "swapped"):
            return self._alike(kinds, first, second, trace)
        if kinds[0] == "swapped":
            mirror = self._crossed(kinds[1], second, first, trace)
            return mirror.T if trace else jnp.transpose(mirror, (2, 3, 0, 1))
        return self._crossed(kinds[0], first, second, trace)

    def _alike(self, kinds: tuple[str, str], first: Any, second: Any, trace: bool) -> jax.Array:
        """Σ_ss' (h_s · h'_s') (δ_s · δ'_s')."""
        (n1, c1, s1, _), (n2, c2, s2, _) = first[1].shape, second[1].shape
        deltas = (first[1], second[1])
        if trace:
            product = gram(*(_rows(jnp.swapaxes(delta, 1, 2), 2) for delta in deltas))
            weight = self._weight(kinds, first[0], second[0], product.dtype)
            return jnp.sum((weight * product).reshape(n1, s1, n2, s2), axis=(1, 3))
        product = gram(*(_rows(delta, 3) for delta in deltas)).reshape(n1, c1, s1, n2, c2, s2)
        weight = self._weight(kinds, first[0], second[0], product.dtype).reshape(n1, 1, s1, n2, 1, s2)
        return jnp.sum(jnp.broadcast_to(weight, product.shape) * product, axis=(2, 5))

    def _crossed(self, kind: str, first: Any, second: Any, trace: bool) -> jax.Array:
        """Σ_ss' (h_s · δ'_s') (δ_s · h'_s'): the cotangents of swapped uses meet the operands of the others."""
        (h,), (other,) = first[0], second[0]
        (n1, c1, s1, _), (n2, c2, s2, _) = first[1].shape, second[1].shape
        left = _looked_up(second[1], h) if kind == "lookup" else gram(_rows(h, 2), _rows(second[1], 3))
        left = left.reshape(n1, s1, n2, c2, s2)
        right = gram(_rows(first[1], 3), _rows(other, 2)).reshape(n1, c1, s1, n2, s2)
        spec = "iajob,ioajb->ij" if trace else "iajqb,ioajb->iojq"
        return jnp.einsum(spec, left, right, precision=_HIGHEST)

    def _weight(self, kinds: tuple[str, str], first: Any, second: Any, dtype: Any) -> jax.Array:
        """Products h · h' of all positions, (n1 s1, n2 s2)."""
        if kinds == ("lookup", "lookup"):
            one, two = first[0].reshape(-1), second[0].reshape(-1)
            return _equal(one, two).astype(dtype)
        if kinds == ("routed", "routed"):
            products = gram(_rows(first[0], 2), _rows(second[0], 2))
            return products * _equal(first[1].reshape(-1), second[1].reshape(-1)).astype(products.dtype)
        if kinds == ("lookup", "plain"):
            return _looked_up(second[0], first[0])
        if kinds == ("plain", "lookup"):
            return _looked_up(first[0], second[0]).T
        weight = None
        for h1, h2 in zip(first, second, strict=True):
            part = gram(_rows(h1, 2), _rows(h2, 2))
            weight = part if weight is None else weight + part
        weight = jnp.asarray(weight)
        return weight + jnp.asarray(self.ones, weight.dtype) if self.ones else weight


def _equal(one: jax.Array, two: jax.Array) -> jax.Array:
    """Whether numbers are the same, and none is -1."""
    return (one[:, None] == two[None, :]) & (one >= 0)[:, None]


def _looked_up(array: jax.Array, rows: jax.Array) -> jax.Array:
    """Entries of the last axis at some row numbers, 0 at −1: (numbers, all other axes)."""
    numbers = rows.reshape(-1)
    found = jnp.take(array.reshape(-1, array.shape[-1]).T, numbers, axis=0, mode="clip")
    return jnp.where((numbers >= 0)[:, None], found, jnp.zeros((), found.dtype))


Term = Rows | Outer | Positions
