"""SIGKILL after each single write of a scoring run, then a rerun: the same bytes as an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

from factories import write_images


def committed_bytes(output: Path) -> dict[str, bytes]:
    names = ("part-*", "_quarantine/*", "_plan-*", "_plan/*")
    return {p.name: p.read_bytes() for pattern in names for p in (output / "model=small/version=1").glob(pattern)}


def test_sigkill_after_each_commit_step_then_rerun(tmp_path, small_models):
    images = write_images(tmp_path / "in", 22, bad=2)
    command = [sys.executable, Path(__file__).with_name("kill_steps.py"), small_models, images, tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    undisturbed = committed_bytes(tmp_path / "out-0")
    assert sum(name.startswith("part-") for name in undisturbed) == 3
    assert sum(name.startswith("quarantine-") for name in undisturbed) == 1
    for one in rounds[1:-1]:
        assert one["first"] == -9, one
        assert one["again"] == 0, one
        assert committed_bytes(tmp_path / f"out-{one['number']}") == undisturbed, one
        manifest = json.loads(
            (tmp_path / f"out-{one['number']}/model=small/version=1/_manifest-g0001.json").read_text()
        )
        assert (manifest["planned"], manifest["scored"], manifest["quarantined"]) == (24, 22, 2)
    killed_after = [one["last_write"].split("-")[0].split(".")[0] for one in rounds[1:-1]]
    assert {"_lease", "_plan", "part", "_quarantine/quarantine", "_manifest"} <= set(killed_after)
    assert rounds[-1]["first"] == 0
