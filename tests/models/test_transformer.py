"""The transformer against its formula in NumPy, its count, and what a position may see."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lplr_jax import ntk
from lplr_jax.models import Transformer
from lplr_jax.parameters import count_parameters

SMALL = functools.partial(Transformer, 7, width=8, layers=2, heads=2, length=5)
TOKENS = np.random.default_rng(0).integers(0, 7, (3, 5)).astype(np.int32)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def network(request):
    """A model and parameters in float64, none of them where the initialisation leaves it."""
    model = SMALL(tied=request.param)
    rng = np.random.default_rng(1)
    params = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float64) + rng.normal(size=leaf.shape) / 4,
        jax.jit(model.init)(jax.random.key(0), TOKENS),
    )
    with jax.enable_x64(True):
        yield model, params, jax.jit(model.apply)


def formula(params, tokens, *, heads):
    """One position at a time, one head at a time."""
    p = params["params"]

    def norm(h, leaves):
        return (h - h.mean()) / np.sqrt(h.var() + 1e-6) * leaves["scale"] + leaves["bias"]

    def dense(h, leaves):
        return h @ leaves["kernel"] + leaves["bias"]

    def gelu(z):
        return 0.5 * z * (1 + np.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    d, layers = p["embedding"]["embedding"].shape[1], p["layers"]["wide"]["kernel"].shape[0]
    outputs = []
    for sequence in tokens:
        h = [p["embedding"]["embedding"][token] + p["positions"]["embedding"][t] for t, token in enumerate(sequence)]
        for layer in range(layers):
            leaves = jax.tree.map(lambda leaf, layer=layer: leaf[layer], p["layers"])
            q, k, v = np.split(
                np.stack([dense(norm(one, leaves["norm_attention"]), leaves["query_key_value"]) for one in h]),
                3,
                axis=1,
            )
            mixed = np.zeros_like(q)
            for head in np.split(np.arange(d), heads):
                for t in range(len(h)):
                    scores = np.exp(k[: t + 1, head] @ q[t, head] / np.sqrt(head.size))
                    mixed[t, head] = scores @ v[: t + 1, head] / scores.sum()
            h = [one + dense(mixed[t], leaves["mixed"]) for t, one in enumerate(h)]
            h = [
                one + dense(gelu(dense(norm(one, leaves["norm_dense"]), leaves["wide"])), leaves["narrow"]) for one in h
            ]
        head = p["head"]["kernel"] if "head" in p else p["embedding"]["embedding"].T / np.sqrt(d)
        outputs.append([norm(one, p["norm"]) @ head for one in h])
    return np.array(outputs)


def test_apply_is_the_formula(network):
    model, params, apply_fn = network
    outputs = apply_fn(params, TOKENS)
    assert outputs.dtype == np.float64
    # Some hundred roundings of numbers of order one to ten in float64.
    np.testing.assert_allclose(outputs, formula(params, TOKENS, heads=model.heads), rtol=1e-12, atol=1e-12)


def test_a_position_sees_the_past_alone(network):
    model, params, apply_fn = network
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 1) % 7
    before, after = apply_fn(params, TOKENS), apply_fn(params, changed)
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before - after)[:, 3:].max(axis=2) > 1e-3).all()
    np.testing.assert_allclose(model.apply(params, TOKENS[:, :3]), before[:, :3], rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_kernel_of_chosen_outputs_is_that_of_the_jacobian(network):
    model, params, _ = network

    def chosen(p, x):
        outputs = model.apply(p, x["tokens"])
        rows = jnp.arange(outputs.shape[0])
        return outputs[rows, x["position"], x["class"]]

    x = {"tokens": TOKENS, "position": np.array([0, 4, 2]), "class": np.array([6, 0, 3])}
    jacobian = jax.jacrev(chosen)(params, x)
    flat = np.concatenate([np.asarray(leaf).reshape(3, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    assert flat.shape[1] == count_parameters(params)
    theta = flat @ flat.T
    # Sums of p products of order one in float64.
    found = ntk.empirical_ntk(chosen, params, x)
    np.testing.assert_allclose(found, theta, atol=1e-12 * np.abs(theta).max(), rtol=0)


@pytest.mark.parametrize("tied", [False, True])
def test_parameter_count_is_the_one_that_is_stated(tied):
    shapes = jax.eval_shape(SMALL(tied=tied).init, jax.random.key(0), TOKENS)
    d, layers, length, heads = 8, 2, 5, 1 if tied else 2
    assert count_parameters(shapes) == layers * (12 * d**2 + 13 * d) + (2 + length) * d + heads * d * 7


def test_initialisation_has_the_variances_that_are_stated():
    model = Transformer(500, width=64, layers=3, heads=4, length=300)
    params = jax.jit(model.init)(jax.random.key(2), jnp.zeros((1, 2), jnp.int32))["params"]
    layers = params["layers"]
    for leaf, variance in (
        (params["embedding"]["embedding"], 1 / 64),
        (params["positions"]["embedding"], 1 / 64),
        (params["head"]["kernel"], 1 / 64**2),
        (layers["query_key_value"]["kernel"], 1 / 64),
        (layers["wide"]["kernel"], 1 / 64),
        (layers["mixed"]["kernel"], 1 / (6 * 64)),
        (layers["narrow"]["kernel"], 1 / (6 * 256)),
    ):
        entries = np.asarray(leaf, np.float64)
        # The sample variance of N normal draws has relative deviation sqrt(2 / N).
        assert entries.var() == pytest.approx(variance, rel=5 * np.sqrt(2 / entries.size))
    first, second = layers["wide"]["kernel"][:2]
    assert not np.allclose(first, second), "each layer is drawn on its own"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "width must be a multiple of heads = 3, got 8"),
        ({"layers": 0}, "layers must be >= 1, got 0"),
        ({"length": 1.5}, "length must be an integer >= 1, got 1.5"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        SMALL(**settings)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (np.zeros((2, 6), np.int32), "x has 6 positions, the network 5"),
        (np.zeros((2, 5), np.float32), "x must be an array of tokens"),
        (np.zeros(5, np.int32), "x must be an array of tokens"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_what_is_no_tokens_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        SMALL().init(jax.random.key(0), x)
