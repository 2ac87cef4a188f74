"""Weights that are put together of several, against the Jacobian: each part is served by itself."""

import jax
import jax.numpy as jnp
import pytest
from dense_kernel import ALL, check, head, normal
from flax import linen as nn

DENSE = "dense: (h hᵀ) ∘ (δ δᵀ)"
SHAPES = {"a": (6, 7), "b": (4, 7), "c": (5, 3), "d": (6, 2), "s": (2, 2, 3), "t": (2, 3, 3), "u": (1, 5, 3)}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def side_by_side(p, x):
    return x @ jnp.concatenate([p["a"], p["b"]])


def outputs_side_by_side(p, x):
    """One part twice, and in part: its uses add up."""
    return x[:, :6] @ jnp.concatenate([p["a"], p["a"][:, :3], p["d"]], axis=1)


def weight_first(p, x):
    return (jnp.concatenate([p["a"], p["b"]]).T @ x.T).T


def twice(p, x):
    return jnp.tanh(x @ jnp.concatenate([p["a"], p["b"]])) @ jnp.concatenate([p["b"], p["a"]]).T


def at_positions(p, x):
    return jnp.tanh(x.reshape(-1, 2, 5)) @ jnp.concatenate([p["c"], -p["c"]], axis=1)


def in_a_batch(p, x):
    weight = jnp.concatenate([p["s"], p["t"]], axis=1)
    return jnp.einsum("nbk,bkm->nbm", x.reshape(-1, 2, 5), weight)


def of_a_batch(p, x):
    """Along the axis of the batch no part has a product of its own."""
    weight = jnp.concatenate([p["u"], 2 * p["u"]])
    return jnp.einsum("nbk,bkm->nbm", x.reshape(-1, 2, 5), weight)


def times_a_constant(p, x):
    """What does not depend on x first meets what does behind the product."""
    return x @ (jnp.eye(10) @ jnp.concatenate([p["a"], p["b"]]))


CASES = {
    side_by_side: {"a": DENSE, "b": DENSE},
    outputs_side_by_side: {"a": "2 × matrix product", "d": DENSE},
    weight_first: {"a": DENSE, "b": DENSE},
    twice: {"a": "2 × matrix product", "b": "2 × matrix product"},
    at_positions: {"c": "2 × matrix product"},
    in_a_batch: {"s": "matrix product", "t": "matrix product"},
    of_a_batch: {"u": "Jacobian"},
    times_a_constant: {"a": "", "b": ""},
}
QUICK = (side_by_side, outputs_side_by_side, of_a_batch)


@pytest.mark.parametrize("case", [pytest.param(one, marks=() if one in QUICK else pytest.mark.slow) for one in CASES])
def test_each_part_is_served_by_itself(case):
    params = {key: normal(number, *SHAPES[key]) for number, key in enumerate(CASES[case])}
    rules = {f"['{key}']": rule for key, rule in CASES[case].items()}
    check(lambda p, x: head(case(p, x)), params, normal(9, 4, 10), rules, ALL if case is twice else ("full",))


@pytest.mark.slow
def test_a_cell_whose_kernels_are_joined():
    """Flax's optimised LSTM cell: the recurrent kernels of its gates are concatenated, and used in every step."""

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            cell = nn.OptimizedLSTMCell(16, param_dtype=jnp.float64, dtype=jnp.float64)
            carry = cell.initialize_carry(jax.random.key(0), x[:, 0].shape)
            for t in range(x.shape[1]):
                carry, h = cell(carry, x[:, t])
            return head(h)

    model, x = Network(), normal(3, 4, 4, 5)
    params = model.init(jax.random.key(1), x)
    gates = (f"['params']['OptimizedLSTMCell_0']['{gate}']['kernel']" for gate in ("hf", "hi", "ig"))
    check(model.apply, params, x, dict.fromkeys(gates, "4 × matrix product"))
