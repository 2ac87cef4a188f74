"""`lplr transformer`: rows as they are drawn, the record against dense computations, table, figure and command."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lplr_jax import cli, data, plotting, records, theory
from lplr_jax.experiments import next_token, transformer
from lplr_jax.losses import SoftmaxCrossEntropy, Squared

WORDS = b"abba dada abad bada daba add a bad dab " * 2
TINY = transformer.TransformerConfig(
    width=4, layers=1, heads=2, length=5, n_train=6, epochs=6, probe_every=3, subset_size=12, hessian_probes=2,
    learning_rate=0.05, adam_learning_rate=0.01, seeds="0,1", save_probes=True,
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_bytes(WORDS)
    return path


def test_rows_are_the_class_that_follows_and_one_other(words):
    text = data.load_text(n=6, length=5, data=words)
    rows = next_token.draw_rows(text, 20, loss="squared", seed=3)
    assert rows.ids.size == 20
    assert (np.diff(rows.ids) > 0).all()
    places, classes = rows.ids // text.c, rows.ids % text.c
    assert np.unique(places, return_counts=True)[1].tolist() == [2] * 10
    np.testing.assert_array_equal(rows.y[:, 0], classes == text.y.reshape(-1)[places])
    assert rows.y.sum() == 10, "each position has its own next byte once"
    for tokens, position, chosen, identity in zip(*rows.x.values(), rows.ids, strict=True):
        sequence, rest = divmod(identity, 5 * text.c)
        assert (position, chosen) == divmod(rest, text.c)
        np.testing.assert_array_equal(tokens[: position + 1], text.x[sequence, : position + 1])
        assert not tokens[position + 1 :].any()
    whole = next_token.draw_rows(text, 9, loss="softmax_cross_entropy", seed=3)
    assert (whole.ids.size, whole.y.shape) == (9 // text.c, (9 // text.c, text.c))
    with pytest.raises(ValueError, match=f"subset_size must be at least {text.c}, all classes of one position, got 2"):
        next_token.draw_rows(text, 2, loss="softmax_cross_entropy", seed=3)


@pytest.mark.parametrize("each", [Squared("sum"), SoftmaxCrossEntropy("sum")])
def test_the_loss_of_a_sequence_is_the_sum_of_its_positions(each):
    rng = np.random.default_rng(0)
    f = rng.normal(size=(3, 8)).astype(np.float32)
    y = np.eye(2, dtype=np.float32)[rng.integers(0, 2, 12)].reshape(3, 8)
    loss = next_token.EachPosition(12.0, each, 2)
    rows = each.per_sample(f.reshape(12, 2), y.reshape(12, 2))
    np.testing.assert_allclose(loss.per_sample(f, y), rows.reshape(3, 4).sum(axis=1), rtol=1e-6)
    np.testing.assert_allclose(loss.total(f, y), rows.sum(), rtol=1e-6)


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--optimizers", "sgd,newton"], "optimizers must be one of sgd, adam, got 'newton'"),
        (["--optimizers", "adam,adam"], "optimizers must be distinct, got 'adam,adam'"),
        (["--subset-size", "63"], "subset_size must be even, two rows a position, got 63"),
        (["--subset-size", "514"], "subset_size must be at most 2 n_train length = 512, got 514"),
        (["--heads", "3"], "width must be a multiple of heads = 3, got 16"),
        (["--loss", "softmax_cross_entropy", "--subset-size", "8"], "subset_size must be at least 34, all classes of"),
        (["--n-train", "5000"], "fewer sequences or positions, or name another with --data"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    assert cli.main(["transformer", "--preset", "smoke", "--out", str(tmp_path / "run"), *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def tiny(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("transformer")
    config = dataclasses.replace(TINY, data=words)
    setting = transformer.set_up(config)
    return config, setting, transformer.run_all(config, folder, setting), folder


def saved(setting, folder, step):
    like = setting.model.init(jax.random.key(0), setting.x[:1])
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in jax.tree.leaves_with_path(like)]
    found = np.load(folder / "probes" / f"epoch_{step:06d}.npz")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name].astype(np.float64) for name in names])


@pytest.mark.slow
def test_the_record_against_dense_computations(tiny):
    """Loss, gradient and Hessian of all positions, and the kernel of the rows, in float64 at saved parameters."""
    _, setting, done, folder = tiny
    record, text = done["sgd", 1], setting.text
    after = np.eye(text.c)[text.y]
    with jax.enable_x64(True):
        places = {place: saved(setting, folder / "sgd-seed1", step) for place, step in ((0, 0), (2, 6))}
        points = {place: jax.flatten_util.ravel_pytree(jax.tree.map(jnp.asarray, one)) for place, one in places.items()}
        back = points[0][1]

        def outputs(theta):
            return setting.model.apply(back(theta), text.x).reshape(-1)

        def loss(theta):
            return 0.5 * jnp.sum((outputs(theta) - after.reshape(-1)) ** 2) / text.y.size

        dense = jax.jit(
            lambda q: (loss(q), jax.grad(loss)(q), jax.hessian(loss)(q), outputs(q), jax.jacrev(outputs)(q))
        )
        computed = {place: jax.device_get(dense(flat)) for place, (flat, _) in points.items()}
    for place, (value, gradient, hessian, found, jacobian) in computed.items():
        step = int(record["probe_epoch"][place])
        j, curvature = jacobian[record["subset_ids"]], np.linalg.eigvalsh(hessian)
        r = (found - after.reshape(-1))[record["subset_ids"]]
        values = np.linalg.eigvalsh(j @ j.T)
        # Series in float32: a few hundred roundings of terms of order one. Products for β have a residual of 1e-4.
        assert record["loss"][step] == pytest.approx(float(value), rel=1e-5)
        assert record["grad_sq_norm"][step] == pytest.approx(float(gradient @ gradient), rel=1e-4)
        assert record["sharpness"][place] == pytest.approx(curvature[-1], rel=1e-3)
        assert record["ntk_max_eig"][place] == pytest.approx(values[-1], rel=1e-12)
        assert record["ntk_min_eig"][place] == pytest.approx(values[0], abs=1e-13 * values[-1])
        assert record["ntk_rayleigh"][place] == pytest.approx(r @ j @ j.T @ r / (r @ r), rel=1e-10)
        assert record["probe_loss"][place] == pytest.approx(r @ r / (2 * r.size), rel=1e-12)
    assert np.isnan(record["sharpness"][1])
    assert (int(record["n"]), int(record["c"]), int(record["p"])) == (text.y.size * text.c, 1, gradient.size)


@pytest.mark.slow
def test_what_the_runs_say(tiny):
    config, setting, done, folder = tiny
    assert list(done) == [("sgd", 0), ("adam", 0), ("sgd", 1), ("adam", 1)]
    for (optimizer, seed), record in done.items():
        assert records.load(folder / f"{optimizer}-seed{seed}").checksum() == record.checksum()
        assert (record.config["optimizer"], record.config["seed"]) == (optimizer, seed)
        assert record.config["data_checksum"] == setting.text.checksum
        assert {"data", "out", "seeds", "optimizers", "adam_learning_rate"}.isdisjoint(record.config)
        by = {verdict.claim: verdict for verdict in theory.verify(record)}
        assert by["consistency"].outcome == "not refuted"
        assert not theory.any_inconsistent(by.values())
        assert all(verdict.outcome != "proved" for verdict in by.values())
        assert (record["step_deviation"][:-1] < 1e-3).all() == (optimizer == "sgd")
    assert done["sgd", 0]["loss"][0] == done["adam", 0]["loss"][0] != done["sgd", 1]["loss"][0]
    table = transformer.table(done, config)
    assert table.arms == ("sgd", "adam")
    last = [float(done["adam", seed]["loss"][-1]) for seed in (0, 1)]
    assert table.cells["loss_t"][1].value == pytest.approx(np.mean(last))
    assert table.cells["loss_t"][1].deviation == pytest.approx(np.std(last, ddof=1))
    assert f"kernel of 12 of {setting.text.y.size * setting.text.c:,} rows" in table.notes[0].lower()
    figure = transformer.figure(done, config)
    assert [axes.get_title(loc="left")[:3] for axes in figure.axes] == ["(a)", "(b)", "(c)", "(d)"]
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), done["sgd", 0]["loss"])
    np.testing.assert_array_equal(figure.axes[2].lines[0].get_ydata(), done["sgd", 0]["ntk_max_eig"])
    assert "floor of every causal function" in figure.axes[0].get_legend_handles_labels()[1]
    assert len(plotting.plot({"a": done["sgd", 0], "b": done["adam", 0]}).axes) == 4


@pytest.mark.slow
def test_cross_entropy_and_mini_batches(words, tmp_path):
    config = dataclasses.replace(
        TINY,
        data=words,
        loss="softmax_cross_entropy",
        batch_size=4,
        optimizers="adam",
        seeds="0",
        save_probes=False,
    )
    record = transformer.run_all(config, tmp_path, transformer.set_up(config))["adam", 0]
    text = data.load_text(n=6, length=5, data=words)
    assert record.loss == "softmax_cross_entropy"
    assert (int(record["n"]), int(record["c"])) == (30, text.c)
    assert int(record["kernel_samples"]) == 12 // text.c
    assert int(record["batch_size"]) == 4 * 5
    assert record["loss"][0] == pytest.approx(np.log(text.c), abs=0.3), "outputs start at variance 1/4"
    assert record["spectrum"].shape[1] == 12 // text.c * text.c
    verdicts = theory.verify(record)
    assert not theory.any_inconsistent(verdicts)
    assert verdicts["ntk_positive"].outcome != "proved"


@pytest.mark.slow
def test_command(words, tmp_path, capsys):
    options = ["--width", "4", "--layers", "1", "--heads", "2", "--length", "5", "--n-train", "6", "--epochs", "4"]
    measured = ["--subset-size", "12", "--hessian-probes", "0", "--second-opinion", "--optimizers", "sgd"]
    command = ["transformer", *options, *measured, "--seeds", "0,1", "--data", str(words), "--out", str(tmp_path)]
    assert cli.main([*command, "--list-arms"]) == 0
    assert capsys.readouterr().out.strip() == '["sgd-seed0", "sgd-seed1"]'
    assert cli.main([*command, "--arm", "sgd-seed1"]) == 0
    assert cli.main(command) == 0
    assert "sgd-seed1: " in capsys.readouterr().out
    difference = records.load(tmp_path / "sgd-seed1")["ntk_peer_difference"]
    assert difference[0] < 1e-12, "neural-tangents agrees up to rounding"
    for name in ("transformer.md", "transformer.csv", "transformer.tex", "figures/transformer.png", "report.html"):
        assert (tmp_path / name).stat().st_size > 300, name
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("is there, made with this config") == 2
