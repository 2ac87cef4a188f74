"""A folder of checkpoints becomes a record: parameters by step, from npz, orbax or safetensors, never unpickled."""

import glob
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lplr_jax import archives, checks
from lplr_jax.parameters import split
from lplr_jax.records import Record
from lplr_jax.runs.problem import Probes, Problem
from lplr_jax.runs.session import Observer
from lplr_jax.runs.watch import Watch
from lplr_jax.types import Params

MOST_BYTES = 2**36
"""Bytes that one snapshot may unpack to."""


def measure(
    problem: Problem,
    snapshots: Mapping[int, Params] | str | Path | Sequence[str | Path],
    *,
    key: str | None = None,
    probes: Probes = Probes(),  # noqa: B008  # a frozen value
    out: str | Path | None = None,
    force: bool = False,
    observer: Observer | None = None,
) -> Record:
    """Measure parameters that were saved along a run, and record them.

    Where a step and the one after it are both among the snapshots the update is measured; the steps between others were
    not seen, which the verdicts say.

    Args:
        problem: what was trained; its parameters are θ_0, and the snapshots have their structure.
        snapshots: parameters by step; or files: a pattern such as "ckpts/*", a folder, or paths. The step is the last
            integer in the name. A file is an npz or a safetensors file whose arrays are named by their paths in the
            tree, a folder one that orbax wrote. Nothing is ever unpickled.
        key: path of the parameters within what a file holds, such as "params" or "state.params".
        probes: what is measured, and at which of the steps: at all of them, unless it says otherwise.
        out: folder for the record.
        force: start afresh; what is in the folder is kept aside under another name.
        observer: told of every probe.

    Raises:
        ValueError: if there is no snapshot, two are of one step, or one does not fit the problem.
        OSError: if one cannot be read.

    Example:
        >>> import jax.numpy as jnp
        >>> problem = Problem(lambda w, x: x @ w, jnp.zeros((2, 1)), jnp.eye(2), jnp.ones((2, 1)))
        >>> record = measure(problem, {0: problem.params, 10: jnp.full((2, 1), 0.5)}, probes=Probes(search=0))
        >>> record["epoch"].tolist(), record["loss"].tolist()
        ([0, 10], [0.5, 0.125])
    """
    checks.instance("problem", problem, Problem, "as lplr_jax.Problem makes one")
    if isinstance(snapshots, Mapping):
        for step in snapshots:
            checks.whole("step", step, least=0)
        # A module may well be callable itself.
        ordered = [(int(step), lambda params=params: params) for step, params in sorted(snapshots.items())]
    else:
        ordered = list(_from_files(problem.params, snapshots, key))
    if not ordered:
        raise ValueError("there is no snapshot to measure: name files, or give parameters by step")
    steps = [step for step, _ in ordered]
    wanted = replace(probes, at=steps) if probes.every is None and probes.at is None else probes
    with Watch(problem, probes=wanted, out=out, force=force, observer=observer, last=steps[-1]) as watching:
        for step, params in ordered:
            watching(step, params())
    return watching.record


def _from_files(like: Params, paths: str | Path | Sequence[str | Path], key: str | None) -> Iterator[tuple[int, Any]]:
    """Yield steps in order, each with a function that reads its parameters."""
    found = _paths(paths)
    by_step: dict[int, Path] = {}
    for path in found:
        step = step_of(path)
        if step in by_step:
            raise ValueError(f"{by_step[step]} and {path} are both of step {step}; name one of them")
        by_step[step] = path
    for step in sorted(by_step):
        yield step, lambda path=by_step[step]: read(path, like, key=key)


def _paths(paths: str | Path | Sequence[str | Path]) -> list[Path]:
    if isinstance(paths, str | Path):
        text = str(paths)
        if Path(text).is_dir() and not _is_orbax(Path(text)):
            inside = [path for path in Path(text).iterdir() if re.search(r"\d", path.name) and path.name[0] != "."]
            found = [path for path in inside if path.is_dir() or path.suffix in (".npz", ".safetensors")]
        else:
            found = [Path(path) for path in glob.glob(text)]  # noqa: PTH207  # a pattern with folders in it
        if not found:
            raise ValueError(f"no snapshot is named {text}; a name holds its step, as in epoch_000100.npz or 100/")
        return found
    return [checks.path("snapshots", path) for path in paths]


def step_of(path: Path) -> int:
    """Return the step that a snapshot's name says: the last integer in it.

    Raises:
        ValueError: if there is none.

    Example:
        >>> step_of(Path("run7/epoch_000100.npz"))
        100
    """
    numbers = re.findall(r"\d+", path.name.removesuffix(path.suffix) if path.suffix in _READERS else path.name)
    if not numbers:
        raise ValueError(f"{path} has no integer in its name, which would be its step; rename it")
    return int(numbers[-1])


def _is_orbax(path: Path) -> bool:
    return any((path / name).exists() for name in ("_METADATA", "_CHECKPOINT_METADATA", "manifest.ocdbt", "default"))


def read(path: Path, like: Params, *, key: str | None = None) -> Params:
    """Return the parameters that a snapshot holds.

    Args:
        path: an npz or safetensors file, or a folder that orbax wrote.
        like: a tree of their structure, shapes and types.
        key: path of the parameters within what the file holds.

    Raises:
        ValueError: if it is no such file, or its arrays do not fit.
        OSError: if it cannot be read.
        ImportError: if the package that reads it is not installed.
    """
    reader = _read_orbax if path.is_dir() else _READERS.get(path.suffix)
    if reader is None:
        raise ValueError(
            f"{path} is no snapshot that is read here: .npz, .safetensors, or a folder of orbax. Pickles (.pkl, .pt, "
            ".msgpack) are not: what they hold would be run"
        )
    arrays = {_plain(name): array for name, array in reader(path).items()}
    prefix = f"{_plain(key)}." if key else ""
    if prefix:
        arrays = {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}
        if not arrays:
            raise ValueError(f"{path} holds nothing under {key!r}")
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    # What is carried along, such as a function, may be in no file, and stays as it is.
    trains = [one.is_theta for one in split(like).leaves]
    found = zip(leaves, trains, strict=True)
    return jax.tree.unflatten(structure, [_leaf(path, arrays, *one) if theta else one[1] for one, theta in found])


def _leaf(path: Path, arrays: Mapping[str, np.ndarray], at: Any, leaf: Any) -> Any:
    name = _plain(jax.tree_util.keystr(at)) or next(iter(arrays), "")
    if name not in arrays:
        there = ", ".join(sorted(arrays)[:8]) + (", ..." if len(arrays) > 8 else "")
        raise ValueError(f"{path} lacks {name!r}, which the problem's parameters have; it holds {there or 'nothing'}")
    array, want = arrays[name], np.dtype(getattr(leaf, "dtype", type(leaf)))
    if array.dtype.kind == "V" and array.dtype.itemsize == want.itemsize:
        array = array.view(want)  # npz knows no bfloat16
    if array.shape != np.shape(leaf) or array.dtype != want:
        raise ValueError(
            f"{path}: {name} is {array.dtype} of shape {array.shape} where the problem has {want} of {np.shape(leaf)}"
        )
    return array


def _plain(name: str) -> str:
    """Return a path in a tree in one spelling, whatever separators it was written with."""
    return ".".join(re.findall(r"[^\[\]'\"./\s]+", name))


def _read_npz(path: Path) -> Mapping[str, np.ndarray]:
    try:
        return archives.read_npz(path, most_bytes=MOST_BYTES, admit=lambda headers: None)
    except archives.ArchiveError as error:
        raise ValueError(f"{path} is no readable npz of arrays ({error}); pickled objects are not read") from error


def _read_safetensors(path: Path) -> Mapping[str, np.ndarray]:
    try:
        from safetensors.numpy import load_file  # pyright: ignore[reportMissingImports] # an extra
    except ImportError as error:
        raise ImportError(
            f"{path} wants the package safetensors, which is not installed: pip install safetensors "
            "(or lplr-jax[safetensors])"
        ) from error
    try:
        return load_file(path)
    except Exception as error:  # its own kind, a subclass of nothing useful
        raise ValueError(f"{path} is no readable safetensors file ({error})") from error


def _read_orbax(path: Path) -> Mapping[str, np.ndarray]:
    try:
        import orbax.checkpoint as ocp  # pyright: ignore[reportMissingImports] # an extra
    except ImportError as error:
        raise ImportError(
            f"{path} wants the package orbax-checkpoint, which is not installed: pip install orbax-checkpoint "
            "(or lplr-jax[orbax])"
        ) from error
    inner = path / "default" if (path / "default").is_dir() else path
    try:
        with warnings.catch_warnings(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            warnings.simplefilter("ignore")  # of shardings, which are not asked for: everything goes to the host
            tree = checkpointer.restore(inner.absolute())
    except Exception as error:
        raise ValueError(f"{path} is no checkpoint that orbax can read ({str(error).splitlines()[0]})") from error
    named = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(at): np.asarray(leaf) for at, leaf in named}


_READERS = {".npz": _read_npz, ".safetensors": _read_safetensors}
