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
