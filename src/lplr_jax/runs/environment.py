"""Versions, device, machine, revision of the code, and the settings of JAX on which numbers depend."""

import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

DECIDING: Mapping[str, Any] = {
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
}
"""Settings of JAX that decide which random numbers a seed gives, and their defaults."""
ROUNDING = ("jax_default_matmul_precision", "jax_enable_x64")
"""Settings of JAX on which last digits may depend."""


def describe_environment() -> Mapping[str, Any]:
    """Return versions, device, machine, revision of the code and settings of JAX, for a record's provenance."""
    import jax

    settings = {name: getattr(jax.config, name) for name in (*DECIDING, *ROUNDING)}
    return {**_unchanging(), "settings": settings}


def unusual_settings(settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return those of `DECIDING` that are not as by default: they are part of a run's identity.

    Args:
        settings: as a record's provenance holds them; None for those of this process, which has none before JAX is
            imported, as it can draw no number.
    """
    if settings is None:
        config = getattr(sys.modules.get("jax"), "config", None)
        settings = {name: getattr(config, name, default) for name, default in DECIDING.items()}
    return {name: settings[name] for name, default in DECIDING.items() if settings.get(name, default) != default}


@cache
def _unchanging() -> Mapping[str, Any]:
    """Return what stays as it is while a process lives."""
    import jax

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


def command_line() -> str:
    """Return the command of ours that this process was started by, as a shell reads it; empty for any other process."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    ours = program.stem == "lplr" or (program.name, program.parent.name) == ("__main__.py", "lplr_jax")
    return shlex.join(["lplr", *sys.argv[1:]]) if ours else ""


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
