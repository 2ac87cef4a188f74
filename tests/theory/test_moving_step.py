"""The product that stands for the power where η_t moves: its sharp end, what breaks it, and the budget of a path."""

import numpy as np
import pytest
from controls import replaced, tampered
from descents import regression, stalled
from hypothesis import given, settings
from hypothesis import strategies as st

from lplr_jax import schema
from lplr_jax.theory.claims import moving_step
from lplr_jax.theory.evidence import Evidence

PROBES = np.array([0, 5, 20])


def moving(steps=20, *, eigenvalues=(2.0,), weights=(1.0,), first=0.4, alpha=0.5, probes=PROBES):
    sizes = first / np.arange(1, steps + 1) ** alpha
    return regression(eigenvalues, weights, sizes, probes), sizes


def rate(record):
    """The claim alone: `verify` would not look at a record that was spoilt."""
    return Evidence(record).verdict("linear_rate")


def test_with_one_eigenvalue_the_product_is_the_loss():
    """1 - 2 a η λ = (1 - η λ)² with a = 1 - η λ / 2: what is left is the rounding that is taken off a_t."""
    record, sizes = moving()
    found = rate(record)
    part = found.part("bound_pointwise")
    assert found.outcome == part.outcome == "not refuted"
    assert part.bound == pytest.approx(0.5 * np.prod((1 - 2 * sizes) ** 2), rel=1e-6)
    assert part.bound >= part.measured
    assert "not checked between" in part.note
    assert found.reference == moving_step.REFERENCE
    assert f"over {sizes.size} steps" in found.note


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), alpha=st.floats(0.05, 2), first=st.floats(0.01, 0.45))
def test_the_product_bounds_every_regression(seed, alpha, first):
    rng = np.random.default_rng(seed)
    eigenvalues, weights = np.sort(rng.uniform(0.1, 4, 3)), rng.uniform(0.1, 2, 3)
    record, sizes = moving(eigenvalues=eigenvalues, weights=weights, alpha=alpha, first=first)
    found = rate(record)
    assert found.outcome == "not refuted", found
    loss = record["loss"]
    a = -np.diff(loss) / (sizes * record["grad_sq_norm"][:-1])
    expected = loss[0] * np.prod(np.maximum(1 - 2 * a * sizes * eigenvalues[0], 0))
    assert found.part("bound_pointwise").bound == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_probes_at_every_iterate_are_said_to_be_so():
    record, _ = moving(probes=np.arange(21))
    assert "λ_min/s at every iterate" in rate(record).part("bound_pointwise").note


def test_each_step_takes_the_least_of_the_probes_around_it():
    """Planted: λ_min of the middle probe is halved, so that every step between its neighbours loses half its rate."""
    record, sizes = moving(probes=np.array([0, 5, 10, 20]))
    halved = tampered(record, ntk_min_eig=replaced(1.0, 1), spectrum=replaced(1.0, 1))
    mu = np.where((np.arange(20) > 0) & (np.arange(20) < 10), 1.0, 2.0)
    a = 1 - sizes
    bound = 0.5 * np.prod(1 - 2 * a * sizes * mu)
    assert rate(halved).part("bound_pointwise").bound == pytest.approx(bound, rel=1e-6)


def test_a_kernel_that_dips_between_probes_is_refuted():
    record = stalled()
    sizes = np.array(record["step_size"])
    sizes[::2] *= 1.02  # the record of a moving step; its a_t are 2 % off 1, which no bound below rests on
    found = rate(tampered(record, step_size=lambda _: sizes))
    assert found.outcome == "refuted"
    assert found.part("bound_pointwise").outcome == "refuted"
    assert not found.inconsistent


def test_a_loss_that_rises_is_not_covered():
    record, _ = moving(first=1.4, eigenvalues=(2.0,))  # η λ = 2.8 at the first step
    found = rate(record)
    assert found.outcome == "not applicable"
    assert "the loss rises at 1 steps, first from step 0" in found.note


def test_without_a_kernel_the_product_is_open():
    record, _ = moving()
    bare = tampered(record, ntk_min_eig=replaced(np.nan), spectrum=replaced(np.nan))
    found = rate(bare)
    assert found.outcome == "undecided"
    assert "no positive μ is known" in found.note


def budgeted(radius, *, eta=0.4, steps=20, share=schema.PATH_SHARE):
    """One mode of λ = 2 under η_t = min(η, w (R - ℓ_t) / ‖G_t‖), R above or below the way of 1/√2 to the end."""
    residual, path, sizes = -1.0, 0.0, []
    for _ in range(steps):
        slope = abs(residual) * np.sqrt(2.0)
        sizes.append(min(eta, share * (radius - path) / slope))
        path += sizes[-1] * slope
        residual *= 1 - 2 * sizes[-1]
    record = regression((2.0,), (1.0,), sizes, np.array([0, 5, steps]))
    return tampered(record, learning_rate=replaced(np.nan)), path


def with_budget(record, radius):
    arrays = {**record.arrays, "path_budget": np.asarray(radius)}
    return type(record)(record.experiment, arrays, record.config)


def test_a_budget_that_binds_takes_the_theorem_out_of_force():
    record, path = budgeted(0.6)
    found = rate(with_budget(record, 0.6))
    assert found.outcome == "not applicable"
    assert "the rate theorem is not in force" in found.note
    part = found.part("budget")
    assert part.outcome == "not refuted"
    assert part.measured == pytest.approx(path, rel=1e-9)
    assert "the budget binds at" in part.note
    assert "first from step 0" in part.note


def test_a_budget_that_never_binds_leaves_the_rate():
    record, _ = moving(first=0.1)
    found = rate(with_budget(record, 5.0))
    assert found.outcome == "not refuted"
    assert "binds" not in found.part("budget").note


@pytest.mark.parametrize("off", [1e-3, 0.1])
def test_a_path_above_its_budget_is_a_contradiction(off):
    record, path = budgeted(0.6)
    found = rate(with_budget(record, path * (1 - off)))
    assert found.outcome == "refuted"
    assert found.inconsistent
    assert found.part("budget").inconsistent


def test_steps_that_do_not_bind_are_told_from_those_that_do():
    """A step that is 1 % short of what the budget allows is not decided by it: the tolerance is a thousandth."""
    record, _ = budgeted(0.6, share=0.99 * schema.PATH_SHARE)
    assert "binds" not in rate(with_budget(record, 0.6)).part("budget").note


def test_where_a_budget_is_used_up_the_run_stands_still_and_is_descent_all_the_same():
    record, _ = budgeted(0.6)
    still = {"step_size": 0.0, "step_rounding": np.inf, "step_deviation": np.nan}
    halted = tampered(
        with_budget(record, 0.6), **{name: replaced(value, slice(15, 20)) for name, value in still.items()}
    )
    assert "not along" not in rate(halted).note
    assert rate(halted).outcome == "not applicable"
    assert "the budget binds" in rate(halted).note
    without = tampered(record, **{name: replaced(value, slice(15, 20)) for name, value in still.items()})
    assert "θ does not move at step" in rate(without).note
