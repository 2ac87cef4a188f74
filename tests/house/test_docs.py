"""The documents: their code runs, their links and commands lead somewhere, and no public name is missing."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import lplr_jax
from lplr_jax.experiments import REGISTRY

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.fixture(scope="module")
def site():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import site_pages
    finally:
        sys.path.pop(0)
    return site_pages


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path)], ids=lambda path: path.name)
def test_code_runs(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for block in blocks(path):
        space = {}
        # A narrow network keeps this quick; every other character is the page's. Promotion is as readers have it.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            exec(compile(block.replace("width=128", "width=16"), path.name, "exec"), space)
        if "watch" in space:
            expected = "not applicable" if "adam" in block else "not refuted"
            outcome = lplr_jax.verify(space["watch"].record)["descent"].outcome
            assert outcome == expected, path.name


def test_the_readme_is_one_screen():
    text = (ROOT / "README.md").read_text()
    assert len(text.split()) <= 450
    assert len(text.splitlines()) <= 60


def test_links_lead_to_files():
    for path in PAGES:
        for target in re.findall(r"\]\(([^)#:]+?)(?:#[\w-]+)?\)", path.read_text()):
            if "_generated" not in target:  # made when the site is built, which checks them
                assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_commands_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = {*REGISTRY, "reproduce", "run", "measure", "verify", "plot", "report", "data"}
    for path in PAGES:
        text = path.read_text()
        # Prose may say "make" too; what stands in code must exist.
        for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.MULTILINE):
            assert name in targets, f"{path.name}: make {name}"
        for name in re.findall(r"(?:`|^|exec )lplr ([a-z-]+)", text, re.MULTILINE):
            assert name in commands, f"{path.name}: lplr {name}"
    assert {"make mnist", "make test"} <= set(
        re.findall(r"^make [a-z]+", (ROOT / "README.md").read_text(), re.MULTILINE)
    )


def test_every_public_name_says_what_it_is(site):
    names = site.names()
    assert {"lplr_jax.watch", "lplr_jax.report", "lplr_jax.ntk.empirical_ntk", "lplr_jax.theory.CLAIMS"} <= set(names)
    for name in names:
        value = site.resolve(name)
        says = value.__doc__ if inspect.isclass(value) or inspect.isroutine(value) else site.described(name)
        assert says, f"{name} is public, and nothing says what it is"


def test_names_in_the_documents_exist(site):
    assert "lplr_jax.watch" in site.readme_names()
    for name in site.readme_names():
        site.resolve(name)


def test_signs_of_mathematics_stand_for_themselves(site):
    assert site._without_signs(["|x| of θ_ times `a*b_`", ">>> x | y", "2 * 3", "", "a*"]) == [
        r"\|x\| of θ\_ times `a*b_`",
        ">>> x | y",
        "2 * 3",
        "",
        r"a\*",
    ]


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_its_script(script):
    """Cell by cell, without outputs."""
    jupytext = pytest.importorskip("jupytext", reason="jupytext is not installed: make test installs it")
    script_cells = jupytext.read(script).cells
    notebook = jupytext.read(script.with_suffix(".ipynb"))
    assert [(c.cell_type, c.source) for c in notebook.cells] == [(c.cell_type, c.source) for c in script_cells]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code
    assert all(not cell.outputs and cell.execution_count is None for cell in code), "committed without outputs"


def test_every_notebook_has_a_script():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == {path.stem for path in NOTEBOOKS}


SHOWN = {
    "checkpoints": "undecided",
    "quickstart": "Hypotheses of the paper",
    "transformer": "PL with a floor",
    "what_the_theorem_says": "silent",
    "your_own_run": "not seen",
}


@pytest.mark.slow
@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(script):
    """From data to the figure, as a reader would."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(script.with_suffix(".ipynb"), as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    kinds = [output.get("data", {}).keys() for cell in code for output in cell.outputs]
    assert any("image/png" in kind for kind in kinds), "the notebook shows a figure"
    assert any(SHOWN[script.stem] in str(output) for cell in code for output in cell.outputs)


@pytest.mark.slow
def test_the_site_is_built_without_a_warning(tmp_path):
    pytest.importorskip("sphinx_book_theme", reason="what the site needs is not installed: make docs installs it")
    pytest.importorskip("myst_nb", reason="what the site needs is not installed: make docs installs it")
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-W",
        "-q",
        "-D",
        "nb_execution_mode=off",
        "-b",
        "html",
        "docs",
        str(tmp_path),
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in ("index", "_generated/claims/floor_pl", "_generated/api/lplr_jax", "_generated/tutorials/quickstart"):
        assert (tmp_path / f"{name}.html").exists()
    shown = (tmp_path / "_generated/claims/floor_pl.html").read_text()
    assert "<math" in shown
    # What a browser would fetch; links may lead elsewhere.
    fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"([^\"]+)|<link[^>]* href=\"([^\"]+)", shown)
    assert not [src for pair in fetched for src in pair if re.match(r"(https?:)?//", src)]
