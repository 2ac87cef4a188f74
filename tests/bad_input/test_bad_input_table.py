"""Every bad input of the table is refused by name, as users call the library: without run-time type checks."""

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def test_every_bad_input_is_refused_by_name(tmp_path, capsys):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "MPLBACKEND": "Agg", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["TFDS_DATA_DIR"] = str(tmp_path / "nothing")
    command = [sys.executable, str(HERE / "bad_input.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    faults = {name: result["fault"] for name, result in results.items() if result["fault"]}
    with capsys.disabled():
        print(f" {len(results)} bad inputs ", end="")
    assert not faults, "\n\n".join(f"{name}\n{fault}" for name, fault in faults.items())
    assert len(results) >= 300
