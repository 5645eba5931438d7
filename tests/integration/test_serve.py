"""The endpoint on Ray Serve as its clients meet it: one server process for the module, plain HTTP, an API key, a model
by alias, and scores equal to the bit. What needs no Ray is in tests/contract and tests/unit/test_endpoint_*.py."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from factories import LABELS, SIDE_PX, image_bytes

from cnn_ray.artifact import Artifact, set_alias
from cnn_ray.auth import add_key
from cnn_ray.config import ScoreConfig, ServeConfig
from cnn_ray.drawn_files import hostile_files, write_unlabelled
from cnn_ray.errors import ArtifactError, ConfigError
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.outputs import read, read_quarantine
from cnn_ray.predictor import load_predictor
from cnn_ray.score import run_score

ROOT = Path(__file__).parents[2]
START_DEADLINE_S = 240
MAX_BODY_BYTES = 200_000
PNG = {"Content-Type": "image/png"}
RUN = """
import sys
from cnn_ray.config import ServeConfig
from cnn_ray.serve import run_server
run_server(ServeConfig.model_validate_json(sys.argv[1]), on_ready=lambda url: print(url, flush=True))
"""
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Server:
    host: str
    port: int
    process: subprocess.Popen[str]
    key: str
    models_uri: str
    log: Path

    def send(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None, **kwargs: Any):
        """(status, document, headers) of one request on a connection of its own."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = (
            body if isinstance(body, bytes) or body is None or hasattr(body, "__next__") else json.dumps(body).encode()
        )
        try:
            connection.request(method, path, data, {"Authorization": f"Bearer {self.key}", **(headers or {})}, **kwargs)
            response = connection.getresponse()
            raw = response.read()
            if response.headers["content-type"] != "application/json":
                return response.status, raw, response.headers
            return response.status, json.loads(raw) if raw else None, response.headers
        finally:
            connection.close()

    def predict(self, document: Any, path: str = "/v1/models/small:predict") -> tuple[int, Any]:
        return self.send("POST", path, document)[:2]


@pytest.fixture(scope="module")
def models(small_models: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Models folder with small@1 as champion, and small@2: the same net under another number."""
    folder = tmp_path_factory.mktemp("models")
    for version in (1, 2):
        shutil.copytree(Path(small_models) / "small" / "1", folder / "small" / str(version))
        description = folder / "small" / str(version) / "artifact.json"
        description.write_text(json.dumps(json.loads(description.read_text()) | {"version": version}))
    set_alias(str(folder), "small", "champion", 1)
    return str(folder)


@pytest.fixture(scope="module")
def server(models: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The only start of Ray and Serve in this file; SIGTERM must end it with exit code 0 and leave nothing behind."""
    folder = tmp_path_factory.mktemp("serve")
    key = add_key(str(folder / "keys.json"), "tests")
    config = ServeConfig(
        model="small@champion", models_uri=models, engine="openvino", precision="f32", port=0, alias_poll_s=0.3,
        max_body_bytes=MAX_BODY_BYTES, max_instances=8, max_replicas=1, num_cpus=0.5, drain_s=3,
        api_keys_uri=str(folder / "keys.json"),
    )  # fmt: skip
    log = folder / "stderr"
    environment = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"} | {"TMPDIR": str(folder)}
    environment["HOME"] = "/proc/nohome"  # which nobody can write, as in a container under another uid
    with log.open("w") as stderr:
        command = [sys.executable, "-c", RUN, config.model_dump_json()]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True)
    try:
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_DEADLINE_S)
        url = process.stdout.readline().strip() if ready else ""
        assert url.startswith("http://127.0.0.1:"), f"not ready: {url!r}\n{log.read_text()[-2000:]}"
        yield Server("127.0.0.1", int(url.rpartition(":")[2]), process, key, models, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
        assert not list(folder.glob("cnn_ray-serve-*"))
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def expected(small_artifact: Artifact):
    """scores(bytes): float32 [C], by the one inference path, without Serve."""
    predictor = load_predictor(small_artifact, engine="openvino", precision="f32")

    def scores(data: bytes) -> np.ndarray:
        image = decode(data, small_artifact.size_px, ImageCaps())
        assert isinstance(image, DecodedImage)
        return predictor.predict(image.pixels[None])[0]

    return scores


def b64(data: bytes) -> dict[str, str]:
    return {"b64": base64.b64encode(data).decode()}


def same_bits(answered: Any, wanted: list[np.ndarray]) -> None:
    np.testing.assert_array_equal(np.array(answered, np.float32).view(np.uint32), np.stack(wanted).view(np.uint32))


def test_row_form_gives_the_scores_of_the_one_inference_path(server, expected):
    images = [image_bytes(0), image_bytes(1, (100, 20), "JPEG")]

    for instances in ([b64(i) for i in images], [{"image_bytes": b64(i)} for i in images]):
        status, document = server.predict({"signature_name": "serving_default", "instances": instances})

        assert status == 200
        assert [row["classes"] for row in document["predictions"]] == [list(LABELS)] * 2
        same_bits([row["scores"] for row in document["predictions"]], [expected(i) for i in images])


def test_column_form_and_a_version_in_the_path(server, expected):
    images = [image_bytes(2), image_bytes(3)]

    for inputs in ([b64(i) for i in images], {"image_bytes": [b64(i) for i in images]}):
        status, document = server.predict({"inputs": inputs}, "/v1/models/small/versions/1:predict")

        assert status == 200
        assert document["outputs"]["classes"] == [list(LABELS)] * 2
        same_bits(document["outputs"]["scores"], [expected(i) for i in images])


def test_pixels_give_the_scores_of_the_image_that_they_came_from(server, expected, small_artifact):
    image = decode(image_bytes(4), small_artifact.size_px, ImageCaps())
    pixels = [image.pixels.tolist()]

    _, rows = server.predict({"signature_name": "serving_pixels", "instances": pixels})
    _, columns = server.predict({"signature_name": "serving_pixels", "inputs": {"pixels": pixels}})

    same_bits(rows["predictions"], [expected(image_bytes(4))])
    assert columns["outputs"] == rows["predictions"]


def test_batching_many_requests_changes_no_bit(server, expected):
    requests = [[image_bytes(100 + n * 4 + i) for i in range(1 + n % 4)] for n in range(48)]

    with ThreadPoolExecutor(16) as clients:
        answers = list(clients.map(lambda images: server.predict({"instances": [b64(i) for i in images]}), requests))

    for images, (status, document) in zip(requests, answers, strict=True):
        assert status == 200
        same_bits([row["scores"] for row in document["predictions"]], [expected(i) for i in images])


def test_status(server):
    available = {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}

    for path in ("/v1/models/small", "/v1/models/small/versions/1"):
        assert server.send("GET", path)[:2] == (200, {"model_version_status": [available]})
        assert server.send("HEAD", path)[:2] == (200, None)


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/models/other:predict", 404, "Servable not found for request: Latest(other)"),
        ("POST", "/v1/models/small/versions/7:predict", 404, "Servable not found for request: Specific(small, 7)"),
        ("GET", "/v1/models/other", 404, "Could not find any versions of model other"),
        ("GET", "/v1/models/small/versions/7", 404, "Could not find version 7 of model small"),
        ("GET", "/v1/models/small:predict", 405, "Malformed request: GET /v1/models/small:predict"),
        ("GET", "/docs", 404, "Malformed request: GET /docs"),
        ("DELETE", "/v2/models/small", 405, "Expected GET or HEAD for /v2/models/small. Received: DELETE."),
    ],
)
def test_other_models_and_routes(server, method, path, status, message):
    assert server.send(method, path)[:2] == (status, {"error": message})


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{", "JSON Parse error"),
        (b"", "The document is empty"),
        ({"instances": []}, "No values in 'instances' array"),
        ({"instances": [b64(b"x")], "inputs": [b64(b"x")]}, "only one of 'inputs' or 'instances'"),
        ({"instances": [{"b64": "?"}]}, "element: 0. Unable to base64 decode"),
        ({"instances": [b64(image_bytes(0)), b64(b"no image")]}, "Instance 1 is not a readable image: not_an_image: "),
        ({"instances": [b64(image_bytes(0)[:60])]}, "Instance 0 is not a readable image: truncated: "),
        ({"instances": [b64(b"")]}, "Instance 0 is not a readable image: empty: "),
        ({"instances": [b64(b"x")] * 9}, "at most 8 instances. Received: 9"),
        ({"signature_name": "other", "instances": [b64(b"x")]}, 'signature name: "other" not found'),
        ({"signature_name": "serving_pixels", "instances": [[[0]]]}, f"shape [N, {SIDE_PX}, {SIDE_PX}, 3]"),
    ],
)
def test_what_is_wrong_with_a_body_is_told(server, body, message):
    status, document = server.predict(body)

    assert status == 400
    assert set(document) == {"error"}
    assert message in document["error"]


def test_a_body_that_says_it_is_too_large_is_refused_before_it_is_read(server):
    start = time.monotonic()
    with socket.create_connection((server.host, server.port), timeout=30) as client:
        head = f"POST /v1/models/small:predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
        client.sendall(head.encode() + b"Content-Length: 99999999999\r\n\r\n{")
        answer = ""
        while received := client.recv(4096):
            answer += received.decode()

    assert answer.startswith("HTTP/1.1 413 ")
    assert f"at most {MAX_BODY_BYTES} bytes" in answer
    assert time.monotonic() - start < 20, "and the connection ends, so that the rest is not sent"


def test_a_chunked_body_is_refused_once_it_is_too_large(server):
    chunks = (b" " * 50_000 for _ in range(6))

    status, document, _ = server.send("POST", "/v1/models/small:predict", chunks, encode_chunked=True)

    assert status == 413
    assert f"at most {MAX_BODY_BYTES} bytes" in document["error"]


def test_without_a_key_only_the_page_and_health_are_answered(server):
    none = {"Authorization": ""}

    assert server.send("POST", "/v1/models/small:predict", b"{}", none)[0] == 401
    assert server.send("GET", "/metrics", headers=none)[0] == 401
    assert server.send("GET", "/v2/health/ready", headers=none)[0] == 200
    status, page, headers = server.send("GET", "/", headers=none)
    assert (status, page[:15]) == (200, b"<!doctype html>")
    assert "script-src 'self'" in headers["content-security-policy"]


def test_an_image_body_and_the_open_inference_protocol_give_the_same_scores(server, expected):
    image = image_bytes(5)

    _, verdict, _ = server.send("POST", "/v1/models/small:predict", image, PNG)
    tensor = {"name": "image", "shape": [1], "datatype": "BYTES", "data": [b64(image)["b64"]]}
    _, answer, _ = server.send("POST", "/v2/models/small/infer", {"inputs": [tensor]})

    same_bits([[verdict["scores"][label] for label in LABELS]], [expected(image)])
    same_bits([next(o["data"] for o in answer["outputs"] if o["name"] == "scores")], [expected(image)])
    assert verdict["label"] == LABELS[int(expected(image).argmax())]
    assert (verdict["model"], verdict["version"]) == ("small", 1)


def test_explain_is_a_png(server):
    status, png, headers = server.send("POST", "/v1/models/small:explain", image_bytes(5), PNG)

    assert (status, headers["content-type"], png[:4]) == (200, "image/png", b"\x89PNG")


def test_the_request_id_comes_back_once(server):
    for sent, expected_pattern in (("abc-1", "abc-1"), (None, "[0-9a-f-]{32,36}"), ("a b", "[0-9a-f-]{32,36}")):
        _, _, headers = server.send("GET", "/v1/models/small", headers={"X-Request-ID": sent} if sent else {})
        assert [re.fullmatch(expected_pattern, value) is not None for value in headers.get_all("x-request-id")] == [
            True
        ]


def test_a_deadline_that_cannot_be_held_is_504_in_our_form(server):
    late = {"X-Request-Timeout-Seconds": "0.0001"}

    status, document, _ = server.send("POST", "/v1/models/small:predict", {"instances": [b64(image_bytes(0))]}, late)

    assert (status, set(document)) == (504, {"error"})


def test_metrics_are_the_sums_of_all_replicas(server):
    from prometheus_client.parser import text_string_to_metric_families

    def count() -> float:
        status, text, _ = server.send("GET", "/metrics")
        assert status == 200
        families = {f.name: f for f in text_string_to_metric_families(text.decode())}
        labels = {"action": "predict", "code": "200", "model": "small", "version": "1"}
        return sum(s.value for s in families["cnn_ray_requests"].samples if s.labels == labels)

    before = count()
    for seed in range(3):
        server.predict({"instances": [b64(image_bytes(seed))]})

    assert count() == before + 3


def test_the_openvino_replica_has_not_imported_tensorflow(server, expected):
    replicas = [p for p in Path("/proc").iterdir() if p.name.isdigit() and _is_replica_of(p, server.process.pid)]

    assert any("/openvino/" in (replica / "maps").read_text() for replica in replicas), "no replica was found"
    for replica in replicas:
        maps = (replica / "maps").read_text()
        assert "libtensorflow_framework" not in maps  # OpenVINO has a frontend named tensorflow, which is small


def _is_replica_of(folder: Path, root: int) -> bool:
    try:
        if not (folder / "cmdline").read_bytes().startswith(b"ray::ServeReplica"):
            return False
        pid = int(folder.name)
        while pid > 1 and pid != root:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return pid == root
    except (OSError, ValueError):
        return False  # it ended while we looked


def test_a_wrong_model_or_a_taken_port_is_told_before_ray_starts(small_models):
    import ray

    from cnn_ray.serve import run_server

    with pytest.raises(ArtifactError, match="Expected model small@9"):
        run_server(ServeConfig(model="small@9", models_uri=small_models))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"Expected a free address to listen on. Received: 127.0.0.1:{port}"):
            run_server(ServeConfig(model="small@1", models_uri=small_models, port=port))
    with pytest.raises(ConfigError, match=r"Expected API keys .* Received: host 0.0.0.0"):
        run_server(ServeConfig(model="small@1", models_uri=small_models, host="0.0.0.0"))
    assert not ray.is_initialized()


def test_serve_run_builds_the_application_from_key_value_arguments(small_models):
    from pydantic import ValidationError
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary as build

    from jobs.serve import build_app

    set_alias(small_models, "small", "champion", 1)
    app = build(build_app, {"model": "small@champion", "models_uri": small_models, "max_replicas": "3"})

    deployment = app._bound_deployment
    assert deployment.init_args[0].model == "small@champion", "replicas follow the alias"
    assert deployment._deployment_config.autoscaling_config.max_replicas == 3
    with pytest.raises(ValidationError, match="max_replica"):
        build(build_app, {"model": "small@1", "max_replica": "3"})


def test_the_example_file_is_what_serve_and_cnn_ray_accept():
    from ray.serve.schema import ServeDeploySchema

    loaded = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "jobs" / "serve.yaml").read_text()))

    assert [app.import_path for app in loaded.applications] == ["jobs.serve:build_app"]
    assert loaded.http_options.host == "127.0.0.1"
    assert ServeConfig.model_validate(loaded.applications[0].args).model == "demo@champion"


def test_the_score_job_gives_the_same_scores_and_refuses_the_same_files(server, small_models, tmp_path):
    """Over a drawn corpus of every format, and files that no sender in good faith makes."""
    source = write_unlabelled(tmp_path / "in", 60, seed=3)
    for name, data in hostile_files().items():
        if len(data) < MAX_BODY_BYTES:
            (source / name).write_bytes(data)
    config = ScoreConfig(
        model="small@1",
        models_uri=small_models,
        input_uri=str(source),
        output_uri=str(tmp_path / "o"),
        precision="f32",  # as the server of these tests; `auto` would take bf16 where the CPU has it
        max_quarantine_rate=1,
    )
    partition = run_score(config).partition_uri
    rows = [row for row in read(partition).to_pylist() if row["size_bytes"] < MAX_BODY_BYTES]

    assert len(rows) >= 60
    for row in rows:
        _, verdict, _ = server.send("POST", "/v1/models/small:predict", Path(row["uri"]).read_bytes(), PNG)
        same_bits([[verdict["scores"][label] for label in LABELS]], [np.float32(row["scores"])])
        assert (verdict["label"], verdict["flagged"]) == (row["label"], row["flagged"])
    quarantined = read_quarantine(partition).to_pylist()
    assert len(quarantined) >= 5
    for row in quarantined:
        _, document = server.predict({"instances": [b64(Path(row["uri"]).read_bytes())]})
        assert document["error"] == f"Instance 0 is not a readable image: {row['code']}: {row['detail']}"


def test_who_leaves_is_not_computed_for(server):
    """An explanation is 170 calls of the model; the connection ends after the first."""
    image = image_bytes(7)
    head = f"POST /v1/models/small:explain HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {server.key}\r\n"
    head += f"Content-Type: image/png\r\nContent-Length: {len(image)}\r\n\r\n"

    def left() -> float:
        text = server.send("GET", "/metrics")[1].decode()
        return sum(float(v) for v in re.findall(r'requests_total{action="explain",code="499"[^}]*} (.*)', text))

    before, deadline = left(), time.monotonic() + 60
    while left() == before:
        assert time.monotonic() < deadline, "no request was cancelled"
        with socket.create_connection((server.host, server.port), timeout=30) as client:
            client.sendall(head.encode() + image)
            time.sleep(0.03)


def test_a_promoted_version_answers_without_a_failed_request(server):
    """Last in the file: from here on the champion is another version."""
    versions: list[int] = []
    body = image_bytes(9)

    def ask() -> int:
        status, verdict, _ = server.send("POST", "/v1/models/small:predict", body, PNG)
        assert status == 200, verdict
        versions.append(verdict["version"])
        return verdict["version"]

    assert ask() == 1
    set_alias(server.models_uri, "small", "champion", 2)
    deadline = time.monotonic() + 30
    while ask() != 2:
        assert time.monotonic() < deadline, "the alias is not followed"

    assert versions == sorted(versions), "one replica does not go back"
    _, status, _ = server.send("GET", "/v1/models/small")
    assert [v["version"] for v in status["model_version_status"]] == ["2", "1"]
    _, old, _ = server.send("POST", "/v1/models/small/versions/1:predict", body, PNG)
    assert old["version"] == 1
    _, labelled, _ = server.send("POST", "/v1/models/small/labels/champion:predict", body, PNG)
    assert labelled["version"] == 2
