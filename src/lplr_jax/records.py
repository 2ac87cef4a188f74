"""Records of runs: what was measured, with units, configuration and provenance, as one npz file without pickles."""

import errno
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import xarray as xr

SCHEMA_VERSION = 1


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
        missing = [name for name in REQUIRED if name not in self.arrays]
        if missing:
            raise RecordError(f"the record lacks {', '.join(missing)}; every record holds {', '.join(REQUIRED)}")
        lengths: dict[str, tuple[int, str]] = {}
        for name, array in self.arrays.items():
            if name not in SCHEMA:
                raise RecordError(f"the record holds {name!r}, which schema {SCHEMA_VERSION} does not know")
            dims = SCHEMA[name].dims
            if array.ndim != len(dims) or array.dtype.kind not in "iuf":
                raise RecordError(f"{name} must be numeric with axes {dims}, got {array.dtype} of shape {array.shape}")
            for dim, length in zip(dims, array.shape, strict=True):
                first, by = lengths.setdefault(dim, (length, name))
                if first != length:
                    raise RecordError(f"{name} has {length} entries along {dim!r} where {by} has {first}")

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
        """
        texts = {
            "experiment": self.experiment,
            "config": json.dumps(dict(self.config), sort_keys=True),
            "provenance": json.dumps(dict(self.provenance), sort_keys=True),
            "checksum": self.checksum(),
        }
        members = {**self.arrays, **{name: np.array(text) for name, text in texts.items()}}
        with atomic_write(Path(path)) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, schema_version=np.array(SCHEMA_VERSION), **members)
        return Path(path)

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

    Args:
        path: an npz file, or a directory that holds `record.npz`.

    Raises:
        RecordError: if the file is missing, is no record, is of a newer schema, holds pickled objects, or was altered.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "record.npz"
    if not path.exists():
        raise RecordError(f"there is no record at {path}; `lplr mnist --out DIR` writes DIR/record.npz")
    try:
        # NumPy leaves a file that it opened itself and could not read to the garbage collector.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            members = {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise RecordError(f"{path} is no readable record ({error}); expected an npz without pickled objects") from error
    version = members.pop("schema_version", None)
    missing = [name for name in _TEXT if name not in members]
    if version is None or missing:
        raise RecordError(f"{path} is an npz file but no record: it lacks {', '.join(missing or ['schema_version'])}")
    if int(version) > SCHEMA_VERSION:
        raise RecordError(
            f"{path} has schema {int(version)}, this version reads up to {SCHEMA_VERSION}; upgrade lplr-jax"
        )
    texts = {name: str(members.pop(name)) for name in _TEXT}
    try:
        config, provenance = json.loads(texts["config"]), json.loads(texts["provenance"])
        record = Record(texts["experiment"], members, config, provenance)
    except ValueError as error:
        raise RecordError(f"{path}: {error}") from error
    if record.checksum() != texts["checksum"]:
        raise RecordError(f"{path} was altered after it was written: its arrays do not match its checksum; run again")
    return record
