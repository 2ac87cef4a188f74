"""Runs whose answer is known from theory, made for the tests of the claims, and ways to spoil a record."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lplr_jax import theory
from lplr_jax.losses import Objective
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.records import Record
from lplr_jax.runs.loop import run_training
from lplr_jax.runs.problem import probe_epochs
from lplr_jax.training import evaluate, init_state, train_epochs

SPECTRUM = np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
N, P = SPECTRUM.size, 10


def linear(w, x):
    return x @ w


def problem(spectrum=SPECTRUM, p=P, seed=0):
    """Inputs with XXᵀ = U diag(spectrum) Uᵀ, targets with equal weight on every mode, and U."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((spectrum.size, spectrum.size)))
    v, _ = np.linalg.qr(rng.standard_normal((p, spectrum.size)))
    return (u * np.sqrt(spectrum)) @ v.T, u @ np.ones((spectrum.size, 1)), u


def narrow(*arrays):
    return tuple(np.asarray(array, np.float32) for array in arrays)


def flat(tree):
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


@np.errstate(over="ignore", invalid="ignore")
def step_arrays(trajectory, gradients, size):
    """What a record says of the steps θ_t -> θ_{t+1}, in float64, from flat parameters and the gradients there."""
    arrays = {f"step_{name}": np.full(size, np.nan) for name in ("size", "deviation", "rounding")}
    pairs = zip(itertools.pairwise(trajectory), gradients, strict=False)
    for t, ((theta, after), gradient) in enumerate(pairs):
        g, moved = np.asarray(gradient, np.float64), np.asarray(theta, np.float64) - np.asarray(after, np.float64)
        length = np.linalg.norm(moved)
        if t >= size or not np.isfinite(length) or not np.isfinite(g).all() or not g.any():
            continue
        eta = float(moved @ g / (g @ g))
        arrays["step_size"][t] = eta
        unit = float(np.finfo(after.dtype).eps) / 2
        half = 0.5 * np.linalg.norm(np.spacing(np.abs(after)).astype(np.float64))
        arrays["step_rounding"][t] = half / length + 4 * unit if length else np.inf
        arrays["step_deviation"][t] = np.linalg.norm(moved - eta * g) / length if length else np.nan
    return arrays


def train(apply_fn, params, x, y, *, eta, epochs, every=10, scale="sum", search_steps=0, hessian=True, config=None):
    """Gradient descent in float64 through the package's own loop: its record, and the parameters of the probes."""
    with jax.enable_x64(True):
        params, x, y = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), (params, x, y))
        objective, optimizer = Objective(apply_fn, scale), optax.sgd(eta)
        at = probe_epochs(epochs, every)
        probe = KernelProbe(
            objective,
            x,
            np.asarray(y),
            subset=np.arange(2),
            kernel="auto",
            hessian_epochs=at if hessian else (),
            spectrum_epochs=at,
        )
        points, trajectory = {}, []

        def advance(state, count):
            """One epoch at a time, so that every iterate is seen."""
            metrics = []
            for _ in range(count):
                trajectory.append(jax.device_get(state.params))
                state, one = train_epochs(state, (x, y), params, objective=objective, optimizer=optimizer, epochs=1)
                metrics.append(one)
            return state, jax.tree.map(lambda *leaves: np.concatenate(leaves), *metrics)

        def probing(state_params, epoch):
            points[epoch] = jax.device_get(state_params)
            return probe(state_params, epoch)

        result = run_training(
            init_state(params, optimizer),
            probes_at=at,
            advance=advance,
            evaluate=lambda q: evaluate(q, (x, y), params, objective=objective),
            probe=probing,
        )
        trajectory.append(jax.device_get(result.params))
        gradient = jax.jit(lambda q: objective.value_and_gradient(q, x, y)[1])
        gradients = [jax.device_get(gradient(q)) for q in trajectory]
        closing = probe.close(result.arrays, search_steps=search_steps, seed=0)
    n, c = y.shape
    numbers = {
        "subset_ids": np.arange(2),
        "loss_scale": float(objective.scale(n)),
        "learning_rate": eta,
        "n": n,
        "c": c,
        "p": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    arrays = {**result.arrays, **closing, **{name: np.asarray(value) for name, value in numbers.items()}}
    if "step_size" not in arrays:
        arrays |= step_arrays(
            *([flat(q) for q in points_] for points_ in (trajectory, gradients)), arrays["epoch"].size
        )
    arrays.setdefault("parameter_eps", np.asarray(2.0**-52))
    return Record("control", arrays, config or {}), points


def by_claim(record):
    verdicts = theory.verify(record)
    assert tuple(v.claim for v in verdicts) == theory.CLAIMS
    return {v.claim: v for v in verdicts}


def tampered(record, **changes):
    arrays = {
        name: np.array(array, dtype=np.float64 if name in changes and array.dtype.kind == "f" else None)
        for name, array in record.arrays.items()
    }
    for name, change in changes.items():
        arrays[name] = np.asarray(change(arrays[name]))
    return dataclasses.replace(record, arrays=arrays)


def scaled(by, *at):
    def change(array):
        array[at or ...] *= by
        return array

    return change


def without(record, *names):
    """Leave arrays out of a record."""
    return dataclasses.replace(record, arrays={k: v for k, v in record.arrays.items() if k not in names})


def replaced(value, *at):
    def change(array):
        array[at or ...] = value
        return array

    return change


def raised(epoch):
    return scaled(1.5, epoch)
