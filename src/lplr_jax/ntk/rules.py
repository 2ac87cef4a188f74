"""One exact rule per kind of use: what is kept of each sample, and how two samples' features make their share of Θ.

With h the other operand of the operation a leaf enters and δ the cotangent at its result, written as h[b, s, k] and
δ[o, b, s, m] (b: batch or group, s: position, k: contracted, m: free, o: output), the gradient of output o is
G[o, b, k, m] = Σ_s h[b, s, k] δ[o, b, s, m]. Three orders of contraction give the same G Gᵀ:

- `Outer` (one position): (h hᵀ + 1) ∘ (δ δᵀ); the 1 is the bias added behind, which shares δ.
- `Positions`: Σ_b Σ_ss' (h_i[b, s] · h_j[b, s']) (δ_io[b, s] · δ_jq[b, s']); for an embedding h_i[s] · h_j[s'] is
  [id = id'].
- `Rows`: form G for each sample, then one product G Gᵀ.

A feature is a pytree of arrays with the sample as leading axis. Every term has the methods

- `features(env, deltas, gradients)`: features of one sample from slot values, cotangents (c, ...) at cuts and gradients
  (c, ...) of fallback leaves;
- `full`, `trace`, `diagonal`: blocks (n1 c, n2 c), (n1, n2) and (n, c) from the features of two blocks of samples;
- `temporaries(outputs)`: array elements that one pair of samples needs while a block is formed.
"""

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
    leading = 1
    for size in array.shape[:count]:
        leading *= size
    return array.reshape(leading, -1)


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
        parts = [part.reshape(part.shape[0], -1).astype(wide) for part in parts]
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
        return tuple(make(env).reshape(-1) for make in self.operands), delta.reshape(delta.shape[0], -1)

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
class Positions:
    """Pairs of positions: Gram matrices of operands and of cotangents at all positions, multiplied and summed.

    `operand` gives h (b, s, k), or integers (s,) to be compared when `lookup` is set (−1 matches nothing).
    """

    leaves: tuple[int, ...]
    operand: Callable[[Env], jax.Array]
    cotangent: Callable[[Env, Env], jax.Array]
    lookup: bool
    positions: int
    batches: int

    def features(self, env: Env, deltas: Env, gradients: Env) -> tuple[jax.Array, jax.Array]:
        """Operand and cotangent (b, c, s, m) of one sample."""
        del gradients
        return self.operand(env), jnp.swapaxes(self.cotangent(env, deltas), 0, 1)

    def full(self, first: Any, second: Any) -> jax.Array:
        """Σ over positions for all pairs of outputs."""
        n1, _, c1, s1, _ = first[1].shape
        n2, _, c2, s2, _ = second[1].shape

        def of_batch(h1: jax.Array, d1: jax.Array, h2: jax.Array, d2: jax.Array) -> jax.Array:
            product = gram(_rows(d1, 3), _rows(d2, 3)).reshape(n1, c1, s1, n2, c2, s2)
            weight = self._weight(h1, h2, product.dtype).reshape(n1, 1, s1, n2, 1, s2)
            return jnp.sum(jnp.broadcast_to(weight, product.shape) * product, axis=(2, 5))

        return self._over_batches(of_batch, first, second).reshape(n1 * c1, n2 * c2)

    def trace(self, first: Any, second: Any) -> jax.Array:
        """Σ over positions, outputs contracted."""
        n1, _, _, s1, _ = first[1].shape
        n2, s2 = second[1].shape[0], second[1].shape[3]

        def of_batch(h1: jax.Array, d1: jax.Array, h2: jax.Array, d2: jax.Array) -> jax.Array:
            product = gram(*(_rows(jnp.swapaxes(d, 1, 2), 2) for d in (d1, d2)))
            weight = self._weight(h1, h2, product.dtype)
            return jnp.sum((weight * product).reshape(n1, s1, n2, s2), axis=(1, 3))

        return self._over_batches(of_batch, first, second)

    def diagonal(self, first: Any, second: Any) -> jax.Array:
        """Σ over positions of a sample with itself."""

        def one(f1: Any, f2: Any) -> jax.Array:
            keep = jax.tree.map(lambda leaf: leaf[None], (f1, f2))
            return jnp.diagonal(self.full(*keep))

        return jax.vmap(one)(first, second)

    def temporaries(self, outputs: int) -> int:
        """Both Gram blocks over positions."""
        return (outputs**2 + 1) * self.positions**2

    def _over_batches(self, of_batch: Callable[..., jax.Array], first: Any, second: Any) -> jax.Array:
        """Σ of `of_batch` (h, δ, h', δ' of one batch entry), one entry at a time: only its Gram blocks are held."""
        if self.batches == 1:
            (h1, d1), (h2, d2) = first, second
            take = (lambda h: h) if self.lookup else (lambda h: h[:, 0])
            return of_batch(take(h1), d1[:, 0], take(h2), d2[:, 0])
        leading = [jnp.moveaxis(a, 1, 0) for a in (*first, *second)]
        total = jax.eval_shape(of_batch, *(jax.ShapeDtypeStruct(a.shape[1:], a.dtype) for a in leading))
        zero = jnp.zeros(total.shape, total.dtype)
        return lax.scan(lambda partial, arrays: (partial + of_batch(*arrays), None), zero, tuple(leading))[0]

    def _weight(self, first: jax.Array, second: jax.Array, dtype: Any) -> jax.Array:
        if not self.lookup:
            return gram(_rows(first, 2), _rows(second, 2))
        one, two = first.reshape(-1), second.reshape(-1)
        equal = (one[:, None] == two[None, :]) & (one >= 0)[:, None]
        return equal.astype(dtype)


Term = Rows | Outer | Positions
