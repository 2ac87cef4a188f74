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
# # From checkpoints to verdicts
#
# A run is over, and its checkpoints are all there is. They say what held at those points, and nothing of the steps between.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import lplr_jax as lp

rng = np.random.default_rng(0)
x = rng.normal(size=(60, 6)).astype("float32")
y = np.sin(x[:, :1]).astype("float32")
params = {
    "hidden": {"w": jnp.asarray(rng.normal(size=(6, 48)) / 2, "float32"), "b": jnp.zeros(48)},
    "out": jnp.asarray(rng.normal(size=(48, 1)) / 7, "float32"),
}


def apply_fn(params, x):
    return jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"]) @ params["out"]


problem = lp.Problem(apply_fn, params, x, y, name="checkpoints")

# %% [markdown]
# Somebody's loop, which kept an npz file now and then: one array for each leaf, named by its path.

# %%
folder = Path(tempfile.mkdtemp())
step_of = jax.jit(lambda p: jax.tree.map(lambda v, g: v - 0.1 * g, p, jax.grad(problem.objective.value)(p, x, y)))
for step in range(201):
    if step % 50 == 0:
        leaves = {"hidden.w": params["hidden"]["w"], "hidden.b": params["hidden"]["b"], "out": params["out"]}
        np.savez(folder / f"step_{step}.npz", **{name: np.asarray(value) for name, value in leaves.items()})
    params = step_of(params)
sorted(path.name for path in folder.iterdir())

# %% [markdown]
# The record of the checkpoints. `linear_rate` is about steps, of which none was seen: it is undecided, and says why.

# %%
record = lp.measure(problem, folder)
verdicts = lp.verify(record)
verdicts

# %%
print(verdicts["linear_rate"].note)

# %%
lp.plot(record)
