"""Properties that the kernel engine keeps for any model, its probes, and what it says about its plan."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax.models import MLP
from lplr_jax.ntk import checks, engine

N, C, WIDTH, FEATURES = 23, 2, 12, 7
# A contraction of k terms differs between two orders of summation by at most 2 k eps of the sum of magnitudes; the
# longest here has k = 28 and three products are chained. The largest entry bounds all others (Cauchy-Schwarz).
ROUNDING = 3 * 2 * 28 * 2.3e-16


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def model(params, x):
    """Every kind of term: dense with bias, positions, per-example gradients (scale), uses with k and m exchanged."""
    h = jnp.tanh(x @ params["in"] + jnp.broadcast_to(params["bias"], (x.shape[0], WIDTH)))
    pairs = jnp.tanh(h.reshape(-1, 2, WIDTH // 2) @ params["pairs"])
    h = pairs.reshape(-1, 28)[:, :WIDTH] * jnp.broadcast_to(params["scale"], (x.shape[0], WIDTH))
    h = jnp.tanh(h @ params["shared"]) @ params["shared"].T
    return h @ params["out"]


@functools.cache
def parameters():
    shapes = {
        "in": (FEATURES, WIDTH),
        "bias": (WIDTH,),
        "pairs": (WIDTH // 2, 14),
        "scale": (WIDTH,),
        "shared": (WIDTH, WIDTH),
        "out": (WIDTH, C),
    }
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), "float64") for name, shape in shapes.items()}


@functools.cache
def samples(n=N):
    return jnp.asarray(np.random.default_rng(1).normal(size=(n, FEATURES)), "float64")


@functools.cache
def whole(outputs="full"):
    return np.asarray(engine.kernel(model, parameters(), samples(), outputs=outputs))


def close(got, want, factor=1.0):
    assert np.max(np.abs(np.asarray(got) - want)) <= factor * ROUNDING * np.max(np.abs(want))


def test_the_model_has_every_kind_of_term():
    rules = {leaf.path: leaf.rule for leaf in engine.explain(model, parameters(), samples()).leaves}
    assert rules["['in']"] == rules["['out']"] == "dense: (h hᵀ) ∘ (δ δᵀ)"
    assert rules["['bias']"] == "bias: δ δᵀ"
    assert rules["['pairs']"] == "matrix product: pairs of positions"
    assert rules["['scale']"] == "scale: per-example gradients"
    assert rules["['shared']"] == "2 × matrix product: pairs of positions"


def test_trace_and_diagonal_are_those_of_the_full_kernel():
    blocks = whole().reshape(N, C, N, C)
    close(whole("trace"), np.einsum("iojo->ij", blocks))
    close(whole("diagonal"), np.diagonal(whole()).reshape(N, C))


@pytest.mark.parametrize(
    ("outputs", "memory_budget"),
    [
        ("full", 25_000),
        ("trace", 25_000),
        ("diagonal", 25_000),
        ("full", 65_536),
        ("full", 150_000),
        ("trace", 400_000),
    ],
)
def test_result_does_not_depend_on_the_memory_budget(outputs, memory_budget):
    explained = engine.explain(model, parameters(), samples(), outputs=outputs, memory_budget=memory_budget)
    got = np.asarray(engine.kernel(model, parameters(), samples(), outputs=outputs, memory_budget=memory_budget))
    close(got, whole(outputs))
    if outputs != "diagonal":
        np.testing.assert_array_equal(got, got.T)
    if memory_budget == 25_000 and outputs == "full":
        assert len(explained.blocks) > 1  # several groups of leaves
        assert min(explained.blocks) < N  # and several blocks of samples, of a size that does not divide n
        assert any(N % block for block in explained.blocks)


def test_two_sets_of_samples_give_the_off_diagonal_block():
    one, two = samples()[:9], samples()[9:]
    for memory_budget in (None, 25_000):
        block = engine.kernel(model, parameters(), one, two, memory_budget=memory_budget)
        close(block, whole()[: 9 * C, 9 * C :])
        trace = engine.kernel(model, parameters(), one, two, outputs="trace", memory_budget=memory_budget)
        close(trace, whole("trace")[:9, 9:])
    diagonal = engine.kernel(model, parameters(), one, two[:9], outputs="diagonal")
    close(diagonal, np.einsum("ioio->io", whole().reshape(N, C, N, C)[:9, :, 9:18]))


def test_more_samples_than_a_tile():
    x = jnp.asarray(np.random.default_rng(1).normal(size=(301, FEATURES)), "float64")
    got = np.asarray(engine.kernel(model, parameters(), x))  # 602 rows: three tiles a side, the last overlapping
    np.testing.assert_array_equal(got, got.T)
    close(got[-2 * N :, : 2 * N], engine.kernel(model, parameters(), x[-N:], x[:N]))
    close(got[200:260, 200:260], engine.kernel(model, parameters(), x[100:130]))


@given(st.permutations(range(N)))
def test_permuted_samples_permute_the_kernel(order):
    order = np.asarray(order)
    got = engine.kernel(model, parameters(), samples()[order], outputs="trace")
    close(got, whole("trace")[np.ix_(order, order)])


@given(st.floats(min_value=-100, max_value=100).filter(lambda a: abs(a) > 1e-3))
def test_scaled_outputs_scale_the_kernel_by_the_square(factor):
    got = engine.kernel(scaled_model, (parameters(), jnp.asarray(factor)), samples())
    extra = np.asarray(model(parameters(), samples())).reshape(-1)  # the factor is a parameter too
    close(np.asarray(got) - np.outer(extra, extra), factor**2 * whole(), 1 + np.max(extra**2) / (factor**2))


def scaled_model(params, x):
    return model(params[0], x) * params[1]


@pytest.mark.parametrize("seed", range(3))
def test_partition_of_the_leaves_sums_to_the_whole(seed):
    chosen = np.random.default_rng(seed).random(6) < 0.5
    names = sorted(parameters())
    part = {name: parameters()[name] for name, pick in zip(names, chosen, strict=True) if pick}
    rest = {name: value for name, value in parameters().items() if name not in part}
    first = engine.kernel(lambda p, x: model({**rest, **p}, x), part, samples())
    second = engine.kernel(lambda p, x: model({**part, **p}, x), rest, samples())
    close(first + second, whole())


def test_kernel_is_positive_semidefinite_to_rounding():
    values = np.linalg.eigvalsh(whole())
    assert values[0] >= -len(values) * ROUNDING * values[-1]
    assert values[-1] > 0


def test_one_sample_and_one_output():
    got = engine.kernel(lambda p, x: model(p, x)[:, 0], parameters(), samples()[:1])
    assert got.shape == (1, 1)
    close(got, whole()[:1, :1])


def test_second_probe_does_not_trace_again():
    traces = []

    def counted(params, x):
        traces.append(None)
        return model(params, x)

    first = engine.kernel(counted, parameters(), samples())
    seen = len(traces)
    moved = jax.tree.map(lambda a: 2 * a, parameters())
    second = engine.kernel(counted, moved, samples())
    assert len(traces) == seen
    assert not np.allclose(first, second)


def test_unhashable_functions_work():
    class Unhashable:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, params, x):
            return model(params, x)

    close(engine.kernel(Unhashable(), parameters(), samples()), whole())


def test_captured_arrays_are_arguments_not_constants():
    frozen = samples(64) @ jnp.ones((FEATURES, 400))
    text = jax.make_jaxpr(lambda p, x: x @ p @ frozen[:12, :2])(parameters()["in"], samples())
    assert text.consts  # the function does capture an array
    traced = engine.trace(lambda p, x: x @ p @ frozen[:12, :2], parameters()["in"], samples())
    assert [value.shape for _, value in traced.program.consts] == [(64, 400)]


# --- what is refused


def test_memory_budget_that_holds_no_pair_is_refused():
    with pytest.raises(ValueError, match=r"memory_budget = 100 bytes does not hold .* at least \d+ are needed"):
        engine.kernel(model, parameters(), samples(), memory_budget=100)
    explained = engine.explain(model, parameters(), samples(), memory_budget=20_000)
    assert min(explained.blocks) >= 1


@pytest.mark.parametrize(
    ("apply_fn", "message"),
    [
        (lambda p, x: (model(p, x), x), "must return one array"),
        (lambda p, x: model(p, x)[:, :, None], r"one row per sample.*\(1, 2, 1\)"),
        (lambda p, x: model(p, x).sum(), r"one row per sample.*\(\)"),
        (lambda p, x: model(p, x) > 0, "real floating-point outputs, got dtype bool"),
    ],
)
def test_outputs_of_the_wrong_form(apply_fn, message):
    with pytest.raises(ValueError, match=message):
        engine.kernel(apply_fn, parameters(), samples())


def test_sets_of_samples_that_do_not_match():
    with pytest.raises(ValueError, match="same tree structure"):
        engine.kernel(model, parameters(), samples(), {"x": samples()})
    with pytest.raises(ValueError, match="got 9 and 23 samples"):
        engine.kernel(model, parameters(), samples()[:9], samples(), outputs="diagonal")


# --- probes


@pytest.mark.parametrize(
    ("params", "x", "error", "message"),
    [
        ({"w": np.ones(2)}, (), ValueError, "holds no arrays"),
        ({"w": np.ones(2)}, np.zeros((0, 3)), ValueError, "no samples"),
        ({"w": np.ones(2)}, [np.zeros((4, 3)), np.zeros((5, 2))], ValueError, r"x\[0\] has 4, x\[1\] has 5"),
        ({"w": np.ones(2)}, np.float64(1), ValueError, "is a scalar"),
        ({"w": np.ones(2)}, {"a": "text"}, TypeError, r"x\['a'\] must be an array, got 'text'"),
        ({"w": np.ones(2)}, np.array([[1.0], [np.nan]]), ValueError, "x has 1 NaN or infinite entries of 2"),
        ({}, np.ones((2, 1)), ValueError, "params hold no floating array"),
        ({"w": np.array([np.inf, np.nan, 0.0])}, np.ones((2, 1)), ValueError, r"params\['w'\] has 2 NaN or infinite"),
        ({"w": np.ones(2, complex)}, np.ones((2, 1)), TypeError, r"params\['w'\] is complex"),
    ],
)
def test_inputs_that_are_refused(params, x, error, message):
    with pytest.raises(error, match=message):
        checks.inputs(params, x)


def test_inputs_that_pass():
    checks.inputs(
        {"w": np.ones(2), "i": np.arange(3), "f": jnp.tanh, "key": jax.random.key(0)}, {"a": np.arange(4), "b": None}
    )


def coupled_through(name):
    def apply_fn(params, x):
        h = x @ params
        if name == "mean":
            return h - jnp.broadcast_to(h.mean(axis=0), h.shape)
        if name == "stopped mean":
            return h - jnp.broadcast_to(jax.lax.stop_gradient(h.mean(axis=0)), h.shape)
        if name == "rank":
            return h * jnp.argsort(h, axis=0).astype(h.dtype)
        if name == "attention":
            return jax.nn.softmax(h @ h.T) @ h
        if name == "batch size":
            return h / x.shape[0]
        return jnp.cumsum(h, axis=0)

    return apply_fn


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("name", ["mean", "stopped mean", "attention", "batch size", "cumsum"])
def test_coupled_samples_are_refused(name, n):
    weights = parameters()["in"]
    with pytest.raises(ValueError, match="depends on the other samples of the batch"):
        checks.sample_coupling(coupled_through(name), weights, samples()[:n])


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_uncoupled_samples_pass(dtype):
    params, x = (jax.tree.map(lambda a: a.astype(dtype), tree) for tree in (parameters(), samples()))
    for n in (1, 2, 9):
        checks.sample_coupling(model, params, x[:n])
    checks.sample_coupling(lambda p, i: jnp.take(p["in"], i, axis=0)[:, :2], params, np.arange(5))


class Net(nn.Module):
    norm: bool = False
    dropout: bool = False

    @nn.compact
    def __call__(self, x, train=True):
        h = nn.Dense(6, param_dtype=x.dtype)(x)
        if self.norm:
            h = nn.BatchNorm(use_running_average=not train, param_dtype=x.dtype, dtype=x.dtype)(h)
        if self.dropout:
            h = nn.Dropout(0.5, deterministic=not train)(h)
        return nn.Dense(2, param_dtype=x.dtype)(h)


def test_batch_norm_is_refused_in_training_and_served_in_evaluation():
    net = Net(norm=True)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        variables = net.init(jax.random.key(0), samples())
        rest = {"batch_stats": variables["batch_stats"]}

        def train(params, x):
            return net.apply({"params": params, **rest}, x, mutable=["batch_stats"])[0]

        def evaluate(params, x):
            return net.apply({"params": params, **rest}, x, train=False)

        with pytest.raises(ValueError, match="use_running_average=True"):
            checks.sample_coupling(train, variables["params"], samples())
        checks.sample_coupling(evaluate, variables["params"], samples())
        rules = [leaf.rule for leaf in engine.explain(evaluate, variables["params"], samples()).leaves]
        assert not any(rule.startswith("Jacobian") for rule in rules)


def test_dropout():
    net = Net(dropout=True)
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        params = net.init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, samples())
        with pytest.raises(ValueError, match=r"random key that it is not given .*deterministic=True"):
            checks.deterministic(net.apply, params, samples())
        checks.deterministic(functools.partial(net.apply, train=False), params, samples())


def test_noise_and_non_finite_outputs():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="two different outputs"):
        checks.deterministic(lambda p, x: x @ p + rng.normal(), parameters()["in"], samples())
    with pytest.raises(ValueError, match="NaN or infinite outputs"):
        checks.deterministic(lambda p, x: jnp.log(-jnp.abs(x @ p)), parameters()["in"], samples())


# --- explain


def test_explanation_counts_and_prints():
    net = MLP(width=16, depth=3, outputs=3)
    x = jnp.ones((10, 5), "float32")
    params = jax.tree.map(lambda a: a.astype("float64"), net.init(jax.random.key(0), x))
    x = x.astype("float64")
    explained = engine.explain(net.apply, params, x)
    pairs, c = 55, 3
    by_path = {leaf.path: leaf for leaf in explained.leaves}
    kernel = by_path["['params']['dense_1']['kernel']"]
    assert kernel.shape == (16, 16)
    assert kernel.multiply_adds == pairs * (16 + c * c * 16 + 1)
    assert kernel.bytes == 10 * 8 * (16 + c * 16)
    assert explained.multiply_adds == sum(leaf.multiply_adds for leaf in explained.leaves)
    assert explained.blocks == (10,)
    text = str(explained)
    for leaf in explained.leaves:
        assert leaf.path in text
        assert leaf.rule in text
    assert len(text.splitlines()) == 2 + 6 + 1
    reason = str(engine.explain(lambda p, x: x @ p + (x @ jnp.tanh(p)), parameters()["in"], samples()))
    assert "Jacobian (reverse mode)" in reason
    assert "is used 2 times, and enters `tanh`, which has no rule" in reason
