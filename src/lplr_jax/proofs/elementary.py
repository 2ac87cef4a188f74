"""Elementary functions of fixed-point arrays, with proved errors.

Quotients and roots are approximated by Newton's iteration and bounded by what is left of their equation:

* 1/b: ρ = 1 - b x gives |1/b - x| = |ρ|/|b|.
* a^(-1/2): ρ = 1 - a x², |ρ| <= 0.3, gives |a^(-1/2) - x| <= |x||ρ|, since |(1 - ρ)^(-1/2) - 1| <= |ρ| there.
* log a: ρ = a exp(-x) - 1, |ρ| <= 0.3, gives |log a - x| = |log(1 + ρ)| <= 1.2 |ρ|.

The exponential is a Taylor polynomial after reduction by ln 2 and by a power of two, evaluated in the same arithmetic,
so that its rounding is in the radius; the remainder of the series is added. Everything else is made of these.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np

from lplr_jax.proofs.fixed import (
    BITS,
    Fixed,
    UndecidedError,
    add,
    choose,
    exactly,
    fixed,
    mul,
    neg,
    rational,
    signs,
    sub,
    widened,
    with_places,
)

_HALVINGS = 6
_QUARTER_TURN = 1.5707963267948966
_UP = 1.0 + 2.0**-30


def _one(places: int) -> Fixed:
    return fixed(1.0, places)


def scaled(a: Fixed, factor: float) -> Fixed:
    """Return a times a float64 number."""
    return mul(a, fixed(factor, a.places))


def _newton_rounds(places: int) -> int:
    return max(1, math.ceil(math.log2(BITS * places / 48)))


def reciprocal(b: Fixed) -> Fixed:
    """Return 1/b.

    Raises:
        UndecidedError: if b may be zero.
    """
    b.near()
    least = np.abs(b.mid) * (2 - _UP) - b.error * _UP
    if not (least > 0).all():
        raise UndecidedError("a divisor may be zero")
    center, one = exactly(b), _one(b.places)
    x = fixed(1.0 / b.mid, b.places)
    for _ in range(_newton_rounds(b.places)):
        x = exactly(add(x, mul(x, sub(one, mul(center, x)))))
    left = sub(one, mul(b, x))
    return widened(x, left.reach / least * _UP)


def div(a: Fixed, b: Fixed) -> Fixed:
    """Return a/b."""
    return mul(a, reciprocal(b))


def rsqrt(a: Fixed) -> Fixed:
    """Return a^(-1/2).

    Raises:
        UndecidedError: if a may be zero or less.
    """
    a.near()
    if not (a.mid * (2 - _UP) - a.error * _UP > 0).all():
        raise UndecidedError("a number under a root may be zero or less")
    center, one = exactly(a), _one(a.places)
    x = fixed(1.0 / np.sqrt(a.mid), a.places)
    for _ in range(_newton_rounds(a.places)):
        left = sub(one, mul(center, mul(x, x)))
        x = exactly(add(x, scaled(mul(x, left), 0.5)))
    left = sub(one, mul(a, mul(x, x))).reach
    if not (left <= 0.3).all():
        raise UndecidedError("a root is not known")
    return widened(x, x.size * left * _UP)


def sqrt(a: Fixed) -> Fixed:
    """Return √a; exact zeros stay zero."""
    if a.radius is None and not a.mid.all():
        zero = a.mid == 0
        safe = choose(zero.astype(np.int64), [a, _one(a.places)])
        return choose(zero.astype(np.int64), [sqrt(safe), fixed(0.0, a.places)])
    return mul(a, rsqrt(a))


@lru_cache(maxsize=32)
def ln2(places: int) -> Fixed:
    """Return log 2 = 2 Σ 3^-(2k+1)/(2k+1), the rest of the series below the first term left out times 9/8."""
    return _series(lambda k: (2, (2 * k + 1) * 3 ** (2 * k + 1)), places, math.log2(9))


@lru_cache(maxsize=32)
def pi(places: int) -> Fixed:
    """Return π = 16 atan(1/5) - 4 atan(1/239) (Machin)."""
    one = _series(lambda k: ((-1) ** k * 16, (2 * k + 1) * 5 ** (2 * k + 1)), places, math.log2(25))
    two = _series(lambda k: ((-1) ** k * 4, (2 * k + 1) * 239 ** (2 * k + 1)), places, math.log2(239**2))
    return sub(one, two)


def _series(term: Callable[[int], tuple[int, int]], places: int, bits: float) -> Fixed:
    """Return Σ_k of quotients of whole numbers that fall by `bits` bits each at least."""
    low, count = BITS * (places + 2), int(BITS * (places + 2) / bits) + 2
    total = 0
    for k in range(count):
        numerator, denominator = term(k)
        total += (numerator << low) // denominator
    # Every quotient is off by one unit at most, and the rest of the series by less than its first term times 9/8.
    found = rational(total, 1 << low, places)
    return widened(found, np.array((count + 16) * 2.0**-low))


def exp(z: Fixed) -> Fixed:
    """Return e^z; where z is far below, 0.

    Raises:
        UndecidedError: for z above 400, or with an error above one half.
    """
    places = z.places
    far = np.zeros(z.shape, bool) if z.far is None else z.far
    middle, error = np.where(far, 0.0, z.mid), z.error
    if (middle > 400).any() or (error > 0.5).any():
        raise UndecidedError("an exponential overflows, or its argument is not known")
    # Below this, e^z is no more than the last digit of 1.
    low = far | (middle < -0.7 * BITS * (places + 2))
    if low.any():
        z = choose(low.astype(np.int64), [exactly_near(z), fixed(0.0, places)])
    guard = places + 1
    z = with_places(z, guard)
    whole = np.rint(np.where(low, 0.0, middle) / math.log(2.0))
    rest = scaled(sub(z, mul(fixed(whole, guard), ln2(guard))), 2.0**-_HALVINGS)
    if not (rest.reach < 0.01).all():
        raise UndecidedError("an argument of an exponential is not known")
    size, terms, remainder = float(rest.reach.max(initial=0.0)), 1, 1.0
    while remainder > 2.0 ** (-BITS * guard) and terms < 200:
        remainder *= size / terms
        terms += 1
    total = _reciprocal_factorial(terms - 1, guard)
    for k in reversed(range(terms - 1)):
        total = add(mul(total, rest), _reciprocal_factorial(k, guard))
    # Terms fall by more than half, so what is left out is at most twice the first term left out.
    total = widened(total, np.full(total.shape, 2.0 * remainder * 1.01))
    for _ in range(_HALVINGS):
        total = mul(total, total)
    total = mul(total, fixed(2.0**whole, guard))
    if low.any():
        total = choose(low.astype(np.int64), [total, fixed(0.0, guard)])
        below = np.where(far, 1e-280, np.exp(np.minimum(middle + error, 0.0)) * 1.01 + 1e-280)
        total = widened(total, np.where(low, below, 0.0))
    return with_places(total, places)


def exactly_near(z: Fixed) -> Fixed:
    """Return the array with what is far below taken as it stands: for entries that are not used."""
    return Fixed(z.digits, z.high, z.radius, z.places)


@lru_cache(maxsize=1024)
def _reciprocal_factorial(k: int, places: int) -> Fixed:
    return rational(1, math.factorial(k), places)


def log(a: Fixed) -> Fixed:
    """Return log a.

    Raises:
        UndecidedError: if a may be zero or less.
    """
    a.near()
    if not (a.mid * (2 - _UP) - a.error * _UP > 0).all():
        raise UndecidedError("a number under a logarithm may be zero or less")
    x, center, one = fixed(np.log(a.mid), a.places), exactly(a), _one(a.places)
    # Each round triples the digits that are right.
    for _ in range(max(1, math.ceil(math.log(BITS * a.places / 48, 3)))):
        left = sub(mul(center, exactly(exp(neg(x)))), one)
        x = exactly(add(x, sub(left, scaled(mul(left, left), 0.5))))
    left = sub(mul(a, exp(neg(x))), one).reach
    if not (left <= 0.3).all():
        raise UndecidedError("a logarithm is not known")
    return widened(x, left * 1.2)


def log1p(a: Fixed) -> Fixed:
    """Return log(1 + a)."""
    return log(add(a, _one(a.places)))


def expm1(a: Fixed) -> Fixed:
    """Return e^a - 1."""
    return sub(exp(a), _one(a.places))


def _outward(z: Fixed) -> tuple[np.ndarray, Fixed]:
    """Return where z is negative, and z with its sign turned there."""
    z.near()
    negative = signs(z) < 0
    return negative, mul(z, fixed(np.where(negative, -1.0, 1.0), z.places))


def tanh(z: Fixed) -> Fixed:
    """Return tanh z = ±(1 - e)/(1 + e) with e = exp(∓2 z)."""
    negative, w = _outward(z)
    e, one = exp(scaled(w, -2.0)), _one(z.places)
    found = div(sub(one, e), add(one, e))
    return mul(found, fixed(np.where(negative, -1.0, 1.0), z.places))


def logistic(z: Fixed) -> Fixed:
    """Return 1/(1 + e^(-z))."""
    negative, w = _outward(z)
    e, one = exp(neg(w)), _one(z.places)
    return mul(choose(negative.astype(np.int64), [fixed(np.ones(z.shape), z.places), e]), reciprocal(add(one, e)))


def erf(z: Fixed) -> Fixed:
    """Return erf z = 2/√π e^(-z²) Σ_n 2^n z^(2n+1)/(1·3···(2n+1)); all terms have one sign."""
    negative, w = _outward(z)
    places = z.places
    beyond = w.mid > 12.0
    if (w.error > 0.03).any():
        raise UndecidedError("an argument of an error function is not known")
    inside = choose(beyond.astype(np.int64), [w, fixed(0.0, places)])
    guard = places + 2 + int(float(np.square(inside.mid).max(initial=0.0)) / (BITS * math.log(2.0)))
    inside = with_places(inside, guard)
    square = mul(inside, inside)
    largest = float(square.reach.max(initial=0.0))
    term = total = inside
    n = 0
    while True:
        n += 1
        term = mul(mul(term, square), rational(2, 2 * n + 1, guard))
        total = add(total, term)
        ratio = 2.0 * largest / (2 * n + 3)
        if ratio < 0.5 and float(term.reach.max(initial=0.0)) < 2.0 ** (-BITS * (places + 1)):
            break
        if n > 2000:
            raise UndecidedError("an error function is not known")
    total = widened(total, term.reach * 1.01)
    factor = scaled(rsqrt(pi(guard)), 2.0)
    found = mul(mul(total, exp(neg(square))), factor)
    if beyond.any():
        # 1 - erf w < e^(-w²) < e^(-144).
        found = choose(beyond.astype(np.int64), [found, fixed(1.0, guard)])
        found = widened(found, np.where(beyond, math.exp(-143.0), 0.0))
    return with_places(mul(found, fixed(np.where(negative, -1.0, 1.0), places)), places)


def _sine_cosine(z: Fixed) -> tuple[Fixed, Fixed, np.ndarray]:
    """Return sine and cosine of what is left of z after whole quarter turns, and their number modulo 4."""
    z.near()
    if (np.abs(z.mid) > 2.0**30).any():
        raise UndecidedError("an angle is too large")
    guard = z.places + 2
    turns = np.rint(z.mid / _QUARTER_TURN)
    rest = sub(with_places(z, guard), mul(fixed(turns, guard), scaled(pi(guard), 0.5)))
    if not (rest.reach < 1.0).all():
        raise UndecidedError("an angle is not known")
    square = mul(rest, rest)
    terms = 2
    while 1.0 / math.factorial(2 * terms) > 2.0 ** (-BITS * guard) and terms < 80:
        terms += 1
    sine = cosine = fixed(0.0, guard)
    for k in reversed(range(terms)):
        sign = (-1) ** k
        sine = add(mul(sine, square), rational(sign, math.factorial(2 * k + 1), guard))
        cosine = add(mul(cosine, square), rational(sign, math.factorial(2 * k), guard))
    # An alternating series with falling terms: the rest is at most the first term left out.
    rest_of = np.full(z.shape, 1.01 / math.factorial(2 * terms) + 1e-280)
    return widened(mul(sine, rest), rest_of), widened(cosine, rest_of), (turns % 4).astype(np.int64)


def sin(z: Fixed) -> Fixed:
    """Return the sine."""
    sine, cosine, turns = _sine_cosine(z)
    return with_places(choose(turns, [sine, cosine, neg(sine), neg(cosine)]), z.places)


def cos(z: Fixed) -> Fixed:
    """Return the cosine."""
    sine, cosine, turns = _sine_cosine(z)
    return with_places(choose(turns, [cosine, neg(sine), neg(cosine), sine]), z.places)
