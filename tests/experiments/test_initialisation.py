"""Initialisations against their formulas, the log-log slope, and `lplr initialisation` end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make
from lplr_jax import cli, diagnostics, records
from lplr_jax.curves.summary import gradient_law, summarise
from lplr_jax.experiments import initialisation, mnist
from lplr_jax.losses import Objective
from lplr_jax.models import INITS, MLP
from lplr_jax.ntk import empirical_ntk
from lplr_jax.parameters import count_parameters


def layers(params):
    return [np.asarray(leaf["kernel"], np.float64) for leaf in params["params"].values()]


def gradient_layers(model, params, x, y):
    _, gradient = Objective(model.apply, "mean").value_and_gradient(params, x, y)
    return [np.abs(np.asarray(leaf["kernel"])).max() for leaf in gradient["params"].values()]


def batch(seed=0, n=6, d=9):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.uniform(size=(n, d)), jnp.float32), jnp.asarray(rng.choice([-1.0, 1.0], (n, 1)), jnp.float32)


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize(("width", "expected"), [(128, 150_145), (256, 398_593), (512, 1_190_401), (1024, 3_953_665)])
def test_the_number_of_parameters_is_the_papers_for_every_initialisation(init, width, expected):
    shapes = jax.eval_shape(MLP(width, initialisation=init).init, jax.random.key(0), jnp.zeros((1, 784)))
    assert count_parameters(shapes) == expected


@pytest.mark.parametrize(
    ("init", "activation"),
    [*((init, "softplus") for init in INITS), ("antisymmetric", "tanh"), ("antisymmetric", "relu")],
)
def test_every_layer_has_a_gradient(init, activation):
    x, y = batch()
    model = MLP(16, activation=activation, initialisation=init)
    params = model.init(jax.random.key(1), x)
    sizes = gradient_layers(model, params, x, y)
    assert len(sizes) == 5
    # Rounding leaves 1e-7 of the largest; a layer cut off by the pairing would have exactly that or nothing.
    assert min(sizes) > 1e-3 * max(sizes), sizes


def test_pairing_the_last_hidden_layer_alone_would_cut_the_layers_below():
    """The counter-example that the pairing of every layer avoids: with A = B the cotangents of both halves cancel."""
    x, y = batch()
    model = MLP(16, initialisation="antisymmetric")
    params = model.init(jax.random.key(1), x)
    kernel = params["params"]["dense_3"]["kernel"]
    half = kernel[:, :8]
    params["params"]["dense_3"]["kernel"] = jnp.concatenate([half, half], axis=1)
    sizes = gradient_layers(model, params, x, y)
    assert max(sizes[:3]) < 1e-5 * max(sizes)


@pytest.mark.parametrize(("seed", "half", "depth", "outputs"), [(0, 1, 2, 1), (1, 5, 4, 3), (2, 12, 5, 1)])
def test_antisymmetric_pairing(seed, half, depth, outputs):
    x, _ = batch(seed)
    model = MLP(2 * half, depth, "softplus", outputs, initialisation="antisymmetric")
    params = model.init(jax.random.key(seed), x)
    first, *hidden, last = layers(params)
    np.testing.assert_array_equal(first[:, :half], first[:, half:])
    for kernel in hidden:
        np.testing.assert_array_equal(kernel[:half, :half], kernel[half:, half:])
        np.testing.assert_array_equal(kernel[:half, half:], kernel[half:, :half])
        assert not np.array_equal(kernel[:half, :half], kernel[:half, half:])
    np.testing.assert_array_equal(last[:half], -last[half:])
    # Outputs cancel up to rounding of 2 half terms, each of the size of the paired sum of magnitudes.
    h = np.asarray(x, np.float64)
    for kernel in [first, *hidden]:
        h = np.logaddexp(h @ kernel, 0)
    size = np.abs(h) @ np.abs(last)
    assert (np.abs(np.asarray(model.apply(params, x))) <= 100 * depth * 2.0**-24 * size).all()


def test_variances():
    x = jnp.zeros((1, 784))
    for init, last_variance in (("he", 2 / 512), ("scaled-output", 2 / 512**2), ("antisymmetric", 2 / 512)):
        params = MLP(512, initialisation=init).init(jax.random.key(2), x)
        *hidden, last = layers(params)
        for kernel, fan_in in zip(hidden, (784, 512, 512, 512), strict=True):
            # The sample variance of N independent draws deviates by sqrt(2 / N); pairing halves N.
            assert kernel.var() == pytest.approx(2 / fan_in, rel=5 * np.sqrt(4 / kernel.size)), init
        # The mean is known to be zero; 256 independent draws in the antisymmetric case.
        assert np.mean(last**2) == pytest.approx(last_variance, rel=5 * np.sqrt(2 / 256)), init


def test_scaled_output_is_he_with_a_smaller_last_layer():
    x, _ = batch()
    he, scaled = (MLP(8, initialisation=init).init(jax.random.key(0), x) for init in ("he", "scaled-output"))
    for a, b in zip(layers(he)[:-1], layers(scaled)[:-1], strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_allclose(layers(scaled)[-1], layers(he)[-1] / np.sqrt(8), rtol=1e-6)


@pytest.mark.usefixtures("without_type_checks")
def test_what_cannot_be_paired_is_refused():
    with pytest.raises(ValueError, match="even width and depth >= 2, got width 7 and depth 5"):
        MLP(7, initialisation="antisymmetric")
    with pytest.raises(ValueError, match="even width and depth >= 2, got width 8 and depth 1"):
        MLP(8, 1, initialisation="antisymmetric")
    with pytest.raises(ValueError, match="initialisation must be one of he, scaled-output, antisymmetric, got 'lecun'"):
        MLP(8, initialisation="lecun")


@given(slope=st.floats(-3, 3), scale=st.floats(0.1, 10), noise=st.floats(0, 0.1), seed=st.integers(0, 99))
def test_power_law_is_least_squares(slope, scale, noise, seed):
    rng = np.random.default_rng(seed)
    x = np.sort(rng.uniform(0.1, 10, 30))
    y = scale * x**slope * np.exp(noise * rng.normal(size=30))
    law = diagnostics.power_law(np.append(x, [np.nan, -1.0]), np.append(y, [1.0, 1.0]))
    # NumPy's covariance divides by N - 2 as well.
    (expected, intercept), covariance = np.polyfit(np.log(x), np.log(y), 1, cov=True)
    assert law.slope == pytest.approx(expected, abs=1e-9)
    assert law.intercept == pytest.approx(intercept, abs=1e-9)
    assert law.stderr == pytest.approx(np.sqrt(covariance[0, 0]), rel=1e-6, abs=1e-9)
    assert law.points == 30
    assert law.range == (pytest.approx(x[0]), pytest.approx(x[-1]))
    assert law.at(x[:3]) == pytest.approx(np.exp(intercept) * x[:3] ** expected)


def test_power_law_without_points_is_nan():
    assert np.isnan(float(diagnostics.power_law(np.array([1.0]), np.array([2.0]))))
    assert np.isnan(diagnostics.power_law(np.array([1.0, 2.0]), np.array([2.0, 3.0])).stderr)


def test_slope_of_a_record_is_taken_over_the_regime():
    t = np.arange(401.0)
    loss = np.exp(-0.01 * t) + 0.05
    record = make(400, 3, loss=loss, grad_sq_norm=3.0 * (loss - 0.05) ** 1.14)
    assert gradient_law(record, 0.05).slope == pytest.approx(1.14, abs=1e-9)
    regime = summarise(record).regime
    law = gradient_law(record, 0.0)
    assert law.points == regime.stop - regime.start
    assert law.range[0] == pytest.approx(loss[regime.stop - 1])


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    folder = tmp_path_factory.mktemp("initialisation")
    config = dataclasses.replace(
        initialisation.PRESETS["smoke"], width=8, epochs=16, probe_every=8, n_train=40, inits="he,antisymmetric"
    )
    lines = []
    return config, folder, initialisation.run(config, folder, say=lines.append), lines


@pytest.mark.slow
def test_arms_differ_in_the_initialisation_alone(smoke):
    config, folder, done, lines = smoke
    first, second = (record.config for _, record in done)
    assert {key for key in first if first[key] != second[key]} == {"init"}
    assert [arm.name for arm, _ in done] == ["he", "antisymmetric"]
    assert done[1][1]["loss"][0] == pytest.approx(0.5, rel=1e-5), "labels are ±1 and the output is zero"
    # η is at most 0.4 of either boundary, up to its rounding to three digits.
    assert all(float(record["learning_rate"] * record["sharpness"][0]) <= 0.81 for _, record in done)
    assert any("expected: monotone descent" in line for line in lines)
    assert (folder / "predictions.json").exists()
    table = initialisation.table(done)
    assert table.cells["slope_proxy"][0].deviation is not None
    again = []
    before = [(folder / arm.name / "record.npz").stat().st_mtime_ns for arm, _ in done]
    initialisation.run(config, folder, say=again.append)
    assert [(folder / arm.name / "record.npz").stat().st_mtime_ns for arm, _ in done] == before
    assert sum("is there, made with this config" in line for line in again) == 2


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--inits", "he,xavier"], "inits must be distinct names among he, scaled-output, antisymmetric"),
        (["--share", "-1"], "share must be a finite number > 0, got -1.0"),
        (["--width", "0"], "width must be >= 1, got 0"),
    ],
)
def test_mistakes_end_with_a_sentence(options, message, capsys, tmp_path):
    command = ["initialisation", "--preset", "smoke", "--out", str(tmp_path / "run"), *options]
    assert cli.main(command) == cli.BAD_INPUT
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).split())


@pytest.mark.usefixtures("without_type_checks")
def test_an_unknown_init_is_refused_by_the_experiment_too():
    with pytest.raises(ValueError, match="init must be one of he, scaled-output, antisymmetric"):
        mnist.resolve(dataclasses.replace(mnist.PRESETS["smoke"], init="lecun"))


@pytest.mark.slow
def test_command_draws_figure_and_tables(tmp_path, capsys):
    assert cli.main(["initialisation", "--preset", "smoke", "--out", str(tmp_path)]) == 0
    assert records.load(tmp_path / "scaled-output").config["init"] == "scaled-output"
    for name in ("initialisation.md", "initialisation.csv", "initialisation.tex", "figures/initialisation.png"):
        assert (tmp_path / name).stat().st_size > 500, name
    assert "the panel of loss against width is left out" in capsys.readouterr().out


@pytest.mark.slow
def test_a_network_whose_output_cancels_has_a_kernel():
    """f(θ_0) is rounding noise there, which must not be taken for coupling of samples; Θ is that of the Jacobian."""
    x, _ = batch()
    model = MLP(8, initialisation="antisymmetric")
    params = model.init(jax.random.key(0), x)
    theta = np.asarray(empirical_ntk(model.apply, params, x))
    with jax.enable_x64(True):
        wide, exact = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (params, x))
        jacobian = jax.jacrev(lambda q: model.apply(q, exact)[:, 0])(wide)
        flat = np.concatenate([np.asarray(leaf).reshape(6, -1) for leaf in jax.tree.leaves(jacobian)], axis=1)
    # Two float64 sums of some 150 products.
    np.testing.assert_allclose(theta, flat @ flat.T, rtol=1e-11)
