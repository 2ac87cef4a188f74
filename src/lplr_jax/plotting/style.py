"""One look for every figure, and how figures reach the disk."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from lplr_jax import checks
from lplr_jax.files import atomic_write
from lplr_jax.records import Record

STYLE = Path(__file__).with_name("lplr.mplstyle")
NO_SOURCE = "source not recorded"


def plain(text: str) -> str:
    """Return text from a record or a file name for a label: no mathematics begins in it, and all of it can be drawn."""
    return text.encode("utf-8", "backslashreplace").decode().replace("\0", "").replace("$", r"\$")


def source_of(record: Record) -> str:
    """Return where the data of a record came from, in words; its provenance may hold anything."""
    found = record.provenance.get("data")
    return str(found.get("source", NO_SOURCE)) if isinstance(found, Mapping) else NO_SOURCE


def save(figure: Figure, path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """Write a figure as PNG (200 dpi) and PDF beside each other, each whole or not at all.

    Args:
        figure: what to write.
        path: file name; its suffix is replaced.

    Returns:
        The two paths.

    Raises:
        TypeError: for what is no figure, or no path.
        ValueError: for a path without a file name.
    """
    checks.instance("figure", figure, Figure, "as four_panel returns one")
    stem = checks.path("path", path)
    if not stem.name:
        raise ValueError(f"path must be that of a file, whose suffix is replaced, got {str(path)!r}")
    written = []
    # No dates in the files: the same record gives the same bytes.
    for suffix, metadata in ((".png", {"Software": None}), (".pdf", {"CreationDate": None, "Producer": None})):
        target = stem.with_suffix(suffix)
        # Drawn in memory: on a full disk the PDF writer leaves its file open.
        drawn = io.BytesIO()
        with mpl.rc_context(fname=STYLE):
            figure.savefig(drawn, format=suffix.removeprefix("."), dpi=200, metadata=metadata)
        with atomic_write(target) as temporary:
            temporary.write_bytes(drawn.getvalue())
        written.append(target)
    return written[0], written[1]
