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
# # What the theorem says about my run
#
# Theorem 5.4 asks for three things: λ_0 > 0, a Lipschitz kernel, and L_Θ r < λ_0. A run on which all of them are proved, and one on which the last
# one fails while the loss falls all the same.

# %%
import jax.numpy as jnp
import numpy as np
import optax

import lplr_jax as lp

rng = np.random.default_rng(1)
x = rng.normal(size=(20, 30)).astype("float32")
y = rng.normal(size=(20, 1)).astype("float32")

# %% [markdown]
# A model that is affine in its parameters has a constant kernel: L_Θ = 0, which is read off its program.

# %%
linear = lp.Problem(lambda w, x: x @ w, jnp.zeros((30, 1)), x, y, name="linear")
of_linear = lp.verify(lp.train(linear, optax.sgd(0.2), steps=200))
of_linear

# %% [markdown]
# A network of two layers. The kernel moves by more than λ_0, so the theorem says nothing: it is silent, not false.

# %%
params = {
    "w": jnp.asarray(rng.normal(size=(30, 40)) / 5, "float32"),
    "v": jnp.asarray(rng.normal(size=(40, 1)), "float32"),
}
network = lp.Problem(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"] / 6, params, x, y, name="network")
record = lp.train(network, optax.sgd(0.2), steps=60)
verdicts = lp.verify(record)
print(lp.theory.reading(verdicts))

# %% [markdown]
# What accounts for the decrease is another statement, PL with a floor, in the leading eigendirections of the kernel:

# %%
print(*lp.theory.story(verdicts, record), sep="\n")

# %%
lp.plot(record)
