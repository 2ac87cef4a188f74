"""The claims, held against runs whose answer is known from theory."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from controls import SPECTRUM, N, P, by_claim, linear, narrow, problem, raised, tampered, train

from lplr_jax import ntk, schema, theory
from lplr_jax.models import MLP
from lplr_jax.theory.verdict import MET


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
    assert found["linear_rate"].outcome == ("not applicable" if "step_size" in digits else "undecided")
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


def test_divergence_is_read():
    x, y, _ = problem()
    record, _ = train(linear, np.zeros((P, 1)), x, y, eta=1e100, epochs=20, every=5)
    assert record.diverged_at is not None
    found = by_claim(record)
    assert found["linear_rate"].outcome == "refuted"
    assert found["regime"].outcome == "refuted"
    assert f"diverged at epoch {record.diverged_at}" in found["regime"].note
    assert not theory.any_inconsistent(found.values())


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
