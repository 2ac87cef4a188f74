"""Verdicts as values: how they combine, and how the command and the tables show them."""

import json

import numpy as np
from controls import scaled, tampered

from lplr_jax import cli, theory
from lplr_jax.reports import report
from lplr_jax.theory.verdict import factor, weakest


def test_command(digits, tmp_path, capsys):
    good, bad = tmp_path / "good" / "record.npz", tmp_path / "bad" / "record.npz"
    digits.save(good)
    tampered(digits, probe_grad_sq_norm=scaled(1.01, 1)).save(bad)
    assert cli.main(["verify", str(good.parent)]) == cli.OK
    shown = capsys.readouterr().out
    for word in (*theory.CLAIMS, "refuted", "silent"):
        assert word in shown, word
    assert cli.main(["verify", str(good.parent), "--verbose"]) == cli.OK
    assert "R* =" in capsys.readouterr().out
    assert cli.main(["verify", str(good), "--strict", "weyl", "--strict", "ntk_positive"]) == cli.OK
    assert cli.main(["verify", str(good), "--strict", "weyl", "--strict", "compatibility"]) == cli.UNMET
    assert cli.main(["verify", str(bad), "--strict", "compatibility"]) == cli.INCONSISTENT
    capsys.readouterr()
    assert cli.main(["verify", str(bad), "--json"]) == cli.INCONSISTENT
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 3
    assert document["verdicts"][0]["outcome"] == "refuted"
    assert [v["claim"] for v in document["verdicts"]] == list(theory.CLAIMS)
    assert cli.main(["verify", str(tmp_path), "--json"]) == cli.INCONSISTENT, "the worst of the arms counts"
    arms = json.loads(capsys.readouterr().out)
    assert arms["exit_code"] == 3
    assert {name: arm["exit_code"] for name, arm in arms["arms"].items()} == {"bad": 3, "good": 0}
    assert arms["arms"]["bad"]["verdicts"] == document["verdicts"]
    assert cli.main(["verify", str(tmp_path)]) == cli.INCONSISTENT
    shown = capsys.readouterr().out
    assert "run by run" in shown
    assert "first to break" in shown
    assert cli.main(["verify", str(tmp_path / "none")]) == cli.BAD_INPUT
    assert cli.main(["verify", str(good), "--strict", "nothing"]) == cli.BAD_INPUT


def test_several_runs_stand_side_by_side(digits, regression):
    arms = {"digits": theory.verify(digits), "regression": theory.verify(regression[0])}
    table = report.verdict_matrix(arms)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns[0] == [*theory.CLAIMS, "first to break"]
    for column, (name, verdicts) in zip(columns[1:], arms.items(), strict=True):
        assert column[:-1] == [v.outcome for v in verdicts], name
    assert columns[1][-1].startswith("compatibility breaks first")


def test_outcomes_combine_by_their_weakest():
    assert weakest(["proved", "refuted", "undecided"]) == "refuted"
    assert weakest(["proved", "undecided", "not refuted"]) == "undecided"
    assert weakest(["proved", "not applicable", "not refuted"]) == "not refuted"
    assert weakest(["proved", "not applicable"]) == "proved"
    assert weakest([]) == "not applicable"
    assert (factor(2.0, 6.0), factor(0.0, 1.0), factor(4.0, 1.0)) == (3.0, np.inf, 0.25)
    assert np.isnan(factor(-1.0, 1.0))
    assert np.isnan(factor(1.0, np.nan))
