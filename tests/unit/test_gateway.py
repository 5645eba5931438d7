"""What Ray's proxies answer by themselves has our form; a request whose replica died is tried once more."""

from __future__ import annotations

import asyncio
import json

import pytest

from cnn_ray import gateway
from cnn_ray.gateway import Gateway, middlewares

OURS = [(b"X-Served-By", b"cnn_ray"), (b"content-type", b"application/json")]


def call(app, *chunks: bytes, path: str = "/v1/models/m:predict", headers=None, around: Gateway | None = None):
    """(status, headers, body) of one request through the gateway."""
    messages = [{"type": "http.request", "body": c, "more_body": True} for c in chunks]
    messages.append({"type": "http.request", "body": b"", "more_body": False})
    sent: list[dict] = []

    async def receive():
        if not messages:
            await asyncio.sleep(3600)
        return messages.pop(0)

    async def send(message):
        sent.append(message)

    asyncio.run(
        (around or Gateway(app))(
            {"type": "http", "path": path, "method": "POST", "headers": headers or []}, receive, send
        )
    )
    assert [m["type"] for m in sent] == ["http.response.start", "http.response.body"], sent
    return sent[0]["status"], dict(sent[0]["headers"]), sent[1]["body"]


async def read(receive) -> bytes | None:
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None  # Ray cancels the replica's call then, and sends nothing
        body += message["body"]
        if not message["more_body"]:
            return body


def answering(status: int, headers=(), body: bytes = b"Ray's own words", log: list | None = None):
    async def app(scope, receive, send):
        received = await read(receive)
        if log is not None:
            log.append(received)
        if received is None:
            return
        await send({"type": "http.response.start", "status": status, "headers": list(headers)})
        await send({"type": "http.response.body", "body": body})

    return app


def test_a_replicas_answer_passes_as_it_is():
    for status in (200, 400, 404, 429, 500, 503):
        answer = call(answering(status, OURS, b"ours"))
        assert answer == (status, dict(OURS), b"ours")


@pytest.mark.parametrize(
    ("status", "expected", "retry_after"),
    [(408, 504, None), (429, 429, b"1"), (503, 503, b"1"), (418, 418, None)],
)
def test_rays_own_answers_get_our_form(status, expected, retry_after):
    log: list[bytes] = []

    got, headers, body = call(answering(status, log=log), b"x")

    assert got == expected
    assert set(json.loads(body)) == {"error"}
    assert "Ray" not in json.loads(body)["error"]
    assert headers[b"content-type"] == b"application/json"
    assert headers.get(b"retry-after") == retry_after
    assert len(log) == 1, "only a lost replica is worth a second try"


def lost_at_first(log: list[bytes], *, says_500: bool, times: int = 1):
    async def app(scope, receive, send):
        log.append(await read(receive))
        if len(log) > times:
            await send({"type": "http.response.start", "status": 200, "headers": OURS})
            await send({"type": "http.response.body", "body": b"scores"})
        elif says_500:
            await send({"type": "http.response.start", "status": 500, "headers": []})
            await send({"type": "http.response.body", "body": b"ActorDiedError: Traceback"})

    return app


@pytest.mark.parametrize("says_500", [True, False])
def test_a_lost_replicas_request_is_sent_again_whole(says_500):
    log: list[bytes] = []

    assert call(lost_at_first(log, says_500=says_500), b"ab", b"cd")[0] == 200
    assert log == [b"abcd", b"abcd"]


def test_a_request_lost_twice_may_be_tried_by_the_client():
    log: list[bytes] = []

    status, headers, body = call(lost_at_first(log, says_500=True, times=9), b"ab")

    assert (status, headers[b"retry-after"]) == (503, b"1")
    assert b"Traceback" not in body
    assert len(log) == 2


def test_a_body_too_large_to_keep_is_not_sent_again(monkeypatch):
    monkeypatch.setattr(gateway, "MAX_REPLAYED_BYTES", 3)
    log: list[bytes] = []

    assert call(lost_at_first(log, says_500=False), b"ab", b"cd")[0] == 503
    assert len(log) == 1


def test_a_body_that_is_too_large_is_refused_while_it_comes(monkeypatch):
    monkeypatch.setenv(gateway.MAX_BODY_VARIABLE, "5")
    log: list[bytes] = []

    async def app(scope, receive, send):
        log.append(await read(receive))

    status, headers, _ = call(app, b"abc", b"def", b"ghi")

    assert (status, headers[b"connection"]) == (413, b"close")
    assert log == [None]


def test_bodies_and_requests_at_the_same_time_are_bounded(monkeypatch):
    monkeypatch.setenv(gateway.MAX_BODY_VARIABLE, "4")
    monkeypatch.setenv(gateway.MAX_REQUESTS_VARIABLE, "1")
    around = Gateway(answering(200, OURS, b"ours"))

    around._bytes = gateway.BODIES_IN_MEMORY * 4 - 1
    assert call(None, b"ab", around=around)[0] == 429
    assert call(None, b"a", around=around)[0] == 200
    assert around._bytes == gateway.BODIES_IN_MEMORY * 4 - 1, "what was counted is given back"
    around._requests = 1
    assert call(None, b"a", around=around)[0] == 429


def test_a_client_that_is_gone_is_not_answered_and_not_tried_again():
    log: list[str] = []

    async def app(scope, receive, send):
        log.append((await receive())["type"])

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        log.append(message["type"])

    asyncio.run(Gateway(app)({"type": "http", "path": "/", "method": "GET", "headers": []}, receive, send))

    assert log == ["http.disconnect"]


def test_ray_repeats_no_request_id_that_is_not_safe():
    seen: list[list] = []

    async def app(scope, receive, send):
        seen.append(scope["headers"])
        await answering(200, OURS)(scope, receive, send)

    for value in (b"abc-1", b"a" * 129, b"a\tb", b"", b"<script>"):
        call(app, headers=[(b"X-Request-ID", value), (b"accept", b"*/*")])

    assert [len(headers) for headers in seen] == [2, 1, 1, 1, 1]


def ray_with_routes(routes: bytes, status: int = 200):
    """Ray's proxy with these routes: 404 for every other path, and a health that does not look at them."""

    async def app(scope, receive, send):
        path = scope["path"]
        if path == "/-/routes":
            return await answering(status, body=routes)(scope, receive, send)
        return await answering(200 if path == "/-/healthz" else 404, body=b"success")(scope, receive, send)

    return app


def test_a_path_beside_rays_routes_is_404():
    status, headers, body = call(ray_with_routes(b'{"/models": "cnn_ray"}'), b"x")

    assert (status, headers.get(b"retry-after"), headers.get(b"connection")) == (404, None, None)
    assert set(json.loads(body)) == {"error"}


@pytest.mark.parametrize("app", [ray_with_routes(b"{}"), ray_with_routes(b"Route table is not populated yet.", 503)])
@pytest.mark.parametrize("path", ["/v1/models/m:predict", "/v2/health/live", "/-/healthz"])
def test_before_the_first_and_after_the_last_application_every_path_is_503(app, path):
    status, headers, body = call(app, b"x", path=path)

    assert (status, headers[b"retry-after"], headers[b"connection"]) == (503, b"1", b"close")
    assert set(json.loads(body)) == {"error"}


def test_rays_own_health_is_left_alone_while_it_has_routes():
    assert call(ray_with_routes(b'{"/": "cnn_ray"}'), path="/-/healthz") == (200, {}, b"success")


@pytest.mark.parametrize("path", ["/v1/models/m:predict", "/v2/health/live", "/v2/health/ready", "/-/healthz", "/"])
def test_the_endpoint_is_open_while_its_file_exists(monkeypatch, tmp_path, path):
    monkeypatch.setenv(gateway.OPEN_VARIABLE, str(tmp_path / "open"))
    around = Gateway(answering(200, OURS, b'{"/": "cnn_ray"}'))

    def statuses() -> int:
        status, headers, body = call(None, b"ab", b"c", path=path, around=around)
        if status == 503:
            assert (headers[b"retry-after"], headers[b"connection"]) == (b"1", b"close")
            assert set(json.loads(body)) == {"error"}
        return status

    assert statuses() == 503
    (tmp_path / "open").touch()
    assert statuses() == 200
    (tmp_path / "open").unlink()
    assert statuses() == 503


def test_haproxy_may_always_ask_a_replica_for_its_health(monkeypatch, tmp_path):
    monkeypatch.setenv(gateway.OPEN_VARIABLE, str(tmp_path / "open"))
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")

    assert call(answering(200, body=b"success"), path="/-/healthz")[0] == 200
    assert call(answering(200, OURS), path="/v2/health/live")[0] == 503


def test_a_refused_body_is_read_so_that_the_client_sees_the_answer(monkeypatch, tmp_path):
    monkeypatch.setenv(gateway.OPEN_VARIABLE, str(tmp_path / "open"))
    monkeypatch.setenv(gateway.MAX_BODY_VARIABLE, "5")
    monkeypatch.setattr(gateway, "DISCARD_S", 0.05)
    scope = {"type": "http", "path": "/", "method": "POST", "headers": []}

    def read_of(scope, chunks: list[bytes]) -> int:
        sent: list[dict] = []
        left = list(chunks)

        async def receive():
            if not left:
                await asyncio.sleep(3600)  # a client that stops in the middle
            return {"type": "http.request", "body": left.pop(0), "more_body": True}

        async def send(message):
            sent.append(message)

        asyncio.run(Gateway(answering(200, OURS))(scope, receive, send))
        assert sent[0]["status"] == 503
        return len(chunks) - len(left)

    assert read_of(scope, [b"abc"]) == 1, "and does not wait for long"
    assert read_of(scope, [b"abc"] * 9) == 2, "and not for more than the largest body"
    assert read_of({**scope, "headers": [(b"Expect", b"100-continue")]}, [b"abc"]) == 0


def test_what_is_refused_in_front_has_a_line_in_the_access_log(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv(gateway.OPEN_VARIABLE, str(tmp_path / "open"))
    monkeypatch.setenv(gateway.ACCESS_LOG_VARIABLE, "1")

    call(answering(200, OURS), headers=[(b"x-request-id", b"r-1")])

    entry = json.loads(capsys.readouterr().err)
    assert (entry["request_id"], entry["status"], entry["path"]) == ("r-1", 503, "/v1/models/m:predict")


def test_ray_accepts_what_the_import_path_names():
    from ray.serve._private.http_util import validate_http_proxy_callback_return

    module, _, name = gateway.IMPORT_PATH.partition(":")
    assert (module, name) == (middlewares.__module__, middlewares.__name__)
    assert [m.cls for m in validate_http_proxy_callback_return(middlewares())] == [Gateway]
