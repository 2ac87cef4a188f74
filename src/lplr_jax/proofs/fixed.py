"""Arrays of fixed-point numbers with as many digits as asked for, each entry with a bound of its error.

A number is Σ_i d_i 2^(B (E - i - 1)), B = 20 bits, with whole digits |d_i| <= 2¹⁹ kept as float64 and one E for the
whole array; its `radius` bounds the distance to the exact value, entry by entry. So every array is a stack of matrices
of small integers: products of two digits have 38 bits, and a sum of up to 2¹⁵ of them is exact in float64 in whatever
order it is taken, with or without fused multiply-adds. Matrix products of many digits are therefore BLAS products of
digits, and nothing is assumed of BLAS but that it forms sums of products. (The idea of exact products of slices:
Ozaki, Ogita, Oishi, Rump 2012.)

Errors: what is cut off beyond `places` digits is added to the radius; for |a - â| <= r_a, |b - b̂| <= r_b

* |(a + b) - (â + b̂)| <= r_a + r_b,
* |a b - â b̂| <= |â| r_b + r_a (|b̂| + r_b), and so for sums of products.

Radii are float64; they are sums and products of non-negative numbers, at most 2²⁰ roundings each, and inflated by 2⁻³⁰
each time. A zero that is made of zeros alone stays an exact zero of radius 0: dead inputs stay dead.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

BITS = 20
_BASE = 2.0**BITS
_UP = 1.0 + 2.0**-30
_LEAST = 1e-290
"""Added to a radius against underflow of the products that it is made of."""
_EXACT_TERMS = 2 ** (53 - 2 * (BITS - 1)) - 1
"""Products of digits whose sum, with what is carried to it, is exact in float64."""
_RANGE = 48
"""Largest place of a digit: 2⁹⁶⁰ and 2⁻⁹⁶⁰ are float64."""
_SPAN = BITS * 31
"""Binary digits from the first of the largest constant of an array to the first of one that counts in it."""
_TINY = 1e-250
"""Constants below this are taken for a zero of that radius: they have no place."""
_FAR = -1e25
"""Constants below this mask something out: of them only that they are below is kept."""
_FAR_ROOM = 1e12
"""Most that is added to what is far below: 10¹² times as much leave it below -1e24."""
STILL_NEAR = -1e24
"""What is far below is less than this, so it is certainly less than numbers above."""


class UndecidedError(ArithmeticError):
    """No bound is known: what the message says may come out either way, or has no rule."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """An array of fixed-point numbers.

    Attributes:
        digits: (k, *shape), whole float64 of at most 2¹⁹.
        high: E.
        radius: bound of the errors, shape; None where all are exact.
        places: most digits that results have.
        far: entries of which is known only that they are below -1e24; None for none.
        larger_of: the two arrays whose entrywise maximum this is, where it is one.
        largest_of: the array whose maxima along some axes this holds, and those axes; laid out so that it broadcasts
            against the array once they are kept.
    """

    digits: np.ndarray
    high: int
    radius: np.ndarray | None
    places: int
    far: np.ndarray | None = None
    larger_of: "tuple[Fixed, Fixed] | None" = None
    largest_of: "tuple[Fixed, tuple[int, ...]] | None" = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array."""
        return self.digits.shape[1:]

    @cached_property
    def mid(self) -> np.ndarray:
        """The numbers in float64, to a relative 2⁻⁵⁰: the first digit that is not zero outweighs those after it."""
        total = np.zeros(self.shape)
        for i in reversed(range(self.digits.shape[0])):
            total += self.digits[i] * 2.0 ** (BITS * (self.high - i - 1))
        return total

    @cached_property
    def size(self) -> np.ndarray:
        """Upper bounds of the moduli of the numbers, errors not counted."""
        return np.abs(self.mid) * _UP

    @cached_property
    def reach(self) -> np.ndarray:
        """Upper bounds of the moduli of the exact values."""
        return self.size if self.radius is None else (self.size + self.radius) * _UP

    @cached_property
    def alive(self) -> np.ndarray:
        """Entries that may not be exactly zero, as numbers 1.0 and 0.0."""
        return (self.reach > 0).astype(np.float64)

    @property
    def error(self) -> np.ndarray:
        """The radius as an array."""
        return np.zeros(self.shape) if self.radius is None else self.radius

    def near(self) -> "Fixed":
        """Refuse what is known only to be far below.

        Raises:
            UndecidedError: if there is any.
        """
        if self.far is not None and self.far.any():
            raise UndecidedError("a number that masks something out is used as a number")
        return self

    def map(self, move: Callable[[np.ndarray], np.ndarray]) -> "Fixed":
        """Return the array with entries moved or repeated: `move` acts on arrays with this shape."""
        digits = np.stack([move(digit) for digit in self.digits])
        radius = None if self.radius is None else move(self.radius)
        far = None if self.far is None else move(self.far)
        return Fixed(digits, self.high, radius, self.places, far)


def _settled(
    digits: np.ndarray, high: int, radius: np.ndarray | None, places: int, far: np.ndarray | None = None
) -> Fixed:
    """Carry, drop what is zero, and cut off what has no place; `digits`, whole numbers below 2⁵³, are overwritten."""
    for i in reversed(range(1, digits.shape[0])):
        _carry(digits, i)
    while True:
        over = np.rint(digits[0] * (1 / _BASE))
        if not over.any():
            break
        digits[0] -= over * _BASE
        digits = np.concatenate([over[None], digits])
        high += 1
    first, last = 0, digits.shape[0]
    while first < last - 1 and not digits[first].any():
        first += 1
    high -= first
    # Digits below the range of float64 have no place either.
    while last > first and (last > first + places or high - (last - first) < -_RANGE):
        last -= 1
        cut = digits[last]
        if cut.any():
            weight = 2.0 ** max(BITS * (high - (last - first) - 1), -1000)
            lost = np.abs(cut) * (weight * _UP)
            radius = lost if radius is None else (radius + lost) * _UP
    while last > first + 1 and not digits[last - 1].any():
        last -= 1
    digits = digits[first:last] if last > first else np.zeros((1, *digits.shape[1:]))
    if digits.shape[0] == 1 and not digits.any():
        high = 0
    if high > _RANGE:
        raise UndecidedError(f"numbers of size 2^{BITS * high} are beyond the range of the enclosures")
    if radius is not None and not radius.any():
        radius = None
    if radius is not None and not np.isfinite(radius).all():
        raise UndecidedError("the bound of an error overflows")
    return Fixed(digits, high, radius, places, far)


def _carry(digits: np.ndarray, i: int) -> None:
    over = np.rint(digits[i] * (1 / _BASE))
    digits[i] -= over * _BASE
    digits[i - 1] += over


def fixed(value: Any, places: int) -> Fixed:
    """Return an array of float64 (or whole numbers below 2⁵³, or truth values) as fixed-point numbers.

    Raises:
        UndecidedError: for what is not finite; -∞ and anything below -1e25 is kept as being far below.
    """
    array = np.asarray(value, np.float64)
    tiny = (array != 0) & (np.abs(array) < _TINY)
    far = array < _FAR
    if far.any():
        array = np.where(far, 0.0, array)
    if not np.isfinite(array).all():
        raise UndecidedError("a constant is not finite")
    top = float(np.abs(array).max(initial=0.0))
    high = 0 if top == 0 else -(-int(np.frexp(top)[1]) // BITS)
    # Digits of what is this far below the largest are beyond the range of float64.
    tiny |= (array != 0) & (np.abs(array) < top * 2.0**-_SPAN)
    if tiny.any():
        found = fixed(np.where(tiny, 0.0, array), places)
        error = np.asarray(found.error + np.where(tiny, np.maximum(np.abs(array), _TINY), 0.0))
        return Fixed(found.digits, found.high, error * _UP, places, far if far.any() else None)
    rest, digits = array * 2.0 ** (-BITS * high), []
    for _ in range(places):
        rest = rest * _BASE
        digit = np.rint(rest)
        rest = rest - digit
        digits.append(digit)
        if not rest.any():
            break
    radius = np.abs(rest) * (2.0 ** (BITS * (high - places)) * _UP) if rest.any() else None
    return _settled(np.stack(digits), high, radius, places, far if far.any() else None)


def rational(numerator: int, denominator: int, places: int) -> Fixed:
    """Return a quotient of whole numbers below 2⁸⁰⁰."""
    low = BITS * (places + 1)
    whole, rest = divmod(abs(numerator) << low, denominator)
    sign, digits = (1 if numerator >= 0 else -1), []
    while whole:
        digits.append(float(sign * (whole & (2**BITS - 1))))
        whole >>= BITS
    if not digits:
        digits = [0.0]
    radius = np.array(2.0**-low) if rest else None
    return _settled(np.array(digits[::-1]), len(digits) - places - 1, radius, places)


def aligned(parts: Sequence[Fixed]) -> tuple[list[np.ndarray], int]:
    """Return the digits of several arrays with one E, as many of each, and that E."""
    high = max(part.high for part in parts)
    low = max(part.digits.shape[0] + high - part.high for part in parts)
    # What lies far below the largest is cut off by who asks.
    stacks = []
    for part in parts:
        stack = np.zeros((low, *part.shape))
        stack[high - part.high : high - part.high + part.digits.shape[0]] = part.digits
        stacks.append(stack)
    return stacks, high


def _sum_radius(*radii: np.ndarray | None) -> np.ndarray | None:
    known = [radius for radius in radii if radius is not None]
    if not known:
        return None
    return np.asarray(known[0] if len(known) == 1 else sum(known[1:], start=known[0]) * _UP)


def _either(one: np.ndarray | None, two: np.ndarray | None, shape: tuple[int, ...]) -> np.ndarray | None:
    if one is None and two is None:
        return None
    return np.broadcast_to(False if one is None else one, shape) | np.broadcast_to(False if two is None else two, shape)


def add(a: Fixed, b: Fixed) -> Fixed:
    """Return a + b; shapes broadcast."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    high = max(a.high, b.high)
    depth = max(part.digits.shape[0] + high - part.high for part in (a, b))
    total = np.zeros((depth, *shape))
    for part in (a, b):
        total[high - part.high : high - part.high + part.digits.shape[0]] += part.digits.reshape(
            part.digits.shape[0], *(1,) * (len(shape) - len(part.shape)), *part.shape
        )
    radius = _sum_radius(a.radius, b.radius)
    if radius is not None:
        radius = np.broadcast_to(radius, shape)
    for one, other in ((a, b), (b, a)):
        if one.far is not None and (one.far & (other.reach > _FAR_ROOM)).any():
            raise UndecidedError("a large number is added to one that masks something out")
    return _settled(total, high, radius, max(a.places, b.places), _either(a.far, b.far, shape))


def neg(a: Fixed) -> Fixed:
    """Return -a."""
    a.near()
    return Fixed(-a.digits, a.high, a.radius, a.places)


def sub(a: Fixed, b: Fixed) -> Fixed:
    """Return a - b; shapes broadcast."""
    return add(a, neg(b))


def _product_radius(
    a: Fixed, b: Fixed, cut: float, form: Callable[[np.ndarray, np.ndarray], np.ndarray]
) -> np.ndarray | None:
    """Bound the error of sums of products; `cut` bounds what is left out of one product."""
    found = []
    if b.radius is not None:
        found.append(form(a.size, b.radius))
    if a.radius is not None:
        found.append(form(a.radius, b.reach))
    least = cut + (_LEAST if found else 0.0)
    if least:
        found.append(form(a.alive, b.alive) * least)
    return None if not found else np.asarray(sum(found[1:], start=found[0])) * _UP


def mul(a: Fixed, b: Fixed) -> Fixed:
    """Return a b, entry by entry; shapes broadcast."""
    a.near()
    b.near()
    places = max(a.places, b.places)
    shape = np.broadcast_shapes(a.shape, b.shape)
    na, nb = a.digits.shape[0], b.digits.shape[0]
    kept = min(na + nb - 1, places + 1)
    total = np.zeros((kept, *shape))
    buffer = np.empty(shape)
    for i in range(na):
        for j in range(min(nb, kept - i)):
            np.multiply(a.digits[i], b.digits[j], out=buffer)
            total[i + j] += buffer
    high = a.high + b.high - 1
    cut = _cut(na, nb, kept, high)
    radius = _product_radius(a, b, cut, np.multiply)
    if radius is not None:
        radius = np.broadcast_to(radius, shape)
    return _settled(total, high, radius, places)


def _cut(na: int, nb: int, kept: int, high: int) -> float:
    """Bound the products of digits that are left out: at most na nb of them, each at most 2³⁸ in its place."""
    left_out = na + nb - 1 > kept
    return na * nb * 2.0 ** max(2 * BITS - 2 + BITS * (high - kept - 1), -1000) * _UP if left_out else 0.0


Stacked = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Sums of products of a stack (g, *shape) with one array, (g, *result)."""


def contract(a: Fixed, b: Fixed, form: Stacked, terms: int) -> Fixed:
    """Return sums of products, such as a matrix product or a convolution.

    Args:
        a: what is stacked.
        b: the other operand.
        form: the same sums of float64 numbers.
        terms: most products in a sum.

    Raises:
        UndecidedError: for sums too long to be exact.
    """
    a.near()
    b.near()
    if terms > _EXACT_TERMS:
        raise UndecidedError(f"a sum of {terms} products is longer than {_EXACT_TERMS}")
    places = max(a.places, b.places)
    na, nb = a.digits.shape[0], b.digits.shape[0]
    kept = min(na + nb - 1, places + 1)
    total: np.ndarray | None = None
    held = 0
    for j in range(min(nb, kept)):
        found = form(a.digits[: kept - j], b.digits[j])
        if total is None:
            total = np.zeros((kept, *found.shape[1:]))
        if held + terms > _EXACT_TERMS:
            # The first digit takes what is carried: it has room, as what it holds is a sum of few.
            for i in reversed(range(1, kept)):
                _carry(total, i)
            held = 1
            if float(np.abs(total[0]).max(initial=0.0)) + terms * 2.0 ** (2 * BITS - 2) >= 2.0**53:
                raise UndecidedError("a sum of products is too long to be exact")
        total[j : j + found.shape[0]] += found
        held += terms
    assert total is not None

    def once(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return form(x[None], y)[0]

    high = a.high + b.high - 1
    radius = _product_radius(a, b, _cut(na, nb, kept, high), once)
    if radius is not None:
        radius = radius * (1.0 + terms * 2.0**-50)
    return _settled(total, high, radius, places)


def linear(a: Fixed, apply: Callable[[np.ndarray], np.ndarray], terms: int) -> Fixed:
    """Return sums of entries of a: `apply` forms them for float64 numbers, at most `terms` each.

    Raises:
        UndecidedError: for sums too long to be exact.
    """
    a.near()
    if terms > 2 ** (53 - BITS):
        raise UndecidedError(f"a sum of {terms} numbers is too long to be exact")
    radius = None if a.radius is None else apply(a.radius) * (1.0 + terms * 2.0**-50)
    return _settled(np.stack([apply(digit) for digit in a.digits]), a.high, radius, a.places)


def joined(parts: Sequence[Fixed], join: Callable[[list[np.ndarray]], np.ndarray], terms: int = 1) -> Fixed:
    """Return several arrays put into one: `join` does it for float64 arrays, each entry a sum of `terms` at most."""
    stacks, high = aligned(parts)
    digits = np.stack([join([stack[i] for stack in stacks]) for i in range(stacks[0].shape[0])])
    radius = far = None
    if any(part.radius is not None for part in parts):
        radius = join([part.error for part in parts]) * (_UP + terms * 2.0**-50)
    if any(part.far is not None for part in parts):
        far = join([np.zeros(part.shape) if part.far is None else part.far.astype(float) for part in parts]) > 0
    return _settled(digits, high, radius, max(part.places for part in parts), far)


def choose(which: np.ndarray, cases: Sequence[Fixed]) -> Fixed:
    """Return entries of the case whose number is at that place in `which`; shapes broadcast."""
    shape = np.broadcast_shapes(which.shape, *(case.shape for case in cases))

    def pick(arrays: list[np.ndarray]) -> np.ndarray:
        return np.choose(np.broadcast_to(which, shape), [np.broadcast_to(array, shape) for array in arrays])

    return joined(cases, pick)


def signs(a: Fixed) -> np.ndarray:
    """Return the sign of every number (-1, 0 or 1), its error not counted."""
    return np.sign(a.mid)


def certain_signs(a: Fixed, b: Fixed) -> np.ndarray:
    """Return the sign of a - b for the exact values, entry by entry; shapes broadcast.

    Raises:
        UndecidedError: if one of them is within its error of zero, or both are far below.
    """
    far_a, far_b = (np.broadcast_to(False if x.far is None else x.far, x.shape) for x in (a, b))
    if (far_a & far_b).any():
        raise UndecidedError("two numbers that mask something out are compared")
    _above_far(a, far_b)
    _above_far(b, far_a)
    gap = sub(*(Fixed(x.digits, x.high, x.radius, x.places) for x in (a, b)))
    unknown = (gap.error > 0) & (np.abs(gap.mid) <= gap.error * _UP * _UP) & ~far_a & ~far_b
    if unknown.any():
        raise UndecidedError("a number lies within its error of a kink or a jump")
    return np.where(far_a, -1.0, np.where(far_b, 1.0, np.sign(gap.mid)))


def _above_far(a: Fixed, where: np.ndarray) -> None:
    """Refuse numbers that are compared with what is far below, and may be as far below.

    Raises:
        UndecidedError: if there is any.
    """
    if where.any() and (where & (a.mid - a.error * _UP < STILL_NEAR)).any():
        raise UndecidedError("a number may be less than one that masks something out")


def maximum(a: Fixed, b: Fixed) -> Fixed:
    """Return the larger of two, entry by entry: the error is at most the larger error."""
    shape = np.broadcast_shapes(a.shape, b.shape)
    x, y = (part if part.far is None else Fixed(part.digits, part.high, part.radius, part.places) for part in (a, b))
    gap = sub(exactly(x), exactly(y))
    second = signs(gap) < 0
    far_a = np.broadcast_to(False if a.far is None else a.far, shape)
    far_b = np.broadcast_to(False if b.far is None else b.far, shape)
    _above_far(x, far_b & ~far_a)
    _above_far(y, far_a & ~far_b)
    # What is far below is less than anything else.
    second = np.where(far_a, True, np.where(far_b, False, second))
    found = choose(second.astype(np.int64), [x, y])
    radius = None
    if found.radius is not None or x.radius is not None or y.radius is not None or gap.radius is not None:
        one, two = np.broadcast_to(x.error, shape), np.broadcast_to(y.error, shape)
        radius = np.where(far_a, two, np.where(far_b, one, np.maximum(one, two)))
        if found.radius is not None:
            radius = np.maximum(radius, found.radius)
        # What the difference lost in its last digit may have decided.
        radius = (radius + gap.error) * _UP
    far = far_a & far_b
    return Fixed(found.digits, found.high, radius, found.places, far if far.any() else None, (a, b))


def same(a: Fixed, b: Fixed) -> bool:
    """Return whether two arrays are certainly equal: one array, or two with the same exact numbers."""
    if a is b:
        return True
    exact = a.radius is None and b.radius is None and a.far is None and b.far is None
    return exact and a.high == b.high and np.array_equal(a.digits, b.digits)


def widened(a: Fixed, error: np.ndarray | None) -> Fixed:
    """Return the numbers with a larger error, by `error`."""
    if error is None:
        return a
    radius = _sum_radius(a.radius, np.broadcast_to(np.asarray(error, np.float64), a.shape))
    return _settled(a.digits.copy(), a.high, radius, a.places, a.far)


def exactly(a: Fixed) -> Fixed:
    """Return the numbers as exact ones: their error set aside."""
    return Fixed(a.digits, a.high, None, a.places, a.far)


def with_places(a: Fixed, places: int) -> Fixed:
    """Return the numbers with another count of digits for what is made of them."""
    return _settled(a.digits.copy(), a.high, a.radius, places, a.far)
