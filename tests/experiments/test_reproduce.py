"""The command that judges the paper's statements, and the search for its set-up: what is run, read, and written."""

import csv
import dataclasses
import json
import math

import numpy as np
import pytest

from builders import make
from lplr_jax import cli, diagnostics, statements
from lplr_jax.experiments import ablation, mnist, reproduce, search
from lplr_jax.experiments.search import Scored, SetUp
from lplr_jax.records import Record
from lplr_jax.reports import statements as written
from lplr_jax.statements import STATEMENTS, Finding


def record(width, *, seed=0, **config):
    return Record("mnist", make().arrays, {"width": width, "seed": seed, **config}, {})


def rows_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def scored(reproduced, *levels):
    outcomes = ["reproduced"] * reproduced + ["not reproduced"] * (4 - reproduced)
    return Scored(SetUp(levels), {str(k): Finding(outcome, "") for k, outcome in enumerate(outcomes)}, {}, 1.0)


def test_every_level_is_tried_alone_and_the_short_runs_first():
    set_ups = search.one_at_a_time()
    assert set_ups[0] == SetUp()
    assert set_ups[0].config(search.SHORT) == dataclasses.replace(search.SHORT, probe_every=60)
    levels = [one.levels for one in set_ups[1:]]
    assert sorted(map(str, levels)) == sorted(
        str(((factor, level),)) for factor, found in search.FACTORS.items() for level in found
    )
    costs = [one.config(search.SHORT).epochs * one.config(search.SHORT).n_train for one in set_ups[1:]]
    assert costs == sorted(costs)
    for one in set_ups:
        one.config(search.SHORT).check()


def test_pairs_are_of_the_best_levels_of_different_factors():
    done = [
        scored(1),
        scored(3, ("pixels", "normalised")),
        scored(2, ("pixels", "standardised")),
        scored(4, ("labels", "bits")),
        scored(2, ("place", 0.8)),
        scored(0, ("restore", 0.1)),
        scored(4, ("seeds", "1")),
    ]
    names = [one.name for one in search.best_pairs(done, 3)]
    assert names == ["labels=bits+pixels=normalised", "labels=bits+place=0.8", "pixels=normalised+place=0.8"]


def test_arms_are_taken_by_their_roles():
    arms = {"m16-seed1": record(16, seed=1), "m16-seed0": record(16), "m32-seed0": record(32), "m64-seed0": record(64)}
    arms["m64-smaller-seed0"] = smaller = record(64, learning_rate=0.1)
    runs = search.runs_of(arms, mnist_width=32)
    assert list(runs.narrow) == [16, 32]
    assert runs.widths[16] is arms["m16-seed0"]
    assert (runs.wide, runs.smaller, runs.mnist) == (arms["m64-seed0"], smaller, arms["m32-seed0"])


def test_a_set_up_without_a_step_size_is_told(tmp_path, monkeypatch):
    def none(*_, **__):
        raise ablation.NoStepSizeError("no η lies between the two")

    monkeypatch.setattr(ablation, "run", none)
    said = []
    found = search.run_one(SetUp(), tmp_path, base=search.SHORT, say=said.append, check=lambda: None)
    assert found.score == (0, 0)
    assert found.findings["narrow_loss"].numbers == "no η lies between the two"
    assert said[0].startswith("default: 0 of 0 statements")


def recording():
    """Names of the set-ups that were run, and what stands for running one."""
    ran = []

    def quick(set_up, folder, **_):
        (folder / set_up.name).mkdir(parents=True, exist_ok=True)
        ran.append(set_up.name)
        return dataclasses.replace(scored(2), set_up=set_up)

    return ran, quick


def test_the_time_of_a_search_ends_and_it_goes_on(tmp_path, monkeypatch):
    ran, quick = recording()
    monkeypatch.setattr(search, "run_one", quick)
    clock = iter(np.arange(0.0, 1000.0, 40.0))
    monkeypatch.setattr(search.time, "monotonic", lambda: next(clock))
    said = []
    settings = {"say": said.append, "factors": {"labels": ("bits",), "place": (0.8,)}, "pairs_of": 2}
    search.search(tmp_path, minutes=1.0, **settings)
    assert ran == ["default"]
    assert said == ["2 set-ups are left for want of time; the same command goes on with them"]
    monkeypatch.undo()
    monkeypatch.setattr(search, "run_one", quick)
    done = search.search(tmp_path, minutes=1.0, **settings)
    assert [one.set_up.name for one in done] == ["default", "labels=bits", "place=0.8", "labels=bits+place=0.8"]


@pytest.mark.slow  # compiles the kernels of two widths
def test_initial_eigenvalues_are_measured_once(tmp_path, monkeypatch):
    path = tmp_path / "starts.json"
    monkeypatch.setattr(reproduce, "SMOKE_WIDTHS", (8, 16))
    found = reproduce.initial_eigenvalues(path, (3,), smoke=True)
    assert {seed: list(widths) for seed, widths in found.items()} == {3: [8, 16]}
    problem = mnist.set_up(mnist.MnistConfig(width=16, seed=3, n_train=100))
    alone = diagnostics.empirical_ntk_min_eig(problem.apply_fn, problem.params, problem.x)
    assert alone.lower <= found[3][16] <= alone.upper
    monkeypatch.setattr(diagnostics, "empirical_ntk_min_eig", lambda *_: pytest.fail("measured again"))
    assert reproduce.initial_eigenvalues(path, (3,), smoke=True) == {3: found[3]}


def test_what_is_there_is_judged_and_the_page_is_written(tmp_path, monkeypatch, capsys):
    """Of nothing but records on disk; what is missing is not decided."""
    monkeypatch.setattr(reproduce, "initial_eigenvalues", lambda *_, **__: {})
    for arm in ("m16-seed0", "m32-seed0", "m32-smaller-seed0"):
        record(int(arm[1:3])).save(tmp_path / "runs" / "ablation" / arm / "record.npz")
    page = tmp_path / "page.md"
    page.write_text(f"{written.BEGIN}\n{written.END}\n")
    command = ["reproduce", "--runs", str(tmp_path / "runs"), "--no-run-missing", "--page", str(page)]
    assert cli.main(command) == cli.OK
    rows = {row["id"]: row for row in rows_of(tmp_path / "runs/reproduce/reproduction.csv")}
    assert list(rows) == [one.id for one in STATEMENTS]
    assert rows["lambda_positive"]["numbers"] == "no record of mnist"
    assert rows["narrow_loss"]["outcome"] == "reproduced"  # of one width alone
    assert rows["smaller_loss"]["outcome"] == "not reproduced"  # the two runs are the same
    assert written.counts(statements.judge(reproduce.gather(tmp_path / "runs"))) in page.read_text()
    assert "31 statements" in capsys.readouterr().out


def test_a_page_without_marks_is_refused_before_anything_runs(tmp_path, capsys):
    assert cli.main(["reproduce", "--runs", str(tmp_path), "--page", str(tmp_path / "none.md")]) == cli.BAD_INPUT
    assert "--page must be a file that holds" in " ".join(capsys.readouterr().err.split())


def test_the_packaged_search_is_read_where_there_is_none_of_ones_own(tmp_path):
    shares = reproduce._shares(tmp_path)
    assert set(shares) == {one.id for one in STATEMENTS}
    assert all(0 <= holds <= decided for holds, decided in shares.values())
    (tmp_path / reproduce.SEARCHED).write_text(written.searched_csv([]))
    assert set(reproduce._shares(tmp_path).values()) == {(0, 0)}


@pytest.mark.slow
def test_the_search_of_the_smoke_preset(tmp_path):
    command = ["reproduce", "--preset", "smoke", "--runs", str(tmp_path), "--search"]
    assert cli.main(command) == cli.OK
    folder = tmp_path / "reproduce-smoke"
    rows = rows_of(folder / reproduce.SEARCHED)
    names = ["default", "labels=bits", "output_init=zero", "labels=bits+output_init=zero"]
    assert [row["set_up"] for row in rows][:3] == names[:3]
    assert {row["set_up"] for row in rows[3:4]} <= {names[3], "output_init=zero+labels=bits"}
    assert sum(row["set_up"].startswith("λ_0 over 5 seeds") for row in rows) == 3
    assert all(math.isfinite(float(row["drift_wide"])) for row in rows[:4] if row["drift_wide"])


@pytest.mark.slow
def test_what_is_missing_is_run(tmp_path, capsys):
    command = ["reproduce", "--preset", "smoke", "--runs", str(tmp_path), "--seeds", "0,1,2,3,4"]
    assert cli.main(command) == cli.OK
    out = " ".join(capsys.readouterr().out.split())
    assert "cifar: left out" in out
    rows = {row["id"]: row for row in rows_of(tmp_path / "reproduce-smoke/reproduction.csv")}
    undecided = {id_ for id_, row in rows.items() if row["outcome"] == "cannot be decided"}
    assert undecided == {"seeds_gap", "seeds_end", "seeds_pl", "seeds_drift", "slope_cifar", "loss_250"}


def test_set_ups_of_the_search_are_arms(tmp_path, monkeypatch, capsys):
    """Listed, run by name or number with a mark of their own, and all of them before the pairs."""
    command = ["reproduce", "--preset", "smoke", "--runs", str(tmp_path), "--search"]
    assert cli.main([*command, "--list-arms"]) == cli.OK
    assert json.loads(capsys.readouterr().out) == ["default", "labels=bits", "output_init=zero"]
    ran, quick = recording()
    monkeypatch.setattr(search, "run_one", quick)
    for arm in ("1", "labels=bits+output_init=zero"):
        assert cli.main([*command, "--arm", arm]) == cli.OK
    assert ran == ["labels=bits", "labels=bits+output_init=zero"]
    assert all((tmp_path / "reproduce-smoke" / "search" / name / "done").exists() for name in ran)
    assert cli.main([*command, "--arm", "labels=none"]) == cli.BAD_INPUT
    assert cli.main([*command[:-1], "--arm", "1"]) == cli.BAD_INPUT
    said = " ".join(capsys.readouterr().err.split())
    assert "'labels=none' is no level of the search; there are labels=bits, output_init=zero" in said
    assert "--arm and --list-arms are for the set-ups of --search" in said


def test_set_ups_run_elsewhere_before_their_pairs(tmp_path, monkeypatch):
    asked = []

    def run(names):
        asked.append(list(names))
        for name in names:
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "done").touch()
        return 4 * (len(asked) == 1)

    monkeypatch.setattr(search, "run_one", lambda set_up, *_, **__: dataclasses.replace(scored(2), set_up=set_up))
    settings = {"factors": {"labels": ("bits",), "place": (0.8,)}, "pairs_of": 2}
    assert search.search_elsewhere(tmp_path, run, **settings) == 4
    assert asked == [["default", "labels=bits", "place=0.8"], ["labels=bits+place=0.8"]]
    assert search.search_elsewhere(tmp_path, run, **settings) == 0
    assert len(asked) == 2, "what is there is not run again"
