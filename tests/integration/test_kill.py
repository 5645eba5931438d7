"""SIGKILL after each single write of a scoring run, then a rerun: the same bytes as an undisturbed run."""

import json
import subprocess
import sys
from pathlib import Path

from factories import image_bytes, write_images

from cnn_ray import outputs, score
from cnn_ray.config import ScoreConfig


def committed_bytes(output: Path) -> dict[str, bytes]:
    names = ("part-*", "_quarantine/*", "_plan-*", "_plan/*", "_superseded/*")
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


def test_sigkill_after_each_commit_step_of_a_second_generation(tmp_path, small_models):
    images = write_images(tmp_path / "in", 22, bad=2)
    settings = {"model": "small@1", "models_uri": small_models, "input_uri": str(images), "shard_size": 8}
    base = ScoreConfig(**settings, output_uri=str(tmp_path / "base"), num_threads=1, max_quarantine_rate=0.1)
    score.run_score(base)
    (images / "bad-0000.png").write_bytes(image_bytes(500))
    (images / "shot-0003.png").write_bytes(image_bytes(501))
    (images / "shot-0004.png").write_bytes(b"")
    (images / "zz.png").write_bytes(image_bytes(502))
    command = [
        sys.executable,
        Path(__file__).with_name("kill_steps.py"),
        small_models,
        images,
        tmp_path,
        base.output_uri,
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rounds = [json.loads(line) for line in done.stdout.splitlines()]
    undisturbed = committed_bytes(tmp_path / "out-0")
    assert {"part-g0002-00000.parquet", "quarantine-g0002-00000.parquet"} <= set(undisturbed)
    assert "superseded-g0002-00000.parquet" in undisturbed
    rows = outputs.read(f"{tmp_path}/out-0/model=small/version=1")
    assert rows.num_rows == 23
    for one in rounds[1:-1]:
        assert (one["first"], one["again"]) == (-9, 0), one
        assert committed_bytes(tmp_path / f"out-{one['number']}") == undisturbed, one
        uri = f"{tmp_path}/out-{one['number']}/model=small/version=1"
        assert outputs.read(uri).equals(rows), one
        assert outputs.read_quarantine(uri)["code"].to_pylist() == ["not_an_image", "empty"], one
        assert outputs.Partition(uri).read_manifest(3) is None, one
    killed_after = [one["last_write"].split("-")[0].split(".")[0] for one in rounds[1:-1]]
    steps = {"_lease", "_plan", "part", "_quarantine/quarantine", "_superseded/superseded", "_manifest"}
    assert steps <= set(killed_after)
    assert rounds[-1]["first"] == 0
