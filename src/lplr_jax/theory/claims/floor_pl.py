"""Claim `floor_pl`: PL with a floor, in the top k eigendirections of the kernel. Ours, not the paper's.

With eigenpairs (λ_j, v_j) of Θ(θ), λ_1 >= λ_2 >= ..., and E_k = Σ over j > k of ⟨v_j, r⟩² / (2 s), for every θ and k

    ½‖∇L‖² = rᵀΘr / (2 s²) >= λ_k (‖r‖² - 2 s E_k) / (2 s²) = (λ_k / s) (L - E_k).

With the decrease test, every a_t >= a >= 0 and E >= E_k(θ_t), L_{t+1} - E <= (1 - 2 a η_t λ_k(t) / s) (L_t - E) where
L_t >= E, and L_{t+1} <= L_t <= E elsewhere: the loss falls linearly, at the rate of λ_k, to the energy not yet learnt.
"""

import itertools
import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from lplr_jax.records import Record
from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.decrease import Decrease, decrease_of, not_descending
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import LOSS_UNITS, SUMS, Evidence
from lplr_jax.theory.spectra import Spectra
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, at_least, factor

REFERENCE = "ours (PL with a floor)"
POINTS = 200
"""Points of a curve for a figure, beside the probes."""


@dataclass(frozen=True)
class Window:
    """One window from step 0 with one k: L_T <= E + (L_0 - E)_+ Π (1 - 2 a η_t λ_k / s)_+.

    Attributes:
        k: the k with the least bound; the least one of several.
        start: step number of its first entry, 0.
        stop: that of its last one, a probe with a spectrum.
        probes: how many with a spectrum it holds, both ends included.
        a: the least a_t.
        rate: the least λ_k of these probes.
        floor: E, the largest E_k of these probes.
        bound: the bound of the loss at its end.
        bound_all: the same with λ_min, that is with k the number of all.
        loss: L_0 and L_T.
        in_two: the least bound of two windows with a k each, the second from the bound of the first.
    """

    k: int
    start: int
    stop: int
    probes: int
    a: float
    rate: float
    floor: float
    bound: float
    bound_all: float
    loss: tuple[float, float]
    in_two: float

    def share(self, bound: float | None = None) -> float:
        """Return log(L_0 / bound) / log(L_0 / L_T), the share of the decrease that a bound accounts for.

        A bound below L_T, which a loss at its rounding can have, accounts for all of it and no more.
        """
        first, last = self.loss
        bound = max(self.bound if bound is None else bound, last)
        if not (first > last >= 0 and first > 0):
            return NAN
        if last == 0:
            return 1.0 if bound == 0 else 0.0
        return math.log(first / bound) / math.log(first / last) if bound > 0 else math.inf


def _sizes(found: Decrease, start: int, stop: int) -> Float[np.ndarray, " n"]:
    first, last = np.searchsorted(found.at, [start, stop])
    return found.size[first:last]


def _product(rate: Float[np.ndarray, " m"], sizes: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Return Π_t (1 - η_t rate)_+ for each rate."""
    if not sizes.size:
        return np.ones_like(rate)
    if (sizes == sizes[0]).all():
        return np.maximum(1 - sizes[0] * rate, 0.0) ** sizes.size
    product = np.ones_like(rate)
    for size in sizes:
        product *= np.maximum(1 - size * rate, 0.0)
    return product


def _bound(
    loss: float, spectra: Spectra, first: int, last: int, contraction: Float[np.ndarray, "k m"]
) -> Float[np.ndarray, " m"]:
    """Return the bound for every k of one window between two probes, from a loss at its start; at most that loss."""
    floor = spectra.floor[first : last + 1].max(axis=0)
    product = np.prod(contraction[first:last], axis=0)
    return np.minimum(floor + np.maximum(loss - floor, 0.0) * product, loss)


def _open(evidence: Evidence, found: Decrease) -> tuple[Outcome, str] | None:
    """Return outcome and reason where no window from step 0 can be held."""
    stopped = not_descending(evidence)
    if stopped:
        return stopped
    spectra = evidence.spectra
    if evidence.partial:
        return "not applicable", f"{evidence.partial}: its eigenvectors say nothing of the gradient of all data"
    if spectra is None or spectra.epochs.size < 2 or spectra.epochs[0] != 0:
        return "undecided", "the window asks for the spectrum at step 0 and at a later probe"
    last = _last(found, spectra)
    if not last:
        return "undecided", "not every step to the first probe with a spectrum after step 0 was seen and resolved"
    stop = int(spectra.at[last])
    inside = found.at < stop
    if found.rises[inside].any():
        rises = int(found.rises[inside].sum())
        return "not applicable", f"the loss rises at {rises} steps of the window, so nothing holds it down"
    if not found.resolved[inside].any():
        return "undecided", "the sign of no a_t of the window is known"
    return None


def _last(found: Decrease, spectra: Spectra) -> int:
    """Return which probe with a spectrum is the last one before which no step is missing; 0 where the first is."""
    unbroken = int(np.sum(found.at == np.arange(found.at.size)))
    return int(np.searchsorted(spectra.at, unbroken, side="right")) - 1


def _least(found: Decrease, stop: int) -> float:
    """Return the least a_t of the steps before a position whose sign is known."""
    kept = found.resolved & (found.at < stop)
    return float(found.value[kept].min())


def window_of(evidence: Evidence) -> Window | None:
    """Return the window from step 0 to the last probe with a spectrum before which no step is missing, or None."""
    found = decrease_of(evidence)
    if _open(evidence, found) or evidence.spectra is None:
        return None
    spectra, series, last = evidence.spectra, evidence.series("loss"), _last(found, evidence.spectra)
    stop = int(spectra.at[last])
    a, loss = _least(found, stop), float(series[0])
    contraction = _contractions(evidence, found, a, last)
    bounds = _bound(loss, spectra, 0, last, contraction)
    k = int(np.argmin(bounds))
    in_two = [
        _bound(float(_bound(loss, spectra, 0, i, contraction).min()), spectra, i, last, contraction).min()
        for i in range(1, last)
    ]
    return Window(
        k=spectra.rows(k + 1),
        start=int(spectra.epochs[0]),
        stop=int(spectra.epochs[last]),
        probes=last + 1,
        a=a,
        rate=float(spectra.rate[: last + 1, k].min()),
        floor=float(spectra.floor[: last + 1, k].max()),
        bound=float(bounds[k]),
        bound_all=float(bounds[-1]),
        loss=(loss, float(series[stop])),
        in_two=float(min(in_two, default=NAN)),
    )


def _contractions(evidence: Evidence, found: Decrease, a: float, last: int) -> Float[np.ndarray, "k m"]:
    """Return Π (1 - 2 a η_t λ_k / s)_+ between neighbouring probes, with the lesser λ_k of the two."""
    spectra = evidence.spectra
    assert spectra is not None
    least = 2 * a / evidence.s * np.minimum(spectra.rate[:last], spectra.rate[1 : last + 1])
    ends = itertools.pairwise(spectra.at[: last + 1].tolist())
    return np.array([_product(rate, _sizes(found, *end)) for rate, end in zip(least, ends, strict=True)])


@dataclass(frozen=True)
class Curves:
    """What bounds and predicts the loss from step 0 on, at some step numbers.

    Attributes:
        steps: step numbers.
        envelope: at each the least bound over k of one window from step 0; NaN where there is none.
        all: the bound with λ_min there.
        linearised: what the kernel of step 0 predicts; no bound.
    """

    steps: Int[np.ndarray, " q"]
    envelope: Float[np.ndarray, " q"]
    all: Float[np.ndarray, " q"]
    linearised: Float[np.ndarray, " q"]


def curves(record: Record) -> Curves | None:
    """Return the bounds of one window from step 0 to each of some steps, for a figure; None where there is no window.

    E is the largest E_k of the probes up to the step and of the next one after it.
    """
    evidence = Evidence(record)
    found, spectra = decrease_of(evidence), evidence.spectra
    if _open(evidence, found) or spectra is None:
        return None
    at = spectra.at[: _last(found, spectra) + 1]
    a, loss = _least(found, int(at[-1])), float(evidence.series("loss")[0])
    marks = np.unique(np.concatenate([at, np.linspace(0, at[-1], POINTS).astype(np.int64)]))
    product, modes = np.ones(spectra.rate.shape[1]), spectra.energy[0].copy()
    bounds, predicted = [(loss, loss)], [float(modes.sum())]
    for start, stop in itertools.pairwise(marks):
        after = int(np.searchsorted(spectra.at, stop))
        sizes = _sizes(found, int(start), int(stop))
        product *= _product(2 * a / evidence.s * spectra.rate[after - 1 : after + 1].min(axis=0), sizes)
        floor = spectra.floor[: after + 1].max(axis=0)
        bound = np.minimum(floor + np.maximum(loss - floor, 0.0) * product, loss)
        bounds.append((float(bound.min()), float(bound[-1])))
        modes *= _modes(spectra.eigenvalues[0] / evidence.s, sizes)
        predicted.append(float(modes.sum()))
    envelope, all_ = np.array(bounds).T
    return Curves(evidence.steps[marks], envelope, all_, np.array(predicted))


def _modes(rate: Float[np.ndarray, " m"], sizes: Float[np.ndarray, " n"]) -> Float[np.ndarray, " m"]:
    """Return Π_t (1 - η_t rate)², by which the energy of a mode of a fixed kernel changes."""
    with np.errstate(over="ignore"):
        if sizes.size and (sizes == sizes[0]).all():
            return (1 - sizes[0] * rate) ** (2 * sizes.size)
        product = np.ones_like(rate)
        for size in sizes:
            product *= (1 - size * rate) ** 2
        return product


def floor_pl(evidence: Evidence) -> Verdict:
    """Hold L_T <= E + (L_0 - E)_+ Π (1 - 2 a η_t λ_k(t)/s)_+ in ONE window from step 0, with ONE k.

    λ_k is the lesser of neighbouring probes that keep a spectrum, E the largest E_k of the window's, a the least a_t;
    each factor is clipped at 0. What lies between the probes is not checked: at best "not refuted", and "refuted" says
    that λ_k fell or E_k rose there. The share log(L_0/bound)/log(L_0/L_T) says how much of the decrease is accounted
    for. Parts: the window, two windows (said so: more windows follow the run and explain nothing), the inequality at
    every probe, and what the kernel of step 0 predicts, which is no bound.
    """
    found = decrease_of(evidence)
    parts = (*_windows(evidence), *_pointwise(evidence), *_linearised(evidence, found))
    first = parts[0] if parts and parts[0].claim == "window" else None
    broken = next((part for part in parts if part.inconsistent), None)
    if broken is not None:
        note = f"{broken.note}; it cannot fail"
        verdict = broken.standing_for("floor_pl", REFERENCE, "refuted", note, inconsistent=True)
    elif first is not None:
        verdict = first.standing_for("floor_pl", REFERENCE, first.outcome, first.note)
    else:
        outcome, note = _open(evidence, found) or ("undecided", "")
        verdict = Verdict("floor_pl", REFERENCE, outcome, note=note)
    return verdict.with_parts(*parts)


def _windows(evidence: Evidence) -> tuple[Verdict, ...]:
    window = window_of(evidence)
    if window is None:
        return ()
    place = int(np.searchsorted(evidence.steps, window.stop))
    slack = 2 * float(evidence.loss_noise[place] + evidence.loss_noise[0])
    last = window.loss[1]

    def held(name: str, bound: float, note: str) -> Verdict:
        refuted = last > bound + slack
        outcome: Outcome = "refuted" if refuted else "not refuted" if math.isfinite(slack) else "undecided"
        return Verdict(
            name, REFERENCE, outcome, measured=last, bound=bound, margin=factor(last, bound), step=window.stop,
            units=LOSS_UNITS, note=note,
        )  # fmt: skip

    span = f"epoch {window.start} to {window.stop}"
    share, all_ = (percent(window.share(bound)) for bound in (window.bound, window.bound_all))
    note = (
        f"k = {window.k}, one window from {span}: {share} of the decrease accounted for, {all_} by λ_min (bound "
        f"{window.bound_all:.4g}); λ_k >= {at_least(window.rate, 4)}, E = {window.floor:.3g}, a = {window.a:.3g}; "
        f"not checked between the {window.probes} probes with a spectrum"
    )
    parts = [held("window", window.bound, note)]
    if math.isfinite(window.in_two):
        share = percent(window.share(window.in_two))
        note = f"2 windows from {span}, a k for each: {share} accounted for; more windows follow the run"
        parts.append(held("two_windows", window.in_two, note))
    return tuple(parts)


def percent(share: float) -> str:
    """Return a share with two digits."""
    return f"{100 * share:.2g} %" if share < 0.995 else f"{100 * share:.0f} %"


def _pointwise(evidence: Evidence) -> tuple[Verdict, ...]:
    spectra = evidence.spectra
    if spectra is None or not evidence.has("probe_grad_sq_norm"):
        return ()
    s, among = evidence.probe_scale, np.isin(evidence.epochs, spectra.epochs)
    half = 0.5 * evidence.probe("probe_grad_sq_norm")[among]
    guaranteed = spectra.rate / s * (spectra.loss[:, None] - spectra.floor)
    # Sums in float64; the solver's own error, as that of the kernel, moves rᵀΘr by itself times ‖r‖² = 2 s L.
    solver = 16 * evidence.kernel_size * np.finfo(np.float64).eps / 2 * spectra.eigenvalues[:, 0]
    with np.errstate(over="ignore", invalid="ignore"):  # a run that diverges
        slack = SUMS * half + 4 * (spectra.error + solver) / s * spectra.loss
        short = guaranteed.max(axis=1) - half - slack
    known = np.isfinite(short)
    if not known.any():
        return ()
    worst = int(np.argmax(np.where(known, short, -np.inf)))
    if not (short[known] > 0).any():  # the closest
        with np.errstate(divide="ignore", invalid="ignore"):
            worst = int(np.argmax(np.where(known & (half > 0), guaranteed.max(axis=1) / half, -np.inf)))
    k = int(np.argmax(guaranteed[worst])) + 1
    refuted = bool(short[worst] > 0)
    where = f" ({evidence.partial}, with its own loss and gradient)" if evidence.partial else ""
    closest = f"{int(known.sum())} probes; closest with k = {spectra.rows(k)} here{where}"
    part = Verdict(
        "pointwise", REFERENCE, "refuted" if refuted else "not refuted", measured=float(half[worst]),
        bound=float(guaranteed[worst, k - 1]), margin=factor(float(guaranteed[worst, k - 1]), float(half[worst])),
        step=int(spectra.epochs[worst]), units="L² / parameter²",
        note=f"½‖∇L‖² >= (λ_k/s)(L - E_k) for every k at {closest}",
        inconsistent=refuted,
    )  # fmt: skip
    return (part,)


def _linearised(evidence: Evidence, found: Decrease) -> tuple[Verdict, ...]:
    """Return what gradient descent with the kernel of step 0 would reach: a prediction, no bound."""
    spectra, last = evidence.spectra, evidence.end - 1
    seen = found.covers(0, last) or evidence.method.fixed
    if spectra is None or evidence.partial or spectra.epochs[0] != 0 or not_descending(evidence) or not seen:
        return ()
    rate, eta = spectra.eigenvalues[0] / evidence.s, evidence.eta
    steps = int(evidence.steps[-1])
    with np.errstate(over="ignore"):
        modes = (1 - eta * rate) ** (2 * steps) if evidence.method.fixed else _modes(rate, found.size)
    predicted = float((spectra.energy[0] * modes).sum())
    part = Verdict(
        "linearised", REFERENCE, "not applicable", measured=float(evidence.series("loss")[last]), bound=predicted,
        step=steps, units=LOSS_UNITS,
        note="a prediction from spectrum and residual of epoch 0 alone, Σ_j e_j Π (1 - η_t λ_j/s)²; no bound",
    )  # fmt: skip
    return (part,)


FLOOR_PL = Claim(
    id="floor_pl",
    reference=REFERENCE,
    statement="The loss falls at the rate of the k-th eigenvalue, down to the energy of the modes past it.",
    latex=r"\tfrac12\|\nabla L\|^2 \ge \tfrac{\lambda_k}{s}(L - E_k), \quad"
    r" L_T \le E + (L_0 - E)_+ \prod_t \bigl(1 - 2 a\, \eta_t \lambda_k / s\bigr)_+",
    needs=("probe_epoch", "spectrum", "residual_energy", "step_size", "step_deviation", "step_rounding"),
    rests_on=Rests(kernels=("", "window", "two_windows", "pointwise")),
    loss=("squared",),
    check=floor_pl,
    example=linear_regression,
)
