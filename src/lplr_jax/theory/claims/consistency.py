"""Claim `consistency`: does the record agree with itself? A failure means that the run or the tool is wrong.

What is compared are recorded numbers, against the error that rounding may have left in them.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float

from lplr_jax.curves.pairs import UNIT_64
from lplr_jax.theory.claims.agreement import REFERENCE, agree, of_probes
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import SUMS, Evidence
from lplr_jax.theory.method import NOT_SEEN, UNRESOLVED
from lplr_jax.theory.verdict import Verdict, weakest


def consistency(evidence: Evidence) -> Verdict:
    """Hold the record against itself: the PL identity at every probe, the Rayleigh quotient's place in the spectrum,
    series against probes, steps against η and drift, interlacing, intervals, distances, spectra, certificates, the
    kernel of some samples against that of another implementation.

    Every part is an identity or an inequality that holds for any network and any data. "proved" says that each holds to
    its rounding bound and that the kernel's error is itself bounded; "undecided" that one could not be held.
    """  # noqa: D205
    form = _form(evidence)
    # Numbers that cannot be would only spread through the other checks.
    others = () if form.outcome == "refuted" else (*_series(evidence), *_steps(evidence), *of_probes(evidence))
    parts = [part for part in (form, *others) if part is not None]
    main = next((part for part in parts if part.claim == "identity"), None)
    broken = [part for part in parts if part.outcome == "refuted"]
    open_ = [part for part in parts if part.outcome == "undecided"]
    shown = broken[0] if broken else open_[0] if open_ else main
    if shown is None:
        return Verdict("consistency", REFERENCE, "undecided", note="the identity was not measured").with_parts(*parts)
    where = f" ({evidence.partial}, loss and gradient of the same samples)" if evidence.partial else ""
    if broken:
        note = f"the record contradicts itself: {', '.join(part.claim for part in broken)}; the rest is not evaluated"
    elif main is None:
        note = f"the identity was not measured; {len(parts)} kinds of check"
    else:
        note = f"the identity holds at all {evidence.epochs.size} probes{where}; {len(parts)} kinds of check"
    if open_ and not broken:
        note += f"; open: {'; '.join(f'{part.claim}, {part.note}' for part in open_)}"
    outcome = weakest(part.outcome for part in parts)
    verdict = shown.standing_for("consistency", REFERENCE, outcome, note, inconsistent=bool(broken))
    return verdict.with_parts(*parts)


def _form(evidence: Evidence) -> Verdict:
    """Count numbers that cannot be: not finite before the divergence, negative, out of order, off at epoch 0."""
    record, end = evidence.record, evidence.end
    bad: list[str] = []
    epoch = record["epoch"]
    if epoch[0] != 0 or not (np.diff(epoch) > 0).all():
        bad.append("epoch does not ascend from 0")
    for name in ("loss", "grad_sq_norm", "drift"):
        series = evidence.series(name)[evidence.claimed]
        signed = name == "loss" and evidence.loss != "squared"  # other losses may fall below 0
        if not (np.isfinite(series).all() and (signed or (series >= 0).all())):
            bad.append(f"{name} is negative or not finite")
    for name in ("step_deviation", "step_rounding"):
        if (evidence.series(name) < 0).any():
            bad.append(f"{name} is negative")
    if end and record["drift"][0] != 0:
        bad.append("drift is not 0 at epoch 0")
    for name in ("loss_scale", "n", "c", "p", "smoothness_upper", "parameter_eps", "probe_eps", "probe_loss_scale"):
        if evidence.number(name) <= 0:
            bad.append(f"{name} is not positive")
    if np.unique(evidence.epochs).size != evidence.epochs.size or (evidence.epochs < 0).any():
        bad.append("probe_epoch repeats or is negative")
    if not np.isin(evidence.epochs, evidence.steps).all():
        bad.append("probe_epoch names an epoch that is not in the series")
    always = ("ntk_min_eig", "ntk_max_eig", "ntk_rayleigh", "ntk_shift", "probe_loss", "probe_grad_sq_norm")
    if 0 not in evidence.epochs:  # no Θ_0 that could be trusted, so no shift
        always = tuple(name for name in always if name != "ntk_shift")
    bad += [f"{name} is not finite" for name in always if name in evidence.arrays and not _all_finite(evidence, name)]
    for name in ("ntk_min_eig_lower", "ntk_min_eig_upper"):
        if name in evidence.arrays and np.isnan(evidence.probe(name)).any():
            bad.append(f"{name} is NaN")
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
    """Hold loss and gradient of the series against the probes in float64, where both are of all data."""
    if evidence.partial or not (evidence.has("probe_loss") and evidence.has("probe_grad_sq_norm")):
        return
    kept = evidence.seen[evidence.at]
    epochs, at = evidence.epochs[kept], evidence.at[kept]
    # The hidden values of large parameters lose digits that outputs do not tell of: as many as θ loses that is rounded.
    moved, beta = 4 * evidence.unit * _size(evidence)[kept], _curvature(evidence)[kept]
    gradient, wide_gradient = evidence.series("grad_sq_norm")[at], evidence.probe("probe_grad_sq_norm")[kept]
    loss, wide = evidence.series("loss")[at], evidence.probe("probe_loss")[kept]
    hidden = np.nan_to_num(np.sqrt(wide_gradient) * moved + beta * moved**2 / 2)
    allowed = 4 * evidence.loss_noise[at] + hidden + SUMS * wide
    note = "loss of the training series against the probe in float64"
    yield agree("loss", np.abs(loss - wide), allowed, epochs, units="units of L", note=note)
    off = evidence.gradient_error[at] + np.nan_to_num(beta * moved)
    allowed = 2 * np.sqrt(gradient) * off + off**2 + SUMS * wide_gradient
    note = "‖∇L‖² of the training series against the probe in float64"
    yield agree("gradient", np.abs(gradient - wide_gradient), allowed, epochs, units="L² / parameter²", note=note)


def _curvature(evidence: Evidence) -> Float[np.ndarray, " k"]:
    """Return ‖∇²L‖ at every probe; the largest of the others where it was not measured."""
    ends = np.fmax(np.abs(evidence.probe("sharpness")), np.abs(evidence.probe("curvature_min")))
    return np.where(np.isfinite(ends), ends, np.max(ends[np.isfinite(ends)], initial=0.0))


def _size(evidence: Evidence) -> Float[np.ndarray, " k"]:
    """Return a bound of ‖θ_t‖ at every probe, by the spacing of θ_0, which is more than ½ eps |θ_0| in every entry."""
    way = evidence.series("drift")[evidence.at]
    if "param_pair_distance" in evidence.arrays and evidence.epochs.size and evidence.epochs[0] == 0:
        way = np.fmin(way, evidence.arrays["param_pair_distance"][0])
    return evidence.number("parameter_spacing") / evidence.unit + way


def _steps(evidence: Evidence) -> Iterator[Verdict | None]:
    """Hold the recorded η against the steps, and the first step against the drift after it."""
    method, recorded = evidence.method, evidence.number("learning_rate")
    if method.plain and np.isfinite(recorded):
        kept = np.isfinite(method.sizes)
        allowed = method.allowed[kept] / (1 - method.allowed[kept])
        gap = np.abs(recorded / method.sizes[kept] - 1)
        note = f"the recorded η = {recorded:.6g} is that of the steps, {method.eta:.6g}"
        yield agree("step_size", gap, allowed, evidence.steps[kept], units="1", note=note)
        kept = kept & np.append(np.diff(evidence.steps) == 1, False) & np.append(evidence.seen[1:], False)
        at = np.flatnonzero(kept)
        drift, moved = evidence.series("drift"), method.sizes * np.sqrt(evidence.series("grad_sq_norm"))
        gap = np.abs(drift[at + 1] - drift[at]) - moved[at]
        sums = 4 * np.sqrt(evidence.number("p")) * max(evidence.unit, UNIT_64)
        slack = sums * (drift[at + 1] + drift[at]) + method.allowed[at] * moved[at]
        note = "no step changes the drift by more than its length η_t ‖∇L_t‖"
        yield agree("drift", gap, slack, evidence.steps[at], units="parameter", note=note)
    if not (evidence.seen[:2].sum() == 2 and evidence.steps[1] == 1):
        return
    drift, gradient = evidence.series("drift")[1], evidence.series("grad_sq_norm")[0]
    size, deviation = evidence.series("step_size")[0], evidence.series("step_deviation")[0]
    sums = np.sqrt(evidence.number("p")) * max(evidence.unit, UNIT_64)
    if np.isfinite(size) and np.isfinite(deviation) and drift > 0 and gradient > 0:
        # ‖Δ‖² = η²‖∇L‖² + (deviation ‖Δ‖)², as η ∇L is the projection of Δ: true of every method. Each of drift²,
        # η², ‖∇L‖² and deviation² is a sum of p products, or twice one.
        gap = abs(1 - deviation**2 - (size * np.sqrt(gradient) / drift) ** 2)
        allowed = 16 * sums + 2 * evidence.gradient_noise[0] / gradient
        note = "drift after the first step, its η_0 ‖∇L_0‖ and its deviation form a right triangle"
        yield agree("first_step", np.array([gap]), allowed, evidence.steps[:1], units="1", note=note)
    elif method.kind == "unseen" and np.isfinite(recorded):
        yield _first_step_unseen(evidence, recorded)


def _first_step_unseen(evidence: Evidence, eta: float) -> Verdict | None:
    """Hold drift_1 against η‖∇L_0‖; where they differ the method or η is another, and nothing here tells which.

    None where rounding makes up so much of the step that its length is not read.
    """
    drift, length = float(evidence.series("drift")[1]), float(np.sqrt(evidence.series("grad_sq_norm")[0]))
    # Each entry of θ_1 is off by half its spacing, at most that of θ_0 and u times the step.
    rounded = np.nan_to_num(evidence.number("parameter_spacing"), nan=0.0) + evidence.unit * drift
    sums = 4 * np.sqrt(evidence.number("p")) * evidence.unit
    allowed = float(rounded + 2 * eta * evidence.gradient_error[0] + sums * drift)
    if not allowed < UNRESOLVED * max(drift, eta * length):
        return None
    holds = abs(drift - eta * length) <= allowed
    note = "the drift after the first step is η ‖∇L_0‖"
    if not holds:
        first = drift / length if length > 0 else np.inf
        note = f"the recorded η = {eta:.4g} is not the first step's: drift_1/‖∇L_0‖ = {first:.4g}; {NOT_SEEN}"
    return Verdict(
        "first_step",
        REFERENCE,
        "proved" if holds else "undecided",
        measured=drift,
        bound=eta * length,
        step=0,
        units="parameter",
        note=note,
    )


CONSISTENCY = Claim(
    id="consistency",
    reference=REFERENCE,
    statement="The numbers of the record agree with each other.",
    latex=r"\tfrac12\|\nabla L\|^2 = \frac{g^\top \Theta\, g}{2 s^2}, \quad g = \partial\ell/\partial f",
    needs=(
        "probe_epoch",
        "probe_loss",
        "probe_grad_sq_norm",
        "ntk_min_eig",
        "ntk_min_eig_lower",
        "ntk_min_eig_upper",
        "ntk_max_eig",
        "ntk_rayleigh",
        "ntk_assembly_error",
        "ntk_shift",
        "param_pair_distance",
    ),
    rests_on=Rests(every_kernel=("",)),
    on_failure="inconsistent",
    check=consistency,
    example=linear_regression,
)
