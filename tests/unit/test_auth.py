"""API keys: hashes only in the file, constant comparison, rotation, and what a broken file does not do."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import stat
from pathlib import Path

import pytest

from cnn_ray import auth
from cnn_ray.auth import KeyRing, add_key, is_local_request, is_loopback, list_keys, new_key, remove_key, require_keys
from cnn_ray.config import ServeConfig
from cnn_ray.errors import ConfigError, NotFoundError, StorageError


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    return str(tmp_path / "keys.json")


def test_a_key_is_256_random_bits_and_its_file_holds_no_part_of_it(keys_file: str):
    key = add_key(keys_file, "nightly")
    assert key.startswith("cnnray_")
    assert len(key) == len("cnnray_") + 52  # 52 * 5 bits >= 256
    assert key != add_key(keys_file, "other")
    raw = Path(keys_file).read_text()
    assert key[7:] not in raw
    assert json.loads(raw)["keys"][0]["sha256"] == hashlib.sha256(key.encode()).hexdigest()


def test_the_file_is_its_owners_alone(keys_file: str):
    add_key(keys_file, "a")
    assert stat.S_IMODE(Path(keys_file).stat().st_mode) == 0o600


def test_a_change_keeps_the_files_mode_and_owner(keys_file: str):
    add_key(keys_file, "a")
    Path(keys_file).chmod(0o640)
    before = Path(keys_file).stat()
    add_key(keys_file, "b")
    after = Path(keys_file).stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_names_are_unique_and_safe(keys_file: str):
    add_key(keys_file, "a")
    with pytest.raises(ConfigError, match="that no key in"):
        add_key(keys_file, "a")
    for name in ("", "a b", "a\nb", "ü", "-a", "x" * 65, "a\n"):
        with pytest.raises(ConfigError, match="Expected a name"):
            new_key(name)


def test_removed_keys_are_refused_and_unknown_names_say_which_there_are(keys_file: str):
    key, other = add_key(keys_file, "a"), add_key(keys_file, "b")
    remove_key(keys_file, "a")
    ring = KeyRing.load(keys_file)
    assert ring.name_of(f"Bearer {key}") is None
    assert ring.name_of(f"Bearer {other}") == "b"
    with pytest.raises(ConfigError, match="known: b"):
        remove_key(keys_file, "a")


def _add_five(keys_file: str, worker: int) -> None:
    for number in range(5):
        add_key(keys_file, f"w{worker}-{number}")


def test_writers_at_the_same_time_lose_no_key(keys_file: str):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_add_five, args=(keys_file, worker)) for worker in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    assert len(list_keys(keys_file)) == 20


def test_keys_in_s3(s3_uri: str):
    keys_uri = f"{s3_uri}/serve/keys.json"
    with pytest.raises(NotFoundError):
        KeyRing.load(keys_uri)
    key = add_key(keys_uri, "a")
    ring = KeyRing.load(keys_uri)
    assert ring.name_of(f"Bearer {key}") == "a"
    second = add_key(keys_uri, "b")
    assert ring.name_of(f"Bearer {second}") is None
    assert ring.refresh()
    assert ring.name_of(f"Bearer {second}") == "b"
    remove_key(keys_uri, "a")
    ring.refresh()
    assert ring.name_of(f"Bearer {key}") is None


def test_headers(keys_file: str):
    key = add_key(keys_file, "a")
    ring = KeyRing.load(keys_file)
    for good in (f"Bearer {key}", f"bearer {key}", f"BEARER  {key}", f"Bearer {key} "):
        assert ring.name_of(good) == "a", good
    digest = hashlib.sha256(key.encode()).hexdigest()
    for bad in (
        None,
        "",
        "Bearer",
        "Bearer ",
        key,
        f"Basic {key}",
        f"Bearer {key[:-1]}",
        f"Bearer {key}x",
        f"Bearer {key.upper()}",
        f"Bearer {key} {key}",
        f"Bearer {digest}",  # who has read the file has no key
        f"Bearer\t{key}",
        "Bearer \udcff\ud800",
        "Bearer \x00",
        f"Bearer {key}" + " " * 600,
    ):
        assert ring.name_of(bad) is None, bad


@pytest.mark.parametrize("offered", [0, 1, 2, None], ids=["first", "middle", "last", "wrong"])
def test_every_key_is_compared_whichever_is_offered(
    keys_file: str, offered: int | None, monkeypatch: pytest.MonkeyPatch
):
    keys = [add_key(keys_file, name) for name in "abc"]
    ring = KeyRing.load(keys_file)
    compared = []
    real = auth.hmac.compare_digest

    def counting(left: bytes, right: bytes) -> bool:
        compared.append(right)
        return real(left, right)

    monkeypatch.setattr(auth.hmac, "compare_digest", counting)
    ring.name_of(f"Bearer {keys[offered] if offered is not None else 'cnnray_wrong'}")
    assert compared == [hashlib.sha256(key.encode()).digest() for key in keys]


def test_a_long_header_is_not_even_hashed(keys_file: str, monkeypatch: pytest.MonkeyPatch):
    add_key(keys_file, "a")
    ring = KeyRing.load(keys_file)

    def refuse(data: bytes) -> None:
        raise AssertionError("hashed")

    monkeypatch.setattr(auth.hashlib, "sha256", refuse)
    assert ring.name_of("Bearer " + "x" * 100_000) is None


def test_rotation_without_a_new_ring(keys_file: str):
    old = add_key(keys_file, "old")
    ring = KeyRing.load(keys_file)
    assert not ring.refresh()
    new = add_key(keys_file, "new")
    assert ring.refresh()
    assert (ring.name_of(f"Bearer {old}"), ring.name_of(f"Bearer {new}")) == ("old", "new")
    remove_key(keys_file, "old")
    assert ring.refresh()
    assert (ring.name_of(f"Bearer {old}"), ring.name_of(f"Bearer {new}")) == (None, "new")
    remove_key(keys_file, "new")
    assert ring.refresh()  # no key left is a decision, not damage
    assert ring.name_of(f"Bearer {new}") is None


def test_a_mounted_kubernetes_secret_is_followed_through_its_links(tmp_path: Path):
    """The kubelet swaps the link ..data from one folder to another; the file's own name is a link through it."""
    keys = [add_key(str(tmp_path / f"..v{number}" / "keys.json"), f"k{number}") for number in (1, 2)]
    (tmp_path / "..data").symlink_to("..v1")
    (tmp_path / "keys.json").symlink_to("..data/keys.json")
    ring = KeyRing.load(str(tmp_path / "keys.json"))
    assert ring.name_of(f"Bearer {keys[0]}") == "k1"
    (tmp_path / "..next").symlink_to("..v2")
    (tmp_path / "..next").rename(tmp_path / "..data")
    assert ring.refresh()
    assert (ring.name_of(f"Bearer {keys[0]}"), ring.name_of(f"Bearer {keys[1]}")) == (None, "k2")


@pytest.mark.parametrize("damage", ["gone", "", "{", "[]", '{"keys": [{"name": "a"}]}', "folder", "huge"])
def test_a_damaged_file_keeps_the_old_keys_and_is_logged_once(
    keys_file: str, damage: str, caplog: pytest.LogCaptureFixture
):
    key = add_key(keys_file, "a")
    ring = KeyRing.load(keys_file)
    path, good = Path(keys_file), Path(keys_file).read_text()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "huge":
        path.write_text(good + " " * auth.MAX_FILE_BYTES)
    elif damage != "gone":
        path.write_text(damage)
    for _ in range(3):
        assert not ring.refresh()
    assert ring.name_of(f"Bearer {key}") == "a"
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    if damage == "folder":
        path.rmdir()
    path.write_text(good)
    ring.refresh()
    path.unlink()
    ring.refresh()
    assert len([record for record in caplog.records if record.levelno == logging.ERROR]) == 2  # a second outage is news
    with pytest.raises((ConfigError, StorageError)):
        KeyRing.load(keys_file)


def test_a_file_that_everybody_may_write_is_refused(keys_file: str):
    add_key(keys_file, "a")
    Path(keys_file).chmod(0o666)
    with pytest.raises(ConfigError, match="not everybody may write"):
        KeyRing.load(keys_file)


@pytest.mark.parametrize(
    "record",
    [
        {"name": "a", "sha256": "PLANTED", "created_at": "x"},
        {"name": "PLANTED PLANTED", "sha256": "0" * 64, "created_at": "x"},
        {"name": "a", "sha256": "0" * 64, "created_at": "x", "PLANTED" * 20: 1},
        {"name": "a", "sha256": ["PLANTED"], "created_at": "x"},
    ],
)
def test_errors_about_the_file_do_not_repeat_what_is_in_it(
    keys_file: str, record: dict[str, object], caplog: pytest.LogCaptureFixture
):
    add_key(keys_file, "a")
    ring = KeyRing.load(keys_file)
    Path(keys_file).write_text(json.dumps({"keys": [record]}))
    with pytest.raises(ConfigError) as caught:
        list_keys(keys_file)
    ring.refresh()
    assert "PLANTED" not in str(caught.value) + caplog.text
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_the_same_name_or_hash_twice_is_refused(keys_file: str):
    _, one = new_key("a")
    _, two = new_key("b")
    for pair in ((one, two.model_copy(update={"name": "a"})), (one, two.model_copy(update={"sha256": one.sha256}))):
        Path(keys_file).write_text(json.dumps({"keys": [key.model_dump() for key in pair]}))
        with pytest.raises(ConfigError, match="twice"):
            list_keys(keys_file)


def test_neither_key_nor_hash_is_logged(keys_file: str, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.DEBUG)
    key = add_key(keys_file, "a")
    ring = KeyRing.load(keys_file)
    ring.name_of(f"Bearer {key}")
    ring.name_of(f"Bearer {key}x")
    remove_key(keys_file, "a")
    ring.refresh()
    assert "API keys loaded: a" in caplog.text
    assert key[7:] not in caplog.text
    assert hashlib.sha256(key.encode()).hexdigest() not in caplog.text
    assert key not in repr(ring.__dict__)


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost", "LOCALHOST", "::ffff:127.0.0.1"]
)
def test_loopback(host: str):
    assert is_loopback(host)
    require_keys(host, ServeConfig(model="m@1"))


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "10.0.0.1", "localhost.evil.example", "::ffff:10.0.0.1", "*"])
def test_other_hosts_need_keys_or_a_word(host: str):
    assert not is_loopback(host)
    with pytest.raises(ConfigError, match="keys add NAME"):
        require_keys(host, ServeConfig(model="m@1"))
    require_keys(host, ServeConfig(model="m@1", api_keys_uri="keys.json"))
    require_keys(host, ServeConfig(model="m@1", allow_anonymous=True))


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"host": "127.0.0.1:8000"},
        {"host": "localhost"},
        {"host": "LocalHost:8000"},
        {"host": "[::1]:8000"},
        {"host": "127.0.0.1:8000", "origin": "http://127.0.0.1:8000"},
        {"host": "localhost", "origin": "http://localhost"},
    ],
)
def test_requests_of_this_machine(headers: dict[str, str]):
    assert is_local_request(headers)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "rebound.example:8000"},
        {"host": "127.0.0.1.rebound.example"},
        {"host": "rebound.example", "origin": "http://rebound.example"},
        {"host": "localhost", "origin": "https://page.example"},
        {"host": "localhost", "origin": "null"},
        {"host": "localhost:8000", "origin": "http://localhost:3000"},
        {"host": "localhost:8000", "origin": "http://[::1"},
        {"origin": "http://localhost"},
        {"host": "localhost", "origin": ""},
        {"host": ""},
        {"host": "[::1"},
        {"host": "user@page.example"},
        {"host": "page.example/127.0.0.1"},
        {"host": "page.example#@127.0.0.1"},
        {"host": "10.0.0.1:8000"},
    ],
)
def test_requests_that_a_web_page_elsewhere_makes(headers: dict[str, str]):
    assert not is_local_request(headers)
