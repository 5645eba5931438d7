"""What an attacker with a good key, or on an open port, sends: nothing is opened, nothing blows up, nothing is said.

Messages are given to the ASGI application as no HTTP client of Python would send them.
"""

from __future__ import annotations

import asyncio
import io
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
from factories import image_bytes
from hostile import hostile_corpus

from cnn_ray import artifact, json_bodies, served_models
from cnn_ray.config import ServeConfig
from cnn_ray.endpoint import Endpoint
from cnn_ray.gateway import Gateway
from cnn_ray.request_errors import RequestError

PREDICT = b"/v1/models/small:predict"
PNG = [(b"content-type", b"image/png")]
IMAGE = image_bytes(1)
Headers = Sequence[tuple[bytes, bytes]]
NONE: Headers = ()


@pytest.fixture(scope="module")
def many_versions(small_models: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Models folder with `small@1` to `small@6`, and `small@9`, whose files are damaged."""
    root = tmp_path_factory.mktemp("versions")
    for version in (1, 2, 3, 4, 5, 6, 9):
        folder = root / "small" / str(version)
        shutil.copytree(Path(small_models) / "small" / "1", folder)
        description = json.loads((folder / "artifact.json").read_text())
        (folder / "artifact.json").write_text(json.dumps({**description, "version": version}))
    for damaged in (root / "small" / "9").rglob("*.bin"):
        damaged.write_bytes(b"damaged")
    return str(root)


def config_of(models_uri: str, **changes: object) -> ServeConfig:
    settings = {"models_uri": models_uri, "model": "small@1", "precision": "f32", "num_threads": 1, **changes}
    return ServeConfig.model_validate(settings)


@pytest.fixture(scope="module")
def endpoint(many_versions: str) -> Iterator[Endpoint]:
    made = Endpoint(config_of(many_versions, max_loaded_models=3, body_timeout_s=0.3, max_body_bytes=100_000))
    yield made
    made.close()


async def send_to(
    endpoint: Endpoint, method: str, path: bytes, headers: Headers = NONE, body: object = b"", **scope: object
) -> SimpleNamespace:
    """Status, headers and JSON of the answer, and how many messages of the body were read. `body` is bytes, or a list
    of ASGI messages after which nothing ever comes."""
    messages = [{"type": "http.request", "body": body}] if isinstance(body, bytes) else list(body)  # pyright: ignore[reportCallIssue, reportArgumentType]
    sent: list[dict[str, object]] = []
    read = 0

    async def receive() -> dict[str, object]:
        nonlocal read
        if read == len(messages):
            await asyncio.Event().wait()
        read += 1
        return messages[read - 1]

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    whole = {
        "type": "http",
        "method": method,
        "path": path.decode("latin-1"),
        "raw_path": path,
        "query_string": b"",
        "headers": headers,
        "client": ("10.0.0.9", 1),
        **scope,
    }
    await endpoint({k: v for k, v in whole.items() if v is not None}, receive, send)  # pyright: ignore[reportArgumentType]
    start, end = sent
    return SimpleNamespace(
        status=start["status"],
        headers=dict(start["headers"]),
        body=end["body"],
        read=read,  # pyright: ignore[reportArgumentType, reportCallIssue]
    )


def ask(endpoint: Endpoint, method: str, path: bytes, *rest: object, **scope: object) -> SimpleNamespace:
    return asyncio.run(send_to(endpoint, method, path, *rest, **scope))  # pyright: ignore[reportArgumentType]


PATHS = [
    b"/v1/models/../../etc/passwd",
    b"/v1/models/..%2f..%2fetc%2fpasswd",
    b"/v1/models/%2e%2e",
    b"/v1/models/%2e%2e/versions/1",
    b"/v1/models/small%2f1",
    b"/v1/models/small/versions/..%2f1",
    b"/v1/models/small/labels/..%2f..%2f1",
    b"/v1/models/small/labels/1",
    b"/v1/models/small/labels/%00",
    b"/v1/models/small%00",
    b"/v1/models/small\x00",
    b"/v1/models/small\r\nX: 1",
    b"/v1/models/%252e%252e%252fsmall",
    b"/v1/models/s3:%2f%2fbucket%2fkey",
    b"/v1/models/s3%3A%2F%2Fbucket",
    b"/v1/models/file%3A%2F%2F%2Fetc",
    b"/v1/models/~root",
    b"/v1/models/\xff\xfe",
    b"/v1/models/%ff%fe",
    b"/v1/models/" + b"a" * 100_000,
    b"/v1/models/" + b"../" * 10_000,
    b"/v1/models/small@1",
    b"/v1/models/small/versions/" + b"9" * 30,
    b"/v1/models/small/versions/" + b"9" * 5000,
    b"/v1/models/small/versions/9223372036854775807",
    b"/v1/models/small/versions/9223372036854775808",
    b"/v1/models/small/versions/-1",
    b"/v1/models/small/versions/0",
    b"/v1/models/small/versions/01x",
    b"/v1/models/small/versions/%31%00",
    b"/v1/models/small/versions/\xd9\xa1",
    b"/v2/models/..%2f..%2fetc",
    b"/v2/models/small/versions/..%2f1",
    b"/v2/models/small/versions/" + b"9" * 30,
    b"/v2/models/small/versions/" + b"9" * 5000,
    b"/v2/models/%00",
    b"/v2/../v1/models/small",
    b"/page/../auth.py",
    b"/page/..%2f..%2fauth.py",
    b"/page/%2e%2e/auth.py",
    b"/page//etc/passwd",
    b"//v1/models/small",
    b"",
    b"*",
    b"/" + b"%" * 1000,
    b"/" + b"/" * 100_000,
]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: repr(path[:40]))
def test_no_path_of_a_caller_is_opened(endpoint: Endpoint, path: bytes, monkeypatch: pytest.MonkeyPatch):
    opened: list[str] = []
    real = artifact.open_store

    def recording(uri: str) -> object:
        opened.append(uri)
        return real(uri)

    monkeypatch.setattr(artifact, "open_store", recording)
    for method, suffix in (("GET", b""), ("GET", b"/metadata"), ("POST", b":predict"), ("POST", b"/infer")):
        answer = ask(endpoint, method, path + suffix, [], b"{}")
        assert answer.status in (400, 404, 405), answer.body
        assert set(json.loads(answer.body)) == {"error"}
        assert len(answer.body) < 500
    models_uri = endpoint.config.models_uri
    assert set(opened) <= {f"{models_uri}/small"}


def test_a_server_without_raw_path_is_answered_too(endpoint: Endpoint):
    """ASGI says that raw_path may be missing."""
    assert ask(endpoint, "POST", PREDICT, PNG, IMAGE, raw_path=None).status == 200
    assert ask(endpoint, "GET", b"/v1/models/small/versions/1", raw_path=None).status == 200
    assert ask(endpoint, "GET", b"/v1/models/small?a=b").status == 200  # or may hold the query


@pytest.mark.parametrize("value", [b"a\r\nSet-Cookie: x=1", b"a\nb", b"\xff", b"a\x00", b"a" * 100_000, b" a"])
def test_a_request_id_puts_nothing_into_headers_or_log(endpoint: Endpoint, value: bytes):
    answer = ask(endpoint, "GET", b"/v1/models/small", [(b"x-request-id", value)])
    assert answer.headers[b"x-request-id"].isalnum()
    assert len(answer.headers[b"x-request-id"]) == 32
    assert b"set-cookie" not in answer.headers


def test_one_request_is_one_line_whatever_it_holds(endpoint: Endpoint):
    logger, stream = logging.getLogger("cnn_ray.access"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    try:
        for method, path in (
            ("GET", b"/a\nINFO forged"),
            ("GET\nINFO forged", b"/a"),
            ("GET", b'/a", "status": 200, "x": "'),
            ("GET", b"/\x1b[2J\xe2\x80\xa8"),
            ("POST", b"/v1/models/small\r\n:predict"),
        ):
            ask(endpoint, method, path, [(b"user-agent", b"a\nb")])
    finally:
        logger.removeHandler(handler)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 5
    for line in lines:
        assert line.isascii()
        assert json.loads(line)["status"] in (400, 404, 405)


def test_strings_of_a_deep_document_take_linear_time():
    """32 KB took 2 s, and 1 MB would hold the process for half an hour."""
    times = []
    for count in (5_000, 20_000):
        body = b"[" * 65 + b'"' + b'\\"' * count
        start = time.perf_counter()
        with pytest.raises(RequestError):
            json_bodies.parse_object(body)
        times.append(time.perf_counter() - start)
    assert times[1] < 0.2, times


def test_deep_documents_are_still_told_from_brackets_in_strings():
    with pytest.raises(RequestError, match="too deeply"):
        json_bodies.parse_object(b'{"a":' * 65 + b"1" + b"}" * 65)
    strings = b",".join([b'"[[[\\"[[{{\\\\"'] * 40)
    assert len(json_bodies.parse_object(b'{"a": [' + strings + b"]}")["a"]) == 40


@pytest.mark.parametrize("end", [b'"', b"\\", b'\\"', b'"\\', b"\\\\"])
def test_documents_that_end_inside_a_string_are_refused(end: bytes):
    with pytest.raises(RequestError):
        json_bodies.parse_object(b"[" * 65 + b'"abc' + end)


def test_asking_about_versions_loads_none(many_versions: str):
    """A status costs no model: else whoever asks for all versions in turn keeps the machine loading."""
    endpoint = Endpoint(config_of(many_versions))
    for path in (
        b"/v1/models/small/versions/2",
        b"/v2/models/small/versions/3",
        b"/v1/models/small/versions/4/metadata",
    ):
        assert ask(endpoint, "GET", path).status == 200
    assert [model.artifact.version for model in endpoint.models.loaded] == [1]
    endpoint.close()


def test_versions_in_memory_are_bounded_and_the_configured_one_stays(endpoint: Endpoint):
    for version in (2, 3, 4, 5, 6, 2, 3, 4):
        assert ask(endpoint, "POST", b"/v1/models/small/versions/%d:predict" % version, PNG, IMAGE).status == 200
        versions = [model.artifact.version for model in endpoint.models.loaded]
        assert len(versions) <= 3
        assert 1 in versions


def test_loads_do_not_pile_up(many_versions: str):
    """While some versions are being loaded, requests for more are told to come back."""
    endpoint = Endpoint(config_of(many_versions, max_loaded_models=2, max_ongoing_requests=64))
    real = endpoint.models._load

    def slow(name: str, version: int) -> object:
        time.sleep(0.2)
        return real(name, version)

    endpoint.models._load = slow  # pyright: ignore[reportAttributeAccessIssue]

    async def go() -> list[SimpleNamespace]:
        paths = [b"/v1/models/small/versions/%d:predict" % (2 + number % 5) for number in range(40)]
        return await asyncio.gather(*(send_to(endpoint, "POST", path, PNG, IMAGE) for path in paths))

    answers = asyncio.run(go())
    assert {answer.status for answer in answers} == {200, 429}
    assert all(b"retry-after" in answer.headers for answer in answers if answer.status == 429)
    assert ask(endpoint, "POST", PREDICT, PNG, IMAGE).status == 200
    endpoint.close()


def test_a_damaged_version_says_nothing_of_its_place(endpoint: Endpoint, many_versions: str):
    answer = ask(endpoint, "POST", b"/v1/models/small/versions/9:predict", PNG, IMAGE)
    assert answer.status in (500, 503)
    assert many_versions.encode() not in answer.body
    assert b"openvino" not in answer.body


def test_slow_broken_and_endless_bodies_end_and_leave_nothing_behind(endpoint: Endpoint):
    part = {"type": "http.request", "body": b"x" * 1000, "more_body": True}
    cases: list[tuple[int, list[dict[str, object]]]] = [
        (408, [part]),
        (408, []),
        (413, [part] * 1000),
        (400, [part, {"type": "http.disconnect"}]),
        (400, [{"type": "http.disconnect"}]),
    ]

    async def go() -> None:
        for status, messages in cases * 3:
            answer = await send_to(endpoint, "POST", PREDICT, PNG, messages)
            assert answer.status == status, answer.body
            assert answer.read <= 101
        done = await asyncio.gather(*(send_to(endpoint, "POST", PREDICT, PNG, [part]) for _ in range(20)))
        assert {answer.status for answer in done} == {408}

    asyncio.run(go())
    assert endpoint._body_bytes == 0
    assert endpoint._working == 0
    assert ask(endpoint, "POST", PREDICT, PNG, IMAGE).status == 200


def test_a_body_that_drips_has_no_longer_than_one_that_stalls(endpoint: Endpoint):
    async def go() -> tuple[int, float]:
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            await asyncio.sleep(0.05)
            return {"type": "http.request", "body": b"x", "more_body": True}

        async def send(message: dict[str, object]) -> None:
            sent.append(message)

        start = time.monotonic()
        scope = {"type": "http", "method": "POST", "path": PREDICT.decode(), "raw_path": PREDICT, "headers": []}
        await endpoint(scope, receive, send)  # pyright: ignore[reportArgumentType]
        return int(str(sent[0]["status"])), time.monotonic() - start

    status, seconds = asyncio.run(go())
    assert status == 408
    assert seconds < 2


def test_all_bodies_together_have_a_bound(endpoint: Endpoint):
    """More bodies than memory is meant for are told to come back, whatever each of them declares."""
    part = {"type": "http.request", "body": b"x" * 90_000, "more_body": True}

    async def go() -> list[int]:
        answers = await asyncio.gather(*(send_to(endpoint, "POST", PREDICT, PNG, [part]) for _ in range(12)))
        return sorted(answer.status for answer in answers)

    statuses = asyncio.run(go())
    assert set(statuses) == {408, 429}
    assert statuses.count(408) <= 4
    assert endpoint._body_bytes == 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([(b"content-length", b"99999999999999")], 413),
        ([(b"content-length", b"9" * 400)], 400),
        ([(b"content-length", b"-1")], 400),
        ([(b"content-length", b"1e3")], 400),
        ([(b"content-length", b"\xd9\xa1")], 400),
        ([(b"content-encoding", b"gzip")], 400),
        ([(b"content-encoding", b"br")], 415),
        ([(b"content-encoding", b"identity, gzip")], 415),
        ([(b"inference-header-content-length", b"-1")], 400),
        ([(b"content-type", b"multipart/form-data; boundary=" + b"b" * 100_000)], 400),
        ([(b"content-type", b"multipart/form-data")], 400),
        ([(b"content-type", b'image/png; a="' + b'\\"' * 50_000)], 400),
        ([(b"content-type", b"\xff\xfe")], 400),
        ([(b"x-request-timeout-seconds", b"nan")], 400),
        ([(b"x-request-timeout-seconds", b"-1")], 400),
        ([(b"x-request-timeout-seconds", b"1e400")], 400),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_odd_headers_are_answered_at_once(endpoint: Endpoint, headers: Headers, status: int):
    for path in (PREDICT, b"/v2/models/small/infer"):
        start = time.perf_counter()
        answer = ask(endpoint, "POST", path, headers, b"{}")
        assert time.perf_counter() - start < 1
        assert answer.status == status, answer.body
        assert set(json.loads(answer.body)) == {"error"}


def test_who_is_gone_takes_his_work_with_him(endpoint: Endpoint):
    """Ray cancels the request of a client that is gone; its images must leave the queue, and its place be free."""

    async def go() -> None:
        for pause_s in (0, 0.002, 0.005, 0.01, 0.02):
            tasks = [asyncio.create_task(send_to(endpoint, "POST", PREDICT, PNG, IMAGE)) for _ in range(30)]
            await asyncio.sleep(pause_s)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert endpoint.models.waiting == 0
            assert endpoint._working == 0
            assert endpoint._body_bytes == 0
            assert endpoint._answers._images == 0
        assert (await send_to(endpoint, "POST", PREDICT, PNG, IMAGE)).status == 200

    asyncio.run(go())


@pytest.mark.parametrize(
    "headers",
    [
        [(b"host", b"rebound.example:8000")],
        [(b"host", b"127.0.0.1:8000"), (b"origin", b"https://page.example")],
        [(b"host", b"127.0.0.1:8000"), (b"origin", b"null")],
        [(b"host", b"[::1")],
        [(b"host", b"localhost"), (b"origin", b"http://[")],
    ],
    ids=["DNS rebinding", "another site", "a sandboxed frame", "half an address", "half an origin"],
)
def test_web_pages_elsewhere_do_not_reach_an_open_local_endpoint(endpoint: Endpoint, headers: Headers):
    for method, path in (("POST", PREDICT), ("GET", b"/v1/models/small"), ("GET", b"/"), ("GET", b"/metrics")):
        answer = ask(endpoint, method, path, [*PNG, *headers], IMAGE)
        assert answer.status == 403
        assert set(json.loads(answer.body)) == {"error"}
    own = [(b"host", b"localhost:8000"), (b"origin", b"http://localhost:8000")]
    assert ask(endpoint, "POST", PREDICT, [*PNG, *own], IMAGE).status == 200


def test_who_lets_everybody_ask_may_be_asked_under_any_name(many_versions: str):
    open_to_all = Endpoint(config_of(many_versions, allow_anonymous=True))
    foreign = [(b"host", b"scores.example"), (b"origin", b"https://page.example")]
    assert ask(open_to_all, "POST", PREDICT, [*PNG, *foreign], IMAGE).status == 200
    open_to_all.close()


def test_few_large_bodies_are_parsed_at_the_same_time(endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch):
    """A body of 64 MiB can become half a gigabyte of Python values for a moment: not in six threads at once."""
    at_once: list[int] = [0]
    most = 0

    def slow(*args: object, **options: object) -> object:
        nonlocal most
        at_once[0] += 1
        most = max(most, at_once[0])
        time.sleep(0.05)
        at_once[0] -= 1
        raise RequestError("no")

    monkeypatch.setattr("cnn_ray.protocol.parse_predict", slow)
    monkeypatch.setattr("cnn_ray.answers.LARGE_BODY_BYTES", 10)

    async def go() -> list[int]:
        sent = (send_to(endpoint, "POST", PREDICT, NONE, b'{"instances": []}') for _ in range(12))
        return [answer.status for answer in await asyncio.gather(*sent)]

    assert set(asyncio.run(go())) == {400}
    assert most <= 2


def test_websockets_end_at_the_gateway():
    """Ray's proxy answers them with a bare 500."""
    sent: list[dict[str, object]] = []

    async def ray(scope: object, receive: object, send: object) -> None:
        raise AssertionError("Ray was asked")

    async def receive() -> dict[str, object]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(Gateway(ray)({"type": "websocket", "path": "/", "headers": []}, receive, send))  # pyright: ignore[reportArgumentType]
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_hostile_files_get_the_verdict_that_scoring_gives_them(endpoint: Endpoint):
    async def go() -> dict[str, tuple[str | None, SimpleNamespace]]:
        return {
            name: (code, await send_to(endpoint, "POST", PREDICT, PNG, data))
            for name, (data, code) in hostile_corpus().items()
            if 0 < len(data) <= endpoint.config.max_body_bytes
        }

    answers = asyncio.run(go())
    assert len(answers) > 100
    for name, (code, answer) in answers.items():
        said = json.loads(answer.body)
        assert answer.status == (200 if code is None else 400), (name, said)
        if code is not None:
            assert f": {code}: " in said["error"], (name, said)
            assert len(answer.body) < 500


def test_hostile_files_are_explained_or_refused(endpoint: Endpoint):
    names = list(hostile_corpus().items())[::12]

    async def go() -> list[tuple[str, str | None, int]]:
        found = []
        for name, (data, code) in names:
            answer = await send_to(endpoint, "POST", b"/v1/models/small:explain", PNG, data)
            found.append((name, code, answer.status))
        return found

    for name, code, status in asyncio.run(go()):
        assert status in ((200, 413) if code is None else (400, 413)), name


def test_killed_decoders_cost_their_own_answers_only(endpoint: Endpoint):
    async def go() -> list[int]:
        assert (await send_to(endpoint, "POST", PREDICT, PNG, IMAGE)).status == 200
        killed = 0
        for listed in Path("/proc/self/task").glob("*/children"):
            for pid in listed.read_text().split():
                if b"decoders" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(int(pid), signal.SIGKILL)
                    killed += 1
        assert killed
        return [(await send_to(endpoint, "POST", PREDICT, PNG, IMAGE)).status for _ in range(6)]

    statuses = asyncio.run(go())
    assert statuses[-2:] == [200, 200]
    assert set(statuses) <= {200, 400, 503}


def test_asking_at_once_for_versions_that_are_not_there_costs_one_listing(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
):
    """The thread that lists also follows the aliases: 50 listings of a slow store would keep it for seconds."""
    listings = 0
    real = served_models.list_versions

    def slow(models_uri: str, name: str) -> frozenset[int]:
        nonlocal listings
        listings += 1
        time.sleep(0.02)
        return real(models_uri, name)

    monkeypatch.setattr(served_models, "list_versions", slow)

    async def go() -> set[int]:
        endpoint.models._known.clear()
        paths = (b"/v1/models/small/versions/%d" % (1000 + number) for number in range(50))
        return {answer.status for answer in await asyncio.gather(*(send_to(endpoint, "GET", path) for path in paths))}

    assert asyncio.run(go()) == {404}
    assert listings == 1


@pytest.mark.parametrize(
    "header",
    [
        (b"x-request-disconnect-disabled", b"\xff"),
        (b"x-request-disconnect-disabled", b"?1"),
        (b"x-request-timeout-seconds", b"\xff"),
        (b"serve_multiplexed_model_id", b"\xff"),
        (b"serve-multiplexed-model-id", b"small"),
        (b"Serve_Multiplexed-Model_Id", b"small"),
        (b"x-session-id", b"\xff"),
        (b"X_Session-Id", b"to-one-replica-please"),
        (b"x-request-id", b"\xff"),
    ],
    ids=repr,
)
def test_headers_that_steer_ray_end_at_the_gateway(header: tuple[bytes, bytes]):
    """Ray's proxy decodes these as UTF-8 without a net (a bare 500), no longer sees clients leave, or sends all that a
    client asks to one replica."""
    passed: list[list[tuple[bytes, bytes]]] = []

    async def ray(scope: dict[str, list[tuple[bytes, bytes]]], receive: object, send: object) -> None:
        passed.append(scope["headers"])

    async def receive() -> dict[str, object]:
        return {"type": "http.disconnect"}

    async def send(message: dict[str, object]) -> None:
        pass

    good = [(b"x-request-id", b"a-1"), (b"x-request-timeout-seconds", b"2.5"), (b"authorization", b"Bearer x")]
    scope = {"type": "http", "path": "/", "method": "POST", "headers": [header]}
    asyncio.run(Gateway(ray)(scope, receive, send))  # pyright: ignore[reportArgumentType]
    asyncio.run(Gateway(ray)({**scope, "headers": good}, receive, send))  # pyright: ignore[reportArgumentType]
    assert passed[0] == []
    assert passed[-1] == good


def test_what_ray_raises_is_no_bare_500():
    sent: list[dict[str, object]] = []

    async def ray(scope: object, receive: object, send: object) -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "the words of an exception")

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b""}

    async def send(message: dict[str, object]) -> None:
        sent.append(message)

    asyncio.run(Gateway(ray)({"type": "http", "path": "/", "method": "POST", "headers": []}, receive, send))  # pyright: ignore[reportArgumentType]
    assert sent[0]["status"] in (500, 503)
    assert set(json.loads(bytes(sent[1]["body"]))) == {"error"}  # pyright: ignore[reportArgumentType]
    assert b"exception" not in bytes(sent[1]["body"])  # pyright: ignore[reportArgumentType]
