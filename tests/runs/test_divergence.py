"""A run that stops being finite ends there, keeps what came before, and says so everywhere."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lplr_jax as lp
from lplr_jax import cli, records, theory
from lplr_jax.experiments import mnist, step_size
from lplr_jax.losses import Objective
from lplr_jax.runs.loop import run_training
from lplr_jax.training import Metrics, evaluate, init_state, train_epochs

TINY = ["mnist", "--width", "8", "--epochs", "12", "--probe-every", "3", "--n-train", "40", "--search-steps", "0"]


def train(apply_fn, params, eta, *, epochs=6, every=3, advance=None, probed=None):
    x, y = jnp.ones((2, 1)), jnp.full((2, 1), 0.5)
    objective, optimizer = Objective(apply_fn, "sum"), optax.sgd(eta)
    settings = {"objective": objective, "optimizer": optimizer}
    probed = [] if probed is None else probed

    def probe(point, epoch):
        probed.append(epoch)
        return {"ntk_min_eig": 1.0}

    return run_training(
        init_state(params, optimizer),
        probes_at=tuple(range(0, epochs + 1, every)),
        advance=advance or (lambda state, k: train_epochs(state, (x, y), params, epochs=k, **settings)),
        evaluate=partial(evaluate, batch=(x, y), initial=params, objective=objective),
        probe=probe,
    )


def test_parameters_that_leave_the_floats_end_a_run_whose_loss_stays_finite():
    """f = exp(-u): one huge step sends u to infinity, where loss and gradient are as finite as can be."""
    probed = []
    result = train(lambda u, x: jnp.exp(-u) * x, jnp.full((1, 1), -10.0, jnp.float32), 1e38, probed=probed)
    assert np.isinf(jax.device_get(result.params)).all()
    arrays = result.arrays
    for name in ("loss", "grad_sq_norm", "drift"):
        assert np.isfinite(arrays[name][:1]).all()
        assert np.isnan(arrays[name][1:]).all(), name
    assert probed == [0]
    assert np.isnan(arrays["ntk_min_eig"]).tolist() == [False, True, True]


def test_parameters_alone_are_enough():
    """Metrics that are finite all along, and a leaf that is not: the run ends where the leaf is seen."""

    def advance(state, epochs):
        ones = np.ones(epochs)
        return state._replace(params={**state.params, "b": state.params["b"] * jnp.nan}), Metrics(*[ones] * 6)

    params = {"w": jnp.ones((1, 1)), "b": jnp.ones(1)}
    arrays = train(lambda p, x: x @ p["w"], params, 0.1, advance=advance).arrays
    assert np.isfinite(arrays["loss"][:3]).all()
    assert np.isnan(arrays["loss"][3:]).all()


def huge(config, set_up=mnist.set_up):
    problem = set_up(config)
    return dataclasses.replace(problem, params=jax.tree.map(lambda leaf: leaf * 1e12, problem.params))


def test_a_run_that_is_not_finite_at_its_start(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(mnist, "set_up", huge)
    assert cli.main([*TINY, "--out", str(tmp_path)]) == cli.DIVERGED == 4
    shown = " ".join(capsys.readouterr().out.split())
    assert "diverged at epoch 0: loss, gradient or parameters are not finite from there on" in shown
    assert "no figure: the run diverged at epoch 0" in shown
    record = records.load(tmp_path)
    assert record.diverged_at == 0
    assert np.isnan(record["loss"]).all()
    verdicts = theory.verify(record)
    assert {verdict.outcome for verdict in verdicts} == {"undecided"}
    assert all("diverged at epoch 0" in verdict.note for verdict in verdicts)
    assert cli.main(["verify", str(tmp_path)]) == cli.OK
    assert cli.main(["plot", str(tmp_path)]) == cli.BAD_INPUT
    assert "no finite value" in capsys.readouterr().err
    with pytest.raises(ValueError, match="not finite at the initialisation"):
        step_size.initial_sharpness(dataclasses.replace(mnist.PRESETS["smoke"], width=8, n_train=40))


@pytest.mark.slow
def test_an_arm_that_diverges_is_a_result(tmp_path, capsys):
    sizes = ["--widths", "4,8", "--epochs", "12", "--probe-every", "6", "--n-train", "40", "--hessian-probes", "1"]
    rates = ["--learning-rate", "1e6", "--smaller-learning-rate", "1e-3"]
    assert cli.main(["ablation", *sizes, *rates, "--out", str(tmp_path)]) == cli.OK
    shown = capsys.readouterr().out
    at = [records.load(tmp_path / arm).diverged_at for arm in ("m4-seed0", "m8-seed0", "m8-smaller-seed0")]
    assert at[0] is not None
    assert at[2] is None
    assert f"m4-seed0: observed divergence, diverged at epoch {at[0]} (" in shown
    row = next(line for line in (tmp_path / "ablation.md").read_text().splitlines() if line.startswith("| diverged"))
    assert row == f"| diverged | at epoch {at[0]} | at epoch {at[1]} | no |"
    assert f"diverged at epoch {at[0]}" in " ".join(shown.partition("first to break")[2].split())


@pytest.mark.parametrize("sampling", ["independent", "reshuffle"])
def test_mini_batches_that_leave_the_floats_are_a_record(sampling, tmp_path):
    """No entry stands where the run did not come to, and so no probe."""
    x, y = jnp.eye(4), jnp.ones((4, 1))
    problem = lp.Problem(lambda w, x: x @ w, jnp.zeros((4, 1)), x, y)
    settings = {"batch_size": 2, "sampling": sampling, "probes": lp.Probes(every=20, search=0, hessian=0)}
    record = lp.train(problem, optax.sgd(200.0), steps=80, out=tmp_path, **settings)
    assert 0 < record.diverged_at < 80
    assert set(record["probe_epoch"]) < set(record["epoch"])
    assert np.isfinite(record["ntk_min_eig"][record["probe_epoch"] < record.diverged_at]).all()
    assert lp.load(tmp_path).checksum() == record.checksum()
    assert not theory.any_inconsistent(theory.verify(record))


def test_digits_that_large_parameters_lose_are_no_contradiction():
    """0.1 · 3e7 - 0.3 · 1e7 is -0.07 for the float32 inputs and off by some 0.1 in their products: tanh' notices."""
    x, y = jnp.array([[0.1, 0.3], [0.2, 0.1]], jnp.float32), jnp.zeros((2, 1), jnp.float32)
    params = {"w": jnp.array([[3e7], [-1e7]], jnp.float32), "v": jnp.ones((1, 1), jnp.float32)}
    problem = lp.Problem(lambda p, x: jnp.tanh(x @ p["w"]) @ p["v"], params, x, y)
    record = lp.measure(problem, {0: params}, probes=lp.Probes(search=0))
    off = abs(float(record["grad_sq_norm"][0] / record["probe_grad_sq_norm"][0]) - 1)
    assert off > 1e-2
    assert not theory.any_inconsistent(theory.verify(record))
    small = {**params, "w": params["w"] * np.float32(1e-7)}
    same = lp.measure(dataclasses.replace(problem, params=small), {0: small}, probes=lp.Probes(search=0))
    spoilt = dataclasses.replace(same, arrays={**same.arrays, "grad_sq_norm": same["grad_sq_norm"] * (1 + off)})
    assert theory.any_inconsistent(theory.verify(spoilt)), "of parameters that are not large it is one"
