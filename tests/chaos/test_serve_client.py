"""The load generator against a scripted server: it must see each failure that the fault runs promise not to happen."""

from __future__ import annotations

import json
import socketserver
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from factories import write_images

CLIENT = Path(__file__).resolve().parents[1] / "bench" / "serve_client.py"
SCORES = [0.25, 0.75]
Script = Callable[[int], bytes | None]


def answer(status: int, document: dict[str, Any], *headers: str) -> bytes:
    body = json.dumps(document).encode()
    head = "".join(f"{header}\r\n" for header in headers)
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{head}\r\n".encode() + body


def verdict(*scores: float, version: int = 1) -> bytes:
    return answer(200, {"scores": dict(zip(("a", "b"), scores, strict=True)), "version": version})


GOOD = verdict(*SCORES)


@contextmanager
def server(script: Script) -> Iterator[str]:
    """URL of a server whose nth request is answered by script(n); None closes the connection."""
    lock, count = threading.Lock(), [0]

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while line := self.rfile.readline():
                length = 0
                while line.strip():
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                    line = self.rfile.readline()
                self.rfile.read(length)
                with lock:
                    number, count[0] = count[0], count[0] + 1
                told = script(number)
                if told is None:
                    return
                self.wfile.write(told)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_address[1]}/predict"
        listening.shutdown()


def load(tmp_path: Path, script: Script, *options: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Summary and requests of half a second of load."""
    tmp_path.mkdir(exist_ok=True)
    images = write_images(tmp_path / "images", 3)
    expected = {"1": {path.name: SCORES for path in images.iterdir()}}
    (tmp_path / "expected.json").write_text(json.dumps(expected))
    with server(script) as url:
        command = [sys.executable, str(CLIENT), url, str(images), "--expected", str(tmp_path / "expected.json")]
        command += ["--warm-up", "0", "--seconds", "0.5", "--log", str(tmp_path / "log"), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    requests = [json.loads(line) for line in (tmp_path / "log").read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[-1]), requests


def test_open_loop_sends_at_the_rate(tmp_path):
    summary, requests = load(tmp_path, lambda number: GOOD, "--rate", "40", "--connections", "9")
    assert summary["statuses"] == {"200": 20}
    assert summary["rate"] == 40
    assert (summary["wrong"], summary["broken"], summary["late"], summary["versions"]) == (0, 0, 0, {"1": 20})
    assert [round(request["sent_s"] * 40) for request in requests] == list(range(20))


def test_wrong_scores_versions_and_bodies_are_counted(tmp_path):
    bad = {3: verdict(0.25000003, 0.75), 5: verdict(*SCORES, version=2), 7: answer(200, {"label": "a"})}
    summary, _ = load(tmp_path, lambda number: bad.get(number, GOOD), "--rate", "40", "--connections", "9")
    assert summary["statuses"] == {"200": 20}
    assert summary["wrong"] == 3


def test_failures_are_counted_by_status(tmp_path):
    bad = {3: answer(500, {}), 5: None, 7: answer(429, {}, "Retry-After: 1"), 9: answer(503, {})}
    summary, _ = load(tmp_path, lambda number: bad.get(number, GOOD), "--rate", "40", "--connections", "9")
    assert summary["statuses"] == {"0": 1, "200": 16, "429": 1, "500": 1, "503": 1}
    assert summary["broken"] == 1
    assert summary["not_told_when"] == 1  # the 503 has no Retry-After


def test_the_documented_retry_waits_as_told_and_does_not_repeat_other_errors(tmp_path):
    bad = {3: answer(429, {}, "Retry-After: 1"), 5: None, 9: answer(500, {})}
    options = ("--rate", "40", "--connections", "9", "--retry")
    summary, requests = load(tmp_path, lambda number: bad.get(number, GOOD), *options)
    assert summary["statuses"] == {"200": 19, "500": 1}
    slow = sorted(request["latency_s"] for request in requests if request["attempts"] == 2)
    assert summary["retried"] == len(slow) == 2
    assert 0.05 <= slow[0] < 1 <= slow[1]


def test_open_loop_counts_from_when_a_request_was_due(tmp_path):
    gate = threading.Event()

    def stall(number: int) -> bytes:
        if number == 4:
            gate.wait(0.3)
        return GOOD

    summary, _ = load(tmp_path, stall, "--rate", "40", "--connections", "1")
    assert summary["late"] > 5  # one connection, and a stall of 12 requests
    assert summary["max_ms"] >= 300
    closed, _ = load(tmp_path / "closed", lambda number: GOOD, "--connections", "2")
    assert closed["late"] == 0
    assert closed["requests"] > 40
