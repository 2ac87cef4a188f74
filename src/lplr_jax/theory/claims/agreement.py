"""The parts of `consistency` that hold probes and certificates against each other.

Each is an identity or an inequality that is true for any network, any data and any step size. A part whose arrays were
not measured is left out.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from lplr_jax.curves.pairs import UNIT_32, UNIT_64
from lplr_jax.curves.pl import pl_identity_tolerance
from lplr_jax.theory.evidence import HESSIAN_ERROR, KERNEL_UNITS, LIPSCHITZ_UNITS, SUMS, Evidence
from lplr_jax.theory.spectra import rest_of
from lplr_jax.theory.verdict import Outcome, Verdict, factor

REFERENCE = "identity ½‖∇L‖² = gᵀΘg/(2 s²), section 3"
RITZ = 1e-3
"""Relative amount by which a Lanczos estimate of a spectral norm may stay below it."""
RADIUS_ERROR = 1e-6
"""Relative error of R*, which is found by bisection."""


def agree(
    name: str,
    gap: Float[np.ndarray, "..."],
    allowed: Float[np.ndarray, "..."] | float,
    epochs: np.ndarray | None,
    *,
    units: str,
    note: str,
    outcome: Outcome = "proved",
) -> Verdict | None:
    """Hold gaps against what rounding allows, entry by entry, and show the worst; None where there is none.

    A gap that is NaN is a failure. Where `allowed` is not finite rounding has no bound, so nothing is held.
    """
    gap = np.asarray(gap, np.float64)
    if not gap.size:
        return None
    allowed = np.broadcast_to(np.asarray(allowed, np.float64), gap.shape)
    open_ = ~np.isfinite(allowed)
    holds = (gap <= allowed) | open_
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        excess = np.where(gap > 0, gap / allowed, np.where(gap <= 0, 0.0, np.inf))
    excess = np.where(holds, np.where(open_, 0.0, excess), np.maximum(np.nan_to_num(excess, nan=np.inf), 1.0))
    worst = np.unravel_index(int(np.argmax(np.where(holds, excess, np.inf))), gap.shape)
    step = None if epochs is None else int(epochs[worst[-1]])
    measured, bound = float(gap[worst]), float(allowed[worst])
    ok = bool(holds.all())
    if open_.any():
        outcome, note = "undecided", f"{note}; the error of {int(open_.sum())} of {gap.size} has no bound"
    return Verdict(
        name,
        REFERENCE,
        outcome if ok else "refuted",
        measured=measured,
        bound=bound,
        margin=factor(max(measured, 0.0), bound),
        step=step,
        units=units,
        note=note,
        inconsistent=not ok,
    )


def of_probes(evidence: Evidence) -> Iterator[Verdict | None]:
    """Yield the parts, None where a part has no entry."""
    at, error = evidence.epochs, evidence.kernel_error
    if not (at.size and evidence.has("ntk_min_eig")):
        return
    quality: Outcome = "proved" if evidence.certified.all() else "not refuted"
    low, high, rayleigh = (evidence.probe(f"ntk_{name}") for name in ("min_eig", "max_eig", "rayleigh"))
    measures = ("ntk_rayleigh", "ntk_max_eig", "probe_loss", "probe_grad_sq_norm")
    told = evidence.loss == "squared" or evidence.has("output_grad_norm")
    if told and not evidence.trace and all(evidence.has(name) for name in measures):
        chain = (evidence.kernel_size + evidence.number("p")) ** 2  # √chain terms at most, so this bounds every sum
        with np.errstate(divide="ignore", invalid="ignore"):
            # ½‖∇L‖² = gᵀΘg / (2 s²) with ‖g‖² = 2 s L for the squared loss.
            g_sq = evidence.probe("output_grad_norm") ** 2
            if evidence.loss == "squared":
                g_sq = 2 * evidence.probe_scale * evidence.probe("probe_loss")
            gap = np.abs(evidence.probe("probe_grad_sq_norm") * evidence.probe_scale**2 / (rayleigh * g_sq) - 1)
            tolerance = error / rayleigh + np.array(
                [
                    pl_identity_tolerance(max_eig=a, rayleigh=b, chain=int(chain), unit_roundoff=evidence.probe_unit)
                    for a, b in zip(high, rayleigh, strict=True)
                ]
            )
        note = "relative gap between gradient and kernel, in float64"
        kept = evidence.probe("probe_loss") != 0  # an exact fit has no ratio
        yield agree("identity", gap[kept], tolerance[kept], at[kept], units="1", note=note, outcome=quality)
        slack = error + evidence.kernel_size * evidence.probe_unit * high
        note = "λ_min <= rᵀΘr/‖r‖² <= λ_max"
        gap = np.maximum(low - rayleigh, rayleigh - high)[kept]
        yield agree("position", gap, slack[kept], at[kept], units=KERNEL_UNITS, note=note)
    yield from _intervals(evidence)
    yield from _enclosures(evidence)
    yield _peer(evidence)
    yield from _pairs(evidence)
    yield from _spectra(evidence)
    yield from _certificates(evidence)


def _intervals(evidence: Evidence) -> Iterator[Verdict | None]:
    at, error, value = evidence.epochs, evidence.kernel_error, evidence.probe("ntk_min_eig")
    if evidence.has("ntk_min_eig_lower") or evidence.has("ntk_min_eig_upper"):
        lower, upper = (evidence.probe(f"ntk_min_eig_{end}") for end in ("lower", "upper"))
        # A Gram matrix has no negative eigenvalue; an interval relative to the computed kernel may end below zero by
        # the error of assembly.
        outside = np.fmax.reduce([lower - value, value - upper, -upper - error])
        note = "lower <= λ_min <= upper, and upper >= 0"
        yield agree("interval", outside, 0.0, at, units=KERNEL_UNITS, note=note)
    if evidence.has("ntk_min_eig_subset"):
        below = value - evidence.probe("ntk_min_eig_subset")
        slack = 2 * error + evidence.kernel_size * UNIT_64 * evidence.probe("ntk_max_eig")
        note = "λ_min of the subset is not below that of all (Cauchy interlacing)"
        yield agree("interlacing", below, slack, at, units=KERNEL_UNITS, note=note)
    if evidence.has("ntk_shift"):
        shift = evidence.probe("ntk_shift")
        off = np.where(at == 0, np.abs(shift), -shift)
        yield agree("shift", off, 0.0, at, units=KERNEL_UNITS, note="‖Θ_t - Θ_0‖ >= 0, and 0 at epoch 0")
        # ‖Θ_t‖ <= ‖Θ_0‖ + ‖Θ_t - Θ_0‖ and the reverse.
        high = evidence.probe("ntk_max_eig")
        if at[0] == 0:
            gap = np.abs(high - high[0]) - shift
            slack = error + error[0] + SUMS * np.maximum(high, shift)
            yield agree("norm", gap, slack, at, units=KERNEL_UNITS, note="|λ_max(Θ_t) - λ_max(Θ_0)| <= ‖Θ_t - Θ_0‖₂")


def _enclosures(evidence: Evidence) -> Iterator[Verdict | None]:
    """Hold loss and decrease as they were measured against what is proved of them."""
    at = evidence.epochs
    if evidence.has("probe_loss_lower") or evidence.has("probe_loss_upper"):
        lower, upper, value = (evidence.probe(f"probe_loss{end}") for end in ("_lower", "_upper", ""))
        kept = np.isfinite(lower + upper + value)
        outside = np.maximum.reduce([lower - value, value - upper, lower - upper])
        note = "the proved bounds of the loss hold the measured one"
        yield agree("loss_bounds", outside[kept], (SUMS * value)[kept], at[kept], units="units of L", note=note)
    if evidence.has("probe_decrease_lower") or evidence.has("probe_decrease_upper"):
        lower, upper = (evidence.probe(f"probe_decrease_{end}") for end in ("lower", "upper"))
        note = "the proved bounds of the decrease of one step are in order"
        kept = np.isfinite(lower + upper)
        yield agree("decrease_bounds", (lower - upper)[kept], 0.0, at[kept], units="1", note=note)


def _peer(evidence: Evidence) -> Verdict | None:
    """Hold the kernel against that of another implementation."""
    gap = evidence.probe("ntk_peer_difference")
    kept = ~np.isnan(gap)
    # Θ_ij is a sum of p products of derivatives, each a chain of sums over fan-ins, 8 √p terms in all: γ_k of
    # Σ|J_ip J_jp| <= √(Θ_ii Θ_jj) <= max Θ for either implementation. Sums that are no fan-ins get what all sums get.
    p = evidence.number("p")
    lost = (p + 8 * np.sqrt(p)) * UNIT_64
    allowed = max(SUMS, 2 * lost / (1 - lost)) if lost < 0.5 else np.inf
    note = "the kernel is that of another implementation, entry by entry over the largest one"
    return agree("peer", gap[kept], allowed, evidence.epochs[kept], units="1", note=note)


def _triangle(distance: Float[np.ndarray, "k k"]) -> Float[np.ndarray, " k"]:
    """Return, for each probe t, how far d(s, t) exceeds d(s, u) + d(u, t) at worst."""
    detour = (distance[:, :, None] + distance[None, :, :]).min(axis=1)
    return (distance - detour).max(axis=0)


def _pairs(evidence: Evidence) -> Iterator[Verdict | None]:
    at = evidence.epochs
    named = (
        ("ntk_pair_shift", "kernel pairs", KERNEL_UNITS, RITZ),
        ("param_pair_distance", "parameter pairs", "parameter", SUMS),
    )
    for name, title, units, relative in named:
        if not evidence.has(name):
            continue
        matrix = np.asarray(evidence.arrays[name], np.float64)
        kept = np.isfinite(matrix.diagonal())
        if not kept.any():
            continue
        inner = matrix[np.ix_(kept, kept)]
        size = float(np.nanmax(matrix))
        faults = np.maximum.reduce([np.abs(inner - inner.T).max(axis=0), np.abs(inner.diagonal()), -inner.min(axis=0)])
        note = "symmetric, zero on the diagonal, not negative, triangle inequality"
        gap = np.maximum(faults, _triangle(inner))
        yield agree(title.replace(" ", "_"), gap, 2 * relative * size, at[kept], units=units, note=note)
        if not (at[0] == 0 and kept[0]):
            continue
        other = evidence.probe("ntk_shift") if name == "ntk_pair_shift" else evidence.series("drift")[evidence.at]
        if name == "param_pair_distance":
            # The drift is a sum of p squares, in float32 or coarser.
            relative = 4 * np.sqrt(evidence.number("p")) * max(UNIT_32, evidence.unit)
        kept &= np.isfinite(other)
        gap = np.abs(matrix[0] - other)[kept]
        slack = relative * np.maximum(matrix[0], other)[kept] + (
            2 * evidence.kernel_error[kept] if units == KERNEL_UNITS else 0.0
        )
        note = "the pairs with θ_0 agree with the series"
        yield agree(f"{title.split()[0]}_row", gap, slack, at[kept], units=units, note=note)


def _spectra(evidence: Evidence) -> Iterator[Verdict | None]:
    if not evidence.has("spectrum"):
        return
    spectrum = np.asarray(evidence.arrays["spectrum"], np.float64)
    kept = np.isfinite(spectrum).all(axis=1)
    at, spectrum = evidence.epochs[kept], spectrum[kept]
    slack = 4 * evidence.kernel_error[kept] + 16 * evidence.kernel_size * UNIT_64 * spectrum[:, -1]
    order = (spectrum[:, :-1] - spectrum[:, 1:]).max(axis=1, initial=-np.inf)
    cut, low = "spectrum_rest" in evidence.arrays, spectrum[:, 0] - evidence.probe("ntk_min_eig")[kept]
    # Of a spectrum that is cut off λ_min is below the last one that is kept.
    ends = np.fmax(-low if cut else np.abs(low), np.abs(spectrum[:, -1] - evidence.probe("ntk_max_eig")[kept]))
    note = "ascending, and its ends are λ_min and λ_max"
    yield agree("spectrum", np.fmax(order, ends), slack, at, units=KERNEL_UNITS, note=note)
    if not evidence.has("residual_energy"):
        return
    energy = np.asarray(evidence.arrays["residual_energy"], np.float64)[kept]
    rest = rest_of(evidence.arrays, "residual_energy", evidence.epochs.size)[kept]
    has = np.isfinite(energy).all(axis=1) & np.isfinite(rest)  # the residual of an exact fit has no direction
    energy, spectrum, at, slack, rest = energy[has], spectrum[has], at[has], slack[has], rest[has]
    faults = np.maximum(np.abs(energy.sum(axis=1) + rest - 1), -np.fmin(energy.min(axis=1), rest))
    yield agree("energy", faults, SUMS, at, units="1", note="the residual's energy is a share: >= 0, sum 1")
    if not (at.size and evidence.has("ntk_rayleigh")):
        return
    off = (energy * spectrum).sum(axis=1) - evidence.probe("ntk_rayleigh")[kept][has]
    # What was cut off has eigenvalues from 0 to the least that is kept.
    gap = np.maximum(off, -off - rest * spectrum[:, 0])
    note = "Σ energy · eigenvalue is rᵀΘr/‖r‖²"
    yield agree("weighted_spectrum", gap, slack, at, units=KERNEL_UNITS, note=note)


def _certificates(evidence: Evidence) -> Iterator[Verdict | None]:
    lower = evidence.number("ntk_lipschitz_lower")
    pairs = evidence.has("ntk_pair_shift") and evidence.has("param_pair_distance")
    if np.isfinite(lower) and pairs and np.isfinite(evidence.ratio.value):
        gap = np.array([abs(lower - evidence.ratio.value)])
        note = "the recorded lower estimate of L_Θ is that of the pairs"
        yield agree("lipschitz", gap, SUMS * abs(lower), None, units=LIPSCHITZ_UNITS, note=note)
    upper = evidence.number("ntk_lipschitz_upper")
    if np.isfinite(upper):
        names = ("lower", "random", "gradient", "power")
        estimates = np.array([evidence.number(f"ntk_lipschitz_{name}") for name in names])
        gap = estimates[np.isfinite(estimates)] - upper
        note = "no lower estimate of L_Θ exceeds the proved upper bound"
        yield agree("lipschitz_bound", gap, 0.0, None, units=LIPSCHITZ_UNITS, note=note)
    if evidence.affine:
        shift = evidence.probe("ntk_shift")
        slack = evidence.kernel_error + evidence.kernel_error[0]
        note = "the kernel of a model affine in its parameters does not move"
        yield agree("affine", np.nan_to_num(shift, nan=0.0), slack, evidence.epochs, units=KERNEL_UNITS, note=note)
    smooth, sharp = evidence.number("smoothness_upper"), evidence.probe("sharpness")
    if np.isfinite(smooth) and evidence.affine and evidence.loss == "squared" and not evidence.partial:
        gap = evidence.probe("ntk_max_eig") / evidence.s - smooth
        note = "the Hessian of a model affine in its parameters is JᵀJ/s, and no λ_max/s exceeds the bound of β"
        slack = np.where(np.isfinite(gap), evidence.kernel_error / evidence.s, np.nan)
        yield agree("smoothness_kernel", gap, slack, evidence.epochs, units="L / parameter²", note=note)
    if np.isfinite(smooth) and np.isfinite(sharp).any():
        kept = np.isfinite(sharp)
        note = "no measured sharpness exceeds the proved upper bound of β"
        units = "L / parameter²"
        yield agree(
            "smoothness_bound",
            sharp[kept] - smooth,
            HESSIAN_ERROR * smooth,
            evidence.epochs[kept],
            units=units,
            note=note,
        )
    certified, budget = evidence.number("radius_certified"), evidence.budget
    if np.isfinite(certified) and budget is not None:
        # R -> L_Θ(R) R grows, so the run's radius lies beyond R* exactly where its bound exceeds λ_0.
        reach = upper * evidence.proof_radius
        wrong = certified < 0 or (
            np.isfinite(reach) and (reach < budget.lower * (1 - RADIUS_ERROR)) != (certified > evidence.proof_radius)
        )
        # Beyond the run's radius L_Θ is no smaller.
        wrong |= certified > evidence.proof_radius and upper * certified > budget.upper * (1 + RADIUS_ERROR)
        note = "R* lies on the side of the run's radius that L_Θ(R) R < λ_0 says"
        yield agree("radius", np.array([float(wrong)]), 0.0, None, units="faults", note=note)
