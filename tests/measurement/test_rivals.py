"""Rivals of the theory, against the Jacobian itself, quadratics, and linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lplr_jax.curves.rivals import rivals
from lplr_jax.losses import Squared
from lplr_jax.losses.objective import Objective
from lplr_jax.measurement import rivals as measured
from lplr_jax.measurement.rivals import critical_step, kernel_rivals
from lplr_jax.runs.loop import train
from lplr_jax.runs.problem import Probes, Problem

RNG = np.random.default_rng(3)


@pytest.mark.parametrize(("n", "c", "p"), [(4, 1, 9), (3, 2, 20), (1, 1, 1)])
def test_of_the_kernel_against_the_jacobian(n, c, p):
    jacobian, g, s = RNG.normal(size=(n * c, p)), RNG.normal(size=(n, c)), 2.5
    found = kernel_rivals(jacobian @ jacobian.T, g, s)
    mean, gradient = jacobian.sum(axis=0), jacobian.T @ g.reshape(-1)
    cosine = abs(mean @ gradient) / (np.linalg.norm(mean) * np.linalg.norm(gradient))
    assert found["rsc_cosine"] == pytest.approx(cosine, rel=1e-12)
    curvature = np.linalg.norm(jacobian @ gradient) ** 2 / (s * np.linalg.norm(gradient) ** 2)
    assert found["gauss_newton_curvature"] == pytest.approx(curvature, rel=1e-12)


def test_what_vanishes_has_no_number():
    found = kernel_rivals(np.eye(3), np.zeros((3, 1)), 1.0)
    assert np.isnan(found["rsc_cosine"])
    assert np.isnan(found["gauss_newton_curvature"])
    alternating = np.array([[1.0], [-1.0]])
    assert kernel_rivals(np.eye(2), alternating, 1.0)["rsc_cosine"] == 0.0
    assert kernel_rivals(np.eye(2), alternating + 2, 1.0)["rsc_cosine"] <= 1.0


@pytest.mark.parametrize("guess", [1e-2, 1.0, 30.0])
def test_the_critical_step_of_a_quadratic(guess):
    """L(θ - ηG) <= L up to η_c = 2 ‖G‖²/(GᵀHG), with H = XᵀX/s."""
    x, y, w = RNG.normal(size=(5, 4)), RNG.normal(size=(5, 1)), RNG.normal(size=(4, 1))
    objective = Objective(lambda w, x: x @ w, Squared(3.0))
    g = x.T @ (x @ w - y) / 3
    exact = 2 * float((g**2).sum() / ((x @ g) ** 2).sum()) * 3
    found = critical_step(objective, w, x, y, guess=guess)
    assert exact / 1.04 <= found <= exact


def test_the_critical_step_that_is_not_found():
    objective = Objective(lambda w, x: x @ w, Squared("sum"))
    x, y = np.eye(2), np.zeros((2, 1))
    assert np.isnan(critical_step(objective, np.zeros((2, 1)), x, y, guess=1.0)), "no gradient"
    assert np.isnan(critical_step(objective, np.ones((2, 1)), x, y, guess=np.nan))
    far = 2.0 ** (2 * measured.PASSES)
    assert np.isnan(critical_step(objective, np.ones((2, 1)), x, y, guess=far)), "too far for so few losses"


def test_the_table_of_a_linear_model():
    """Aiming is 2, the slope of log ‖∇L‖² on log L is 1 where Θ is a multiple of the identity, 2/η_c = β."""
    x, w = np.linalg.qr(RNG.normal(size=(6, 6)))[0][:4].astype(np.float32), np.zeros((6, 1), np.float32)
    y = RNG.normal(size=(4, 1)).astype(np.float32)
    problem = Problem(lambda w, x: x @ w, jnp.asarray(w), x, y, loss=Squared("sum"))
    probes = Probes(every=5, search=0, certify_floor=1.0)
    table = {row.name.partition(" ")[0]: row for row in rivals(train(problem, optax.sgd(0.1), steps=20, probes=probes))}
    aiming, critical, slope = (table[name] for name in ("aiming", "critical", "Kurdyka-Łojasiewicz"))
    assert (aiming.least, aiming.most) == (pytest.approx(2, rel=1e-5), pytest.approx(2, rel=1e-5))
    assert 1 <= critical.least <= critical.most <= 1.05
    assert slope.first == pytest.approx(1, rel=1e-4)
    assert table["Gauss-Newton"].first == pytest.approx(1, rel=1e-5)
    assert table["sharpness"].last == pytest.approx(1, rel=1e-4)
    assert 0 <= table["restricted"].least <= 1


def test_a_record_without_the_numbers_has_no_table(without_type_checks):
    problem = Problem(lambda w, x: jax.nn.softplus(x @ w), jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1)))
    record = train(problem, optax.sgd(0.1), steps=2, probes=Probes(every=1, search=0, hessian=0))
    names = [row.name for row in rivals(record)]
    assert not any(name.startswith(("aiming", "critical", "sharpness")) for name in names)
    with pytest.raises(TypeError, match="record must be"):
        rivals({})
