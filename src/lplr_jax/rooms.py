"""The rooms of the package, bottom first, and the few doors that lead upward: the one place where they are listed."""

import importlib
from typing import Any, NamedTuple


class Room(NamedTuple):
    """One module or package.

    Attributes:
        name: under `lplr_jax`.
        wing: "ground", "left" (measures, needs JAX), "right" (judges, needs none) or "both".
        holds: what it is for, in a few words.
    """

    name: str
    wing: str
    holds: str


ROOMS = (
    Room("rooms", "ground", "this list"),
    Room("checks", "ground", "settings and arrays held against what they may be"),
    Room("archives", "ground", "files from elsewhere, read with bounds"),
    Room("files", "ground", "files written whole or not at all"),
    Room("schema", "right", "every name, unit and meaning of a record"),
    Room("records", "right", "Record, to npz and back"),
    Room("curves", "right", "what series say: rate, stability, PL bracket, pairs, summary"),
    Room("theory", "right", "claims, evidence, verdicts"),
    Room("plotting", "right", "a record to a figure"),
    Room("types", "left", "what is called a parameter tree and a network"),
    Room("parameters", "left", "which leaves of a parameter tree are θ"),
    Room("layouts", "left", "convolutions as XLA's CPU likes them"),
    Room("closures", "left", "what a function reads beside its arguments"),
    Room("programs", "left", "traced functions, told apart by what they compute"),
    Room("certificates", "left", "bounds on rounding in linear algebra"),
    Room("lanczos", "left", "extreme Ritz values of an operator"),
    Room("linalg", "left", "eigenvalues with their quality"),
    Room("losses", "left", "Loss, and an objective made of one"),
    Room("data", "left", "images"),
    Room("models", "left", "built-in networks; only experiments import them"),
    Room("training", "left", "pure steps, and scans over steps, batches and epochs"),
    Room("ntk", "left", "the kernel engine and its peer"),
    Room("proofs", "left", "enclosures: rounding of the kernel, balls, affine programs"),
    Room("diagnostics", "left", "one point: λ_min, Hessian, PL"),
    Room("measurement", "left", "what a probe measures, and the closing measurements"),
    Room("runs", "both", "one run: problem, loop, folder, checkpoint, environment"),
    Room("reports", "both", "what people see: tables, screen, progress, log, exit codes"),
    Room("experiments", "both", "one file an experiment"),
    Room("cli", "both", "the `lplr` command"),
)
"""Each imports only from those before it, and from itself; a test reads the imports."""

DOORS = {
    "lplr_jax.theory": {
        "closing_arrays": "lplr_jax.measurement.closing",
        "kernel_values": "lplr_jax.measurement.kernel",
        "min_eig_with_assembly": "lplr_jax.measurement.kernel",
        "spectrum_and_energy": "lplr_jax.measurement.kernel",
        "verify_point": "lplr_jax.runs.point",
    },
    "lplr_jax.models": {
        "ApplyFn": "lplr_jax.types",
        "Params": "lplr_jax.types",
        "count_parameters": "lplr_jax.parameters",
    },
    "lplr_jax.types": {"count_parameters": "lplr_jax.parameters"},
    "lplr_jax.training": {"LossScale": "lplr_jax.losses", "Objective": "lplr_jax.losses"},
}
"""Names that a module gives out lazily from another one: upward, or where they lived before."""


def through_door(module: str, name: str) -> Any:
    """Return a name that a module gives out lazily.

    Raises:
        AttributeError: for a name that is no door of the module.
    """
    if name not in DOORS.get(module, {}):
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    return getattr(importlib.import_module(DOORS[module][name]), name)
