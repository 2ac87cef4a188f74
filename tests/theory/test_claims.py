"""Claims as objects: every one is met on its example, undecided without what it needs, and moved by its thresholds."""

import ast
import dataclasses
import importlib
import itertools
import pkgutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from controls import by_claim, replaced, scaled, tampered, without
from test_moving_step import budgeted, with_budget
from test_noise import contained, drifting
from test_other_rates import cosine, momentum_run

from lplr_jax import schema, theory
from lplr_jax.records import RecordError
from lplr_jax.theory import claims
from lplr_jax.theory.claims import noise
from lplr_jax.theory.claims.example import linear_regression
from lplr_jax.theory.evidence import Evidence
from lplr_jax.theory.verdict import MET

ROOT = Path(__file__).parents[2]


def of_loss(record, loss):
    copy = dataclasses.replace(record)
    object.__setattr__(copy, "loss", loss)
    return copy


@pytest.mark.parametrize("name", theory.CLAIMS)
def test_a_claim_is_met_on_its_example(name):
    claim = claims.REGISTRY[name]
    verdict = Evidence(claim.example()).verdict(name)
    assert verdict.met, verdict
    assert verdict.claim == claim.id == name
    assert verdict.reference == claim.reference
    assert set(claim.needs) <= set(schema.SCHEMA)
    others = [momentum_run(0.3, 0.5)[0], cosine(8)[0]] if name == "linear_rate" else []  # judged by other statements
    found = [verdict, *(Evidence(record).verdict(name) for record in others)]
    parts = {part.claim.removeprefix(f"{name}.") for one in found for part in one.parts}
    rests = {*claim.rests_on.every_kernel, *claim.rests_on.kernels, *claim.rests_on.hessians} - {""}
    assert rests <= parts, "every part that rests on probes is a part of an example"


@pytest.mark.parametrize(
    ("name", "need"), [(name, need) for name in theory.CLAIMS for need in claims.REGISTRY[name].needs]
)
def test_without_what_it_needs_a_claim_is_undecided(name, need):
    found = by_claim(without(claims.REGISTRY[name].example(), need))
    assert found[name].outcome == "undecided"
    assert found[name].note.startswith("not measured: ")
    assert need in found[name].note
    assert not theory.any_inconsistent(found.values())


OPTIONAL = sorted(set(linear_regression().arrays) - set(schema.REQUIRED))


@pytest.mark.parametrize("names", [(name,) for name in OPTIONAL] + list(itertools.combinations(OPTIONAL, 2)))
def test_what_is_missing_contradicts_nothing_and_proves_nothing(names):
    whole = by_claim(linear_regression())
    try:
        record = without(linear_regression(), *names)
    except RecordError:
        return
    for verdict in theory.flatten(theory.verify(record)):
        assert not verdict.inconsistent, verdict
        if verdict.claim in whole:
            assert verdict.outcome != "refuted", verdict


def test_a_claim_is_judged_once(monkeypatch):
    calls = []
    claim = claims.REGISTRY["compatibility"]

    def counted(evidence):
        calls.append(1)
        return claim.check(evidence)

    registry = {**claims.REGISTRY, "compatibility": dataclasses.replace(claim, check=counted)}
    monkeypatch.setattr(claims, "REGISTRY", registry)
    assert by_claim(linear_regression())["linear_rate"].outcome == "proved"
    assert len(calls) == 1
    with pytest.raises(KeyError, match="there is no claim 'nothing'; there are consistency"):
        Evidence(linear_regression()).verdict("nothing")


def test_ids_follow_from_the_registry():
    assert tuple(claims.REGISTRY) == theory.CLAIMS
    assert get_args(theory.Claim) == theory.CLAIMS
    assert theory.CLAIMS[:9] == (
        *("consistency", "ntk_positive", "ntk_lipschitz", "compatibility", "weyl"),
        *("local_pl", "linear_rate", "lqcr", "regime"),
    )
    assert theory.CLAIMS[9:] == ("descent", "path", "floor_pl", "containment", "interpolation", "noise", "loss_bridge")
    for name, claim in claims.REGISTRY.items():
        assert claim.reference.startswith("ours (") == (name in theory.CLAIMS[9:])


def test_a_claim_for_another_loss_is_not_applicable():
    found = by_claim(of_loss(linear_regression(), "logistic"))
    for name, verdict in found.items():
        if claims.REGISTRY[name].loss == "any":
            assert verdict.outcome != "not applicable", verdict
            assert not verdict.inconsistent
        elif name == "noise":  # stated for it, but not of full batches
            assert verdict.note == "every step uses all data, as far as is recorded"
        elif name == "loss_bridge":  # stated for it, but nothing of it was measured
            assert verdict.outcome == "undecided"
        elif name == "linear_rate":
            assert verdict.outcome == "not applicable"
            assert "a fixed step gives 1/t and no linear rate" in verdict.note
            # L of this record is squared, of modes between the slopes of which it lies.
            assert "the measured slope of log ‖∇L‖² on log L is 1.15, 2 where" in verdict.note
        else:
            assert verdict.outcome == "not applicable"
            assert verdict.note == "stated for the loss squared; that of this run is logistic"
    assert found["ntk_positive"].outcome == "proved"
    assert {name for name in found if claims.REGISTRY[name].loss != "any"} == {
        *("local_pl", "linear_rate", "floor_pl", "containment", "interpolation", "noise", "loss_bridge")
    }


@pytest.mark.parametrize("scale", [1.5, 3.0, 1e-3, 1e6])
def test_any_number_is_a_scale(scale):
    """L divided by s and η multiplied by it is the same run; no value of s is special."""
    per = dict.fromkeys(("loss", "probe_loss", "sharpness", "curvature_min", "smoothness_upper"), 1 / scale)
    per |= dict.fromkeys(("grad_sq_norm", "probe_grad_sq_norm"), 1 / scale**2)
    per |= {"lqcr_inner": 1 / scale, "step_size": scale, "learning_rate": scale, "loss_scale": scale}
    record = tampered(linear_regression(), **{name: scaled(factor) for name, factor in per.items()})
    # Half of the samples' own loss, were it of a subset, is said by probe_loss_scale.
    found, base = by_claim(record), by_claim(linear_regression())
    for name in theory.CLAIMS:
        assert found[name].outcome == base[name].outcome, found[name]
    assert found["local_pl"].bound == pytest.approx(0.5 / scale, rel=1e-9)


def test_the_scale_of_the_probes_may_be_recorded():
    arrays = dict(without(linear_regression(), "spectrum", "residual_energy").arrays)
    arrays |= {"probe_loss": arrays["probe_loss"] / 7, "probe_grad_sq_norm": arrays["probe_grad_sq_norm"] / 49}
    arrays |= {"kernel_samples": np.asarray(2), "lqcr_inner": arrays["lqcr_inner"] / 7}
    assert by_claim(dataclasses.replace(linear_regression(), arrays=arrays))["consistency"].inconsistent
    arrays["probe_loss_scale"] = np.asarray(7.0)
    found = by_claim(dataclasses.replace(linear_regression(), arrays=arrays))
    assert found["consistency"].part("identity").outcome in MET


def test_the_page_of_the_claims_is_theirs():
    text = (ROOT / "docs" / "claims.md").read_text()
    head, pages = text.split("\n### ", 1)
    expected = "\n".join(claims.page(name) for name in theory.CLAIMS)
    assert f"### {pages}" == expected, "write it again: '\\n'.join(map(claims.page, claims.CLAIMS)) below the heading"
    assert "claims.page" in head


def no_smoothness(**changes):
    return without(tampered(linear_regression(), **changes), "smoothness_upper")


def triple(off):
    """Kernel shifts of three probes, one of which differs from its mirror by a relative `off`."""
    matrix = 1.0 - np.eye(3)
    matrix[1, 2] += off
    return without(tampered(linear_regression(), ntk_pair_shift=replaced(matrix)), "ntk_lipschitz_lower")


def lower(by):
    """λ_min of one probe lower by 0.1 where the kernel moves by a relative `by` less."""
    changes = {name: replaced(0.4, 1) for name in ("ntk_min_eig", "ntk_min_eig_lower", "ntk_min_eig_upper")}
    return tampered(linear_regression(), ntk_shift=replaced(0.1 * (1 - by), 1), **changes)


def reaching(beyond):
    """R* beyond the last radius that L_Θ R < λ_0 allows by a relative `beyond`."""
    upper = 1e-2
    at = float(linear_regression()["ntk_min_eig_upper"][0]) / upper * (1 + beyond)
    changes = {"affine_in_parameters": 0, "ntk_lipschitz_upper": upper, "radius_certified": at}
    return tampered(linear_regression(), **{name: replaced(value) for name, value in changes.items()})


def aside(rounding):
    """Steps far from the gradient, of which rounding may make up the given share."""
    return tampered(
        linear_regression(), step_deviation=replaced(0.98, slice(20)), step_rounding=replaced(rounding, slice(20))
    )


def part(claim, name=""):
    def outcome(record):
        verdict = Evidence(record).verdict(claim)
        return (verdict.part(name) if name else verdict).outcome

    return outcome


def kind(record):
    return Evidence(record).method.kind


def budget_short_of(off):
    """Steps that fall short of what a budget of the path allows by a relative `off`."""
    record, _ = budgeted(0.6, steps=8, share=schema.PATH_SHARE * (1 - off))
    return with_budget(record, 0.6)


def rising_to(p):
    """A loss that rises at once to L_0 / p, where a fall of nothing is promised."""
    record = claims.REGISTRY["noise"].example()
    changes = {"sharpness": 0.0, "ntk_min_eig": 0.0}
    raised = tampered(record, **{name: replaced(value) for name, value in changes.items()})
    return tampered(raised, loss=replaced(float(record["loss"][0]) / p, 1))


def far(share):
    """A drift of probability 1 % where that share of q is given to rounding; C goes with 1/(1 - √(1 - q))."""
    _, _, values, v, *_ = contained(0, 0.05)
    q = float(noise.rate(0.05, values[-1] * (1 + 1e-3), values[0], values[-1], v))
    plain = Evidence(drifting()).verdict("noise").part("containment")
    ours, other = (1 - np.sqrt(1 - q * (1 - one)) for one in (noise.SHARE, share))
    return drifting(factor=plain.bound / plain.measured * ours / other)


# For each threshold: what to look at, what it is within the threshold and beyond, and records on both sides of it, each
# by a factor of three.
THRESHOLDS = {
    "claims.interpolation.NEAREST": (
        lambda record: "not the nearest" in Evidence(record).verdict("interpolation").note,
        (False, True),
        [tampered(linear_regression(), interpolant_stationarity=replaced(found)) for found in (3e-3, 3e-2)],
    ),
    "evidence.HESSIAN_ERROR": (
        part("linear_rate", "step_size"),
        ("not refuted", "refuted"),
        [no_smoothness(sharpness=replaced((1 + off) / 0.2)) for off in (3e-4, 3e-3)],
    ),
    "evidence.SUMS": (
        part("consistency", "energy"),
        ("proved", "refuted"),
        [tampered(linear_regression(), residual_energy=scaled(1 + off)) for off in (3e-10, 3e-9)],
    ),
    "claims.agreement.RITZ": (
        part("consistency", "kernel_pairs"),
        ("proved", "refuted"),
        [triple(2 * off) for off in (3e-4, 3e-3)],
    ),
    "claims.agreement.RADIUS_ERROR": (
        part("consistency", "radius"),
        ("proved", "refuted"),
        [reaching(off) for off in (3e-7, 3e-6)],
    ),
    "claims.weyl.NORM_ERROR": (part("weyl"), ("proved", "refuted"), [lower(off) for off in (3e-7, 3e-6)]),
    "claims.moving_step.BINDS": (
        part("linear_rate"),
        ("not applicable", "not refuted"),
        [budget_short_of(off) for off in (3e-4, 3e-3)],
    ),
    "claims.moving_step.COSINE": (
        lambda record: "linear_rate.cosine" in {p.claim for p in Evidence(record).verdict("linear_rate").parts},
        (True, False),
        [cosine(40, floor=off)[0] for off in (3e-3, 3e-2)],
    ),
    "claims.noise.LEVEL": (
        part("noise", "supermartingale"),
        ("refuted", "not refuted"),
        [rising_to(p) for p in (3e-3, 3e-2)],
    ),
    "claims.noise.SHARE": (
        part("noise", "containment"),
        ("not refuted", "refuted"),
        [far(share) for share in (3e-4, 3e-3)],
    ),
    "method.UNRESOLVED": (kind, ("other", "unseen"), [aside(share) for share in (0.03, 0.3)]),
}


def test_every_threshold_has_a_test():
    """Constants of the modules, read off their source: a float in capitals is a threshold."""
    found = set()
    folder = Path(theory.__file__).parent
    for path in folder.rglob("*.py"):
        if path.name == "example.py":
            continue
        name = ".".join(path.relative_to(folder).with_suffix("").parts)
        module = importlib.import_module(f"lplr_jax.theory.{name}".removesuffix(".__init__"))
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else []
            for target in targets:
                value = getattr(module, getattr(target, "id", ""), None)
                if isinstance(value, float) and np.isfinite(value):
                    found.add(f"{name}.{target.id}")
    assert found == set(THRESHOLDS)


def theory_modules():
    return [importlib.import_module(i.name) for i in pkgutil.walk_packages(theory.__path__, "lplr_jax.theory.")]


@pytest.mark.parametrize("name", THRESHOLDS)
def test_a_threshold_ten_times_off_is_noticed(name, monkeypatch):
    outcome, (within, beyond), (small, large) = THRESHOLDS[name]
    assert (outcome(small), outcome(large)) == (within, beyond)
    constant = name.rpartition(".")[2]
    value = getattr(importlib.import_module(f"lplr_jax.theory.{name.rpartition('.')[0]}"), constant)
    for factor, record, moved in ((10, large, within), (0.1, small, beyond)):
        with monkeypatch.context() as patched:
            for module in theory_modules():
                if hasattr(module, constant):
                    patched.setattr(module, constant, value * factor)
            assert outcome(record) == moved
