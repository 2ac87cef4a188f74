"""The main job end to end: real digits in, a record out, the same every time, and the theory's identities on it."""

import dataclasses
import hashlib
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from lplr_jax import cli, diagnostics, records, theory
from lplr_jax.experiments import mnist
from lplr_jax.runs.problem import probe_epochs

TINY = dataclasses.replace(mnist.PRESETS["smoke"], width=16, epochs=24, probe_every=8, n_train=60, learning_rate=2e-3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    return mnist.run(TINY, probe_dir=folder / "probes"), folder


def test_record_is_whole(tiny):
    record, folder = tiny
    assert record["epoch"].tolist() == list(range(25))
    assert record["probe_epoch"].tolist() == [0, 8, 16, 24]
    for name in ("loss", "grad_sq_norm", "drift", "ntk_min_eig", "ntk_rayleigh", "ntk_shift", "ntk_min_eig_subset"):
        assert np.isfinite(record[name]).all(), name
    assert (int(record["n"]), int(record["c"]), int(record["p"])) == (60, 1, 3 * 16**2 + 789 * 16 + 1)
    assert float(record["loss_scale"]) == 60.0
    assert record["subset_ids"].size == 12
    assert record.config["width"] == 16
    assert "out" not in record.config
    assert "data" not in record.config
    assert record.provenance["data"]["checksum"] == record.config["data_checksum"]
    assert record.provenance["versions"]["jax"] == jax.__version__
    back = records.load(record.save(folder / "record.npz"))
    assert back.checksum() == record.checksum()


def test_drift_and_shift_are_those_of_the_saved_parameters(tiny):
    record, folder = tiny
    loaded = [dict(np.load(folder / "probes" / f"epoch_{epoch:06d}.npz")) for epoch in (0, 8, 16, 24)]
    assert set(loaded[0]) == {f"params.dense_{i}.{leaf}" for i in range(5) for leaf in ("kernel", "bias")}
    for epoch, params in zip((0, 8, 16, 24), loaded, strict=True):
        differences = [params[name].astype(np.float64) - loaded[0][name] for name in params]
        drift = np.sqrt(sum(np.sum(d**2) for d in differences))
        # Float32 sums over 13,393 squares.
        assert record["drift"][epoch] == pytest.approx(drift, rel=1e-5)
    assert record["ntk_shift"][0] == 0.0
    assert (record["ntk_shift"][1:] > 0).all()


def test_identities_hold_at_every_probe(tiny):
    record, _ = tiny
    s, at = float(record["loss_scale"]), record["probe_epoch"]
    right = record["ntk_rayleigh"] / s
    np.testing.assert_allclose(0.5 * record["probe_grad_sq_norm"] / record["probe_loss"], right, rtol=1e-10)
    # Chain: four sums over 784 or 16 terms forward and backward, 60 samples, 8 roundings a layer.
    chain = 2 * (784 + 4 * 16) + 60 + 40
    for t, value in zip(at, right, strict=True):
        probe = int(np.flatnonzero(at == t)[0])
        tolerance = diagnostics.pl_identity_tolerance(
            max_eig=record["ntk_max_eig"][probe], rayleigh=record["ntk_rayleigh"][probe], chain=chain
        )
        assert tolerance < 0.01, "a tolerance this wide tests nothing"
        assert 0.5 * record["grad_sq_norm"][t] / record["loss"][t] == pytest.approx(value, rel=tolerance)
    # Interlacing, Weyl, and the place of the Rayleigh quotient in the spectrum; 60 u λ_max is the solver's rounding.
    slack = 60 * 2.3e-16 * record["ntk_max_eig"].max() * 4
    assert (record["ntk_min_eig_subset"] >= record["ntk_min_eig"] - slack).all()
    assert (np.abs(record["ntk_min_eig"] - record["ntk_min_eig"][0]) <= record["ntk_shift"] + slack).all()
    assert (record["ntk_rayleigh"] >= record["ntk_min_eig"] - slack).all()
    assert (record["ntk_rayleigh"] <= record["ntk_max_eig"] + slack).all()


@pytest.mark.slow
def test_same_config_same_arrays(tiny):
    again = mnist.run(dataclasses.replace(TINY))
    assert again.checksum() == tiny[0].checksum()
    other = mnist.run(dataclasses.replace(TINY, seed=1, epochs=8))
    assert other["loss"][0] != again["loss"][0]


def test_kernels_agree_along_a_run(tiny):
    peer = mnist.run(dataclasses.replace(TINY, kernel="neural-tangents"))
    np.testing.assert_array_equal(peer["loss"], tiny[0]["loss"])
    # Two float64 assemblies differ by a few u λ_max, which moves every eigenvalue by at most as much.
    slack = 1e-13 * tiny[0]["ntk_max_eig"].max()
    np.testing.assert_allclose(peer["ntk_min_eig"], tiny[0]["ntk_min_eig"], rtol=0, atol=slack)


@pytest.mark.slow
def test_divergence_is_a_result(tmp_path, capsys):
    options = ["--preset", "smoke", "--learning-rate", "1e4", "--out", str(tmp_path)]
    assert cli.main(["mnist", *options]) == cli.DIVERGED
    record = records.load(tmp_path)
    at = record.diverged_at
    assert at is not None
    assert np.isfinite(record["loss"][:at]).all()
    assert np.isnan(record["loss"][at:]).all()
    assert np.isnan(record["drift"][at:]).all()
    assert np.isnan(record["ntk_min_eig"][record["probe_epoch"] >= at]).all()
    assert "diverged" in capsys.readouterr().out


def test_command_writes_record_figure_and_table(tmp_path, capsys):
    assert cli.main(["mnist", "--preset", "smoke", "--epochs", "20", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    for word in ("λ_0", "drift", "L_T", "record.npz", "mnist.png", "report.html", "epoch 20/20"):
        assert word in shown, word
    ending = shown.partition("epoch 20/20")[2].splitlines()
    assert 20 <= len(ending) <= 40, "one screen"
    filled = [line for line in ending if line]
    assert len(filled) == len(set(filled)), "no line twice"
    assert "\x1b" not in shown, "plain text when the output is no terminal"
    record = records.load(tmp_path / "run")
    assert record["epoch"].size == 21
    assert sorted(path.name for path in (tmp_path / "run" / "figures").iterdir()) == ["mnist.pdf", "mnist.png"]
    again = ["mnist", "--preset", "smoke", "--epochs", "20", "--out", str(tmp_path / "run"), "--verbose"]
    assert cli.main(again) == 0
    assert "λ_T" in capsys.readouterr().out, "the summary"
    assert cli.main(["plot", str(tmp_path / "run"), "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "run" / "figures" / "mnist.png").read_bytes()


def test_help_names_every_field_with_its_default(capsys):
    assert cli.main(["mnist", "--help"]) == 0
    shown = capsys.readouterr().out
    for field in dataclasses.fields(mnist.MnistConfig):
        assert f"--{field.name.replace('_', '-')}" in shown, field.name
    assert "0.0008" in shown
    assert cli.main(["mnist", "--preset", "smoke", "--help"]) == 0
    assert "(default: 32)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widht", "5"], "--width"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
        (["--epochs", "many"], "many"),
        (["--width", "-3"], "width must be >= 1, got -3"),
        (["--learning-rate", "-1"], "learning_rate must be a finite number > 0, got -1.0"),
        (["--learning-rate", "nan"], "learning_rate must be a finite number > 0, got nan"),
        (["--probe-every", "999999"], "probe_every must be at most epochs = 60, got 999999"),
        (["--subset-size", "300"], "subset_size must be at most n_train = 200, got 300"),
        (["--kernel", "magic"], "kernel must be one of auto"),
        (["--activation", "swish"], "swish"),
        (["--seed", "-1"], "seed must be >= 0, got -1"),
        (["--regime-start", "70"], "regime_start must be an epoch of the run, 0 to 60, got 70"),
        (["--n-train", "99999"], "n_train"),
        (["--data", "/no/such/folder"], "/no/such/folder"),
    ],
)
@pytest.mark.usefixtures("without_type_checks")
def test_mistakes_end_with_a_sentence_and_code_2(options, message, capsys, tmp_path):
    assert cli.main(["mnist", "--preset", "smoke", "--out", str(tmp_path / "run"), *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    text = " ".join((captured.err + captured.out).split())
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists(), "nothing half-written"


def own(path, n=40, seed=0):
    generator = np.random.default_rng(seed)
    np.savez(path, x_train=generator.normal(size=(n, 2, 3)), y_train=np.arange(n) % 3)
    return path


@pytest.mark.slow
def test_own_samples_make_a_record_and_are_read_once(tmp_path, capsys, caplog):
    path, out = own(tmp_path / "three.npz"), tmp_path / "out"
    small = ["--preset", "smoke", "--width", "8", "--epochs", "8", "--probe-every", "8", "--hessian-probes", "0"]
    small += ["--spectrum-probes", "0", "--search-steps", "0"]
    words = ["mnist", *small, "--n-train", "12", "--data", str(path), "--out", str(out)]
    assert cli.main(words) == cli.OK
    assert caplog.text.count("own data: 12 samples from npz file three.npz") == 1
    record = records.load(out / "record.npz")
    with np.load(path) as file:
        rows = np.argsort(np.arange(12) % 3, kind="stable")  # twelve samples, of each class in turn
        x, y = file["x_train"][:12].reshape(12, -1)[rows].astype(np.float32), np.eye(3)[file["y_train"][:12][rows]]
    digest = hashlib.sha256(b"float32(12, 6)" + x.tobytes() + b"float32(12, 3)" + y.astype(np.float32).tobytes())
    assert record.config["data_checksum"] == record.provenance["data"]["checksum"] == f"sha256:{digest.hexdigest()}"
    assert record.experiment == "mnist"
    assert (int(record["n"]), int(record["c"])) == (12, 3)
    assert "classes" not in record.config
    said = {"source": "npz file three.npz", "targets": "one-hot in the order 0, 1, 2", "location": str(path)}
    assert said.items() <= record.provenance["data"].items()
    assert cli.main([*words, "--classes", "2,0"]) == cli.BAD_INPUT
    assert "classes" in capsys.readouterr().err


def test_a_file_that_changed_is_read_anew(tmp_path, monkeypatch):
    config = mnist.MnistConfig(data=own(tmp_path / "mine.npz"), n_train=6, subset_size=1)
    first = mnist.load_data(config)
    assert mnist.load_data(dataclasses.replace(config, width=64)) is first
    two = mnist.load_data(dataclasses.replace(config, classes="2,0"))
    assert (two.c, two.classes) == (1, ("2", "0"))
    assert mnist.load_data(config).checksum == first.checksum
    own(config.data, n=40, seed=1)
    os.utime(config.data, ns=(1, 1))
    changed = mnist.load_data(config)
    assert changed.checksum != first.checksum
    config.data.unlink()
    with pytest.raises(ValueError, match="no such file or folder"):
        mnist.load_data(config)
    for folder, seed in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        own(tmp_path / folder / "mine.npz", seed=seed)
    beside = dataclasses.replace(config, data=Path("mine.npz"))
    found = []
    for folder in ("a", "b"):
        monkeypatch.chdir(tmp_path / folder)
        found.append(mnist.load_data(beside).checksum)
    assert found[0] != found[1]


def test_probe_epochs_hold_both_ends():
    assert probe_epochs(10, 4) == (0, 4, 8, 10)
    assert probe_epochs(8, 4) == (0, 4, 8)
    assert probe_epochs(3, 50) == (0, 3)
    with pytest.raises(ValueError, match="probe_every must be >= 1, got 0"):
        probe_epochs(5, 0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "hinge"}, "loss must be squared, logistic, cross-entropy, .*got 'hinge'"),
        ({"loss": "cross-entropy:2"}, "loss must be squared, .*got 'cross-entropy:2'"),
        ({"loss": "logistic", "classes": "0,1,2"}, "the logistic loss is of two classes, -1 and 1, got 3 classes"),
        ({"loss": "logistic", "labels": "bits"}, "labels 0 and 1 are targets of the squared loss"),
        ({"kernel_images": 0}, "kernel_images must be >= 1"),
        ({"kernel_images": 101}, "kernel_images must be at most n_train = 100"),
        ({"loss": "logistic", "step_rule": "armijo:2"}, "armijo"),
    ],
)
def test_losses_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        mnist.identity(mnist.MnistConfig(**{"n_train": 100, **settings}))


def test_classes_are_trained_by_cross_entropy():
    """Ten classes, and the kernel of a stratified subset; what is kept of the default does not change."""
    config = mnist.MnistConfig(
        width=8, epochs=4, probe_every=2, n_train=40, hessian_probes=0, search_steps=0, spectrum_probes=0,
        loss="cross-entropy", classes="0,1,2,3,4,5,6,7,8,9", kernel_images=10,
    )  # fmt: skip
    record = mnist.run(config)
    assert record.loss == record.config["loss"] == "softmax_cross_entropy"
    labels = np.argmax(mnist.load_data(config).y, axis=1)
    assert sorted(labels[record["subset_ids"]]) == list(range(10))
    assert record["ntk_class_min_eig"].shape == (3,)
    # Of ten classes of small outputs: log 10 at first, to the size of the outputs.
    assert 1.5 < float(record["loss"][0]) < 6
    assert not theory.any_inconsistent(theory.verify(record))
    assert not {"loss", "kernel_images"} & set(mnist.decisive(mnist.MnistConfig()))
