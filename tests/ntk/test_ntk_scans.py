"""Leaves that act inside loops, against the Jacobian: slices of a stack, and weights that all steps share."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense_kernel import ALL, TOLERANCE, check, head, normal
from flax import linen as nn
from jax import lax

from lplr_jax.ntk import engine, unroll

SLICED, WHOLE = "matrix product in 3 steps of its own slices: pairs", "matrix product in 3 steps: pairs"


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def spread(b, like):
    return jnp.broadcast_to(b, like.shape)


def layer(h, leaves):
    out = h @ leaves["w"]
    return jnp.tanh(out + spread(leaves["b"], out))


LAYERS = {"w": np.random.default_rng(1).normal(size=(3, 8, 8)), "b": np.random.default_rng(2).normal(size=(3, 8))}


def stacked(p, x, **settings):
    return head(lax.scan(lambda h, leaves: (layer(h, leaves), h[:, :2]), x, p, **settings)[0])


def looped(p, x):
    for number in range(3):
        x = layer(x, jax.tree.map(lambda leaf, at=number: leaf[at], p))
    return head(x)


@pytest.mark.parametrize(
    "settings", [{}, *(pytest.param({"unroll": unroll}, marks=pytest.mark.slow) for unroll in (2, True))]
)
def test_stacked_layers(settings):
    rules = {"['w']": SLICED, "['b']": "bias: δ δᵀ"}
    check(functools.partial(stacked, **settings), LAYERS, normal(3, 4, 8), rules, ALL if not settings else ("full",))


def test_stacked_layers_cost_no_more_than_a_loop():
    x = normal(3, 4, 8)
    scan, loop = (engine.explain(f, LAYERS, x) for f in (stacked, looped))
    assert scan.bytes == loop.bytes
    weights = [next(leaf for leaf in found.leaves if leaf.path == "['w']") for found in (scan, loop)]
    # Pairs of positions count the product of both Gram blocks for every pair of outputs, c² of them where a loop has 1.
    assert weights[0].multiply_adds - weights[1].multiply_adds == 3 * 10 * (2**2 - 1)
    np.testing.assert_allclose(engine.kernel(stacked, LAYERS, x), engine.kernel(looped, LAYERS, x), rtol=1e-12)
    traced = engine.trace(stacked, LAYERS, x)
    plan = engine.make_plan(traced.program, traced.leaves, engine.workload("full", traced.c, (4,)))
    assert [term.leaves for term in plan.terms] == [(1, 0)]  # the biases share the cotangents of the weights


def test_backwards_over_a_stack():
    check(functools.partial(stacked, reverse=True), LAYERS, normal(3, 4, 8), {"['w']": SLICED})


CELL = {
    name: np.random.default_rng(seed).normal(size=shape) / 3
    for seed, (name, shape) in enumerate({"u": (16, 16), "w": (9, 16), "b": (16,), "out": (16, 4)}.items())
}


def recurrent(p, x, reverse=False, keep=False):
    def step(h, piece):
        h = h @ p["u"] + piece @ p["w"]
        h = jnp.tanh(h + spread(p["b"], h))
        return h, h

    start = jnp.zeros((x.shape[0], 16), x.dtype)
    last, states = lax.scan(step, start, jnp.swapaxes(x, 0, 1), reverse=reverse)
    return head(jnp.swapaxes(states, 0, 1) @ p["out"] if keep else last @ p["out"])


@pytest.mark.parametrize(
    ("reverse", "keep"), [(True, False), *(pytest.param(r, True, marks=pytest.mark.slow) for r in (False, True))]
)
def test_recurrence(reverse, keep):
    rules = {
        "['u']": WHOLE,
        "['w']": WHOLE,
        "['b']": "bias in 3 steps: per-example",
        "['out']": "" if keep else "dense",
    }
    apply_fn = functools.partial(recurrent, reverse=reverse, keep=keep)
    check(apply_fn, CELL, normal(5, 4, 3, 9), rules, ALL if keep else ("full",))


def test_weights_that_share_cotangents_share_their_products():
    traced = engine.trace(recurrent, CELL, normal(5, 4, 3, 9))
    plan = engine.make_plan(traced.program, traced.leaves, engine.workload("full", traced.c, (4,)))
    names = sorted(CELL)
    assert {names.index("u"), names.index("w")} in [set(term.leaves) for term in plan.terms]


@pytest.mark.slow
def test_many_steps_take_gradients():
    check(recurrent, CELL, normal(5, 3, 30, 9), {"['u']": "matrix product in 30 steps: per-example gradients"})


def test_layers_outside_and_time_inside():
    """Each layer's weights are sliced by the outer loop and shared by the steps of the inner one."""

    def apply_fn(p, x):
        def one_layer(sequence, leaves):
            def step(h, piece):
                h = jnp.tanh(h @ leaves["u"] + piece @ leaves["w"])
                return h, h

            return lax.scan(step, jnp.zeros((x.shape[0], 8), x.dtype), sequence)[1], None

        return head(jnp.swapaxes(lax.scan(one_layer, jnp.swapaxes(x, 0, 1), p)[0], 0, 1))

    params = {"u": normal(1, 2, 8, 8) / 3, "w": normal(2, 2, 8, 8)}
    rule = "matrix product in 2 steps of its own slices in 3 steps: pairs of positions"
    check(apply_fn, params, normal(3, 3, 3, 8), {"['u']": rule, "['w']": rule}, ALL)


@pytest.mark.slow
def test_the_same_layers_over_and_over():
    """The outer loop takes the stack whole, the inner one slices it."""

    def apply_fn(p, x):
        def again(h, _):
            return lax.scan(lambda h, leaves: (layer(h, leaves), None), h, p)[0], None

        return head(lax.scan(again, x, None, length=2)[0])

    rule = "matrix product in 2 steps in 3 steps of its own slices: pairs of positions"
    check(apply_fn, LAYERS, normal(3, 3, 8), {"['w']": rule}, ALL)


def test_loop_with_a_fixed_number_of_steps():
    def closed_over(p, x):
        return head(lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p) * (1 + i), x))

    def carried(p, x):
        return head(lax.fori_loop(0, 3, lambda i, state: (jnp.tanh(state[0] @ state[1]), state[1]), (x, p))[0])

    for apply_fn in (closed_over, carried):
        check(apply_fn, normal(1, 16, 16) / 4, normal(2, 3, 16), {"": WHOLE})


def test_weights_that_the_loop_changes_fall_back():
    def apply_fn(p, x):
        def step(state, _):
            h, w = state
            return (jnp.tanh(h @ w), jnp.sin(w)), None

        return head(lax.scan(step, (x, p), None, length=3)[0][0])

    check(apply_fn, normal(1, 6, 6), normal(2, 3, 6), {"": "Jacobian (reverse mode)"})
    reasons = [leaf.reason for leaf in engine.explain(apply_fn, normal(1, 6, 6), normal(2, 3, 6)).leaves]
    assert reasons == ["is handed on in `scan`, which has no rule"]


@pytest.mark.slow
def test_learnt_start_of_a_loop():
    def apply_fn(p, x):
        start = jnp.broadcast_to(p["start"], (x.shape[0], 8))
        return head(lax.scan(lambda h, piece: (jnp.tanh(h @ p["u"] + piece), None), start, jnp.swapaxes(x, 0, 1))[0])

    params = {"start": normal(1, 1, 8), "u": normal(2, 8, 8) / 3}
    check(apply_fn, params, normal(3, 3, 2, 8), {"['start']": "Jacobian (reverse mode)", "['u']": "in 2 steps: pairs"})


BODIES = {
    "moved": lambda h, p, t: h @ p.T[::-1],
    "scaled by a step": lambda h, p, t: h @ (p * t),
    "masked": lambda h, p, t: h @ (p * jnp.asarray(np.arange(256.0).reshape(16, 16) % 3)),
    "used twice": lambda h, p, t: jnp.tanh(h @ p) @ p.T,
    "wrapped": lambda h, p, t: jax.checkpoint(jax.jit(lambda h, p: jnp.tanh(h @ p)))(h, p),
    "scale": lambda h, p, t: h * spread(p[0], h),
    "bias": lambda h, p, t: spread(p[0], h) - h,
    "looked up": lambda h, p, t: h + p[(jnp.abs(h[:, 0]) * 50).astype(jnp.int32) % 16],
    "convolution": lambda h, p, t: lax.conv_general_dilated(
        h[:, :, None], p.reshape(2, 1, 128)[:, :, :1], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
    )[..., 0],
}


QUICK = {("scaled by a step", True), ("used twice", False), ("looked up", False)}


@pytest.mark.parametrize(
    ("name", "sliced"),
    [
        pytest.param(name, sliced, marks=() if (name, sliced) in QUICK else pytest.mark.slow)
        for name in BODIES
        for sliced in (False, True)
    ],
)
def test_bodies(name, sliced):
    def apply_fn(p, x):
        def step(h, scanned):
            t, mine = scanned
            return jnp.tanh(BODIES[name](h, mine if sliced else p, t)), None

        times = jnp.arange(1.0, 3.0)
        return head(lax.scan(step, x, (times, p if sliced else times))[0])

    p = normal(1, 2, 16, 16) if sliced else normal(1, 16, 16)
    served = {
        "bias": "bias",
        "moved": "pairs of positions",
        "scaled by a step": "pairs",
        "used twice": "pairs",
        "wrapped": "pairs",
    }
    check(apply_fn, p / 4, normal(2, 3, 16), {"": served.get(name, "in 2 steps")})


def test_slices_and_the_whole_stack():
    """One layer of the stack is used once more behind the loop: the entries meet in no common order."""

    def apply_fn(p, x):
        return head(stacked({"w": p, "b": LAYERS["b"]}, x) + jnp.tanh(x @ p[1])[:, :2])

    check(apply_fn, LAYERS["w"], normal(3, 3, 8), {"": "per-example gradients"})


@pytest.mark.slow
def test_derivative_of_a_loop():
    """The loop and its reverse, in which the weights stand on the other side."""

    def apply_fn(p, x):
        def potential(a):
            return jnp.sum(lax.scan(lambda h, _: (jnp.tanh(h @ p), None), a, None, length=2)[0])

        return head(jax.grad(potential)(x))

    check(apply_fn, normal(1, 16, 16) / 4, normal(2, 3, 16), {"": "matrix product in 2 steps: pairs"}, ALL)


@pytest.mark.slow
def test_rules_of_its_own_fall_back():
    def step(h, p):
        return jnp.tanh(h @ p)

    custom = jax.custom_vjp(step)
    custom.defvjp(lambda h, p: (step(h, p), (h, p)), lambda kept, ct: jax.vjp(step, *kept)[1](ct))

    def apply_fn(p, x):
        return head(lax.scan(lambda h, _: (custom(h, p), None), x, None, length=2)[0])

    check(apply_fn, normal(1, 6, 6), normal(2, 3, 6), {"": "Jacobian (reverse mode)"})


def test_loops_before_and_around_a_while():
    def until(h):
        return lax.while_loop(lambda state: state[0] < 2, lambda state: (state[0] + 1, jnp.sin(state[1])), (0, h))[1]

    def before(p, x):
        return head(until(lax.scan(lambda h, _: (jnp.tanh(h @ p), None), x, None, length=2)[0]))

    def around(p, x):
        return head(lax.scan(lambda h, _: (until(jnp.tanh(h @ p)), None), x, None, length=2)[0])

    for apply_fn in (before, around):
        params, x = normal(1, 6, 6), normal(2, 3, 6)
        rows = jax.jacfwd(lambda p, f=apply_fn, x=x: f(p, x).reshape(-1))(params).reshape(6, -1)
        want = np.asarray(rows @ rows.T)
        got = engine.kernel(apply_fn, params, x)
        assert np.max(np.abs(got - want)) <= TOLERANCE * np.max(np.abs(want))
        assert [leaf.rule for leaf in engine.explain(apply_fn, params, x).leaves] == ["Jacobian (forward mode)"]


@pytest.mark.slow
def test_no_steps_and_results_that_nothing_reads():
    def apply_fn(p, x):
        none, _ = lax.scan(lambda h, _: (h @ p, None), x, None, length=0)
        (used, _), (_, kept) = lax.scan(
            lambda state, _: ((jnp.tanh(state[0] @ p), state[1] @ p), (state[1] * 2, state[0][:, :1])),
            (none, x),
            None,
            length=2,
        )
        return head(used + jnp.broadcast_to(kept[0], used.shape))

    check(apply_fn, normal(1, 16, 16) / 4, normal(2, 3, 16), {"": "matrix product in 2 steps"})


class Block(nn.Module):
    @nn.compact
    def __call__(self, h, _):
        h = h + nn.Dense(6, param_dtype="float64")(nn.tanh(nn.Dense(10, param_dtype="float64")(h)))
        return nn.LayerNorm(param_dtype="float64")(h), None


class Stack(nn.Module):
    @nn.compact
    def __call__(self, x):
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return nn.Dense(2, param_dtype="float64")(scanned()(x, None)[0].reshape(x.shape[0], -1))


@pytest.mark.slow
def test_flax_scan_with_remat():
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        x = normal(3, 4, 1, 6)
        params = jax.tree.map(lambda a: a + 0.1, Stack().init(jax.random.key(0), x))
        check(Stack().apply, params, x, {})
        leaves = engine.explain(Stack().apply, params, x).leaves
    kernels = [leaf.rule for leaf in leaves if "kernel" in leaf.path and "Block" in leaf.path]
    assert len(kernels) == 2
    assert all("in 3 steps of its own slices: pairs of positions" in rule for rule in kernels)
    assert not [leaf for leaf in leaves if leaf.rule.startswith("Jacobian")]


@pytest.mark.parametrize("memory_budget", [30_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_result_does_not_depend_on_the_memory_budget(memory_budget):
    x = normal(5, 23, 3, 9)
    want = engine.kernel(recurrent, CELL, x)
    got = engine.kernel(recurrent, CELL, x, memory_budget=memory_budget)
    assert np.max(np.abs(got - want)) <= TOLERANCE * np.max(np.abs(want))


COUNTERS = {
    "by its counter": lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p[i]), x),
    "from the second on": lambda p, x: lax.fori_loop(1, 3, lambda i, h: jnp.tanh(h @ p[i]), x),
    "backwards": lambda p, x: lax.scan(lambda h, i: (jnp.tanh(h @ p[2 - i]), None), x, jnp.arange(3))[0],
    "every other": lambda p, x: lax.fori_loop(0, 2, lambda i, h: jnp.tanh(h @ jnp.take(p, 2 * i, axis=0)), x),
    "handed on": lambda p, x: lax.fori_loop(0, 3, lambda i, s: (jnp.tanh(s[0] @ s[1][i]), s[1]), (x, p))[0],
    "reversed scan": lambda p, x: lax.scan(
        lambda s, _: ((jnp.tanh(s[0] @ p[s[1]]), s[1] + 1), None), (x, 0), jnp.zeros(3), reverse=True
    )[0][0],
    "in two loops": lambda p, x: lax.fori_loop(
        0, 3, lambda i, h: (lambda w: lax.fori_loop(0, 2, lambda j, h: jnp.tanh(h @ w + j), h))(p[i]), x
    ),
    "and whole": lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p[i] + h @ p[0]), x),
    "one step": lambda p, x: lax.fori_loop(2, 3, lambda i, h: jnp.tanh(h @ jnp.take(p, i, axis=0)), x),
    "not evenly": lambda p, x: lax.fori_loop(0, 3, lambda i, h: jnp.tanh(h @ p[i * i % 3]), x),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ("backwards", "in two loops") else pytest.mark.slow) for name in COUNTERS],
)
def test_slices_by_the_counter_of_a_loop(name):
    rules = {"and whole": "matrix product", "not evenly": "Jacobian", "in two loops": "pairs of positions"}
    rules["one step"] = "matrix product in 1 steps of its own slices: (h hᵀ) ∘ (δ δᵀ)"
    rule = rules.get(name, "steps of its own slices: pairs of positions")
    check(lambda p, x: head(COUNTERS[name](p, x)), normal(1, 3, 8, 8) / 3, normal(2, 4, 8), {"": rule})


UNROLLED = {
    "stacked": stacked,
    "backwards": functools.partial(stacked, reverse=True),
    "keeping": lambda p, x: head(
        jnp.swapaxes(lax.scan(lambda h, a: (layer(h, a), layer(h, a)), x, p, reverse=True)[1], 0, 1)
    ),
    "by its counter": lambda p, x: head(
        lax.fori_loop(0, 3, lambda i, h: layer(h, {"w": p["w"][i], "b": p["b"][2 - i]}) + i, x)
    ),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "by its counter" else pytest.mark.slow) for n in UNROLLED]
)
def test_short_scans_of_much_work_are_written_out(name, monkeypatch):
    monkeypatch.setattr(unroll, "WORK", 1)
    check(UNROLLED[name], LAYERS, normal(3, 4, 8), {"['w']": "dense: (h hᵀ) ∘ (δ δᵀ)"}, ("full",))


def test_work_of_a_step_decides_whether_a_scan_is_written_out():
    (scan,) = [op for op in engine.trace(stacked, LAYERS, normal(3, 4, 8)).program.ops if op.name == "scan"]
    assert unroll.multiply_adds(scan.params["jaxpr"]) == 8 * 8
    rules = [engine.explain(stacked, LAYERS, normal(3, n, 8)).leaves[1].rule for n in (15624, 15625)]
    assert ["steps" in rule for rule in rules] == [True, False]
    deep = {"w": np.zeros((9, 8, 8)), "b": np.zeros((9, 8))}
    assert "steps" in engine.explain(stacked, deep, normal(3, 20000, 8)).leaves[1].rule
