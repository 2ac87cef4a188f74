"""The peer backend against a naive per-example Jacobian, and the promise that JAX is left as it was."""

import functools
import gc
import itertools
import subprocess
import sys
import textwrap
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax import parameters
from lplr_jax.ntk import engine, neural_tangents

N1, N2 = 7, 4
SINGLE = ("jacobian", "ntvp", "structured")


def plain_mlp(params, x):
    """Softplus MLP in bare JAX with one output per sample and no output axis."""
    h = x
    for layer, (weight, bias) in enumerate(params):
        h = h @ weight + bias[None]
        h = jax.nn.softplus(h) if layer < len(params) - 1 else h
    return h[:, 0]


class LinenMLP(nn.Module):
    """Softplus MLP in Flax linen with three outputs."""

    @nn.compact
    def __call__(self, x):
        for width in (8, 5):
            x = nn.softplus(nn.Dense(width)(x))
        return nn.Dense(3)(x)


class LinenCNN(nn.Module):
    """Convolutions, GroupNorm, a strided residual branch and two outputs."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.GroupNorm(2)(nn.Conv(4, (3, 3))(x)))
        x = nn.softplus(nn.GroupNorm(2)(nn.Conv(4, (3, 3), strides=2)(x) + x[:, ::2, ::2]))
        return nn.Dense(2)(x.mean((1, 2)))


def numbers(seed, shape):
    return np.random.default_rng(seed).normal(size=shape)


@functools.cache
def problem(name):
    """Return apply_fn, params and x1, x2 as float64 NumPy arrays."""
    if name == "plain":
        sizes = (6, 8, 5, 1)
        shapes = [((a, b), (b,)) for a, b in itertools.pairwise(sizes)]
        params = [(numbers(i, w) / np.sqrt(w[0]), numbers(9 + i, b) / 4) for i, (w, b) in enumerate(shapes)]
        apply_fn, shape = plain_mlp, (6,)
    else:
        module, shape = (LinenMLP(), (6,)) if name == "linen" else (LinenCNN(), (6, 6, 2))
        shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *shape), "float32"))
        params = jax.tree.map(lambda leaf: numbers(leaf.size, leaf.shape) / 2, shapes)
        apply_fn = module.apply
    return apply_fn, params, numbers(1, (N1, *shape)), numbers(2, (N2, *shape))


@functools.cache
def naive_jacobians(name):
    """Return J (n, c, p) at x1 and at x2 in float64: one reverse-mode Jacobian per example."""
    apply_fn, params, x1, x2 = problem(name)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        jacobian = jax.jit(jax.jacrev(lambda params, x: jnp.atleast_1d(apply_fn(params, x[None])[0])))
        leaves = [[jax.tree.leaves(jacobian(params, example)) for example in x] for x in (x1, x2)]
        return [
            np.array([np.concatenate([np.asarray(a).reshape(len(a), -1) for a in e], 1) for e in x]) for x in leaves
        ]


def naive_blocks(name, same):
    """Return Θ[i, o, j, q] in float64, contracted by NumPy."""
    j1, j2 = naive_jacobians(name)
    return np.einsum("iop,jqp->iojq", j1, j1 if same else j2)


def expected(name, outputs, same):
    blocks = naive_blocks(name, same)
    n1, c, n2, _ = blocks.shape
    return {
        "full": lambda: blocks.reshape(n1 * c, n2 * c),
        "trace": lambda: np.einsum("iojo->ij", blocks),
        "diagonal": lambda: np.einsum("ioio->io", blocks),
    }[outputs]()


def computed(name, *, implementation, outputs, same, dtype="float64", memory_budget=None):
    apply_fn, params, x1, x2 = problem(name)
    with jax.enable_x64(dtype == "float64"):
        params, x1, x2 = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), (params, x1, x2))
        theta = neural_tangents.kernel(
            apply_fn,
            params,
            x1,
            None if same else x2,
            implementation=implementation,
            outputs=outputs,
            memory_budget=memory_budget,
        )
        assert theta.dtype == dtype
        return np.asarray(theta)


def assert_matches(actual, wanted, name, dtype="float64"):
    """Compare within the roundings of a sum of p products, and as many again for the Jacobians behind it.

    |J_i| · |J_j| <= ‖J_i‖ ‖J_j‖ <= max Θ (Cauchy-Schwarz), so 2 p u = p eps bounds the error against the largest entry.
    A convolution's Jacobian sums over its 36 positions before that.
    """
    p = sum(np.size(leaf) for leaf in jax.tree.leaves(problem(name)[1]))
    chain = p + (36 * 9 if name == "cnn" else 0)
    assert actual.shape == wanted.shape
    scale = max(np.abs(naive_blocks(name, True)).max(), np.abs(wanted).max())
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=chain * np.finfo(dtype).eps * scale)


CASES = [("full", True), ("full", False), ("trace", True), ("trace", False), ("diagonal", True)]


@pytest.mark.parametrize(("outputs", "same"), [("full", True), ("trace", False), ("diagonal", True)])
@pytest.mark.parametrize("implementation", SINGLE)
def test_several_outputs_in_float64(implementation, outputs, same):
    actual = computed("linen", implementation=implementation, outputs=outputs, same=same)
    assert_matches(actual, expected("linen", outputs, same), "linen")
    if same and outputs != "diagonal":
        np.testing.assert_array_equal(actual, actual.T)


@pytest.mark.parametrize("implementation", SINGLE)
def test_one_output_without_an_axis_in_float64(implementation):
    actual = computed("plain", implementation=implementation, outputs="full", same=False)
    assert_matches(actual, expected("plain", "full", False), "plain")


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "same"), CASES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("name", ["plain", "linen"])
@pytest.mark.parametrize("implementation", SINGLE)
def test_every_combination(implementation, name, dtype, outputs, same):
    actual = computed(name, implementation=implementation, outputs=outputs, same=same, dtype=dtype)
    assert_matches(actual, expected(name, outputs, same), name, dtype)


@pytest.mark.parametrize("implementation", SINGLE)
def test_float32(implementation):
    actual = computed("plain", implementation=implementation, outputs="full", same=True, dtype="float32")
    assert_matches(actual, expected("plain", "full", True), "plain", "float32")


def test_auto(capfd):
    actual = computed("linen", implementation="auto", outputs="full", same=False)
    assert_matches(actual, expected("linen", "full", False), "linen")
    assert capfd.readouterr().out == ""


@pytest.mark.slow
@pytest.mark.parametrize(("outputs", "same"), CASES)
@pytest.mark.parametrize(("name", "dtype"), [("plain", "float32"), ("linen", "float64")])
def test_auto_in_every_combination(name, dtype, outputs, same):
    actual = computed(name, implementation="auto", outputs=outputs, same=same, dtype=dtype)
    assert_matches(actual, expected(name, outputs, same), name, dtype)


@pytest.mark.parametrize("implementation", ["jacobian", "structured"])
def test_convolutions_and_group_norm(implementation):
    actual = computed("cnn", implementation=implementation, outputs="full", same=False)
    assert_matches(actual, expected("cnn", "full", False), "cnn")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("outputs", "same", "dtype"),
    [("full", True, "float32"), ("full", False, "float64"), ("trace", True, "float64"), ("diagonal", True, "float64")],
)
@pytest.mark.parametrize("implementation", SINGLE)
def test_convolutions_in_several_combinations(implementation, outputs, same, dtype):
    actual = computed("cnn", implementation=implementation, outputs=outputs, same=same, dtype=dtype)
    assert_matches(actual, expected("cnn", outputs, same), "cnn", dtype)


@given(n1=st.integers(1, 4), n2=st.integers(1, 4), c=st.integers(1, 3), d=st.integers(1, 3), seed=st.integers(0, 99))
@pytest.mark.parametrize("implementation", ["jacobian", "structured"])
def test_a_linear_model_has_the_kronecker_kernel(implementation, n1, n2, c, d, seed):
    # f_o(x) = x · w_o + b_o, so Θ = (x1 x2ᵀ + 1) ⊗ I: exact in float64, because the entries are small integers.
    x1, x2 = (np.random.default_rng(seed + i).integers(-9, 9, (n, d)).astype(float) for i, n in enumerate((n1, n2)))
    with jax.enable_x64(True):
        params = {"w": jnp.ones((d, c)), "b": jnp.ones((c,)), "step": jnp.int32(3)}
        actual = neural_tangents.kernel(
            linear_model, params, jnp.asarray(x1), jnp.asarray(x2), implementation=implementation
        )
        np.testing.assert_array_equal(np.asarray(actual), np.kron(x1 @ x2.T + 1, np.eye(c)))


def linear_model(params, x):
    return x @ params["w"] + params["b"][None] + params["step"].astype(x.dtype)


@pytest.mark.parametrize(
    ("implementation", "outputs", "same"),
    [
        ("structured", "full", True),
        ("structured", "trace", False),
        *(
            pytest.param(implementation, *case, marks=pytest.mark.slow)
            for implementation in ("jacobian", "ntvp")
            for case in CASES
            if case[0] != "diagonal"
        ),
    ],
)
def test_blocks_change_nothing(implementation, outputs, same, monkeypatch):
    needs = recorded_needs(monkeypatch)
    whole = computed("linen", implementation=implementation, outputs=outputs, same=same)
    # Seven rows in blocks of at most three: two blocks overlap.
    budget = needs[-1] // 3
    blocked = computed("linen", implementation=implementation, outputs=outputs, same=same, memory_budget=budget)
    assert len(needs) > 2
    assert needs[-1] <= budget < needs[1]
    # A block may order its sums differently: the same bound as against the naive Jacobian, on either side.
    assert_matches(blocked, expected("linen", outputs, same), "linen")
    assert_matches(blocked, whole, "linen")
    if same:
        np.testing.assert_array_equal(blocked, blocked.T)


def test_the_diagonal_is_blocked_too(monkeypatch):
    needs = recorded_needs(monkeypatch)
    computed("linen", implementation="jacobian", outputs="diagonal", same=True)
    budget = needs[-1] // 2
    blocked = computed("linen", implementation="jacobian", outputs="diagonal", same=True, memory_budget=budget)
    assert needs[-1] <= budget < needs[1]
    assert_matches(blocked, expected("linen", "diagonal", True), "linen")


def recorded_needs(monkeypatch):
    """Record what the compiler says about each candidate block."""
    needs, measure = [], neural_tangents._bytes_needed

    def recording(*args):
        needs.append(measure(*args))
        return needs[-1]

    monkeypatch.setattr(neural_tangents, "_bytes_needed", recording)
    return needs


def test_the_default_budget_blocks_and_gives_way_to_a_large_pair(monkeypatch):
    monkeypatch.setattr(neural_tangents, "DEFAULT_MEMORY_BUDGET", 1)
    x = jnp.asarray([[1.0], [2.0], [3.0]], "float32")
    actual = neural_tangents.kernel(lambda params, x: x * params, jnp.float32(2), x, None, implementation="jacobian")
    np.testing.assert_array_equal(actual, x @ x.T)


def test_parameters_are_arguments_and_repeated_probes_do_not_compile():
    module = LinenMLP()
    _, params, x, _ = problem("linen")
    params, x = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float32"), (params, x))
    neural_tangents._kept.clear()
    first = neural_tangents.kernel(module.apply, params, x, None, outputs="trace")
    (function,) = neural_tangents._kept.values()
    assert function._cache_size() == 1
    smaller = jax.tree.map(lambda leaf: leaf / 2, params)
    second = neural_tangents.kernel(module.apply, smaller, x, None, outputs="trace")
    assert function._cache_size() == 1
    assert float(jnp.abs(first - second).max()) > 0.1
    text = function.lower(jax.tree.leaves(params), x, None).as_text()
    # Constants that are written out element by element carry data; splats such as zeros do not.
    assert "dense<[" not in text
    assert 'dense<"0x' not in text


def test_the_cache_is_bounded_and_lets_models_go():
    class Scale:
        def apply(self, params, x):
            return x * params

    model = Scale()
    x = jnp.ones((3, 1), "float32")
    np.testing.assert_array_equal(neural_tangents.kernel(model.apply, jnp.float32(2), x, None), np.ones((3, 3)))
    gone = weakref.ref(model)
    del model
    for scale in range(2 * neural_tangents._MAX_CACHED):
        split = parameters.split(jnp.float32(2))
        traced = engine.trace(lambda params, x, by=float(scale): x * params * by, split, x)
        neural_tangents._jitted(None, split, traced, (3, True, None), "structured", "full")
    assert len(neural_tangents._kept) == neural_tangents._MAX_CACHED
    gc.collect()
    assert gone() is None


def test_threads_do_not_disturb_each_other():
    results = {}

    def work(implementation):
        results[implementation] = computed("plain", implementation=implementation, outputs="trace", same=False)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("jacobian", "structured")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2
    for result in results.values():
        assert_matches(result, expected("plain", "trace", False), "plain")


def sliced(params, x):
    weight, start = params[:12].reshape(3, 4), jnp.argmax(x[0])
    return jax.lax.dynamic_slice_in_dim(jnp.tanh(x @ weight), start, 2, axis=1) * params[12]


@pytest.mark.parametrize("model", [sliced, jax.checkpoint(sliced)], ids=["slices", "remat"])
def test_structured_derivatives_of_operations_that_they_have_no_rule_for(model):
    with jax.enable_x64(True):
        params, x = jnp.asarray(numbers(0, 13)), jnp.asarray(numbers(1, (2, 3)))
        jacobian = jnp.stack([jax.jacrev(lambda params, x=x: sliced(params, x[None])[0])(params) for x in x])
        wanted = np.einsum("iop,jqp->iojq", jacobian, jacobian).reshape(4, 4)
        actual = np.asarray(neural_tangents.kernel(model, params, x, None, implementation="structured"))
    # Thirteen products a sum and as many roundings behind them.
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=26 * np.finfo("float64").eps * np.abs(wanted).max())


def split_model(params, x):
    left, right = jnp.split(x @ params, 2, axis=1)
    return left * right


def test_an_unknown_operation_is_named_with_the_way_out():
    params, x = jnp.asarray(numbers(0, (3, 4)), "float32"), jnp.asarray(numbers(1, (2, 3)), "float32")
    with pytest.raises(NotImplementedError, match=r'"structured" cannot treat .*multiple outputs.*"jacobian"'):
        neural_tangents.kernel(split_model, params, x, None)
    jacobians = jax.vmap(lambda x: jax.jacrev(lambda params: split_model(params, x[None])[0])(params))(x).reshape(4, -1)
    wanted = np.asarray(jacobians, "float64") @ np.asarray(jacobians, "float64").T
    actual = neural_tangents.kernel(split_model, params, x, None, implementation="jacobian")
    # Twelve products a sum and a handful of roundings in each Jacobian entry.
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=24 * np.finfo("float32").eps * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"implementation": "fast"}, "implementation must be one of jacobian, ntvp, structured, auto, got 'fast'"),
        ({"outputs": "mean"}, "outputs must be one of full, trace, diagonal, got 'mean'"),
        ({"outputs": "diagonal", "x2": jnp.ones((1, 2), "float32")}, "leave x2 out"),
        ({"memory_budget": 0}, "memory_budget must be a positive number of bytes or None, got 0"),
        ({"memory_budget": 1}, r"memory_budget of 1 bytes is below the \d+ that one pair of samples needs"),
        (
            {"apply_fn": lambda params, x: (x * params)[..., None]},
            r"must return outputs .* n = 3, got shape \(3, 2, 1\)",
        ),
        ({"apply_fn": lambda params, x: (x * params).sum()}, r"must return outputs .* n = 3, got shape \(\)"),
    ],
)
def test_mistakes_are_explained(settings, message):
    settings = {"apply_fn": lambda params, x: x * params, "x2": None, **settings}
    apply_fn, x2 = settings.pop("apply_fn"), settings.pop("x2")
    with pytest.raises(ValueError, match=message):
        neural_tangents.kernel(apply_fn, jnp.float32(1), jnp.ones((3, 2), "float32"), x2, **settings)


def in_fresh_process(code):
    return subprocess.run([sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True)


def test_jax_is_left_as_it_was():
    done = in_fresh_process(
        """
        import sys, warnings
        import jax, jax.core, jax.extend.core, jax.interpreters.ad, jax.numpy as jnp, jax.stages, numpy as np
        import jax.example_libraries.stax, jax.flatten_util  # submodules that neural-tangents loads
        from lplr_jax.ntk import neural_tangents

        assert "neural_tangents" not in sys.modules, "imported before a kernel was asked for"
        modules = [sys.modules[name] for name in ("jax", "jax.core", "jax.interpreters.ad", "jax.stages", "jax.numpy")]
        holders = [*modules, jax.stages.Compiled, jax.extend.core.Primitive]

        def state():
            names = [dict(vars(holder)) for holder in holders]
            return names, dict(jax.config.values), np.get_printoptions(), list(warnings.filters), np.geterr()

        def touched(before, after):
            return [set(b) ^ set(a) | {k for k in b if b[k] is not a[k]} for b, a in zip(before[0], after[0])]

        before = state()
        neural_tangents.kernel  # looked up, not called
        assert neural_tangents.available() is None
        during = []

        def apply_fn(params, x):
            during.append(touched(before, state()))
            return jnp.tanh(x @ params)

        for implementation in neural_tangents.IMPLEMENTATIONS:
            neural_tangents.kernel(apply_fn, jnp.ones((2, 2)), jnp.ones((3, 2)), None, implementation=implementation)
        after = state()
        during.append(touched(before, after))
        assert not any(set().union(*names) for names in during), during
        assert len(during) > 4
        assert before[1:] == after[1:]
        for name in ("jax.util", "neural_tangents.experimental"):
            assert name not in sys.modules, name
        assert not hasattr(sys.modules["neural_tangents"], "experimental")
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_neural_tangents_asking_for_it_is_a_clear_error():
    done = in_fresh_process(
        """
        import sys
        sys.modules["neural_tangents"] = None
        import jax, jax.core, jax.numpy as jnp
        from lplr_jax.ntk import neural_tangents

        names = dict(vars(jax.core))

        def message():
            try:
                neural_tangents.kernel(lambda params, x: x * params, jnp.ones(1), jnp.ones((3, 1)), None)
            except ImportError as error:
                assert str(error) == neural_tangents.available(), (error, neural_tangents.available())
                return str(error)
            raise AssertionError("no ImportError")

        for way in ("pip install --no-deps neural-tangents==0.6.5", "[nt] extra"):
            assert way in message(), message()
        del sys.modules["neural_tangents"]
        sys.modules["frozendict"] = None  # an import that fails half way
        assert "frozendict" in message(), message()
        assert not [name for name in sys.modules if name.startswith("neural_tangents")]
        assert vars(jax.core) == names
        assert "jax.util" not in sys.modules
        del sys.modules["frozendict"]  # installed in the meantime
        assert neural_tangents.available() is None
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
