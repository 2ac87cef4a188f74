"""The rooms of the package, bottom first, its public face, and the few lazy names that lead upward."""

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
    Room("printing", "ground", "text from elsewhere made fit to be shown"),
    Room("checks", "ground", "settings and arrays held against what they may be"),
    Room("archives", "ground", "files from elsewhere, read with bounds"),
    Room("files", "ground", "files written whole or not at all"),
    Room("values", "right", "what the numbers of an array may be"),
    Room("schema", "right", "every name, unit and meaning of a record"),
    Room("records", "right", "Record, to npz and back"),
    Room("arms", "right", "the records of a folder of arms"),
    Room("curves", "right", "what series say: rate, stability, PL bracket, pairs, summary"),
    Room("theory", "right", "claims, evidence, verdicts"),
    Room("statements", "right", "the paper's empirical statements, judged from records"),
    Room("plotting", "right", "a record to a figure"),
    Room("types", "left", "what is called a parameter tree and a network"),
    Room("parameters", "left", "which leaves of a parameter tree are θ"),
    Room("layouts", "left", "convolutions as XLA's CPU likes them"),
    Room("closures", "left", "what a function reads beside its arguments"),
    Room("programs", "left", "traced functions, told apart by what they compute"),
    Room("narrowing", "left", "where a program rounds to a narrower type inside"),
    Room("certificates", "left", "bounds on rounding in linear algebra"),
    Room("lanczos", "left", "extreme Ritz values of an operator"),
    Room("shifts", "left", "what searches for an interval of λ_min share"),
    Room("factors", "left", "λ_min proved from a Cholesky factor that came from elsewhere"),
    Room("unpacked", "left", "λ_min of a matrix that is kept whole"),
    Room("packed", "left", "λ_min of a matrix in half the memory"),
    Room("linalg", "left", "eigenvalues with their quality"),
    Room("losses", "left", "Loss, and an objective made of one"),
    Room("data", "left", "images and text"),
    Room("models", "left", "built-in networks; only experiments import them"),
    Room("training", "left", "pure steps, and scans over steps, batches and epochs"),
    Room("ntk", "left", "the kernel engine and its peer"),
    Room("proofs", "left", "enclosures: rounding of the kernel, Jacobians with more digits, balls, affine programs"),
    Room("diagnostics", "left", "one point: λ_min, Hessian, PL"),
    Room("measurement", "left", "what a probe measures, and the closing measurements"),
    Room("runs", "both", "one run: problem, loop, folder, checkpoint, environment"),
    Room("reports", "both", "what people see: tables, screen, progress, log, exit codes"),
    Room("experiments", "both", "one file an experiment"),
    Room("cli", "both", "the `lplr` command"),
)
"""Each imports only from those before it, and from itself; a test reads the imports."""

FACE = {
    "curves": "lplr_jax.curves",
    "data": "lplr_jax.data",
    "diagnostics": "lplr_jax.diagnostics",
    "experiments": "lplr_jax.experiments",
    "linalg": "lplr_jax.linalg",
    "losses": "lplr_jax.losses",
    "models": "lplr_jax.models",
    "ntk": "lplr_jax.ntk",
    "plotting": "lplr_jax.plotting",
    "records": "lplr_jax.records",
    "schema": "lplr_jax.schema",
    "theory": "lplr_jax.theory",
    "training": "lplr_jax.training",
    "Record": "lplr_jax.records",
    "RecordError": "lplr_jax.records",
    "Verdict": "lplr_jax.theory",
    "Verdicts": "lplr_jax.theory",
    "load": "lplr_jax.arms",
    "verify": "lplr_jax.theory",
    "verify_point": "lplr_jax.runs.point",
    "Probes": "lplr_jax.runs.problem",
    "Problem": "lplr_jax.runs.problem",
    "Watch": "lplr_jax.runs.watch",
    "measure": "lplr_jax.runs.snapshots",
    "plot": "lplr_jax.plotting",
    "report": "lplr_jax.reports.page",
    "series": "lplr_jax.runs.entries",
    "train": "lplr_jax.runs.loop",
    "watch": "lplr_jax.runs.watch",
}
"""What `import lplr_jax` gives lazily: a room itself, or a name and the module that holds it."""

DOORS = {
    "lplr_jax.records": {"record_html": "lplr_jax.reports.html"},
    "lplr_jax.linalg": {"numbers_html": "lplr_jax.reports.html"},
    "lplr_jax.theory": {
        "closing_arrays": "lplr_jax.measurement.closing",
        "kernel_values": "lplr_jax.measurement.kernel",
        "min_eig_with_assembly": "lplr_jax.measurement.kernel",
        "spectrum_and_energy": "lplr_jax.measurement.kernel",
        "verdict_html": "lplr_jax.reports.html",
        "verify_point": "lplr_jax.runs.point",
    },
    "lplr_jax.models": {
        "ApplyFn": "lplr_jax.types",
        "Params": "lplr_jax.types",
        "count_parameters": "lplr_jax.parameters",
    },
    "lplr_jax.types": {"count_parameters": "lplr_jax.parameters"},
    "lplr_jax.training": {"LossScale": "lplr_jax.losses", "Objective": "lplr_jax.losses"},
    "lplr_jax": FACE,
}
"""Names that a module gives out lazily from another one: the face, names from above it, names that lay in it before.

A lazy name is never that of another module in the same package, which importing that module would put in its place.
"""


def through_door(module: str, name: str) -> Any:
    """Return what a module gives out lazily under a name; the body of its `__getattr__`.

    Raises:
        AttributeError: for a name that the module does not give out.
    """
    target = DOORS.get(module, {}).get(name)
    if target is None:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    found = importlib.import_module(target)
    return found if target == f"{module}.{name}" else getattr(found, name)


def table() -> str:
    """Return the rooms as a Markdown table, bottom first; docs/architecture.md shows it."""
    rows = [f"| `{room.name}` | {room.wing} | {room.holds} |" for room in ROOMS]
    return "\n".join(["| room | wing | what it holds |", "|---|---|---|", *rows])
