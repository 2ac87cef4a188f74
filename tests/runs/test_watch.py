"""Any loop becomes a record: verdicts expected from theory, series against the loop's own numbers and closed forms."""

import dataclasses
import itertools
import logging
import os
import signal
import subprocess
import sys

import equinox as eqx
import flax.linen as linen
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lplr_jax import records, theory
from lplr_jax.losses import Squared
from lplr_jax.runs.entries import series
from lplr_jax.runs.loop import train
from lplr_jax.runs.problem import Probes, Problem
from lplr_jax.runs.snapshots import measure
from lplr_jax.runs.watch import Watch, watch

N, D, STEPS = 8, 5, 12
FEW = Probes(every=6, search=0, hessian=0)


def data(seed=0, outputs=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(N, D)).astype(np.float32), rng.normal(size=(N, outputs)).astype(np.float32)


def linen_case(x, c):
    model = linen.Sequential([linen.Dense(6), jnp.tanh, linen.Dense(c)])
    return model.apply, model.init(jax.random.key(0), x)


def nnx_case(x, c):
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(nnx.Linear(D, 6, rngs=rngs), jnp.tanh, nnx.Linear(6, c, rngs=rngs))
    graph, state = nnx.split(model)
    return lambda state, x: nnx.merge(graph, state)(x), state


def equinox_case(x, c):
    params, static = eqx.partition(eqx.nn.MLP(D, c, 6, 1, key=jax.random.key(0)), eqx.is_inexact_array)
    return lambda params, x: jax.vmap(eqx.combine(params, static))(x), params


def haiku_case(x, c):
    net = hk.without_apply_rng(hk.transform(lambda x: hk.nets.MLP([6, c])(x)))
    return net.apply, net.init(jax.random.key(0), x)


def bare_case(x, c):
    params = {"w": jnp.asarray(np.random.default_rng(1).normal(size=(D, c)), jnp.float32), "b": jnp.zeros(c)}
    return lambda p, x: x @ p["w"] + p["b"][None], params


FRAMEWORKS = {"linen": linen_case, "nnx": nnx_case, "equinox": equinox_case, "haiku": haiku_case, "bare": bare_case}

# What Theorem 5.7 says of each is known from what the update is, not from its name.
METHODS = {
    "gradient descent": (lambda: optax.sgd(0.05), "descent"),
    "decreasing step": (lambda: optax.sgd(optax.cosine_decay_schedule(0.05, 2 * STEPS)), "moving"),
    "norm clipping": (lambda: optax.chain(optax.clip_by_global_norm(0.3), optax.sgd(0.05)), "moving"),
    "heavy ball": (lambda: optax.sgd(0.05, momentum=0.9), "heavy ball"),
    "nesterov": (lambda: optax.sgd(0.05, momentum=0.9, nesterov=True), "other"),
    "adam": (lambda: optax.adam(0.01), "other"),
    "adamw": (lambda: optax.adamw(0.01), "other"),
    "lion": (lambda: optax.lion(0.003), "other"),
    "weight decay": (lambda: optax.chain(optax.add_decayed_weights(0.05), optax.sgd(0.05)), "other"),
    "elementwise clipping": (lambda: optax.chain(optax.clip(0.05), optax.sgd(0.05)), "other"),
}


def loop(problem, optimizer, look, steps=STEPS, handed=False, donate=True):
    """Train with an own jitted step that donates its parameters; returns the losses that it saw."""
    gradient = jax.value_and_grad(problem.objective.value)

    def step(params, state, x, y):
        _, grads = gradient(params, x, y)
        with jax.numpy_dtype_promotion("standard"):  # optax's schedules and moments rely on it
            updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0,) if donate else ())
    measure = jax.jit(gradient)
    params, losses = jax.tree.map(jnp.copy, problem.params), []
    state = optimizer.init(params)
    for t in range(steps + 1):
        loss, grads = measure(params, *problem.data)
        losses.append(float(loss))
        look(t, params, **({"loss": loss, "grads": grads} if handed else {}))
        if t < steps:
            params, state = step(params, state, *problem.data)
    return np.array(losses)


def rate(record):
    return next(verdict for verdict in theory.verify(record) if verdict.claim == "linear_rate")


@pytest.mark.parametrize(
    "framework",
    [pytest.param(name, marks=pytest.mark.slow if name in ("linen", "haiku") else ()) for name in FRAMEWORKS],
)
def test_every_framework(framework):
    x, y = data(outputs=2)
    apply_fn, params = FRAMEWORKS[framework](x, 2)
    problem = Problem(apply_fn, params, x, y)
    with watch(problem, probes=FEW) as look:
        losses = loop(problem, optax.sgd(0.05), look)
    record = look.record
    np.testing.assert_array_equal(record["epoch"], np.arange(STEPS + 1))
    # Two programs of one loss: sums over 16 terms of order one in float32.
    np.testing.assert_allclose(record["loss"], losses, rtol=1e-5)
    np.testing.assert_allclose(record["step_size"][:-1], 0.05, rtol=1e-3)
    assert not theory.any_inconsistent(theory.verify(record))


@pytest.mark.parametrize(
    ("method", "handed"),
    [
        pytest.param(method, handed, marks=pytest.mark.slow if handed and METHODS[method][1] != "descent" else ())
        for method, handed in itertools.product(METHODS, (False, True))
    ],
)
def test_every_method(method, handed):
    """A linear model has L_Θ = 0, so gradient descent of a fixed small step is proved and nothing else may be.

    Steps that move along the gradient, and those of heavy ball, have statements of ours, which are not refuted.
    """
    x, y = data()
    x = np.linalg.qr(np.random.default_rng(2).normal(size=(N + 2, N)))[0].T.astype(np.float32)
    problem = Problem(lambda w, x: x @ w, jnp.full((N + 2, 1), 0.1, jnp.float32), x, y, loss=Squared("sum"))
    optimizer, kind = METHODS[method][0](), METHODS[method][1]
    with watch(problem, probes=FEW) as look:
        loop(problem, optimizer, look, handed=handed)
    verdict = rate(look.record)
    if kind == "descent":
        assert verdict.outcome == "proved", verdict
    elif kind in ("moving", "heavy ball"):
        assert verdict.outcome == "not refuted", verdict
        reference = {"moving": "ours (moving step)", "heavy ball": "ours (heavy ball)"}[kind]
        assert verdict.reference == reference, "the paper's rate is that of a fixed step"
    else:
        assert verdict.outcome == "not applicable", verdict
        assert "not along" in verdict.note or "fixed step" in verdict.note
    found = {v.claim: v.outcome for v in theory.verify(look.record)}
    assert found["consistency"] == "proved"
    assert found["local_pl"] == "proved"


@pytest.mark.parametrize("form", ["vector", "column", "pytree of inputs"])
@pytest.mark.parametrize("scale", ["sum", "mean", N / 2, 3.7])
def test_outputs_inputs_and_scales(form, scale):
    x, y = data()
    if form == "vector":
        problem = Problem(lambda w, x: x @ w, jnp.zeros(D), x, y[:, 0], loss=Squared(scale))
    elif form == "column":
        problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1)), x, y, loss=Squared(scale))
    else:
        parts = {"left": x[:, :2], "right": x[:, 2:]}
        problem = Problem(
            lambda w, x: x["left"] @ w["a"] + x["right"] @ w["b"],
            {"a": jnp.zeros((2, 1)), "b": jnp.zeros((D - 2, 1))},
            parts,
            y,
            loss=Squared(scale),
        )
    s = {"sum": 1.0, "mean": float(N)}.get(scale, scale)
    eta = 0.05 * s
    with watch(problem, probes=FEW) as look:
        loop(problem, optax.sgd(eta), look)
    record = look.record
    assert float(record["loss_scale"]) == s
    theta = np.zeros((D, 1))
    for t in range(STEPS + 1):
        r = x.astype(np.float64) @ theta - y
        # Twelve steps in float32 on numbers of order one.
        assert record["loss"][t] == pytest.approx(float(np.sum(r**2)) / (2 * s), rel=1e-5)
        theta = theta - eta * x.T @ r / s
    # No bound is known on the rounding of a kernel of several inputs.
    whole = next(v for v in theory.verify(record) if v.claim == "consistency").outcome
    assert whole == ("not refuted" if form == "pytree of inputs" else "proved")


@pytest.mark.filterwarnings("ignore:apply_fn rounds to a unit")
@pytest.mark.parametrize("inner", ["weak", "float32", "bfloat16"])
def test_a_program_narrower_than_its_parameters_is_no_contradiction(inner):
    """θ in float64 and a loss in less: by a cast, or as an array of a Python number alone gives way to its data."""
    x, y = data()
    narrow = jnp.float32 if inner == "weak" else jnp.dtype(inner)
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        start = jnp.full((D, 1), 0.1) if inner == "weak" else jnp.full((D, 1), 0.1, "float64")
        cast = (lambda a: a) if inner == "weak" else (lambda a: a.astype(narrow))
        problem = Problem(lambda w, x: jnp.tanh(cast(x) @ cast(w)), start, x, y, loss=Squared("sum"))
        record = train(problem, optax.sgd(0.05), steps=8, probes=FEW)
    eps = 2.0**-52 if inner == "weak" else float(jnp.finfo(narrow).eps)
    assert float(record["parameter_eps"]) == float(record["probe_eps"]) == eps
    verdict = theory.verify(record)["consistency"]
    assert not verdict.inconsistent, verdict
    if inner != "weak":
        wide = dataclasses.replace(record, arrays={**record.arrays, "probe_eps": np.asarray(2.0**-52)})
        assert theory.verify(wide)["consistency"].inconsistent, "rounding inside is what makes the gap"


def test_the_last_step_of_a_loop_on_python_numbers_computes_as_the_others_do():
    """Step 7 is handed over between two points of the record, so only the end of the watch looks at it."""
    x, y = data()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("standard"):
        problem = Problem(lambda w, x: x @ w, jnp.full((D, 1), 0.1), x, y, loss=Squared("sum"))
        with watch(problem, probes=Probes(at=[0], search=0, hessian=0), every=5) as look:
            for t in (0, 1, 5, 6, 7):
                look(t, jnp.full((D, 1), 0.1 + t / 70))
    expected = float(np.sum((x.astype(np.float64) @ np.full((D, 1), 0.1 + 7 / 70) - y) ** 2)) / 2
    # In float32 the sum is off by 1e-8 at the least: 0.2 alone has no float32.
    assert float(look.record["loss"][-1]) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("every", [1, 5])
def test_arrays_that_the_loop_moves_in_place_are_those_that_were_handed_over(every):
    """NumPy's arrays are moved where they are: θ_0, the probes and the last step are what they were at the call."""
    x, y = data()
    start = {"a": np.linspace(-1, 1, D, dtype=np.float32)[:, None], "b": np.ones((1, 1), np.float32)}

    def record(in_place):
        params = jax.tree.map(np.copy, start)
        problem = Problem(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x, y)
        gradient = jax.jit(jax.grad(problem.objective.value))
        with watch(problem, probes=Probes(at=[0, 4], search=0, hessian=0), every=every) as look:
            for t in range(8):
                look(t, params)
                moves = jax.tree.map(lambda g: np.float32(0.1) * np.asarray(g), gradient(params, x, y))
                if in_place:
                    for name, move in moves.items():
                        params[name] -= move
                else:
                    params = {name: params[name] - move for name, move in moves.items()}
        return look.record

    moved, anew = record(True), record(False)
    assert moved["probe_epoch"].tolist() == [0, 4, 7]
    for name in moved.arrays:
        np.testing.assert_array_equal(moved[name], anew[name], err_msg=name)


@pytest.mark.parametrize("kind", ["equinox", "tree"])
def test_functions_among_the_parameters_are_carried_along(kind):
    """A whole Equinox module, and a tree that holds a function, against the same network of arrays alone."""
    x, y = data()
    module = eqx.nn.MLP(D, 1, 6, 1, activation=jnp.tanh, key=jax.random.key(0))
    arrays, static = eqx.partition(module, eqx.is_inexact_array)
    if kind == "equinox":
        params, apply_fn = module, lambda m, x: jax.vmap(m)(x)
    else:
        params = {"w": [(layer.weight, layer.bias) for layer in module.layers], "act": jnp.tanh, "name": "two"}
        apply_fn = lambda p, x: p["act"](x @ p["w"][0][0].T + p["w"][0][1][None]) @ p["w"][1][0].T + p["w"][1][1][None]  # noqa: E731
    alone = Problem(lambda a, x: jax.vmap(eqx.combine(a, static))(x), arrays, x, y)
    problem = Problem(apply_fn, params, x, y)
    assert (problem.p, problem.c) == (alone.p, alone.c)
    rtol = 1e-5  # two programs of one network in float32
    want = train(alone, optax.sgd(0.05), steps=6, probes=FEW)
    np.testing.assert_allclose(train(problem, optax.sgd(0.05), steps=6, probes=FEW)["loss"], want["loss"], rtol=rtol)
    points, gradient = {}, eqx.filter_grad(lambda p: jnp.mean((apply_fn(p, x) - y) ** 2) / 2)
    with watch(problem, probes=FEW) as look:
        for t in range(7):
            points[t] = params
            look(t, params)
            params = eqx.apply_updates(params, jax.tree.map(lambda g: -0.05 * g, gradient(params)))
    np.testing.assert_allclose(look.record["loss"], want["loss"], rtol=rtol)
    np.testing.assert_allclose(look.record["step_size"][:-1], 0.05, rtol=1e-3)
    snapshots = measure(problem, points, probes=FEW)
    np.testing.assert_array_equal(snapshots["loss"], look.record["loss"])


def test_every_kth_step_sees_the_one_after_it():
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1)), x, y)
    with watch(problem, probes=Probes(at=[0], search=0, hessian=0), every=5) as look:
        loop(problem, optax.sgd(0.05), look)
    record = look.record
    assert record["epoch"].tolist() == [0, 1, 5, 6, 10, 11, 12]
    known = np.isfinite(record["step_size"])
    assert record["epoch"][known].tolist() == [0, 5, 10]
    np.testing.assert_allclose(record["step_size"][known], 0.05, rtol=1e-4)
    assert record.diverged_at is None
    assert rate(record).outcome != "proved"


def test_steps_of_a_thousand_million_allocate_nothing():
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1)), x, y)
    look = watch(problem, probes=Probes(at=[0, 10**9], search=0, hessian=0))
    for t in (0, 1, 10**9, 10**9 + 1):
        look(t, problem.params + np.float32(t > 1))
    record = look.close()
    assert record["epoch"].tolist() == [0, 1, 10**9, 10**9 + 1]
    assert record["probe_epoch"].tolist() == [0, 10**9, 10**9 + 1]
    assert rate(record).outcome != "proved"


def test_scanned_chunks_give_the_same_record():
    x, y = data()
    apply_fn, params = bare_case(x, 1)
    problem = Problem(apply_fn, params, x, y)

    def chunk(problem, params, initial, length):
        def body(params, _):
            grads = jax.grad(problem.objective.value)(params, problem.x, problem.y)
            after = jax.tree.map(lambda p, g: p - np.float32(0.05) * g, params, grads)
            return after, series(problem, params, initial, after)

        return jax.lax.scan(body, params, length=length)

    scan = jax.jit(chunk, static_argnums=3)
    look, theta = watch(problem, probes=FEW), problem.params
    for start, length in look.chunks(STEPS):
        look(start, theta)
        theta, entries = scan(problem, theta, problem.params, length)
        look.extend(start, entries)
    look(STEPS, theta)
    scanned = look.close()
    with watch(problem, probes=FEW) as plain:
        loop(problem, optax.sgd(0.05), plain)
    for name in ("epoch", "probe_epoch"):
        np.testing.assert_array_equal(scanned[name], plain.record[name])
    for name in ("loss", "grad_sq_norm", "drift"):
        np.testing.assert_allclose(scanned[name], plain.record[name], rtol=2e-5, atol=1e-7)


def test_own_loop_and_watched_loop_agree():
    x, y = data()
    apply_fn, params = linen_case(x, 1)
    problem = Problem(apply_fn, params, x, y)
    own = train(problem, optax.sgd(0.05), steps=STEPS, probes=FEW)
    with watch(problem, probes=FEW) as look:
        loop(problem, optax.sgd(0.05), look)
    assert own["probe_epoch"].tolist() == [0, 6, 12]
    for name in ("loss", "grad_sq_norm", "drift", "ntk_rayleigh", "probe_loss"):
        # Two programs for one step: rounding of float32 over twelve steps.
        np.testing.assert_allclose(look.record[name], own[name], rtol=1e-4, atol=1e-6)


def test_without_a_length_the_hessian_doubles():
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1)), x, y)
    with watch(problem, probes=Probes(every=2, search=0, hessian=9)) as look:
        loop(problem, optax.sgd(0.05), look, steps=13)
    sharpness = look.record["sharpness"]
    # Probes 1, 2, 4 and 8 of 0, 2, ..., 12, 13; the eighth is the last one too.
    assert np.flatnonzero(np.isfinite(sharpness)).tolist() == [0, 1, 3, 7]
    top = np.linalg.eigvalsh(x.T.astype(np.float64) @ x / N)[-1]
    np.testing.assert_allclose(sharpness[[0, 1, 3, 7]], top, rtol=1e-5)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda loss, grads, before: (2 * loss, jax.tree.map(lambda g: 2 * g, grads)), "2 times as large"),
        (lambda loss, grads, before: before, "that of step 5"),
        (lambda loss, grads, before: (loss + 1, grads), "not that of all data"),
    ],
    ids=["a constant factor", "one step late", "another loss"],
)
def test_a_wrong_loss_is_told(caplog, wrong, words):
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1)), x, y)
    w, before = problem.params, None
    look = watch(problem, probes=FEW)
    with caplog.at_level(logging.WARNING):
        for t in range(7):
            own = jax.value_and_grad(problem.objective.value)(w, x, y)
            loss, grads = wrong(*own, before or own)
            look(t, w, loss=loss, grads=grads)
            before, w = own, w - 0.05 * own[1]
    assert any(words in message for message in caplog.messages), caplog.messages


@pytest.mark.usefixtures("without_type_checks")
def test_what_cannot_be_watched_is_one_sentence():
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1), jnp.float32), x, y)
    look = watch(problem, probes=FEW)
    with pytest.raises(TypeError, match="inside a transformation of JAX"):
        jax.jit(lambda w: look(0, w))(problem.params)
    gone = problem.params + 0
    gone.delete()
    with pytest.raises(ValueError, match="step 0 were deleted"):
        look(0, gone)
    with pytest.raises(ValueError, match=r"float32 of shape \(5, 1\) there, float32 of shape \(4, 1\) here"):
        look(0, problem.params[:4])
    with pytest.raises(ValueError, match="not those of the problem"):
        look(0, problem.params + 1)
    with pytest.raises(ValueError, match="no step was handed over"):
        look.close()
    for step in ("0", None, 0.0, False, -1, np.nan, 2**53):
        with pytest.raises(ValueError, match="step must be "):
            look(step, problem.params)
    look(0, problem.params)
    with pytest.raises(ValueError, match="steps must ascend: got step 0 after step 0"):
        look(0, problem.params)
    with pytest.raises(TypeError, match="belong together"):
        look(1, problem.params, loss=1.0)
    with pytest.raises(RuntimeError, match="still open"):
        _ = look.record


def test_divergence_ends_the_measurements(caplog):
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1), jnp.float32), x, y)
    with watch(problem, probes=Probes(every=4, search=0, hessian=0)) as look:
        loop(problem, optax.sgd(1e20), look)
    record = look.record
    assert record.diverged_at is not None
    assert record["probe_epoch"].tolist() == [0]
    assert np.isfinite(record["loss"][: record.diverged_at]).all()


def test_a_loop_that_fails_keeps_what_there_is():
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1), jnp.float32), x, y)
    look = watch(problem, probes=FEW)
    with pytest.raises(ZeroDivisionError), look:  # noqa: PT012
        for t in range(4):
            look(t, problem.params)
        raise ZeroDivisionError
    assert look.record["epoch"].tolist() == [0, 1, 2, 3]


def kept(problem, folder, first, last, w):
    look = Watch(problem, probes=FEW, out=folder)
    for t in range(first, last + 1):
        look(t, w)
        w = w - np.float32(0.05) * jax.grad(problem.objective.value)(w, *problem.data)
    return look, w


@pytest.mark.parametrize(
    ("first", "words"), [(4, "cut off from step 4"), (7, "goes on from step 6"), (9, "7 to 8 were not seen")]
)
def test_a_watched_loop_goes_on_in_its_folder(tmp_path, caplog, first, words):
    """A loop that stops after step 8 has saved up to its probe at step 6."""
    x, y = data()
    problem = Problem(lambda w, x: x @ w, jnp.zeros((D, 1)), x, y)
    trajectory = [problem.params]
    for _ in range(12):
        w = trajectory[-1]
        trajectory.append(w - np.float32(0.05) * jax.grad(problem.objective.value)(w, x, y))
    look, _ = kept(problem, tmp_path / "run", 0, 8, problem.params)
    look._stack.close()  # the process dies: the lock goes, nothing is closed
    with caplog.at_level(logging.WARNING):
        look, _ = kept(problem, tmp_path / "run", first, 12, trajectory[first])
        record = look.close()
    assert any(words in message for message in caplog.messages)
    seen = [*range(min(first, 7)), *range(first, 13)]
    assert record["epoch"].tolist() == seen
    for t, loss in zip(seen, record["loss"], strict=True):
        r = x @ np.asarray(trajectory[t], np.float64) - y
        assert loss == pytest.approx(np.sum(r**2) / (2 * N), rel=1e-5)
    sizes = dict(zip(seen, record["step_size"], strict=True))
    assert np.isfinite([sizes[t] for t in seen if t + 1 in seen]).all()
    with pytest.raises(ValueError, match="finished record"):
        Watch(problem, probes=FEW, out=tmp_path / "run")


LOOP = """
import os, signal, sys
import jax, jax.numpy as jnp, numpy as np
import lplr_jax as lp
from lplr_jax.measurement.probe import KernelProbe

folder, first, dies_at, where = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
rng = np.random.default_rng(0)
x, y = rng.normal(size=(6, 4)).astype("f4"), rng.normal(size=(6, 1)).astype("f4")
problem = lp.Problem(lambda w, x: jnp.tanh(x @ w), jnp.full((4, 1), 0.1, "f4"), x, y, name="loop")
measure = KernelProbe.__call__

def killed(self, params, epoch):
    values = measure(self, params, epoch)
    if where == "during" and epoch == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    return values

KernelProbe.__call__ = killed
gradient = jax.jit(jax.grad(problem.objective.value))
w = problem.params
watch = lp.watch(problem, probes=lp.Probes(every=4, search=0, hessian=0), out=folder)
for step in range(15):
    if step >= first:
        watch(step, w)
    if where == "between" and step == dies_at:
        os.kill(os.getpid(), signal.SIGKILL)
    w = w - np.float32(0.1) * gradient(w, x, y)
watch.close()
"""


@pytest.mark.parametrize(
    ("dies_at", "where", "again_from"),
    [
        pytest.param(10, "between", 0, marks=pytest.mark.slow),
        pytest.param(8, "during", 0, marks=pytest.mark.slow),
        (10, "between", 9),
    ],
)
def test_a_watched_loop_survives_sigkill(tmp_path, dies_at, where, again_from):
    """Started again from step 0 the record is that of a loop left alone; from its own checkpoint, all that was seen."""

    def run(folder, first, *fate):
        command = [sys.executable, "-c", LOOP, str(folder), str(first), *map(str, fate)]
        return subprocess.run(command, check=False, capture_output=True, env={**os.environ, "JAX_PLATFORMS": "cpu"})

    assert run(tmp_path / "killed", 0, dies_at, where).returncode == -signal.SIGKILL
    again = run(tmp_path / "killed", again_from, -1, "never")
    assert again.returncode == 0, again.stderr
    alone = run(tmp_path / "alone", 0, -1, "never")
    assert alone.returncode == 0, alone.stderr
    killed, whole = records.load(tmp_path / "killed"), records.load(tmp_path / "alone")
    if again_from == 0:
        assert killed.checksum() == whole.checksum()
        return
    # The probe of step 8 was saved, and with it all before; step 9 is where the loop goes on.
    assert killed["epoch"].tolist() == whole["epoch"].tolist()
    for name in ("loss", "drift", "step_size", "ntk_min_eig", "ntk_pair_shift"):
        np.testing.assert_array_equal(killed[name], whole[name])
    assert killed.provenance["resumed_at"] == [8]
