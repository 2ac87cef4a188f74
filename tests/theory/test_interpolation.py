"""The claim `interpolation`: what recorded bounds certify, what they do not, and what equal inputs forbid."""

import dataclasses

import mpmath
import numpy as np
import pytest
from controls import replaced, tampered, without

from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.claims.interpolation import certificate_of
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import NAN


def numbers(**changes):
    """The closed form with other numbers of θ̃, by the names of the record without their prefix."""
    return tampered(linear_regression(), **{f"interpolant_{name}": replaced(v) for name, v in changes.items()})


def judged(record):
    return Evidence(record).verdict("interpolation")


def test_the_closed_form_is_proved():
    verdict = judged(linear_regression())
    assert (verdict.outcome, verdict.measured) == ("proved", 0.0)
    assert "R_0 = 1.87083" in verdict.note  # √(2 + 1 + ½)


@pytest.mark.parametrize("h", [1e-12, 1e-3, 0.3, 0.4999999])
def test_the_radius_is_that_of_the_theorem(h):
    """t* = (σ/L_J)(1 - √(1 - 2h)) in 40 digits: the recorded form does not cancel, and rounds up."""
    bend, least = 7.0, 2.0
    residual = h * least / bend
    found = certificate_of(
        Evidence(numbers(residual=residual, min_eig_lower=least, jacobian_lipschitz=bend, ball=1.0, distance=3.0))
    )
    with mpmath.workdps(40):
        exact_h = mpmath.mpf(bend) * mpmath.mpf(residual) / mpmath.mpf(least)
        exact = mpmath.sqrt(least) / bend * (1 - mpmath.sqrt(1 - 2 * exact_h))
        assert found.reason == ""
        assert exact_h <= found.h <= exact_h * (1 + 1e-14)
        # The root amplifies the rounding of h by up to 1/√(1 - 2h).
        assert exact <= found.reach <= exact * (1 + 1e-13 / mpmath.sqrt(1 - 2 * exact_h))
        assert exact + 3 <= found.radius <= (exact + 3) * (1 + 1e-13 / mpmath.sqrt(1 - 2 * exact_h))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"residual": 0.6, "min_eig_lower": 1.0, "jacobian_lipschitz": 1.0, "ball": 9.0}, "h = 0.6 > ½"),
        ({"residual": 0.1, "min_eig_lower": 1.0, "jacobian_lipschitz": 1.0, "ball": 0.1}, "leaves the ball of radius"),
        ({"min_eig_lower": 0.0}, "> 0 is not proved"),
        ({"min_eig_lower": -1e-3}, "> 0 is not proved"),
        ({"min_eig_lower": NAN}, "rounding of this network has no bound"),
        ({"residual": NAN}, "rounding of this network has no bound"),
        ({"jacobian_lipschitz": NAN}, "no proved Lipschitz constant"),
        ({"jacobian_lipschitz": np.inf}, "no proved Lipschitz constant"),
    ],
)  # fmt: skip
def test_what_is_no_certificate_proves_nothing(changes, words):
    verdict = judged(numbers(**changes))
    assert verdict.outcome == "undecided"
    assert words in verdict.note


def test_either_side_of_one_half():
    for residual, outcome in ((0.5 - 1e-12, "proved"), (0.5 + 1e-12, "undecided")):
        record = numbers(residual=residual, min_eig_lower=1.0, jacobian_lipschitz=1.0, ball=2.0)
        assert judged(record).outcome == outcome


def test_a_subset_certifies_nothing_of_all():
    record = linear_regression()
    arrays = {**without(record, "spectrum", "residual_energy").arrays, "kernel_samples": np.asarray(2)}
    found = certificate_of(Evidence(dataclasses.replace(record, arrays=arrays)))
    assert "2 of 3 samples" in found.reason


def test_without_a_point_it_is_open():
    verdict = judged(without(linear_regression(), "interpolant_residual"))
    assert verdict.outcome == "undecided"
    assert "certify_floor" in verdict.note


def test_equal_inputs_with_unlike_targets_refute_it():
    record = without(linear_regression(), *(n for n in linear_regression().arrays if n.startswith("interpolant_")))
    verdict = judged(tampered(record, loss_floor_lower=replaced(1e-3)))
    assert (verdict.outcome, verdict.inconsistent) == ("refuted", False)
    assert "equal inputs have unlike targets: L >= 0.001" in verdict.note
    both = judged(tampered(linear_regression(), loss_floor_lower=replaced(1e-3)))
    assert both.inconsistent, "zero loss is not both attained and out of reach"
