r"""A proved upper bound of L_Θ, of ‖J‖₂ and of β on a ball around θ_0, for dense networks with smooth activations.

Notation, one sample: h_0 = x, z_l = h_{l-1} W_l + b_l, h_l = σ_l(z_l) for l = 1, ..., D, f = h_D. δ_l is the derivative
of the outputs by z_l, a (c, m_l) matrix, and g_l that by h_l: g_D = I, δ_l = g_l ∘ σ_l'(z_l), g_l = δ_{l+1} W_{l+1}ᵀ.
Rows of the Jacobian are [h_{l-1}, 1] ⊗ δ_l. |σ'| <= 1 and |σ''| <= κ_l: 1/4 for softplus, 4/(3√3) for tanh, 0 for the
identity. Norms of matrices over outputs are Frobenius norms, those of W spectral. A subscript 0 marks values at θ_0,
which are computed for every sample with bounds of their rounding (`ntk.assembly`).

On the ball ‖θ - θ_0‖ <= R every layer obeys ‖W_l - W_l,0‖ <= R, so with ω_l = ‖W_l,0‖ + R and q_l = √(‖h_l‖² + 1):

1. Values. z - z_0 = (h - h_0) W + [h_0, 1] Δ, hence Z_l = ω_l A_{l-1} + R q_{l-1,0} bounds ‖z_l - z_l,0‖, and A_l = Z_l
   bounds ‖h_l - h_l,0‖, with A_0 = 0.
2. Cotangents. g - g_0 = (δ - δ_0) Wᵀ + δ_0 ΔWᵀ, hence G_l = ω_{l+1} E_{l+1} + R ‖δ_{l+1,0}‖, G_D = 0; and
   δ - δ_0 = (g - g_0) ∘ σ'(z) + g_0 ∘ (σ'(z) - σ'(z_0)), hence E_l = G_l + κ_l γ_l Z_l, γ_l the largest column norm of
   g_l,0. So ‖δ_l‖ <= P_l = ‖δ_l,0‖ + E_l, and columns of g_l have norm at most γ_l + G_l.
3. Derivatives along a unit direction whose part in layer l has norm ν_l, Σ ν_l² = 1: every bound is linear in ν, a row
   of D coefficients. ż_l = ω_l ḣ_{l-1} + q_{l-1} ν_l, ḣ_l = ż_l, ḣ_0 = 0; ġ_l = ω_{l+1} δ̇_{l+1} + P_{l+1} ν_{l+1},
   ġ_D = 0; δ̇_l = ġ_l + κ_l (γ_l + G_l) ż_l. The block of layer l moves by at most P_l ḣ_{l-1} + q_{l-1} δ̇_l.
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

from lplr_jax.proofs.assembly import dense_layers, kernel_factors, output_error, spectral_norm_bound
from lplr_jax.types import ApplyFn, Params

_INFLATE = 1.0 + 1e-6
_BISECTIONS = 200

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
class Anchor:
    """What the recursion takes from θ_0; lists over layers 1 to D, arrays over samples, all of them upper bounds.

    Attributes:
        inputs: √(‖h_{l-1}‖² + 1), without the 1 where there is no bias.
        cotangents: ‖δ_l‖.
        columns: largest column norm of g_l.
        weights: ‖W_l‖₂.
        bends: κ_l.
        jacobian: ‖J_0‖₂.
        residual: ‖g_0‖, for the squared loss the norm of the residual.
        loss_scale: the number s.
        curvature: κ, bound of the second derivative of the loss in the outputs.
    """

    inputs: tuple[np.ndarray, ...]
    cotangents: tuple[np.ndarray, ...]
    columns: tuple[np.ndarray, ...]
    weights: tuple[float, ...]
    bends: tuple[float, ...]
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
        depth, n = len(self.weights), self.inputs[0].size
        omega = [weight + radius for weight in self.weights]
        # Step 1; `moved` is Z_l, and A_l equals it.
        moved: list[np.ndarray] = []
        for layer in range(depth):
            before = moved[-1] if layer else np.zeros(n)
            moved.append(omega[layer] * before + radius * self.inputs[layer])
        hidden = [self.inputs[0]]
        for layer in range(1, depth):
            # √(‖h‖² + 1) is 1-Lipschitz in ‖h‖.
            hidden.append(self.inputs[layer] + moved[layer - 1])
        # Step 2.
        column, size = [np.zeros(n)] * depth, [np.zeros(n)] * depth
        off = np.zeros(n)
        for layer in reversed(range(depth)):
            drift = np.zeros(n) if layer == depth - 1 else omega[layer + 1] * off + radius * self.cotangents[layer + 1]
            off = drift + self.bends[layer] * self.columns[layer] * moved[layer]
            column[layer], size[layer] = self.columns[layer] + drift, self.cotangents[layer] + off
        # Step 3; rows of coefficients, one column for each ν.
        pre: list[np.ndarray] = []
        for layer in range(depth):
            row = omega[layer] * pre[-1] if layer else np.zeros((n, depth))
            row[:, layer] += hidden[layer]
            pre.append(row)
        blocks: list[np.ndarray] = []
        cotangent = np.zeros((n, depth))
        for layer in reversed(range(depth)):
            if layer < depth - 1:
                cotangent = omega[layer + 1] * cotangent
                cotangent[:, layer + 1] += size[layer + 1]
            cotangent = cotangent + (self.bends[layer] * column[layer])[:, None] * pre[layer]
            before = pre[layer - 1] if layer else np.zeros((n, depth))
            blocks.append(size[layer][:, None] * before + hidden[layer][:, None] * cotangent)
        # Step 4; a matrix of D columns.
        stacked = np.concatenate(blocks)
        if not np.isfinite(stacked).all():
            return math.inf
        try:
            return float(np.linalg.norm(stacked, 2))
        except np.linalg.LinAlgError:
            return math.inf


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
    layers = dense_layers(apply_fn, params, x)
    if layers is None or not all(layer.activation in SMOOTH for layer in layers):
        return None
    factors, spread = kernel_factors(apply_fn, params, x), output_error(apply_fn, params, x)
    if factors is None or spread is None:
        return None
    factors = factors[::-1]
    n = factors[0].h.shape[0]
    c = factors[0].delta.shape[0] // n
    weights = [spectral_norm_bound(layer.weight) for layer in layers]
    inputs, cotangents, columns = [], [], []
    for at, (layer, part) in enumerate(zip(layers, factors, strict=True)):
        length = (np.linalg.norm(part.h, axis=1) + part.h_error) * _INFLATE
        inputs.append(np.sqrt(length**2 + layer.biased) * _INFLATE)
        rows = np.linalg.norm(part.delta, axis=1) + part.delta_error
        cotangents.append(np.linalg.norm(rows.reshape(n, c), axis=1) * _INFLATE)
        if at == len(layers) - 1:
            columns.append(np.ones(n))  # g_D = I
            continue
        following = factors[at + 1]
        g = following.delta @ layers[at + 1].weight.T
        # ‖ĝ - g‖ of a row: the error of δ through W, and the rounding of the product, below 1e-6 of the norms.
        length = np.linalg.norm(following.delta, axis=1)
        error = (following.delta_error + 1e-9 * length) * weights[at + 1] * math.sqrt(layer.weight.shape[1])
        largest = np.linalg.norm(g.reshape(n, c, -1), axis=1).max(axis=1)
        columns.append((largest + np.linalg.norm(error.reshape(n, c), axis=1)) * _INFLATE)
    return Anchor(
        inputs=tuple(inputs),
        cotangents=tuple(cotangents),
        columns=tuple(columns),
        weights=tuple(weights),
        bends=tuple(layer.bend for layer in layers),
        jacobian=math.sqrt(max(max_eig_upper, 0.0)) * _INFLATE,
        # The computed residual differs from the exact one by what its outputs do.
        residual=(residual_norm + spread) * _INFLATE,
        loss_scale=loss_scale,
        curvature=curvature,
    )


def certified_radius(base: Anchor, budget: float) -> float:
    """Return R*, rounded down: L_Θ(R) R < λ_0 is proved for every R <= R*.

    R -> L_Θ(R) R grows, so one root separates the two sides; it is bisected on a log scale, and the end that satisfies
    the inequality is returned.

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
    for _ in range(_BISECTIONS):
        middle = math.sqrt(low * high)
        if not low < middle < high:
            break
        low, high = (middle, high) if safe(middle) else (low, middle)
    return low
