"""Numbers that the arithmetic loses: NaN with the reason, claims undecided, never a wrong sign; the run goes on."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg
import scipy.sparse.linalg

import survival
from lplr_jax import cli, diagnostics, lanczos, linalg, plotting, records, theory
from lplr_jax.experiments import mnist
from lplr_jax.measurement import closing, probe, search
from lplr_jax.ntk import empirical_ntk
from lplr_jax.proofs import ball as bounds
from lplr_jax.proofs.rounding import ACTIVATIONS, spectral_norm_bound
from lplr_jax.reports import report
from lplr_jax.runs.checkpoint import Checkpoints

TINY = dataclasses.replace(survival.TINY, hessian_precision="float32", search_steps=0)
RNG = np.random.default_rng(0)


def fails(*_, **__):
    raise scipy.linalg.LinAlgError("the algorithm failed to converge")


def arpack_fails(*_, **__):
    raise scipy.sparse.linalg.ArpackError(-9999)


def krylov_gives_nan(a, *, return_eigenvectors=True, **_):
    values = np.array([np.nan])
    return (values, np.full((len(a), 1), np.nan)) if return_eigenvectors else values


def gives_nan(a, **_):
    return np.full(len(a), np.nan)


@pytest.mark.parametrize("dense", [fails, gives_nan])
@pytest.mark.parametrize("krylov", [arpack_fails, krylov_gives_nan])
@pytest.mark.parametrize("n", [3, 401])
def test_no_solver_no_number(dense, krylov, n, monkeypatch):
    monkeypatch.setattr(scipy.linalg, "eigvalsh", dense)
    monkeypatch.setattr(scipy.sparse.linalg, "eigsh", krylov)
    a = np.diag(np.arange(1.0, n + 1))
    for function in (linalg.max_eig, linalg.spectral_norm, linalg.extremes):
        with pytest.raises(linalg.UntrustedError, match="LAPACK's eigensolver"):
            function(a)
    # A bound needs no solver: the Frobenius norm is one.
    assert spectral_norm_bound(a) >= n


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_entries_that_are_no_numbers(value):
    a = np.eye(3)
    a[1, 1] = value
    for function in (linalg.max_eig, linalg.spectral_norm, linalg.extremes, linalg.min_eig):
        with pytest.raises(linalg.UntrustedError, match="1 entries that are NaN or infinite"):
            function(a)


@pytest.mark.parametrize("n", [3, 401])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_entries_near_the_largest_double_keep_their_sign(n, sign):
    """Squares overflow here; a value that comes back has the right sign and size, or none comes back."""
    values = sign * np.linspace(0.5, 1.0, n) * 1.5e308
    low, high = linalg.extremes(np.diag(values))
    assert low == pytest.approx(values.min())
    assert high == pytest.approx(values.max())
    assert linalg.spectral_norm(np.diag(values)) == pytest.approx(1.5e308)
    assert linalg.min_eig(np.diag(values)).sign == sign


def test_a_product_that_overflows_at_the_end_is_not_converged():
    """Every Lanczos coefficient is finite and the next vector is not: nothing is known of how far off the pairs are."""
    diagonal, off = np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.1])
    values, residuals, _ = lanczos._projected_pairs(diagonal, off, np.inf)
    assert np.isfinite(values).all()
    assert np.isinf(residuals).all()
    _, residuals, _ = lanczos._projected_pairs(diagonal, off, 0.0)
    assert (residuals == 0).all()


def test_hessian_without_a_number(monkeypatch):
    good = diagnostics.hessian_extremes(lambda w, d: 0.5 * jnp.sum(d * w * w), jnp.ones(3), jnp.array([-1.0, 2.0, 3.0]))
    assert (good.converged, round(good.largest, 6)) == (True, 3.0)
    with monkeypatch.context() as patched:
        patched.setattr(scipy.linalg, "eigh_tridiagonal", fails)
        lost = diagnostics.hessian_extremes(lambda w: 0.5 * jnp.sum(w * w), jnp.ones(3))
    assert np.isnan([lost.least, lost.largest]).all()
    assert not lost.converged
    nan = diagnostics.hessian_extremes(lambda w: jnp.sum(w * w) * jnp.nan, jnp.ones(3))
    assert np.isnan([nan.least, nan.largest]).all()
    assert not nan.converged
    again = diagnostics.hessian_extremes(
        lambda w, d: 0.5 * jnp.sum(d * w * w), jnp.ones(3), jnp.array([-1.0, 2.0, 3.0]), start=nan
    )
    assert again.largest == pytest.approx(3.0), "a start that is no number is not taken up"


@pytest.fixture(scope="module")
def undisturbed():
    return mnist.run(TINY)


def losing(monkeypatch, epoch, *, name="empirical_ntk", value=np.nan):
    """Let the kernel of one probe come back from the device with a NaN."""
    calls = []

    def disturbed(apply_fn, params, x, **settings):
        theta = np.array(empirical_ntk(apply_fn, params, x, **settings))
        calls.append(len(calls))
        if 3 * calls[-1] == epoch:
            theta[2, 2] = value
        return theta

    monkeypatch.setattr(probe, name, disturbed)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_probe_that_is_lost_is_left_out_with_its_reason(value, monkeypatch, undisturbed, caplog):
    losing(monkeypatch, 6, value=value)
    record = mnist.run(TINY)
    reason = "kernel: the matrix has 1 entries that are NaN or infinite; its spectrum is undefined"
    assert record.provenance["untrusted"] == {"6": reason}
    assert f"epoch 6: cannot be trusted and is left out: {reason}" in caplog.text
    assert record["probe_epoch"][record["probe_untrusted"] == 1].tolist() == [6]
    for name in (*probe.KERNEL_VALUES, "lqcr_inner"):
        assert np.isnan(record[name][2]), name
        kept = [0, 1, 3, 4]
        np.testing.assert_array_equal(record[name][kept], undisturbed[name][kept])
    np.testing.assert_array_equal(record["loss"], undisturbed["loss"])
    np.testing.assert_array_equal(record["sharpness"], undisturbed["sharpness"])
    before, after = ({v.claim: v for v in theory.flatten(theory.verify(r))} for r in (undisturbed, record))
    for claim in ("consistency", "ntk_positive.probes", "weyl", "local_pl.pointwise"):
        assert before[claim].met, claim
        assert after[claim].outcome == "undecided", claim
        assert f"could not be trusted (epoch 6: {reason})" in after[claim].note
    assert after["ntk_positive"] == dataclasses.replace(before["ntk_positive"], parts=after["ntk_positive"].parts)
    assert not theory.any_inconsistent(after.values())
    for claim, verdict in after.items():
        if verdict.outcome == "refuted":
            assert before[claim].outcome == "refuted", claim
    plotting.four_panel(record)


def test_a_nan_without_a_reason_is_a_fault(undisturbed):
    arrays = {**undisturbed.arrays, "ntk_min_eig": undisturbed["ntk_min_eig"].copy()}
    arrays["ntk_min_eig"][2] = np.nan
    assert theory.any_inconsistent(theory.verify(dataclasses.replace(undisturbed, arrays=arrays)))


def test_without_a_first_kernel_nothing_rests_on_it(monkeypatch, undisturbed, tmp_path):
    losing(monkeypatch, 0)
    record = mnist.run(TINY)
    assert np.isnan(record["ntk_shift"]).all()
    np.testing.assert_array_equal(record["ntk_min_eig"][1:], undisturbed["ntk_min_eig"][1:])
    verdicts = {verdict.claim: verdict for verdict in theory.verify(record)}
    assert not theory.any_inconsistent(verdicts.values())
    for claim in ("ntk_positive", "compatibility", "weyl", "local_pl", "regime"):
        assert verdicts[claim].outcome == "undecided", claim
        assert "could not be trusted (epoch 0: kernel: the matrix has" in verdicts[claim].note
    report.summary_table(record)
    plotting.save(plotting.four_panel(record), tmp_path / "f.png")


def test_the_reason_survives_an_interruption(monkeypatch, tmp_path):
    losing(monkeypatch, 3)
    whole = mnist.run(TINY)
    losing(monkeypatch, 3)

    class Stop(Exception):  # noqa: N818
        pass

    class Stopping:
        def resume(self, epoch):
            pass

        def chunk(self, epoch, loss):
            if epoch == 9:
                raise Stop

        def probe(self, epoch, values):
            pass

    with pytest.raises(Stop):
        mnist.run(TINY, observer=Stopping(), checkpoints=Checkpoints(tmp_path))
    losing(monkeypatch, -1)
    record = mnist.run(TINY, checkpoints=Checkpoints(tmp_path))
    assert record.provenance["untrusted"] == whole.provenance["untrusted"]
    assert record.checksum() == whole.checksum()


def test_a_solver_that_always_fails_ends_no_run(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(scipy.linalg, "eigvalsh", fails)
    monkeypatch.setattr(diagnostics, "hessian_extremes", lambda *_, **__: diagnostics.Extremes(
        np.nan, np.nan, np.inf, np.inf, converged=False, num_matvecs=1, least_vector=np.zeros(1),
        largest_vector=np.zeros(1),
    ))  # fmt: skip
    options = [
        f"--{name.replace('_', '-')}={getattr(TINY, name)}" for name in ("width", "epochs", "probe_every", "n_train")
    ]
    assert cli.main(["mnist", *options, "--search-steps=0", "--out", str(tmp_path)]) == cli.OK
    record = records.load(tmp_path)
    assert (record["probe_untrusted"] == 3).all()
    assert np.isnan(record["ntk_min_eig"]).all()
    reason = (
        "kernel: LAPACK's eigensolver failed: the algorithm failed to converge; Hessian: a product with the Hessian"
    )
    assert record.provenance["untrusted"]["12"].startswith(reason)
    verdicts = {verdict.claim: verdict for verdict in theory.verify(record)}
    without_kernel = ("linear_rate", "descent", "path", "noise", "loss_bridge")
    assert {verdicts[claim].outcome for claim in theory.CLAIMS if claim not in without_kernel} == {"undecided"}
    assert "eigensolver failed" in " ".join(capsys.readouterr().out.split())


def test_curvature_that_is_lost(monkeypatch, undisturbed):
    found = diagnostics.hessian_extremes
    calls = []

    def once(*args, **settings):
        calls.append(1)
        result = found(*args, **settings)
        return dataclasses.replace(result, largest=np.nan) if len(calls) == 2 else result

    monkeypatch.setattr(diagnostics, "hessian_extremes", once)
    record = mnist.run(TINY)
    assert record["probe_untrusted"][2] == 2
    assert np.isfinite(record["ntk_min_eig"]).all()
    assert record["sharpness"][0] == undisturbed["sharpness"][0]
    # The next one starts from other vectors: Ritz values with residuals of 1e-4 of themselves.
    assert record["sharpness"][4] == pytest.approx(undisturbed["sharpness"][4], rel=2e-4)
    verdicts = {verdict.claim: verdict for verdict in theory.flatten(theory.verify(record))}
    assert verdicts["linear_rate.step_size"].outcome in ("undecided", "refuted")
    assert verdicts["lqcr.curvature"].outcome == "undecided"
    assert "epoch 6: Hessian: a product with the Hessian is not finite" in verdicts["lqcr.curvature"].note


def test_closing_measurements_that_are_lost(monkeypatch, undisturbed):
    monkeypatch.setattr(closing, "pair_shifts", fails)
    monkeypatch.setattr(closing, "search_ball", arpack_fails)
    record = mnist.run(dataclasses.replace(TINY, search_steps=2))
    assert "ntk_pair_shift" not in record
    assert "ntk_lipschitz_power" not in record
    assert record.provenance["untrusted"]["closing"].startswith(
        "pairs of probes: the algorithm failed to converge; sea"
    )
    np.testing.assert_array_equal(record["ntk_min_eig"], undisturbed["ntk_min_eig"])
    assert not theory.any_inconsistent(theory.verify(record))
    monkeypatch.undo()
    with pytest.raises(linalg.FAILURES):
        search.pair_shifts([np.eye(3), np.diag([1.0, np.nan, 1.0])])
    monkeypatch.setattr(np.linalg, "norm", fails)
    one, entry = np.ones(1), np.ones((1, 1))
    layer = bounds.Layer(one, one, entry, entry, one, 1.0, ACTIVATIONS["tanh"])
    base = bounds.Anchor((layer,), jacobian=1.0, residual=1.0, loss_scale=1.0)
    assert base.on_ball(0.5).lipschitz == np.inf, "no norm, no bound"


def test_a_point_without_a_number(monkeypatch):
    x, y = jnp.array([[1.0, 0.0], [0.0, 2.0]]), jnp.ones((2, 1))
    monkeypatch.setattr(np.linalg, "eigh", fails)
    verdicts = theory.verify_point(lambda w, x: x @ w, jnp.zeros((2, 1)), x, y, loss_scale="sum")
    assert {v.outcome for v in verdicts if v.claim in ("consistency", "ntk_positive", "local_pl")} == {"undecided"}
    assert "epoch 0: kernel: the algorithm failed to converge" in verdicts[1].note


def test_a_mistake_still_ends_the_run(monkeypatch):
    def refuses(*_, **__):
        raise ValueError("apply_fn mixes samples")

    monkeypatch.setattr(probe, "empirical_ntk", refuses)
    with pytest.raises(ValueError, match="mixes samples"):
        mnist.run(TINY)
