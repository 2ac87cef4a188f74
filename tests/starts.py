"""Many processes that start at once in one run folder: a script that prints what each of them came to, as JSON.

Its arguments: a folder to work in, the kind of starts, how many processes, how often each of them starts.
"""

import contextlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from lplr_jax.runs import folder as run_folder


class Fails(Exception):  # noqa: N818
    """A run that fails at its start."""


@contextlib.contextmanager
def alone(markers: Path, name: str, against: str) -> Iterator[None]:
    """Be the only one of a name, while nobody is there whose name matches a pattern."""
    handle = os.open(markers / name, os.O_CREAT | os.O_EXCL)
    os.close(handle)
    try:
        if others := [path.name for path in markers.glob(against)]:
            raise AssertionError(f"{name} beside {others}")
        yield
    finally:
        (markers / name).unlink()


def one(kind: str, root: Path, draw: random.Random) -> None:
    """Start one run as the kind says; its body lasts some milliseconds."""
    run, markers, force = root / "run", root / "markers", False
    config, name, against = {"width": 8}, "run", "arm-*"
    if kind == "force":
        force = draw.random() < 0.3
    if kind == "sweep" and draw.random() < 0.8:
        arm = draw.choice("abc")
        run, name, against = run / arm, f"arm-{arm}", "run"
    with run_folder.claimed(run, "test", config, force=force) as lock, alone(markers, name, against):
        lock.check()
        time.sleep(draw.uniform(0, 0.003))
        if kind == "force":
            (run / "record").touch()
        if draw.random() < 0.5:
            raise Fails


def child(kind: str, root: Path, times: int, seed: int, gate: int, answer: int) -> None:
    """Wait for the gate, start again and again, and send what came of it."""
    os.read(gate, 1)
    draw = random.Random(seed)
    for _ in range(times):
        time.sleep(draw.uniform(0, 0.05))
        try:
            one(kind, root, draw)
            said = ["done", ""]
        except Exception as error:
            said = [type(error).__name__, str(error)]
        os.write(answer, (json.dumps([os.getpid(), *said]) + "\n").encode())


def start(kind: str, root: Path, count: int, times: int) -> list[list[object]]:
    """Start processes at once, and return what each start came to: pid, kind of end, what was said."""
    (root / "markers").mkdir(exist_ok=True)
    if kind == "sweep":
        (root / "run").mkdir(exist_ok=True)
        run_folder.write_config(root / "run", "test", {"width": 8})
    gate, hold = os.pipe()
    source, answer = os.pipe()
    pids = []
    for index in range(count):
        pid = os.fork()
        if pid == 0:
            os.close(hold)
            signal.alarm(300)
            child(kind, root, times, index, gate, answer)
            os._exit(0)
        pids.append(pid)
    os.close(hold)
    os.close(answer)
    with os.fdopen(source) as lines:
        found = [json.loads(line) for line in lines]
    for pid in pids:
        os.waitpid(pid, 0)
    os.close(gate)
    return found


if __name__ == "__main__":
    work, what, processes, starts = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    ends = start(what, work, processes, starts)
    print(json.dumps({"ends": ends, "jax": "jax" in sys.modules, "left": sorted(p.name for p in work.rglob(".*"))}))
