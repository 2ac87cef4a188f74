"""λ_min of a kernel that is kept in half a matrix, against the kernel kept whole."""

import jax.numpy as jnp
import numpy as np
import pytest

from lplr_jax import diagnostics
from lplr_jax.diagnostics import kernel as kernel_module

RNG = np.random.default_rng(0)


def mlp(params, x):
    return jnp.tanh(x @ params[0] + params[1][None]) @ params[2]


def shared(params, x):  # a leaf used twice has no rule, and no proof
    return jnp.tanh(x @ params[0]) @ params[0].T @ params[2]


def network(d=6, m=24, c=2):
    return [RNG.standard_normal(s) / np.sqrt(s[0]) for s in ((d, m), (m,), (m, c) if c > 1 else (m, 1))]


@pytest.mark.parametrize(("n", "c"), [(30, 1), (31, 2), (301, 1)])
@pytest.mark.parametrize("budget", [None, 200_000])
def test_packed_and_full_agree_and_are_proved(n, c, budget):
    x = RNG.standard_normal((n, 6))
    params = network(m=8 * n, c=c) if n < 100 else network(m=64)
    packed, full = (
        diagnostics.empirical_ntk_min_eig(mlp, params, x, storage=storage, memory_budget=budget)
        for storage in ("packed", "full")
    )
    assert packed.proved
    assert full.proved
    assert packed.lower <= full.upper
    assert full.lower <= packed.upper
    assert packed.upper - packed.lower <= 10 * (full.upper - full.lower) + 1e-7 * abs(full.value)
    # The same blocks give the same kernel, hence the same distance to the one that the proof forms.
    assert packed.assembly_error == pytest.approx(full.assembly_error, rel=1e-6)
    assert packed.factor_error == full.factor_error


def test_a_network_without_a_bound_is_not_proved_packed():
    found = diagnostics.empirical_ntk_min_eig(
        shared, [*network(6, 24, 1)[:1], 0, np.ones((6, 1))], X6, storage="packed"
    )
    assert not found.proved
    assert 'storage="full" may have it' in found.reason


X6 = RNG.standard_normal((9, 6))


def test_packed_where_the_full_one_does_not_fit(monkeypatch):
    params, x = network(), RNG.standard_normal((12, 6))
    made = []
    original = kernel_module._certified_packed
    monkeypatch.setattr(kernel_module, "_certified_packed", lambda *a: made.append(24) or original(*a))
    monkeypatch.setattr(kernel_module, "budget", lambda requested: 16 * 24**2)
    assert diagnostics.empirical_ntk_min_eig(mlp, params, x).proved
    assert made == []
    monkeypatch.setattr(kernel_module, "budget", lambda requested: 16 * 24**2 - 1)
    assert diagnostics.empirical_ntk_min_eig(mlp, params, x).proved
    assert made == [24]
    diagnostics.empirical_ntk_min_eig(mlp, params, x, memory_budget=10**8)
    diagnostics.empirical_ntk_min_eig(mlp, params, x, storage="full")
    assert made == [24]


def test_mistakes_are_named():
    params, x = network(), RNG.standard_normal((12, 6))
    with pytest.raises(ValueError, match="storage must be one of"):
        diagnostics.empirical_ntk_min_eig(mlp, params, x, storage="half")
    with pytest.raises(ValueError, match='storage="packed" is for kernel="engine"'):
        diagnostics.empirical_ntk_min_eig(mlp, params, x, storage="packed", kernel="neural-tangents")
    with pytest.raises(ValueError, match="cholesky is for a kernel that is kept whole"):
        diagnostics.empirical_ntk_min_eig(mlp, params, x, storage="packed", cholesky=np.linalg.cholesky)
    with pytest.raises(TypeError, match="cholesky"):
        diagnostics.empirical_ntk_min_eig(mlp, params, x, cholesky=3)


@pytest.mark.parametrize("apply_fn", [mlp, shared], ids=["proved", "relative to the computed kernel"])
def test_a_factorisation_from_elsewhere_is_passed_on(apply_fn, monkeypatch):
    monkeypatch.setattr(kernel_module, "budget", lambda requested: 1)  # which would be packed
    params, x, asked = network(m=64), RNG.standard_normal((20, 6)), []

    def coarse(a, shift):
        asked.append(shift)
        return np.linalg.cholesky((a - shift * np.eye(len(a))).astype(np.float32))

    params = params if apply_fn is mlp else [params[0], 0, np.ones((6, 1))]
    found = diagnostics.empirical_ntk_min_eig(apply_fn, params, x, cholesky=coarse)
    own = diagnostics.empirical_ntk_min_eig(apply_fn, params, x, storage="full")
    assert asked
    assert found.proved == own.proved
    assert found.lower <= own.upper
    assert own.lower <= found.upper
    assert found.upper - found.lower > own.upper - own.lower  # single precision costs width
