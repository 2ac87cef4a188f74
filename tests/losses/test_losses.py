"""Losses against mpmath at 50 digits and dense Jacobians; what targets they take, and what they refuse."""

import dataclasses
import subprocess
import sys

import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import optax
import pytest

from lplr_jax import losses
from lplr_jax.losses import Exponential, Huber, Logistic, Objective, SoftmaxCrossEntropy, Squared, SquaredHinge

LABELS = np.array([2, 0, 1, 1, 0])
CASES = {
    "squared": (Squared("mean"), 3, "numbers"),
    "squared sum": (Squared("sum"), 1, "numbers"),
    "squared number": (Squared(3.5), 2, "numbers"),
    "logistic": (Logistic("mean"), 1, "signs"),
    "softmax": (SoftmaxCrossEntropy("sum"), 3, "classes"),
    "huber": (Huber(0.75, 2.5), 2, "numbers"),
    "squared hinge": (SquaredHinge(), 1, "signs"),
    "exponential": (Exponential("sum"), 1, "signs"),
    "smoothed": (SoftmaxCrossEntropy(smoothing=0.1), 3, "classes"),
    "soft": (SoftmaxCrossEntropy(2.0, soft=True), 4, "distributions"),
}
ALL = pytest.mark.parametrize(("loss", "c", "kind"), CASES.values(), ids=CASES.keys())


def targets(kind, n, c, rng):
    if kind == "signs":
        return np.where(rng.random((n, 1)) < 0.5, -1.0, 1.0)
    if kind == "distributions":
        return rng.dirichlet(np.ones(c) / 2, n)
    return np.eye(c)[rng.integers(0, c, n)] if kind == "classes" else rng.standard_normal((n, c))


def exact(loss, f, y):
    """Value and gradient of one sample at 50 digits, by the textbook's formula and its derivative."""
    with mpmath.workdps(50):
        f, y = [mpmath.mpf(float(v)) for v in f], [mpmath.mpf(float(v)) for v in y]
        if isinstance(loss, Squared):
            r = [a - b for a, b in zip(f, y, strict=True)]
            return sum(v * v for v in r) / 2, r
        if isinstance(loss, Logistic):
            with mpmath.workdps(500):  # 1 + e^-1000 is not 1
                e = mpmath.exp(-y[0] * f[0])
                return mpmath.log(1 + e), [-y[0] * e / (1 + e)]
        if isinstance(loss, SquaredHinge):
            short = max(1 - y[0] * f[0], mpmath.mpf(0))
            return short * short / 2, [-y[0] * short]
        if isinstance(loss, Exponential):
            e = mpmath.exp(-y[0] * f[0])
            return e, [-y[0] * e]
        if isinstance(loss, SoftmaxCrossEntropy):
            with mpmath.workdps(1000):
                total = sum(mpmath.exp(v) for v in f)
                p = [mpmath.exp(v) / total for v in f]
                alpha = mpmath.mpf(loss.smoothing)
                tau = [(1 - alpha) * v + alpha / len(y) for v in y]
                value = sum(t * (mpmath.log(total) - v) for t, v in zip(tau, f, strict=True))
                return value, [a - b for a, b in zip(p, tau, strict=True)]
        value, gradient = mpmath.mpf(0), []
        for a, b in zip(f, y, strict=True):
            r, d = a - b, mpmath.mpf(loss.delta)
            value += r * r / 2 if abs(r) <= d else d * (abs(r) - d / 2)
            gradient.append(max(-d, min(d, r)))
        return value, gradient


def close(found, truth, relative, tiny):
    """Relative error, or below the smallest normal number, which a processor may flush to zero."""
    return abs(mpmath.mpf(float(found)) - truth) <= relative * abs(truth) + 2 * tiny


EXTREMES = [0.0, 1e-30, 1e-8, 0.5, -0.5, 0.75, 1.0, 20.0, -20.0, 50.0, 86.0, -86.0, 104.0, -104.0, 700.0, -750.0, 3e4]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "loss",
    [
        Squared(),
        Logistic(),
        SoftmaxCrossEntropy(),
        SoftmaxCrossEntropy(smoothing=0.125),
        SoftmaxCrossEntropy(soft=True),
        Huber(0.75),
        SquaredHinge(),
        Exponential(),
    ],
    ids=lambda loss: loss.name,
)
def test_values_and_gradients_at_extreme_outputs(loss, dtype):
    rng = np.random.default_rng(0)
    if isinstance(loss, SoftmaxCrossEntropy):
        f = [[a, b, 1.0] for a in EXTREMES for b in EXTREMES[::3]]
        f += [[1e4 + a, 1e4, 1e4 - 1] for a in EXTREMES[3:9]]
        y = np.eye(3)[rng.integers(0, 3, len(f))]
        if loss.soft:
            y[::2] = [0.5, 0.25, 0.25]
            y[1::4] = [0.0, 0.75, 0.25]
    elif isinstance(loss, Exponential):  # e^-m overflows beyond; its own rounding of m moves it by |m| eps
        f = [[a] for a in EXTREMES if abs(a) <= 86 for _ in (0, 1)]
        y = np.array([[1.0], [-1.0]] * (len(f) // 2))
    else:
        f = [[a] for a in EXTREMES for _ in (0, 1)]
        y = np.array([[1.0], [-1.0]] * len(EXTREMES))
    with jax.enable_x64(True):
        f, y = jnp.asarray(f, dtype), jnp.asarray(y, dtype)
        value, gradient = jax.jit(loss.per_sample)(f, y), jax.jit(loss.gradient)(f, y)
        traced = jax.jit(jax.grad(loss.total))(f, y)
        product = jax.jit(lambda f, y: jax.jvp(jax.grad(lambda v: loss.total(v, y)), (f,), (jnp.ones_like(f),)))(f, y)
    assert value.shape == (len(f),)
    assert value.dtype == gradient.dtype == dtype
    eps, tiny = float(jnp.finfo(dtype).eps), float(jnp.finfo(dtype).tiny)
    for i in range(len(f)):
        truth, slope = exact(loss, np.asarray(f[i]), np.asarray(y[i]))
        # A rounding of a difference of outputs moves its exponential by as much relatively; 16 for the functions.
        moved = 2 * float(np.ptp(np.asarray(f[i], np.float64))) if isinstance(loss, SoftmaxCrossEntropy) else 0.0
        relative = (16 + moved) * eps
        # Where τ is not one-hot p - τ is a difference, which the rounding of p <= 1 and of τ moves.
        absolute = (16 + moved) * eps if isinstance(loss, SoftmaxCrossEntropy) and not loss.hard else 0.0
        assert close(value[i], truth, relative, tiny), (f[i], y[i], value[i], truth)
        for found in (gradient, traced):
            for a, b in zip(np.asarray(found[i]), slope, strict=True):
                assert close(a, b, relative, tiny + absolute / 2), (f[i], y[i], a, b)
    assert all(np.isfinite(part).all() for part in product), "Hessian-vector products too"


@pytest.mark.parametrize(
    ("loss", "c"),
    [
        (Squared(), 2),
        (Logistic(), 1),
        (SoftmaxCrossEntropy(), 4),
        (SoftmaxCrossEntropy(smoothing=0.3), 4),
        (SoftmaxCrossEntropy(soft=True), 4),
        (Huber(0.75), 2),
        (SquaredHinge(), 1),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_curvature_bounds_the_second_derivative_and_is_attained(loss, c):
    rng = np.random.default_rng(1)
    kind = "classes" if c == 4 else "signs" if c == 1 else "numbers"
    with jax.enable_x64(True):
        largest = []
        y = targets(kind, 1, c, rng)
        # Half the probability on each of two classes, the sign undecided, no residual: the steepest places.
        steep = np.where(np.arange(c) < 2, 0.0, -60.0)[None] if c == 4 else y * (kind == "numbers")
        hessian_of = jax.jit(jax.hessian(lambda v: loss.total(v.reshape(1, c), y)))
        for f in (steep, *rng.standard_normal((40, 1, c)) * 3):
            hessian = hessian_of(jnp.asarray(f.reshape(-1)))
            largest.append(np.linalg.eigvalsh(np.asarray(hessian))[-1])
    assert max(largest) == pytest.approx(loss.curvature, rel=1e-12)


@ALL
def test_gradient_norms_lie_in_the_range_that_goes_with_the_value(loss, c, kind):
    rng = np.random.default_rng(2)
    f, y = 3 * rng.standard_normal((200, c)), targets(kind, 200, c, rng)
    if kind == "classes":  # the rest on one class, and spread over all
        own = y == 1
        f[:50] = np.where(own, 0.7, np.where(np.roll(own, 1, axis=1), 0.2, -80.0))[:50]
        f[50:100] = np.where(own, 1.0, 0.0)[50:100]
    if kind == "numbers":  # the residual in one output, and spread over all
        f[:50] = y[:50] + np.where(np.arange(c) == 0, 1.5, 0.0)
        f[50:100] = y[50:100] + 1.5
    with jax.enable_x64(True):
        values, squares = (
            np.asarray(a) for a in (loss.per_sample(f, y), np.square(np.asarray(loss.gradient(f, y))).sum(axis=1))
        )
    low, high = loss.gradient_sq_range(values, c)
    assert np.all(low <= squares * (1 + 1e-12))
    assert np.all(squares <= high * (1 + 1e-12))
    if isinstance(loss, SoftmaxCrossEntropy) and not loss.hard:  # the value alone tells no more
        assert np.all(low == 0)
        return
    squares, low, high = (array[values > 0] for array in (squares, low, high))  # a hinge may be met
    assert np.min(squares / low) == pytest.approx(1, rel=1e-12)
    assert np.max(squares / high) == pytest.approx(1, rel=1e-12)


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"] + params["b"]


def problem(c, kind, n=5, d=3, width=4):
    rng = np.random.default_rng(3)
    params = {
        "w": rng.standard_normal((d, width)),
        "v": rng.standard_normal((width, c)),
        "b": rng.standard_normal((1, c)),
    }
    return params, rng.standard_normal((n, d)), targets(kind, n, c, rng)


@ALL
def test_identity_of_gradient_and_kernel_for_every_loss(loss, c, kind):
    """½‖∇L‖² = gᵀΘg/(2 s²), with Θ from a dense Jacobian in forward mode and g in closed form."""
    with jax.enable_x64(True):
        params, x, y = jax.tree.map(jnp.asarray, problem(c, kind))
        objective = Objective(network, loss)
        _, gradient = objective.value_and_gradient(params, x, y)
        g = objective.gradient_in_outputs(params, x, y).reshape(-1)
        blocks = jax.tree.leaves(jax.jacfwd(lambda p: network(p, x).reshape(-1))(params))
        jacobian = np.concatenate([np.asarray(block).reshape(g.size, -1) for block in blocks], axis=1)
    left = 0.5 * sum(float(np.square(leaf).sum()) for leaf in jax.tree.leaves(gradient))
    g = np.asarray(g)
    s = objective.scale(len(x), c)
    assert s == {"sum": 1, "mean": 5}.get(loss.scale, loss.scale)
    assert left == pytest.approx(g @ (jacobian @ jacobian.T) @ g / (2 * s**2), rel=1e-12)


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("jit", [False, True])
def test_squared_loss_keeps_its_bits(scale, jit):
    """As a sum over all entries, halved, over s: the formula of every record so far."""
    params, x, y = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), problem(3, "numbers", n=37))
    s = len(x) if scale == "mean" else 1
    weights = jnp.asarray(np.arange(37) < 30, jnp.float32)

    def before(params, x, y):
        with jax.default_matmul_precision("highest"):
            return 0.5 * jnp.sum(jnp.square(network(params, x) - y)) / s

    def before_batch(params, x, y, weights):
        with jax.default_matmul_precision("highest"):
            squares = jnp.sum(jnp.square(network(params, x) - y), axis=1)
        return 0.5 * (100 / (100 if scale == "mean" else 1)) * jnp.sum(weights * squares) / jnp.sum(weights)

    wrap = jax.jit if jit else lambda f: f
    objective = Objective(network, scale)
    old = wrap(jax.value_and_grad(before))(params, x, y)
    jax.tree.map(np.testing.assert_array_equal, wrap(objective.value_and_gradient)(params, x, y), old)
    old = wrap(jax.value_and_grad(before_batch))(params, x, y, weights)
    new = wrap(jax.value_and_grad(lambda *a: objective.batch_value(*a, n=100)))(params, x, y, weights)
    jax.tree.map(np.testing.assert_array_equal, new, old)


@ALL
def test_batches_make_the_loss_of_all(loss, c, kind):
    with jax.enable_x64(True):
        params, x, y = jax.tree.map(jnp.asarray, problem(c, kind, n=6))
        objective = Objective(network, loss)
        whole = float(objective.value(params, x, y))
        ones = jnp.ones(3)
        parts = [float(objective.batch_value(params, x[a : a + 3], y[a : a + 3], ones, n=6)) for a in (0, 3)]
        assert np.mean(parts) == pytest.approx(whole, rel=1e-13)
        halves = [float(objective.value(params, x[a : a + 3], y[a : a + 3])) for a in (0, 3)]
    assert {"sum": sum, "mean": np.mean}[loss.reduction](halves) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("make", [np.asarray, jnp.asarray])
def test_one_output_may_come_without_its_axis(make):
    x, w = np.float32([[1, 2], [3, 4], [5, 7]]), np.float32([0.5, -1])
    y = np.float32([1, -1, 1])
    for loss in (Squared("sum"), Logistic(), Huber(1.0), SquaredHinge(), Exponential()):
        flat, column = Objective(lambda w, x: x @ w, loss), Objective(lambda w, x: x @ w[:, None], loss)
        expected = float(column.value(w, x, make(y[:, None])))
        for objective in (flat, column):
            for target in (y, y[:, None]):
                assert float(objective.value(w, x, make(target))) == expected
                assert objective.residual(w, x, make(target)).shape == (3, 1)
                assert objective.gradient_in_outputs(w, x, make(target)).shape == (3, 1)
        assert loss.gradient(make(x @ w), make(y)).shape == (3,)


def test_labels_are_classes():
    f = np.random.default_rng(0).standard_normal((5, 3)).astype(np.float32)
    loss = SoftmaxCrossEntropy()
    expected = np.asarray(loss.per_sample(f, np.eye(3, dtype=np.float32)[LABELS]))
    for labels in (LABELS, LABELS[:, None], LABELS.astype(np.uint8), np.eye(3, dtype=int)[LABELS], jnp.asarray(LABELS)):
        np.testing.assert_array_equal(loss.per_sample(f, labels), expected)
        np.testing.assert_array_equal(jax.jit(loss.per_sample)(f, labels), expected)
    wide = np.zeros((1, 300), np.float32)
    wide[0, 44] = 50.0  # 300 - 256: a label as a byte must not wrap round
    assert float(loss.per_sample(wide, np.array([44], np.uint8))[0]) < 1e-18


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("loss", "shape", "y", "message"),
    [
        (Logistic(), (2, 1), [[0], [1]], r"must be -1 or 1, got 0 for sample 0; labels 0 and 1 become 2 \* y - 1"),
        (Logistic(), (2,), [1.0, 0.5], r"must be -1 or 1, got 0.5 for sample 1"),
        (Logistic(), (2, 2), [[1, 0], [0, 1]], r"one output a sample, got outputs of shape \(2, 2\)"),
        (SoftmaxCrossEntropy(), (2, 1), [[1], [1]], r"c >= 2, got shape \(2, 1\); Logistic"),
        (SoftmaxCrossEntropy(), (2, 3), [0, 3], r"integer labels 0 to 2; that of sample 1 becomes the row \[0.0, 0.0"),
        (SoftmaxCrossEntropy(), (2, 3), [-1, 0], r"integer labels 0 to 2; that of sample 0"),
        (SoftmaxCrossEntropy(), (1, 2), [[0.9, 0.1]], r"one-hot rows, .*of sample 0 becomes the row \[0.9, 0.1\]"),
        (SoftmaxCrossEntropy(), (1, 2), [[0.9, 0.1]], r"soft=True takes distributions"),
        (SoftmaxCrossEntropy(), (1, 2), [[1, 1]], r"one-hot rows, or integer labels 0 to 1; that"),
        (SoftmaxCrossEntropy(smoothing=0.1), (1, 2), [[0.9, 0.1]], r"one-hot rows, or integer labels 0 to 1 \(soft"),
        (SoftmaxCrossEntropy(soft=True), (2, 2), [[1.0, 0.0], [0.9, 0.2]], r"distributions over 2 .*of sample 1"),
        (SoftmaxCrossEntropy(soft=True), (1, 2), [[1.5, -0.5]], r"distributions over 2 classes, >= 0 and of sum 1"),
        (SquaredHinge(), (2, 1), [[0], [1]], r"squared hinge loss must be -1 or 1, got 0 for sample 0"),
        (Exponential(), (2, 2), [[1, 1], [1, 1]], r"exponential loss is of one output a sample"),
        (SoftmaxCrossEntropy(), (2, 3), [0.0, 1.0], r"shape \(2, 3\) but y has shape \(2,\)"),
        (Squared(), (3, 2), [1, 2, 3], r"shape \(3, 2\) but y has shape \(3,\)"),
        (Squared(), (3,), [[1, 2, 3]], r"shape \(3,\) but y has shape \(1, 3\)"),
        (Squared(), (3, 1, 1), [[1], [2], [3]], r"shape \(3, 1, 1\) but y has shape \(3, 1\)"),
        (Squared(), (0, 1), np.zeros((0, 1)), r"no samples"),
    ],
)
def test_targets_that_a_loss_is_not_defined_for(loss, shape, y, message):
    f, y = np.zeros(shape, np.float32), np.asarray(y)
    for call in (loss.per_sample, loss.total, loss.gradient):
        with pytest.raises(ValueError, match=message):
            call(f, y)


def test_targets_that_are_traced_give_no_number():
    f = np.zeros((2, 3), np.float32)
    for bad in ([0, 3], [[1.0, 0, 0], [0.5, 0.5, 0]]):
        y = np.asarray(bad) if np.ndim(bad) == 1 else np.float32(bad)
        loss = SoftmaxCrossEntropy()
        assert np.isnan(jax.jit(loss.per_sample)(f, y)).tolist() == [False, True]
        assert np.isnan(jax.jit(loss.gradient)(f, y)).all(axis=1).tolist() == [False, True]
    soft, bad = SoftmaxCrossEntropy(soft=True), np.float32([[0.5, 0.25, 0.25], [0.5, 0.25, 0.5]])
    assert np.isnan(jax.jit(soft.per_sample)(f, bad)).tolist() == [False, True]
    assert np.isnan(jax.jit(soft.gradient)(f, bad)).all(axis=1).tolist() == [False, True]
    y = np.float32([1, 0])
    for loss in (Logistic(), SquaredHinge(), Exponential()):
        assert np.isnan(jax.jit(loss.per_sample)(f[:, 0], y)).tolist() == [False, True]
        assert np.isnan(jax.jit(loss.gradient)(f[:, 0], y)).tolist() == [False, True]


@pytest.mark.parametrize("c", [2, 5])
def test_the_least_loss_is_the_entropy_of_the_targets(c):
    """Attained at f = log τ; optax has the same values, and what smoothing means."""
    rng = np.random.default_rng(4)
    f, labels = rng.standard_normal((6, c)), rng.integers(0, c, 6)
    smooth, soft = SoftmaxCrossEntropy(smoothing=0.2), SoftmaxCrossEntropy(soft=True)
    tau = np.asarray(optax.smooth_labels(np.eye(c)[labels], 0.2), np.float64)
    with jax.enable_x64(True):
        for loss, y in ((smooth, labels), (soft, tau)):
            expected = optax.softmax_cross_entropy(jnp.asarray(f), jnp.asarray(tau))
            # optax smooths in float32.
            np.testing.assert_allclose(loss.per_sample(f, y), expected, rtol=2e-7)
            rows = np.asarray(loss.targets(y, f.shape, f.dtype))
            least = loss.least(rows)
            np.testing.assert_allclose(loss.per_sample(np.log(tau), y), least, rtol=1e-6)
            assert np.all(loss.per_sample(f, y) > least)
            with mpmath.workdps(50):
                for found, row in zip(least, tau, strict=True):
                    truth = -sum(mpmath.mpf(v) * mpmath.log(mpmath.mpf(v)) for v in row)
                    assert found == pytest.approx(float(truth), rel=1e-6)
        margins = optax.losses.hinge_loss(jnp.asarray(f[:, 0]), jnp.asarray(np.sign(f[:, 1])))
        found = SquaredHinge().per_sample(f[:, 0], np.sign(f[:, 1]))
        np.testing.assert_allclose(found, np.square(margins) / 2, rtol=1e-14)
    assert Squared().least(f).tolist() == [0.0] * 6


@pytest.mark.usefixtures("without_type_checks")
def test_smoothing_is_a_share():
    for bad in (-0.1, 1, 1.5, np.nan, "0.1"):
        with pytest.raises(ValueError, match="smoothing must be"):
            SoftmaxCrossEntropy(smoothing=bad)
    with pytest.raises(ValueError, match=r"soft targets are distributions already; got smoothing = 0.1"):
        SoftmaxCrossEntropy(smoothing=0.1, soft=True)


@pytest.mark.usefixtures("without_type_checks")
def test_what_is_no_array_of_numbers():
    f = np.zeros((2, 1), np.float32)
    for bad in ("text", None, [1.0, 2.0], np.array(["a", "b"]), f.astype(bool)):
        with pytest.raises(TypeError, match=r"y must be array \(n, c\) of numbers, got"):
            Squared().per_sample(f, bad)
        with pytest.raises(TypeError, match=r"apply_fn must return one array \(n, c\) of numbers, got"):
            Objective(lambda w, x: bad, "sum").value(f, f, f)  # noqa: B023


@pytest.mark.usefixtures("without_type_checks")
def test_scales():
    assert [Squared(s).scale_of(7, 3) for s in ("sum", "mean", 3, np.float32(0.5))] == [1.0, 7.0, 3.0, 0.5]
    n, c = 4, 3
    f, y = np.random.default_rng(0).standard_normal((2, n, c)).astype(np.float32)
    objective = Objective(lambda w, x: w, Squared(n * c / 2))
    assert float(objective.value(f, f, y)) == pytest.approx(np.mean((f - y) ** 2), rel=1e-6)
    for bad in (0, -1.0, np.nan, np.inf, "average", None, [1.0], True, 1j):
        for make in (Squared, Logistic, lambda s: Huber(1.0, s), lambda s: losses.by_name("squared", s)):
            with pytest.raises(ValueError, match=r'loss_scale must be "sum".*"mean".*> 0; got'):
                make(bad)
    for bad in (0, -1.0, np.nan, "1", None):
        with pytest.raises(ValueError, match="delta must be a finite number > 0, got"):
            Huber(bad)


@pytest.mark.usefixtures("without_type_checks")
def test_a_loss_or_a_scale():
    assert losses.as_loss("sum") == losses.as_loss(loss_scale="sum") == Squared("sum")
    assert losses.as_loss(Logistic()) == Logistic()
    for loss in ("hinge", 0, [Squared()], Squared):
        with pytest.raises(ValueError, match=r"loss must be a Loss, such as .*got"):
            losses.as_loss(loss)
    with pytest.raises(ValueError, match="give loss or loss_scale, not both"):
        losses.as_loss(Logistic(), loss_scale="sum")
    with pytest.raises(ValueError, match=r"loss_scale must be .*got None"):
        losses.as_loss()


@pytest.mark.usefixtures("without_type_checks")
def test_equal_losses_share_compiled_code():
    def apply_fn(w, x):
        return x @ w

    traces = []

    def value(w, objective):
        traces.append(1)
        return objective.value(w, np.ones((2, 1), np.float32), np.ones((2, 1), np.float32))

    compiled = jax.jit(value, static_argnames=("objective",))
    w = np.ones((1, 1), np.float32)
    for loss in ("mean", Squared("mean"), Squared()):
        compiled(w, objective=Objective(apply_fn, loss))
    assert len(traces) == 1
    different = [Squared("sum"), Squared(2), Huber(1.0), Huber(2.0), Huber(1.0, "sum"), Logistic()]
    assert len({Objective(apply_fn, loss) for loss in (*different, *different)}) == len(different)
    assert Squared(2) == Squared(2.0) == Squared(np.float32(2))
    assert Objective(apply_fn, "mean").loss_scale == "mean"
    assert Objective(apply_fn, 2).loss_scale == 2.0


@pytest.mark.usefixtures("without_type_checks")
def test_a_record_names_its_loss():
    smooth, soft = SoftmaxCrossEntropy(2.0, smoothing=0.1), SoftmaxCrossEntropy(2.0, soft=True)
    known = (Squared(2.0), Logistic(2.0), SoftmaxCrossEntropy(2.0), Huber(0.1, 2.0), Huber(1e-30, 2.0))
    for loss in (*known, SquaredHinge(2.0), Exponential(2.0), smooth, soft):
        assert losses.by_name(loss.name, 2.0) == loss
        assert loss.floor == 0.0
        assert loss.name.partition("(")[0] in losses.LOSSES
    for name in (
        "",
        "hinge",
        "huber",
        "huber()",
        "huber(0.10)",
        "huber(-1.0)",
        "huber(1.0",
        "squared()",
        None,
        3,
        "softmax_cross_entropy(0.0)",
        "softmax_cross_entropy(2.0)",
        "exponential(1.0)",
    ):
        with pytest.raises(ValueError, match=r"the name of a loss must be one of squared, logistic.*got"):
            losses.by_name(name)


def test_an_own_loss_is_one_method():
    """Log-cosh, with its gradient from the default."""

    @dataclasses.dataclass(frozen=True)
    class LogCosh(losses.Loss):
        scale: losses.Scale = "mean"
        name = "log_cosh"

        def _per_sample(self, f, y):
            return jnp.sum(jnp.logaddexp(f - y, y - f) - jnp.log(2.0), axis=1)

    f, y = np.float32([2.0, 0.5, -1.0]), np.float32([1, 1, 1])
    loss = LogCosh()
    np.testing.assert_allclose(loss.per_sample(f, y), np.log(np.cosh(f - y)), rtol=1e-5)
    np.testing.assert_allclose(loss.gradient(f, y), np.tanh(f - y), rtol=1e-5)
    low, high = loss.gradient_sq_range(np.ones(2), 1)
    assert (low.tolist(), high.tolist()) == ([0, 0], [np.inf, np.inf])
    assert loss.curvature == np.inf


def test_a_reader_of_records_needs_no_jax():
    code = (
        "import sys, numpy as np; from lplr_jax import losses\n"
        "loss = losses.by_name('huber(0.5)', 3.0)\n"
        "assert (loss.scale_of(4, 1), loss.floor, loss.curvature) == (3.0, 0.0, 1.0)\n"
        "assert losses.Logistic().gradient_sq_range(np.zeros(1), 1)[0] == 0\n"
        "assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_distributions_of_float32_are_those_in_float64_too():
    """Rows that sum up to 1 to float32's rounding: probes look at them in float64; gradients sum up to 0."""
    y = np.random.default_rng(0).dirichlet(np.ones(3), 6).astype(np.float32)
    assert (np.abs(y.astype(np.float64).sum(axis=1) - 1) > 1e-9).any()
    loss, f = SoftmaxCrossEntropy(soft=True), np.random.default_rng(1).standard_normal((6, 3))
    with jax.enable_x64(True):
        g = np.asarray(loss.gradient(jnp.asarray(f), jnp.asarray(y, jnp.float64)))
    assert np.abs(g.sum(axis=1)).max() < 1e-15
    with pytest.raises(ValueError, match="distributions over 3"), jax.enable_x64(True):
        loss.gradient(jnp.asarray(f), jnp.asarray(y + np.float32(1e-5), jnp.float64))
