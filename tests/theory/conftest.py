"""Two runs that many tests look at: a linear regression, and digits."""

import dataclasses

import numpy as np
import pytest
from controls import P, linear, problem, train

from lplr_jax.experiments import mnist


@pytest.fixture(scope="session")
def regression():
    x, y, u = problem()
    record, points = train(linear, np.zeros((P, 1)), x, y, eta=0.2, epochs=40)
    return record, points, x, y, u


@pytest.fixture(scope="session")
def digits():
    config = dataclasses.replace(
        mnist.PRESETS["smoke"],
        width=8,
        depth=3,
        epochs=24,
        probe_every=8,
        n_train=40,
        learning_rate=2e-3,
        search_steps=2,
    )
    return mnist.run(config)
