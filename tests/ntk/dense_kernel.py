"""The dense kernel, contracted from a Jacobian of every sample: what the rules of the engine are held against."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from lplr_jax.ntk import engine

ALL = ("full", "trace", "diagonal")
TOLERANCE = 1e-13  # products of at most 200 terms, two or three in a chain: 3 · 200 · 1.1e-16 in the worst case


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def head(h, out=2):
    flat = jnp.tanh(h).reshape(h.shape[0], -1)
    return jnp.tanh(flat @ (normal(99, flat.shape[1], out) / math.sqrt(flat.shape[1])))


def dense(apply_fn, params, x):
    """J Jᵀ (n, c, n, c) from vmap over samples of reverse-mode Jacobians."""
    jac = jax.vmap(jax.jacrev(lambda p, one: apply_fn(p, one[None])[0]), (None, 0))(params, x)
    rows = jnp.concatenate([leaf.reshape(*leaf.shape[:2], -1) for leaf in jax.tree.leaves(jac)], axis=2)
    return jnp.einsum("iop,jqp->iojq", rows, rows)


def check(apply_fn, params, x, rules, outputs=("full",)):
    """The kernels asked for agree with the Jacobian, and the plan names the rules."""
    want = np.asarray(jax.jit(functools.partial(dense, apply_fn))(params, x))
    n, c = want.shape[:2]
    wanted = {
        "full": want.reshape(n * c, n * c),
        "trace": np.einsum("iojo->ij", want),
        "diagonal": np.einsum("ioio->io", want),
    }
    for name in outputs:
        got = np.asarray(engine.kernel(apply_fn, params, x, outputs=name))
        assert np.max(np.abs(got - wanted[name])) <= TOLERANCE * np.max(np.abs(wanted[name])), name
    if len(outputs) > 1:
        two = engine.kernel(apply_fn, params, x[:2], x[1:])
        assert np.max(np.abs(two - wanted["full"][: 2 * c, c:])) <= TOLERANCE * np.max(np.abs(wanted["full"]))
    found = {leaf.path: leaf.rule for leaf in engine.explain(apply_fn, params, x).leaves}
    for path, rule in rules.items():
        assert rule in found[path], found
