"""What probes, points and closing measurements give for losses of any kind and scale, and for any step numbers."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from lplr_jax import diagnostics, schema, theory
from lplr_jax.losses import Exponential, Huber, Logistic, Objective, SoftmaxCrossEntropy, Squared, SquaredHinge
from lplr_jax.measurement import closing, gradients
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.measurement.spacing import parameter_eps, parameter_spacing
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs.ball import Anchor, Layer
from lplr_jax.proofs.rounding import ACTIVATIONS

N, D = 6, 4
RNG = np.random.default_rng(0)
X = RNG.standard_normal((N, D)).astype(np.float32)
NUMBERS = RNG.standard_normal((N, 3)).astype(np.float32)
SIGNS = np.sign(NUMBERS[:, 0])
CLASSES = np.array([0, 2, 1, 1, 0, 2])
CASES = {
    "squared": (Squared("mean"), NUMBERS, 3),
    "mean of squares": (Squared(N * 3 / 2), NUMBERS, 3),
    "logistic": (Logistic("sum"), SIGNS, 1),
    "softmax": (SoftmaxCrossEntropy("mean"), CLASSES, 3),
    "huber": (Huber(0.5, 2.5), NUMBERS, 3),
}
ALL = pytest.mark.parametrize(("loss", "y", "c"), CASES.values(), ids=CASES.keys())


def network(c, width=4):
    model = MLP(width, 3, "softplus", c)
    return model.apply, model.init(jax.random.key(0), X)


@ALL
def test_identity_at_a_point(loss, y, c):
    """½‖∇L‖² = ρ‖g‖²/(2 s²); ρ from the engine's kernel, ∇L from differentiating the network in one piece."""
    apply_fn, params = network(c)
    point = diagnostics.evaluate_point(apply_fn, params, X, y, loss=loss)
    assert point.gradient.shape == point.residual.shape == (N, c)
    assert point.gradient.dtype == np.float64
    assert point.loss_scale == loss.scale_of(N, c)
    rho = point.rayleigh(np.asarray(empirical_ntk(apply_fn, params, X)))
    right = rho * np.square(point.gradient).sum() / (2 * point.loss_scale**2)
    assert 0.5 * point.grad_sq_norm == pytest.approx(right, rel=1e-10)
    if loss.name == "squared":
        np.testing.assert_array_equal(point.gradient, point.residual)
        assert point.pl_ratio == pytest.approx(rho / point.loss_scale, rel=1e-10)
    else:
        assert np.abs(point.gradient - point.residual).max() > 0.1


def test_a_flat_function_and_a_column_are_one_point():
    apply_fn, params = network(1)
    one = diagnostics.evaluate_point(apply_fn, params, X, SIGNS[:, None], loss_scale="sum")
    two = diagnostics.evaluate_point(lambda p, x: apply_fn(p, x)[:, 0], params, X, SIGNS, loss_scale="sum")
    assert (one.loss, one.grad_sq_norm) == (two.loss, two.grad_sq_norm)
    np.testing.assert_array_equal(one.gradient, two.gradient)


def test_verdicts_of_a_point_differ_by_units_alone():
    """The mean of squares over n c entries is 2/c times half the mean over samples."""
    apply_fn, params = network(3)
    mean = theory.verify_point(apply_fn, params, X, NUMBERS, loss_scale="mean")
    entries = theory.verify_point(apply_fn, params, X, NUMBERS, loss_scale=N * 3 / 2)
    again = theory.verify_point(apply_fn, params, X, NUMBERS, loss=Squared(N * 3 / 2))
    flat = {v.claim: v for v in theory.flatten(mean)}
    other = {v.claim: v for v in theory.flatten(entries)}
    assert {claim: v.outcome for claim, v in flat.items()} == {claim: v.outcome for claim, v in other.items()}
    assert flat["consistency.identity"].outcome == "proved"
    assert not theory.any_inconsistent(entries)
    assert [v.outcome for v in again] == [v.outcome for v in entries]
    one, two = flat["local_pl.pointwise"], other["local_pl.pointwise"]
    assert two.measured == pytest.approx(one.measured * (2 / 3 if one.units == "units of L" else 1), rel=1e-12)


def test_points_of_one_output_may_come_without_its_axis():
    w = np.float32([0.5, -1, 2, 0])
    verdicts = theory.verify_point(lambda w, x: x @ w, w, X[:3], SIGNS[:3], loss_scale="sum")
    column = theory.verify_point(lambda w, x: (x @ w)[:, None], w, X[:3], SIGNS[:3, None], loss_scale="sum")
    assert [v.outcome for v in verdicts] == [v.outcome for v in column]
    assert not theory.any_inconsistent(verdicts)


def run_probes(objective, y, points, *, x=X, subset=None, search_steps=0, kept=None, **settings):
    """Probe given points, and close; what a run records beside is made up of the probes alone."""
    probe = KernelProbe(objective, x, y, subset=subset, kernel="auto", **settings)
    rows = []
    for step, params in points.items():
        rows.append(probe(params, step))
        if kept is not None:
            kept[step] = dict(probe.remembered(step))
    names = {name for row in rows for name in row}
    arrays = {name: np.array([row.get(name, np.nan) for row in rows]) for name in names}
    start = points[min(points)]
    arrays["probe_epoch"] = np.array(list(points))
    arrays["drift"] = closing.pair_distances([start, *points.values()])[0, 1:]
    return probe, {**arrays, **probe.close(arrays, search_steps=search_steps, seed=0)}


def moved(params, size):
    leaves, structure = jax.tree.flatten(params)
    rng = np.random.default_rng(1)
    return jax.tree.unflatten(
        structure, [np.asarray(a) + size * rng.standard_normal(a.shape).astype(a.dtype) for a in leaves]
    )


@pytest.mark.parametrize(("loss", "y", "c"), list(CASES.values())[1:4], ids=list(CASES)[1:4])
def test_probes_of_every_loss(loss, y, c):
    apply_fn, params = network(c)
    objective = Objective(apply_fn, loss)
    points = {0: params, 7: moved(params, 0.01), 10**9: moved(params, 0.02)}
    asked = []

    def first_and_last(step):
        asked.append(step)
        return step != 7

    probe, arrays = run_probes(
        objective,
        y,
        points,
        subset=np.arange(2),
        hessian_epochs=first_and_last,
        spectrum_epochs=(0, 10**9),
        search_steps=2 if c == 1 else 0,
    )
    assert not probe.untrusted
    assert asked == list(points), "a predicate is asked once a probe, in order"
    # Spectra of the probes that have them, in their places, and the energy of g in them.
    assert np.isnan(arrays["spectrum"][1]).all()
    weighted = (arrays["spectrum"] * arrays["residual_energy"]).sum(axis=1)
    np.testing.assert_allclose(weighted[[0, 2]], arrays["ntk_rayleigh"][[0, 2]], rtol=1e-10)
    assert arrays["spectrum"].shape == (3, N * c)
    # The sharpness against a dense Hessian, and the proved bound above it.
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, jnp.float64), points)
        targets = y if y.dtype.kind == "i" else y.astype(float)
        _, unravel = ravel_pytree(wide[0])
        hessian_at = jax.jit(jax.hessian(lambda v: objective.value(unravel(v), X.astype(float), targets)))
        hessians = [np.asarray(hessian_at(ravel_pytree(wide[step])[0])) for step in (0, 10**9)]
    for place, hessian in zip((0, 2), hessians, strict=True):
        eigenvalues = np.linalg.eigvalsh(hessian)
        assert arrays["sharpness"][place] == pytest.approx(eigenvalues[-1], rel=1e-5)
        assert arrays["curvature_min"][place] == pytest.approx(eigenvalues[0], abs=1e-5 * eigenvalues[-1])
        assert eigenvalues[-1] <= arrays["smoothness_upper"]
    assert np.isnan(arrays["sharpness"][1])
    # ⟨∇L(θ_t), θ_t - θ_T⟩ from one gradient in one piece.
    theta = [gradients.flat_parameters(p) for p in points.values()]
    gradient = gradients.gradient_at(objective, points[7], X, y)
    assert arrays["lqcr_inner"][1] == pytest.approx(gradient @ (theta[1] - theta[2]), rel=1e-12)
    assert arrays["probe_loss_scale"] == loss.scale_of(N, c)
    assert arrays["parameter_eps"] == 2.0**-23
    assert set(arrays) <= set(schema.SCHEMA)


def test_a_subset_has_a_scale_of_its_own():
    params = RNG.standard_normal((D, 3)).astype(np.float32)
    for loss, expected in ((Squared("mean"), 4), (Squared(9.5), 9.5)):
        objective = Objective(lambda w, x: jnp.tanh(x @ w), loss)
        _, arrays = run_probes(objective, NUMBERS[:4], {0: params}, x=X[:4])
        assert arrays["probe_loss_scale"] == expected
        ratio = 0.5 * arrays["probe_grad_sq_norm"] / arrays["probe_loss"]
        assert ratio * arrays["probe_loss_scale"] == pytest.approx(arrays["ntk_rayleigh"], rel=1e-10)


@pytest.mark.slow
def test_a_fixed_number_adds_up_over_micro_batches():
    """With a budget of one sample at a time the Hessian is that of all data at once, whatever the scale."""
    params = RNG.standard_normal((D, 3)).astype(np.float32)
    for loss in (Squared(N * 3 / 2), SoftmaxCrossEntropy("mean")):
        objective = Objective(lambda w, x: jnp.tanh(x @ w), loss)
        data = X, np.eye(3, dtype=np.float32)[CLASSES]
        whole = diagnostics.hessian_extremes(objective.value, params, *data)
        parts = diagnostics.hessian_extremes(
            objective.value, params, *data, reduction=objective.reduction, memory_budget=1
        )
        assert (whole.batch_size, parts.batch_size) == (None, 1)
        assert parts.largest == pytest.approx(whole.largest, rel=2e-6)


def test_a_resumed_probe_closes_as_one_that_was_not():
    apply_fn, params = network(1)
    objective = Objective(apply_fn, Logistic())
    points, kept = {3: params, 2 * 10**9: moved(params, 0.01)}, {}
    _, whole = run_probes(
        objective,
        SIGNS,
        points,
        hessian_epochs=lambda step: step > 3,
        spectrum_epochs=lambda step: step == 3,
        kept=kept,
    )
    assert "hessian" not in kept[3]
    assert "hessian" in kept[2 * 10**9]
    assert "spectrum" not in kept[2 * 10**9]
    again = KernelProbe(objective, X, SIGNS, subset=None, kernel="auto")
    for step, arrays in kept.items():
        again.recall(step, arrays, params)
    closed = again.close(whole, search_steps=0, seed=0)
    for name, array in closed.items():
        np.testing.assert_array_equal(array, whole[name])
    assert "probe_loss_scale" in closed


def test_smoothness_of_an_affine_model_is_attained():
    """At f = 0 the logistic loss bends by 1/4 in every direction, so ∇²L = XᵀX/(4 s): the bound has no room."""
    objective = Objective(lambda w, x: x @ w, Logistic("sum"))
    w = np.zeros((D, 1), np.float32)
    _, arrays = run_probes(objective, SIGNS, {0: w, 1: w + np.float32(0.1)})
    assert arrays["affine_in_parameters"] == 1
    truth = np.linalg.svd(X.astype(float), compute_uv=False)[0] ** 2 / 4
    # Room for the Cholesky factorisation that proves λ_max: a tenth of a per cent.
    assert truth <= arrays["smoothness_upper"] <= truth * 1.002


@pytest.mark.parametrize("curvature", [0.25, 0.5, 1.0])
def test_smoothness_on_a_ball_follows_the_curvature(curvature):
    """β <= (κ B² + L_J (‖g_0‖ + κ B R))/s, written out from the bounds of J and its Lipschitz constant."""
    one, entry = np.ones(1), np.ones((1, 1))
    layer = Layer(one, one, entry, entry, 0 * one, 1.0, ACTIVATIONS["softplus"])
    base = Anchor((layer, layer), 3.0, 2.0, 5.0, curvature)
    ball = base.on_ball(0.5)
    g = 2.0 + curvature * ball.jacobian * 0.5
    expected = (curvature * ball.jacobian**2 + ball.jacobian_lipschitz * g) / 5
    # Inflated by 1e-6 for the rounding of the recursion.
    assert ball.smoothness == pytest.approx(expected * (1 + 1e-6), rel=1e-12)


def test_an_own_loss_without_a_known_curvature_has_no_smoothness_bound():
    class Unknown(Squared):
        name = "unknown"
        curvature = math.inf

    apply_fn, params = network(1)
    _, arrays = run_probes(Objective(apply_fn, Unknown("sum")), SIGNS, {0: params, 1: moved(params, 0.01)})
    assert arrays["smoothness_upper"] == np.inf
    assert np.isfinite(arrays["ntk_lipschitz_upper"])


@pytest.mark.parametrize(
    ("dtype", "bits", "lowest"),
    [
        (ml_dtypes.bfloat16, 8, -133),
        (np.float16, 11, -24),
        (np.float32, 24, -149),
        (np.float64, 53, -1074),
    ],
)
def test_spacing_is_that_of_the_dtype(dtype, bits, lowest):
    """Numbers in [2^k, 2^(k+1)) are 2^(k+1-bits) apart, those below the normal ones 2^lowest."""
    unit = 2.0 ** (1 - bits)
    assert parameter_eps({"w": np.ones(3, dtype)}) == unit
    for value, expected in ((1.0, unit), (-3.0, 2 * unit), (0.75, unit / 2), (0.0, 2.0**lowest)):
        for leaf in (np.array([value], dtype), np.array(value, dtype)):
            found = parameter_spacing({"w": leaf})
            assert found == expected or (value == 0 and found <= expected)  # squares of the least numbers underflow
    two = parameter_spacing({"w": np.array([1.0, -3.0], dtype), "steps": np.arange(3)})
    assert two == pytest.approx(math.hypot(unit, 2 * unit), rel=1e-12)


def test_the_coarsest_dtype_is_that_of_the_parameters():
    mixed = {"a": jnp.ones(2, jnp.bfloat16), "b": np.ones(2, np.float32), "c": np.int32(3)}
    assert parameter_eps(mixed) == 2.0**-7
    assert parameter_spacing(mixed) == pytest.approx(math.sqrt(2) * math.hypot(2.0**-7, 2.0**-23), rel=1e-12)
    assert parameter_eps({"c": np.int32(3)}) == parameter_spacing({"c": np.int32(3)}) == 0.0


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_probes_of_parameters_of_low_precision(dtype):
    """The point is that of the stored numbers, cast up: the kernel, pairs and spacing follow from them."""
    params = {"w": jnp.asarray(RNG.standard_normal((D, 3)), dtype), "b": jnp.zeros(3, dtype)}

    def apply_fn(p, x):
        return jnp.tanh(x @ p["w"] + p["b"][None])

    points = {0: params, 1: jax.tree.map(lambda a: a + jnp.asarray(0.25, dtype), params)}
    probe, arrays = run_probes(Objective(apply_fn, "mean"), NUMBERS, points, spectrum_epochs=(0, 1))
    assert not probe.untrusted
    flat = [gradients.flat_parameters(p) for p in points.values()]
    assert flat[0].dtype == np.float64
    assert arrays["param_pair_distance"][0, 1] == pytest.approx(np.linalg.norm(flat[0] - flat[1]), rel=1e-13)
    assert arrays["parameter_eps"] == float(jnp.finfo(dtype).eps)
    wide = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    np.testing.assert_allclose(
        arrays["spectrum"][0], np.linalg.eigvalsh(np.asarray(empirical_ntk(apply_fn, wide, X))), atol=1e-12
    )
    point = theory.verify_point(apply_fn, params, X, NUMBERS, loss_scale="mean")
    assert not theory.any_inconsistent(point)


@pytest.mark.parametrize(
    ("loss", "y"),
    [
        (Logistic(), SIGNS), (SquaredHinge(), SIGNS), (Exponential(), SIGNS), (SoftmaxCrossEntropy(), CLASSES),
        (SoftmaxCrossEntropy(smoothing=0.1), CLASSES), (SoftmaxCrossEntropy(soft=True), np.eye(3)[CLASSES] * 0.7 + 0.1),
    ],
)  # fmt: skip
def test_the_accuracy_of_a_probe_is_counted(loss, y):
    """A linear network whose outputs are chosen: five of six samples lie on the side of their class."""
    wanted = np.where(np.eye(3)[CLASSES] > 0, 2.0, -1.0) if y is not SIGNS else SIGNS[:, None] * 1.5
    wanted[2] = -wanted[2] if y is SIGNS else np.roll(wanted[2], 1)
    params, x = wanted.astype(np.float32), np.eye(N, dtype=np.float32)
    _, arrays = run_probes(Objective(lambda w, x: x @ w, loss), y, {0: params}, x=x)
    assert arrays["probe_accuracy"].tolist() == [pytest.approx(5 / 6)]


def test_losses_of_no_classes_have_no_accuracy():
    apply_fn, params = network(3)
    _, arrays = run_probes(Objective(apply_fn, Huber(1.0)), NUMBERS, {0: params})
    assert "probe_accuracy" not in arrays
