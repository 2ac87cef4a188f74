"""Fixed-point arrays against rational and high-precision arithmetic: every error stays within its radius."""

from fractions import Fraction

import mpmath
import numpy as np
import pytest

from lplr_jax.proofs import elementary as el
from lplr_jax.proofs import fixed as fx
from lplr_jax.proofs.fixed import BITS, Fixed, UndecidedError

RNG = np.random.default_rng(0)
mpmath.mp.prec = 1200
ZERO = fx.fixed(0.0, 4)


def exact(a: Fixed, at) -> Fraction:
    """The number itself, from its digits."""
    return sum(
        (
            Fraction(int(a.digits[(i, *at)])) * Fraction(2) ** (BITS * (a.high - i - 1))
            for i in range(a.digits.shape[0])
        ),
        Fraction(0),
    )


def as_mpf(value: Fraction):
    return mpmath.mpf(value.numerator) / value.denominator


def holds(a: Fixed, truth, at) -> bool:
    """Whether a true value lies within the radius of an entry; both sides exact up to 1,200 bits."""
    return abs(as_mpf(exact(a, at)) - truth) <= mpmath.mpf(float(a.error[at]))


def spread(shape, decades):
    """Numbers of very unlike sizes."""
    return RNG.normal(size=shape) * 10.0 ** RNG.uniform(-decades, decades, shape)


FUNCTIONS = {
    "add": (fx.add, lambda a, b: a + b),
    "sub": (fx.sub, lambda a, b: a - b),
    "mul": (fx.mul, lambda a, b: a * b),
    "div": (el.div, lambda a, b: a / b),
    "maximum": (fx.maximum, lambda a, b: max(a, b)),
    "exp": (lambda a, b: el.exp(a), lambda a, b: mpmath.exp(a)),
    "expm1": (lambda a, b: el.expm1(a), lambda a, b: mpmath.expm1(a)),
    "tanh": (lambda a, b: el.tanh(a), lambda a, b: mpmath.tanh(a)),
    "logistic": (lambda a, b: el.logistic(a), lambda a, b: 1 / (1 + mpmath.exp(-a))),
    "erf": (lambda a, b: el.erf(a), lambda a, b: mpmath.erf(a)),
    "sin": (lambda a, b: el.sin(a), lambda a, b: mpmath.sin(a)),
    "cos": (lambda a, b: el.cos(a), lambda a, b: mpmath.cos(a)),
    "log": (lambda a, b: el.log(fx.mul(b, b)), lambda a, b: mpmath.log(b * b)),
    "log1p": (lambda a, b: el.log1p(fx.mul(b, b)), lambda a, b: mpmath.log1p(b * b)),
    "rsqrt": (lambda a, b: el.rsqrt(fx.mul(b, b)), lambda a, b: 1 / abs(b)),
    "sqrt": (lambda a, b: el.sqrt(fx.mul(b, b)), lambda a, b: abs(b)),
}


@pytest.mark.parametrize("places", [4, 7, 12])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_holds_the_true_value(name, places):
    function, truth = FUNCTIONS[name]
    a = np.concatenate([[0.0, -0.0, 1.0, -30.0, 13.5], RNG.normal(size=8) * 3, spread(7, 6).clip(-50, 50)])
    b = np.concatenate([[1.0, -1.0, 2.0, 0.5, 1e-3], RNG.normal(size=8), spread(7, 3)])
    found = function(fx.fixed(a, places), fx.fixed(b, places))
    for i in range(a.size):
        assert holds(found, truth(mpmath.mpf(float(a[i])), mpmath.mpf(float(b[i]))), (i,)), (name, a[i], b[i])
    # The radius is of use: digits that are asked for are there, less what a quotient by 1e-6 and e^13 take.
    assert found.error.max() <= 2.0 ** (-BITS * (places - 5)) * max(1.0, found.size.max())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_holds_the_values_of_all_operands_within_their_radii(name):
    function, truth = FUNCTIONS[name]
    a, b = RNG.normal(size=20) * 2, np.sign(RNG.normal(size=20)) * RNG.uniform(0.3, 3, 20)
    radius = 10.0 ** RNG.uniform(-14, -3, (2, 20))
    x, y = (fx.widened(fx.fixed(value, 6), reach) for value, reach in zip((a, b), radius, strict=True))
    found = function(x, y)
    for side_a in (-1.0, 0.37, 1.0):
        for side_b in (-1.0, 1.0):
            for i in range(20):
                at_a = mpmath.mpf(float(a[i])) + mpmath.mpf(side_a) * mpmath.mpf(float(radius[0, i]))
                at_b = mpmath.mpf(float(b[i])) + mpmath.mpf(side_b) * mpmath.mpf(float(radius[1, i]))
                assert holds(found, truth(at_a, at_b), (i,)), (name, i)
    slack = {"maximum": 1.01, "add": 1.01, "sub": 1.01}
    if name in slack:  # the radius of a sum is that of its parts and no more
        largest = radius.max(axis=0) if name == "maximum" else radius.sum(axis=0)
        assert (found.error <= largest * slack[name] + 1e-30).all()


def test_a_product_of_matrices_of_extreme_digits_is_exact_up_to_its_radius():
    for terms in (3, 200, 4096):
        a, b = (np.full((2, terms), (1.0 - 2.0**-53) * sign) for sign in (1, -1))
        b = b.T * np.array([1.0, 2.0**-30])
        x, y = fx.fixed(a, 8), fx.fixed(b, 8)
        found = fx.contract(x, y, lambda stack, other: stack @ other, terms)
        for at in np.ndindex(2, 2):
            truth = sum(Fraction(a[at[0], k]) * Fraction(b[k, at[1]]) for k in range(terms))
            assert abs(exact(found, at) - truth) <= Fraction(float(found.error[at]))
        assert found.error.max() == 0.0


def test_a_product_of_many_digits_is_cut_within_its_radius():
    a, b = (fx.mul(fx.fixed(spread((4, 9), 2), 6), fx.fixed(spread((4, 9), 2), 6)) for _ in range(2))
    turned = b.map(np.transpose)
    found = fx.contract(a, turned, lambda stack, other: stack @ other, 9)
    assert found.digits.shape[0] <= 6
    for at in np.ndindex(4, 4):
        truth = sum(exact(a, (at[0], k)) * exact(b, (at[1], k)) for k in range(9))
        slack = sum(
            Fraction(float(a.error[at[0], k])) * abs(exact(b, (at[1], k)))
            + Fraction(float(b.error[at[1], k])) * abs(exact(a, (at[0], k)))
            for k in range(9)
        )
        assert abs(exact(found, at) - truth) + slack <= Fraction(float(found.error[at]))


def test_sums_too_long_to_be_exact_are_refused():
    a = fx.fixed(np.ones((1, 2)), 4)
    with pytest.raises(UndecidedError, match="longer than 32767"):
        fx.contract(a, a.map(np.transpose), lambda stack, other: stack @ other, 2**15)


def test_zeros_stay_exact_where_other_entries_are_cut():
    a, b = np.array([0.0, 1 / 3, 0.0]), np.array([1 / 7, 1 / 7, 0.0])
    x = fx.fixed(a, 3)
    found = fx.mul(fx.mul(x, fx.fixed(b, 3)), fx.fixed(b, 3))
    assert found.error.tolist()[0] == found.error.tolist()[2] == 0.0 < found.error[1]
    assert fx.certain_signs(found, ZERO).tolist() == [0.0, 1.0, 0.0]


def test_what_is_within_its_error_of_zero_has_no_sign():
    near = fx.widened(fx.fixed([1e-12, 0.0], 4), np.array([1e-12, 0.0]))
    with pytest.raises(UndecidedError, match="kink or a jump"):
        fx.certain_signs(near, ZERO)
    assert fx.certain_signs(fx.widened(fx.fixed([1e-12], 4), np.array([0.99e-12])), ZERO).tolist() == [1.0]


def test_constants_that_mask_something_out_are_kept_apart():
    low = float(np.finfo(np.float64).min)
    a = fx.fixed([1.0, low, -np.inf], 4)
    assert a.far.tolist() == [False, True, True]
    weights = el.exp(fx.sub(a, fx.fixed(1.0, 4)))
    assert weights.mid.tolist() == [1.0, 0.0, 0.0]
    assert 0 < weights.error[1] < 1e-200
    assert fx.maximum(a, fx.fixed([0.0, -7.0, low], 4)).mid.tolist()[:2] == [1.0, -7.0]
    for misuse in (lambda: fx.mul(a, a), lambda: fx.neg(a), lambda: el.tanh(a)):
        with pytest.raises(UndecidedError, match="masks something out"):
            misuse()


def test_tiny_constants_are_zero_within_a_radius_and_infinities_are_refused():
    a = fx.fixed([1e-300, 1.0], 4)
    assert a.mid.tolist() == [0.0, 1.0]
    assert a.error[0] >= 1e-300
    for bad in (np.inf, np.nan):
        with pytest.raises(UndecidedError, match="not finite"):
            fx.fixed(bad, 4)


@pytest.mark.parametrize(
    ("function", "a", "text"),
    [
        (el.reciprocal, 0.0, "divisor may be zero"),
        (el.rsqrt, -1.0, "root may be zero or less"),
        (el.log, 0.0, "logarithm may be zero or less"),
        (el.exp, 401.0, "overflows"),
        (el.sin, 2.0**31, "angle is too large"),
    ],
)
def test_functions_beyond_their_domain_are_refused(function, a, text):
    with pytest.raises(UndecidedError, match=text):
        function(fx.fixed(a, 6))


@pytest.mark.parametrize("places", [3, 9, 20])
def test_constants_and_quotients_of_whole_numbers(places):
    for found, truth in (
        (el.ln2(places), mpmath.log(2)),
        (el.pi(places), mpmath.pi),
        (fx.rational(-22, 7, places), mpmath.mpf(-22) / 7),
        (fx.rational(3, 4, places), mpmath.mpf("0.75")),
    ):
        assert holds(found, +truth, ())
        assert found.error <= 2.0 ** (-BITS * (places - 1))


def test_a_vanishing_exponential_counts_the_error_of_its_argument():
    # With 4 places e^z is taken for 0 below -84; z is known to a third.
    z = fx.widened(fx.fixed([-90.0, 1.0], 4), np.array([1 / 3, 0.0]))
    found = el.exp(z)
    assert found.mid[0] == 0.0
    assert holds(found, mpmath.exp(mpmath.mpf(-90) + mpmath.mpf(float(z.error[0]))), (0,))
    assert holds(el.logistic(fx.neg(z)), 1 / (1 + mpmath.exp(mpmath.mpf(-90) + mpmath.mpf(1) / 3)), (0,))


@pytest.mark.parametrize("least", [1e-60, 3e-150, 1e-240])
def test_constants_far_below_the_largest_lie_within_their_radius(least):
    found = fx.fixed([1e250, least, 0.0], 6)
    assert holds(found, mpmath.mpf(least), (1,))
    assert found.error[1] <= 1.01 * least
    assert found.error[2] == 0.0


def test_a_tiny_constant_masks_nothing_out():
    a = fx.fixed([1e-300, 1.0], 4)
    assert fx.mul(a, a).mid.tolist() == [0.0, 1.0]


def test_what_is_far_below_stays_so_or_is_refused():
    a = fx.fixed([-1e26, 1.0], 4)
    assert fx.add(a, fx.fixed(1e11, 4)).far.tolist() == [True, False]
    assert fx.add(a, fx.fixed([1.0, 1e30], 4)).far.tolist() == [True, False]
    with pytest.raises(UndecidedError, match="large number is added"):
        fx.add(a, fx.fixed(1e26, 4))
    # A product may be as far below as a constant that masks something out.
    deep = fx.mul(fx.fixed(-1e20, 4), fx.fixed([1e10, 1.0], 4))
    for decide in (fx.maximum, fx.certain_signs):
        with pytest.raises(UndecidedError, match="may be less than one that masks something out"):
            decide(a, deep)


def test_what_is_left_out_of_a_product_counts_where_it_underflows():
    # (u (1 + e)) (u (1 - e)) - u u = -u² e², whose digits are left out, and whose place is below float64.
    u, e = (fx.fixed(np.array(2.0**-power), 28) for power in (470, 400))
    one = fx.fixed(1.0, 28)
    parts = [fx.mul(u, fx.add(one, e)), u], [fx.mul(u, fx.sub(one, e)), fx.neg(u)]
    left, right = (fx.joined(part, np.stack) for part in parts)
    found = fx.contract(left, right, lambda stack, other: stack @ other, 2)
    assert found.error > 0.0
