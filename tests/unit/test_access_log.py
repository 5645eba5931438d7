"""One request is one line, and nothing confidential is in it."""

from __future__ import annotations

import io
import json
import logging
import re
from datetime import UTC, datetime

import pytest

from cnn_ray.access_log import MAX_PATH_CHARS, AccessEntry, access_line, log_access, open_access_log, request_id
from cnn_ray.auth import new_key

AT = datetime(2026, 1, 2, 3, 4, 5, 678_900, tzinfo=UTC)
ENTRY = AccessEntry(
    request_id="r-1",
    method="POST",
    path="/v1/models/demo:predict",
    status=200,
    action="predict",
    model="demo",
    version=3,
    key="nightly",
    client="10.0.0.9",
    body_bytes=123,
    instances=2,
    total_ms=31.23456,
    decode_ms=9.999,
    predict_ms=20,
)


def line_of(**changes: object) -> str:
    from dataclasses import replace

    return access_line(replace(ENTRY, **changes), AT)  # pyright: ignore[reportArgumentType]


def test_the_line_is_json_with_every_field():
    assert json.loads(access_line(ENTRY, AT)) == {
        "time": "2026-01-02T03:04:05.678Z",
        "request_id": "r-1",
        "method": "POST",
        "path": "/v1/models/demo:predict",
        "status": 200,
        "action": "predict",
        "model": "demo",
        "version": 3,
        "key": "nightly",
        "client": "10.0.0.9",
        "body_bytes": 123,
        "instances": 2,
        "total_ms": 31.23,
        "decode_ms": 10.0,
        "predict_ms": 20,
    }


@pytest.mark.parametrize(
    "path",
    [
        '/a\nb", "status": 500',
        "/a\r\n{}",
        "/\x1b[31m\x00\x7f",
        "/\u2028\u2029\x85",
        "/\ud800",
        "/ü/日本",
        "/" + "x" * 9000,
    ],
)
def test_a_path_stays_inside_its_string(path: str):
    line = line_of(path=path, method=path.replace("/", "A"), model=path, client=path)
    assert re.fullmatch(r"[ -~]+", line)
    read = json.loads(line)
    assert read["status"] == 200
    assert read["path"] in (path, path[:MAX_PATH_CHARS] + "...")
    assert len(read["path"]) <= MAX_PATH_CHARS + 3
    assert len(line) < 2500


def test_queries_and_keys_in_the_path_are_left_out():
    key, _ = new_key("a")
    for path in (f"/v1/models/m?key={key}", f"/{key}", f"/v1/models/{key}:predict", f"/x={key.upper()}"):
        line = line_of(path=path)
        assert key[7:] not in line.lower()
    assert json.loads(line_of(path="/a?b=secret"))["path"] == "/a"


@pytest.mark.parametrize("good", ["a", "req-1", "A.b_C:9", "x" * 128, "0af7651916cd43dd8448eb211c80319c"])
def test_good_request_ids_are_kept(good: str):
    assert request_id(good) == good


@pytest.mark.parametrize(
    "bad",
    [None, "", "x" * 129, "a b", "a\n", "a\r\nSet-Cookie: x=1", "ü", "a,b", '"', "<b>", "a\x00", "{}", new_key("a")[0]],
)
def test_other_request_ids_are_replaced(bad: str | None):
    made = request_id(bad)
    assert re.fullmatch("[0-9a-f]{32}", made)
    assert made != request_id(bad)


def test_the_log_gets_bare_json_and_no_other_handler_does():
    logger = logging.getLogger("cnn_ray.access")
    before = (logger.level, logger.propagate, list(logger.handlers))
    first, second, elsewhere = io.StringIO(), io.StringIO(), io.StringIO()
    of_root = logging.StreamHandler(elsewhere)  # caplog will not do: pytest adds it to loggers that do not propagate
    logging.getLogger().addHandler(of_root)
    try:
        open_access_log(first)
        open_access_log(second)  # a second call moves it
        log_access(ENTRY)
        log_access(ENTRY)
        assert [json.loads(line)["request_id"] for line in second.getvalue().splitlines()] == ["r-1", "r-1"]
        assert first.getvalue() == ""
        assert elsewhere.getvalue() == ""
    finally:
        logging.getLogger().removeHandler(of_root)
        logger.level, logger.propagate, logger.handlers = before
