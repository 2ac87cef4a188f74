r"""A proved upper bound of L_Θ, of ‖J‖₂ and of β on a ball around a point, for dense networks with smooth activations.

Notation, one sample: h_0 = x, z_l = h_{l-1} W_l + b_l, h_l = σ_l(z_l) for l = 1, ..., D, f = h_D. δ_l is the derivative
of the outputs by z_l, a (c, m_l) matrix, and g_l that by h_l: g_D = I, δ_l = g_l ∘ σ_l'(z_l), g_l = δ_{l+1} W_{l+1}ᵀ.
Rows of the Jacobian are [h_{l-1}, 1] ⊗ δ_l. Norms of matrices over outputs are Frobenius norms, those of W spectral. A
subscript 0 marks values at the centre, which are computed for every sample with bounds of their rounding
(`proofs.assembly`).

On the ball ‖θ - θ_0‖ <= R the parts of the layers move by R_l with Σ R_l² <= R², so what is linear in them, a row of D
coefficients a_l, is at most R ‖a‖ (Cauchy-Schwarz). With ω_l = ‖W_l,0‖ + R, q_l = √(‖h_l‖² + 1), γ_lj the norm of
column j of g_l,0, layer by layer:

1. Values. z - z_0 = (h - h_0) W + [h_0, 1] Δ, hence Z_l = ω_l A_{l-1} + q_{l-1,0} R_l bounds ‖z_l - z_l,0‖ and
   A_l = s_l Z_l bounds ‖h_l - h_l,0‖, A_0 = 0. s_l = sup |σ'| and κ_lj = sup |σ''| are over what the units of a sample
   reach: no further than R ‖Z_l‖ from z_l,0.
2. Cotangents. g - g_0 = (δ - δ_0) Wᵀ + δ_0 ΔWᵀ, hence G_l = ω_{l+1} E_{l+1} + ‖δ_{l+1,0}‖ R_{l+1}, G_D = 0; and
   δ - δ_0 = (g - g_0) ∘ σ'(z) + g_0 ∘ (σ'(z) - σ'(z_0)), hence E_l = s_l G_l + max_j(γ_lj κ_lj) Z_l. So
   ‖δ_l‖ <= P_l = ‖δ_l,0‖ + R ‖E_l‖, and column j of g_l has norm at most γ_lj + R ‖G_l‖.
3. Derivatives along a unit direction whose part in layer l has norm ν_l, Σ ν_l² = 1: again linear, a row of D
   coefficients. ż_l = ω_l ḣ_{l-1} + q_{l-1} ν_l, ḣ_l = s_l ż_l, ḣ_0 = 0; ġ_l = ω_{l+1} δ̇_{l+1} + P_{l+1} ν_{l+1},
   ġ_D = 0; δ̇_l = s_l ġ_l + (max_j(γ_lj κ_lj) + R ‖G_l‖ max_j κ_lj) ż_l. The block of layer l moves by at most
   P_l ḣ_{l-1} + q_{l-1} δ̇_l.
4. Stacking these rows over samples and layers into M, ‖DJ(θ)[v]‖_F <= ‖M ν‖ <= ‖M‖₂ =: L_J. The ball is convex, so J
   is L_J-Lipschitz on it, and ‖J‖₂ <= B = ‖J_0‖₂ + L_J R.
5. Θ - Θ' = (J - J') Jᵀ + J' (J - J')ᵀ, so L_Θ <= 2 B L_J.
6. With g = ∂ℓ/∂f and 0 <= ∂²ℓ/∂f² <= κ (g = f - y and κ = 1 for the squared loss), ∇²L = (Jᵀ ∂²ℓ/∂f² J + Σ g_k ∇²f_k)/s
   and ‖Σ g_k ∇²f_k‖ = sup_v ‖(DJ[v])ᵀ g‖ <= L_J ‖g‖, ‖g‖ <= ‖g_0‖ + κ B R, so β <= (κ B² + L_J (‖g_0‖ + κ B R))/s.

Every bound grows with R. The recursion adds and multiplies non-negative numbers, some 10² D² of them for a sample, and
sums over n c samples, in float64: with at most 2³² operations the relative error stays below 1e-6, by which results are
inflated.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from lplr_jax.proofs.assembly import dense_network
from lplr_jax.proofs.dense import DenseNetwork
from lplr_jax.proofs.rounding import Activation
from lplr_jax.types import ApplyFn, Params

_INFLATE = 1.0 + 1e-6
_PRECISION = 1.0 + 1e-4
"""Factor within which R* is bisected; what is returned is safe at any."""

SMOOTH = ("softplus", "tanh", "identity")
"""Activations for which the recursion holds: |σ'| <= 1 and |σ''| bounded."""


@dataclass(frozen=True)
class BallBounds:
    """Proved bounds on the ball of radius R around θ_0.

    Attributes:
        jacobian: bound of ‖J(θ)‖₂.
        jacobian_lipschitz: bound of the Lipschitz constant of J, in spectral norm.
        lipschitz: bound of L_Θ.
        smoothness: bound of β, the largest eigenvalue of ∇²L.
    """

    jacobian: float
    jacobian_lipschitz: float
    lipschitz: float
    smoothness: float


@dataclass(frozen=True)
class Layer:
    """What the recursion takes from one layer at the centre; arrays over samples, all of them upper bounds.

    Attributes:
        inputs: √(‖h_{l-1}‖² + 1), without the 1 where there is no bias, (n,).
        cotangents: ‖δ_l‖, (n,).
        columns: γ_l, norms of the columns of g_l, (n, m).
        pre: z_l, (n, m).
        pre_error: by how much an entry of z_l may be off, (n,).
        weight: ‖W_l‖₂.
        activation: σ_l.
    """

    inputs: np.ndarray
    cotangents: np.ndarray
    columns: np.ndarray
    pre: np.ndarray
    pre_error: np.ndarray
    weight: float
    activation: Activation

    def near(self, reach: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return s_l, max_j κ_lj and max_j γ_lj κ_lj where units move by no more than `reach`, (n,) each."""
        wide = (reach + self.pre_error)[:, None]
        bend = self.activation.bend_near(self.pre, wide)
        return (
            self.activation.slope_near(self.pre, wide).max(axis=1),
            bend.max(axis=1),
            (self.columns * bend).max(axis=1),
        )


@dataclass(frozen=True)
class Anchor:
    """What the recursion takes from the centre of the ball, all of them upper bounds.

    Attributes:
        layers: 1 to D.
        jacobian: ‖J_0‖₂.
        residual: ‖g_0‖, for the squared loss the norm of the residual.
        loss_scale: the number s.
        curvature: κ, bound of the second derivative of the loss in the outputs.
    """

    layers: tuple[Layer, ...]
    jacobian: float
    residual: float
    loss_scale: float
    curvature: float = 1.0

    def on_ball(self, radius: float) -> BallBounds:
        """Return the bounds on the ball of this radius; infinite where numbers overflow.

        Raises:
            ValueError: for a negative or NaN radius.
        """
        if not radius >= 0:
            raise ValueError(f"radius must be >= 0, got {radius}")
        with np.errstate(over="ignore", invalid="ignore"):
            spread = self._jacobian_lipschitz(radius) * _INFLATE
            norm = (self.jacobian + spread * radius) * _INFLATE
            bend, g = self.curvature, self.residual + self.curvature * norm * radius
            smooth = (bend * (norm * norm) + spread * g) / self.loss_scale * _INFLATE
            values = (norm, spread, 2 * norm * spread * _INFLATE, smooth)
        return BallBounds(*(float(value) if math.isfinite(value) else math.inf for value in values))

    def _jacobian_lipschitz(self, radius: float) -> float:
        depth, n = len(self.layers), self.layers[0].inputs.size
        omega = [layer.weight + radius for layer in self.layers]
        nothing = np.zeros((n, depth))
        # Step 1; `moved` is Z_l as a row of coefficients, one column for each R_l.
        slope, bend, bent, hidden, moved = [], [], [], [], []
        before, size = nothing, np.zeros(n)
        for at, layer in enumerate(self.layers):
            row = omega[at] * before
            row[:, at] += layer.inputs
            moved.append(row)
            # √(‖h‖² + 1) is 1-Lipschitz in ‖h‖.
            hidden.append(layer.inputs + size)
            for found, value in zip((slope, bend, bent), layer.near(radius * _rows(row)), strict=True):
                found.append(value)
            before = slope[at][:, None] * row
            size = radius * _rows(before)
        # Step 2.
        turned, cotangent = [np.zeros(n)] * depth, [np.zeros(n)] * depth
        off = nothing
        for at in reversed(range(depth)):
            row = nothing
            if at < depth - 1:
                row = omega[at + 1] * off
                row[:, at + 1] += self.layers[at + 1].cotangents
            off = slope[at][:, None] * row + bent[at][:, None] * moved[at]
            turned[at] = bent[at] + radius * _rows(row) * bend[at]
            cotangent[at] = self.layers[at].cotangents + radius * _rows(off)
        # Step 3; rows of coefficients, one column for each ν_l.
        pre: list[np.ndarray] = []
        for at in range(depth):
            row = omega[at] * slope[at - 1][:, None] * pre[-1] if at else np.zeros((n, depth))
            row[:, at] += hidden[at]
            pre.append(row)
        blocks: list[np.ndarray] = []
        off = nothing
        for at in reversed(range(depth)):
            if at < depth - 1:
                off = omega[at + 1] * off
                off[:, at + 1] += cotangent[at + 1]
            off = slope[at][:, None] * off + turned[at][:, None] * pre[at]
            before = slope[at - 1][:, None] * pre[at - 1] if at else nothing
            blocks.append(cotangent[at][:, None] * before + hidden[at][:, None] * off)
        # Step 4; a matrix of D columns.
        stacked = np.concatenate(blocks)
        if not np.isfinite(stacked).all():
            return math.inf
        try:
            return float(np.linalg.norm(stacked, 2))
        except np.linalg.LinAlgError:
            return math.inf


def _rows(a: np.ndarray) -> np.ndarray:
    return np.sqrt(np.einsum("ij,ij->i", a, a))


def anchor(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    *,
    max_eig_upper: float,
    residual_norm: float,
    loss_scale: float,
    curvature: float = 1.0,
) -> Anchor | None:
    """Return what the bounds take from θ_0.

    Args:
        apply_fn: pure function (params, x) -> (n, c) or (n,).
        params: θ_0, pytree of floating arrays.
        x: inputs (n, ...).
        max_eig_upper: upper bound of λ_max(Θ_0).
        residual_norm: ‖g_0‖, for the squared loss the norm of the residual, computed in float64.
        loss_scale: the number s.
        curvature: κ, bound of the second derivative of the loss in the outputs.

    Returns:
        The anchor; None where the program is not a fully connected network with smooth activations.
    """
    network = dense_network(apply_fn, params, x)
    if network is None:
        return None
    return anchor_of(
        network,
        max_eig_upper=max_eig_upper,
        residual_norm=residual_norm,
        loss_scale=loss_scale,
        curvature=curvature,
    )


def anchor_of(
    network: DenseNetwork, *, max_eig_upper: float, residual_norm: float, loss_scale: float, curvature: float = 1.0
) -> Anchor | None:
    """Return what the bounds take from an evaluated network; see `anchor`. None where an activation is not smooth."""
    layers, factors = network.layers, network.factors
    if not all(layer.activation.name in SMOOTH for layer in layers):
        return None
    n, c = network.outputs.shape
    found: list[Layer] = []
    for at, (layer, part) in enumerate(zip(layers, factors, strict=True)):
        length = (np.linalg.norm(part.h, axis=1) + part.h_error) * _INFLATE
        rows = np.linalg.norm(part.delta, axis=1) + part.delta_error
        columns = np.ones((n, 1))  # g_D = I
        if at < len(layers) - 1:
            following = factors[at + 1]
            g = following.delta @ layers[at + 1].weight.T
            # ‖ĝ - g‖ of a row: the error of δ through W, and the rounding of the product, below 1e-6 of the norms.
            spread_row = np.linalg.norm(following.delta, axis=1)
            error = (
                (following.delta_error + 1e-9 * spread_row) * network.norms[at + 1] * math.sqrt(layer.weight.shape[1])
            )
            largest = np.linalg.norm(g.reshape(n, c, -1), axis=1)
            columns = (largest + np.linalg.norm(error.reshape(n, c), axis=1)[:, None]) * _INFLATE
        found.append(
            Layer(
                inputs=np.sqrt(length**2 + part.bias) * _INFLATE,
                cotangents=np.linalg.norm(rows.reshape(n, c), axis=1) * _INFLATE,
                columns=columns,
                pre=part.pre,
                pre_error=part.pre_error,
                weight=network.norms[at],
                activation=layer.activation,
            )
        )
    return Anchor(
        layers=tuple(found),
        jacobian=math.sqrt(max(max_eig_upper, 0.0)) * _INFLATE,
        # The computed residual differs from the exact one by what its outputs do.
        residual=(residual_norm + float(np.linalg.norm(network.output_error))) * _INFLATE,
        loss_scale=loss_scale,
        curvature=curvature,
    )


def certified_radius(base: Anchor, budget: float) -> float:
    """Return R*, rounded down: L_Θ(R) R < λ_0 is proved for every R <= R*.

    R -> L_Θ(R) R grows, so one root separates the two sides; it is bisected on a log scale to 1e-4, and the end that
    satisfies the inequality is returned.

    Args:
        base: what the bounds take from θ_0.
        budget: proved lower bound of λ_0.

    Returns:
        The radius: 0 where the budget is not positive, infinite where L_Θ = 0.
    """
    if not budget > 0:
        return 0.0

    def safe(radius: float) -> bool:
        return base.on_ball(radius).lipschitz * radius * _INFLATE < budget

    if base.on_ball(1.0).lipschitz == 0:
        return math.inf
    low, high = 1.0, 1.0
    while not safe(low):
        high, low = low, low / 2
        if low < 1e-300:
            return 0.0
    while safe(high):
        low, high = high, high * 2
        if high > 1e300:
            return low
    while high > low * _PRECISION:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if safe(middle) else (low, middle)
    return low
