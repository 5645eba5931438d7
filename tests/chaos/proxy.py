"""The fault proxy and moto as processes, steered from Python.

    with MotoServer() as moto, FaultProxy(moto.url, input_path="/bucket/in/") as proxy:
        os.environ |= s3_settings(proxy.url)
        proxy.set(seed=1, faults={"get": {"slow_down": 0.1, "truncated": 0.1}}, latency_s=0.05)
        ...
        proxy.counters()["get.body_bytes"]

What can be set and what is counted stands in `proxy_server`. Objects below `input_path` must not change: they are
answered from memory (2 cores, 64 connections of one asyncio client: see tests/integration/test_faults.py).
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any
from urllib.parse import urlsplit

HERE = Path(__file__).parent
FAULTS = ("slow_down", "internal", "reset", "truncated", "stall", "expired", "lost")


def s3_settings(url: str) -> dict[str, str]:
    """Environment for clients of the S3 server at `url`, which leads to no real account."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "AWS_EC2_METADATA_DISABLED": "true",
    }


class _Server:
    """A server in a process of its own, ended with the block."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, str(HERE / script), *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        stream = self._process.stdout
        self.url = stream.readline().strip() if stream else ""
        if not self.url:
            raise RuntimeError(f"{script} did not start: exit code {self._process.wait()}")

    @property
    def pid(self) -> int:
        return self._process.pid

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Afterwards the process is gone."""
        self._process.kill()
        self._process.wait()


class MotoServer(_Server):
    """An S3 server without faults."""

    def __init__(self) -> None:
        super().__init__("moto_server.py")


class FaultProxy(_Server):
    """The proxy; `url` is the endpoint to give to clients."""

    def __init__(self, upstream: str, input_path: str = "") -> None:
        super().__init__("proxy_server.py", upstream)
        if input_path:
            self.set(input_path=input_path)

    def set(self, **settings: Any) -> None:
        """Changes the named settings from the next request on."""
        self._ask("POST", "/-/settings", settings)

    def calm(self) -> None:
        """Nothing is injected any more."""
        self.set(faults={}, outage=False, outage_after=None, expired=False, trip=None, latency_s=0)

    def counters(self) -> dict[str, int]:
        """What was counted since the last reset: "<kind>.requests", "<kind>.body_bytes", "<kind>.<fault>", "faults"."""
        return self._ask("GET", "/-/counters", None)

    def reset_counters(self) -> None:
        """Forgets the counts, and how often each request was sent."""
        self._ask("POST", "/-/reset", None)

    def _ask(self, method: str, path: str, body: object) -> Any:
        connection = http.client.HTTPConnection(urlsplit(self.url).netloc, timeout=30)
        try:
            connection.request(method, path, json.dumps(body))
            answer = connection.getresponse()
            if answer.status != 200:
                raise ValueError(f"The proxy refused {body}")
            return json.loads(answer.read())
        finally:
            connection.close()
