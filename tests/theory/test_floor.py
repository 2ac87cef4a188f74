"""PL with a floor against closed forms: every bound by a loop of its own, and planted violations."""

import itertools

import numpy as np
import optax
import pytest
from controls import by_claim, replaced, scaled, tampered
from descents import regression, stalled
from test_method import ETA, run

from lplr_jax.theory.claims.floor_pl import curves, window_of
from lplr_jax.theory.evidence import Evidence

PROBES = [0, 4, 12, 20]
EIGENVALUES, WEIGHTS = np.array([0.01, 0.1, 1.0, 4.0]), np.array([0.1, 0.5, 1.0, 2.0])
CONSTANT, DECAYING = np.full(20, 0.2), 0.3 / np.sqrt(1 + np.arange(20))


def floor(record):
    return Evidence(record).verdict("floor_pl")


def chain(eigenvalues, weights, sizes, cuts, probes, scale=1.0):
    """The bound of windows between `cuts` by a loop over k and t, with the least a_t of the run in closed form."""
    factors = np.concatenate([np.ones((1, weights.size)), np.cumprod(1 - sizes[:, None] * eigenvalues / scale, axis=0)])
    energy = (weights * factors) ** 2 / (2 * scale)
    loss, gradient = energy.sum(axis=1), 2 * energy @ eigenvalues / scale
    a = ((loss[:-1] - loss[1:]) / (sizes * gradient[:-1])).min()
    bound, ks = loss[0], []
    for start, stop in itertools.pairwise(cuts):
        found = []
        for k in range(1, weights.size + 1):
            rate, past = eigenvalues[-k], energy[:, : weights.size - k].sum(axis=1)
            level = max(past[t] for t in probes if start <= t <= stop)
            value = max(bound - level, 0.0)
            for size in sizes[start:stop]:
                value *= max(1 - 2 * a * size * rate / scale, 0.0)
            found.append(min(level + value, bound))
        ks.append(int(np.argmin(found)) + 1)
        bound = min(found)
    return bound, ks, loss, found


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("sizes", [CONSTANT, DECAYING], ids=["constant", "decaying"])
def test_one_window_and_one_k(sizes, scale):
    sizes = sizes * scale
    record = regression(EIGENVALUES, WEIGHTS, sizes, PROBES, scale)
    bound, (k,), loss, every = chain(EIGENVALUES, WEIGHTS, sizes, (0, 20), PROBES, scale)
    told, window = floor(record), window_of(Evidence(record))
    assert told.outcome == "not refuted"
    assert told.measured == pytest.approx(loss[-1], rel=1e-12)
    assert told.bound == told.part("window").bound == pytest.approx(bound, rel=1e-9)
    assert window.k == k
    assert window.bound_all == pytest.approx(every[-1], rel=1e-9)
    assert window.share() == pytest.approx(np.log(loss[0] / bound) / np.log(loss[0] / loss[-1]), rel=1e-9)
    assert f"k = {k}, one window from epoch 0 to 20" in told.note
    assert "not checked between the 4 probes" in told.note


def test_a_second_figure_states_its_number_of_windows():
    told = floor(regression(EIGENVALUES, WEIGHTS, CONSTANT, PROBES))
    stated = {part.claim.partition(".")[2]: part.note for part in told.parts if "window" in part.claim}
    assert set(stated) == {"window", "two_windows"}
    assert ", one window from epoch 0 to 20: " in stated["window"]
    assert stated["two_windows"].startswith("2 windows from epoch 0 to 20, a k for each: ")
    best = min(chain(EIGENVALUES, WEIGHTS, CONSTANT, (0, cut, 20), PROBES)[0] for cut in (4, 12))
    assert told.part("two_windows").bound == pytest.approx(best, rel=1e-9)
    assert best < told.bound, "more windows follow the run"
    # With nothing between the ends there is one window, and no second figure.
    short = floor(regression(EIGENVALUES, WEIGHTS, CONSTANT, [0, 20]))
    assert [part.claim for part in short.parts if "window" in part.claim] == ["floor_pl.window"]


def test_a_signal_of_low_rank_is_accounted_for():
    """Three equal eigenvalues hold the signal, so that a_t is theirs and the bound is attained: share 1 with k = 3."""
    eigenvalues = np.array([1e-6, 1e-5, 1e-4, 4.0, 4.0, 4.0])
    weights = np.array([1e-6, 1e-6, 1e-6, 1.0, 1.0, 1.0])
    record = regression(eigenvalues, weights, np.full(12, 0.1), [0, 6, 12])
    window = window_of(Evidence(record))
    assert window.k == 3
    assert window.floor == pytest.approx(3e-12 / 2, rel=1e-3)
    assert window.share() == pytest.approx(1.0, abs=1e-3)
    assert window.share(window.bound_all) < 1e-5


def test_factors_are_clipped_at_zero():
    """2 a η λ / s = 1.5 for the top mode: an odd number of negative factors would give a bound below the floor."""
    record = regression([0.05, 4.0], [1.0, 1e-3], np.full(3, 0.4), [0, 3])
    bound, *_ = chain(np.array([0.05, 4.0]), np.array([1.0, 1e-3]), np.full(3, 0.4), (0, 3), [0, 3])
    told = floor(record)
    assert told.outcome == "not refuted"
    assert told.bound == pytest.approx(bound, rel=1e-9)
    assert told.bound >= told.measured
    alone = floor(regression([2.0], [1.0], np.full(3, 0.45), [0, 3]))
    assert 0 <= alone.measured <= alone.bound


@pytest.mark.parametrize("seed", range(20))
def test_every_curve_lies_above_the_loss(seed):
    """A kernel that does not move is known between its probes as well, so that every bound holds at every step."""
    rng = np.random.default_rng(seed)
    m, steps = int(rng.integers(1, 7)), int(rng.integers(2, 12))
    eigenvalues = np.sort(10.0 ** rng.uniform(-4, 0, m))
    weights = rng.standard_normal(m) * 10.0 ** rng.uniform(-2, 0, m)
    sizes = rng.uniform(0.05, 1.7, steps) / eigenvalues[-1]
    probes = np.unique([0, steps, *rng.integers(0, steps, 3)]).tolist()
    record = regression(eigenvalues, weights, sizes, probes)
    found = curves(record)
    loss = record["loss"][found.steps]
    # The kernel's error, and the rounding of thirty products.
    assert (found.envelope >= loss * (1 - 1e-12)).all()
    assert (found.all >= found.envelope * (1 - 1e-12)).all()
    np.testing.assert_allclose(found.linearised, loss, rtol=1e-9)
    window = window_of(Evidence(record))
    assert found.envelope[-1] == pytest.approx(window.bound, rel=1e-12)
    assert found.all[-1] == pytest.approx(window.bound_all, rel=1e-12)
    assert floor(record).outcome == "not refuted"


@pytest.mark.parametrize("sizes", [CONSTANT, DECAYING], ids=["constant", "decaying"])
def test_the_prediction_of_a_linear_model_is_its_loss(sizes):
    part = floor(regression(EIGENVALUES, WEIGHTS, sizes, PROBES)).part("linearised")
    assert part.bound == pytest.approx(part.measured, rel=1e-10)
    assert part.outcome == "not applicable"
    assert "a prediction" in part.note
    assert "no bound" in part.note


def test_a_kernel_that_stalls_between_the_probes_refutes():
    told = floor(stalled())
    assert told.outcome == told.part("window").outcome == "refuted"
    assert told.measured > 10 * told.bound
    assert told.margin < 0.1
    assert not told.inconsistent
    assert told.part("pointwise").outcome == "not refuted"


@pytest.mark.parametrize(("by", "outcome"), [(1.0, "not refuted"), (0.98, "refuted")])
def test_the_inequality_at_a_probe_cannot_fail(by, outcome):
    """One mode, where both sides are equal."""
    record = regression([2.0], [1.0], np.full(6, 0.1), [0, 3, 6])
    told = floor(tampered(record, probe_grad_sq_norm=scaled(by, 1)))
    part = told.part("pointwise")
    assert part.outcome == outcome
    assert part.inconsistent == told.inconsistent == (outcome == "refuted")
    if outcome == "refuted":
        assert told.outcome == "refuted"
        assert part.step == 3
    assert part.margin == pytest.approx(by, rel=1e-9)


def test_the_error_of_the_kernel_lowers_the_rate_and_raises_the_floor():
    """Of Θ' within δ of Θ: rate λ' - δ, floor E' λ'/(λ' - δ); where λ' <= δ nothing is known."""
    record = regression(EIGENVALUES, WEIGHTS, CONSTANT, PROBES)
    spectra = Evidence(tampered(record, ntk_assembly_error=replaced(0.05))).spectra
    np.testing.assert_allclose(spectra.rate[0], [3.95, 0.95, 0.05, 0.0], rtol=1e-12)
    past = 0.5 * np.array([1.26, 0.26, 0.01])
    np.testing.assert_allclose(spectra.floor[0, :3], past * [4 / 3.95, 1 / 0.95, 0.1 / 0.05], rtol=1e-12)
    assert spectra.floor[0, 3] == record["loss"][0]
    # A Rayleigh quotient of any kernel that near stays above the line.
    rng = np.random.default_rng(0)
    for _ in range(50):
        noise = rng.standard_normal((4, 4))
        noise = 0.05 * (noise + noise.T) / np.linalg.norm(noise + noise.T, 2)
        half = WEIGHTS @ (np.diag(EIGENVALUES) + noise) @ WEIGHTS / 2
        assert (half >= spectra.rate[0] * (record["loss"][0] - spectra.floor[0]) - 1e-12).all()


def test_a_subset_has_an_inequality_and_no_window():
    """Kernel, loss and gradient of two samples of four; the run is of all."""
    base = regression(EIGENVALUES, WEIGHTS, CONSTANT, PROBES)
    part = regression(EIGENVALUES[1:3], WEIGHTS[1:3], CONSTANT, PROBES)
    own = {name: replaced(part[name]) for name in ("probe_loss", "probe_grad_sq_norm")}
    arrays = {name: part[name] for name in ("spectrum", "residual_energy", "ntk_min_eig", "ntk_max_eig")}
    record = tampered(base, **own)
    record = type(record)("subset", {**record.arrays, **arrays, "kernel_samples": np.asarray(2)}, {})
    told = floor(record)
    assert told.outcome == "not applicable"
    assert "kernel of 2 of 4 samples" in told.note
    assert [p.claim for p in told.parts] == ["floor_pl.pointwise"]
    assert told.part("pointwise").outcome == "not refuted"
    assert "with its own loss and gradient" in told.part("pointwise").note


def test_an_averaged_kernel_says_nothing():
    base = regression(EIGENVALUES, WEIGHTS, CONSTANT, PROBES)
    record = type(base)("averaged", {**base.arrays, "kernel_trace": np.asarray(1)}, {})
    told = floor(record)
    assert told.outcome == "not applicable"
    assert "output-averaged kernel" in told.note
    assert not told.parts
    assert curves(record) is None


def test_the_window_ends_where_a_step_is_missing():
    record = regression(EIGENVALUES, WEIGHTS, CONSTANT, PROBES)
    for at, stop in ((15, 12), (12, 12), (11, 4), (4, 4)):
        told = floor(tampered(record, step_size=replaced(np.nan, at)))
        assert told.step == stop
        assert f"from epoch 0 to {stop}: " in told.note
        bound = chain(EIGENVALUES, WEIGHTS, CONSTANT[:stop], (0, stop), [t for t in PROBES if t <= stop])[0]
        assert told.bound == pytest.approx(bound, rel=1e-9)
    told = floor(tampered(record, step_size=replaced(np.nan, 3)))
    assert told.outcome == "undecided"
    assert "was seen and resolved" in told.note


def test_one_spectrum_is_no_window():
    told = floor(
        tampered(regression(EIGENVALUES, WEIGHTS, CONSTANT, PROBES), spectrum=replaced(np.nan, slice(1, None)))
    )
    assert told.outcome == "undecided"
    assert "at step 0 and at a later probe" in told.note


def test_an_exact_fit_has_no_energy():
    """η λ = 1 solves one mode in one step: the loss is 0 from then on."""
    record = regression([2.0], [1.0], np.full(3, 0.5), [0, 3])
    assert np.isnan(record["residual_energy"][1]).all()
    told = floor(record)
    assert told.outcome == "not refuted"
    assert told.measured == 0
    # (1 - η (λ - δ))³ L_0 with the kernel's error δ = 1e-13.
    assert 0 <= told.bound < 1e-37


def test_mini_batches_are_outside():
    record = run(optax.sgd(ETA), batch=5)
    assert by_claim(record)["floor_pl"].outcome == "not applicable"
    assert curves(record) is None


def test_between_two_probes_the_lesser_eigenvalue_counts():
    """λ_k of the second of four probes is half of the others', so that two of the three spans fall at half the rate."""
    record = regression([3.0], [1.0], CONSTANT, PROBES)
    told = floor(tampered(record, spectrum=scaled(0.5, 1)))
    a = 1 - 0.2 * 3 / 2
    slow, fast = (1 - 2 * a * 0.2 * rate for rate in (1.5, 3.0))
    assert told.bound == pytest.approx(0.5 * slow**12 * fast**8, rel=1e-9)
    assert told.outcome == "not refuted"
    assert window_of(Evidence(tampered(record, spectrum=scaled(0.5, 1)))).rate == pytest.approx(1.5, rel=1e-9)


def test_the_largest_floor_of_the_window_counts():
    """Past the first mode the energy is highest in the middle; λ_2 is 1e-9, so that k = 1 is the best all the same."""
    record = regression([1e-9, 4.0], [0.1, 1.0], np.full(20, 0.1), PROBES)
    loss = record["probe_loss"].copy()
    loss[2] = 0.05
    share = record["residual_energy"].copy()
    share[2] = [0.9, 0.1]
    changed = tampered(record, residual_energy=replaced(share), probe_loss=replaced(loss))
    window = window_of(Evidence(changed))
    assert window.k == 1
    assert window.floor == pytest.approx(0.045, rel=1e-9)
    assert window_of(Evidence(record)).floor == pytest.approx(0.005, rel=1e-9)
    assert window.bound == pytest.approx(0.045, rel=1e-3)
