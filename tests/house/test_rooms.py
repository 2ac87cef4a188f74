"""The rooms as they are listed: what each may load, and that documents show the same list."""

import ast
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import lplr_jax
from lplr_jax import rooms

ROOT = Path(__file__).parents[2]
PACKAGE = Path(lplr_jax.__file__).parent
WITH_NETWORKS = ("models", "experiments", "cli")
"""The built-in networks and those who use them."""


def test_every_room_is_listed_once_and_exists():
    listed = [room.name for room in rooms.ROOMS]
    assert len(listed) == len(set(listed))
    found = {path.stem for path in PACKAGE.glob("*.py")} | {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert found - {"__init__", "__main__"} == set(listed)
    assert {room.wing for room in rooms.ROOMS} == {"ground", "right", "left", "both"}


def test_the_documents_show_the_same_rooms():
    shown = re.search(
        r"<!-- rooms -->\n(.*?)\n<!-- end of rooms -->", (ROOT / "docs/architecture.md").read_text(), re.S
    )
    assert shown
    assert shown[1] == rooms.table(), "paste what `python -c 'from lplr_jax import rooms; print(rooms.table())'` prints"
    for room in rooms.ROOMS:
        assert re.search(rf"^    {room.name} +{room.wing} +{re.escape(room.holds)}$", lplr_jax.__doc__, re.MULTILINE)


def test_tests_lie_by_room():
    found = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert found <= {room.name for room in rooms.ROOMS} | {"house", "bad_input"}


def resolve(name):
    """The object of a dotted name below the package."""
    found = lplr_jax
    parts = name.split(".")
    for place, part in enumerate(parts):
        if not hasattr(found, part):
            found = importlib.import_module(".".join(("lplr_jax", *parts[: place + 1])))
        else:
            found = getattr(found, part)
    return found


def test_what_the_architecture_names_exists():
    text = (ROOT / "docs/architecture.md").read_text()
    listed = {room.name for room in rooms.ROOMS}
    named = [name for name in re.findall(r"`([a-z_]+(?:\.\w+)*)`", text) if name.split(".")[0] in listed]
    assert len([name for name in named if "." in name]) > 30
    for name in named:
        resolve(name)


LOADED = """
import importlib, json, pkgutil, sys
import lplr_jax

found = {}
for name in sys.argv[1:]:
    room = importlib.import_module("lplr_jax." + name)
    for info in pkgutil.walk_packages(getattr(room, "__path__", ()), room.__name__ + "."):
        importlib.import_module(info.name)
    found[name] = sorted({name.split(".")[0] for name in sys.modules})
print(json.dumps(found))
"""


def loaded(names):
    """The packages that a new Python has loaded after all modules of each room, one room after another."""
    done = subprocess.run([sys.executable, "-c", LOADED, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_ground_and_right_wing_load_no_jax():
    names = [room.name for room in rooms.ROOMS if room.wing in ("ground", "right")]
    assert {"records", "theory", "plotting"} <= set(names)
    for name, packages in loaded(names).items():
        found = {"jax", "jaxlib", "flax", "optax"} & set(packages)
        assert not found, f"{name} loads {', '.join(sorted(found))}"


def imports(path):
    """Every module that a file names in an import, in full."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_networks_are_needed_by_experiments_alone():
    for path in PACKAGE.rglob("*.py"):
        if path == PACKAGE / "__init__.py" or path.relative_to(PACKAGE).parts[0].removesuffix(".py") in WITH_NETWORKS:
            continue
        found = [name for name in imports(path) if re.match(r"(flax|lplr_jax\.models)(\.|$)", name)]
        assert not found, f"{path.relative_to(PACKAGE)} imports {found}"
