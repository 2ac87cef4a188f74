"""Same seed, same machine: same bytes. Other devices, another block size: the same up to a proved bound."""

import dataclasses
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

import survival
from lplr_jax import linalg, records, shifts
from lplr_jax.experiments import mnist
from lplr_jax.measurement import probe
from lplr_jax.ntk import empirical_ntk

TINY = dataclasses.replace(survival.TINY, epochs=6, hessian_probes=2, search_steps=0)

EIGHT = """
import sys
import jax
from lplr_jax.experiments import mnist
assert jax.device_count() == 8
mnist.run(mnist.MnistConfig(**eval(sys.argv[1]))).save(sys.argv[2])
"""


@pytest.fixture(scope="module")
def one():
    return mnist.run(TINY)


def assert_agree(found, record):
    """Hold two runs against each other, whose kernels differ by what their assembly may be off at most."""
    for name in ("epoch", "loss", "grad_sq_norm", "drift", "probe_epoch", "subset_ids"):
        assert found[name].tobytes() == record[name].tobytes(), name
    lower, upper = ([r[f"ntk_min_eig_{end}"] for r in (found, record)] for end in ("lower", "upper"))
    assert (np.maximum(*lower) <= np.minimum(*upper)).all(), "both intervals hold λ_min of one exact kernel"
    width = sum(high - low for low, high in zip(lower, upper, strict=True))
    assert (np.abs(found["ntk_min_eig"] - record["ntk_min_eig"]) <= width).all()
    # Each kernel is within its recorded error of the exact one (Weyl), a dense solver adds n u ‖·‖.
    error = found["ntk_assembly_error"] + record["ntk_assembly_error"]
    n, u = int(record["n"]), 2.0**-53
    largest = record["ntk_max_eig"]
    assert (error < 1e-8 * largest).all(), "a bound this wide tests nothing"
    for name in ("ntk_max_eig", "ntk_rayleigh", "ntk_min_eig_subset"):
        assert (np.abs(found[name] - record[name]) <= error + 4 * n * u * largest).all(), name
    shift = np.abs(found["ntk_shift"] - record["ntk_shift"])
    assert (shift <= error + error[0] + 4 * n * u * largest.max()).all()
    spectrum = np.abs(found["spectrum"] - record["spectrum"]).max(axis=1)
    measured = np.isfinite(spectrum)
    assert measured.any()
    assert (spectrum <= error + 4 * n * u * largest)[measured].all()


@pytest.mark.slow
def test_eight_devices_agree_with_one(one, tmp_path):
    fields = {name: value for name, value in one.config.items() if name != "data_checksum"}
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-c", EIGHT, repr(fields), str(tmp_path / "record.npz")]
    subprocess.run(command, check=True, env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
    found = records.load(tmp_path)
    assert found.provenance["device"].endswith("x 8")
    assert found.config == one.config
    assert_agree(found, one)


@pytest.mark.slow
def test_another_block_size_agrees(one, monkeypatch):
    budgets = []
    # Of several devices each holds its share of the samples at once.
    budget = 30_000 * jax.device_count()

    def small(*args, **settings):
        budgets.append(budget)
        return empirical_ntk(*args, **settings, memory_budget=budget)

    monkeypatch.setattr(probe, "empirical_ntk", small)
    found = mnist.run(TINY)
    assert len(budgets) == 3
    assert_agree(found, one)


def test_krylov_restarts_are_repeatable():
    """A chain that ends after a few steps is continued from random numbers: those of a fixed seed."""
    rng = np.random.default_rng(0)
    low_rank = rng.standard_normal((450, 2))
    matrices = (low_rank @ low_rank.T, np.eye(450), np.diag(np.repeat([1.0, 2.0, -3.0], 150)))
    for a in matrices:
        answers = set()
        for _ in range(3):
            np.random.default_rng().standard_normal(7)
            values, vectors = shifts.arpack(a, which="LM")
            answers.add(values.tobytes() + vectors.tobytes() + np.float64(linalg.spectral_norm(a)).tobytes())
        assert len(answers) == 1
