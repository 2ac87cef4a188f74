"""The entries of a watched series: what is measured of a step, and what waits for the step after it."""

from typing import Any, NamedTuple

import jax

from lplr_jax import training
from lplr_jax.runs.problem import Problem
from lplr_jax.training import Metrics, StepMeasures
from lplr_jax.types import Params


@jax.jit
def measures(loss: Any, gradient: Params, params: Params, initial: Params) -> tuple[Any, Any, Any]:
    """Return loss, ‖∇L‖² and drift."""
    return training.metrics_of(loss, gradient, params, initial)[:3]


measure_step = jax.jit(training.measure_step)
"""`training.measure_step`, compiled by itself."""


def series(problem: Problem, params: Params, initial: Params, next_params: Params) -> Metrics:
    """Return the entry of a step for `Watch.extend`: a pure function, for use inside a loop that scans.

    Pass the problem into what is jitted as an argument (it is a pytree), or its data becomes part of the program.

    Args:
        problem: what is trained.
        params: θ_t.
        initial: θ_0.
        next_params: θ_{t+1}, which any method may have made.

    Returns:
        Loss, ‖∇L‖² and drift at θ_t, and how the step lies to ∇L_t; scalars.
    """
    params, initial, next_params = (problem.theta(one) for one in (params, initial, next_params))
    loss, gradient = problem.reduced.objective.value_and_gradient(params, problem.x, problem.y)
    return training.metrics_of(loss, gradient, params, initial, training.measure_step(params, gradient, next_params))


class Kept(NamedTuple):
    """A point whose step is not known yet: copies, as the loop may donate what it hands over."""

    step: int
    params: Params
    gradient: Params


class Entry(NamedTuple):
    """One entry of the series, on the device."""

    step: int
    values: tuple[Any, Any, Any]
    measures: StepMeasures | None
