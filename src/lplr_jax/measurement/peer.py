"""A second opinion on the kernel: that of some samples, computed by the implementation that the run does not use."""

import logging
import warnings
from typing import Any

import jax
import numpy as np
from jaxtyping import Float, Int

from lplr_jax import diagnostics
from lplr_jax.ntk.empirical import at_point, point, precision_scope
from lplr_jax.types import ApplyFn, Params

_LOG = logging.getLogger(__name__)

ROWS = 200
"""Rows of that kernel, samples times outputs. Calibrated: both probes of the width-128 MLP cost a second together."""


def peer_samples(n: int, outputs: int, subset: np.ndarray | None, seed: int) -> Int[np.ndarray, " k"]:
    """Return which samples have their kernel computed twice: the subset, drawn from where it has too many rows.

    Args:
        n: samples.
        outputs: per sample.
        subset: sample numbers to take them from; None for all.
        seed: of the draw, which is independent of every other one of the run.
    """
    among = np.arange(n) if subset is None else np.asarray(subset)
    most = max(1, ROWS // outputs)
    if among.size > most:
        among = np.random.default_rng([seed, ROWS]).choice(among, most, replace=False)
    return np.sort(among)


def peer_difference(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    theta: Float[np.ndarray, "nc nc"],
    samples: Int[np.ndarray, " k"],
    *,
    kernel: str,
) -> float | None:
    """Return the largest difference of an entry between two implementations of a kernel, over the largest entry.

    The peer is neural-tangents with structured derivatives, and the engine where the run's own kernel is of
    neural-tangents.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs.
        params: the point.
        x: inputs of all samples.
        theta: the run's kernel of all samples, in float64.
        samples: sample numbers.
        kernel: which implementation computed it, one of `lplr_jax.ntk.KERNELS`.

    Returns:
        The difference; None, with a line in the log, where the peer cannot be had or cannot treat the function.
    """
    peer = "engine" if kernel.startswith("neural-tangents") else "neural-tangents"
    x = jax.tree.map(lambda leaf: leaf[samples], x)
    try:
        with precision_scope("float64"), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the run's own kernel has said what there is to say
            at = point(apply_fn, params, x, dtype="float64", coupling=False)
            if at.traced.narrow is not None:
                raise ValueError("the function rounds to a narrower type inside")
            other = np.asarray(at_point(apply_fn, at, kernel=peer))
    except Exception as error:  # of a library that nobody maintains, on a function that nobody here knows
        reason = " ".join(str(error).split()) or type(error).__name__
        _LOG.info("no second opinion on the kernel by %s: %s", peer, reason[:200])
        return None
    own = diagnostics.principal_block(theta, samples, at.traced.c)
    largest, gap = float(np.abs(own).max()), float(np.abs(own - other).max())
    return gap / largest if largest > 0 else np.inf if gap > 0 else 0.0
