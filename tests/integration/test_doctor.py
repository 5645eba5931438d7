"""The doctor against real folders and S3 servers, and servers that break one promise each."""

import http.server
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import ClassVar

import pytest
from factories import write_images

from cnn_ray import doctor, doctor_storage
from cnn_ray.config import NightlyConfig, ScoreConfig, load_yaml
from cnn_ray.doctor_finding import ok
from cnn_ray.errors import ConfigError
from cnn_ray.storage import LocalStore, S3Store, open_store


@pytest.fixture(params=["local", "s3"])
def output_uri(request, tmp_path):
    return request.getfixturevalue("s3_uri") if request.param == "s3" else str(tmp_path / "out")


def test_a_good_store_is_well_and_keeps_no_probe(output_uri):
    findings = doctor_storage.output_findings(output_uri)
    assert [finding.level for finding in findings] == ["ok", "ok"]
    assert open_store(output_uri).keys() == []
    assert doctor_storage.read_clock_finding(output_uri).level == "ok"
    assert doctor_storage.arrow_finding(output_uri, "chunked uploads", needed=True).level == "ok"
    assert open_store(output_uri).keys() == []


def overwrites(store, key, data):
    store.put(key, data)
    return True


def forgets_the_version(store, key, data, version):
    store.put(key, data)
    return "new"


def corrupts(store, key, path):
    store.put(key, b"30d40;chunk-signature=0\r\n" + path.read_bytes())


@pytest.mark.parametrize(
    ("method", "broken", "said"),
    [
        ("put_if_absent", overwrites, "ignores If-None-Match"),
        ("put_if_match", forgets_the_version, "ignores If-Match"),
        ("put_file", corrupts, "gives back other bytes than were put as a file"),
    ],
)
@pytest.mark.parametrize("kind", [LocalStore, S3Store])
def test_a_store_that_breaks_a_promise_is_an_error(method, broken, said, kind, s3_uri, tmp_path, monkeypatch):
    monkeypatch.setattr(kind, method, broken)
    uri = s3_uri if kind is S3Store else str(tmp_path)
    findings = doctor_storage.output_findings(uri)
    assert any(finding.level == "error" and said in finding.said for finding in findings), findings
    assert open_store(uri).keys() == []


def test_a_denied_or_missing_place_is_an_error(s3_server, tmp_path):
    assert [f.level for f in doctor_storage.output_findings("s3://no-such-bucket-here/x")] == ["error"]
    assert doctor_storage.input_finding("s3://no-such-bucket-here/x").level == "error"
    assert doctor_storage.input_finding(str(tmp_path / "none")).level == "error"
    assert doctor_storage.input_finding(str(tmp_path / "none.csv")).level == "error"
    assert doctor_storage.input_finding(str(tmp_path)).level == "ok"


class NaiveS3(http.server.BaseHTTPRequestHandler):
    """An S3 server of the old kind: it keeps the body as it came, chunk headers and all."""

    protocol_version = "HTTP/1.1"
    objects: ClassVar[dict[str, bytes]] = {}

    def do_PUT(self):
        path, _, query = self.path.partition("?")
        body = self.body()
        NaiveS3.objects[path] = NaiveS3.objects.get(path, b"") + body if query else body  # parts come in order
        self.answer(b"", {"ETag": '"1"'})

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_GET(self):
        self.answer(NaiveS3.objects[self.path])

    def do_HEAD(self):
        found = NaiveS3.objects.get(self.path)
        self.answer(found or b"", status=404 if found is None else 200)

    def do_DELETE(self):
        NaiveS3.objects.pop(self.path, None)
        self.answer(b"", status=204)

    def do_POST(self):
        self.body()
        kind = "InitiateMultipartUpload" if self.path.endswith("?uploads") else "CompleteMultipartUpload"
        inner = "<Bucket>bucket</Bucket><Key>k</Key><UploadId>u</UploadId><ETag>1</ETag>"
        self.answer(f"<{kind}Result>{inner}</{kind}Result>".encode())

    def answer(self, body, headers=None, status=200):
        self.send_response(status)
        for name, value in {"ETag": '"1"', **(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.mark.parametrize(("calculation", "level"), [("when_supported", "error"), ("when_required", "ok")])
def test_a_server_that_stores_chunk_headers_is_found(s3_server, tmp_path, calculation, level):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), NaiveS3)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    code = (
        "from cnn_ray.doctor_storage import arrow_finding\n"
        "f = arrow_finding('s3://bucket/out', 'chunked uploads', needed=True)\nprint(f.level, f.said)"
    )
    environment = os.environ | {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
        "AWS_REQUEST_CHECKSUM_CALCULATION": calculation,
    }
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    server.shutdown()
    assert done.stdout.startswith(level), done.stdout + done.stderr[-2000:]
    assert level == "ok" or "corrupts uploads in chunks" in done.stdout
    assert NaiveS3.objects == {}


@pytest.mark.parametrize(
    ("behind_s", "level"), [(0, "ok"), (-5, "ok"), (60, "warning"), (-60, "warning"), (1000, "error")]
)
def test_clock_skew(behind_s, level):
    now = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)
    said = (now + timedelta(seconds=behind_s)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert doctor_storage.clock_finding(said, now).level == level
    assert doctor_storage.clock_finding(None, now).level == "warning"


def test_model_digest(small_models, tmp_path, monkeypatch):
    models = tmp_path / "models"
    shutil.copytree(small_models, models)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = ScoreConfig(
        model="small@1", models_uri=str(models), input_uri=str(tmp_path), output_uri=str(tmp_path / "o")
    )
    assert doctor.model_finding(config).level == "ok"
    assert doctor.engine_finding(config).said.startswith("openvino ")
    weights = models / "small" / "1" / "openvino" / "model.bin"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    damaged = doctor.model_finding(config)
    assert damaged.level == "error"
    assert "openvino/model.bin" in damaged.said
    assert doctor.model_finding(config.model_copy(update={"model": "small@9"})).level == "error"
    assert doctor.engine_finding(config.model_copy(update={"precision": "mixed_float16"})).level == "error"


def test_a_check_that_hangs_or_breaks_is_a_finding():
    over = threading.Event()

    def breaks():
        raise KeyError("gone")

    start = time.monotonic()
    findings = doctor.run_checks(
        [("hangs", lambda: [ok("hangs", str(over.wait(60)))]), ("breaks", breaks), ("good", lambda: [ok("good", "")])],
        0.3,
    )
    over.set()
    assert time.monotonic() - start < 10
    assert [(finding.check, finding.level) for finding in findings] == [
        ("hangs", "error"),
        ("breaks", "error"),
        ("good", "ok"),
    ]
    assert "no answer" in findings[0].said


@pytest.mark.parametrize("habit", ["accepts and never answers", "refuses"])
def test_the_prompt_comes_back_when_storage_does_not_answer(habit, tmp_path):
    """Pools of threads that a check has started are waited for by Python; the doctor leaves without them."""
    hole = socket.socket()
    hole.bind(("127.0.0.1", 0))
    if habit != "refuses":
        hole.listen(64)
    path = tmp_path / "score.yaml"
    path.write_text(
        "model: m@1\nmodels_uri: s3://bucket/models\ninput_uri: s3://bucket/in\noutput_uri: s3://bucket/out\n"
    )
    environment = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{hole.getsockname()[1]}",
        "AWS_ACCESS_KEY_ID": "t",
        "AWS_SECRET_ACCESS_KEY": "t",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    start = time.monotonic()
    code, findings, stderr = run_doctor("--config", path, **environment)
    seconds = time.monotonic() - start
    hole.close()
    assert code == 2, stderr
    said = {f["check"]: f["said"] for f in findings if f["level"] == "error"}
    expected = "EndpointConnectionError" if habit == "refuses" else "no answer in 15 s"
    for check in ("input", "output", "model"):
        assert expected in said[check], findings
    assert seconds < doctor.DEADLINE_S + 15  # its own start and imports on a busy machine


def test_a_kind_of_file_is_told_by_its_keys(tmp_path):
    root = Path(__file__).parents[2]

    def names(path):
        return {name for name, _ in doctor.checks_of_document(load_yaml(path), str(path))}

    assert names(root / "cluster.yaml") == {"cluster yaml"}
    assert names(root / "jobs" / "serve.yaml") == names(root / "jobs" / "kubernetes_rayservice.yaml") == {"serve yaml"}
    assert names(root / "jobs" / "nightly.yaml") == {"time-outs", *names(root / "jobs" / "score.yaml")}
    assert names(root / "jobs" / "cifar10.yaml") == {"models", "runs", "clock"}
    with pytest.raises(ConfigError, match="serveConfigV2"):
        doctor.checks_of_document({"kind": "RayService", "spec": {"serveConfigV2": "x: ["}}, "f.yaml")


@pytest.mark.parametrize(
    ("changes", "level"),
    [
        ({"wait_for_marker": "_SUCCESS", "wait_timeout_s": 3600}, "ok"),
        ({"wait_for_marker": "_SUCCESS"}, "warning"),
        ({"min_age_s": 60}, "warning"),
        ({"date_budget_s": 20}, "warning"),
        ({"date_budget_s": 21600}, "ok"),
    ],
)
def test_the_times_of_a_night_agree(changes, level):
    score = {"model": "a@1", "input_uri": "/in/{date}", "output_uri": "/out"}
    assert doctor.night_finding(NightlyConfig(score=score, **changes)).level == level


def run_doctor(*arguments, **environment):
    command = [sys.executable, "-m", "cnn_ray.cli", "doctor", "--json", *map(str, arguments)]
    environment = os.environ | environment
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    return done.returncode, json.loads(done.stdout or "[]"), done.stderr


def test_the_command_ends_with_2_exactly_where_a_finding_is_an_error(tmp_path, small_models, s3_uri):
    write_images(tmp_path / "in", 2)
    path = tmp_path / "score.yaml"
    text = f"model: small@1\nmodels_uri: {small_models}\ninput_uri: {tmp_path}/in\noutput_uri: {s3_uri}/out\n"
    path.write_text(text)
    code, findings, stderr = run_doctor("--config", path)
    assert code == 0, (findings, stderr)
    assert {"python", "packages", "input", "output", "clock", "model", "engine"} <= {f["check"] for f in findings}

    path.write_text(text.replace("/in\n", "/inn\n"))
    code, findings, _ = run_doctor("--config", path)
    assert code == 2
    assert [f["check"] for f in findings if f["level"] == "error"] == ["input"]

    path.write_text(text + "batch_sice: 3\n")
    code, findings, _ = run_doctor("--config", path)
    assert code == 2
    assert any("batch_sice" in f["said"] and "batch_size" in f["mend"] for f in findings)
    assert run_doctor("--config", tmp_path / "none.yaml")[0] == 2
    assert not (Path(tmp_path) / "inn").exists()
