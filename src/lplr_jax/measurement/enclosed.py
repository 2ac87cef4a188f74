"""What is proved of one point of a dense network under the squared loss: its loss, one exact step, its future.

With r̂ the residual of the outputs as they were computed, e the bound of their error: ‖r‖ lies within e of ‖r̂‖. G is
the gradient, Ĝ = K̂ᵀr̂/s as formed here: s‖Ĝ - G‖ <= ‖K̂ - K‖ ‖r̂‖ + ‖K‖ e + the rounding of the products, some n + c
terms for an entry, γ Σ_i ‖[h_i, 1]‖ Σ_o |r_io| ‖δ_io‖.

One step of exact gradient descent leads from θ to θ⁺ = θ - η G. The loss is evaluated at θ̂⁺ = fl(θ - η Ĝ), which lies
within ε = η ‖Ĝ - G‖ + 2 u (‖θ̂⁺‖ + η ‖Ĝ‖) of θ⁺; ‖r‖ moves between the two by at most B ε, B the bound of ‖J‖ on the
ball around θ that holds both. That bounds a = (L(θ) - L(θ⁺)) / (η ‖G‖²) from either side.

The future: the theorem of `containment` with θ as its centre and a = ½, which η <= 1/β gives. It asks for
h = L_J ‖r‖/λ < ¼, with L_J and β on the closed ball of radius (σ/L_J)(1 - √(1 - 4h)) <= 4 ‖r‖/σ around θ.
"""

import math
from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax.certificates import UNIT, gamma
from lplr_jax.proofs.ball import Anchor, anchor_of
from lplr_jax.proofs.dense import DenseLayer, DenseNetwork, output_with_error
from lplr_jax.proofs.rounding import INFLATE, UNDERFLOW, AssemblyBound, row_norms

NAMES = (
    "probe_loss_lower",
    "probe_loss_upper",
    "probe_decrease_lower",
    "probe_decrease_upper",
    "restart_ratio",
    "restart_radius",
    "restart_smoothness",
)
"""Names in the record of what is proved of a probe."""


def enclose(
    network: DenseNetwork,
    bound: AssemblyBound,
    y: Float[np.ndarray, "n c"],
    *,
    scale: float,
    min_eig_lower: float,
    max_eig_upper: float,
    learning_rate: float,
) -> dict[str, float]:
    """Return what is proved of a point, by record name; NaN where a number has no bound.

    Args:
        network: the point, evaluated.
        bound: how far its factors are from the exact ones.
        y: targets.
        scale: the number s.
        min_eig_lower: proved lower bound of λ_min(Θ).
        max_eig_upper: proved upper bound of λ_max(Θ).
        learning_rate: η of the step; NaN for none.
    """
    values: dict[str, float] = dict.fromkeys(NAMES, math.nan)
    low, high = residual_norm(network.outputs, network.output_error, y)
    values["probe_loss_lower"], values["probe_loss_upper"] = _loss(low, high, scale)
    base = anchor_of(network, max_eig_upper=max_eig_upper, residual_norm=high, loss_scale=scale)
    if base is None:
        return values
    if learning_rate > 0:
        decrease = _one_step(network, bound, base, max_eig_upper, learning_rate, y)
        values["probe_decrease_lower"], values["probe_decrease_upper"] = decrease
    if min_eig_lower > 0:
        radius = 4 * high / math.sqrt(min_eig_lower) * INFLATE
        ball = base.on_ball(radius)
        values["restart_ratio"] = 4 * ball.jacobian_lipschitz * high / min_eig_lower * INFLATE
        values["restart_radius"], values["restart_smoothness"] = radius, ball.smoothness
    return values


def residual_norm(outputs: Float[np.ndarray, "n c"], error: Float[np.ndarray, " n"], y: Any) -> tuple[float, float]:
    """Bound ‖f - y‖ from either side, f within `error` of the computed outputs, row by row.

    Differences, squares, sums and roots lose at most (n c + 4) u of what they give.
    """
    computed = float(np.linalg.norm(outputs - np.asarray(y, np.float64).reshape(outputs.shape)))
    off = float(np.linalg.norm(error)) * INFLATE + 2 * gamma(outputs.size + 4) * computed + UNDERFLOW
    return max(computed - off, 0.0), (computed + off) * (1 + UNIT)


def _loss(low: float, high: float, scale: float) -> tuple[float, float]:
    return low * low / (2 * scale) * (1 - 8 * UNIT), high * high / (2 * scale) * (1 + 8 * UNIT)


def _one_step(
    network: DenseNetwork,
    bound: AssemblyBound,
    base: Anchor,
    size: float,
    eta: float,
    y: np.ndarray,
) -> tuple[float, float]:
    """Bound a = (L(θ) - L(θ⁺)) / (η ‖G‖²) of one exact step from either side; NaN where η ‖G‖² may be 0."""
    scale, (n, c) = base.loss_scale, network.outputs.shape
    residual = network.outputs - y
    moved, squared, lost, far = [], 0.0, 0.0, 0.0
    for layer, part in zip(network.layers, network.factors, strict=True):
        rows = part.delta.reshape(n, c, -1)
        slope = np.einsum("nc,ncm->nm", residual, rows) / scale
        weight, bias = part.h.T @ slope, slope.sum(axis=0, keepdims=True)
        squared += float(np.square(weight).sum()) + float(np.square(bias).sum()) * part.bias
        length = np.sqrt(np.square(row_norms(part.h)) + part.bias)
        each = (np.abs(residual) * row_norms(part.delta).reshape(n, c)).sum(axis=1)
        lost += gamma(n + c + 4) * float((length * each).sum()) * INFLATE
        weight = layer.weight - eta * weight
        bias = None if layer.bias is None else layer.bias - eta * bias
        far += float(np.square(weight).sum()) + (0.0 if bias is None else float(np.square(bias).sum()))
        moved.append(DenseLayer(weight, bias, layer.activation))
    low, high = residual_norm(network.outputs, network.output_error, y)
    lost += bound.factor_error * high + math.sqrt(size) * float(np.linalg.norm(network.output_error)) * INFLATE
    off = (lost / scale) * INFLATE + UNDERFLOW
    length = math.sqrt(squared)
    least, most = length * (2 - INFLATE) - off, length * INFLATE + off
    after = output_with_error(moved, network.factors[0].h)
    if not least > 0 or after is None:
        return math.nan, math.nan
    # Rounding of θ̂⁺, and the distance of Ĝ from G.
    aside = (eta * off + 2 * UNIT * (math.sqrt(far) + eta * most)) * INFLATE
    slide = base.on_ball((eta * most + aside) * INFLATE).jacobian * aside * INFLATE
    near, beyond = residual_norm(*after, y)
    before = _loss(low, high, scale)
    behind = _loss(max(near - slide, 0.0), beyond + slide, scale)
    falls = [(before[0] - behind[1]), (before[1] - behind[0])]
    # A fall below 0 is divided by the least ‖G‖², one above by the largest, and the reverse for the upper end.
    lower = falls[0] / (eta * (most if falls[0] > 0 else least) ** 2)
    upper = falls[1] / (eta * (least if falls[1] > 0 else most) ** 2)
    if not (math.isfinite(lower) and math.isfinite(upper)):
        return math.nan, math.nan
    return lower - 8 * UNIT * abs(lower), upper + 8 * UNIT * abs(upper)
