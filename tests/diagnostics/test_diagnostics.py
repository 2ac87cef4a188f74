"""The PL identity end to end; λ_min of the kernel and of its blocks."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax import diagnostics
from lplr_jax.losses import Objective
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk


@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 7),
    d=st.integers(1, 6),
    width=st.integers(1, 9),
    depth=st.integers(1, 4),
    c=st.integers(1, 3),
    scale=st.sampled_from(["sum", "mean"]),
    activation=st.sampled_from(["softplus", "tanh", "relu"]),
)
def test_pl_identity(seed, n, d, width, depth, c, scale, activation):
    """½‖∇L‖²/L = rᵀΘr/(s‖r‖²): gradient, residual and kernel tied together, in float64 and in float32."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(n, c)).astype(np.float32)
    model = MLP(width, depth, activation, c)
    params = model.init(jax.random.key(seed), jnp.asarray(x))
    theta = np.asarray(empirical_ntk(model.apply, params, x))
    point = diagnostics.evaluate_point(model.apply, params, x, y, loss_scale=scale)
    right = point.rayleigh(theta) / point.loss_scale
    assert point.loss_scale == (n if scale == "mean" else 1)
    assert point.pl_ratio == pytest.approx(right, rel=1e-10)
    loss, gradient = Objective(model.apply, scale).value_and_gradient(params, jnp.asarray(x), jnp.asarray(y))
    squared = sum(float(jnp.sum(leaf.astype(jnp.float32) ** 2)) for leaf in jax.tree.leaves(gradient))
    tolerance = diagnostics.pl_identity_tolerance(
        max_eig=float(np.linalg.eigvalsh(theta)[-1]),
        rayleigh=point.rayleigh(theta),
        # Forward and backward sums over the widest layer, over outputs and samples; 8 more for activation and loss.
        chain=2 * depth * (max(d, width) + 1) + n * c + 8 * depth,
    )
    assert 0.5 * squared / float(loss) == pytest.approx(right, rel=tolerance)


def test_identity_fails_for_the_kernel_of_another_point():
    model = MLP(6, 3)
    x, y = np.random.default_rng(0).normal(size=(5, 4)).astype(np.float32), np.ones((5, 1), np.float32)
    params, other = (model.init(jax.random.key(k), jnp.asarray(x)) for k in (0, 1))
    point = diagnostics.evaluate_point(model.apply, params, x, y, loss_scale="sum")
    assert point.pl_ratio != pytest.approx(point.rayleigh(np.asarray(empirical_ntk(model.apply, other, x))), rel=1e-3)
    with pytest.raises(ValueError, match=r"shape \(4, 4\) but there are 5 outputs"):
        point.rayleigh(np.eye(4))


def test_min_eig_of_a_linear_model_is_that_of_the_gram_matrix():
    x = np.random.default_rng(2).normal(size=(6, 9))
    result = diagnostics.empirical_ntk_min_eig(lambda w, x: x @ w, jnp.ones((9, 1)), x)
    expected = np.linalg.svd(x, compute_uv=False)[-1] ** 2
    # Forming the Gram matrix loses n u ‖x‖².
    assert float(result) == result.value == pytest.approx(expected, abs=6 * 2.3e-16 * np.linalg.norm(x, 2) ** 2 * 4)
    assert result.lower <= expected <= result.upper


@pytest.mark.parametrize("flag", [False, True])
def test_min_eig_is_float64_whatever_the_flag(flag):
    # In float32 the kernel of two inputs at distance 1e-6 is singular: λ_min = 1e-12 / 2 is far below 6e-8.
    x = np.array([[1.0, 0.0], [1.0, 1e-6]])
    w = np.ones((2, 1), np.float32)
    with jax.enable_x64(flag):
        result = diagnostics.empirical_ntk_min_eig(lambda w, x: x @ w, w, x)
        assert jax.config.jax_enable_x64 == flag
    # λ_min solves λ² - (2 + e²)λ + e² = 0, so λ_min = e²/2 to first order; entries near 1 carry errors of 2e-16.
    assert result.value == pytest.approx(0.5e-12, abs=1e-15)


class Normalised(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Flax takes the statistics of float64 values in float32, which strict promotion refuses.
        with jax.numpy_dtype_promotion("standard"):
            return nn.Dense(1)(nn.LayerNorm()(nn.Dense(3)(x)))


def test_proofs_cover_assembly_or_say_that_they_do_not():
    x = np.random.default_rng(5).normal(size=(6, 8)).astype(np.float32)
    model = MLP(16, 3)
    proved = diagnostics.empirical_ntk_min_eig(model.apply, model.init(jax.random.key(0), x), x)
    assert proved.proved
    assert proved.factor_error > 0
    assert 0 < proved.lower <= proved.value <= proved.upper
    network = Normalised()
    relative = diagnostics.empirical_ntk_min_eig(network.apply, network.init(jax.random.key(0), x), x, proof="never")
    assert not relative.proved
    assert "the interval is about the computed kernel" in relative.reason
    assert relative.assumptions == ()


def test_subset_interlaces():
    model = MLP(8, 3, outputs=2)
    x = np.random.default_rng(0).normal(size=(10, 5)).astype(np.float32)
    params = model.init(jax.random.key(0), jnp.asarray(x))
    theta = np.asarray(empirical_ntk(model.apply, params, x))
    ids = diagnostics.subset_ids(10, 4, seed=1)
    assert ids.shape == (4,)
    assert len(set(ids.tolist())) == 4
    assert np.array_equal(ids, np.sort(ids))
    block = diagnostics.principal_block(theta, ids, 2)
    np.testing.assert_allclose(block, empirical_ntk(model.apply, params, x[ids]), rtol=1e-12, atol=1e-12)
    assert np.linalg.eigvalsh(block)[0] >= np.linalg.eigvalsh(theta)[0] - 1e-12 * np.abs(theta).max()
    with pytest.raises(ValueError, match="subset_size must be >= 1, got 0"):
        diagnostics.subset_ids(10, 0, seed=1)
