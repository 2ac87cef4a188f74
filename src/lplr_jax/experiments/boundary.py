"""The largest step size that descends, found by short runs and held against 2/β at initialisation."""

import itertools
import json
import math
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array
from matplotlib.figure import Figure

from lplr_jax import archives, checks, plotting
from lplr_jax.checks import integers
from lplr_jax.curves.stability import PowerLaw, power_law, rounding_allowance
from lplr_jax.experiments import mnist
from lplr_jax.experiments.experiment import Experiment
from lplr_jax.experiments.parts import DataPart, FolderPart, LossPart, SeedPart, WidthsPart, decisive, shared
from lplr_jax.experiments.quantities import READINGS
from lplr_jax.experiments.step_size import initial_sharpness
from lplr_jax.files import atomic_write
from lplr_jax.losses import Objective
from lplr_jax.reports.tables import Measured, Quantity, Table
from lplr_jax.runs.environment import describe_environment
from lplr_jax.runs.folder import CHECKPOINTS, ConfigMismatchError, differences
from lplr_jax.training import TrainState, init_state, train_step
from lplr_jax.types import Params

_GRADIENT_DESCENT = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
"""Gradient descent whose η is part of its state, so that one compiled program serves every η."""

_POINTS_BYTES = 2**20

TOGETHER = 7
"""Step sizes tried at once on an accelerator; a CPU tries one after the other. Calibrated."""


@dataclass(frozen=True)
class BoundaryConfig(FolderPart, DataPart, LossPart, SeedPart, WidthsPart):
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
class Bracket:
    """Where the boundary lies.

    Attributes:
        descends: largest η that was seen to descend.
        fails: least η that was seen not to.
        trials: step sizes tried.
    """

    descends: float
    fails: float
    trials: int

    @property
    def middle(self) -> float:
        """Their geometric mean."""
        return math.sqrt(self.descends * self.fails)


def descends(
    objective: Objective, params: Params, batch: tuple[Any, Array], learning_rate: Array, *, steps: int
) -> Array:
    """Return whether L_{t+1} <= L_t for all t < steps, up to rounding; stops at the first rise.

    Rounding is allowed for as in `diagnostics.rounding_allowance`, in the precision of the loss.

    Args:
        objective: the loss.
        params: θ_0.
        batch: all data.
        learning_rate: η, a traced scalar of the precision of the parameters.
        steps: how many steps are watched.
    """
    state = init_state(params, _GRADIENT_DESCENT)
    hyperparams = {**state.opt_state.hyperparams, "learning_rate": learning_rate}  # pyright: ignore[reportAttributeAccessIssue]
    state = state._replace(opt_state=state.opt_state._replace(hyperparams=hyperparams))  # pyright: ignore[reportAttributeAccessIssue]
    initial = objective.value(params, *batch)
    roundoff = float(jnp.finfo(initial.dtype).eps) / 2
    # Beside a minimiser L_0 says nothing about the size of the outputs; the labels do.
    size = jnp.maximum(initial, 0.5 * jnp.sum(jnp.square(batch[1])) / objective.scale(batch[1].shape[0]))

    def going_on(carry: tuple[TrainState, Array, Array, Array]) -> Array:
        _, _, step, falling = carry
        return falling & (step <= steps)

    def body(carry: tuple[TrainState, Array, Array, Array]) -> tuple[TrainState, Array, Array, Array]:
        state, before, step, _ = carry
        state, metrics = train_step(state, batch, params, objective=objective, optimizer=_GRADIENT_DESCENT)
        falling = metrics.loss <= before + rounding_allowance(before, size, roundoff)
        return state, jnp.asarray(metrics.loss), step + 1, falling

    carry = (state, initial, jnp.asarray(0), jnp.isfinite(initial))
    return jax.lax.while_loop(going_on, body, carry)[3]


@partial(jax.jit, static_argnames=("objective", "steps"))
def _one(objective: Objective, params: Params, batch: Any, rate: Array, *, steps: int) -> Array:
    return descends(objective, params, batch, rate, steps=steps)


@partial(jax.jit, static_argnames=("objective", "steps"))
def _many(objective: Objective, params: Params, batch: Any, rates: Array, *, steps: int) -> Array:
    return jax.vmap(lambda rate: descends(objective, params, batch, rate, steps=steps))(rates)


def find_boundary(
    objective: Objective,
    params: Params,
    batch: tuple[Any, Array],
    *,
    start: float,
    steps: int = 100,
    tolerance: float = 0.01,
    together: bool | None = None,
    max_rounds: int = 60,
) -> Bracket:
    """Find the largest η that descends from θ_0, by bisection on a log scale.

    Assumes that every η below the boundary descends; where that fails, it is one boundary among several.

    Args:
        objective: the loss.
        params: θ_0; its precision is that of the runs.
        batch: all data.
        start: η to begin with, such as 2/β; the bracket is doubled or halved from there.
        steps: length of every run.
        tolerance: relative width of the bracket at which the search stops.
        together: try several η at once by vmap, narrowing eightfold a round; None does so on accelerators.
        max_rounds: rounds after which the search gives up.

    Returns:
        The bracket.

    Raises:
        ValueError: for settings out of range, or if no boundary is found.
    """
    checks.number("start", start, above=0)
    checks.number("tolerance", tolerance, above=0)
    checks.whole("steps", steps, least=1)
    dtype = jax.tree.leaves(params)[0].dtype
    count = TOGETHER if (jax.default_backend() != "cpu" if together is None else together) else 1

    def run(rates: Sequence[float]) -> list[bool]:
        if len(rates) == 1:
            return [bool(_one(objective, params, batch, jnp.asarray(rates[0], dtype), steps=steps))]
        found = _many(objective, params, batch, jnp.asarray(rates, dtype), steps=steps)
        return [bool(value) for value in jax.device_get(found)]

    low, high, trials = 0.0, math.inf, 0
    for _ in range(max_rounds):
        if low > 0 and high <= low * (1 + tolerance):
            return Bracket(low, high, trials)
        if low > 0 and high < math.inf:
            rates = [low * (high / low) ** (k / (count + 1)) for k in range(1, count + 1)]
        elif low > 0:
            rates = [low * 2.0**k for k in range(1, count + 1)]
        else:
            rates = sorted(min(start, high / 2) * 2.0**-k for k in range(count))
        for rate, falling in zip(rates, run(rates), strict=True):
            trials += 1
            if not falling:
                high = rate
                break
            low = rate
    raise ValueError(
        f"no boundary after {trials} trials: the largest η that descends is {low:g}, the least that does not {high:g}; "
        "give a start closer to it, or a wider tolerance"
    )


@dataclass(frozen=True)
class Point:
    """One width: the measured boundary and 2/β."""

    width: int
    predicted: float
    bracket: Bracket

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
) -> tuple[Point, ...]:
    """Measure the boundary of every width.

    Args:
        config: what to run; `out` and `force` are for the caller.
        say: told one line a width: 2/β before the search, the boundary after it.
        done: points that were measured before, of the least widths.
        keep: given all points so far after every width.

    Raises:
        ValueError: for a field out of range or data that cannot be had.
    """
    config.check()
    points = list(done)
    for width in config.each_width()[len(points) :]:
        setting = _mnist_config(config, width)
        predicted = 2 / initial_sharpness(setting)
        say(f"width {width}: predicted boundary 2/β = {predicted:.4g}")
        problem = mnist.set_up(setting)
        bracket = find_boundary(
            problem.objective,
            problem.params,
            (problem.x, problem.y),
            start=predicted,
            steps=config.steps,
            tolerance=config.tolerance,
        )
        point = Point(width, predicted, bracket)
        say(
            f"width {width}: descends at {bracket.descends:.4g}, rises at {bracket.fails:.4g} "
            f"({bracket.trials} runs): {point.ratio:.3f} of 2/β"
        )
        points.append(point)
        keep(points)
    return tuple(points)


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

    Args:
        config: what to run.
        folder: where the points go; those of a run that was interrupted are found there.
        say: told one line a width.
        check: called before every write; raises where nothing must be written any more.

    Raises:
        ConfigMismatchError: if the points that are there were measured with another config.
        ValueError: if they cannot be read.
    """
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
    points = run(config, say=say, done=done, keep=keep)
    check()
    save(points, asked, target)
    say(f"points   {target}")
    shutil.rmtree(partial_results.parent, ignore_errors=True)
    return points


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
    return Point(width, predicted, Bracket(descending, fails, checks.whole("trials", bracket.get("trials"), least=1)))


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
)
