"""The story of a run: at most six lines, by rule from the verdicts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from controls import by_claim, replaced, tampered
from descents import catapult, regression, stalled
from rich.console import Console
from test_method import ETA, run

from lplr_jax import theory
from lplr_jax.losses import Squared
from lplr_jax.reports import ending
from lplr_jax.runs.loop import train
from lplr_jax.runs.problem import Probes, Problem
from lplr_jax.theory.claims.example import linear_regression, logistic_regression
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
        "Hypotheses of the paper: λ_0 > 0 is proved, Θ Lipschitz is proved, L_Θ r < λ_0 is proved, η <= 1/β is proved. "
        "Conclusions of the paper: local PL (Theorem 5.4) is proved, the linear rate (Theorem 5.7) is proved."
    )
    window = by_claim(linear_regression())["floor_pl"]
    share = np.log(linear_regression()["loss"][0] / window.bound) / np.log(
        linear_regression()["loss"][0] / linear_regression()["loss"][-1]
    )
    assert f"accounts for {100 * share:.2g} % of the decrease of log L" in lines[2]
    assert "stays within its time budget" in lines[3]
    # θ* = 1/√λ_i, at √(2 + 1 + ½) of θ_0 = 0.
    assert lines[4].startswith("Zero loss is proved to be attained within 1.871 of θ_0 (ours, not the paper's), where")
    assert lines[4].endswith("L* = 0 is a theorem on larger balls alone.")
    assert lines[5].startswith(f"Unexplained: {100 * (1 - share):.2g} % of the decrease of log L; ")
    assert sum("ours, not the paper's" in line for line in lines) == 4


def test_a_run_that_the_paper_does_not_reach(digits):
    lines = told(digits)
    assert "L_Θ r < λ_0 is refuted by the factor" in lines[0]
    assert "The theorems are silent about this run, not false." in lines[0]


def test_a_loss_that_is_not_squared_has_a_bridge_in_its_place():
    lines = told(logistic_regression())
    assert lines[2].startswith("½‖∇L‖² is 1.94 times what λ and the loss guarantee of it, or more, at every probe")
    assert "it goes with L to the power of 1.92. So L falls as 1/t at least: epoch 0 to 20, k = 0" in lines[2]
    assert lines[4].startswith("L* is not 0 (ours, not the paper's): every margin is at most 1.425")
    assert lines[5] == "Unexplained: nothing of what was measured."
    before = told(tampered(logistic_regression(), samples_beyond=replaced(1.0)))
    assert "a bound of 1/t is open: k = 1 samples lie beyond ln 2" in before[2]
    assert before[5] == "Unexplained: the rate of the decrease."


def test_a_method_that_nothing_is_said_of():
    lines = told(run(optax.sgd(ETA), batch=5))
    for line in lines[1:4]:
        assert "is open (ours, not the paper's): " in line
        assert "not along -∇L" in line
    assert lines[5] == "Unexplained: the rate of the decrease; the length of the path."


def test_steps_that_rise():
    lines = judged(catapult())
    assert lines[1].startswith("Some steps raise the loss")
    assert "stays within its time budget" in lines[3]
    assert "why the loss falls over the run though single steps raise it" in lines[5]


def test_a_bound_that_fails_accounts_for_nothing():
    lines = judged(stalled())
    assert lines[2].startswith("What accounts for the decrease is refuted")
    assert "the rate of the decrease" in lines[5]


def test_a_signal_of_low_rank_leaves_nothing_of_the_decrease():
    eigenvalues, weights = np.array([1e-5, 4.0, 4.0]), np.array([1e-7, 1.0, 1.0])
    lines = judged(regression(eigenvalues, weights, np.full(6, 0.1), [0, 3, 6]))
    assert "accounts for 100 % of the decrease of log L" in lines[2]
    assert "the top 2 eigendirections" in lines[2]


@pytest.mark.parametrize("words", ["epoch", "step"])
def test_steps_are_called_as_the_config_calls_them(words):
    record = dataclasses.replace(linear_regression(), config={"epochs": 20} if words == "epoch" else {})
    lines = told(record)
    assert f"No {words} that was seen" in lines[1]
    assert f"in one window, {words} 0 to 20," in lines[2]


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


def of_network(x, y, *, steps=60, eta=0.1, width=12, **probes):
    """A tanh network of one hidden layer from a fixed seed, trained by gradient descent in float64."""
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        params = [rng.normal(size=(x.shape[1], width)), rng.normal(size=(width, 1)) / np.sqrt(width)]
        params, x, y = jax.tree.map(lambda a: jnp.asarray(a, "float64"), (params, x, y))
        problem = Problem(lambda p, x: jnp.tanh(x @ p[0]) @ p[1], params, x, y, loss=Squared("mean"))
        kept = {"every": 10, "search": 0, "hessian": 3, "certify_floor": 1.0, **probes}
        return train(problem, optax.sgd(eta), steps=steps, probes=Probes(**kept), learning_rate=eta)


def test_equal_inputs_with_unlike_targets_are_out_of_reach():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 3)), rng.normal(size=(6, 1))
    x[1], y[:2] = x[0], [[0.0], [1.0]]
    lines = told(of_network(x, y))
    # Two targets that differ by 1 leave ¼ + ¼ of squares, over 2 s = 12.
    assert lines[4].startswith("Zero loss is out of reach (ours, not the paper's): equal inputs have unlike targets")
    assert "L >= 0.0416666" in lines[4]  # 1 / 24, rounded down as a bound from below is


@pytest.mark.parametrize("labels", ["smooth", "noise"])
def test_what_zero_loss_costs(labels):
    """The same inputs, targets that a smooth function gives and targets of noise: noise lies farther away."""
    rng = np.random.default_rng(2)
    x = rng.normal(size=(8, 3))
    y = np.sin(x[:, :1]) if labels == "smooth" else rng.choice([-1.0, 1.0], size=(8, 1))
    lines = told(of_network(x, y, width=40))
    assert lines[4].startswith("Zero loss is proved to be attained within ")
    _DISTANCE[labels] = float(lines[4].split("within ")[1].split(" ")[0])
    if len(_DISTANCE) == 2:
        assert _DISTANCE["smooth"] < _DISTANCE["noise"]


_DISTANCE: dict[str, float] = {}


def test_a_wide_network_is_the_papers():
    """Few samples, many units, a small residual: the hypotheses of the paper are proved, and what follows from them."""
    rng = np.random.default_rng(3)
    x = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    record = of_network(x, 1e-3 * rng.normal(size=(3, 1)), width=4096, steps=30, eta=5e-4)
    lines = told(record)
    assert "L_Θ r < λ_0 is proved" in lines[0]
    assert "local PL (Theorem 5.4) is proved" in lines[0]
    assert "From θ_0 alone it does not follow" not in lines[3]


def test_a_catapult_and_its_recovery():
    """One problem at two step sizes: at the larger one the loss jumps and falls all the same, and only that is told."""
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(6, 4)), rng.normal(size=(6, 1))
    wild, tame = (told(of_network(x, y, eta=eta, width=64, steps=200)) for eta in (0.14, 0.05))
    assert wild[1].startswith("Some steps raise the loss")
    assert "why the loss falls over the run though single steps raise it" in wild[5]
    assert tame[1].startswith("No step that was seen raises the loss beyond rounding")
    assert "why the loss falls" not in tame[5]
