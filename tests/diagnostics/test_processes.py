"""One kernel by two real processes of four simulated devices each, joined by jax.distributed."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import two_processes
from two_processes import PARAMS, N, X, model

from lplr_jax import diagnostics, linalg, ntk
from lplr_jax.diagnostics import processes
from lplr_jax.ntk import parts
from lplr_jax.proofs.assembly import assembly_bound

ROWS = 2 * N


def start(folder, mode):
    """Start both processes; what they say goes to files, which never block them."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    started = []
    for i in range(2):
        command = [sys.executable, two_processes.__file__, address, str(i), str(folder / "parts"), mode]
        with (folder / f"{i}.out").open("w") as out, (folder / f"{i}.err").open("w") as err:
            started.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
    return started


def ended(started, seconds):
    """Wait for both."""
    try:
        for process in started:
            process.wait(timeout=seconds)
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [process.returncode for process in started]


def said(folder, process):
    return json.loads((folder / f"{process}.out").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def agreed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    codes = ended(start(folder, "agree"), 120)
    assert codes == [0, 0], (folder / "0.err").read_text()[-3000:] + (folder / "1.err").read_text()[-3000:]
    return folder, said(folder, 0), said(folder, 1)


def packed_on_disk(folder):
    (result,) = (folder / "parts").glob("*-result.json")
    places = parts.Places(folder / "parts", result.name.partition("-")[0], 2)
    written = parts.gather(places, ROWS)
    return written, linalg.Blocks(ROWS, parts.blocks(places, written)).matrix()[:], places


def test_each_process_holds_its_rows(agreed):
    _, zero, one = agreed
    assert zero["devices"] == one["devices"] == [8, 4]
    # Five samples of two outputs a device; of the 74 rows the last device has four.
    assert zero["rows"] == [[0, 10, ROWS], [10, 10, ROWS], [20, 10, ROWS], [30, 10, ROWS]]
    assert one["rows"] == [[40, 10, ROWS], [50, 10, ROWS], [60, 10, ROWS], [70, 4, ROWS]]
    # The kernel itself is left sharded the same way, where the devices divide its rows.
    assert zero["held"] == [[9 * i, 9, 72] for i in range(4)]
    assert one["held"] == [[9 * i, 9, 72] for i in range(4, 8)]


def test_two_processes_agree_with_one(agreed):
    folder, zero, one = agreed
    _, theta, _ = packed_on_disk(folder)
    alone = np.asarray(ntk.empirical_ntk(model, PARAMS, X))
    bound = assembly_bound(model, PARAMS, X, alone)
    assert bound is not None
    # Each of the two is within the proved error of the exact kernel.
    allowed = bound.kernel_error(alone) + bound.kernel_error(theta)
    assert np.linalg.norm(theta - alone, 2) <= allowed
    assert allowed < 1e-9 * np.linalg.norm(alone, 2)
    assert zero["found"] == one["found"]
    single = diagnostics.empirical_ntk_min_eig(model, PARAMS, X, storage="packed")
    found = zero["found"]
    assert found["proved"]
    assert found["lower"] <= single.upper
    assert single.lower <= found["upper"]
    # Weyl: the least eigenvalues differ by no more than the kernels, and each value lies in its interval.
    widths = found["upper"] - found["lower"] + single.upper - single.lower
    assert abs(found["value"] - single.value) <= allowed + widths


def test_processes_with_other_arguments_are_refused(agreed):
    _, zero, one = agreed
    assert zero["refused"] == one["refused"]
    assert "of process 1 are not those of process 0" in zero["refused"]


def test_a_damaged_part_is_not_taken(agreed):
    folder, *_ = agreed
    written, _, places = packed_on_disk(folder)
    path = folder / "parts" / written[2].file
    whole = path.read_bytes()
    assert sum((folder / "parts" / part.file).stat().st_size for part in written) == 4 * ROWS * (ROWS + 1)
    for damaged in (whole[:-8], whole[:64] + b"\x01" + whole[65:]):
        path.write_bytes(damaged)
        with pytest.raises(OSError, match=r"rows-000020.f64 is not as it was written"):
            linalg.Blocks(ROWS, parts.blocks(places, written)).matrix()
    path.write_bytes(whole)
    with pytest.raises(RuntimeError, match="are not the 75 rows of the kernel"):
        parts.gather(places, ROWS + 1)


def test_one_process_does_all_of_it_and_leaves_no_rows(tmp_path):
    found = diagnostics.distributed_ntk_min_eig(model, PARAMS, X, tmp_path)
    assert found.proved
    assert [path.name.partition("-")[2] for path in sorted(tmp_path.iterdir())] == ["process-0.json", "result.json"]
    few = diagnostics.distributed_ntk_min_eig(model, [PARAMS[0][:, :1], PARAMS[1][:1], PARAMS[2][:1]], X, tmp_path)
    assert few.value == 0.0
    assert few.proved


def test_what_another_process_failed_of_is_told(tmp_path):
    places = parts.Places(tmp_path, "job", 2)
    parts.write(places, 0, [(0, np.eye(2))])
    parts.say(places.manifest(1), {"failed": "OSError: no room"})
    with pytest.raises(processes.ProcessLostError, match="process 1 failed: OSError: no room"):
        processes._certify(model, None, X, places, 2)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "left"), [("kernel dies", 0), ("certificate dies", 1)])
def test_a_process_that_is_killed_ends_the_other_within_a_minute(tmp_path, mode, left):
    started = start(tmp_path, mode)
    began = None
    try:
        while started[left].poll() is None:
            if began is None and started[1 - left].poll() is not None:
                began = time.monotonic()
            assert began is None or time.monotonic() - began < 60
            time.sleep(0.1)
    finally:
        codes = ended(started, 60)
    assert codes[1 - left] == -9
    assert codes[left] != 0
    told = (tmp_path / f"{left}.err").read_text()
    assert "another task died" in told or "of the 2 processes is gone" in told
    assert not list(Path(tmp_path / "parts").glob("*-result.json")) or left == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mode", "zero", "one"),
    [
        (
            "cannot write",
            "ProcessLostError: process 1 cannot write to",
            "PermissionError: [Errno 13] Permission denied",
        ),
        ("folders differ", "ValueError: process 0 does not see in", "ValueError: process 0 does not see in"),
    ],
)
def test_a_folder_that_is_not_one_for_all_is_told_at_once(tmp_path, mode, zero, one):
    """Such a process could say nothing of its failure, and the other would wait for its rows."""
    assert all(ended(start(tmp_path, mode), 90))
    assert said(tmp_path, 0)["raised"].startswith(zero)
    assert said(tmp_path, 1)["raised"].startswith(one)
    assert not list(tmp_path.glob("parts*/*"))


@pytest.mark.slow
def test_a_disk_that_is_full_is_told_in_both(tmp_path):
    codes = ended(start(tmp_path, "writing fails"), 90)
    assert all(codes)
    assert said(tmp_path, 1)["raised"].startswith("OSError: [Errno 28]")
    assert (
        said(tmp_path, 0)["raised"] == "ProcessLostError: process 1 failed: OSError: [Errno 28] No space left on device"
    )
