"""Trainings that are killed in the middle of an epoch end with the very weights of an undisturbed one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_ray_train import ROOT, configuration, draw_classes, own_train_workers

from cnn_ray.config import PhaseConfig, TrainConfig
from cnn_ray.train import run_training

pytestmark = pytest.mark.slow

EPOCHS = 3
PATHS = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(__file__).parent), str(ROOT / "tests")])}
LEAST_EPOCH_S = 1.5
"""The driver hears of an epoch at most 0.7 s after its end: a kill right then is in the middle of the next."""


def long_epochs(folder: Path, images: Path) -> TrainConfig:
    from cnn_ray.config import DataConfig

    return configuration(
        folder,
        data=DataConfig(uri=str(images)),
        train=PhaseConfig(epochs=EPOCHS, learning_rate=0.001),
        batch_size=2,
    )


def trained_weights(folder: Path) -> list[np.ndarray]:
    """The arrays of the published weights file, by name."""
    import h5py

    found: list[tuple[str, np.ndarray]] = []

    def keep(name: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset):
            found.append((name, np.asarray(node)))

    with h5py.File(folder / "models" / "small" / "1" / "model.weights.h5") as file:
        file.visititems(keep)
    return [array for _, array in sorted(found, key=lambda pair: pair[0])]


def same_bits(left: Path, right: Path) -> bool:
    pairs = list(zip(trained_weights(left), trained_weights(right), strict=True))
    return len(pairs) > 3 and all(np.array_equal(a, b) for a, b in pairs)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(folder of the run, folder of the images), trained with two workers."""
    folder = tmp_path_factory.mktemp("undisturbed")
    images = draw_classes(folder / "images", 400)
    run_training(long_epochs(folder, images))
    return folder, images


def test_a_rank_killed_in_mid_epoch_changes_no_bit(undisturbed, tmp_path):
    folder, images = undisturbed
    told: list[tuple[float, int, float]] = []
    killed_at: list[float] = []
    lock = threading.Lock()

    def kill_one(logs: dict[str, Any]) -> None:
        with lock:
            told.append((time.monotonic(), logs["epoch"], logs["duration_s"]))
            if not killed_at:
                os.kill(own_train_workers()[-1], signal.SIGKILL)
                killed_at.append(time.monotonic())

    run_training(long_epochs(tmp_path, images), on_epoch=kill_one)
    assert told[0][2] > LEAST_EPOCH_S, "too short to be killed in the middle"
    assert told[1][0] - killed_at[0] > told[1][2] + 2, "the group was not restarted"
    assert [epoch for _, epoch, _ in told][-1] == EPOCHS
    assert same_bits(folder, tmp_path)


def test_a_killed_driver_is_resumed_by_its_run_and_changes_no_bit(undisturbed, tmp_path):
    folder, images = undisturbed
    (tmp_path / "c.json").write_text(long_epochs(tmp_path, images).model_dump_json())
    command = [sys.executable, "-m", "cnn_ray.cli", "train"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
    first = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(tmp_path / "c.json")],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert first.stderr is not None
    for line in first.stderr:
        if "epoch 1:" in line:
            first.kill()
            break
    assert first.wait(timeout=60) == -signal.SIGKILL
    (run,) = (tmp_path / "runs").glob("small-*")
    assert json.loads((run / "_config.json").read_text())["name"] == "small"
    second = subprocess.run(
        [*command, "--resume", str(run)], capture_output=True, text=True, timeout=300, env=environment
    )
    assert second.returncode == 0, second.stderr
    assert "epoch 1:" not in second.stderr
    assert f"epoch {EPOCHS}:" in second.stderr
    assert same_bits(folder, tmp_path)


def test_checkpoints_on_s3_carry_a_training_over_a_killed_rank(undisturbed, tmp_path, s3_uri):
    """Runs and models in a bucket: the group restarts from a checkpoint there, with the same bits at the end."""
    from cnn_ray.storage import open_store

    folder, images = undisturbed
    config = long_epochs(tmp_path, images)
    config = config.model_copy(update={"runs_uri": f"{s3_uri}/runs", "models_uri": f"{s3_uri}/models"})
    told: list[int] = []

    def kill_one(logs: dict[str, Any]) -> None:
        told.append(logs["epoch"])
        if len(told) == 1:
            os.kill(own_train_workers()[-1], signal.SIGKILL)

    result = run_training(config, on_epoch=kill_one)
    assert told[-1] == EPOCHS
    assert result.run_uri.startswith(s3_uri)
    store = open_store(s3_uri)
    keys = store.keys("runs/")
    assert [key for key in keys if "checkpoint_" in key and key.endswith("position.json")]
    assert [key for key in keys if key.endswith("/_split.parquet")]
    target = tmp_path / "models" / "small" / "1"
    target.mkdir(parents=True)
    store.get_to_file("models/small/1/model.weights.h5", target / "model.weights.h5")
    assert same_bits(folder, tmp_path)


def test_elastic_training_goes_on_with_fewer_workers_and_keeps_the_global_batch(undisturbed, tmp_path):
    """Two workers are wanted and one will do; the cluster has room for one. The global batch stays what it was."""
    folder, images = undisturbed
    config = long_epochs(tmp_path, images).model_copy(update={"min_workers": 1, "num_workers": 2})
    command = [sys.executable, "-c", ELASTIC, config.model_dump_json()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=PATHS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "workers 1" in done.stdout
    for a, b in zip(trained_weights(folder), trained_weights(tmp_path), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


ELASTIC = """
import sys, threading, time
import ray
from test_ray_train import own_train_workers
from cnn_ray.config import TrainConfig
from cnn_ray.train import run_training

ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
config = TrainConfig.model_validate_json(sys.argv[1])
most = []
run_training(config, on_epoch=lambda logs: most.append(len(own_train_workers())))
print("workers", max(most))
"""


def test_a_killed_driver_leaves_no_process_behind(tmp_path):
    images = draw_classes(tmp_path / "images", 400)
    (tmp_path / "c.json").write_text(long_epochs(tmp_path, images).model_dump_json())
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(tmp_path / "c.json")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "CNN_RAY_TEST_MARK": str(tmp_path)},
    )
    assert driver.stderr is not None
    for line in driver.stderr:
        if "epoch 1:" in line:
            driver.kill()
            break
    driver.wait(timeout=60)
    deadline = time.monotonic() + 90
    while (left := marked(str(tmp_path))) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not left, left


def marked(mark: str) -> list[str]:
    """Command lines of the processes that inherited the driver's environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"CNN_RAY_TEST_MARK={mark}".encode() in path.read_bytes():
                found.append((path.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
        except OSError:
            continue
    return found
