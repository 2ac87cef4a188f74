"""The right wing judges and draws without JAX: on a machine that has none, every verdict can be made again."""

import subprocess
import sys


def test_judging_and_drawing_load_no_jax():
    code = (
        "import sys, lplr_jax.theory, lplr_jax.records, lplr_jax.plotting;"
        "print(sorted({'jax', 'flax', 'optax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_verifying_loads_no_jax():
    code = (
        "import sys;"
        "from lplr_jax import theory; from lplr_jax.theory.claims import REGISTRY;"
        "found = [theory.verify(claim.example()) for claim in REGISTRY.values()];"
        "print(sorted({'jax', 'flax', 'optax'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
