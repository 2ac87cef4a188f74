"""One of two processes that share a kernel: `python two_processes.py ADDRESS PROCESS FOLDER MODE`."""

import json
import os
import signal
import sys
from dataclasses import asdict

import jax
import numpy as np
from jax.sharding import NamedSharding

from lplr_jax import diagnostics
from lplr_jax.diagnostics import processes
from lplr_jax.ntk import engine, parts

RNG = np.random.default_rng(0)
N = 37  # eight devices do not divide it: the last of them has three samples of five
PARAMS = [RNG.standard_normal(s) / np.sqrt(s[0]) for s in ((6, 64), (64,), (64, 2))]
X = RNG.standard_normal((N, 6))


def model(params, x):
    return jax.numpy.tanh(x @ params[0] + params[1][None]) @ params[2]


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def main(address, process, folder, mode):
    """Do as the mode says, and print what came of it as JSON."""
    me = int(process)
    jax.distributed.initialize(address, num_processes=2, process_id=me, heartbeat_timeout_seconds=10)
    if mode == "kernel dies" and me == 1:
        engine.strips = die
    if mode == "certificate dies" and me == 0:
        processes._certify = die
    if mode == "cannot write" and me == 1:

        def refused(*_):
            raise PermissionError(13, "Permission denied")

        parts.say = refused
    if mode == "folders differ":
        parts.SEEN_SECONDS, folder = 1.0, f"{folder}-{me}"
    if mode == "writing fails" and me == 1:

        def full(places, process, strips):
            list(strips)
            raise OSError(28, "No space left on device")

        parts.write = full
    said = {}
    if mode == "agree":
        with jax.enable_x64(True):
            theta = engine.kernel(model, PARAMS, X[:36])
            assert isinstance(theta.sharding, NamedSharding)
            said["held"] = [[s.index[0].start or 0, *s.data.shape] for s in theta.addressable_shards]
        shapes, original = [], parts.write

        def write(places, process, strips):
            strips = list(strips)
            shapes.extend([start, *rows.shape] for start, rows in strips)
            original(places, process, strips)

        parts.write = write
        try:
            diagnostics.distributed_ntk_min_eig(model, [PARAMS[0] + me, *PARAMS[1:]], X, folder)
        except ValueError as error:
            said["refused"] = str(error)
        found = diagnostics.distributed_ntk_min_eig(model, PARAMS, X, folder, keep=True)
        said |= {"devices": [jax.device_count(), jax.local_device_count()], "rows": shapes, "found": asdict(found)}
    else:
        try:
            diagnostics.distributed_ntk_min_eig(model, PARAMS, X, folder)
        except Exception as error:
            said["raised"] = f"{type(error).__name__}: {error}"
            print(json.dumps(said), flush=True)
            raise
    print(json.dumps(said), flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    main(*sys.argv[1:])
