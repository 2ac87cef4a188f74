"""Versions, device, machine and revision of the code."""

import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import jax


@cache
def describe_environment() -> Mapping[str, Any]:
    """Return versions, device, machine and revision of the code, for a record's provenance."""
    versions = {"python": platform.python_version()}
    for package in ("lplr-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matfree", "neural-tangents"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "absent"
    device = jax.devices()[0]
    return {
        "versions": versions,
        "device": f"{device.platform} ({device.device_kind}) x {jax.device_count()}",
        "platform": platform.platform(),
        "git_revision": _git_revision(),
    }


def peak_memory_bytes() -> int:
    """Return the largest resident size that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _git_revision() -> str:
    here = Path(__file__).resolve().parent
    if not any((parent / ".git").exists() for parent in here.parents[:4]):
        return "not a checkout"
    try:
        command = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
