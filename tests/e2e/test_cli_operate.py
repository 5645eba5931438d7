"""nightly, schedule and runs prune as a user or a scheduler meets them: exit codes, one sentence, what is printed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from factories import write_images

from cnn_ray import cli, outputs
from cnn_ray.config import NightlyConfig, build_config, load_yaml
from cnn_ray.storage import open_store

JOBS = Path(__file__).parents[2] / "jobs"


def run(capsys, *arguments) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as ended:
        cli.main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    return ended.value.code, captured.out, captured.err  # type: ignore[return-value]


def write_config(folder: Path, models: str, **changes) -> Path:
    score = {"model": "small@1", "models_uri": models, "input_uri": f"{folder}/in/{{date}}"}
    score |= {"output_uri": f"{folder}/out", "precision": "f32", "runner": "local", "report": False, "shard_size": 4}
    given = {"score": score | changes.pop("score", {}), "look_back_days": 2, **changes}
    (folder / "nightly.yaml").write_text(yaml.safe_dump(given))
    return folder / "nightly.yaml"


def states(out: str) -> dict[str, str]:
    return dict(re.findall(r"│ (\d{4}-\d{2}-\d{2}) +│ (\w+)", out))


def test_a_night_on_s3_from_owed_to_done_to_pruned(capsys, tmp_path, small_models, s3_uri):
    config = write_config(
        tmp_path,
        small_models,
        score={"input_uri": f"{s3_uri}/in/{{date}}", "output_uri": f"{s3_uri}/out"},
        look_back_days=1,
        wait_for_marker="_SUCCESS",
    )
    nightly = ("nightly", "--config", config, "--today", "2026-11-25")
    for path in write_images(tmp_path / "shots", 3).iterdir():
        open_store(s3_uri).put(f"in/2026-11-24/{path.name}", path.read_bytes())
    code, out, _ = run(capsys, *nightly)
    assert (code, states(out), "waits for" in out) == (75, {"2026-11-24": "owed"}, True)
    open_store(s3_uri).put("in/2026-11-24/_SUCCESS", b"")
    code, out, _ = run(capsys, *nightly)
    assert (code, states(out)) == (0, {"2026-11-24": "done"})
    assert outputs.read(f"{s3_uri}/out/date=2026-11-24/model=small/version=1").num_rows == 3
    code, out, _ = run(capsys, "nightly", "status", "--config", config, "--today", "2026-11-25", "--json")
    told = json.loads(out)
    assert (code, told["dates"][0]["state"], told["last_call"]["exit_code"]) == (0, "done", 0)
    prune = ("runs", "prune", f"{s3_uri}/out", "--keep-days", "30", "--today", "2099-01-01")
    code, out, _ = run(capsys, *prune)
    assert (code, "would be removed" in out, "Nothing was changed" in out) == (0, True, True)
    code, out, _ = run(capsys, *prune, "--yes")
    assert (code, "removed" in out) == (0, True)
    code, out, _ = run(capsys, *prune, "--yes")
    assert (code, "No partition" in out) == (0, True)
    code, out, _ = run(capsys, *nightly)
    assert (code, "removed for its age" in out) == (0, True)


def test_exit_codes_4_2_3(capsys, tmp_path, small_models):
    config = write_config(tmp_path, small_models)
    write_images(tmp_path / "in" / "2026-11-23", 2, bad=3)
    write_images(tmp_path / "in" / "2026-11-24", 2)
    nightly = ("nightly", "--config", config, "--today", "2026-11-25")
    code, out, _ = run(capsys, *nightly)
    assert (code, states(out)) == (4, {"2026-11-23": "failed", "2026-11-24": "done"})
    assert "--accept" in out
    accept = ("score", f"{tmp_path}/in/{{date}}", f"{tmp_path}/out", "--date", "2026-11-23", "--model", "small@1")
    settings = ("--models-uri", small_models, "--precision", "f32", "--shard-size", "4", "--no-report")
    assert run(capsys, *accept, *settings, "--accept")[0] == 0
    assert run(capsys, *nightly)[0] == 0
    assert run(capsys, *nightly, "--score-model", "small@9")[0] == 3
    (tmp_path / "in" / "2026-11-24" / "more.png").write_bytes(b"x")
    for arguments, message in [
        (("--today", "tomorrow"), "Expected a date like"),
        (("--score-date", "2026-11-24"), "Received: date, which is for one run"),
        (("--score-input-uri", "in"), r"Expected {date} in input_uri of a nightly run, or"),
        (("--order", "random"), "random"),
        (("--webhook-url", "http://x.example/secret", "--webhook-hosts", "x.example"), "https"),
        (("--loook-back-days", "3"), "--look-back-days"),
    ]:
        code, _, err = run(capsys, *nightly, *arguments)
        assert (code, message in err) == (2, True), err
        assert "secret" not in err


def test_looking_writes_nothing(capsys, tmp_path, small_models):
    config = write_config(tmp_path, small_models)
    write_images(tmp_path / "in" / "2026-11-24", 2)
    nightly = ("nightly", "--config", config, "--today", "2026-11-25")
    code, out, _ = run(capsys, *nightly, "--dry-run")
    assert (code, "would be scored" in out, "waits for the first screenshot" in out) == (0, True, True)
    code, out, _ = run(capsys, *nightly, "status")
    assert (code, states(out)) == (0, {"2026-11-23": "owed", "2026-11-24": "owed"})
    code, out, _ = run(capsys, *nightly, "--print-config")
    assert (code, yaml.safe_load(out)["look_back_days"]) == (0, 2)
    assert not (tmp_path / "out").exists()


def test_sigterm_keeps_what_is_committed_and_the_next_start_goes_on(tmp_path, small_models):
    write_images(tmp_path / "in" / "2026-11-24", 2400)  # some seconds of work on any machine
    config = write_config(tmp_path, small_models, look_back_days=1, score={"num_threads": 1})
    command = [sys.executable, "-m", "cnn_ray.cli", "nightly", "--config", str(config), "--today", "2026-11-25"]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    partition = tmp_path / "out/date=2026-11-24/model=small/version=1"
    deadline = time.monotonic() + 90
    while not list(partition.glob("part-*")):
        assert time.monotonic() < deadline
        assert first.poll() is None, first.communicate()
        time.sleep(0.01)
    status = [*command, "status"]
    shown = subprocess.run(status, capture_output=True, text=True, timeout=90, check=False)
    assert states(shown.stdout) == {"2026-11-24": "running"}, shown
    first.send_signal(signal.SIGTERM)
    _, err = first.communicate(timeout=60)
    assert first.returncode == 130, err
    assert "Interrupted. Run the same command to continue." in err
    assert json.loads((tmp_path / "out/_nightly.json").read_text())["models"]["small"]["last_call"]["exit_code"] == 130
    kept = {p: p.stat().st_mtime_ns for p in partition.glob("part-*")}
    assert 0 < len(kept) < 600
    second = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert (second.returncode, states(second.stdout)) == (0, {"2026-11-24": "done"}), second
    assert all(p.stat().st_mtime_ns == stamp for p, stamp in kept.items())
    assert outputs.read(str(partition)).num_rows == 2400


def test_jobs_nightly_is_the_verb(tmp_path, small_models):
    write_images(tmp_path / "in" / "2026-11-24", 2)
    config = write_config(tmp_path, small_models, look_back_days=1)
    shutil.copytree(
        JOBS.parent / "cnn_ray", tmp_path / "work" / "cnn_ray", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(JOBS, tmp_path / "work" / "jobs")
    command = [sys.executable, "jobs/nightly.py", "--config", str(config), "--today", "2026-11-25"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd=tmp_path / "work", env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, states(done.stdout)) == (0, {"2026-11-24": "done"}), done


def test_the_example_is_a_configuration():
    config = build_config(NightlyConfig, load_yaml(JOBS / "nightly.yaml"))
    assert (config.order, config.wait_for_marker) == ("newest", "_SUCCESS")


def test_prune_wants_days(capsys, tmp_path):
    for arguments in ((), ("--keep-days", "0"), ("--keep-days", "many")):
        code, _, err = run(capsys, "runs", "prune", tmp_path, *arguments)
        assert (code, "keep-days" in err) == (2, True)
    code, out, _ = run(capsys, "runs", "prune", tmp_path, "--keep-days", "1")
    assert (code, "No partition" in out) == (0, True)
