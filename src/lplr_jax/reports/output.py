"""What a command writes in the end, and says that it did: tables and figures."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from lplr_jax import plotting
from lplr_jax.records import Record
from lplr_jax.reports import tables
from lplr_jax.reports.screen import CONSOLE, say


def tabulate(table: tables.Table, stem: Path) -> None:
    """Show a table, and write it as STEM.md, STEM.csv and STEM.tex."""
    for block in tables.blocks(table, CONSOLE.width):
        CONSOLE.print(tables.to_rich(block))
    for path in tables.save(table, stem):
        say(f"table    {path}")


def draw(figure: Figure | str, target: Path) -> None:
    """Write a figure as PNG and PDF; for a text, say that there is no figure, and why."""
    if isinstance(figure, str):
        say(f"no figure: {figure}")
        return
    for path in plotting.save(figure, target):
        say(f"figure   {path}")


def figure_of(records: Mapping[str, Record]) -> tuple[Figure, str]:
    """Return the figure of a record, or of the arms of an experiment, and what it is called.

    Args:
        records: by the name of the arm; that of a record alone is "".
    """
    found = list(records.values())
    if all(record.experiment == "cifar" for record in found):
        return plotting.cifar(found), "cifar"
    if "" in records:
        return plotting.four_panel(found[0]), found[0].experiment
    if len({repr(record.config.get("init")) for record in found}) > 1:
        return plotting.initialisation(records), "initialisation"
    return plotting.ablation(found), "ablation"
