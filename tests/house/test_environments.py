"""The command line where the world is odd: it does its work, or says in one line why not; never a traceback."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import pytest

from lplr_jax import records
from lplr_jax.theory.claims.example import linear_regression

ZEROS = ("--search-steps", "0", "--hessian-probes", "0", "--spectrum-probes", "0")
TINY = ("mnist", "--width", "8", "--epochs", "4", "--n-train", "20", "--probe-every", "2", *ZEROS)
DIVERGING = (*TINY, "--learning-rate", "100", "--epochs", "40")
NO_USER = """
import pwd, sys
def unknown(*_):
    raise KeyError("no such user")
pwd.getpwuid = pwd.getpwnam = unknown
from lplr_jax.__main__ import main
sys.exit(main())
"""
GONE = 'rmdir "$PWD" && exec "$@"'


class Case(NamedTuple):
    """An environment: what is run in it, and how that ends."""

    argv: tuple[str, ...] = TINY
    code: int = 0
    said: str = ""  # a pattern of all of standard error
    settings: Mapping[str, str | None] = MappingProxyType({})  # None: not set
    python: tuple[str, ...] = ("-m", "lplr_jax")
    shell: str = 'exec "$@"'
    cwd: str | None = None


LONG = (*TINY, "--out")
CASES = {
    "no passwd entry and no HOME": Case(
        python=("-c", NO_USER), settings={"HOME": None, "XDG_CACHE_HOME": None, "TFDS_DATA_DIR": "/nonexistent"}
    ),
    "read-only HOME": Case(settings={"HOME": "/proc", "XDG_CACHE_HOME": None}),
    "no GPU": Case(
        code=2, said=r"lplr: JAX finds no device for JAX_PLATFORMS='cuda'.*\n", settings={"JAX_PLATFORMS": "cuda"}
    ),
    "transfer guard": Case(settings={"JAX_TRANSFER_GUARD": "disallow"}),
    "debug NaNs": Case(settings={"JAX_DEBUG_NANS": "1", "JAX_DEBUG_INFS": "1"}),
    "debug NaNs, diverging": Case(DIVERGING, code=4, settings={"JAX_DEBUG_NANS": "1", "JAX_DEBUG_INFS": "1"}),
    "float64": Case(settings={"JAX_ENABLE_X64": "1"}),
    "strict promotion": Case(settings={"JAX_NUMPY_DTYPE_PROMOTION": "strict", "JAX_NUMPY_RANK_PROMOTION": "raise"}),
    "another generator": Case(settings={"JAX_DEFAULT_PRNG_IMPL": "rbg"}),
    "no assertions": Case(python=("-O", "-m", "lplr_jax")),
    "no docstrings": Case(python=("-OO", "-m", "lplr_jax")),
    "warnings are errors": Case(settings={"PYTHONWARNINGS": "error"}),
    "ASCII": Case(settings={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
    "20 columns": Case(settings={"TERM": "dumb", "COLUMNS": "20"}),
    "umask": Case(shell='umask 077; exec "$@"'),
    "folder that is read-only": Case(code=5, said=r"lplr: .*runs.*\n", cwd="/proc"),
    "folder that is gone": Case(("verify", "RECORD"), shell=GONE),
    "folder that is gone, written to": Case(code=5, said=r"lplr: .*\n", shell=GONE),
    "no TMPDIR": Case(settings={"TMPDIR": "/nonexistent/tmp"}),
    "long name": Case((*LONG, "a" * 300), code=5, said=r"lplr: .*File name too long.*\n"),
    "long path": Case((*LONG, "/".join(["a" * 200] * 30)), code=5, said=r"lplr: .*File name too long.*\n"),
    "blanks and letters": Case((*LONG, "my run λ \u202e[red]")),
    "backend of matplotlib": Case(("plot", "RECORD", "--out", "a.png"), settings={"MPLBACKEND": "nonsense"}),
    "one thread": Case(settings={"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "7"}),
}


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    path = tmp_path_factory.mktemp("record") / "record.npz"
    linear_regression().save(path)
    return path


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def environment(**settings):
    own = ("PATH", "PYTHONPATH", "OPENBLAS_NUM_THREADS", "TMPDIR", "HOME", "VIRTUAL_ENV")
    kept = {name: os.environ[name] for name in own if name in os.environ}
    return {name: value for name, value in {**kept, "JAX_PLATFORMS": "cpu", **settings}.items() if value is not None}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_odd_environment(case, record, cache, tmp_path):
    argv = [str(record) if word == "RECORD" else word for word in case.argv]
    command = ["sh", "-c", case.shell, "sh", sys.executable, *case.python, *argv]
    done = subprocess.run(
        command,
        capture_output=True,
        cwd=case.cwd or tmp_path,
        env=environment(**{"XDG_CACHE_HOME": str(cache), **case.settings}),
        check=False,
        timeout=500,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == case.code, out + err
    assert re.fullmatch(case.said, err), err
    assert "Traceback" not in out + err
    assert "\u202e" not in out
    if case.argv[0] != "mnist" or case.code not in (0, 4):
        assert case.shell == GONE or case.cwd or {path.name for path in tmp_path.iterdir()} <= {"a.png", "a.pdf"}
        return
    (path,) = tmp_path.rglob("record.npz")
    found = records.load(path)
    assert (found.diverged_at is None) == (case.code == 0)
    assert list(path.parent.rglob("*.png")) or list(tmp_path.glob("figures/*.png"))
    if case.shell.startswith("umask"):
        assert path.stat().st_mode & 0o777 == 0o600
    if "JAX_DEFAULT_PRNG_IMPL" in case.settings:
        assert json.loads((path.parent / "config.json").read_text())["config"]["jax_default_prng_impl"] == "rbg"
        assert found.provenance["settings"]["jax_default_prng_impl"] == "rbg"
        assert "jax_default_prng_impl" not in found.config


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("place", ["tyro", "rich.console", "numpy"])
def test_a_signal_while_the_command_is_imported_is_one_line(number, place, tmp_path):
    """The process shoots itself when it begins to import a module, wherever that is in the chain."""
    code = f"""
import os, signal, sys
from lplr_jax.__main__ import main
class Shoot:
    def find_spec(self, name, path=None, target=None):
        if name == {place!r}:
            sys.meta_path.remove(self)
            os.kill(os.getpid(), {int(number)})
sys.meta_path.insert(0, Shoot())
sys.argv[1:] = ["verify", "nothing"]
sys.exit(main())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert done.returncode == 130, done
    assert re.fullmatch(rf"lplr: interrupted by {number.name};.*\n", done.stderr), done.stderr


def test_the_package_runs_as_the_command(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "lplr_jax", "--version"], capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    assert re.fullmatch(r"lplr-jax \S+\n", done.stdout), done.stderr
    scripts = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert 'lplr = "lplr_jax.__main__:main"' in scripts


SWALLOWED = """
import os, signal, sys
from lplr_jax import cli
class Lost:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
class Shoot:
    def find_spec(self, name, path=None, target=None):
        if name == "jax":
            if sys.argv[1] == "removed":
                Lost()
            try:
                os.kill(os.getpid(), signal.SIGINT) if sys.argv[1] != "removed" else None
            except KeyboardInterrupt:
                if sys.argv[1] == "another error":
                    raise ImportError("a library that failed half-way")
sys.meta_path.insert(0, Shoot())
sys.exit(cli.main(["mnist", "--preset", "smoke", "--epochs", "2000000"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", ["caught", "removed", "another error"])
def test_an_interrupt_that_an_import_swallows_still_ends_the_command(how, tmp_path):
    """Caught by the library, dropped by Python in a finaliser, or turned into another error."""
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, how], capture_output=True, text=True, cwd=tmp_path, env=environment()
    )
    assert done.returncode == 130, done
    assert re.fullmatch(r"lplr: interrupted by SIGINT;.*\n", done.stderr), done.stderr
