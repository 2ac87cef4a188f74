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
# # From digits to the four panels
#
# The empirical NTK of an MLP on real digits, a short run, and what it says about local Polyak-Łojasiewicz theory.

# %%
# %matplotlib inline
import jax

from lplr_jax import data, diagnostics, models

digits = data.load("mnist", n_train=200)
digits.x.shape, digits.y.shape, digits.source

# %% [markdown]
# A model is a pure function `apply_fn(params, x)`. λ_min of its full kernel is computed in float64, whatever the global flag; the interval says how far it can be trusted.

# %%
model = models.MLP(width=64)
params = model.init(jax.random.key(0), digits.x[:1])
diagnostics.empirical_ntk_min_eig(model.apply, params, digits.x)

# %% [markdown]
# The Polyak-Łojasiewicz identity: ½‖∇L‖²/L equals rᵀΘr/(s‖r‖²) to rounding. It ties gradient, residual and kernel together.

# %%
import numpy as np

from lplr_jax.ntk import empirical_ntk

theta = np.asarray(empirical_ntk(model.apply, params, digits.x))
point = diagnostics.evaluate_point(model.apply, params, digits.x, digits.y, loss_scale="mean")
point.pl_ratio, point.rayleigh(theta) / point.loss_scale

# %% [markdown]
# A short run, with the kernel at every tenth epoch. The record holds every number with its units.

# %%
from lplr_jax.experiments import mnist

record = mnist.run(mnist.MnistConfig(width=64, n_train=200, epochs=200, probe_every=20, learning_rate=2e-3))
record.to_xarray()

# %% [markdown]
# How fast does it fall? The same curve, with L* = 0 and with the proxy that takes the last loss for L*:

# %%
report = diagnostics.rate_report(record["loss"])
print(f"L* = 0: {report.zero.factor:.5f} per epoch, proxy: {report.proxy.factor:.5f}")
print(f"set by the proxy: {report.set_by_proxy}")

# %%
from lplr_jax import plotting

plotting.four_panel(record)

# %% [markdown]
# What the run comes to, in a few lines, and claim by claim:

# %%
import lplr_jax as lp

verdicts = lp.verify(record)
print(*lp.theory.story(verdicts, record), sep="\n")

# %%
verdicts
