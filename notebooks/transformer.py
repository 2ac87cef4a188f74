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
# # A transformer on text
#
# `lplr transformer` trains one of 30,000 parameters and follows the kernel of some of its rows. Here is one so small that its whole kernel fits,
# all positions and all classes, and what the theory says of it.

# %%
import jax
import optax

import lplr_jax as lp
from lplr_jax.curves.position import position_of

text = lp.data.load_text(n=5, length=8)
bytes(text.vocabulary[token] for token in text.x.reshape(-1)).decode(), text.c

# %% [markdown]
# A causal network, as a pure function with one row of outputs a sequence: the next byte at each position, as one-hot.

# %%
model = lp.models.Transformer(text.c, width=8, layers=1, heads=2, length=8)
params = jax.jit(model.init)(jax.random.key(0), text.x)


def apply_fn(params, x):
    return model.apply(params, x).reshape(x.shape[0], -1)


y = jax.nn.one_hot(text.y, text.c).reshape(text.n, -1)
problem = lp.Problem(apply_fn, params, text.x, y, loss=lp.losses.Squared(text.y.size), name="transformer")
problem.n * problem.c, problem.p

# %% [markdown]
# What a position sees are the bytes up to it. Two positions that see the same have the same outputs, whatever the parameters:

# %%
text.y.size, len(set(text.contexts().tolist()))

# %% [markdown]
# So rows of the Jacobian are equal and λ_min(Θ) = 0 at every θ, with more parameters than rows as here: λ_0 > 0, the first hypothesis of the
# theorem, fails for every causal network on such a text, whatever its width. Where the next bytes differ, no such network reaches zero loss either.

# %%
record = lp.train(problem, optax.sgd(0.2), steps=80, probes=lp.Probes(every=20, search=0, hessian=0))
print(record["ntk_min_eig"], record["ntk_max_eig"])

# %% [markdown]
# Where does the gradient lie, then? ½‖∇L‖² = ρ‖g‖²/(2 s²) with ρ = gᵀΘg/‖g‖², and ρ is an eigenvalue of the upper third. So what bounds
# the gradient from below is PL with a floor, in the top k eigenvectors, and not λ_min:

# %%
position = position_of(record)
for step, rho, above, share, k in zip(
    position.steps, position.rayleigh, position.above, position.floor_share, position.best, strict=True
):
    print(f"step {step:2d}: ρ = {rho:.3g}, below {above:.1%} of the eigenvalues; top {k} give {share:.0%} of ½‖∇L‖²")

# %%
print(*lp.theory.story(lp.verify(record), record), sep="\n")

# %%
lp.plot(record)
