"""What the numbers of an array of a record may be."""

import math
from typing import NamedTuple

LARGEST_INTEGER = 2**53
"""Integers of a record lie below it, so that float64 holds them and their differences exactly."""


class Values(NamedTuple):
    """What the numbers of one array may be.

    Attributes:
        least: smallest value.
        above: whether `least` itself is refused.
        most: largest value.
        finite: whether infinities are refused.
        nan: whether NaN stands for "not measured".
        among: the only numbers allowed, where it is not empty.
        whole: whether they must be integers, below `LARGEST_INTEGER`.
    """

    least: float = -math.inf
    above: bool = False
    most: float = math.inf
    finite: bool = False
    nan: bool = True
    among: tuple[int, ...] = ()
    whole: bool = False

    @property
    def words(self) -> str:
        """What they must be, for a message."""
        if self.among:
            return f"one of {', '.join(map(str, self.among))}"
        kind = "an integer" if self.whole else "a finite number" if self.finite else "a number"
        bounds = [f"{'>' if self.above else '>='} {self.least:g}"] * math.isfinite(self.least)
        return " ".join([kind, *bounds, *([f"and at most {self.most:g}"] * math.isfinite(self.most))])


ANY = Values()
"""Any number, NaN where nothing was measured."""
NON_NEGATIVE = Values(least=0.0)
"""At least 0."""
POSITIVE = Values(least=0.0, above=True)
"""Above 0."""
SHARE = Values(least=0.0, most=1.0)
"""From 0 to 1."""
FLAG = Values(among=(0, 1), nan=False)
"""0 or 1."""
COUNT = Values(least=1.0, whole=True, nan=False)
"""A whole number from 1 on."""
PLACE = Values(least=0.0, whole=True, nan=False)
"""A whole number from 0 on."""
