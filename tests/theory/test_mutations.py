"""Records with one array spoilt: no claim that was met may pass."""

import dataclasses

import numpy as np
import pytest
from controls import by_claim, raised, replaced, scaled, tampered

from lplr_jax import schema, theory
from lplr_jax.records import RecordError

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
    ("descent", "regression", "loss", raised(7)),
    ("path", "regression", "drift", scaled(10.0, slice(2, None))),
    ("floor_pl", "regression", "spectrum", scaled(1.5)),
    ("floor_pl", "regression", "loss", raised(7)),
]


@pytest.mark.parametrize(
    ("claim", "kind", "name", "change"), MUTATIONS, ids=[f"{claim}-{name}" for claim, _, name, _ in MUTATIONS]
)
def test_a_broken_array_never_passes(claim, kind, name, change, digits, regression):
    record = digits if kind == "digits" else regression[0]
    before = by_claim(record)[claim]
    if name != "curvature_min":
        assert before.met, before
    try:
        after = by_claim(tampered(record, **{name: change}))
    except RecordError:  # no record can hold such numbers
        return
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
