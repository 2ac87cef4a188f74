"""Runs that are killed: the command line in a process of its own, shot from outside or at a chosen write."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from lplr_jax.experiments import mnist

TINY = mnist.MnistConfig(
    width=8,
    epochs=12,
    probe_every=3,
    n_train=40,
    learning_rate=2e-3,
    hessian_probes=3,
    spectrum_probes=2,
    search_steps=2,
)
"""A run of a second, with probes of every kind."""

# Audit events of everything that changes a directory: the places at which a kill can leave something half-done.
CHILD = """
import os, signal, sys

folder, target, argv = sys.argv[1], sys.argv[2], sys.argv[3:]
from lplr_jax import cli

writes, seen = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"), 0

def hook(event, args):
    global seen
    if event not in writes or folder not in str(args[0]) or (event == "open" and not (args[2] or 0) & os.O_CREAT):
        return
    seen += 1
    if target == str(seen) or (event == "os.rename" and str(args[1]) == target):
        os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(hook)
code = cli.main(argv)
print(f"writes: {seen}", file=sys.stderr)
sys.exit(code)
"""


def start(folder: Path, argv: list[str], *, kill_at: int | Path = -1) -> subprocess.Popen[str]:
    """Start the command line.

    Args:
        folder: whose writes are counted.
        argv: the command line.
        kill_at: the number of the write, or the name to which a file is moved, before which it shoots itself.
    """
    command = [sys.executable, "-c", CHILD, str(folder), str(kill_at), *argv]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, env={**os.environ, "JAX_PLATFORMS": "cpu"}, **pipes)


def run(folder: Path, argv: list[str], *, kill_at: int | Path = -1) -> tuple[int, str]:
    """Run the command line to its end, and return its code and all that it said."""
    process = start(folder, argv, kill_at=kill_at)
    said, _ = process.communicate()
    return process.returncode, said


def shoot_after(folder: Path, argv: list[str], seconds: float) -> int:
    """Start the command line, kill it after a time, and return its code: -9 unless it was done before."""
    process = start(folder, argv)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    return process.returncode


def seconds_of(folder: Path, argv: list[str]) -> float:
    """Return how long the command line takes when nobody disturbs it."""
    began = time.monotonic()
    code, said = run(folder, argv)
    assert code == 0, said
    return time.monotonic() - began
