"""What the claims need from the model: measured in the run, after its last epoch, and stored in the record."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import scipy.spatial.distance
from jaxtyping import Float

from lplr_jax import certificates, linalg
from lplr_jax.curves.pairs import kernel_error, pair_ratio, proof_radius
from lplr_jax.diagnostics import evaluate_point
from lplr_jax.losses import Objective, Squared
from lplr_jax.measurement.bridge import run_values
from lplr_jax.measurement.gradients import flat_parameters, gradient_at, output_gradient_at
from lplr_jax.measurement.kernel import max_eig_upper
from lplr_jax.measurement.search import pair_shifts, search_ball
from lplr_jax.measurement.spacing import loss_eps, parameter_spacing, probe_eps
from lplr_jax.parameters import count_parameters, split, theta_alone
from lplr_jax.proofs.affine import is_affine
from lplr_jax.proofs.ball import anchor, certified_radius
from lplr_jax.types import Params

_COLUMNS = 4096
"""Parameters of all points that are held in float64 at a time, so that they stay in a core's cache."""


def closing_arrays(
    objective: Objective,
    x: Any,
    y: Any,
    *,
    points: Mapping[int, Params],
    kernels: Mapping[int, Float[np.ndarray, "nc nc"]],
    arrays: Mapping[str, np.ndarray],
    search_steps: int,
    kernel: str = "auto",
    seed: int = 0,
    lose: Callable[[str], None] = lambda reason: None,
) -> dict[str, np.ndarray]:
    """Measure what needs the whole run: pairs of probes, the way to θ_T, L_Θ from below and above, R*.

    Args:
        objective: what was minimised.
        x: inputs (n, ...).
        y: targets (n, c), or (n,) for (n, 1).
        points: parameters of the probes by step number, on the host; probes without are NaN in the pairs. What they
            carry beside θ is held as it is in the first.
        kernels: full kernels at the same step numbers.
        arrays: what the run measured so far, by record name.
        search_steps: steps of the power iteration for L_Θ; 0 for no search.
        kernel: one of `lplr_jax.ntk.KERNELS`.
        seed: of the search's random directions.
        lose: told why something is left out whose number the arithmetic lost.

    Returns:
        Arrays by record name.
    """
    epochs = [int(epoch) for epoch in arrays["probe_epoch"]]
    known = [epoch for epoch in epochs if epoch in points]
    if not known:
        return {}
    points = {epoch: points[epoch] for epoch in known}
    apply_fn, theta = theta_alone(objective.apply_fn, points[known[0]])
    if theta is not points[known[0]]:
        objective = Objective(apply_fn, objective.loss)
        points = {epoch: [np.asarray(leaf) for leaf in split(point).values] for epoch, point in points.items()}
    initial = points[known[0]]
    result: dict[str, np.ndarray] = {
        "affine_in_parameters": np.asarray(int(is_affine(objective.apply_fn, initial, x))),
        "parameter_spacing": np.asarray(parameter_spacing(initial)),
        "parameter_eps": np.asarray(loss_eps(objective, initial, x, y)),
        "probe_eps": np.asarray(probe_eps(objective, initial, x, y)),
    }
    places = [place for place, epoch in enumerate(epochs) if epoch in points]
    result["param_pair_distance"], result["lqcr_inner"] = _distances(
        objective, x, y, points, known, places, len(epochs)
    )
    bounds = arrays.get("ntk_assembly_error", np.full(len(epochs), np.nan))
    error = kernel_error(bounds, arrays["ntk_max_eig"], kernels[known[0]].shape[0], float(result["probe_eps"]) / 2)
    with _losing("pairs of probes", lose):
        shift = np.full((len(epochs), len(epochs)), np.nan)
        shift[np.ix_(places, places)] = pair_shifts([kernels[epoch] for epoch in known])
        result["ntk_pair_shift"] = shift
        ratio = pair_ratio(shift, result["param_pair_distance"], error, arrays["probe_epoch"])
        result["ntk_lipschitz_lower"] = np.asarray(ratio.value)
    if epochs[0] not in points:
        return result
    drift = arrays["drift"][np.isfinite(arrays["drift"])]
    radius = float(drift.max(initial=0.0))
    if search_steps and radius > 0 and not result["affine_in_parameters"]:
        with _losing("search for L_Θ", lose):
            found = search_ball(
                objective.apply_fn,
                initial,
                x,
                radius=radius,
                gradient=gradient_at(objective, initial, x, y),
                error=float(error[0]),
                steps=search_steps,
                kernel=kernel,
                seed=seed,
            )
            result |= {f"ntk_lipschitz_{name}": np.asarray(value) for name, value in vars(found).items()}
    with _losing("upper bound of L_Θ", lose):
        affine = bool(result["affine_in_parameters"])
        result |= _bounds(objective, initial, x, y, kernels[epochs[0]], arrays, drift, affine)
    return result


@contextmanager
def _losing(what: str, lose: Callable[[str], None]) -> Iterator[None]:
    """Leave out what the body measures where the arithmetic loses its number, and tell why."""
    try:
        yield
    except linalg.FAILURES as error:
        lose(f"{what}: {error}")


def _distances(
    objective: Objective,
    x: Any,
    y: Any,
    points: Mapping[int, Params],
    known: Sequence[int],
    places: Sequence[int],
    k: int,
) -> tuple[Float[np.ndarray, "k k"], Float[np.ndarray, " k"]]:
    """Return ‖θ_s - θ_t‖ for every pair, and ⟨∇L(θ_t), θ_t - θ_T⟩."""
    distance, inner = np.full((k, k), np.nan), np.full(k, np.nan)
    distance[np.ix_(places, places)] = pair_distances([points[epoch] for epoch in known])
    last = flat_parameters(points[known[-1]])
    for i, epoch in zip(places, known, strict=True):
        theta = flat_parameters(points[epoch])
        inner[i] = float(gradient_at(objective, points[epoch], x, y) @ (theta - last))
    return distance, inner


def pair_distances(points: Sequence[Params]) -> Float[np.ndarray, "k k"]:
    """Return ‖θ_s - θ_t‖ for every pair of points, from differences in float64, a few thousand parameters at a time."""
    squares = np.zeros(len(points) * (len(points) - 1) // 2)
    for leaves in zip(*map(jax.tree.leaves, points), strict=True):
        rows = [np.asarray(leaf).reshape(-1) for leaf in leaves]
        for start in range(0, rows[0].size, _COLUMNS):
            block = np.stack([row[start : start + _COLUMNS] for row in rows]).astype(np.float64)
            squares += scipy.spatial.distance.pdist(block, "sqeuclidean")
    return scipy.spatial.distance.squareform(np.sqrt(squares))


def _bounds(
    objective: Objective,
    initial: Params,
    x: Any,
    y: Any,
    theta: Float[np.ndarray, "nc nc"],
    arrays: Mapping[str, np.ndarray],
    drift: Float[np.ndarray, " t"],
    affine: bool,
) -> dict[str, np.ndarray]:
    """Return the proved bounds on the ball of the run, and R*."""
    error = float(arrays["ntk_assembly_error"][0]) if "ntk_assembly_error" in arrays else math.nan
    result = _ball_bounds(objective, initial, x, y, theta, arrays, drift, affine, error)
    if not isinstance(objective.loss, Squared):
        point = evaluate_point(objective.apply_fn, initial, x, y, loss=objective.loss)
        n, c = point.gradient.shape
        blocks = theta.reshape(n, c, n, c)[np.arange(n), :, np.arange(n), :]
        result |= run_values(
            objective.loss,
            point,
            sample_max_eig=float(np.abs(blocks).sum(axis=2).max()) * (1 + 1e-9) + error,
            jacobian_lipschitz=float(result.get("jacobian_lipschitz_upper", math.nan)),
            radius=proof_radius(drift, count_parameters(initial)),
        )
    return result


def _ball_bounds(
    objective: Objective,
    initial: Params,
    x: Any,
    y: Any,
    theta: Float[np.ndarray, "nc nc"],
    arrays: Mapping[str, np.ndarray],
    drift: Float[np.ndarray, " t"],
    affine: bool,
    error: float,
) -> dict[str, np.ndarray]:
    largest = max_eig_upper(theta, error)
    budget = float(arrays["ntk_min_eig_lower"][0]) if math.isfinite(error) else math.nan
    gradient, curvature = output_gradient_at(objective, initial, x, y), objective.loss.curvature
    scale = objective.scale(*gradient.shape)
    if affine:
        return {
            "ntk_lipschitz_upper": np.asarray(0.0),
            "jacobian_lipschitz_upper": np.asarray(0.0),
            "smoothness_upper": np.asarray(certificates.up(curvature * largest / scale)),
            "radius_certified": np.asarray(math.inf if budget > 0 else math.nan),
        }
    if not math.isfinite(largest):
        return {}
    base = anchor(
        objective.apply_fn,
        initial,
        x,
        max_eig_upper=largest,
        residual_norm=float(np.linalg.norm(gradient)),
        loss_scale=scale,
        curvature=curvature,
    )
    if base is None:
        return {}
    ball = base.on_ball(proof_radius(drift, count_parameters(initial)))
    result = {
        "ntk_lipschitz_upper": np.asarray(ball.lipschitz),
        "jacobian_lipschitz_upper": np.asarray(ball.jacobian_lipschitz),
        "smoothness_upper": np.asarray(ball.smoothness),
    }
    if budget > 0:
        result["radius_certified"] = np.asarray(certified_radius(base, budget))
    return result
