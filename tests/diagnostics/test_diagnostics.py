"""Brackets, regimes and rates against closed forms; the PL identity end to end."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_jax import diagnostics
from lplr_jax.curves.rate import _suffix_medians
from lplr_jax.losses import Objective
from lplr_jax.models import MLP
from lplr_jax.ntk import empirical_ntk

positive = st.floats(1e-6, 1e6)


@given(loss=st.lists(positive, min_size=1, max_size=8), share=st.floats(0, 0.999), grad=positive)
def test_bracket_holds_the_ratio_of_every_admissible_minimum(loss, share, grad):
    loss = np.array(loss)
    floor = float(loss.min())
    low, high = diagnostics.pl_bracket(loss, np.full_like(loss, grad), floor)
    truth = 0.5 * grad / (loss - share * floor)
    # Three roundings separate the ends from the truth.
    assert np.all(low <= truth * (1 + 4e-16))
    assert np.all(truth <= high * (1 + 4e-16))
    assert np.all(np.isinf(high[loss <= floor]))


def test_bracket_at_its_edges():
    low, high = diagnostics.pl_bracket(np.array([0.0, np.nan, 2.0, 0.5]), np.array([0.0, 1.0, 4.0, 1.0]), 0.5)
    np.testing.assert_array_equal(low, [np.inf, np.nan, 1.0, 1.0])
    np.testing.assert_array_equal(high, [np.inf, np.nan, 2 / 1.5, np.inf])
    for floor in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="floor must be a finite number >= 0"):
            diagnostics.pl_bracket(1.0, 1.0, floor)


def test_floor_is_the_least_recorded_loss():
    assert diagnostics.loss_floor(np.array([3.0, 0.5, 1.0, np.nan])) == 0.5
    with pytest.raises(ValueError, match="no finite value"):
        diagnostics.loss_floor(np.array([np.nan, np.inf]))


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
@settings(max_examples=8)
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
    relative = diagnostics.empirical_ntk_min_eig(network.apply, network.init(jax.random.key(0), x), x)
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


T = np.arange(2001.0)


@given(rate=st.floats(1e-4, 0.02), scale=st.floats(1e-3, 1e3))
def test_exponential_decay_is_recovered(rate, scale):
    decay = diagnostics.contraction_factor(scale * np.exp(-rate * T), slice(100, 1500))
    assert decay.rate == pytest.approx(rate, rel=1e-9)
    assert float(decay) == decay.factor == pytest.approx(np.exp(-rate), rel=1e-12)
    assert decay.law == ("exponential" if 1 - decay.power_r2 >= 0.005 else "undecided")
    np.testing.assert_allclose(decay.local_factors, np.exp(-rate), rtol=1e-9)
    assert decay.epochs == 1400


@given(exponent=st.floats(0.1, 3.0))
def test_power_law_is_recovered(exponent):
    loss = np.concatenate([[1.0], T[1:] ** -exponent])
    decay = diagnostics.contraction_factor(loss, slice(100, 1500))
    assert decay.exponent == pytest.approx(exponent, rel=1e-9)
    assert decay.law == "power law"
    # Local rates run from a/100 down to a/1500.
    low, high = decay.local_factors
    assert np.exp(-exponent / 100) <= low < high <= np.exp(-exponent / 1500)


def test_a_linear_rate_made_by_the_proxy_is_called_so():
    """A power law has no rate, yet its gap to the last loss fits a line whose slope falls like 1/T."""
    loss = (1 + T) ** -0.5
    report = diagnostics.rate_report(loss, window=diagnostics.middle_half)
    assert report.zero.law == "power law"
    assert report.set_by_proxy is True
    cut = dict(report.refits)
    assert cut[1000].rate == pytest.approx(2 * report.proxy.rate, rel=0.05)
    assert cut[1500].rate == pytest.approx(4 / 3 * report.proxy.rate, rel=0.05)


def test_a_true_linear_rate_is_not_blamed_on_the_proxy():
    report = diagnostics.rate_report(np.exp(-0.02 * T))
    assert report.set_by_proxy is False
    assert report.zero.rate == pytest.approx(0.02, rel=1e-9)
    # The proxy bends only the last log 2 / rate epochs of the regime, 35 of 1966.
    assert report.proxy.rate == pytest.approx(0.02, rel=0.01)


def test_regime_of_an_exponential_ends_where_the_proxy_doubles_the_ratio():
    rate = 0.004
    loss = np.exp(-rate * T)
    regime = diagnostics.stable_regime(loss)
    # L - L_T >= L / 2 while t <= T - log 2 / rate; a pure exponential has no transient.
    assert regime == slice(0, int(2000 - np.log(2) / rate) + 1)
    low, high = diagnostics.pl_bracket(loss, loss, float(loss.min()))
    assert np.all(high[regime] <= 2 * low[regime] * (1 + 1e-12))
    assert high[regime.stop] > 2 * low[regime.stop]


def test_regime_drops_the_transient():
    loss = np.exp(-0.004 * T) + 5 * np.exp(-0.5 * T)
    regime = diagnostics.stable_regime(loss)
    # The fast mode's part of the local rate falls below the slow one's where 2.5 e^(-t/2) = 0.004 e^(-0.004 t),
    # t = 13; the rate is averaged over 20 epochs, so the start may come up to 20 epochs early.
    assert 0 < regime.start <= 13


def test_regime_of_a_catapult_starts_after_the_loss_is_back():
    loss = np.where(T < 50, np.exp(0.05 * T), np.exp(2.5 - 0.2 * (T - 50)))
    loss = np.where(T > 75, np.exp(-2.5 - 0.003 * (T - 75)), loss)
    regime = diagnostics.stable_regime(loss)
    assert regime.start >= 62
    assert np.all(loss[regime] <= loss[0])


@pytest.mark.parametrize(
    "loss",
    [np.ones(50), np.array([1.0, 0.5]), np.linspace(1, 0.9, 100), np.full(20, np.nan), np.exp(0.1 * np.arange(40.0))],
    ids=["constant", "two epochs", "never clear of the proxy", "all NaN", "rising"],
)
def test_no_regime_is_an_empty_slice(loss):
    assert diagnostics.stable_regime(loss, floor=float(np.nanmin(loss)) if np.isfinite(loss).any() else 0.0) == slice(
        0, 0
    )


def test_regime_of_a_run_that_diverged_is_that_of_its_finite_part():
    loss = np.exp(-0.02 * np.arange(300.0))
    broken = np.concatenate([loss, np.full(100, np.nan)])
    assert diagnostics.stable_regime(broken) == diagnostics.stable_regime(loss)
    report = diagnostics.rate_report(broken)
    assert [cut for cut, _ in report.refits] == [149, 224]


def test_regime_can_be_overridden():
    loss = np.exp(-0.01 * np.arange(500.0))
    assert diagnostics.stable_regime(loss, start=20, stop=90) == slice(20, 90)
    for start, stop, message in (
        (600, None, "regime start 600"),
        (None, 900, "stop 900"),
        (5, 6, "at least 3 epochs, got start 5 and stop 6"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnostics.stable_regime(loss, start=start, stop=stop)


@given(st.lists(st.floats(-5, 5) | st.sampled_from([np.inf, 0.0, np.nan]), min_size=1, max_size=30))
def test_medians_of_all_ends_of_a_series(values):
    found = _suffix_medians(np.array(values))
    with np.errstate(invalid="ignore"):
        expected = [np.median(values[k:]) for k in range(len(values))]
    np.testing.assert_allclose(found, expected, rtol=1e-15, atol=0)


def test_a_long_run_that_only_rises_is_read_in_good_time():
    # Median by median this is 10^10 operations.
    assert diagnostics.stable_regime(np.linspace(1, 2, 100_001), stop=100_000) == slice(0, 0)


def test_fit_without_enough_epochs_is_undecided():
    decay = diagnostics.contraction_factor(np.array([1.0, 0.5, -1.0, 0.0, np.nan]), slice(0, 5))
    assert decay.epochs == 0
    assert decay.law == "undecided"
    assert np.isnan(decay.factor)
    assert diagnostics.rate_report(np.array([1.0, 0.9])).set_by_proxy is None
