"""Rivals of the theory, against the Jacobian itself, quadratics, and linear models."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.optimize

from lplr_jax.curves.rivals import rivals
from lplr_jax.losses import Squared
from lplr_jax.losses.objective import Objective
from lplr_jax.measurement import rivals as measured
from lplr_jax.measurement.rivals import critical_step, kernel_rivals
from lplr_jax.reports.rows import summary_rows
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


@pytest.fixture
def passes(monkeypatch):
    """The losses that searches for a critical step ask for."""
    asked, after = [], measured._after

    def counted(params, gradient, eta, *data, objective):
        asked.append(float(eta))
        return after(params, gradient, eta, *data, objective=objective)

    monkeypatch.setattr(measured, "_after", counted)
    return asked


def quadratic(spectrum, w):
    """½ wᵀHw, H of a given spectrum in random directions, as a squared loss; its step η_c = 2 ‖G‖²/(GᵀHG)."""
    q = np.linalg.qr(RNG.normal(size=(len(spectrum), len(spectrum))))[0]
    x = np.sqrt(spectrum)[:, None] * q
    h = x.T @ x
    g = h @ w
    exact = 2 * float((g * g).sum() / (g * (h @ g)).sum())
    return Objective(lambda w, x: x @ w, Squared("sum")), x, np.zeros((len(spectrum), 1)), exact


@pytest.mark.parametrize("factor", [1e-2, 0.6, 0.95, 1.0, 1.05, 1.7, 60.0])
def test_the_critical_step_of_a_quadratic(factor, passes):
    """L(θ - ηG) <= L up to η_c = 2 ‖G‖²/(GᵀHG); four losses do where the guess is within 10 %."""
    w = RNG.normal(size=(4, 1))
    objective, x, y, exact = quadratic([0.1, 1.0, 2.0, 5.0], w)
    found = critical_step(objective, w, x, y, guess=factor * exact)
    assert exact / 1.04 <= found <= exact * (1 + 1e-9)
    assert len(passes) <= (4 if 1 / 1.1 < factor < 1.1 else measured.PASSES)


def test_critical_sharpness_is_at_most_that_of_the_hessian():
    """2/η_c = GᵀHG/‖G‖² <= β on a quadratic, and β where the gradient lies along the sharpest direction."""
    spectrum = np.array([0.01, 0.5, 3.0])
    for _ in range(5):
        w = RNG.normal(size=(3, 1))
        objective, x, y, exact = quadratic(spectrum, w)
        assert 2 / exact <= 3.0
        found = critical_step(objective, w, x, y, guess=exact)
        assert found >= 2 / 3.0 / 1.04
        sharpest = np.linalg.eigh(x.T @ x)[1][:, -1:]
        assert critical_step(objective, sharpest, x, y, guess=1.0) == pytest.approx(2 / 3.0, rel=0.04)


def test_the_critical_step_of_a_network_is_that_of_an_exact_line_search():
    """Against the root of L(θ - ηG) - L(θ) by Brent's method, network and gradient written out in NumPy."""
    x, y, w, v = RNG.normal(size=(6, 3)), RNG.normal(size=(6, 1)), RNG.normal(size=(3, 4)), RNG.normal(size=(4, 1))

    def loss(w, v):
        return 0.5 * float(np.square(np.tanh(x @ w) @ v - y).sum()) / 6

    h = np.tanh(x @ w)
    r = (h @ v - y) / 6
    of_v, of_w = h.T @ r, x.T @ (r @ v.T * (1 - h**2))

    def rise(eta):
        return loss(w - eta * of_w, v - eta * of_v) - loss(w, v)

    grid = np.geomspace(1e-2, 1e2, 400)
    first = int(np.argmax([rise(eta) > 0 for eta in grid]))
    exact = scipy.optimize.brentq(rise, grid[first - 1], grid[first])
    objective = Objective(lambda q, x: jnp.tanh(x @ q[0]) @ q[1], Squared("mean"))
    found = critical_step(objective, (w, v), x, y, guess=1.5 * exact)
    assert exact / 1.04 <= found <= exact * (1 + 1e-9)


def test_critical_sharpness_stands_at_every_probe_with_or_without_a_hessian():
    problem = Problem(lambda w, x: jnp.tanh(x @ w), jnp.ones((2, 1)), jnp.eye(2), jnp.zeros((2, 1)))
    record = train(problem, optax.sgd(0.1), steps=4, probes=Probes(every=2, search=0, hessian=0))
    assert "sharpness" not in record
    assert np.isfinite(record["critical_step"]).all()
    rows = {name: (value, says) for name, value, says in summary_rows(record)}
    value, says = rows["critical sharpness 2/η_c"]
    assert value == f"{2 / record['critical_step'][0]:.4g}, {2 / record['critical_step'][-1]:.4g}"
    assert "steps 0 and 4" in says


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
    assert not any(name.startswith(("aiming", "sharpness")) for name in names)
    with pytest.raises(TypeError, match="record must be"):
        rivals({})
