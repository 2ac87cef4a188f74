"""A network of zero loss near the one that was reached: found in float64, and what certifies that there is one.

Newton-Kantorovich for ½‖f(θ) - y‖², with J surjective at θ̃ and r̃ = f(θ̃) - y: let h = L_J ‖r̃‖/λ_min(Θ(θ̃)), L_J the
Lipschitz constant of J in spectral norm on the closed ball of radius t* = (σ/L_J)(1 - √(1 - 2h)), σ = √λ_min(Θ(θ̃)). If
h <= ½, a zero of f - y lies within t* of θ̃. *Proof*: the steps -J̃⁺(f(θ_k) - y) with the pseudo-inverse at θ̃, of norm
1/σ, are majorised by t_{k+1} = t_k + φ(t_k)/σ with φ(t) = ‖r̃‖ - σ t + L_J t²/2, since ‖f(θ_{k+1}) - y‖ is at most
∫ ‖J - J̃‖ <= L_J (t_{k+1}² - t_k²)/2 = φ(t_{k+1}); t_k rises to the smaller root of φ, which is t* <= 2 ‖r̃‖/σ.

The point is sought with J never formed: minimum-norm steps -Jᵀ Θ⁻¹ r until r vanishes to rounding; then, among the
points of zero loss, downhill in ‖θ - θ_0‖, at first along its projected gradient, then by Newton's method on the
manifold {f = y}, whose Hessian there is P (I + Σ u_k ∇²f_k) P, u the multipliers and P the projection onto the kernel
of J, by conjugate gradients. A step is followed by minimum-norm corrections with the factor of Θ at hand.
"""

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jaxtyping import Float

from lplr_jax import linalg
from lplr_jax.certificates import up
from lplr_jax.losses import Objective
from lplr_jax.measurement.enclosed import residual_norm
from lplr_jax.measurement.flat import FlatNetwork
from lplr_jax.measurement.gradients import flat_parameters
from lplr_jax.measurement.kernel import max_eig_upper
from lplr_jax.ntk.empirical import precision_scope
from lplr_jax.proofs.assembly import dense_network
from lplr_jax.proofs.ball import anchor_of
from lplr_jax.proofs.rounding import INFLATE
from lplr_jax.types import Params

RATE = 2e10
"""Operations a second of two cores in float64, by which seconds become a number of steps. Calibrated."""
_DOWNHILL, _PRODUCTS, _HALVINGS, _CORRECTIONS = 6, 12, 8, 4
_SMALL = 1e-8
"""‖r‖/‖y‖ below which a point counts as one of zero loss while the distance is minimised."""
_ROUNDING = 1e-11
"""‖r‖/‖y‖ at which a point is polished: the bound of its rounding is far larger."""
_STATIONARY = 1e-4
"""Projected gradient over distance at which the distance counts as minimal: it then is to some 1e-8 of itself."""


@dataclass(frozen=True)
class Interpolant:
    """A point beside which a network of zero loss is sought, and the numbers that a certificate needs.

    Attributes:
        params: θ̃, in float64.
        residual: upper bound of ‖f(θ̃) - y‖, rounding included.
        min_eig_lower: proved lower bound of λ_min(Θ(θ̃)); NaN where none is known.
        jacobian_lipschitz: proved bound of the Lipschitz constant of J on the closed ball; NaN where none is known.
        ball: its radius around θ̃, at least 2 residual/√min_eig_lower.
        distance: upper bound of ‖θ̃ - θ_0‖.
        stationarity: ‖P (θ̃ - θ_0)‖ over the distance; 0 where no point of zero loss nearby is nearer to θ_0.
        steps: kernels that were factorised.
    """

    params: Params
    residual: float
    min_eig_lower: float
    jacobian_lipschitz: float
    ball: float
    distance: float
    stationarity: float
    steps: int

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the numbers by record name."""
        named = {name: value for name, value in vars(self).items() if name != "params"}
        return {f"interpolant_{name}": np.asarray(value) for name, value in named.items()}


def duplicate_floor(x: Any, y: Float[np.ndarray, "n c"], scale: float) -> float:
    """Return a lower bound of the squared loss of every function of each sample alone.

    It is 0 unless equal inputs have unlike targets, for which the mean of their targets is the best output.
    """
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(x)]
    groups: dict[Hashable, list[int]] = {}
    for i in range(len(y)):
        groups.setdefault(tuple(leaf[i].tobytes() for leaf in leaves), []).append(i)
    wide = np.asarray(y, np.float64)
    off = sum(float(np.square(wide[group] - wide[group].mean(axis=0)).sum()) for group in groups.values())
    return max(off / (2 * scale) * (1 - 1e-9), 0.0)


class Budget:
    """Seconds of two cores as a number of operations: a clock would make a record depend on the machine's load."""

    def __init__(self, seconds: float, *, n: int, rows: int, p: int) -> None:
        """Count what a step costs.

        Args:
            seconds: of two cores.
            n: samples.
            rows: of the kernel, n c.
            p: parameters.
        """
        sweep, square = float(n) * p, float(rows) ** 2
        self.plain = 16 * square * math.sqrt(p) + square * rows / 3 + 14 * sweep
        """Operations of a step of least norm: kernel, factor, two products with J."""
        self.newton = self.plain + _PRODUCTS * (22 * sweep + 4 * square) + _CORRECTIONS * 8 * sweep
        """Operations of a step by conjugate gradients."""
        self.left = seconds * RATE - (_CORRECTIONS + 2) * self.plain
        """What is left beside the last steps and the certificate."""

    def spend(self, operations: float) -> bool:
        """Take operations; return whether there were as many."""
        if operations > self.left:
            return False
        self.left -= operations
        return True


class _Search(FlatNetwork):
    """Points, residuals and projections around θ_0, all of them vectors in float64 on the host."""

    def __init__(self, objective: Objective, initial: Params, x: Any, y: Any, kernel: str) -> None:
        super().__init__(objective.apply_fn, initial, x, kernel)
        outputs = lambda w, x: self.apply_fn(self.unravel(w), x).reshape(-1)  # noqa: E731
        self._targets = np.asarray(y, np.float64).reshape(-1)
        self.size = float(np.linalg.norm(self._targets))
        self._outputs: Callable[..., Any] = jax.jit(outputs)
        self._along = jax.jit(lambda w, d, x: jax.jvp(lambda q: outputs(q, x), (w,), (d,))[1])
        self._back = jax.jit(lambda w, u, x: jax.vjp(lambda q: outputs(q, x), w)[1](u)[0])
        slope = jax.grad(lambda q, u, x: jnp.sum(outputs(q, x) * u))
        self._bent = jax.jit(lambda w, u, d, x: jax.jvp(lambda q: slope(q, u, x), (w,), (d,))[1])
        self.steps = 0

    def residual(self, w: np.ndarray) -> np.ndarray:
        return np.asarray(self._outputs(w, self.x)) - self._targets

    def at(self, w: np.ndarray) -> "_Tangent":
        """Factorise the kernel at a point; LinAlgError where it is not positive."""
        self.steps += 1
        return _Tangent(self, w, scipy.linalg.cho_factor(self.kernel(w), lower=True))

    def along(self, w: np.ndarray, d: np.ndarray) -> np.ndarray:
        return np.asarray(self._along(w, d, self.x))

    def back(self, w: np.ndarray, u: np.ndarray) -> np.ndarray:
        return np.asarray(self._back(w, u, self.x))

    def bent(self, w: np.ndarray, u: np.ndarray, d: np.ndarray) -> np.ndarray:
        """Return Σ u_k ∇²f_k d."""
        return np.asarray(self._bent(w, u, d, self.x))


class _Tangent:
    """J at one point, by its products and the factor of J Jᵀ."""

    def __init__(self, search: _Search, w: np.ndarray, factor: Any) -> None:
        self.search, self.w, self._factor = search, w, factor

    def solve(self, b: np.ndarray) -> np.ndarray:
        return scipy.linalg.cho_solve(self._factor, b)

    def least(self, residual: np.ndarray) -> np.ndarray:
        """Return the step of least norm that takes a residual away, to first order: -Jᵀ Θ⁻¹ r."""
        return -self.search.back(self.w, self.solve(residual))

    def multipliers(self, v: np.ndarray) -> np.ndarray:
        return self.solve(self.search.along(self.w, v))

    def project(self, v: np.ndarray) -> np.ndarray:
        """Return P v, the part that does not change f to first order."""
        return v - self.search.back(self.w, self.multipliers(v))

    def corrected(self, w: np.ndarray) -> tuple[np.ndarray, float]:
        """Go back to f = y from a point nearby; return the point and ‖r‖ there."""
        size = math.inf
        for _ in range(_CORRECTIONS):
            r = self.search.residual(w)
            before, size = size, float(np.linalg.norm(r))
            if not size < before or size <= _SMALL * self.search.size:
                break
            w = w + self.least(r)
        return w, float(np.linalg.norm(self.search.residual(w)))


def _to_zero(search: _Search, w: np.ndarray, allowed: Callable[[], bool]) -> np.ndarray | None:
    """Take damped steps of least norm until the residual is at rounding; None where it does not get there."""
    size = float(np.linalg.norm(search.residual(w)))
    while size > _ROUNDING * search.size and allowed():
        d, share = search.at(w).least(search.residual(w)), 1.0
        while not (smaller := float(np.linalg.norm(search.residual(w + share * d)))) < size * (1 - 0.1 * share):
            share /= 2
            if share < 1e-4:  # no descent: at rounding, or stuck
                return w if size <= _SMALL * search.size else None
        w, size = w + share * d, smaller
    return w if size <= _SMALL * search.size else None


def _nearer(search: _Search, w: np.ndarray, budget: Budget) -> tuple[np.ndarray, float]:
    """Lower the distance to θ_0 among points of zero loss; return the point and its stationarity before the last step.

    Newton's steps come after a few along the projected gradient, which are cheaper and as good far away.
    """
    stationarity, step = math.inf, 0
    while budget.spend(budget.plain if step < _DOWNHILL else budget.newton):
        tangent, away = search.at(w), w - search.centre
        back, direction = tangent.least(search.residual(w)), -tangent.project(away)
        distance = float(np.linalg.norm(away))
        stationarity = float(np.linalg.norm(direction)) / distance if distance > 0 else 0.0
        if stationarity <= _STATIONARY:
            break
        if step >= _DOWNHILL:
            direction = _newton(tangent, away, direction)
        share, found = 1.0, None
        for _ in range(_HALVINGS):
            trial, size = tangent.corrected(w + back + share * direction)
            if size <= 0.01 * search.size and np.linalg.norm(trial - search.centre) < distance:
                found = trial
                break
            share /= 2
        if found is None and step >= _DOWNHILL:
            break
        w, step = (w if found is None else found), (_DOWNHILL if found is None else step + 1)
    return w, stationarity


def _newton(tangent: _Tangent, away: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve P (I + Σ u_k ∇²f_k) P d = b in the tangent space by conjugate gradients, as far as the curvature is > 0."""
    u = -tangent.multipliers(away)
    d, rest = np.zeros_like(b), b.copy()
    q, square = rest.copy(), float(rest @ rest)
    goal = 0.01 * square * min(1.0, math.sqrt(square))
    for product in range(_PRODUCTS):
        image = tangent.project(q + tangent.search.bent(tangent.w, u, q))
        curvature = float(q @ image)
        if not curvature > 1e-8 * float(q @ q):
            return q if product == 0 else d
        d = d + (square / curvature) * q
        rest = rest - (square / curvature) * image
        before, square = square, float(rest @ rest)
        if square < goal:
            break
        q = rest + (square / before) * q
    return d


def find_interpolant(
    objective: Objective,
    params: Params,
    x: Any,
    y: Any,
    *,
    initial: Params,
    seconds: float,
    kernel: str = "auto",
) -> Interpolant | None:
    """Seek a point of zero squared loss near θ_0, from where a run ended, and measure what certifies it.

    Args:
        objective: the squared loss of a network.
        params: where to start, θ_T.
        x: inputs (n, ...).
        y: targets.
        initial: θ_0.
        seconds: of two cores, by `Budget`.
        kernel: one of `lplr_jax.ntk.KERNELS`.

    Returns:
        The point; None where the seconds do not suffice, or no point of zero loss was reached.

    Raises:
        linalg.UntrustedError: where the arithmetic loses a number.
    """
    with precision_scope("float64"):
        search = _Search(objective, initial, x, y, kernel)
        start = flat_parameters(params)
        rows = search.residual(start).size
        n = int(jax.tree.leaves(x)[0].shape[0])
        budget, last = Budget(seconds, n=n, rows=rows, p=start.size), iter(range(_CORRECTIONS))
        try:
            w = _to_zero(search, start, lambda: budget.spend(budget.plain)) if rows <= start.size else None
            if w is None:
                return None
            near, stationarity = _nearer(search, w, budget)
            # A correction stops short of rounding.
            near = _to_zero(search, near, lambda: next(last, None) is not None)
        except np.linalg.LinAlgError:  # the kernel is not positive, so no step of least norm is defined
            return None
        if near is None:
            return None
        point, far = search.unravel(jnp.asarray(near)), float(np.linalg.norm(near - search.centre))
        theta = linalg.as_symmetric(search.kernel(near))
        residual, least, bend, ball = certificate(objective, point, x, y, theta)
        return Interpolant(
            params=jax.device_get(point),
            residual=residual,
            min_eig_lower=least,
            jacobian_lipschitz=bend,
            ball=ball,
            # A norm of p squares in float64.
            distance=up(far * (1 + near.size * 2.0**-52)),
            stationarity=stationarity,
            steps=search.steps,
        )


def certificate(
    objective: Objective, params: Params, x: Any, y: Any, theta: Float[np.ndarray, "nc nc"]
) -> tuple[float, float, float, float]:
    """Return what Newton-Kantorovich asks for at a point.

    Args:
        objective: the squared loss of a network.
        params: θ̃, in float64.
        x: inputs (n, ...).
        y: targets (n, c), or (n,) for (n, 1).
        theta: its kernel as it was computed.

    Returns:
        Upper bound of ‖f(θ̃) - y‖, lower bound of λ_min, bound of L_J on the ball, radius of the ball; all of them NaN
        where the rounding of the network has no bound, L_J alone where its activations are not smooth.
    """
    network = dense_network(objective.apply_fn, params, x)
    if network is None or not (bound := network.assembly(theta)).finite:
        return math.nan, math.nan, math.nan, math.nan
    _, residual = residual_norm(network.outputs, network.output_error, y)
    least = linalg.min_eig(theta, **vars(bound)).lower
    if not least > 0:
        return residual, least, math.nan, math.nan
    ball = up(2 * residual / math.sqrt(least) * INFLATE)
    size = max_eig_upper(theta, bound.kernel_error(theta))
    base = anchor_of(network, max_eig_upper=size, residual_norm=residual, loss_scale=1.0)
    return residual, least, math.nan if base is None else base.on_ball(ball).jacobian_lipschitz, ball
