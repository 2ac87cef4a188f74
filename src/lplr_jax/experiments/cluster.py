"""Arms of a sweep as jobs of a scheduler, through submitit: preempted ones save their state, and are queued again."""

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lplr_jax import checks
from lplr_jax.reports.exit_codes import DIVERGED, INCONSISTENT, INTERRUPTED, IO_FAILED, OK, of_process
from lplr_jax.runs.session import Say

CLUSTERS = ("here", "slurm", "local")
"""Where arms run: in processes of this machine, in Slurm's jobs, in jobs that submitit itself runs on this machine."""
MINUTES = 60
"""Minutes of a job, unless `timeout_min` says otherwise; a job that needs more is queued again. Calibrated."""
_GRACE_SECONDS = 60.0
_PAUSE_SECONDS = 0.05


class ArmJob:
    """One arm as a process of its own, called by submitit where the job runs.

    Args:
        command: the process, with its arguments.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self.command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        """Run it, and return its exit code."""
        # A scheduler sends the notice that is for submitit to all processes of a job. A signal that is blocked as a
        # process starts stays blocked in it, and one that comes meanwhile is not lost here.
        notice = {getattr(signal, f"SIG{os.environ.get('SUBMITIT_PREEMPT_SIGNAL', 'USR2')}")}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, notice)
        try:
            self._process = process = subprocess.Popen(self.command)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Not `wait`, whose lock would be held while `checkpoint` interrupts it.
        while (code := process.poll()) is None:
            time.sleep(_PAUSE_SECONDS)
        if code == INTERRUPTED:
            # A scheduler sends SIGTERM to all processes of a job, in either order with the notice that queues it again.
            time.sleep(_GRACE_SECONDS)
        return code

    def checkpoint(self) -> Any:
        """Have the process save its state and end, and return what goes on from there; submitit queues it again."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None and self._process.returncode is None:
            try:
                os.kill(self._process.pid, signal.SIGTERM)
                os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOWAIT)
            except (ProcessLookupError, ChildProcessError):  # it has ended by itself
                pass
        return DelayedSubmission(ArmJob(self.command))

    def __getstate__(self) -> dict[str, Any]:
        return {"command": self.command, "_process": None}


_ONE = ("nodes", "tasks_per_node", "ntasks_per_node", "ntasks")
_LISTS = ("setup", "srun_args")


def options_of(text: str) -> dict[str, Any]:
    """Read name=value pairs with commas; numbers and true or false become such, commands a list of one.

    Raises:
        ValueError: for anything else, and for jobs that no arm can be: of no time, or of several processes.

    Example:
        >>> options_of("timeout_min=30,slurm_partition=gpu")
        {'timeout_min': 30, 'slurm_partition': 'gpu'}
    """
    found: dict[str, Any] = {}
    for pair in filter(None, text.split(",")):
        name, equals, value = pair.strip().partition("=")
        if not (equals and name.isidentifier() and value):
            raise ValueError(
                f"job_options must be name=value with commas, as in timeout_min=30,slurm_partition=gpu, "
                f"got {checks.shown(pair)}"
            )
        found[name] = [value] if name.endswith(_LISTS) else _value(value)
        if name.removeprefix("slurm_") in _ONE and found[name] != 1:
            raise ValueError(f"job_options: {name} must be 1, got {value}: an arm is one process")
        if name == "timeout_min" and found[name] == 0:
            raise ValueError("job_options: timeout_min must be >= 1, got 0")
    return found


def _value(text: str) -> Any:
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    if re.fullmatch(r"\d+", text):
        return int(text)
    return float(text) if re.fullmatch(r"\d+\.\d+", text) else text


def run_jobs(
    argv: Sequence[str], names: Sequence[str], *, cluster: str, folder: Path, options: str, at_a_time: int, say: Say
) -> int:
    """Run arms as jobs of a scheduler, wait for all of them, and return the worst exit code.

    Args:
        argv: the command line of the sweep.
        names: of the arms.
        cluster: one of `CLUSTERS`, but not "here".
        folder: for submitit's files, on a disk that the jobs see.
        options: of the jobs, for `options_of`; names are those of submitit's `update_parameters`.
        at_a_time: at most so many jobs run; 1 for as many as the scheduler lets.
        say: told of jobs that start and end.

    Raises:
        ImportError: without submitit.
        ValueError: for options that submitit or the scheduler does not take.
    """
    settings = {"timeout_min": MINUTES, **options_of(options)}
    executor = _executor(cluster, folder, settings, at_a_time)
    told = [argument for argument in argv if argument != "--force"]  # what was there is aside by now
    command = [sys.executable, "-m", "lplr_jax", *told, "--cluster", "here", "--jobs", "1", "--arm"]
    size = at_a_time if cluster == "local" and at_a_time > 1 else len(names)
    worst = OK
    for start in range(0, len(names), size):
        wave = names[start : start + size]
        with executor.batch():
            jobs = [executor.submit(ArmJob([*command, name])) for name in wave]
        try:
            for name, job in zip(wave, jobs, strict=True):
                say(f"{name}: job {job.job_id}, its output in {job.paths.stdout}")
            for name, job in zip(wave, jobs, strict=True):
                code = _code_of(job)
                say(f"{name}: {'done' if code == OK else f'ended with exit code {code}'}")
                if code not in (OK, DIVERGED, INCONSISTENT):  # those two are told by the whole sweep
                    worst = max(worst, code)
        except KeyboardInterrupt:
            for job in jobs:
                job.cancel(check=False)  # which has them save their states
            raise
    return worst


def check_jobs(cluster: str, options: str) -> None:
    """Raise what `run_jobs` would for jobs that cannot be, before anything is computed or written."""
    with tempfile.TemporaryDirectory() as folder:
        _executor(cluster, Path(folder), {"timeout_min": MINUTES, **options_of(options)}, 1)


def _executor(cluster: str, folder: Path, settings: dict[str, Any], at_a_time: int) -> Any:
    try:
        import submitit
    except ImportError as error:
        raise ImportError(
            f"--cluster {cluster} needs the package submitit, which is not installed: pip install submitit "
            "(or the [slurm] extra), or leave it out and give --arm to a scheduler of your own"
        ) from error
    try:
        executor = submitit.AutoExecutor(folder=folder, cluster=cluster)
        if at_a_time > 1:
            settings = {"slurm_array_parallelism": at_a_time, **settings}
        executor.update_parameters(**settings)
    except (AssertionError, NameError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"submitit does not take these jobs: {error}") from error
    return executor


def _code_of(job: Any) -> int:
    """Wait for a job, and return the exit code of its arm; "input or output failed" where the job itself does."""
    from submitit.core.utils import FailedJobError, UncompletedJobError

    try:
        return of_process(int(job.result()))
    except (FailedJobError, UncompletedJobError):
        return IO_FAILED
