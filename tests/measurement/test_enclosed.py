"""What is proved of a point, against 60 digits: its loss, the decrease of one exact step, and the future of a run."""

import dataclasses
import math

import jax
import mpmath
import numpy as np
import optax
import pytest

from lplr_jax import theory
from lplr_jax.measurement import enclosed
from lplr_jax.measurement.enclosed import enclose
from lplr_jax.measurement.kernel import max_eig_upper
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs.assembly import dense_network
from lplr_jax.runs.loop import train
from lplr_jax.runs.problem import Probes, Problem
from lplr_jax.theory.evidence import Evidence

N, D, WIDTH = 5, 3, 8
ACTIVATIONS = {
    "tanh": (jax.numpy.tanh, mpmath.tanh, lambda z: mpmath.sech(z) ** 2),
    "softplus": (jax.nn.softplus, lambda z: mpmath.log1p(mpmath.exp(z)), lambda z: 1 / (1 + mpmath.exp(-z))),
}


def case(name, c, seed, scale=1.0):
    rng = np.random.default_rng(seed)
    params = [rng.normal(size=(D, WIDTH)) * scale, rng.normal(size=(1, WIDTH)), rng.normal(size=(WIDTH, c)) * scale]
    return ACTIVATIONS[name][0], params, rng.normal(size=(N, D)), rng.normal(size=(N, c))


def network_of(act):
    return lambda p, x: act(x @ p[0] + p[1]) @ p[2]


def enclosed_at(name, c, seed, eta, s, scale=1.0):
    act, params, x, y = case(name, c, seed, scale)
    apply_fn = network_of(act)
    theta = np.asarray(empirical_ntk(apply_fn, params, x))
    network = dense_network(apply_fn, params, x)
    bound = network.assembly(theta)
    least = float(np.linalg.eigvalsh(theta)[0]) * (1 - 1e-6)
    most = max_eig_upper(theta, bound.kernel_error(theta))
    settings = {"scale": s, "min_eig_lower": least, "max_eig_upper": most, "learning_rate": eta}
    return enclose(network, bound, y, **settings), params, x, y


def exact_step(name, params, x, y, eta, s):
    """L(θ), ‖G‖² and L(θ - η G) of the softplus or tanh network in many digits."""
    _, act, slope = ACTIVATIONS[name]
    w, b, v, x, y = (mpmath.matrix(a.tolist()) for a in (*params, x, y))

    def loss(w, b, v):
        z = x * w + mpmath.matrix([[b[0, j] for j in range(WIDTH)] for _ in range(N)])
        return z, z.apply(act) * v - y

    z, r = loss(w, b, v)
    total = lambda a: sum(e**2 for e in a)  # noqa: E731
    back = r * v.T
    delta = mpmath.matrix([[back[i, j] * slope(z[i, j]) for j in range(WIDTH)] for i in range(N)])
    grads = x.T * delta / s, mpmath.matrix([[sum(delta[i, j] for i in range(N)) for j in range(WIDTH)]]) / s
    grads = (*grads, z.apply(act).T * r / s)
    moved = [a - mpmath.mpf(eta) * g for a, g in zip((w, b, v), grads, strict=True)]
    return total(r) / (2 * s), sum(total(g) for g in grads), total(loss(*moved)[1]) / (2 * s)


@pytest.mark.parametrize(("name", "c"), [("tanh", 1), ("softplus", 1), ("softplus", 3)])
@pytest.mark.parametrize("eta", [1e-6, 1e-3, 0.05, 3.0])
def test_loss_and_decrease_lie_in_their_bounds(name, c, eta):
    """The bounds are tight too: rounding is 1e-15 of the numbers, amplified by what a step of η takes away."""
    for seed in range(3):
        found, params, x, y = enclosed_at(name, c, seed, eta, 2.5)
        with mpmath.workdps(60):
            before, slope, after = exact_step(name, params, x, y, eta, mpmath.mpf("2.5"))
            a = (before - after) / (mpmath.mpf(eta) * slope)
            assert found["probe_loss_lower"] <= before <= found["probe_loss_upper"]
            assert found["probe_decrease_lower"] <= a <= found["probe_decrease_upper"]
            assert found["probe_loss_upper"] - found["probe_loss_lower"] <= 1e-11 * before
            room = 1e-5 * abs(a) + 1e-10 * (before + after) / (mpmath.mpf(eta) * slope)
            assert found["probe_decrease_upper"] - found["probe_decrease_lower"] <= room


@pytest.mark.parametrize("broken", ["output_error", "factor_error", "rounding of the products", "distance of the step"])
def test_every_error_counts(broken, monkeypatch):
    """Outputs, factors, products and the step are spoilt by as much as their bound says; each bound is needed."""
    act, params, x, y = case("tanh", 1, 0)
    apply_fn = network_of(act)
    theta = np.asarray(empirical_ntk(apply_fn, params, x))
    network = dense_network(apply_fn, params, x)
    bound = network.assembly(theta)
    settings = {"scale": 1.0, "min_eig_lower": 1e-3, "max_eig_upper": max_eig_upper(theta, 0.0), "learning_rate": 0.01}
    width = lambda found: found["probe_decrease_upper"] - found["probe_decrease_lower"]  # noqa: E731
    plain = width(enclose(network, bound, y, **settings))
    if broken == "output_error":
        network = dataclasses.replace(network, output_error=network.output_error + 1e-3)
    elif broken == "factor_error":
        bound = dataclasses.replace(bound, factor_error=1e-2)
    elif broken == "rounding of the products":
        monkeypatch.setattr(enclosed, "gamma", lambda k: 1e-2)
    else:
        monkeypatch.setattr(enclosed, "UNIT", 1e-4)
    assert width(enclose(network, bound, y, **settings)) > 1e-3 > 100 * plain


def test_what_has_no_smooth_activation_has_bounds_of_its_loss_alone():
    _, params, x, y = case("tanh", 1, 0)
    apply_fn = network_of(jax.nn.relu)
    theta = np.asarray(empirical_ntk(apply_fn, params, x))
    network = dense_network(apply_fn, params, x)
    found = enclose(
        network, network.assembly(theta), y, scale=1.0, min_eig_lower=1.0, max_eig_upper=9.0, learning_rate=0.1
    )
    assert found["probe_loss_lower"] <= found["probe_loss_upper"] < math.inf
    assert all(math.isnan(value) for name, value in found.items() if not name.startswith("probe_loss"))


def test_the_future_is_that_of_the_theorem():
    """4 L_J ‖r‖/λ on the ball of radius 4 ‖r‖/σ, where the bounds of `proofs.ball` are tested on their own."""
    found, params, x, y = enclosed_at("tanh", 1, 1, 0.1, 2.0)
    size = np.linalg.norm(np.tanh(x @ params[0] + params[1]) @ params[2] - y)
    apply_fn = network_of(jax.numpy.tanh)
    least = float(np.linalg.eigvalsh(np.asarray(empirical_ntk(apply_fn, params, x)))[0])
    assert found["restart_radius"] == pytest.approx(4 * size / math.sqrt(least), rel=1e-5)
    from lplr_jax.proofs.ball import anchor

    theta = np.asarray(empirical_ntk(apply_fn, params, x))
    base = anchor(apply_fn, params, x, max_eig_upper=max_eig_upper(theta, 0.0), residual_norm=size, loss_scale=2.0)
    ball = base.on_ball(found["restart_radius"])
    assert found["restart_ratio"] == pytest.approx(4 * ball.jacobian_lipschitz * size / least, rel=1e-5)
    assert found["restart_smoothness"] == pytest.approx(ball.smoothness, rel=1e-5)


def near_a_zero(off, dtype, **settings):
    """Train a network whose targets are its own outputs, but for `off`: the residual is small beside the kernel."""
    act, params, x, _ = case("tanh", 1, 2)
    with jax.enable_x64(dtype == "float64"):
        params, x = jax.tree.map(lambda a: jax.numpy.asarray(a, dtype), (params, x))
        y = network_of(act)(params, x) + np.asarray(off, dtype)
        eta = settings["learning_rate"]
        return train(Problem(network_of(act), params, x, y), optax.sgd(eta), **settings)


def test_outputs_that_nearly_cancel_their_targets_are_no_contradiction():
    """In float32 the residual of 1e-6 is little more than the rounding of f: the noise is that of f, not of f - y."""
    settings = {"steps": 10, "probes": Probes(every=5, search=0, hessian=0), "learning_rate": 0.01}
    record = near_a_zero(1e-6, "float32", **settings)
    assert theory.verify(record)["consistency"].outcome == "proved"
    arrays = {**record.arrays, "target_norm": np.asarray(0.0)}
    assert theory.verify(dataclasses.replace(record, arrays=arrays))["consistency"].inconsistent


def test_a_run_near_a_zero_has_a_proved_future():
    """The theorem speaks from the first probe on; a larger residual leaves it open, and nothing is called refuted."""
    settings = {"steps": 10, "probes": Probes(every=5, search=0, hessian=0), "learning_rate": 0.01}
    record = near_a_zero(1e-6, "float64", **settings)
    verdicts = theory.verify(record)
    restart = verdicts["containment"].part("restart")
    assert restart.outcome == "proved", restart
    assert "falls linearly to 0" in restart.note
    exact = verdicts["descent"].part("exact_step")
    assert exact.outcome == "proved", exact
    assert restart.step == 0
    assert verdicts["containment"].outcome == "proved"
    below = verdicts["weyl"].part("from_below")
    assert below.outcome in ("proved", "not refuted"), below
    assert 0 < below.bound <= below.measured
    still = {name: np.zeros_like(record[name]) for name in ("ntk_shift",)}
    higher = {"ntk_min_eig_upper": record["ntk_min_eig_lower"] * 0.5, "ntk_min_eig": record["ntk_min_eig_lower"] * 0.4}
    for changes in ({**still, **higher},):
        arrays = {**record.arrays, **{k: np.append(record[k][:1], v[1:]) for k, v in changes.items()}}
        assert Evidence(dataclasses.replace(record, arrays=arrays)).verdict("weyl").part("from_below").inconsistent
    record = near_a_zero(0.3, "float32", **settings)
    restart = theory.verify(record)["containment"].part("restart")
    assert restart.outcome == "undecided"
    assert restart.measured > 1


def test_a_step_that_is_too_long_is_proved_to_rise():
    record = near_a_zero(0.3, "float32", steps=2, probes=Probes(every=1, search=0, hessian=0), learning_rate=3.0)
    verdict = theory.verify(record)["descent"]
    assert verdict.part("exact_step").outcome == "refuted"
    assert verdict.outcome == "refuted"
    assert record["loss"][1] > record["loss"][0]
