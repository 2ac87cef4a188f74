"""Every statement of the paper on records made to fulfil it, and on the same records with what it rests on broken."""

import csv
import io

import numpy as np
import pytest

from lplr_jax.experiments.drifts import nearest
from lplr_jax.records import Record
from lplr_jax.reports import statements as written
from lplr_jax.statements import STATEMENTS, Finding, Runs, judge
from lplr_jax.statements.widths import PAPER_DRIFTS, mean_ratios

T = 400
EPOCHS = np.arange(T + 1)
SHARES = np.linspace(0, 1, 41)


def rising(jump=0.3):
    """A drift that overshoots once and then grows."""
    drift = jump * (1 - np.exp(-EPOCHS / 100.0))
    drift[3] = drift[2] * 0.99
    return drift


def mnist(**changes):
    """A run with a transient of ten steps, a long exponential, and a terminal loss far from zero."""
    loss = 0.3 + 0.5 * np.exp(-EPOCHS / 100) + 0.2 * np.exp(-EPOCHS / 2.0)
    gap = loss - loss[-1]
    least = 0.2 * np.where(SHARES < 0.1, 1 - 0.5 * SHARES, 0.95)
    arrays = {
        "epoch": EPOCHS,
        "loss": loss,
        # ‖∇L‖² ∝ gap^1.14, so that the log-log slope is the paper's.
        "grad_sq_norm": np.maximum(gap, 1e-9) ** 1.14 * np.where(EPOCHS < 5, 50.0, 1.0) ** (EPOCHS > 0),
        "drift": rising(),
        "probe_epoch": EPOCHS[::10],
        "ntk_min_eig": least / 4,
        "ntk_min_eig_subset": least,
        "loss_scale": np.array(1000.0),
        "learning_rate": np.array(1e-3),
        "n": np.array(1000),
        "c": np.array(1),
        "p": np.array(5000),
    }
    return Record("mnist", {**arrays, **changes}, {"width": 128, "seed": 0}, {})


def scaled(record, **factors):
    return Record("mnist", {**record.arrays, **{k: record[k] * f for k, f in factors.items()}}, record.config, {})


def runs(**changes):
    """Records on which every statement holds, but for what is changed."""
    base = mnist()
    settled = PAPER_DRIFTS[0] * np.where(EPOCHS > 10, 1.0, EPOCHS / 10)
    fallen = np.where(SHARES > 0, 0.1, 0.4)
    found = {
        "mnist": base,
        "widths": {
            128: base,
            256: scaled(base, loss=0.9, grad_sq_norm=0.9),
            512: scaled(base, loss=0.8, grad_sq_norm=0.8),
            1024: scaled(mnist(drift=settled, ntk_min_eig_subset=fallen), loss=0.7, grad_sq_norm=0.4),
        },
        "smaller": scaled(mnist(drift=rising(PAPER_DRIFTS[1])), loss=0.6, grad_sq_norm=0.9),
        "inits": {"he": base, "scaled-output": scaled_output()},
        "seeds": {f"seed{k}": cifar(k) for k in range(3)},
        "starts": {k: {m: (1 + 0.01 * k) * m / 128 for m in (128, 256, 512, 1024)} for k in range(5)},
    }
    return Runs(**{**found, **changes})


def scaled_output():
    softer = 0.3 + 0.5 * np.exp(-EPOCHS / 100) + 0.01 * np.exp(-EPOCHS / 2.0)
    return mnist(loss=softer)


def cifar(seed, **changes):
    loss = (1 + 0.1 * seed) * np.exp(-EPOCHS / 40.0)
    gap = np.maximum(loss - loss[-1], 1e-9)
    settings = {
        "loss": loss,
        "grad_sq_norm": gap**0.29,
        "drift": (1 + 0.01 * seed) * (1 - np.exp(-EPOCHS / 60.0)),
    }
    return mnist(**{**settings, **changes})


def outcomes(found):
    return {id_: finding.outcome for id_, finding in judge(found).items()}


def test_every_statement_can_hold():
    found = judge(runs())
    assert {id_: finding for id_, finding in found.items() if finding.outcome != "reproduced"} == {}
    assert list(found) == [one.id for one in STATEMENTS]
    assert len(set(found)) == len(found) >= 22


def dropped(depth, late=0.95):
    return 0.2 * np.where(SHARES < 0.1, 1 - SHARES * depth / 0.1, late)


def drifting(at):
    drift = rising()
    drift[at] = drift[at - 1] * 0.99
    return drift


def widths(**by_width):
    there = dict(runs().widths)
    for name, change in by_width.items():
        there[int(name[1:])] = change(there[int(name[1:])])
    return there


def with_subset(values):
    return lambda record: Record("mnist", {**record.arrays, "ntk_min_eig_subset": values}, record.config, {})


def with_drift(values):
    return lambda record: Record("mnist", {**record.arrays, "drift": values}, record.config, {})


def ramp(total):
    return 0.2 * (1 + total * SHARES)


def starts(factor, seeds=5):
    return {k: {m: factor ** np.log2(m / 128) for m in (128, 256, 512, 1024)} for k in range(seeds)}


# Just on this side of a threshold, and just beyond it: the statement holds for the first alone.
EDGES = [
    ("lambda_positive", {"mnist": mnist(ntk_min_eig_subset=dropped(0.99, 1e-3))},
     {"mnist": mnist(ntk_min_eig_subset=dropped(0.99, -1e-3))}),
    ("lambda_plateau", {"mnist": mnist(ntk_min_eig_subset=dropped(0.012, 0.988))},
     {"mnist": mnist(ntk_min_eig_subset=dropped(0.008, 0.992))}),
    ("lambda_plateau", {"mnist": mnist(ntk_min_eig_subset=dropped(0.05) * (1 + 0.12 * SHARES**2 * (SHARES > 0.3)))},
     {"mnist": mnist(ntk_min_eig_subset=dropped(0.05) * (1 + 0.16 * SHARES**2 * (SHARES > 0.3)))}),
    ("lambda_change", {"mnist": mnist(ntk_min_eig_subset=dropped(0.2, 0.76))},
     {"mnist": mnist(ntk_min_eig_subset=dropped(0.2, 0.74))}),
    ("lambda_change", {"mnist": mnist(ntk_min_eig_subset=dropped(0.1, 0.9))},
     {"mnist": mnist(ntk_min_eig_subset=ramp(0.2))}),
    ("drift_smooth", {"mnist": mnist(drift=drifting(39))}, {"mnist": mnist(drift=drifting(45))}),
    ("loss_left", {"mnist": mnist(loss=np.exp(-EPOCHS / 90.0))}, {"mnist": mnist(loss=np.exp(-EPOCHS / 80.0))}),
    ("pl_above", {"mnist": scaled(mnist(), ntk_min_eig_subset=30.0)},
     {"mnist": scaled(mnist(), ntk_min_eig_subset=1e4)}),
    ("gap_phases", {}, {"mnist": mnist(loss=0.3 + 0.5 * np.exp(-EPOCHS / 100))}),
    ("pl_bounded", {}, {"mnist": scaled(mnist(), grad_sq_norm=np.where(EPOCHS > 30, 1.15, 1.0))}),
    ("pl_ends", {}, {"mnist": mnist(loss=2.0 - EPOCHS / 1000, grad_sq_norm=0.4 - EPOCHS / 1000 + 1e-9)}),
    ("lambda_0_rises", {"starts": starts(1.05)}, {"starts": starts(0.95)}),
    ("lambda_0_doubles", {"starts": starts(1.65)}, {"starts": starts(1.55)}),
    ("lambda_0_doubles", {"starts": starts(2.45)}, {"starts": starts(2.55)}),
    ("narrow_lambda", {"widths": widths(m512=with_subset(ramp(0.24)))},
     {"widths": widths(m512=with_subset(ramp(0.26)))}),
    ("narrow_loss", {}, {"widths": widths(m256=lambda one: scaled(one, loss=1.2))}),
    ("narrow_drift", {"widths": widths(m512=lambda one: scaled(one, drift=1.24))},
     {"widths": widths(m512=lambda one: scaled(one, drift=1.26))}),
    ("narrow_pl", {"widths": widths(m512=lambda one: scaled(one, grad_sq_norm=9.0))},
     {"widths": widths(m512=lambda one: scaled(one, grad_sq_norm=11.0))}),
    ("wide_drift", {}, {"widths": widths(m1024=with_drift(EPOCHS / 200.0))}),
    ("wide_drift", {}, {"widths": widths(m1024=lambda one: scaled(one, drift=0.15))}),
    ("wide_lambda", {"widths": widths(m1024=with_subset(ramp(-0.51)))},
     {"widths": widths(m1024=with_subset(ramp(-0.49)))}),
    ("wide_pl", {}, {"widths": widths(m1024=lambda one: scaled(one, grad_sq_norm=3.0))}),
    ("wide_loss", {"widths": widths(m1024=lambda one: scaled(one, loss=0.7))},
     {"widths": widths(m1024=lambda one: scaled(one, loss=0.6))}),
    ("smaller_drift", {"smaller": scaled(runs().smaller, drift=1.4)}, {"smaller": scaled(runs().smaller, drift=1.6)}),
    ("smaller_drift", {"smaller": scaled(runs().smaller, drift=0.7)}, {"smaller": scaled(runs().smaller, drift=0.6)}),
    ("smaller_lambda", {"smaller": with_subset(ramp(0.06))(runs().smaller)},
     {"smaller": with_subset(ramp(0.07))(runs().smaller)}),
    ("smaller_loss", {}, {"smaller": scaled(runs().smaller, loss=1.3)}),
    ("smaller_pl", {}, {"smaller": scaled(runs().smaller, grad_sq_norm=0.5)}),
    ("seeds_gap", {}, {"seeds": {"seed0": cifar(0), "seed1": cifar(0, loss=1 / (1 + EPOCHS / 10.0))}}),
    ("seeds_gap", {"seeds": {k: scaled(cifar(0), loss=f) for k, f in (("a", 1.0), ("b", 2.6))}},
     {"seeds": {k: scaled(cifar(0), loss=f) for k, f in (("a", 1.0), ("b", 2.7))}}),
    ("seeds_end", {}, {"seeds": {k: cifar(0, loss=np.exp(-EPOCHS / 5.0)) for k in "ab"}}),
    ("seeds_pl", {}, {"seeds": {"a": cifar(0), "b": cifar(0, loss=np.ones(T + 1))}}),
    ("seeds_drift", {"seeds": {k: scaled(cifar(0), drift=f) for k, f in (("a", 1.0), ("b", 1.14))}},
     {"seeds": {k: scaled(cifar(0), drift=f) for k, f in (("a", 1.0), ("b", 1.17))}}),
    ("seeds_drift", {}, {"seeds": {k: cifar(0, drift=1.0 * EPOCHS) for k in "ab"}}),
    ("enhanced", {}, {"inits": {"he": scaled_output(), "scaled-output": mnist()}}),
    ("slope_mnist", {}, {"mnist": mnist(grad_sq_norm=np.maximum(mnist()["loss"] - mnist()["loss"][-1], 1e-9) ** 1.3)}),
    ("slope_cifar", {}, {"seeds": {"a": mnist()}}),
    ("loss_250", {}, {"widths": widths(m1024=lambda one: scaled(one, loss=2.0))}),
]  # fmt: skip


@pytest.mark.parametrize(("id_", "within", "beyond"), EDGES, ids=[f"{k}-{edge[0]}" for k, edge in enumerate(EDGES)])
def test_a_statement_holds_up_to_its_threshold(id_, within, beyond):
    statement = next(one for one in STATEMENTS if one.id == id_)
    for changes, outcome in ((within, "reproduced"), (beyond, "not reproduced")):
        finding = statement.find(runs(**changes))
        assert finding.outcome == outcome, finding


def test_every_statement_has_an_edge():
    assert {edge[0] for edge in EDGES} == {one.id for one in STATEMENTS}


def test_without_records_nothing_is_decided():
    assert set(outcomes(Runs()).values()) == {"cannot be decided"}


def test_four_seeds_cannot_show_doubling():
    for id_ in ("lambda_0_rises", "lambda_0_doubles"):
        finding = judge(runs(starts=starts(2.0, seeds=4)))[id_]
        assert (finding.outcome, finding.numbers) == ("cannot be decided", "4 seeds, where 5 are needed")


def test_one_seed_shows_nothing_of_every_seed():
    found = outcomes(runs(seeds={"seed0": cifar(0)}))
    assert {found[id_] for id_ in ("seeds_gap", "seeds_end", "seeds_pl", "seeds_drift")} == {"cannot be decided"}


def test_what_was_not_measured_is_named():
    arrays = {name: array for name, array in mnist().arrays.items() if name != "ntk_min_eig_subset"}
    finding = judge(Runs(mnist=Record("mnist", arrays, {}, {})))["lambda_positive"]
    assert finding.outcome == "cannot be decided"
    assert "ntk_min_eig_subset was not measured" in finding.numbers


def test_a_run_that_diverged_does_not_show_it():
    loss = mnist()["loss"].copy()
    loss[7:] = np.nan
    finding = judge(Runs(mnist=mnist(loss=loss)))["lambda_positive"]
    assert (finding.outcome, finding.numbers) == ("not reproduced", "mnist diverged at step 7")


def test_mean_ratio_is_that_of_a_doubling():
    ratios = mean_ratios({0: {1: 1.0, 4: 9.0}, 1: {1: 2.0, 4: 8.0}})
    # Over two doublings the factors are 3 and 2, so log-means of ln 3 and ln 2; their standard error is half the gap.
    assert ratios[4] == pytest.approx((np.sqrt(6), (np.log(3) - np.log(2)) / 2))


def test_the_nearest_drifts_are_found_by_hand():
    fast, faster = (mnist(drift=top * np.minimum(1.0, EPOCHS / 10)) for top in (1.0, 2.0))
    slow = mnist(drift=0.158 * EPOCHS / 100)
    met = nearest("hand", {2.4: fast, 2.8: faster}, slow)
    # From step 10 on the larger drift is 2, off by 2/1.87; the smaller is exact at step 100.
    assert met.eta_beta == 2.8
    assert met.off == pytest.approx(2.0 / 1.870)
    assert met.met
    assert met.smaller == pytest.approx(0.158, rel=2.0 / 1.870 - 1)
    assert met.reach == {2.4: 1.0, 2.8: 2.0}
    assert not nearest("hand", {2.4: fast}, slow).met


def test_the_tables_hold_every_statement_once(tmp_path):
    findings, shares = judge(runs()), {"pl_above": (3, 4)}
    md, table, tex = (path.read_text() for path in written.save(findings, shares, tmp_path / "found"))
    assert md.startswith(f"{len(STATEMENTS)} statements: {len(STATEMENTS)} reproduced, 0 not reproduced")
    rows = list(csv.DictReader(io.StringIO(table)))
    assert [row["id"] for row in rows] == [one.id for one in STATEMENTS]
    assert next(row for row in rows if row["id"] == "pl_above")["set_ups_decided"] == "4"
    assert tex.count(r"\\") == len(STATEMENTS) + 1
    assert "3 of 4" in md
    assert "3 of 4" in tex


def test_a_page_keeps_what_is_around_the_table(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{written.BEGIN}\nold\n{written.END}\nafter\n")
    written.put(page, "new\n")
    assert page.read_text() == f"before\n{written.BEGIN}\nnew\n{written.END}\nafter\n"
    page.write_text("no marks")
    with pytest.raises(ValueError, match="must hold the lines"):
        written.put(page, "new")


def test_shares_are_counted_over_what_was_decided():
    def row(name, **outcomes):
        findings = {one.id: Finding(outcomes.get(one.id, "cannot be decided"), "") for one in STATEMENTS}
        return name, findings, {"drift_wide": 1.0}

    text = written.searched_csv([row("a", pl_above="reproduced"), row("b", pl_above="not reproduced"), row("c")])
    shares = written.shares_of(text)
    assert shares["pl_above"] == (1, 2)
    assert shares["pl_ends"] == (0, 0)
    assert [line.split(",")[:3] for line in text.splitlines()[1:]] == [
        ["a", "1", "1"],
        ["b", "0", "1"],
        ["c", "0", "0"],
    ]
    with pytest.raises(ValueError, match="has a column set_up"):
        written.shares_of("x,y\n1,2\n")
