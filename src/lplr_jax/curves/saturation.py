"""A curve that rises to a limit, and where it has stopped growing."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from lplr_jax import checks

_HALVES = 200
"""Places tried for b on a log scale, before the best of them is refined. Calibrated."""
_REACH = 1e3
"""How far beyond the data b may lie: from there on the curve is a straight line over them. Calibrated."""


@dataclass(frozen=True)
class Saturation:
    """g(m) = c - a m/(b + m) with b > 0, fitted by least squares.

    Attributes:
        a: the limit lies at c - a, so a < 0 where the curve rises.
        b: where half of the way from g(0) to the limit is done.
        c: g(0).
    """

    a: float
    b: float
    c: float

    @property
    def limit(self) -> float:
        """g(∞) = c - a."""
        return self.c - self.a

    def at(self, m: Float[np.ndarray, "*k"]) -> Float[np.ndarray, "*k"]:
        """Return the fitted curve at m."""
        return self.c - self.a * m / (self.b + m)

    def slope(self, m: Float[np.ndarray, "*k"] | float) -> Float[np.ndarray, "*k"] | float:
        """Return g'(m) = -a b/(b + m)²."""
        return -self.a * self.b / (self.b + m) ** 2

    def reaches(self, share: float) -> float:
        """Return the least m >= 0 with g(m) >= share of the limit; NaN where the curve does not rise to a positive one.

        From there on the slope is at most (1 - share)² limit²/(-a b), a threshold of the slope in units of the data.
        """
        if not (self.a < 0 < self.limit):
            return math.nan
        # limit - g(m) = -a b/(b + m)
        return max(0.0, -self.a * self.b / ((1 - share) * self.limit) - self.b)


def saturation(m: Float[np.ndarray, " k"], values: Float[np.ndarray, " k"]) -> Saturation | None:
    """Fit g(m) = c - a m/(b + m), b > 0: a and c by linear least squares for every b, b by a search on a log scale.

    Args:
        m: abscissae > 0, three distinct ones at least.
        values: ordinates.

    Returns:
        The fit; None where fewer than three distinct points are finite.

    Raises:
        ValueError: for arrays of unlike lengths.

    Example:
        >>> m = np.array([1.0, 2.0, 4.0, 8.0])
        >>> fit = saturation(m, 5 * m / (3 + m))
        >>> round(fit.limit, 6), round(fit.b, 6), round(fit.reaches(0.9), 6)
        (5.0, 3.0, 27.0)
    """
    m, values = (checks.real_array(name, a, axes="k") for name, a in (("m", m), ("values", values)))
    if m.shape != values.shape:
        raise ValueError(f"m and values must have the same shape (k,), got {m.shape} and {values.shape}")
    known = np.isfinite(m) & np.isfinite(values) & (m > 0)
    m, values = m[known], values[known]
    if np.unique(m).size < 3:
        return None

    def linear(log_b: float) -> tuple[float, np.ndarray]:
        t = m / (math.exp(log_b) + m)
        columns = np.stack([t, np.ones_like(t)], axis=1)
        found = np.linalg.lstsq(columns, values, rcond=None)[0]
        return float(np.square(columns @ found - values).sum()), found

    places = np.linspace(math.log(m.min() / _REACH), math.log(m.max() * _REACH), _HALVES)
    best = int(np.argmin([linear(place)[0] for place in places]))
    low, high = places[max(best - 1, 0)], places[min(best + 1, places.size - 1)]
    settings = {"bounds": (low, high), "method": "bounded", "options": {"xatol": 1e-12}}
    import scipy.optimize  # most figures need none of it, and it takes as long to load as one to draw

    found: Any = scipy.optimize.minimize_scalar(lambda place: linear(place)[0], **settings)
    log_b = float(found.x)
    _, (rise, c) = linear(log_b)
    return Saturation(-float(rise), math.exp(log_b), float(c))
