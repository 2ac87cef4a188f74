"""One state, pure steps, and scans over steps, over mini-batches and over passes with exact diagnostics."""

from typing import Any

from lplr_jax import rooms
from lplr_jax.training.batches import (
    Schedule,
    batches_of,
    evaluate_exactly,
    momentum_sgd,
    shuffled_epoch,
    train_batches,
)
from lplr_jax.training.minibatches import BatchSteps, MiniBatches, Pass
from lplr_jax.training.rules import StepRule
from lplr_jax.training.rules import parse as step_rule
from lplr_jax.training.steps import (
    EpochMetrics,
    ExactMetrics,
    Metrics,
    ShuffledState,
    State,
    StepMeasures,
    TrainState,
    evaluate,
    init_shuffled,
    init_state,
    measure_step,
    metrics_of,
    train_epochs,
    train_step,
)

__all__ = [
    "BatchSteps",
    "EpochMetrics",
    "ExactMetrics",
    "Metrics",
    "MiniBatches",
    "Pass",
    "Schedule",
    "ShuffledState",
    "State",
    "StepMeasures",
    "StepRule",
    "TrainState",
    "batches_of",
    "evaluate",
    "evaluate_exactly",
    "init_shuffled",
    "init_state",
    "measure_step",
    "metrics_of",
    "momentum_sgd",
    "shuffled_epoch",
    "step_rule",
    "train_batches",
    "train_epochs",
    "train_step",
]


def __getattr__(name: str) -> Any:
    """Give out a name that lives elsewhere now."""
    return rooms.through_door(__name__, name)
