"""The short form of the chaos run, as CI plays it: 10 local and 2 Ray rounds, not one broken promise."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_short_chaos(tmp_path):
    command = [sys.executable, Path(__file__).with_name("run.py"), "--short", "--json", tmp_path / "chaos.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rounds = json.loads((tmp_path / "chaos.json").read_text())["rounds"]
    assert {runner: len(played) for runner, played in rounds.items()} == {"local": 10, "ray": 2}
    for played in rounds.values():
        assert all(one["codes"][-1] == 0 and not one["violation"] for one in played)
    assert sum(len(one["codes"]) for one in rounds["local"]) > 10  # some were killed and went on
