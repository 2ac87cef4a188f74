"""The paper's empirical statements, one by one, judged from records by stated rules; needs no JAX."""

from collections.abc import Mapping

from lplr_jax.statements.cifar import CIFAR
from lplr_jax.statements.earlier import EARLIER
from lplr_jax.statements.mnist import MNIST
from lplr_jax.statements.statement import Finding, Outcome, Runs, Statement
from lplr_jax.statements.widths import WIDTHS

__all__ = ["STATEMENTS", "Finding", "Outcome", "Runs", "Statement", "judge"]

STATEMENTS: tuple[Statement, ...] = (*MNIST, *WIDTHS, *CIFAR, *EARLIER)
"""All statements, in the order of the paper."""


def judge(runs: Runs) -> Mapping[str, Finding]:
    """Judge every statement by its id."""
    return {statement.id: statement.find(runs) for statement in STATEMENTS}
