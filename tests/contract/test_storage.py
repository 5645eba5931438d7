"""The promises of a store, the same for local folders and S3, and what each does when storage fails."""

from __future__ import annotations

import http.server
import os
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path

import pytest

from cnn_ray import errors, records, storage, storage_base, storage_ranges, storage_retry
from cnn_ray.storage import S3Store, Store, open_store, split_uri
from cnn_ray.storage_s3 import QUICK_TRIES


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return open_store(request.getfixturevalue("s3_uri"))
    (tmp_path / "root").mkdir()
    return open_store(str(tmp_path / "root"))


def test_when_the_newest_object_was_written(store: Store) -> None:
    assert store.newest_s() is None
    before_s = time.time()
    store.put("a/old", b"x")
    store.put("b/new", b"x")
    newest_s, older_s = store.newest_s(), store.newest_s("a/")
    assert newest_s is not None
    assert older_s is not None
    assert before_s - 2 < older_s <= newest_s < time.time() + 2  # S3 tells whole seconds
    assert store.newest_s("c/") is None


def test_put_get_head_exists(store: Store) -> None:
    store.put("a/b.bin", b"one")
    store.put("a/b.bin", b"three")
    assert store.get("a/b.bin") == b"three"
    assert store.head("a/b.bin").size_bytes == 5
    assert store.get("a/b.bin", if_match=store.head("a/b.bin").etag) == b"three"
    assert store.exists("a/b.bin")
    assert not store.exists("a/c.bin")
    store.put("empty", b"")
    assert store.get("empty") == b""


@pytest.mark.parametrize(
    "key", ["a b", "a%20b", "100%", "a+b&c=d?e#f", "ünï/日本", "date=2025-01-01/x", "a'\"<>b", "~a*[b]{c}|^`"]
)
def test_every_name_comes_back_under_its_own_name(store: Store, key: str) -> None:
    store.put(key, key.encode())
    assert store.keys() == [key]
    assert store.get(key) == key.encode()


def test_missing_object_is_not_found(store: Store) -> None:
    for call in (store.get, store.head, store.get_versioned):
        with pytest.raises(errors.NotFoundError, match=r"Expected .* Received: .* Next: "):
            call("nothing")


def test_if_match_notices_a_change(store: Store) -> None:
    store.put("x", b"old")
    etag = store.head("x").etag
    store.put("x", b"newer")
    with pytest.raises(errors.ChangedError):
        store.get("x", if_match=etag)


def test_max_bytes_is_the_largest_size_allowed(store: Store) -> None:
    store.put("x", b"12345")
    assert store.get("x", max_bytes=5) == b"12345"
    with pytest.raises(errors.TooLargeError):
        store.get("x", max_bytes=4)


def test_listing_is_in_byte_order_over_pages_and_folders(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "100")  # 4 pages of the server; 1,200 uploads would take 15 s
    monkeypatch.setattr(storage_ranges, "SPAN_PAGES", 1)  # the rest is cut into ranges
    keys = ["a-b", "a/b", "a/b/c", "a0", "a", "B", "é", "z/é", "\U0001f600", "ﬀ"]
    keys = [k for k in keys if k not in ("a", "a/b")] if store.uri.startswith("/") else keys
    keys += [f"many/{i}" for i in range(350)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda key: store.put(key, key.encode()), keys))
    tables = list(store.list())
    assert all(table.schema == records.LISTING_SCHEMA for table in tables)
    rows = [row for table in tables for row in table.to_pylist()]
    expected = sorted(keys, key=str.encode)
    assert [row["uri"] for row in rows] == [store.uri_of(key) for key in expected]
    assert [row["size_bytes"] for row in rows] == [len(key.encode()) for key in expected]
    first = expected[0]
    assert rows[0]["etag"] == store.head(first).etag
    assert store.keys("many/11") == sorted(k for k in keys if k.startswith("many/11"))
    assert store.keys("no such") == []
    assert list(store.list("no such/")) == []


def test_local_batches_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "LIST_BATCH_ROWS", 2)
    for key in "abcde":
        (tmp_path / key).touch()
    assert [table.num_rows for table in open_store(str(tmp_path)).list()] == [2, 2, 1]


def test_put_if_absent_has_one_winner(store: Store) -> None:
    start = threading.Barrier(16)

    def race(i: int) -> bool:
        start.wait(30)
        return store.put_if_absent("claim/it", b"%d" % i)

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(race, range(16)))
    assert won.count(True) == 1
    assert store.get("claim/it") == b"%d" % won.index(True)
    assert store.keys() == ["claim/it"]


def test_put_if_match_loses_no_increment(store: Store) -> None:
    store.put("counter", b"0")

    def add_one(_: int) -> None:
        version = None
        while version is None:
            data, seen = store.get_versioned("counter")
            version = store.put_if_match("counter", b"%d" % (int(data) + 1), seen)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(add_one, range(24)))
    assert store.get("counter") == b"24"


def test_put_if_match_tokens(store: Store) -> None:
    store.put("x", b"1")
    _, first = store.get_versioned("x")
    second = store.put_if_match("x", b"2", first)
    assert second is not None
    assert second == store.get_versioned("x")[1]
    assert store.put_if_match("x", b"3", first) is None
    assert store.get("x") == b"2"
    assert store.put_if_match("gone/x", b"3", first) is None
    assert store.keys() == ["x"]


def test_files_travel_whole(store: Store, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "new" / "target"
    source.write_bytes(os.urandom(3_000_000))
    store.put_file("m/model", source)
    store.get_to_file("m/model", target)
    assert target.read_bytes() == source.read_bytes()
    with pytest.raises(errors.NotFoundError):
        store.get_to_file("m/none", tmp_path / "none")
    assert sorted(p.name for p in target.parent.iterdir()) == ["target"]


@pytest.mark.parametrize("key", ["../x", "a/../../x", "a/..", "/etc/passwd", "a\0b", ""])
def test_no_key_leaves_the_root(store: Store, key: str) -> None:
    calls: list[Callable[[], object]] = [
        lambda: store.get(key),
        lambda: store.put(key, b""),
        lambda: store.put_if_absent(key, b""),
        lambda: store.put_if_match(key, b"", "v"),
        lambda: store.head(key),
        lambda: store.put_file(key, Path(__file__)),
    ]
    for call in calls:
        with pytest.raises(errors.ConfigError):
            call()


def test_pickle_after_use(store: Store) -> None:
    store.put("x", b"1")
    assert store.get("x") == b"1"
    copy = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own
    assert (copy.uri, copy.get("x")) == (store.uri, b"1")


def test_check_writable_leaves_nothing(store: Store) -> None:
    store.check_writable()
    assert store.keys() == []


def test_delete_is_done_once_and_stays_below_the_root(store: Store) -> None:
    store.put("a/b", b"x")
    store.delete("a/b")
    assert not store.exists("a/b")
    store.delete("a/b")
    with pytest.raises(errors.ConfigError):
        store.delete("../b")


def test_s3_server_date_is_that_of_the_answer(s3_uri: str) -> None:
    said = S3Store(s3_uri).server_date()
    assert said is not None
    assert abs((parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds()) < 60


def test_locations(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    assert open_store("folder/").uri == f"{tmp_path}/folder"
    assert open_store("~/x").uri == "/home/me/x"
    assert open_store("file:///a%20b/").uri == "/a b"
    assert open_store("s3://bucket/").uri == "s3://bucket"
    assert open_store("s3://bucket/a/b/").uri_of("c") == "s3://bucket/a/b/c"
    assert split_uri("s3://b-1/p/m.csv") == ("s3://b-1/p", "m.csv")
    assert split_uri("s3://b-1/m.csv") == ("s3://b-1", "m.csv")
    assert split_uri("m.csv") == (str(tmp_path), "m.csv")
    assert split_uri("/m.csv") == ("/", "m.csv")


@pytest.mark.parametrize(
    "uri", ["", "gs://b/x", "https://me:secret@host/x?X-Amz-Signature=secret", "s3://me:secret@b/x"]
)
def test_other_locations_are_refused_without_repeating_secrets(uri: str) -> None:
    with pytest.raises(errors.ConfigError) as caught:
        open_store(uri)
    assert "secret" not in str(caught.value)


def test_split_uri_needs_a_file() -> None:
    with pytest.raises(errors.ConfigError):
        split_uri("s3://bucket")


def test_import_is_light() -> None:
    code = "import sys, cnn_ray.storage; print(sorted({'boto3', 'botocore', 'obstore', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# ---- local folders


def test_local_missing_folder(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "none"))
    with pytest.raises(errors.NotFoundError):
        list(store.list())
    assert store.keys() == []


def test_local_unwritable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "below", Path("/proc/cnn_ray")):
        store = open_store(str(place))
        for call in (store.check_writable, lambda s=store: s.put("x", b""), lambda s=store: s.put_if_absent("x", b"")):
            with pytest.raises(errors.StorageError, match="Next: "):
                call()
    with pytest.raises(errors.StorageError):
        open_store(str(tmp_path)).put("n" * 300, b"")


def test_local_links_stay_below_the_root(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "secret").write_text("secret")
    (root / "real").write_text("real")
    (root / "inside").symlink_to(root / "real")
    (root / "outside").symlink_to(tmp_path / "secret")
    (root / "loop").symlink_to(root)
    (root / "dangling").symlink_to(root / "none")
    os.mkfifo(root / "fifo")
    store = open_store(str(root))
    assert store.keys() == ["inside", "real"]
    for call in (lambda: store.get("outside"), lambda: store.put("outside", b"x")):
        with pytest.raises(errors.AccessDeniedError):
            call()
    for key in ("fifo", "loop", "dangling", "real/x"):
        with pytest.raises(errors.NotFoundError):
            store.get(key)
    assert (tmp_path / "secret").read_text() == "secret"


def test_local_names_that_are_not_utf8(tmp_path: Path) -> None:
    folder = os.fsencode(tmp_path) + b"/f\xff"
    os.mkdir(folder)  # noqa: PTH102 - bytes
    with open(folder + b"/\xe9 100%.png", "wb") as file:  # noqa: PTH123 - bytes
        file.write(b"x")
    store = open_store(str(tmp_path))
    assert store.keys() == ["f%FF/%E9%20100%25.png"]
    assert store.get(store.keys()[0]) == b"x"
    assert [table.num_rows for table in store.list("f%FF/")] == [1]


def test_local_temporary_files_are_not_listed(tmp_path: Path) -> None:
    (tmp_path / f"{storage_base.OWN_PREFIX}tmp-1-x").write_text("half")
    (tmp_path / ".hidden").write_text("x")
    assert open_store(str(tmp_path)).keys() == [".hidden"]


def test_local_full_disk_is_named() -> None:
    error = storage_base.error_of_os(OSError(28, "No space left on device"), "/data/out/x")
    assert type(error) is errors.StorageError
    assert "/data/out/x" in str(error)
    assert "space" in str(error)


# ---- S3


def test_s3_missing_bucket(s3_server: str) -> None:
    store = open_store("s3://no-such-bucket-at-all/p")
    calls = [
        lambda: list(store.list()),
        store.check_writable,
        lambda: store.get("x"),
        lambda: store.put("x", b""),
        store.keys,
    ]
    for call in calls:
        with pytest.raises(errors.NotFoundError):
            call()


def test_s3_folder_markers_are_no_objects_and_odd_keys_are(s3_uri: str) -> None:
    bucket = open_store(s3_uri.rpartition("/")[0])
    for key in ("prefix/", "prefix/a/", "prefix/a//b", "prefix/a/./c", "prefixed"):
        bucket.put(key, b"" if key.endswith("/") else b"1")
    store = open_store(s3_uri)
    assert store.keys() == ["a/./c", "a//b"]
    assert store.get("a//b") == b"1"


def test_s3_get_is_the_quick_client_s(s3_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(s3_uri)
    store.put("x", b"1")
    monkeypatch.delattr(S3Store, "_get_slow")
    assert store.get("x", if_match=store.head("x").etag, max_bytes=1) == b"1"


def test_s3_quick_client_that_never_answered_is_dropped(scripted: ScriptedServer) -> None:
    store = open_store("s3://bucket/p")
    for _ in range(QUICK_TRIES):
        scripted.replies = [xml_error(400, "AuthorizationHeaderMalformed"), GOOD]
        assert store.get("x") == GOOD.body
    scripted.agents.clear()
    assert store.get("x") == GOOD.body
    assert len(scripted.agents) == 1
    assert "Boto3" in scripted.agents[0]


def test_s3_quick_client_outlives_one_failure_at_its_start(scripted: ScriptedServer) -> None:
    scripted.replies = [xml_error(503, "SlowDown"), GOOD]
    store = open_store("s3://bucket/p")
    for _ in range(3):
        assert store.get("x") == GOOD.body
    assert "Boto3" in scripted.agents[1]
    assert not any("Boto3" in agent for agent in scripted.agents[2:])


class Reply:
    """One prepared answer. `missing` bytes are declared but never sent; `reset` breaks the connection."""

    def __init__(
        self, status: int, body: bytes = b"", *, missing: int = 0, reset: bool = False, **headers: str
    ) -> None:
        self.status, self.body, self.missing, self.reset, self.headers = status, body, missing, reset, headers


def xml_error(status: int, code: str) -> Reply:
    body = f"<Error><Code>{code}</Code><Message>secret-message</Message></Error>"
    return Reply(status, body.encode(), **{"Content-Type": "application/xml"})


GOOD = Reply(200, b"0123456789", ETag='"e"')


class ScriptedServer:
    """An HTTP server that gives its prepared answers in turn, the last one for ever, and remembers the requests."""

    def __init__(self) -> None:
        self.replies: list[Reply] = []
        self.requests: list[tuple[str, str]] = []
        self.agents: list[str] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                outer.requests.append((self.command, self.path))
                outer.agents.append(self.headers.get("User-Agent", ""))
                reply = outer.replies.pop(0) if len(outer.replies) > 1 else outer.replies[0]
                if reply.reset:
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    self.close_connection = True
                    self.connection.close()
                    return
                self.send_response(reply.status)
                headers = {"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"} | reply.headers
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(reply.body) + reply.missing))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(reply.body)
                if reply.missing:
                    self.close_connection = True

            do_GET = do_PUT = do_HEAD = answer

            def log_message(self, format: str, *args: object) -> None:
                pass

            def finish(self) -> None:
                with suppress(OSError, ValueError):
                    super().finish()

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server.server_address[1]}")
    monkeypatch.setattr(storage_retry, "BACKOFF_BASE_S", 0.001)
    yield server
    server.server.shutdown()
    server.server.server_close()


CUT = Reply(200, b"01234", missing=5, ETag='"e"')
RESET = Reply(0, reset=True)
SLOW_DOWN = xml_error(503, "SlowDown")
TRANSIENT = {
    "truncated": CUT,
    "reset": RESET,
    "503": SLOW_DOWN,
    "500": xml_error(500, "InternalError"),
    "429": Reply(429),
    "expired": xml_error(400, "ExpiredToken"),
    "timeout": xml_error(400, "RequestTimeout"),
    "conflict": xml_error(409, "ConditionalRequestConflict"),
}


@pytest.mark.parametrize("name", TRANSIENT)
@pytest.mark.parametrize("quick", [True, False])
def test_s3_transient_failures_are_tried_again(scripted: ScriptedServer, name: str, quick: bool) -> None:
    bad = TRANSIENT[name]
    scripted.replies = [bad, bad, bad, GOOD]
    store = open_store("s3://bucket/p")
    assert (store.get("x") if quick else store.get_versioned("x")[0]) == GOOD.body
    assert len(scripted.requests) in ((4, 5) if quick else (4,))


@pytest.mark.parametrize("name", TRANSIENT)
def test_s3_transient_failures_that_stay_are_unavailable(scripted: ScriptedServer, name: str) -> None:
    scripted.replies = [TRANSIENT[name]]
    store = open_store("s3://bucket/p")
    for call in (lambda: store.get("x"), lambda: store.get_versioned("x")):
        scripted.requests.clear()
        with pytest.raises(errors.UnavailableError, match="Next: try again later") as caught:
            call()
        assert storage_retry.ATTEMPTS <= len(scripted.requests) <= storage_retry.ATTEMPTS + 1
        assert "secret" not in str(caught.value)


FINAL = [
    (403, "AccessDenied", errors.AccessDeniedError),
    (403, "InvalidAccessKeyId", errors.CredentialsError),
    (403, "SignatureDoesNotMatch", errors.CredentialsError),
    (403, "RequestTimeTooSkewed", errors.CredentialsError),
    (404, "NoSuchKey", errors.NotFoundError),
    (404, "NoSuchBucket", errors.NotFoundError),
    (412, "PreconditionFailed", errors.ChangedError),
    (400, "EntityTooLarge", errors.StorageError),
]


@pytest.mark.parametrize(("status", "code", "expected"), FINAL)
def test_s3_final_failures_are_told_at_once(scripted: ScriptedServer, status: int, code: str, expected: type) -> None:
    scripted.replies = [xml_error(status, code)]
    store = open_store("s3://bucket/p")
    calls = [lambda: store.get_versioned("x"), lambda: store.put("x", b""), lambda: list(store.list())]
    for call in calls:
        scripted.requests.clear()
        with pytest.raises(errors.StorageError) as caught:
            call()
        assert type(caught.value) is expected
        assert len(scripted.requests) == 1
        assert "secret" not in str(caught.value)
    with pytest.raises(errors.StorageError) as caught:
        store.get("x", if_match="e")
    assert type(caught.value) is expected


def test_s3_head_has_only_a_status(scripted: ScriptedServer) -> None:
    scripted.replies = [Reply(403)]
    with pytest.raises(errors.AccessDeniedError):
        open_store("s3://bucket/p").head("x")


def test_s3_put_if_absent_whose_answer_was_lost(scripted: ScriptedServer) -> None:
    refused = xml_error(412, "PreconditionFailed")
    store = open_store("s3://bucket/p")
    for data, expected in ((GOOD.body, True), (b"not what is stored", False)):
        scripted.replies = [RESET, refused, GOOD]
        assert store.put_if_absent("x", data) is expected
        scripted.replies = [RESET, refused, GOOD]
        assert store.put_if_match("x", data, "v") == ("e" if expected else None)
    scripted.replies, scripted.requests = [refused, GOOD], []
    assert store.put_if_absent("x", GOOD.body) is False
    assert [method for method, _ in scripted.requests] == ["PUT"]
    scripted.replies = [xml_error(409, "ConditionalRequestConflict"), Reply(200, ETag='"new"')]
    assert store.put_if_absent("x", b"") is True


def test_s3_cut_listing_page_is_tried_again(scripted: ScriptedServer) -> None:
    row = b"<Contents><Key>p/a</Key><ETag>&quot;e&quot;</ETag><Size>3</Size></Contents>"
    page = b"<ListBucketResult>" + row + b"</ListBucketResult>"
    scripted.replies = [Reply(200, page[:60]), Reply(200, page[:60], missing=50), SLOW_DOWN, Reply(200, page)]
    rows = next(open_store("s3://bucket/p").list()).to_pylist()
    assert rows == [{"uri": "s3://bucket/p/a", "etag": "e", "size_bytes": 3}]


def test_s3_error_in_a_200_listing_is_tried_again(scripted: ScriptedServer) -> None:
    error = b"<?xml version='1.0'?><Error><Code>InternalError</Code><Message>m</Message></Error>"
    scripted.replies = [Reply(200, error), Reply(200, b"<ListBucketResult></ListBucketResult>")]
    assert list(open_store("s3://bucket/p").list()) == []
    assert len(scripted.requests) == 2


def test_s3_listing_pages_are_kept_from_botocore_s_parsers(s3_uri: str) -> None:
    store = open_store(s3_uri)
    store.put("x", b"1")
    assert isinstance(store, S3Store)
    bodies: list[bytes] = []
    store._clients()[0].meta.events.register_first(
        "before-parse.s3.*", lambda response_dict, **_: bodies.append(response_dict["body"])
    )
    assert store.keys() == ["x"]
    assert bodies == [b"<ListBucketResult/>"]


def test_s3_big_file_is_whole_or_absent(scripted: ScriptedServer, tmp_path: Path) -> None:
    scripted.replies = [CUT, RESET, GOOD]
    store = open_store("s3://bucket/p")
    store.get_to_file("x", tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == GOOD.body
    scripted.replies = [CUT]
    with pytest.raises(errors.UnavailableError):
        store.get_to_file("x", tmp_path / "y")
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


def test_s3_too_large_reads_no_body(scripted: ScriptedServer) -> None:
    scripted.replies = [Reply(200, b"01234", missing=10**9, ETag='"e"')]
    with pytest.raises(errors.TooLargeError):
        open_store("s3://bucket/p").get("x", max_bytes=10**6)
    assert len(scripted.requests) == 1


def test_s3_nobody_there_is_unavailable(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    monkeypatch.setattr(storage_retry, "BACKOFF_BASE_S", 0.001)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    with pytest.raises(errors.UnavailableError):
        open_store("s3://bucket/p").get("x")


def test_s3_without_credentials(monkeypatch: pytest.MonkeyPatch, s3_server: str) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    for call in (open_store("s3://bucket/p").get, open_store("s3://bucket/p").head):
        with pytest.raises(errors.CredentialsError):
            call("x")


def test_s3_settings_of_a_profile(monkeypatch: pytest.MonkeyPatch, s3_uri: str, s3_server: str, tmp_path: Path) -> None:
    """Endpoint, region and keys from files alone reach both clients."""
    open_store(s3_uri).put("x", b"1")
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name)
    (tmp_path / "config").write_text(f"[profile p]\nregion = eu-west-1\nendpoint_url = {s3_server}\n")
    (tmp_path / "credentials").write_text("[p]\naws_access_key_id = k\naws_secret_access_key = s\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_PROFILE", "p")
    store = open_store(s3_uri)
    assert (store.get("x"), store.head("x").size_bytes) == (b"1", 1)
    monkeypatch.setenv("AWS_PROFILE", "unknown")
    with pytest.raises(errors.CredentialsError):
        open_store(s3_uri).get("x")


def _oserrors_of_clients() -> list[type[Exception]]:
    from botocore import exceptions
    from urllib3 import exceptions as of_urllib3

    found = [k for module in (exceptions, of_urllib3) for k in vars(module).values() if isinstance(k, type)]
    return [k for k in found if issubclass(k, OSError) and issubclass(k, exceptions.BotoCoreError)]


@pytest.mark.parametrize("kind", _oserrors_of_clients(), ids=lambda kind: kind.__name__)
def test_s3_time_outs_are_no_failures_of_a_disk(kind: type[Exception]) -> None:
    """They are OSErrors in botocore."""
    made = kind(endpoint_url="http://x", error="m", proxy_url="p")
    explained = storage_retry.error_of_s3(made, "s3://bucket/x")
    assert type(explained) is errors.UnavailableError
    assert explained.retryable
