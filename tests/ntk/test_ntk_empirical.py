"""The public kernel function: names, precision, conventions, and what it refuses."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export

from lplr_jax import diagnostics
from lplr_jax.models import MLP
from lplr_jax.ntk import KERNELS, empirical_ntk, engine, explain, precision_scope


def problem(n=5, c=2):
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    model = MLP(6, 3, outputs=c)
    return model.apply, model.init(jax.random.key(1), jnp.asarray(x)), x


def dense_jacobian(apply_fn, params, x):
    """The (n c, p) Jacobian in float64, sample by sample, by reverse mode: no shortcut shared with any kernel."""
    with jax.enable_x64(True):
        params = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), params)
        rows = []
        for sample in np.asarray(x, np.float64):
            jacobian = jax.jacrev(lambda p, s=sample: apply_fn(p, jnp.asarray(s[None]))[0])(params)
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(jacobian)]
            rows.append(np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1))
    return np.concatenate(rows)


@pytest.mark.parametrize("kernel", ["auto", "engine", "neural-tangents", "neural-tangents:jacobian"])
def test_conventions(kernel):
    """Full and undivided, sample-major; trace is the sum over outputs; diagonal is that of the full kernel."""
    apply_fn, params, x = problem()
    jacobian = dense_jacobian(apply_fn, params, x)
    expected = jacobian @ jacobian.T
    # 150 terms a sum, two assemblies: 300 u, relative to the largest entry.
    tolerance = {"rtol": 0, "atol": 300 * 2.3e-16 * np.abs(expected).max()}
    full = np.asarray(empirical_ntk(apply_fn, params, x, kernel=kernel))
    np.testing.assert_allclose(full, expected, **tolerance)
    np.testing.assert_array_equal(full, full.T)
    trace = empirical_ntk(apply_fn, params, x, kernel=kernel, outputs="trace")
    np.testing.assert_allclose(trace, np.einsum("iojo->ij", expected.reshape(5, 2, 5, 2)), **tolerance)
    diagonal = empirical_ntk(apply_fn, params, x, kernel=kernel, outputs="diagonal")
    np.testing.assert_allclose(diagonal, np.diag(expected).reshape(5, 2), **tolerance)
    block = empirical_ntk(apply_fn, params, x[:2], x[2:], kernel=kernel)
    np.testing.assert_allclose(block, expected[:4, 4:], **tolerance)


@pytest.mark.parametrize("flag", [False, True])
def test_precision_is_a_choice_of_the_call(flag):
    apply_fn, params, x = problem()
    with jax.enable_x64(flag):
        double = empirical_ntk(apply_fn, params, x)
        single = empirical_ntk(apply_fn, params, x, dtype="float32")
        assert jax.config.jax_enable_x64 == flag
    assert (double.dtype, single.dtype) == (np.float64, np.float32)
    error = np.abs(np.asarray(double) - np.asarray(single, np.float64)).max() / np.abs(double).max()
    # Float32 must show, and stay within 150 roundings of it.
    assert 1e-12 < error < 150 * 6e-8


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_float64_kernel_lowers_for_accelerators(platform):
    apply_fn, params, x = problem()
    with precision_scope("float64"):
        double = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x))
        exported = export.export(jax.jit(lambda p, x: engine.kernel(apply_fn, p, x)), platforms=[platform])(*double)
    assert exported.platforms == (platform,)
    assert exported.out_avals[0].dtype == np.float64
    assert "stablehlo.dot_general" in exported.mlir_module()


@pytest.mark.usefixtures("without_type_checks")
def test_names_are_checked():
    apply_fn, params, x = problem()
    for settings, message in (
        ({"kernel": "ntk"}, "kernel must be one of auto, engine, neural-tangents"),
        ({"outputs": "sum"}, "outputs must be one of full, trace, diagonal, got 'sum'"),
        ({"dtype": "float16"}, "dtype must be one of float32, float64, got 'float16'"),
        ({"outputs": "diagonal", "x2": x}, "leave x2 out"),
        ({"kernel": "neural-tangents", "mesh": jax.make_mesh((1,), ("rows",))}, "mesh is for kernel="),
        ({"memory_budget": 0}, "memory_budget must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            empirical_ntk(apply_fn, params, x, **settings)
    assert "neural-tangents:auto" in KERNELS


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(1)(x))


@pytest.mark.parametrize("function", [empirical_ntk, diagnostics.empirical_ntk_min_eig])
@pytest.mark.usefixtures("without_type_checks")
def test_bad_input_is_refused_with_a_sentence(function):
    apply_fn, params, x = problem()
    broken = x.copy()
    broken[1, 2] = np.nan
    calls = iter(range(100))
    for arguments, message in (
        ((apply_fn, params, broken), "1 NaN or infinite"),
        ((apply_fn, jax.tree.map(lambda leaf: leaf * np.float32(np.inf), params), x), "NaN or infinite"),
        ((apply_fn, params, x[:0]), "no samples"),
        ((apply_fn, params, x[0]), r"a single sample needs a leading axis: x\[None\]"),
        ((apply_fn, params, np.float32(1.0)), "scalar"),
        ((apply_fn, params, x[:, :2]), r"fails on samples of shape \(1, 2\)"),
        ((lambda p, x: apply_fn(p, x) * jnp.asarray(float(next(calls)), x.dtype), params, x), "two different outputs"),
        ((lambda p, x: apply_fn(p, x) - jnp.mean(apply_fn(p, x)), params, x), "depends on the other samples"),
        ((lambda p, x: jnp.sum(apply_fn(p, x)), params, x), r"must return \(n, c\) or \(n,\)"),
        (
            (Noisy().apply, Noisy().init({"params": jax.random.key(0), "dropout": jax.random.key(1)}, x), x),
            "random key",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            function(*arguments)


def test_explanation_names_every_leaf():
    apply_fn, params, x = problem()
    shown = str(explain(apply_fn, params, x))
    for layer in range(3):
        assert f"dense_{layer}" in shown
    assert "multiply-adds" in shown


def test_importing_the_package_imports_no_peer():
    code = "import sys, lplr_jax.cli; assert 'neural_tangents' not in sys.modules and 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
