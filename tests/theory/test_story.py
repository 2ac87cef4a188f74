"""The story of a run: at most six lines, by rule from the verdicts."""

import dataclasses

import numpy as np
import optax
import pytest
from controls import by_claim, replaced, tampered
from descents import catapult, regression, stalled
from rich.console import Console
from test_method import ETA, run

from lplr_jax import theory
from lplr_jax.reports import ending
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import Evidence


def told(record):
    lines = theory.story(theory.verify(record), record)
    assert 1 <= len(lines) <= 6
    assert all(line.endswith(".") and "\n" not in line and "nan" not in line for line in lines), lines
    return lines


def judged(record):
    """The story of verdicts that `consistency`, for which a closed form holds too few arrays, does not stop."""
    evidence = Evidence(record)
    return theory.story([evidence.verdict(claim) for claim in theory.CLAIMS], record)


def test_a_run_that_the_paper_explains():
    lines = told(linear_regression())
    assert lines[0] == (
        "Hypotheses of the paper: λ_0 > 0 is proved, Θ Lipschitz is proved, L_Θ r < λ_0 is proved, η <= 1/β is proved."
    )
    assert "local PL (Theorem 5.4) is proved" in lines[1]
    assert "silent" not in lines[1]
    window = by_claim(linear_regression())["floor_pl"]
    share = np.log(linear_regression()["loss"][0] / window.bound) / np.log(
        linear_regression()["loss"][0] / linear_regression()["loss"][-1]
    )
    assert f"accounts for {100 * share:.2g} % of the decrease of log L" in lines[3]
    assert "stays within its time budget" in lines[4]
    assert lines[5].startswith(f"Unexplained: {100 * (1 - share):.2g} % of the decrease of log L; ")
    assert sum("ours, not the paper's" in line for line in lines) == 3


def test_a_run_that_the_paper_does_not_reach(digits):
    lines = told(digits)
    assert "L_Θ r < λ_0 is refuted by the factor" in lines[0]
    assert "The theorems are silent about this run, not false." in lines[1]


def test_a_method_that_nothing_is_said_of():
    lines = told(run(optax.sgd(ETA), batch=5))
    for line in lines[2:5]:
        assert "is open (ours, not the paper's): " in line
        assert "not along -∇L" in line
    assert lines[5] == "Unexplained: the rate of the decrease; the length of the path."


def test_steps_that_rise():
    lines = judged(catapult())
    assert lines[2].startswith("Some steps raise the loss")
    assert "stays within its time budget" in lines[4]
    assert "why the loss falls over the run though single steps raise it" in lines[5]


def test_a_bound_that_fails_accounts_for_nothing():
    lines = judged(stalled())
    assert lines[3].startswith("What accounts for the decrease is refuted")
    assert "the rate of the decrease" in lines[5]


def test_a_signal_of_low_rank_leaves_nothing_of_the_decrease():
    eigenvalues, weights = np.array([1e-5, 4.0, 4.0]), np.array([1e-7, 1.0, 1.0])
    lines = judged(regression(eigenvalues, weights, np.full(6, 0.1), [0, 3, 6]))
    assert "accounts for 100 % of the decrease of log L" in lines[3]
    assert "the top 2 eigendirections" in lines[3]


@pytest.mark.parametrize("words", ["epoch", "step"])
def test_steps_are_called_as_the_config_calls_them(words):
    record = dataclasses.replace(linear_regression(), config={"epochs": 20} if words == "epoch" else {})
    lines = told(record)
    assert f"No {words} that was seen" in lines[2]
    assert f"in one window, {words} 0 to 20," in lines[3]


def test_a_record_that_contradicts_itself_tells_nothing():
    (line,) = told(tampered(linear_regression(), probe_loss=replaced(5.0, 1)))
    assert line == "The record or this package is wrong (consistency): nothing is read off it."


def test_a_run_that_diverged_at_once_tells_that():
    base = linear_regression()
    arrays = {k: v for k, v in base.arrays.items() if not k.startswith(("probe_", "ntk_", "param_pair"))}
    arrays = {k: v for k, v in arrays.items() if base.arrays[k].ndim == 0 or v.shape == base["epoch"].shape}
    arrays = {k: v[:2] if v.ndim else v for k, v in arrays.items()}
    arrays |= {k: np.full(2, np.nan) for k in ("loss", "grad_sq_norm", "drift")}
    record = dataclasses.replace(base, arrays=arrays)
    (line,) = told(record)
    assert line.startswith("Diverged at epoch 0")


def test_the_story_stands_above_the_claims():
    record, console = linear_regression(), Console(width=200, record=True, file=None, force_terminal=False)
    verdicts = theory.verify(record)
    with console.capture() as shown:
        ending.show(console, {"": verdicts}, {"": record})
    text = shown.get()
    assert text.startswith("Hypotheses of the paper: ")
    assert text.index("Unexplained: ") < text.index("\nconsistency ")
    both = {"verdicts": {"a": verdicts, "b": verdicts}, "records": {"a": record, "b": record}}
    with console.capture() as shown:
        ending.show(console, **both, first=True)
    assert shown.get().count("Hypotheses of the paper: ") == 1
    assert shown.get().index("a:") < shown.get().index("Hypotheses of the paper: ")
    with console.capture() as shown:
        ending.show(console, **both, verbose=True)
    assert shown.get().count("Hypotheses of the paper: ") == 2
