"""Linear rates of other steps by their own statements: heavy ball, half a cosine, steps that grow as L falls."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from controls import replaced, scaled, step_arrays, tampered
from descents import record_of, regression
from hypothesis import given, settings
from hypothesis import strategies as st

import lplr_jax as lp
from lplr_jax import schema
from lplr_jax.records import Record
from lplr_jax.theory.claims import heavy_ball, loss_scaled, moving_step
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import Evidence
from lplr_jax.training import momentum_sgd

EIGENVALUES = np.array([0.5, 1.0, 2.0])


def rate(record):
    """The claim alone: `verify` would not look at a record that was spoilt."""
    return Evidence(record).verdict("linear_rate")


def momentum_run(eta, gamma, *, steps=60, eigenvalues=EIGENVALUES, update=None, loss=lambda r: 0.5 * np.sum(r**2)):
    """Heavy ball on ½ Σ (√λ_i θ_i - 1)² in float64, or another update of (θ, d, gradient), as a record."""
    root, theta = np.sqrt(eigenvalues), np.zeros(eigenvalues.size)
    update = update or (lambda d, gradient: gamma * d - eta * gradient)
    way, moved, gradients = [theta], np.zeros_like(theta), []
    for _ in range(steps + 1):
        gradients.append(root * (root * way[-1] - 1))
        moved = update(moved, gradients[-1])
        way.append(way[-1] + moved)
    way, gradients = np.array(way[:-1]), np.array(gradients)
    modes = root * way - 1
    losses, slopes = 0.5 * (modes**2).sum(axis=1), (gradients**2).sum(axis=1)
    probes = np.array([0, steps // 2, steps])
    record = record_of(
        losses, slopes, np.full(steps, eta), np.linalg.norm(way, axis=1), spectra=np.tile(eigenvalues, (3, 1)),
        energies=modes[probes] ** 2, probes=probes, p=eigenvalues.size, sharpness=np.full(3, eigenvalues[-1]),
    )  # fmt: skip
    return Record("ball", {**record.arrays, **step_arrays(list(way), gradients, steps + 1)}, {}), way


@settings(max_examples=60, deadline=None)
@given(beta=st.floats(0.5, 50), share=st.floats(1e-3, 0.95), gamma=st.floats(1e-3, 0.99), condition=st.floats(1e-6, 1))
def test_the_root_satisfies_its_equation_and_is_the_smaller_one(beta, share, gamma, condition):
    eta, mu = share * 2 * (1 - gamma) / beta, condition * beta
    c = heavy_ball.smaller_root(eta, beta, mu, gamma)
    k = 1 - eta * beta / 2 - gamma / 2
    left, right = gamma / 2 + c * gamma**2, (1 - c * eta * mu) * (k - c)
    assert left == pytest.approx(right, rel=1e-9, abs=1e-12)
    assert c > 0
    assert k - c >= 0
    assert c * eta * mu <= 1
    roots = np.roots([eta * mu, -(1 + eta * mu * k + gamma**2), k - gamma / 2])
    # NumPy's roots cancel where η μ is small, by some 1e-16/(η μ).
    assert c == pytest.approx(roots.real.min(), rel=1e-8, abs=1e-14 / (eta * mu))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 0.99), gamma=st.floats(0.02, 0.97))
def test_the_lyapunov_function_falls_on_every_quadratic(seed, share, gamma):
    """The statement itself, with exact β and μ, from a random θ and a random d: no run has to reach that state."""
    rng = np.random.default_rng(seed)
    eigenvalues = np.sort(rng.uniform(0.01, 3, 4))
    mu, beta = eigenvalues[[0, -1]]
    eta = share * 2 * (1 - gamma) / beta
    c = heavy_ball.smaller_root(eta, beta, mu, gamma)
    weight = (1 - eta * beta / 2 - gamma / 2 - c) / eta
    theta, d = rng.standard_normal(4), rng.standard_normal(4) * 10 ** rng.uniform(-3, 1)

    def value(theta, d):
        return 0.5 * theta @ (eigenvalues * theta) + weight * d @ d

    after = gamma * d - eta * eigenvalues * theta
    assert value(theta + after, after) <= (1 - c * eta * mu) * value(theta, d) * (1 + 1e-12)


def test_the_rate_of_heavy_ball_is_of_a_size_with_what_there_is():
    """γ -> 0 is gradient descent: c -> k = 1 - ηβ/2, and 1 - cημ a step, half of what 1 - 2 a ημ has."""
    c = heavy_ball.smaller_root(0.1, 2.0, 1e-6, 1e-9)
    assert c == pytest.approx(0.9, rel=1e-6)


@pytest.mark.parametrize(("eta", "gamma"), [(0.3, 0.5), (0.09, 0.9), (0.6, 0.2), (0.4, 0.01)])
def test_heavy_ball_is_read_off_its_steps_and_judged_by_its_own_statement(eta, gamma):
    record, _ = momentum_run(eta, gamma)
    found = rate(record)
    assert found.outcome == "not refuted", found
    assert found.reference == heavy_ball.REFERENCE
    part = found.part("heavy_ball")
    assert part.measured <= gamma <= part.bound
    assert part.bound - part.measured < 1e-6
    c = heavy_ball.smaller_root(eta, 2.0 * 1.001, 0.5, part.bound)
    lyapunov = found.part("lyapunov")
    assert lyapunov.outcome == "not refuted"
    assert lyapunov.bound == pytest.approx(1 - c * eta * 0.5, rel=1e-9)
    assert lyapunov.measured <= lyapunov.bound
    assert found.part("bound_pointwise").bound == pytest.approx(record["loss"][0] * (1 - c * eta * 0.5) ** 60, rel=1e-7)


def test_with_proved_constants_they_are_taken():
    record, _ = momentum_run(0.3, 0.5, steps=20)
    known = {**linear_regression().arrays, **record.arrays}
    more = {name: linear_regression()[name] for name in ("ntk_min_eig_lower", "ntk_min_eig_upper", "smoothness_upper")}
    found = rate(Record("ball", {**known, **more, "probe_epoch": np.array([0, 10, 20])}, {}))
    assert "proved on the ball of the run" in found.part("bound_theorem").note
    assert found.outcome == "not refuted"


def test_too_long_a_step_is_promised_nothing():
    record, _ = momentum_run(0.3, 0.9)  # ηβ = 0.6 against 0.2
    found = rate(record)
    assert found.outcome == "not applicable"
    assert found.part("step_size").outcome == "refuted"
    assert "ηβ < 2 (1 - γ) refuted" in found.note
    # Just within and just beyond 2 (1 - γ), the sharpness having its error of 1e-3.
    for eta, outcome in ((0.0998, "not refuted"), (0.1002, "refuted")):
        assert rate(momentum_run(eta, 0.9)[0]).part("step_size").outcome == outcome


@pytest.mark.parametrize("lost", [schema.KERNEL_LOST, schema.HESSIAN_LOST])
def test_what_rests_on_a_probe_that_was_lost_is_open(lost):
    record, _ = momentum_run(0.3, 0.5)
    untrusted = np.array([0, lost, 0])
    found = rate(Record("ball", {**record.arrays, "probe_untrusted": untrusted}, {}))
    assert found.outcome == found.part("lyapunov").outcome == "undecided"
    assert found.part("heavy_ball").outcome == "not refuted"
    assert "could not be trusted (epoch 30" in found.part("lyapunov").note


def test_planted_a_kernel_that_is_too_good_or_a_loss_that_stalls_refutes_it():
    """The least mode is of λ = 0.01 where the probes say 1: V falls by less than is promised; likewise at one step."""
    slow, _ = momentum_run(0.3, 0.5, eigenvalues=np.array([0.01, 1.0, 2.0]))
    wrong = rate(tampered(slow, ntk_min_eig=replaced(1.0), spectrum=replaced(1.0)))
    assert wrong.outcome == "refuted"
    assert wrong.part("lyapunov").outcome == wrong.part("bound_pointwise").outcome == "refuted"
    assert not wrong.inconsistent
    record, _ = momentum_run(0.3, 0.5)
    raised = rate(tampered(record, loss=lambda a: np.where(np.arange(a.size) == 6, 30 * a, a))).part("lyapunov")
    assert raised.outcome == "refuted"
    assert raised.step == 5


@pytest.mark.parametrize("other", ["nesterov", "moving momentum", "moving step", "adam"])
def test_what_is_no_heavy_ball_is_not_taken_for_one(other):
    state = {"t": 0, "m": 0.0, "v": 0.0}

    def nesterov(d, gradient):
        state["m"] = 0.5 * state["m"] + gradient
        return -0.2 * (gradient + 0.5 * state["m"])

    def moving_momentum(d, gradient):
        state["t"] += 1
        return (0.5 + 0.01 * (state["t"] % 2)) * d - 0.2 * gradient

    def moving_step_(d, gradient):
        state["t"] += 1
        return 0.5 * d - 0.2 * (1 + 0.02 * state["t"]) * gradient

    def adam(d, gradient):
        state["t"] += 1
        state["v"] = 0.9 * state["v"] + 0.1 * gradient**2
        return 0.9 * d - 0.05 * gradient / (np.sqrt(state["v"]) + 0.1)

    made = {"nesterov": nesterov, "moving momentum": moving_momentum, "moving step": moving_step_, "adam": adam}
    record, _ = momentum_run(0.2, 0.5, update=made[other])
    found = rate(record)
    assert found.outcome == "not applicable"
    assert found.reference == "Theorem 5.7"


def test_optax_momentum_in_float32_is_judged():
    """The package's own loop: γ is found to what float32 leaves, and the rate is held against every step seen."""
    rng = np.random.default_rng(0)
    x = np.asarray(np.linalg.qr(rng.standard_normal((9, 5)))[0].T * [[0.8], [0.9], [1.0], [1.1], [1.2]], np.float32)
    y = np.asarray(rng.standard_normal((5, 1)), np.float32)
    problem = lp.Problem(lambda w, x: x @ w, jnp.zeros((9, 1), jnp.float32), x, y)
    record = lp.train(problem, optax.sgd(0.5, momentum=0.6), steps=40, probes=lp.Probes(10, search=0))
    found = lp.verify(record)["linear_rate"]
    assert found.outcome == "not refuted", found
    part = found.part("heavy_ball")
    assert part.measured <= 0.6 <= part.bound
    assert part.bound - part.measured < 1e-3


def cosine(steps, *, first=0.4, floor=0.0, eigenvalues=EIGENVALUES):
    sizes = first * (floor + (1 - floor) * (1 + np.cos(np.pi * np.arange(steps) / steps)) / 2)
    return regression(eigenvalues, np.ones(3), sizes, np.array([0, steps // 2, steps])), sizes


@pytest.mark.parametrize("steps", [2, 3, 17, 40])
def test_half_a_cosine_has_half_the_sum(steps):
    record, sizes = cosine(steps)
    found = rate(record)
    assert found.outcome == "not refuted"
    part = found.part("cosine")
    assert part.outcome == "not refuted"
    assert part.bound == pytest.approx(0.4 * (steps + 1) / 2, rel=1e-12)
    assert part.measured == pytest.approx(sizes.sum(), rel=1e-12)
    bound = found.part("bound_cosine")
    a = (-np.diff(record["loss"]) / (sizes * record["grad_sq_norm"][:-1])).min()
    assert bound.outcome == "not refuted"
    assert bound.bound == pytest.approx(record["loss"][0] * np.exp(-a * 0.5 * 0.4 * (steps + 1)), rel=1e-5)
    # The product is sharper than the exponential of the sum.
    assert found.part("bound_pointwise").bound <= bound.bound


def test_optax_cosine_is_recognised():
    """Its η_t in float32 sum up to what is stated, to the rounding of the measured steps."""
    x = np.eye(3, dtype=np.float32) * np.sqrt(EIGENVALUES).astype(np.float32)
    settings = {"loss": lp.losses.Squared("sum")}
    problem = lp.Problem(lambda w, x: x @ w, jnp.zeros((3, 1), jnp.float32), x, jnp.ones((3, 1)), **settings)
    optimizer = momentum_sgd(0.3, 0.0, schedule="cosine", steps=30)
    record = lp.train(problem, optimizer, steps=30, probes=lp.Probes(10, search=0, hessian=0))
    part = lp.verify(record)["linear_rate"].part("cosine")
    assert part.outcome == "not refuted"
    assert part.bound == pytest.approx(0.3 * 31 / 2, rel=1e-5)


def test_planted_a_floor_below_the_cosine_is_told():
    """A schedule that ends at 0.8 % of η_0 is near a cosine, and its sum is not η_0 (T + 1)/2; one at 3 % is none."""
    near, far = rate(cosine(40, floor=0.008)[0]), rate(cosine(40, floor=0.03)[0])
    assert near.part("cosine").outcome == "refuted"
    assert "not those of one" in near.part("cosine").note
    assert near.outcome == "not refuted", "the product holds all the same"
    assert "linear_rate.cosine" not in {part.claim for part in far.parts}
    assert moving_step.COSINE == 0.01


def separable(steps=120, *, weights=(1.0, 1.5, 2.0), scale=1.0, sizes=None, start=3.0):
    """Logistic regression with a parameter of its own for each sample, so Θ = diag(w²), K = max w and S = 0 exactly.

    Steps η_t = scale · ln 2/(K² q̄_t), or those of a function of (t, q̄).
    """
    root = np.asarray(weights)
    n, theta = root.size, start / np.asarray(weights) * np.linspace(0.6, 1, len(weights))
    sizes = sizes or (lambda t, mean: scale * math.log(2) / (root.max() ** 2 * mean))
    way, taken, gradients = [theta], [], []
    for t in range(steps + 1):
        wrong = 1 / (1 + np.exp(root * way[-1]))
        gradients.append(-root * wrong / n)
        taken.append(sizes(t, wrong.mean()))
        way.append(way[-1] - taken[-1] * gradients[-1])
    way, gradients = np.array(way[:-1]), np.array(gradients)
    values = np.log1p(np.exp(-root * way))
    g = -1 / (1 + np.exp(root * way))
    probes = np.array([0, steps // 2, steps])
    size = (g**2).sum(axis=1)
    record = record_of(
        values.mean(axis=1), (gradients**2).sum(axis=1), np.array(taken[:-1]),
        np.linalg.norm(way - way[0], axis=1), spectra=np.tile(np.sort(root**2), (3, 1)), energies=g[probes] ** 2,
        probes=probes, p=n, scale=float(n), output_grad_norm=np.sqrt(size)[probes],
        output_norm=np.linalg.norm(root * way, axis=1)[probes], sample_bound_sum=size[probes],
        samples_beyond=(values > np.log(2)).sum(axis=1)[probes].astype(float),
    )  # fmt: skip
    arrays = {**record.arrays, "learning_rate": np.asarray(np.nan)}
    return Record("separable", arrays, {}, loss="logistic"), values, np.array(taken[:-1])


def test_the_loss_scaled_step_has_a_linear_rate_with_exact_constants():
    """B = K², λ = min w²: L_{t+1} <= (1 - .2786 λ/(n B)) L_t and a_t >= .557 at every step, by hand."""
    record, values, sizes = separable()
    loss = values.mean(axis=1)
    exact = 1 - (1 - 1 / (2 * math.log(2))) * 1.0 / (3 * 4.0)
    assert (loss[1:] <= exact * loss[:-1]).all()
    a = -np.diff(loss) / (sizes * record["grad_sq_norm"][:-1])
    assert (a >= 2 - 1 / math.log(2)).all()
    assert loss[-1] < 1e-3 * loss[0]
    found = rate(record)
    assert found.outcome == "not refuted", found
    assert found.reference == loss_scaled.REFERENCE
    assert found.part("decrease").outcome == "not refuted"
    assert found.part("decrease").measured == pytest.approx(a.min(), rel=1e-6)
    # What the steps show of B is at least B and at most 2 ln 2 times that, so the bound is as much weaker at most.
    bound = found.part("bound_pointwise").bound
    steps = loss.size - 1
    weakest = 1 - (1 - exact) / (2 * math.log(2))
    assert loss[0] * exact**steps <= bound * (1 + 1e-9)
    assert bound <= loss[0] * weakest**steps * (1 + 1e-6)
    assert found.part("bound_pointwise").measured <= bound


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), c=st.integers(2, 5))
def test_the_loss_scaled_step_of_softmax_obeys_its_statement(seed, c):
    """A linear network on random inputs: K = max ‖x_i‖, S = 0, B = 2K², k = 0; one step from a random point."""
    rng = np.random.default_rng(seed)
    n, d = 4, 6
    x, labels = rng.standard_normal((n, d)), rng.integers(0, c, n)
    # Outputs in which every label has at least half: θ = X⁺ F.
    outputs = rng.standard_normal((n, c)) * rng.uniform(0.1, 2)
    outputs[np.arange(n), labels] = np.log(np.exp(outputs).sum(axis=1)) + rng.uniform(0.01, 4)
    w = np.linalg.pinv(x) @ outputs

    def at(w):
        f = x @ w
        p = np.exp(f - f.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return -np.log(p[np.arange(n), labels]), p - np.eye(c)[labels]

    losses, g = at(w)
    wrong = -np.expm1(-losses)
    big = 2 * (x**2).sum(axis=1).max()
    eta = math.log(2) / (big * wrong.mean())
    gradient = x.T @ g / n
    after, slope = at(w - eta * gradient)[0], np.sum(gradient**2)
    least = np.linalg.eigvalsh(x @ x.T)[0]  # on vectors of sum 0, as on all others: Θ = XXᵀ ⊗ I
    fall = (1 - 1 / (2 * math.log(2))) * c / (c - 1) * least / (n * big)
    assert losses.max() <= math.log(2)
    assert after.mean() <= losses.mean() - (2 - 1 / math.log(2)) * eta * slope + 1e-13
    assert after.mean() <= (1 - fall) * losses.mean() + 1e-13


def test_planted_a_larger_eigenvalue_refutes_the_loss_scaled_rate():
    record, _, _ = separable()
    found = rate(tampered(record, ntk_min_eig=scaled(20.0)))
    assert found.outcome == "refuted"
    assert found.part("bound_pointwise").outcome == "refuted"
    assert not found.inconsistent


def test_planted_a_step_that_is_too_long_breaks_the_decrease_and_not_the_bound():
    """Steps of four times what B allows: a_t < .557, and what is measured stands in for it."""
    record, *_ = separable(scale=4.0, weights=(2.0,), steps=8)
    found = rate(record)
    assert found.part("decrease").outcome == "refuted"
    assert "the measured a_t stands in the bound" in found.part("decrease").note
    assert found.part("bound_pointwise").outcome == found.outcome == "not refuted"


@pytest.mark.parametrize("kind", ["fixed", "decaying"])
def test_steps_that_do_not_go_with_the_loss_have_no_linear_rate(kind):
    sizes = {"fixed": lambda t, mean: 0.5, "decaying": lambda t, mean: 0.5 / math.sqrt(t + 1)}[kind]
    found = rate(separable(sizes=sizes)[0])
    assert found.outcome == "not applicable"
    assert "a fixed step gives 1/t and no linear rate" in found.note


def test_samples_beyond_ln_2_leave_the_loss_scaled_rate_open():
    record, *_ = separable(start=0.5)
    spoilt = tampered(record, samples_beyond=replaced(1.0, 2))
    assert rate(spoilt).outcome == "undecided"
    assert "beyond ln 2 at the last probe" in rate(spoilt).note
    later = tampered(record, samples_beyond=replaced(1.0, 0))
    assert "from epoch 60 on" in rate(later).note


def test_the_rule_itself_is_judged_by_its_own_statement():
    rng = np.random.default_rng(1)
    x = np.asarray(rng.standard_normal((6, 12)), np.float32)
    y = np.asarray(rng.choice([-1.0, 1.0], (6, 1)), np.float32)
    problem = lp.Problem(lambda w, x: x @ w, jnp.zeros((12, 1), jnp.float32), x, y, loss=lp.losses.Logistic())
    rule = lp.training.step_rule("loss-scaled")
    record = lp.train(problem, rule, steps=150, probes=lp.Probes(50, search=0, hessian=0))
    found = lp.verify(record)["linear_rate"]
    assert found.outcome == "not refuted", found
    assert found.reference == loss_scaled.REFERENCE
    assert record["loss"][-1] < 1e-3 * record["loss"][0]


def seen_at(record, places):
    """The same run of which only some entries were seen."""
    series = [name for name in record.arrays if schema.SCHEMA[name].dims == ("epoch",)]
    arrays = dict(record.arrays) | {name: record[name][places] for name in series}
    return Record("thinned", arrays, {})


def leaving(record, at):
    """The same run, but that nothing is finite from a step on."""
    names = ("loss", "grad_sq_norm", "drift", "step_size", "step_deviation", "step_rounding")
    return tampered(record, **{name: replaced(np.nan, slice(at + name.startswith("step"), None)) for name in names})


def test_heavy_ball_is_held_for_no_more_than_was_seen():
    record, _ = momentum_run(0.3, 0.5)
    few = rate(seen_at(record, np.r_[0:5, 30, 60]))
    assert few.outcome == "not refuted"
    assert "over 4 steps" in few.note
    assert "held to step 4, as the update was seen at 4 of 60 steps" in few.note
    assert few.step == 4
    # In the gap another method may have stood still: no loss behind it speaks against the rate.
    later = rate(tampered(seen_at(record, np.r_[0:5, 30, 60]), loss=replaced(float(record["loss"][4]), slice(5, 7))))
    assert later.outcome == "not refuted"
    # V asks for the step before as well: one step of each three neighbours, and the first of all, where d = 0.
    triples = rate(seen_at(record, np.sort(np.r_[0:60:4, 1:60:4, 2:60:4, 60])))
    assert "at all 16 steps that were seen" in triples.part("lyapunov").note


@pytest.mark.parametrize(
    ("made", "outcome"),
    [
        (lambda: momentum_run(0.3, 0.5)[0], "refuted"),
        (lambda: cosine(60)[0], "not applicable"),
        (lambda: separable(steps=60)[0], "not applicable"),
    ],
)
def test_a_run_that_leaves_what_is_finite_keeps_no_rate(made, outcome):
    """All that was seen before is in order; the step from 39 is seen, and leads to a loss that is no number."""
    assert rate(made()).outcome == "not refuted"
    found = rate(leaving(made(), 40))
    assert found.outcome == outcome
    assert "the step from epoch 39 leads out of what is finite" in found.note


def test_a_share_of_the_last_step_near_one_is_told_from_one():
    assert "γ = 1 - 1e-06" in rate(momentum_run(9e-7, 0.999999)[0]).note
