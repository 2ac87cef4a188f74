"""Which leaves are θ: one answer from every function, held against Jacobians by the leaves that are meant."""

import contextlib

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from lplr_jax import diagnostics, parameters
from lplr_jax.ntk import empirical_ntk, explain
from lplr_jax.proofs.affine import is_affine

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(5, 3)), RNG.normal(size=(3, 1))


@contextlib.contextmanager
def lenient():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


def linear(params, x):
    return x @ params["w"] + jnp.broadcast_to(jnp.asarray(params["b"]), (x.shape[0], 1))


def jacobian_kernel(function, theta, x):
    """J Jᵀ in float64 by reverse mode, for a function of a list of arrays."""
    with jax.enable_x64(True):
        theta = [jnp.asarray(np.asarray(leaf, np.float64)) for leaf in theta]
        x = jnp.asarray(np.asarray(x, np.float64))
        rows = jax.jacrev(lambda leaves: function(leaves, x).reshape(-1))(theta)
        jacobian = np.concatenate([np.asarray(leaf).reshape(leaf.shape[0], -1) for leaf in rows], axis=1)
    return jacobian @ jacobian.T


@pytest.mark.parametrize("bias", [0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), jnp.float32(0.5)])
def test_scalars_are_parameters_everywhere(bias):
    params = {"w": W, "b": bias}
    want = X @ X.T + 1
    np.testing.assert_allclose(empirical_ntk(linear, params, X), want, rtol=1e-14)
    assert parameters.count_parameters(params) == 4
    largest = np.linalg.eigvalsh(want)[-1]
    assert diagnostics.ntk_extremes(linear, params, X).largest == pytest.approx(largest, rel=1e-9)
    # ½ Σ f² has the Hessian JᵀJ.
    sharpness = diagnostics.hessian_extremes(lambda p, x: 0.5 * jnp.sum(linear(p, x) ** 2), params, X)
    assert sharpness.largest == pytest.approx(largest, rel=1e-9)
    y = np.zeros((5, 1))
    outputs = X @ W + float(bias)
    gradient = np.append(X.T @ outputs, outputs.sum())
    point = diagnostics.evaluate_point(linear, params, X, y, loss_scale="sum")
    assert point.grad_sq_norm == pytest.approx(gradient @ gradient, rel=1e-12)
    assert is_affine(linear, params, X)
    # Five rows, four parameters.
    assert diagnostics.empirical_ntk_min_eig(linear, params, X).upper == 0


def carried(params, x):
    h = params["function"](x @ params["w"]) * params["steps"]
    noise = jax.random.normal(params["key"], (1, 1), x.dtype)
    return jnp.where(params["mask"], h, -h) + jnp.broadcast_to(noise, h.shape)


def test_other_leaves_are_carried_along_everywhere():
    params = {
        "w": W,
        "steps": 2,
        "mask": np.array([True]),
        "key": jax.random.key(1),
        "none": None,
        "function": jnp.tanh,
    }
    slopes = 2 * (1 - np.tanh(X @ W) ** 2)
    want = (X @ X.T) * (slopes @ slopes.T)
    with lenient():
        np.testing.assert_allclose(empirical_ntk(carried, params, X), want, rtol=1e-12)
        largest = diagnostics.ntk_extremes(carried, params, X).largest
        point = diagnostics.evaluate_point(carried, params, X, np.zeros((5, 1)), loss_scale="sum")
        sharpness = diagnostics.hessian_extremes(lambda p, x: jnp.sum(carried(p, x)), params, X)
        table = explain(carried, params, X)
    assert parameters.count_parameters(params) == 3
    assert largest == pytest.approx(np.linalg.eigvalsh(want)[-1], rel=1e-9)
    gradient = X.T @ (slopes * point.residual)
    assert point.grad_sq_norm == pytest.approx(float(np.sum(gradient**2)), rel=1e-12)
    second = np.sum(-2 * np.tanh(X @ W) * slopes * (X @ (v := np.linalg.eigh(_hessian())[1][:, -1:])) ** 2)
    assert sharpness.largest == pytest.approx(second, rel=1e-9)
    assert v.shape == (3, 1)
    assert [leaf.path for leaf in table.leaves] == ["['w']"]
    assert dict(table.carried) == {
        "['steps']": "integer",
        "['mask']": "boolean",
        "['key']": "random key",
        "['function']": "function",
    }
    assert "not θ: ['steps'], integer" in str(table)


def _hessian():
    """Of Σ 2 tanh(x w): tanh'' = -2 tanh (1 - tanh²)."""
    t = np.tanh(X @ W)
    return (X * (-4 * t * (1 - t**2))).T @ X


def test_a_whole_equinox_module_is_what_its_arrays_are():
    model = eqx.nn.MLP(3, 1, 7, 2, activation=jax.nn.softplus, key=jax.random.key(0))
    arrays, static = eqx.partition(model, eqx.is_inexact_array)

    def whole(module, x):
        return jax.vmap(module)(x)

    def parts(leaves, x):
        return jax.vmap(eqx.combine(leaves, static))(x)

    with lenient():
        one, two = (diagnostics.empirical_ntk_min_eig(f, p, X) for f, p in ((whole, model), (parts, arrays)))
        assert parameters.count_parameters(model) == sum(leaf.size for leaf in jax.tree.leaves(arrays))
        assert is_affine(whole, model, X) is False
    assert one.proved
    assert (one.value, one.lower, one.upper) == (two.value, two.lower, two.upper)


def test_numbers_in_equinox_modules_are_settings():
    class Slope(eqx.Module):
        weight: jax.Array
        slope: float

        def __call__(self, x):
            return self.slope * (x @ self.weight)

    model = Slope(jnp.asarray(W, jnp.float32), 3.0)
    np.testing.assert_allclose(empirical_ntk(lambda m, x: m(x), model, X), 9 * X @ X.T, rtol=1e-14)
    assert parameters.split(model).leaves[1].reason == "number in an Equinox module, which trains arrays"


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        h = nn.Dense(4, dtype=x.dtype)(x)
        h = nn.BatchNorm(use_running_average=True, dtype=x.dtype)(h)
        return nn.Dense(1, dtype=x.dtype)(jnp.tanh(h))


def test_of_flax_variables_only_params_train():
    module = Normed()
    with lenient():
        variables = module.init(jax.random.key(0), jnp.asarray(X, jnp.float32))
        got = np.asarray(empirical_ntk(module.apply, variables, X))
        leaves, tree = jax.tree.flatten(variables["params"])
        stats = jax.tree.map(lambda a: np.asarray(a, np.float64), variables["batch_stats"])
        want = jacobian_kernel(
            lambda theta, x: module.apply({"params": jax.tree.unflatten(tree, theta), "batch_stats": stats}, x),
            leaves,
            X,
        )
        assert parameters.count_parameters(variables) == sum(leaf.size for leaf in leaves)
        least = diagnostics.empirical_ntk_min_eig(module.apply, variables, X)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.abs(want).max())
    assert least.value == pytest.approx(np.linalg.eigvalsh(want)[0], abs=1e-12 * np.abs(want).max())
    # With the statistics it would be another kernel.
    assert np.abs(got - np.asarray(all_floats(module.apply, variables))).max() > 1e-3 * np.abs(got).max()


def all_floats(apply_fn, variables):
    with lenient():
        return empirical_ntk(apply_fn, variables, X, trainable=lambda path: path[-1] != "nothing")


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.last = nnx.Linear(4, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.drop(jnp.tanh(self.norm(self.first(x)))))


def test_of_nnx_modules_and_states_only_param_trains():
    net = Net(nnx.Rngs(0))
    graph, params, rest = nnx.split(net, nnx.Param, ...)
    state = nnx.state(net)
    with lenient():
        want = np.asarray(empirical_ntk(lambda p, x: nnx.merge(graph, p, rest)(x), params, X))
        whole = np.asarray(empirical_ntk(lambda module, x: module(x), net, X))
        graph2, _ = nnx.split(net)
        stated = np.asarray(empirical_ntk(lambda s, x: nnx.merge(graph2, s)(x), state, X))
    np.testing.assert_allclose(whole, want, rtol=0, atol=1e-12 * np.abs(want).max())
    np.testing.assert_allclose(stated, want, rtol=0, atol=1e-12 * np.abs(want).max())
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameters.count_parameters(net) == parameters.count_parameters(state) == count
    assert {leaf.reason for leaf in parameters.split(net).leaves if not leaf.is_theta} >= {
        "nnx.BatchStat, not nnx.Param"
    }


@pytest.mark.parametrize(
    "trainable",
    [lambda path: path[0] == "w", {"w": True, "b": False}, {"w": {"deep": True}, "b": np.bool_(False)}],
    ids=["predicate", "prefix", "tree"],
)
def test_a_filter_says_what_trains(trainable):
    params = {"w": {"deep": W}, "b": np.array([0.5])}

    def apply_fn(p, x):
        return x @ p["w"]["deep"] + jnp.broadcast_to(p["b"], (x.shape[0], 1))

    np.testing.assert_allclose(empirical_ntk(apply_fn, params, X, trainable=trainable), X @ X.T, rtol=1e-14)
    largest = diagnostics.ntk_extremes(apply_fn, params, X, trainable=trainable).largest
    assert largest == pytest.approx(np.linalg.eigvalsh(X @ X.T)[-1], rel=1e-9)
    assert parameters.count_parameters(params, trainable) == 3
    least = diagnostics.empirical_ntk_min_eig(apply_fn, params, X[:2], trainable=trainable)
    assert least.lower <= np.linalg.eigvalsh(X[:2] @ X[:2].T)[0] <= least.upper


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("trainable", "error", "message"),
    [
        ({"w": True}, ValueError, "trainable must be a pytree of booleans like params"),
        ({"w": 1, "b": True}, TypeError, r"True or False for params\['w'\], got 1"),
        (lambda path: False, ValueError, "no floating arrays, .*left out by trainable"),
    ],
)
def test_filters_that_are_refused(trainable, error, message):
    with pytest.raises(error, match=message):
        empirical_ntk(linear, {"w": W, "b": np.array([0.5])}, X, trainable=trainable)


@pytest.mark.parametrize("z", [1j, np.array([1j]), jnp.asarray([1j])])
def test_complex_leaves_are_refused_with_a_word(z):
    with pytest.raises(TypeError, match=r"params\['z'\] is complex.*real and imaginary parts apart"):
        parameters.split({"w": W, "z": z})


def test_leaves_that_nothing_seems_to_train_get_a_warning():
    params = {"w": W, "running_mean": np.zeros(1), "spare": np.ones(2), "stopped": np.ones(1)}

    def apply_fn(p, x):
        h = x @ p["w"] - jnp.broadcast_to(p["running_mean"], (x.shape[0], 1))
        return h * jnp.broadcast_to(jax.lax.stop_gradient(p["stopped"]), h.shape)

    with pytest.warns(parameters.UntrainedLeafWarning) as caught:
        empirical_ntk(apply_fn, params, X)
    said = [str(warning.message) for warning in caught]
    assert any("params['running_mean'] counts as θ" in text for text in said)
    assert any("do not depend on params['spare'], params['stopped']" in text for text in said)
    assert all("trainable=" in text for text in said)
    empirical_ntk(apply_fn, params, X, trainable=lambda path: path == ("w",))  # warnings are errors here
