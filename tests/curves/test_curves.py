"""What series say, against closed forms: brackets, regimes, rates, stability, summary; dense and sparse."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders import make
from lplr_jax import diagnostics
from lplr_jax.curves.rate import _suffix_medians, check_regime, step_numbers
from lplr_jax.curves.summary import gradient_law, observed, step_word, summarise

positive = st.floats(1e-6, 1e6)


@given(loss=st.lists(positive, min_size=1, max_size=8), share=st.floats(0, 0.999), grad=positive)
def test_bracket_holds_the_ratio_of_every_admissible_minimum(loss, share, grad):
    loss = np.array(loss)
    floor = float(loss.min())
    low, high = diagnostics.pl_bracket(loss, np.full_like(loss, grad), floor)
    truth = 0.5 * grad / (loss - share * floor)
    # Three roundings separate the ends from the truth.
    assert np.all(low <= truth * (1 + 4e-16))
    assert np.all(truth <= high * (1 + 4e-16))
    assert np.all(np.isinf(high[loss <= floor]))


def test_bracket_at_its_edges():
    low, high = diagnostics.pl_bracket(np.array([0.0, np.nan, 2.0, 0.5]), np.array([0.0, 1.0, 4.0, 1.0]), 0.5)
    np.testing.assert_array_equal(low, [np.inf, np.nan, 1.0, 1.0])
    np.testing.assert_array_equal(high, [np.inf, np.nan, 2 / 1.5, np.inf])
    for floor in (-1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="floor must be a finite number >= 0"):
            diagnostics.pl_bracket(1.0, 1.0, floor)


def test_floor_is_the_least_recorded_loss():
    assert diagnostics.loss_floor(np.array([3.0, 0.5, 1.0, np.nan])) == 0.5
    with pytest.raises(ValueError, match="no finite value"):
        diagnostics.loss_floor(np.array([np.nan, np.inf]))


T = np.arange(2001.0)


@given(rate=st.floats(1e-4, 0.02), scale=st.floats(1e-3, 1e3))
def test_exponential_decay_is_recovered(rate, scale):
    decay = diagnostics.contraction_factor(scale * np.exp(-rate * T), slice(100, 1500))
    assert decay.rate == pytest.approx(rate, rel=1e-9)
    assert float(decay) == decay.factor == pytest.approx(np.exp(-rate), rel=1e-12)
    assert decay.law == ("exponential" if 1 - decay.power_r2 >= 0.005 else "undecided")
    np.testing.assert_allclose(decay.local_factors, np.exp(-rate), rtol=1e-9)
    assert decay.epochs == 1400


@given(exponent=st.floats(0.1, 3.0))
def test_power_law_is_recovered(exponent):
    loss = np.concatenate([[1.0], T[1:] ** -exponent])
    decay = diagnostics.contraction_factor(loss, slice(100, 1500))
    assert decay.exponent == pytest.approx(exponent, rel=1e-9)
    assert decay.law == "power law"
    # Local rates run from a/100 down to a/1500.
    low, high = decay.local_factors
    assert np.exp(-exponent / 100) <= low < high <= np.exp(-exponent / 1500)


def test_a_linear_rate_made_by_the_proxy_is_called_so():
    """A power law has no rate, yet its gap to the last loss fits a line whose slope falls like 1/T."""
    loss = (1 + T) ** -0.5
    report = diagnostics.rate_report(loss, window=diagnostics.middle_half)
    assert report.zero.law == "power law"
    assert report.set_by_proxy is True
    cut = dict(report.refits)
    assert cut[1000].rate == pytest.approx(2 * report.proxy.rate, rel=0.05)
    assert cut[1500].rate == pytest.approx(4 / 3 * report.proxy.rate, rel=0.05)


def test_a_true_linear_rate_is_not_blamed_on_the_proxy():
    report = diagnostics.rate_report(np.exp(-0.02 * T))
    assert report.set_by_proxy is False
    assert report.zero.rate == pytest.approx(0.02, rel=1e-9)
    # The proxy bends only the last log 2 / rate epochs of the regime, 35 of 1966.
    assert report.proxy.rate == pytest.approx(0.02, rel=0.01)


def test_regime_of_an_exponential_ends_where_the_proxy_doubles_the_ratio():
    rate = 0.004
    loss = np.exp(-rate * T)
    regime = diagnostics.stable_regime(loss)
    # L - L_T >= L / 2 while t <= T - log 2 / rate; a pure exponential has no transient.
    assert regime == slice(0, int(2000 - np.log(2) / rate) + 1)
    low, high = diagnostics.pl_bracket(loss, loss, float(loss.min()))
    assert np.all(high[regime] <= 2 * low[regime] * (1 + 1e-12))
    assert high[regime.stop] > 2 * low[regime.stop]


def test_regime_drops_the_transient():
    loss = np.exp(-0.004 * T) + 5 * np.exp(-0.5 * T)
    regime = diagnostics.stable_regime(loss)
    # The fast mode's part of the local rate falls below the slow one's where 2.5 e^(-t/2) = 0.004 e^(-0.004 t),
    # t = 13; the rate is averaged over 20 epochs, so the start may come up to 20 epochs early.
    assert 0 < regime.start <= 13


def test_regime_of_a_catapult_starts_after_the_loss_is_back():
    loss = np.where(T < 50, np.exp(0.05 * T), np.exp(2.5 - 0.2 * (T - 50)))
    loss = np.where(T > 75, np.exp(-2.5 - 0.003 * (T - 75)), loss)
    regime = diagnostics.stable_regime(loss)
    assert regime.start >= 62
    assert np.all(loss[regime] <= loss[0])


@pytest.mark.parametrize(
    "loss",
    [np.ones(50), np.array([1.0, 0.5]), np.linspace(1, 0.9, 100), np.full(20, np.nan), np.exp(0.1 * np.arange(40.0))],
    ids=["constant", "two epochs", "never clear of the proxy", "all NaN", "rising"],
)
def test_no_regime_is_an_empty_slice(loss):
    assert diagnostics.stable_regime(loss, floor=float(np.nanmin(loss)) if np.isfinite(loss).any() else 0.0) == slice(
        0, 0
    )


def test_regime_of_a_run_that_diverged_is_that_of_its_finite_part():
    loss = np.exp(-0.02 * np.arange(300.0))
    broken = np.concatenate([loss, np.full(100, np.nan)])
    assert diagnostics.stable_regime(broken) == diagnostics.stable_regime(loss)
    report = diagnostics.rate_report(broken)
    assert [cut for cut, _ in report.refits] == [149, 224]


def test_regime_can_be_overridden():
    loss = np.exp(-0.01 * np.arange(500.0))
    assert diagnostics.stable_regime(loss, start=20, stop=90) == slice(20, 90)
    for start, stop, message in (
        (600, None, "regime start 600"),
        (None, 900, "stop 900"),
        (5, 6, "at least 3 recorded steps, got start 5 and stop 6"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnostics.stable_regime(loss, start=start, stop=stop)


@given(st.lists(st.floats(-5, 5) | st.sampled_from([np.inf, 0.0, np.nan]), min_size=1, max_size=30))
def test_medians_of_all_ends_of_a_series(values):
    found = _suffix_medians(np.array(values))
    with np.errstate(invalid="ignore"):
        expected = [np.median(values[k:]) for k in range(len(values))]
    np.testing.assert_allclose(found, expected, rtol=1e-15, atol=0)


def test_a_long_run_that_only_rises_is_read_in_good_time():
    # Median by median this is 10^10 operations.
    assert diagnostics.stable_regime(np.linspace(1, 2, 100_001), stop=100_000) == slice(0, 0)


def test_fit_without_enough_epochs_is_undecided():
    decay = diagnostics.contraction_factor(np.array([1.0, 0.5, -1.0, 0.0, np.nan]), slice(0, 5))
    assert decay.epochs == 0
    assert decay.law == "undecided"
    assert np.isnan(decay.factor)
    assert diagnostics.rate_report(np.array([1.0, 0.9])).set_by_proxy is None


# Sparse axes: the step numbers are irregular, the laws are those of the steps.
GRID = np.unique(np.concatenate([np.arange(10), np.geomspace(10, 2000, 150).astype(int), [2000]]))
NAN = np.nan


@given(rate=st.floats(1e-4, 0.01), seed=st.integers(0, 99))
def test_rates_are_per_step_however_many_were_seen(rate, seed):
    kept = np.random.default_rng(seed).random(2001) < 0.1
    kept[[0, 1, 2, 3, 2000]] = True
    steps = np.flatnonzero(kept)
    decay = diagnostics.contraction_factor(np.exp(-rate * steps), slice(None), steps=steps)
    assert decay.rate == pytest.approx(rate, rel=1e-9)
    np.testing.assert_allclose(decay.local_factors, np.exp(-rate), rtol=1e-9)
    power = diagnostics.contraction_factor((1.0 + steps) ** -1.5, slice(None), steps=steps + 1)
    assert power.exponent == pytest.approx(1.5, rel=1e-9)
    assert power.epochs == steps.size


def test_a_sparse_regime_ends_where_the_proxy_doubles_the_ratio():
    rate = 0.004
    regime = diagnostics.stable_regime(np.exp(-rate * GRID), steps=GRID)
    # As on the dense axis, L - L_T >= L / 2 while t <= T - log 2 / rate.
    assert GRID[regime.stop - 1] <= 2000 - np.log(2) / rate < GRID[regime.stop]
    assert regime.start == 0
    # Were the gaps between entries taken for single steps, the local rates of this grid would differ by 50.
    transient = np.exp(-rate * GRID) + 5 * np.exp(-0.5 * GRID)
    start = diagnostics.stable_regime(transient, steps=GRID).start
    assert 9 <= GRID[start] <= 13, "2.5 e^(-t/2) = 0.004 e^(-0.004 t) at t = 13, and the last doubling takes 3 steps"


def test_named_steps_are_looked_up():
    loss = np.exp(-0.01 * GRID)
    regime = diagnostics.stable_regime(loss, start=100, stop=1000, steps=GRID)
    inside = GRID[regime]
    np.testing.assert_array_equal(inside, GRID[(GRID >= 100) & (GRID < 1000)])
    for start, stop, message in (
        (2001, None, "regime start 2001 and stop None must lie in the run's steps 0 to 2000"),
        (None, 2002, "must lie in the run's steps 0 to 2000"),
        (1990, 1999, "at least 3 recorded steps"),
    ):
        with pytest.raises(ValueError, match=message):
            diagnostics.stable_regime(loss, start=start, stop=stop, steps=GRID)
    assert diagnostics.stable_regime(loss, stop=2001, steps=GRID).stop == GRID.size
    check_regime(2001, 1990, 1999)


@pytest.mark.parametrize(
    "steps", [np.arange(4), np.arange(5.0), np.array([0, 1, 1, 2, 3]), np.array([-1, 0, 1, 2, 3]), np.arange(5)[::-1]]
)
def test_steps_that_do_not_fit_are_refused(steps, without_type_checks):
    with pytest.raises(ValueError, match="steps must be"):
        step_numbers(steps, 5)


def test_the_middle_half_is_one_of_steps():
    inside = GRID[diagnostics.middle_half(np.ones(GRID.size), steps=GRID)]
    np.testing.assert_array_equal(inside, GRID[(GRID >= 500) & (GRID <= 1500)])
    assert diagnostics.middle_half(np.ones(3), steps=np.array([0, 1, 10**9])) == slice(0, 0)
    # A gap is no end: the last finite entry is.
    assert diagnostics.middle_half(np.array([1, NAN, 1, NAN, 1, 1, NAN, 1, 1, NAN])) == slice(2, 7)


def test_shorter_runs_end_at_the_last_step_that_was_seen():
    report = diagnostics.rate_report(np.exp(-0.002 * GRID), window=diagnostics.middle_half, steps=GRID)
    expected = [GRID[GRID <= 1000].max(), GRID[GRID <= 1500].max()]
    assert [cut for cut, _ in report.refits] == expected
    assert report.zero.rate == pytest.approx(0.002, rel=1e-9)


def test_a_run_is_observed_by_its_step_numbers():
    steps = np.array([0, 1, 5, 20, 21, 400])
    drift = np.array([0.0, 1.0, 2.0, 3.0, 2.5, 4.0])
    loss = np.array([1.0, 0.8, 0.6, 0.5, 0.4, 0.3])
    assert diagnostics.observe(loss, drift, steps=steps).outcome == "monotone descent"
    # By position, 21 is among the first 20 steps.
    assert diagnostics.observe(loss, drift).overshoots == 1
    assert diagnostics.observe(loss, drift, steps=steps - (steps == 21) - (steps == 20)).overshoots == 1
    loss[4] = 0.55
    seen = diagnostics.observe(loss, drift, steps=steps)
    assert (seen.outcome, seen.rises, seen.first_rise) == ("oscillation", 1, 21)
    # NaN between finite losses is a gap; at the end it is a divergence.
    gap = np.where(steps == 5, NAN, loss)
    assert diagnostics.observe(gap, drift, steps=steps) == seen
    assert diagnostics.observe(np.where(steps == 400, NAN, loss), drift, steps=steps).outcome == "divergence"


FAR = 10**9


def far_record(**changes):
    """An exponential over 10^9 steps, of which 60 were seen."""
    steps = np.unique(np.concatenate([[0, 1], np.linspace(2, FAR, 58).astype(np.int64)]))
    loss = np.exp(-3e-9 * steps) + 0.01
    arrays = {"epoch": steps, "loss": loss, "grad_sq_norm": 0.5 * loss, "drift": np.sqrt(steps)}
    return make(steps.size - 1, 3, **{**arrays, "probe_epoch": np.array([0, 1, FAR]), **changes})


def test_a_summary_allocates_nothing_by_step_number():
    record = far_record()
    tracemalloc.start()
    try:
        summary = summarise(record)
        assert observed(record).outcome == "monotone descent"
        assert gradient_law(record, 0.0).slope == pytest.approx(1.0, abs=1e-9)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 5e6
    first, last = summary.steps(summary.regime)
    # (L - L_T) >= L / 2, that is e^(-3 t) >= 2 e^(-3) + 0.01, up to t = 0.733 of the run; entries are 0.0175 apart.
    assert first == 0
    assert 0.73 * FAR - 0.0176 * FAR < last < 0.74 * FAR
    assert summary.steps(summary.middle)[0] >= FAR // 4
    assert summary.middle_rate.zero.rate == pytest.approx(3e-9, rel=0.1)
    with pytest.raises(ValueError, match="holds no entry"):
        summary.steps(slice(0, 0))


def test_gaps_are_filled_by_step_numbers_and_ends_are_not():
    steps = np.array([0, 1, 2, 10, 20, 30, 40, 45, 60, 70, 80, 90, 100])
    line = 2.0 - steps / 100
    holes = np.isin(steps, [10, 45])
    whole, holed = (
        summarise(make(12, 3, epoch=steps, loss=loss, probe_epoch=np.array([0, 1, 2])))
        for loss in (line, np.where(holes, NAN, line))
    )
    # A loss that is linear in the step number is filled in exactly, so every rate is the same.
    assert holed.middle_rate.zero.rate == pytest.approx(whole.middle_rate.zero.rate, rel=1e-12)
    assert holed.regime == whole.regime
    # Bracket and envelope are of measured entries alone.
    assert np.isnan(holed.bracket[0][holes]).all()
    tail = np.where(steps > 60, NAN, line)
    unseen = make(12, 3, epoch=steps, loss=tail, seen=(steps <= 60).astype(int), probe_epoch=np.array([0, 1, 2]))
    assert unseen.diverged_at is None
    assert summarise(unseen).steps(summarise(unseen).middle) == (20, 45), "15 to 45, of the 60 steps that were seen"
    assert observed(unseen).outcome == "monotone descent"


def test_a_regime_that_the_config_names_is_one_of_steps():
    record = far_record()
    record.config["regime_start"], record.config["regime_stop"] = FAR // 4, FAR // 2
    summary = summarise(record)
    inside = summary.step_numbers[summary.regime]
    np.testing.assert_array_equal(
        inside, summary.step_numbers[(summary.step_numbers >= FAR // 4) & (summary.step_numbers < FAR // 2)]
    )
    record.config["regime_stop"] = FAR + 2
    with pytest.raises(ValueError, match="must lie in the run's steps 0 to 1000000000"):
        summarise(record)


def test_a_summary_needs_neither_probes_nor_a_positive_loss():
    bare = make(probe_epoch=None, ntk_min_eig=None, grad_sq_norm=np.full(7, NAN))
    summary = summarise(bare)
    assert np.isnan(summary.envelope).all()
    assert summary.floor == pytest.approx(np.exp(-1.8))
    below = summarise(make(loss=1.0 - np.arange(7.0)))
    assert below.floor == -5.0
    assert np.isnan(below.bracket).all()


def test_steps_are_called_epochs_where_the_config_counts_them():
    record = make()
    assert step_word(record) == "step"
    record.config["epochs"] = 6
    assert step_word(record) == "epoch"
