"""Lower bounds by layers, against the kernels of the layers themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lplr_jax import diagnostics
from lplr_jax.models import MLP


def problem(width, outputs, n, *, depth=3, activation="softplus", seed=0):
    model = MLP(width, depth, activation=activation, outputs=outputs)
    x = np.random.default_rng(seed).normal(size=(n, 12)).astype(np.float32)
    return model.apply, model.init(jax.random.key(seed), jnp.asarray(x)), x


def kernel_of(apply_fn, params, x, which):
    """The kernel of one layer, from a dense Jacobian."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(a, "float64"), params)
        jacobian = jax.jacrev(lambda p: apply_fn(p, jnp.asarray(x, "float64")).reshape(-1))(wide)
        leaves = [
            np.asarray(leaf).reshape(leaf.shape[0], -1)
            for path, leaf in jax.tree.leaves_with_path(jacobian)
            if which in jax.tree_util.keystr(path)
        ]
    return sum(leaf @ leaf.T for leaf in leaves)


@pytest.mark.parametrize(
    ("width", "outputs", "n", "activation"),
    [(16, 1, 9, "softplus"), (16, 3, 9, "tanh"), (40, 2, 25, "relu"), (8, 2, 30, "softplus")],
)
def test_each_layer_and_their_sum_are_below(width, outputs, n, activation):
    apply_fn, params, x = problem(width, outputs, n, activation=activation)
    bounds = diagnostics.layer_lower_bounds(apply_fn, params, x)
    names = sorted(params["params"])
    assert bounds.shape == (len(names),) == (3,)
    least = [np.linalg.eigvalsh(kernel_of(apply_fn, params, x, name))[0] for name in names]
    for bound, truth in zip(bounds, least, strict=True):
        assert 0 <= bound <= truth * (1 + 1e-12) + 1e-12
    assert bounds.sum() <= diagnostics.empirical_ntk_min_eig(apply_fn, params, x).value
    fits = [n <= 12 + 1, n <= width + 1, n <= width + 1]
    enough = [width >= outputs, width >= outputs, True]
    assert (bounds > 0).tolist() == [a and b for a, b in zip(fits, enough, strict=True)]


def test_the_bound_of_an_affine_network_is_its_kernel_s():
    x = np.random.default_rng(1).normal(size=(5, 8))
    affine = lambda p, x: x @ p["w"] + p["b"].reshape(1, -1)  # noqa: E731
    bound = diagnostics.layer_lower_bounds(affine, {"b": np.zeros(2), "w": np.ones((8, 2))}, x)
    truth = np.linalg.eigvalsh(x @ x.T + 1)[0]
    assert bound.shape == (1,)
    assert truth * (1 - 1e-9) <= bound[0] <= truth


def test_samples_alike_leave_nothing():
    apply_fn, params, x = problem(16, 1, 6)
    x[1] = x[0]
    assert diagnostics.layer_lower_bounds(apply_fn, params, x).tolist() == [0.0, 0.0, 0.0]


def test_another_network_is_told_the_way_out():
    with pytest.raises(ValueError, match=r"trainable=.*lower bound of λ_min"):
        diagnostics.layer_lower_bounds(lambda w, x: jnp.sin(x @ w), np.ones((3, 1)), np.ones((2, 3)))


def test_the_leaves_of_one_layer_bound_the_whole_kernel():
    apply_fn, params, x = problem(16, 2, 9)
    head = diagnostics.empirical_ntk_min_eig(apply_fn, params, x, trainable=lambda path: "dense_2" in path)
    truth = np.linalg.eigvalsh(kernel_of(apply_fn, params, x, "dense_2"))[0]
    assert head.lower <= truth <= head.upper
    assert head.upper < diagnostics.empirical_ntk_min_eig(apply_fn, params, x).lower
