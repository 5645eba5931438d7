"""The webhook against a real https server: who gets the message, and that no server can hold the night up."""

from __future__ import annotations

import http.server
import json
import ssl
import threading
import time
from datetime import UTC, date, datetime, timedelta
from typing import ClassVar

import pytest
import yaml

from cnn_ray import nightly, webhook
from cnn_ray.config import NightlyConfig, build_config
from cnn_ray.errors import ConfigError

SCORE = {"model": "a@1", "input_uri": "in/{date}", "output_uri": "out"}


class Hook(http.server.BaseHTTPRequestHandler):
    """Keeps what it gets; the path says how it answers."""

    seen: ClassVar[list[tuple[str, dict]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.seen.append((self.path, body))
        if "drip" in self.path:
            self.wfile.write(b"HTTP/1.1 200 OK\r\n")
            for _ in range(50):
                self.wfile.write(b"X-Drip: 1\r\n")
                self.wfile.flush()
                time.sleep(0.1)
            return
        self.send_response(302 if "redirect" in self.path else 500 if "broken" in self.path else 204)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def certificate(folder) -> tuple[str, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return str(folder / "cert.pem"), str(folder / "key.pem")


@pytest.fixture
def hook(tmp_path, monkeypatch):
    """`localhost:PORT` of a server whose certificate is trusted."""
    cert, key = certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    server = http.server.ThreadingHTTPServer(("localhost", 0), Hook)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("SSL_CERT_FILE", cert)
    Hook.seen.clear()
    yield f"localhost:{server.server_address[1]}"
    server.shutdown()


def test_the_message_arrives_as_json(hook):
    assert webhook.post_json(f"https://{hook}/a?token=1", {"event": "failed", "n": 1}) is None
    assert Hook.seen == [("/a?token=1", {"event": "failed", "n": 1})]


def test_what_fails_is_said_without_the_address(hook, monkeypatch):
    assert webhook.post_json(f"https://{hook}/broken/secret", {}) == "HTTP status 500"
    assert webhook.post_json("https://localhost:1/secret", {}) == "ConnectionRefusedError"
    monkeypatch.delenv("SSL_CERT_FILE")
    assert webhook.post_json(f"https://{hook}/secret", {}) == "SSLCertVerificationError"
    assert [path for path, _ in Hook.seen] == ["/broken/secret"]


def test_redirects_are_not_followed(hook):
    assert webhook.post_json(f"https://{hook}/redirect", {}) == "HTTP status 302"
    assert [path for path, _ in Hook.seen] == ["/redirect"]


def test_a_server_that_drips_does_not_hold_the_night_up(hook):
    start = time.monotonic()
    assert webhook.post_json(f"https://{hook}/drip", {}, timeout_s=1) == "no answer within 1 s"
    assert time.monotonic() - start < 2


@pytest.mark.parametrize(
    ("url", "hosts", "message"),
    [
        ("http://hooks.example.com/x", ["hooks.example.com"], "Expected https://"),
        ("https://other.example.com/x", ["hooks.example.com"], r"webhook_hosts \(hooks.example.com\)"),
        ("https://hooks.example.com.evil.example/x", ["hooks.example.com"], "webhook_hosts"),
        ("https://hooks.example.com@evil.example/x", ["hooks.example.com"], "without a user"),
        ("https://hooks.example.com:8443/x", ["hooks.example.com"], "webhook_hosts"),
        ("https:///x", [""], "Expected https://"),
        ("https://hooks.example.com/x", [], "none"),
    ],
)
def test_addresses_that_are_not_allowed(url, hosts, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_config(NightlyConfig, {"score": SCORE, "webhook_url": url, "webhook_hosts": hosts})
    assert "/x" not in str(caught.value)


def test_the_secret_part_of_the_address_is_never_shown():
    given = {
        "score": SCORE,
        "webhook_url": "https://Hooks.example.com/T0/secret?k=v",
        "webhook_hosts": ["hooks.example.com"],
    }
    shown = yaml.safe_dump(build_config(NightlyConfig, given).model_dump(mode="json"))
    assert "secret" not in shown
    assert "k=v" not in shown
    assert "https://Hooks.example.com/..." in shown


def test_a_failed_and_a_drifted_date_are_told_and_a_dead_hook_is_a_warning(hook, small_models, tmp_path, caplog):
    from factories import write_images

    for day, count, bad in (("2026-11-22", 2, 2), ("2026-11-23", 2, 0), ("2026-11-24", 9, 0)):
        write_images(tmp_path / "in" / day, count, bad)
    score = {"model": "small@1", "models_uri": small_models, "input_uri": f"{tmp_path}/in/{{date}}"}
    score |= {"output_uri": f"{tmp_path}/out", "precision": "f32", "runner": "local", "report": False}
    given = {"score": score, "look_back_days": 3, "webhook_url": f"https://{hook}/T0/secret", "webhook_hosts": [hook]}
    config = build_config(NightlyConfig, given)
    assert nightly.run_nightly(config, date(2026, 11, 25)).exit_code == 4
    told = [body for _, body in Hook.seen]
    assert [(one["event"], one["date"], one["exit_code"]) for one in told] == [
        ("failed", "2026-11-22", 4),
        ("drift", "2026-11-24", 0),
    ]
    assert "2 of 4" in told[0]["detail"]
    assert told[1]["drift"] == ["9 screenshots were planned, 2 before (+350.0%)."]
    assert "secret" not in json.dumps(told)
    assert nightly.run_nightly(config, date(2026, 11, 25)).exit_code == 4
    assert len(Hook.seen) == 2  # a failure is told once
    dead = build_config(
        NightlyConfig, {**given, "webhook_url": "https://localhost:1/secret", "webhook_hosts": ["localhost:1"]}
    )
    write_images(tmp_path / "in" / "2026-11-25", 40)
    assert nightly.run_nightly(dead, date(2026, 11, 26)).exit_code == 0
    assert "The webhook was not told of 2026-11-25: ConnectionRefusedError." in caplog.text
    assert "secret" not in caplog.text
    assert "secret" not in (tmp_path / "out" / "_nightly.json").read_text()
