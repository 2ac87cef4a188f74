"""Between a loss and its gradient in the outputs, sample by sample: what PL becomes where the loss is not squared.

½‖∇L‖² = ρ‖g‖²/(2 s²) >= λ‖g‖²/(2 s²), and ‖g_i‖² is at least some ψ(ℓ_i). Gradients of softmax are orthogonal to the
vector of ones in every sample, so λ may be λ_⊥ = λ_min((I ⊗ Qᵀ) Θ (I ⊗ Q)), Q an orthonormal basis of what is
orthogonal to the ones; as ‖Q‖ = 1, what bounds the error of Θ bounds that of the reduced kernel.
"""

import math
from dataclasses import replace
from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax import certificates, linalg
from lplr_jax.diagnostics import PointDiagnostics
from lplr_jax.losses import Loss, SoftmaxCrossEntropy
from lplr_jax.losses.margins import MarginLoss
from lplr_jax.proofs.rounding import AssemblyBound

ALWAYS = ("output_grad_norm", "sample_bound_sum", "samples_beyond", "output_norm")
"""Names in the record of what is measured at a probe of every loss but the squared one."""
OF_CLASSES = ("ntk_class_min_eig", "ntk_class_min_eig_lower", "ntk_class_min_eig_upper")
"""Names of what is measured for softmax as well."""
OF_LABELS = ("probe_accuracy",)
"""Names of what is measured as well where every sample has a class."""
OF_DISTRIBUTIONS = ("sample_least_share",)
"""Names of what is measured where targets are distributions as well."""


def names(loss: Loss) -> tuple[str, ...]:
    """Return what `bridge_values` measures for a loss, by record name."""
    if not isinstance(loss, SoftmaxCrossEntropy):
        return (*ALWAYS, *(OF_LABELS if isinstance(loss, MarginLoss) else ()))
    return (*ALWAYS, *OF_LABELS, *OF_CLASSES, *(() if loss.hard else OF_DISTRIBUTIONS))


def contrasts(c: int) -> Float[np.ndarray, "c c-1"]:
    """Return an orthonormal basis of the vectors of sum 0, Helmert's."""
    basis = np.zeros((c, c - 1))
    for k in range(1, c):
        basis[:k, k - 1], basis[k, k - 1] = 1 / math.sqrt(k * (k + 1)), -math.sqrt(k / (k + 1))
    return basis


def class_kernel(theta: Float[np.ndarray, "nc nc"], c: int) -> tuple[Float[np.ndarray, "m m"], float]:
    """Return (I ⊗ Qᵀ) Θ (I ⊗ Q), m = n (c - 1), and a bound on what rounding took from it, in spectral norm.

    Every entry is a sum of c² products of three factors, of which those of Q are off by at most 4 u; two sums of c
    terms are formed one after the other, so an entry is off by at most γ_{2c+10} of the same sum of absolute values.
    """
    basis, n = contrasts(c), theta.shape[0] // c

    def reduced(blocks: np.ndarray, q: np.ndarray) -> np.ndarray:
        rows = np.tensordot(blocks.reshape(n * c * n, c), q, axes=(1, 0)).reshape(n, c, n, c - 1)
        return np.tensordot(rows, q, axes=(1, 0)).transpose(0, 3, 1, 2).reshape(n * (c - 1), n * (c - 1))

    absolute = reduced(np.abs(theta), np.abs(basis))
    found = reduced(theta, basis)
    error = certificates.gamma(2 * c + 10) * float(np.linalg.norm(absolute)) * (1 + 1e-6)
    return (found + found.T) / 2, certificates.up(error)


def class_min_eig(
    theta: Float[np.ndarray, "nc nc"], c: int, p: int, bound: AssemblyBound | None
) -> tuple[linalg.MinEig, bool]:
    """Return λ_⊥ of a kernel of c classes and p parameters, and whether the interval includes the error of assembly."""
    kernel, rounding = class_kernel(theta, c)
    if kernel.shape[0] > p:
        return linalg.MinEig(value=0.0, lower=0.0, upper=0.0, proved=True, converged=True), True
    known = (
        replace(bound, assembly_error=bound.assembly_error + rounding) if bound else AssemblyBound(rounding, 0.0, ())
    )
    return linalg.min_eig(kernel, **vars(known)), bound is not None


def bridge_values(
    theta: Float[np.ndarray, "nc nc"], point: PointDiagnostics, loss: Loss, p: int, *, bound: AssemblyBound | None
) -> dict[str, float]:
    """Return what the claim `loss_bridge` needs of one point, by record name.

    Args:
        theta: the full kernel, sample-major.
        point: losses and gradients there.
        loss: of the run.
        p: parameters.
        bound: the error of the kernel's assembly; None where none is known: then λ_⊥ has no interval.
    """
    gradient, c = point.gradient, point.gradient.shape[1]
    values = {
        "output_grad_norm": float(np.linalg.norm(gradient)),
        "output_norm": float(np.linalg.norm(point.outputs)),
        "samples_beyond": float(np.sum(point.losses > math.log(2))),
        "sample_bound_sum": float(np.sum(loss.gradient_sq_range(point.losses, c)[0])),
    }
    if isinstance(loss, MarginLoss):
        values["probe_accuracy"] = float(np.mean((point.outputs > 0) == (point.targets > 0)))
    if not isinstance(loss, SoftmaxCrossEntropy):
        return values
    found, wanted = (np.argmax(rows, axis=1) for rows in (point.outputs, point.targets))
    values["probe_accuracy"] = float(np.mean(found == wanted))
    least, proved = class_min_eig(theta, c, p, bound)
    values["ntk_class_min_eig"] = least.value
    values["ntk_class_min_eig_lower"] = least.lower if proved else math.nan
    values["ntk_class_min_eig_upper"] = least.upper if proved else math.nan
    if not loss.hard:
        share, excess = _of_distributions(point, loss)
        values["sample_least_share"] = float(share.min())
        values["sample_bound_sum"] = float(np.sum(2 * share * excess))
    return values


def _of_distributions(
    point: PointDiagnostics, loss: SoftmaxCrossEntropy
) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
    """Return min_k min(p_ik, τ_ik) and KL(τ_i‖p_i) = ℓ_i - H(τ_i): ‖g_i‖² is at least twice their product."""
    tau = np.asarray(loss.distributions(point.targets)[0])
    share = np.minimum(point.gradient + tau, tau).min(axis=1)
    return np.maximum(share, 0.0), np.maximum(point.losses - loss.least(point.targets), 0.0)


def run_values(
    loss: Loss,
    point: PointDiagnostics,
    *,
    sample_max_eig: float,
    jacobian_lipschitz: float,
    radius: float,
) -> dict[str, np.ndarray]:
    """Return the infimum of L where it is known and not 0, and what bounds every margin on a ball, by record name.

    A margin m_i is Lipschitz in f_i, and f_i in θ with K <= √λ_max(Θ_ii(θ_0)) + L_J R on B(θ_0, R).

    Args:
        loss: of the run.
        point: losses and gradients at θ_0.
        sample_max_eig: upper bound of every λ_max(Θ_ii) at θ_0.
        jacobian_lipschitz: proved L_J on the ball.
        radius: R.
    """
    found: dict[str, Any] = {}
    infimum = float(loss.least(point.targets).sum()) / point.loss_scale
    if infimum > 0:
        found["loss_infimum"] = infimum * (1 - 1e-12)
    if loss.margin_slope and math.isfinite(sample_max_eig + jacobian_lipschitz):
        slope = loss.margin_slope * (math.sqrt(max(sample_max_eig, 0.0)) + jacobian_lipschitz * radius)
        found["margin_max"] = float(loss.margins(point.outputs, point.targets).max())
        found["margin_slope_upper"] = certificates.up(slope * (1 + 1e-9))
    return {name: np.asarray(value) for name, value in found.items()}
