"""The hypotheses and conclusions of local PL theory, held against a record.

`verify` needs the record alone, and no JAX. What needs the model is measured in the run: see `lplr_jax.measurement`.
"""

from typing import Any

from lplr_jax import rooms
from lplr_jax.schema import HESSIAN_LOST, KERNEL_LOST
from lplr_jax.theory.claims import CLAIMS
from lplr_jax.theory.claims import ClaimId as Claim
from lplr_jax.theory.story import story
from lplr_jax.theory.verdict import Outcome, Verdict, Verdicts, any_inconsistent, as_json, flatten
from lplr_jax.theory.verify import reading, verify

__all__ = [
    "CLAIMS",
    "HESSIAN_LOST",
    "KERNEL_LOST",
    "Claim",
    "Outcome",
    "Verdict",
    "Verdicts",
    "any_inconsistent",
    "as_json",
    "closing_arrays",
    "flatten",
    "kernel_values",
    "min_eig_with_assembly",
    "reading",
    "spectrum_and_energy",
    "story",
    "verify",
    "verify_point",
]


def __getattr__(name: str) -> Any:
    """Open a door upward: these names need the model, and JAX with it."""
    return rooms.through_door(__name__, name)
