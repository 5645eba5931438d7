"""S3 servers and objects as they are in the field: each habit is named, or does no harm."""

from __future__ import annotations

import gzip
import http.client
import http.server
import os
import pickle
import re
import threading
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from cnn_ray import errors, storage_retry
from cnn_ray.config import StorageConfig
from cnn_ray.reader import ImageReader
from cnn_ray.records import QuarantineCode, RowFailure
from cnn_ray.storage import S3Store, open_store
from cnn_ray.storage_clients import make_clients
from cnn_ray.storage_options import these_storage_options, use_storage_options

Headers = dict[str, str]
_OWN_HOP = {"content-length", "transfer-encoding", "connection"}


def s3_error(status: int, code: str, more: str = "") -> tuple[int, bytes]:
    return status, f"<Error><Code>{code}</Code><Message>m</Message>{more}</Error>".encode()


class OddServer:
    """A proxy before moto. `refuse` may answer a request itself, `change` may turn an answer's headers and body."""

    def __init__(self, upstream: str) -> None:
        self.refuse: Callable[[str, str, Headers], tuple[int, bytes] | None] = lambda _method, _path, _headers: None
        self.change: Callable[[Headers, bytes], bytes] = lambda _headers, body: body
        self.seen: list[tuple[str, str, Headers]] = []
        outer, address = self, upstream.removeprefix("http://")

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                headers = {k.lower(): v for k, v in self.headers.items() if k.lower() not in {"host", *_OWN_HOP}}
                outer.seen.append((self.command, self.path, dict(headers)))
                refusal = outer.refuse(self.command, self.path, headers)
                if refusal is not None:
                    return self.send(refusal[0], {}, refusal[1])
                connection = http.client.HTTPConnection(address, timeout=30)
                connection.request(self.command, self.path, body, headers)
                response = connection.getresponse()
                data = response.read()
                back = {k.lower(): v for k, v in response.getheaders()}
                size = back.get("content-length", str(len(data)))
                back = {k: v for k, v in back.items() if k not in _OWN_HOP}
                data = outer.change(back, data)
                return self.send(response.status, back, data, size if self.command == "HEAD" else str(len(data)))

            def send(self, status: int, headers: Headers, body: bytes, size: str | None = None) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", size or str(len(body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            do_GET = do_PUT = do_HEAD = do_DELETE = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def odd(s3_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[OddServer]:
    server = OddServer(s3_server)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server.server_address[1]}")
    monkeypatch.setattr(storage_retry, "BACKOFF_BASE_S", 0.001)
    yield server
    server.server.shutdown()
    server.server.server_close()


def etags(turn: Callable[[str], str | None]) -> Callable[[Headers, bytes], bytes]:
    """A change of every ETag, in headers and listings; None takes it away."""

    def change(headers: Headers, body: bytes) -> bytes:
        if "etag" in headers:
            turned = turn(headers.pop("etag"))
            headers |= {} if turned is None else {"etag": turned}
        if b"<ListBucketResult" not in body[:300]:
            return body

        def listed(match: re.Match[bytes]) -> bytes:
            turned = turn(match[1].decode().replace("&quot;", '"'))
            return b"" if turned is None else b"<ETag>" + turned.encode().replace(b'"', b"&quot;") + b"</ETag>"

        return re.sub(rb"<ETag>(.*?)</ETag>", listed, body)

    return change


@pytest.mark.parametrize(
    ("turn", "said"),
    [
        (lambda _: None, "Received: none"),
        (lambda _: '""', "Received: none"),
        (lambda etag: f"W/{etag}", "a weak one"),
        (lambda etag: f"W/{etag.strip(chr(34))}", "a weak one"),
    ],
)
def test_etags_that_no_condition_can_name_are_named(odd: OddServer, s3_uri: str, turn: Any, said: str) -> None:
    open_store(s3_uri).put("in/a", b"1")
    odd.change = etags(turn)
    store = open_store(s3_uri)
    for ask in (lambda: list(store.list()), lambda: store.head("in/a"), store.check_conditional_writes):
        odd.seen.clear()
        with pytest.raises(errors.ServerLacksError, match="Expected a strong ETag") as caught:
            ask()
        assert said in str(caught.value)
        assert caught.value.exit_code == 2
        assert len(odd.seen) <= 2  # the answer and the probe's removal: no second try
    assert store.get("in/a") == b"1"  # what needs no version can be read
    assert store.keys() == ["in/a"]


def test_etags_without_quotes_are_as_good(odd: OddServer, s3_uri: str) -> None:
    odd.change = etags(lambda etag: etag.strip('"'))
    store = open_store(s3_uri)
    store.check_conditional_writes()
    store.put("a", b"1")
    row = next(store.list()).to_pylist()[0]
    assert store.get("a", if_match=row["etag"]) == b"1"
    store.check_etag("a")
    assert store.keys() == ["a"]


def drops(name: str) -> Callable[[str, str, Headers], None]:
    def refuse(method: str, _path: str, headers: Headers) -> None:
        if method == "PUT":
            headers.pop(name, None)

    return refuse


def answers(status: int, code: str, name: str) -> Callable[[str, str, Headers], tuple[int, bytes] | None]:
    return lambda method, _path, headers: s3_error(status, code) if method == "PUT" and name in headers else None


LACKS = {
    "501": (answers(501, "NotImplemented", "if-none-match"), "If-None-Match is not implemented"),
    "501 for If-Match": (answers(501, "NotImplemented", "if-match"), "If-Match is not implemented"),
    "405": (answers(405, "MethodNotAllowed", "if-none-match"), "If-None-Match is not implemented"),
    "ignored If-None-Match": (drops("if-none-match"), "ignores If-None-Match"),
    "ignored If-Match": (drops("if-match"), "ignores If-Match"),
    "refused If-None-Match": (answers(412, "PreconditionFailed", "if-none-match"), "of a new object was refused"),
    "refused If-Match": (answers(412, "PreconditionFailed", "if-match"), "names the right ETag was refused"),
}


@pytest.mark.parametrize("name", LACKS)
def test_a_server_without_conditional_writes_is_named_at_once(odd: OddServer, s3_uri: str, name: str) -> None:
    odd.refuse, said = LACKS[name]
    store = open_store(s3_uri)
    with pytest.raises(errors.ServerLacksError, match="conditional writes") as caught:
        store.check_conditional_writes()
    assert said in str(caught.value)
    assert caught.value.exit_code == 2
    assert len(odd.seen) <= 9
    assert store.keys() == []


def test_the_probe_of_a_good_server_is_cheap_and_leaves_nothing(odd: OddServer, s3_uri: str) -> None:
    store = open_store(s3_uri)
    store.check_conditional_writes()
    assert [method for method, _, _ in odd.seen].count("PUT") == 4
    assert len(odd.seen) <= 8
    assert store.keys() == []


def test_a_get_that_refuses_the_right_etag_is_compared_instead(odd: OddServer, s3_uri: str) -> None:
    odd.refuse = lambda method, _path, headers: (
        s3_error(412, "PreconditionFailed") if method == "GET" and "if-match" in headers else None
    )
    store = open_store(s3_uri)
    store.put("a", b"old")
    etag = store.head("a").etag
    assert [store.get("a", if_match=etag) for _ in range(2)] == [b"old"] * 2
    store.put("a", b"newer")
    with pytest.raises(errors.ChangedError):
        store.get("a", if_match=etag)


def test_a_get_that_ignores_the_etag_gives_no_other_version(odd: OddServer, s3_uri: str) -> None:
    def ignore(_method: str, _path: str, headers: Headers) -> None:
        headers.pop("if-match", None)

    odd.refuse = ignore
    store = open_store(s3_uri)
    store.put("a", b"old")
    etag = store.head("a").etag
    assert store.get("a", if_match=etag) == b"old"
    store.put("a", b"newer")
    with pytest.raises(errors.ChangedError):
        store.get("a", if_match=etag)


def test_listings_that_tell_other_etags_than_answers_are_named(odd: OddServer, s3_uri: str) -> None:
    store = open_store(s3_uri)
    store.put("a", b"1")
    store.check_etag("a")
    odd.change = lambda _headers, body: re.sub(rb"<ETag>.*?</ETag>", b"<ETag>&quot;0-1&quot;</ETag>", body)
    with pytest.raises(errors.ServerLacksError, match="the same ETag"):
        store.check_etag("a")


@pytest.mark.parametrize("storage_class", ["GLACIER", "DEEP_ARCHIVE"])
@pytest.mark.parametrize("quick", [True, False])
def test_archived_objects_have_a_code_of_their_own(
    odd: OddServer, s3_uri: str, storage_class: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/a", Body=b"1", StorageClass=storage_class)
    if not quick:
        monkeypatch.setattr(S3Store, "_get_quick", lambda *_: None)
    with pytest.raises(errors.ArchivedError, match="restore it") as caught:
        open_store(s3_uri).get("a")
    assert caught.value.exit_code == 2
    assert len(odd.seen) <= 3
    failure = ImageReader(s3_uri).fetch(f"{s3_uri}/a")
    assert isinstance(failure, RowFailure)
    assert failure.code == QuarantineCode.ARCHIVED


PLAIN = os.urandom(1000)
ENCODED = {
    "gzip": ("gzip", gzip.compress(PLAIN), PLAIN),
    "GZIP, as some write it": ("GZIP", gzip.compress(PLAIN), PLAIN),
    "x-gzip": ("x-gzip", gzip.compress(PLAIN), PLAIN),
    "several members": ("gzip", gzip.compress(PLAIN[:300]) + gzip.compress(PLAIN[300:]), PLAIN),
    "gzip with zeros behind": ("gzip", gzip.compress(PLAIN) + bytes(512), PLAIN),
    "aws-chunked and gzip": ("aws-chunked,gzip", gzip.compress(PLAIN), PLAIN),
    "aws-chunked alone": ("aws-chunked", PLAIN, PLAIN),
    "gzip that is none": ("gzip", b"\x89PNG" + PLAIN, b"\x89PNG" + PLAIN),
    "a charset": ("utf-8", PLAIN, PLAIN),
    "exactly as large as allowed": ("gzip", gzip.compress(bytes(20_000)), bytes(20_000)),
    "a bomb": ("gzip", gzip.compress(bytes(5_000_000)), errors.TooLargeError),
    "a bomb of members": ("gzip", gzip.compress(bytes(19_000)) * 2, errors.TooLargeError),
    "endless empty members": ("gzip", gzip.compress(b"") * 900, b""),
    "cut": ("gzip", gzip.compress(PLAIN)[:-9], errors.DamagedError),
    "another checksum": ("gzip", gzip.compress(PLAIN)[:-8] + bytes(8), errors.DamagedError),
    "br": ("br", PLAIN, errors.EncodedError),
    "zstd": ("zstd", PLAIN, errors.EncodedError),
    "deflate": ("deflate", zlib.compress(PLAIN), errors.EncodedError),
    "twice": ("gzip, gzip", gzip.compress(gzip.compress(PLAIN)), errors.EncodedError),
}


@pytest.mark.parametrize("name", ENCODED)
@pytest.mark.parametrize("quick", [True, False])
def test_content_encoding(s3_server: str, s3_uri: str, name: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, stored, expected = ENCODED[name]
    bucket, _, prefix = s3_uri.removeprefix("s3://").partition("/")
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/a", Body=stored, ContentEncoding=encoding)
    monkeypatch.setattr(S3Store, "_get_slow" if quick else "_get_quick", _explode if quick else lambda *_: None)
    store = open_store(s3_uri)
    info = store.head("a")
    assert info.size_bytes == len(stored)
    if isinstance(expected, bytes):
        assert store.get("a", if_match=info.etag, max_bytes=20_000) == expected
    else:
        with pytest.raises(expected):
            store.get("a", if_match=info.etag, max_bytes=20_000)
        failure = ImageReader(s3_uri).fetch(f"{s3_uri}/a")
        assert isinstance(failure, RowFailure) == (expected is not errors.TooLargeError)
        assert isinstance(failure, bytes) or failure.code in ("unsupported_format", "decode_error")


def _explode(*_: object) -> None:
    raise AssertionError("the slow client was asked")


@pytest.mark.parametrize("quick", [True, False])
def test_requester_pays_and_encryption_are_asked_for_in_every_request(
    odd: OddServer, s3_uri: str, quick: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd.refuse = lambda _method, _path, headers: (
        None if headers.get("x-amz-request-payer") == "requester" else s3_error(403, "AccessDenied")
    )
    with pytest.raises(errors.AccessDeniedError, match="--request-payer"):
        open_store(s3_uri).put("a", b"1")
    if not quick:
        monkeypatch.setattr(S3Store, "_get_quick", lambda *_: None)
    options = StorageConfig(request_payer="requester", sse="aws:kms", sse_kms_key_id="key-1")
    with these_storage_options(options):
        store = open_store(s3_uri)
    store = pickle.loads(pickle.dumps(store))  # noqa: S301 - as Ray does
    odd.seen.clear()
    store.put("a", b"1")
    assert store.put_if_absent("b", b"1")
    assert store.get("a") == b"1"
    assert store.get_versioned("a")[0] == b"1"
    assert [table.num_rows for table in store.list()] == [2]
    store.delete("b")
    assert store.exists("a")
    for method, _, headers in odd.seen:
        assert headers["x-amz-request-payer"] == "requester"
        wanted = ("aws:kms", "key-1") if method == "PUT" else (None, None)
        names = ("x-amz-server-side-encryption", "x-amz-server-side-encryption-aws-kms-key-id")
        assert tuple(headers.get(name) for name in names) == wanted


def test_options_hold_for_the_process_or_for_a_block() -> None:
    def options_of_new() -> StorageConfig:
        store = open_store("s3://bucket/p")
        assert isinstance(store, S3Store)
        return store.options

    payer, sse = StorageConfig(request_payer="requester"), StorageConfig(sse="AES256")
    try:
        use_storage_options(payer)
        assert options_of_new() == payer
        with these_storage_options(sse):
            assert options_of_new() == sse
        assert options_of_new() == payer
    finally:
        use_storage_options(StorageConfig())
    assert options_of_new() == StorageConfig()


@pytest.mark.parametrize("style", ["path", "virtual"])
def test_addressing_style(s3_server: str, style: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://s3.example.test:9000")
    client, quick = make_clients("bucket-a", StorageConfig(addressing_style=style))
    url = client.generate_presigned_url("get_object", Params={"Bucket": "bucket-a", "Key": "k"})
    assert url.startswith("http://bucket-a.") == (style == "virtual")
    assert str(quick.config.get("virtual_hosted_style_request", False)).lower() == str(style == "virtual").lower()
    assert quick.config["endpoint"].startswith("http://bucket-a.") == (style == "virtual")


def test_a_wrong_region_is_named_with_the_right_one(odd: OddServer, s3_uri: str) -> None:
    """boto3 follows some of these by itself; whatever it does not follow is a sentence."""
    answer = s3_error(301, "PermanentRedirect", "<Region>eu-central-1</Region><Endpoint>x</Endpoint>")
    odd.refuse = lambda _method, _path, _headers: answer
    store = open_store(s3_uri)
    for ask in (lambda: store.get("a"), lambda: store.put("a", b""), lambda: list(store.list())):
        odd.seen.clear()
        with pytest.raises(errors.StorageError, match="AWS_DEFAULT_REGION=eu-central-1"):
            ask()
        assert len(odd.seen) < 8
