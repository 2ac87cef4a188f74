"""Saved states of a run: written between chunks, whole or not at all, and given back byte for byte.

A checkpoint is a folder with `arrays.npz`, the training state and the series so far, and `manifest.json`, which says
whose it is: the epoch, a digest of the run's config, and the SHA-256 of every file and of itself. What a probe
remembers, a kernel for one, is written once, beside the checkpoints, and named by every later manifest.
"""

import errno
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lplr_jax import archives, checks
from lplr_jax.files import HALF, atomic_write, name_file, sync_directory, sync_tree
from lplr_jax.runs.errors import ConfigMismatchError

_LOG = logging.getLogger(__name__)
FORMAT = 2
"""Of the manifest. The first one had no number, and kept its arrays in a folder."""
_NAME = re.compile(r"epoch_(\d{8,})")
_MEMORY = re.compile(r"memory/(epoch_\d{8,})\.npz")
_ARRAYS = "arrays.npz"
_MANIFEST = "manifest.json"
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_RAW = ".as-"
"""Between the name of a member and the dtype of an array that npz does not know and that is kept as its bytes."""
_BLOCK = 2**12
"""Bytes that any file takes, at least."""
_MANIFEST_BYTES = 2**25
_FILE_BYTES = 2**40
_DIRECTORY_BYTES = 2**26
"""Of the zip directory of a state: some 100 bytes a leaf."""
_WAY_OUT = "start afresh with --force, which keeps the folder aside"


class _FormatError(ValueError):
    """A checkpoint of another version of this package."""


@dataclass(frozen=True)
class Identity:
    """Whose checkpoint it is.

    Attributes:
        run: SHA-256 of the experiment's name and its config; None for a run that names no config.
        data: checksum of the data, so that the message can tell; it is part of the config as well.
    """

    run: str | None = None
    data: str | None = None

    @classmethod
    def of(cls, experiment: str, config: Mapping[str, Any]) -> "Identity":
        """Return the identity of the run of one config.

        Raises:
            ValueError: for a config that is no JSON.
        """
        checksum = config.get("data_checksum")
        digest = _digest({"experiment": experiment, "config": dict(config)})
        return cls(digest, checksum if isinstance(checksum, str) else None)


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


@dataclass(frozen=True)
class _File:
    """A file that a manifest names."""

    sha256: str
    bytes: int

    @classmethod
    def at(cls, path: Path) -> "_File":
        return cls(archives.sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class _Manifest:
    """What a manifest holds, every field of its type."""

    epoch: int
    identity: Identity
    state: tuple[tuple[str, tuple[int, ...]], ...]
    arrays: _File
    memory: Mapping[int, _File]
    facts: Mapping[str, Any]


class _Memory(Mapping[int, Mapping[str, np.ndarray]]):
    """What the probes remembered, by epoch, ascending: each is read when it is asked for, as all may not fit in memory.

    Raises:
        ArchiveError: at once, if one of the files is another one.
        ValueError: at once, if one cannot be read.
    """

    def __init__(self, folder: Path, files: Mapping[int, _File]) -> None:
        self._folder, self._files = folder, dict(sorted(files.items()))
        for epoch in self._files:
            self[epoch]

    def __getitem__(self, epoch: int) -> Mapping[str, np.ndarray]:
        return _read_npz(self._folder / f"epoch_{epoch:08d}.npz", self._files[epoch])

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
        self._memory: dict[int, _File] = {}

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
                    _write_npz(temporary, memory)
                self._memory[epoch] = _File.at(path)
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
        if isinstance(last, ConfigMismatchError | _FormatError):
            raise last
        said = "; ".join(f"{path}: {problem}" for path, problem in problems)
        raise OSError(f"no checkpoint can be read ({said}); {_WAY_OUT}")

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
            _write_npz(temporary / _ARRAYS, content)
            files = {f"memory/epoch_{at:08d}.npz": file for at, file in self._memory.items()}
            files[_ARRAYS] = _File.at(temporary / _ARRAYS)
            manifest = {
                "format": FORMAT,
                "epoch": epoch,
                "run": self._identity.run,
                "data": self._identity.data,
                "state": forms,
                "files": {name: {"sha256": file.sha256, "bytes": file.bytes} for name, file in files.items()},
                "facts": facts,
            }
            text = _canonical({**manifest, "sha256": _digest(manifest)})
            if len(text) > _MANIFEST_BYTES:
                raise ValueError(f"the manifest takes {len(text):,} bytes, more than {_MANIFEST_BYTES:,}: fewer probes")
            (temporary / _MANIFEST).write_text(text, encoding="utf-8")
            sync_tree(temporary)
            if target.exists():  # left behind by a run that could not take it
                shutil.rmtree(target)
            temporary.rename(target)
            sync_directory(self._folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise

    def _load(self, target: Path, like: Any) -> Saved:
        manifest = _read_manifest(target)
        if manifest.identity != self._identity:
            what = "data" if manifest.identity.data != self._identity.data else "config"
            raise ConfigMismatchError(
                f"{target} is of a run of another {what}: it is not taken. Put the run's own files back, name another "
                f"folder with --out, or {_WAY_OUT}"
            )
        leaves = _tree().leaves(like)
        if len(leaves) != len(manifest.state):
            raise ValueError(f"it holds a state of {len(manifest.state)} arrays, this run has {len(leaves)}")
        for there, here in zip(manifest.state, map(_described, leaves), strict=True):
            if there != here:
                raise ValueError("it holds {} of shape {} where this run has {} of shape {}".format(*there, *here))
        content = _read_npz(target / _ARRAYS, manifest.arrays)
        missing = [name for i in range(len(leaves)) if (name := f"state-{i}") not in content]
        if missing:
            raise ValueError(f"{_ARRAYS} lacks {', '.join(missing[:5])}")
        memory = _Memory(self._folder / "memory", manifest.memory)
        restored = (_like(content[f"state-{i}"], leaf) for i, leaf in enumerate(leaves))
        self._memory = dict(manifest.memory)
        named = {key.removeprefix("array-"): value for key, value in content.items() if key.startswith("array-")}
        return Saved(
            manifest.epoch, _tree().unflatten(_tree().structure(like), restored), named, memory, manifest.facts
        )


def _canonical(content: Any) -> str:
    """Return the one JSON text of a content: keys sorted, no blanks, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _digest(content: Any) -> str:
    """Return the SHA-256 of a content's JSON."""
    return hashlib.sha256(_canonical(json.loads(_canonical(content))).encode()).hexdigest()


def _read_manifest(target: Path) -> _Manifest:
    """Read a manifest, hold it against its own digest and its folder's name, and check every field.

    Raises:
        ValueError: if it is not what was written.
    """
    content = archives.read_json(target / _MANIFEST, most_bytes=_MANIFEST_BYTES)
    if not isinstance(content, dict):
        raise ValueError(f"the manifest is no object but {checks.shown(content)}")
    if "format" not in content and (target / "arrays").is_dir():
        raise _FormatError(f"{target} was written by an earlier version, which this one does not read; {_WAY_OUT}")
    digest = content.pop("sha256", None)
    if digest != _digest(content):
        raise ValueError("the manifest does not match its own digest")
    if content.get("format") != FORMAT:
        raise _FormatError(
            f"{target} has format {checks.shown(content.get('format'))}, this version reads {FORMAT}; upgrade, or "
            f"{_WAY_OUT}"
        )
    epoch = checks.whole("epoch of the manifest", content.get("epoch"), least=0)
    if target.name != f"epoch_{epoch:08d}":
        raise ValueError(f"its manifest is of epoch {epoch}")
    files = {name: _read_file(name, entry) for name, entry in _typed(content, "files", dict).items()}
    arrays, memory = files.pop(_ARRAYS, None), {}
    if arrays is None:
        raise ValueError(f"the manifest names no {_ARRAYS}")
    for name, file in files.items():
        match = _MEMORY.fullmatch(name)
        at = int(match[1].removeprefix("epoch_")) if match else -1
        if not match or match[1] != f"epoch_{at:08d}" or at > epoch:
            raise ValueError(f"{checks.shown(name)} is no name of what a probe up to epoch {epoch} remembers")
        memory[at] = file
    identity = Identity(*(_typed(content, name, str | None) for name in ("run", "data")))
    state = tuple(_read_form(form) for form in _typed(content, "state", list))
    return _Manifest(epoch, identity, state, arrays, memory, _typed(content, "facts", dict))


def _typed(content: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = content.get(name)
    if name not in content or not isinstance(value, kind):
        raise ValueError(f"{name!r} of the manifest is {checks.shown(value)}")
    return value


def _read_file(name: str, entry: Any) -> _File:
    if not isinstance(entry, dict) or not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))):
        raise ValueError(f"the manifest has no SHA-256 of {checks.shown(name)}")
    return _File(entry["sha256"], checks.whole(f"size of {name}", entry.get("bytes"), least=0, most=_FILE_BYTES))


def _read_form(form: Any) -> tuple[str, tuple[int, ...]]:
    match form:
        case [str(dtype), list(shape)]:
            return dtype, tuple(checks.whole("side of an array of the state", side, least=0) for side in shape)
    raise ValueError(f"an array of the state is {checks.shown(form)}, neither dtype nor shape")


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as npz; those of types that npz does not know as their bytes, the type in the name."""
    members: dict[str, np.ndarray] = {}
    for name, array in arrays.items():
        if not _PLAIN.fullmatch(name) or _RAW in name:
            raise ValueError(
                f"the name of an array must be letters, digits, '.', '-' and '_', got {checks.shown(name)}"
            )
        if array.dtype.isbuiltin == 2:  # registered by another package, as bfloat16 is
            raw = np.frombuffer(array.tobytes(), np.uint8)
            members[f"{name}{_RAW}{array.dtype.name}"] = raw.reshape(*array.shape, array.dtype.itemsize)
        elif array.dtype.kind in "OV":
            raise ValueError(f"{name} must hold numbers, got {checks.shown(array)}")
        else:
            members[name] = array
    with path.open("wb") as file:
        np.savez(file, allow_pickle=False, **members)


def _read_npz(path: Path, file: _File) -> dict[str, np.ndarray]:
    """Read what `_write_npz` wrote, once size and SHA-256 are those of the manifest.

    Raises:
        ArchiveError: if it is another file.
    """
    if archives.sha256(path, size=file.bytes) != file.sha256:
        raise archives.ArchiveError(f"{path} does not match the digest in the manifest")
    # Members are stored as they are, so together they are smaller than the file.
    members = archives.read_npz(
        path, most_bytes=file.bytes, admit=lambda headers: None, directory_bytes=_DIRECTORY_BYTES
    )
    return dict(_restored(name, array) for name, array in members.items())


def _restored(member: str, array: np.ndarray) -> tuple[str, np.ndarray]:
    name, raw, kind = member.partition(_RAW)
    if not raw:
        return name, array
    dtype = getattr(ml_dtypes, kind, None)
    if not isinstance(dtype, type) or array.dtype != np.uint8 or array.shape[-1:] != (np.dtype(dtype).itemsize,):
        raise ValueError(f"{checks.shown(member)} is {checks.shown(array)}, not the bytes of what its name says")
    return name, array.view(dtype).reshape(array.shape[:-1])


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
