"""A cluster that has no worker grows for a queued score job and shrinks after it: Ray's autoscaler (v2) with its fake
provider, whose nodes are raylets on this machine, and node types as cluster.yaml names them."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
import yaml
from factories import write_images

from cnn_ray import outputs

pytestmark = pytest.mark.slow
RAY = Path(sys.executable).with_name("ray")
CLUSTER = Path(__file__).parents[2] / "cluster.yaml"
HEAD_ID = "f" * 51 + "00000"
IDLE_MINUTES = 0.15


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def descendants(pid: int) -> list[int]:
    lists = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    children = [int(child) for text in lists for child in text.split()]
    return children + [below for child in children for below in descendants(child)]


def fake_config(gcs_address: str) -> dict:
    """cluster.yaml's CPU workers, two CPUs and two nodes at most, on the fake provider."""
    types = yaml.safe_load(CLUSTER.read_text())["available_node_types"]
    workers = {
        name: {"resources": {"CPU": 2}, "node_config": {}, "min_workers": types[name]["min_workers"], "max_workers": 2}
        | {"priority": types[name]["priority"]}
        for name in ("cpu_decode_on_demand", "cpu_decode_spot")
    }
    head = {"ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    provider = {  # not as "fake_multinode": the defaults of that are not in Ray's wheel
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "disable_node_updaters": True,
        "gcs_address": gcs_address,
        "launch_multiple": True,
        "head_node_id": HEAD_ID,
    }
    return {
        "cluster_name": "fake",
        "max_workers": 2,
        "idle_timeout_minutes": IDLE_MINUTES,
        "provider": provider,
        "available_node_types": workers | head,
        "head_node_type": "ray.head.default",
        "auth": {},
        "file_mounts": {},
        "cluster_synced_files": [],
        "file_mounts_sync_continuously": False,
        "rsync_exclude": [],
        "rsync_filter": [],
        "initialization_commands": [],
        **{f"{kind}_{what}_commands": [] for kind in ("head", "worker") for what in ("setup", "start_ray")},
        "setup_commands": [],
    }


@pytest.fixture
def cluster(tmp_path):
    """(job server, GCS address) of a head node without CPUs whose autoscaler may add workers."""
    port, dashboard = free_port(), free_port()
    ip = socket.gethostbyname(socket.gethostname())
    (tmp_path / "fake.json").write_text(json.dumps(fake_config(f"{ip}:{port}")))
    environment = {**os.environ, "PATH": f"{RAY.parent}{os.pathsep}{os.environ['PATH']}"}
    environment |= {
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "disabled",
        "RAY_FAKE_CLUSTER": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    }
    command = [RAY, "start", "--head", "--block", f"--node-ip-address={ip}", f"--port={port}", "--num-cpus=0"]
    command += [f"--autoscaling-config={tmp_path}/fake.json", f"--dashboard-port={dashboard}"]
    command += ["--include-dashboard=true", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}"]
    with (tmp_path / "head.log").open("w") as log:
        process = subprocess.Popen([str(c) for c in command], env=environment, stdout=log, stderr=log)
    try:
        yield f"http://127.0.0.1:{dashboard}", environment
    finally:
        family = descendants(process.pid)
        process.terminate()
        process.wait(60)
        for pid in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def workers(address: str) -> int:
    """Living nodes beside the head, -1 where nobody answers yet."""
    try:
        with urllib.request.urlopen(f"{address}/api/v0/nodes?detail=true", timeout=10) as answer:
            rows = json.load(answer)["data"]["result"]["result"]
    except (OSError, KeyError, ValueError):
        return -1
    return sum(row["state"] == "ALIVE" and not row["is_head_node"] for row in rows)


def until(condition, what: str, deadline_s: float = 120):
    deadline = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.3)


def test_nodes_come_for_a_queued_job_and_go_after_it(cluster, tmp_path, small_models):
    address, environment = cluster
    until(lambda: workers(address) == 0, "the head does not answer")
    write_images(tmp_path / "in", 40)
    (tmp_path / "night.yaml").write_text(
        f"model: small@1\nmodels_uri: {small_models}\ninput_uri: {tmp_path}/in\noutput_uri: {tmp_path}/out\n"
        "shard_size: 4\nprecision: f32\n"
    )
    command = [sys.executable, "-m", "cnn_ray.cli", "submit", "score", "--config", str(tmp_path / "night.yaml")]
    command += ["--address", address]
    most = 0
    job = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.monotonic() + 240
    while job.poll() is None:
        assert time.monotonic() < deadline, "the job does not end"
        most = max(most, workers(address))
        time.sleep(0.3)
    said = job.communicate()[0]
    assert job.returncode == 0, said
    assert 1 <= most <= 2
    assert outputs.read(f"{tmp_path}/out/model=small/version=1").num_rows == 40
    until(lambda: workers(address) == 0, "idle workers stay")
