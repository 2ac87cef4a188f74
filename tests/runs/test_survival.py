"""Runs survive: killed, interrupted, out of space, in use; and the record is that of a run in one go."""

import dataclasses
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from contextlib import nullcontext, suppress
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from matplotlib.figure import Figure

import survival
from lplr_jax import cli, plotting, records
from lplr_jax.experiments import mnist
from lplr_jax.files import HALF
from lplr_jax.reports import report, tables
from lplr_jax.runs import checkpoint, interrupt
from lplr_jax.runs import folder as run_folder
from lplr_jax.runs.checkpoint import Checkpoints
from lplr_jax.training import init_state
from survival import TINY

OPTIONS = ["mnist", *(f"--{name.replace('_', '-')}={value}" for name, value in dataclasses.asdict(TINY).items() if value
           is not None and name not in ("force", "data", "out"))]  # fmt: skip


def command(folder, *more):
    return [*OPTIONS, "--out", str(folder), *more]


@pytest.fixture(autouse=True)
def _signals_are_heeded():
    """A suite that runs in the background ignores SIGINT, and so would what it starts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def in_one_go():
    """The record of a run that nobody disturbed and that saved nothing on its way."""
    cli._use_compilation_cache()  # that of the killed processes, which would compile the same programs again
    return mnist.run(TINY)


def assert_same(folder, record):
    found = records.load(folder)
    for name, array in record.arrays.items():
        assert found[name].tobytes() == array.tobytes(), name
    assert found.checksum() == record.checksum()
    left = {path.name for path in folder.iterdir()}
    whole = {"record.npz", "config.json", "report.html", "probes", "figures"}
    assert left == whole, "nothing half-written, no checkpoint, no lock"
    assert not list(folder.rglob(f"*{HALF}*"))


@pytest.mark.slow
def test_three_kills_and_the_record_is_that_of_one_go(tmp_path, in_one_go):
    """Killed within a probe's file, at the rename of a checkpoint, and at the rename of the record."""
    folder = tmp_path / "run"
    reached = []
    for target in ("checkpoint/memory/epoch_00000003.npz", "checkpoint/epoch_00000006", "record.npz"):
        code, said = survival.run(folder, command(folder), kill_at=folder / target)
        assert code == -signal.SIGKILL, said
        reached.append(re.findall(r"goes on from epoch (\d+)", said))
        assert not (folder / "record.npz").exists()
    assert reached == [[], ["0"], ["3"]]
    assert cli.main(command(folder)) == 0
    assert_same(folder, in_one_go)
    assert records.load(folder).provenance["resumed_at"] == [0, 3, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_signal_saves_first_and_says_how_to_go_on(number, tmp_path, in_one_go, monkeypatch, capsys):
    def chunk(self, epoch, loss):
        if epoch == 6:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patched:
        patched.setattr(report._Plain, "chunk", chunk)
        assert cli.main(command(tmp_path / "run")) == cli.INTERRUPTED == 130
    said = " ".join(capsys.readouterr().err.split())
    assert said == "lplr: interrupted; epoch 6 of 12 is saved; the same command goes on from there"
    assert cli.main(command(tmp_path / "run")) == 0
    assert "goes on from epoch 6 of 12" in capsys.readouterr().out
    assert_same(tmp_path / "run", in_one_go)


def twice_while_deferred():
    with interrupt.deferred("everything"):
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the second signal waited")


def test_a_second_signal_does_not_wait():
    with interrupt.handled():
        with pytest.raises(interrupt.Interrupted, match="epoch 5 is saved"), interrupt.deferred("epoch 5 is saved"):
            os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(interrupt.Interrupted, match="interrupted by SIGINT"):
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(interrupt.Interrupted, match="by SIGTERM"):
            twice_while_deferred()
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, "the third one kills"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_finished_run_is_shown_and_another_config_is_refused(tmp_path, in_one_go, capsys):
    folder = tmp_path / "run"
    in_one_go.save(folder / "record.npz")
    before = (folder / "record.npz").read_bytes()
    assert cli.main(command(folder)) == 0
    assert "record.npz is there, made with this config; --force makes it anew" in capsys.readouterr().out
    assert (folder / "figures" / "mnist.png").exists()
    assert (folder / "record.npz").read_bytes() == before
    assert cli.main(command(folder, "--width", "9", "--seed", "3")) == cli.BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert "run holds the run of another config: " in said
    assert "width 8 there, 9 asked for" in said
    assert "seed 0 there, 3 asked for" in said
    assert "--out" in said
    assert "--force" in said
    assert cli.main(["boundary", "--out", str(folder)]) == cli.BAD_INPUT
    assert "experiment mnist there, boundary asked for" in capsys.readouterr().err
    (folder / "notes.txt").write_text("mine")
    assert cli.main(command(folder, "--epochs", "3", "--force")) == 0
    aside = tmp_path / "run.old-1"
    assert f"kept {aside}" in " ".join(capsys.readouterr().out.split())
    assert records.load(folder)["epoch"].size == 4
    assert (aside / "record.npz").read_bytes() == before
    assert (aside / "notes.txt").read_text() == "mine"


def test_an_unfinished_run_of_another_config_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(report._Plain, "chunk", lambda self, epoch, loss: os.kill(os.getpid(), signal.SIGINT))
    assert cli.main(command(tmp_path / "run")) == cli.INTERRUPTED
    assert cli.main(command(tmp_path / "run", "--learning-rate", "1e-3")) == cli.BAD_INPUT
    assert "learning_rate 0.002 there, 0.001 asked for" in " ".join(capsys.readouterr().err.split())
    assert (tmp_path / "run" / "checkpoint" / "epoch_00000000").exists()


def interrupted_at(epoch, folder, monkeypatch, *more):
    """Leave a run with the checkpoint of an epoch."""

    def chunk(self, at, loss):
        if at == epoch:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patched:
        patched.setattr(report._Plain, "chunk", chunk)
        assert cli.main(command(folder, *more)) == cli.INTERRUPTED


def test_no_run_goes_on_from_what_is_not_its_own(tmp_path, monkeypatch, capsys, in_one_go):
    """Config gone, another run's checkpoint in its place, one bit of the manifest: one line, and no record."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    interrupted_at(6, ours, monkeypatch)
    interrupted_at(6, theirs, monkeypatch, "--learning-rate", "1e-3")
    capsys.readouterr()
    (theirs / "config.json").unlink()
    assert cli.main(command(theirs)) == cli.BAD_INPUT
    assert "epoch_00000006 is of a run of another config: it is not taken." in said_in_one_line(capsys)
    (ours / "checkpoint").rename(tmp_path / "spare")
    shutil.copytree(theirs / "checkpoint", ours / "checkpoint")
    assert cli.main(command(ours)) == cli.BAD_INPUT
    assert "is of a run of another config" in said_in_one_line(capsys)
    shutil.rmtree(ours / "checkpoint")
    shutil.copytree(tmp_path / "spare", ours / "checkpoint")
    manifest = ours / "checkpoint" / "epoch_00000006" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"epoch":6', '"epoch":4'))
    assert cli.main(command(ours)) == cli.IO_FAILED
    assert "the manifest does not match its own digest" in said_in_one_line(capsys)
    for folder in (ours, theirs):
        assert not (folder / "record.npz").exists()
    shutil.rmtree(ours / "checkpoint")
    (tmp_path / "spare").rename(ours / "checkpoint")
    (ours / "config.json").unlink()
    assert cli.main(command(ours)) == 0, "its own, with the same config asked for"
    assert "goes on from epoch 6 of 12" in capsys.readouterr().out
    assert_same(ours, in_one_go)


def test_a_full_standard_output_is_no_full_disk(tmp_path, in_one_go):
    in_one_go.save(tmp_path / "record.npz")
    with Path("/dev/full").open("w") as full:
        process = [sys.executable, "-m", "lplr_jax.cli", "verify", str(tmp_path)]
        done = subprocess.run(process, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == cli.IO_FAILED
    expected = "lplr: standard output cannot be written to (No space left on device); send it elsewhere"
    assert " ".join(done.stderr.split()) == expected


def take_and_release(folder):
    lock = run_folder.Lock(folder)
    lock.acquire()
    assert json.loads((folder / ".lock").read_text())["pid"] == os.getpid()
    lock.release()
    assert not (folder / ".lock").exists()


def test_one_writer(tmp_path, capsys, in_one_go):
    folder = tmp_path / "run"
    lock = run_folder.Lock(folder)
    lock.acquire()
    # flock is between open files, so one process can stand for two.
    assert cli.main(command(folder)) == cli.IN_USE == 6
    said = " ".join(capsys.readouterr().err.split())
    assert re.search(
        rf"run is in use: process {os.getpid()} on {re.escape(socket.gethostname())} writes to it since 20", said
    )
    lock.check()
    lock.release()
    assert not list(folder.iterdir())
    child = (
        "import fcntl, os, sys, time; from pathlib import Path; from lplr_jax.runs.folder import Lock;"
        "Lock(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", child, str(folder)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(run_folder.DirectoryInUseError, match=f"process {holder.pid} on"):
            run_folder.Lock(folder).acquire()
        holder.kill()
    assert json.loads((folder / ".lock").read_text())["pid"] == holder.pid, "it died and left its lock"
    take_and_release(folder)
    (folder / ".lock").write_text(json.dumps({"pid": 1, "host": "another", "since": "2026-01-01T00:00:00+00:00"}))
    refusal = r"process 1 on another .* if it is gone for certain, delete"
    with pytest.raises(run_folder.DirectoryInUseError, match=refusal):
        run_folder.Lock(folder).acquire()
    (folder / ".lock").write_text('{"pid": 1, "ho')
    take_and_release(folder)


def test_a_lock_without_flock_goes_by_the_process(tmp_path, monkeypatch):
    def unsupported(handle, how):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for pid, free in ((dead.pid, True), (os.getppid(), False)):
        (tmp_path / ".lock").write_text(json.dumps({"pid": pid, "host": socket.gethostname()}))
        if free:
            take_and_release(tmp_path)
        else:
            with pytest.raises(run_folder.DirectoryInUseError, match=f"process {pid}"):
                run_folder.Lock(tmp_path).acquire()


def state_with_everything():
    params = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.zeros((0,)), "h": jnp.ones(2, jnp.bfloat16)}
    optimizer = optax.sgd(optax.cosine_decay_schedule(0.1, 10), momentum=0.9)
    return {"train": init_state(params, optimizer), "key": jax.random.key(3), "steps": np.asarray(7)}


def test_a_checkpoint_gives_back_every_byte(tmp_path):
    state = state_with_everything()
    odd = np.array([np.nan, -0.0, np.inf, 5e-324])
    odd[:1].view(np.uint64)[0] |= 0x123  # a NaN with a payload
    store = Checkpoints(tmp_path / "c")
    assert store.latest(state) is None
    for epoch in (0, 5):
        kernel = np.asfortranarray(np.random.default_rng(epoch).standard_normal((3, 3)))
        store.save(
            epoch, state, {"odd": odd, "none": np.zeros((0, 2))}, remembered={"kernel": kernel}, facts={"a": [1]}
        )
    other = jax.tree.map(
        lambda leaf: (
            leaf
            if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else (0 * leaf if isinstance(leaf, jax.Array) else np.zeros_like(leaf))
        ),
        state,
    )
    saved = Checkpoints(tmp_path / "c").latest(other)
    assert (saved.epoch, saved.facts, sorted(saved.memory)) == (5, {"a": [1]}, [0, 5])
    assert saved.arrays["odd"].tobytes() == odd.tobytes()
    assert saved.arrays["none"].shape == (0, 2)
    assert saved.memory[5]["kernel"].flags.f_contiguous
    assert saved.memory[5]["kernel"].tobytes() == kernel.tobytes()
    assert jax.tree.structure(saved.state) == jax.tree.structure(state)
    assert jax.random.uniform(saved.state["key"]) == jax.random.uniform(state["key"])
    for there, here in zip(jax.tree.leaves(saved.state), jax.tree.leaves(state), strict=True):
        assert (there.dtype, there.shape, type(there)) == (here.dtype, here.shape, type(here))
        if not jnp.issubdtype(here.dtype, jax.dtypes.prng_key):
            assert np.asarray(there).tobytes() == np.asarray(here).tobytes()
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["epoch_00000005", "memory"]
    with pytest.raises(OSError, match="this run has"):
        Checkpoints(tmp_path / "c").latest({**state, "more": jnp.ones(1)})


def test_a_damaged_checkpoint_is_not_taken(tmp_path, caplog):
    state = {"w": jnp.arange(3.0)}
    store = Checkpoints(tmp_path / "c")
    store.save(0, state, {}, remembered={"kernel": np.eye(9)})
    shutil.copytree(tmp_path / "c" / "epoch_00000000", tmp_path / "spare")
    store.save(1, {"w": jnp.arange(3.0) + 1}, {}, remembered={"kernel": np.eye(9)})
    shutil.copytree(tmp_path / "spare", tmp_path / "c" / "epoch_00000000")
    broken = tmp_path / "c" / "memory" / "epoch_00000001.npz"
    content = bytearray(broken.read_bytes())
    content[300] ^= 1
    broken.write_bytes(content)
    assert Checkpoints(tmp_path / "c").latest(state).epoch == 0, "the one before it"
    assert "epoch_00000001" in caplog.text
    (tmp_path / "c" / "epoch_00000000" / "manifest.json").write_text("{")
    with pytest.raises(OSError, match=r"no checkpoint can be read .* --force"):
        Checkpoints(tmp_path / "c").latest(state)


def mount(*arguments):
    return subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)


@pytest.fixture
def disk(tmp_path):
    """A file system of its own, with room for two checkpoints and not for the run."""
    target = tmp_path / "disk"
    target.mkdir()
    mounted = mount("-t", "tmpfs", "-o", "size=400k", "tmpfs", target)
    if mounted.returncode:
        pytest.skip(f"needs the right to mount a tmpfs: {mounted.stderr.decode().strip()}")
    yield target
    subprocess.run(["umount", "--lazy", str(target)], check=True)


def said_in_one_line(capsys):
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.slow
@pytest.mark.parametrize("foreseen", [True, False])
def test_a_full_disk_ends_in_one_line_and_the_run_goes_on_after_room_is_made(
    disk, in_one_go, capsys, monkeypatch, foreseen
):
    folder = disk / "run"
    with monkeypatch.context() as patched:
        if not foreseen:  # somebody else fills the disk while it is written
            patched.setattr(checkpoint, "_check_room", lambda *_: None)
        assert cli.main(command(folder)) == cli.IO_FAILED == 5
    said = said_in_one_line(capsys)
    assert re.search(rf"{folder}/\S+ cannot be written \(No space left on device.*\); make room", said)
    assert "make room: what was saved before is intact, and the same command goes on from there" in said
    assert not (folder / "record.npz").exists()
    assert not list(folder.rglob(f"*{HALF}*"))
    (saved,) = (folder / "checkpoint").glob("epoch_*")
    assert mount("-o", "remount,size=40m", disk).returncode == 0
    assert cli.main(command(folder)) == 0
    assert f"goes on from epoch {int(saved.name.removeprefix('epoch_'))} of 12" in capsys.readouterr().out
    assert_same(folder, in_one_go)


def test_a_directory_that_becomes_read_only(disk, in_one_go, capsys, monkeypatch):
    folder = disk / "run"
    assert mount("-o", "remount,size=40m", disk).returncode == 0
    interrupted_at(6, folder, monkeypatch)
    capsys.readouterr()
    assert mount("-o", "remount,ro", disk).returncode == 0
    assert cli.main(command(folder)) == cli.IO_FAILED
    assert "Read-only file system" in said_in_one_line(capsys)
    assert mount("-o", "remount,rw", disk).returncode == 0
    assert cli.main(command(folder)) == 0
    assert "goes on from epoch 6 of 12" in capsys.readouterr().out
    assert_same(folder, in_one_go)


def test_a_directory_that_vanishes(tmp_path, capsys, monkeypatch, in_one_go):
    folder = tmp_path / "run"

    def chunk(self, epoch, loss):
        if epoch == 6:
            folder.rename(tmp_path / "elsewhere")

    with monkeypatch.context() as patched:
        patched.setattr(report._Plain, "chunk", chunk)
        assert cli.main(command(folder)) == cli.IO_FAILED
    assert "the directory was removed or replaced while the run wrote to it" in said_in_one_line(capsys)
    assert not (folder / "record.npz").exists()
    shutil.rmtree(folder, ignore_errors=True)
    (tmp_path / "elsewhere").rename(folder)
    assert cli.main(command(folder)) == 0
    assert "goes on from epoch 3 of 12" in capsys.readouterr().out
    assert_same(folder, in_one_go)


def test_whatever_does_not_fit_leaves_nothing_torn(disk, in_one_go):
    """Record, figure and table on a disk with a little more room each time: whole, or not there."""
    writers = {
        "record.npz": lambda target: in_one_go.save(target),
        "figure.png": lambda target: plotting.save(drawn(), target),
        "table.md": lambda target: tables.save(long, target.with_suffix("")),
    }
    quantity = tables.Quantity("a", "a", "a", "a " * 30_000)
    long = tables.Table("t", ("one",), (quantity,), {"a": [1]})

    def drawn():
        figure = Figure(figsize=(2, 2))
        figure.subplots().plot(np.random.default_rng(0).standard_normal(3000))
        return figure

    whole = {}
    for room in (1000, 4, 20, 40):
        assert mount("-o", f"remount,size={room}k", disk).returncode == 0
        for name, write in writers.items():
            with nullcontext() if room == 1000 else suppress(OSError):
                write(disk / name)
            for path in disk.iterdir():
                assert whole.setdefault(path.name, path.read_bytes()) == path.read_bytes(), "whole, or not there"
                path.unlink()
    assert sorted(whole) == ["figure.pdf", "figure.png", "record.npz", "table.csv", "table.md", "table.tex"]


def test_a_relative_folder_is_taken(tmp_path, monkeypatch, in_one_go):
    monkeypatch.chdir(tmp_path)
    assert cli.main(command(Path("run"))) == 0
    assert_same(tmp_path / "run", in_one_go)
