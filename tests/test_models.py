"""The MLP against its formula, its counts, and the statistics of its initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax.models import MLP, count_parameters


@pytest.mark.parametrize(("width", "expected"), [(128, 150_145), (256, 398_593), (512, 1_190_401), (1024, 3_953_665)])
def test_parameter_count_is_the_papers(width, expected):
    shapes = jax.eval_shape(MLP(width).init, jax.random.key(0), jnp.zeros((1, 784)))
    assert count_parameters(shapes) == expected == 3 * width**2 + 789 * width + 1


@given(
    n=st.integers(1, 4),
    d=st.integers(1, 5),
    width=st.integers(1, 6),
    depth=st.integers(1, 4),
    outputs=st.integers(1, 3),
    activation=st.sampled_from(["softplus", "tanh", "relu"]),
)
def test_apply_is_the_formula(n, d, width, depth, outputs, activation):
    model = MLP(width, depth, activation, outputs)
    x = np.random.default_rng(n).normal(size=(n, d)).astype(np.float32)
    params = model.init(jax.random.key(depth), jnp.asarray(x))
    functions = {
        "softplus": lambda z: np.logaddexp(z, 0),
        "tanh": np.tanh,
        "relu": lambda z: np.maximum(z, 0),
    }
    h = x.astype(np.float64)
    for layer in range(depth):
        leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params["params"][f"dense_{layer}"])
        h = h @ leaves["kernel"] + leaves["bias"]
        h = functions[activation](h) if layer < depth - 1 else h
    assert h.shape == (n, outputs)
    # Each layer adds a few roundings of float32 to values of order one; 5 layers of at most 6 terms stay below 1e-5.
    np.testing.assert_allclose(model.apply(params, jnp.asarray(x)), h, rtol=1e-5, atol=1e-5)


def test_initialisation_is_he_normal():
    params = MLP(1024).init(jax.random.key(3), jnp.zeros((1, 784)))["params"]
    for layer, fan_in in enumerate([784, 1024, 1024, 1024]):
        kernel = np.asarray(params[f"dense_{layer}"]["kernel"], np.float64)
        assert not np.any(np.asarray(params[f"dense_{layer}"]["bias"]))
        # The sample variance of N normal draws has relative deviation sqrt(2 / N).
        tolerance = 5 * np.sqrt(2 / kernel.size)
        assert kernel.var() == pytest.approx(2 / fan_in, rel=tolerance)
        # A truncated normal has no draw beyond two deviations of the normal before truncation (2.28 of its own).
        assert np.abs(kernel).max() > 3.5 * kernel.std()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width must be >= 1, got 0"),
        ({"depth": -2}, "depth must be >= 1, got -2"),
        ({"outputs": 1.5}, "outputs must be an integer >= 1, got 1.5"),
        ({"width": True}, "width must be an integer >= 1, got True"),
        ({"activation": "swish"}, "activation must be one of relu, softplus, tanh, got 'swish'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        MLP(**settings)
