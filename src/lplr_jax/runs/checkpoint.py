"""Saved states of a run: written between chunks, whole or not at all, and given back byte for byte.

A checkpoint is a folder with `arrays.npz`, the training state and the series so far, and `manifest.json`, which says
whose it is: the epoch, a digest of the run's config, and the SHA-256 of every file and of itself. What a probe
remembers, a kernel for one, is written once, beside the checkpoints, and named by every later manifest.
"""

import errno
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lplr_jax import checks
from lplr_jax.files import HALF, atomic_write, name_file, sync_directory, sync_tree
from lplr_jax.runs.errors import ConfigMismatchError
from lplr_jax.runs.manifest import (
    ARRAYS,
    FORMAT,
    MANIFEST,
    MOST_BYTES,
    WAY_OUT,
    File,
    FormatError,
    Identity,
    canonical,
    digest,
    read_manifest,
    read_npz,
    write_npz,
)

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"epoch_(\d{8,})")
_BLOCK = 2**12
"""Bytes that any file takes, at least."""


@dataclass(frozen=True)
class Saved:
    """A state that was saved.

    Attributes:
        epoch: epoch of the state.
        state: the training state, a pytree like the one it was asked for with.
        arrays: what was measured up to that epoch, by name.
        memory: what the probe remembered, by epoch, ascending.
        facts: JSON values that decide no number: seconds spent, where the run was resumed, versions.
    """

    epoch: int
    state: Any
    arrays: Mapping[str, np.ndarray]
    memory: Mapping[int, Mapping[str, np.ndarray]]
    facts: Mapping[str, Any] = field(default_factory=dict)


class _Memory(Mapping[int, Mapping[str, np.ndarray]]):
    """What the probes remembered, by epoch, ascending: each is read when it is asked for, as all may not fit in memory.

    Raises:
        ArchiveError: at once, if one of the files is another one.
        ValueError: at once, if one cannot be read.
    """

    def __init__(self, folder: Path, files: Mapping[int, File]) -> None:
        self._folder, self._files = folder, dict(sorted(files.items()))
        for epoch in self._files:
            self[epoch]

    def __getitem__(self, epoch: int) -> Mapping[str, np.ndarray]:
        return read_npz(self._folder / f"epoch_{epoch:08d}.npz", self._files[epoch])

    def __iter__(self) -> Iterator[int]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


class Checkpoints:
    """The saved states of one run in one directory; the last good one is kept until the next is complete.

    Args:
        folder: the directory; made at the first save.
        check: called before every write; raises where the directory must not be written to any more.
        identity: whose checkpoints they are; those of another run are refused.
    """

    def __init__(
        self, folder: Path, *, check: Callable[[], None] = lambda: None, identity: Identity | None = None
    ) -> None:
        self._folder, self._check, self._identity = folder.absolute(), check, identity or Identity()
        self._memory: dict[int, File] = {}

    def save(
        self,
        epoch: int,
        state: Any,
        arrays: Mapping[str, np.ndarray],
        *,
        remembered: Mapping[str, np.ndarray] | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> None:
        """Save the state of an epoch, and what its probe remembers.

        Args:
            epoch: epoch of the state.
            state: a pytree of arrays; PRNG keys may be among them.
            arrays: what was measured so far, by plain names: letters, digits, dots, dashes, underscores.
            remembered: arrays that the probe of this epoch keeps, by plain names; saved once.
            facts: JSON values beside them.

        Raises:
            OSError: if it cannot be written; the one before stays.
            ValueError: for a name that is not plain, or an array of objects.
        """
        self._check()
        leaves = [(_described(leaf), _to_host(leaf)) for leaf in _tree().leaves(state)]
        content = {f"state-{i}": value for i, (_, value) in enumerate(leaves)}
        content |= {f"array-{name}": np.asarray(value) for name, value in arrays.items()}
        memory = {name: np.asarray(value) for name, value in (remembered or {}).items()}
        name = f"epoch_{checks.whole('epoch', epoch, least=0):08d}"
        target = self._folder / name
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            _check_room(target, [*content.values(), *memory.values()])
            if memory:
                path = self._folder / "memory" / f"{name}.npz"
                with atomic_write(path) as temporary:
                    write_npz(temporary, memory)
                self._memory[epoch] = File.at(path)
            self._write(target, epoch, content, [form for form, _ in leaves], dict(facts or {}))
        except OSError as error:
            name_file(error, target)
            raise
        for other in self._complete():
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def latest(self, like: Any) -> Saved | None:
        """Return the last state that was saved, None where there is none.

        A newer one that cannot be taken is told in a warning.

        Args:
            like: a state of the same structure, shapes and types.

        Raises:
            ConfigMismatchError: if the last one is of a run of another config, and none before it of this one.
            ValueError: if it is of another version of this package.
            OSError: if it is damaged.
        """
        problems: list[tuple[Path, Exception]] = []
        for target in reversed(self._complete()):
            try:
                saved = self._load(target, like)
            except (ValueError, OSError) as error:
                problems.append((target, error))
                continue
            for path, problem in problems:
                _LOG.warning("%s is not taken, so the run goes on from the checkpoint before it: %s", path, problem)
            return saved
        if not problems:
            return None
        _, last = problems[0]
        if isinstance(last, ConfigMismatchError | FormatError):
            raise last
        said = "; ".join(f"{path}: {problem}" for path, problem in problems)
        raise OSError(f"no checkpoint can be read ({said}); {WAY_OUT}")

    def clear(self) -> None:
        """Remove everything: the run is done and its record is safe."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _complete(self) -> Sequence[Path]:
        """Return the folders of checkpoints, by epoch."""
        found = [(int(name[1]), path) for path in self._folder.glob("epoch_*") if (name := _NAME.fullmatch(path.name))]
        return [path for _, path in sorted(found)]

    def _write(
        self,
        target: Path,
        epoch: int,
        content: Mapping[str, np.ndarray],
        forms: Sequence[tuple[str, tuple[int, ...]]],
        facts: Mapping[str, Any],
    ) -> None:
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}{HALF}", dir=self._folder))
        try:
            write_npz(temporary / ARRAYS, content)
            files = {f"memory/epoch_{at:08d}.npz": file for at, file in self._memory.items()}
            files[ARRAYS] = File.at(temporary / ARRAYS)
            manifest = {
                "format": FORMAT,
                "epoch": epoch,
                "run": self._identity.run,
                "data": self._identity.data,
                "state": forms,
                "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in files.items()},
                "facts": facts,
            }
            text = canonical({**manifest, "sha256": digest(manifest)})
            if len(text) > MOST_BYTES:
                raise ValueError(f"the manifest takes {len(text):,} bytes, more than {MOST_BYTES:,}: fewer probes")
            (temporary / MANIFEST).write_text(text, encoding="utf-8")
            sync_tree(temporary)
            if target.exists():  # left behind by a run that could not take it
                shutil.rmtree(target)
            temporary.rename(target)
            sync_directory(self._folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _load(self, target: Path, like: Any) -> Saved:
        manifest = read_manifest(target)
        if manifest.identity != self._identity:
            what = "data" if manifest.identity.data != self._identity.data else "config"
            raise ConfigMismatchError(
                f"{target} is of a run of another {what}: it is not taken. Put the run's own files back, name another "
                f"folder with --out, or {WAY_OUT}"
            )
        leaves = _tree().leaves(like)
        if len(leaves) != len(manifest.state):
            raise ValueError(f"it holds a state of {len(manifest.state)} arrays, this run has {len(leaves)}")
        for there, here in zip(manifest.state, map(_described, leaves), strict=True):
            if there != here:
                raise ValueError("it holds {} of shape {} where this run has {} of shape {}".format(*there, *here))
        content = read_npz(target / ARRAYS, manifest.arrays)
        missing = [name for i in range(len(leaves)) if (name := f"state-{i}") not in content]
        if missing:
            raise ValueError(f"{ARRAYS} lacks {', '.join(missing[:5])}")
        memory = _Memory(self._folder / "memory", manifest.memory)
        restored = (_like(content[f"state-{i}"], leaf) for i, leaf in enumerate(leaves))
        self._memory = dict(manifest.memory)
        named = {key.removeprefix("array-"): value for key, value in content.items() if key.startswith("array-")}
        return Saved(
            manifest.epoch, _tree().unflatten(_tree().structure(like), restored), named, memory, manifest.facts
        )


def _tree() -> Any:
    import jax  # a run has it loaded; who only asks whose folder it is need not

    return jax.tree


def _is_key(leaf: Any) -> bool:
    import jax
    import jax.numpy as jnp

    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(leaf: Any) -> np.ndarray:
    import jax

    return np.asarray(jax.device_get(jax.random.key_data(leaf) if _is_key(leaf) else leaf))


def _described(leaf: Any) -> tuple[str, tuple[int, ...]]:
    """Return type and shape of a leaf; the type of a key says of which generator it is."""
    import jax

    if _is_key(leaf):
        return f"key<{jax.random.key_impl(leaf)}>", tuple(leaf.shape)
    array = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return (array.dtype.name if array.dtype.isbuiltin == 2 else array.dtype.str), tuple(array.shape)


def _like(value: np.ndarray, leaf: Any) -> Any:
    """Return a saved array in the form of the leaf that it replaces: type, device, and whether it is a key."""
    import jax
    import jax.numpy as jnp

    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
    if isinstance(leaf, jax.Array):
        # A copy: the state is donated, and a buffer shared with NumPy cannot be. In the scope 64 bits stay 64.
        with jax.enable_x64(True):
            return jax.device_put(jnp.array(value), leaf.sharding)
    if isinstance(leaf, np.generic):
        return value[()]
    return type(leaf)(value.item()) if isinstance(leaf, bool | int | float | complex) else value


def _check_room(target: Path, arrays: Sequence[np.ndarray]) -> None:
    """Raise OSError where the disk has no room for a checkpoint, before anything of it is written."""
    needed = sum(value.nbytes + _BLOCK // 8 for value in arrays) + 4 * _BLOCK
    free = shutil.disk_usage(target.parent).free
    if needed > free:
        text = f"{os.strerror(errno.ENOSPC)} ({needed:,} bytes are needed, {free:,} are free)"
        raise OSError(errno.ENOSPC, text, str(target))
