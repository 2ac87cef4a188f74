"""The noise of mini-batches against all batches there are, on least squares with exact expectations."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lplr_jax as lp
from lplr_jax.losses import Objective, Squared
from lplr_jax.measurement.noise import DRAWS, Batches, batch_decrease, block_noise, sample_noise
from lplr_jax.training import init_state
from lplr_jax.training.batches import partition_of, train_batches

N, D, C = 6, 4, 2


def linear(w, x):
    return x @ w


def setting(seed=0, n=N, d=D, c=C):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((d, c)), rng.standard_normal((n, d)), rng.standard_normal((n, c))


def by_hand(w, x, y, b, scale):
    """Gradients g_B of all batches without replacement, ∇L, and L as a function, in NumPy."""
    n, s = len(x), len(x) if scale == "mean" else 1.0
    gradients = [(n / s) * x[i][:, None] * (x[i] @ w - y[i]) for i in range(n)]
    batches = [np.mean([gradients[i] for i in rows], axis=0) for rows in itertools.combinations(range(n), b)]
    return np.array(gradients), np.array(batches), lambda q: np.sum((x @ q - y) ** 2) / (2 * s)


@pytest.mark.parametrize("scale", ["mean", "sum"])
@pytest.mark.parametrize("b", [1, 2, 4, 6])
def test_the_variance_of_all_batches_is_that_of_the_diagonal_blocks(b, scale):
    w, x, y = setting()
    gradients, batches, _ = by_hand(w, x, y, b, scale)
    theta = np.kron(x @ x.T, np.eye(C))
    s = float(N) if scale == "mean" else 1.0
    found = sample_noise(theta, x @ w - y, s)
    assert found["sample_grad_sq_norm"] == pytest.approx(np.mean([np.sum(g**2) for g in gradients]), rel=1e-12)
    assert found["sample_kernel_max"] == pytest.approx((x**2).sum(axis=1).max(), rel=1e-12)
    whole = gradients.mean(axis=0)
    variance = np.mean([np.sum((g - whole) ** 2) for g in batches])
    predicted = (found["sample_grad_sq_norm"] - np.sum(whole**2)) / b * (N - b) / (N - 1)
    assert predicted == pytest.approx(variance, rel=1e-10, abs=1e-13)


def test_blocks_are_those_of_the_sample_and_not_the_diagonal_alone():
    """Outputs that depend on each other: a block with off-diagonal entries, whose diagonal alone is not enough."""
    block = np.array([[2.0, 1.5], [1.5, 2.0]])
    theta = np.kron(np.eye(3), block)
    g = np.tile([1.0, -1.0], (3, 1))
    found = sample_noise(theta, g, 3.0)
    assert found["sample_grad_sq_norm"] == pytest.approx(1.0), "gᵀΘ_ii g = 2 + 2 - 3"
    assert found["sample_kernel_max"] == pytest.approx(3.5)


@pytest.mark.parametrize("b", [1, 3])
def test_the_mean_step_is_that_of_all_batches(b):
    w, x, y = setting()
    _, batches, loss = by_hand(w, x, y, b, "mean")
    eta = 0.1
    expected = np.mean([loss(w - eta * g) - loss(w) for g in batches])
    found = batch_decrease(Objective(linear, "mean"), *map(jnp.asarray, (w, x, y)), Batches(b, eta, 3))
    if b == 1:
        assert found == {"batch_decrease": pytest.approx(expected, rel=1e-5), "batch_decrease_error": 0.0}
    else:
        assert abs(found["batch_decrease"] - expected) < found["batch_decrease_error"]
        # The remainder is ½ η² g_BᵀH g_B: the interval is narrower than the mean step for such an η.
        assert found["batch_decrease_error"] < abs(expected)


def test_the_interval_holds_the_mean_as_often_as_it_says():
    """At 95 %, on 20 draws: more than 4 misses have probability 3e-3; the interval is wider than that in truth."""
    w, x, y = setting(1)
    _, batches, loss = by_hand(w, x, y, 3, "mean")
    expected = np.mean([loss(w - 0.3 * g) - loss(w) for g in batches])
    misses, narrow = 0, 0
    for seed in range(20):
        arrays = map(jnp.asarray, (w, x, y))
        found = batch_decrease(Objective(linear, "mean"), *arrays, Batches(3, 0.3, seed))
        off = abs(found["batch_decrease"] - expected)
        misses += off > found["batch_decrease_error"]
        narrow += off > found["batch_decrease_error"] / 10
    assert misses <= 4
    assert narrow > 0, "a tenth of the interval would not hold it"
    assert DRAWS == 64


def run(sampling, *, b=2, eta=0.05, noise=0.0, seed=0, steps=60):
    w, x, y = setting(5, n=8, d=20 if not noise else 3, c=1)
    problem = lp.Problem(linear, *(jnp.asarray(a, jnp.float32) for a in (0 * w, x, y)), loss=Squared("mean"))
    probes = lp.Probes(20, search=0, hessian=99)
    return lp.train(
        problem, optax.sgd(eta), steps=steps, batch_size=b, sampling=sampling, seed=seed, probes=probes,
        learning_rate=eta,
    )  # fmt: skip


def test_independent_batches_are_drawn_anew_and_resume_alike(tmp_path):
    """A pass uses every sample once or not; both are reproducible, and say what they are."""
    first, again, other = run("independent"), run("independent"), run("reshuffle")
    np.testing.assert_array_equal(first["loss"], again["loss"])
    assert not np.array_equal(first["loss"], other["loss"])
    assert (int(first["batch_size"]), int(first["batches_independent"]), int(other["batches_independent"])) == (2, 1, 0)
    assert first.config["sampling"] == "independent"
    assert "sampling" not in other.config, "the usual run is the same run as before"


def test_least_squares_that_interpolate_have_no_noise_ball():
    """20 parameters for 8 samples: σ² goes with the loss, and both to zero; with 3 parameters neither does."""
    fits, stuck = run("independent", eta=0.02, steps=600), run("independent", eta=0.02, steps=600, noise=1.0)
    assert fits["loss"][-1] < 1e-3 * fits["loss"][0]
    assert fits["sample_grad_sq_norm"][-1] < 1e-2 * fits["sample_grad_sq_norm"][0]
    assert stuck["sample_grad_sq_norm"][-1] > 0.05 * stuck["sample_grad_sq_norm"][0]
    for record in (fits, stuck):
        found = lp.verify(record)["noise"]
        assert found.outcome == "not refuted", found
        assert "growth" in found.note


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_sampling_is_refused():
    with pytest.raises(ValueError, match="sampling must be one of reshuffle, independent, partition, got 'cyclic'"):
        run("cyclic")


BLOCKS = np.array([[0, 4], [3, 1], [5, 2]])


@pytest.mark.parametrize("scale", ["mean", "sum", 2.5])
def test_the_blocks_of_a_partition_are_enumerated(scale):
    """Mean of ‖g_B‖², growth and mean step of three blocks, by hand; b = 1 is the variance of single samples."""
    w, x, y = setting()
    s = {"mean": float(N), "sum": 1.0}.get(scale, scale)
    each = [(N / s) * x[i][:, None] * (x[i] @ w - y[i]) for i in range(N)]
    gradients = [np.mean([each[i] for i in rows], axis=0) for rows in BLOCKS]
    theta, loss = np.kron(x @ x.T, np.eye(C)), lambda q: np.sum((x @ q - y) ** 2) / (2 * s)
    found = block_noise(theta, x @ w - y, s, BLOCKS)
    assert found["block_grad_sq_norm"] == pytest.approx(np.mean([np.sum(g**2) for g in gradients]), rel=1e-12)
    largest = max(np.linalg.norm(x[rows], 2) ** 2 for rows in BLOCKS)
    assert found["block_kernel_max"] == pytest.approx(largest, rel=1e-12)
    # v L with v = 2 n Λ_B/(s b) is above the mean of ‖g_B‖², and so above the variance over blocks.
    assert found["block_grad_sq_norm"] <= 2 * N * largest / (s * 2) * loss(w)
    eta = 0.1
    expected = np.mean([loss(w - eta * g) - loss(w) for g in gradients])
    objective = Objective(linear, scale)
    step = batch_decrease(objective, *map(jnp.asarray, (w, x, y)), Batches(2, eta, 0, BLOCKS))
    assert step == {"batch_decrease": pytest.approx(expected, rel=1e-5), "batch_decrease_error": 0.0}
    single = block_noise(theta, x @ w - y, s, np.arange(N)[:, None])
    alone = sample_noise(theta, x @ w - y, s)
    assert single["block_grad_sq_norm"] == pytest.approx(alone["sample_grad_sq_norm"], rel=1e-12)
    assert single["block_kernel_max"] == pytest.approx(alone["sample_kernel_max"], rel=1e-12)


def test_the_growth_of_blocks_is_sharp():
    """All loss in one block, along the top of its kernel: the mean of ‖g_B‖² is v L exactly."""
    x, y = np.array([[1.0, 0], [1.0, 0], [0, 1.0], [0, 1.0]]), np.array([[-1.0], [-1.0], [0], [0]])
    found = block_noise(x @ x.T, -y, 4.0, np.array([[0, 1], [2, 3]]))
    loss = np.sum(y**2) / 8
    assert found["block_grad_sq_norm"] == pytest.approx(2 * 4 * found["block_kernel_max"] / (4.0 * 2) * loss, rel=1e-12)


def test_a_partition_is_kept_over_the_run_and_measured():
    """Every step is one of the blocks: θ_t moves in the span of one block's inputs, and the record says which σ²."""
    record, other = run("partition"), run("independent")
    assert (int(record["batches_fixed"]), int(record["batches_independent"])) == (1, 1)
    assert "batches_fixed" not in other
    assert "block_grad_sq_norm" not in other
    assert (record["batch_decrease_error"] == 0).all()
    verdict = lp.verify(record)["noise"]
    assert verdict.outcome == "not refuted", verdict
    assert "of the 4 blocks of a partition" in verdict.part("growth").note
    assert "exactly" in verdict.part("one_step").note
    assert verdict.part("supermartingale").outcome == "not refuted"
    again = run("partition")
    np.testing.assert_array_equal(record["loss"], again["loss"])
    # The blocks that the probe measured at θ_0 are those that steps are drawn from.
    _, x, y = setting(5, n=8, d=20, c=1)
    blocks = np.asarray(partition_of(jax.random.key_data(jax.random.key(0)), 8, 2))
    assert sorted(blocks.ravel()) == list(range(8))
    squares = [np.sum(np.mean([x[i] * y[i] for i in rows], axis=0) ** 2) for rows in blocks]
    assert record["block_grad_sq_norm"][0] == pytest.approx(np.mean(squares), rel=1e-5)


def test_steps_of_a_partition_are_its_blocks_and_each_as_likely():
    _, x, y = (jnp.asarray(a, jnp.float32) for a in setting(5, n=8, d=20, c=1))
    optimizer, objective = optax.sgd(0.1), Objective(linear, "mean")
    state = init_state(jnp.zeros((20, 1), jnp.float32), optimizer)
    blocks = np.asarray(partition_of(state.key, 8, 2))
    moves = [np.asarray(0.1 * x[rows].T @ y[rows] / 2) for rows in blocks]
    counts = np.zeros(4, int)
    for step in range(80):
        fresh = jax.tree.map(jnp.copy, state)._replace(step=jnp.asarray(step, jnp.int32))
        settings = {"objective": objective, "optimizer": optimizer, "batch_size": 2, "steps": 1}
        moved = np.asarray(train_batches(fresh, (x, y), sampling="partition", **settings).params)
        (which,) = [j for j, move in enumerate(moves) if np.allclose(moved, move, rtol=1e-5, atol=1e-7)]
        counts[which] += 1
    # χ² of 3 degrees of freedom is above 16.3 with probability 1e-3; the seed is fixed.
    assert np.sum((counts - 20) ** 2 / 20) < 16.3, counts


@pytest.mark.usefixtures("without_type_checks")
def test_a_partition_wants_blocks_of_one_size():
    with pytest.raises(ValueError, match="wants batches of one size: 3 does not divide n = 8"):
        run("partition", b=3)


OTHERS = {
    "adam": lambda: optax.adam(0.05),
    "momentum": lambda: optax.sgd(0.05, momentum=0.5),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.05, 60)),
    "weight decay": lambda: optax.chain(optax.add_decayed_weights(0.01), optax.sgd(0.05)),
    "clipping": lambda: optax.chain(optax.clip_by_global_norm(0.1), optax.sgd(0.05)),
}


def of_batches(optimizer, sampling, **settings):
    """A regression that interpolates, of eight orthogonal inputs, in float32."""
    rng = np.random.default_rng(0)
    x = np.linalg.qr(rng.standard_normal((12, 8)))[0].T * np.linspace(0.8, 1.2, 8)[:, None]
    arrays = (jnp.asarray(a, jnp.float32) for a in (np.zeros((12, 1)), x, rng.standard_normal((8, 1))))
    problem = lp.Problem(linear, *arrays)
    settings = {"steps": 60, "probes": lp.Probes(20, search=0), **settings}
    with jax.numpy_dtype_promotion("standard"):  # optax's schedules and moments rely on it
        return lp.train(problem, optimizer, batch_size=2, sampling=sampling, **settings)


@pytest.mark.parametrize("sampling", ["independent", "partition"])
def test_a_step_is_measured_against_the_gradient_of_its_own_batch(sampling):
    """Along it with η where the method is SGD, though far off the full gradient; ‖g_B‖ is ‖Δθ‖/η."""
    record = of_batches(optax.sgd(0.05), sampling)
    known = np.isfinite(record["batch_step_size"])
    assert known.sum() == np.isfinite(record["step_size"]).sum() > 20
    np.testing.assert_allclose(record["batch_step_size"][known], 0.05, rtol=1e-5)
    assert (record["batch_step_deviation"][known] < 1e-5).all()
    assert np.nanmedian(record["step_deviation"]) > 0.1
    cosine = np.sqrt(1 - record["step_deviation"] ** 2)
    length = np.abs(record["step_size"]) * np.sqrt(record["grad_sq_norm"]) / cosine
    np.testing.assert_allclose(np.sqrt(record["batch_grad_sq_norm"])[known], length[known] / 0.05, rtol=1e-4)
    assert "batch_step_size" not in of_batches(optax.sgd(0.05), "reshuffle")


@pytest.mark.parametrize("method", OTHERS)
def test_what_is_stated_of_plain_steps_is_not_held_against_others(method):
    found = lp.verify(of_batches(OTHERS[method](), "independent", learning_rate=0.05))["noise"]
    for name in ("supermartingale", "containment"):
        assert found.part(name).outcome == "not applicable"
        assert "steps -η g_B with one η" in found.part(name).note


def test_a_run_that_has_come_to_the_end_of_its_precision_is_not_refuted():
    """E L falls by 5 % a step, to 1e-60 of L_0 after 3,000; float32 stays near 1e-14, and no hypothesis is to blame."""
    record = of_batches(optax.sgd(0.5), "independent", steps=3000, probes=lp.Probes(1500, search=0))
    assert record["loss"][-1] < 1e-12
    found = lp.verify(record)["noise"]
    assert "a fall is promised" in found.part("supermartingale").note
    assert "rounding may outweigh q" in found.part("supermartingale").note
    assert found.outcome == found.part("supermartingale").outcome == "not refuted", found
