"""The doctor's look at who could reach this machine's Ray: listening ports, the token, HAProxy's socket."""

from __future__ import annotations

import ipaddress
import stat
from collections.abc import Iterable, Mapping
from pathlib import Path

from cnn_ray.doctor_finding import Finding, error, ok, warning

LISTEN = "0A"
RAY_PORTS = {8265: "dashboard and Jobs API", 10001: "Ray Client", 6379: "GCS"}
"""Whoever reaches one of these runs code on the cluster, unless a token is asked for."""
SERVE_PORTS = {8000: "Serve", 8404: "HAProxy statistics", 9101: "HAProxy metrics"}
SECRET_MODE = 0o600
HAPROXY_VARIABLE = "RAY_SERVE_HAPROXY_SOCKET_PATH"
HAPROXY_SOCKET = "/tmp/haproxy-serve/admin.sock"  # noqa: S108 - Ray's default


def listening() -> list[tuple[str, int]]:
    """(address, port) of each TCP socket of this machine that listens, as /proc tells it."""
    found: list[tuple[str, int]] = []
    for name in ("tcp", "tcp6"):
        path = Path("/proc/net") / name
        if path.exists():
            found += parse_sockets(path.read_text(encoding="ascii").splitlines()[1:])
    return found


def parse_sockets(lines: Iterable[str]) -> list[tuple[str, int]]:
    """(address, port) of the listening sockets among lines of /proc/net/tcp or tcp6."""
    found: list[tuple[str, int]] = []
    for line in lines:
        fields = line.split()
        if len(fields) > 3 and fields[3] == LISTEN:
            words, _, port = fields[1].partition(":")
            # Each 32-bit word is in the machine's byte order.
            raw = b"".join(bytes.fromhex(words[k : k + 8])[::-1] for k in range(0, len(words), 8))
            found.append((str(ipaddress.ip_address(raw)), int(port, 16)))
    return found


def is_open(address: str) -> bool:
    """Whether others than this machine reach a socket that listens there."""
    parsed = ipaddress.ip_address(address)
    mapped = parsed.ipv4_mapped if isinstance(parsed, ipaddress.IPv6Address) else None
    return not (mapped or parsed).is_loopback


def port_findings(
    sockets: Iterable[tuple[str, int]], *, token_mode: bool, serve_ports: Iterable[int] = ()
) -> list[Finding]:
    """The ports of Ray and Serve that others reach."""
    found: list[Finding] = []
    serve = SERVE_PORTS | dict.fromkeys(serve_ports, "Serve")
    for address, port in sorted(set(sockets)):
        if not is_open(address):
            continue
        if port in RAY_PORTS and not token_mode:
            found.append(
                error(
                    "ports",
                    f"{RAY_PORTS[port]} at {address}:{port} without a token: whoever reaches it runs code",
                    "export RAY_AUTH_MODE=token before `ray start`, and --dashboard-host=127.0.0.1 (CVE-2023-48022)",
                )
            )
        elif port == 8265:
            found.append(
                warning(
                    "ports", f"{RAY_PORTS[port]} at {address}:{port}", "--dashboard-host=127.0.0.1, `ray dashboard`"
                )
            )
        elif port in serve:
            found.append(
                warning(
                    "ports", f"{serve[port]} at {address}:{port}", "api_keys_uri for Serve (README, Keys), a firewall"
                )
            )
    return found or [ok("ports", "none of Ray's or Serve's is open to others")]


def token_findings(environment: Mapping[str, str], home: Path, *, wanted: bool) -> list[Finding]:
    """Whether Ray asks for a token, and whether others of this machine can read it. The token is never shown.

    `wanted` says that a cluster is used: without a token mode that is worth a warning.
    """
    mode = environment.get("RAY_AUTH_MODE", "")
    named = environment.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named) if named else home / ".ray" / "auth_token"
    found: list[Finding] = []
    if mode not in ("", "token", "disabled", "k8s"):
        found.append(error("token", f"RAY_AUTH_MODE is {mode!r}", "export RAY_AUTH_MODE=token"))
    elif mode != "token" and wanted:
        found.append(
            warning("token", "RAY_AUTH_MODE is not token", "export RAY_AUTH_MODE=token on every node and client")
        )
    elif mode == "token" and not environment.get("RAY_AUTH_TOKEN") and not path.is_file():
        found.append(error("token", f"token mode, and no token at {path}", "ray get-auth-token --generate"))
    if path.is_file():
        bits = stat.S_IMODE(path.stat().st_mode)
        if bits & ~SECRET_MODE:
            found.append(
                (error if wanted or mode == "token" else warning)(
                    "token", f"{path} has mode {bits:04o}", f"chmod 600 {path} (Ray makes it 0644)"
                )
            )
    return found or [ok("token", "token mode" if mode == "token" else "no cluster, no token needed")]


def haproxy_finding(socket: Path) -> Finding:
    """Whether an admin socket of HAProxy lets everybody of this machine command it."""
    if not socket.exists():
        return ok("haproxy", f"no admin socket at {socket}")
    bits = stat.S_IMODE(socket.stat().st_mode)
    if bits & ~SECRET_MODE:
        return error(
            "haproxy",
            f"admin socket {socket} has mode {bits:04o}",
            "start Serve by `cnn-ray serve --haproxy`, which closes it, or chmod 600",
        )
    return ok("haproxy", f"admin socket {socket} is for this user alone")
