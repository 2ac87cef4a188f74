"""Points of zero loss: a zero found in 60 digits inside every certified ball, the nearest ones, and what has none."""

import dataclasses

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from lplr_jax import theory
from lplr_jax.losses import Squared
from lplr_jax.losses.objective import Objective
from lplr_jax.measurement.interpolation import Budget, certificate, duplicate_floor, find_interpolant
from lplr_jax.ntk import empirical_ntk
from lplr_jax.runs.loop import train
from lplr_jax.runs.problem import Probes, Problem

RNG = np.random.default_rng(5)
N, D, WIDTH = 4, 3, 6
X = RNG.normal(size=(N, D))
Y = RNG.normal(size=(N, 1))


def network(params, x):
    w, b, v = params
    return jnp.tanh(x @ w + b) @ v


def parameters(seed):
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(D, WIDTH)), rng.normal(size=(1, WIDTH)), rng.normal(size=(WIDTH, 1))]


OBJECTIVE = Objective(network, Squared("sum"))


def zero_in_many_digits(params):
    """A zero of f - y from θ̃ by minimum-norm Newton steps in 60 digits, and its distance from θ̃."""
    w, b, v = ([[mpmath.mpf(float(e)) for e in row] for row in np.atleast_2d(leaf)] for leaf in params)
    start = [e for leaf in (w, b, v) for row in leaf for e in row]
    x = [[mpmath.mpf(float(e)) for e in row] for row in X]

    def at(flat):
        w = [flat[i * WIDTH : (i + 1) * WIDTH] for i in range(D)]
        b, v = flat[D * WIDTH : (D + 1) * WIDTH], flat[(D + 1) * WIDTH :]
        rows, residual = [], []
        for i in range(N):
            t = [mpmath.tanh(sum(x[i][k] * w[k][j] for k in range(D)) + b[j]) for j in range(WIDTH)]
            slope = [v[j] * (1 - t[j] ** 2) for j in range(WIDTH)]
            rows.append([x[i][k] * s for k in range(D) for s in slope] + slope + t)
            residual.append(sum(t[j] * v[j] for j in range(WIDTH)) - mpmath.mpf(float(Y[i, 0])))
        return mpmath.matrix(rows), mpmath.matrix(residual)

    flat = list(start)
    for _ in range(6):
        jacobian, residual = at(flat)
        step = jacobian.T * mpmath.lu_solve(jacobian * jacobian.T, residual)
        flat = [a - s for a, s in zip(flat, step, strict=True)]
    assert mpmath.norm(at(flat)[1]) < mpmath.mpf(10) ** -50
    return mpmath.norm(mpmath.matrix([a - s for a, s in zip(flat, start, strict=True)]))


@pytest.mark.parametrize("seed", range(3))
def test_a_zero_lies_in_the_certified_ball(seed):
    found = find_interpolant(OBJECTIVE, parameters(seed), X, Y, initial=parameters(seed), seconds=1.0)
    assert found is not None
    h = found.jacobian_lipschitz * found.residual / found.min_eig_lower
    assert h <= 0.5
    reach = 2 * found.residual / np.sqrt(found.min_eig_lower) / (1 + np.sqrt(1 - 2 * h))
    with mpmath.workdps(60):
        assert zero_in_many_digits(found.params) <= reach <= found.ball
    moved = np.concatenate([(a - b).ravel() for a, b in zip(found.params, parameters(seed), strict=True)])
    assert np.linalg.norm(moved) <= found.distance <= np.linalg.norm(moved) * (1 + 1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_bounds_at_a_point_hold_in_many_digits(seed):
    """Far from a zero too: ‖r‖ from above, λ_min from below, L_J above the slope of J along random lines."""
    params = parameters(seed)
    with jax.enable_x64(True):
        theta = np.asarray(empirical_ntk(network, params, X))
        residual, least, bend, ball = certificate(OBJECTIVE, params, X, Y, theta)
        jacobian = jax.jit(
            lambda *p: jnp.concatenate([j.reshape(N, -1) for j in jax.jacobian(network)(list(p), X)], axis=1)
        )
        base = np.asarray(jacobian(*params))
        exact = np.linalg.norm(np.asarray(network(params, X)) - Y)
        rng = np.random.default_rng(seed)
        for _ in range(20):
            v = [rng.normal(size=leaf.shape) for leaf in params]
            size = np.sqrt(sum(np.square(leaf).sum() for leaf in v))
            near = [a + 1e-3 * ball * b / size for a, b in zip(params, v, strict=True)]
            assert np.linalg.norm(np.asarray(jacobian(*near)) - base, 2) <= bend * 1e-3 * ball
    assert exact <= residual <= exact * (1 + 1e-5)
    assert least <= np.linalg.eigvalsh(base @ base.T)[0] <= least * (1 + 1e-6)
    assert ball >= 2 * residual / np.sqrt(least)


def test_the_nearest_zero_of_a_linear_model_is_the_projection():
    objective = Objective(lambda w, x: x @ w, Squared("sum"))
    x, start = RNG.normal(size=(3, 5)), RNG.normal(size=(5, 1))
    y = RNG.normal(size=(3, 1))
    found = find_interpolant(objective, start + 1.0, x, y, initial=start, seconds=1.0)
    expected = np.linalg.norm(np.linalg.pinv(x) @ (y - x @ start))
    assert found.distance == pytest.approx(expected, rel=1e-9)
    assert found.stationarity <= 1e-4
    assert found.jacobian_lipschitz == 0


def test_newton_finds_the_nearest_zero_of_a_circle():
    """f = √(θ_1² + θ_2²)-like: a softplus unit whose zeros form a curve; the nearest one by a search over the curve."""
    objective = Objective(lambda p, x: jax.nn.softplus(x @ p["w"]) @ p["v"], Squared("sum"))
    start = {"w": np.array([[0.3, -0.2]]), "v": np.array([[1.5], [-0.4]])}
    x, y = np.array([[1.0]]), np.array([[2.0]])
    found = find_interpolant(objective, start, x, y, initial=start, seconds=2.0)
    assert found.stationarity <= 1e-4
    from scipy.optimize import minimize

    flat = np.array([0.3, -0.2, 1.5, -0.4])
    value = lambda q: np.logaddexp(0, q[:2]) @ q[2:] - 2.0  # noqa: E731
    best = min(
        minimize(
            lambda q: np.sum((q - flat) ** 2),
            flat + RNG.normal(size=4),
            constraints={"type": "eq", "fun": value},
            method="SLSQP",
            options={"ftol": 1e-14, "maxiter": 500},
        ).fun
        for _ in range(8)
    )
    assert found.distance == pytest.approx(np.sqrt(best), rel=1e-5)


def test_more_seconds_come_no_farther():
    distances = []
    for seconds in (1e-6, 1e-4, 1.0):
        found = find_interpolant(OBJECTIVE, parameters(0), X, Y, initial=parameters(1), seconds=seconds)
        distances.append(np.inf if found is None else found.distance)
    assert distances[0] == np.inf, "no step is allowed"
    assert distances[0] >= distances[1] >= distances[2]
    again = find_interpolant(OBJECTIVE, parameters(0), X, Y, initial=parameters(1), seconds=1.0)
    assert again.distance == distances[2], "operations are counted, not seconds"


def test_the_budget_counts_operations():
    one, two = (Budget(10.0, n=n, rows=n, p=1000) for n in (100, 200))
    assert two.plain > 2 * one.plain
    assert one.newton > one.plain
    assert one.spend(one.left)
    assert not one.spend(1.0)


@pytest.mark.parametrize("outputs", [2, 5])
def test_more_rows_than_parameters_have_no_interpolant(outputs):
    objective = Objective(lambda w, x: x @ w @ jnp.ones((1, outputs), x.dtype), Squared("sum"))
    w, y = np.ones((D, 1)), np.ones((N, outputs))
    assert find_interpolant(objective, w, X, y, initial=w, seconds=1.0) is None


def test_relu_and_unknown_programs_have_no_certificate():
    for act, bent in ((jax.nn.relu, True), (jax.nn.gelu, False)):
        objective = Objective(lambda p, x, act=act: act(x @ p[0] + p[1]) @ p[2], Squared("sum"))
        found = find_interpolant(objective, parameters(0), X, Y, initial=parameters(0), seconds=1.0)
        assert found is not None
        assert np.isnan(found.jacobian_lipschitz)
        assert np.isfinite(found.min_eig_lower) == bent


def test_equal_inputs_with_unlike_targets_have_a_floor():
    """Two pairs: targets 1 and -1 leave 2, targets (1, 2, 3) leave 2; a third pair agrees."""
    x = np.array([[1.0], [1.0], [2.0], [2.0], [2.0], [3.0], [3.0]], np.float32)
    y = np.array([[1.0], [-1.0], [1.0], [2.0], [3.0], [5.0], [5.0]])
    assert duplicate_floor(x, y, 7.0) == pytest.approx(4.0 / 14, rel=1e-8)
    assert duplicate_floor(x, y, 7.0) < 4.0 / 14
    assert duplicate_floor({"a": x, "b": np.arange(7.0)}, y, 1.0) == 0.0


def test_a_run_tells_whether_zero_loss_is_in_reach(tmp_path):
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (parameters(0), X, Y))
    problem = Problem(network, params, x, y)
    settings = {"every": 5, "search": 0, "hessian": 0}
    record = train(problem, optax.sgd(0.1), steps=10, probes=Probes(**settings, certify_floor=1.0), out=tmp_path / "a")
    verdict = theory.verify(record)["interpolation"]
    assert verdict.outcome == "proved", verdict
    assert float(record["loss_floor_lower"]) == 0.0
    without = train(problem, optax.sgd(0.1), steps=10, probes=Probes(**settings))
    assert "interpolant_residual" not in without
    x = problem.x.at[1].set(problem.x[0])
    doubled = dataclasses.replace(problem, x=x)
    record = train(doubled, optax.sgd(0.1), steps=10, probes=Probes(**settings, certify_floor=1.0))
    assert theory.verify(record)["interpolation"].outcome == "refuted"
    assert float(record["loss_floor_lower"]) == pytest.approx(float((Y[0] - Y[1])[0] ** 2) / 4 / N, rel=1e-6)
