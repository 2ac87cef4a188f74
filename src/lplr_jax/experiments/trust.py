"""How far λ_min can be trusted: one kernel in four precisions, on inputs that almost coincide."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from lplr_jax import checks, data, linalg
from lplr_jax.linalg import MinEig
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs.assembly import assembly_bound, dense_network

DISTANCES = (1e-1, 1e-2, 1e-3, 1e-4)
"""Euclidean distances between the images of a pair; two different digits are about 10 apart."""


@dataclass(frozen=True)
class TrustRow:
    """λ_min of the same kernel in four precisions.

    Attributes:
        distance: between the two images of each pair.
        float32: kernel and eigenvalues in float32.
        tf32: as float32, with the operands of the kernel's matrix products rounded to 10 bits after the point, as GPUs
            do by default; the forward and backward sweeps stay in float64, so this is the favourable case.
        float64: kernel in float64, eigenvalues by LAPACK.
        certified: the float64 kernel with its proved interval, rounding of the assembly included.
    """

    distance: float
    float32: float
    tf32: float
    float64: float
    certified: MinEig


def near_duplicates(x: np.ndarray, distance: float, *, pairs: int = 50, seed: int = 0) -> np.ndarray:
    """Return x (n, d) with its last `pairs` rows replaced by neighbours of the first ones, `distance` away."""
    checks.whole("pairs", pairs)
    checks.number("distance", distance, above=0)
    if not 0 < 2 * pairs <= x.shape[0]:
        raise ValueError(f"pairs must be between 1 and half of the {x.shape[0]} samples, got {pairs}")
    step = np.random.default_rng(seed).standard_normal((pairs, x.shape[1]))
    step *= distance / np.linalg.norm(step, axis=1, keepdims=True)
    return np.concatenate([x[:-pairs], x[:pairs] + step])


def round_to_tf32(a: np.ndarray) -> np.ndarray:
    """Return the nearest numbers with 10 bits after the leading one, ties to even, as float32."""
    bits = np.ascontiguousarray(a, np.float32).view(np.uint32)
    odd = (bits >> np.uint32(13)) & np.uint32(1)
    return ((bits + np.uint32(0xFFF) + odd) & np.uint32(0xFFFFE000)).view(np.float32)


def tf32_kernel(apply_fn: Any, params: Any, x: Any) -> np.ndarray:
    """Return the kernel of a fully connected network with a single output, its products in emulated TF32."""
    network = dense_network(apply_fn, params, x)
    if network is None:
        raise ValueError("the emulation covers dense layers with softplus, tanh or relu; this program has another step")
    theta = np.zeros((x.shape[0], x.shape[0]), np.float32)
    for factor in reversed(network.factors):
        h, delta = round_to_tf32(factor.h), round_to_tf32(factor.delta)
        theta += (h @ h.T + np.float32(factor.bias)) * (delta @ delta.T)
    return theta


def measure(
    *, n: int = 1000, pairs: int = 50, width: int = 128, seed: int = 0, distances: Sequence[float] = DISTANCES
) -> tuple[TrustRow, ...]:
    """Measure λ_min of the softplus network at initialisation on digits with near-duplicates, once for each distance.

    Args:
        n: digits.
        pairs: how many have a near-duplicate.
        width: units of each of four hidden layers.
        seed: of the initialisation and of the displacements.
        distances: between the images of a pair.

    Returns:
        One row for each distance.
    """
    digits = np.asarray(data.load("mnist", n_train=n).x, np.float64).reshape(n, -1)
    model = MLP(width=width)
    params = model.init(jax.random.key(seed), jnp.zeros((1, digits.shape[1])))
    rows = []
    for distance in distances:
        x = near_duplicates(digits, distance, pairs=pairs, seed=seed)
        theta = np.asarray(empirical_ntk(model.apply, params, x))
        single = np.asarray(empirical_ntk(model.apply, params, x, dtype="float32"))
        bound = assembly_bound(model.apply, params, x, theta)
        if bound is None:
            raise RuntimeError("the network overflows; the certificate has no bound")
        rows.append(
            TrustRow(
                distance=distance,
                float32=float(scipy.linalg.eigvalsh(single)[0]),
                tf32=float(scipy.linalg.eigvalsh(tf32_kernel(model.apply, params, x))[0]),
                float64=float(scipy.linalg.eigvalsh(theta)[0]),
                certified=linalg.min_eig(theta, **vars(bound)),
            )
        )
    return tuple(rows)


def as_markdown(rows: Sequence[TrustRow]) -> str:
    """Return the table of the README."""
    lines = [
        "| distance within a pair | TF32 (emulated) | float32 | float64 | proved interval | sign |",
        "|---|---|---|---|---|---|",
    ]
    words = {1: "proved positive", 0: "undecided", -1: "proved negative"}
    for row in rows:
        m = row.certified
        numbers = " | ".join(f"{value:.3g}" for value in (row.distance, row.tf32, row.float32))
        interval = f"[{m.lower:.8g}, {m.upper:.8g}]"
        lines.append(f"| {numbers} | {row.float64:.8g} | {interval} | {words[m.sign]} |")
    return "\n".join(lines)
