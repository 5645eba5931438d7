"""Two hosts (processes) over the same nights: never two active runs on one date, and everything is done at the end."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from factories import write_images

from cnn_ray import outputs
from cnn_ray.storage import open_store

RACER = Path(__file__).with_name("night_racer.py")


@pytest.mark.parametrize("place", ["local", "s3"])
def test_two_hosts_never_work_on_one_date_at_once(tmp_path, small_models, place, request):
    output = f"{tmp_path}/out" if place == "local" else f"{request.getfixturevalue('s3_uri')}/out"
    days = ["2026-11-22", "2026-11-23", "2026-11-24"]
    for day in days:
        write_images(tmp_path / "in" / day, 4)
    score = {"model": "small@1", "models_uri": small_models, "input_uri": f"{tmp_path}/in/{{date}}"}
    score |= {"output_uri": output, "precision": "f32", "runner": "local", "report": False}
    (tmp_path / "nightly.yaml").write_text(yaml.safe_dump({"score": score, "look_back_days": 3}))
    command = [sys.executable, RACER, tmp_path / "nightly.yaml", "2026-11-25", tmp_path / "log"]
    hosts = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    ends = [(host.communicate(timeout=180)[1], host.returncode) for host in hosts]
    assert {code for _, code in ends} <= {0, 75}, ends
    assert 0 in {code for _, code in ends}, ends
    working: dict[str, str] = {}
    begun: list[str] = []
    for line in (tmp_path / "log").read_text().splitlines():
        what, day, pid = line.split()
        if what == "begin":
            assert day not in working, f"{pid} began {day} while {working[day]} worked on it"
            working[day] = pid
            begun.append(day)
        else:
            assert working.pop(day) == pid
    assert sorted(begun) == days  # each was scored once, whoever came first
    for day in days:
        partition = f"{output}/date={day}/model=small/version=1"
        assert outputs.read(partition).num_rows == 4
        assert len(open_store(partition).keys("_manifest-g")) == 1
