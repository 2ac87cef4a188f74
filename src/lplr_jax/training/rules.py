"""Step sizes that are chosen and not tuned: optax transformations along -∇L, whose state is a pytree. Ours.

Most rest on the decrease test (D): L(θ - η ∇L) <= L - a η ‖∇L‖². It holds with a = 1 - ηβ/2 where β bounds the
curvature on the segment; here β is measured by power iteration on the Hessian, which bounds it from below alone, so (D)
is looked at after every proposal and the step shortened until it holds.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

from lplr_jax import checks
from lplr_jax.schema import LOSS_SCALED_DECREASE, PATH_SHARE
from lplr_jax.types import Params

EVERY = 10
"""Steps between measurements of the curvature. Calibrated."""
FIRST_PRODUCTS, LATER_PRODUCTS = 20, 3
"""Hessian products of the first measurement, and of later ones, which begin where the last one ended. Calibrated."""
TRIES = 60
"""Shortenings of one step at most; 0.8^60 = 1.5e-6. Calibrated."""
SLACK = 16
"""Spacings of L that rounding may add to it in the decrease test. Calibrated."""
CLASSIFICATION = ("logistic", "softmax_cross_entropy")
"""Losses with ‖∇²L‖ <= B q̄, for which the loss-scaled step is stated; not those of smoothed labels, where ‖g_i‖ may
stay while 1 - e^{-ℓ_i} does."""


class StepRule(optax.GradientTransformationExtraArgs):
    """An optax transformation that says which rule it is.

    Attributes:
        text: the rule in one form, as `parse` reads it.
        learning_rate: η of a fixed step, NaN where it is chosen on the way.
        path_budget: R, below which the length of the path is held; NaN without one.
        losses: names of the losses that it is stated for; empty for any.
    """

    text: str
    learning_rate: float
    path_budget: float
    losses: tuple[str, ...]

    @classmethod
    def of(
        cls,
        transformation: optax.GradientTransformation,
        text: str,
        *,
        learning_rate: float = math.nan,
        path_budget: float = math.nan,
        losses: tuple[str, ...] = (),
    ) -> "StepRule":
        """Name a transformation."""
        rule = cls(*optax.with_extra_args_support(transformation))
        rule.text, rule.learning_rate, rule.path_budget, rule.losses = text, learning_rate, path_budget, losses
        return rule


class RuleState(NamedTuple):
    """What a rule carries from step to step."""

    steps: Int[Array, ""]
    """Steps taken."""
    curvature: Float[Array, ""]
    """β: as measured last, or as a step that failed the decrease test showed it since."""
    direction: Params
    """Where the power iteration stands, of unit length."""
    mistake: Float[Array, ""]
    """q̄ where β was measured; 1 for rules that do not ask for it."""
    path: Float[Array, ""]
    """ℓ_t = Σ η_t ‖∇L_t‖."""


class _Seen(NamedTuple):
    """What a proposal may rest on, at θ_t."""

    value: Array
    slope: Array
    """‖∇L‖²."""
    cap: Array
    """κ/β, 1 where the Hessian vanishes."""
    mistake: Array
    state: RuleState


def _curvature(
    value_fn: Callable[[Params], Array], params: Params, direction: Params, products: Int[Array, ""]
) -> tuple[Array, Params]:
    """Return ‖Hv‖ <= ‖H‖ and v after a number of power iterations."""
    gradient = jax.grad(value_fn)

    def body(_: Any, carry: tuple[Array, Params]) -> tuple[Array, Params]:
        moved = jax.jvp(gradient, (params,), (carry[1],))[1]
        length = optax.tree.norm(moved)
        unit = jax.tree.map(lambda a, b: jnp.where(length > 0, a / length.astype(a.dtype), b), moved, carry[1])
        return length.astype(carry[0].dtype), unit

    dtype = jax.eval_shape(value_fn, params).dtype
    return jax.lax.fori_loop(0, products, body, (jnp.zeros((), dtype), direction))


def _start(params: Params) -> Params:
    """Return a random direction of unit length, the same for the same shapes."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [jax.random.normal(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    length = optax.tree.norm(drawn)
    return jax.tree.unflatten(tree, [leaf / length.astype(leaf.dtype) for leaf in drawn])


def _mistake(losses: Array) -> Array:
    """Return q̄ = mean(1 - e^{-ℓ_i})."""
    return jnp.mean(-jnp.expm1(-losses))


def _by_curvature(
    text: str,
    propose: Callable[[_Seen], Array],
    *,
    kappa: float,
    decrease: float,
    every: int | None,
    losses: tuple[str, ...] = (),
    path_budget: float = math.nan,
) -> StepRule:
    """Return a rule that proposes a step size and shortens it until (D) holds with a = `decrease`.

    Args:
        text: its name.
        propose: from what was seen at θ_t to η_t.
        kappa: the cap of η is κ/β.
        decrease: a of the test.
        every: steps between measurements of β; None for the first step alone.
        losses: of `StepRule`; where it is not empty, `losses_fn` is asked for.
        path_budget: of `StepRule`.
    """

    def init(params: Params) -> RuleState:
        dtype = jnp.result_type(*map(jnp.asarray, jax.tree.leaves(params)))
        # A buffer of its own each, as the state is donated.
        beta, mistake, path = (jnp.full((), value, dtype) for value in (0, 1, 0))
        return RuleState(jnp.zeros((), jnp.int32), beta, _start(params), mistake, path)

    def update(
        updates: Params,
        state: RuleState,
        params: Params,
        *,
        value: Array,
        value_fn: Callable[[Params], Array],
        losses_fn: Callable[[Params], Array] | None = None,
        **ignored: Any,
    ) -> tuple[Params, RuleState]:
        del ignored
        dtype = state.curvature.dtype
        value, slope = value.astype(dtype), optax.tree.norm(updates, squared=True).astype(dtype)
        mistake = jnp.ones((), dtype)
        if losses:
            if losses_fn is None:
                raise TypeError(f"the step rule {text} wants losses_fn, from θ to the losses of the samples (n,)")
            mistake = _mistake(losses_fn(params)).astype(dtype)

        def measure() -> tuple[Array, Params, Array]:
            products = jnp.where(state.steps == 0, FIRST_PRODUCTS, LATER_PRODUCTS)
            beta, direction = _curvature(value_fn, params, state.direction, products)
            return beta.astype(dtype), direction, mistake

        due = state.steps == 0 if every is None else state.steps % every == 0
        beta, direction, measured_at = jax.lax.cond(
            due, measure, lambda: (state.curvature, state.direction, state.mistake)
        )
        state = state._replace(curvature=beta, direction=direction, mistake=measured_at)
        cap = jnp.where(beta == 0, jnp.ones_like(beta), kappa / beta)
        proposed = propose(_Seen(value, slope, cap, mistake, state)).astype(dtype)

        def stepped(size: Array) -> Params:
            return jax.tree.map(lambda leaf: -size.astype(leaf.dtype) * leaf, updates)

        def excess(size: Array) -> Array:
            """Return L(θ - ηG) - L; what is not finite counts as infinite."""
            after = value_fn(optax.apply_updates(params, stepped(size))).astype(dtype)
            return jnp.where(jnp.isfinite(after), after - value, jnp.inf)

        slack = SLACK * jnp.finfo(dtype).eps * jnp.abs(value)

        def fails(carry: tuple[Array, Array, Array]) -> Array:
            size, above, tries = carry
            return (above > slack - decrease * size * slope) & (tries < TRIES)

        def shorter(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            size, above, tries = carry
            # The secant curvature of the step that failed is what (D) would have asked β to be.
            secant = 2 * (above + size * slope) / (size**2 * slope)
            fitting = jnp.where(jnp.isfinite(secant), 2 * (1 - decrease) / secant, size / 8)
            size = jnp.minimum(fitting, 0.8 * size)
            return size, excess(size), tries + 1

        start = (proposed, excess(proposed), jnp.zeros((), jnp.int32))
        size, _, tries = jax.lax.while_loop(fails, shorter, start)
        raised = jnp.maximum(beta, 2 * (1 - decrease) / size)
        state = state._replace(
            steps=state.steps + 1,
            curvature=jnp.where((tries > 0) & jnp.isfinite(raised), raised, beta),
            path=state.path + size * jnp.sqrt(slope),
        )
        return stepped(size), state

    transformation = optax.GradientTransformationExtraArgs(init, update)  # pyright: ignore[reportArgumentType]
    return StepRule.of(transformation, text, losses=losses, path_budget=path_budget)


# Compiled code is found again by the identity of the transformation, so each rule is made once for each setting.


@lru_cache(maxsize=64)
def fixed(learning_rate: float) -> StepRule:
    """Return gradient descent with one η: `optax.sgd`."""
    checks.number("the step size of fixed", learning_rate, above=0)
    return StepRule.of(optax.sgd(learning_rate), f"fixed:{learning_rate!r}", learning_rate=learning_rate)


@lru_cache(maxsize=64)
def sharpness(kappa: float = 1.0, *, every: int = EVERY) -> StepRule:
    """Return η_t = κ/β_t with (D), a = 1 - κ/2.

    Args:
        kappa: κ, above 0 and below 2.
        every: steps between measurements of β.
    """
    _between("κ of sharpness", kappa, 2.0)
    checks.whole("every", every, least=1)
    return _by_curvature(
        f"sharpness:{kappa!r}", lambda seen: seen.cap, kappa=kappa, decrease=1 - kappa / 2, every=every
    )


@lru_cache(maxsize=64)
def armijo(sigma: float = 0.5) -> StepRule:
    """Return optax's backtracking: L(θ - η ∇L) <= L - σ η ‖∇L‖², to rounding, whatever the architecture.

    Args:
        sigma: σ, above 0 and below 1.
    """
    _between("σ of armijo", sigma, 1.0)

    def search(dtype: Any) -> optax.GradientTransformationExtraArgs:
        # From 1 down to 2e-10 in the first step; at most half as long again as the last one from then on.
        slack = SLACK * float(jnp.finfo(dtype).eps)
        line = optax.scale_by_backtracking_linesearch(100, slope_rtol=sigma, max_learning_rate=2.0**20, rtol=slack)
        return optax.chain(optax.sgd(1.0), line)

    def update(updates: Params, state: Any, params: Params | None = None, **seen: Any) -> tuple[Params, Any]:
        with jax.numpy_dtype_promotion("standard"):  # optax multiplies by weak numbers of its own
            return search(seen["value"].dtype).update(updates, state, params, **seen)

    made = optax.GradientTransformationExtraArgs(search(jnp.float32).init, update)
    return StepRule.of(made, f"armijo:{sigma!r}")


@lru_cache(maxsize=64)
def polyak(kappa: float = 1.0, *, every: int = EVERY) -> StepRule:
    """Return Polyak's η_t = L_t / ‖∇L_t‖² for a least loss of 0, at most κ/β_t, with (D), a = 1 - κ/2.

    It is `optax.polyak_sgd` with a cap that is measured; that one stops where ‖∇L‖² <= 2.2e-16, this one does not.
    """
    _between("κ of polyak", kappa, 2.0)

    def propose(seen: _Seen) -> Array:
        polyak_step = jnp.where(seen.slope > 0, seen.value / seen.slope, jnp.zeros_like(seen.slope))
        return jnp.minimum(polyak_step, seen.cap)

    return _by_curvature(f"polyak:{kappa!r}", propose, kappa=kappa, decrease=1 - kappa / 2, every=every)


@lru_cache(maxsize=64)
def budget(radius: float, *, every: int = EVERY) -> StepRule:
    """Return η_t = 1/β_t, and at most w (R - ℓ_t) / ‖∇L_t‖ with w = ½: the path stays shorter than R by construction.

    Args:
        radius: R, in units of the parameters.
        every: steps between measurements of β.
    """
    checks.number("R of budget", radius, above=0)

    def propose(seen: _Seen) -> Array:
        left = jnp.maximum(radius - seen.state.path, 0.0)
        most = jnp.where(seen.slope > 0, PATH_SHARE * left / jnp.sqrt(seen.slope), jnp.zeros_like(seen.slope))
        return jnp.minimum(seen.cap, most)

    text = f"budget:{radius!r}"
    return _by_curvature(text, propose, kappa=1.0, decrease=0.5, every=every, path_budget=radius)


@lru_cache(maxsize=64)
def loss_scaled(*, every: int = EVERY) -> StepRule:
    """Return η_t = ln 2 / (B q̄_t), q̄ = mean(1 - e^{-ℓ_i}), for logistic loss and cross-entropy, with (D), a = .557.

    B is measured as β/q̄ where β is, which bounds it from below alone; the test does the rest.
    """

    def propose(seen: _Seen) -> Array:
        return seen.cap * jnp.where(seen.mistake > 0, seen.state.mistake / seen.mistake, jnp.ones_like(seen.mistake))

    return _by_curvature(
        "loss-scaled", propose, kappa=math.log(2), decrease=LOSS_SCALED_DECREASE, every=every, losses=CLASSIFICATION
    )


@lru_cache(maxsize=64)
def decay(alpha: float = 0.5, learning_rate: float | None = None) -> StepRule:
    """Return η_t = η_0 / (t + 1)^α, shortened where (D) with a = ½ asks for it.

    Args:
        alpha: α, above 0.
        learning_rate: η_0; None for 1/β_0, measured at the first step. With a number it is `optax.sgd` of a schedule.
    """
    checks.number("α of decay", alpha, above=0)
    if learning_rate is not None:
        checks.number("η_0 of decay", learning_rate, above=0)
        schedule = lambda count: learning_rate * (jnp.asarray(count, jnp.float32) + 1) ** -alpha  # noqa: E731
        return StepRule.of(optax.sgd(schedule), f"decay:{alpha!r}", learning_rate=learning_rate)

    def propose(seen: _Seen) -> Array:
        return seen.cap * (seen.state.steps.astype(seen.cap.dtype) + 1) ** -alpha

    return _by_curvature(f"decay:{alpha!r}", propose, kappa=1.0, decrease=0.5, every=None)


def _between(name: str, value: float, most: float) -> None:
    if not checks.number(name, value, above=0) < most:
        raise ValueError(f"{name} must be below {most:g}, got {value}")


class _Kind(NamedTuple):
    """How a rule is written: what its value is called, its range in words, the ends, and whether it may be left out."""

    make: Callable[..., StepRule]
    value: str = ""
    most: float = math.inf
    default: bool = True
    example: str = "1"

    @property
    def range(self) -> str:
        return f"{self.value} > 0" if math.isinf(self.most) else f"0 < {self.value} < {self.most:g}"


RULES: dict[str, _Kind] = {
    "fixed": _Kind(fixed, "η", default=False, example="0.01"),
    "sharpness": _Kind(sharpness, "κ", 2.0),
    "armijo": _Kind(armijo, "σ", 1.0, example="0.5"),
    "polyak": _Kind(polyak, "κ", 2.0),
    "budget": _Kind(budget, "R", default=False, example="1.5"),
    "loss-scaled": _Kind(loss_scaled),
    "decay": _Kind(decay, "α", example="0.5"),
}
"""Every rule by the name that a command line knows it by."""


def parse(text: str) -> StepRule:
    """Return the rule of a text such as "sharpness:1", "armijo:0.5", "budget:2", "loss-scaled".

    Raises:
        ValueError: for an unknown name, or a value that is missing, no number or out of range.

    Example:
        >>> parse("sharpness:1").text
        'sharpness:1.0'
    """
    name, colon, value = str(text).partition(":")
    kind = RULES.get(name)
    if not isinstance(text, str) or kind is None:
        raise ValueError(f"a step rule is NAME or NAME:VALUE with NAME one of {', '.join(RULES)}, got {text!r}")
    if not kind.value:
        if colon:
            raise ValueError(f"the step rule {name} takes no value; got {text!r}")
        return kind.make()
    if not colon and kind.default:
        return kind.make()
    wanted = f"the step rule {name} wants a number {kind.range} after the colon, as in {name}:{kind.example}"
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"{wanted}; got {text!r}") from None
    if not (math.isfinite(number) and 0 < number < kind.most):
        raise ValueError(f"{wanted}; got {text!r}")
    return kind.make(number)


def check_loss(optimizer: Any, loss: str) -> None:
    """Raise ValueError for a rule that is not stated for a loss."""
    if isinstance(optimizer, StepRule) and optimizer.losses and loss not in optimizer.losses:
        stated = " and ".join(optimizer.losses)
        raise ValueError(f"the step rule {optimizer.text} is stated for {stated}; the loss is {loss}")


def rule_numbers(optimizer: Any) -> dict[str, np.ndarray]:
    """Return what a record holds of a rule beside its measurements, by record name."""
    if not isinstance(optimizer, StepRule):
        return {}
    told = {"learning_rate": optimizer.learning_rate, "path_budget": optimizer.path_budget}
    return {name: np.asarray(value) for name, value in told.items() if math.isfinite(value)}
