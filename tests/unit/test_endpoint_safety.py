"""The endpoint and strangers: keys, what stays open, what answers and logs never say. No Ray: the ASGI application."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest
from factories import image_bytes

from cnn_ray import access_log, auth
from cnn_ray.auth import add_key, remove_key
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint
from cnn_ray.predictor import Predictor

PREDICT = "/v1/models/small:predict"
IMAGE = image_bytes(1)
PNG = {"Content-Type": "image/png"}


def config_of(models_uri: str, **changes: object) -> ServeConfig:
    settings = {"models_uri": models_uri, "model": "small@1", "precision": "f32", "num_threads": 1, **changes}
    return ServeConfig.model_validate(settings)


def ask(endpoint: Endpoint, method: str, path: str, **options: object) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=endpoint)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as client:
            return await client.request(method, path, **options)  # pyright: ignore[reportArgumentType]

    return asyncio.run(go())


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


@pytest.fixture(scope="module")
def opened(small_models: str) -> Iterator[Endpoint]:
    """Without keys."""
    endpoint = Endpoint(config_of(small_models))
    yield endpoint
    endpoint.close()


@pytest.fixture(scope="module")
def locked(small_models: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, str, str]]:
    """With keys, the key of "nightly", and the key file."""
    keys_uri = str(tmp_path_factory.mktemp("keys") / "keys.json")
    key = add_key(keys_uri, "nightly")
    endpoint = Endpoint(config_of(small_models, api_keys_uri=keys_uri))
    yield endpoint, key, keys_uri
    endpoint.close()


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Lines of the access log, where nothing else is logged."""
    stream = io.StringIO()
    access_log.open_access_log(stream)
    yield stream
    access_log.open_access_log()


@pytest.fixture
def everything_logged() -> Iterator[io.StringIO]:
    """What any logger of the process says, from DEBUG on, with tracebacks; but for the client of these tests."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(lambda record: not record.name.startswith(("httpx", "httpcore")))
    root, access = logging.getLogger(), logging.getLogger("cnn_ray.access")
    level = root.level
    root.addHandler(handler)
    access.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(level)
    root.removeHandler(handler)
    access.removeHandler(handler)


GUARDED = [
    ("POST", PREDICT),
    ("POST", "/v1/models/small/versions/1:predict"),
    ("POST", "/v1/models/small:classify"),
    ("POST", "/v1/models/small:explain"),
    ("GET", "/v1/models/small"),
    ("GET", "/v1/models/small/metadata"),
    ("GET", "/v1/models/other"),
    ("GET", "/v2"),
    ("GET", "/v2/models/small"),
    ("GET", "/v2/models/small/ready"),
    ("POST", "/v2/models/small/infer"),
    ("GET", "/v2/models/small/config"),
    ("GET", "/v2/models/small/stats"),
    ("GET", "/v2/models/stats"),
    ("POST", "/v2/repository/index"),
    ("POST", "/v2/repository/models/small/load"),
    ("GET", "/openapi.json"),
    ("GET", "/metrics"),
    ("HEAD", "/metrics"),
    ("GET", "/nothing/here"),
    ("GET", "/v1"),
    ("DELETE", "/v1/models/small"),
    ("OPTIONS", "/v1/models/small"),
]


@pytest.mark.parametrize(("method", "path"), GUARDED)
def test_without_a_good_key_nothing_is_answered(locked: tuple[Endpoint, str, str], method: str, path: str):
    endpoint, key, _ = locked
    for headers in (
        {},
        bearer("cnnray_wrong"),
        bearer(key[:-1]),
        {"Authorization": f"Basic {key}"},
        {"X-Api-Key": f"Bearer {key}"},
    ):
        answer = ask(endpoint, method, path, headers=headers)
        assert answer.status_code == 401, (headers, answer.text)
        assert answer.headers["WWW-Authenticate"] == "Bearer"
        if method != "HEAD":
            assert set(answer.json()) == {"error"}
        assert key not in answer.text


def test_a_key_in_the_url_opens_nothing(locked: tuple[Endpoint, str, str]):
    endpoint, key, _ = locked
    assert ask(endpoint, "GET", f"/v1/models/small?key={key}&access_token={key}").status_code == 401


def test_a_good_key_opens(locked: tuple[Endpoint, str, str]):
    endpoint, key, _ = locked
    answer = ask(endpoint, "POST", PREDICT, content=IMAGE, headers=PNG | bearer(key))
    assert answer.status_code == 200, answer.text
    assert answer.json()["model"] == "small"
    assert ask(endpoint, "GET", "/metrics", headers=bearer(key)).status_code == 200
    assert ask(endpoint, "GET", "/openapi.json", headers=bearer(key)).status_code == 200


def test_health_is_open_and_says_nothing_else(locked: tuple[Endpoint, str, str]):
    endpoint, _, _ = locked
    for path in ("/v2/health/live", "/v2/health/ready"):
        for headers in ({}, bearer("wrong")):
            answer = ask(endpoint, "GET", path, headers=headers)
            assert answer.status_code == 200
            assert "small" not in answer.text


def test_the_page_is_open_and_asks_for_a_key(locked: tuple[Endpoint, str, str]):
    answer = ask(locked[0], "GET", "/")
    assert answer.status_code == 200
    assert answer.headers["Content-Security-Policy"].startswith("default-src 'none'")
    assert 'data-needs-key="yes"' in answer.text


def test_metrics_are_open_by_choice(small_models: str, locked: tuple[Endpoint, str, str]):
    endpoint = Endpoint(config_of(small_models, api_keys_uri=locked[2], open_metrics=True))
    assert ask(endpoint, "GET", "/metrics").status_code == 200
    assert ask(endpoint, "GET", "/v1/models/small").status_code == 401
    endpoint.close()


def test_keys_rotate_without_a_restart(small_models: str, tmp_path: Path):
    keys_uri = str(tmp_path / "keys.json")
    old = add_key(keys_uri, "old")
    endpoint = Endpoint(config_of(small_models, api_keys_uri=keys_uri))

    def status(key: str) -> int:
        return ask(endpoint, "GET", "/v1/models/small", headers=bearer(key)).status_code

    new = add_key(keys_uri, "new")
    assert (status(old), status(new)) == (200, 401)
    asyncio.run(endpoint.follow())
    assert (status(old), status(new)) == (200, 200)
    remove_key(keys_uri, "old")
    asyncio.run(endpoint.follow())
    assert (status(old), status(new)) == (401, 200)
    Path(keys_uri).write_text("damaged")
    asyncio.run(endpoint.follow())
    assert (status(old), status(new)) == (401, 200)
    endpoint.close()


def test_a_wrong_key_costs_as_many_comparisons_as_a_right_one(
    locked: tuple[Endpoint, str, str], monkeypatch: pytest.MonkeyPatch
):
    endpoint, key, _ = locked
    compared: list[int] = []
    real = auth.hmac.compare_digest

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(len(right))
        return real(left, right)

    monkeypatch.setattr(auth.hmac, "compare_digest", counting)
    counts = []
    for offered in (key, "cnnray_wrong", "x"):
        compared.clear()
        ask(endpoint, "GET", "/v1/models/small", headers=bearer(offered))
        counts.append(list(compared))
    assert counts == [[32]] * 3


def test_a_refused_body_is_not_read(locked: tuple[Endpoint, str, str]):
    """Who has no key costs neither memory nor a place among the requests in work."""

    async def go() -> int:
        read = 0

        async def receive() -> dict[str, object]:
            nonlocal read
            read += 1
            return {"type": "http.request", "body": b"x" * 1000, "more_body": True}

        async def send(message: object) -> None:
            pass

        scope = {"type": "http", "method": "POST", "path": PREDICT, "raw_path": PREDICT.encode(), "headers": []}
        await locked[0](scope, receive, send)  # pyright: ignore[reportArgumentType]
        return read

    assert asyncio.run(go()) == 0


SECRET = "the-secret-of-the-predictor"


@pytest.mark.parametrize("kind", [RuntimeError, ValueError, KeyError, MemoryError, OSError])
def test_errors_never_show_what_went_wrong_inside(
    small_models: str, kind: type[Exception], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    endpoint = Endpoint(config_of(small_models))

    def explode(self: Predictor, pixels: object) -> object:
        raise kind(f"/secret/path {SECRET}")

    monkeypatch.setattr(Predictor, "predict", explode)
    for model in endpoint.models.loaded:
        model.batcher._predict = model.predictor.predict
    pixels = {"instances": np.zeros((1, *endpoint.models.loaded[0].artifact.size_px, 3), int).tolist()}
    for options in (
        {"content": IMAGE, "headers": PNG},
        {"json": {"instances": [{"b64": base64.b64encode(IMAGE).decode()}]}},
        {"json": pixels},
    ):
        answer = ask(endpoint, "POST", PREDICT, **options)
        assert answer.status_code == 500
        assert set(answer.json()) == {"error"}
        assert SECRET not in answer.text + str(answer.headers)
        assert kind.__name__ not in answer.text
        assert "Traceback" not in answer.text
    assert SECRET in caplog.text  # who runs the server sees it
    endpoint.close()


def test_request_ids_go_through_and_unsafe_ones_are_replaced(opened: Endpoint, log: io.StringIO):
    for path in ("/v1/models/small", "/v1/models/none", "/metrics", "/v2/health/live", "/nowhere", "/"):
        assert ask(opened, "GET", path, headers={"X-Request-ID": "my-id.1"}).headers["X-Request-ID"] == "my-id.1"
        made = ask(opened, "GET", path).headers["X-Request-ID"]
        assert re.fullmatch("[0-9a-f]{32}", made)
    for unsafe in ("a b", "x" * 200, '"}', "a;b", "\u00fc"):
        answer = ask(opened, "GET", "/v1/models/small", headers={"X-Request-ID": unsafe.encode()})
        assert re.fullmatch("[0-9a-f]{32}", answer.headers["X-Request-ID"])
    ids = [json.loads(line)["request_id"] for line in log.getvalue().splitlines()]
    assert len(ids) == 17
    assert all(re.fullmatch("my-id.1|[0-9a-f]{32}", name) for name in ids)


def test_one_line_per_request_with_who_what_and_how_long(locked: tuple[Endpoint, str, str], log: io.StringIO):
    endpoint, key, _ = locked
    ask(endpoint, "POST", PREDICT, content=IMAGE, headers=PNG | bearer(key))
    ask(endpoint, "POST", PREDICT, content=IMAGE, headers=PNG)
    ask(endpoint, "POST", "/v1/models/none:predict", content=b"{}", headers=bearer(key))
    good, refused, unknown = [json.loads(line) for line in log.getvalue().splitlines()]
    assert (good["status"], good["action"], good["model"], good["version"]) == (200, "predict", "small", 1)
    assert (good["key"], good["body_bytes"], good["instances"]) == ("nightly", len(IMAGE), 1)
    assert 0 < good["decode_ms"] < good["total_ms"]
    assert 0 < good["predict_ms"] < good["total_ms"]
    assert (refused["status"], refused["key"], refused["body_bytes"]) == (401, None, 0)
    assert (unknown["status"], unknown["model"], unknown["key"]) == (404, "", "nightly")


def test_no_log_holds_a_body_a_key_or_a_query(locked: tuple[Endpoint, str, str], everything_logged: io.StringIO):
    endpoint, key, _ = locked
    marks = ["PLANTED-BODY", "PLANTED-QUERY", "PLANTED-COOKIE", key[7:], "cnnray_wrongwrong"]
    encoded = base64.b64encode(b"PLANTED-BODY in an image").decode()
    for headers in (bearer(key), bearer("cnnray_wrongwrong")):
        for content in (
            b"PLANTED-BODY",
            json.dumps({"instances": [{"b64": encoded}]}).encode(),
            json.dumps({"instances": ["PLANTED-BODY"]}).encode(),
            json.dumps({"signature_name": "PLANTED-BODY", "instances": [1]}).encode(),
            json.dumps({"PLANTED-BODY": 1}).encode(),
        ):
            for kind in ("application/json", "image/png", "multipart/form-data; boundary=PLANTED-BODY"):
                ask(
                    endpoint,
                    "POST",
                    f"{PREDICT}?token=PLANTED-QUERY",
                    content=content,
                    headers=headers | {"Content-Type": kind, "Cookie": "PLANTED-COOKIE", "X-Request-ID": key},
                )
    said = everything_logged.getvalue()
    assert said.count('"status": ') == 30
    assert "boundary" not in said  # nor does python-multipart write a line for each damaged form
    for mark in [*marks, encoded[:16]]:
        assert mark not in said, mark


def test_the_traceback_of_a_bug_is_logged_without_what_the_request_held(
    locked: tuple[Endpoint, str, str], everything_logged: io.StringIO, monkeypatch: pytest.MonkeyPatch
):
    endpoint, key, _ = locked

    def explode(*args: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr("cnn_ray.image_bodies.image_of", explode)
    headers = bearer(key) | {"Content-Type": "PLANTED-TYPE", "Cookie": "PLANTED-COOKIE"}
    answer = ask(endpoint, "POST", f"{PREDICT}?q=PLANTED-QUERY", content=b"PLANTED-BODY", headers=headers)
    assert answer.status_code == 500
    said = everything_logged.getvalue()
    assert "RuntimeError: a bug" in said
    assert "PLANTED" not in said
    assert key[7:] not in said


def test_metrics_count_what_was_answered_and_no_client_adds_series(opened: Endpoint):
    def series() -> set[str]:
        lines = ask(opened, "GET", "/metrics").text.splitlines()
        return {line.rpartition(" ")[0] for line in lines if not line.startswith("#")}

    assert ask(opened, "POST", PREDICT, content=IMAGE, headers=PNG).status_code == 200
    ask(opened, "GET", "/v1/models/one")
    ask(opened, "GET", "/nowhere")
    before = series()
    assert 'cnn_ray_requests_total{action="predict",code="200",model="small",version="1"}' in before
    for number in range(50):
        ask(opened, "GET", f"/v1/models/model-{number}")
        ask(opened, "GET", f"/nowhere/{number}")
        ask(opened, "GET", f"/v1/models/small/versions/{number + 2}")
    assert len(series() - before) < 20
    assert "cnn_ray_in_flight 1.0" in ask(opened, "GET", "/metrics").text  # the scrape itself


@pytest.mark.parametrize(("method", "allow"), [("DELETE", "GET, HEAD"), ("PUT", "GET, HEAD")])
def test_wrong_methods_name_the_right_ones(opened: Endpoint, method: str, allow: str):
    answer = ask(opened, method, "/v1/models/small")
    assert answer.status_code == 405
    assert answer.headers["Allow"] == allow
