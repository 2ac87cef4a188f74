"""Kernels of probes that are kept in memory, on disk, or not at all."""

import errno
import logging
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from lplr_jax.measurement import kept
from lplr_jax.runs.problem import Probes, Problem, kernel_probe

N, D = 12, 20
RNG = np.random.default_rng(0)
X, Y = RNG.standard_normal((N, D)), RNG.standard_normal((N, 1))


def _closing_with(monkeypatch, caplog, *, most_bytes, free):
    """The closing measurements of four probes whose kernels have so many bytes of memory and disk."""
    problem = Problem(lambda w, x: jnp.tanh(x @ w), jnp.zeros((D, 1)), X, Y)
    probe, _ = kernel_probe(problem, Probes(1, hessian=0, spectrum=0, search=0), steps=None)
    probe._kernels = kept.KeptKernels(most_bytes)
    monkeypatch.setattr(kept.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    caplog.clear()
    with caplog.at_level(logging.INFO):
        for step in (0, 1, 2, 3):
            probe(problem.params + np.float32(step / 10), step)
    arrays = {"probe_epoch": np.arange(4), "drift": np.arange(4.0), "ntk_max_eig": np.ones(4), "probe_loss": np.ones(4)}
    arrays |= {name: np.ones(4) for name in ("ntk_assembly_error", "ntk_min_eig_lower")}
    on_disk = [isinstance(kernel, np.memmap) for kernel in probe._kernels.values()]
    return probe.close(arrays, search_steps=0, seed=0), on_disk, list(caplog.messages)


def test_kernels_beyond_memory_go_to_disk_and_give_the_same(monkeypatch, caplog, tmp_path):
    monkeypatch.setattr(kept.tempfile, "gettempdir", lambda: str(tmp_path))
    whole, on_disk, _ = _closing_with(monkeypatch, caplog, most_bytes=None, free=0)
    assert on_disk == [False] * 4
    few, on_disk, messages = _closing_with(monkeypatch, caplog, most_bytes=2 * 8 * N * N, free=2**40)
    assert on_disk == [False, False, True, True]
    assert sum(str(tmp_path) in message for message in messages) == 1
    assert not list(tmp_path.iterdir()), "the files have no names, so nothing is left of them"
    assert few.keys() == whole.keys()
    for name, value in whole.items():
        np.testing.assert_array_equal(few[name], value, err_msg=name)


def test_kernels_beyond_memory_and_disk_are_left_out(monkeypatch, caplog):
    room = 2 * 8 * N * N
    closing, on_disk, messages = _closing_with(monkeypatch, caplog, most_bytes=room, free=room - 1)
    assert on_disk == [False, False]
    assert sum("left out" in message for message in messages) == 1
    assert np.isfinite(closing["param_pair_distance"]).sum() == 4


@pytest.mark.parametrize("fails", ["file", "folder"])
def test_a_disk_that_fills_up_meanwhile_ends_no_run(monkeypatch, caplog, fails):
    """What is free as it is looked up may be taken as the file is written; TMPDIR may be gone, or not be written to."""

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    name = {"file": "TemporaryFile", "folder": "gettempdir"}[fails]
    monkeypatch.setattr(kept.tempfile, name, full)
    closing, on_disk, messages = _closing_with(monkeypatch, caplog, most_bytes=2 * 8 * N * N, free=2**40)
    assert on_disk == [False, False]
    assert sum("No space left on device" in message for message in messages) == 1
    assert np.isfinite(closing["param_pair_distance"]).sum() == 4
