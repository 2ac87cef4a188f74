"""The kernel on several devices: eight simulated ones in one process."""

import json
import os
import subprocess
import sys

import pytest

COMMON = """
import json
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import Mesh

def model(params, x):
    h = jnp.tanh(x @ params["in"])
    h = h * jnp.broadcast_to(params["scale"], h.shape)
    return jnp.tanh(h @ params["shared"]) @ params["shared"].T[:, :2]

rng = np.random.default_rng(0)
params = {"in": rng.normal(size=(5, 6)), "scale": rng.normal(size=6), "shared": rng.normal(size=(6, 6))}

def samples(n):
    return np.random.default_rng(1).normal(size=(n, 5))

def naive(x1, x2):
    def rows(x):
        jac = jax.jacrev(lambda p: model(p, x).reshape(-1))(params)
        return jnp.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in jax.tree.leaves(jac)], axis=1)
    with jax.default_device(jax.local_devices()[0]):
        return np.asarray(rows(jnp.asarray(x1)) @ rows(jnp.asarray(x2)).T)
"""

EIGHT = (
    COMMON
    + """
from lplr_jax.ntk import engine
assert jax.device_count() == 8
seen = {}
with jax.enable_x64(True):
    want = naive(samples(40), samples(40))
    one = Mesh(np.asarray(jax.devices()[:1]), ("rows",))
    for n in (40, 36, 35):
        theta = engine.kernel(model, params, samples(n))
        got = np.asarray(theta)
        seen[f"error {n}"] = float(np.abs(got - want[: 2 * n, : 2 * n]).max() / np.abs(want).max())
        seen[f"symmetric {n}"] = bool((got == got.T).all())
        seen[f"shards {n}"] = sorted({tuple(s.data.shape) for s in theta.addressable_shards})
        seen[f"devices {n}"] = len({s.device for s in theta.addressable_shards})
    odd = Mesh(np.asarray(jax.devices()[:5]), ("rows",))
    got = np.asarray(engine.kernel(model, params, samples(40), mesh=odd))
    seen["error odd"] = float(np.abs(got - want).max() / np.abs(want).max())
    seen["symmetric odd"] = bool((got == got.T).all())
    # More samples for each device than a tile holds: a device then loops over tiles of its own block. Θ = x xᵀ here.
    many = samples(8 * 300)
    got = np.asarray(engine.kernel(lambda w, x: x @ w, np.ones((5, 1)), many))
    seen["error tiles"] = float(np.abs(got - many @ many.T).max() / np.abs(many @ many.T).max())
    seen["symmetric tiles"] = bool((got == got.T).all())
    got = np.asarray(engine.kernel(model, params, samples(40), mesh=one))
    seen["error one"] = float(np.abs(got - want).max() / np.abs(want).max())
    got = np.asarray(engine.kernel(model, params, samples(40)[:16], samples(40)[16:27]))
    seen["error x2"] = float(np.abs(got - want[:32, 32:54]).max() / np.abs(want).max())
    blocks = want.reshape(40, 2, 40, 2)
    got = np.asarray(engine.kernel(model, params, samples(40), outputs="trace"))
    seen["error trace"] = float(np.abs(got - np.einsum("iojo->ij", blocks)).max() / np.abs(want).max())
    got = np.asarray(engine.kernel(model, params, samples(35), outputs="diagonal"))
    seen["error diagonal"] = float(np.abs(got - np.diagonal(want).reshape(40, 2)[:35]).max() / np.abs(want).max())
    # XLA counts the floating-point operations of the program that one device runs, but the body of a loop once: 32
    # samples of 2 outputs are one tile.
    flops, original = {}, engine.sharded.kernel
    def counted(run, arrays, first, second):
        count = run.whole.lower(arrays, run.consts, first, second).compile().cost_analysis()["flops"]
        flops[run.call.mesh.size] = count
        return original(run, arrays, first, second)
    engine.sharded.kernel = counted
    for mesh in (one, None):
        engine.kernel(lambda p, x: model(p, x), params, samples(40)[:32], mesh=mesh)
    engine.sharded.kernel = original
    seen["share of the work"] = flops[8] / flops[1]
    try:
        engine.kernel(model, params, samples(40), memory_budget=3000)
    except ValueError as error:
        seen["refused"] = str(error)
print(json.dumps(seen))
"""
)


def environment(devices):
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@pytest.fixture(scope="module")
def eight():
    done = subprocess.run(
        [sys.executable, "-c", EIGHT], capture_output=True, text=True, check=False, env=environment(8)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_eight_devices_agree_with_the_jacobian(eight):
    errors = {name: value for name, value in eight.items() if name.startswith("error")}
    assert len(errors) == 9
    assert max(errors.values()) <= 1e-12, errors


def test_result_is_exactly_symmetric_on_any_number_of_devices(eight):
    assert all(value for name, value in eight.items() if name.startswith("symmetric"))


def test_each_device_holds_its_rows(eight):
    assert eight["devices 40"] == 8
    assert eight["shards 40"] == [[10, 80]]
    assert eight["shards 36"] == [[9, 72]]  # of two outputs each
    assert eight["shards 35"] == [[35, 35]]  # eight does not divide 70: a quarter, on two devices each
    assert eight["devices 35"] == 8


def test_each_device_does_its_share_of_the_work(eight):
    # An eighth of the sweeps; of 64 blocks each device forms 5 (8 of them twice), where one device forms all 64.
    assert eight["share of the work"] <= 1 / 8 + 0.02


def test_budget_of_a_device_that_holds_too_little_is_refused(eight):
    assert "memory_budget = 3000 bytes for each device" in eight["refused"]
