"""Start weights from a file: local or S3, fetched once for all workers of a node, refused when they are others."""

import hashlib
import threading
import time

import pytest

from cnn_ray.config import ModelDefinition
from cnn_ray.errors import ConfigError
from cnn_ray.model import check_definition
from cnn_ray.node_files import one_at_a_time
from cnn_ray.storage import open_store
from cnn_ray.storage_s3 import S3Store
from cnn_ray.weights import fetch_weights

BYTES = b"start weights" * 1000
DIGEST = hashlib.sha256(BYTES).hexdigest()


def mobilenet(weights: str | None, digest: str | None = None) -> ModelDefinition:
    return ModelDefinition(architecture="MobileNetV2", weights=weights, weights_sha256=digest)


@pytest.fixture
def downloads(s3_uri, tmp_path, monkeypatch) -> list[str]:
    """The keys that were downloaded, in an empty cache; the bucket holds base.weights.h5."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    open_store(s3_uri).put("base.weights.h5", BYTES)
    keys: list[str] = []
    honest = S3Store.get_to_file

    def counted(self, key, path):
        keys.append(key)
        time.sleep(0.1)  # long enough for the other workers to arrive
        honest(self, key, path)

    monkeypatch.setattr(S3Store, "get_to_file", counted)
    return keys


def test_no_file_is_fetched_for_no_weights_and_for_imagenet():
    assert fetch_weights(mobilenet(None)) is None
    assert fetch_weights(mobilenet("imagenet")) is None


def test_a_local_file_is_used_where_it_lies(tmp_path):
    path = tmp_path / "base.weights.h5"
    path.write_bytes(BYTES)
    assert fetch_weights(mobilenet(str(path), DIGEST)) == path


def test_the_workers_of_a_node_download_an_object_once(downloads, s3_uri):
    definition = mobilenet(f"{s3_uri}/base.weights.h5", DIGEST)
    paths: list = []
    workers = [threading.Thread(target=lambda: paths.append(fetch_weights(definition))) for _ in range(4)]
    [worker.start() for worker in workers]
    [worker.join() for worker in workers]
    assert len(downloads) == 1
    assert len(paths) == 4
    assert len(set(paths)) == 1
    assert paths[0].read_bytes() == BYTES
    assert paths[0].name == "base.weights.h5", "Keras reads the format from the ending"


def test_an_object_that_was_replaced_is_fetched_anew(downloads, s3_uri):
    definition = mobilenet(f"{s3_uri}/base.weights.h5")
    before = fetch_weights(definition)
    open_store(s3_uri).put("base.weights.h5", b"others")
    after = fetch_weights(definition)
    assert (before.read_bytes(), after.read_bytes()) == (BYTES, b"others")
    assert len(downloads) == 2


def test_a_download_that_breaks_leaves_nothing_that_looks_whole(downloads, s3_uri, monkeypatch):
    definition = mobilenet(f"{s3_uri}/base.weights.h5")
    with monkeypatch.context() as patch:

        def broken(_self, _key, path):
            path.write_bytes(BYTES[:10])
            raise OSError("disk full")

        patch.setattr(S3Store, "get_to_file", broken)
        with pytest.raises(OSError, match="disk full"):
            fetch_weights(definition)
    assert fetch_weights(definition).read_bytes() == BYTES


def test_a_wrong_digest_is_refused_with_both_digests(downloads, s3_uri, tmp_path):
    local = tmp_path / "base.weights.h5"
    local.write_bytes(BYTES)
    for weights in (str(local), f"{s3_uri}/base.weights.h5"):
        with pytest.raises(ConfigError, match=f"SHA-256 {'0' * 64}.*Received: .*{DIGEST}.*Next: "):
            fetch_weights(mobilenet(weights, "0" * 64))


def test_a_missing_file_or_object_is_said_in_one_sentence(downloads, s3_uri, tmp_path):
    for weights in (str(tmp_path / "no.weights.h5"), f"{s3_uri}/no.weights.h5"):
        with pytest.raises(ConfigError, match=r"does not exist\. Next: .*imagenet.*none"):
            fetch_weights(mobilenet(weights))


@pytest.mark.parametrize("weights", [None, "imagenet"])
def test_a_digest_without_a_file_is_refused(weights):
    with pytest.raises(ConfigError, match=r"Expected a file in model\.weights"):
        check_definition(mobilenet(weights, DIGEST))


def test_one_process_at_a_time_is_inside(tmp_path):
    inside, most = 0, 0

    def work() -> None:
        nonlocal inside, most
        with one_at_a_time(tmp_path / "lock"):
            inside += 1
            most = max(most, inside)
            time.sleep(0.01)
            inside -= 1

    threads = [threading.Thread(target=work) for _ in range(5)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert most == 1
