"""The run folder: one writer at a time, one config for good, the old one kept aside when a new one starts."""

import contextlib
import itertools
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lplr_jax import archives, records
from lplr_jax.files import atomic_write, sync_directory, target_of
from lplr_jax.records import Record
from lplr_jax.runs.checkpoint import Checkpoints, Identity
from lplr_jax.runs.environment import unusual_settings
from lplr_jax.runs.errors import ConfigMismatchError, DirectoryInUseError
from lplr_jax.runs.lock import LOCK, Lock, shared

__all__ = [
    "CHECKPOINTS",
    "CONFIG",
    "LOCK",
    "ConfigMismatchError",
    "DirectoryInUseError",
    "Lock",
    "check_config",
    "claimed",
    "differences",
    "identity_of",
    "joined",
    "read_config",
    "read_or_make",
    "write_config",
]

CONFIG = "config.json"
CHECKPOINTS = "checkpoint"
_ABSENT = "absent"
_CONFIG_BYTES = 2**20
_CLAIMED: list[Lock] = []
"""The locks of the folders that this process holds at the moment."""


@contextmanager
def claimed(
    folder: Path,
    experiment: str,
    config: Mapping[str, Any],
    *,
    force: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Iterator[Lock]:
    """Hold a run folder for the run of one config while the body writes to it.

    Args:
        folder: the directory; made where it is missing.
        experiment: what runs in it.
        config: everything that decides its numbers.
        force: start afresh; what is there is kept aside under another name.
        say: told where the old one went.

    Yields:
        The lock, whose `check` tells whether the directory is still there.

    Raises:
        DirectoryInUseError: if another process writes to it.
        ConfigMismatchError: if it holds a run of another config, and `force` is off.
        OSError: if it cannot be written to.
    """
    if not force and folder.exists():
        check_config(folder, experiment, config)  # before anything is written, a lock file included
    lock = Lock(folder, say=say)
    lock.acquire()
    made, wrote = lock.made_folder, False
    _CLAIMED.append(lock)
    try:
        if force and _holds_a_run(folder):
            _set_aside(folder, lock, say)
        check_config(folder, experiment, config)
        _remove_temporaries(folder, experiment)
        wrote = write_config(folder, experiment, config)
        yield lock
    finally:
        _CLAIMED.remove(lock)
        if wrote:
            _forget_if_bare(folder, lock)
        lock.release()
        if made:
            with contextlib.suppress(OSError):  # it holds something, another process came, or it is gone
                folder.rmdir()


@contextmanager
def joined(folder: Path, experiment: str, config: Mapping[str, Any]) -> Iterator[None]:
    """Share the folder of a sweep with its other arms, while the body writes one arm.

    Raises:
        DirectoryInUseError: if the sweep runs as a whole.
        ConfigMismatchError: if it holds a run of another config.
        OSError: if it cannot be written to.
    """
    check_config(folder, experiment, config)
    folder.mkdir(parents=True, exist_ok=True)
    with shared(folder):
        check_config(folder, experiment, config)
        write_config(folder, experiment, config)
        yield


def _forget_if_bare(folder: Path, lock: Lock) -> None:
    """Remove the config of a run that failed at its start, where nothing else is in its folder."""
    with contextlib.suppress(OSError):
        lock.check()
        if {path.name for path in folder.iterdir()} <= {CONFIG, LOCK}:
            (folder / CONFIG).unlink(missing_ok=True)


def _holds_a_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CONFIG, "record.npz", CHECKPOINTS, "predictions.json"))


def _set_aside(folder: Path, lock: Lock, say: Callable[[str], None]) -> None:
    """Rename the folder, say so, and lock a new one in its place."""
    here = Path.cwd()
    if here.is_relative_to(folder.resolve()):
        raise ValueError(f"--force would rename {folder}, in which this process works; name another folder with --out")
    aside = _free_name(folder, "old")
    folder.rename(aside)
    sync_directory(aside.parent)
    say(f"kept     {aside}, the run that was there")
    lock.move(aside)
    lock.release()
    lock.move(folder)
    lock.acquire()


def _remove_temporaries(folder: Path, experiment: str) -> None:
    """Remove what this package's writers left half-written in a run folder when they were killed.

    The lock is ours, so nobody writes them now. Only names that the writers make, and only where they make them: what
    else lies in the folder, and every folder in it that is not the run's own, is left alone.
    """
    results = rf"(config|predictions|boundary)\.json|record\.npz|{re.escape(experiment)}\.(md|csv|tex|png|pdf)"
    for place, targets in (
        (folder, results),
        (folder / "figures", results),
        (folder / "probes", r"epoch_\d+\.npz"),
        (folder / CHECKPOINTS, r"epoch_\d{8,}|boundary\.json"),
        (folder / CHECKPOINTS / "memory", r"epoch_\d{8,}\.npz"),
    ):
        if place.is_symlink() or not place.is_dir():
            continue
        for path in place.iterdir():
            target = target_of(path.name)
            if target is None or path.is_symlink() or not re.fullmatch(targets, target):
                continue
            if path.is_file():
                path.unlink()
            elif place.name == CHECKPOINTS and path.is_dir():
                shutil.rmtree(path)


def read_config(folder: Path) -> tuple[str, dict[str, Any]] | None:
    """Return experiment and config of the run in a folder, None where there is none.

    Raises:
        ValueError: if they cannot be read.
    """
    path = folder / CONFIG
    try:
        if os.path.lexists(path):
            return _checked_config(archives.read_json(path, most_bytes=_CONFIG_BYTES))
    except ValueError as error:
        # The process that made it may have removed it since, as its run failed at the start.
        if os.path.lexists(path):
            raise ValueError(
                f"{path} is damaged ({error}); start afresh with --force, which keeps the folder aside"
            ) from error
    if (folder / "record.npz").exists():
        try:
            record = records.load(folder)
        except records.RecordError:
            if (folder / "record.npz").exists():
                raise
            return None
        settings = record.provenance.get("settings")
        return record.experiment, {**record.config, **unusual_settings(settings if isinstance(settings, dict) else {})}
    return None


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the settings of JAX that decide random numbers, where they are not as by default."""
    return {**config, **unusual_settings()}


def identity_of(experiment: str, config: Mapping[str, Any]) -> Identity:
    """Return whose checkpoints those of a run are, in this process."""
    return Identity.of(experiment, _deciding(config))


def _checked_config(content: Any) -> tuple[str, dict[str, Any]]:
    match content:
        case {"experiment": str(experiment), "config": dict(config)}:
            return experiment, config
    raise ValueError("it names no experiment, or no config")


def write_config(folder: Path, experiment: str, config: Mapping[str, Any]) -> bool:
    """Say in the folder whose run it holds, and return True, unless it says so already."""
    path = folder / CONFIG
    if path.exists():
        return False
    content = {"experiment": experiment, "config": _deciding(config)}
    text = json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    with atomic_write(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return True


def check_config(folder: Path, experiment: str, config: Mapping[str, Any]) -> None:
    """Check that a directory holds no run, or one of this config.

    Raises:
        ConfigMismatchError: with the fields that differ.
    """
    found = read_config(folder)
    if found is None:
        return
    name, there = found
    differing = differences(there, _deciding(config))
    if name != experiment:
        differing = (f"experiment {name} there, {experiment} asked for",)
    if differing:
        raise ConfigMismatchError(
            f"{folder} holds the run of another config: {'; '.join(differing)}. Name another folder with --out "
            "(make: OUT=...), or start afresh with --force (make: ARGS=--force), which keeps the old one aside"
        )


def differences(there: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return in words the fields in which a config that was written differs from the one that is asked for."""
    asked = json.loads(json.dumps(dict(config)))
    fields = [field for field in {**asked, **there} if there.get(field, _ABSENT) != asked.get(field, _ABSENT)]
    return tuple(
        f"{field} {there.get(field, _ABSENT)} there, {asked.get(field, _ABSENT)} asked for" for field in fields
    )


def _load_or_set_aside(path: Path, say: Callable[[str], None]) -> Record | None:
    """Read a record; one that cannot be read is kept aside, and None says that it must be made again."""
    try:
        return records.load(path)
    except records.RecordError as error:
        aside = _free_name(path, "damaged")
        path.rename(aside)
        say(f"record   {path} is damaged and is made again; it is kept as {aside} ({error})")
        return None


def _free_name(path: Path, what: str) -> Path:
    """Return the first name of the kind PATH.what-1 that is not taken."""
    return next(
        name for number in itertools.count(1) if not (name := path.with_name(f"{path.name}.{what}-{number}")).exists()
    )


def read_or_make(
    folder: Path,
    experiment: str,
    config: Mapping[str, Any],
    make: Callable[[Checkpoints], Record],
    *,
    check: Callable[[], None] = lambda: None,
    say: Callable[[str], None] = lambda line: None,
) -> Record:
    """Return the record of a run: the one that is there, or a new one, gone on with where it was interrupted.

    A folder that the caller has not claimed, as that of an arm of a sweep, is locked while this goes on.

    Args:
        folder: the run folder; its record is FOLDER/record.npz.
        experiment: what runs in it.
        config: everything that decides the numbers, as the record keeps it.
        make: makes the record, with checkpoints to save to and to go on from.
        check: called before every write; raises where nothing must be written any more.
        say: told that the record is there.

    Raises:
        DirectoryInUseError: if another process writes to the folder.
        ConfigMismatchError: if it holds a run of another config.
        OSError: if something cannot be written or read.
    """
    check_config(folder, experiment, config)
    with _locked(folder, check, say) as checked:
        return _read_or_make(folder, experiment, config, make, check=checked, say=say)


@contextmanager
def _locked(folder: Path, check: Callable[[], None], say: Callable[[str], None]) -> Iterator[Callable[[], None]]:
    """Hold a folder, unless this process does so already; yield the check to be made before every write."""
    held = {lock.folder.absolute() for lock in _CLAIMED}
    if folder.absolute() in held:
        yield check
        return
    lock = Lock(folder, under_ours=folder.absolute().parent in held, say=say)
    check()
    lock.acquire()

    def both() -> None:
        check()
        lock.check()

    try:
        yield both
    finally:
        lock.release()


def _read_or_make(
    folder: Path,
    experiment: str,
    config: Mapping[str, Any],
    make: Callable[[Checkpoints], Record],
    *,
    check: Callable[[], None],
    say: Callable[[str], None],
) -> Record:
    check_config(folder, experiment, config)
    _remove_temporaries(folder, experiment)
    path = folder / "record.npz"
    checkpoints = Checkpoints(folder / CHECKPOINTS, check=check, identity=identity_of(experiment, config))
    record = _load_or_set_aside(path, say) if path.exists() else None
    if record is not None:
        say(f"record   {path} is there, made with this config; --force makes it anew")
        checkpoints.clear()
        return record
    check()
    write_config(folder, experiment, config)
    record = make(checkpoints)
    check()
    record.save(path)
    checkpoints.clear()
    return record
