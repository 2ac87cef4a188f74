"""The hypotheses and conclusions of local PL theory, held against a run or a point.

`verify` needs the record alone. What needs the model is measured in the run and stored: `measure` has the closing
measurements, `bounds` the proved upper bounds, `search` the lower estimates, `structure` the analysis of the jaxpr.
"""

from lplr_jax.theory.evidence import HESSIAN_LOST, KERNEL_LOST
from lplr_jax.theory.measure import closing_arrays, kernel_values, min_eig_with_assembly, spectrum_and_energy
from lplr_jax.theory.verdict import CLAIMS, Claim, Outcome, Verdict, any_inconsistent, as_json, flatten
from lplr_jax.theory.verify import reading, verify, verify_point

__all__ = [
    "CLAIMS",
    "HESSIAN_LOST",
    "KERNEL_LOST",
    "Claim",
    "Outcome",
    "Verdict",
    "any_inconsistent",
    "as_json",
    "closing_arrays",
    "flatten",
    "kernel_values",
    "min_eig_with_assembly",
    "reading",
    "spectrum_and_energy",
    "verify",
    "verify_point",
]
