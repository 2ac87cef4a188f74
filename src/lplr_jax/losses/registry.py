"""Losses by name, and what stands for a loss in a setting."""

from collections.abc import Callable, Mapping

from lplr_jax import checks
from lplr_jax.losses.base import SCALES, Loss, Scale
from lplr_jax.losses.exponential import Exponential
from lplr_jax.losses.huber import Huber
from lplr_jax.losses.logistic import Logistic
from lplr_jax.losses.softmax_cross_entropy import of_distributions, smoothed
from lplr_jax.losses.squared import Squared
from lplr_jax.losses.squared_hinge import SquaredHinge

LOSSES: Mapping[str, Callable[..., Loss]] = {
    "squared": Squared,
    "logistic": Logistic,
    "softmax_cross_entropy": smoothed,
    "soft_cross_entropy": of_distributions,
    "huber": Huber,
    "squared_hinge": SquaredHinge,
    "exponential": Exponential,
}
"""Losses by what a record calls them; what stands in parentheses behind it are the numbers that they take."""


def by_name(name: str, scale: Scale = "mean") -> Loss:
    """Return the loss that a record names.

    Args:
        name: a loss's `name`: a key of `LOSSES`, with its numbers in parentheses where it has any.
        scale: its scale; a record keeps the number s.

    Raises:
        ValueError: for any other text.

    Example:
        >>> by_name("huber(0.5)", 10.0)
        Huber(delta=0.5, scale=10.0)
    """
    kind, _, rest = name.partition("(") if isinstance(name, str) else ("", "", "")
    try:
        numbers = tuple(float(part) for part in rest.removesuffix(")").split(",") if part)
        found = LOSSES[kind](*numbers, scale=scale) if kind in LOSSES else None
    except (ValueError, TypeError):
        found = None
    if found is None or found.name != name:
        as_loss(loss_scale=scale)  # a scale that is none is told as such
        raise ValueError(
            f"the name of a loss must be one of {', '.join(LOSSES)}, with its numbers in parentheses, such as "
            f"huber(1.0); got {checks.shown(name)}"
        )
    return found


def parse(text: str, scale: Scale = "mean") -> Loss:
    """Return the loss that a setting names: a record's name, its numbers after a colon, with hyphens if you like.

    Args:
        text: such as "logistic", "cross-entropy", "cross-entropy:0.1" for smoothed labels, "huber:1", "squared-hinge".
        scale: its scale.

    Raises:
        ValueError: for any other text.

    Example:
        >>> parse("huber:1").name, parse("cross-entropy").name
        ('huber(1.0)', 'softmax_cross_entropy')
    """
    kind, _, rest = text.partition(":") if isinstance(text, str) else ("", "", "")
    kind = {"cross-entropy": "softmax_cross_entropy"}.get(kind, kind.replace("-", "_"))
    try:
        return by_name(f"{kind}({float(rest)!r})" if rest else kind, scale)
    except ValueError:
        as_loss(loss_scale=scale)
        raise ValueError(
            "loss must be squared, logistic, cross-entropy, cross-entropy:α with smoothed labels, huber:δ, "
            f"squared-hinge or exponential; got {checks.shown(text)}"
        ) from None


def as_loss(loss: Loss | Scale | None = None, *, loss_scale: Scale | None = None) -> Loss:
    """Return the loss that one of two settings names; a scale alone is that of the squared loss.

    Raises:
        ValueError: if both settings are given or neither, or one is out of range.
    """
    if loss is not None and loss_scale is not None:
        raise ValueError(
            f"give loss or loss_scale, not both: a loss has its scale, got {checks.shown(loss)} and "
            f"{checks.shown(loss_scale)}"
        )
    if isinstance(loss, Loss):
        return loss
    try:
        return Squared(loss if loss is not None else loss_scale)  # pyright: ignore[reportArgumentType]  # checked there
    except ValueError:
        if loss is None:
            raise
        raise ValueError(
            f"loss must be a Loss, such as losses.Squared(), or a scale of the squared loss: {SCALES}; got "
            f"{checks.shown(loss)}"
        ) from None
