"""Arms of a sweep one by one, for schedulers, or several at a time in processes of this machine."""

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import jax

from lplr_jax import checks
from lplr_jax.experiments import cluster
from lplr_jax.experiments.parts import DECIDES_NOTHING, Part
from lplr_jax.reports.exit_codes import DIVERGED, INCONSISTENT, OK, of_process
from lplr_jax.runs.session import Say

NONE = "none"
"""As an arm: what is shared is prepared, and no arm runs."""
_PAUSE_SECONDS = 0.05
_THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class ArmsPart(Part):
    """Which arms of a sweep run, and where."""

    arm: str | None = field(default=None, metadata=DECIDES_NOTHING)
    """Run this arm alone, by name or number; "none" writes the predictions. The table comes with the whole sweep."""
    list_arms: bool = field(default=False, metadata=DECIDES_NOTHING)
    """Print the names of the arms as JSON, and run nothing."""
    jobs: int = field(default=1, metadata=DECIDES_NOTHING)
    """Arms that run at a time, each in a process with its share of the processors (one GPU each where there are)."""
    cluster: Literal["here", "slurm", "local"] = field(default="here", metadata=DECIDES_NOTHING)
    """Where arms run: in processes of this machine, as jobs of Slurm (needs the package submitit; --jobs is then how
    many at most, 1 as many as it lets), or as jobs that submitit runs on this machine."""
    job_options: str = field(default="", metadata=DECIDES_NOTHING)
    """What the jobs ask for, as submitit calls it: timeout_min=240,slurm_partition=gpu,gpus_per_node=1."""

    def check(self) -> None:
        """Raise ValueError for the first field whose value cannot be run."""
        super().check()
        checks.whole("jobs", self.jobs, least=1)
        checks.one_of("cluster", self.cluster, cluster.CLUSTERS)
        cluster.options_of(self.job_options)
        if self.job_options and self.cluster == "here":
            raise ValueError("job_options are for --cluster slurm or local; leave one of them out")

    @property
    def elsewhere(self) -> bool:
        """Whether arms run in other processes."""
        return self.jobs > 1 or self.cluster != "here"

    def check_jobs(self) -> None:
        """Raise ValueError or ImportError where the jobs of a cluster cannot be."""
        if self.cluster != "here":
            cluster.check_jobs(self.cluster, self.job_options)

    def run_arms(self, argv: Sequence[str], names: Sequence[str], folder: Path, *, say: Say) -> int:
        """Run all arms in other processes, and return the worst exit code."""
        if self.cluster == "here":
            return run_jobs(argv, names, jobs=self.jobs, say=say)
        return cluster.run_jobs(
            argv,
            names,
            cluster=self.cluster,
            folder=folder / "jobs",
            options=self.job_options,
            at_a_time=self.jobs,
            say=say,
        )

    def takes(self, name: str) -> bool:
        """Return whether an arm is to run."""
        return self.arm is None or name == self.arm


def resolve(arm: str, names: Sequence[str]) -> str:
    """Return the name of an arm that is given by name or number.

    Raises:
        ValueError: for one that there is not.
    """
    if arm in (*names, NONE):
        return arm
    if arm.isdecimal() and int(arm) < len(names):
        return names[int(arm)]
    raise ValueError(f"arm must be 0 to {len(names) - 1} or one of {', '.join(names)}, got {checks.shown(arm)}")


def run_jobs(argv: Sequence[str], names: Sequence[str], *, jobs: int, say: Say) -> int:
    """Run arms by `python -m lplr_jax ... --arm NAME`, some at a time, and return the worst exit code.

    Every process has an equal share of the processors, from its start on. An interrupt is passed on to all of them.
    """
    checks.whole("jobs", jobs, least=1)
    waiting, running, worst = list(names), {}, OK
    told = [argument for argument in argv if argument != "--force"]  # what was there is aside by now
    shares = _shares(jobs)
    try:
        while waiting or running:
            for slot in [slot for slot, (_, process) in running.items() if process.poll() is not None]:
                name, process = running.pop(slot)
                say(f"{name}: {'done' if process.returncode == OK else f'ended with exit code {process.returncode}'}")
                if process.returncode not in (OK, DIVERGED, INCONSISTENT):  # those two are told by the whole sweep
                    worst = max(worst, of_process(process.returncode))
            for slot in range(jobs):
                if waiting and slot not in running:
                    name = waiting.pop(0)
                    command = [sys.executable, "-m", "lplr_jax", *told, "--jobs", "1", "--arm", name]
                    running[slot] = name, _start(command, shares[slot], slot, jobs)
            time.sleep(_PAUSE_SECONDS)
    finally:
        for _, process in running.values():
            process.terminate()  # which saves a checkpoint
        for _, process in running.values():
            process.wait()
    return worst


def _shares(jobs: int) -> list[set[int]]:
    """Return the processors of each job: disjoint where there are enough."""
    mine = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    size = max(1, len(mine) // jobs)
    return [{mine[(slot * size + i) % len(mine)] for i in range(size)} for slot in range(jobs)]


def _environment(share: set[int], slot: int) -> Mapping[str, str]:
    found = dict(os.environ) | dict.fromkeys(_THREADS, str(len(share)))
    if jax.default_backend() == "gpu" and "CUDA_VISIBLE_DEVICES" not in os.environ:
        found["CUDA_VISIBLE_DEVICES"] = str(slot % jax.local_device_count())
    return found


def _start(command: Sequence[str], share: set[int], slot: int, jobs: int) -> subprocess.Popen[bytes]:
    """Start a process on its share of the processors; it inherits what this thread is held to."""
    environment = _environment(share, slot)
    with contextlib.ExitStack() as stack:
        if hasattr(os, "sched_setaffinity") and jobs > 1:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, share)
        return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
