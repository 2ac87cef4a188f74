"""Decrease test and time budget against closed forms: constant and moving η, a catapult, planted violations."""

import dataclasses

import numpy as np
import optax
import pytest
from controls import by_claim, replaced, scaled, tampered, without
from descents import catapult, regression
from test_coverage import PAIRS, hidden
from test_method import EPOCHS, ETA, MOVING, data, run

from lplr_jax.theory.claims.decrease import decrease_of
from lplr_jax.theory.evidence import Evidence

EIGENVALUES, WEIGHTS = np.array([0.5, 1.0, 2.0]), np.array([1.0, 0.3, 0.7])
CONSTANT, DECAYING = np.full(20, 0.2), 0.4 / (1 + np.arange(20))


def verdict(record, claim="descent"):
    return Evidence(record).verdict(claim)


@pytest.mark.parametrize("sizes", [CONSTANT, DECAYING], ids=["constant", "decaying"])
def test_a_quadratic_gives_its_curvature_along_the_step(sizes):
    """a_t = 1 - η_t κ_t / 2 with κ_t = gᵀHg / gᵀg, by a dense Hessian."""
    record = regression(EIGENVALUES, WEIGHTS, sizes, [0, 10, 20])
    modes = WEIGHTS * np.concatenate([np.ones((1, 3)), np.cumprod(1 - sizes[:, None] * EIGENVALUES, axis=0)])[:-1]
    gradient = np.sqrt(EIGENVALUES) * modes
    curvature = np.einsum("ti,ij,tj->t", gradient, np.diag(EIGENVALUES), gradient) / (gradient**2).sum(axis=1)
    found = decrease_of(Evidence(record))
    np.testing.assert_allclose(found.value, 1 - sizes * curvature / 2, rtol=1e-11)
    told = verdict(record)
    assert told.outcome == "not refuted"
    assert told.reference == "ours (decrease test)"
    assert told.measured == pytest.approx((1 - sizes * curvature / 2).min(), rel=1e-11)
    assert told.step == int(np.argmin(1 - sizes * curvature / 2))
    whole = (record["loss"][0] - record["loss"][-1]) / (sizes * (gradient**2).sum(axis=1)).sum()
    assert told.part("window").measured == pytest.approx(whole, rel=1e-11)
    assert "all 20 steps were seen" in told.note


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_rounding_stays_within_the_noise(dtype):
    """Losses and steps computed in `dtype`, a_t in closed form from θ_t in float64."""
    record = run(optax.sgd(ETA), dtype=dtype)
    x = data()[0].astype(dtype).astype(np.float64)
    hessian, y = x.T @ x / len(x), data()[1].astype(dtype).astype(np.float64)
    found = decrease_of(Evidence(record))
    theta, exact = np.zeros(x.shape[1]), []
    for _ in range(EPOCHS):
        gradient = x.T @ (x @ theta - y) / len(x)
        exact.append(1 - ETA / 2 * gradient @ hessian @ gradient / (gradient @ gradient))
        theta = theta - ETA * gradient
    assert found.at.size == EPOCHS
    gap = np.abs(found.value - exact)
    # The float32 path is another one after a few steps: its a_t differ by the drift of the residual, 1e-4 at most.
    assert (gap <= found.noise + 1e-4 * (dtype == "float32")).all()
    assert verdict(record).outcome == "not refuted"


@pytest.mark.parametrize("name", MOVING)
def test_any_schedule_is_gradient_descent(name):
    found = by_claim(run(MOVING[name], dtype="float64"))
    assert found["linear_rate"].outcome == "not refuted"
    assert found["linear_rate"].reference == "ours (moving step)", "the paper's rate is that of a fixed step"
    assert found["descent"].outcome == found["path"].outcome == "not refuted", found["path"]


def test_other_methods_are_outside():
    for record in (run(optax.sgd(ETA), batch=5), run(optax.adam(0.01))):
        found = by_claim(record)
        for claim in ("descent", "path", "floor_pl"):
            assert found[claim].outcome == "not applicable", found[claim]
            assert "not along -∇L" in found[claim].note


def test_a_step_that_raises_the_loss_refutes():
    record = regression(EIGENVALUES, WEIGHTS, CONSTANT, [0, 10, 20])
    lifted = tampered(record, loss=replaced(record["loss"][6] * 1.01, 7))
    told = verdict(lifted)
    assert told.outcome == "refuted"
    assert told.step == 6
    assert "a_t < 0 at 1 of 20 steps" in told.note
    assert not told.inconsistent
    assert told.part("window").outcome == "not refuted", "the losses between the ends do not enter"


def test_a_rise_within_rounding_leaves_the_sign_open():
    base = regression(EIGENVALUES, WEIGHTS, CONSTANT, [0, 10, 20])
    record = tampered(base, parameter_eps=replaced(2.0**-23))
    found, noise = decrease_of(Evidence(record)), Evidence(record).loss_noise
    for share, outcome in ((0.5, "not refuted"), (3.0, "refuted")):
        rise = share * (noise[7] + noise[6] + found.size[6] * Evidence(record).gradient_noise[6])
        told = verdict(tampered(record, loss=replaced(record["loss"][6] + rise, 7)))
        assert told.outcome == outcome, (share, told)
    flat = tampered(record, loss=replaced(1.0), grad_sq_norm=replaced(1e-12))
    assert verdict(flat).outcome == "undecided"
    assert verdict(flat, "path").outcome == "undecided"


def test_the_noise_of_another_loss_is_not_known():
    record = dataclasses.replace(regression(EIGENVALUES, WEIGHTS, CONSTANT, [0, 10, 20]), loss="logistic")
    assert verdict(record).outcome == verdict(record, "path").outcome == "undecided"


def test_steps_that_were_not_seen_are_counted():
    record = hidden(run(optax.sgd(ETA)), PAIRS)
    found = by_claim(record)
    assert found["descent"].outcome == "not refuted"
    assert f"{EPOCHS - 6} of {EPOCHS} steps were not seen" in found["descent"].note
    for claim in ("path", "floor_pl"):
        assert found[claim].outcome == "undecided", claim
    assert "so the length of the path is not known" in found["path"].note
    bare = without(record, "step_size", "step_deviation", "step_rounding")
    assert by_claim(bare)["descent"].outcome == "undecided"


def test_a_catapult_raises_the_loss_and_stays_within_its_budget():
    record = catapult()
    loss = record["loss"]
    rises = np.diff(loss) > 0
    assert rises[0]
    assert 2 < rises.sum() < 20
    assert loss[-1] < 1e-3 * loss[0]
    evidence = Evidence(record)
    told, path = evidence.verdict("descent"), evidence.verdict("path")
    assert told.outcome == "refuted"
    assert told.step == int(np.argmin(-np.diff(loss) / record["grad_sq_norm"][:-1]))
    assert told.part("window").measured > 0
    assert path.outcome == "not refuted"
    assert 0 < path.measured <= path.part("length").measured <= path.bound
    floor = evidence.verdict("floor_pl")
    assert floor.outcome == "not applicable"
    assert f"the loss rises at {rises.sum()} steps" in floor.note
    # Stopped while the loss is still higher than at first, there is no budget.
    high = {name: array[:3] for name, array in record.arrays.items() if array.shape == loss.shape}
    arrays = without(record, "spectrum", "residual_energy").arrays | high
    arrays |= {k: v[:1] for k, v in arrays.items() if k.startswith(("probe_", "ntk_"))}
    short = dataclasses.replace(record, arrays=arrays)
    assert verdict(short, "path").outcome == "not applicable"
    assert verdict(short).part("window").outcome == "refuted"


@pytest.mark.parametrize("sizes", [CONSTANT, DECAYING], ids=["constant", "decaying"])
def test_the_budget_in_closed_form(sizes):
    record = regression(EIGENVALUES, WEIGHTS, sizes, [0, 10, 20])
    told = verdict(record, "path")
    steps = sizes * np.sqrt(record["grad_sq_norm"][:-1])
    a_w = (record["loss"][0] - record["loss"][-1]) / (sizes * record["grad_sq_norm"][:-1]).sum()
    budget = np.sqrt((record["loss"][0] - record["loss"][-1]) * sizes.sum() / a_w)
    assert told.outcome == "not refuted"
    assert told.bound == pytest.approx(budget, rel=1e-12)
    assert told.part("length").measured == told.part("drift").bound == pytest.approx(steps.sum(), rel=1e-12)
    assert told.measured == pytest.approx(record["drift"].max(), rel=1e-12)
    assert told.margin == pytest.approx(budget / record["drift"].max(), rel=1e-12)
    # PL with μ = λ_min = 1/2.
    a = decrease_of(Evidence(record)).least
    roots = np.sqrt(record["loss"][0]) - np.sqrt(record["loss"][-1])
    assert told.part("pl").bound == pytest.approx(2 * roots / a, rel=1e-12)
    assert told.part("pl").outcome == "not refuted"


def test_one_step_is_the_whole_budget():
    told = verdict(regression([1.0], [1.0], [0.3], [0, 1]), "path")
    assert told.outcome == "not refuted"
    assert told.margin == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("factor", "outcome"), [(1.0, "not refuted"), (10.0, "refuted")])
def test_a_drift_beyond_the_budget_is_a_contradiction(factor, outcome):
    record = tampered(regression(EIGENVALUES, WEIGHTS, DECAYING, [0, 10, 20]), drift=scaled(factor, slice(5, None)))
    told = verdict(record, "path")
    assert told.outcome == outcome
    assert told.inconsistent == (outcome == "refuted")
    assert told.part("drift").outcome == outcome
    assert told.part("length").outcome == "not refuted"


def test_a_path_longer_than_pl_allows_is_a_finding():
    """The least λ_min of the probes is 16 times that of the steps, so that the bound is a quarter of the true one."""
    record = regression([0.1], [1.0], CONSTANT, [0, 10, 20])
    told = verdict(tampered(record, ntk_min_eig=replaced(1.6)), "path")
    assert told.part("pl").outcome == "refuted"
    assert told.outcome == "not refuted"
    assert not told.inconsistent
