"""Bad input at the real command line, and what it costs: no waiting, no traceback, no memory."""

import os
import subprocess
import sys

import numpy as np
import pytest

from bad_input_files import MIB, big, bomb, gz_bomb, idx_pair, members_of, npy, pack, put, sparse

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}


def lplr(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "lplr_jax.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**ENVIRONMENT, **environment}, timeout=120, check=False
    )


def test_a_bad_record_ends_with_one_line_and_debug_shows_where(tmp_path):
    path = put(tmp_path, b"no record")
    done = lplr("verify", path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lplr: {path} is no readable record")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    done = lplr("verify", path, "--debug", cwd=tmp_path)
    assert done.returncode == 2
    assert "Traceback" in done.stderr


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "record.npz")
    done = lplr("plot", tmp_path, cwd=tmp_path)
    assert done.returncode == 2
    assert "is a pipe; name an ordinary file" in done.stderr


def test_bad_settings_leave_nothing_behind_and_need_no_utf8(tmp_path):
    done = lplr("mnist", "--epochs", "0", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    done = lplr("mnist", "--data", "/no/λ", "--out", "out", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert r"/no/\u03bb" in done.stderr
    assert not list(tmp_path.iterdir())


MEASURE = """
import resource, sys
from lplr_jax import data, records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    {call}
except ValueError as error:
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024, error)
"""


@pytest.mark.parametrize(
    ("write", "call"),
    [
        (
            lambda p: idx_pair(p / "d", b"\0\0\x08\x03\xff\xff\xff\xff\0\0\0\x1c\0\0\0\x1c"),
            "data.load('mnist', data_dir={!r})",
        ),
        (
            lambda p: idx_pair(p / "d", b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c"),
            "data.load('mnist', data_dir={!r})",
        ),
        (lambda p: gz_bomb(idx_pair(p / "d", suffix=".gz")), "data.load('mnist', data_dir={!r})"),
        (lambda p: sparse(p / "data_batch_1.bin", 3073 * 350_000_000), "data.load('cifar10', data_dir={!r})"),
        (lambda p: pack(p / "r.npz", members_of(loss=npy(np.zeros(7), shape=(10**15,)))), "records.load({!r})"),
        (lambda p: big(p / "r.npz", 2**31), "records.load({!r})"),
        (lambda p: bomb(p / "r.npz", real=512 * MIB, declared=56), "records.load({!r})"),
    ],
    ids=[
        "IDX of 4 billion",
        "IDX of 60,000",
        "gz of 512 MiB",
        "batch of 1 TB",
        "npy of 8 PB",
        "zip of 2 GiB",
        "zip that lies",
    ],
)
def test_what_is_declared_costs_no_memory(tmp_path, write, call):
    program = MEASURE.format(call=call.format(str(write(tmp_path))))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    used, _, message = done.stdout.partition(" ")
    assert message, "accepted"
    # What is really in these files is 0.5 to 50 kB (gz and zip: up to 3 MB); reading in pieces of 1 MiB needs a few.
    assert int(used) < 16 * MIB, message
