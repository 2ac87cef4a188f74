"""`lplr noise`: sizes as they are asked for, what the table says of records that are known, and the command."""

import dataclasses

import numpy as np
import pytest

from lplr_jax import cli, plotting, records
from lplr_jax.experiments import noise
from lplr_jax.theory.claims.noise import example


def known(*, eta=0.2, variance=1.0):
    """The example of the claim, n = 3 and b = 2, with another η, and a variance that is scaled."""
    record = example()
    slope = record["probe_grad_sq_norm"]
    squares = slope + variance * (record["sample_grad_sq_norm"] - slope)
    arrays = {**record.arrays, "learning_rate": np.asarray(eta), "sample_grad_sq_norm": squares}
    return dataclasses.replace(record, arrays=arrays)


RATIO = 0.125 * float(example()["probe_grad_sq_norm"][-1] / example()["grad_sq_norm"][10:].mean())
"""R of the example, whose second half begins at step 10."""


def test_the_ratio_is_that_of_the_last_probe():
    """S² = 3‖G‖² - ‖G‖², σ² = S²/2 · 1/2 = ‖G‖²/2; η β = 0.4, so that R = 0.4/1.6 σ² over the mean ‖G‖²."""
    found = noise._of_probe(known())
    slope = float(example()["probe_grad_sq_norm"][-1])
    assert found["variance"] == pytest.approx(slope / 2, rel=1e-12)
    assert found["ratio"] == pytest.approx(RATIO, rel=1e-12)
    assert found["loose"] == pytest.approx(slope / 2 / (2 * 3 * 2 / 4 * float(example()["probe_loss"][-1])), rel=1e-12)


@pytest.mark.usefixtures("without_type_checks")
def test_the_table_has_a_ball_where_the_noise_outweighs_the_fall():
    calm, loud = known(), known(variance=2000.0)
    done = {(1, 0): loud, (2, 0): calm, (2, 1): calm}
    table = noise.table(done)
    assert table.arms == ("b = 1", "b = 2")
    assert table.cells["ball"][1] == "none"
    ratio = RATIO * 2000
    assert table.cells["ratio"][0].value == pytest.approx(ratio)
    assert table.cells["ball"][0].value == pytest.approx(ratio * float(loud["loss"][10:].mean()))
    labels = noise.figure(done).axes[0].get_legend_handles_labels()[1]
    loss, epoch = calm["loss"], calm["epoch"]
    fall = loss[epoch >= 15].mean() / loss[(epoch >= 10) & (epoch <= 15)].mean()
    assert table.cells["fall"][1].value == pytest.approx(fall, rel=1e-12)
    assert labels == [f"b = 1: last quarter / before {fall:.3f}", "b = 1: predicted ball", *labels[2:]]
    assert len(labels) == 3
    with pytest.raises(ValueError, match="curves must hold every method that has a level"):
        plotting.losses({}, {})


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch-sizes", "0,5"], "batch_sizes must be distinct integers >= 1"),
        (["--batch-sizes", "61"], "batch_sizes must be at most n_train = 60, got 61"),
        (["--steps", "1"], "steps must be >= 2, got 1"),
        (["--share", "0"], "share must be a finite number > 0, got 0.0"),
        (["--width", "0"], "width must be >= 1, got 0"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    assert cli.main(["noise", "--preset", "smoke", "--out", str(tmp_path / "run"), *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_command(tmp_path, capsys):
    options = ["--width", "4", "--depth", "2", "--n-train", "12", "--steps", "8", "--batch-sizes", "3,12", "--seeds"]
    command = ["noise", *options, "0,1", "--out", str(tmp_path)]
    assert cli.main(command) == 0
    assert sorted(folder.parent.name for folder in tmp_path.glob("b*/record.npz")) == [
        *("b12-seed0", "b3-seed0", "b3-seed1"),
    ]
    first, second = (records.load(tmp_path / f"b3-seed{seed}") for seed in (0, 1))
    assert first["loss"][0] == second["loss"][0]
    assert not np.array_equal(first["loss"], second["loss"])
    assert int(first["batches_independent"]) == 1
    for name in ("noise.md", "noise.csv", "noise.tex", "figures/noise.png"):
        assert (tmp_path / name).stat().st_size > 300, name
    capsys.readouterr()
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("is there, made with this config") == 3
