"""λ_min of one kernel by several processes: rows of Θ on all devices, its certificate on one host."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from lplr_jax import checks, linalg, programs
from lplr_jax.diagnostics.kernel import by_counting, certified_from_blocks
from lplr_jax.ntk import engine, parts
from lplr_jax.ntk.empirical import Point, check_settings, point, precision_scope, without_gradient
from lplr_jax.ntk.memory import budget
from lplr_jax.parameters import Trainable
from lplr_jax.types import ApplyFn, Params


class ProcessLostError(RuntimeError):
    """Another process of the job is gone, or failed; nothing was concluded."""


def distributed_ntk_min_eig(
    apply_fn: ApplyFn,
    params: Params,
    x: Any,
    folder: str | os.PathLike[str],
    *,
    memory_budget: int | None = None,
    trainable: Trainable = None,
    keep: bool = False,
) -> linalg.MinEig:
    """Compute λ_min of the full (n c, n c) empirical kernel by all processes of a job, in float64.

    Every process calls it with the same arguments, after `jax.distributed.initialize`. The devices of all of them share
    the rows of Θ, 8 (n c)² bytes over their number for each; every process writes its own to disk, 4 (n c)² bytes
    together, and process 0 reads them as it factorises, in 4 (n c)² bytes of its host's memory. No process holds Θ.

    A process that dies ends the others by JAX's heartbeats, after 100 s unless `jax.distributed.initialize` was given
    another `heartbeat_timeout_seconds`. Alone in its job, a process does all of it by itself.

    Args:
        apply_fn: as for `empirical_ntk_min_eig`.
        params: as for `empirical_ntk_min_eig`, the same in every process.
        x: inputs with leading axis n, the same in every process.
        folder: where the rows go; all processes must see it.
        memory_budget: bytes for the assembly on each device; None takes what suits the smallest.
        trainable: as for `ntk.empirical_ntk`.
        keep: whether the rows stay on disk.

    Returns:
        What `empirical_ntk_min_eig(..., storage="packed")` returns, in every process.

    Raises:
        ProcessLostError: if another process failed or is gone.
        ValueError: as for `empirical_ntk_min_eig`, for arguments that differ between processes, and for a folder that
            is not one for all.
        OSError: if rows cannot be written, or are not read as they were written.
    """
    check_settings(apply_fn, memory_budget=memory_budget)
    place = checks.folder("folder", folder)
    with precision_scope("float64"):
        at = point(apply_fn, params, x, dtype="float64", trainable=trainable)
        if trainable is None:
            without_gradient(at)
        samples, me = jax.tree.leaves(at.x)[0].shape[0], jax.process_index()
        rows = samples * at.traced.c
        checks.whole("rows of the kernel, n c,", rows, most=linalg.MAX_ROWS)
        if rows > at.params.size:
            return by_counting(rows, at.params.size)
        with _together():
            job, most = _agree(at, memory_budget)
        places = parts.Places(place, job, jax.process_count())
        with _together():
            _meet(places, me)
        try:
            mesh = Mesh(np.asarray(jax.devices()), ("rows",))
            with _together():
                strips = engine.strips(at.traced, at.params, at.x, mesh=mesh, memory_budget=most)
                parts.write(places, me, strips)
            if me == 0:
                found = _certify(apply_fn, at, x, places, rows)
                parts.say(places.result(), asdict(found))
                return found
        except BaseException as error:
            told = places.result() if me == 0 else places.manifest(me)
            parts.say(told, {"failed": f"{type(error).__name__}: {error}"})
            raise
        finally:
            if me == 0 and not keep:
                parts.remove(places)
        told = parts.hear(places.result())
    if "failed" in told:
        if not keep:  # process 0 may have been gone before these rows were there
            parts.remove(places)
        raise ProcessLostError(f"process 0 failed: {told['failed']}")
    return linalg.MinEig(**{**told, "assumptions": tuple(told["assumptions"])})


def _certify(apply_fn: ApplyFn, at: Point, x: Any, places: parts.Places, rows: int) -> linalg.MinEig:
    """Enclose λ_min from what all processes wrote."""
    try:
        written = parts.gather(places, rows)
    except RuntimeError as error:
        raise ProcessLostError(str(error)) from error
    return certified_from_blocks(apply_fn, at, x, linalg.Blocks(rows, parts.blocks(places, written)))


def _agree(at: Point, memory_budget: int | None) -> tuple[str, int]:
    """Return a number of this job and a budget, the same in every process.

    Raises:
        ValueError: if the processes were given different arguments.
    """
    arrays = [*at.params.arrays, *jax.tree.leaves(at.x), *at.traced.consts]
    told = repr([programs.digest(array) for array in arrays]).encode()
    mine = hashlib.blake2b(told, digest_size=4).digest()
    mine = np.frombuffer(mine + os.urandom(4), np.uint32)
    # Halves, as arrays of 64 bits need the wider scope that another process may not be in.
    most = np.array([*mine, *divmod(budget(memory_budget), 2**31)], np.uint32)
    every = np.asarray(multihost_utils.process_allgather(most)).reshape(jax.process_count(), 4).astype(np.int64)
    odd = [process for process, one in enumerate(every) if one[0] != every[0, 0]]
    if odd:
        raise ValueError(
            f"parameters, inputs or captured arrays of process {odd[0]} are not those of process 0; all processes must "
            "be given the same"
        )
    return f"{every[0, 1]:08x}", int((every[:, 2] * 2**31 + every[:, 3]).min())


def _meet(places: parts.Places, me: int) -> None:
    """Have every process write to the folder, and see what the others wrote, before anything is computed.

    A process that cannot write could not say later that it failed either, and the others would wait for it.
    """
    try:
        try:
            parts.say(places.here(me), {})
            failed = None
        except OSError as error:
            failed = error
        mute = np.flatnonzero(_of_all(failed is not None))
        if failed is not None:
            raise failed
        if mute.size:
            raise ProcessLostError(f"process {mute[0]} cannot write to {places.folder}; its own output says why")
        blind = np.flatnonzero(_of_all(bool(parts.unseen(places))))
        if blind.size:
            raise ValueError(
                f"process {blind[0]} does not see in {places.folder} what the others write there; it must be one "
                "folder for all processes"
            )
    finally:
        with suppress(OSError):
            places.here(me).unlink()


def _of_all(flag: bool) -> np.ndarray:
    """Return the flags of all processes, in order, in every process."""
    return np.asarray(multihost_utils.process_allgather(np.array([flag], np.uint32))).reshape(-1)


@contextmanager
def _together() -> Iterator[None]:
    """Say of what fails as processes talk to each other what it means."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        first = str(error).splitlines()[0]
        raise ProcessLostError(
            f"another of the {jax.process_count()} processes is gone, so this one ends too ({first}); its own output "
            "says why; start all of them again"
        ) from error
