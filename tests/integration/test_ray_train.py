"""Training through Ray Train: two workers, live progress, checkpoints, a published model, errors in one sentence."""

from __future__ import annotations

import errno
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
from PIL import Image

from cnn_ray.config import DataConfig, ModelDefinition, PhaseConfig, TrainConfig, build_config, load_yaml
from cnn_ray.errors import ConfigError, DataError, TrainingError
from cnn_ray.train import run_training
from cnn_ray.train_loop import TIMINGS
from cnn_ray.train_ray import explain_failure, failed_again

ROOT = Path(__file__).parents[2]
EPOCHS = 3


def draw_classes(root: Path, count: int) -> Path:
    """Two folders of PNGs: warm and cold noise, and one file that is no image."""
    rng = np.random.default_rng(0)
    for label, channel in (("cold", 2), ("warm", 0)):
        (root / label).mkdir(parents=True)
        for k in range(count):
            pixels = rng.integers(0, 150, (24, 32, 3))
            pixels[:, :, channel] += 90
            Image.fromarray(pixels.astype(np.uint8)).save(root / label / f"{k:03}.png")
    (root / "cold" / "damaged.png").write_bytes(b"no image")
    return root


def configuration(folder: Path, **changes: Any) -> TrainConfig:
    settings: dict[str, Any] = {
        "name": "small",
        "models_uri": str(folder / "models"),
        "runs_uri": str(folder / "runs"),
        "data": DataConfig(uri=str(folder / "images")),
        "model": ModelDefinition(input_size_px=24),
        "train": PhaseConfig(epochs=EPOCHS, learning_rate=0.01),
        "batch_size": 16,
        "num_workers": 2,
    }
    return TrainConfig(**settings | changes)


@pytest.fixture(scope="module")
def local_ray():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
        ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def trained(local_ray, tmp_path_factory):
    """(folder, result, [(time, logs)], end time) of one training with two workers."""
    folder = tmp_path_factory.mktemp("training")
    draw_classes(folder / "images", 30)
    epochs: list[tuple[float, dict[str, Any]]] = []
    result = run_training(configuration(folder), on_epoch=lambda logs: epochs.append((time.monotonic(), logs)))
    return folder, result, epochs, time.monotonic()


def test_a_model_version_is_published_and_answers(trained):
    from cnn_ray.artifact import load_artifact, verify_artifact

    folder, result, _, _ = trained
    assert result.reference == "small@1"
    artifact = load_artifact(str(folder / "models"), "small@1")
    assert artifact.uri == result.artifact_uri
    assert artifact.labels == ("cold", "warm")
    assert artifact.positive_label == "warm"
    assert verify_artifact(artifact) > 3
    assert artifact.description.training["metrics"]["val_accuracy"] == result.metrics["val_accuracy"]
    assert artifact.description.engines["openvino"]["f32"].accuracy >= 0.9, "the published numbers are the trained ones"


def test_epochs_are_told_while_the_training_runs(trained):
    _, result, epochs, end = trained
    assert [logs["epoch"] for _, logs in epochs] == [1, 2, 3]
    assert {k: v for k, v in epochs[-1][1].items() if k not in TIMINGS} == result.metrics
    assert end - epochs[0][0] > 1, "the first epoch was told only at the end"


def test_the_run_keeps_the_last_checkpoint_and_is_marked_finished(trained):
    folder, result, _, _ = trained
    run = Path(result.run_uri)
    assert run.parent == folder / "runs"
    positions = [json.loads(path.read_text()) for path in run.glob("checkpoint_*/position.json")]
    assert [position["epoch"] for position in positions] == [EPOCHS]
    assert json.loads((run / "_finished.json").read_text()) == {"reference": "small@1"}


def test_the_next_run_of_the_same_command_has_its_own_folder(trained):
    from cnn_ray.dataset import read_labelled_set
    from cnn_ray.train import _run_name

    folder, result, _, _ = trained
    config = configuration(folder).model_copy(update={"num_workers": 1, "max_failures": 0})
    labelled = read_labelled_set(DataConfig(uri=str(folder / "images")))
    name = _run_name(configuration(folder), labelled)
    assert name == f"{Path(result.run_uri).name[:-2]}-2"
    assert _run_name(config, labelled) == name, "a crashed run may go on with another number of workers"
    assert _run_name(config.model_copy(update={"seed": 1}), labelled) != name


REFUSED = {
    "no data": ({"data": DataConfig(uri="/no/such/folder")}, "no/such/folder"),
    "architecture": ({"model": ModelDefinition(architecture="LeNet")}, "Expected a known architecture"),
    "weights": ({"model": ModelDefinition(architecture="MobileNetV2", weights="gone.weights.h5")}, "gone.weights.h5"),
    "positive label": ({"positive_label": "hot"}, "Received: 'hot'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_be_known_before_is_refused_before_ray_starts(tmp_path, monkeypatch, name):
    import ray

    draw_classes(tmp_path / "images", 12)
    changes, sentence = REFUSED[name]
    monkeypatch.setattr(ray, "init", lambda **_: pytest.fail("Ray was started"))
    with pytest.raises(Exception, match=sentence) as refused:
        run_training(configuration(tmp_path, **changes))
    assert refused.value.exit_code == 2  # pyright: ignore[reportAttributeAccessIssue]


def test_failures_of_workers_reach_the_user_as_one_sentence():
    from ray.train import TrainingFailedError  # noqa: F401 - imports Ray Train before its exceptions
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    ours = WorkerGroupError("text", {1: RuntimeError("collateral"), 0: DataError("Expected x. Received: y. Next: z.")})
    assert isinstance(explain_failure(ours, "runs/a"), DataError)
    lost = explain_failure(ControllerError(ConnectionError("Traceback ...\n  peer gone")), "runs/a")
    assert isinstance(lost, TrainingError)
    assert "ConnectionError: peer gone" in str(lost)
    assert "runs/a" in str(lost)


def test_an_error_of_the_program_is_a_bug_and_not_a_reason_to_try_again():
    from ray.train import TrainingFailedError  # noqa: F401 - imports Ray Train before its exceptions
    from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

    bug = NameError("name 'tensorflow' is not defined")
    waited = TrainingError("Expected all workers to answer within 6 s. Received: x. Next: y.")
    assert explain_failure(WorkerGroupError("text", {0: waited, 1: bug}), "runs/a") is bug
    assert explain_failure(ControllerError(bug), "runs/a") is bug
    memory = explain_failure(WorkerGroupError("text", {0: MemoryError()}), "runs/a")
    assert isinstance(memory, ConfigError)
    full = explain_failure(WorkerGroupError("text", {0: OSError(errno.ENOSPC, "No space left on device")}), "runs/a")
    assert "free space" in str(full)


def test_workers_that_die_alike_after_each_restart_are_no_reason_to_try_again():
    from ray.exceptions import ActorDiedError
    from ray.train import TrainingFailedError  # noqa: F401 - imports Ray Train before its exceptions
    from ray.train.v2.api.exceptions import WorkerGroupError

    died = WorkerGroupError("text", {0: ActorDiedError()})
    assert explain_failure(died, "runs/a").exit_code == 75  # pyright: ignore[reportAttributeAccessIssue]
    assert explain_failure(died, "runs/a", again=True).exit_code == 2  # pyright: ignore[reportAttributeAccessIssue]

    def lines(*events: dict[str, Any]) -> list[str]:
        return [json.dumps(event) for event in events]

    first, second = {"failed": {"0": "ActorDiedError: pid 12"}}, {"failed": {"1": "ActorDiedError: pid 345"}}
    assert failed_again(lines({"epoch": 1}, first, second))
    assert not failed_again(lines(first, {"epoch": 2}, second))
    assert not failed_again(lines(first))
    assert not failed_again(lines(first, {"failed": {"0": "OutOfMemoryError: x"}}))


def test_the_example_configuration_is_valid():
    config = build_config(TrainConfig, load_yaml(ROOT / "jobs" / "train_screens_mobilenetv2.yaml"))
    assert config.model.architecture == "MobileNetV2"
    assert config.fine_tune is not None
    with pytest.raises(ConfigError, match="did you mean"):
        build_config(TrainConfig, {**config.model_dump(), "batchsize": 3})


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_training_ends_the_same(trained, tmp_path):
    """kill -9 of a worker after the second epoch: the group restarts from the last checkpoint."""
    folder, undisturbed, _, _ = trained
    config = configuration(folder, models_uri=str(tmp_path / "models"), runs_uri=str(tmp_path / "runs"))
    killed = threading.Event()

    def kill_one(logs: dict[str, Any]) -> None:
        if logs["epoch"] == 2 and not killed.is_set():
            os.kill(own_train_workers()[0], signal.SIGKILL)
            killed.set()

    result = run_training(config, on_epoch=kill_one)
    assert killed.is_set()
    assert result.metrics["epoch"] == EPOCHS
    assert result.metrics["val_loss"] == pytest.approx(undisturbed.metrics["val_loss"], abs=1e-6)


def own_train_workers() -> list[int]:
    """Process ids of Ray Train workers below this process: other Rays on the machine are not ours to kill."""

    def ours(pid: int) -> bool:
        while pid > 1 and pid != os.getpid():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid == os.getpid()

    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if b"RayTrainWorker" in path.read_bytes() and ours(int(path.parent.name)):
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_ctrl_c_stops_and_the_same_command_goes_on(tmp_path):
    draw_classes(tmp_path / "images", 30)
    config = configuration(tmp_path, num_workers=1, train=PhaseConfig(epochs=40, learning_rate=0.001))
    (tmp_path / "c.yaml").write_text(json.dumps(json.loads(config.model_dump_json())))
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), "--config", str(tmp_path / "c.yaml")]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert first.stderr is not None
    for line in first.stderr:
        if "epoch 3:" in line:
            first.send_signal(signal.SIGINT)
            break
    rest = first.stderr.read()
    assert first.wait(timeout=60) == 130, rest
    assert "Run the same command to continue" in rest
    second = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert second.returncode == 0, second.stderr
    assert "epoch 40:" in second.stderr
    assert "epoch 2:" not in second.stderr
