"""Mini-batch epochs and exact full-data sums, against NumPy in float64 and closed forms."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax import diagnostics
from lplr_jax.layouts import plain_convolutions
from lplr_jax.losses import Objective
from lplr_jax.models import MLP, ResNet
from lplr_jax.runs.loop import replay
from lplr_jax.training import MiniBatches, batches_of, evaluate_exactly, init_shuffled, momentum_sgd, shuffled_epoch


def linear(params, x):
    return x @ params["w"]


def linear_problem(seed, n, d=3, c=2):
    rng = np.random.default_rng(seed)
    x, w = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(d, c)).astype(np.float32)
    y = np.eye(c, dtype=np.float32)[rng.integers(0, c, n)]
    return x, y, w


def order_of(seed, epoch, n):
    return np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(seed), epoch), n))


@pytest.mark.parametrize(("n", "size", "scale"), [(11, 4, "mean"), (8, 4, "sum"), (5, 5, "mean")])
def test_epochs_follow_numpy(n, size, scale):
    """Heavy ball by hand: every sample once an epoch, a short last batch that is the mean over what is left."""
    x, y, w = linear_problem(n, n)
    epochs, eta, mu = 3, 0.02, 0.9
    steps = epochs * batches_of(n, size)
    optimizer = momentum_sgd(eta, mu, schedule="cosine", steps=steps)
    state = init_shuffled({"w": jnp.asarray(w)}, optimizer, seed=7)
    theta, velocity, step = w.astype(np.float64), np.zeros_like(w, np.float64), 0
    for epoch in range(epochs):
        state = shuffled_epoch(
            state,
            (jnp.asarray(x), jnp.asarray(y)),
            objective=Objective(linear, scale),
            optimizer=optimizer,
            batch_size=size,
        )
        order = order_of(7, epoch, n)
        assert sorted(order) == list(range(n))
        for start in range(0, n, size):
            rows = order[start : start + size]
            gradient = x[rows].astype(np.float64).T @ (x[rows] @ theta - y[rows]) / len(rows)
            velocity = mu * velocity + gradient * (n if scale == "sum" else 1)
            theta = theta - eta * (1 + np.cos(np.pi * step / steps)) / 2 * velocity
            step += 1
        # A dozen steps of sums over at most 16 terms of order ten, in float32.
        np.testing.assert_allclose(state.params["w"], theta, rtol=0, atol=2e-5)
    assert int(state.step) == epochs


def test_batches_estimate_the_loss_without_bias():
    x, y, w = (jnp.asarray(a) for a in linear_problem(0, 12))
    for scale in ("mean", "sum"):
        objective = Objective(linear, scale)
        rows = jnp.arange(12).reshape(3, 4)
        values = [objective.batch_value({"w": w}, x[r], y[r], jnp.ones(4, "float32"), n=12) for r in rows]
        assert float(sum(values)) / 3 == pytest.approx(float(objective.value({"w": w}, x, y)), rel=1e-6)
        # What fills a batch up has no weight, whatever it holds.
        filled = objective.batch_value(
            {"w": w}, x[:4].at[3].set(1e3), y[:4], jnp.array([1.0, 1.0, 1.0, 0.0], "float32"), n=12
        )
        short = objective.batch_value({"w": w}, x[:3], y[:3], jnp.ones(3), n=12)
        assert float(filled) == pytest.approx(float(short), rel=1e-6)


@given(n=st.integers(2, 12), micro=st.integers(1, 12), c=st.integers(1, 3), scale=st.sampled_from(["mean", "sum"]))
def test_exact_sums_are_those_of_one_shot_whatever_the_micro_batch(n, micro, c, scale):
    x, y, w = linear_problem(n, n, c=c)
    y = 2 * y - 1 if c == 1 else y
    start = w + np.float32(0.5)
    got = evaluate_exactly(
        {"w": jnp.asarray(w)},
        (jnp.asarray(x), jnp.asarray(y)),
        {"w": jnp.asarray(start)},
        objective=Objective(linear, scale),
        micro_batch=min(micro, n),
    )
    residual = x.astype(np.float64) @ w - y
    s = n if scale == "mean" else 1
    gradient = x.T.astype(np.float64) @ residual / s
    # Float32 outputs and per-batch gradients: sums of at most 12 terms of order ten, each rounded to 6e-8.
    size = float(np.abs(x).max() * np.abs(w).max()) * 3 + 1
    noise = 16 * 6e-8 * size
    assert float(got.loss) == pytest.approx(np.sum(residual**2) / (2 * s), rel=1e-6, abs=4 * noise * n * c * size / s)
    off = noise * float(np.abs(x).max()) * n * np.sqrt(3 * c) / s
    assert np.sqrt(float(got.grad_sq_norm)) == pytest.approx(np.linalg.norm(gradient), rel=1e-6, abs=off)
    assert float(got.drift) == pytest.approx(np.linalg.norm(start.astype(np.float64) - w), rel=1e-14)
    outputs = residual + y
    right = (outputs > 0) == (y > 0) if c == 1 else (outputs.argmax(1) == y.argmax(1))[:, None]
    clear = np.abs(outputs).min() > 1e-5 and (c == 1 or np.diff(np.sort(outputs, axis=1)).min() > 1e-5)
    assert not clear or float(got.accuracy) == pytest.approx(right.mean())
    assert got.loss.dtype == np.float64


@pytest.fixture(scope="module")
def network():
    model = ResNet(width=4, stages=2, blocks=1, groups=2, outputs=5, activation="softplus")
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(14, 8, 8, 3)).astype(np.float32))
    y = jnp.asarray(np.eye(5, dtype=np.float32)[np.arange(14) % 5])
    return Objective(model.apply, "mean"), x, y, [model.init(jax.random.key(seed), x[:1]) for seed in (0, 1)]


@pytest.mark.slow
def test_exact_gradient_of_a_network_does_not_depend_on_the_micro_batch(network):
    objective, x, y, (params, _) = network
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x, y))
        loss, gradient = objective.value_and_gradient(*wide)
        square = float(optax.tree.norm(gradient, squared=True))
    for micro in (4, 14):
        got = evaluate_exactly(params, (x, y), params, objective=objective, micro_batch=micro)
        # √(sum of fan-ins, both ways, and pixels) roundings of float32.
        gamma = np.sqrt(2 * (27 + 36 + 36 + 72 + 64)) * 2.0**-24
        assert float(got.loss) == pytest.approx(float(loss), rel=4 * gamma)
        assert float(got.grad_sq_norm) == pytest.approx(square, rel=20 * gamma)
    # The same sums, but in float64 throughout: then they agree to its rounding, remainder or not.
    with jax.enable_x64(True):
        values = [
            evaluate_exactly(wide[0], wide[1:], wide[0], objective=objective, micro_batch=micro) for micro in (4, 14)
        ]
    for got in values:
        assert float(got.grad_sq_norm) == pytest.approx(square, rel=1e-13)
        assert float(got.loss) == pytest.approx(float(loss), rel=1e-14)


def with_batches_of_six(objective, optimizer):
    return {"objective": objective, "optimizer": optimizer, "batch_size": 6}


def test_order_comes_from_seed_and_epoch_alone(network):
    """A run that goes on from a saved state takes the same steps, bit for bit."""
    objective, x, y, (params, _) = network
    optimizer = momentum_sgd(0.01, 0.9, schedule="cosine", steps=9)
    epoch = partial(shuffled_epoch, data=(x, y), **with_batches_of_six(objective, optimizer))
    state = epoch(init_shuffled(params, optimizer, seed=3))
    saved = jax.tree.map(np.asarray, state)
    onward = epoch(epoch(state))
    again = epoch(epoch(jax.tree.map(jnp.asarray, saved)))
    for a, b in zip(jax.tree.leaves(onward), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)
    other = epoch(init_shuffled(params, optimizer, seed=4))
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (other.params, saved.params)), strict=True))
    assert np.isfinite(jax.tree.leaves(params)[0]).all(), "donation leaves the caller's parameters alone"


@pytest.mark.slow
def test_seeds_trained_together_follow_the_same_path(network):
    """Over the first steps, to a bound on how rounding spreads through heavy ball.

    With d the distance of two paths and w that of their velocities, a step gives w <- μ w + β d + γ G and
    d <- d + η w + u ‖θ‖: γ G is the rounding of a gradient of norm at most G, β bounds the curvature of every batch.
    """
    objective, x, y, initials = network
    n, size, eta, mu, epochs, u = 14, 6, 1e-3, 0.9, 2, 2.0**-24
    optimizer = momentum_sgd(eta, mu, schedule="constant", steps=1)
    stack = partial(jax.tree.map, lambda *leaves: jnp.stack(leaves))
    settings = {"objective": objective, "optimizer": optimizer, "batch_size": size, "micro_batch": 7}
    together = MiniBatches((x, y), stack(*initials), together=True, **settings)
    states = stack(*(init_shuffled(params, optimizer, seed=seed) for seed, params in enumerate(initials)))
    parts = replay(states, [epochs], together.advance, count=2)
    for seed, (params, part) in enumerate(zip(initials, parts, strict=True)):
        alone = MiniBatches((x, y), params, **settings)
        state, metrics = alone.advance(init_shuffled(params, optimizer, seed=seed), epochs)
        other, others = part(None, epochs)
        assert metrics.loss.shape == others.loss.shape == (epochs,)
        ends = [
            diagnostics.hessian_extremes(objective.value, point, x, y, reduction="mean")
            for point in (params, state.params)
        ]
        # A batch's curvature is at most n / size times that of all; twice that covers the way between the ends.
        beta = 2 * n / size * max(max(end.largest, -end.least) for end in ends)
        largest = float(np.max(metrics.loss))
        slope = np.sqrt(2 * beta * largest * n / size)
        gamma = np.sqrt(2 * (27 + 36 + 36 + 72 + 64)) * u
        length = float(optax.tree.norm(params))
        apart = velocity = 0.0
        for _ in range(epochs * batches_of(n, size)):
            velocity = mu * velocity + beta * apart + gamma * slope
            apart += eta * velocity + u * length
        moved = float(optax.tree.norm(jax.tree.map(jnp.subtract, state.params, params)))
        found = float(optax.tree.norm(jax.tree.map(lambda a, b: a - jnp.asarray(b), state.params, other.params)))
        assert apart < 0.02 * moved, "a bound this wide tests nothing"
        assert found <= apart
        np.testing.assert_allclose(others.loss, metrics.loss, rtol=0, atol=slope * apart + 4 * gamma * largest)


def test_diagnostics_are_thinned_and_never_made_twice(network):
    objective, x, y, (params, _) = network
    optimizer = momentum_sgd(1e-3, 0.9, schedule="constant", steps=1)
    trainer = MiniBatches((x, y), params, micro_batch=7, every=3, **with_batches_of_six(objective, optimizer))
    state = init_shuffled(params, optimizer, seed=0)
    before = trainer.evaluate(state.params)
    state, metrics = trainer.advance(state, 5)
    assert np.isfinite(metrics.loss).tolist() == [True, False, False, True, False]
    assert metrics.loss[0] == before.loss
    assert [len(spent) for spent in trainer.seconds.values()] == [5, 2]
    assert trainer.passes().training > 0


def test_momentum_sgd_is_the_schedule_it_says():
    gradient = {"w": jnp.ones(1)}
    for schedule, momentum in (("cosine", 0.0), ("constant", 0.5)):
        optimizer = momentum_sgd(0.5, momentum, schedule=schedule, steps=4)
        state, velocity = optimizer.init(gradient), 0.0
        for step in range(5):
            update, state = optimizer.update(gradient, state)
            velocity = momentum * velocity + 1
            eta = 0.25 * (1 + np.cos(np.pi * min(step, 4) / 4)) if schedule == "cosine" else 0.5
            assert float(update["w"][0]) == pytest.approx(-eta * velocity, abs=1e-7)
    assert momentum_sgd(0.5, 0.9, schedule="cosine", steps=4) is momentum_sgd(0.5, 0.9, schedule="cosine", steps=4)


@pytest.mark.parametrize("size", [0, 6])
def test_batches_that_cannot_be(size):
    with pytest.raises(ValueError, match=f"a batch must hold 1 to n = 5 samples, got {size}"):
        batches_of(5, size)


@pytest.mark.slow
def test_plain_convolutions_keep_the_numbers_and_stand_in_one_layout(network):
    """In a loop XLA's CPU compiler leaves layouts as they are, so all must be the one that runs fast."""
    objective, x, y, (params, _) = network
    gradient = jax.grad(objective.value)
    plain = plain_convolutions(gradient)
    for a, b in zip(*(jax.tree.leaves(jax.jit(f)(params, x, y)) for f in (gradient, plain)), strict=True):
        # The same products, in another order of summation: √(8·8·14) roundings of the largest entry.
        np.testing.assert_allclose(a, b, rtol=0, atol=np.sqrt(8 * 8 * 14) * 6e-8 * max(1.0, float(jnp.abs(a).max())))

    def layouts(f):
        numbers = re.findall(r"ConvDimensionNumbers\(.*?spec=\((.*?)\), rhs_spec=\((.*?)\), out_spec=\((.*?)\)\)", f)
        return set(numbers)

    assert layouts(str(jax.make_jaxpr(plain)(params, x, y))) == {("0, 3, 1, 2", "3, 2, 0, 1", "0, 3, 1, 2")}
    assert len(layouts(str(jax.make_jaxpr(gradient)(params, x, y)))) > 1
    # Through vmap and jit, and for a network without convolutions.
    dense = MLP(width=3, depth=2, outputs=5)
    theta = dense.init(jax.random.key(0), x)
    value = Objective(dense.apply, "sum").value
    twice = jnp.stack([x, x])
    mapped = jax.jit(jax.vmap(plain_convolutions(jax.grad(value)), in_axes=(None, 0, None)))(theta, twice, y)
    for a, b in zip(*map(jax.tree.leaves, (mapped, jax.grad(value)(theta, x, y))), strict=True):
        np.testing.assert_allclose(a[1], b, rtol=1e-5, atol=1e-5)
