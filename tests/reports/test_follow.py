"""A run can be followed: progress with time left and verdict, JSON lines, scalars for TensorBoard."""

import json
import os
import re
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from lplr_jax import cli, records, theory
from lplr_jax.reports import follow, report

OPTIONS = ["mnist", "--width=8", "--epochs=12", "--probe-every=3", "--n-train=40", "--learning-rate=2e-3"]
OPTIONS += ["--hessian-probes=2", "--spectrum-probes=2", "--search-steps=0", "--hessian-precision=float32"]


@pytest.fixture(autouse=True)
def _signals_are_heeded():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def refuse(constant):
    pytest.fail(f"{constant} is no JSON")


def lines_of(path):
    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_a_log_that_an_interrupted_run_goes_on_with(tmp_path, monkeypatch, capsys):
    log, folder, seen = tmp_path / "deep" / "log.jsonl", tmp_path / "run", []

    def probe(self, epoch, values):
        seen.append(lines_of(log)[-1])
        if epoch == 6:
            os.kill(os.getpid(), signal.SIGINT)

    # A regime that begins beyond the first probes must not disturb the verdicts on them.
    argv = [*OPTIONS, "--regime-start=8", "--out", str(folder), "--log", str(log)]
    with monkeypatch.context() as patched:
        patched.setattr(follow._Logged, "probe", probe)
        assert cli.main(argv) == cli.INTERRUPTED
    assert [(line["event"], line["epoch"]) for line in seen] == [("verdict", epoch) for epoch in (0, 3, 6)], "at once"
    with log.open("a") as file:
        file.write('{"time": "2026-01-01T0')  # a process that was killed as it wrote
    assert cli.main(argv) == cli.OK
    lines = lines_of(log)
    told = [(line["event"], line.get("epoch")) for line in lines]
    first = [(event, epoch) for epoch in (0, 3, 6) for event in ("chunk", "verdict")]
    second = [(event, epoch) for epoch in (9, 12) for event in ("chunk", "verdict", "probe")]
    assert told == [*first, ("resume", 6), *second, ("verdict", None)]
    assert {line["run"] for line in lines} == {"mnist"}
    record = records.load(folder)
    assert lines[-1]["final"] is True
    assert lines[-1]["diverged_at"] is None
    assert lines[-1]["outcomes"] == {verdict.claim: verdict.outcome for verdict in theory.verify(record)}
    assert [line["loss"] for line in lines if line["event"] == "chunk"] == record["loss"][::3].tolist()
    (last,) = [line for line in lines if line["event"] == "probe" and line["epoch"] == 12]
    for name in ("ntk_min_eig", "ntk_shift", "sharpness"):
        assert last["values"][name] == record[name][-1]
    shown = capsys.readouterr().out
    assert re.search(r"epoch 9/12  loss [\d.]+  λ_min [\d.e-]+  \d+ s left  so far: refuted compatibility", shown)


def test_what_is_no_number_is_null_and_no_half_line_stays(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b'{"time": "a"}\n' + b'{"time": "' + b"x" * 200_000)
    log = follow.JsonLines(path)
    log.write("probe", "arm", values={"a": np.float64("nan"), "b": np.float32(0.5), "c": np.int64(3)}, list=[np.inf, 1])
    log.close()
    first, second = lines_of(path)
    assert first == {"time": "a"}
    assert second["values"] == {"a": None, "b": 0.5, "c": 3}
    assert second["list"] == [None, 1]
    # JSON that is no log would lose its last line, or all of it.
    for content in (b"x" * 10, b'{"name": "package"}', b"{}", b"[1]\n"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="a file of another kind"):
            follow.JsonLines(path)
        assert path.read_bytes() == content


def test_a_log_of_no_event_leaves_nothing(tmp_path):
    path = tmp_path / "new" / "folder" / "log"
    follow.JsonLines(path).close()
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_log_in_the_folder_of_the_run_starts_afresh_with_it(tmp_path):
    folder = tmp_path / "run"
    argv = [*OPTIONS, "--out", str(folder), "--log", str(folder / "log")]
    assert cli.main(argv) == cli.OK
    before = (folder / "log").read_bytes()
    assert cli.main([*argv, "--force"]) == cli.OK
    assert (tmp_path / "run.old-1" / "log").read_bytes() == before
    first, second = (
        [(line["event"], line.get("epoch")) for line in lines_of(path / "log")]
        for path in (tmp_path / "run.old-1", folder)
    )
    assert first == second


@pytest.mark.slow
def test_who_stops_reading_stops_no_run(tmp_path):
    def unread(*argv):
        reading, writing = os.pipe()
        os.close(reading)
        try:
            command = [sys.executable, "-m", "lplr_jax.cli", *argv]
            done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, check=False)
        finally:
            os.close(writing)
        return done.returncode, done.stderr

    folder = tmp_path / "run"
    assert unread(*OPTIONS, "--out", str(folder)) == (cli.OK, "")
    assert records.load(folder)["loss"].shape == (13,)
    assert unread("verify", str(folder)) == (cli.OK, "")
    assert unread("verify", str(folder), "--json", "--strict=compatibility") == (cli.UNMET, "")
    assert unread("verify", "--help") == (cli.OK, "")
    code, said = unread("verify", str(tmp_path / "missing"))
    assert code == cli.BAD_INPUT
    assert "missing" in said


def test_a_log_that_is_something_else_is_left_alone(tmp_path, capsys):
    path = tmp_path / "thesis.tex"
    path.write_text("\\documentclass{article}")
    assert cli.main([*OPTIONS, "--out", str(tmp_path / "run"), "--log", str(path)]) == cli.BAD_INPUT
    assert "thesis.tex is a file of another kind, which is left alone" in " ".join(capsys.readouterr().err.split())
    assert path.read_text() == "\\documentclass{article}"
    assert not (tmp_path / "run").exists()
    assert cli.main([*OPTIONS, "--out", str(tmp_path / "run"), "--log", str(tmp_path)]) == cli.BAD_INPUT
    assert "must be an ordinary file, not a link, folder" in capsys.readouterr().err


def test_a_bar_on_a_terminal():
    console = Console(force_terminal=True, width=160, record=True)
    with report.progress(console, 10) as bar:
        bar.resume(4)
        bar.chunk(6, 0.25)
        bar.standing(6, [theory.Verdict("weyl", "", "refuted"), theory.Verdict("lqcr", "", "undecided")])
        bar.probe(6, {"ntk_min_eig": 0.5})
    shown = console.export_text()
    assert "goes on from epoch 4" in shown
    assert re.search(r"6/10 .* loss 0.25  λ_min 0.5 .* left +refuted weyl; undecided lqcr", shown)
    wrong = [theory.Verdict("weyl", "", "refuted", inconsistent=True), theory.Verdict("lqcr", "", "undecided")]
    assert report.in_short(wrong) == "inconsistent weyl"
    assert report.in_short([theory.Verdict("weyl", "", "proved")]) == "all claims hold"


def test_tensorboard_that_is_not_installed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    assert cli.main([*OPTIONS, "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "tb")]) == cli.BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert "--tensorboard needs the package tensorboardX, which is not installed: pip install tensorboardX" in said
    assert not (tmp_path / "run").exists()


def scalars_of(folder, event):
    """Read event files as TensorBoard does: length, checksum, protocol buffer, checksum."""
    found = []
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            message = event.FromString(content[at + 12 : at + 12 + length])
            found += [(value.tag, message.step, value.simple_value) for value in message.summary.value]
            at += length + 16
    return found


def test_scalars_are_readable_while_the_run_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX", reason="the [tensorboard] extra is not installed")
    from tensorboardX.proto.event_pb2 import Event

    seen, write = [], follow._Scalars.probe

    def probe(self, epoch, values):
        write(self, epoch, values)
        seen.append({step for tag, step, _ in scalars_of(tmp_path / "tb" / "mnist", Event) if tag == "ntk_min_eig"})

    monkeypatch.setattr(follow._Scalars, "probe", probe)
    assert cli.main([*OPTIONS, "--out", str(tmp_path / "run"), "--tensorboard", str(tmp_path / "tb")]) == cli.OK
    assert seen == [set(range(0, last + 1, 3)) for last in (0, 3, 6, 9, 12)]
    record = records.load(tmp_path / "run")
    found = scalars_of(tmp_path / "tb", Event)
    for name, at in (("loss", record["epoch"]), ("ntk_min_eig", record["probe_epoch"])):
        values = dict(zip(at.tolist(), record[name], strict=True))
        for tag, step, value in found:
            if tag == name:
                assert value == np.float32(values[step])
