"""Series of which not every step was seen, sparse axes, numbers without bound: only what was seen counts."""

import dataclasses

import numpy as np
import optax
import pytest
from controls import by_claim, replaced, tampered
from test_method import EPOCHS, ETA, run

from lplr_jax import theory
from lplr_jax.records import Record
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import MET

SERIES = ("loss", "grad_sq_norm", "drift", "step_size", "step_deviation", "step_rounding", "seen")


def hidden(record, kept, *, flags=False):
    """The same run, of which only the entries `kept` were seen."""
    arrays = dict(record.arrays)
    mask = np.zeros(arrays["epoch"].size, bool)
    mask[kept] = True
    step = mask & np.append(mask[1:], False)
    for name in SERIES[:-1]:
        arrays[name] = np.where(step if name.startswith("step_") else mask, arrays[name], np.nan)
    if flags:
        arrays["seen"] = mask.astype(np.int64)
    return dataclasses.replace(record, arrays=arrays)


def sparse(record, kept):
    """The same, stored without the entries that were not seen."""
    arrays = {k: v[kept] if k in (*SERIES, "epoch") else v for k, v in hidden(record, kept).arrays.items()}
    return dataclasses.replace(record, arrays=arrays)


@pytest.fixture(scope="module")
def whole():
    return run(optax.sgd(ETA))


PAIRS = np.sort([*range(0, EPOCHS + 1, 10), *range(1, EPOCHS + 1, 10)])


@pytest.mark.parametrize("flags", [False, True])
def test_steps_that_were_not_seen_block_a_proof(whole, flags):
    found = by_claim(hidden(whole, PAIRS, flags=flags))
    assert found["consistency"].outcome == "proved"
    rate = found["linear_rate"]
    assert rate.outcome == "not refuted"
    assert f"seen at 6 of {EPOCHS} steps" in rate.note
    assert f"at all 6 seen steps (of {EPOCHS})" in rate.part("descent").note
    assert f"at all 12 seen epochs (of {EPOCHS})" in rate.part("bound_theorem").note
    assert found["regime"].outcome == "not refuted"
    # L_Θ = 0 everywhere, so no region has to hold the iterates that were not seen.
    assert found["local_pl"].outcome == "proved"


def test_a_sparse_axis_is_the_same_run(whole):
    probes = {k: v for k, v in whole.arrays.items() if not k.startswith(("probe_", "ntk_", "param_pair"))}
    record = dataclasses.replace(whole, arrays=probes)
    dense, thin = by_claim(hidden(record, PAIRS)), by_claim(sparse(record, PAIRS))
    for claim in theory.CLAIMS:
        assert thin[claim].outcome == dense[claim].outcome
    assert thin["linear_rate"].part("descent") == dense["linear_rate"].part("descent")
    assert not theory.any_inconsistent(thin.values())


def test_a_step_number_allocates_nothing():
    """Two pairs of entries, a billion steps apart; η μ is 1e-10, so that the bound is far from 0 at the end."""
    base = linear_regression()
    far = 10**9
    mu = 1e-10
    epoch = np.array([0, 1, far, far + 1])
    loss = np.exp(-1.5 * mu * epoch)
    changes = {
        "epoch": epoch,
        "loss": loss,
        "grad_sq_norm": 2 * mu * loss,
        "drift": np.array([0.0, np.sqrt(2 * mu), 0.1, 0.1]),
        "step_size": np.array([1.0, np.nan, 1.0, np.nan]),
        "step_deviation": np.array([0.0, np.nan, 0.0, np.nan]),
        "step_rounding": np.array([1e-9, np.nan, 1e-9, np.nan]),
        "learning_rate": np.asarray(1.0),
        "probe_epoch": np.array([0]),
        "probe_loss": loss[:1],
        "probe_grad_sq_norm": 2 * mu * loss[:1],
    }
    kernel = {"ntk_min_eig": mu, "ntk_max_eig": 2 * mu, "ntk_rayleigh": mu, "ntk_assembly_error": mu * 1e-6}
    kernel |= {"ntk_min_eig_lower": mu * (1 - 1e-6), "ntk_min_eig_upper": mu * (1 + 1e-6), "ntk_shift": 0.0}
    scalars = ("affine_in_parameters", "loss_scale", "n", "c", "p", "parameter_eps")
    arrays = {name: base[name] for name in scalars} | {k: np.array([v]) for k, v in kernel.items()} | changes
    found = by_claim(Record("far", arrays, {}))
    assert found["consistency"].outcome in MET, found["consistency"]
    part = found["linear_rate"].part("bound_theorem")
    assert part.step == far + 1
    assert part.bound == pytest.approx(np.exp(-mu * far), rel=1e-3)
    assert found["linear_rate"].part("descent").outcome == "not refuted"
    assert f"2 seen steps (of {far + 1})" in found["linear_rate"].part("descent").note


def test_a_loss_that_rises_between_what_was_seen_holds_nowhere():
    """Three epochs of 101, each loss above the one before: no two follow each other, so no step was seen."""
    series = {"loss": [1.0, 5.0, 9.0], "grad_sq_norm": [4.0] * 3, "drift": [0.0, 1.0, 2.0]}
    arrays = {"epoch": np.arange(101)}
    for name, values in series.items():
        arrays[name] = np.full(101, np.nan)
        arrays[name][[0, 50, 100]] = values
    scalars = {"loss_scale": 10.0, "learning_rate": 0.01, "n": 10, "c": 1, "p": 50}
    record = Record("thin", arrays | {k: np.asarray(v) for k, v in scalars.items()}, {"diagnostics_every": 50})
    found = by_claim(record)
    assert found["linear_rate"].outcome == "undecided"
    assert found["linear_rate"].part("descent").outcome == "undecided"
    assert "0 seen steps (of 100)" in found["linear_rate"].part("descent").note
    assert not theory.any_inconsistent(found.values())


def test_the_drift_between_what_was_seen_is_not_known():
    """Inside R* at every epoch seen: containment and what rests on the radius are open without the others."""
    changes = {"affine_in_parameters": 0, "ntk_lipschitz_upper": 1e-3, "radius_certified": 100.0}
    record = tampered(linear_regression(), **{name: replaced(value) for name, value in changes.items()})
    before, after = by_claim(record), by_claim(hidden(record, [0, 1, 2, 10, 20], flags=True))
    for claim in ("compatibility", "local_pl", "linear_rate"):
        assert before[claim].outcome == "proved", before[claim]
        assert after[claim].outcome == "not refuted", after[claim]
    assert before["linear_rate"].part("containment").outcome == "proved"
    assert after["linear_rate"].part("containment").outcome == "undecided"
    assert after["compatibility"].part("radius").outcome == "undecided"


@pytest.mark.parametrize("at", [0, 7, 20])
@pytest.mark.parametrize("name", ["loss", "grad_sq_norm", "drift"])
@pytest.mark.parametrize("value", [1e300, 1e150])
def test_a_huge_entry_does_not_make_the_rest_pass(name, at, value):
    record = tampered(linear_regression(), **{name: replaced(value, at)})
    found = by_claim(record)
    assert not found["linear_rate"].met, found["linear_rate"]
    if name != "drift" or at == 0:
        assert not found["regime"].met


def test_a_slack_without_bound_holds_nothing():
    record = tampered(linear_regression(), ntk_assembly_error=replaced(np.inf, 1), ntk_max_eig=replaced(np.inf, 1))
    evidence = Evidence(
        tampered(linear_regression(), ntk_assembly_error=replaced(np.nan), ntk_max_eig=replaced(np.nan))
    )
    assert np.isnan(evidence.kernel_error).all()
    assert evidence.verdict("weyl").outcome == "undecided"
    assert not by_claim(record)["consistency"].met
