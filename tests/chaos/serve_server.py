"""A `cnn-ray serve` process for the fault runs: started as typed, looked into by /proc, redeployed from outside."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from processes import below, running
from serve_contestants import free_port, wait_until_answered

ROOT = Path(__file__).resolve().parents[2]
CLIENT = ROOT / "tests" / "bench" / "serve_client.py"
NAME = "bench"
PATH = f"/v1/models/{NAME}:predict"
REDEPLOY = """
import sys
import ray
from ray import serve
from cnn_ray.config import ServeConfig
from cnn_ray.serve import APP_NAME, build_app
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
serve.run(build_app(ServeConfig.model_validate_json(sys.argv[2])), name=APP_NAME, route_prefix="/")
"""


@dataclass(frozen=True)
class Server:
    """A running endpoint and the settings it was started with."""

    process: subprocess.Popen[bytes]
    port: int
    settings: dict[str, Any]

    @property
    def url(self) -> str:
        """Where it takes images."""
        return f"http://127.0.0.1:{self.port}{PATH}"

    def replicas(self) -> set[int]:
        """Process ids of the replicas that live now."""
        return {
            pid for pid in below(self.process.pid) if _command(pid).startswith("ray::ServeReplica:cnn_ray:Endpoint")
        }

    def redeploy(self, log: Path, **changed: Any) -> None:
        """Returns when the application runs with the changed settings: what `serve deploy` does from another terminal.

        Raises:
            RuntimeError: it could not be deployed; the text holds the end of its log.
        """
        config = json.dumps({**self.settings, **changed})
        address, of_ray = self._ray()
        command = [sys.executable, "-c", REDEPLOY, address, config]
        environment = {**os.environ, **of_ray, "PYTHONPATH": str(ROOT)}
        with log.open("wb") as out:
            done = subprocess.run(command, env=environment, stdout=out, stderr=out, timeout=120, check=False)
        if done.returncode:
            raise RuntimeError(f"Expected a deployment. Received:\n{log.read_text()[-1500:]}")

    def _ray(self) -> tuple[str, dict[str, str]]:
        """(address, variables) of the Ray that the endpoint started: with its token."""
        for pid in below(self.process.pid):
            for word in _command(pid).split("\0"):
                if word.startswith("--gcs-address="):
                    lines = Path(f"/proc/{pid}/environ").read_text(errors="replace").split("\0")
                    found = dict(line.split("=", 1) for line in lines if line.startswith("RAY_"))
                    return word.partition("=")[2], found
        raise RuntimeError("Expected a raylet below cnn-ray serve. Received: none.")


@contextlib.contextmanager
def served(folder: Path, **settings: Any) -> Iterator[Server]:
    """The endpoint with these settings of ServeConfig, from its first answer until the block ends.

    Raises:
        RuntimeError: it did not answer; the text holds the end of its log.
    """
    port = free_port()
    settings = {
        "models_uri": str(folder / "models"),
        "engine": "openvino",
        "precision": "f32",
        "port": port,
        **settings,
    }
    command = [sys.executable, "-m", "cnn_ray.cli", "serve"]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        command += ([flag] if value else []) if isinstance(value, bool) else [flag, str(value)]
    log = folder / "serve.log"
    with running(command, log, {"PYTHONPATH": str(ROOT), "TF_CPP_MIN_LOG_LEVEL": "3"}) as process:
        wait_until_answered(process, port, PATH, min((folder / "images").iterdir()), log)
        yield Server(process, port, settings)


class Load:
    """The load generator as a process of its own that runs beside what is done to the server."""

    def __init__(self, server: Server, folder: Path, *options: str) -> None:
        """Sends from now on; every 200 must have the scores in `expected.json` of the folder."""
        self._log = folder / "requests.jsonl"
        command = [sys.executable, str(CLIENT), server.url, str(folder / "images"), "--log", str(self._log)]
        command += ["--expected", str(folder / "expected.json"), "--warm-up", "0", *options]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stop(self) -> None:
        """Nothing is sent from now on."""
        self._process.send_signal(signal.SIGTERM)

    def result(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """(the summary, every request) when it has ended.

        Raises:
            RuntimeError: the load generator failed.
        """
        output, _ = self._process.communicate(timeout=180)
        if self._process.returncode:
            raise RuntimeError(f"the load generator ended with {self._process.returncode}")
        requests = [json.loads(line) for line in self._log.read_text().splitlines()]
        return json.loads(output.splitlines()[-1]), requests


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    return ""
