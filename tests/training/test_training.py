"""The objective and the step against closed forms and NumPy in float64."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax import export

from lplr_jax.losses import Objective
from lplr_jax.models import MLP
from lplr_jax.training import evaluate, init_state, train_epochs, train_step


def linear(params, x):
    return x @ params["w"]


def linear_problem(seed, n, d, c):
    rng = np.random.default_rng(seed)
    x, y, w = rng.normal(size=(n, d)), rng.normal(size=(n, c)), rng.normal(size=(d, c))
    return x.astype(np.float32), y.astype(np.float32), w.astype(np.float32)


@given(
    seed=st.integers(0, 99),
    n=st.integers(1, 6),
    d=st.integers(1, 5),
    c=st.integers(1, 3),
    scale=st.sampled_from(["sum", "mean"]),
)
def test_objective_is_the_squared_loss(seed, n, d, c, scale):
    x, y, w = linear_problem(seed, n, d, c)
    objective = Objective(linear, scale)
    loss, gradient = objective.value_and_gradient({"w": jnp.asarray(w)}, jnp.asarray(x), jnp.asarray(y))
    residual = x.astype(np.float64) @ w - y
    s = n if scale == "mean" else 1
    assert objective.scale(n) == s
    # At most d + n c terms, each rounded to 6e-8 of values of order ten.
    np.testing.assert_allclose(loss, np.sum(residual**2) / (2 * s), rtol=1e-5)
    np.testing.assert_allclose(gradient["w"], x.T @ residual / s, rtol=1e-4, atol=2e-5)


def test_steps_of_a_linear_model_follow_the_closed_form():
    x, y, w = linear_problem(1, 8, 3, 1)
    eta, steps = 0.05, 30
    objective, optimizer = Objective(linear, "mean"), optax.sgd(eta)
    params = {"w": jnp.asarray(w)}
    state, metrics = train_epochs(
        init_state(params, optimizer), (x, y), params, objective=objective, optimizer=optimizer, epochs=steps
    )
    hessian = x.astype(np.float64).T @ x / 8
    best = np.linalg.solve(hessian, x.astype(np.float64).T @ y / 8)
    values, vectors = np.linalg.eigh(hessian)
    for t in (0, 1, 7, steps - 1):
        # On a quadratic θ_t - θ* = (I - ηH)^t (θ_0 - θ*).
        theta = best + vectors @ np.diag((1 - eta * values) ** t) @ vectors.T @ (w - best)
        residual = x @ theta - y
        gradient = x.T @ residual / 8
        # Rounding of 30 contracting steps stays within a few units of float32.
        np.testing.assert_allclose(metrics.loss[t], np.sum(residual**2) / 16, rtol=3e-6)
        np.testing.assert_allclose(metrics.grad_sq_norm[t], np.sum(gradient**2), rtol=2e-5, atol=1e-10)
        np.testing.assert_allclose(metrics.drift[t], np.linalg.norm(theta - w), rtol=2e-5, atol=1e-7)
    after = evaluate(state.params, (x, y), params, objective=objective)
    theta = best + vectors @ np.diag((1 - eta * values) ** steps) @ vectors.T @ (w - best)
    np.testing.assert_allclose(after.drift, np.linalg.norm(theta - w), rtol=2e-5)


def mlp_problem(seed=0, n=12):
    model = MLP(7, 3)
    rng = np.random.default_rng(seed)
    x, y = jnp.asarray(rng.normal(size=(n, 5)), jnp.float32), jnp.asarray(rng.normal(size=(n, 1)), jnp.float32)
    return Objective(model.apply, "mean"), model.init(jax.random.key(seed), x[:1]), (x, y)


def test_step_is_the_same_unjitted_jitted_and_scanned():
    objective, params, batch = mlp_problem()
    optimizer = optax.sgd(0.1)
    step = partial(train_step, objective=objective, optimizer=optimizer)
    runs = {}
    for name, function in (("unjitted", step), ("jitted", jax.jit(step))):
        state, metrics = init_state(params, optimizer), []
        for _ in range(5):
            state, values = function(state, batch, params)
            metrics.append(values)
        runs[name] = (state, jax.tree.map(lambda *column: np.stack(column), *metrics))
    runs["scanned"] = train_epochs(
        init_state(params, optimizer), batch, params, objective=objective, optimizer=optimizer, epochs=5
    )
    # Fusion may reorder sums of at most 12 x 7 float32 terms; five steps do not amplify that.
    for name in ("jitted", "scanned"):
        for a, b in zip(jax.tree.leaves(runs["unjitted"]), jax.tree.leaves(runs[name]), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-7)


def test_chunks_do_not_change_a_run():
    objective, params, batch = mlp_problem()
    optimizer = optax.sgd(0.1)
    run = partial(train_epochs, objective=objective, optimizer=optimizer)
    whole, metrics = run(init_state(params, optimizer), batch, params, epochs=12)
    state, parts = init_state(params, optimizer), []
    for length in (5, 4, 3):
        state, part = run(state, batch, params, epochs=length)
        parts.append(part.loss)
    np.testing.assert_array_equal(np.concatenate(parts), metrics.loss)
    jax.tree.map(np.testing.assert_array_equal, state.params, whole.params)


def test_buffers_are_donated_and_the_initial_parameters_survive():
    objective, params, batch = mlp_problem()
    optimizer = optax.sgd(0.1)
    state = init_state(params, optimizer)
    train_epochs(state, batch, params, objective=objective, optimizer=optimizer, epochs=2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_nothing_large_is_captured():
    objective, params, batch = mlp_problem(n=500)
    optimizer = optax.sgd(0.1)
    run = partial(train_epochs, objective=objective, optimizer=optimizer, epochs=3)
    jaxpr = jax.make_jaxpr(run)(init_state(params, optimizer), batch, params)
    captured = [np.size(constant) for constant in jaxpr.consts]
    inner = [np.size(c) for eqn in jaxpr.eqns for v in eqn.params.values() for c in getattr(v, "consts", ())]
    assert sum(captured) + sum(inner) < 10


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_step_and_scan_lower_for_accelerators(platform):
    objective, params, batch = mlp_problem()
    optimizer = optax.sgd(0.1)
    settings = {"objective": objective, "optimizer": optimizer}
    state = init_state(params, optimizer)
    for function in (
        jax.jit(partial(train_step, **settings)),
        jax.jit(partial(train_epochs.__wrapped__, epochs=4, **settings)),
    ):
        exported = export.export(function, platforms=[platform])(state, batch, params)
        assert exported.platforms == (platform,)
        assert "stablehlo.dot_general" in exported.mlir_module()


@pytest.mark.usefixtures("without_type_checks")
def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r'loss_scale must be "sum" .*, or the number s itself.* got \'average\''):
        Objective(linear, "average")
    objective = Objective(linear, "sum")
    with pytest.raises(ValueError, match=r"apply_fn returns shape \(4, 2\) but y has shape \(4, 1\)"):
        objective.residual({"w": jnp.ones((3, 2))}, jnp.ones((4, 3)), jnp.ones((4, 1)))
