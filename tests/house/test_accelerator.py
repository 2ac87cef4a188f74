"""The benchmark for accelerators: what it writes of parts that end, fail and are cut off, and that its parts run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

PART = """
import json, sys, time
print(json.dumps({"row": {"a": 1.5, "b": True}}), flush=True)
print("noise of a library", flush=True)
mode = sys.argv[sys.argv.index("--one") + 1]
if mode == "least":
    time.sleep(100)
if mode == "seeds":
    raise ValueError("no such device")
print(json.dumps({"host_bytes": 2 * 10**9, "device_bytes": None}))
"""


@pytest.fixture(scope="module")
def accelerator():
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import accelerator
    finally:
        sys.path.remove(str(BENCHMARKS))
    return accelerator


def test_a_part_counts_as_far_as_it_came(accelerator, tmp_path, monkeypatch):
    script = tmp_path / "part.py"
    script.write_text(PART)
    monkeypatch.setattr(accelerator, "__file__", str(script))
    limits = {"kernels": 60, "least": 2, "seeds": 60}
    parts = {name: accelerator.gather(name, True, seconds) for name, seconds in limits.items()}
    assert {name: part["rows"] for name, part in parts.items()} == {name: [{"a": 1.5, "b": True}] for name in limits}
    ended = {name: part["ended"] for name, part in parts.items()}
    assert ended == {"kernels": "whole", "least": "cut off after 2 s", "seeds": "failed: ValueError: no such device"}
    parts["cifar"] = {"rows": [], "ended": "left out: no time was left", "seconds": 0.0}
    machine = {"device": "x", "backend": "cpu", "platform": "y", "jax": "1", "cores": 2}
    report = {"machine": machine, "small": True, "parts": parts, "seconds": 3.0, "cpu_seconds": 1.0}
    text = accelerator.table(report)
    assert "No figure of an accelerator is in it." in text
    assert "| 1.5 | yes |" in text
    assert "left out: no time was left" in text
    assert "peak 2.00 GB on the host" in text
    report["machine"]["backend"] = "gpu"
    assert "dry run" not in accelerator.table(report)


def test_the_parts_fit_into_the_time(accelerator):
    # What a part leaves unused the later ones may have; all of them together may not need more than there is.
    assert sum(seconds for _, _, seconds in accelerator.PARTS.values()) <= 1.15 * accelerator.LIMIT
    assert accelerator.LIMIT == 8 * 60


def test_every_case_is_one_of_the_kernel_benchmark(accelerator):
    names = {*accelerator.KERNELS[False], *accelerator.IMAGES[False], *accelerator.KERNELS[True]}
    cases = accelerator.ntk.cases()
    assert all(f"{name}-f{bits}" in cases for name in names for bits in (32, 64))


@pytest.mark.slow
def test_it_runs_small(tmp_path):
    command = [sys.executable, str(BENCHMARKS / "accelerator.py"), "--small", "--out", str(tmp_path), "--name", "dry"]
    subprocess.run([*command, "--only", "training", "least", "seeds", "mnist"], check=True, capture_output=True)
    report = json.loads((tmp_path / "dry.json").read_text())
    assert {name: part["ended"] for name, part in report["parts"].items()} == dict.fromkeys(
        ("training", "least", "seeds", "mnist"), "whole"
    )
    (least,) = report["parts"]["least"]["rows"]
    assert least["the CPU's interval meets it"]
    assert report["parts"]["mnist"]["rows"][0]["exit code"] == 0
    assert (tmp_path / "dry.md").read_text().startswith(report["machine"]["device"])
