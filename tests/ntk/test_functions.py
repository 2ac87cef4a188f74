"""What a function may contain: captured values, narrow types, rules of its own, masks, noise; and who may call it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lplr_jax import closures, diagnostics
from lplr_jax.linalg import UntrustedError
from lplr_jax.ntk import empirical_ntk, engine, explain
from lplr_jax.ntk.empirical import NarrowingWarning

RNG = np.random.default_rng(0)
X, W = RNG.normal(size=(4, 3)), RNG.normal(size=(3, 1))
SLOPES = 1 - np.tanh(X @ W) ** 2
TANH = (X @ X.T) * (SLOPES @ SLOPES.T)


# --- captured values


class Scaled:
    def __init__(self):
        self.scale = 1.0

    def __call__(self, w, x):
        return self.scale * (x @ w)


SETTINGS = {"scale": 1.0}


def of_a_global(w, x):
    return SETTINGS["scale"] * (x @ w)


def of_a_helper(w, x):
    return of_a_global(w, x)


def through_a_closure():
    held = {"scale": 1.0}
    return (lambda w, x: held["scale"] * (x @ w)), held


def through_an_array():
    held = {"scale": np.array(1.0)}

    def move(value):
        held["scale"][...] = value

    return (lambda w, x: jnp.asarray(held["scale"]) * (x @ w)), move


def beside_something_unknown():
    held, unknown = {"scale": 1.0}, memoryview(np.array([0.0]))  # then the function is traced anew

    def apply_fn(w, x):
        return held["scale"] * (x @ w) + float(unknown[0])

    return apply_fn, held


def cases():
    scaled = Scaled()
    closure, held = through_a_closure()
    array, move = through_an_array()
    unknown, other = beside_something_unknown()
    return {
        "closure": (closure, lambda v: held.update(scale=v)),
        "global": (of_a_global, lambda v: SETTINGS.update(scale=v)),
        "helper": (of_a_helper, lambda v: SETTINGS.update(scale=v)),
        "attribute": (scaled, lambda v: setattr(scaled, "scale", v)),
        "method": (scaled.__call__, lambda v: setattr(scaled, "scale", v)),
        "array": (array, move),
        "unknown": (unknown, lambda v: other.update(scale=v)),
    }


@pytest.mark.parametrize("kernel", ["engine", "neural-tangents"])
@pytest.mark.parametrize("name", list(cases()))
def test_a_captured_value_that_changes_changes_the_kernel(name, kernel):
    apply_fn, move = cases()[name]
    for scale in (1.0, 10.0, 1.0):
        move(scale)
        theta = empirical_ntk(apply_fn, W, X, kernel=kernel)
        np.testing.assert_allclose(theta, scale**2 * X @ X.T, rtol=1e-13)
        largest = diagnostics.ntk_extremes(apply_fn, W, X).largest
        assert largest == pytest.approx(scale**2 * np.linalg.eigvalsh(X @ X.T)[-1], rel=1e-9)
        point = diagnostics.evaluate_point(apply_fn, W, X, np.zeros((4, 1)), loss_scale="sum")
        assert point.loss == pytest.approx(0.5 * scale**2 * np.sum((X @ W) ** 2), rel=1e-12)
    move(1.0)


def test_a_derivative_rule_that_changes_changes_the_kernel():
    held = {"slope": 1.0}

    @jax.custom_vjp
    def act(z):
        return 1.0 * z

    act.defvjp(lambda z: (act(z), None), lambda _, g: (held["slope"] * g,))
    for slope in (1.0, 3.0):
        held["slope"] = slope
        np.testing.assert_allclose(empirical_ntk(lambda w, x: act(x @ w), W, X), slope**2 * X @ X.T, rtol=1e-13)


def test_equal_functions_share_compiled_code():
    empirical_ntk(lambda w, x: jnp.tanh(x @ w), W, X)
    before = len(engine._runs)
    empirical_ntk(lambda w, x: jnp.tanh(x @ w), 2 * W, X)
    assert len(engine._runs) == before


def test_fingerprints_know_what_they_do_not_know():
    assert closures.fingerprint(lambda: next(iter([]))) is not None
    assert closures.fingerprint(jnp.tanh) is not None
    # Random numbers of the process, attributes of the user's modules, iterators.
    calls = iter(range(3))
    assert closures.fingerprint(lambda: next(calls)) is None
    assert closures.fingerprint(lambda: np.random.default_rng()) is None


# --- narrow types


def bfloat16_network(params, x):
    for weight in params[:-1]:
        x = jax.nn.softplus(x.astype("bfloat16") @ weight.astype("bfloat16"))
    return x.astype(jnp.float64) @ params[-1]


def wide_network(params, x):
    for weight in params[:-1]:
        x = jax.nn.softplus(x @ weight)
    return x @ params[-1]


def narrow_cases():
    def float32(w, x):
        return x.astype("float32") @ w.astype("float32")

    def preferred(w, x):
        return jax.lax.dot_general(x, w, (((1,), (0,)), ((), ())), preferred_element_type=jnp.float32)

    def reduced(w, x):
        return x @ jax.lax.reduce_precision(w, 11, 20)

    def attention(w, x):
        q = (x @ w)[:, None, None, :]
        key = jnp.broadcast_to(jnp.linspace(-1, 1, 6, dtype=x.dtype).reshape(1, 6, 1, 1), (x.shape[0], 6, 1, 1))
        return jax.nn.dot_product_attention(q, key, key)[:, 0, 0, :]

    return {"cast": float32, "preferred": preferred, "reduced": reduced, "attention": attention}


@pytest.mark.parametrize("name", list(narrow_cases()))
def test_rounding_inside_is_told_and_leaves_the_sign_open(name):
    apply_fn = narrow_cases()[name]
    near = np.vstack([X[:2], X[:1] + 1e-6])
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        with pytest.warns(NarrowingWarning, match=r"rounds to a unit of .* first in `.*test_functions.py, line \d+"):
            theta = np.asarray(empirical_ntk(apply_fn, W, near))
        least = diagnostics.empirical_ntk_min_eig(apply_fn, W, near)
        assert "rounds to a unit" in str(explain(apply_fn, W, near))
    assert theta.dtype == np.float64
    assert least.sign == 0
    assert not least.proved
    assert "widened by an estimate" in least.reason
    # The three rows are dependent up to 1e-6, and so is the kernel of any function of x w.
    assert least.lower <= 1e-11 <= least.upper


def test_the_interval_of_a_bfloat16_network_holds_the_wide_kernel():
    params = [RNG.normal(size=(3, 8)) / 2, RNG.normal(size=(8, 8)) / 3, RNG.normal(size=(8, 1))]
    with jax.numpy_dtype_promotion("standard"):
        least = diagnostics.empirical_ntk_min_eig(bfloat16_network, params, X)
        wide = diagnostics.empirical_ntk_min_eig(wide_network, params, X)
    assert wide.proved
    assert abs(least.value - wide.value) > 1e-4  # the rounding shows
    assert least.lower <= wide.value <= least.upper


def test_wide_functions_and_rounded_inputs_pass_without_a_word():
    data = X.astype(np.float32)
    traced = engine.trace(lambda w, x: jnp.tanh(x @ w), W.astype(np.float32), data)
    assert traced.narrow is None
    # What is rounded before it meets θ belongs to the function.
    with jax.numpy_dtype_promotion("standard"):
        np.testing.assert_allclose(
            empirical_ntk(lambda w, x: x.astype("float32").astype(w.dtype) @ w, W, X), data.astype(float) @ data.T
        )


def test_narrow_networks_are_not_taken_for_coupled_ones():
    params = [RNG.normal(size=(784, 512)) / 28, RNG.normal(size=(512, 1))]
    x = RNG.normal(size=(6, 784))

    def apply_fn(params, x):
        return jnp.tanh(x.astype("float32") @ params[0].astype("float32")).astype(x.dtype) @ params[1]

    with pytest.warns(NarrowingWarning):
        assert empirical_ntk(apply_fn, params, x).shape == (6, 6)


@pytest.mark.parametrize("dtype", [jnp.float32, np.float32, np.dtype("float32"), "float32"])
def test_dtype_is_a_name_or_a_dtype(dtype):
    assert empirical_ntk(lambda w, x: x @ w, W, X, dtype=dtype).dtype == np.float32


@pytest.mark.parametrize("kernel", ["engine", "neural-tangents"])
def test_foreign_byte_orders_and_trees_of_inputs(kernel):
    table, ids = np.arange(12.0).reshape(4, 3).astype(">f8"), np.array([0, 3, 3], ">i4")
    x = {"ids": ids, "by": np.full((3, 1), 2.0)}
    got = np.asarray(empirical_ntk(lambda e, x: e[x["ids"]] * jnp.tile(x["by"], 3), table, x, kernel=kernel))
    same = (ids[:, None] == ids).astype(float)
    np.testing.assert_array_equal(got, 4 * np.kron(same, np.eye(3)))


# --- rules of their own


@jax.custom_vjp
def reverse_only(z):
    return jnp.tanh(z)


reverse_only.defvjp(lambda z: (jnp.tanh(z), z), lambda z, g: (g * (1 - jnp.tanh(z) ** 2),))


@jax.custom_vjp
def root(a):
    """√a by Newton's method, whose loop has no reverse mode."""
    return jax.lax.while_loop(
        lambda c: jnp.any(jnp.abs(c * c - a) > 1e-12), lambda c: (c + a / c) / 2, jnp.maximum(a, 1.0)
    )


root.defvjp(lambda a: (root(a), root(a)), lambda z, g: (g / (2 * z),))


def forward_only(w, x):
    """tanh of x w, the product formed in a loop whose length depends on nothing, yet is not known to JAX."""
    return jax.lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, jnp.tanh(x @ w)), (0, 0 * (x @ w)))[1]


@pytest.mark.parametrize(
    ("apply_fn", "modes"),
    [(lambda w, x: reverse_only(x @ w), "reverse"), (forward_only, "forward")],
    ids=["reverse", "forward"],
)
def test_programs_with_one_mode_of_differentiation(apply_fn, modes):
    np.testing.assert_allclose(empirical_ntk(apply_fn, W, X), TANH, rtol=1e-12)
    if modes == "reverse":
        largest = diagnostics.ntk_extremes(apply_fn, W, X).largest
        assert largest == pytest.approx(np.linalg.eigvalsh(TANH)[-1], rel=1e-9)
    else:
        with pytest.raises(ValueError, match="no derivative in reverse mode"):
            diagnostics.ntk_extremes(apply_fn, W, X)

    def coupled(w, x):
        return apply_fn(w, x - jnp.broadcast_to(x.mean(axis=0), x.shape))

    with pytest.raises(ValueError, match="depends on the other samples"):
        empirical_ntk(coupled, W, X)


def test_the_rule_decides_and_not_the_body_under_it():
    table = np.array([[1.0], [4.0]])
    got = empirical_ntk(lambda e, i: root(e[i]), table, np.array([0, 1]))
    np.testing.assert_allclose(got, np.diag([0.25, 0.0625]), rtol=1e-12)
    rules = [leaf.rule for leaf in explain(lambda e, i: root(e[i]), table, np.array([0, 1])).leaves]
    assert "forward" not in rules[0]


# --- who calls, and where from


def test_inside_a_transformation_one_sentence_says_what_to_do():
    def take(w):
        return empirical_ntk(lambda v, x: x @ v, w, X)

    def take_captured(w):
        return empirical_ntk(lambda v, x: (x @ v) * w[0, 0].astype(x.dtype), W, X)

    stacked = np.stack([W, W]).astype(np.float32)
    for call in (
        lambda: jax.vmap(take)(stacked),
        lambda: jax.jit(take)(W.astype(np.float32)),
        lambda: jax.jit(take_captured)(W.astype(np.float32)),
        lambda: jax.lax.map(take, stacked),
        lambda: jax.jit(lambda w: diagnostics.ntk_extremes(lambda v, x: x @ v, w, X).largest)(W.astype(np.float32)),
        lambda: jax.grad(lambda w: diagnostics.hessian_extremes(lambda v: jnp.sum(v**4), w).largest)(
            W.astype(np.float32)
        ),
    ):
        with pytest.raises(TypeError, match=r"cannot run inside jax.jit, jax.vmap.*call it outside"):
            call()


def test_sharding_constraints_are_no_part_of_the_function():
    mesh = jax.make_mesh((1,), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    place = NamedSharding(mesh, P("rows"))

    def apply_fn(w, x):
        return jnp.tanh(jax.lax.with_sharding_constraint(x @ w, place))

    np.testing.assert_allclose(empirical_ntk(apply_fn, W, X), TANH, rtol=1e-12)
    np.testing.assert_allclose(empirical_ntk(apply_fn, W, X, mesh=mesh), TANH, rtol=1e-12)


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (KeyError("layer"), r"error of its own \(KeyError: 'layer'\)$"),
        (ZeroDivisionError("division by zero"), r"error of its own \(ZeroDivisionError"),
        (NotImplementedError("later"), r"error of its own \(NotImplementedError: later"),
    ],
)
def test_errors_of_the_function_are_said_to_be_its_own(raised, message):
    def apply_fn(w, x):
        raise raised

    with pytest.raises(ValueError, match=message) as caught:
        empirical_ntk(apply_fn, W, X)
    assert "needs the shape" not in str(caught.value)
    assert caught.value.__cause__ is raised


# --- samples


def unit(w, x):
    z = x @ w
    return z / (1e-6 + jnp.linalg.norm(z, axis=1, keepdims=True))


@pytest.mark.parametrize("kernel", ["engine", "neural-tangents"])
@pytest.mark.parametrize("outputs", ["full", "trace", "diagonal"])
def test_samples_without_a_kernel_are_named(outputs, kernel):
    x = X.copy()
    x[2] = 0  # the norm has no derivative there
    weights = np.hstack([W, W + 1])
    with jax.numpy_rank_promotion("allow"):
        with pytest.raises(UntrustedError, match=r"NaN or infinite at sample 2: the derivative"):
            empirical_ntk(unit, weights, x, outputs=outputs, kernel=kernel)
        if outputs != "diagonal":
            with pytest.raises(UntrustedError, match=r"sample 2 of x2"):
                empirical_ntk(unit, weights, X, x, outputs=outputs, kernel=kernel)
            with pytest.raises(UntrustedError, match=r"sample 2 of x1"):
                empirical_ntk(unit, weights, x, X, outputs=outputs, kernel=kernel)


def test_infinite_inputs_are_data_where_the_outputs_are_finite():
    mask = np.array([[0.0, 0.0, -np.inf], [0.0, -np.inf, 0.0], [0.0, 0.0, 0.0], [-np.inf, 0.0, 0.0]])

    def apply_fn(params, x):
        share = jax.nn.softmax(x["mask"] + jnp.broadcast_to(params["also"], x["mask"].shape), axis=1)
        return (share * x["values"]) @ params["w"]

    share = np.exp(mask) / np.exp(mask).sum(axis=1, keepdims=True)
    params = {"w": W, "also": np.array([0.0, 0.0, -np.inf])}
    shut = np.exp(mask + params["also"])
    shut = shut / shut.sum(axis=1, keepdims=True) * X
    x = {"mask": mask, "values": X}
    got = empirical_ntk(apply_fn, params, x, trainable={"w": True, "also": False})
    np.testing.assert_allclose(got, shut @ shut.T, rtol=1e-12)
    params["also"] = np.zeros(3)
    got = empirical_ntk(apply_fn, params, x, trainable={"w": True, "also": False})
    np.testing.assert_allclose(got, (share * X) @ (share * X).T, rtol=1e-12)
    with pytest.raises(UntrustedError, match=r"outputs for samples 0, 1, 3.*x holds infinite entries"):
        empirical_ntk(lambda w, x: x @ w, W, mask)
    with pytest.raises(UntrustedError, match=r"in sample 3; clean the data"):
        empirical_ntk(lambda w, x: x @ w, W, np.where(mask == 0, 1.0, np.where(np.arange(4)[:, None] == 3, np.nan, 1)))


def test_noise_with_a_fixed_key_is_refused():
    def dropout(w, x):
        h = jnp.tanh(x @ w)
        return (h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape).astype(h.dtype)).sum(axis=1, keepdims=True)

    with pytest.raises(ValueError, match="depends on its place in the batch, as under dropout"):
        empirical_ntk(dropout, RNG.normal(size=(3, 20)), X)


@pytest.mark.parametrize("rows", [40, 4000])
def test_more_rows_than_parameters_leave_nothing_to_compute(rows, monkeypatch):
    x = RNG.normal(size=(rows, 3))

    def refuse(*args, **settings):
        raise AssertionError("a kernel was formed")

    monkeypatch.setattr(engine, "evaluate", refuse)
    least = diagnostics.empirical_ntk_min_eig(lambda w, x: jnp.tanh(x @ w), np.hstack([W] * 10), x)
    assert (least.value, least.lower, least.upper, least.proved, least.converged) == (0, 0, 0, True, True)
    assert "more rows than parameters" in least.assumptions[0]


def test_an_assembled_kernel_of_more_rows_than_parameters_keeps_its_assembly_error():
    theta = np.asarray(empirical_ntk(lambda w, x: x @ w, W, X))
    least = diagnostics.certified_min_eig(lambda w, x: x @ w, W, X, theta)
    assert (least.lower, least.upper) == (0, 0)
    assert 0 < least.assembly_error < 1e-10
