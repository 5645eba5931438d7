"""Open ports, tokens and sockets that others reach are found, and nothing else."""

import ipaddress
import socket

import pytest

from cnn_ray import doctor_security as security

TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid
   0: 0100007F:2049 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 1
   1: 00000000:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  0 0 2
   2: 0100007F:9999 0100007F:1F90 01 00000000:00000000 00:00000000 00000000  0 0 3
"""
TCP6 = """  sl
   0: 00000000000000000000000000000000:2049 0:0 0A 0
   1: 00000000000000000000000001000000:2049 0:0 0A 0
   2: 0000000000000000FFFF00000100007F:1F40 0:0 0A 0
"""


def test_sockets_are_parsed():
    assert security.parse_sockets(TCP.splitlines()[1:]) == [("127.0.0.1", 8265), ("0.0.0.0", 8000)]
    mapped = str(ipaddress.ip_address("::ffff:127.0.0.1"))  # Python writes it in two ways
    assert security.parse_sockets(TCP6.splitlines()[1:]) == [("::", 8265), ("::1", 8265), (mapped, 8000)]


def test_a_listening_socket_of_this_machine_is_seen():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        assert ("127.0.0.1", listener.getsockname()[1]) in security.listening()


@pytest.mark.parametrize(
    ("address", "port", "token_mode", "level"),
    [
        ("0.0.0.0", 8265, False, "error"),
        ("::", 8265, False, "error"),
        ("10.0.0.5", 10001, False, "error"),
        ("0.0.0.0", 6379, False, "error"),
        ("0.0.0.0", 8265, True, "warning"),
        ("0.0.0.0", 6379, True, "ok"),
        ("127.0.0.1", 8265, False, "ok"),
        ("::ffff:127.0.0.1", 8265, False, "ok"),
        ("0.0.0.0", 8000, True, "warning"),
        ("0.0.0.0", 9300, True, "warning"),
        ("0.0.0.0", 22, False, "ok"),
    ],
)
def test_ports_that_others_reach(address, port, token_mode, level):
    (finding,) = security.port_findings([(address, port)], token_mode=token_mode, serve_ports=[9300])
    assert finding.level == level


def levels(environment, home, wanted=True):
    return [finding.level for finding in security.token_findings(environment, home, wanted=wanted)]


def test_token_mode_and_the_token_file(tmp_path):
    mode = {"RAY_AUTH_MODE": "token"}
    assert levels({}, tmp_path) == ["warning"]
    assert levels({}, tmp_path, wanted=False) == ["ok"]
    assert levels({"RAY_AUTH_MODE": "tokens"}, tmp_path) == ["error"]
    assert levels(mode, tmp_path) == ["error"], "no token"
    assert levels(mode | {"RAY_AUTH_TOKEN": "abc"}, tmp_path) == ["ok"]

    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("the-very-secret")
    token.chmod(0o644)
    (finding,) = security.token_findings(mode, tmp_path, wanted=True)
    assert finding.level == "error"
    assert "0644" in finding.said
    assert finding.mend.startswith(f"chmod 600 {token}")
    assert "the-very-secret" not in str(finding)
    assert levels({}, tmp_path, wanted=False) == ["warning"]
    token.chmod(0o600)
    assert levels(mode, tmp_path) == ["ok"]
    assert levels(mode | {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, tmp_path) == ["error"]


def test_haproxy_socket_that_everybody_may_write(tmp_path):
    path = tmp_path / "admin.sock"
    assert security.haproxy_finding(path).level == "ok"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        path.chmod(0o666)
        assert security.haproxy_finding(path).level == "error"
        path.chmod(0o600)
        assert security.haproxy_finding(path).level == "ok"
