"""Closing measurements of a tree with leaves that are no parameters, against those of its parameters alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lplr_jax import theory
from lplr_jax.losses import Logistic, Objective, Squared
from lplr_jax.ntk import empirical_ntk

RNG = np.random.default_rng(0)
X = RNG.standard_normal((6, 3)).astype(np.float32)
Y = np.sign(RNG.standard_normal((6, 1))).astype(np.float32)
W, V = (RNG.standard_normal(shape).astype(np.float32) for shape in ((3, 8), (8, 1)))
BESIDE = {
    "integer": lambda t: np.int32(t),
    "number": lambda t: t,
    "boolean": lambda t: jnp.array([True]),
    "key": lambda t: jax.random.key(t),
    "function": lambda t: jnp.tanh,
    "text": lambda t: "a",
}


def network(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


@pytest.mark.parametrize("loss", [Squared("mean"), Logistic()])
def test_what_is_carried_along_changes_nothing(loss):
    def measured(beside):
        points = {t: {"v": V + np.float32(0.01 * t), "w": W - np.float32(0.01 * t), **beside(t)} for t in range(3)}
        kernels = {t: np.asarray(empirical_ntk(network, point, X)) for t, point in points.items()}
        spectra = np.array([np.linalg.eigvalsh(kernel) for kernel in kernels.values()])
        arrays = {
            "probe_epoch": np.arange(3),
            "drift": np.array([0.0, 0.05, 0.1]),
            "ntk_max_eig": spectra[:, -1],
            "ntk_min_eig_lower": spectra[:, 0],
            "ntk_assembly_error": np.full(3, 1e-12),
        }
        settings = {"points": points, "kernels": kernels, "arrays": arrays, "search_steps": 2}
        return theory.closing_arrays(Objective(network, loss), X, Y, **settings)

    alone = measured(lambda t: {})
    assert {"ntk_lipschitz_power", "ntk_lipschitz_upper", "param_pair_distance", "lqcr_inner"} <= alone.keys()
    for name, leaf in BESIDE.items():
        found = measured(lambda t, leaf=leaf: {"beside": leaf(t)})
        assert found.keys() == alone.keys()
        for key, value in alone.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-9, err_msg=f"{name}: {key}")


@pytest.mark.parametrize("name", BESIDE)
def test_a_point_has_the_verdicts_of_its_parameters_alone(name):
    alone = theory.verify_point(network, {"v": V, "w": W}, X, Y, loss_scale="mean")
    found = theory.verify_point(network, {"beside": BESIDE[name](0), "v": V, "w": W}, X, Y, loss_scale="mean")
    assert [(v.claim, v.outcome) for v in found] == [(v.claim, v.outcome) for v in alone]
