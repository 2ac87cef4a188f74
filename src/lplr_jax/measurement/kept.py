"""Kernels that are kept until the end of a run: in memory up to a bound, then on disk."""

import logging
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float

from lplr_jax.ntk.memory import total_memory

_LOG = logging.getLogger(__name__)


class KeptKernels(Mapping[int, np.ndarray]):
    """Kernels by step. Those that memory has no room for are files of the temporary folder (TMPDIR), read as needed.

    Args:
        most_bytes: that may be kept in memory; None for a third of the machine's.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        self._most_bytes = total_memory() // 3 if most_bytes is None else most_bytes
        self._kernels: dict[int, np.ndarray] = {}
        self._told: set[str] = set()

    def __getitem__(self, step: int) -> np.ndarray:
        return self._kernels[step]

    def __iter__(self) -> Iterator[int]:
        return iter(self._kernels)

    def __len__(self) -> int:
        return len(self._kernels)

    def __delitem__(self, step: int) -> None:
        del self._kernels[step]

    def keep(self, step: int, theta: Float[np.ndarray, "nc nc"]) -> bool:
        """Keep a kernel, and return whether there was room; say so, once each, where memory or disk has none."""
        held = sum(kernel.nbytes for kernel in self._kernels.values() if not isinstance(kernel, np.memmap))
        if held + theta.nbytes <= self._most_bytes:
            self._kernels[step] = theta
            return True
        full = (
            f"the kernels of {len(self._kernels)} probes take {held / 2**30:.1f} GiB of the "
            f"{self._most_bytes / 2**30:.1f} that may be kept in memory"
        )
        on_disk, folder = None, Path()
        try:
            folder = Path(tempfile.gettempdir())
            why = f"{folder} has no room for more"
            # Half of what is free is for others, who may take it all the same.
            if theta.nbytes <= shutil.disk_usage(folder).free // 2:
                on_disk = _on_disk(theta, folder)
        except OSError as error:
            why = f"no temporary file can be written ({error.strerror or error})"
        if on_disk is None:
            self._tell(
                logging.WARNING,
                f"epoch {step}: {full}, and {why}, so the pairs of later probes are left out; fewer probes, a subset, "
                "or TMPDIR on a larger disk keep all pairs",
            )
            return False
        self._tell(logging.INFO, f"epoch {step}: {full}; later ones go to {folder}")
        self._kernels[step] = on_disk
        return True

    def _tell(self, level: int, message: str) -> None:
        kind = logging.getLevelName(level)
        if kind not in self._told:
            self._told.add(kind)
            _LOG.log(level, "%s", message)


def _on_disk(theta: Float[np.ndarray, "nc nc"], folder: Path) -> np.memmap:
    """Write a kernel to a file without a name, which is gone with the process, however it ends, and map it."""
    with tempfile.TemporaryFile(prefix="lplr-kernel-", dir=folder) as file:
        np.ascontiguousarray(theta).tofile(file)
        file.flush()
        return np.memmap(file, dtype=theta.dtype, mode="r", shape=theta.shape)
