"""The width ablation: its rule, its predictions, its arms and its tables, and that a prediction can miss."""

import csv
import dataclasses
import io
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from builders import make
from lplr_jax import cli, diagnostics, plotting, records
from lplr_jax.curves.stability import EXPECTED, observe, place_of, rounding_allowance
from lplr_jax.experiments import ablation, mnist, step_size
from lplr_jax.losses import Objective
from lplr_jax.reports import tables
from lplr_jax.training import evaluate, init_state, train_epochs

TINY = ablation.AblationConfig(
    widths="4,24", epochs=8, probe_every=4, hessian_probes=2, n_train=30, learning_rate=2e-2, smaller_learning_rate=1e-3
)


def decay(rate, steps=40, start=1.0):
    return start * rate ** np.arange(steps + 1.0)


GROWING = np.linspace(0, 1, 41)


@pytest.mark.parametrize(
    ("loss", "drift", "outcome"),
    [
        (decay(0.9), GROWING, "monotone descent"),
        (decay(0.9) + 3e-7 * np.sin(np.arange(41)), GROWING, "monotone descent"),
        (decay(0.9), np.where(np.arange(41) == 3, 0.01, GROWING), "oscillation"),
        (decay(0.9), np.where(np.arange(41) == 30, 0.01, GROWING), "monotone descent"),
        (np.where(np.arange(41) == 20, 0.5, decay(0.9)), GROWING, "oscillation"),
        (np.where(np.arange(41) == 1, 5.0, decay(0.9)), GROWING, "catapult"),
        (decay(1.1), GROWING, "divergence"),
        (np.where(np.arange(41) > 5, np.nan, decay(0.9)), np.where(np.arange(41) > 5, np.nan, GROWING), "divergence"),
    ],
)
def test_outcomes(loss, drift, outcome):
    assert observe(loss, drift).outcome == outcome


def test_observation_counts():
    seen = observe(np.array([1.0, 3.0, 0.5, 0.6, 0.4]), np.array([0.0, 1.0, 0.5, 0.7, 0.8]))
    assert seen == diagnostics.Observation("catapult", 2, 1, 3.0, 1)
    assert observe(np.array([1.0, np.nan]), np.array([0.0, np.nan])).peak == np.inf
    with pytest.raises(ValueError, match="step 0 is not finite"):
        observe(np.array([np.nan]), np.array([0.0]))


@given(eta=st.floats(0.05, 1.9), share=st.floats(0.05, 0.9), ratio=st.floats(0.0, 0.2))
def test_outcomes_on_a_quadratic_are_those_of_theory(eta, share, ratio):
    """Gradient descent on β/2 x² + ratio β/2 y²: the loss falls for η < 2/β; the drift falls at first iff η > 1/β."""
    beta, x, y = 1.0, 1.0, share
    t = np.arange(30.0)
    xs, ys = x * (1 - eta * beta) ** t, y * (1 - eta * ratio * beta) ** t
    loss = 0.5 * beta * (xs**2 + ratio * ys**2)
    drift = np.hypot(xs - x, ys - y)
    outcome = observe(loss, drift, unit_roundoff=2.0**-53).outcome
    # The slow direction moves by at most 0.2 share η a step, the sharp one by η: only the band at 1/β is unsure.
    if abs(eta - 1) > 0.1:
        assert outcome in EXPECTED[place_of(eta * beta)]


@pytest.mark.parametrize(("eta_beta", "place"), [(0.99, "below 1/β"), (1.0, "between 1/β and 2/β"), (2.0, "above 2/β")])
def test_places(eta_beta, place):
    assert place_of(eta_beta) == place
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="η β must be a finite number > 0"):
            place_of(bad)


def test_rounding_allowance_covers_float32_noise_and_no_more():
    x = jnp.asarray(np.random.default_rng(0).uniform(size=(200, 50)), jnp.float32)
    w = np.random.default_rng(1).normal(size=(50, 1))
    y = jnp.asarray(np.asarray(x, np.float64) @ w, jnp.float32)
    losses = []
    # The same loss from permuted sums near convergence: its spread is rounding alone.
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(50)
        point = jnp.asarray(w[order] + 1e-4, jnp.float32)
        losses.append(float(Objective(lambda q, a: a @ q, "mean").value(point, x[:, order], y)))
    spread, initial = np.ptp(losses), float(jnp.mean(y**2) / 2)
    assert 0 < spread < rounding_allowance(losses[0], initial, 2.0**-24) < 1e-3 * initial


def test_rule_puts_the_step_between_the_boundaries():
    config = ablation.AblationConfig(widths="1024,128,512", place=0.25, restore=0.3)
    rule = ablation.choose(config, {(128, 0): 400.0, (512, 0): 1600.0, (1024, 0): 3200.0})
    low, high = 2 / 3200, 2 / 1600
    assert rule.eta == pytest.approx(low * (high / low) ** 0.25, rel=5e-3)
    assert low < rule.eta < high
    assert rule.smaller_eta == pytest.approx(0.3 * low, rel=5e-3)
    assert "0.25 of the way" in rule.words
    assert rule.words.count("calibrated") == 2
    groups = ablation.arms_of(config, rule)
    assert [group[0].name for group in groups] == [f"m{m}-seed0" for m in (128, 512, 1024)] + ["m1024-smaller-seed0"]
    with pytest.raises(ValueError, match="no η lies between the two; name one with --learning-rate"):
        ablation.choose(config, {(128, 0): 1.0, (512, 0): 3200.0, (1024, 0): 1600.0})


def test_default_arms_are_the_papers_and_differ_in_width_and_step_alone():
    config = ablation.PRESETS["default"]
    sharpness = {(m, 0): 3.2 * m for m in (128, 256, 512, 1024)}
    arms = [arm for group in ablation.arms_of(config, ablation.choose(config, sharpness)) for arm in group]
    assert [arm.config.width for arm in arms] == [128, 256, 512, 1024, 1024]
    assert [place_of(arm.config.learning_rate * 3.2 * arm.config.width) for arm in arms] == [
        "below 1/β",
        "below 1/β",
        "between 1/β and 2/β",
        "above 2/β",
        "below 1/β",
    ]
    configs = [dataclasses.asdict(arm.config) for arm in arms]
    differing = {key for key in configs[0] if len({str(one[key]) for one in configs}) > 1}
    assert differing == {"width", "learning_rate", "hessian_probes"}, "what is measured may differ, what is run not"
    assert [one["hessian_probes"] for one in configs] == [9, 9, 2, 2, 2]
    assert mnist.resolve(arms[0].config)[1] == 50, "41 probes in 2,000 epochs"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder, lines = tmp_path_factory.mktemp("ablation"), []
    return folder, ablation.run(TINY, folder, say=lines.append), lines


def test_prediction_comes_before_and_observation_after(tiny):
    folder, done, lines = tiny
    written = json.loads((folder / "predictions.json").read_text())
    for arm, record in done:
        before, after = (
            next(i for i, line in enumerate(lines) if line.startswith(f"{arm.name}: {word}"))
            for word in ("η = ", "observed")
        )
        assert before < after
        assert lines[before] in written["predictions"]
        eta_beta = float(record["learning_rate"] * record["sharpness"][0])
        place, outcome = place_of(eta_beta), observe(record["loss"], record["drift"]).outcome
        assert f"η β = {eta_beta:.3g}: {place}" in lines[before]
        assert f"observed {outcome}" in lines[after]
        assert lines[after].endswith("hit" if outcome in EXPECTED[place] else "miss")


def test_initial_sharpness_is_that_of_the_dense_hessian(tiny):
    _, done, _ = tiny
    arm, record = done[0]
    problem = mnist.set_up(arm.config)
    flat, unravel = jax.flatten_util.ravel_pytree(problem.params)
    with jax.enable_x64(True):
        wide = jnp.asarray(flat, jnp.float64)
        x, y = (jnp.asarray(part, jnp.float64) for part in (problem.x, problem.y))
        shapes = [leaf.shape for leaf in jax.tree.leaves(problem.params)]
        treedef = jax.tree.structure(problem.params)
        cuts = np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1]

        def loss(vector):
            parts = [part.reshape(shape) for part, shape in zip(jnp.split(vector, cuts), shapes, strict=True)]
            return problem.objective.value(jax.tree.unflatten(treedef, parts), x, y)

        # Power iteration on float64 products: independent of Lanczos; the gap of the top eigenvalue is wide.
        product = jax.jit(lambda v: jax.jvp(jax.grad(loss), (wide,), (v,))[1])
        v = jax.grad(loss)(wide)
        for _ in range(200):
            v = product(v / jnp.linalg.norm(v))
        top = float(jnp.linalg.norm(v))
    assert unravel is not None
    # Float32 products leave 2e-5 of the largest eigenvalue; the tolerance asked for is 1e-4.
    assert float(record["sharpness"][0]) == pytest.approx(top, rel=2e-4)
    assert step_size.initial_sharpness(arm.config) == pytest.approx(top, rel=2e-4)


def test_finished_arms_are_not_run_again(tiny):
    folder, done, _ = tiny
    stamps = {arm.name: (folder / arm.name / "record.npz").stat().st_mtime_ns for arm, _ in done}
    (folder / done[1][0].name / "record.npz").write_bytes(b"cut short")
    lines = []
    again = ablation.run(TINY, folder, say=lines.append)
    kept = [arm.name for arm, _ in again if (folder / arm.name / "record.npz").stat().st_mtime_ns == stamps[arm.name]]
    assert kept == [done[0][0].name, done[2][0].name]
    assert sum("is there, made with this config" in line for line in lines) == 2
    assert sum("is damaged" in line for line in lines) == 1
    assert (folder / done[1][0].name / "record.npz.damaged-1").read_bytes() == b"cut short"
    for (_, first), (_, second) in zip(done, again, strict=True):
        assert first.checksum() == second.checksum()
    with pytest.raises(ValueError, match="m4-seed0 holds the run of another config: epochs 8 there, 9 asked for"):
        ablation.run(dataclasses.replace(TINY, epochs=9), folder)


@pytest.mark.slow
def test_seeds_trained_together_follow_the_same_path(tiny):
    """Over the first 20 steps, to a bound: a step adds the rounding of η ∇L and of θ, and expands by 1 + η ε at most.

    Two paths e apart are (I - η H) e apart after a step, H the mean Hessian between them, whose eigenvalues lie in
    [-ε, β]: with η β < 1 its norm is 1 + η ε. The loss then differs by ‖∇L‖ e, and ‖∇L‖² <= 2 β L as L >= 0.
    """
    _, done, _ = tiny
    base = dataclasses.replace(done[2][0].config, epochs=20, probe_every=20)
    configs = [dataclasses.replace(base, seed=seed) for seed in (0, 1)]
    steps, u = 20, 2.0**-24
    for config, advance in zip(configs, ablation.train_together(configs), strict=True):
        problem = mnist.set_up(config)
        batch, settings = (problem.x, problem.y), {"objective": problem.objective, "optimizer": problem.optimizer}
        state = init_state(problem.params, problem.optimizer)
        alone, metrics = train_epochs(state, batch, problem.params, epochs=steps, **settings)
        together, others = advance(init_state(problem.params, problem.optimizer), steps)
        ends = [
            diagnostics.hessian_extremes(problem.objective.value, point, *batch, reduction=config.loss_scale)
            for point in (problem.params, alone.params)
        ]
        # Twice the curvature found at both ends covers the way between them and the Ritz values' own error.
        beta, epsilon = 2 * max(end.largest for end in ends), 2 * max(-end.least for end in ends)
        eta, first = config.learning_rate, float(metrics.loss[0])
        assert eta * beta < 1
        # Sums over at most 784 + 4 m + n terms, both ways; probabilistic bound (Higham and Mary 2019).
        gamma = np.sqrt(2 * (784 + 4 * 24 + 30)) * u
        length = float(jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(problem.params))))
        added = eta * gamma * np.sqrt(2 * beta * first) + u * length
        apart = added * sum((1 + eta * max(epsilon, 0.0)) ** step for step in range(steps))
        bound = np.sqrt(2 * beta * first) * apart + gamma * first
        assert bound < 0.02 * float(metrics.loss[0] - metrics.loss[-1]), "a bound this wide tests nothing"
        np.testing.assert_allclose(others.loss, metrics.loss, rtol=0, atol=bound)
        after = [
            evaluate(one.params, batch, problem.params, objective=problem.objective).loss for one in (alone, together)
        ]
        assert abs(float(after[0]) - float(after[1])) <= bound


def test_table_has_every_column_of_the_paper_and_more(tiny):
    _, done, _ = tiny
    table = ablation.table(done)
    assert table.arms == ("m = 4", "m = 24", "m = 24, smaller η")
    for key, (arm, record) in itertools.product(("p", "lambda_0", "loss_t", "drift_t", "eta_beta"), done):
        cell = table.cells[key][[a.name for a, _ in done].index(arm.name)]
        expected = {
            "p": 3 * arm.config.width**2 + 789 * arm.config.width + 1,
            "lambda_0": record["ntk_min_eig"][0],
            "loss_t": record["loss"][-1],
            "drift_t": record["drift"][-1],
            "eta_beta": record["learning_rate"] * record["sharpness"][0],
        }[key]
        assert getattr(cell, "value", cell) == pytest.approx(float(expected))
    eigs = done[0][1]["ntk_min_eig"]
    assert table.cells["ntk_drift"][0].value == pytest.approx(abs(eigs[-1] - eigs[0]) / eigs[0])
    assert "drift_paper" not in {quantity.key for quantity in table.quantities}
    hits = sum(cell == "hit" for cell in table.cells["verdict"])
    assert f"{hits} of 3 hit, {3 - hits} missed" in table.notes[0]


def ablation_records():
    for width, eta, unstable in ((128, 8e-4, False), (1024, 8e-4, True), (1024, 2e-4, False)):
        t = np.arange(401.0)
        loss = np.exp(-0.01 * t) + 0.05
        loss[1] = 9.0 if unstable else loss[1]
        record = make(400, 9, loss=loss, learning_rate=np.array(eta), sharpness=np.full(9, 3.3 * width))
        extra = {name: np.full(9, 0.1) for name in ("ntk_min_eig_lower", "ntk_min_eig_subset")}
        config = {"width": width, "seed": 0}
        yield dataclasses.replace(record, arrays={**record.arrays, **extra}, config=config)


def test_paper_figures_stand_beside_ours_and_divergence_is_a_result():
    done = []
    for record, kind in zip(ablation_records(), ("common", "common", "smaller"), strict=True):
        arm = ablation.Arm("a", kind, dataclasses.replace(mnist.PRESETS["default"], width=record.config["width"]))
        done.append((arm, record))
    for name in ("loss", "drift", "grad_sq_norm"):
        done[1][1].arrays[name][200:] = np.nan
    table = ablation.table(done)
    assert [getattr(cell, "value", None) for cell in table.cells["drift_paper"]] == [None, 1.870, 0.158]
    assert table.cells["loss_t"][1].value == np.inf
    assert table.cells["observed"][1] == "divergence"
    assert table.cells["diverged"] == ["no", "at epoch 200", "no"]
    figure = plotting.ablation([record for _, record in done])
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert [label.partition(": ")[2] for label in labels] == [
        "monotone descent",
        "diverged at step 200",
        "monotone descent",
    ]
    assert table.cells["verdict"][1] == "hit"
    assert any("another set-up" in note for note in table.notes)


def test_deviation_over_seeds():
    cell = tables.mean_of([1.0, 2.0, 4.0])
    assert (cell.value, cell.deviation) == (pytest.approx(7 / 3), pytest.approx(np.std([1, 2, 4], ddof=1)))
    assert tables.mean_of([2.5]) == tables.Measured(2.5)
    assert [tables.as_text(tables.Measured(value)) for value in (0.99945678, 0.9, 1.0)] == ["0.999457", "0.9", "1"]
    assert tables.mean_of([float("nan")]) is None
    assert tables.mean_of([float("inf"), float("inf")]) == tables.Measured(float("inf"))


def example():
    quantities = (
        tables.Quantity("eta", "η", r"$\eta$", "step size"),
        tables.Quantity("p", "p", "$p$", ""),
        tables.Quantity("what", "a|b", "what", ""),
    )
    cells = {
        "eta": [tables.Measured(8.5912345e-4), tables.Measured(2.5e-7, 1e-8), None],
        "p": [150_145, 3_953_665, 7],
        "what": ["above 2/β", "50 % & more_or_less", None],
    }
    return tables.Table("T", ("one", "two", "three"), quantities, cells, ("a note",))


def test_one_source_four_forms(tmp_path):
    table = example()
    rows = list(csv.DictReader(io.StringIO(tables.to_csv(table))))
    assert [row["arm"] for row in rows] == ["one", "two", "three"]
    assert float(rows[0]["eta"]) == 8.5912345e-4
    assert [row["eta_deviation"] for row in rows] == ["", "1e-08", ""]
    assert rows[1]["p"] == "3953665"
    markdown = tables.to_markdown(table).splitlines()
    assert markdown[2] == "|  | one | two | three |"
    assert "| η | 0.0008591 | 2.5e-07 ± 1e-08 | - |" in markdown
    assert r"| a\|b | above 2/β | 50 % & more_or_less | - |" in markdown
    latex = tables.to_latex(table)
    assert r"$\eta$ & 0.0008591 & 2.5$\times 10^{-7}$ $\pm$ 1$\times 10^{-8}$ & - \\" in latex
    assert r"above 2/$\beta$ & 50 \% \& more\_or\_less & - \\" in latex
    assert latex.count(r"\\") == 4
    for rule in ("toprule", "midrule", "bottomrule"):
        assert rf"\{rule}" in latex
    assert latex.isascii()
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(tables.to_rich(table))
    assert "3,953,665" in console.export_text()
    assert [path.suffix for path in tables.save(table, tmp_path / "t")] == [".md", ".csv", ".tex"]
    with pytest.raises(ValueError, match="p must have one cell for each of 3 arms, got 1"):
        dataclasses.replace(table, cells={**table.cells, "p": [1]})


def test_figure_dashes_the_unstable_arm_and_keeps_one_colour_a_width(tmp_path):
    figure = plotting.ablation(list(ablation_records()))
    drift = figure.axes[1].lines
    assert [line.get_linestyle() for line in drift] == ["-", "--", "-"]
    assert len({str(line.get_color()) for line in drift}) == 2
    assert str(drift[1].get_color()) == str(drift[2].get_color()) != str(drift[0].get_color())
    # The inset shows the catapult, which one step of the long axis would hide.
    (inset,) = figure.axes[3].child_axes
    assert [line.get_ydata()[1] > 1 for line in inset.lines] == [False, True, False]
    assert inset.lines[1].get_xdata()[-1] == 20
    # Apart in grey as well.
    light = [np.dot(line.get_color()[:3], [0.299, 0.587, 0.114]) for line in drift]
    assert abs(light[0] - light[1]) > 0.2
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels[1] == "m = 1024, η = 0.0008: catapult"
    assert plotting.save(figure, tmp_path / "a.png")[0].stat().st_size > 20_000
    with pytest.raises(ValueError, match="no record"):
        plotting.ablation([])


def test_figure_of_initialisations_has_a_third_panel_where_widths_are_known():
    one, two, three = ablation_records()
    assert len(plotting.initialisation({"he": one, "scaled-output": three}).axes) == 2
    figure = plotting.initialisation({"he": one}, [one, two], epoch=250)
    assert len(figure.axes) == 3
    stable, unstable = figure.axes[2].lines[:2]
    assert stable.get_xdata().tolist() == [128.0]
    assert unstable.get_xdata().tolist() == [1024.0]
    assert unstable.get_ydata()[0] == two["loss"][250]


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "64"], "widths must be at least two"),
        (["--widths", "64,x"], "widths must be integers with commas between them"),
        (["--widths", "64,64"], "widths must be distinct integers >= 1"),
        (["--seeds", "0,-1"], "seeds must be distinct integers >= 0"),
        (["--place", "1.5"], "place must lie between 0 and 1, got 1.5"),
        (["--restore", "0"], "restore must be a finite number > 0, got 0.0"),
        (["--learning-rate", "nan"], "learning_rate must be a finite number > 0, got nan"),
        (["--hessian-probes", "0"], "hessian_probes must be >= 1, got 0"),
        (["--epochs", "0"], "epochs must be >= 1, got 0"),
        (["--init", "antisymmetric", "--widths", "15,32"], "needs an even width"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    out = ["--preset", "smoke", "--n-train", "20", "--out", str(tmp_path / "run")]
    assert cli.main(["ablation", *out, *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    text = " ".join((captured.err + captured.out).split())
    assert message in text
    assert "Traceback" not in text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_command_writes_arms_tables_and_figure(tmp_path, capsys):
    assert cli.main(["ablation", "--preset", "smoke", "--seeds", "0,1", "--out", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert "Predictions:" in shown
    assert shown.count("expected:") == 8
    for suffix in ("md", "csv", "tex"):
        assert (tmp_path / f"ablation.{suffix}").stat().st_size > 500
    assert (tmp_path / "figures" / "ablation.png").stat().st_size > 20_000
    assert records.load(tmp_path / "m64-smaller-seed1").config["seed"] == 1
    assert "±" in (tmp_path / "ablation.md").read_text()
