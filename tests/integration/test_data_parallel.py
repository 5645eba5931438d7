"""Proofs about the data-parallel loop with real processes: two ranks against one, and a rank that stalls.

All numerical scenarios share one start of three processes, because importing TensorFlow takes longer than they do.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cnn_ray.train_loop import TIMINGS

WORKER = Path(__file__).with_name("data_parallel_worker.py")
ROOT = WORKER.parents[2]
NUMERICAL = ("agree", "exact", "noisy", "uneven", "callbacks", "chief_stops", "resume", "frozen")
CONFIGURED = ("weighted", "scheduled", "features", "logs")
REPLICAS = ("exact", "uneven", "callbacks", "agree")
START_S = 240


@dataclass(frozen=True)
class Ended:
    """What a rank ended with."""

    weights: list[np.ndarray]
    result: dict[str, Any]
    folder: Path

    @property
    def history(self) -> list[dict[str, Any]]:
        return [{k: v for k, v in logs.items() if k not in TIMINGS} for logs in self.result["history"]]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(out: Path, ranks: int, scenarios: tuple[str, ...], **environment: str) -> list[subprocess.Popen[bytes]]:
    addresses = [f"127.0.0.1:{free_port()}" for _ in range(ranks)]
    processes = []
    for rank in range(ranks):
        env = {
            **os.environ,
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            **environment,
        }
        env.pop("TF_CONFIG", None)
        if ranks > 1:
            task = {"type": "worker", "index": rank}
            env["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})
        with (out / f"log_{rank}_of_{ranks}").open("wb") as log:
            command = [sys.executable, "-u", str(WORKER), str(out), *scenarios]
            processes.append(subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT))
    return processes


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(scenario, rank, ranks) -> what it ended with."""
    out = tmp_path_factory.mktemp("ranks")
    replicas = out / "replicas"
    replicas.mkdir()
    scenarios = NUMERICAL + CONFIGURED
    processes = start(out, 2, scenarios) + start(out, 1, scenarios)
    processes += start(replicas, 1, REPLICAS, LOGICAL_DEVICES="2")
    try:
        codes = [process.wait(timeout=START_S) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join(f"{path.name}:\n{path.read_text()[-1500:]}" for path in sorted(out.rglob("log_*_of_*")))
    assert codes == [0, 0, 0, 0], logs

    def read(scenario: str, rank: int, ranks: int, *, below: str = "") -> Ended:
        folder = out / below / f"{scenario}_{rank}_of_{ranks}"
        with np.load(folder / "weights.npz") as arrays:
            weights = [arrays[name] for name in arrays.files]
        return Ended(weights, json.loads((folder / "result.json").read_text()), folder)

    return read


@pytest.mark.parametrize("scenario", [name for name in NUMERICAL + CONFIGURED if name != "agree"])
def test_both_ranks_end_with_the_same_bits_and_logs(ended, scenario):
    first, second = ended(scenario, 0, 2), ended(scenario, 1, 2)
    assert len(first.weights) == len(second.weights) > 0
    assert all(np.array_equal(a, b) for a, b in zip(first.weights, second.weights, strict=True))
    assert first.history == second.history


@pytest.mark.parametrize("scenario", ["exact", "uneven", "callbacks", "chief_stops", "weighted"])
def test_two_workers_of_16_end_like_one_of_32(ended, scenario):
    """No dropout, no BatchNorm, SGD: what is left is the order of float32 additions."""
    pair, single = ended(scenario, 0, 2), ended(scenario, 0, 1)
    for a, b in zip(pair.weights, single.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [h["loss"] for h in pair.history] == pytest.approx([h["loss"] for h in single.history], abs=1e-5)
    assert [h["val_accuracy"] for h in pair.history] == [h["val_accuracy"] for h in single.history]


@pytest.mark.parametrize("scenario", ["exact", "uneven", "callbacks"])
def test_two_replicas_in_one_process_end_like_one(ended, scenario):
    """Two logical CPU devices in one worker: batches are cut, an odd one is filled up at weight 0."""
    pair, single = ended(scenario, 0, 1, below="replicas"), ended(scenario, 0, 1)
    for a, b in zip(pair.weights, single.weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert [h["loss"] for h in pair.history] == pytest.approx([h["loss"] for h in single.history], abs=1e-5)
    assert [h["val_accuracy"] for h in pair.history] == [h["val_accuracy"] for h in single.history]


@pytest.mark.parametrize("ranks", [1, 2])
def test_schedules_and_plateaus_go_on_where_they_were(ended, ranks):
    result = ended("scheduled", 0, ranks).result
    assert result["equal"] == [True, True], "resumed in the cosine, and between two reductions"
    rates = [logs["learning_rate"] for logs in result["history"]]
    assert rates[:5] == pytest.approx(result["expected"], rel=1e-5, abs=1e-9)
    assert rates[1] > rates[2] > rates[3] > rates[4]
    assert rates[4] == pytest.approx(0, abs=1e-4)
    assert len(set(rates[5:])) >= 3, "ReduceLROnPlateau lowered it twice"


def test_a_rate_does_not_depend_on_the_number_of_workers(ended):
    pair, single = ended("scheduled", 0, 2), ended("scheduled", 0, 1)
    assert [h["learning_rate"] for h in pair.history] == [h["learning_rate"] for h in single.history]


@pytest.mark.parametrize("ranks", [1, 2])
def test_cached_features_train_the_same_head(ended, ranks):
    result = ended("features", 0, ranks).result
    assert result["gap"] < 1e-5
    assert result["losses"][0] == pytest.approx(result["losses"][1], abs=1e-5)


@pytest.mark.parametrize("ranks", [1, 2])
def test_logs_are_written_once_and_a_resumed_run_drops_what_it_trains_again(ended, ranks):
    run = ended("logs", 0, ranks).folder / "run"
    lines = (run / "log.csv").read_text().splitlines()
    assert lines[0].startswith("epoch,")
    assert [line.split(",")[0] for line in lines[1:]] == ["0", "1", "2", "3"]
    assert list((run / "tensorboard").rglob("events.out.tfevents.*"))


def test_training_learns(ended):
    history = ended("noisy", 0, 2).history
    assert history[-1]["loss"] < 0.3 * history[0]["loss"]


def test_uneven_shards_give_the_metrics_that_numpy_computes(ended):
    """37 training rows, one validation row: rank 1 holds no validation row at all."""
    from data_parallel_worker import images

    pair = ended("uneven", 0, 2)
    assert [ended("uneven", rank, 2).result["held"] for rank in (0, 1)] == [[19, 1], [18, 0]]
    scores = np.load(pair.folder / "scores.npy")[37:]
    labels = images(38)[1][37:]
    last = pair.history[-1]
    assert last["val_loss"] == pytest.approx(-np.log(scores[np.arange(1), labels]).mean(), abs=1e-5)
    assert last["val_accuracy"] == (scores.argmax(1) == labels).mean()
    assert last["accuracy"] * 37 == pytest.approx(round(last["accuracy"] * 37))


def test_keras_callbacks_agree_and_only_rank_0_writes(ended):
    pair = [ended("callbacks", rank, 2) for rank in (0, 1)]
    rates = [logs["learning_rate"] for logs in pair[1].history]
    assert len(rates) == 5, "EarlyStopping(patience=4) after the best first epoch"
    assert rates == pytest.approx([0.05, 0.05, 0.025, 0.0125, 0.00625]), "ReduceLROnPlateau(patience=1, factor=0.5)"
    lines = (pair[0].folder / "log.csv").read_text().splitlines()
    assert len(lines) == 6
    assert not (pair[1].folder / "log.csv").exists()


def test_what_only_rank_0_decides_holds_for_all(ended):
    other = ended("chief_stops", 1, 2)
    assert [logs["learning_rate"] for logs in other.history] == pytest.approx([0.1, 0.01])


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_training_ends_like_an_undisturbed_one(ended, ranks):
    """Dropout, flips, BatchNorm, Adam, two phases, EarlyStopping with its best weights: equal to the last bit."""
    result = ended("resume", 0, ranks).result
    assert [logs["phase"] for logs in result["history"]] == ["train"] * 3 + ["fine_tune"] * 3
    assert result["equal"] == [True, True, True], "from mid-phase, from the end of a phase, from the second phase"


def test_only_the_head_trains_on_a_frozen_backbone_and_batchnorm_statistics_never_move(ended):
    result = ended("frozen", 0, 2).result
    assert {path.split("/")[0] for path in result["head"]} == {"scores"}
    kernels = [path for path in result["moved"] if "conv2d" in path]
    assert kernels, result["moved"]
    assert not [path for path in result["moved"] if "batch_normalization" in path], result["moved"]


def test_an_error_of_one_rank_is_raised_by_all(ended):
    for rank in (0, 1):
        assert ended("agree", rank, 2).result["raised"] == ["DataError", "Expected a ä. Received: b."]


def test_a_stalled_peer_ends_in_an_error_and_the_process_exits(tmp_path):
    first, second = start(tmp_path, 2, ("stall",), COLLECTIVE_TIMEOUT_S="6")
    try:
        deadline = time.monotonic() + START_S
        while not (tmp_path / "stall_1_of_2" / "asleep").exists():
            assert time.monotonic() < deadline, (tmp_path / "log_1_of_2").read_text()
            assert first.poll() is None, (tmp_path / "log_0_of_2").read_text()
            time.sleep(0.1)
        since = time.monotonic()
        code = first.wait(timeout=60)
        waited_s = time.monotonic() - since
    finally:
        for process in (first, second):
            process.send_signal(signal.SIGKILL)
    log = (tmp_path / "log_0_of_2").read_text()
    assert code == 75, log
    assert "TrainingError: Expected all workers to answer within 6 s." in log
    assert 4 < waited_s < 45
