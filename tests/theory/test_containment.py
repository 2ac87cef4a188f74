"""Containment derived from θ_0: the closed form of a linear model, planted counterexamples, and both thresholds."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from controls import replaced, tampered

import lplr_jax as lp
from lplr_jax import theory
from lplr_jax.theory.claims.containment import containment, jacobian_shift
from lplr_jax.theory.claims.example import EIGENVALUES, ETA, linear_regression
from lplr_jax.theory.evidence import Evidence


def judged(record):
    return Evidence(record).verdict("containment")


def moving(shift, **changes):
    """The example as if its Jacobian were not constant, with a kernel that moved by `shift` at both later probes."""
    record = linear_regression()
    arrays = {name: array for name, array in record.arrays.items() if name != "affine_in_parameters"}
    arrays["ntk_shift"] = np.array([0.0, shift, shift])
    arrays["ntk_max_eig_upper"] = np.full(3, 2.0)
    return dataclasses.replace(record, arrays=arrays | changes)


def test_a_linear_model_is_contained_by_a_closed_form():
    verdict = judged(linear_regression())
    assert verdict.outcome == "proved"
    # ‖r_0‖ = √3, σ_0² = .5, and a = 1 - η β/2 with β the largest eigenvalue over s = 1.
    a = 1 - ETA * EIGENVALUES[-1] / 2
    exact = np.sqrt(3) / (a * np.sqrt(EIGENVALUES[0]))
    assert exact <= verdict.bound <= 1.001 * exact, "the recorded loss may be off by rounding"
    assert verdict.measured == linear_regression()["drift"].max()
    assert verdict.margin > 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"smoothness_upper": replaced(5.01)}, "η <= 1/β is not proved"),
        ({"ntk_min_eig_lower": replaced(-0.1)}, "λ_0 > 0 is not proved"),
        ({"step_size": replaced(np.nan, 3)}, "not every step was seen"),
    ],
)
def test_what_a_proof_needs(changes, reason):
    verdict = judged(tampered(linear_regression(), **changes))
    assert verdict.outcome == "undecided"
    assert reason in verdict.note


def test_a_run_beyond_a_proved_bound_contradicts_the_record():
    far = linear_regression()["drift"] * 3
    verdict = containment(Evidence(tampered(linear_regression(), drift=lambda array: far)))
    assert verdict.outcome == "refuted"
    assert verdict.inconsistent


def test_the_bound_of_the_jacobian_is_one():
    """‖J_t - J_0‖₂ of random Jacobians is at least what their kernels tell, and is reached by multiples of one."""
    rng = np.random.default_rng(3)
    first = rng.standard_normal((3, 7))
    for second in (2.5 * first, rng.standard_normal((3, 7)), first + 1e-3 * rng.standard_normal((3, 7))):
        kernels = [jac @ jac.T for jac in (first, second, second)]
        record = moving(np.linalg.norm(kernels[1] - kernels[0], 2))
        tops = np.array([np.linalg.norm(kernel, 2) for kernel in kernels])
        record = dataclasses.replace(
            record, arrays={**record.arrays, "ntk_max_eig_upper": tops, "ntk_assembly_error": np.zeros(3)}
        )
        bound = jacobian_shift(Evidence(record))[1]
        true = np.linalg.norm(second - first, 2)
        assert bound <= true * (1 + 1e-12)
        if np.allclose(second, 2.5 * first):
            assert bound == pytest.approx(true, rel=1e-12)


@pytest.mark.parametrize(("off", "outcome"), [(-1e-6, "not refuted"), (1e-6, "refuted")])
def test_the_threshold_is_the_least_singular_value(off, outcome):
    # shift/(2 √2) against √.5: the kernel has to move by 2, less its errors of some 1e-14.
    assert judged(moving(2.0 * (1 + off))).outcome == outcome


def test_without_an_upper_bound_of_the_largest_eigenvalue_the_spectrum_serves_and_no_ritz_value():
    record = moving(3.0)
    without = dataclasses.replace(record, arrays={k: v for k, v in record.arrays.items() if k != "ntk_max_eig_upper"})
    assert judged(without).outcome == "refuted"
    neither = dataclasses.replace(without, arrays={k: v for k, v in without.arrays.items() if k != "spectrum"})
    verdict = judged(neither)
    assert verdict.outcome == "undecided"
    assert "no upper bound of λ_max" in verdict.note


def test_what_is_refuted_depends_on_the_steps_that_were_seen():
    verdict = judged(moving(3.0))
    assert "h < a/2 fails for every a up to" in verdict.note
    unseen = moving(3.0, step_size=np.where(np.arange(21) == 4, np.nan, linear_regression()["step_size"]))
    verdict = judged(unseen)
    assert verdict.outcome == "refuted"
    assert "for every a and L_J, h < a/2 fails or the decrease test does" in verdict.note


def test_a_long_step_refutes_the_conjunction_and_not_the_smallness():
    """f = -.1 + θ + θ²/2 has h = .1 < 1/2; one step of η = 19 raises the loss, so that the decrease test fails."""

    def apply_fn(theta, x):
        return (-0.1 + theta + theta**2 / 2) * x

    one, loss = jnp.ones((1, 1)), lp.losses.Squared("sum")
    problem = lp.Problem(apply_fn, jnp.zeros((1, 1)), one, 0 * one, loss=loss, name="valley")
    record = lp.train(problem, optax.sgd(19.0), steps=1, probes=lp.Probes(at=(0, 1), search=0, hessian=0))
    verdict = judged(record)
    assert verdict.outcome == "refuted"
    # J = 1 + θ, from 1 to 2.9: the kernel goes from 1 to 8.41, and 7.41/3.9 = 1.9 is the whole of it.
    assert verdict.measured == pytest.approx(1.9, rel=1e-5)
    assert verdict.bound == pytest.approx(1.0, rel=1e-6)
    assert "for every a and L_J, h < a/2 fails or the decrease test does" in verdict.note


@pytest.mark.parametrize("name", ["grad", "kernel"])
def test_another_method_and_another_kernel_are_not_judged(name):
    record = moving(3.0)
    if name == "grad":
        other = dataclasses.replace(record, arrays={**record.arrays, "step_deviation": np.where(
            np.arange(21) < 20, 1.0, np.nan)})  # fmt: skip
        assert judged(other).outcome == "not applicable"
    else:
        arrays = {k: v for k, v in record.arrays.items() if k not in ("spectrum", "residual_energy")}
        averaged = dataclasses.replace(record, arrays={**arrays, "kernel_trace": np.array(1)})
        assert judged(averaged).outcome == "not applicable"


def test_the_story_tells_it():
    verdicts = theory.verify(linear_regression())
    assert any("proved from θ_0 alone" in line for line in theory.story(verdicts, linear_regression()))
