"""A planted secret of each kind reaches nothing that is shown or stored; what is no secret stays as it is."""

import json
import logging
import subprocess
import sys

import pytest
import yaml

from cnn_ray.auth import new_key
from cnn_ray.redaction import RedactingFormatter, redact, redacted

SECRETS = {
    "access key": ("key AKIAIOSFODNN7EXAMPLE in use", "AKIAIOSFODNN7EXAMPLE"),
    "temporary access key": ("ASIAIOSFODNN7EXAMPLE", "ASIAIOSFODNN7EXAMPLE"),
    "secret key": ("aws_secret_access_key = wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY", "wJalrXUtnFEMI"),
    "secret key in the environment": ("AWS_SECRET_ACCESS_KEY=wJalrXUtnFEMI/K7MDENG/bPxRfiCY", "wJalrXUtnFEMI"),
    "session token in JSON": ('{"aws_session_token": "FwoGZXIvYXdzEBYaDHqa0AP"}', "FwoGZXIvYXdzEBYaDHqa0AP"),
    "password in a URL": ("https://user:hunter2pass@host/path", "hunter2pass"),
    "token in a URL": ("https://ghp_0123456789abcdef@github.com/x", "ghp_0123456789abcdef"),
    "signed URL": ("https://b.s3.amazonaws.com/k?X-Amz-Expires=60&X-Amz-Signature=fe5f80f77d5fa3", "fe5f80f77d5fa3"),
    "signature alone": ("X-Amz-Signature=fe5f80f77d5fa3beca038a248ff027", "fe5f80f77d5fa3beca038a248ff027"),
    "webhook query": ("https://alerts.example.com/hook?key=qwertyuiop", "qwertyuiop"),
    "webhook path": ("https://hooks.slack.com/services/T00000000/B0000/XXXXXXXXXXXX", "XXXXXXXXXXXX"),
    "api key": ("cnnray_abcdefghijklmnopqrstuvwxyz234567abcdefghijklmnopqr", "abcdefghijklmnopqr"),
    "bearer": ("Authorization: Bearer 0123456789abcdef0123456789", "0123456789abcdef"),
    "ray token": ("RAY_AUTH_TOKEN=3f9a8b7c6d5e4f3a2b1c", "3f9a8b7c6d5e4f3a2b1c"),
}


@pytest.mark.parametrize(("text", "secret"), SECRETS.values(), ids=SECRETS)
def test_the_secret_goes_and_that_there_was_one_stays(text, secret):
    assert secret not in redact(text)
    assert "***" in redact(text)
    assert redact(redact(text)) == redact(text)


def test_a_real_api_key_of_ours_goes():
    key, _ = new_key("bot")
    assert redact(f"keys add: {key}.") == "keys add: cnnray_***."


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/prefix/date=2026-11-23/shot-0001.png",
        "models_uri: /data/models",
        "api_keys_uri: s3://bucket/keys.json",
        "https://docs.ray.io/en/latest/ray-security/token-auth.html",
        "http://127.0.0.1:8000/v1/models/demo:predict",
        "/data/screens/what?.png",
        "signature_name: serving_default",
        "3f9a8b7c6d5e4f3a2b1c3f9a8b7c6d5e4f3a2b1c3f9a8b7c6d5e4f3a2b1c3f9a",
        "Bearer key",
        "token authentication",
    ],
)
def test_what_is_no_secret_stays(text):
    assert redact(text) == text


def test_values_at_any_depth():
    value = {"a": [SECRETS["signed URL"][0], {"b": SECRETS["api key"][0]}], "n": 3, "t": (SECRETS["bearer"][0],)}
    clean = json.dumps(redacted(value))
    assert not [secret for _, secret in SECRETS.values() if secret in clean]
    assert redacted(value)["n"] == 3


def test_log_lines_and_tracebacks():
    formatter = RedactingFormatter("%(levelname)s %(message)s")
    try:
        raise RuntimeError(SECRETS["password in a URL"][0])
    except RuntimeError:
        record = logging.LogRecord(
            "x", logging.ERROR, "f", 1, "failed for %s", (SECRETS["signed URL"][0],), sys.exc_info()
        )
    text = formatter.format(record)
    assert "hunter2pass" not in text
    assert "fe5f80f77d5fa3" not in text
    assert text.startswith("ERROR failed for https://b.s3.amazonaws.com/k?***")


def test_print_config_and_errors_show_none(tmp_path):
    path = tmp_path / "night.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "score": {
                    "model": "small@1",
                    "input_uri": "https://user:hunter2pass@host/{date}?X-Amz-Signature=fe5f80f77d5fa3",
                    "output_uri": "/out/AKIAIOSFODNN7EXAMPLE",
                },
                "webhook_url": "https://alerts.example.com/services/T0/deepsecretpath?key=qwertyuiop",
                "webhook_hosts": ["alerts.example.com"],
            }
        )
    )

    def run(*arguments):
        command = [sys.executable, "-m", "cnn_ray.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return done.returncode, done.stdout + done.stderr

    code, text = run("nightly", "--config", str(path), "--print-config")
    assert code == 0, text
    code, error = run("score", "--model", "no model https://u:hunter2pass@h/x?key=qwertyuiop", "in", "out")
    assert code == 2
    assert "***" in error
    for secret in ("hunter2pass", "fe5f80f77d5fa3", "AKIAIOSFODNN7EXAMPLE", "deepsecretpath", "qwertyuiop"):
        assert secret not in text + error
