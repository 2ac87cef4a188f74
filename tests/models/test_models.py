"""The networks against their formulas, their counts, and the statistics of their initialisation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax.models import MLP, ResNet
from lplr_jax.ntk import checks
from lplr_jax.parameters import count_parameters


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


@pytest.mark.parametrize("initialisation", ["he", "scaled-output", "antisymmetric"])
def test_the_ntk_parametrisation_is_the_same_function_of_the_same_seed(initialisation):
    """z = √(2/fan_in) W h + b with W of unit variance where "he" has 2/fan_in."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5)), jnp.float32)
    standard = MLP(64, 3, initialisation=initialisation)
    ntk = MLP(64, 3, initialisation=initialisation, parametrisation="ntk")
    one, two = (model.init(jax.random.key(1), x) for model in (standard, ntk))
    # Roundings of float32, a few a layer.
    np.testing.assert_allclose(standard.apply(one, x), ntk.apply(two, x), rtol=1e-5, atol=1e-5)
    for layer, fan_in in (("dense_0", 5), ("dense_1", 64), ("dense_2", 64)):
        scaled = np.asarray(two["params"][layer]["kernel"]) * np.sqrt(2 / fan_in)
        np.testing.assert_allclose(one["params"][layer]["kernel"], scaled, rtol=1e-6)
    if initialisation == "he":
        kernel = np.asarray(two["params"]["dense_1"]["kernel"], np.float64)
        assert kernel.var() == pytest.approx(1, rel=5 * np.sqrt(2 / kernel.size))


@pytest.mark.parametrize(("name", "variance"), [("he", 2.0), ("lecun", 1.0), ("small", 1 / 3), ("zero", 0.0)])
def test_output_layer_has_the_variance_it_says(name, variance):
    key, x = jax.random.key(5), jnp.zeros((1, 784))
    params = MLP(1024, 2, outputs=5, output_init=name).init(key, x)["params"]
    kernel = np.asarray(params["dense_1"]["kernel"], np.float64)
    # Of 5,120 normal draws; the variances that are told apart differ by a factor of 2 at least.
    assert kernel.var() * 1024 == pytest.approx(variance, rel=5 * np.sqrt(2 / kernel.size))
    usual = MLP(1024, 2, outputs=5).init(key, x)["params"]
    assert np.array_equal(params["dense_0"]["kernel"], usual["dense_0"]["kernel"]), "the other layers are as they were"
    image = jnp.zeros((1, 8, 8, 3))
    small = {"width": 64, "stages": 1, "blocks": 1, "outputs": 40}
    head = np.asarray(ResNet(**small, output_init=name).init(key, image)["params"]["dense"]["kernel"], np.float64)
    assert head.var() * 64 == pytest.approx(variance, rel=5 * np.sqrt(2 / head.size))


def test_uniform_biases_fill_their_interval():
    params = MLP(400, 2, outputs=400, bias_init="uniform").init(jax.random.key(1), jnp.zeros((1, 100)))["params"]
    for layer, fan_in in (("dense_0", 100), ("dense_1", 400)):
        bias = np.abs(np.asarray(params[layer]["bias"])) * np.sqrt(fan_in)
        # The largest of 400 uniform draws is below 0.97 with a probability of 5e-6.
        assert 0.97 < bias.max() <= 1
        assert bias.mean() == pytest.approx(0.5, abs=5 / np.sqrt(12 * 400))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"parametrisation": "mup"}, "parametrisation must be one of standard, ntk, got 'mup'"),
        ({"output_init": "xavier"}, "output_init must be one of .*, got 'xavier'"),
        ({"bias_init": "one"}, "bias_init must be one of .*, got 'one'"),
        (
            {"initialisation": "scaled-output", "output_init": "zero"},
            "output_init 'zero' and bias_init 'zero' go with the initialisation 'he'; 'scaled-output' sets",
        ),
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


@pytest.mark.parametrize(("width", "expected"), [(16, 174_933), (64, 2_776_389)])
def test_residual_network_has_the_parameters_it_says(width, expected):
    shapes = jax.eval_shape(ResNet(width=width).init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    assert count_parameters(shapes) == expected == 676 * width**2 + 117 * width + 5
    kernels = {name: leaf["kernel"].shape for name, leaf in shapes["params"].items() if "kernel" in leaf}
    assert kernels["conv_0_0_first"] == (3, 3, width, width)
    assert kernels["conv_2_0_first"] == (3, 3, 2 * width, 4 * width)
    assert kernels["conv_2_0_skip"] == (1, 1, 2 * width, 4 * width)
    assert kernels["dense"] == (4 * width, 5)
    assert sum("_skip" in name for name in kernels) == 2, "the first stage keeps its shape"


@pytest.mark.slow
def test_residual_network_is_the_formula():
    """A block by hand in NumPy: convolution as a sum over nine shifts, norm over groups, and the way around it."""
    model = ResNet(width=4, stages=2, blocks=1, groups=2, outputs=3, activation="softplus")
    x = np.random.default_rng(0).normal(size=(2, 6, 6, 3)).astype(np.float32)
    params = model.init(jax.random.key(1), jnp.asarray(x))
    rng = np.random.default_rng(1)
    moved = jax.tree.map(lambda leaf: leaf + rng.normal(size=leaf.shape).astype(np.float32) / 4, params)
    leaves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), moved["params"])

    def conv(h, name, stride):
        kernel = leaves[f"conv_{name}"]["kernel"]
        size = kernel.shape[0]
        out = -(-h.shape[1] // stride)
        # "SAME": what is missing is padded with zeros, the odd one behind.
        missing = max((out - 1) * stride + size - h.shape[1], 0)
        pad = (missing // 2, missing - missing // 2)
        h = np.pad(h, ((0, 0), pad, pad, (0, 0)))
        steps = [slice(i, i + stride * (out - 1) + 1, stride) for i in range(size)]
        y = sum(h[:, steps[i]][:, :, steps[j]] @ kernel[i, j] for i in range(size) for j in range(size))
        grouped = y.reshape(*y.shape[:3], 2, -1)
        mean, variance = (f(grouped, axis=(1, 2, 4), keepdims=True) for f in (np.mean, np.var))
        normal = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(y.shape)
        return normal * leaves[f"norm_{name}"]["scale"] + leaves[f"norm_{name}"]["bias"]

    def softplus(z):
        return np.logaddexp(z, 0)

    h = softplus(conv(x.astype(np.float64), "stem", 1))
    h = softplus(h + conv(softplus(conv(h, "0_0_first", 1)), "0_0_second", 1))
    branch = conv(softplus(conv(h, "1_0_first", 2)), "1_0_second", 1)
    h = softplus(conv(h, "1_0_skip", 2) + branch)
    expected = h.mean(axis=(1, 2)) @ leaves["dense"]["kernel"] + leaves["dense"]["bias"]
    # Seven layers whose norms keep values of order one; each adds a dozen roundings of float32.
    np.testing.assert_allclose(model.apply(moved, jnp.asarray(x)), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.slow
def test_residual_network_starts_as_he_and_mixes_no_samples():
    model = ResNet(width=32, stages=2, blocks=1)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4, 3)).astype(np.float32))
    params = model.init(jax.random.key(0), x)
    for name, leaf in params["params"].items():
        if "kernel" in leaf:
            kernel = np.asarray(leaf["kernel"], np.float64)
            fan_in = kernel.size // kernel.shape[-1]
            assert kernel.var() == pytest.approx(2 / fan_in, rel=5 * np.sqrt(2 / kernel.size)), name
    checks.sample_coupling(model.apply, params, x)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 12}, "width must be a multiple of groups = 8, got 12"),
        ({"blocks": 0}, "blocks must be >= 1, got 0"),
        ({"activation": "swish"}, "activation must be one of relu, softplus, tanh, got 'swish'"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_settings_of_the_residual_network_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ResNet(**settings)
