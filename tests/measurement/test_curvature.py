"""A probe without a kernel: against the dense Hessian, 60 digits, and itself after it was interrupted."""

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from lplr_jax import theory
from lplr_jax.losses import Squared
from lplr_jax.measurement.curvature import CurvatureProbe
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs.assembly import dense_network
from lplr_jax.runs.loop import run_and_record
from lplr_jax.runs.problem import Problem
from lplr_jax.training import evaluate, init_state, train_epochs

N, D, WIDTH, C, ETA = 6, 3, 5, 2, 0.7


def apply_fn(p, x):
    return jnp.tanh(x @ p[0] + p[1]) @ p[2]


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    shapes = ((D, WIDTH), (1, WIDTH), (WIDTH, C))
    params = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]
    x, y = (jnp.asarray(rng.normal(size=(N, k)), jnp.float32) for k in (D, C))
    return Problem(apply_fn, params, x, y, loss=Squared("mean"), name="curve")


def probe_of(problem, **changes):
    settings = {"matvecs": 8, "precision": "float64", "learning_rate": ETA, **changes}
    return CurvatureProbe(problem.objective, problem.x, problem.y, **settings)


@pytest.fixture(scope="module")
def values(problem):
    return probe_of(problem)(problem.params, 0)


def exact(problem, eta):
    """L(θ), ‖G‖² and L(θ - ηG) in many digits."""
    w, b, v = (mpmath.matrix(np.asarray(leaf, float).tolist()) for leaf in problem.params)
    x, y = (mpmath.matrix(np.asarray(a, float).tolist()) for a in problem.data)
    ones = mpmath.matrix([[1] for _ in range(N)])

    def forward(w, b, v):
        z = x * w + ones * b
        h = z.apply(mpmath.tanh)
        r = h * v - y
        return z, h, r, sum(entry**2 for entry in r) / (2 * N)

    z, h, r, before = forward(w, b, v)
    back = r * v.T
    delta = mpmath.matrix([[back[i, j] * mpmath.sech(z[i, j]) ** 2 for j in range(WIDTH)] for i in range(N)])
    gradient = [x.T * delta / N, ones.T * delta / N, h.T * r / N]
    slope = sum(entry**2 for part in gradient for entry in part)
    after = forward(*(leaf - mpmath.mpf(eta) * part for leaf, part in zip((w, b, v), gradient, strict=True)))[3]
    return before, slope, after


def test_sharpness_is_that_of_the_dense_hessian(problem, values):
    with jax.enable_x64(True):
        flat, unravel = jax.flatten_util.ravel_pytree([np.asarray(leaf, np.float64) for leaf in problem.params])
        x, y = (jnp.asarray(a, jnp.float64) for a in problem.data)
        hessian = jax.hessian(lambda q: problem.objective.value(unravel(q), x, y))(flat)
        gradient = jax.grad(lambda q: problem.objective.value(unravel(q), x, y))(flat)
    assert values["sharpness"] == pytest.approx(float(np.linalg.eigvalsh(hessian)[-1]), rel=1e-6)
    assert values["probe_grad_sq_norm"] == pytest.approx(float(np.square(gradient).sum()), rel=1e-12)
    assert values["critical_step"] > 0


@pytest.mark.parametrize("eta", [0.05, 30.0])
def test_the_exact_step_lies_in_its_interval(problem, eta):
    """Both ends hold a number of 60 digits, and hold it tightly; a step of 30 raises the loss, provedly."""
    found = probe_of(problem, learning_rate=eta)(problem.params, 0)
    with mpmath.workdps(60):
        before, slope, after = exact(problem, eta)
        a = (before - after) / (mpmath.mpf(eta) * slope)
        assert mpmath.mpf(found["probe_loss_lower"]) < before < mpmath.mpf(found["probe_loss_upper"])
        assert mpmath.mpf(found["probe_decrease_lower"]) < a < mpmath.mpf(found["probe_decrease_upper"])
    # ‖G‖² is known to 2e-6 either way; ‖K‖ is bounded by √(tr Θ), which multiplies roundings of 1e-15 only.
    assert found["probe_decrease_upper"] - found["probe_decrease_lower"] < 4.1e-6 * max(1, abs(float(a)))
    assert (found["probe_decrease_upper"] < 0) == (eta == 30.0)


def test_the_trace_bounds_the_kernel_and_is_no_looser_than_it_must(problem):
    network = dense_network(apply_fn, problem.params, problem.x)
    theta = np.asarray(empirical_ntk(apply_fn, problem.params, problem.x))
    assert np.trace(theta) <= network.trace_upper <= np.trace(theta) * (1 + 1e-5)
    assert network.assembly(theta).factor_error == network.factor_error < 1e-13


def test_a_run_without_a_kernel_is_a_record(problem):
    batch, optimizer = problem.data, optax.sgd(0.1)
    settings = {"objective": problem.objective, "optimizer": optimizer}
    probe = probe_of(problem, learning_rate=0.1)
    record = run_and_record(
        problem,
        init_state(problem.params, optimizer),
        probe=probe,
        probes_at=(0, 2, 4),
        advance=lambda state, k: train_epochs(state, batch, problem.params, epochs=k, **settings),
        evaluate=lambda params: evaluate(params, batch=batch, initial=problem.params, objective=problem.objective),
        numbers=problem.numbers(0.1),
        config={},
    )
    assert np.isfinite(record["sharpness"]).all()
    assert "ntk_min_eig" not in record
    found = {verdict.claim: verdict for verdict in theory.verify(record)}
    assert found["ntk_positive"].outcome == "undecided"
    assert found["descent"].outcome == "not refuted"
    assert not theory.any_inconsistent(found.values())


def test_what_is_remembered_goes_on_bit_for_bit(problem):
    moved = [leaf * 1.01 for leaf in problem.params]
    whole = probe_of(problem)
    kept = (whole(problem.params, 0), whole.remembered(0))[1]
    expected = whole(moved, 1)
    again = probe_of(problem)
    again.recall(0, kept, problem.params)
    assert again(moved, 1) == expected
    assert again.close({}, search_steps=0, seed=0) == {}


def test_a_hessian_that_is_lost_does_not_end_the_run(problem):
    probe = probe_of(problem, precision="float32")
    values = probe([leaf * np.float32(1e30) for leaf in problem.params], 3)  # r² overflows in float32
    assert np.isnan(values["sharpness"])
    assert values["probe_untrusted"] == 2
    assert "3" in probe.untrusted
    again = probe_of(problem)
    again.recall(3, probe.remembered(3), problem.params)
    assert again.untrusted == probe.untrusted
    again.forget(3)
    assert again.untrusted == {}
