"""Records of runs: what was measured, with units, configuration and provenance, as one npz file without pickles."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

from lplr_jax import archives, checks

SCHEMA_VERSION = 1

MOST_BYTES = 2**30
"""Bytes that a record may unpack to; one of 10^6 epochs and 9 spectra of 10^4 eigenvalues takes some 50 MB."""
_TEXT_BYTES = 2**24


class RecordError(ValueError):
    """A file or a set of arrays that is no valid record."""


class Entry(NamedTuple):
    """What one array of a record is."""

    dims: tuple[str, ...]
    units: str
    meaning: str


HALF = ".half-"
"""Part of the name of every file and directory that is not whole yet."""

LOSS = "units of L"
KERNEL = "output² / parameter²"
LIPSCHITZ = "output² / parameter³"

SCHEMA: dict[str, Entry] = {
    "epoch": Entry(("epoch",), "epochs", "epoch t; 0 is the initialisation"),
    "loss": Entry(("epoch",), LOSS, "L(θ_t) on all training data, in training precision"),
    "grad_sq_norm": Entry(("epoch",), "L² / parameter²", "‖∇L(θ_t)‖², in training precision"),
    "drift": Entry(("epoch",), "parameter", "‖θ_t - θ_0‖₂"),
    "accuracy": Entry(("epoch",), "1", "share of training samples whose largest output is that of their class"),
    "probe_epoch": Entry(("probe",), "epochs", "epoch of each kernel probe"),
    "probe_loss": Entry(("probe",), LOSS, "L(θ_t) evaluated in float64"),
    "probe_grad_sq_norm": Entry(("probe",), "L² / parameter²", "‖∇L(θ_t)‖² evaluated in float64"),
    "ntk_min_eig": Entry(("probe",), KERNEL, "λ_min of the full (n c, n c) kernel"),
    "ntk_min_eig_lower": Entry(("probe",), KERNEL, "proved lower bound on λ_min"),
    "ntk_min_eig_upper": Entry(("probe",), KERNEL, "proved upper bound on λ_min"),
    "ntk_max_eig": Entry(("probe",), KERNEL, "λ_max of the full kernel"),
    "ntk_min_eig_subset": Entry(("probe",), KERNEL, "λ_min on the subset, an upper bound of that on all"),
    "ntk_rayleigh": Entry(("probe",), KERNEL, "rᵀΘr / ‖r‖² at the residual r of the probe"),
    "ntk_effective_rank": Entry(("probe",), "1", "(tr Θ)² / ‖Θ‖_F², between 1 and the number of rows"),
    "ntk_shift": Entry(("probe",), KERNEL, "‖Θ_t - Θ_0‖₂"),
    "sharpness": Entry(("probe",), "L / parameter²", "largest eigenvalue of the Hessian of L; NaN where not measured"),
    "curvature_min": Entry(
        ("probe",), "L / parameter²", "least eigenvalue of the Hessian of L; NaN where not measured"
    ),
    "lqcr_inner": Entry(("probe",), LOSS, "⟨∇L(θ_t), θ_t - θ_T⟩, T the last probe"),
    "ntk_assembly_error": Entry(
        ("probe",), KERNEL, "bound on the assembly error of Θ in spectral norm; finite where the interval includes it"
    ),
    "probe_untrusted": Entry(
        ("probe",),
        "1",
        "1: the kernel's values of this probe are NaN as the arithmetic lost them, 2: the Hessian's, 3: both",
    ),
    "spectrum": Entry(("probe", "eigenvalue"), KERNEL, "eigenvalues of Θ_t, ascending; NaN where not measured"),
    "residual_energy": Entry(
        ("probe", "eigenvalue"), "1", "share of ‖r‖² along each eigenvector of Θ_t; NaN where not measured"
    ),
    "ntk_pair_shift": Entry(("probe", "other_probe"), KERNEL, "‖Θ_s - Θ_t‖₂ for every pair of probes, from below"),
    "param_pair_distance": Entry(("probe", "other_probe"), "parameter", "‖θ_s - θ_t‖₂ for every pair of probes"),
    "ntk_lipschitz_lower": Entry((), LIPSCHITZ, "largest ‖Θ_s - Θ_t‖₂/‖θ_s - θ_t‖ over pairs of probes, less errors"),
    "ntk_lipschitz_random": Entry((), LIPSCHITZ, "lower estimate of L_Θ on the ball of the run, random directions"),
    "ntk_lipschitz_gradient": Entry((), LIPSCHITZ, "the same, along the gradient at θ_0"),
    "ntk_lipschitz_power": Entry((), LIPSCHITZ, "the same, by power iteration on the derivative of the kernel"),
    "ntk_lipschitz_upper": Entry((), LIPSCHITZ, "proved upper bound of L_Θ on the ball of the run; NaN where none"),
    "smoothness_upper": Entry((), "L / parameter²", "proved upper bound of β on the ball of the run; NaN where none"),
    "radius_certified": Entry((), "parameter", "R*: proved that L_Θ(R) R < λ_0 for R < R*; NaN where none"),
    "parameter_spacing": Entry((), "parameter", "2-norm of the float32 spacings of θ_0"),
    "affine_in_parameters": Entry((), "1", "1 where the program is affine in its parameters, read off its jaxpr"),
    "kernel_samples": Entry((), "samples", "samples of every probe's kernel, loss and gradient; absent: all n"),
    "kernel_trace": Entry((), "1", "1 where the probes hold the output-averaged kernel, (1/c) Σ_o Θ_oo"),
    "subset_ids": Entry(("subset",), "sample numbers", "training samples of the subset"),
    "loss_scale": Entry((), "1", "the number s in L = ‖r‖² / (2 s)"),
    "learning_rate": Entry((), "parameter² / L", "step size η"),
    "n": Entry((), "samples", "training samples"),
    "c": Entry((), "outputs", "outputs per sample"),
    "p": Entry((), "parameters", "parameters"),
}
"""Every array a record may hold. What was not measured is absent."""

REQUIRED = ("epoch", "loss", "grad_sq_norm", "drift", "loss_scale", "learning_rate", "n", "c", "p")
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


class atomic_write:  # noqa: N801 - reads as a function at every call
    """Context with a temporary path beside `path`, moved there and flushed to disk when the body succeeds."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> Path:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{self._path.stem}{HALF}"
        handle, name = tempfile.mkstemp(prefix=prefix, suffix=self._path.suffix, dir=self._path.parent)
        os.close(handle)
        self._temporary = Path(name)
        return self._temporary

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                _sync(self._temporary)
                # mkstemp makes files that only their owner can read; a record is an ordinary file.
                umask = os.umask(0)
                os.umask(umask)
                self._temporary.chmod(0o666 & ~umask)
                self._temporary.replace(self._path)
                sync_directory(self._path.parent)
        finally:
            self._temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a directory are on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_directory(folder: Path) -> None:
    """Wait until the names in a directory are on disk; some file systems know no such thing, which is no error."""
    try:
        _sync(folder)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES):
            raise


def sync_tree(folder: Path) -> None:
    """Wait until every file of a tree is on disk, and the names of them all."""
    for path in folder.rglob("*"):
        if path.is_dir():
            sync_directory(path)
        else:
            _sync(path)
    sync_directory(folder)


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
