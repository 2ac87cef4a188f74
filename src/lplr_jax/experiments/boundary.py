"""The largest step size that descends, found by short runs and held against 2/β at initialisation."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lplr_jax import archives, checks, plotting
from lplr_jax.checks import integers
from lplr_jax.curves.stability import PowerLaw, power_law
from lplr_jax.experiments import mnist
from lplr_jax.experiments.descent_search import Bracket, find_boundary
from lplr_jax.experiments.experiment import Experiment
from lplr_jax.experiments.parts import DataPart, FolderPart, LossPart, SeedPart, WidthsPart, decisive, shared
from lplr_jax.experiments.quantities import READINGS
from lplr_jax.experiments.step_size import initial_sharpness
from lplr_jax.experiments.sweep import NONE, ArmsPart
from lplr_jax.files import atomic_write
from lplr_jax.measurement.rivals import critical_step
from lplr_jax.reports.tables import Measured, Quantity, Table
from lplr_jax.runs.environment import describe_environment
from lplr_jax.runs.folder import CHECKPOINTS, ConfigMismatchError, claimed, differences

_POINTS_BYTES = 2**20


@dataclass(frozen=True)
class BoundaryConfig(ArmsPart, FolderPart, DataPart, LossPart, SeedPart, WidthsPart):
    """Everything that decides the boundaries, and where they go."""

    widths: str = "64,128,256,512,1024"
    """Widths m, with commas."""
    steps: int = 100
    """Steps over which the loss must not rise for η to count as descending."""
    tolerance: float = 0.02
    """Relative width of the bracket at which bisection stops."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        checks.whole("steps", self.steps, least=1)
        checks.number("tolerance", self.tolerance, above=0)
        for width in self.each_width():
            mnist.resolve(_mnist_config(self, width))


PRESETS: dict[str, BoundaryConfig] = {
    "smoke": BoundaryConfig(widths="16,32,64", n_train=200, tolerance=0.05),
    "default": BoundaryConfig(),
    "paper": BoundaryConfig(widths="64,128,256,512,1024,2048", tolerance=0.002),
}
"""Named sets of defaults. All calibrated."""


@dataclass(frozen=True)
class Point:
    """One width: the measured boundary, 2/β, and η_c at θ_0, None where it was not found."""

    width: int
    predicted: float
    bracket: Bracket
    critical: float | None = None

    @property
    def ratio(self) -> float:
        """Measured over predicted."""
        return self.bracket.middle / self.predicted


def _mnist_config(config: BoundaryConfig, width: int) -> mnist.MnistConfig:
    return mnist.MnistConfig(**shared(config, mnist.MnistConfig), width=width, hessian_probes=0)


def identity(config: BoundaryConfig) -> dict[str, Any]:
    """Return everything that decides the numbers.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    widths = config.each_width()
    checksum = mnist.load_data(_mnist_config(config, widths[0])).checksum
    return {**decisive(config), "widths": ",".join(map(str, widths)), "data_checksum": checksum}


def run(
    config: BoundaryConfig,
    *,
    say: Callable[[str], None] = lambda line: None,
    done: Sequence[Point] = (),
    keep: Callable[[Sequence[Point]], None] = lambda points: None,
    known: Mapping[int, Point] = MappingProxyType({}),
) -> tuple[Point, ...]:
    """Measure the boundary of every width.

    Args:
        config: what to run; `out` and `force` are for the caller.
        say: told one line a width: 2/β before the search, the boundary after it.
        done: points that were measured before, of the least widths.
        keep: given all points so far after every width.
        known: points that were measured as arms, by width.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    points = list(done)
    for width in config.each_width()[len(points) :]:
        points.append(known[width] if width in known else _measure(config, width, say))
        keep(points)
    return tuple(points)


def _measure(config: BoundaryConfig, width: int, say: Callable[[str], None]) -> Point:
    """Measure the boundary of one width."""
    setting = _mnist_config(config, width)
    predicted = 2 / initial_sharpness(setting)
    problem = mnist.set_up(setting)
    found = critical_step(problem.objective, problem.params, *problem.data, guess=predicted)
    critical = None if math.isnan(found) else found
    beside = "" if critical is None else f"; one step descends up to η_c = {critical:.4g}"
    say(f"width {width}: predicted boundary 2/β = {predicted:.4g}{beside}")
    settings = {"steps": config.steps, "tolerance": config.tolerance}
    bracket = find_boundary(problem.objective, problem.params, problem.data, start=predicted, **settings)
    point = Point(width, predicted, bracket, critical)
    say(
        f"width {width}: descends at {bracket.descends:.4g}, rises at {bracket.fails:.4g} "
        f"({bracket.trials} runs): {point.ratio:.3f} of 2/β"
    )
    return point


def exponents(points: Sequence[Point]) -> tuple[PowerLaw, PowerLaw]:
    """Return the power laws in the width of the measured boundary and of 2/β."""
    widths = np.array([point.width for point in points], np.float64)
    measured, predicted = ([point.bracket.middle for point in points], [point.predicted for point in points])
    return power_law(widths, np.array(measured)), power_law(widths, np.array(predicted))


def run_in(
    config: BoundaryConfig,
    folder: Path,
    *,
    say: Callable[[str], None] = lambda line: None,
    check: Callable[[], None] = lambda: None,
) -> tuple[Point, ...]:
    """Measure the boundary of every width and write FOLDER/boundary.json; widths that are done are not run again.

    An arm, one width, goes to FOLDER/m64/boundary.json; the sweep as a whole reads what is there.

    Args:
        config: what to run.
        folder: where the points go; those of a run that was interrupted are found there.
        say: told one line a width.
        check: called before every write; raises where nothing must be written any more.

    Raises:
        ConfigMismatchError: if the points that are there were measured with another config.
        ValueError: if they cannot be read.
    """
    if config.arm is not None:
        return () if config.arm == NONE else _run_arm(config, folder, say=say)
    target, partial_results = folder / "boundary.json", folder / CHECKPOINTS / "boundary.json"
    asked = identity(config)
    if os.path.lexists(target):
        points = load(target, asked)
        say(f"points   {target} is there, made with this config; --force makes it anew")
        return points

    def keep(points: Sequence[Point]) -> None:
        check()
        save(points, asked, partial_results)

    done = load(partial_results, asked, whole=False) if os.path.lexists(partial_results) else ()
    if done:
        say(f"goes on after width {done[-1].width}")
    points = run(config, say=say, done=done, keep=keep, known=_measured_as_arms(config, folder))
    check()
    save(points, asked, target)
    say(f"points   {target}")
    shutil.rmtree(partial_results.parent, ignore_errors=True)
    return points


def arms(config: BoundaryConfig) -> list[str]:
    """Return the names of the arms: one a width."""
    return [f"m{width}" for width in config.each_width()]


def _arm(config: BoundaryConfig, width: int) -> BoundaryConfig:
    return replace(config, widths=str(width), arm=None)


def _run_arm(config: BoundaryConfig, folder: Path, *, say: Callable[[str], None]) -> tuple[Point, ...]:
    """Measure one width in a folder of its own, which is locked for it."""
    assert config.arm is not None
    one = _arm(config, int(config.arm.removeprefix("m")))
    with claimed(folder / config.arm, "boundary", identity(one), say=say) as lock:
        return run_in(one, folder / config.arm, say=say, check=lock.check)


def _measured_as_arms(config: BoundaryConfig, folder: Path) -> dict[int, Point]:
    """Return the points of the arms that are done, by width."""
    found = {}
    for width, name in zip(config.each_width(), arms(config), strict=True):
        path = folder / name / "boundary.json"
        if os.path.lexists(path):
            (found[width],) = load(path, identity(_arm(config, width)))
    return found


def load(path: Path, asked: Mapping[str, Any] | None = None, *, whole: bool = True) -> tuple[Point, ...]:
    """Read the points of a boundary.json, which may be anybody's file.

    Args:
        path: the file.
        asked: what must have decided its numbers, as of `identity`; None takes any.
        whole: whether every width of its config must be there; else the first ones will do.

    Raises:
        ConfigMismatchError: if other settings decided its numbers.
        ValueError: if it is not what `save` writes.
    """
    try:
        content = archives.read_json(path, most_bytes=_POINTS_BYTES)
        checks.instance("the content", content, dict, "as was written")
        checks.instance("config", content.get("config"), dict, "as was written")
        checks.instance("points", content.get("points"), list, "as was written")
        widths = sorted(integers("widths", content["config"].get("widths"), least=1))
        points = tuple(_read_point(entry) for entry in content["points"])
        found = [point.width for point in points]
        if found != widths[: len(found)] or (whole and len(found) < len(widths)):
            raise ValueError(f"points of widths {checks.shown(found)} where its config says {checks.shown(widths)}")
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of boundaries ({error}); remove it, or start afresh with --force"
        ) from error
    differing = differences(content["config"], asked) if asked is not None else ()
    if differing:
        raise ConfigMismatchError(
            f"{path} was measured with another config: {'; '.join(differing)}. Remove it, name another folder with "
            "--out, or start afresh with --force, which keeps the old one aside"
        )
    return points


def _read_point(entry: Any) -> Point:
    checks.instance("a point", entry, dict, "as was written")
    bracket = entry.get("bracket")
    checks.instance("a bracket", bracket, dict, "as was written")
    width = checks.whole("width", entry.get("width"), least=1)
    predicted = checks.number("predicted", entry.get("predicted"), above=0)
    descending = checks.number("descends", bracket.get("descends"), above=0)
    fails = checks.number("fails", bracket.get("fails"), above=descending)
    critical = entry.get("critical")  # which came later
    critical = None if critical is None else checks.number("critical", critical, above=0)
    trials = checks.whole("trials", bracket.get("trials"), least=1)
    return Point(width, predicted, Bracket(descending, fails, trials), critical)


def save(points: Sequence[Point], decisive: Mapping[str, Any], target: Path) -> Path:
    """Write what decides the points, as of `identity`, the points and the provenance as JSON."""
    content = {
        "config": dict(decisive),
        "points": [{**asdict(point), "ratio": point.ratio} for point in points],
        "provenance": describe_environment(),
    }
    with atomic_write(target) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return target


QUANTITIES = (
    replace(READINGS["boundary"].quantity, key="predicted"),
    READINGS["critical_step"].quantity,
    Quantity("descends", "η that descends", r"$\eta$ that descends", "largest that was seen to"),
    Quantity("fails", "η that does not", r"$\eta$ that does not", "least that was seen to let the loss rise"),
    Quantity("ratio", "measured / predicted", "measured / predicted", "geometric mean of the two over 2/β"),
    Quantity("trials", "runs", "runs", "step sizes tried"),
)


def table(points: Sequence[Point], config: BoundaryConfig) -> Table:
    """Return the boundary of every width beside 2/β."""
    measured, predicted = exponents(points)
    slopes = [math.log(b.predicted / a.predicted) / math.log(b.width / a.width) for a, b in itertools.pairwise(points)]
    local = ", ".join(f"{slope:.2f}" for slope in slopes)
    return Table(
        "Step-size boundary: the largest η whose loss never rises",
        tuple(f"m = {point.width}" for point in points),
        QUANTITIES,
        {
            "predicted": [Measured(point.predicted) for point in points],
            "critical_step": [None if point.critical is None else Measured(point.critical) for point in points],
            "descends": [Measured(point.bracket.descends) for point in points],
            "fails": [Measured(point.bracket.fails) for point in points],
            "ratio": [Measured(point.ratio) for point in points],
            "trials": [point.bracket.trials for point in points],
        },
        (
            f"Descends: L_(t+1) ≤ L_t for {config.steps} steps, "
            "up to γ (L + sqrt(L S)) + γ² S of rounding, γ = 64 u, S = max(L_0, ‖y‖²/(2s)).",
            f"Exponent in m: measured {measured.slope:.3f} ± {measured.stderr:.3f}, "
            f"2/β {predicted.slope:.3f} ± {predicted.stderr:.3f} (standard error); 2/β between neighbours: {local}.",
        ),
    )


def figure(points: Sequence[Point]) -> Figure:
    """Return the boundary of every width beside 2/β, and their ratio."""
    return plotting.boundary(
        [point.width for point in points],
        [point.predicted for point in points],
        [point.bracket.descends for point in points],
        [point.bracket.fails for point in points],
        critical=[math.nan if point.critical is None else point.critical for point in points],
    )


EXPERIMENT = Experiment(
    name="boundary",
    config=BoundaryConfig,
    presets=PRESETS,
    identity=lambda config, given: identity(config),
    run=lambda config, folder, given, /, *, say, follow, check: run_in(config, folder, say=say, check=check),
    records=lambda points: {},
    table=table,
    figure=lambda points, config: figure(points),
    followed=False,
    arms=arms,
)
