"""From the first connection to the last: an endpoint that starts or drains says 503 and when to try again, never 404;
what it was asked before is answered; its log is on its own standard error. With Ray's proxy and with HAProxy."""

from __future__ import annotations

import collections
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from factories import image_bytes

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 240
ENDS_WITHIN_S = 25
PATHS = ("/v2/health/live", "/v2/health/ready", "/v1/models/small", "/metrics", "/-/healthz")
PNG = {"Content-Type": "image/png"}


@dataclass
class Endpoint:
    process: subprocess.Popen[bytes]
    port: int
    log: Path
    seen: collections.Counter[object] = field(default_factory=collections.Counter)
    """What was answered until it was ready."""

    def ask(self, method: str, path: str, body: bytes | None = None) -> object:
        """The status, or `refused`; 503 only in the right form."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, PNG if body else {})
            answer = connection.getresponse()
            answer.read()
            return checked(answer)
        except OSError:
            return "refused"
        finally:
            connection.close()

    def requests_logged(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]


def checked(answer: http.client.HTTPResponse) -> int:
    if answer.status == 503:
        assert answer.headers["retry-after"] is not None
        assert answer.headers["connection"] == "close"
    return answer.status


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="module", params=["proxy", "haproxy"])
def endpoint(request: pytest.FixtureRequest, small_models: str, tmp_path_factory) -> Iterator[Endpoint]:
    folder, port = tmp_path_factory.mktemp("serve"), free_port()
    command = [sys.executable, "-m", "cnn_ray.cli", "serve", "--model", "small@1", "--models-uri", small_models]
    command += ["--port", str(port), "--max-replicas", "1", "--num-cpus", "0.5", "--precision", "f32"]
    command += ["--body-timeout-s", "60", *(["--haproxy"] if request.param == "haproxy" else [])]
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    with (folder / "stderr").open("wb") as stderr:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=stderr)
    started = Endpoint(process, port, folder / "stderr")
    deadline = time.monotonic() + START_DEADLINE_S
    try:
        while started.ask("GET", "/v2/health/ready") != 200:
            assert time.monotonic() < deadline
            assert process.poll() is None, started.log.read_text()[-2000:]
            started.seen.update(started.ask("GET", path) for path in PATHS[:-1])
            started.seen[started.ask("POST", "/v1/models/small:predict", image_bytes(1))] += 1
            time.sleep(0.05)
        yield started
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def test_until_it_is_ready_every_request_is_503(endpoint):
    assert set(endpoint.seen) <= {"refused", 503, 200}
    assert endpoint.seen[503] > 0, "the port was open before the model answered"


def test_ready_is_ready(endpoint):
    for path in PATHS:
        assert endpoint.ask("GET", path) == 200
    assert endpoint.ask("POST", "/v1/models/small:predict", image_bytes(1)) == 200


def test_each_request_is_a_line_of_json_on_standard_error(endpoint):
    endpoint.ask("POST", "/v1/models/small:predict", image_bytes(2))
    deadline = time.monotonic() + 10
    while not (lines := endpoint.requests_logged()) or lines[-1]["action"] != "predict":
        assert time.monotonic() < deadline, endpoint.log.read_text()[-1000:]
        time.sleep(0.05)

    assert lines[-1]["path"] == "/v1/models/small:predict"
    assert (lines[-1]["status"], lines[-1]["model"], lines[-1]["version"]) == (200, "small", 1)


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_the_end_answers_what_came_before_and_refuses_the_rest(endpoint, number):
    """Last for each endpoint. One upload is under way, four clients keep asking on open connections."""
    answers: list[tuple[float, object]] = []
    ending = threading.Event()
    clients = [threading.Thread(target=_keep_asking, args=(endpoint.port, answers, ending)) for _ in range(4)]
    for client in clients:
        client.start()
    image = image_bytes(3)
    with socket.create_connection(("127.0.0.1", endpoint.port), timeout=60) as upload:
        head = b"POST /v1/models/small:predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: image/png\r\n"
        upload.sendall(head + b"Content-Length: %d\r\n\r\n" % len(image) + image[:100])
        signalled = time.monotonic()
        endpoint.process.send_signal(number)
        time.sleep(4)
        upload.sendall(image[100:])
        assert upload.recv(64).startswith(b"HTTP/1.1 200 "), "what was under way is answered"
    code = endpoint.process.wait(timeout=60)
    took_s = time.monotonic() - signalled
    ending.set()
    for client in clients:
        client.join()

    assert (code, took_s < ENDS_WITHIN_S) == (0, True), took_s
    late = collections.Counter(status for at, status in answers if at > signalled + 1)
    assert late[503] > 10
    assert set(late) <= {503, "refused"}, late
    assert "Traceback" not in endpoint.log.read_text()


def _keep_asking(port: int, answers: list[tuple[float, object]], ending: threading.Event) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    while not ending.is_set():
        at = time.monotonic()
        try:
            connection.request("POST", "/v1/models/small:predict", image_bytes(1), PNG)
            answer = connection.getresponse()
            answer.read()
            answers.append((at, checked(answer)))
        except (OSError, http.client.HTTPException):
            connection.close()
            answers.append((at, "refused"))
            time.sleep(0.05)
        time.sleep(0.02)


@pytest.mark.parametrize("after_s", [1.0, 4.0])
def test_a_start_can_be_ended(small_models, tmp_path, after_s):
    command = [sys.executable, "-m", "cnn_ray.cli", "serve", "--model", "small@1", "--models-uri", small_models]
    with (tmp_path / "stderr").open("wb") as stderr:
        process = subprocess.Popen([*command, "--port", "0"], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr)
    time.sleep(after_s)
    process.send_signal(signal.SIGINT)

    assert process.wait(timeout=ENDS_WITHIN_S) in (0, 130)
    assert "Traceback" not in (tmp_path / "stderr").read_text()
