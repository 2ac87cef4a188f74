"""What the bounds on a kernel's assembly share: constants, activations with their errors, norms rounded up.

The constants of the activations follow from 4 ulp (8 u) for exp, log1p and tanh.

* softplus = max(z, 0) + log1p(exp(-|z|)): both terms are non-negative and log1p has condition at most 1, so the value
  has 8 u + 8 u + u < 20 u relative; the slope, 1 / (1 + e) or e / (1 + e), has 8 u + 5 u + u < 20 u.
* tanh: 8 u relative; the slope 1 - t² loses 2 · 8 u + 3 u < 20 u absolute.
* relu is exact, and so is its slope unless a pre-activation lies within its error of zero.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jaxtyping import Float

from lplr_jax import certificates, linalg, programs
from lplr_jax.certificates import TINY, UNIT, gamma
from lplr_jax.ntk.jaxpr import Op, Program, flatten

ASSUMPTIONS = (
    "exp, log1p and tanh of NumPy are within 4 units in the last place",
    "the network is the one read off its program: dense and convolutional layers, softplus, tanh, relu, and steps that "
    "move, add or scale entries",
)

# Norms and sums here have at most 2³² non-negative terms, added in any order: 2³² u < 1e-6.
INFLATE = 1.0 + 1e-6
# What underflow may take from a row: 2³⁰ operations lose η each, and squares below η spoil a norm by √(2³⁰ η).
UNDERFLOW = 2.0**20 * math.sqrt(TINY)


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

    @property
    def finite(self) -> bool:
        """Whether no number overflowed."""
        return math.isfinite(self.assembly_error) and math.isfinite(self.factor_error)

    def kernel_error(self, theta: Float[np.ndarray, "nc nc"]) -> float:
        """Return a bound on ‖Θ - K Kᵀ‖₂ of the given kernel and the exact one.

        ‖K̂ K̂ᵀ - K Kᵀ‖ <= e (2 ‖K̂‖ + e), and ‖K̂‖² <= ‖Θ‖ + assembly error, by row sums.
        """
        size = math.sqrt(certificates.row_sum_bound(theta) + self.assembly_error)
        return (self.assembly_error + self.factor_error * (2 * size + self.factor_error)) * (1 + 1e-9)


Near = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From z and a reach to a bound on [z - reach, z + reach]."""


@dataclass(frozen=True)
class Activation:
    """Value and derivative with relative error `value_error` and absolute error `slope_error`; sup|σ''| = `bend`.

    `slope_near` and `bend_near` bound |σ'| and |σ''| on [z - reach, z + reach] from above, rounding included.
    """

    name: str
    reference: Callable[[Any], Any]
    value: Callable[[np.ndarray], np.ndarray]
    slope: Callable[[np.ndarray], np.ndarray]
    bend: float
    value_error: float
    slope_error: float
    slope_near: Near
    bend_near: Near


def _softplus(z: np.ndarray) -> np.ndarray:
    return np.maximum(z, 0.0) + np.log1p(np.exp(-np.abs(z)))


def _logistic(z: np.ndarray) -> np.ndarray:
    e = np.exp(-np.abs(z))
    return np.where(z >= 0.0, 1.0, e) / (1.0 + e)


def _flat(value: float) -> Near:
    return lambda z, reach: np.full(np.broadcast_shapes(z.shape, reach.shape), value)


def _inner(z: np.ndarray, reach: np.ndarray) -> np.ndarray:
    """Return the least |z| within reach."""
    return np.maximum(np.abs(z) - reach, 0.0)


def _softplus_bend(z: np.ndarray, reach: np.ndarray) -> np.ndarray:
    e = np.exp(-_inner(z, reach))  # σ'' = e / (1 + e)² falls with |z|
    return e / np.square(1.0 + e) + _NEAR


def _tanh_bend(z: np.ndarray, reach: np.ndarray) -> np.ndarray:
    # |σ''| = 2 t (1 - t²) rises up to t = tanh |z| = 1/√3, and falls from there on.
    t = np.tanh(np.clip(_TANH_STEEPEST, _inner(z, reach), np.abs(z) + reach))
    return 2.0 * t * (1.0 - np.square(t)) + _NEAR


_NEAR = 64 * UNIT
"""Absolute error of the bounds on an interval: as that of the slopes, for numbers of at most one."""
_TANH_STEEPEST = math.atanh(1 / math.sqrt(3))

IDENTITY = Activation("identity", lambda z: z, lambda z: z, np.ones_like, 0.0, 0.0, 0.0, _flat(1.0), _flat(0.0))
_FOUND = (
    Activation(
        "softplus",
        jax.nn.softplus,
        _softplus,
        _logistic,
        bend=0.25,
        value_error=20 * UNIT,
        slope_error=20 * UNIT,
        slope_near=lambda z, reach: _logistic(z + reach) + _NEAR,
        bend_near=_softplus_bend,
    ),
    Activation(
        "tanh",
        jax.numpy.tanh,
        np.tanh,
        lambda z: 1.0 - np.square(np.tanh(z)),
        bend=0.77,  # sup|tanh''| = 4 / (3 √3) = 0.7698
        value_error=8 * UNIT,
        slope_error=20 * UNIT,
        slope_near=lambda z, reach: 1.0 - np.square(np.tanh(_inner(z, reach))) + _NEAR,
        bend_near=_tanh_bend,
    ),
    Activation(
        "relu",
        jax.nn.relu,
        lambda z: np.maximum(z, 0.0),
        lambda z: (z > 0.0).astype(np.float64),
        bend=0.0,
        value_error=0.0,
        slope_error=0.0,
        slope_near=_flat(1.0),
        bend_near=_flat(math.inf),
    ),
)
ACTIVATIONS = {activation.name: activation for activation in (IDENTITY, *_FOUND)}
"""By name."""


def in_float64(program: Program) -> bool:
    """Return whether every step has one result, takes and gives float64, and multiplies without rounding before."""
    for op in program.ops:
        slots = [atom for atom in op.ins if isinstance(atom, int)]
        if len(op.outs) != 1 or any(program.avals[slot].dtype != np.float64 for slot in (*slots, *op.outs)):
            return False
        if "_" in str(op.params.get("precision") or ""):  # an algorithm by name, such as BF16_BF16_F32
            return False
    return True


def _signature(op: Op) -> tuple[Any, ...]:
    """Return what an operation does: its name, its settings, its derivative rule, its literal operands."""
    literals = tuple(None if isinstance(atom, int) else float(atom.val) for atom in op.ins)
    # Two functions with one value may have two derivatives, so their rules are compared.
    return op.name, programs.equation_key(op.eqn, rules=True), literals


def match_activation(op: Op, program: Program) -> Activation | None:
    """Return the activation that an operation is, or None."""
    spec = program.avals[op.outs[0]]
    with jax.enable_x64(True):
        found = _signature(op)
        for activation in _FOUND:
            function = activation.reference
            # A network may be written for one sample, or for one unit; its rules are then traced for a batch of them.
            for _ in range(min(len(spec.shape), 2) + 1):
                reference = flatten(jax.make_jaxpr(function)(spec), 0)
                if len(reference.ops) != 1 or reference.ops[0].name != op.name:
                    break
                if _signature(reference.ops[0]) == found:
                    return activation
                function = jax.vmap(function)
    return None


def row_norms(a: np.ndarray) -> np.ndarray:
    """Return upper bounds of the 2-norms of rows, shape (n,)."""
    return np.sqrt(np.einsum("ij,ij->i", a, a)) * INFLATE + UNDERFLOW


def spectral_norm_bound(w: Float[np.ndarray, "k m"]) -> float:
    """Return an upper bound of ‖W‖₂, from λ_max of the smaller Gram matrix by a Cholesky test, or else ‖W‖_F.

    The Gram matrix is formed with error at most γ_k ‖W‖_F² in spectral norm.
    """
    small = w if w.shape[0] <= w.shape[1] else w.T
    gram = small @ small.T
    frobenius = float(np.einsum("ij,ij->", w, w)) * INFLATE + UNDERFLOW
    limit = frobenius
    if math.isfinite(frobenius) and 2.0**-300 < frobenius < 2.0**300:
        # An estimate with one per cent to spare; the test decides whether it is a bound.
        try:
            shift = 1.01 * linalg.spectral_norm(0.5 * (gram + gram.T), tolerance=1e-3)
        except linalg.UntrustedError:
            shift = math.inf
        # One triangle is read; it differs from the exact product by no more than γ_k ‖W‖_F².
        if shift < frobenius and certificates.cholesky_test(-gram, -shift, np.empty(gram.shape, order="F")):
            limit = shift
    return math.sqrt(limit + 2.0 * gamma(small.shape[1]) * frobenius) * INFLATE


def frobenius_bound(w: np.ndarray) -> float:
    """Return an upper bound of ‖W‖_F."""
    return float(np.linalg.norm(w)) * INFLATE + UNDERFLOW
