"""All claims at one point."""

from typing import Any

from lplr_jax.losses import Loss, Scale, as_loss
from lplr_jax.measurement.point import point_arrays
from lplr_jax.records import Record
from lplr_jax.theory.verdict import Verdicts
from lplr_jax.theory.verify import verify
from lplr_jax.types import ApplyFn, Params


def verify_point(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    y: Any,
    *,
    loss_scale: Scale | None = None,
    loss: Loss | None = None,
    kernel: str = "auto",
    memory_budget: int | None = None,
) -> Verdicts:
    """Hold against one point what can be held there: identity, λ_min > 0 with its proof, pointwise PL, linearity.

    Args:
        apply_fn: pure function from parameters and inputs (n, ...) to outputs (n, c), or (n,) for (n, 1).
        params: pytree of floating arrays, θ.
        x: inputs (n, ...).
        y: targets (n, c), or (n,) for (n, 1).
        loss_scale: of the squared loss: "sum" for s = 1, "mean" for s = n, or the number s.
        loss: any other loss; give one of the two.
        kernel: one of `lplr_jax.ntk.KERNELS`.
        memory_budget: bytes for the kernel's assembly beside the kernel itself.

    Returns:
        One verdict for each of `CLAIMS`; those that need a run are undecided or not applicable, and so are those whose
        number the arithmetic lost, with the reason.

    Raises:
        ValueError: for inputs or a function that `empirical_ntk` or `evaluate_point` refuse, or if not one of
            `loss_scale` and `loss` is given.

    Example:
        >>> import jax.numpy as jnp
        >>> x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.ones((2, 1))
        >>> first, positive, *_ = verify_point(lambda w, x: x @ w, jnp.zeros((2, 1)), x, y, loss_scale="sum")
        >>> first.outcome, positive.outcome
        ('proved', 'proved')
    """
    loss = as_loss(loss, loss_scale=loss_scale)
    arrays, lost = point_arrays(apply_fn, params, x, y, loss=loss, kernel=kernel, memory_budget=memory_budget)
    return verify(Record("point", arrays, {}, {"untrusted": {"0": lost}} if lost else {}, loss=loss.name))
