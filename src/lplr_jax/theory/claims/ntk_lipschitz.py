"""Claim `ntk_lipschitz`: the kernel is Lipschitz on the region."""

import math

from lplr_jax.theory.claims.claim import Claim, Rests
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import LIPSCHITZ_UNITS, Evidence
from lplr_jax.theory.verdict import NAN, Outcome, Verdict, at_most, factor

AFFINE = "the jaxpr shows that the Jacobian does not depend on θ"


def ntk_lipschitz(evidence: Evidence) -> Verdict:
    """Assumption 5.1 (b): Θ is Lipschitz on the region, in spectral norm.

    `measured` is the largest ratio over pairs of probes, `bound` the proved upper bound on the ball of the run. Ratios
    are lower estimates: they can contradict an upper bound, and establish none.
    """
    reference, ratio, upper = "Assumption 5.1 (b)", evidence.ratio, evidence.number("ntk_lipschitz_upper")
    outcome: Outcome
    if evidence.affine:
        outcome, upper, note = "proved", 0.0, f"L_Θ = 0 everywhere: {AFFINE}"
    elif math.isfinite(upper):
        outcome, note = (
            "proved",
            f"L_Θ <= {at_most(upper, 3)} on the ball of radius {evidence.radius:.3g}, by recursion over layers",
        )
    elif math.isfinite(ratio.value):
        outcome, note = "not refuted", "lower estimates only; no upper bound is known for this model"
    else:
        return Verdict("ntk_lipschitz", reference, "undecided", note="the shift of the kernel was not measured")
    where = "" if ratio.s is None else f"; largest ratio between epochs {ratio.s} and {ratio.t}"
    verdict = Verdict(
        "ntk_lipschitz",
        reference,
        outcome,
        measured=ratio.value,
        bound=upper if not math.isnan(upper) else NAN,
        margin=factor(ratio.value, upper),
        units=LIPSCHITZ_UNITS,
        note=note + where,
    )
    return verdict.with_parts(*directions(evidence))


def directions(evidence: Evidence) -> tuple[Verdict, ...]:
    """Return the part that tells what a search for worse directions in the ball found; none where there was none."""
    found = {name: evidence.number(f"ntk_lipschitz_{name}") for name in ("random", "gradient", "power")}
    found = {name: value for name, value in found.items() if math.isfinite(value)}
    if not found:
        return ()
    words = ", ".join(f"{name} {value:.3g}" for name, value in found.items())
    largest, ratio = max(found.values()), evidence.ratio.value
    note = f"search in the ball, lower estimates: {words}"
    if ratio > 0:
        note += f"; {largest / ratio:.3g} times the largest of the trajectory"
    part = Verdict(
        "search",
        "Assumption 5.1 (b)",
        "not refuted",
        measured=largest,
        bound=evidence.number("ntk_lipschitz_upper"),
        margin=factor(largest, evidence.number("ntk_lipschitz_upper")),
        units=LIPSCHITZ_UNITS,
        note=note,
    )
    return (part,)


NTK_LIPSCHITZ = Claim(
    id="ntk_lipschitz",
    reference="Assumption 5.1 (b)",
    statement="The kernel is Lipschitz in the parameters on the region, in spectral norm.",
    latex=r"\|\Theta(\theta) - \Theta(\theta')\|_2 \le L_\Theta \|\theta - \theta'\|",
    needs=("probe_epoch", "ntk_shift"),
    rests_on=Rests(kernels=("",)),
    check=ntk_lipschitz,
    example=linear_regression,
)
