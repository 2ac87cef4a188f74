"""What the verdicts on one run come to together, in a few lines, by rule."""

import math
from collections.abc import Sequence

from lplr_jax.curves.summary import check_record, step_word
from lplr_jax.records import Record
from lplr_jax.theory.claims.floor_pl import Window, percent, window_of
from lplr_jax.theory.claims.interpolation import certificate_of
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import Verdict, any_inconsistent, at_least, at_most

LINES = 6
"""Lines that a story has at most."""
OURS = "ours, not the paper's"
_CONTAINED = {
    "proved": " That it stays near θ_0 is proved from θ_0 alone (containment).",
    "refuted": " From θ_0 alone it does not follow: the Jacobian moves too far (containment is refuted).",
}


def story(verdicts: Sequence[Verdict], record: Record) -> tuple[str, ...]:
    """Say which hypotheses hold, what accounts for the decrease and for the path, of zero loss, and what remains.

    Args:
        verdicts: what `verify` returned for the record.
        record: the run; its steps are called as its config calls them.

    Returns:
        At most six lines of plain text.

    Raises:
        TypeError: for what is no record.
    """
    check_record(record)
    by = {verdict.claim: verdict for verdict in verdicts}
    wrong = [verdict.claim for verdict in verdicts if verdict.inconsistent]
    if any_inconsistent(verdicts):
        return (f"The record or this package is wrong ({', '.join(wrong)}): nothing is read off it.",)
    evidence = Evidence(record)
    if not evidence.end:
        return (by["consistency"].note[:1].upper() + by["consistency"].note[1:] + ": there is nothing to explain.",)
    window, word = window_of(evidence), step_word(record)
    return (
        f"{_hypotheses(by)} {_conclusions(by)}",
        _steps(by["descent"], word),
        _decrease(by["floor_pl"], window, word) if evidence.loss == "squared" else _bridge(by["loss_bridge"]),
        _path(by["path"], by["containment"]),
        _zero(by["interpolation"], evidence) if evidence.loss == "squared" else _floor(by["loss_bridge"]),
        _rest(by, window),
    )


def _hypotheses(by: dict[str, Verdict]) -> str:
    condition = by["compatibility"]
    excess = condition.measured / condition.bound if condition.bound > 0 else math.inf
    by_much = f" by the factor {excess:.2g}" if condition.outcome == "refuted" and math.isfinite(excess) else ""
    parts = {part.claim: part for part in by["linear_rate"].parts}
    step = parts.get("linear_rate.step_size")
    told = [
        f"λ_0 > 0 is {by['ntk_positive'].outcome}",
        f"Θ Lipschitz is {by['ntk_lipschitz'].outcome}",
        f"L_Θ r < λ_0 is {condition.outcome}{by_much}",
        *([f"η <= 1/β is {step.outcome}"] if step else []),
    ]
    return f"Hypotheses of the paper: {', '.join(told)}."


def _conclusions(by: dict[str, Verdict]) -> str:
    local, rate = by["local_pl"], by["linear_rate"]
    words = f"Conclusions of the paper: local PL (Theorem 5.4) is {local.outcome}"
    words += f", the linear rate (Theorem 5.7) is {rate.outcome}."
    if local.outcome == rate.outcome == "not applicable":
        words += " The theorems are silent about this run, not false."
    return words


def _steps(verdict: Verdict, word: str) -> str:
    if verdict.outcome == "not refuted":
        unit = "with a_t the fall of L in units of η_t ‖∇L_t‖²"
        return f"No {word} that was seen raises the loss beyond rounding ({OURS}), {unit}: {verdict.note}."
    if verdict.outcome == "refuted":
        return f"Some steps raise the loss ({OURS}): {verdict.note}."
    return f"Whether every {word} lowers the loss is {_open(verdict)} ({OURS}): {verdict.note}."


def _decrease(verdict: Verdict, window: Window | None, word: str) -> str:
    if window is None or not verdict.met:
        return f"What accounts for the decrease is {_open(verdict)} ({OURS}): {verdict.note}."
    first, last = window.loss
    if not first > last:
        span = f"{word} {window.start} to {window.stop}"
        return f"The loss did not fall from {span}: there is no decrease to account for."
    directions = f"{window.k} eigendirections" if window.k > 1 else "eigendirection"
    shares = [percent(window.share(bound)) for bound in (window.bound, window.bound_all)]
    return (
        f"PL with a floor ({OURS}) accounts for {shares[0]} of the decrease of log L, λ_min for {shares[1]}: in one "
        f"window, {word} {window.start} to {window.stop}, the loss falls in the top {directions} at the "
        f"rate of λ_{window.k} >= {at_least(window.rate, 3)} to L_T <= {at_most(window.bound, 3)}, where {last:.3g} "
        "was reached; all of it is measured along the run, not predicted."
    )


def _bridge(verdict: Verdict) -> str:
    """Say what the kernel accounts for where the loss is not squared."""
    parts = {part.claim.rpartition(".")[2]: part for part in verdict.parts}
    if not ("chain" in parts and math.isfinite(parts["chain"].measured)):
        return f"What accounts for the decrease is {_open(verdict)} ({OURS}): {verdict.note}."
    least = parts["chain"].measured
    words = f"½‖∇L‖² is {least:.3g} times what λ and the loss guarantee of it, or more, at every probe ({OURS})"
    envelope, slope = parts.get("envelope"), parts.get("exponent")
    power = "" if slope is None else f"; it goes with L to the power of {slope.measured:.3g}"
    if envelope is None:
        return f"{words}{power}."
    if envelope.outcome == "not refuted":
        return f"{words}{power}. So L falls as 1/t at least: {envelope.note}."
    return f"{words}; a bound of 1/t is {_open(envelope)}: {envelope.note}."


def _floor(verdict: Verdict) -> str:
    """Say what L* is known to be above where the loss is not squared."""
    for part in verdict.parts:
        if part.claim.endswith((".floor", ".infimum")) and part.met:
            return f"L* is not 0 ({OURS}): {part.note}."
    return f"What L* is on the ball of the run is open ({OURS}): no bound of a margin is known."


def _path(verdict: Verdict, containment: Verdict) -> str:
    if not verdict.met:
        return f"Whether a time budget explains the path is {_open(verdict)} ({OURS}): {verdict.note}."
    length = verdict.part("length")
    return (
        f"The path stays within its time budget ({OURS}): length {length.measured:.3g} is {_of(length)} of the budget "
        f"{verdict.bound:.3g}, drift {verdict.measured:.3g} is {_of(verdict)} of it, without any PL constant."
        f"{_CONTAINED.get(containment.outcome, '')}"
    )


def _zero(verdict: Verdict, evidence: Evidence) -> str:
    if verdict.outcome == "refuted":
        return f"Zero loss is out of reach ({OURS}): {verdict.note}."
    found = certificate_of(evidence)
    if verdict.outcome != "proved" or found is None:
        return f"Whether zero loss is within reach is {_open(verdict)} ({OURS}): {verdict.note}."
    inside = "on the ball of the run itself" if evidence.radius >= found.radius else "on larger balls alone"
    return (
        f"Zero loss is proved to be attained within {at_most(found.radius, 4)} of θ_0 ({OURS}), where the run drifted "
        f"{evidence.radius:.3g}: L* = 0 is a theorem {inside}."
    )


def _of(verdict: Verdict) -> str:
    return percent(verdict.measured / verdict.bound) if verdict.bound > 0 else "all"


def _rest(by: dict[str, Verdict], window: Window | None) -> str:
    left = []
    floor = by["floor_pl"]
    if window is not None and floor.met:
        share = window.share()
        if share < 1:
            left.append(f"{percent(1 - share)} of the decrease of log L")
        left.append(f"what the kernel does between the {window.probes} probes that keep a spectrum")
    elif not (by["linear_rate"].met or "loss_bridge.envelope" in _met(by["loss_bridge"])):
        left.append("the rate of the decrease")
    if by["descent"].outcome == "refuted" and by["path"].outcome != "not applicable":
        left.append("why the loss falls over the run though single steps raise it")
    if not by["path"].met:
        left.append("the length of the path")
    return f"Unexplained: {'; '.join(left) or 'nothing of what was measured'}."


def _met(verdict: Verdict) -> set[str]:
    return {part.claim for part in verdict.parts if part.met}


def _open(verdict: Verdict) -> str:
    return "refuted" if verdict.outcome == "refuted" else "open"
