"""What an experiment is, and the one command that all of them share."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, Protocol, TypeVar, runtime_checkable

import jax
import tyro
from matplotlib.figure import Figure

from lplr_jax import checks, theory
from lplr_jax.experiments import sweep
from lplr_jax.experiments.parts import FolderPart, decisive
from lplr_jax.records import Record
from lplr_jax.reports import ending, output, page
from lplr_jax.reports.exit_codes import DIVERGED, INCONSISTENT, OK
from lplr_jax.reports.follow import SCREEN_ALONE, FollowConfig, Following
from lplr_jax.reports.screen import CONSOLE, say
from lplr_jax.reports.tables import Table
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.runs.folder import claimed, joined, read_or_make
from lplr_jax.runs.loop import Advance
from lplr_jax.runs.session import Follow, Observer, Say

Config = TypeVar("Config", bound=FolderPart)
Given = TypeVar("Given")
Done = TypeVar("Done")
_Config = TypeVar("_Config", bound=FolderPart, contravariant=True)
_Given = TypeVar("_Given", contravariant=True)
_Done = TypeVar("_Done", covariant=True)


@runtime_checkable
class Run(Protocol[_Config, _Given, _Done]):
    """Runs a config in a folder that is locked for it; what is there already is read instead."""

    def __call__(
        self, config: _Config, folder: Path, given: _Given, /, *, say: Say, follow: Follow, check: Callable[[], None]
    ) -> _Done:
        """Run.

        Args:
            config: what to run; `out` and `force` are for the caller.
            folder: where everything goes.
            given: what was prepared for the config.
            say: told one line at a time what is done.
            follow: from name and number of epochs to a context with an observer for one run.
            check: called before every write; raises where nothing must be written any more.
        """
        ...


@dataclass(frozen=True)
class Experiment(Generic[Config, Given, Done]):
    """A config with presets, and what is made of it.

    Attributes:
        name: the command, and the name of its folder, table and figure.
        config: the class of its config.
        presets: named sets of defaults; "default" is among them, unless `default_preset` names what it stands for.
        run: runs a config.
        records: the records of what was run, by the name of the run.
        table: the table of what was run, if there is one.
        figure: the figure of what was run, or why there is none, in words.
        notes: lines to say at the end.
        prepare: loads what `identity` and `run` share; raises ValueError before anything is written.
        identity: everything that decides the numbers; raises ValueError for a config that cannot be run.
        default_preset: the preset that "default" stands for on this machine.
        followed: whether there is a run to follow, in a log or in TensorBoard.
        first_told: whether the story of the first of several records is told.
        diverged: exit code where a run diverged; 0 where that is a finding.
        arms: the names of the arms of a config that is a `sweep.ArmsPart`, in order; they are those of their folders.
    """

    name: str
    config: type[Config]
    presets: Mapping[str, Config]
    run: Run[Config, Given, Done]
    records: Callable[[Done], Mapping[str, Record]]
    table: Callable[[Done, Config], Table] | None = None
    figure: Callable[[Done, Config], Figure | str] | None = None
    notes: Callable[[Done, Config], Sequence[str]] = lambda done, config: ()
    prepare: Callable[[Config, Path], Given] = lambda config, folder: None  # pyright: ignore[reportAssignmentType]
    identity: Callable[[Config, Given], Mapping[str, Any]] = lambda config, given: decisive(config)
    default_preset: Callable[[], str] = lambda: "default"
    followed: bool = True
    first_told: bool = False
    diverged: int = DIVERGED
    arms: Callable[[Config], Sequence[str]] | None = None

    def preset(self, name: str) -> Config:
        """Return a set of defaults; for a name that there is not, that of "default"."""
        return self.presets.get(name) or self.presets[self.default_preset()]

    def places(self, preset: str, out: Path | None) -> tuple[Path, Path]:
        """Return the folder of a run and that of its figures; two presets never share one by default."""
        # "default" and the preset that it stands for share a folder.
        default = preset in ("default", self.default_preset())
        folder = out or Path("runs") / (self.name if default else f"{self.name}-{preset}")
        figures = Path("figures") if default and out is None else folder / "figures"
        return checks.folder("--out", folder), checks.folder("the folder of the figures", figures)

    def execute(self, config: Config, *, preset: str, following: Following, argv: Sequence[str] = ()) -> int:
        """Run a config, show and save what came of it, and return the exit code; `argv` is for processes of arms."""
        folder, figures = self.places(preset, config.out)
        if self.arms is not None and isinstance(config, sweep.ArmsPart):
            config.check()
            names = list(self.arms(config))
            if config.list_arms:
                say(json.dumps(names))
                return OK
            if config.arm is not None:
                return self._one_arm(replace(config, arm=sweep.resolve(config.arm, names)), folder, following)
            if config.elsewhere:
                config.check_jobs()
                given = self.prepare(config, folder)
                prepared = replace(config, arm=sweep.NONE)
                with claimed(folder, self.name, self.identity(config, given), force=config.force, say=say) as lock:
                    self.run(prepared, folder, given, say=say, follow=following, check=lock.check)
                if code := config.run_arms(argv, names, folder, say=say):
                    return code
                config = replace(config, force=False)
        given = self.prepare(config, folder)
        identity = self.identity(config, given)
        with claimed(folder, self.name, identity, force=config.force, say=say) as lock:
            done = self.run(config, folder, given, say=say, follow=following, check=lock.check)
            if self.table is not None:
                output.tabulate(self.table(done, config), folder / self.name)
        found = self.records(done)
        drawn = None if self.figure is None else self.figure(done, config)
        if drawn is not None:
            output.draw(drawn, figures / f"{self.name}.png")
        verdicts = {name: theory.verify(record) for name, record in found.items()}
        if found:
            say(f"report   {page.write(page.page(found, verdicts, drawn), folder / page.NAME)}")
            ending.show(CONSOLE, verdicts, found, verbose=following.verbose, first=self.first_told)
        for line in self.notes(done, config):
            say(line)
        return self._ended(found, verdicts, following)

    def _one_arm(self, config: Config, folder: Path, following: Following) -> int:
        """Run one arm in the sweep's folder, beside others that do so; table and figure come with the whole sweep."""
        if config.force:
            raise ValueError("--force sets the whole sweep aside, other arms included; leave it out with --arm")
        given = self.prepare(config, folder)
        with joined(folder, self.name, self.identity(config, given)):
            done = self.run(config, folder, given, say=say, follow=following, check=lambda: None)
        found = self.records(done)
        verdicts = {name: theory.verify(record) for name, record in found.items()}
        if found:
            ending.show(CONSOLE, verdicts, found, verbose=following.verbose, first=False)
        return self._ended(found, verdicts, following)

    def _ended(self, found: Mapping[str, Record], verdicts: Mapping[str, theory.Verdicts], following: Following) -> int:
        """Tell who follows that these runs have ended, and return the exit code."""
        for name, record in found.items():
            following.finished(name, verdicts[name], diverged_at=record.diverged_at)
        if any(map(theory.any_inconsistent, verdicts.values())):
            return INCONSISTENT
        return self.diverged if any(record.diverged_at is not None for record in found.values()) else OK

    def command(self, argv: Sequence[str], help_: str) -> Callable[..., int]:
        """Return the command for a parser: preset, config, and where else the run shows itself.

        Args:
            argv: the command line, whose preset decides the defaults that the parser shows.
            help_: what the experiment is for, in one line.
        """
        names = ("smoke", "default", *(name for name in self.presets if name not in ("smoke", "default")))
        choice = Literal[tuple(name for name in names if name == "default" or name in self.presets)]
        flat = tyro.conf.arg(name="")
        config_of, also_of = Annotated[self.config, flat], Annotated[FollowConfig, flat]
        chosen = self.preset(asked_preset(argv))

        # The annotations are what the parser reads: values of this experiment, of which a type checker knows nothing.
        def followed(preset: choice = "default", config: config_of = chosen, also: also_of = SCREEN_ALONE) -> int:  # pyright: ignore
            with Following(CONSOLE, also) as following:
                return self.execute(config, preset=preset, following=following, argv=argv)

        def alone(preset: choice = "default", config: config_of = chosen) -> int:  # pyright: ignore
            return followed(preset, config)

        found, stands_for = followed if self.followed else alone, self.default_preset()
        meaning = "" if stands_for == "default" else f'; "default" is "{stands_for}" on this machine'
        found.__doc__ = (
            f"{help_}\n\nArgs:\n"
            f"    preset: which defaults the other options start from{meaning}.\n"
            "    config: everything that decides the numbers.\n"
            "    also: where else than on screen the run shows itself.\n"
        )
        return found


def asked_preset(argv: Sequence[str]) -> str:
    """Find the preset before parsing: it decides the defaults that the parser shows."""
    for i, argument in enumerate(argv):
        if argument == "--preset" and i + 1 < len(argv):
            return argv[i + 1]
        if argument.startswith("--preset="):
            return argument.partition("=")[2]
    return "default"


def record_of(
    folder: Path,
    experiment: str,
    identity: Mapping[str, Any],
    make: Callable[[Observer | None, Checkpoints], Record],
    *,
    run: str,
    epochs: int,
    say: Say,
    follow: Follow,
    check: Callable[[], None],
) -> Record:
    """Return the record of one run: the one that is there, or a new one, which is followed while it is made.

    Args:
        folder: of the run.
        experiment: what runs in it.
        identity: everything that decides the numbers.
        make: makes the record; told who follows, and what it saves to and goes on from.
        run: its name, unlike that of the command's other runs.
        epochs: how long it is.
        say: told that the record is there.
        follow: from name and number of epochs to a context with an observer.
        check: called before every write.
    """

    def followed(checkpoints: Checkpoints) -> Record:
        with follow(run, epochs) as observer:
            return make(observer, checkpoints)

    return read_or_make(folder, experiment, identity, followed, check=check, say=say)


def trained_together(
    folder: Path, names: Sequence[str], train: Callable[[], Sequence[Advance]], together: bool | None
) -> Sequence[Advance | None]:
    """Train several runs in one program, and return for each what replays its part; None for runs that train alone.

    Args:
        folder: of the folders of the runs; nothing is trained where the record of every run is there.
        names: of the folders.
        train: trains all of them, those included whose record is there.
        together: whether to; None does so on accelerators (on a CPU vmap is slower).
    """
    together = jax.default_backend() != "cpu" if together is None else together
    missing = [name for name in names if not (folder / name / "record.npz").exists()]
    return train() if together and missing and len(names) > 1 else [None] * len(names)
