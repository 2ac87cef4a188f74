"""Who follows a run, and what it is told."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol, runtime_checkable

from lplr_jax.theory import Verdict


@runtime_checkable
class Observer(Protocol):
    """Follows a run while it goes on."""

    def resume(self, epoch: int) -> None:
        """Be told that the run goes on from the saved `epoch`."""

    def chunk(self, epoch: int, loss: float) -> None:
        """Be told that `epoch` is reached, with its loss."""

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        """Be told what a probe measured."""


@runtime_checkable
class Judging(Protocol):
    """An observer that wants to know how the theory's claims stand while the run goes on."""

    def standing(self, epoch: int, verdicts: Sequence[Verdict]) -> None:
        """Be told the verdicts on the run up to `epoch`, before its probe is told."""


class Silent:
    """An observer that shows nothing."""

    def resume(self, epoch: int) -> None:
        """Show nothing."""

    def chunk(self, epoch: int, loss: float) -> None:
        """Show nothing."""

    def probe(self, epoch: int, values: Mapping[str, float]) -> None:
        """Show nothing."""


Say = Callable[[str], None]


Follow = Callable[[str, int], AbstractContextManager[Observer | None]]
"""From the name of an arm and its number of epochs to a context with its observer."""


def unfollowed(run: str, epochs: int) -> AbstractContextManager[None]:
    """Follow a run with no observer."""
    del run, epochs
    return nullcontext()
