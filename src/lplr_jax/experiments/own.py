"""Runs and snapshots of a problem that a user's own file defines: what `lplr run` and `lplr measure` do."""

import ast
import importlib.util
import math
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated

import jax
import optax
import tyro

from lplr_jax import checks, plotting, theory
from lplr_jax.records import Record
from lplr_jax.reports import ending, output
from lplr_jax.reports.exit_codes import DIVERGED, INCONSISTENT, OK
from lplr_jax.reports.follow import FollowConfig, Following
from lplr_jax.reports.screen import CONSOLE, say
from lplr_jax.runs.loop import train
from lplr_jax.runs.problem import Probes, Problem
from lplr_jax.runs.snapshots import measure as measure_snapshots
from lplr_jax.training import rules
from lplr_jax.training.batches import Sampling

OPTIMIZERS = (
    "sgd",
    "noisy_sgd",
    "sign_sgd",
    "adam",
    "adamw",
    "nadam",
    "amsgrad",
    "radam",
    "adamax",
    "adagrad",
    "adadelta",
    "adafactor",
    "rmsprop",
    "lion",
    "lamb",
    "lars",
    "yogi",
)
"""Optimisers of optax that `lplr run` knows by name; others are for `lplr_jax.train`."""


def load_problem(place: str) -> Problem:
    """Execute a Python file and return the problem that it defines.

    Args:
        place: FILE.py:NAME, where NAME is a `Problem`, or a function without arguments that makes one.

    Raises:
        ValueError: if there is no such file or name, what it names is no problem, or the file fails as it is executed.
        OSError: if what the file reads cannot be read.
    """
    file, _, name = place.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise ValueError(f"name the problem as FILE.py:NAME, got {checks.shown(place)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}; name the problem as FILE.py:NAME")
    say(f"problem  {name} of {path}, which is executed")
    spec = importlib.util.spec_from_file_location(f"_lplr_problem_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses and pickles look for it
    sys.path.insert(0, str(path.resolve().parent))  # what lies beside the file can be imported, as by `python FILE`
    try:
        with _theirs(path):
            spec.loader.exec_module(module)
        if not hasattr(module, name):
            there = ", ".join(key for key, value in vars(module).items() if isinstance(value, Problem)) or "none"
            raise ValueError(f"{path} defines no {name}; problems there: {there}")
        found = getattr(module, name)
        if callable(found) and not isinstance(found, Problem):
            with _theirs(path):
                found = found()
    finally:
        with suppress(ValueError):  # the file may have put its own in its place
            sys.path.remove(str(path.resolve().parent))
    if not isinstance(found, Problem):
        raise ValueError(f"{name} of {path} must be an lplr_jax.Problem or make one, got {checks.shown(found)}")
    return found


@contextmanager
def _theirs(path: Path) -> Iterator[None]:
    """Tell an error of a user's file from one of ours, by the line of the file that it came from."""
    try:
        yield
    except SystemExit as error:
        raise ValueError(
            f"{path} ends the process as it is executed (exit code {error.code}); put what it runs as a program behind "
            'if __name__ == "__main__"'
        ) from error
    except OSError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if Path(frame.filename).resolve() == path.resolve()]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        where = str(path) if line is None else f"{path}, line {line}"
        raise ValueError(f"{where}: {type(error).__name__}: {error} (--debug shows where from)") from error


def make_optimizer(text: str) -> tuple[optax.GradientTransformation, float]:
    """Return an optimiser of optax, and its step size, from text such as "sgd:0.05" or "sgd:0.05,momentum=0.9".

    Raises:
        ValueError: for a name that optax does not have, or settings that it does not take.

    Example:
        >>> make_optimizer("adam:0.001,b1=0.8")[1]
        0.001
    """
    name, _, rest = text.partition(":")
    if name not in OPTIMIZERS:
        raise ValueError(f"--optimizer must begin with one of {', '.join(OPTIMIZERS)}, got {checks.shown(text)}")
    settings: dict[str, object] = {}
    for index, part in enumerate(filter(None, rest.split(","))):
        key, equals, value = part.partition("=")
        key, value = (key, value) if equals else ("learning_rate", key)
        if not equals and index:
            raise ValueError(f"--optimizer {text!r}: {part!r} wants a name, as in momentum=0.9")
        try:
            settings[key.strip()] = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError) as error:
            raise ValueError(f"--optimizer {text!r}: {value!r} is no number") from error
    rate = settings.get("learning_rate")
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not (rate > 0 and math.isfinite(rate)):
        raise ValueError(f"--optimizer {text!r} wants a step size > 0 after the name, as in sgd:0.05")
    try:
        made = getattr(optax, name)(**settings)
        with jax.numpy_dtype_promotion("standard"):  # optax's moments rely on it
            jax.eval_shape(lambda one: made.update(one, made.init(one), one), jax.ShapeDtypeStruct((2,), "float32"))
    except Exception as error:  # whatever a setting of another kind meets
        raise ValueError(f"--optimizer {text!r}: {error}") from error
    return made, float(rate)


def run(
    problem: Annotated[str, tyro.conf.Positional],
    /,
    optimizer: str = "sgd:0.1",
    step_rule: str | None = None,
    steps: int = 1000,
    batch_size: int | None = None,
    sampling: Sampling = "reshuffle",
    seed: int = 0,
    probe_every: int | None = None,
    hessian_probes: int = 9,
    search_steps: int = 6,
    certify_floor: float = 0.0,
    subset_size: int | None = None,
    kernel: str = "auto",
    out: Path | None = None,
    force: bool = False,
    log: Path | None = None,
    tensorboard: Path | None = None,
    verbose: bool = False,
) -> int:
    """Train a problem of your own: record, verdicts and figure, resumed bit for bit by the same command.

    The file that is named is executed.

    Args:
        problem: FILE.py:NAME, where NAME is an lplr_jax.Problem, or a function that makes one.
        optimizer: name of an optimiser of optax, its step size, and further settings: sgd:0.05,momentum=0.9.
        step_rule: rule of the step size in place of the optimiser: fixed:η, sharpness:κ, armijo:σ, polyak:κ, budget:R,
            loss-scaled or decay:α.
        steps: how many.
        batch_size: samples of a shuffled mini-batch [default: all data in every step].
        sampling: "reshuffle" for passes in which every sample comes once, "independent" for batches drawn anew,
            "partition" for steps that each draw one of the blocks of a partition.
        seed: of the order of mini-batches and of random subsets.
        probe_every: steps between kernel probes [default: a fortieth of the run].
        hessian_probes: probes, evenly spread, at which the Hessian's extremes are measured.
        search_steps: power iterations of the search for a lower estimate of L_Θ; 0 for none.
        certify_floor: seconds of two cores for a network of zero loss near the end and its certificate; 0 for none.
        subset_size: samples of a subset whose kernel is measured instead of that of all.
        kernel: implementation: auto, engine, neural-tangents, or neural-tangents:NAME.
        out: folder for record and figure [default: runs/NAME of the problem].
        force: start afresh; the run that is in the folder is kept aside under another name.
        log: file of JSON lines, one a chunk, a probe and a state of the verdicts.
        tensorboard: folder for TensorBoard's scalars.
        verbose: show summary and verdicts in full at the end.
    """
    kept = {"hessian": hessian_probes, "search": search_steps, "subset": subset_size, "kernel": kernel, "seed": seed}
    kept["certify_floor"] = certify_floor
    probes = Probes(probe_every, **kept)
    update, rate = make_optimizer(optimizer)
    said = {"optimizer": optimizer}
    if step_rule is not None:
        update, rate = rules.parse(step_rule), math.nan
        said = {"step_rule": update.text}
    what = load_problem(problem)
    folder = checks.folder("--out", out or Path("runs") / what.name)
    with Following(CONSOLE, FollowConfig(log, tensorboard)) as following, following(what.name, steps) as observer:
        record = train(
            what,
            update,
            steps=steps,
            batch_size=batch_size,
            sampling=sampling,
            seed=seed,
            probes=probes,
            out=folder,
            observer=observer,
            learning_rate=rate,
            config=said,
            force=force,
            say=say,
        )
        following.finished(what.name, theory.verify(record), diverged_at=record.diverged_at)
    return _show(record, folder, verbose=verbose)


def measure(
    snapshots: Annotated[tuple[str, ...], tyro.conf.Positional],
    /,
    problem: str,
    params: str | None = None,
    hessian_probes: int = 9,
    search_steps: int = 6,
    certify_floor: float = 0.0,
    subset_size: int | None = None,
    kernel: str = "auto",
    out: Path | None = None,
    force: bool = False,
    log: Path | None = None,
    verbose: bool = False,
) -> int:
    """Measure checkpoints of a run of your own; what lies between them was not seen, which the verdicts say.

    The file that defines the problem is executed; the checkpoints are read and never unpickled.

    Args:
        snapshots: a pattern such as 'ckpts/*', a folder, or files; the last integer in a name is its step.
        problem: FILE.py:NAME, where NAME is an lplr_jax.Problem, or a function that makes one.
        params: path of the parameters within what a checkpoint holds, such as state.params.
        hessian_probes: snapshots, evenly spread, at which the Hessian's extremes are measured.
        search_steps: power iterations of the search for a lower estimate of L_Θ; 0 for none.
        certify_floor: seconds of two cores for a network of zero loss near the end and its certificate; 0 for none.
        subset_size: samples of a subset whose kernel is measured instead of that of all.
        kernel: implementation: auto, engine, neural-tangents, or neural-tangents:NAME.
        out: folder for record and figure [default: runs/NAME of the problem].
        force: start afresh; what is in the folder is kept aside under another name.
        log: file of JSON lines, one a probe.
        verbose: show summary and verdicts in full at the end.
    """
    probes = Probes(
        hessian=hessian_probes, search=search_steps, subset=subset_size, kernel=kernel, certify_floor=certify_floor
    )
    what = load_problem(problem)
    folder = checks.folder("--out", out or Path("runs") / what.name)
    paths = snapshots[0] if len(snapshots) == 1 else list(snapshots)
    with Following(CONSOLE, FollowConfig(log)) as following, following(what.name, 0) as observer:
        settings = {"key": params, "probes": probes, "out": folder, "force": force}
        record = measure_snapshots(what, paths, **settings, observer=observer)
        following.finished(what.name, theory.verify(record), diverged_at=record.diverged_at)
    return _show(record, folder, verbose=verbose)


def _show(record: Record, folder: Path, *, verbose: bool) -> int:
    say(f"record   {folder / 'record.npz'}")
    diverged_at_once = record.diverged_at == 0
    figure = "the run diverged at step 0" if diverged_at_once else plotting.plot(record)
    output.draw(figure, folder / f"{record.experiment}.png")
    verdicts = theory.verify(record)
    ending.show(CONSOLE, {"": verdicts}, {"": record}, verbose=verbose)
    if theory.any_inconsistent(verdicts):
        return INCONSISTENT
    return OK if record.diverged_at is None else DIVERGED
