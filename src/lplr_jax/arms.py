"""The record of a run, or the records of all arms of an experiment."""

import os
import re
from pathlib import Path

from lplr_jax import checks, records
from lplr_jax.records import Record


class Arms(dict[str, Record]):
    """The records of an experiment that has one folder for each arm, by the names of the folders."""

    def __repr__(self) -> str:
        return "\n".join([f"<{len(self)} records", *(f"{name!r}: {record!r}" for name, record in self.items())]) + ">"


def _place(arm: Path) -> list[str | int]:
    """Return what sorts arms as people do: m128 before m1024."""
    parts = re.split(r"(\d+)", arm.parent.name)
    return [int(part) if part.isdecimal() else part for part in parts]


def load(path: str | os.PathLike[str]) -> Record | Arms:
    """Read a record, or those of a folder of arms; nothing in the files is run or unpickled.

    Args:
        path: an npz file, the folder of a run, or a folder that holds one folder for each arm of an experiment.

    Raises:
        RecordError: if there is no record, or one that cannot be read.
        TypeError: for what is no path.
    """
    folder = checks.path("path", path)
    whole = not folder.is_dir() or (folder / "record.npz").exists()
    arms = [] if whole else sorted(folder.glob("*/record.npz"), key=_place)
    return Arms({arm.parent.name: records.load(arm) for arm in arms}) or records.load(folder)
