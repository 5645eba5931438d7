"""Ray's HAProxy configuration with its openings closed, rendered by Ray and checked by HAProxy itself."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from cnn_ray import haproxy


def rendered(folder: Path) -> str:
    from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
    from ray.serve.config import HTTPOptions

    config = HAProxyConfig(
        http_options=HTTPOptions(host="127.0.0.1", port=8123),
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_enabled=False,
    )
    server = ServerConfig(name="replica", host="127.0.0.1", port=30000)
    backend = BackendConfig(name="app", path_prefix="/", app_name="app", servers=[server])
    api = HAProxyApi(cfg=config, backend_configs={"app": backend}, config_file_path=str(folder / "haproxy.cfg"))
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
