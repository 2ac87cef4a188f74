"""What a checkpoint's files are: the manifest that names them, signed by its own digest, and arrays as npz."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from lplr_jax import archives, checks

FORMAT = 2
"""Of the manifest. The first one had no number, and kept its arrays in a folder."""
ARRAYS = "arrays.npz"
"""File of the state and the series."""
MANIFEST = "manifest.json"
"""File of the manifest."""
MOST_BYTES = 2**25
"""Of a manifest."""
WAY_OUT = "start afresh with --force, which keeps the folder aside"
_MEMORY = re.compile(r"memory/(epoch_\d{8,})\.npz")
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_RAW = ".as-"
"""Between the name of a member and the dtype of an array that npz does not know and that is kept as its bytes."""
_FILE_BYTES = 2**40
_DIRECTORY_BYTES = 2**26
"""Of the zip directory of a state: some 100 bytes a leaf."""


class FormatError(ValueError):
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
        run = digest({"experiment": experiment, "config": dict(config)})
        return cls(run, checksum if isinstance(checksum, str) else None)


@dataclass(frozen=True)
class File:
    """A file that a manifest names."""

    sha256: str
    bytes: int

    @classmethod
    def at(cls, path: Path) -> "File":
        """Return what a manifest says of a file that is there."""
        return cls(archives.sha256(path), path.stat().st_size)


@dataclass(frozen=True)
class Manifest:
    """What a manifest holds, every field of its type."""

    epoch: int
    identity: Identity
    state: tuple[tuple[str, tuple[int, ...]], ...]
    arrays: File
    memory: Mapping[int, File]
    facts: Mapping[str, Any]


def canonical(content: Any) -> str:
    """Return the one JSON text of a content: keys sorted, no blanks, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(content: Any) -> str:
    """Return the SHA-256 of a content's JSON."""
    return hashlib.sha256(canonical(json.loads(canonical(content))).encode()).hexdigest()


def read_manifest(target: Path) -> Manifest:
    """Read a manifest, hold it against its own digest and its folder's name, and check every field.

    Raises:
        ValueError: if it is not what was written.
    """
    content = archives.read_json(target / MANIFEST, most_bytes=MOST_BYTES)
    if not isinstance(content, dict):
        raise ValueError(f"the manifest is no object but {checks.shown(content)}")
    if "format" not in content and (target / "arrays").is_dir():
        raise FormatError(f"{target} was written by an earlier version, which this one does not read; {WAY_OUT}")
    signed = content.pop("sha256", None)
    if signed != digest(content):
        raise ValueError("the manifest does not match its own digest")
    if content.get("format") != FORMAT:
        raise FormatError(
            f"{target} has format {checks.shown(content.get('format'))}, this version reads {FORMAT}; upgrade, or "
            f"{WAY_OUT}"
        )
    epoch = checks.whole("epoch of the manifest", content.get("epoch"), least=0)
    if target.name != f"epoch_{epoch:08d}":
        raise ValueError(f"its manifest is of epoch {epoch}")
    files = {name: _read_file(name, entry) for name, entry in _typed(content, "files", dict).items()}
    arrays, memory = files.pop(ARRAYS, None), {}
    if arrays is None:
        raise ValueError(f"the manifest names no {ARRAYS}")
    for name, file in files.items():
        match = _MEMORY.fullmatch(name)
        at = int(match[1].removeprefix("epoch_")) if match else -1
        if not match or match[1] != f"epoch_{at:08d}" or at > epoch:
            raise ValueError(f"{checks.shown(name)} is no name of what a probe up to epoch {epoch} remembers")
        memory[at] = file
    identity = Identity(*(_typed(content, name, str | None) for name in ("run", "data")))
    state = tuple(_read_form(form) for form in _typed(content, "state", list))
    return Manifest(epoch, identity, state, arrays, memory, _typed(content, "facts", dict))


def _typed(content: Mapping[str, Any], name: str, kind: Any) -> Any:
    value = content.get(name)
    if name not in content or not isinstance(value, kind):
        raise ValueError(f"{name!r} of the manifest is {checks.shown(value)}")
    return value


def _read_file(name: str, entry: Any) -> File:
    if not isinstance(entry, dict) or not re.fullmatch("[0-9a-f]{64}", str(entry.get("sha256"))):
        raise ValueError(f"the manifest has no SHA-256 of {checks.shown(name)}")
    return File(entry["sha256"], checks.whole(f"size of {name}", entry.get("bytes"), least=0, most=_FILE_BYTES))


def _read_form(form: Any) -> tuple[str, tuple[int, ...]]:
    match form:
        case [str(dtype), list(shape)]:
            return dtype, tuple(checks.whole("side of an array of the state", side, least=0) for side in shape)
    raise ValueError(f"an array of the state is {checks.shown(form)}, neither dtype nor shape")


def write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as npz; those of types that npz does not know as their bytes, the type in the name.

    Raises:
        ValueError: for a name that is not plain, or an array of objects.
    """
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


def read_npz(path: Path, file: File) -> dict[str, np.ndarray]:
    """Read what `write_npz` wrote, once size and SHA-256 are those of the manifest.

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
