"""The jobs as a cluster runs them: a head node of our own with its job server, and `ray job submit --working-dir`."""

import base64
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import httpx
import pytest
import yaml
from factories import image_bytes, write_images

from cnn_ray import gateway, outputs
from cnn_ray.auth import add_key

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
RAY = Path(sys.executable).with_name("ray")


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for_agent(address: str) -> None:
    """Returns once a trivial job is accepted: the job server answers before the agent that runs jobs is up."""
    request = urllib.request.Request(
        f"{address}/api/jobs/", json.dumps({"entrypoint": "true"}).encode(), {"Content-Type": "application/json"}
    )
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(request, timeout=30)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def descendants(pid: int) -> list[int]:
    """All processes below this one."""
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for text in lists for child in text.split()]
    return children + [below for child in children for below in descendants(child)]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Address of the job server of a head node that this module alone uses; it ends with its process."""
    work = tmp_path_factory.mktemp("ray")
    port, dashboard = free_port(), free_port()
    path = f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"  # jobs run the node's `python`: that of this environment
    environment = {**os.environ, "PATH": path, "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
    environment[gateway.IMPORT_PATH_VARIABLE] = gateway.IMPORT_PATH  # as in cluster.yaml
    command = [RAY, "start", "--head", "--block", f"--port={port}", "--num-cpus=4", f"--dashboard-port={dashboard}"]
    command += ["--include-dashboard=true", "--dashboard-host=127.0.0.1", "--disable-usage-stats"]
    command += [f"--dashboard-agent-listen-port={free_port()}"]  # by default one for all Rays of a machine
    log = (work / "head.log").open("w")
    process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{dashboard}"
    wait_for_agent(address)
    yield address, environment
    family = descendants(process.pid)  # noted before: once `ray start` is gone, its daemons belong to nobody
    process.terminate()
    process.wait(60)
    for pid in family:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def working_dir(tmp_path_factory):
    """What a user has in the folder that is submitted: the package, the jobs, a configuration."""
    folder = tmp_path_factory.mktemp("work")
    for name in ("cnn_ray", "jobs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def submit(head, working_dir, *entrypoint) -> subprocess.CompletedProcess:
    address, environment = head
    command = [RAY, "job", "submit", "--address", address, "--working-dir", working_dir, "--", *entrypoint]
    return subprocess.run(
        [str(c) for c in command], env=environment, capture_output=True, text=True, timeout=240, check=False
    )


def test_score_job(head, working_dir, tmp_path, small_models):
    images = write_images(tmp_path / "in", 20, bad=1)
    (working_dir / "score.yaml").write_text(
        f"model: small@1\nmodels_uri: {small_models}\ninput_uri: {tmp_path}/in\noutput_uri: {tmp_path}/out\n"
        "shard_size: 8\nmax_quarantine_rate: 0.1\n"
    )
    command = ("python", "jobs/score.py", "--config", "score.yaml", "--date", "2026-11-23")
    done = submit(head, working_dir, *command)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    uri = f"{tmp_path}/out/date=2026-11-23/model=small/version=1"
    assert outputs.Partition(uri).read_manifest(1).runner == "ray"
    assert outputs.read(uri).num_rows == 20
    assert images.exists()
    again = submit(head, working_dir, *command)
    assert "Already scored" in again.stdout
    wrong = submit(head, working_dir, *command, "--model", "small@9")
    assert wrong.returncode != 0
    assert re.search(r"no artifact\.json", wrong.stdout)


def test_train_job(head, working_dir, tmp_path):
    from cnn_ray.drawn_files import write_labelled

    write_labelled(tmp_path / "labelled", 40, seed=1)
    (working_dir / "train.yaml").write_text(
        f"name: drawn\nmodels_uri: {tmp_path}/models\nruns_uri: {tmp_path}/runs\n"
        f"data: {{uri: {tmp_path}/labelled}}\nmodel: {{architecture: simple_cnn, input_size_px: 32}}\n"
        "train: {epochs: 1, learning_rate: 0.001}\n"
    )
    done = submit(head, working_dir, "python", "jobs/train.py", "--config", "train.yaml")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "Model: drawn@1" in done.stdout
    assert (tmp_path / "models/drawn/1/artifact.json").exists()


def serve_command(head, *arguments, ok: bool = True) -> str:
    """What `serve ... --address` says."""
    address, environment = head
    command = [str(RAY.with_name("serve")), *(str(a) for a in arguments), "--address", address]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0 or not ok, done.stdout + done.stderr
    return done.stdout


def serve_file(path: Path, host: str, port: int, **args) -> Path:
    """jobs/serve.yaml with other values."""
    document = yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text())
    document["http_options"] |= {"host": host, "port": port}
    document["applications"][0]["args"] |= args
    path.write_text(yaml.safe_dump(document))
    return path


def until(condition, what: str, deadline_s: float = 120):
    """The first true value of `condition`."""
    deadline = time.monotonic() + deadline_s
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: {value}"
        time.sleep(0.2)
    return value


def test_serve_deploy_follows_its_file_and_needs_keys_where_others_reach_it(head, tmp_path, small_models):
    key = add_key(str(tmp_path / "keys.json"), "tests")
    port = free_port()
    settings = {"model": "small@1", "models_uri": small_models, "precision": "f32", "num_cpus": 0.5, "max_replicas": 1}
    keys = {"api_keys_uri": str(tmp_path / "keys.json")}

    def ask(status_only: bool = False):
        try:
            answer = httpx.post(
                f"http://127.0.0.1:{port}/v1/models/small:predict",
                content=image_bytes(1),
                headers={"Content-Type": "image/png", "Authorization": f"Bearer {key}"},
                timeout=30,
            )
        except httpx.TransportError:
            return None
        return answer.status_code if status_only else answer

    path = serve_file(tmp_path / "serve.yaml", "0.0.0.0", port, **settings, **keys)
    serve_command(head, "deploy", path)
    answer = until(lambda: (a := ask()) is not None and a.status_code == 200 and a, "not answered")
    assert answer.json()["model"] == "small"
    assert httpx.post(f"http://127.0.0.1:{port}/v1/models/small:predict", content=b"{}").status_code == 401

    serve_file(path, "0.0.0.0", port, **settings, **keys, max_instances=1)
    serve_command(head, "deploy", path)
    two = {"instances": [{"b64": base64.b64encode(image_bytes(n)).decode()} for n in (1, 2)]}
    statuses: list[int | None] = []

    def updated() -> bool:
        statuses.append(ask(status_only=True))
        url = f"http://127.0.0.1:{port}/v1/models/small:predict"
        return "at most 1 instances" in httpx.post(url, json=two, headers={"Authorization": f"Bearer {key}"}).text

    until(updated, "the new setting is not there")
    assert set(statuses) == {200}, "one replica is updated without a failed request"

    serve_command(head, "shutdown", "-y")
    serve_file(path, "0.0.0.0", port, **settings)
    serve_command(head, "deploy", path)
    until(lambda: "Expected API keys for an endpoint that others reach" in serve_command(head, "status"), "not refused")
    assert ask(status_only=True) != 200
    serve_command(head, "shutdown", "-y")
