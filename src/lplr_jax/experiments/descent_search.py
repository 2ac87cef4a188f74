"""The largest step size that descends from a point, by bisection over short runs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from lplr_jax import checks
from lplr_jax.curves.stability import rounding_allowance
from lplr_jax.losses import Objective
from lplr_jax.training import TrainState, init_state, train_step
from lplr_jax.types import Params

_GRADIENT_DESCENT = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
"""Gradient descent whose η is part of its state, so that one compiled program serves every η."""

TOGETHER = 7
"""Step sizes tried at once on an accelerator; a CPU tries one after the other. Calibrated."""


@dataclass(frozen=True)
class Bracket:
    """Where the boundary lies.

    Attributes:
        descends: largest η that was seen to descend.
        fails: least η that was seen not to.
        trials: step sizes tried.
    """

    descends: float
    fails: float
    trials: int

    @property
    def middle(self) -> float:
        """Their geometric mean."""
        return math.sqrt(self.descends * self.fails)


def descends(
    objective: Objective, params: Params, batch: tuple[Any, Array], learning_rate: Array, *, steps: int
) -> Array:
    """Return whether L_{t+1} <= L_t for all t < steps, up to rounding; stops at the first rise.

    Rounding is allowed for as in `diagnostics.rounding_allowance`, in the precision of the loss.

    Args:
        objective: the loss.
        params: θ_0.
        batch: all data.
        learning_rate: η, a traced scalar of the precision of the parameters.
        steps: how many steps are watched.
    """
    state = init_state(params, _GRADIENT_DESCENT)
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": learning_rate}  # pyright: ignore[reportAttributeAccessIssue]
    state = state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))  # pyright: ignore[reportAttributeAccessIssue]
    initial = objective.value(params, *batch)
    roundoff = float(jnp.finfo(initial.dtype).eps) / 2
    # Beside a minimiser L_0 says nothing about the size of the outputs; the labels do.
    size = jnp.maximum(initial, 0.5 * jnp.sum(jnp.square(batch[1])) / objective.scale(batch[1].shape[0]))

    def going_on(carry: tuple[TrainState, Array, Array, Array]) -> Array:
        _, _, step, falling = carry
        return falling & (step <= steps)

    def body(carry: tuple[TrainState, Array, Array, Array]) -> tuple[TrainState, Array, Array, Array]:
        state, before, step, _ = carry
        state, metrics = train_step(state, batch, params, objective=objective, optimizer=_GRADIENT_DESCENT)
        falling = metrics.loss <= before + rounding_allowance(before, size, roundoff)
        return state, jnp.asarray(metrics.loss), step + 1, falling

    carry = (state, initial, jnp.asarray(0), jnp.isfinite(initial))
    return jax.lax.while_loop(going_on, body, carry)[3]


@partial(jax.jit, static_argnames=("objective", "steps"))
def _one(objective: Objective, params: Params, batch: Any, rate: Array, *, steps: int) -> Array:
    return descends(objective, params, batch, rate, steps=steps)


@partial(jax.jit, static_argnames=("objective", "steps"))
def _many(objective: Objective, params: Params, batch: Any, rates: Array, *, steps: int) -> Array:
    return jax.vmap(lambda rate: descends(objective, params, batch, rate, steps=steps))(rates)


def find_boundary(
    objective: Objective,
    params: Params,
    batch: tuple[Any, Array],
    *,
    start: float,
    steps: int = 100,
    tolerance: float = 0.01,
    together: bool | None = None,
    max_rounds: int = 60,
) -> Bracket:
    """Find the largest η that descends from θ_0, by bisection on a log scale.

    Assumes that every η below the boundary descends; where that fails, it is one boundary among several.

    Args:
        objective: the loss.
        params: θ_0; its precision is that of the runs.
        batch: all data.
        start: η to begin with, such as 2/β; the bracket is doubled or halved from there.
        steps: length of every run.
        tolerance: relative width of the bracket at which the search stops.
        together: try several η at once by vmap, narrowing eightfold a round; None does so on accelerators.
        max_rounds: rounds after which the search gives up.

    Returns:
        The bracket.

    Raises:
        ValueError: for settings out of range, or if no boundary is found.
    """
    checks.number("start", start, above=0)
    checks.number("tolerance", tolerance, above=0)
    checks.whole("steps", steps, least=1)
    dtype = jax.tree.leaves(params)[0].dtype
    count = TOGETHER if (jax.default_backend() != "cpu" if together is None else together) else 1

    def run(rates: Sequence[float]) -> list[bool]:
        if len(rates) == 1:
            return [bool(_one(objective, params, batch, jnp.asarray(rates[0], dtype), steps=steps))]
        found = _many(objective, params, batch, jnp.asarray(rates, dtype), steps=steps)
        return [bool(value) for value in jax.device_get(found)]

    low, high, trials = 0.0, math.inf, 0
    for _ in range(max_rounds):
        if low > 0 and high <= low * (1 + tolerance):
            return Bracket(low, high, trials)
        if low > 0 and high < math.inf:
            rates = [low * (high / low) ** (k / (count + 1)) for k in range(1, count + 1)]
        elif low > 0:
            rates = [low * 2.0**k for k in range(1, count + 1)]
        else:
            rates = sorted(min(start, high / 2) * 2.0**-k for k in range(count))
        for rate, falling in zip(rates, run(rates), strict=True):
            trials += 1
            if not falling:
                high = rate
                break
            low = rate
    raise ValueError(
        f"no boundary after {trials} trials: the largest η that descends is {low:g}, the least that does not {high:g}; "
        "give a start closer to it, or a wider tolerance"
    )
