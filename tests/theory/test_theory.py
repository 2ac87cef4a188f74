"""The claims, held against runs whose answer is known from theory, and against records with one array tampered."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lplr_jax import cli, ntk, schema, theory
from lplr_jax.experiments import mnist
from lplr_jax.losses import Objective
from lplr_jax.measurement.probe import KernelProbe
from lplr_jax.models import MLP
from lplr_jax.records import Record
from lplr_jax.reports import report
from lplr_jax.runs.loop import probe_epochs, run_training
from lplr_jax.theory.verdict import MET, factor, weakest
from lplr_jax.training import evaluate, init_state, train_epochs

SPECTRUM = np.array([0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
N, P = SPECTRUM.size, 10


def linear(w, x):
    return x @ w


def problem(spectrum=SPECTRUM, p=P, seed=0):
    """Inputs with XXᵀ = U diag(spectrum) Uᵀ, targets with equal weight on every mode, and U."""
    rng = np.random.default_rng(seed)
    u, _ = np.linalg.qr(rng.standard_normal((spectrum.size, spectrum.size)))
    v, _ = np.linalg.qr(rng.standard_normal((p, spectrum.size)))
    return (u * np.sqrt(spectrum)) @ v.T, u @ np.ones((spectrum.size, 1)), u


def train(apply_fn, params, x, y, *, eta, epochs, every=10, scale="sum", search_steps=0, hessian=True, config=None):
    """Gradient descent in float64 through the package's own loop: its record, and the parameters of the probes."""
    with jax.enable_x64(True):
        params, x, y = jax.tree.map(lambda leaf: jnp.asarray(leaf, "float64"), (params, x, y))
        objective, optimizer = Objective(apply_fn, scale), optax.sgd(eta)
        at = probe_epochs(epochs, every)
        probe = KernelProbe(
            objective,
            x,
            np.asarray(y),
            subset=np.arange(2),
            kernel="auto",
            hessian_epochs=at if hessian else (),
            spectrum_epochs=at,
        )
        points = {}

        def probing(state_params, epoch):
            points[epoch] = jax.device_get(state_params)
            return probe(state_params, epoch)

        result = run_training(
            init_state(params, optimizer),
            probes_at=at,
            advance=lambda state, k: train_epochs(
                state, (x, y), params, objective=objective, optimizer=optimizer, epochs=k
            ),
            evaluate=lambda q: evaluate(q, (x, y), params, objective=objective),
            probe=probing,
        )
        closing = probe.close(result.arrays, search_steps=search_steps, seed=0)
    n, c = y.shape
    numbers = {
        "subset_ids": np.arange(2),
        "loss_scale": float(objective.scale(n)),
        "learning_rate": eta,
        "n": n,
        "c": c,
        "p": sum(leaf.size for leaf in jax.tree.leaves(params)),
    }
    arrays = {**result.arrays, **closing, **{name: np.asarray(value) for name, value in numbers.items()}}
    return Record("control", arrays, {"dtype": "float64", **(config or {})}), points


def by_claim(record):
    verdicts = theory.verify(record)
    assert tuple(v.claim for v in verdicts) == theory.CLAIMS
    return {v.claim: v for v in verdicts}


def tampered(record, **changes):
    arrays = {
        name: np.array(array, dtype=np.float64 if name in changes else None) for name, array in record.arrays.items()
    }
    for name, change in changes.items():
        arrays[name] = np.asarray(change(arrays[name]))
    return dataclasses.replace(record, arrays=arrays)


@pytest.fixture(scope="module")
def regression():
    x, y, u = problem()
    record, points = train(linear, np.zeros((P, 1)), x, y, eta=0.2, epochs=40)
    return record, points, x, y, u


@pytest.fixture(scope="module")
def digits():
    config = dataclasses.replace(
        mnist.PRESETS["smoke"],
        width=8,
        depth=3,
        epochs=24,
        probe_every=8,
        n_train=40,
        learning_rate=2e-3,
        search_steps=2,
    )
    return mnist.run(config)


def test_linear_regression_is_proved(regression):
    """Θ = XXᵀ for every θ: λ_0 = 1/2, L_Θ = 0, β = 4, μ = 1/2, all in units of the sum loss."""
    record, points, x, y, u = regression
    found = by_claim(record)
    for claim in theory.CLAIMS[:7]:
        assert found[claim].outcome == "proved", found[claim]
        assert not found[claim].inconsistent
    assert float(record["affine_in_parameters"]) == 1
    assert float(record["ntk_lipschitz_upper"]) == 0
    # Rounding of the kernel and of its factorisation.
    assert found["ntk_positive"].measured == pytest.approx(0.5, rel=1e-12)
    # A tenth of a per cent of room in the proof of λ_max.
    assert float(record["smoothness_upper"]) == pytest.approx(4.0, rel=2e-3)
    assert float(record["smoothness_upper"]) >= 4.0
    assert found["local_pl"].bound == pytest.approx(0.5, rel=1e-9)
    assert found["local_pl"].bound <= 0.5
    assert float(record["radius_certified"]) == np.inf
    assert found["regime"].outcome == "proved"
    # Every modal residual contracts by 1 - η λ_i.
    initial = u.T @ (x @ np.zeros((P, 1)) - y)
    for epoch, w in points.items():
        modes = u.T @ (x @ w - y)
        expected = (1 - 0.2 * SPECTRUM[:, None]) ** epoch * initial
        # Forty steps, each with a few roundings of numbers of size one.
        np.testing.assert_allclose(modes, expected, rtol=0, atol=1e-12)
    # 1 - η μ is a bound that is not attained: (1 - η λ)² < 1 - η λ.
    part = found["linear_rate"].part("bound_theorem")
    promised = (1 - 0.2 * 0.5) ** np.arange(41) * record["loss"][0]
    assert (record["loss"][1:] < promised[1:]).all()
    assert part.margin > 1
    assert part.bound == pytest.approx(promised[-1], rel=1e-6)


def test_descent_constant_is_refuted_where_it_cannot_hold(regression):
    found = by_claim(regression[0])
    assert found["lqcr"].outcome == "refuted"
    assert "no positive constant" in found["lqcr"].note
    assert found["lqcr"].part("curvature").outcome == "proved"
    # The constant along the run itself is positive: it is an upper bound, and says nothing of the null space.
    assert found["lqcr"].part("descent").measured > 0


def test_refined_rate_lies_between_the_loss_and_the_theorem(regression):
    record = regression[0]
    found = by_claim(record)["linear_rate"]
    refined, theorem = found.part("refined"), found.part("bound_theorem")
    assert found.part("refined").note.startswith("ours, not the paper's")
    assert refined.measured <= refined.bound <= theorem.bound
    # The product of 1 - η ρ_t/s, from the residuals in closed form.
    modes = np.abs((1 - 0.2 * SPECTRUM) ** np.arange(40)[:, None])
    rayleigh = (modes**2 @ SPECTRUM) / (modes**2).sum(axis=1)
    assert refined.bound == pytest.approx(np.prod(1 - 0.2 * rayleigh) * N / 2, rel=1e-8)


def test_units_do_not_change_outcomes(regression):
    """s = n with n times the step is the same run; constants in units of L are divided by n."""
    _, _, x, y, _ = regression
    record, _ = train(linear, np.zeros((P, 1)), x, y, eta=0.2 * N, epochs=40, scale="mean")
    found, base = by_claim(record), by_claim(regression[0])
    for claim in theory.CLAIMS:
        assert found[claim].outcome == base[claim].outcome
    assert found["local_pl"].bound == pytest.approx(0.5 / N, rel=1e-9)


def test_duplicated_input_is_never_proved():
    x, y, _ = problem()
    x[1], y[1] = x[0], y[0]
    record, _ = train(linear, np.zeros((P, 1)), x, y, eta=0.1, epochs=20)
    found = by_claim(record)
    for claim in ("ntk_positive", "compatibility", "local_pl", "linear_rate"):
        assert found[claim].outcome not in MET, found[claim]
    assert found["ntk_positive"].outcome == "undecided"
    assert not theory.any_inconsistent(found.values())


def test_more_rows_than_parameters_is_refuted_by_counting():
    x, y, _ = problem(spectrum=np.array([1.0, 2.0, 3.0]), p=3)
    x, y = np.concatenate([x, x + 1]), np.concatenate([y, y])
    found = {v.claim: v for v in theory.verify_point(linear, jnp.zeros((3, 1)), *narrow(x, y), loss_scale="sum")}
    assert found["ntk_positive"].outcome == "refuted"
    assert "p = 3" in found["ntk_positive"].note


def narrow(*arrays):
    return tuple(np.asarray(array, np.float32) for array in arrays)


@pytest.mark.parametrize("start", [1.0, 1e-3])
def test_step_above_two_over_beta_is_refuted_at_the_right_epoch(start):
    """Along the top mode ηλ = 2.1, so L grows by 1.21 a step; which step first breaks the lemma follows by hand."""
    spectrum = np.array([0.2, 0.4, 0.8, 1.0, 1.5, 4.0])
    x, _, u = problem(spectrum)
    weights = np.ones(N)
    weights[-1] = start
    eta, epochs = 2.1 / spectrum[-1], 60
    record, _ = train(linear, np.zeros((P, 1)), x, u @ weights[:, None], eta=eta, epochs=epochs)
    modes = (1 - eta * spectrum) ** np.arange(epochs + 1)[:, None] * weights
    loss, gradient = 0.5 * (modes**2).sum(axis=1), (modes**2 * spectrum).sum(axis=1)
    expected = int(np.flatnonzero(loss[1:] > loss[:-1] - eta / 2 * gradient[:-1])[0])
    assert (expected == 0) == (start == 1.0)
    found = by_claim(record)
    assert found["linear_rate"].outcome == "refuted"
    assert found["linear_rate"].step == expected
    assert found["linear_rate"].part("step_size").outcome == "refuted"
    assert found["linear_rate"].part("step_size").measured == pytest.approx(2.1, rel=1e-5)
    assert found["regime"].outcome == "refuted"
    assert found["regime"].step == expected
    assert "linear_rate breaks first" in found["regime"].note
    # The PL inequality does not depend on the step size.
    assert found["local_pl"].outcome == "proved"
    assert not theory.any_inconsistent(found.values())


def test_regime_tells_when_descent_returns(regression):
    """One loss raised between two probes: the step into it breaks the lemma, the step out of it more than obeys."""
    found = by_claim(tampered(regression[0], loss=raised(5)))
    assert found["regime"].step == 4
    assert "linear_rate breaks first, with the step from epoch 4" in found["regime"].note
    assert "in order again from epoch 5" in found["regime"].note
    assert found["linear_rate"].part("descent").measured == pytest.approx(1.5 * regression[0]["loss"][5])


def test_two_layer_linear_network():
    """Θ = XXᵀ‖w‖² + XW(XW)ᵀ moves with θ: nothing may be called linear in its parameters."""
    x, y, _ = problem()
    rng = np.random.default_rng(1)
    params = {"a": rng.standard_normal((P, 8)) / 4, "b": rng.standard_normal((8, 1)) / 4}
    record, points = train(lambda q, x: (x @ q["a"]) @ q["b"], params, x, y, eta=0.05, epochs=30, hessian=False)
    kernels = [float(np.sum(q["b"] ** 2)) * x @ x.T + (x @ q["a"]) @ (x @ q["a"]).T for _, q in sorted(points.items())]
    for i, one in enumerate(kernels):
        assert record["ntk_min_eig"][i] == pytest.approx(np.linalg.eigvalsh(one)[0], rel=1e-9)
        for j, two in enumerate(kernels):
            expected = np.linalg.norm(one - two, 2)
            assert record["ntk_pair_shift"][i, j] == pytest.approx(expected, rel=1e-7, abs=1e-12)
    found = by_claim(record)
    assert float(record["affine_in_parameters"]) == 0
    assert found["consistency"].outcome == "proved"
    assert found["ntk_positive"].outcome == "proved"
    assert found["ntk_lipschitz"].outcome == "proved"
    assert 0 < float(record["ntk_lipschitz_lower"]) <= float(record["ntk_lipschitz_upper"])
    assert found["compatibility"].outcome != "proved"
    # ⟨∇L(θ_t), θ_t - θ_T⟩ by hand at the first probe.
    first, last = points[0], points[30]
    residual = x @ first["a"] @ first["b"] - y
    gradient = {"a": x.T @ residual @ first["b"].T, "b": (x @ first["a"]).T @ residual}
    inner = sum(float(np.sum(gradient[name] * (first[name] - last[name]))) for name in gradient)
    assert record["lqcr_inner"][0] == pytest.approx(inner, rel=1e-10)


def test_inside_the_certified_radius_the_theorem_is_proved():
    """One tiny step of a softplus network stays inside R*, so 5.1 to 5.7 are proved without any linearity."""
    rng = np.random.default_rng(0)
    x, y = narrow(rng.standard_normal((4, 3)), rng.standard_normal((4, 1)))
    model = MLP(width=16, depth=2)
    params = model.init(jax.random.key(0), x)
    record, _ = train(model.apply, params, x, y, eta=1e-9, epochs=4, every=2, scale="mean", hessian=False)
    found = by_claim(record)
    assert float(record["affine_in_parameters"]) == 0
    assert float(record["radius_certified"]) > found["compatibility"].part("radius").measured > 0
    for claim in ("ntk_positive", "ntk_lipschitz", "compatibility", "local_pl", "linear_rate"):
        assert found[claim].outcome == "proved", found[claim]
    assert found["linear_rate"].part("containment").outcome == "proved"


def test_digits_and_what_the_summary_says(digits):
    found = by_claim(digits)
    assert found["consistency"].outcome == "proved"
    assert found["weyl"].outcome in MET
    assert found["compatibility"].outcome == "refuted"
    assert found["local_pl"].outcome == "not applicable"
    assert found["linear_rate"].outcome == "not applicable"
    assert found["local_pl"].part("pointwise").outcome == "proved"
    text = theory.reading(list(found.values()))
    assert text.count(". ") == 1, "two sentences"
    assert "silent" in text
    assert "not false" in text
    assert digits.provenance["verdicts"] == theory.as_json(theory.verify(digits))


def test_subset_and_averaged_kernels_prove_nothing(digits, regression):
    for record in (digits, regression[0]):
        # The measurements of all samples, declared to be those of a part: every number agrees, the reach does not.
        # A spectrum of all rows would tell.
        kept = {name: a for name, a in record.arrays.items() if name not in ("spectrum", "residual_energy")}
        record = dataclasses.replace(record, arrays=kept)
        for name, value in (("kernel_samples", int(record["n"]) - 1), ("kernel_trace", 1)):
            part = dataclasses.replace(record, arrays={**record.arrays, name: np.asarray(value)})
            found = by_claim(part)
            if found["consistency"].inconsistent:
                continue  # the identity is scaled with the samples, so a false declaration may show
            assert found["ntk_positive"].outcome == "not refuted"
            assert found["compatibility"].outcome != "proved"
            assert found["local_pl"].outcome != "proved"
        averaged = dataclasses.replace(record, arrays={**record.arrays, "kernel_trace": np.asarray(1)})
        assert by_claim(averaged)["ntk_positive"].outcome == "not refuted"


@pytest.mark.parametrize(
    "config", [{"momentum": 0.9}, {"batch_size": 2}, {"schedule": "cosine"}], ids=lambda config: next(iter(config))
)
def test_rate_is_not_applicable_to_other_methods(regression, config):
    record = dataclasses.replace(regression[0], config={**regression[0].config, **config})
    assert by_claim(record)["linear_rate"].outcome == "not applicable"
    assert by_claim(record)["local_pl"].outcome == "proved"


def test_probe_order_does_not_matter(digits):
    order = np.random.default_rng(0).permutation(digits["probe_epoch"].size)
    arrays = dict(digits.arrays)
    for name in digits.arrays:
        for axis, dim in enumerate(schema.SCHEMA[name].dims):
            if dim in ("probe", "other_probe"):
                arrays[name] = np.take(arrays[name], order, axis=axis)
    assert theory.as_json(theory.verify(dataclasses.replace(digits, arrays=arrays))) == theory.as_json(
        theory.verify(digits)
    )


def test_neither_float64_flag_nor_kernel_nor_block_size_changes_an_outcome():
    rng = np.random.default_rng(0)
    # Enough samples for several blocks under the least budget.
    x, y = narrow(rng.standard_normal((70, 12)), rng.standard_normal((70, 1)))
    model = MLP(width=8, depth=2)
    params = model.init(jax.random.key(1), x)
    plain = theory.verify_point(model.apply, params, x, y, loss_scale="mean")
    with jax.enable_x64(True):
        wide = theory.verify_point(model.apply, params, x, y, loss_scale="mean")
    peer = theory.verify_point(model.apply, params, x, y, loss_scale="mean", kernel="neural-tangents")
    budget = 5_000
    assert len(ntk.explain(model.apply, params, x, memory_budget=budget).blocks) > 1
    small = theory.verify_point(model.apply, params, x, y, loss_scale="mean", memory_budget=budget)
    outcomes = [[v.outcome for v in theory.flatten(verdicts)] for verdicts in (plain, wide, peer, small)]
    assert all(other == outcomes[0] for other in outcomes[1:])
    found = {v.claim: v for v in plain}
    assert found["consistency"].outcome == found["ntk_positive"].outcome == "proved"
    assert found["local_pl"].part("pointwise").outcome == "proved"
    assert found["linear_rate"].outcome == "not applicable"


def scaled(by, *at):
    def change(array):
        array[at or ...] *= by
        return array

    return change


def replaced(value, *at):
    def change(array):
        array[at or ...] = value
        return array

    return change


def raised(epoch):
    return scaled(1.5, epoch)


# For each claim: the record on which it is met, and arrays with one of which broken it must not be.
MUTATIONS = [
    ("consistency", "digits", "probe_grad_sq_norm", scaled(1.001, 1)),
    ("consistency", "digits", "probe_loss", scaled(1.01, 2)),
    ("consistency", "digits", "ntk_rayleigh", scaled(0.99, 0)),
    ("consistency", "digits", "loss", replaced(-1.0, 3)),
    ("consistency", "digits", "residual_energy", scaled(1.01, 0)),
    ("consistency", "digits", "spectrum", scaled(1.5, 0, -1)),
    ("consistency", "digits", "ntk_max_eig", replaced(np.nan, 2)),
    ("ntk_positive", "digits", "ntk_min_eig", scaled(1.01, 0)),
    ("ntk_positive", "digits", "ntk_min_eig_upper", replaced(-1.0, 0)),
    ("ntk_positive", "digits", "ntk_min_eig_lower", scaled(1.01, 0)),
    ("ntk_positive", "digits", "ntk_min_eig_subset", scaled(1e-6, 1)),
    ("ntk_lipschitz", "digits", "ntk_pair_shift", scaled(100.0, 0, 1)),
    ("ntk_lipschitz", "digits", "ntk_lipschitz_upper", replaced(1.0)),
    ("ntk_lipschitz", "digits", "ntk_lipschitz_lower", scaled(0.5)),
    ("ntk_lipschitz", "digits", "param_pair_distance", scaled(3.0, 1, 2)),
    ("compatibility", "regression", "ntk_shift", replaced(5.0, 1)),
    ("compatibility", "regression", "drift", scaled(0.1)),
    ("compatibility", "regression", "radius_certified", replaced(1e-3)),
    ("weyl", "digits", "ntk_shift", scaled(1e-12)),
    ("weyl", "digits", "ntk_min_eig", scaled(1e3, 2)),
    ("local_pl", "regression", "grad_sq_norm", scaled(1e-6, 5)),
    ("local_pl", "regression", "ntk_min_eig", scaled(2.0)),
    ("linear_rate", "regression", "loss", raised(5)),
    ("linear_rate", "regression", "sharpness", scaled(3.0, 0)),
    ("linear_rate", "regression", "smoothness_upper", scaled(0.5)),
    ("lqcr", "digits", "lqcr_inner", scaled(-1.0)),
    ("lqcr", "digits", "curvature_min", replaced(np.nan)),
    ("regime", "regression", "loss", raised(7)),
    ("regime", "regression", "ntk_shift", replaced(10.0, 2)),
]


@pytest.mark.parametrize(
    ("claim", "kind", "name", "change"), MUTATIONS, ids=[f"{claim}-{name}" for claim, _, name, _ in MUTATIONS]
)
def test_a_broken_array_never_passes(claim, kind, name, change, digits, regression):
    record = digits if kind == "digits" else regression[0]
    before = by_claim(record)[claim]
    if name != "curvature_min":
        assert before.met, before
    after = by_claim(tampered(record, **{name: change}))
    if name == "curvature_min":
        # Without curvature the claim rests on its other half, and says so.
        assert all(part.claim != "lqcr.curvature" for part in after["lqcr"].parts)
        return
    assert not after[claim].met, after[claim]
    inconsistent = theory.any_inconsistent(after.values())
    assert inconsistent or after[claim].outcome == "refuted"


def test_weyl_alone_finds_a_kernel_that_did_not_move(digits):
    """Without pairs, spectra and λ_max nothing else contradicts a shift that is too small."""
    kept = {
        name: array
        for name, array in digits.arrays.items()
        if name not in ("ntk_pair_shift", "param_pair_distance", "ntk_lipschitz_lower", "spectrum", "residual_energy")
    }
    broken = tampered(dataclasses.replace(digits, arrays=kept), ntk_shift=scaled(1e-12))
    broken = tampered(broken, ntk_max_eig=replaced(float(digits["ntk_max_eig"][0])))
    found = by_claim(broken)
    assert not found["consistency"].inconsistent
    assert found["weyl"].outcome == "refuted"
    assert found["weyl"].inconsistent


def test_a_record_without_probes_is_undecided(digits):
    names = (*schema.REQUIRED,)
    bare = dataclasses.replace(digits, arrays={name: digits[name] for name in names})
    found = by_claim(bare)
    for claim in ("consistency", "ntk_positive", "ntk_lipschitz", "compatibility", "weyl", "local_pl", "lqcr"):
        assert found[claim].outcome == "undecided", claim
    assert not theory.any_inconsistent(found.values())


def test_divergence_is_read():
    x, y, _ = problem()
    record, _ = train(linear, np.zeros((P, 1)), x, y, eta=1e200, epochs=20, every=5)
    assert record.diverged_at is not None
    found = by_claim(record)
    assert found["linear_rate"].outcome == "refuted"
    assert found["regime"].outcome == "refuted"
    assert f"diverged at epoch {record.diverged_at}" in found["regime"].note
    assert not theory.any_inconsistent(found.values())


def test_command(digits, tmp_path, capsys):
    good, bad = tmp_path / "good" / "record.npz", tmp_path / "bad" / "record.npz"
    digits.save(good)
    tampered(digits, probe_grad_sq_norm=scaled(1.01, 1)).save(bad)
    assert cli.main(["verify", str(good.parent)]) == cli.OK
    shown = capsys.readouterr().out
    for word in (*theory.CLAIMS, "refuted", "silent", "R* ="):
        assert word in shown, word
    assert cli.main(["verify", str(good), "--strict", "weyl", "--strict", "ntk_positive"]) == cli.OK
    assert cli.main(["verify", str(good), "--strict", "weyl", "--strict", "compatibility"]) == cli.UNMET
    assert cli.main(["verify", str(bad), "--strict", "compatibility"]) == cli.INCONSISTENT
    capsys.readouterr()
    assert cli.main(["verify", str(bad), "--json"]) == cli.INCONSISTENT
    document = json.loads(capsys.readouterr().out)
    assert document["exit_code"] == 3
    assert document["verdicts"][0]["outcome"] == "refuted"
    assert [v["claim"] for v in document["verdicts"]] == list(theory.CLAIMS)
    assert cli.main(["verify", str(tmp_path), "--json"]) == cli.INCONSISTENT, "the worst of the arms counts"
    arms = json.loads(capsys.readouterr().out)
    assert arms["exit_code"] == 3
    assert {name: arm["exit_code"] for name, arm in arms["arms"].items()} == {"bad": 3, "good": 0}
    assert arms["arms"]["bad"]["verdicts"] == document["verdicts"]
    assert cli.main(["verify", str(tmp_path)]) == cli.INCONSISTENT
    shown = capsys.readouterr().out
    assert "run by run" in shown
    assert "first to break" in shown
    assert cli.main(["verify", str(tmp_path / "none")]) == cli.BAD_INPUT
    assert cli.main(["verify", str(good), "--strict", "nothing"]) == cli.BAD_INPUT


def test_several_runs_stand_side_by_side(digits, regression):
    arms = {"digits": theory.verify(digits), "regression": theory.verify(regression[0])}
    table = report.verdict_matrix(arms)
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    assert columns[0] == [*theory.CLAIMS, "first to break"]
    for column, (name, verdicts) in zip(columns[1:], arms.items(), strict=True):
        assert column[:-1] == [v.outcome for v in verdicts], name
    assert columns[1][-1].startswith("compatibility breaks first")


def test_outcomes_combine_by_their_weakest():
    assert weakest(["proved", "refuted", "undecided"]) == "refuted"
    assert weakest(["proved", "undecided", "not refuted"]) == "undecided"
    assert weakest(["proved", "not applicable", "not refuted"]) == "not refuted"
    assert weakest(["proved", "not applicable"]) == "proved"
    assert weakest([]) == "not applicable"
    assert (factor(2.0, 6.0), factor(0.0, 1.0), factor(4.0, 1.0)) == (3.0, np.inf, 0.25)
    assert np.isnan(factor(-1.0, 1.0))
    assert np.isnan(factor(1.0, np.nan))


@pytest.mark.slow
def test_drift_shrinks_with_width(capsys):
    """Wide two-layer softplus networks, η in proportion to 1/m: the same fit with ever less motion (drift ~ 1/√m)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((6, 4))
    y = rng.standard_normal((6, 1)) * 0.1
    drifts, ratios = [], []
    for width in (128, 256, 512, 1024, 2048, 4096):
        model = MLP(width=width, depth=2)
        params = model.init(jax.random.key(0), narrow(x)[0])
        # Targets relative to the initial outputs, so that every width has the same residual to fit.
        target = np.asarray(model.apply(params, narrow(x)[0]), np.float64) + y
        record, _ = train(
            model.apply, params, x, target, eta=0.5 / width, epochs=200, every=50, scale="mean", hessian=False
        )
        found = by_claim(record)
        assert not theory.any_inconsistent(found.values())
        drifts.append(float(np.nanmax(record["drift"])))
        ratios.append(float(found["compatibility"].measured / record["ntk_min_eig"][0]))
        with capsys.disabled():
            print(f"\nwidth {width}: drift {drifts[-1]:.4g}, L_Θ r / λ_0 >= {ratios[-1]:.4g}", end="")
    assert all(b < a for a, b in itertools.pairwise(drifts))
    # From 128 to 4,096 a factor √32 = 5.7; half of it leaves room for the random features.
    assert drifts[0] / drifts[-1] > 2.8
    assert ratios[-1] < ratios[0]
