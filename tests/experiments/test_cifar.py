"""The stochastic runs end to end, from tiny files in the genuine format: records, kernel, verdicts, table, figure."""

import dataclasses
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from builders import cifar_like, make, write_batch
from lplr_jax import cli, data, diagnostics, plotting, records, theory
from lplr_jax.curves.summary import gradient_law, summarise
from lplr_jax.experiments import cifar
from lplr_jax.records import Record
from lplr_jax.reports import tables
from lplr_jax.runs.session import Silent

TINY = cifar.CifarConfig(
    width=4,
    stages=1,
    blocks=1,
    groups=2,
    output_init="he",
    epochs=5,
    learning_rate=0.005,
    batch_size=8,
    n_train=20,
    subset_size=5,
    probe_every=2,
    diagnostics_every=3,
    spectrum_probes=2,
    seeds="0,1",
    save_probes=True,
)

pytestmark = pytest.mark.slow  # one training of two seeds serves the whole file


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    write_batch(folder / "data_batch_1.bin", *cifar_like(60))
    return folder


@pytest.fixture(scope="module")
def tiny(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("cifar")
    said = []
    config = dataclasses.replace(TINY, data=images)
    return config, cifar.run_all(config, folder, cifar.set_up(config), say=said.append), folder, said


def test_records_are_whole(tiny):
    config, done, folder, said = tiny
    assert list(done) == [0, 1]
    for seed, record in done.items():
        assert records.load(folder / f"seed{seed}").checksum() == record.checksum()
        assert record["epoch"].tolist() == list(range(6))
        assert record["probe_epoch"].tolist() == [0, 2, 4, 5]
        # Epochs 0 and 3 by --diagnostics-every, the others because they are probed.
        assert np.isfinite(record["loss"]).tolist() == [True, False, True, True, True, True]
        assert record.diverged_at is None
        assert record["subset_ids"].tolist() == [0, 4, 8, 12, 16]
        assert int(record["kernel_samples"]) == 5
        assert (int(record["n"]), int(record["c"]), float(record["loss_scale"])) == (20, 5, 20.0)
        assert record.config["seed"] == seed
        assert {"data", "out", "seeds", "force"}.isdisjoint(record.config)
        assert (record.config["momentum"], record.config["batch_size"], record.config["schedule"]) == (0.9, 8, "cosine")
        assert record.provenance["verdicts"][0]["claim"] == "consistency"
    dataset = data.load("cifar10", data_dir=config.data, n_train=20)
    assert done[0].config["standardisation"] == {
        "mean": list(dataset.standardisation[0]),
        "deviation": list(dataset.standardisation[1]),
    }
    assert any("times a pass" in line for line in said)
    assert done[0]["loss"][0] != done[1]["loss"][0]


def test_kernel_of_the_subset_is_that_of_the_jacobian(tiny):
    """Against a dense Jacobian in float64 at the saved parameters, and its own spectrum."""
    config, done, folder, _ = tiny
    problem, record = cifar.set_up(config), done[1]
    rows = record["subset_ids"]
    like = problem.model.init(jax.random.key(0), problem.x[:1])
    thetas = []
    for index, epoch in enumerate(record["probe_epoch"]):
        saved = np.load(folder / "seed1" / "probes" / f"epoch_{epoch:06d}.npz")
        names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(like)]
        with jax.enable_x64(True):
            params = jax.tree.unflatten(
                jax.tree.structure(like), [jnp.asarray(saved[name], jnp.float64) for name in names]
            )
            x = jnp.asarray(np.asarray(problem.x)[rows], jnp.float64)
            jacobian = jax.jit(jax.jacrev(problem.model.apply))(params, x)
            outputs = np.asarray(problem.model.apply(params, x))
        j = np.concatenate([np.asarray(leaf).reshape(25, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
        theta, values = j @ j.T, np.linalg.eigvalsh(j @ j.T)
        thetas.append(theta)
        r = (outputs - problem.dataset.y[rows]).reshape(-1)
        slack = 1e-12 * values[-1]
        assert record["ntk_min_eig"][index] == pytest.approx(values[0], abs=slack)
        assert record["ntk_max_eig"][index] == pytest.approx(values[-1], abs=slack)
        rank = np.trace(theta) ** 2 / np.sum(theta**2)
        assert record["ntk_effective_rank"][index] == pytest.approx(rank, rel=1e-12)
        assert record["ntk_rayleigh"][index] == pytest.approx(r @ theta @ r / (r @ r), rel=1e-10)
        assert record["probe_loss"][index] == pytest.approx(r @ r / (2 * 5), rel=1e-12)
        shift = np.abs(np.linalg.eigvalsh(theta - thetas[0])).max()
        assert record["ntk_shift"][index] == pytest.approx(shift, rel=1e-6, abs=slack)


def test_verdicts_claim_no_more_than_a_subset_can_tell(tiny):
    for record in tiny[1].values():
        by = {verdict.claim: verdict for verdict in theory.verify(record)}
        assert by["consistency"].outcome == "not refuted"
        assert "5 of 20 samples" in by["consistency"].note
        assert by["ntk_positive"].outcome in ("not refuted", "undecided")
        assert by["linear_rate"].outcome == ("not applicable" if "step_size" in record else "undecided")
        assert not theory.any_inconsistent(by.values())
        assert all(verdict.outcome != "proved" for verdict in by.values())
    record = tiny[1][0]
    tampered = {**record.arrays, "probe_loss": record["probe_loss"] * 1.01}
    assert theory.verify(dataclasses.replace(record, arrays=tampered))[0].inconsistent


def test_envelope_of_all_data_is_not_held_against_a_subset():
    """λ_min of 2 of 4 samples over s = 4 is above the guarantee, so an envelope below it refutes nothing."""
    arrays = {"kernel_samples": np.array(2), "ntk_min_eig": np.full(9, 40.0), "ntk_max_eig": np.full(9, 50.0)}
    t = np.arange(401.0)
    record = make(400, 9, loss=np.exp(-0.01 * t) + 0.05, grad_sq_norm=0.2 * (np.exp(-0.01 * t) + 0.05), **arrays)
    part = {verdict.claim: verdict for verdict in theory.verify(record)}["local_pl"].part("envelope")
    assert part.outcome == "undecided"
    assert part.bound == pytest.approx(10.0)
    assert "2 of 4 samples" in part.note


def test_finished_seeds_are_not_run_again(tiny, monkeypatch):
    config, done, folder, _ = tiny
    said = []

    def refuse(*args, **settings):
        raise AssertionError("a finished seed was run again")

    monkeypatch.setattr(cifar, "run", refuse)
    again = cifar.run_all(config, folder, cifar.set_up(config), say=said.append)
    assert [record.checksum() for record in again.values()] == [record.checksum() for record in done.values()]
    assert sum("is there, made with this config" in line for line in said) == 2
    with pytest.raises(AssertionError, match="run again"):
        cifar.run_all(dataclasses.replace(config, seeds="2"), folder, cifar.set_up(config))
    with pytest.raises(ValueError, match=r"another config: learning_rate 0\.005 there, 0\.1 asked for"):
        cifar.run_all(dataclasses.replace(config, learning_rate=0.1), folder, cifar.set_up(config))


def test_an_interrupted_seed_goes_on_bit_for_bit(tiny, tmp_path):
    config, done, _, _ = tiny

    class Stop(Silent):
        def probe(self, epoch, values):
            if epoch == 2:
                raise KeyboardInterrupt("stopped")

    @contextmanager
    def follow(run, epochs):
        yield Stop()

    config, problem = dataclasses.replace(config, seeds="1", save_probes=False), cifar.set_up(config)
    with pytest.raises(KeyboardInterrupt, match="stopped"):
        cifar.run_all(config, tmp_path, problem, follow=follow)
    whole = cifar.run_all(config, tmp_path, problem)[1]
    assert whole.provenance["resumed_at"] == [2]
    assert whole.checksum() == done[1].checksum()


def test_table_and_slope(tiny):
    _, done, _, _ = tiny
    table = cifar.table(done)
    assert table.arms == ("seed 0", "seed 1", "mean")
    for key, name, index in (("lambda_0", "ntk_min_eig", 0), ("loss_t", "loss", -1), ("drift_t", "drift", -1)):
        values = [float(record[name][index]) for record in done.values()]
        assert [cell.value for cell in table.cells[key]] == pytest.approx([*values, np.mean(values)])
        assert table.cells[key][2].deviation == pytest.approx(np.std(values, ddof=1))
    assert "0.29" in tables.to_markdown(table)
    assert "outside Theorem 5.7" in tables.to_markdown(table)
    # A power law stays one under the running mean of logarithms, at every place of NaN.
    gap = np.exp(-0.1 * np.arange(41.0))
    law = make(40, 3, loss=gap, grad_sq_norm=3 * gap**0.29)
    law.arrays["loss"][5:8] = np.nan
    assert gradient_law(law, 0.0, smoothing=4, whole=True).slope == pytest.approx(0.29, abs=1e-9)


def stochastic_record(seed, epochs=40):
    t = np.arange(epochs + 1.0)
    loss = (1 + 0.05 * seed) * np.exp(-0.1 * t) + 0.05
    record = make(epochs, 5, loss=loss, grad_sq_norm=0.2 * loss, drift=np.sqrt(t) * (1 + 0.1 * seed))
    arrays = {
        **record.arrays,
        "kernel_samples": np.array(2),
        "ntk_max_eig": np.full(5, 9.0),
        "ntk_min_eig": np.full(5, 0.2 + 0.1 * seed),
    }
    config = {"seed": seed, "momentum": 0.9, "schedule": "cosine", "batch_size": 2, "epochs": epochs}
    return Record("cifar", arrays, config, {})


def test_figure_shows_mean_and_deviation_of_the_records():
    seeds = [stochastic_record(seed) for seed in (0, 1, 2)]
    figure = plotting.cifar(seeds)
    a, b, c, d = figure.axes
    losses = np.stack([record["loss"] for record in seeds])
    np.testing.assert_allclose(a.lines[0].get_ydata(), losses.mean(axis=0))
    # Mean and one sample deviation to each side, as the corners of the band.
    corners = a.collections[0].get_paths()[0].vertices[:, 1]
    edge = losses.mean(axis=0) + losses.std(axis=0, ddof=1)
    assert np.abs(corners[:, None] - edge[None]).min(axis=0).max() < 1e-12
    for line, record in zip(b.lines[::2], seeds, strict=True):
        np.testing.assert_allclose(line.get_ydata(), 0.5 * record["grad_sq_norm"] / record["loss"])
    np.testing.assert_allclose(c.lines[-1].get_ydata(), np.mean([record["drift"] for record in seeds], axis=0))
    np.testing.assert_allclose(d.lines[-1].get_ydata(), 0.3)
    for axes in (a, b, c, d):
        assert axes.get_xlabel() == "epoch"
        assert "[" in axes.get_ylabel()
    note = figure._supxlabel.get_text().replace("\n", " ")
    assert "robustness check" in note
    assert "outside Theorem 5.7" in note
    regime = summarise(seeds[0]).regime
    assert regime.stop
    assert any(patch.get_hatch() for patch in a.patches), "the tail of the proxy is marked"
    with pytest.raises(ValueError, match="differ in epoch"):
        plotting.cifar([seeds[0], stochastic_record(1, epochs=30)])
    with pytest.raises(ValueError, match="no record"):
        plotting.cifar([])


def test_figure_says_whose_regime_it_shades():
    seeds = [stochastic_record(seed) for seed in (0, 1)]
    # L >= 2 min L for L = e^(-t/10) + 0.05 to t = 10 log(1 / (2 e^-4 + 0.05)) = 24.5, and for seed 1 to 24.7.
    assert summarise(seeds[0]).regime == slice(0, 25)
    flat = dataclasses.replace(seeds[1], arrays={**seeds[1].arrays, "loss": np.linspace(1.0, 0.9, 41)})
    flat.arrays["loss"][0] = 3.0
    for records_drawn, whose, hatched in ((seeds, "all seeds", 24), ([seeds[0], flat], "1 of 2 seeds", 0)):
        axes = plotting.cifar(records_drawn).axes[0]
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert labels[-2:] == [f"stable regime of {whose}", "the proxy for L* decides for some seed"]
        (hatch,) = [patch for patch in axes.patches if patch.get_hatch()]
        assert hatch.get_x() == hatched
    labels = [text.get_text() for text in plotting.cifar([flat, flat]).axes[0].get_legend().get_texts()]
    assert labels[-1] == "the proxy for L* decides for some seed"
    assert not any("regime" in label for label in labels)


@pytest.mark.slow
def test_command_writes_everything_and_plot_redraws_it(tiny, tmp_path, capsys):
    config, _, folder, _ = tiny
    options = [
        item
        for field in dataclasses.fields(config)
        if field.name not in ("force", "save_probes") and getattr(config, field.name) is not None
        for item in (f"--{field.name.replace('_', '-')}", str(getattr(config, field.name)))
    ]
    assert cli.main(["cifar", "--preset", "smoke", *options, "--out", str(folder)]) == 0
    shown = capsys.readouterr().out
    for word in (
        "is there, made with this config",
        "least PL ratio",
        "0.29",
        "linear_rate",
        "not applicable",
        "Refuted on the runs shown",
    ):
        assert word in shown, word
    assert {path.name for path in folder.iterdir()} >= {"cifar.md", "cifar.csv", "cifar.tex", "seed0", "seed1"}
    drawn = (folder / "figures" / "cifar.png").read_bytes()
    assert cli.main(["plot", str(folder), "--out", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == drawn
    assert cli.main(["plot", str(folder / "seed1"), "--out", str(tmp_path / "one.png")]) == 0
    assert cli.main(["verify", str(folder / "seed0")]) == 0


def test_without_images_the_command_says_the_ways_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nothing"))
    monkeypatch.setattr("lplr_jax.data.prepared.host_answers", lambda url: False)
    assert cli.main(["cifar"]) == cli.BAD_INPUT
    message = " ".join(capsys.readouterr().err.split())
    for word in ("Three ways to provide CIFAR-10", "(1)", "(2)", "(3)", "make cifar DATA=path", "--data path"):
        assert word in message, word
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": "0,0"}, "seeds must be distinct integers"),
        ({"batch_size": 21}, "batch_size must be at most n_train = 20, got 21"),
        ({"micro_batch": 0}, "micro_batch must be >= 1, got 0"),
        ({"momentum": 1.0}, r"momentum must be at least 0 and below 1, got 1\.0"),
        ({"learning_rate": float("nan")}, "learning_rate must be a finite number > 0, got nan"),
        ({"subset_size": 40}, "subset_size must be at most n_train = 20, got 40"),
        ({"diagnostics_every": 9}, "diagnostics_every must be at most epochs = 5, got 9"),
        ({"width": 5}, "width must be a multiple of groups = 2, got 5"),
        ({"kernel": "magic"}, "kernel must be one of"),
    ],
)
def test_bad_fields_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        cifar.resolve(dataclasses.replace(TINY, **changes))


def test_presets(monkeypatch):
    assert cifar.preset("default") is cifar.PRESETS["cpu"]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert cifar.preset("default") is cifar.PRESETS["paper"]
    for config in cifar.PRESETS.values():
        assert cifar.resolve(config).micro_batch == config.batch_size
    paper = cifar.PRESETS["paper"]
    assert (paper.width, paper.n_train, paper.epochs, paper.momentum) == (64, 5000, 100, 0.9)


def test_subset_is_stratified_and_fixed():
    y = np.eye(3)[[0, 0, 0, 0, 1, 1, 1, 2]]
    assert diagnostics.stratified_ids(y, 3).tolist() == [0, 4, 7]
    assert diagnostics.stratified_ids(y, 6).tolist() == [0, 1, 2, 4, 5, 7], "a class that has run out leaves its share"
    with pytest.raises(ValueError, match="subset_size must be 1 to n_train = 8, got 9"):
        diagnostics.stratified_ids(y, 9)
    assert diagnostics.effective_rank(np.eye(4)) == pytest.approx(4)
    assert diagnostics.effective_rank(np.outer([1.0, 2.0], [1.0, 2.0])) == pytest.approx(1)
    with pytest.raises(ValueError, match="the kernel is zero"):
        diagnostics.effective_rank(np.zeros((2, 2)))
