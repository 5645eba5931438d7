# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""A report of S3 Inventory -> the rows of its objects: key, etag, size. See
https://docs.aws.amazon.com/AmazonS3/latest/userguide/storage-inventory-location.html

`manifest.json` names the files of the report, which lie in the bucket that keeps the reports, and the bucket that they
tell of. Of a versioned bucket the newest version of each object is taken, unless it is a delete marker.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote_plus

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, ValidationError

from cnn_ray.allowed_uris import is_allowed
from cnn_ray.errors import AccessDeniedError, DataError, NotFoundError
from cnn_ray.manifest_csv import csv_table
from cnn_ray.manifest_listing import ManifestOptions, listing_of
from cnn_ray.manifest_text import MOST_BYTES, utf8_text
from cnn_ray.manifest_values import text_array
from cnn_ray.storage import Store, open_store, split_uri

ARN = "arn:aws:s3:::"
BATCH_ROWS = 65_536

_WANTED = {  # as CSV and as Parquet name them, without "_" and in lower case
    "bucket": "bucket",
    "key": "key",
    "islatest": "is_latest",
    "isdeletemarker": "is_delete_marker",
    "size": "size_bytes",
    "etag": "etag",
}


class _File(BaseModel):
    key: str
    md5: str | None = Field(default=None, alias="MD5checksum")


class _Report(BaseModel):
    source_bucket: str = Field(alias="sourceBucket")
    destination_bucket: str = Field(alias="destinationBucket")
    file_format: str = Field(alias="fileFormat")
    file_schema: str = Field(alias="fileSchema")
    files: list[_File]


def inventory_listing(uri: str, allow_uris: tuple[str, ...], options: ManifestOptions) -> pa.Table:
    """Return the sorted listing of the objects that a report names, `uri` being that of its manifest.json.

    Raises:
        NotFoundError: the report or one of its files is not there.
        DataError: it is no report, has the format ORC, or a file is not the one that it names.
        AccessDeniedError: its files lie where `allow_uris` does not let it read.
    """
    folder, name = split_uri(uri)
    root = open_store(folder)
    report = _report(root.get(name, max_bytes=MOST_BYTES), uri)
    schema = pa.schema([("name", pa.string()), ("etag", pa.string()), ("size_bytes", pa.string())])
    tables = [_objects(rows, report) for file in report.files for rows in _rows(file, report, root, uri, allow_uris)]
    table = pa.concat_tables([schema.empty_table(), *tables])
    return listing_of(table, root, uri, allow_uris, options, lambda row: f"object {row + 1}")


def _report(raw: bytes, uri: str) -> _Report:
    try:
        report = _Report.model_validate_json(utf8_text(raw, uri))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the document"
        raise DataError(
            f"Expected the manifest.json of an S3 Inventory in {uri}. Received: {where}: {first['msg']}. "
            "Next: name a report of S3 Inventory, or a manifest that ends with .csv, .jsonl or .parquet."
        ) from None
    if report.file_format.upper() not in ("CSV", "PARQUET"):
        raise DataError(
            f"Expected an S3 Inventory of CSV or Parquet files in {uri}. Received: {report.file_format}. "
            "Next: set the format of the inventory to Parquet."
        )
    return report


def _rows(file: _File, report: _Report, root: Store, uri: str, allow_uris: tuple[str, ...]) -> Iterator[pa.Table]:
    """The wanted columns of a file of the report, as text."""
    raw = _bytes(file, report, root, uri, allow_uris)
    if file.md5 is not None and hashlib.md5(raw, usedforsecurity=False).hexdigest() != file.md5.lower():
        raise DataError(
            f"Expected the file {file.key} with the MD5 that {uri} says. Received: other bytes. "
            "Next: wait until the report is complete, or take another one."
        )
    if report.file_format.upper() == "CSV":
        names = [name.strip() for name in report.file_schema.split(",")]
        yield _wanted(csv_table(utf8_text(raw, file.key), file.key, header=names), uri)
        return
    try:
        for batch in pq.ParquetFile(io.BytesIO(raw)).iter_batches(BATCH_ROWS):
            yield _wanted(pa.table({n: text_array(batch[n]) for n in batch.schema.names if _plain(n) in _WANTED}), uri)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"Expected a Parquet file in {file.key}. Received: {reason}. Next: take another report."
        ) from None


def _bytes(file: _File, report: _Report, root: Store, uri: str, allow_uris: tuple[str, ...]) -> bytes:
    """The bytes of a file of the report. A report that was copied has its files in ../data, as in the bucket."""
    if not root.uri.startswith("s3://"):
        beside = open_store(f"{root.uri.rpartition('/')[0]}/data")
        try:
            return beside.get(file.key.rpartition("/")[2], max_bytes=MOST_BYTES)
        except NotFoundError:
            pass
    location = f"s3://{report.destination_bucket.removeprefix(ARN)}/{file.key}"
    own_bucket = root.uri.startswith("s3://") and is_allowed(location, root.uri, ())
    if not own_bucket and not is_allowed(location, root.uri, allow_uris):
        raise AccessDeniedError(
            f"Expected the files of the report in the bucket of {uri}, or where --allow-uris lets it read. "
            f"Received: {location}. Next: add that bucket to --allow-uris if you trust the report."
        )
    bucket, _, key = location.removeprefix("s3://").partition("/")
    return open_store(f"s3://{bucket}").get(key, max_bytes=MOST_BYTES)


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _wanted(table: pa.Table, uri: str) -> pa.Table:
    """The columns that count, under our names."""
    columns = {_WANTED[_plain(name)]: table[name] for name in table.column_names if _plain(name) in _WANTED}
    if "key" not in columns:
        raise DataError(f"Expected a column Key in {uri}. Received: none. Next: take a report of S3 Inventory.")
    return pa.table(columns)


def _objects(rows: pa.Table, report: _Report) -> pa.Table:
    """Location, etag and size of each object that is there; zero-byte names that end with "/" are folder markers."""
    have = rows.column_names
    for name, gone in (("is_latest", "false"), ("is_delete_marker", "true")):
        if name in have:
            rows = rows.filter(pc.invert(pc.fill_null(pc.equal(pc.utf8_lower(rows[name]), gone), False)))
    if "size_bytes" in have:
        marker = pc.and_(pc.ends_with(rows["key"], "/"), pc.fill_null(pc.equal(rows["size_bytes"], "0"), False))
        rows = rows.filter(pc.invert(marker))
    keys: Any = rows["key"].combine_chunks()
    if report.file_format.upper() == "CSV":
        keys = _decoded(keys)
    source = report.source_bucket.removeprefix(ARN)
    bucket = rows["bucket"].combine_chunks() if "bucket" in have else pa.array([source] * rows.num_rows, pa.string())
    names = pc.binary_join_element_wise(pa.scalar("s3:/"), bucket, keys, "/")
    none = pa.nulls(rows.num_rows, pa.string())
    return pa.table(
        {
            "name": names,
            "etag": rows["etag"] if "etag" in have else none,
            "size_bytes": rows["size_bytes"] if "size_bytes" in have else none,
        }
    )


def _decoded(keys: Any) -> Any:
    """Keys of a CSV report, which are URL-encoded."""
    encoded = pc.match_substring_regex(keys, "[%+]")
    if not pc.any(encoded).as_py():
        return keys
    return pc.replace_with_mask(
        keys, encoded, pa.array([unquote_plus(key) for key in keys.filter(encoded).to_pylist()], pa.string())
    )
