"""Records of runs: what was measured, with units, configuration and provenance, as one npz file without pickles."""

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from lplr_jax import archives, checks
from lplr_jax.files import atomic_write
from lplr_jax.schema import REQUIRED, SCHEMA

SCHEMA_VERSION = 1

MOST_BYTES = 2**30
"""Bytes that a record may unpack to; one of 10^6 epochs and 9 spectra of 10^4 eigenvalues takes some 50 MB."""
_TEXT_BYTES = 2**24


class RecordError(ValueError):
    """A file or a set of arrays that is no valid record."""


_TEXT = ("experiment", "config", "provenance", "checksum")
_INDICES = ("epoch", "probe_epoch", "subset_ids")


@dataclass(frozen=True)
class Record:
    """What one run left behind.

    Attributes:
        experiment: name of the experiment, such as "mnist".
        arrays: the measurements, by the names of `SCHEMA`.
        config: everything that decides the numbers; two runs of one config agree in every array.
        provenance: versions, device, data source and checksum, places and wall-clock times.
    """

    experiment: str
    arrays: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    loss: str = "squared"

    def __post_init__(self) -> None:
        # The name becomes part of file names.
        if not (isinstance(self.experiment, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.experiment)):
            raise RecordError(
                f"experiment must be a name of letters, digits, - and _, got {checks.shown(self.experiment)}"
            )
        for what in ("arrays", "config", "provenance"):
            content = getattr(self, what)
            if not (isinstance(content, Mapping) and all(isinstance(name, str) for name in content)):
                raise RecordError(f"{what} must be a mapping from names (a JSON object), got {checks.shown(content)}")
        for name, array in self.arrays.items():
            if not isinstance(array, np.ndarray):
                raise RecordError(f"{name} must be a numpy array, got {checks.shown(array)}; wrap it in np.asarray")
        _check_form({name: (array.shape, array.dtype) for name, array in self.arrays.items()})
        _check_values(self.arrays)

    def __getitem__(self, name: str) -> np.ndarray:
        """Return one array by its name in `SCHEMA`.

        Raises:
            KeyError: if this run did not measure it.
        """
        if name not in self.arrays:
            raise KeyError(f"{name} was not measured in this run; it holds {', '.join(sorted(self.arrays))}")
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def diverged_at(self) -> int | None:
        """First epoch from which on no loss is finite, None for a run that stayed finite to its end.

        A loss that is missing between finite ones was not measured.
        """
        finite = np.flatnonzero(np.isfinite(self.arrays["loss"]))
        first = int(finite[-1]) + 1 if finite.size else 0
        return first if first < self.arrays["loss"].size else None

    def checksum(self) -> str:
        """Return the SHA-256 of experiment, config and all arrays; provenance does not enter."""
        digest = hashlib.sha256(json.dumps([self.experiment, dict(self.config)], sort_keys=True).encode())
        for name in sorted(self.arrays):
            array = np.ascontiguousarray(self.arrays[name])
            digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
            digest.update(array.tobytes())
        return f"sha256:{digest.hexdigest()}"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the record as one npz file, whole or not at all.

        Args:
            path: file to write; its directory is made where it is missing.

        Returns:
            The path written.

        Raises:
            TypeError: for what is no path.
            ValueError: for a path without a file name.
            OSError: if it cannot be written; what was there before stays.
        """
        path = checks.path("path", path)
        if not path.name:
            raise ValueError(f"path must be that of a file, got {str(path)!r}")
        texts = {
            "experiment": self.experiment,
            "config": json.dumps(dict(self.config), sort_keys=True),
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
            "checksum": self.checksum(),
        }
        members = {**self.arrays, **{name: np.array(text) for name, text in texts.items()}}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, schema_version=np.array(SCHEMA_VERSION), **members)
        return path

    def to_xarray(self) -> xr.Dataset:
        """Return the arrays as an xarray Dataset with units, meanings, and the config among its attributes."""
        coords = {name: self.arrays[name] for name in ("epoch",)}
        if "probe_epoch" in self.arrays:
            coords["probe"] = self.arrays["probe_epoch"]
        variables = {
            name: xr.Variable(entry.dims, self.arrays[name], {"units": entry.units, "long_name": entry.meaning})
            for name, entry in SCHEMA.items()
            if name in self.arrays and name != "epoch"
        }
        attributes = {"experiment": self.experiment, "config": json.dumps(dict(self.config), sort_keys=True)}
        return xr.Dataset(variables, coords=coords, attrs=attributes)


def _check_form(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> None:
    """Hold names, types, ranks and lengths against the schema; the numbers themselves are not needed."""
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise RecordError(f"the record lacks {', '.join(missing)}; every record holds {', '.join(REQUIRED)}")
    lengths: dict[str, tuple[int, str]] = {}
    for name, (shape, dtype) in arrays.items():
        if name not in SCHEMA:
            raise RecordError(
                f"the record holds {name!r}, which schema {SCHEMA_VERSION} does not know; it knows {', '.join(SCHEMA)}"
            )
        dims = SCHEMA[name].dims
        if len(shape) != len(dims) or dtype.kind not in "iuf":
            raise RecordError(f"{name} must be numeric with axes {dims}, got {dtype} of shape {shape}")
        if name in _INDICES and dtype.kind not in "iu":
            raise RecordError(f"{name} must hold integers, got {dtype}; it counts {SCHEMA[name].units}")
        for dim, length in zip(dims, shape, strict=True):
            first, by = lengths.setdefault(dim, (length, name))
            if first != length:
                raise RecordError(f"{name} has {length} entries along {dim!r} where {by} has {first}; they must agree")
    if not lengths["epoch"][0]:
        raise RecordError("the record has no epoch; epoch 0, the initialisation, is the least that one holds")


def _check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Hold the numbers by which others are counted or divided against their range."""
    for name in ("n", "c", "p", "kernel_samples"):
        if name in arrays:
            value = float(arrays[name])
            if not (value >= 1 and value == np.floor(value) and value < 2**63):
                raise RecordError(f"{name} must be an integer >= 1, got {value:g}")
    if "kernel_samples" in arrays and int(arrays["kernel_samples"]) > int(arrays["n"]):
        raise RecordError(f"kernel_samples must be <= n = {int(arrays['n'])}, got {int(arrays['kernel_samples'])}")
    for name in ("loss_scale", "learning_rate"):
        value = float(arrays[name])
        # A record of a single point has no step size.
        if not (np.isfinite(value) and value > 0) and not (name == "learning_rate" and np.isnan(value)):
            raise RecordError(f"{name} must be a finite number > 0, got {value:g}")
    ranges = {"probe_epoch": ("epochs", arrays["epoch"].size), "subset_ids": ("samples", int(arrays["n"]))}
    for name, (what, end) in ranges.items():
        if name in arrays and arrays[name].size and not 0 <= int(arrays[name].min()) <= int(arrays[name].max()) < end:
            span = f"{arrays[name].min()} to {arrays[name].max()}"
            raise RecordError(f"{name} must lie in the run's {what} 0 to {end - 1}, got {span}")


def load(path: str | os.PathLike[str]) -> Record:
    """Read a record, and check its schema, its shapes and its integrity.

    Nothing in the file is run or unpickled, and no array is allocated before names, types and sizes of all are known to
    be those of a record of at most `MOST_BYTES`.

    Args:
        path: an npz file, or a directory that holds `record.npz`.

    Raises:
        RecordError: if the file is missing, is no record, is of a newer schema, holds pickled objects, or was altered.
        TypeError: for what is no path.
    """
    path = checks.path("path", path)
    try:
        path = path / "record.npz" if path.is_dir() else path
    except OSError as error:  # a name that is too long, a link to itself
        place = checks.shown(str(path))
        raise RecordError(f"there is no record at {place} ({error.strerror}); name another") from error
    if not os.path.lexists(path):
        raise RecordError(f"there is no record at {path}; `lplr mnist --out DIR` writes DIR/record.npz")
    try:
        members = _members(path)
    except RecordError as error:
        raise RecordError(f"{path}: {error}") from error
    except archives.ArchiveError as error:
        raise RecordError(
            f"{path} is no readable record ({error}); expected an npz without pickled objects, as `lplr` writes it"
        ) from error
    texts = {name: str(members.pop(name)) for name in _TEXT}
    try:
        config, provenance = json.loads(texts["config"]), json.loads(texts["provenance"])
        record = Record(texts["experiment"], members, config, provenance)
        intact = record.checksum() == texts["checksum"]
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: {error}; use an intact copy, or run again") from error
    if not intact:
        raise RecordError(f"{path} was altered after it was written: its arrays do not match its checksum; run again")
    return record


def _members(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays and texts of a record; its schema version decides whether the others are looked at."""

    def has_version(headers: Mapping[str, archives.Header]) -> None:
        missing = [name for name in ("schema_version", *_TEXT) if name not in headers]
        if missing:
            raise RecordError(f"an npz file but no record: it lacks {', '.join(missing)}; `lplr mnist` writes one")
        version = headers["schema_version"]
        if version.shape or version.dtype.kind not in "iu":
            raise RecordError(
                f"schema_version must be one integer, got {version.dtype} of shape {version.shape}; run again"
            )

    def is_record(headers: Mapping[str, archives.Header]) -> None:
        for name in _TEXT:
            text = headers[name]
            if text.shape or text.dtype.kind != "U" or text.nbytes > _TEXT_BYTES:
                raise RecordError(
                    f"{name} must be one text of at most {_TEXT_BYTES // 4:,} letters, "
                    f"got {text.dtype} of shape {text.shape}; run again"
                )
        rest = {name: header for name, header in headers.items() if name not in ("schema_version", *_TEXT)}
        _check_form({name: (header.shape, header.dtype) for name, header in rest.items()})

    first = archives.read_npz(path, most_bytes=MOST_BYTES, admit=has_version, only=("schema_version",))
    version = int(first["schema_version"])
    if not 1 <= version <= SCHEMA_VERSION:
        way = "upgrade lplr-jax" if version > SCHEMA_VERSION else "the file is damaged; run again"
        raise RecordError(f"the file has schema {version}, this version reads up to {SCHEMA_VERSION}; {way}")
    members = archives.read_npz(path, most_bytes=MOST_BYTES, admit=is_record)
    del members["schema_version"]
    return members
