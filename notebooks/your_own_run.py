# ---
# jupyter:
#   jupytext:
#     cell_metadata_filter: -all
#     formats: ipynb,py:percent
#     notebook_metadata_filter: jupytext,-jupytext.text_representation.jupytext_version,kernelspec
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A run of your own
#
# An NNX network with 10 outputs on scikit-learn's digits, an optax loop that is yours: record, verdicts, figure.

# %%
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import lplr_jax as lp

digits = load_digits()
x = (digits.data[:200] / 16).astype("float32")
y = np.eye(10, dtype="float32")[digits.target[:200]]

rngs = nnx.Rngs(0)
network = nnx.Sequential(nnx.Linear(64, 64, rngs=rngs), nnx.softplus, nnx.Linear(64, 10, rngs=rngs))
graph, params = nnx.split(network)
problem = lp.Problem(lambda params, x: nnx.merge(graph, params)(x), params, x, y, name="digits")

optimizer = optax.sgd(0.2)
state, step_of = optimizer.init(params), jax.jit(jax.value_and_grad(problem.objective.value))
snapshots = {}
with lp.watch(problem, probes=lp.Probes(every=20, subset=50, hessian=2, search=0)) as watch:
    for step in range(101):
        loss, grads = step_of(params, x, y)
        watch(step, params, loss=loss, grads=grads)
        if step % 50 == 0:
            snapshots[step] = params
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
watch.record

# %% [markdown]
# What the theory's claims come to on this run. The kernel was taken on 50 of the samples, all outputs: a bound of λ_min from above.

# %%
lp.verify(watch.record)

# %%
lp.plot(watch.record)

# %% [markdown]
# ## The same from snapshots
#
# Checkpoints that are there already will do; what lies between them was not seen, and the verdicts say so. Here they are in memory;
# `lp.measure(problem, "ckpts/*")` reads npz files, orbax folders and safetensors.

# %%
few = lp.measure(problem, snapshots, probes=lp.Probes(subset=50, hessian=0, search=0))
next(verdict for verdict in lp.verify(few) if verdict.claim == "linear_rate").note

# %% [markdown]
# ## Equinox, and a scanned loop

# %%
import equinox as eqx

model = eqx.nn.MLP(64, 10, 32, 1, activation=jnp.tanh, key=jax.random.key(0))
params, static = eqx.partition(model, eqx.is_inexact_array)
problem = lp.Problem(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, x, y, name="equinox")


def chunk(problem, params, initial, length):
    def body(params, _):
        grads = jax.grad(problem.objective.value)(params, problem.x, problem.y)
        after = jax.tree.map(lambda p, g: p - 0.2 * g, params, grads)
        return after, lp.series(problem, params, initial, after)

    return jax.lax.scan(body, params, length=length)


scan, watch = (
    jax.jit(chunk, static_argnums=3),
    lp.watch(problem, probes=lp.Probes(every=25, subset=50, hessian=0, search=0)),
)
for start, length in watch.chunks(100):
    watch(start, params)
    params, series = scan(problem, params, problem.params, length)
    watch.extend(start, series)
watch(100, params)
watch.close()
