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

import jax
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


def test_readme_code_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    spaces = []
    for block in blocks:
        spaces.append({})
        # A narrow network keeps this quick; every other character is the README's. Promotion is as readers have it.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(block.replace("width=128", "width=16"), "README.md", "exec"), spaces[-1])
    assert spaces[0]["digits"].x.shape == (1000, 784)
    watched = spaces[1]["watch"].record
    assert lplr_jax.verify(watched)["linear_rate"].outcome == "not applicable"


def test_readme_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = [(ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")]
    named = {name for text in texts for name in re.findall(r"make ([a-z-]+)", text)} - {"or"}
    assert {"mnist", "test"} <= named
    # Prose may say "make" too; what stands in code must exist.
    code = {
        name
        for text in texts
        for name in re.findall(r"`make ([a-z-]+)|^make ([a-z-]+)", text, re.MULTILINE)
        for name in name
        if name
    }
    assert code <= targets, code - targets


def test_lock_is_exact_and_names_no_place():
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line]
    pinned = {}
    for line in lines:
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[^ ;]+( ; .+)?", line), line
        name, rest = line.split("==", 1)
        pinned.setdefault(name, rest.split(" ")[0])
    for name in ("tensorflow", "tf2jax", "torch"):
        assert name not in pinned
    expected = {
        "jax": "0.10.2",
        "flax": "0.12.8",
        "optax": "0.2.8",
        "neural-tangents": "0.6.5",
        "tensorflow-datasets": "4.9.10",
    }
    assert {name: pinned[name] for name in expected} == expected
    dependencies = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for requirement in dependencies:
        assert re.split(r"[<>=]", requirement)[0] in pinned, requirement


def test_the_project_speaks_of_itself_alone():
    texts = [*sources(), *(ROOT / "tests").glob("*.py"), *(ROOT / name for name in TRACKED), ROOT / "requirements.lock"]
    texts += [
        *(ROOT / "scripts").glob("*"),
        *(ROOT / "benchmarks").rglob("*.py"),
        *(ROOT / "notebooks").glob("*.ipynb"),
    ]
    home = str(Path.home()) + "/"
    for path in texts:
        text = path.read_text()
        assert home not in text or len(home) < 4, path
        assert str(ROOT.parent) + "/" not in text, path
        assert not re.search(r"https?://[^ ]*/simple|https?://[^ ]*\.whl", text), path


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        pytest.param("quickstart", "MinEig", marks=pytest.mark.slow),
        pytest.param("your_own_run", "not seen", marks=pytest.mark.slow),
    ],
)
def test_notebook_runs(name, shown):
    """From data to the figure, as a reader would; the outputs are not stored."""
    import nbformat
    from nbclient import NotebookClient

    path = ROOT / "notebooks" / f"{name}.ipynb"
    notebook = nbformat.read(path, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "committed without outputs"
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    kinds = [output.get("data", {}).keys() for cell in code for output in cell.outputs]
    assert any("image/png" in kind for kind in kinds), "the notebook ends with a figure"
    assert any(shown in str(output) for cell in code for output in cell.outputs)


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
