"""Bad problems: what does not fit is told before anything is run."""

import numpy as np

from bad_input import Case
from lplr_jax import losses
from lplr_jax.runs.problem import Problem

X = np.arange(12.0, dtype=np.float32).reshape(4, 3) / 12
Y = np.ones((4, 1), np.float32)
W = np.full((3, 1), 0.5, np.float32)


def linear(w, x):
    return x @ w


def problem_cases():
    """Return every case of this module."""
    lost = np.where(X[2, 1] == X, np.float32(np.nan), X)
    return [
        Case("Problem of inputs with NaN", lambda _: Problem(linear, W, lost, Y), (ValueError,), "x has 1 NaN or infinite entries of 12, in sample 2; clean the data"),
        Case("Problem of a tree of inputs with NaN", lambda _: Problem(lambda w, x: x["a"] @ w, W, {"a": np.full_like(X, np.nan)}, Y), (ValueError,), r"x\['a'\] has 12 NaN or infinite entries of 12, in samples 0, 1, 2, 3"),
        Case("Problem of targets with NaN", lambda _: Problem(linear, W, X, Y * np.nan), (ValueError,), "y holds numbers that are not finite"),
        Case("Problem of labels that are not ±1", lambda _: Problem(linear, W, X, 3 * Y, loss=losses.Logistic()), (ValueError,), "-1 or"),
        Case("Problem of a loss by its name", lambda _: Problem(linear, W, X, Y, loss="mse"), (ValueError, TypeError), "loss must be a Loss, such as"),
        Case("Problem of too few targets", lambda _: Problem(linear, W, X, Y[:3]), (ValueError,), "one row a sample"),
    ]  # fmt: skip
