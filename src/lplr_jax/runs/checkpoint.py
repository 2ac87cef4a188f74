"""Saved states of a run: written between chunks, whole or not at all, and given back byte for byte.

A checkpoint is small: the training state, the series and the probes so far. What a probe remembers, a kernel for one,
is written once, beside it, and named by every later checkpoint.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lplr_jax import archives
from lplr_jax.files import HALF, atomic_write, sync_directory, sync_tree

_LOG = logging.getLogger(__name__)
_NAMES = "epoch_{:08d}"
_FILE = 2**12
"""Bytes that any file takes, at least."""
_MANIFEST_BYTES = 2**24
_MEMORY_BYTES = 2**36
"""A kernel of 60,000 rows in float64 takes 29 GB; the file's own directory is held against its bytes anyway."""


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


class Checkpoints:
    """The saved states of one run in one directory; the last good one is kept until the next is complete.

    Args:
        folder: the directory; made at the first save.
        check: called before every write; raises where the directory must not be written to any more.
    """

    def __init__(self, folder: Path, *, check: Callable[[], None] = lambda: None) -> None:
        # Orbax takes absolute paths alone; the command line's default is a relative one.
        self._folder, self._check = folder.absolute(), check
        self._memory: dict[int, str] = {}

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
            arrays: what was measured so far, by name.
            remembered: arrays that the probe of this epoch keeps; saved once.
            facts: JSON values beside them.

        Raises:
            OSError: if it cannot be written; the one before stays.
        """
        self._check()
        leaves = {f"state-{i}": _to_host(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        content = {**leaves, **{f"array-{name}": np.asarray(value) for name, value in arrays.items()}}
        name = _NAMES.format(epoch)
        if remembered:
            target = self._folder / "memory" / f"{name}.npz"
            with atomic_write(target) as temporary, temporary.open("wb") as file:
                np.savez(file, allow_pickle=False, **remembered)
            self._memory[epoch] = f"{name}.npz"
        self._folder.mkdir(parents=True, exist_ok=True)
        target = self._folder / name
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}{HALF}", dir=self._folder))
        try:
            filled = {key: value for key, value in content.items() if value.size}
            _check_room(temporary, filled)
            with _orbax() as checkpointer:
                checkpointer.save(temporary / "arrays", filled)
            manifest = {
                "epoch": epoch,
                "leaves": len(leaves),
                "empty": {key: [value.dtype.str, value.shape] for key, value in content.items() if not value.size},
                "digest": _digest(content),
                "memory": {str(at): file for at, file in self._memory.items()},
                "facts": dict(facts or {}),
            }
            (temporary / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
            sync_tree(temporary)
            if target.exists():  # left behind by a run that could not read it
                shutil.rmtree(target)
            temporary.rename(target)
            sync_directory(self._folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for other in self._complete():
            if other.name != name:
                shutil.rmtree(other, ignore_errors=True)

    def latest(self, like: Any) -> Saved | None:
        """Return the last state that was saved, None where there is none.

        Args:
            like: a state of the same structure, shapes and types.

        Raises:
            OSError: if what is there cannot be read.
        """
        problems = []
        for target in reversed(self._complete()):
            try:
                saved = self._load(target, like)
            # A manifest may be any JSON, with anything where its fields should be.
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
                problems.append(f"{target}: {error}")
                continue
            for problem in problems:
                _LOG.warning("unreadable, so the run goes on from the checkpoint before it: %s", problem)
            return saved
        if problems:
            raise OSError(
                f"no checkpoint can be read ({'; '.join(problems)}); start afresh with --force, which keeps them aside"
            )
        return None

    def clear(self) -> None:
        """Remove everything: the run is done and its record is safe."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _complete(self) -> Sequence[Path]:
        return sorted(self._folder.glob("epoch_*"))

    def _load(self, target: Path, like: Any) -> Saved:
        manifest = json.loads(archives.read_text(target / "manifest.json", most_bytes=_MANIFEST_BYTES))
        for key, (_, shape) in manifest["empty"].items():
            if 0 not in shape:
                raise ValueError(f"{key} of shape {shape} is not empty")
        with _orbax() as checkpointer:
            content = {key: np.asarray(value) for key, value in checkpointer.restore(target / "arrays").items()}
        content |= {key: np.zeros(shape, dtype) for key, (dtype, shape) in manifest["empty"].items()}
        if _digest(content) != manifest["digest"]:
            raise ValueError("its arrays do not match its digest")
        leaves, structure = jax.tree.flatten(like)
        if len(leaves) != manifest["leaves"]:
            raise ValueError(f"it holds a state of {manifest['leaves']} arrays, this run has {len(leaves)}")
        state = jax.tree.unflatten(structure, [_like(content[f"state-{i}"], leaf) for i, leaf in enumerate(leaves)])
        memory = {}
        for epoch, file in sorted((int(at), file) for at, file in manifest["memory"].items()):
            if file != f"{_NAMES.format(epoch)}.npz":
                raise ValueError(f"{file!r} is no name of what a probe at epoch {epoch} remembers")
            path = self._folder / "memory" / file
            memory[epoch] = archives.read_npz(path, most_bytes=_MEMORY_BYTES, admit=lambda headers: None)
        self._memory = {int(at): file for at, file in manifest["memory"].items()}
        named = {key.removeprefix("array-"): value for key, value in content.items() if key.startswith("array-")}
        return Saved(int(manifest["epoch"]), state, named, memory, manifest["facts"])


def _is_key(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _to_host(leaf: Any) -> np.ndarray:
    return np.asarray(jax.device_get(jax.random.key_data(leaf) if _is_key(leaf) else leaf))


def _like(value: np.ndarray, leaf: Any) -> Any:
    """Return a saved array in the form of the leaf that it replaces: type, device, and whether it is a key."""
    here = _to_host(leaf)
    if (value.shape, value.dtype) != (here.shape, here.dtype):
        there = f"{value.dtype} of shape {value.shape}"
        raise ValueError(f"it holds {there} where this run has {here.dtype} of shape {here.shape}")
    if _is_key(leaf):
        return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(leaf))
    # A copy: the state is donated, and a buffer shared with NumPy cannot be.
    return jax.device_put(jnp.array(value), leaf.sharding) if isinstance(leaf, jax.Array) else value


def _digest(content: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(content):
        array = np.ascontiguousarray(content[name])
        digest.update(f"{name} {array.dtype.str} {content[name].shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def _check_room(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Raise OSError where the disk has no room for arrays; orbax tells of a full one late and at length."""
    needed = sum(value.nbytes for value in arrays.values()) + _FILE * (len(arrays) + 1)
    free = shutil.disk_usage(folder).free
    if needed > free:
        text = f"{os.strerror(errno.ENOSPC)} (checkpoint: {needed:,} bytes are needed, {free:,} are free)"
        raise OSError(errno.ENOSPC, text)


def _unraisable(hook: Callable[[Any], Any], unraisable: Any) -> None:
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


@contextmanager
def _orbax() -> Iterator[Any]:
    """Yield orbax's checkpointer, its errors turned into OSError of one line, its log of them kept off the screen."""
    import orbax.checkpoint as ocp  # a third of a second that only runs need

    log = logging.getLogger("absl")
    before, hook = log.disabled, sys.unraisablehook
    log.disabled = True
    # Where a write fails orbax leaves the others to themselves, and each would print that its loop is closed, some of
    # them after the error is told: then the hook stays.
    sys.unraisablehook = partial(_unraisable, hook)
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            yield checkpointer
        sys.unraisablehook = hook
    except OSError:
        raise
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        number = errno.ENOSPC if "os_error_code='28'" in text or "No space left" in text else errno.EIO
        raise OSError(number, f"{os.strerror(number)} (checkpoint: {text[:300]})") from error
    finally:
        log.disabled = before
