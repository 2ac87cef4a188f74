"""The step-size boundary where it is known: linear models, quadratics and a two-layer linear network."""

import csv
import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lplr_jax import cli, diagnostics, plotting
from lplr_jax.curves.stability import power_law
from lplr_jax.experiments import boundary
from lplr_jax.experiments.boundary import BoundaryConfig, Point
from lplr_jax.experiments.descent_search import Bracket, descends, find_boundary
from lplr_jax.losses import Objective


def linear(params, x):
    return x @ params


def diagonal(params, x):
    # Squared outputs of this model are Σ d_i θ_i², a quadratic with the Hessian diag(d) for the sum loss.
    return x * params[None, :]


def two_layers(params, x):
    first, second = params
    return x @ first @ second


def test_boundary_of_a_linear_model_is_two_over_beta():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, y = jnp.asarray(rng.normal(size=(40, 5))), jnp.asarray(rng.normal(size=(40, 1)))
        params = jnp.asarray(rng.normal(size=(5, 1)))
        for scale, s in (("mean", 40), ("sum", 1)):
            expected = 2 / float(np.linalg.eigvalsh(np.asarray(x.T @ x) / s)[-1])
            start = expected * rng.uniform(0.1, 10)
            found = find_boundary(Objective(linear, scale), params, (x, y), start=start, tolerance=1e-4)
            # Just above 2/β the sharp direction grows by 4e-3 a step, which shows once the others have decayed.
            assert found.middle == pytest.approx(expected, rel=1e-3)
            assert found.descends < found.fails <= found.descends * (1 + 1e-4)


@given(
    values=st.lists(st.floats(0.3, 5.0), min_size=1, max_size=5),
    start=st.floats(0.01, 10.0),
    together=st.booleans(),
)
def test_boundary_of_a_quadratic_is_two_over_beta(values, start, together):
    with jax.enable_x64(True):
        spectrum = np.zeros(5)
        spectrum[: len(values)] = values
        x, y = jnp.asarray(np.sqrt(spectrum))[None, :], jnp.zeros((1, 5))
        found = find_boundary(
            Objective(diagonal, "sum"), jnp.ones(5), (x, y), start=start, tolerance=1e-4, together=together
        )
    assert found.middle == pytest.approx(2 / max(values), rel=1e-3)


def test_boundary_of_a_two_layer_linear_network():
    """Beside a minimiser, displaced along the sharpest direction, the boundary is 2/β of that minimiser."""
    rng = np.random.default_rng(3)
    with jax.enable_x64(True):
        x = jnp.asarray(rng.normal(size=(20, 4)))
        params = (jnp.asarray(rng.normal(size=(4, 6))), jnp.asarray(rng.normal(size=(6, 2))))
        y = two_layers(params, x)
        objective = Objective(two_layers, "mean")
        flat, unravel = jax.flatten_util.ravel_pytree(params)
        hessian = jax.hessian(lambda v: objective.value(unravel(v), x, y))(flat)
        values, vectors = np.linalg.eigh(np.asarray(hessian))
        beside = unravel(flat + 1e-5 * jnp.asarray(vectors[:, -1]))
        found = find_boundary(objective, beside, (x, y), start=1.0, tolerance=1e-4)
        # Third derivatives change β by the order of the displacement, 1e-5.
        assert found.middle == pytest.approx(2 / values[-1], rel=1e-3)
        # The product itself sees the same β.
        assert diagnostics.hessian_extremes(objective.value, params, x, y).largest == pytest.approx(
            values[-1], rel=1e-6
        )


def test_descends_is_the_sign_of_every_step():
    """Against the closed form x_t = (1 - η) x_0 of L = x²/2, step by step."""
    with jax.enable_x64(True):
        objective, batch = Objective(diagonal, "sum"), (jnp.ones((1, 1)), jnp.zeros((1, 1)))
        rates = jnp.asarray([0.5, 1.0, 1.5, 1.99, 2.01, 3.0, jnp.inf])
        alone = [bool(descends(objective, jnp.ones(1), batch, rate, steps=100)) for rate in rates]
        together = jax.vmap(lambda rate: descends(objective, jnp.ones(1), batch, rate, steps=100))(rates)
    assert alone == [True, True, True, True, False, False, False]
    assert together.tolist() == alone


@pytest.mark.parametrize(("steps", "expected"), [(2, True), (40, False)])
def test_a_late_rise_is_seen_only_by_a_run_that_is_long_enough(steps, expected):
    """A sharp direction that starts tiny outgrows a slow one only after some steps."""
    with jax.enable_x64(True):
        x = jnp.asarray([[1.0, np.sqrt(0.05)]])
        params = jnp.asarray([1e-3, 1.0])
        batch = (x, jnp.zeros((1, 2)))
        assert bool(descends(Objective(diagonal, "sum"), params, batch, jnp.asarray(2.4), steps=steps)) is expected


def test_rounding_is_no_rise():
    """In float32 a converged run stands still within a few roundings for 1,000 steps."""
    rng = np.random.default_rng(1)
    x, w = jnp.asarray(rng.normal(size=(50, 8)), jnp.float32), jnp.asarray(rng.normal(size=(8, 1)), jnp.float32)
    beta = float(np.linalg.eigvalsh(np.asarray(x.T @ x, np.float64) / 50)[-1])
    batch = (x, x @ w + 0.1)
    run = jax.jit(lambda rate: descends(Objective(linear, "mean"), jnp.zeros((8, 1)), batch, rate, steps=1000))
    assert bool(run(jnp.asarray(1.0 / beta, jnp.float32)))
    assert not bool(run(jnp.asarray(2.02 / beta, jnp.float32)))


@pytest.mark.usefixtures("without_type_checks")
def test_mistakes_are_named():
    objective, batch = Objective(diagonal, "sum"), (jnp.zeros((1, 1)), jnp.zeros((1, 1)))
    with pytest.raises(ValueError, match=r"no boundary after \d+ trials"):
        find_boundary(objective, jnp.ones(1), batch, start=1.0, max_rounds=5)
    for settings_, message in (
        ({"start": -1.0}, "start must be a finite number > 0, got -1.0"),
        ({"start": 1.0, "tolerance": 0.0}, "tolerance must be a finite number > 0, got 0.0"),
        ({"start": 1.0, "steps": 0}, "steps must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            find_boundary(objective, jnp.ones(1), batch, **settings_)


def points():
    return tuple(Point(m, 0.7 / m, Bracket(0.65 / m, 0.66 / m, 7)) for m in (64, 128, 256))


def test_exponents_and_table():
    measured, predicted = boundary.exponents(points())
    assert measured.slope == pytest.approx(-1)
    assert predicted.slope == pytest.approx(-1)
    table = boundary.table(points(), BoundaryConfig())
    assert table.cells["ratio"][0].value == pytest.approx(np.sqrt(0.65 * 0.66) / 0.7)
    assert "measured -1.000 ± 0.000" in table.notes[1]
    assert table.cells["critical_step"] == [None] * 3, "files from before have none"
    found = boundary.table([replace(point, critical=0.5) for point in points()], BoundaryConfig())
    assert found.cells["critical_step"][0].value == 0.5


def test_figure_shows_both_and_their_ratio(tmp_path):
    figure = plotting.boundary([64, 128, 256], [0.01, 0.005, 0.0025], [0.009, 0.004, 0.002], [0.0091, 0.0041, 0.0021])
    top, bottom = figure.axes
    np.testing.assert_allclose(top.lines[0].get_ydata(), [0.01, 0.005, 0.0025])
    ratio = np.sqrt(np.array([0.009 * 0.0091, 0.004 * 0.0041, 0.002 * 0.0021])) / [0.01, 0.005, 0.0025]
    np.testing.assert_allclose(bottom.lines[2].get_ydata(), ratio)
    law = power_law(np.array([64.0, 128.0, 256.0]), np.array([0.01, 0.005, 0.0025]))
    assert f"{law.slope:.2f}" in top.get_legend().get_texts()[0].get_text()
    ends = [[0.009, 0.004, 0.002], [0.0091, 0.0041, 0.0021]]
    beside = plotting.boundary([64, 128, 256], [0.01, 0.005, 0.0025], *ends, critical=[0.02, np.nan, 0.01])
    labels = {line.get_label(): line for line in beside.axes[0].lines}
    (once,) = (line for label, line in labels.items() if "one step descends" in label)
    np.testing.assert_array_equal(once.get_ydata(), [0.02, np.nan, 0.01])
    assert plotting.save(figure, tmp_path / "b.png")[0].stat().st_size > 10_000
    with pytest.raises(ValueError, match=r"at least two, got \[1, 1, 1, 1\]"):
        plotting.boundary([64], [0.1], [0.1], [0.1])


@pytest.mark.slow
def test_command(tmp_path, capsys):
    options = [
        "--widths",
        "4,8",
        "--n-train",
        "30",
        "--steps",
        "10",
        "--tolerance",
        "0.2",
        "--depth",
        "2",
        "--out",
        str(tmp_path),
    ]
    assert cli.main(["boundary", *options]) == 0
    shown = capsys.readouterr().out
    for width in (4, 8):
        assert shown.index(f"width {width}: predicted boundary") < shown.index(f"width {width}: descends at")
    content = json.loads((tmp_path / "boundary.json").read_text())
    assert [point["width"] for point in content["points"]] == [4, 8]
    assert content["config"]["steps"] == 10
    for point in content["points"]:
        assert point["critical"] > 0
        bracket = point["bracket"]
        assert bracket["descends"] < bracket["fails"] <= 1.2 * bracket["descends"]
    with (tmp_path / "boundary.csv").open() as file:
        assert [row["arm"] for row in csv.DictReader(file)] == ["m = 4", "m = 8"]
    assert (tmp_path / "figures" / "boundary.png").stat().st_size > 10_000


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--widths", "a"], "widths must be integers with commas between them"),
        (["--steps", "0"], "steps must be >= 1, got 0"),
        (["--tolerance", "0"], "tolerance must be a finite number > 0, got 0.0"),
    ],
)
def test_bad_options_end_with_a_sentence(options, message, capsys, tmp_path):
    assert cli.main(["boundary", "--out", str(tmp_path / "run"), *options]) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())
    assert not (tmp_path / "run").exists()
