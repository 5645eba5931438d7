# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""A manifest -> a table of text: CSV, TSV, JSON Lines, Parquet, and a folder of Parquet files as Spark writes it.

    INPUT                                  is
    NAME.csv .tsv .jsonl .ndjson [.gz]     one file of text; any case of the suffix
    NAME.parquet                           one Parquet file, or a folder of them
    FOLDER/*.parquet                       the Parquet files in and below any folder
    .../manifest.json                      a report of S3 Inventory (see `cnn_ray.s3_inventory`)

Only the name decides what is a manifest. A folder is never taken for one because of what lies in it: whoever can write
into a folder of screenshots could then choose what a run reads.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

from cnn_ray.errors import DataError, NotFoundError
from cnn_ray.manifest_csv import csv_table, line_of_row, refuse_repeated
from cnn_ray.manifest_text import MOST_BYTES, utf8_text
from cnn_ray.manifest_values import JsonNumber, is_text, json_text, text_array
from cnn_ray.storage import Store, open_store, split_uri

TEXT_SUFFIXES = (".csv", ".tsv", ".jsonl", ".ndjson")
MANIFEST_SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
INVENTORY_NAME = "manifest.json"
ALL_PARQUET = "*.parquet"

MOST_COLUMNS = 1000
BATCH_ROWS = 16_384


@dataclass(frozen=True)
class ManifestTable:
    """The rows of a manifest: every column is text. `place` says where a row (from 0) stands, for messages."""

    table: pa.Table
    place: Callable[[int], str]


def is_manifest(uri: str) -> bool:
    """Whether the location names a manifest rather than a collection of images."""
    name = uri.lower()
    return name.endswith(MANIFEST_SUFFIXES) or name.rstrip("/").endswith(".parquet") or is_inventory(uri)


def is_inventory(uri: str) -> bool:
    """Whether the location names the report of an S3 Inventory."""
    return uri.rpartition("/")[2] == INVENTORY_NAME


def collection_of(uri: str) -> str | None:
    """Return the folder all of whose files are the input, None where it is one file."""
    if not is_manifest(uri):
        return uri
    return _folder_of(uri).uri if uri.rstrip("/").lower().endswith(".parquet") else None


def manifest_exists(uri: str) -> bool:
    """Whether the manifest is there, be it a file or a folder of Parquet files."""
    folder, name = split_uri(uri)
    store = open_store(folder)
    if name != ALL_PARQUET and store.exists(name):
        return True
    return name.lower().endswith(".parquet") and bool(_data_files(uri))


def read_manifest(uri: str, uri_column: str) -> ManifestTable:
    """Return the rows of a manifest as text. The column of locations, where there is one, was text in the file too.

    Raises:
        NotFoundError: no such file.
        DataError: the file is not what its name says, or a location is no text.
    """
    folder, name = split_uri(uri)
    store, kind = open_store(folder), name.lower().removesuffix(".gz").rpartition(".")[2]
    if is_inventory(uri):
        raise DataError(
            f"Expected a manifest with a row for each image. Received: {uri}, a report of S3 Inventory, which has no "
            "columns of yours. Next: name it as the INPUT of score, or make a CSV of it."
        )
    if kind == "parquet":
        return _parquet(uri, uri_column)
    raw = store.get(name, max_bytes=MOST_BYTES)
    if kind in ("jsonl", "ndjson"):
        return _json_lines(utf8_text(raw, uri), uri, uri_column)
    delimiter = "\t" if kind == "tsv" else ","

    def place(row: int) -> str:
        line = line_of_row(utf8_text(store.get(name, max_bytes=MOST_BYTES), uri), delimiter, row + 1)
        return f"row {row + 1} (line {line})"

    return ManifestTable(csv_table(utf8_text(raw, uri), uri, delimiter), place)


def _not_text(uri: str, column: str, kind: str, place: str) -> DataError:
    return DataError(
        f"Expected text in the column {column!r} of {uri}. Received: {kind} in {place}. Next: write locations as text."
    )


def _parquet(uri: str, uri_column: str) -> ManifestTable:
    """The rows of one Parquet file, or of all files of a folder."""
    folder, name = split_uri(uri)
    store = open_store(folder)
    try:
        if name != ALL_PARQUET:
            return _parquet_file(store.get(name, max_bytes=MOST_BYTES), uri, uri_column)
    except NotFoundError:
        if not _data_files(uri):
            raise
    root, files = _folder_of(uri), _data_files(uri)
    if not files:
        raise NotFoundError(f"Expected Parquet files in {root.uri}. Received: none. Next: check the location.")
    tables = [_file_of_folder(root, key, uri_column) for key in files]
    starts = [0]
    for table in tables:
        starts.append(starts[-1] + table.num_rows)

    def place(row: int) -> str:
        number = max(k for k, start in enumerate(starts[:-1]) if start <= row)
        return f"row {row - starts[number] + 1} of {files[number]}"

    return ManifestTable(pa.concat_tables(tables, promote_options="permissive"), place)


def _folder_of(uri: str) -> Store:
    folder, name = split_uri(uri)
    return open_store(folder if name == ALL_PARQUET else uri.rstrip("/"))


def _data_files(uri: str) -> list[str]:
    """Keys of the Parquet files below the folder, without what writers leave beside them (`_SUCCESS`, `.crc`)."""
    prefix = _folder_of(uri)
    return [
        key
        for key in prefix.keys("")
        if key.lower().endswith(".parquet") and not any(part.startswith(("_", ".")) for part in key.split("/"))
    ]


def _file_of_folder(root: Store, key: str, uri_column: str) -> pa.Table:
    """The rows of a file, with a column for each `name=value` folder above it, as Hive and Spark write them."""
    uri = root.uri_of(key)
    table = _parquet_file(root.get(key, max_bytes=MOST_BYTES), uri, uri_column).table
    for part in key.split("/")[:-1]:
        name, equals, value = part.partition("=")
        if equals:
            refuse_repeated([*table.column_names, unquote(name)], uri)
            text = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
            table = table.append_column(unquote(name), pa.array([text] * table.num_rows, pa.string()))
    return table


def _parquet_file(raw: bytes, uri: str, uri_column: str) -> ManifestTable:
    def place(row: int) -> str:
        return f"row {row + 1}"

    batches: list[pa.RecordBatch] = []
    size_bytes = 0
    try:
        file = pq.ParquetFile(io.BytesIO(raw))
        names = file.schema_arrow.names
        refuse_repeated(names, uri)
        kind = file.schema_arrow.field(uri_column).type if uri_column in names else None
        if kind is not None and file.metadata.num_rows and not is_text(kind):
            raise _not_text(uri, uri_column, f"values of type {kind}", place(0))
        schema = pa.schema([(name, pa.string()) for name in names])
        for batch in file.iter_batches(BATCH_ROWS):
            columns = [text_array(column) for column in batch.columns]
            batches.append(pa.RecordBatch.from_arrays(columns, schema=schema))
            size_bytes += batches[-1].nbytes
            if size_bytes > MOST_BYTES:
                raise DataError(
                    f"Expected at most {MOST_BYTES >> 20} MiB of text in {uri}. Received: more. Next: split the file."
                )
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"Expected a readable Parquet file in {uri}. Received: {reason}. Next: correct it.") from None
    return ManifestTable(pa.Table.from_batches(batches, schema), place)


def _json_lines(text: bytes, uri: str, uri_column: str) -> ManifestTable:
    lines: list[int] = []
    names: dict[str, None] = {}
    tables: list[pa.Table] = []
    rows: list[dict[str, Any]] = []
    number = start = 0
    while start < len(text):
        end = text.find(b"\n", start)
        end = len(text) if end < 0 else end
        line, start, number = text[start:end].strip(), end + 1, number + 1
        if not line:
            continue
        lines.append(number)
        rows.append(_json_row(line, uri, uri_column, f"row {len(lines)} (line {number})"))
        names.update(dict.fromkeys(rows[-1]))
        if len(names) > MOST_COLUMNS:
            raise DataError(
                f"Expected at most {MOST_COLUMNS} columns in {uri}. Received: more, up to line {number}. "
                "Next: keep what varies from row to row as one JSON value."
            )
        if len(rows) >= BATCH_ROWS:
            tables.append(_text_table(rows, names))
            rows = []
    if not lines:
        raise DataError(f"Expected a JSON object in each line of {uri}. Received: an empty file. Next: write it again.")
    tables.append(_text_table(rows, names))
    return ManifestTable(
        pa.concat_tables(tables, promote_options="permissive"), lambda row: f"row {row + 1} (line {lines[row]})"
    )


def _text_table(rows: list[dict[str, Any]], names: dict[str, None]) -> pa.Table:
    return pa.table({name: pa.array([row.get(name) for row in rows], pa.string()) for name in names})


def _json_row(line: bytes, uri: str, uri_column: str, place: str) -> dict[str, Any]:
    """The cells of one line as text."""
    try:
        row = _DECODER.decode(line.decode())
        if not isinstance(row, dict):
            raise ValueError(f"a value of type {type(row).__name__}")
        location = row.get(uri_column)
        if location is not None and (not isinstance(location, str) or isinstance(location, JsonNumber)):
            raise _not_text(uri, uri_column, _KINDS.get(type(location), "a number"), place)
        cells = {name: json_text(value) for name, value in row.items()}
        "".join([*cells, *filter(None, cells.values())]).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:100]
        raise DataError(
            f"Expected one JSON object in each line of {uri}. Received: {reason}, in {place}. Next: correct the line."
        ) from None
    return cells


_KINDS: dict[type, str] = {bool: "true or false", list: "a list", dict: "an object"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    row = dict(pairs)
    if len(row) < len(pairs):
        name = next(name for number, (name, _) in enumerate(pairs) if name in [n for n, _ in pairs[:number]])
        raise ValueError(f"the name {name!r} twice")
    return row


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object, parse_int=JsonNumber, parse_float=JsonNumber, parse_constant=JsonNumber
)
