"""Pages that are made from the package: claims, names, tutorials; and the check that no public name is missing."""

import ast
import functools
import importlib
import inspect
import itertools
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from lplr_jax import rooms
from lplr_jax.theory.claims import REGISTRY, page

ROOT = Path(__file__).parents[1]
README_NAME = re.compile(
    r"\b(?:lp|lplr_jax|data|diagnostics|linalg|losses|models|ntk|plotting|records|theory)\.([A-Za-z_][\w.]*)"
)
WHAT = {
    "lplr_jax": "The face: what `import lplr_jax as lp` gives, lazily and without loading JAX.",
    "data": "Images, text, and data of your own.",
    "diagnostics": "One point or one series: λ_min, the Hessian's extremes, the PL bracket, rates.",
    "experiments": "The built-in experiments.",
    "linalg": "Eigenvalues with their quality.",
    "losses": "Losses, and an objective made of one.",
    "models": "The networks of the built-in experiments.",
    "ntk": "The kernel engine.",
    "plotting": "Figures from records.",
    "records": "Records, to npz and back.",
    "schema": "Every name, unit and meaning of a record.",
    "theory": "Claims, verdicts, the story.",
    "training": "Pure training steps, and scans over them.",
}


def modules() -> list[str]:
    """Return the modules of the public face that have names of their own."""
    found = [name for name, module in rooms.FACE.items() if module == f"lplr_jax.{name}"]
    return [name for name in found if public(importlib.import_module(f"lplr_jax.{name}"))]


def public(module: ModuleType) -> list[str]:
    """Return the public names of a module: what it lists, or what it defines."""
    if hasattr(module, "__all__"):
        return [name for name in module.__all__ if name not in rooms.FACE or module.__name__ != "lplr_jax"]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def face() -> list[str]:
    """Return the names of the face that are no modules."""
    return [name for name, module in rooms.FACE.items() if module != f"lplr_jax.{name}"]


def _own(module: str) -> list[str]:
    """Return in full the public names of a module that are not those of the face under another one."""
    of_face = {id(resolve(f"lplr_jax.{name}")) for name in face()}
    found = [f"lplr_jax.{module}.{name}" for name in public(importlib.import_module(f"lplr_jax.{module}"))]
    return [name for name in found if id(resolve(name)) not in of_face]


def names() -> list[str]:
    """Return every public name in full, as the site must show it."""
    return [f"lplr_jax.{name}" for name in face()] + [name for module in modules() for name in _own(module)]


def readme_names() -> list[str]:
    """Return the names of this package that the README uses, in full."""
    found = []
    for match in README_NAME.finditer((ROOT / "README.md").read_text(encoding="utf-8")):
        head, rest = match[0].split(".", 1)
        found.append(f"lplr_jax.{rest}" if head in ("lp", "lplr_jax") else f"lplr_jax.{head}.{rest}")
    return [name for name in found if not name.endswith((".md", ".npz"))]


def resolve(name: str) -> Any:
    """Return what a full name stands for.

    Raises:
        AttributeError: where it stands for nothing.
    """
    value: Any = importlib.import_module("lplr_jax")
    for part in name.split(".")[1:]:
        try:
            value = getattr(value, part)
        except AttributeError:
            if not isinstance(value, ModuleType):
                raise
            value = importlib.import_module(f"{value.__name__}.{part}")
    return value


@functools.cache
def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def described(name: str) -> list[str]:
    """Return the lines below the assignment of a name that is neither class nor function, wherever it is assigned."""
    room, last = name.split(".")[1], name.rpartition(".")[2]
    package = ROOT / "src" / "lplr_jax"
    own = package / room
    files = dict.fromkeys([*sorted(own.rglob("*.py")), *sorted(package.rglob("*.py"))])
    trees = [_tree(path) for path in files if last in path.read_text(encoding="utf-8")]
    imports = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    aliases = {alias.name for node in imports for alias in node.names if alias.asname == last}
    if aliases:
        trees = [_tree(path) for path in files]
    for tree in trees:
        for node in ast.walk(tree):
            for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
                for assigned, after in itertools.pairwise(body if isinstance(body, list) else ()):
                    targets = getattr(assigned, "targets", [getattr(assigned, "target", None)])
                    found = {
                        node.id for t in targets if t is not None for node in ast.walk(t) if isinstance(node, ast.Name)
                    }
                    if found.isdisjoint({last, *aliases}):
                        continue
                    text = (
                        getattr(getattr(after, "value", None), "value", None) if isinstance(after, ast.Expr) else None
                    )
                    if isinstance(text, str):
                        return _without_signs(inspect.cleandoc(text).splitlines())
    return []


def _entry(name: str) -> Iterator[str]:
    value = resolve(name)
    if inspect.isclass(value):
        kind = "exception" if issubclass(value, BaseException) else "class"
    elif inspect.isroutine(value):
        kind = "function"
    else:
        kind = "data"
    if kind == "data":
        yield from (f".. py:data:: {name}", "", *(f"   {line}" for line in described(name)), "")
    else:
        yield from (f".. auto{kind}:: {name}", "")


def _names_page(module: str, found: list[str]) -> str:
    title = "lplr_jax" if module == "lplr_jax" else f"lplr_jax.{module}"
    entries = [line for name in found for line in _entry(name)]
    return "\n".join([f"# `{title}`", "", WHAT[module], "", "```{eval-rst}", *entries, "```", ""])


def _claim_page(name: str, outcomes: str) -> str:
    body = page(name).replace(f"### `{name}`\n", "", 1)
    # Two dollars within a line of formula are no dollars of Markdown.
    section = re.search(rf"^## `{name}`:?[^\n]*\n(.*?)(?=^## |\Z)", outcomes, re.MULTILINE | re.DOTALL)
    does = section[1].strip() if section else ""
    head = f"# `{name}`\n{body}\n"
    return head + (f"\n## What each outcome does and does not establish\n\n{does}\n" if does else "")


def write(here: Path) -> None:
    """Write the generated pages; a file that would not change is left alone, so that nothing is built twice."""
    made: dict[Path, str] = {}
    folder = here / "_generated"
    outcomes = (here / "verdicts.md").read_text(encoding="utf-8")
    for name in REGISTRY:
        made[folder / "claims" / f"{name}.md"] = _claim_page(name, outcomes)
    listed = "\n".join(f"- [`{name}`]({name}.md): {claim.statement}" for name, claim in REGISTRY.items())
    tree = "\n".join(["```{toctree}", ":hidden:", *REGISTRY, "```", ""])
    intro = "One page a claim, made from the claim itself. [How to read their outcomes](../../verdicts.md)."
    made[folder / "claims" / "index.md"] = f"# The claims\n\n{intro}\n\n{listed}\n\n{tree}"
    pages = {"lplr_jax": [f"lplr_jax.{name}" for name in face()]}
    for module in modules():
        pages[module] = _own(module)
    for module, found in pages.items():
        made[folder / "api" / f"{module}.md"] = _names_page(module, found)
    listed = "\n".join(f"- [`{module}`]({module}.md): {WHAT[module]}" for module in pages)
    tree = "\n".join(["```{toctree}", ":hidden:", *pages, "```", ""])
    made[folder / "api" / "index.md"] = f"# Names\n\n{listed}\n\n{tree}"
    tutorials = sorted((ROOT / "notebooks").glob("*.py"))
    for tutorial in tutorials:
        made[folder / "tutorials" / tutorial.name] = tutorial.read_text(encoding="utf-8")
    for path, text in made.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.rglob("*"):
        if path.is_file() and path not in made:
            path.unlink()


def _without_signs(lines: list[str]) -> list[str]:
    """Have signs of mathematics stand for themselves: |x| is no substitution, x_ no link, a star no stress."""
    found, in_example = [], False
    for line in lines:
        in_example = line.lstrip().startswith(">>>") or (in_example and bool(line.strip()))
        parts = [line] if in_example else re.split(r"(``?[^`]*``?)", line)
        signs = re.compile(r"(?<=\w)_(?=\W|$)|[|*]")
        found.append("".join(p if in_example or p.startswith("`") else signs.sub(r"\\\g<0>", p) for p in parts))
    return found


def _plain(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    lines[:] = _without_signs(lines)


def _check(app: Any, env: Any) -> None:
    from sphinx.util import logging

    logger = logging.getLogger(__name__)
    shown = {entry[0] for entry in env.get_domain("py").get_objects()}
    for name in names():
        if name not in shown:
            logger.warning("%s is public and on no page", name)
        value = resolve(name)
        if not (value.__doc__ if inspect.isclass(value) or inspect.isroutine(value) else described(name)):
            logger.warning("%s is public, and nothing says what it is", name)
    for name in readme_names():
        try:
            resolve(name)
        except AttributeError:
            logger.warning("the README names %s, which is not there", name)
            continue
        module_or_part = name in shown or inspect.ismodule(resolve(name)) or name.rsplit(".", 1)[0] in shown
        if not module_or_part:
            logger.warning("the README names %s, which is on no page", name)


def _mathml(self: Any, node: Any, display: str) -> None:
    from docutils import nodes
    from latex2mathml.converter import convert

    formula = convert(node.astext(), display=display)
    self.body.append(formula if display == "inline" else f'<div class="math-block">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Connect the check, the docstrings and the formulas, which browsers draw themselves: no script, no fonts."""
    app.connect("autodoc-process-docstring", _plain, priority=100)
    app.connect("env-check-consistency", _check)
    inline = (lambda self, node: _mathml(self, node, "inline"), None)
    block = (lambda self, node: _mathml(self, node, "block"), None)
    app.add_html_math_renderer("mathml", inline, block)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
