"""Records of runs: what was measured, with units, configuration and provenance, as one npz file without pickles."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lplr_jax import archives, checks, rooms
from lplr_jax.files import atomic_write
from lplr_jax.schema import INTEGERS, REQUIRED, SCHEMA, SINCE_2
from lplr_jax.values import LARGEST_INTEGER, Values

if TYPE_CHECKING:
    import xarray

SCHEMA_VERSION = 2
"""Version 2 has a sparse axis, the measured update, the spacing of the parameters, and the name of the loss."""

MOST_BYTES = 2**30
"""Bytes that a record may unpack to; one of 10^6 epochs and 9 spectra of 10^4 eigenvalues takes some 50 MB."""
_TEXT_BYTES = 2**24


class RecordError(ValueError):
    """A file or a set of arrays that is no valid record."""


SQUARED = "squared"
"""Name of the loss ½‖f_i - y_i‖², the only one of files of schema 1."""

# The loss of the run is an array of its own, so the text with its name is called otherwise.
_FIRST_TEXT = ("experiment", "config", "provenance", "checksum")
_TEXT: dict[int, tuple[str, ...]] = {1: _FIRST_TEXT, 2: (*_FIRST_TEXT, "loss_name")}


@dataclass(frozen=True)
class Record:
    """What one run left behind.

    Attributes:
        experiment: name of the experiment, such as "mnist".
        arrays: the measurements, by the names of `SCHEMA`.
        config: everything that decides the numbers; two runs of one config agree in every array.
        provenance: versions, device, data source and checksum, places and wall-clock times.
        loss: name of the loss of each sample; the number s is the array `loss_scale`.

    Raises:
        RecordError: if a name, type, length or number is none that a record may hold; it says which, and why.
    """

    experiment: str
    arrays: Mapping[str, np.ndarray]
    config: Mapping[str, Any]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    loss: str = SQUARED

    def __post_init__(self) -> None:
        # The name becomes part of file names.
        if not (isinstance(self.experiment, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}", self.experiment)):
            raise RecordError(
                f"experiment must be a name of letters, digits, - and _, got {checks.shown(self.experiment)}"
            )
        if not (isinstance(self.loss, str) and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9 _.,()=+-]{0,63}", self.loss)):
            raise RecordError(
                f"loss must be the name of a loss, 1 to 64 letters, digits, spaces and signs of _.,()=+-, such as "
                f"{SQUARED!r}; got {checks.shown(self.loss)}; the losses of the run belong into arrays"
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

    def __repr__(self) -> str:
        """A few lines: what the run was, what was measured, and how it went."""
        lines = [f"{label}: {text}" for label, text in facts(self)]
        return "\n  ".join([f"<Record {self.experiment!r}", *lines]) + ">"

    def _repr_html_(self) -> str:
        """A table for notebooks."""
        # Reports stand above records, so this door is opened when somebody goes through.
        return rooms.through_door(__name__, "record_html")(self)

    @property
    def diverged_at(self) -> int | None:
        """Step number of the first measured entry from which on no loss is finite; None for a run that stayed finite.

        A loss that is missing between finite ones was not measured, and so was one that `seen` calls unseen.
        """
        loss = self.arrays["loss"]
        finite = np.flatnonzero(np.isfinite(loss))
        after = np.arange(loss.size) > (finite[-1] if finite.size else -1)
        if "seen" in self.arrays:
            after &= self.arrays["seen"] == 1
        return int(self.arrays["epoch"][after.argmax()]) if after.any() else None

    def checksum(self) -> str:
        """Return the SHA-256 of experiment, config, the loss where it is not squared, and all arrays.

        Provenance does not enter.
        """
        names = [self.experiment, dict(self.config), *([] if self.loss == SQUARED else [self.loss])]
        digest = hashlib.sha256(json.dumps(names, sort_keys=True).encode())
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
            "loss_name": self.loss,
        }
        members = {**self.arrays, **{name: np.array(text) for name, text in texts.items()}}
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, schema_version=np.array(SCHEMA_VERSION), **members)
        return path

    def to_xarray(self) -> "xarray.Dataset":
        """Return the arrays as an xarray Dataset with units, meanings, and the config among its attributes."""
        import xarray  # half a second, which only who asks for a Dataset should wait

        def variable(name: str, dims: tuple[str, ...]) -> "xarray.Variable":
            entry = SCHEMA[name]
            return xarray.Variable(dims, self.arrays[name], {"units": entry.units, "long_name": entry.meaning})

        coords = {"epoch": variable("epoch", ("epoch",))}
        if "probe_epoch" in self.arrays:
            coords["probe"] = variable("probe_epoch", ("probe",))
            if any("other_probe" in SCHEMA[name].dims for name in self.arrays):
                coords["other_probe"] = variable("probe_epoch", ("other_probe",))
        variables = {name: variable(name, SCHEMA[name].dims) for name in SCHEMA if name in self.arrays}
        del variables["epoch"]
        attributes = {
            "experiment": self.experiment,
            "loss": self.loss,
            "config": json.dumps(dict(self.config), sort_keys=True),
        }
        return xarray.Dataset(variables, coords=coords, attrs=attributes)


def facts(record: Record) -> tuple[tuple[str, str], ...]:
    """Return what a record is in a few labelled lines: size, steps, probes, end, loss, λ_0 with its interval."""
    arrays, found = record.arrays, []
    n, c, p, s, eta = (float(arrays[name]) for name in ("n", "c", "p", "loss_scale", "learning_rate"))
    size = f"n = {n:,.0f}, c = {c:,.0f}, p = {p:,.0f}, {record.loss} loss, s = {s:g}"
    found.append(("problem", size + (f", η = {eta:.4g}" if np.isfinite(eta) else "")))
    epoch, loss = arrays["epoch"], arrays["loss"]
    known = np.flatnonzero(np.isfinite(loss))
    measured = "all measured" if known.size == epoch.size == int(epoch[-1]) + 1 else f"{known.size:,} measured"
    found.append(("steps", f"0 to {int(epoch[-1]):,}, {measured}"))
    probes = arrays.get("probe_epoch", np.zeros(0, np.int64))
    if probes.size:
        found.append(("probes", f"{probes.size:,}, at steps {int(probes.min()):,} to {int(probes.max()):,}"))
    else:
        found.append(("probes", "none"))
    end = record.diverged_at
    found.append(("end", "finite to the last measured step" if end is None else f"diverged at step {end:,}"))
    if known.size:
        first, last = (f"{loss[k]:.5g} (step {int(epoch[k]):,})" for k in known[[0, -1]])
        found.append(("loss", f"{first} to {last}"))
    at = np.flatnonzero(probes == 0)
    if at.size and "ntk_min_eig" in arrays and np.isfinite(arrays["ntk_min_eig"][at[0]]):
        value = float(arrays["ntk_min_eig"][at[0]])
        ends = [float(arrays[name][at[0]]) for name in ("ntk_min_eig_lower", "ntk_min_eig_upper") if name in arrays]
        text = f"{value:.5g}"
        if len(ends) == 2 and np.isfinite(ends).all():
            # As many digits as tell the ends of the interval apart.
            share = abs(ends[1] - ends[0]) / max(abs(value), np.finfo(float).tiny)
            digits = 2 + int(np.clip(np.ceil(-np.log10(max(share, 1e-14))), 1, 14))
            text = f"{value:.{digits}g}, in [{ends[0]:.{digits}g}, {ends[1]:.{digits}g}]"
        found.append(("λ_0", text))
    return tuple(found)


def _check_form(arrays: Mapping[str, tuple[tuple[int, ...], np.dtype]], version: int = SCHEMA_VERSION) -> None:
    """Hold names, types, ranks and lengths against the schema; the numbers themselves are not needed."""
    missing = [name for name in REQUIRED if name not in arrays]
    if missing:
        raise RecordError(f"the record lacks {', '.join(missing)}; every record holds {', '.join(REQUIRED)}")
    names = [name for name in SCHEMA if version >= 2 or name not in SINCE_2]
    lengths: dict[str, tuple[int, str]] = {}
    for name, (shape, dtype) in arrays.items():
        if name not in names:
            raise RecordError(
                f"the record holds {name!r}, which schema {version} does not know; it knows {', '.join(names)}"
            )
        dims = SCHEMA[name].dims
        if len(shape) != len(dims) or dtype.kind not in "iuf":
            raise RecordError(f"{name} must be numeric with axes {dims}, got {dtype} of shape {shape}")
        if name in INTEGERS and dtype.kind not in "iu":
            raise RecordError(f"{name} must hold integers, got {dtype}; it holds {SCHEMA[name].meaning}")
        for dim, length in zip(dims, shape, strict=True):
            first, by = lengths.setdefault(dim, (length, name))
            if first != length:
                raise RecordError(f"{name} has {length} entries along {dim!r} where {by} has {first}; they must agree")
    if not lengths["epoch"][0]:
        raise RecordError("the record has no epoch; epoch 0, the initialisation, is the least that one holds")
    if "other_probe" in lengths:
        length, by = lengths["other_probe"]
        if length != lengths["probe"][0]:
            raise RecordError(f"{by} must be square in the probes, got {lengths['probe'][0]} by {length}")


def _check_values(arrays: Mapping[str, np.ndarray]) -> None:
    """Hold the numbers against what the schema says of each array, and against each other where one counts another."""
    for name, array in arrays.items():
        _check_range(name, array, SCHEMA[name].values)
    _check_steps(arrays)
    n, c = int(arrays["n"]), int(arrays["c"])
    if n * c >= LARGEST_INTEGER:
        raise RecordError(f"n c must be below 2^53, got n = {n} and c = {c}")
    samples = int(arrays.get("kernel_samples", n))
    if samples > n:
        raise RecordError(f"kernel_samples must be <= n = {n}, got {samples}")
    trace = "kernel_trace" in arrays and float(arrays["kernel_trace"]) == 1
    rows = samples * (1 if trace else c)
    for name in ("spectrum", "residual_energy"):
        if name in arrays and arrays[name].shape[1] != rows:
            found = arrays[name].shape[1]
            if f"{name}_rest" in arrays and 1 <= found < rows:
                continue
            of = f"{samples} samples" + ("" if trace else f" and {c} outputs")
            fewer = f", or fewer and {name}_rest"
            raise RecordError(
                f"{name} must have {rows} entries along 'eigenvalue', the rows of {of}{fewer}; got {found}"
            )
    if "subset_ids" in arrays and arrays["subset_ids"].size:
        ids = arrays["subset_ids"]
        if int(ids.max()) >= n:
            span = f"{int(ids.min())} to {int(ids.max())}"
            raise RecordError(f"subset_ids must lie in the run's samples 0 to {n - 1}, got {span}")
        _check_distinct("subset_ids", ids)
    if "radius_certified" in arrays and np.isposinf(arrays["radius_certified"]):
        affine = "affine_in_parameters" in arrays and float(arrays["affine_in_parameters"]) == 1
        if not affine and not ("ntk_lipschitz_upper" in arrays and float(arrays["ntk_lipschitz_upper"]) == 0):
            raise RecordError(
                "radius_certified must be finite unless affine_in_parameters = 1 or ntk_lipschitz_upper = 0, got inf"
            )


def _check_range(name: str, array: np.ndarray, values: Values) -> None:
    """Raise RecordError, with the first number that is out of range and its place."""
    nan = np.isnan(array)
    bad = nan & (not values.nan)
    bad |= ~nan & ((array <= values.least) if values.above else (array < values.least))
    bad |= array > values.most
    if values.finite:
        bad |= np.isinf(array)
    if values.among:
        bad |= ~nan & ~np.isin(array, values.among)
    if values.whole:
        bad |= ~nan & ((array >= LARGEST_INTEGER) | (array != np.floor(array)))
    if bad.any():
        place = np.unravel_index(int(bad.argmax()), array.shape)
        where = f" at entry {', '.join(map(str, place))}" if place else ""
        large = values.whole and LARGEST_INTEGER <= array[place] < np.inf
        words = "below 2^53" if large else values.words
        way = "; NaN stands for what was not measured" if values.nan else ""
        raise RecordError(f"{name} must be {words}, got {array[place]}{where}{way}")


def _check_distinct(name: str, array: np.ndarray) -> None:
    values, counts = np.unique(array, return_counts=True)
    if values.size < array.size:
        twice = int(values[counts.argmax()])
        raise RecordError(f"{name} must be distinct, got {twice} {counts.max()} times")


def _check_steps(arrays: Mapping[str, np.ndarray]) -> None:
    """Hold step numbers against each other; they are looked up, never counted up to."""
    epoch = arrays["epoch"]
    if int(epoch[0]) != 0:
        raise RecordError(
            f"epoch must start with 0, got {int(epoch[0])}: drift and every claim are measured from the "
            "initialisation; call the first step that was seen 0"
        )
    falls = np.flatnonzero(epoch[1:] <= epoch[:-1])
    if falls.size:
        k = int(falls[0])
        raise RecordError(f"epoch must be strictly ascending, got {int(epoch[k])} before {int(epoch[k + 1])}")
    if "probe_epoch" in arrays and arrays["probe_epoch"].size:
        probes = arrays["probe_epoch"].astype(np.int64)
        place = np.searchsorted(epoch.astype(np.int64), probes)
        astray = epoch.astype(np.int64)[np.minimum(place, epoch.size - 1)] != probes
        if astray.any():
            steps = f"the {epoch.size:,} steps in epoch, 0 to {int(epoch[-1])}"
            raise RecordError(f"probe_epoch must be among {steps}; got {int(probes[astray.argmax()])}")
        _check_distinct("probe_epoch", probes)


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
    texts = {name: str(members.pop(name)) for name in _TEXT[2] if name in members}
    try:
        config, provenance = json.loads(texts["config"]), json.loads(texts["provenance"])
        record = Record(texts["experiment"], members, config, provenance, texts.get("loss_name", SQUARED))
        intact = record.checksum() == texts["checksum"]
    except (ValueError, RecursionError) as error:
        raise RecordError(f"{path}: {error}; use an intact copy, or run again") from error
    if not intact:
        raise RecordError(f"{path} was altered after it was written: its arrays do not match its checksum; run again")
    return record


def _members(path: Path) -> dict[str, np.ndarray]:
    """Return the arrays and texts of a record; its schema version decides whether the others are looked at."""

    def lacks(headers: Mapping[str, archives.Header], names: Iterable[str]) -> None:
        missing = [name for name in names if name not in headers]
        if missing:
            raise RecordError(f"an npz file but no record: it lacks {', '.join(missing)}; `lplr mnist` writes one")

    def has_version(headers: Mapping[str, archives.Header]) -> None:
        lacks(headers, ("schema_version", *_TEXT[1]))
        version = headers["schema_version"]
        if version.shape or version.dtype.kind not in "iu":
            raise RecordError(
                f"schema_version must be one integer, got {version.dtype} of shape {version.shape}; run again"
            )

    def is_record(headers: Mapping[str, archives.Header]) -> None:
        lacks(headers, _TEXT[version])
        for name in _TEXT[version]:
            text = headers[name]
            if text.shape or text.dtype.kind != "U" or text.nbytes > _TEXT_BYTES:
                raise RecordError(
                    f"{name} must be one text of at most {_TEXT_BYTES // 4:,} letters, "
                    f"got {text.dtype} of shape {text.shape}; run again"
                )
        rest = {name: header for name, header in headers.items() if name not in ("schema_version", *_TEXT[version])}
        _check_form({name: (header.shape, header.dtype) for name, header in rest.items()}, version)

    first = archives.read_npz(path, most_bytes=MOST_BYTES, admit=has_version, only=("schema_version",))
    version = int(first["schema_version"])
    if not 1 <= version <= SCHEMA_VERSION:
        way = "upgrade lplr-jax" if version > SCHEMA_VERSION else "the file is damaged; run again"
        raise RecordError(f"the file has schema {version}, this version reads up to {SCHEMA_VERSION}; {way}")
    members = archives.read_npz(path, most_bytes=MOST_BYTES, admit=is_record)
    del members["schema_version"]
    return members
