"""Bad input at the real command line, and what it costs: no waiting, no traceback, no memory."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from bad_files import MIB, big, bomb, gz_bomb, idx_pair, members_of, npy, pack, put, sparse

from lplr_jax import cli

ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}


def lplr(*arguments, cwd, **environment):
    command = [sys.executable, "-m", "lplr_jax.cli", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env={**ENVIRONMENT, **environment}, timeout=120, check=False
    )


def test_a_bad_record_ends_with_one_line_and_debug_shows_where(tmp_path, capsys):
    path = put(tmp_path, b"no record")
    done = lplr("verify", path, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith(f"lplr: {path} is no readable record")
    assert len(done.stderr.splitlines()) == 1
    assert not done.stdout
    assert cli.main(["verify", str(path), "--debug"]) == 2
    assert "Traceback" in (shown := capsys.readouterr().err)
    assert "BadZipFile" in shown


def test_bad_settings_leave_nothing_behind_and_need_no_utf8(tmp_path):
    done = lplr("mnist", "--epochs", "0", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    done = lplr("mnist", "--data", "/no/λ", "--out", "out", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert done.returncode == 2
    assert r"/no/\u03bb" in done.stderr
    assert not list(tmp_path.iterdir())


MEASURE = """
import pathlib, re, sys
import numpy as np
from lplr_jax import data, records

def read(what):
    return int(re.search(what + r":\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]) * 1024

for call in ["np.ones(2**23)", *sys.argv[1:]]:
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak is that of what follows
    before, said = read("VmRSS"), ""
    try:
        eval(call)
    except ValueError as error:
        said = str(error)
    print(read("VmHWM") - before, said or "accepted")
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peaks are read from Linux")
def test_what_is_declared_costs_no_memory(tmp_path):
    """Growth of the resident memory of a process of its own, one file after another."""
    files = {
        "IDX of 4 billion": idx_pair(tmp_path / "a", b"\0\0\x08\x03\xff\xff\xff\xff\0\0\0\x1c\0\0\0\x1c"),
        "IDX of 60,000": idx_pair(tmp_path / "b", b"\0\0\x08\x03\0\0\xea\x60\0\0\0\x1c\0\0\0\x1c"),
        "gz of 512 MiB": gz_bomb(idx_pair(tmp_path / "c", suffix=".gz"), 512 * MIB),
        "batch of 1 TB": sparse(tmp_path / "data_batch_1.bin", 3073 * 350_000_000),
        "npy of 8 PB": pack(tmp_path / "1.npz", members_of(loss=npy(np.zeros(7), shape=(10**15,)))),
        "zip of 2 GiB": big(tmp_path / "2.npz", 2**31),
        "zip that lies": bomb(tmp_path / "3.npz", real=512 * MIB, declared=56),
    }
    readers = {"IDX": "data.load('mnist', data_dir={!r})", "gz": "data.load('mnist', data_dir={!r})"}
    readers |= {"batch": "data.load('cifar10', data_dir={!r})"}
    calls = [readers.get(name.split()[0], "records.load({!r})").format(str(path)) for name, path in files.items()]
    command = [sys.executable, "-c", MEASURE, *calls]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    control, *lines = done.stdout.splitlines()
    assert int(control.split()[0]) > 60 * MIB, "an array of 64 MiB must show"
    assert len(lines) == len(files)
    for name, line in zip(files, lines, strict=True):
        # What is really in these files is 0.5 kB to 3 MB; reading in pieces of 1 MiB needs a few.
        grown, said = line.split(maxsplit=1)
        assert said != "accepted", name
        assert int(grown) < 16 * MIB, f"{name}: {line}"
