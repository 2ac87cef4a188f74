"""The public face: every name, lazily, the same object whatever was imported before, and seen by type checkers."""

import ast
import importlib
import importlib.util
import json
import pkgutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import lplr_jax
from lplr_jax import rooms

ROOT = Path(__file__).parents[2]
PACKAGE = Path(lplr_jax.__file__).parent


def fresh(code, *arguments):
    """What a new Python prints as JSON."""
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


IMPORTED = """
import json, sys
before = set(sys.modules)
import lplr_jax
after = set(sys.modules) - before
print(json.dumps(sorted({name.split(".")[0] for name in after} - sys.stdlib_module_names)))
"""


def test_importing_the_package_loads_nothing_beside_the_standard_library():
    assert fresh(IMPORTED) == ["lplr_jax"]


POINT = """
import lplr_jax
import numpy as np
x = np.array([[1.0, 2.0], [3.0, 5.0]])
print(float(lplr_jax.diagnostics.empirical_ntk_min_eig(lambda w, x: x @ w, np.ones((2, 1)), x)))
"""


def test_a_bare_import_reaches_a_function_of_a_room():
    # Θ = x xᵀ has trace 39 and determinant 1; the smaller root of λ² - 39 λ + 1, by the quotient that cancels nothing.
    exact = 2 / (39 + (39**2 - 4) ** 0.5)
    # ‖Θ‖ u times a few: the eigenvalue is as accurate as the matrix.
    assert fresh(POINT) == pytest.approx(exact, abs=40 * 2**-50)


TWICE = """
import importlib, json, pkgutil, sys
import lplr_jax as lp
from lplr_jax import rooms

def public():
    # By hand and not by `from ... import`, which would import a module of that name.
    found = {("lplr_jax", name): getattr(lp, name) for name in lp.__all__}
    for package in sys.argv[1:]:
        module = importlib.import_module(package)
        found |= {(package, name): getattr(module, name) for name in getattr(module, "__all__", ())}
    return found

before = public()
for info in pkgutil.walk_packages(lp.__path__, "lplr_jax."):
    importlib.import_module(info.name)
after = public()
changed = [".".join(key) for key in before if before[key] is not after[key]]
print(json.dumps({"names": len(before), "changed": changed, "same": before.keys() == after.keys()}))
"""


def packages():
    return [info.name for info in pkgutil.walk_packages([str(PACKAGE)], "lplr_jax.") if info.ispkg]


def test_every_name_is_the_same_before_and_after_every_import():
    found = fresh(TWICE, *packages())
    assert found["names"] > len(rooms.FACE) + 20
    assert found["same"]
    assert not found["changed"]


@pytest.mark.parametrize("name", rooms.FACE)
def test_a_name_is_that_of_its_module(name):
    module = importlib.import_module(rooms.FACE[name])
    expected = module if rooms.FACE[name] == f"lplr_jax.{name}" else vars(module)[name]
    assert getattr(lplr_jax, name) is expected
    assert name in dir(lplr_jax)
    assert name in lplr_jax.__all__


@pytest.mark.parametrize("package", rooms.DOORS)
def test_a_lazy_name_is_that_of_no_other_module(package):
    """Importing `package.name` binds the module to that name, and a lazy name would be gone."""
    module = importlib.import_module(package)
    for name, target in rooms.DOORS[package].items():
        if target != f"{package}.{name}" and hasattr(module, "__path__"):
            assert importlib.util.find_spec(f"{package}.{name}") is None, f"{package}.{name} is a module as well"


@pytest.mark.parametrize("module", rooms.DOORS)
def test_a_name_that_is_none_is_an_attribute_error(module):
    with pytest.raises(AttributeError, match=rf"module '{module}' has no attribute 'nonsense'$"):
        getattr(importlib.import_module(module), "nonsense")  # noqa: B009


def test_type_checkers_read_the_same_names():
    """The imports under TYPE_CHECKING, which nothing runs."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    found = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, "a public import repeats its name"
            found[alias.name] = f"lplr_jax.{alias.name}" if node.module == "lplr_jax" else node.module
    assert found == rooms.FACE


@pytest.mark.slow
def test_pyright_sees_every_name_and_no_other(tmp_path):
    names = [name for name in lplr_jax.__all__ if name != "__version__"]
    lines = ["import lplr_jax as lp", *(f"reveal_type(lp.{name})" for name in names), "lp.nonsense"]
    (tmp_path / "use.py").write_text("\n".join(lines))
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(PACKAGE.parent)]}))
    command = [str(Path(sys.executable).with_name("pyright")), "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run([*command, "-p", str(tmp_path)], capture_output=True, text=True, check=False)
    said = json.loads(done.stdout)["generalDiagnostics"]
    revealed = [entry["message"] for entry in said if entry["severity"] == "information"]
    assert len(revealed) == len(names)
    assert not [message for message in revealed if "Unknown" in message or '"Any"' in message]
    (error,) = [entry for entry in said if entry["severity"] == "error"]
    assert '"nonsense" is not a known attribute' in error["message"]


def test_the_wheel_says_that_it_is_typed(tmp_path):
    from hatchling.builders.wheel import WheelBuilder

    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path))
    with zipfile.ZipFile(wheel) as file:
        names = file.namelist()
    assert "lplr_jax/py.typed" in names
    assert "lplr_jax/plotting/lplr.mplstyle" in names
    assert not [name for name in names if not name.startswith(("lplr_jax/", "lplr_jax-"))]
