"""Which figure shows some records: chosen by what they hold, never by the name of their experiment."""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lplr_jax.curves.position import position_of
from lplr_jax.curves.summary import check_records
from lplr_jax.plotting.ablation import ablation, initialisation
from lplr_jax.plotting.cifar import cifar
from lplr_jax.plotting.panels import four_panel, known
from lplr_jax.plotting.spectral import spectral
from lplr_jax.printing import printable
from lplr_jax.records import Record


def plot(records: Record | Sequence[Record] | Mapping[str, Record]) -> Figure:
    """Draw the figure that shows what one or several records hold.

    One record is drawn by `four_panel`, or by `cifar` where it holds accuracies and the kernel of a part of the
    samples. Of several, those that differ in the initialisation their configs name are drawn by `initialisation`,
    those that differ in the optimiser they name and keep spectra by `spectral`, those with accuracies on the same steps
    by `cifar`, all others by `ablation`.

    Args:
        records: a record, a sequence of them, or a mapping from names to them.

    Returns:
        The figure; `save` writes it.

    Raises:
        TypeError: for what is none of these.
        ValueError: without records, or if the loss of one has no finite value.

    Example:
        >>> from lplr_jax.records import Record
        >>> numbers = {name: np.array(1.0) for name in ("loss_scale", "learning_rate", "n", "c", "p")}
        >>> series = {"loss": np.exp(-np.arange(9.0)), "grad_sq_norm": np.ones(9), "drift": np.arange(9.0)}
        >>> figure = plot(Record("mine", {"epoch": np.arange(9), **series, **numbers}, {}))
        >>> [axes.get_title(loc="left") for axes in figure.axes][0]
        '(a)  drift from the initialisation'
    """
    if isinstance(records, Record):
        return cifar([records]) if _stochastic(records) else four_panel(records)
    named = {str(name): record for name, record in records.items()} if isinstance(records, Mapping) else {}
    several = list(named.values()) if isinstance(records, Mapping) else records
    check_records(several)
    if len(several) == 1:
        return plot(several[0])
    initialisations = [printable(record.config.get("init")) for record in several]
    if len(set(initialisations)) > 1:
        return initialisation(named or _distinct(initialisations, several))
    methods = [printable(record.config.get("optimizer")) for record in several]
    if len(set(methods)) > 1 and all(position_of(record) is not None for record in several):
        return spectral(
            {name: [one for one, of in zip(several, methods, strict=True) if of == name] for name in methods}
        )
    axes = ("epoch", "probe_epoch")
    together = all(np.array_equal(_of(record, name), _of(several[0], name)) for record in several for name in axes)
    if together and all(known(record, "accuracy") for record in several):
        return cifar(several)
    return ablation(several)


def _stochastic(record: Record) -> bool:
    return known(record, "accuracy") and "kernel_samples" in record


def _of(record: Record, name: str) -> np.ndarray:
    return record.arrays.get(name, np.zeros(0))


def _distinct(names: Sequence[str], records: Sequence[Record]) -> dict[str, Record]:
    """Return records by name; names that come several times are numbered."""
    found: dict[str, Record] = {}
    for name, record in zip(names, records, strict=True):
        number = sum(other == name or other.startswith(f"{name} (") for other in found)
        found[f"{name} ({number + 1})" if number else name] = record
    return found
