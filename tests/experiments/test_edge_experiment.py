"""`lplr edge`: its initialisation and images, the table, the command, and the edge itself on real images."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders import cifar_like, write_batch
from lplr_jax import cli, records
from lplr_jax.curves.edge import edge_of
from lplr_jax.experiments import edge
from lplr_jax.experiments.edge import EdgeConfig
from lplr_jax.models import MLP

REAL = Path(os.environ.get("LPLR_TEST_DATA", "")) / "cifar10_5class.npz"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_batch(folder / "data_batch_1.bin", *cifar_like(60))
    return folder


def test_initialisation_is_uniform_with_the_published_bounds():
    model = MLP(40, 3, "tanh", 5)
    x = jnp.zeros((1, 300))
    params = edge.initial(model, 3, x)["params"]
    for name, fan_in in (("dense_0", 300), ("dense_1", 40), ("dense_2", 40)):
        for leaf in params[name].values():
            drawn = np.asarray(leaf, np.float64) * fan_in**0.5
            assert np.abs(drawn).max() <= 1
            # A uniform variance of 1/3 from N draws is off by (2/√45)/√N in one deviation.
            assert drawn.var() == pytest.approx(1 / 3, abs=5 * 0.298 / drawn.size**0.5)
    again, other = edge.initial(model, 3, x)["params"], edge.initial(model, 4, x)["params"]
    np.testing.assert_array_equal(params["dense_1"]["kernel"], again["dense_1"]["kernel"])
    assert not np.array_equal(params["dense_1"]["kernel"], other["dense_1"]["kernel"])
    assert jax.tree.structure(params) == jax.tree.structure(model.init(jax.random.key(0), x)["params"])


def test_pixels_are_standardised_one_by_one():
    x = edge.standardised(np.array([[[1.0, 5.0]], [[3.0, 5.0]]], np.float32))
    np.testing.assert_array_equal(x, [[-1, 0], [1, 0]])


@pytest.mark.slow
def test_command(images, tmp_path, capsys):
    options = ["--n-train", "20", "--width", "6", "--epochs", "6", "--probe-every", "3", "--data", str(images)]
    assert cli.main(["edge", *options, "--out", str(tmp_path)]) == cli.OK
    shown = " ".join(capsys.readouterr().out.split())
    assert "not reached: the sharpness is at most" in shown
    record = records.load(tmp_path)
    assert record["probe_epoch"].tolist() == [0, 3, 6]
    for name in ("sharpness", "critical_step", "probe_decrease_lower", "probe_decrease_upper"):
        assert np.isfinite(record[name]).all(), name
    assert (record["probe_decrease_lower"] <= record["probe_decrease_upper"]).all()
    assert "ntk_min_eig" not in record
    assert record.config["learning_rate"] == 0.01
    for name in ("edge.md", "edge.csv", "edge.tex", "figures/edge.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 200, name
    # A run that was stopped goes on bit for bit.
    half = EdgeConfig(n_train=20, width=6, epochs=6, probe_every=3, data=images)
    assert edge.run(half).checksum() == record.checksum()


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Three ways to provide CIFAR-10"),
        (["--learning-rate", "0"], "learning_rate must be a finite number > 0"),
        (["--hessian-matvecs", "1"], "hessian_matvecs must be >= 2, got 1"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    command = ["edge", "--data", str(tmp_path), "--source", "files", "--out", str(tmp_path / "run")]
    assert cli.main([*command, *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="real CIFAR-10 images: name their folder in LPLR_TEST_DATA")
def test_sharpness_rises_to_the_edge_and_hovers_there():
    """As published, on 500 images: sharpening up to 2/η; the critical sharpness rises late, and joins it there."""
    config = EdgeConfig(n_train=500, epochs=1200, probe_every=100, data=REAL.parent)
    record = edge.run(config)
    found = edge_of(record)
    assert found.sharpness_0 < 0.6 * found.threshold
    assert found.reached is not None
    assert 400 < found.reached < 1000
    before = record["sharpness"][record["probe_epoch"] <= found.reached]
    assert (np.diff(before) > 0).all(), "it rises all the way"
    assert found.hovers
    assert found.rises_before == 0
    assert found.rises > 0.1
    assert found.loss_t < found.loss_reached
    assert found.critical_before < 0.2 < 0.3 < found.critical
    table = edge.table({"edge": record}, config)
    assert "from there on the sharpness hovers" in table.notes[1]
    raised, lowered = (int(text.split()[0]) for text in (found.raised, found.lowered))
    assert raised >= 1, "one exact step of η is proved to raise the loss there"
    assert raised + lowered == found.probes, "at every probe one of the two is proved"
