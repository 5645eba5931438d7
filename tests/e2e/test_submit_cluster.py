"""`cnn-ray submit` against a real cluster of two nodes with token authentication on."""

import contextlib
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import SimpleNamespace

import pytest
from factories import write_images

from cnn_ray import outputs

pytestmark = pytest.mark.slow
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def descendants(pid: int) -> list[int]:
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for text in lists for child in text.split()]
    return children + [below for child in children for below in descendants(child)]


def status_of(address: str, token: str | None = None) -> int:
    """What the job server answers to a request with this token."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    try:
        return urllib.request.urlopen(
            urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=10
        ).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A head without CPUs, as cluster.yaml has it, and a worker node; both end with the test."""
    work = tmp_path_factory.mktemp("cluster")
    token = secrets.token_hex(32)
    (work / "token").write_text(token)
    (work / "token").chmod(0o600)
    environment = {
        **os.environ,
        "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}",
        "RAY_USAGE_STATS_ENABLED": "0",
    }
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(work / "token")}
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_TOKEN"):
        environment.pop(name, None)
    port, dashboard = free_port(), free_port()
    head = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=0", f"--dashboard-port={dashboard}"]
    head += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    worker = [RAY, "start", "--block", f"--address=127.0.0.1:{port}", "--num-cpus=4"]
    processes, address = [], f"http://127.0.0.1:{dashboard}"
    with contextlib.ExitStack() as stack:
        for name, command in (("head", head), ("worker", worker)):
            log = stack.enter_context((work / f"{name}.log").open("w"))
            command = [str(part) for part in (*command, f"--dashboard-agent-listen-port={free_port()}")]
            processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True))
            deadline = time.monotonic() + 120
            while status_of(address, token) != 200:
                assert time.monotonic() < deadline, (work / f"{name}.log").read_text()
                time.sleep(0.5)
        yield SimpleNamespace(address=address, environment=environment, token=token)
        family = [pid for process in processes for pid in descendants(process.pid)]
        for process in reversed(processes):
            process.terminate()
            process.wait(60)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def cli(cluster, *arguments, **changes) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "cnn_ray.cli", "submit", *map(str, arguments), "--address", cluster.address]
    environment = {name: value for name, value in (cluster.environment | changes).items() if value is not None}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def submitted(done: subprocess.CompletedProcess) -> str:
    assert "Submitted: " in done.stdout, done.stdout + done.stderr
    return done.stdout.partition("Submitted: ")[2].split()[0]


def test_a_night_from_submission_to_its_exit_code(cluster, tmp_path, small_models):
    write_images(tmp_path / "in", 20, bad=1)
    night = tmp_path / "night.yaml"
    night.write_text(
        f"model: small@1\nmodels_uri: {small_models}\ninput_uri: {tmp_path}/in\noutput_uri: {tmp_path}/out\n"
        "shard_size: 8\nprecision: f32\n"
    )
    command = ("score", "--config", night, "--date", "2026-11-23")
    done = cli(cluster, *command, "--max-quarantine-rate", "0.1", "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    name = submitted(done)
    assert "Parquet: " in done.stdout
    uri = f"{tmp_path}/out/date=2026-11-23/model=small/version=1"
    assert outputs.Partition(uri).read_manifest(1).runner == "ray"
    assert outputs.read(uri).num_rows == 20

    again = cli(cluster, *command)
    assert (again.returncode, f"Already submitted: {name} is SUCCEEDED" in again.stdout) == (0, True)
    limit = cli(cluster, *command, "--output-uri", f"{tmp_path}/out2", "--max-quarantine-rate", "0")
    assert limit.returncode == 4, limit.stdout + limit.stderr
    second = cli(cluster, *command, "--attempt", "2", "--follow")
    assert second.returncode == 0
    assert "Already scored" in second.stdout
    listed = cli(cluster, "list").stdout
    assert all(word in listed for word in (name, "SUCCEEDED", "FAILED", f"{tmp_path}/out2"))
    assert "Parquet: " in cli(cluster, "logs", name).stdout
    assert cluster.token not in done.stdout + done.stderr + again.stdout + listed


def test_the_nights_of_a_week(cluster, tmp_path, small_models):
    write_images(tmp_path / "in" / "2026-11-23", 6)
    write_images(tmp_path / "in" / "2026-11-24", 4)
    path = tmp_path / "nightly.yaml"
    path.write_text(
        f"score: {{model: small@1, models_uri: {small_models}, input_uri: '{tmp_path}/in/{{date}}', precision: f32,\n"
        f"  output_uri: {tmp_path}/out, runner: local}}\nlook_back_days: 2\n"
    )
    done = cli(cluster, "nightly", "--config", path, "--today", "2026-11-25", "--follow")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    for day, rows in (("2026-11-23", 6), ("2026-11-24", 4)):
        assert outputs.read(f"{tmp_path}/out/date={day}/model=small/version=1").num_rows == rows
    again = cli(cluster, "nightly", "--config", path, "--today", "2026-11-25")
    assert "is SUCCEEDED" in again.stdout
    assert submitted(cli(cluster, "nightly", "--config", path, "--today", "2026-11-26", "--no-wait"))


def test_without_the_token_nothing_is_taken(cluster, tmp_path):
    assert status_of(cluster.address) == 401
    assert status_of(cluster.address, "0" * 64) == 403
    refused = cli(cluster, "list", RAY_AUTH_MODE="disabled")
    assert (refused.returncode, "Expected the token of the cluster" in refused.stderr) == (2, True)
    (tmp_path / "token").write_text("0" * 64)
    wrong = cli(cluster, "list", RAY_AUTH_TOKEN_PATH=str(tmp_path / "token"))
    assert (wrong.returncode, "a wrong token" in wrong.stderr) == (2, True)


def test_a_job_is_left_running_by_ctrl_c_and_stopped_by_stop(cluster, tmp_path, small_models):
    write_images(tmp_path / "in", 5)
    night = tmp_path / "night.yaml"
    night.write_text(
        f"model: small@1\nmodels_uri: {small_models}\ninput_uri: {tmp_path}/in\noutput_uri: {tmp_path}/out\n"
        "num_gpus: 1\nengine: openvino\n"  # there is no GPU, so it waits
    )
    command = [sys.executable, "-m", "cnn_ray.cli", "submit", "score", "--config", str(night), "--follow"]
    process = subprocess.Popen(
        [*command, "--address", cluster.address],
        env=cluster.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    name = process.stdout.readline().split()[-1]
    deadline = time.monotonic() + 60
    while "RUNNING" not in cli(cluster, "status", name).stdout:
        assert time.monotonic() < deadline
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, f"the job {name} goes on" in stderr) == (130, True)
    assert "RUNNING" in cli(cluster, "status", name).stdout
    assert cli(cluster, "stop", name).stdout == f"Stopping: {name}\n"
    deadline = time.monotonic() + 60
    while "STOPPED" not in cli(cluster, "status", name).stdout:
        assert time.monotonic() < deadline
