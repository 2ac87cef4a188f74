"""Claim `consistency`: does the record agree with itself? A failure means that the run or the tool is wrong.

Every statement here is an identity or an inequality that holds for any network, any data and any step size. What is
compared are recorded numbers, against the error that rounding may have left in them.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from lplr_jax.curves.pairs import UNIT_32, UNIT_64
from lplr_jax.curves.pl import pl_identity_tolerance
from lplr_jax.theory.evidence import HESSIAN_ERROR, KERNEL_UNITS, LIPSCHITZ_UNITS, Evidence
from lplr_jax.theory.verdict import Outcome, Verdict, factor, weakest

REFERENCE = "identity ½‖∇L‖²/L = rᵀΘr/(s‖r‖²), section 3"
SUMS = 1e-9
"""Relative error allowed to sums and norms formed twice in float64."""
RITZ = 1e-3
"""Relative amount by which a Lanczos estimate of a spectral norm may stay below it."""


def consistency(evidence: Evidence) -> Verdict:
    """Hold the record against itself: the PL identity at every probe, the Rayleigh quotient's place in the spectrum,
    float32 against float64, interlacing, intervals, distances, spectra, certificates.

    "proved" says that every such statement holds to its rounding bound and that the kernel's error is itself bounded.
    """  # noqa: D205
    form = _form(evidence)
    # Numbers that cannot be would only spread through the other checks.
    others = () if form.outcome == "refuted" else (*_series(evidence), *_probes(evidence))
    parts = [part for part in (form, *others) if part is not None]
    main = next((part for part in parts if part.claim == "identity"), None)
    broken = [part for part in parts if part.outcome == "refuted"]
    shown = broken[0] if broken else main
    if shown is None:
        return Verdict("consistency", REFERENCE, "undecided", note="no kernel probe was recorded").with_parts(*parts)
    if broken:
        note = f"the record contradicts itself: {', '.join(part.claim for part in broken)}; the rest is not evaluated"
    else:
        where = f" ({evidence.partial}, loss and gradient of the same samples)" if evidence.partial else ""
        note = f"the identity holds at all {evidence.epochs.size} probes{where}; {len(parts)} kinds of check"
    outcome = weakest(part.outcome for part in parts)
    verdict = shown.standing_for("consistency", REFERENCE, outcome, note, inconsistent=bool(broken))
    return verdict.with_parts(*parts)


def _check(
    name: str,
    gap: Float[np.ndarray, "..."],
    allowed: Float[np.ndarray, "..."] | float,
    epochs: np.ndarray | None,
    *,
    units: str,
    note: str,
    outcome: Outcome = "proved",
) -> Verdict | None:
    """Hold gaps against what rounding allows, entry by entry, and show the worst; a NaN is a failure."""
    gap = np.asarray(gap, np.float64)
    if not gap.size:
        return None
    allowed = np.broadcast_to(np.asarray(allowed, np.float64), gap.shape)
    holds = gap <= allowed
    with np.errstate(divide="ignore", invalid="ignore"):
        excess = np.where(gap > 0, gap / allowed, np.where(gap <= 0, 0.0, np.inf))
    excess = np.where(holds, excess, np.maximum(np.nan_to_num(excess, nan=np.inf), 1.0))
    worst = np.unravel_index(int(np.argmax(np.where(holds, excess, np.inf))), gap.shape)
    step = None if epochs is None else int(epochs[worst[-1]])
    measured, bound = float(gap[worst]), float(allowed[worst])
    ok = bool(holds.all())
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


def _form(evidence: Evidence) -> Verdict:
    """Count numbers that cannot be: not finite before the divergence, negative, out of order, off at epoch 0."""
    record, end = evidence.record, evidence.end
    bad: list[str] = []
    if not np.array_equal(record["epoch"], np.arange(record["epoch"].size)):
        bad.append("epoch is not 0, 1, 2, ...")
    for name in ("loss", "grad_sq_norm", "drift"):
        series = np.asarray(record[name][:end])[evidence.measured]
        if not (np.isfinite(series).all() and (series >= 0).all()):
            bad.append(f"{name} is negative or not finite")
    if end and record["drift"][0] != 0:
        bad.append("drift is not 0 at epoch 0")
    for name in ("loss_scale", "n", "c", "p"):
        if not float(record[name]) > 0:
            bad.append(f"{name} is not positive")
    if np.unique(evidence.epochs).size != evidence.epochs.size or (evidence.epochs < 0).any():
        bad.append("probe_epoch repeats or is negative")
    always = ("ntk_min_eig", "ntk_max_eig", "ntk_rayleigh", "ntk_shift", "probe_loss", "probe_grad_sq_norm")
    if 0 not in evidence.epochs:  # no Θ_0 that could be trusted, so no shift
        always = tuple(name for name in always if name != "ntk_shift")
    bad += [f"{name} is not finite" for name in always if name in evidence.arrays and not _all_finite(evidence, name)]
    if "ntk_min_eig_lower" in evidence.arrays and np.isnan(evidence.probe("ntk_min_eig_lower")).any():
        bad.append("ntk_min_eig_lower is NaN")
    note = "; ".join(bad) or "finite, of the right sign and in order"
    return Verdict(
        "form",
        REFERENCE,
        "refuted" if bad else "proved",
        measured=float(len(bad)),
        bound=0.0,
        units="faults",
        note=note,
        inconsistent=bool(bad),
    )


def _all_finite(evidence: Evidence, name: str) -> bool:
    # The residual of an exact fit has no direction.
    ignored = evidence.probe("probe_loss") == 0 if name == "ntk_rayleigh" else False
    return bool((np.isfinite(evidence.arrays[name]) | ignored).all())


def _series(evidence: Evidence) -> Iterator[Verdict | None]:
    if evidence.partial or not (evidence.has("probe_loss") and evidence.has("probe_grad_sq_norm")):
        return
    at = evidence.epochs
    loss, wide = evidence.series("loss")[at], evidence.probe("probe_loss")
    allowed = 4 * evidence.loss_noise[at] + SUMS * wide
    note = "loss of the training series against the probe in float64"
    yield _check("loss", np.abs(loss - wide), allowed, at, units="units of L", note=note)
    gradient, wide_gradient = evidence.series("grad_sq_norm")[at], evidence.probe("probe_grad_sq_norm")
    allowed = evidence.gradient_noise[at] + SUMS * wide_gradient
    note = "‖∇L‖² of the training series against the probe in float64"
    yield _check("gradient", np.abs(gradient - wide_gradient), allowed, at, units="L² / parameter²", note=note)


def _probes(evidence: Evidence) -> Iterator[Verdict | None]:
    at, error = evidence.epochs, evidence.kernel_error
    if not (at.size and evidence.has("ntk_min_eig")):
        return
    quality: Outcome = "proved" if evidence.certified.all() else "not refuted"
    low, high, rayleigh = (evidence.probe(f"ntk_{name}") for name in ("min_eig", "max_eig", "rayleigh"))
    measures = ("ntk_rayleigh", "ntk_max_eig", "probe_loss", "probe_grad_sq_norm")
    if not evidence.trace and all(evidence.has(name) for name in measures):
        chain = (evidence.kernel_size + evidence.number("p")) ** 2  # √chain terms at most, so this bounds every sum
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = 0.5 * evidence.probe("probe_grad_sq_norm") / evidence.probe("probe_loss")
            gap = np.abs(ratio * evidence.probe_scale / rayleigh - 1)
            tolerance = error / rayleigh + np.array(
                [
                    pl_identity_tolerance(max_eig=a, rayleigh=b, chain=int(chain), unit_roundoff=UNIT_64)
                    for a, b in zip(high, rayleigh, strict=True)
                ]
            )
        note = "relative gap between gradient and kernel, in float64"
        kept = evidence.probe("probe_loss") != 0  # an exact fit has no ratio
        yield _check("identity", gap[kept], tolerance[kept], at[kept], units="1", note=note, outcome=quality)
        slack = error + evidence.kernel_size * UNIT_64 * high
        note = "λ_min <= rᵀΘr/‖r‖² <= λ_max"
        gap = np.maximum(low - rayleigh, rayleigh - high)[kept]
        yield _check("position", gap, slack[kept], at[kept], units=KERNEL_UNITS, note=note)
    yield from _intervals(evidence)
    yield from _pairs(evidence)
    yield from _spectra(evidence)
    yield from _certificates(evidence)


def _intervals(evidence: Evidence) -> Iterator[Verdict | None]:
    at, error, value = evidence.epochs, evidence.kernel_error, evidence.probe("ntk_min_eig")
    if evidence.has("ntk_min_eig_lower"):
        lower, upper = (evidence.probe(f"ntk_min_eig_{end}") for end in ("lower", "upper"))
        # A Gram matrix has no negative eigenvalue; an interval relative to the computed kernel may end below zero by
        # the error of assembly.
        outside = np.maximum.reduce([lower - value, value - upper, -upper - error])
        note = "lower <= λ_min <= upper, and upper >= 0"
        yield _check("interval", outside, 0.0, at, units=KERNEL_UNITS, note=note)
    if evidence.has("ntk_min_eig_subset"):
        below = value - evidence.probe("ntk_min_eig_subset")
        slack = 2 * error + evidence.kernel_size * UNIT_64 * evidence.probe("ntk_max_eig")
        note = "λ_min of the subset is not below that of all (Cauchy interlacing)"
        yield _check("interlacing", below, slack, at, units=KERNEL_UNITS, note=note)
    if evidence.has("ntk_shift"):
        shift = evidence.probe("ntk_shift")
        off = np.where(at == 0, np.abs(shift), -shift)
        yield _check("shift", off, 0.0, at, units=KERNEL_UNITS, note="‖Θ_t - Θ_0‖ >= 0, and 0 at epoch 0")
        # ‖Θ_t‖ <= ‖Θ_0‖ + ‖Θ_t - Θ_0‖ and the reverse.
        high = evidence.probe("ntk_max_eig")
        if at[0] == 0:
            gap = np.abs(high - high[0]) - shift
            slack = error + error[0] + SUMS * np.maximum(high, shift)
            yield _check("norm", gap, slack, at, units=KERNEL_UNITS, note="|λ_max(Θ_t) - λ_max(Θ_0)| <= ‖Θ_t - Θ_0‖₂")


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
        inner = matrix[np.ix_(kept, kept)]
        size = float(np.nanmax(matrix))
        faults = np.maximum.reduce([np.abs(inner - inner.T).max(axis=0), np.abs(inner.diagonal()), -inner.min(axis=0)])
        note = "symmetric, zero on the diagonal, not negative, triangle inequality"
        gap = np.maximum(faults, _triangle(inner))
        yield _check(title.replace(" ", "_"), gap, 2 * relative * size, at[kept], units=units, note=note)
        if not (at[0] == 0 and kept[0]):
            continue
        other = evidence.probe("ntk_shift") if name == "ntk_pair_shift" else evidence.series("drift")[at]
        if name == "param_pair_distance":
            relative = 4 * np.sqrt(evidence.number("p")) * UNIT_32  # the drift is a sum of p squares in float32
        else:
            other = np.where(np.isfinite(other), other, inner[0].max())
        gap = np.abs(matrix[0] - other)[kept]
        slack = relative * np.maximum(matrix[0], other)[kept] + (
            2 * evidence.kernel_error[kept] if units == KERNEL_UNITS else 0.0
        )
        note = "the pairs with θ_0 agree with the series"
        yield _check(f"{title.split()[0]}_row", gap, slack, at[kept], units=units, note=note)


def _spectra(evidence: Evidence) -> Iterator[Verdict | None]:
    if not evidence.has("spectrum"):
        return
    spectrum = np.asarray(evidence.arrays["spectrum"], np.float64)
    kept = np.isfinite(spectrum).all(axis=1)
    at, spectrum = evidence.epochs[kept], spectrum[kept]
    slack = 4 * evidence.kernel_error[kept] + 16 * evidence.kernel_size * UNIT_64 * spectrum[:, -1]
    order = (spectrum[:, :-1] - spectrum[:, 1:]).max(axis=1, initial=-np.inf)
    ends = np.maximum(
        np.abs(spectrum[:, 0] - evidence.probe("ntk_min_eig")[kept]),
        np.abs(spectrum[:, -1] - evidence.probe("ntk_max_eig")[kept]),
    )
    note = "ascending, and its ends are λ_min and λ_max"
    yield _check("spectrum", np.maximum(order, ends), slack, at, units=KERNEL_UNITS, note=note)
    if not evidence.has("residual_energy"):
        return
    energy = np.asarray(evidence.arrays["residual_energy"], np.float64)[kept]
    faults = np.maximum(np.abs(energy.sum(axis=1) - 1), -energy.min(axis=1))
    yield _check("energy", faults, SUMS, at, units="1", note="the residual's energy is a share: >= 0, sum 1")
    gap = np.abs((energy * spectrum).sum(axis=1) - evidence.probe("ntk_rayleigh")[kept])
    note = "Σ energy · eigenvalue is rᵀΘr/‖r‖²"
    yield _check("weighted_spectrum", gap, slack, at, units=KERNEL_UNITS, note=note)


def _certificates(evidence: Evidence) -> Iterator[Verdict | None]:
    lower = evidence.number("ntk_lipschitz_lower")
    if np.isfinite(lower) and evidence.has("ntk_pair_shift"):
        gap = np.array([abs(lower - evidence.ratio.value)])
        note = "the recorded lower estimate of L_Θ is that of the pairs"
        yield _check("lipschitz", gap, SUMS * abs(lower), None, units=LIPSCHITZ_UNITS, note=note)
    upper = evidence.number("ntk_lipschitz_upper")
    if np.isfinite(upper):
        names = ("lower", "random", "gradient", "power")
        estimates = np.array([evidence.number(f"ntk_lipschitz_{name}") for name in names])
        gap = estimates[np.isfinite(estimates)] - upper
        note = "no lower estimate of L_Θ exceeds the proved upper bound"
        yield _check("lipschitz_bound", gap, 0.0, None, units=LIPSCHITZ_UNITS, note=note)
    if evidence.affine:
        shift = evidence.probe("ntk_shift")
        slack = evidence.kernel_error + evidence.kernel_error[0]
        note = "the kernel of a model affine in its parameters does not move"
        yield _check("affine", np.nan_to_num(shift, nan=0.0), slack, evidence.epochs, units=KERNEL_UNITS, note=note)
    smooth, sharp = evidence.number("smoothness_upper"), evidence.probe("sharpness")
    if np.isfinite(smooth) and np.isfinite(sharp).any():
        kept = np.isfinite(sharp)
        note = "no measured sharpness exceeds the proved upper bound of β"
        units = "L / parameter²"
        yield _check(
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
            np.isfinite(reach) and (reach < budget.lower * (1 - 1e-6)) != (certified > evidence.proof_radius)
        )
        note = "R* lies on the side of the run's radius that L_Θ(R) R < λ_0 says"
        yield _check("radius", np.array([float(wrong)]), 0.0, None, units="faults", note=note)
