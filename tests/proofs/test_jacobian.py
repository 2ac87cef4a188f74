"""Enclosed Jacobians and λ_min of networks with normalisation, attention and pooling, against 100 digits.

The oracle is written by hand in mpmath, layer by layer, and differentiated by central differences of step 1e-50, whose
error is below 1e-90: it shares no code with JAX or with the arithmetic under test.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import mpmath
import numpy as np
import pytest
from mpmath import mp

from lplr_jax import Probes, Problem, diagnostics, linalg, parameters, programs, train, verify
from lplr_jax.models import ResNet, Transformer
from lplr_jax.ntk.empirical import empirical_ntk
from lplr_jax.proofs import jacobian
from lplr_jax.proofs.assembly import assembly_bound, bound_or_reason
from lplr_jax.proofs.fixed import UndecidedError

DIGITS = 100
RNG = np.random.default_rng(7)


def normal(*shape):
    return RNG.normal(size=shape)


# Layers by hand: vectors are lists of mpf.


def dense(h, w, b=None):
    out = [mpmath.fsum(h[i] * w[i][j] for i in range(len(h))) for j in range(len(w[0]))]
    return out if b is None else [a + c for a, c in zip(out, b, strict=True)]


def normalised(h, eps, *, centre=True):
    mean = mpmath.fsum(h) / len(h) if centre else mpmath.mpf(0)
    variance = mpmath.fsum((a - mean) ** 2 for a in h) / len(h)
    return [(a - mean) / mpmath.sqrt(variance + eps) for a in h]


def scaled(h, scale, shift=None):
    return [a * s + (0 if shift is None else shift[i]) for i, (a, s) in enumerate(zip(h, scale, strict=True))]


EPS = 1e-6
"""Flax's, as the float64 that it is."""
GELU = (float(np.sqrt(2 / np.pi)), 0.044715)


class LayerNorms(nn.Module):
    @nn.compact
    def __call__(self, x):
        settings = {"param_dtype": x.dtype, "force_float32_reductions": False}
        h = nn.Dense(4)(x)
        h = nn.silu(nn.LayerNorm(use_fast_variance=False, **settings)(h))
        h = nn.RMSNorm(**settings)(nn.Dense(4)(h))
        return nn.Dense(2)(jax.nn.gelu(h, approximate=False))


def layer_norms(p, x):
    p = p["params"]
    h = dense(x, p["Dense_0"]["kernel"], p["Dense_0"]["bias"])
    h = scaled(normalised(h, EPS), p["LayerNorm_0"]["scale"], p["LayerNorm_0"]["bias"])
    h = [z / (1 + mpmath.exp(-z)) for z in h]
    h = dense(h, p["Dense_1"]["kernel"], p["Dense_1"]["bias"])
    h = scaled(normalised(h, EPS, centre=False), p["RMSNorm_0"]["scale"])
    h = [z / 2 * (1 + mpmath.erf(z / mpmath.sqrt(2))) for z in h]
    return dense(h, p["Dense_2"]["kernel"], p["Dense_2"]["bias"])


class Pooled(nn.Module):
    """A convolution in two groups, a norm of each, maxima of windows."""

    @nn.compact
    def __call__(self, x):
        h = nn.Conv(4, (2,), padding="VALID")(x)
        settings = {"param_dtype": x.dtype, "force_float32_reductions": False}
        h = nn.GroupNorm(2, use_fast_variance=False, **settings)(h)
        h = nn.relu(nn.max_pool(h, (2,), (2,)))
        return nn.Dense(2)(h.reshape(h.shape[0], -1))


def pooled(p, x):
    p = p["params"]
    kernel, bias = p["Conv_0"]["kernel"], p["Conv_0"]["bias"]
    rows = [
        [mpmath.fsum(x[t + k][i] * kernel[k][i][o] for k in range(2) for i in range(2)) + bias[o] for o in range(4)]
        for t in range(len(x) - 1)
    ]
    for group in ((0, 1), (2, 3)):
        flat = normalised([row[o] for row in rows for o in group], EPS)
        for t, row in enumerate(rows):
            for k, o in enumerate(group):
                row[o] = flat[2 * t + k]
    rows = [scaled(row, p["GroupNorm_0"]["scale"], p["GroupNorm_0"]["bias"]) for row in rows]
    h = [max(0, rows[2 * t][o], rows[2 * t + 1][o]) for t in range(len(rows) // 2) for o in range(4)]
    return dense(h, p["Dense_0"]["kernel"], p["Dense_0"]["bias"])


def transformer(p, x):
    """`models.Transformer` with one layer and two heads."""
    p = p["params"]
    layer = jax.tree.map(lambda a: a[0], p["layers"], is_leaf=lambda a: isinstance(a, np.ndarray))
    t, d, heads = len(x), len(p["embedding"]["embedding"][0]), 2
    h = [
        [p["embedding"]["embedding"][token][k] + p["positions"]["embedding"][i][k] for k in range(d)]
        for i, token in enumerate(x)
    ]

    def norm(rows, q):
        return [scaled(normalised(row, EPS), q["scale"], q["bias"]) for row in rows]

    split = [
        dense(row, layer["query_key_value"]["kernel"], layer["query_key_value"]["bias"])
        for row in norm(h, layer["norm_attention"])
    ]
    size = d // heads
    mixed = [[mpmath.mpf(0)] * d for _ in range(t)]
    for head in range(heads):
        query, key, value = (
            [row[part * d + head * size : part * d + (head + 1) * size] for row in split] for part in range(3)
        )
        for i in range(t):
            scores = [
                mpmath.exp(mpmath.fsum(a * b for a, b in zip(query[i], key[j], strict=True)) * mpmath.mpf(size**-0.5))
                for j in range(i + 1)
            ]
            total = mpmath.fsum(scores)
            for k in range(size):
                mixed[i][head * size + k] = mpmath.fsum(scores[j] * value[j][k] for j in range(i + 1)) / total
    h = [
        [a + b for a, b in zip(row, dense(m, layer["mixed"]["kernel"], layer["mixed"]["bias"]), strict=True)]
        for row, m in zip(h, mixed, strict=True)
    ]
    wide = [
        [gelu_in_jax(z) for z in dense(row, layer["wide"]["kernel"], layer["wide"]["bias"])]
        for row in norm(h, layer["norm_dense"])
    ]
    h = [
        [a + b for a, b in zip(row, dense(w, layer["narrow"]["kernel"], layer["narrow"]["bias"]), strict=True)]
        for row, w in zip(h, wide, strict=True)
    ]
    return [out for row in norm(h, p["norm"]) for out in dense(row, p["head"]["kernel"])]


def gelu_in_jax(z):
    """With the two constants that JAX holds, as the float64 that they are."""
    root, cube = (mpmath.mpf(value) for value in GELU)
    return z * (mpmath.mpf(0.5) * (1 + mpmath.tanh(root * (z + cube * z**3))))


def equinox_network():
    first, second = eqx.nn.Linear(3, 4, key=jax.random.key(0)), eqx.nn.Linear(4, 2, key=jax.random.key(1))
    norm = eqx.nn.LayerNorm(4)
    apply_fn = lambda p, x: jax.vmap(lambda row: p[2](jax.nn.softplus(p[1](p[0](row)))))(x)  # noqa: E731
    return apply_fn, (first, norm, second)


def equinox_by_hand(p, x):
    first, norm, second = p
    turn = lambda w: [list(column) for column in zip(*w, strict=True)]  # noqa: E731
    h = dense(x, turn(first.weight), first.bias)
    h = scaled(normalised(h, 1e-5), norm.weight, norm.bias)
    return dense([mpmath.log(1 + mpmath.exp(z)) for z in h], turn(second.weight), second.bias)


def haiku_network():
    def network(x):
        h = hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Linear(4)(x))
        return hk.Linear(2)(jnp.tanh(h))

    made = hk.without_apply_rng(hk.transform(network))
    return made.apply, made.init(jax.random.key(0), jnp.ones((1, 3)))


def haiku_by_hand(p, x):
    h = dense(x, p["linear"]["w"], p["linear"]["b"])
    h = scaled(normalised(h, 1e-5), p["layer_norm"]["scale"], p["layer_norm"]["offset"])
    return dense([mpmath.tanh(z) for z in h], p["linear_1"]["w"], p["linear_1"]["b"])


def flax_network(model, x):
    return model.apply, model.init(jax.random.key(3), jnp.asarray(x))


TOKENS = np.array([[1, 0, 2], [2, 2, 1]], np.int32)
SMALL = Transformer(3, width=4, layers=1, heads=2, length=3)


def flat_transformer():
    apply_fn = lambda p, x: SMALL.apply(p, x).reshape(x.shape[0], -1)  # noqa: E731
    return apply_fn, SMALL.init(jax.random.key(0), jnp.asarray(TOKENS))


CASES = {
    "layer norms": (lambda: flax_network(LayerNorms(), X), layer_norms, X := normal(2, 3)),
    "pooled": (lambda: flax_network(Pooled(), XS), pooled, XS := normal(2, 5, 2)),
    "transformer": (flat_transformer, transformer, TOKENS),
    "equinox": (equinox_network, equinox_by_hand, X),
    "haiku": (haiku_network, haiku_by_hand, X),
}


def moved(params):
    """Parameters away from the ones and zeros that norms begin with, in float64."""
    rng = np.random.default_rng(1)

    def move(a):
        known = eqx.is_array(a) and jnp.issubdtype(a.dtype, jnp.floating)
        return np.asarray(a, np.float64) + 0.3 * rng.normal(size=a.shape) if known else a

    return jax.tree.map(move, params)


def precise_jacobian(by_hand, params, x):
    """Rows (n c) of central differences in mpmath, as a list of lists; x is one sample after the other."""
    leaves, tree = jax.tree.flatten(params)
    wide = [np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(a)) for a in leaves]
    samples = [np.asarray(one).tolist() for one in x]
    if np.asarray(x).dtype.kind == "f":
        samples = [np.vectorize(mpmath.mpf, otypes=[object])(np.asarray(one)) for one in x]
    step, columns = mpmath.mpf(10) ** -50, []
    for leaf in wide:
        flat = leaf.reshape(-1)
        for k in range(flat.size):
            kept, both = flat[k], []
            for sign in (1, -1):
                flat[k] = kept + sign * step
                both.append([out for one in samples for out in by_hand(jax.tree.unflatten(tree, wide), one)])
            flat[k] = kept
            columns.append([(a - b) / (2 * step) for a, b in zip(*both, strict=True)])
    return [list(row) for row in zip(*columns, strict=True)]


@pytest.fixture(scope="module", params=CASES)
def case(request):
    make, by_hand, x = CASES[request.param]
    apply_fn, params = make()
    params = moved(params)
    with mp.workdps(DIGITS):
        precise = precise_jacobian(by_hand, params, x)
    return apply_fn, params, x, precise


def test_rows_hold_those_of_a_hundred_digits(case):
    apply_fn, params, x, precise = case
    with jax.enable_x64(True):
        wide = parameters.split(params)
        closed = jacobian.traced(apply_fn, wide, x)
        rows = [jacobian.sample_rows(closed, wide.arrays, [x[i : i + 1]]) for i in range(len(x))]
    c = len(precise) // len(x)
    with mp.workdps(DIGITS):
        for i, row in enumerate(precise):
            found = rows[i // c]
            start = 0
            for part, error in zip(found.leaves, found.errors, strict=True):
                off = mpmath.sqrt(
                    mpmath.fsum((mpmath.mpf(float(a)) - b) ** 2 for a, b in zip(part[i % c], row[start:], strict=False))
                )
                assert off <= mpmath.mpf(float(error[i % c])) + mpmath.mpf(10) ** -45
                start += part.shape[1]
            assert start == len(row)


def test_the_proved_interval_holds_the_eigenvalue_of_a_hundred_digits(case):
    apply_fn, params, x, precise = case
    found = diagnostics.empirical_ntk_min_eig(apply_fn, params, x)
    with mp.workdps(DIGITS):
        j = mpmath.matrix(precise)
        exact = min(mpmath.eigsy(j * j.T, eigvals_only=True))
        assert found.proved
        assert mpmath.mpf(found.lower) <= exact <= mpmath.mpf(found.upper)
    assert found.lower > 0
    assert found.upper - found.lower <= 1e-6 * found.value


def test_a_kernel_that_is_off_is_told_by_its_bound(case):
    apply_fn, params, x, _ = case
    theta = linalg.as_symmetric(np.asarray(empirical_ntk(apply_fn, params, x)))
    right = assembly_bound(apply_fn, params, x, theta)
    off = RNG.normal(size=theta.shape) * np.abs(theta).max() * 1e-6
    wrong = assembly_bound(apply_fn, params, x, linalg.as_symmetric(theta + off + off.T))
    distance = np.linalg.norm(off + off.T, 2)
    assert wrong.assembly_error >= distance - right.assembly_error
    assert right.assembly_error < 1e-3 * distance


def test_a_residual_network_is_proved_on_images():
    model = ResNet(width=2, stages=2, blocks=1, groups=2, outputs=2)
    x = normal(2, 6, 6, 3).astype(np.float32)
    params = model.init(jax.random.key(0), x[:1])
    found = diagnostics.empirical_ntk_min_eig(model.apply, params, x)
    assert found.proved
    assert found.upper - found.lower <= 1e-2 * found.lower
    assert any("whole numbers below 2⁵³" in text for text in found.assumptions)


@pytest.mark.parametrize(
    ("apply_fn", "text"),
    [
        (lambda p, x: jnp.sort(x @ p), "sort has no rule"),
        (lambda p, x: jnp.abs(jnp.tanh(x @ p) - jnp.tanh(x @ p)), "kink or a jump"),
        (lambda p, x: (x @ p).astype(jnp.float32), "rounds"),
    ],
)
def test_without_a_bound_the_reason_is_said(apply_fn, text):
    with np.errstate(all="ignore"):
        found = diagnostics.certified_min_eig(apply_fn, normal(3, 2), normal(2, 3), np.eye(4))
    assert not found.proved
    assert text in found.reason


def test_a_proof_that_takes_long_is_made_on_demand(monkeypatch):
    apply_fn, params = equinox_network()
    theta = np.asarray(empirical_ntk(apply_fn, params, X))
    monkeypatch.setattr("lplr_jax.proofs.assembly.MOST_WORK", 1e5)
    bound, why = bound_or_reason(apply_fn, params, X, theta)
    assert bound is None
    assert 'seconds of two cores, and proof="always"' in why
    assert bound_or_reason(apply_fn, params, X, theta, proof="always")[0].finite
    assert "never" in bound_or_reason(apply_fn, params, X, theta, proof="never")[1]
    with pytest.raises(ValueError, match=r"proof must be one of .*got 'maybe'"):
        diagnostics.empirical_ntk_min_eig(apply_fn, params, X, proof="maybe")


def test_more_digits_are_tried_as_far_as_the_work_goes(monkeypatch):
    """A map that doubles errors at every step: fewer than 15 digits tell nothing of it."""

    def apply_fn(p, x):
        step = lambda h, _: (3.9 * h * (1 - h), None)  # noqa: E731
        return jax.lax.scan(step, jax.nn.sigmoid(x @ p), None, length=150)[0]

    params, x = normal(3, 1) / 4, normal(2, 3)
    with jax.enable_x64(True):
        theta = np.asarray(empirical_ntk(apply_fn, params, x))
        most = jacobian.work(jacobian.traced(apply_fn, parameters.split(params), x, 2).jaxpr)
        tried = []
        value = jacobian.interpreter.value
        monkeypatch.setattr(jacobian.interpreter, "value", lambda a, places: tried.append(places) or value(a, places))
        wide = parameters.split(params)
        with pytest.raises(UndecidedError, match='overflows; proof="always" tries with more digits than 12'):
            jacobian.enclosed_bound(apply_fn, wide, x, theta, most_work=1.01 * most)
        assert sorted(set(tried)) == [6, 8, 10, 12]
        bound = jacobian.enclosed_bound(apply_fn, wide, x, theta, most_work=np.inf)
        assert max(tried) > 12
    assert bound.factor_error < 1e-8 * np.sqrt(np.trace(theta))


def test_a_kink_that_more_digits_may_tell_is_said():
    apply_fn = lambda p, x: jax.nn.relu(jnp.tanh(x @ p) ** 2 - jnp.tanh(x @ p) * jnp.tanh(x @ p))  # noqa: E731
    with jax.enable_x64(True):
        wide = parameters.split(normal(3, 2))
        most = jacobian.work(jacobian.traced(apply_fn, wide, X, 2).jaxpr)
        with pytest.raises(UndecidedError, match='kink or a jump; proof="always" tries with more digits than 12'):
            jacobian.enclosed_bound(apply_fn, wide, X, np.eye(4), most_work=1.01 * most)


@pytest.mark.parametrize(
    ("function", "nanoseconds"),
    [
        # A function of an entry at 6 digits, on one core: what is asked for is that no more is spent than is counted.
        (lambda x: jax.scipy.special.erf(x), 20000),
        (lambda x: jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (100,), (1,), "SAME"), 10000),
    ],
)
def test_costly_entries_are_counted(function, nanoseconds):
    with jax.enable_x64(True):
        counted = jacobian.work(jax.make_jaxpr(function)(np.ones(10**4)).jaxpr)
    assert counted >= nanoseconds * 10**4


def test_a_product_of_many_factors_is_counted_by_its_factors():
    with jax.enable_x64(True):
        many, few = (jacobian.work(jax.make_jaxpr(lambda x: jnp.prod(x))(np.ones(n)).jaxpr) for n in (1000, 10))
    assert many >= 50 * few


def test_samples_go_together_or_one_by_one(monkeypatch):
    apply_fn, params = equinox_network()
    x = normal(7, 3)
    theta = np.asarray(empirical_ntk(apply_fn, params, x))
    found = []
    for most in (1, 3, 64):
        monkeypatch.setattr(jacobian, "_MOST", most)
        monkeypatch.setattr(jacobian, "_bounds", programs.Kept(8))
        found.append(assembly_bound(apply_fn, params, x, theta))
    for bound in found:
        assert bound.assembly_error == pytest.approx(found[0].assembly_error, rel=1e-6)
        assert bound.factor_error <= 1e-8 * np.sqrt(np.trace(theta))


def test_a_branch_that_not_all_samples_take_is_evaluated_one_by_one():
    def apply_fn(p, x):
        def one(row):
            inverse = lambda z: 1.0 / z  # noqa: E731
            return jnp.tanh(jax.lax.cond(row[0] > 0, inverse, lambda z: z, row[0]) * p)

        return jax.vmap(one)(x) if x.shape[0] > 1 else one(x[0])[None]

    x = np.array([[2.0], [0.0], [-1.0]])
    theta = np.asarray(empirical_ntk(apply_fn, normal(2), x))
    assert assembly_bound(apply_fn, normal(2), x, theta) is not None


def test_a_jacobian_beyond_the_memory_is_said(monkeypatch):
    apply_fn, params = equinox_network()
    monkeypatch.setattr(jacobian, "budget", lambda _: 1000)
    _, why = bound_or_reason(apply_fn, params, X, np.eye(4))
    assert "the Jacobian of 4 rows and" in why


def test_no_digits_are_enough_for_a_relu_at_zero():
    apply_fn = lambda p, x: jax.nn.relu(jnp.tanh(x @ p) ** 2 - jnp.tanh(x @ p) * jnp.tanh(x @ p))  # noqa: E731
    with jax.enable_x64(True):
        wide = parameters.split(normal(3, 2))
        closed = jacobian.traced(apply_fn, wide, X)
        with pytest.raises(UndecidedError, match="kink"):
            jacobian.sample_rows(closed, wide.arrays, [X[:1]])


@pytest.mark.parametrize(
    ("proof", "known"), [("auto", [True, False]), ("always", [True, True]), ("never", [False] * 2)]
)
def test_a_run_proves_where_it_is_asked_to(proof, known):
    import optax

    apply_fn, params = equinox_network()
    y = normal(2, 2)
    problem = Problem(apply_fn, params, X.astype(np.float32), y.astype(np.float32))
    probes = Probes(at=[0, 2], hessian=0, search=0, proof=proof)
    record = train(problem, optax.sgd(1e-3), steps=2, probes=probes)
    assert np.isfinite(record["ntk_assembly_error"]).tolist() == known
    outcome = {verdict.claim: verdict.outcome for verdict in verify(record)}["ntk_positive"]
    assert (outcome == "proved") == known[0]


@pytest.mark.parametrize("beside", [False, True])
def test_layers_without_units_are_no_obstacle(beside):
    """The kernel is that of what is beside them: x xᵀ of a linear branch, or 1 of a last bias and one sample."""

    def apply_fn(p, x):
        return jnp.tanh(x @ p[0]) @ p[1] + (x @ p[2] if beside else p[2])

    x = normal(2, 3) if beside else normal(1, 3)
    params = [np.zeros((3, 0)), np.zeros((0, 1)), np.ones((3, 1)) if beside else np.ones((1, 1))]
    found = diagnostics.empirical_ntk_min_eig(apply_fn, params, x)
    assert found.proved
    exact = np.linalg.svd(x)[1].min() ** 2 if beside else 1.0
    assert found.lower <= exact * (1 + 1e-14)
    assert found.upper >= exact * (1 - 1e-14)
    assert found.upper - found.lower <= 1e-8 * exact
