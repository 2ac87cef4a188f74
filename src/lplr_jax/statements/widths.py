"""Section 6.2: what the paper says of the width ablation."""

import itertools
import math

import numpy as np

from lplr_jax.curves.summary import summarise
from lplr_jax.records import Record
from lplr_jax.statements.statement import Finding, Runs, Statement, found, listed, measured, middle_regime

PAPER_DRIFTS = (1.870, 0.158)
"""Final drift of the paper's two runs of width 1024 (Table 1), at the common and at the smaller η."""
DRIFT_FACTOR = 1.5
"""Factor within which the quotient of the two drifts agrees with the paper's."""
LEAST_SEEDS = 5
"""Seeds without which the law of λ_0 is not judged: one seed can show any ratio between 1 and 2."""
DOUBLING = (1.6, 2.5)
"""Mean factor of λ_0 for a doubled width that is about two."""
SMALL_CHANGE = 0.25
"""Largest |λ_T - λ_0|/λ_0 on the subset that is small."""
NARROW = 1.25
"""Largest quotient of two drifts in a narrow range."""
ORDER = 10.0
"""Largest quotient of two PL ratios of one order."""
EARLY_SHARE = 0.05
"""Share of the run that is its first epochs."""
JUMPED = 0.8
"""Least share of the final drift that is reached there, and from which the drift departs no more."""
COLLAPSE = 0.5
"""Share of λ_0 that is a large one."""
COMPARABLE = 2.0
"""Largest quotient of two final losses that are comparable."""


def _last(record: Record, name: str) -> float:
    return float(measured(record, name)[1][-1])


def _change(record: Record) -> float:
    _, eigs = measured(record, "ntk_min_eig_subset")
    return float(abs(eigs[-1] - eigs[0]) / abs(eigs[0]))


def _least_pl(record: Record) -> float:
    summary = summarise(record)
    ratio = summary.bracket[1][middle_regime(summary)]
    return float(ratio.min()) if ratio.size else math.nan


def mean_ratios(starts: dict[int, dict[int, float]]) -> dict[int, tuple[float, float]]:
    """Return for each width but the first the mean factor of λ_0 over the doublings since the width before.

    The second number is the standard error of its logarithm over seeds; NaN for one seed.
    """
    widths = sorted(set.intersection(*(set(one) for one in starts.values())))
    ratios = {}
    for a, b in itertools.pairwise(widths):
        logs = np.array([math.log(one[b] / one[a]) / math.log2(b / a) for one in starts.values()])
        error = logs.std(ddof=1) / math.sqrt(logs.size) if logs.size > 1 else math.nan
        ratios[b] = float(np.exp(logs.mean())), float(error)
    return ratios


def _starts(runs: Runs) -> dict[int, dict[int, float]]:
    return {seed: dict(one) for seed, one in runs.starts.items()}


def _few(runs: Runs) -> Finding | None:
    seeds = len(runs.starts)
    if seeds >= LEAST_SEEDS:
        return None
    return Finding("cannot be decided", f"{seeds} seeds, where {LEAST_SEEDS} are needed")


def _monotone(runs: Runs) -> Finding:
    starts = _starts(runs)
    ratios = mean_ratios(starts)
    rising = sum(all(one[a] < one[b] for a, b in itertools.pairwise(sorted(one))) for one in starts.values())
    words = f"{rising} of {len(starts)} seeds rise at every step of the width; mean factors a doubling "
    words += listed({width: ratio for width, (ratio, _) in ratios.items()})
    return _few(runs) or found(all(ratio > 1 for ratio, _ in ratios.values()), words)


def _doubles(runs: Runs) -> Finding:
    ratios = mean_ratios(_starts(runs))
    parts = [f"{width}: {ratio:.2f} ×/÷ {math.exp(error):.2f}" for width, (ratio, error) in ratios.items()]
    holds = all(DOUBLING[0] <= ratio <= DOUBLING[1] for ratio, _ in ratios.values())
    return _few(runs) or found(holds, "mean factor a doubling, by the wider: " + ", ".join(parts))


def _change_small(runs: Runs) -> Finding:
    changes = {width: _change(record) for width, record in runs.narrow.items()}
    return found(max(changes.values()) <= SMALL_CHANGE, f"|λ_T - λ_0|/λ_0 at {listed(changes)}")


def _loss_falls(runs: Runs) -> Finding:
    losses = {width: _last(record, "loss") for width, record in runs.narrow.items()}
    return found(all(b < a for a, b in itertools.pairwise(losses.values())), f"L_T at {listed(losses)}")


def _drift_narrow(runs: Runs) -> Finding:
    drifts = {width: _last(record, "drift") for width, record in runs.narrow.items()}
    return found(max(drifts.values()) <= NARROW * min(drifts.values()), f"final drift at {listed(drifts)}")


def _pl_order(runs: Runs) -> Finding:
    ratios = {width: _least_pl(record) for width, record in runs.narrow.items()}
    holds = 0 < max(ratios.values()) <= ORDER * min(ratios.values())
    return found(holds, f"least PL ratio (proxy) at {listed(ratios)}", *ratios.values())


def _wide_drift(runs: Runs) -> Finding:
    at, drift = measured(runs.wide, "drift")
    reached, later = drift[at <= EARLY_SHARE].max(), drift[at > EARLY_SHARE]
    words = f"{reached:.3g} in the first {EARLY_SHARE:.0%} of the run, {later.min():.3g} to {later.max():.3g} after it"
    holds = reached >= JUMPED * drift[-1] and later.min() >= JUMPED * later.max()
    narrow = max(_last(record, "drift") for record in runs.narrow.values())
    words += f" (narrower widths end at most at {narrow:.3g})"
    return found(holds and drift[-1] > NARROW * narrow, words)


def _wide_lambda(runs: Runs) -> Finding:
    _, eigs = measured(runs.wide, "ntk_min_eig_subset")
    words = f"λ_T/λ_0 = {eigs[-1] / eigs[0]:.3g}, least {eigs.min() / eigs[0]:.3g}"
    return found(eigs[-1] <= (1 - COLLAPSE) * eigs[0], words)


def _wide_pl(runs: Runs) -> Finding:
    wide, narrow = _least_pl(runs.wide), {width: _least_pl(record) for width, record in runs.narrow.items()}
    words = f"least PL ratio (proxy) {wide:.3g}, narrower widths {listed(narrow)}"
    return found(wide < min(narrow.values()), words, wide, *narrow.values())


def _wide_loss(runs: Runs) -> Finding:
    wide, narrow = _last(runs.wide, "loss"), {w: _last(record, "loss") for w, record in runs.narrow.items()}
    mean = sum(narrow.values()) / len(narrow)
    return found(1 / COMPARABLE <= wide / mean <= COMPARABLE, f"L_T = {wide:.3g}, narrower widths {listed(narrow)}")


def _smaller(runs: Runs) -> Record:
    assert runs.smaller is not None
    return runs.smaller


def _smaller_drift(runs: Runs) -> Finding:
    common, smaller = _last(runs.wide, "drift"), _last(_smaller(runs), "drift")
    paper = PAPER_DRIFTS[0] / PAPER_DRIFTS[1]
    words = f"{common:.3g} and {smaller:.3g}, a quotient of {common / smaller:.3g} (paper: 1.870 and 0.158, 11.8)"
    return found(paper / DRIFT_FACTOR <= common / smaller <= paper * DRIFT_FACTOR, words)


def _smaller_lambda(runs: Runs) -> Finding:
    change, narrow = _change(_smaller(runs)), {width: _change(record) for width, record in runs.narrow.items()}
    words = f"|λ_T - λ_0|/λ_0 = {change:.3g}, narrower widths {listed(narrow)}"
    return found(change <= NARROW * max(narrow.values()), words)


def _smaller_loss(runs: Runs) -> Finding:
    smaller, common = _last(_smaller(runs), "loss"), _last(runs.wide, "loss")
    return found(smaller < common, f"L_T = {smaller:.3g}, at the common η {common:.3g}")


def _smaller_pl(runs: Runs) -> Finding:
    smaller, others = _least_pl(_smaller(runs)), {width: _least_pl(record) for width, record in runs.widths.items()}
    words = f"least PL ratio (proxy) {smaller:.3g}, at the common η {listed(others)}"
    return found(smaller > max(others.values()), words, smaller, *others.values())


def _one(id_: str, sentence: str, rule: str, judge: object, *needs: str) -> Statement:
    return Statement(id_, "6.2", sentence, rule, needs or ("widths",), judge)  # pyright: ignore[reportArgumentType]


_BOTH = ("widths", "smaller")

WIDTHS = (
    _one("lambda_0_rises", "λ_0 rises with the width.",
         f"the mean factor over at least {LEAST_SEEDS} seeds is > 1 at every step of the width", _monotone, "starts"),
    _one("lambda_0_doubles", "λ_0 about doubles with the width.",
         f"the mean factor a doubling over at least {LEAST_SEEDS} seeds lies in {DOUBLING[0]:g} to {DOUBLING[1]:g} at "
         "every step of the width", _doubles, "starts"),
    _one("narrow_lambda", "λ_min changes little at widths 128 to 512.",
         f"|λ_T - λ_0|/λ_0 on the subset at most {SMALL_CHANGE:g}", _change_small),
    _one("narrow_loss", "The final loss falls with the width from 128 to 512.", "L_T falls at every step of the width",
         _loss_falls),
    _one("narrow_drift", "The final drift of widths 128 to 512 is in a narrow range.",
         f"largest over least at most {NARROW:g}", _drift_narrow),
    _one("narrow_pl", "The least PL ratio of widths 128 to 512 is of one order.",
         f"largest over least at most {ORDER:g}, proxy for L*", _pl_order),
    _one("wide_drift", "At the common η the drift of width 1024 jumps in the first epochs, and then stays.",
         f"{JUMPED:.0%} of the final drift within the first {EARLY_SHARE:.0%} of the run, all later drifts within "
         f"{JUMPED:.0%}, and above those of the narrower widths", _wide_drift),
    _one("wide_lambda", "There λ_min loses a large share.", f"λ_T at most {1 - COLLAPSE:.0%} of λ_0 on the subset",
         _wide_lambda),
    _one("wide_pl", "There the PL ratio falls.", "its least is below that of every narrower width, proxy for L*",
         _wide_pl),
    _one("wide_loss", "There the final loss is comparable.",
         f"within a factor of {COMPARABLE:g} of the narrower widths' mean", _wide_loss),
    _one("smaller_drift", "At the smaller η the drift of width 1024 is about a twelfth.",
         f"the quotient of the two is within a factor of {DRIFT_FACTOR:g} of the paper's 11.8", _smaller_drift, *_BOTH),
    _one("smaller_lambda", "There λ_min changes as at the narrower widths.",
         f"|λ_T - λ_0|/λ_0 on the subset at most {NARROW:g} times the largest of them", _smaller_lambda, *_BOTH),
    _one("smaller_loss", "There the final loss is lower.", "L_T below that of the same width at the common η",
         _smaller_loss, *_BOTH),
    _one("smaller_pl", "There the least PL ratio is the largest of the study.",
         "above that of every width at the common η, proxy for L*", _smaller_pl, *_BOTH),
)  # fmt: skip
"""The statements of section 6.2."""
