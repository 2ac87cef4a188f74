"""What the five figures of the paper's earlier version (v2) say."""

import itertools
import math

from lplr_jax.curves.summary import gradient_law, summarise
from lplr_jax.records import Record
from lplr_jax.statements.statement import Finding, Runs, Statement, found, listed, measured

SLOPES = {"mnist": 1.14, "seeds": 0.29}
"""Log-log slope of ‖∇L‖² against the gap in the earlier version; its smoothing is not known to us."""
SLOPE_MARGIN = 0.1
"""Largest difference to it."""
SMOOTHED = 10
"""Both curves are averaged over one of so many parts of the run first."""
TRANSIENT_SHARE = 0.05
"""Share of the run that is its transient."""
ALIKE = 0.25
"""Largest difference of two later rates that are alike, as a share of that of "he"."""
ENHANCED = "scaled-output"
"""Our stand-in for the enhanced initialisation, whose definition is not known to us."""
EPOCH = 250
"""Epoch at which the losses of all widths are compared."""


def _slope(record: Record) -> float:
    smoothing = max(1, record["epoch"].size // SMOOTHED)
    return gradient_law(record, summarise(record).floor, smoothing=smoothing, whole=True).slope


def _mnist_slope(runs: Runs) -> Finding:
    assert runs.mnist is not None
    slope = _slope(runs.mnist)
    return found(abs(slope - SLOPES["mnist"]) <= SLOPE_MARGIN, f"{slope:.3g} (paper: {SLOPES['mnist']})", slope)


def _cifar_slope(runs: Runs) -> Finding:
    slopes = {name: _slope(record) for name, record in runs.seeds.items()}
    mean = sum(slopes.values()) / len(slopes)
    words = f"{listed(slopes)}; mean {mean:.3g} (paper: {SLOPES['seeds']})"
    return found(abs(mean - SLOPES["seeds"]) <= SLOPE_MARGIN, words, mean)


def _fall(record: Record) -> float:
    at, loss = measured(record, "loss")
    return math.log(loss[0] / loss[at <= TRANSIENT_SHARE][-1])


def _enhanced(runs: Runs) -> Finding:
    he, other = (runs.inits[name] for name in ("he", ENHANCED))
    falls, rates = [_fall(one) for one in (he, other)], [summarise(one).middle_rate.zero.rate for one in (he, other)]
    words = (
        f"log L falls by {falls[0]:.3g} and {falls[1]:.3g} in the first {TRANSIENT_SHARE:.0%} of the run (he, "
        f"{ENHANCED}); later rates of L {rates[0]:.3g} and {rates[1]:.3g} per step"
    )
    return found(falls[1] < falls[0] and abs(rates[1] / rates[0] - 1) <= ALIKE, words, *rates)


def _loss_of_widths(runs: Runs) -> Finding:
    losses = {}
    for width in sorted(runs.widths):
        record = runs.widths[width]
        here = record["loss"][record["epoch"] == EPOCH]
        if not here.size:
            raise KeyError(f"no loss of epoch {EPOCH} at width {width}")
        losses[width] = float(here[0])
    holds = all(b < a for a, b in itertools.pairwise(losses.values()))
    return found(holds, f"L at epoch {EPOCH}, one η: {listed(losses)}", *losses.values())


EARLIER = (
    Statement("enhanced", "v2", "The enhanced initialisation softens the transient, and leaves the later decay alone.",
              f"with {ENHANCED} in its place: log L falls less in the first {TRANSIENT_SHARE:.0%} of the run, and its "
              f"rate over the middle half is within {ALIKE:.0%}", ("inits",), _enhanced),
    Statement("slope_mnist", "v2", "The log-log slope of ‖∇L‖² against the gap is 1.14 on MNIST.",
              f"within {SLOPE_MARGIN:g}, smoothed over a tenth of the run", ("mnist",), _mnist_slope),
    Statement("slope_cifar", "v2", "The log-log slope of ‖∇L‖² against the gap is 0.29 on CIFAR-10.",
              f"mean over seeds within {SLOPE_MARGIN:g}, smoothed over a tenth of the run", ("seeds",), _cifar_slope),
    Statement("loss_250", "v2", "The loss after 250 epochs falls monotonically with the width.",
              f"L at epoch {EPOCH} falls at every step of the width, all widths at the common η", ("widths",),
              _loss_of_widths),
)  # fmt: skip
"""The statements of the earlier version."""
