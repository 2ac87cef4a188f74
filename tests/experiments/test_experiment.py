"""What experiments share: the registry, the config parts, the one command, and how little the command line imports."""

import dataclasses
import importlib
import inspect
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from builders import make
from lplr_jax import cli, experiments, records, theory
from lplr_jax.experiments import mnist, parts, step_size
from lplr_jax.experiments.experiment import Experiment, record_of, trained_together
from lplr_jax.reports.tables import Measured, Quantity, Table

NAMES = tuple(experiments.REGISTRY)
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg"}


def lplr(*arguments, cwd, seconds=120, **environment):
    command = [sys.executable, "-m", "lplr_jax.cli", *map(str, arguments)]
    environment = {name: value for name, value in {**ENVIRONMENT, **environment}.items() if value is not None}
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=seconds, check=False
    )


@dataclasses.dataclass(frozen=True)
class ToyConfig(parts.FolderPart, parts.SeedsPart):
    """Config of the toy."""

    rate: float = 0.5
    """Factor an epoch."""
    shout: bool = dataclasses.field(default=False, metadata=parts.DECIDES_NOTHING)
    """Say it louder."""


def toy(diverged=cli.DIVERGED, calls=None):
    """An experiment of two runs, each of a closed form."""

    def run(config, folder, given, /, *, say, follow, check):
        done = {}
        for seed in config.each_seed():

            def build(observer, checkpoints, seed=seed):
                if calls is not None:
                    calls.append(seed)
                loss = np.maximum((1 + seed) * config.rate ** np.arange(401.0), 1e-30)
                record = make(400, 9, loss=loss, grad_sq_norm=2 * loss)
                observer.chunk(400, float(loss[-1]))
                return dataclasses.replace(record, experiment="toy", config={"rate": config.rate, "seed": seed})

            identity = {"rate": config.rate, "seed": seed}
            name = f"seed{seed}"
            done[name] = record_of(
                folder / name, "toy", identity, build, run=name, epochs=400, say=say, follow=follow, check=check
            )
        return done

    def table(done, config):
        cells = {"l": [Measured(float(record["loss"][-1])) for record in done.values()]}
        return Table("toys", tuple(done), (Quantity("l", "L_T", "$L_T$", "at the end"),), cells)

    return Experiment(
        name="toy",
        config=ToyConfig,
        presets={"default": ToyConfig(seeds="0,1"), "smoke": ToyConfig(seeds="3")},
        run=run,
        records=lambda done: done,
        table=table,
        figure=lambda done, config: Figure() if config.rate < 1 else "it grows",
        notes=lambda done, config: ("HELLO",) if config.shout else (),
        diverged=diverged,
    )


@pytest.fixture
def registered(monkeypatch):
    """Register experiments as a new file and a line in the registry do."""

    def register(experiment):
        module = types.ModuleType("a_new_file")
        module.EXPERIMENT = experiment
        monkeypatch.setitem(sys.modules, "a_new_file", module)
        monkeypatch.setitem(experiments.REGISTRY, "toy", experiments.Listed("a_new_file", "A toy (section 9)."))

    return register


def test_an_experiment_is_one_file_and_one_line(registered, tmp_path, capsys, monkeypatch):
    calls = []
    registered(toy(calls=calls))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--help"]) == 0
    assert "A toy (section 9)." in capsys.readouterr().out
    assert cli.main(["toy", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for word in ("--preset {smoke,default}", "--seeds", "(default: 0,1)", "Factor an epoch.", "--log", "--force"):
        assert word in shown, word
    assert cli.main(["toy", "--log", "log.jsonl"]) == cli.OK
    assert calls == [0, 1]
    shown = capsys.readouterr().out
    for word in ("toys", "L_T", "table    runs/toy/toy.csv", "figure   figures/toy.png", "first to break", "seed1"):
        assert word in shown, word
    assert "HELLO" not in shown
    assert records.load(Path("runs/toy/seed1")).config == {"rate": 0.5, "seed": 1}
    lines = [json.loads(line) for line in Path("log.jsonl").read_text().splitlines()]
    assert [line["run"] for line in lines if line.get("final")] == ["seed0", "seed1"]
    # What decides no number may change, what does may not; the records that are there are read.
    assert cli.main(["toy", "--shout"]) == cli.OK
    assert calls == [0, 1]
    assert "HELLO" in capsys.readouterr().out
    assert cli.main(["toy", "--rate", "0.4"]) == cli.BAD_INPUT
    assert "rate 0.5 there, 0.4 asked for" in " ".join(capsys.readouterr().err.split())
    assert cli.main(["toy", "--preset", "smoke"]) == cli.OK
    assert calls == [0, 1, 3]
    shown = capsys.readouterr().out
    assert shown.count("Hypotheses of the paper: ") == 1, "the story of one run"
    assert all(shown.count(f"\n{claim} ") == 1 for claim in theory.CLAIMS), "and one line a claim"
    assert Path("runs/toy-smoke/figures/toy.png").exists(), "two presets share no folder"
    assert cli.main(["toy", "--rate", "0.4", "--force"]) == cli.OK
    assert calls == [0, 1, 3, 0, 1]
    assert Path("runs/toy.old-1/seed1/record.npz").exists()


@pytest.mark.parametrize(("diverged", "code"), [(cli.DIVERGED, cli.DIVERGED), (cli.OK, cli.OK)])
def test_divergence_is_an_exit_code_or_a_finding(registered, tmp_path, capsys, diverged, code, monkeypatch):
    experiment = toy(diverged)
    registered(experiment)
    whole = experiment.run

    def run(config, folder, given, /, **told):
        done = whole(config, folder, given, **told)
        for record in done.values():
            for name in ("loss", "grad_sq_norm", "drift"):
                record.arrays[name][200:] = np.nan
        return done

    registered(dataclasses.replace(experiment, run=run))
    assert cli.main(["toy", "--rate", "1.01", "--out", str(tmp_path)]) == code
    assert "no figure: it grows" in capsys.readouterr().out


def test_a_record_that_contradicts_itself_is_an_exit_code(registered, tmp_path, capsys):
    experiment = toy()
    whole = experiment.run

    def run(config, folder, given, /, **told):
        done = whole(config, folder, given, **told)
        next(iter(done.values())).arrays["drift"][0] = 5.0  # θ_0 is not where it is
        return done

    registered(dataclasses.replace(experiment, run=run))
    assert cli.main(["toy", "--out", str(tmp_path)]) == cli.INCONSISTENT


@pytest.mark.parametrize("name", NAMES)
def test_the_registry_says_what_is_there(name):
    experiment = experiments.find(name)
    assert experiment.name == name
    assert experiment.config in {type(preset) for preset in experiment.presets.values()}
    assert {"smoke", "paper"} <= set(experiment.presets)
    assert experiment.preset("default") is experiment.preset(experiment.default_preset())
    folders = [str(experiment.places(preset, None)[0]) for preset in ("smoke", "default", "paper")]
    assert folders[:2] == [f"runs/{name}-smoke", f"runs/{name}"]
    assert str(experiment.places("default", None)[1]) == "figures"
    assert str(experiment.places("smoke", None)[1]) == f"runs/{name}-smoke/figures"


@pytest.mark.parametrize("name", NAMES)
def test_every_field_is_documented_where_it_is_defined(name):
    config = experiments.find(name).config
    for field in dataclasses.fields(config):
        owner = next(cls for cls in config.__mro__ if field.name in inspect.get_annotations(cls))
        lines = inspect.getsource(owner).partition(f"\n    {field.name}: ")[2].split("\n")
        assert lines[1].strip().startswith('"""'), field.name


@pytest.mark.parametrize("name", NAMES)
def test_no_number_hangs_on_where_things_are(name):
    config = experiments.find(name).config()
    decisive = parts.decisive(config)
    assert {"data", "out", "force", "save_probes"}.isdisjoint(decisive)
    moved = dataclasses.replace(config, data=Path("elsewhere"), out=Path("there"), force=True)
    assert parts.decisive(moved) == decisive
    assert decisive == {key: value for key, value in dataclasses.asdict(config).items() if key in decisive}


def test_fields_of_the_configs():
    """Option names and keys of the records: what is in folders of earlier versions goes on."""
    expected = {
        "mnist": "activation certify_floor depth epochs hessian_precision hessian_probes init kernel learning_rate "
        "loss_scale n_train probe_every regime_start regime_stop search_steps seed source spectrum_probes "
        "subset_size width",
        "ablation": "activation depth epochs hessian_probes init kernel learning_rate loss_scale n_train place "
        "probe_every restore seeds smaller_learning_rate source subset_size widths",
        "boundary": "activation depth init loss_scale n_train seed source steps tolerance widths",
        "width": "activation depth held_out init kernel loss_scale n_train parametrisations seeds source widths",
        "edge": "activation depth epochs hessian_matvecs learning_rate loss_scale n_train probe_every seed source "
        "width",
        "initialisation": "activation depth epochs inits kernel learning_rate loss_scale n_train probe_every seed "
        "share source width",
        "steps": "activation depth epochs init kernel loss_scale n_train probe_every rules seed source widths",
        "noise": "activation batch_sizes depth loss_scale n_train seeds share source steps width",
        "cifar": "activation batch_size blocks diagnostics_every epochs groups kernel learning_rate loss_scale "
        "micro_batch momentum n_train output_init probe_every schedule search_steps source spectrum_probes stages "
        "subset_size width",
    }
    for name, keys in expected.items():
        assert sorted(parts.decisive(experiments.find(name).config())) == keys.split(), name


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(experiments.find(name).config, "classes")])
def test_classes_are_kept_where_they_are_named(name):
    config = experiments.find(name).config
    named = parts.decisive(dataclasses.replace(config(), classes=" 4, 9"))
    assert named == {**parts.decisive(config()), "classes": "4,9"}


def test_a_known_sharpness_is_that_of_its_classes():
    config = mnist.MnistConfig()
    keys = "activation data depth init loss_scale n_train seed source width"  # as in predictions of earlier versions
    assert sorted(step_size.sharpness_setting(config)) == keys.split()
    other = step_size.sharpness_setting(dataclasses.replace(config, classes="4,9"))
    assert other == {**step_size.sharpness_setting(config), "classes": "4,9"}


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize(
    ("part", "changes", "message"),
    [
        (parts.LayersPart, {"depth": 0}, "depth must be >= 1, got 0"),
        (parts.LayersPart, {"depth": 1001}, "depth must be at most 1000, got 1001"),
        (parts.LayersPart, {"activation": "swish"}, "activation must be one of .*got 'swish'"),
        (parts.WidthsPart, {"widths": "8,8"}, "widths must be distinct integers >= 1, got '8,8'"),
        (parts.WidthsPart, {"depth": 0}, "depth must be >= 1, got 0"),
        (parts.SeedPart, {"seed": -1}, "seed must be >= 0, got -1"),
        (parts.SeedsPart, {"seeds": "1,99999999999"}, "seeds must be at most 4294967295, got 99999999999"),
        (parts.LossPart, {"loss_scale": "average"}, "loss_scale must be one of .*got 'average'"),
        (parts.ProbePart, {"epochs": 0}, "epochs must be >= 1, got 0"),
        (parts.ProbePart, {"epochs": 5, "probe_every": 6}, "probe_every must be at most epochs = 5, got 6"),
        (parts.ProbePart, {"epochs": 10**6, "probe_every": 1}, "probe_every must be at least 100"),
        (parts.ProbePart, {"kernel": "magic"}, "kernel must be one of auto.*got 'magic'"),
        (parts.SpectrumPart, {"spectrum_probes": -1}, "spectrum_probes must be >= 0, got -1"),
        (parts.SpectrumPart, {"search_steps": 1.5}, "search_steps must be an integer >= 0, got 1.5"),
        (parts.DataPart, {"n_train": 0}, "n_train must be >= 1, got 0"),
        (parts.DataPart, {"classes": "4"}, "classes must be two or more different integer labels .*got '4'"),
        (parts.DataPart, {"classes": 49}, "classes must be two or more different integer labels .*got 49"),
    ],
)
def test_a_part_checks_itself(part, changes, message):
    part().check()
    with pytest.raises(ValueError, match=message):
        part(**changes).check()


@pytest.mark.usefixtures("without_type_checks")
@pytest.mark.parametrize("name", NAMES)
def test_a_config_checks_all_its_parts(name):
    config = experiments.find(name).config
    config().check()
    wrong = {"depth": 0, "loss_scale": "average", "n_train": 0, "kernel": "magic", "epochs": 0, "search_steps": -1}
    wrong |= {"widths": "x", "seeds": "x", "seed": -1}
    fields = [field.name for field in dataclasses.fields(config) if field.name in wrong]
    assert len(fields) >= 4
    for field in fields:
        with pytest.raises(ValueError, match=f"{field} must be"):
            dataclasses.replace(config(), **{field: wrong[field]}).check()


def test_runs_are_trained_together_where_it_is_asked_for_and_any_is_missing(tmp_path):
    def one(state, epochs):
        return state, epochs

    def train():
        return [one, one]

    assert trained_together(tmp_path, ["a", "b"], train, True) == [one, one]
    assert trained_together(tmp_path, ["a", "b"], train, None) == [None, None], "a CPU trains one after the other"
    assert trained_together(tmp_path, ["a"], train, True) == [None]
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.npz").touch()
    assert trained_together(tmp_path, ["a", "b"], train, True) == [None, None]


IMPORTED = """
import sys
from lplr_jax import cli
code = cli.main(sys.argv[1:])
heavy = ("jax", "matplotlib", "numpy", "scipy", "flax", "lplr_jax.experiments.mnist", "lplr_jax.experiments.parts")
print(code, *(name for name in heavy if name in sys.modules), file=sys.stderr)
"""


def imported(*arguments):
    command = [sys.executable, "-c", IMPORTED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=True)
    code, *names = done.stderr.splitlines()[-1].split()
    return int(code), set(names)


@pytest.fixture
def saved(tmp_path):
    return make().save(tmp_path / "record.npz")


def test_a_command_imports_what_it_needs(saved, tmp_path):
    for overview in ((), ("--help",), ("--version",), ("magic",)):
        assert imported(*overview) == (cli.OK if "--" in "".join(overview) else cli.BAD_INPUT, set()), overview
    assert imported("data", "--help")[1] == set()
    code, names = imported("verify", saved)
    assert code == cli.OK
    assert not names & {"jax", "flax", "matplotlib"}
    code, names = imported("plot", saved, "--out", tmp_path / "a.png")
    assert code == cli.OK
    assert not names & {"jax", "flax"}
    assert "jax" in imported("mnist", "--help")[1], "the check sees what is there"


def test_help_answers_at_once(tmp_path):
    """In a small share of the processor time that importing JAX alone takes, measured in turn on whatever machine."""

    def spent(run):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run().returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    imported = [sys.executable, "-c", "import jax"]
    turns = [
        (spent(lambda: lplr("--help", cwd=tmp_path)), spent(lambda: subprocess.run(imported, check=False)))
        for _ in range(3)
    ]
    ours, jax_alone = map(min, zip(*turns, strict=True))
    assert ours < 0.6 * jax_alone, (ours, jax_alone)


def test_version(tmp_path):
    done = lplr("--version", cwd=tmp_path)
    assert re.fullmatch(r"lplr-jax \S+\n", done.stdout)


def test_general_commands_stand_behind_the_experiments(capsys):
    assert cli.main(["--help"]) == 0
    order = re.findall(r"• ([a-z]+)", capsys.readouterr().out)
    assert order == [*NAMES, *cli.ABOVE, *cli.OWN, *cli.GENERAL]
    for name, listed in experiments.REGISTRY.items():
        assert listed.help.endswith(".")
        assert importlib.import_module(listed.module).EXPERIMENT.name == name


@pytest.mark.parametrize("platform", ["cuda", "nonsense"])
def test_a_platform_that_is_not_here_is_one_line(platform, tmp_path):
    if platform == "cuda" and shutil.which("nvidia-smi"):
        pytest.skip("CUDA is here")
    done = lplr("mnist", "--preset", "smoke", "--out", "run", cwd=tmp_path, JAX_PLATFORMS=platform)
    assert done.returncode == cli.BAD_INPUT, done.stderr
    assert re.fullmatch(rf"lplr: JAX finds no device for JAX_PLATFORMS='{platform}'.*unset it.*\n", done.stderr)
    assert not list(tmp_path.iterdir())


def test_a_backend_of_matplotlib_that_is_not_there_does_no_harm(saved, tmp_path):
    done = lplr("plot", saved, "--out", tmp_path / "a.png", cwd=tmp_path, MPLBACKEND="nonsense")
    assert (done.returncode, done.stderr) == (cli.OK, "")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def test_a_user_without_a_home_has_no_cache(monkeypatch):
    import jax

    before = jax.config.jax_compilation_cache_dir
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        cli._use_compilation_cache()
        assert jax.config.jax_compilation_cache_dir is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize(
    "closed", [*(pytest.param(one, marks=pytest.mark.slow) for one in (">&-", "2>&-", ">&- 2>&-")), "<&- >&- 2>&-"]
)
def test_streams_that_are_closed_from_the_start_do_no_harm(closed, saved, tmp_path):
    command = f'exec "$0" -m lplr_jax.cli "$@" {closed}'
    out = tmp_path / "a.png"
    for arguments in (["verify", saved], ["plot", saved, "--out", out], ["--help"]):
        words = [sys.executable, *map(str, arguments)]
        done = subprocess.run(["bash", "-c", command, *words], capture_output=True, env=ENVIRONMENT, check=False)
        assert done.returncode == cli.OK, done
        assert b"Traceback" not in done.stderr
    assert out.read_bytes().startswith(b"\x89PNG"), "nothing was written into a file that took a stream's number"


INTERRUPTED = """
import os, signal, sys, threading
from lplr_jax import cli
threading.Timer(float(sys.argv[1]), os.kill, (os.getpid(), signal.SIGINT)).start()
sys.exit(cli.main(["mnist", "--preset", "smoke", "--epochs", "1000000"]))
"""


@pytest.mark.parametrize("delay", [0.1, 0.4, 0.8, 1.2])
def test_an_interrupt_while_modules_are_imported_is_quiet(delay, tmp_path):
    command = [sys.executable, "-c", INTERRUPTED, str(delay)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, cwd=tmp_path, timeout=90)
    assert done.returncode == cli.INTERRUPTED, done
    assert re.fullmatch(r"lplr: interrupted by SIGINT;.*\n", done.stderr)
