"""Our own loop on any problem: closed forms, mini-batches by hand, resume bit for bit, and the command line."""

import json
import os
import signal
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lplr_jax import cli, records
from lplr_jax.experiments import mnist
from lplr_jax.experiments.own import load_problem, make_optimizer
from lplr_jax.losses import Squared
from lplr_jax.runs.loop import optimizer_digest, train
from lplr_jax.runs.problem import Probes, Problem
from lplr_jax.runs.watch import watch

FEW = Probes(every=5, search=0, hessian=0)


def linear(n=6, d=4, seed=0, loss=Squared("mean")):  # noqa: B008  # a frozen value
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(n, d)).astype(np.float32), rng.normal(size=(n, 1)).astype(np.float32)
    return Problem(lambda w, x: x @ w, jnp.zeros((d, 1)), x, y, loss=loss, name="linear")


def test_steps_on_all_data_follow_numpy():
    problem = linear()
    record = train(problem, optax.sgd(0.1), steps=10, probes=FEW)
    theta = np.zeros((4, 1))
    x, y = (np.asarray(part, np.float64) for part in problem.data)
    for t in range(11):
        r = x @ theta - y
        assert record["loss"][t] == pytest.approx(np.sum(r**2) / 12, rel=1e-5)
        assert record["drift"][t] == pytest.approx(np.linalg.norm(theta), rel=1e-5, abs=1e-7)
        theta -= 0.1 * x.T @ r / 6
    np.testing.assert_allclose(record["step_size"][:-1], 0.1, rtol=1e-5)


def test_mini_batches_follow_numpy():
    """Batches of 4 of 6 samples: two steps a pass, the second one the mean over the two that are left."""
    problem = linear()
    record = train(problem, optax.sgd(0.1), steps=7, batch_size=4, seed=3, probes=Probes(at=[0], search=0, hessian=0))
    assert record["epoch"].tolist() == list(range(8))
    theta = np.zeros((4, 1))
    x, y = (np.asarray(part, np.float64) for part in problem.data)
    for t in range(8):
        r = x @ theta - y
        assert record["loss"][t] == pytest.approx(np.sum(r**2) / 12, rel=1e-5)
        order = np.asarray(jax.random.permutation(jax.random.fold_in(jax.random.key(3), t // 2), 6))
        rows = order[4 * (t % 2) : 4 * (t % 2) + 4]
        step = 0.1 * x[rows].T @ (x[rows] @ theta - y[rows]) / len(rows)
        if t < 7:
            full = x.T @ r / 6
            size = float(np.sum(step * full) / np.sum(full**2))
            off = np.linalg.norm(step - size * full) / np.linalg.norm(step)
            assert record["step_size"][t] == pytest.approx(size, rel=1e-4)
            assert record["step_deviation"][t] == pytest.approx(off, rel=1e-3)
        theta -= step


def test_passes_are_seen_at_their_first_two_steps():
    problem = linear(n=12)
    record = train(problem, optax.sgd(0.1), steps=9, batch_size=3, probes=Probes(at=[0], search=0, hessian=0))
    assert record["epoch"].tolist() == [0, 1, 4, 5, 8, 9]


def test_other_leaves_are_carried_along():
    problem = Problem(
        lambda p, x: jnp.asarray(p["scale"], x.dtype) * (x @ p["w"]) + p["count"][None].astype(x.dtype),
        {"w": jnp.zeros((4, 1)), "scale": 1.0, "count": jnp.arange(1)},
        *linear().data,
    )
    assert problem.p == 5
    record = train(problem, optax.sgd(0.1), steps=5, probes=FEW)
    assert float(record["p"]) == 5
    np.testing.assert_allclose(record["step_size"][:-1], 0.1, rtol=1e-4)


def test_an_optimiser_is_told_by_what_it_does():
    params = {"w": jnp.zeros(3)}
    heavy = optax.sgd(0.1, momentum=0.9)
    with jax.numpy_dtype_promotion("standard"):  # Adam's moments rely on it
        digests = [
            optimizer_digest(optimizer, params)
            for optimizer in (optax.sgd(0.1), optax.sgd(0.1), optax.sgd(0.2), heavy, optax.adam(0.1))
        ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 4


IDENTITY = """
    import equinox as eqx, jax, jax.numpy as jnp, optax
    from collections.abc import Callable
    from lplr_jax import Problem
    from lplr_jax.runs.loop import optimizer_digest

    class Net(eqx.Module):
        w: jax.Array
        act: Callable = eqx.field(static=True)

    class Other:
        pass

    net = Net(jnp.ones((3, 1)), lambda z: jnp.tanh(z))
    params = {"net": net, "act": lambda z: z, "other": Other(), "key": jax.random.key(0)}
    problem = Problem(lambda p, x: p["net"].act(x @ p["net"].w), params, jnp.ones((2, 3)), jnp.ones((2, 1)))
    print(problem.digest(), optimizer_digest(optax.noisy_sgd(0.1, key=jax.random.key(0)), problem.reduced.params))
"""


def test_another_process_finds_the_same_identity():
    """Texts of functions and objects tell where they lie in memory: by it no run would go on in another process."""
    command = [sys.executable, "-c", textwrap.dedent(IDENTITY)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    said = {subprocess.run(command, env=environment, check=True, capture_output=True).stdout for _ in range(2)}
    assert len(said) == 1
    assert b"sha256" in said.pop()


def test_the_command_our_loop_and_a_watch_agree():
    """One run three ways: the first two are one program, the third compiles its step by itself."""
    config = mnist.MnistConfig(
        width=8,
        depth=3,
        n_train=20,
        epochs=8,
        probe_every=4,
        learning_rate=2e-3,
        hessian_probes=2,
        search_steps=0,
        certify_floor=0.0,
    )
    problem, (_, every, beside) = mnist.set_up(config), mnist.resolve(config)
    probes = Probes(every, beside=beside, hessian=2, spectrum=9, search=0)
    command = mnist.run(config)
    own = train(problem, problem.optimizer, steps=8, probes=probes, learning_rate=2e-3)
    params, step = problem.params, jax.jit(jax.grad(problem.objective.value))
    with watch(problem, probes=probes) as look:
        for t in range(9):
            look(t, params)
            params = jax.tree.map(lambda p, g: p - np.float32(2e-3) * g, params, step(params, *problem.data))
    for name, array in command.arrays.items():
        np.testing.assert_array_equal(own[name], array, err_msg=name)
        if name not in ("learning_rate", "step_deviation", "step_rounding", "curvature_min", "ntk_peer_difference"):
            # Float32 sums of at most 784 terms in another order, over eight steps.
            size = np.nanmax(np.abs(array), initial=1e-30)
            known = np.isfinite(array) & np.isfinite(look.record[name])
            np.testing.assert_allclose(
                look.record[name][known], array[known], rtol=1e-3, atol=1e-3 * size, err_msg=name
            )


def test_a_folder_holds_one_run(tmp_path):
    problem = linear()
    first = train(problem, optax.sgd(0.1), steps=10, probes=FEW, out=tmp_path / "run")
    again = train(problem, optax.sgd(0.1), steps=10, probes=FEW, out=tmp_path / "run")
    assert again.checksum() == first.checksum() == records.load(tmp_path / "run").checksum()
    with pytest.raises(ValueError, match="optimizer_checksum"):
        train(problem, optax.sgd(0.2), steps=10, probes=FEW, out=tmp_path / "run")
    with pytest.raises(ValueError, match="data_checksum"):
        train(linear(seed=1), optax.sgd(0.1), steps=10, probes=FEW, out=tmp_path / "run")


PROBLEM = """
    import os, signal
    import jax.numpy as jnp, numpy as np
    import lplr_jax as lp

    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3)).astype("f4"), rng.normal(size=(8, 1)).astype("f4")
    params = {"a": rng.normal(size=(3, 6)).astype("f4"), "b": rng.normal(size=(6, 1)).astype("f4")}

    def make():
        return lp.Problem(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, x, y, name="own")

    ready = make()
    number = 3
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(textwrap.dedent(PROBLEM))
    return path


def options(file, out, *more):
    quick = ["--steps", "12", "--probe-every", "4", "--search-steps", "0", "--hessian-probes", "0"]
    return ["run", f"{file}:make", "--optimizer", "sgd:0.05", *quick, "--out", str(out), *more]


def test_the_command_runs_a_file(file, tmp_path, capsys):
    assert cli.main(options(file, tmp_path / "out", "--log", str(tmp_path / "log.jsonl"))) == cli.OK
    said = capsys.readouterr().out
    assert "is executed" in said
    record = records.load(tmp_path / "out")
    assert record.experiment == "own"
    assert float(record["learning_rate"]) == 0.05
    assert (tmp_path / "out" / "own.png").stat().st_size > 10_000
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events[-1] == "verdict"
    assert cli.main(options(file, tmp_path / "out")) == cli.OK
    assert "is there" in capsys.readouterr().out
    assert cli.main(["verify", str(tmp_path / "out")]) == cli.OK
    assert cli.main(["plot", str(tmp_path / "out"), "--out", str(tmp_path / "again.png")]) == cli.OK


def test_the_command_measures_snapshots(file, tmp_path, capsys):
    problem = load_problem(f"{file}:ready")
    for t, scale in ((0, 1.0), (3, 0.9), (12, 0.8)):
        arrays = {name: np.asarray(leaf) * np.float32(scale) for name, leaf in problem.params.items()}
        (tmp_path / "ckpts").mkdir(exist_ok=True)
        np.savez(tmp_path / "ckpts" / f"step-{t}.npz", **arrays)
    arguments = ["measure", str(tmp_path / "ckpts" / "*"), "--problem", f"{file}:ready", "--out", str(tmp_path / "out")]
    assert cli.main([*arguments, "--search-steps", "0", "--hessian-probes", "0"]) == cli.OK
    assert records.load(tmp_path / "out")["epoch"].tolist() == [0, 3, 12]
    capsys.readouterr()


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("mine.py", "FILE.py:NAME"),
        ("absent.py:make", "there is no file"),
        ("mine.py:other", "defines no other; problems there: ready"),
        ("mine.py:number", "must be an lplr_jax.Problem or make one"),
    ],
)
def test_mistakes_in_naming_a_problem(file, monkeypatch, place, words):
    monkeypatch.chdir(file.parent)
    with pytest.raises(ValueError, match=words):
        load_problem(place)


FAULTY = {
    "sum(": r"mine.py, line 1: SyntaxError",
    "1 / 0": r"mine.py, line 1: ZeroDivisionError: division by zero",
    "def make():\n    return {}['here']": r"mine.py, line 2: KeyError: 'here'",
    "import absent_from_here": r"mine.py, line 1: ModuleNotFoundError: No module named 'absent_from_here'",
    "import lplr_jax as lp\nmake = lambda: lp.Problem(None, 1, 2, 3)": r"mine.py, line 2: TypeError: apply_fn must",
    "raise SystemExit(7)": r"mine.py ends the process as it is executed \(exit code 7\)",
    "import sys\nsys.path.clear()\nmake = 3": "must be an lplr_jax.Problem or make one, got 3",
}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("content", FAULTY)
def test_an_error_of_the_file_is_told_as_its_own(tmp_path, monkeypatch, content):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(content)
    for place in ("mine.py:make", f"{tmp_path}/mine.py:make"):
        with pytest.raises(ValueError, match=FAULTY[content]):
            load_problem(place)


def test_what_the_file_reads_and_is_not_there_is_told_by_its_name(tmp_path):
    (tmp_path / "mine.py").write_text("open('no-such-data')")
    with pytest.raises(FileNotFoundError, match="no-such-data"):
        load_problem(f"{tmp_path}/mine.py:make")


@pytest.mark.parametrize(
    "text",
    [
        *("magic:0.1", "sgd", "sgd:x", "sgd:-1", "sgd:0.1,0.9", "sgd:0.1,speed=3", "adam:nan"),
        *("sgd:0.1,momentum='a'", "adam:0.1,b1=(1,2)", "sgd:0.1,momentum=0.9,accumulator_dtype='float99'"),
    ],
)
def test_mistakes_in_naming_an_optimiser(text):
    with pytest.raises(ValueError, match="--optimizer"):
        make_optimizer(text)


def test_a_killed_run_goes_on_bit_for_bit(file, tmp_path):
    """SIGKILL right after the checkpoint of step 4; the same command then ends with the record of a run left alone."""
    killer = textwrap.dedent("""
        import os, signal, sys
        from lplr_jax import cli
        from lplr_jax.runs import checkpoint
        save = checkpoint.Checkpoints.save
        def killed(self, epoch, *args, **kwargs):
            save(self, epoch, *args, **kwargs)
            if epoch == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.Checkpoints.save = killed
        cli.main(sys.argv[1:])
    """)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", killer, *options(file, tmp_path / "a")],
        env=environment,
        check=False,
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert cli.main(options(file, tmp_path / "a")) == cli.OK
    assert cli.main(options(file, tmp_path / "b")) == cli.OK
    a, b = records.load(tmp_path / "a"), records.load(tmp_path / "b")
    assert a.provenance["resumed_at"] == [4]
    assert a.checksum() == b.checksum()


NEW_LOSSES = {
    "squared_hinge": ("SquaredHinge()", "np.sign(rng.standard_normal((6, 1)))", 1, "armijo:0.5"),
    "exponential": ("Exponential()", "np.sign(rng.standard_normal((6, 1)))", 1, "sharpness:1"),
    "softmax_cross_entropy(0.1)": ("SoftmaxCrossEntropy(smoothing=0.1)", "rng.integers(0, 3, 6)", 3, "decay:0.5"),
    "soft_cross_entropy": ("SoftmaxCrossEntropy(soft=True)", "rng.dirichlet(np.ones(3), 6)", 3, "polyak:1"),
    "softmax_cross_entropy": ("SoftmaxCrossEntropy()", "rng.integers(0, 3, 6)", 3, "loss-scaled"),
}


@pytest.mark.slow
@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", NEW_LOSSES)
def test_every_loss_runs_under_a_rule_and_goes_on_bit_for_bit(name, tmp_path, monkeypatch):
    """The command, stopped after its second probe and called again, has the record of one that was not stopped."""
    from lplr_jax.runs import checkpoint

    loss, y, c, rule = NEW_LOSSES[name]
    file = tmp_path / "mine.py"
    file.write_text(
        "import numpy as np, lplr_jax as lp\n"
        "rng = np.random.default_rng(0)\n"
        f"x, y = rng.standard_normal((6, 8)).astype(np.float32), np.asarray({y})\n"
        "y = y.astype(np.float32 if y.dtype.kind == 'f' else np.int32)\n"
        f"w = np.zeros((8, {c}), np.float32)\n"
        f"problem = lp.Problem(lambda w, x: x @ w, w, x, y, loss=lp.losses.{loss})\n"
    )
    command = ["run", f"{file}:problem", "--step-rule", rule, "--steps", "9", "--probe-every", "3"]
    command += ["--search-steps", "0", "--hessian-probes", "2", "--out"]
    save = checkpoint.Checkpoints.save

    def stopped(self, epoch, *args, **kwargs):
        save(self, epoch, *args, **kwargs)
        if epoch == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkpoint.Checkpoints, "save", stopped)
        assert cli.main([*command, str(tmp_path / "a")]) == cli.INTERRUPTED
    assert cli.main([*command, str(tmp_path / "a")]) == cli.OK
    assert cli.main([*command, str(tmp_path / "b")]) == cli.OK
    a, b = records.load(tmp_path / "a"), records.load(tmp_path / "b")
    assert a.provenance["resumed_at"] == [3]
    assert a.checksum() == b.checksum()
    assert a.loss == name
    assert a["loss"][-1] < a["loss"][0]
    assert 0 <= a["probe_accuracy"][-1] <= 1
