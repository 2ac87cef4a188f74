"""The surroundings of a user who makes a mistake."""

import tempfile
from pathlib import Path

import jax
import pytest


@pytest.fixture
def as_a_user(without_type_checks, monkeypatch, tmp_path_factory):
    """Call the library as users do: JAX as it comes, no type checker in front of errors, no data of the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", "/nonexistent/cache")
    monkeypatch.setenv("TFDS_DATA_DIR", "/nonexistent/tensorflow_datasets")
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def folder():
    """An empty folder that is gone afterwards: pipes, and files that claim terabytes, are not kept."""
    with tempfile.TemporaryDirectory(prefix="bad-input-") as name:
        yield Path(name)
