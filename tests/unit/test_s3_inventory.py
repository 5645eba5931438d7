"""S3 Inventory as INPUT: the objects of a bucket, as its report names them."""

import gzip
import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cnn_ray import inputs
from cnn_ray.errors import AccessDeniedError, DataError, NotFoundError
from cnn_ray.object_lookup import NOT_ALLOWED
from cnn_ray.storage import open_store

CSV_SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass"
ROWS = [
    ("src", "d%C3%A9/a+b%2B.png", "v2", "true", "false", "5", "2026-11-29T00:00:00.000Z", "0a", "STANDARD"),
    ("src", "d%C3%A9/a+b%2B.png", "v1", "false", "false", "4", "2026-11-28T00:00:00.000Z", "09", "STANDARD"),
    ("src", "gone.png", "v3", "true", "true", "", "2026-11-29T00:00:00.000Z", "", ""),
    ("src", "c/date%3D1/x.png", "", "true", "false", "7", "2026-11-29T00:00:00.000Z", "0b-3", "GLACIER"),
    ("src", "c/", "", "true", "false", "0", "2026-11-29T00:00:00.000Z", "0c", "STANDARD"),
    ("src", "c/_SUCCESS", "", "true", "false", "0", "2026-11-29T00:00:00.000Z", "0d", "STANDARD"),
]
EXPECTED = [
    {"uri": "s3://src/c/date=1/x.png", "etag": "0b-3", "size_bytes": 7},
    {"uri": "s3://src/dé/a b+.png", "etag": "0a", "size_bytes": 5},
]


def csv_file(rows=ROWS):
    return gzip.compress("".join(",".join(f'"{cell}"' for cell in row) + "\n" for row in rows).encode())


def parquet_file():
    from urllib.parse import unquote_plus

    columns = list(zip(*ROWS, strict=True))
    table = pa.table(
        {
            "bucket": columns[0],
            "key": [unquote_plus(key) for key in columns[1]],
            "version_id": columns[2],
            "is_latest": [cell == "true" for cell in columns[3]],
            "is_delete_marker": [cell == "true" for cell in columns[4]],
            "size": pa.array([int(cell) if cell else None for cell in columns[5]], pa.int64()),
            "e_tag": [cell or None for cell in columns[7]],
            "storage_class": columns[8],
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def report(bucket, key, raw, kind="CSV", **changes):
    document = {
        "sourceBucket": "src",
        "destinationBucket": f"arn:aws:s3:::{bucket}",
        "version": "2016-11-30",
        "creationTimestamp": "1764291600000",
        "fileFormat": kind,
        "fileSchema": CSV_SCHEMA if kind == "CSV" else "message s3.inventory { required binary bucket (STRING); }",
        "files": [{"key": key, "size": len(raw), "MD5checksum": hashlib.md5(raw, usedforsecurity=False).hexdigest()}],
    }
    return json.dumps({**document, **changes}).encode()


def place(s3_uri, raw, kind="CSV", **changes):
    """A report in the bucket; the location of its manifest.json."""
    bucket = s3_uri.split("/")[2]
    key = f"inv/src/all/data/f.{'csv.gz' if kind == 'CSV' else 'parquet'}"
    store = open_store(f"s3://{bucket}")
    store.put(key, raw)
    store.put("inv/src/all/2026-11-29T01-00Z/manifest.json", report(bucket, key, raw, kind, **changes))
    return f"s3://{bucket}/inv/src/all/2026-11-29T01-00Z/manifest.json"


@pytest.mark.parametrize("kind", ["CSV", "Parquet"])
def test_the_newest_versions_are_listed(s3_uri, kind):
    uri = place(s3_uri, csv_file() if kind == "CSV" else parquet_file(), kind)
    (table,) = inputs.list_inputs(uri, "uri", ("s3://src",))
    assert table.to_pylist() == EXPECTED


def test_another_bucket_must_be_allowed(s3_uri):
    (table,) = inputs.list_inputs(place(s3_uri, csv_file()), "uri")
    assert set(table["etag"].to_pylist()) == {NOT_ALLOWED}
    uri = place(s3_uri, csv_file(), destinationBucket="arn:aws:s3:::other-bucket")
    with pytest.raises(AccessDeniedError, match="allow-uris"):
        list(inputs.list_inputs(uri, "uri", ("s3://src",)))


def test_etags_and_sizes_that_the_report_lacks_are_asked_for(s3_uri):
    bucket = s3_uri.split("/")[2]
    store = open_store(f"s3://{bucket}")
    store.put("a.png", b"123")
    uri = place(s3_uri, csv_file([(bucket, "a.png")]), fileSchema="Bucket, Key")
    (table,) = inputs.list_inputs(uri, "uri")
    assert table.to_pylist() == [{"uri": f"s3://{bucket}/a.png", "etag": store.head("a.png").etag, "size_bytes": 3}]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fileFormat": "ORC"}, "ORC"),
        ({"files": [{"key": "inv/src/all/data/f.csv.gz", "MD5checksum": "0" * 32}]}, "MD5"),
        ({"fileSchema": "Bucket, Name"}, "2 cells"),
        ({"files": "x"}, "files"),
    ],
)
def test_what_is_no_report_is_refused(s3_uri, changes, words):
    with pytest.raises(DataError, match=words):
        list(inputs.list_inputs(place(s3_uri, csv_file(), **changes), "uri"))


def test_another_manifest_json_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text('{"status": "complete"}')
    with pytest.raises(DataError, match="S3 Inventory"):
        list(inputs.list_inputs(str(tmp_path / "manifest.json"), "uri"))
    (tmp_path / "manifest.json").write_text("[1")
    with pytest.raises(DataError, match="S3 Inventory"):
        list(inputs.list_inputs(str(tmp_path / "manifest.json"), "uri"))


def test_a_missing_file_of_the_report_is_named(s3_uri):
    uri = place(s3_uri, csv_file(), files=[{"key": "inv/none.csv.gz"}])
    with pytest.raises(NotFoundError, match=r"inv/none\.csv\.gz"):
        list(inputs.list_inputs(uri, "uri"))


def test_a_copied_report_has_its_files_beside_it(tmp_path):
    folder = tmp_path / "2026-11-29T01-00Z"
    folder.mkdir()
    (tmp_path / "data").mkdir()
    raw = csv_file()
    (tmp_path / "data" / "f.csv.gz").write_bytes(raw)
    (folder / "manifest.json").write_bytes(report("reports", "inv/src/all/data/f.csv.gz", raw))
    (table,) = inputs.list_inputs(str(folder / "manifest.json"), "uri")
    assert table.to_pylist() == EXPECTED
