"""Scoring from and to S3: archived and compressed objects, requester pays, servers without conditional writes."""

import gzip

import boto3
import pytest
from factories import image_bytes

from cnn_ray import outputs, score
from cnn_ray.config import ScoreConfig, StorageConfig
from cnn_ray.errors import ArchivedError, ServerLacksError
from cnn_ray.storage import S3Store, open_store
from cnn_ray.storage_options import use_storage_options


@pytest.fixture(autouse=True)
def options_as_before():
    yield
    use_storage_options(StorageConfig())


def put(uri, key, **arguments):
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    body = arguments.pop("Body", None) or image_bytes(seed=len(key))
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{key}", Body=body, **arguments)


def config(models, uri, **changes):
    settings = {"model": "small@1", "models_uri": models, "input_uri": f"{uri}/in", "output_uri": f"{uri}/out"}
    return ScoreConfig(**{**settings, "runner": "local", "report": False, **changes})


def test_archived_objects_are_rows_unless_all_are_archived(small_models, s3_uri):
    for name in ("in/a.png", "in/bb.png", "in/ccc.png"):
        put(s3_uri, name, StorageClass="DEEP_ARCHIVE")
    with pytest.raises(ArchivedError, match="every object tried lies in an archive storage class") as caught:
        score.run_score(config(small_models, s3_uri))
    assert caught.value.exit_code == 2

    put(s3_uri, "in/a.png")  # restored, so another object; the plan of the first try goes on
    put(s3_uri, "in/dddd.png")
    result = score.run_score(config(small_models, s3_uri, max_quarantine_rate=1))
    codes = outputs.read_quarantine(result.partition_uri)["code"].to_pylist()
    assert codes.count("archived") == 2
    assert result.manifest.codes["archived"] == 2

    put(s3_uri, "in/eeeee.png", StorageClass="GLACIER")  # alone in its generation: no reason to hold up a night
    later = score.run_score(config(small_models, s3_uri, max_quarantine_rate=1))
    assert later.manifest.codes["archived"] == 3


def test_images_stored_with_content_encoding_gzip_are_scored(small_models, s3_uri):
    plain = image_bytes(seed=7)
    put(s3_uri, "in/plain.png", Body=plain)
    put(s3_uri, "in/packed.png", Body=gzip.compress(plain), ContentEncoding="gzip")
    put(s3_uri, "in/z-bomb.png", Body=gzip.compress(bytes(2_000_000)), ContentEncoding="gzip")
    put(s3_uri, "in/z-br.png", Body=plain, ContentEncoding="br")
    result = score.run_score(config(small_models, s3_uri, max_quarantine_rate=1, max_image_bytes=1_000_000))
    rows = {row["uri"].rpartition("/")[2]: row for row in outputs.read(result.partition_uri).to_pylist()}
    assert sorted(rows) == ["packed.png", "plain.png"]
    for name in ("scores", "sha256", "phash", "width_px"):
        assert rows["packed.png"][name] == rows["plain.png"][name]
    bad = outputs.read_quarantine(result.partition_uri).to_pylist()
    assert [row["code"] for row in bad] == ["too_large", "unsupported_format"]


def test_a_server_that_ignores_conditions_is_refused_before_anything_is_planned(small_models, s3_uri, monkeypatch):
    def overwrites(self, key, data):
        self.put(key, data)
        return True

    put(s3_uri, "in/a.png")
    monkeypatch.setattr(S3Store, "put_if_absent", overwrites)
    with pytest.raises(ServerLacksError, match="ignores If-None-Match"):
        score.run_score(config(small_models, s3_uri))
    assert open_store(f"{s3_uri}/out").keys() == []
    with pytest.raises(ServerLacksError, match="ignores If-None-Match"):
        score.run_score(config(small_models, s3_uri))


def test_a_finished_run_tries_no_writes(small_models, s3_uri, monkeypatch):
    put(s3_uri, "in/a.png")
    score.run_score(config(small_models, s3_uri))
    monkeypatch.setattr(S3Store, "check_conditional_writes", None)
    assert score.run_score(config(small_models, s3_uri)).already_done


def test_what_a_run_writes_has_the_encryption_that_is_asked_for(small_models, s3_uri):
    put(s3_uri, "in/a.png")
    result = score.run_score(config(small_models, s3_uri, sse="AES256"))
    bucket, _, prefix = result.partition_uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3")
    keys = [item["Key"] for item in client.list_objects_v2(Bucket=bucket, Prefix=prefix)["Contents"]]
    assert len(keys) >= 4
    for key in keys:
        assert client.head_object(Bucket=bucket, Key=key)["ServerSideEncryption"] == "AES256"
