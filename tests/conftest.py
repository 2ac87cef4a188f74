"""Strict numerics for every test: nothing promotes or broadcasts silently, and the float64 flag is left alone."""

import atexit
import logging
import os
import shutil
import tempfile

os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    # One cache of compiled programs for this session: its workers and the processes that tests start inherit it, and
    # nothing of an earlier session is found in it.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lplr-test-programs-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import jaxtyping
import pytest
from hypothesis import HealthCheck, settings

# Under JAX_ENABLE_X64 what names no type is float64 beside parameters in float32, as with a user who sets it.
if not jax.config.jax_enable_x64:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# An example compiles, so no deadline; derandomised, so that a red run can be repeated; `make test-all` is "thorough".
SETTINGS = {"deadline": None, "derandomize": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("quick", max_examples=8, **SETTINGS)
settings.register_profile("thorough", max_examples=60, **SETTINGS)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def _x64_flag_is_left_alone():
    before = jax.config.jax_enable_x64
    yield
    assert jax.config.jax_enable_x64 == before, "the global float64 flag was changed"


@pytest.fixture
def without_type_checks():
    """Call the library as users do, who have no run-time type checker in front of its own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def _restore_logging():
    """`cli.main` configures logging for a process; a test session has many."""
    root, package = logging.getLogger(), logging.getLogger("lplr_jax")
    handlers, level, own = root.handlers[:], root.level, package.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    package.setLevel(own)
