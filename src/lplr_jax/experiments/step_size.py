"""Step sizes from 2/β: measured at initialisation, predicted from, and held against what was observed."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lplr_jax import archives, checks, diagnostics
from lplr_jax.curves.stability import EXPECTED, observe, place_of
from lplr_jax.experiments import mnist
from lplr_jax.files import atomic_write
from lplr_jax.records import Record
from lplr_jax.runs.session import Say

_PREDICTIONS_BYTES = 2**20


SHARPNESS_TOLERANCE = 1e-4
"""Residual of the sharpness at initialisation over its value; a float32 product leaves some 2e-5. Calibrated."""


@dataclass(frozen=True)
class Arm:
    """One run of the ablation."""

    name: str
    kind: Literal["common", "smaller"]
    config: mnist.MnistConfig


def initial_sharpness(config: mnist.MnistConfig) -> float:
    """Measure λ_max(∇²L(θ_0)) with float32 products, to a residual of 1e-4 of itself.

    Raises:
        ValueError: if it does not converge or is not positive.
    """
    problem = mnist.set_up(config)
    if not math.isfinite(float(problem.objective.value(problem.params, problem.x, problem.y))):
        raise ValueError(
            f"the loss of width {config.width}, seed {config.seed} is not finite at the initialisation: no step size "
            "descends from there; lower --depth or name another --init"
        )
    found: diagnostics.Extremes | None = None
    for _ in range(4):
        found = diagnostics.hessian_extremes(
            problem.objective.value,
            problem.params,
            problem.x,
            problem.y,
            reduction=config.loss_scale,
            dtype="float32",
            max_matvecs=24,
            tolerance=SHARPNESS_TOLERANCE,
            start=found,
        )
        if found.largest > 0 and found.largest_residual <= SHARPNESS_TOLERANCE * found.largest:
            return found.largest
    raise ValueError(
        f"the sharpness at initialisation of width {config.width}, seed {config.seed} did not converge "
        f"(last value {found.largest if found else math.nan}); name --learning-rate and --smaller-learning-rate"
    )


def three_digits(value: float) -> float:
    """Round to three significant digits, so that η does not hang on the last bits of a sharpness."""
    return float(f"{value:.2e}")


def sharpness_of_all(configs: Sequence[mnist.MnistConfig], folder: Path, *, say: Say) -> tuple[float, ...]:
    """Measure β_0 of every config, or take it from the predictions that were written before."""
    known = known_sharpness(folder)
    found: list[float] = []
    for config in configs:
        setting = sharpness_setting(config)
        value = next((entry["value"] for entry in known if entry["setting"] == setting), None)
        found.append(initial_sharpness(config) if value is None else value)
        what = f"width {config.width}, init {config.init}, seed {config.seed}"
        say(f"{what}: β = {found[-1]:.5g}, 2/β = {2 / found[-1]:.4g}")
    return tuple(found)


def known_sharpness(folder: Path) -> list[dict[str, Any]]:
    """Return the sharpnesses of a folder's predictions.json, which may be anybody's file; none where there is none.

    Raises:
        ValueError: if it is not what `write_predictions` writes.
    """
    path = folder / "predictions.json"
    if not os.path.lexists(path):
        return []
    try:
        content = archives.read_json(path, most_bytes=_PREDICTIONS_BYTES)
        checks.instance("the content", content, dict, "as was written")
        known = content.get("sharpness")
        checks.instance("sharpness", known, list, "as was written")
        for entry in known:
            checks.instance("an entry", entry, dict, "as was written")
            checks.instance("setting", entry.get("setting"), dict, "as was written")
            checks.number("value", entry.get("value"), above=0)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is no file of predictions ({type(error).__name__}: {error}); remove it, or use --force"
        ) from error
    return known


def sharpness_setting(config: mnist.MnistConfig) -> dict[str, Any]:
    """Return what decides the sharpness at initialisation."""
    names = ("width", "depth", "activation", "init", "loss_scale", "n_train", "seed", "source")
    decides = mnist.decisive(config)
    # These came later: what was measured of the default ones is found again.
    later = ("classes", "pixels", "labels", "output_init", "bias_init")
    return {name: decides[name] for name in (*names, *later) if name in decides} | {"data": str(config.data)}


def prediction(arm: Arm, beta: float) -> str:
    """Say where η of an arm lies and what is expected, in one line."""
    eta_beta = arm.config.learning_rate * beta
    place = place_of(eta_beta)
    return (
        f"{arm.name}: η = {arm.config.learning_rate:g} (calibrated), 2/β = {2 / beta:.4g}, η β = {eta_beta:.3g}: "
        f"{place}; expected: {' or '.join(EXPECTED[place])}"
    )


def judged(record: Record, outcome: str) -> tuple[str, Literal["hit", "miss", "undecided"]]:
    """Return what η β at θ_0 promised, in words, and whether the outcome is among it."""
    eta_beta = float(record["learning_rate"] * record["sharpness"][0])
    if not math.isfinite(eta_beta):
        return "unknown: the sharpness at θ_0 could not be trusted", "undecided"
    expected = EXPECTED[place_of(eta_beta)]
    return " or ".join(expected), "hit" if outcome in expected else "miss"


def observation(arm: Arm, record: Record) -> str:
    """Say what an arm did, by the rule of `diagnostics.observe`, and whether it was expected."""
    seen = observe(record["loss"], record["drift"])
    _, verdict = judged(record, seen.outcome)
    what = seen.outcome if record.diverged_at is None else f"divergence, diverged at epoch {record.diverged_at}"
    rises = f"{seen.rises} rising steps" + (f" from epoch {seen.first_rise}" if seen.rises else "")
    return (
        f"{arm.name}: observed {what} (peak L/L_0 = {seen.peak:.4g}, {rises}, "
        f"{seen.overshoots} early falls of the drift): {verdict}"
    )


def write_predictions(words: str, arms: Sequence[tuple[Arm, float]], folder: Path) -> None:
    """Write predictions.json before the first step: the rule, the sharpnesses, and one line an arm."""
    settings = [(sharpness_setting(arm.config), beta) for arm, beta in arms]
    distinct = [entry for index, entry in enumerate(settings) if entry not in settings[:index]]
    content = {
        "rule": words,
        "sharpness": [{"setting": setting, "value": beta} for setting, beta in distinct],
        "predictions": [prediction(arm, beta) for arm, beta in arms],
    }
    with atomic_write(folder / "predictions.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
