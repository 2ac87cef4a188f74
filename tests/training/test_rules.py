"""Step rules on quadratics of known β, on curves where β misleads, and against optax; state, text, mistakes."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lplr_jax as lp
from lplr_jax import records, schema
from lplr_jax.experiments import mnist
from lplr_jax.losses import Logistic, Objective, Squared
from lplr_jax.runs.loop import optimizer_digest
from lplr_jax.training import init_state, rules, train_epochs

SPECTRUM = np.array([0.2, 0.5, 1.0, 2.0])
"""Eigenvalues of the Hessian; β = 2, and a power iteration of 20 products is off by less than 2^-40 of it."""
NAMED = ("fixed:0.3", "sharpness:1", "armijo:0.5", "polyak:1", "budget:1.5", "decay:0.5")


def linear(w, x):
    return x @ w


def quadratic(seed=0):
    """θ, x, y with XᵀX/n of the eigenvalues above, float32."""
    rng = np.random.default_rng(seed)
    u, v = (np.linalg.qr(rng.standard_normal((4, 4)))[0] for _ in range(2))
    x = (u * np.sqrt(4 * SPECTRUM)) @ v.T
    return tuple(jnp.asarray(a, jnp.float32) for a in (np.zeros((4, 1)), x, x @ rng.standard_normal((4, 1))))


def descend(rule, params, x, y, *, steps=30, apply_fn=linear, loss=None):
    """Metrics of `steps` steps, each field with the value after the last step left out."""
    objective = Objective(apply_fn, loss or Squared("mean"))
    _, metrics = train_epochs(
        init_state(params, rule), (x, y), params, objective=objective, optimizer=rule, epochs=steps
    )
    return jax.tree.map(lambda a: np.asarray(a, np.float64), metrics)


def decrease(metrics):
    """a_t of all steps but the last one, and what rounding of two losses of n float32 terms may move it by."""
    asked = metrics.step_size[:-1] * metrics.grad_sq_norm[:-1]
    return -np.diff(metrics.loss) / asked, 64 * 2.0**-24 * metrics.loss[:-1] / asked


@pytest.mark.parametrize("kappa", [0.5, 1.0, 1.9])
def test_sharpness_takes_its_share_of_the_known_curvature(kappa):
    metrics = descend(rules.sharpness(kappa), *quadratic())
    # A step is measured to some 1e-4 of itself in float32 once it is short.
    np.testing.assert_allclose(metrics.step_size[:10], kappa / 2, rtol=1e-3)
    a, off = decrease(metrics)
    assert (a >= 1 - kappa / 2 - off).all()


def test_decay_starts_at_the_inverse_of_the_curvature():
    metrics = descend(rules.decay(0.7), *quadratic())
    np.testing.assert_allclose(metrics.step_size, 0.5 / np.arange(1, 31) ** 0.7, rtol=1e-3)
    given_one = descend(rules.decay(0.7, 0.25), *quadratic())
    np.testing.assert_allclose(given_one.step_size, 0.25 / np.arange(1, 31) ** 0.7, rtol=1e-3)


def test_polyak_is_that_of_optax_under_the_known_cap():
    params, x, y = quadratic()
    ours, theirs = (descend(rule, params, x, y) for rule in (rules.polyak(1.0), optax.polyak_sgd(0.5)))
    assert (theirs.step_size < 0.499).any() or (theirs.step_size > 0.4999).any()
    np.testing.assert_allclose(ours.loss[:20], theirs.loss[:20], rtol=1e-3)
    # Where it does not bind, η is half the inverse Rayleigh quotient of the gradient's kernel: L/‖G‖² = s/(2ρ).
    loose = descend(rules.polyak(1.9), params, x, y)
    ratio = loose.loss / loose.grad_sq_norm
    np.testing.assert_allclose(loose.step_size[:10], np.minimum(ratio, 0.95)[:10], rtol=1e-3)
    assert (ratio[:10] < 0.95).any(), "Polyak's own step is seen"


def test_armijo_is_that_of_optax():
    params, x, y = quadratic()
    line = optax.scale_by_backtracking_linesearch(100, slope_rtol=0.7, max_learning_rate=2.0**20, rtol=16 * 2.0**-23)
    with jax.numpy_dtype_promotion("standard"):
        theirs = descend(optax.chain(optax.sgd(1.0), line), params, x, y)
    ours = descend(rules.armijo(0.7), params, x, y)
    np.testing.assert_array_equal(ours.loss, theirs.loss)
    a, off = decrease(ours)
    assert (a >= 0.7 - off).all()
    assert (a < 0.95).any(), "steps are as long as the test allows, not short of it"


def flat_then_steep(w, x):
    """log cosh is flat far out: β there says nothing of where a step of κ/β leads."""
    return jnp.sqrt(2 * (jnp.logaddexp(w * x, -w * x) - jnp.log(2.0)))


@pytest.mark.parametrize("name", ["sharpness:1", "polyak:1.9", "budget:1000", "decay:0.5"])
@pytest.mark.parametrize("start", [3.0, 6.0])
def test_a_step_that_the_measured_curvature_allows_too_long_is_shortened(name, start):
    one = jnp.ones((1, 1), jnp.float32)
    metrics = descend(rules.parse(name), start * one, one, 0 * one, apply_fn=flat_then_steep, steps=3)
    beta = 1 / np.cosh(start) ** 2
    assert metrics.step_size[0] < 0.5 / beta
    a, off = decrease(metrics)
    least = {"polyak:1.9": 0.05}.get(name, 0.5)
    assert (a >= least - np.maximum(off, 1e-5)).all(), a


@given(radius=st.sampled_from([1e-3, 0.3, 10.0]), seed=st.integers(0, 20))
def test_a_budget_is_never_used_up(radius, seed):
    metrics = descend(rules.budget(radius), *quadratic(seed), steps=40)
    lengths = metrics.step_size * np.sqrt(metrics.grad_sq_norm)
    before = np.concatenate([[0.0], np.cumsum(lengths)[:-1]])
    known = lengths > 1e-3 * radius  # shorter steps are measured to their own rounding alone
    most = np.minimum(0.5, schema.PATH_SHARE * (radius - before) / np.sqrt(metrics.grad_sq_norm))
    np.testing.assert_allclose(metrics.step_size[known], most[known], rtol=2e-3)
    assert metrics.drift.max() <= radius * (1 + 1e-5)  # some sixty roundings in float32


def test_the_loss_scaled_step_of_one_sample_is_known():
    """ℓ = log(1 + e^{-θ}): q̄ = 1/(1 + e^θ), ∇²L = q̄(1 - q̄), so that B = 1 - q̄ where it was measured."""
    one = jnp.ones((1, 1), jnp.float32)
    metrics = descend(rules.loss_scaled(every=5), 0 * one, one, one, loss=Logistic("mean"), steps=12)
    theta = np.concatenate([[0.0], np.cumsum(metrics.step_size * np.sqrt(metrics.grad_sq_norm))[:-1]])
    q = 1 / (1 + np.exp(theta))
    measured_at = (np.arange(12) // 5) * 5
    ratio = metrics.step_size / (np.log(2) / ((1 - q[measured_at]) * q))
    # B grows along the first steps, where the test shortens them; from the second measurement on it is 1 to a percent.
    np.testing.assert_allclose(np.delete(ratio, [2, 3, 4]), 1, rtol=1e-3)
    assert (ratio < 1 + 1e-3).all()
    a, off = decrease(metrics)
    assert (a >= rules.LOSS_SCALED_DECREASE - off).all()
    np.testing.assert_allclose(rules.LOSS_SCALED_DECREASE, 0.5573, atol=1e-4)


def test_a_rule_that_is_not_stated_for_a_loss_is_refused():
    problem = lp.Problem(linear, *quadratic())
    with pytest.raises(
        ValueError, match="loss-scaled is stated for logistic and softmax_cross_entropy; the loss is sq"
    ):
        lp.train(problem, rules.loss_scaled(), steps=1)
    with pytest.raises(ValueError, match="loss-scaled is stated for"):
        mnist.MnistConfig(step_rule="loss-scaled").check()
    mnist.MnistConfig(step_rule="loss-scaled", loss="cross-entropy").check()
    with pytest.raises(ValueError, match=r"the loss is softmax_cross_entropy\(0.1\)"):
        mnist.MnistConfig(step_rule="loss-scaled", loss="cross-entropy:0.1").check()
    for loss in (lp.losses.SoftmaxCrossEntropy(smoothing=0.1), lp.losses.SoftmaxCrossEntropy(soft=True)):
        with pytest.raises(ValueError, match="loss-scaled is stated for"):
            rules.check_loss(rules.loss_scaled(), loss.name)


@pytest.mark.parametrize("name", NAMED)
def test_the_state_is_all_that_is_needed_to_go_on(name):
    """Bit for bit, through the host, and between two measurements of the curvature."""
    (params, x, y), rule = quadratic(), rules.parse(name)
    run = {"objective": Objective(linear, "mean"), "optimizer": rule}
    whole, series = train_epochs(init_state(params, rule), (x, y), params, epochs=24, **run)
    part, first = train_epochs(init_state(params, rule), (x, y), params, epochs=7, **run)
    part = jax.tree.map(jnp.asarray, jax.device_get(part))
    part, second = train_epochs(part, (x, y), params, epochs=17, **run)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(part), strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(series.loss, np.concatenate([first.loss, second.loss]))


@pytest.mark.parametrize("name", ["sharpness:1", "armijo:0.5"])
def test_rules_train_in_float64_and_on_mini_batches(name):
    params, x, y = quadratic()
    with jax.enable_x64(True):
        wide = descend(rules.parse(name), *(jnp.asarray(a, jnp.float64) for a in (params, x, y)))
        assert wide.loss.dtype == np.float64
        assert np.all(np.diff(wide.loss) < 0)
    record = lp.train(lp.Problem(linear, params, x, y), rules.parse(name), steps=8, batch_size=2, probes=lp.Probes(8))
    assert np.isfinite(record["loss"]).all()


@pytest.mark.parametrize("name", ["fixed:1e30", "sharpness:1", "armijo:0.5"])
def test_a_divergence_is_a_result(name):
    """A network that gives no number but where it starts: a fixed step leaves it, one that looks ahead stays."""
    params, x, y = quadratic()

    def breaks(w, inputs):
        return jnp.where(jnp.any(w != 0), jnp.nan, 1.0) * (inputs @ w)

    record = lp.train(lp.Problem(breaks, params, x, y), rules.parse(name), steps=4, probes=lp.Probes(4, search=0))
    assert record.diverged_at == (1 if name.startswith("fixed") else None)
    if not name.startswith("fixed"):
        assert record["drift"][-1] == 0


def test_a_record_says_what_a_rule_was_to_keep(tmp_path):
    problem = lp.Problem(linear, *quadratic())
    record = lp.train(problem, rules.budget(0.25), steps=8, probes=lp.Probes(4, search=0), out=tmp_path)
    assert float(records.load(tmp_path)["path_budget"]) == 0.25
    assert np.isnan(record["learning_rate"])
    assert float(lp.train(problem, rules.fixed(0.3), steps=2, probes=lp.Probes(2, search=0))["learning_rate"]) == 0.3


def test_the_digest_tells_rules_apart_and_that_of_optax_stays():
    params = {"w": jnp.zeros(3)}
    texts = (
        "sharpness:1",
        "sharpness:1.5",
        "budget:1",
        "polyak",
        "armijo:0.5",
        "armijo:0.4",
        "decay:0.5",
        "loss-scaled",
    )
    made = [*map(rules.parse, texts), rules.sharpness(1.0, every=3)]
    assert len({optimizer_digest(rule, params) for rule in made}) == len(made)
    plain = optax.sgd(0.1)
    closed = jax.make_jaxpr(plain.update)(params, plain.init(params), params)
    expected = f"sha256:{hashlib.sha256(f'{closed.jaxpr}'.encode()).hexdigest()}"
    assert optimizer_digest(plain, params) == expected


def test_a_default_run_is_the_same_run_as_before():
    default = mnist.PRESETS["default"]
    assert "step_rule" not in mnist.decisive(default)
    both = [mnist.MnistConfig(step_rule=text) for text in ("sharpness", "sharpness:1", "sharpness:1.0")]
    assert {mnist.decisive(config)["step_rule"] for config in both} == {"sharpness:1.0"}


@pytest.mark.parametrize("name", NAMED)
def test_a_rule_is_read_back_from_its_own_text(name):
    rule = rules.parse(name)
    assert rules.parse(rule.text) is rule


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("newton:1", "NAME one of fixed, sharpness, armijo, polyak, budget, loss-scaled, decay, got 'newton:1'"),
        ("", "a step rule is NAME or NAME:VALUE"),
        (3, "a step rule is NAME or NAME:VALUE"),
        ("fixed", "fixed wants a number η > 0 after the colon, as in fixed:0.01; got 'fixed'"),
        ("fixed:-0.1", "fixed wants a number η > 0 .* got 'fixed:-0.1'"),
        ("sharpness:2", "sharpness wants a number 0 < κ < 2 after the colon, as in sharpness:1; got 'sharpness:2'"),
        ("sharpness:-1", "0 < κ < 2"),
        ("armijo:1", "0 < σ < 1"),
        ("polyak:nan", "0 < κ < 2"),
        ("budget", "budget wants a number R > 0"),
        ("budget:inf", "budget wants a number R > 0"),
        ("decay:", "decay wants a number α > 0 after the colon, as in decay:0.5; got 'decay:'"),
        ("decay:fast", "decay wants a number α > 0"),
        ("loss-scaled:1", "loss-scaled takes no value; got 'loss-scaled:1'"),
    ],
)
def test_mistakes_of_a_text_get_one_sentence(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        rules.parse(text)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("without_type_checks")
def test_mistakes_of_a_call_get_one_sentence():
    for make, value, message in (
        (rules.fixed, -1.0, "the step size of fixed must be a finite number > 0, got -1.0"),
        (rules.sharpness, 2.5, "κ of sharpness must be below 2, got 2.5"),
        (rules.armijo, 0.0, "σ of armijo must be a finite number > 0, got 0.0"),
        (rules.budget, -2.0, "R of budget must be a finite number > 0, got -2.0"),
        (rules.decay, 0.0, "α of decay must be a finite number > 0, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            make(value)
    rule, w = rules.loss_scaled(), jnp.ones(2)
    with pytest.raises(TypeError, match="wants losses_fn"):
        rule.update(w, rule.init(w), w, value=jnp.ones(()), value_fn=jnp.sum)
