"""The short form of the endpoint's fault runs, as CI plays it: a small model, default mode, not one broken promise.

The overload is not among them: how far its tail reaches is a measurement, for a machine that does nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = ("alias", "update", "kill", "kill_retry", "autoscaling")


@pytest.mark.slow
def test_short_serve_faults(tmp_path):
    report = tmp_path / "faults.json"
    command = [sys.executable, Path(__file__).with_name("serve_faults.py"), "--short", "--only", ",".join(FAULTS)]
    command += ["--json", report]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    faults = json.loads(report.read_text())["faults"]
    assert set(faults) == {f"default/{name}" for name in FAULTS}
    assert set(faults["default/alias"]["versions"]) == {"1", "2"}  # both answered
