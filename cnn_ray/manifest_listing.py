# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""A manifest -> its sorted listing: each row's location, etag, size, and its other columns as `input_` ones."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.allowed_uris import allowed_locations
from cnn_ray.errors import DataError
from cnn_ray.manifest_files import ManifestTable, read_manifest
from cnn_ray.manifest_text import MOST_BYTES
from cnn_ray.object_lookup import ABSENT, DENIED, NOT_ALLOWED, look_up
from cnn_ray.records import INPUT_PREFIX, LISTING_SCHEMA
from cnn_ray.redaction import redact
from cnn_ray.storage import Store, open_store, split_uri
from cnn_ray.stores import Stores

AUTO_COLUMN = "auto"
NO_COLUMN = "none"
ETAG_COLUMNS = ("etag", "ETag", "e_tag")
SIZE_COLUMNS = ("size_bytes", "size", "Size")
"""As our own output, a CSV of S3 Inventory and its Parquet name them."""

_ETAG = r'^"?[!#-\[\]-~]{1,255}"?$'
_SIZE = r"^[0-9]{1,18}$"
_AWKWARD = re.compile(r"[\x00-\x1f\x7f ,;{}()=]+")
"""Spark, Hive and Delta tables take no such characters in the name of a column."""

MOST_ALL_BYTES = 8 << 30
"""Text of all columns and files of a manifest; one column of locations must fit into one Arrow array."""

Place = Callable[[int], str]


@dataclass(frozen=True)
class ManifestOptions:
    """How the rows of a manifest are taken, besides the column of locations."""

    etag_column: str = AUTO_COLUMN
    size_column: str = AUTO_COLUMN
    on_duplicate: Literal["error", "first"] = "error"
    follow_symlinks: bool = False


def manifest_listing(uri: str, uri_column: str, allow_uris: tuple[str, ...], options: ManifestOptions) -> pa.Table:
    """Return the listing of a manifest, sorted by uri.

    Raises:
        NotFoundError: no such manifest.
        DataError: it cannot be read, lacks a column, has a row without a location, or names one twice.
    """
    manifest = read_manifest(uri, uri_column)
    names = _locations_as_written(manifest, uri, uri_column)
    etags = _column(manifest, uri, options.etag_column, ETAG_COLUMNS, "etag_column")
    sizes = None if etags is None else _column(manifest, uri, options.size_column, SIZE_COLUMNS, "size_column")
    taken = {uri_column, etags, sizes}
    others = [name for name in manifest.table.column_names if name not in taken]
    table = pa.table({"name": names}).combine_chunks()
    given = {"etag": etags, "size_bytes": sizes}
    for target, name in given.items():
        table = table.append_column(target, _nulls(len(names)) if name is None else manifest.table[name])
    for name, column in zip(_input_names(others, uri), others, strict=True):
        table = table.append_column(name, manifest.table[column])
    root = open_store(split_uri(uri)[0], follow_symlinks=options.follow_symlinks)
    return listing_of(table, root, uri, allow_uris, options, manifest.place)


def listing_of(
    rows: pa.Table,
    root: Store,
    uri: str,
    allow_uris: tuple[str, ...],
    options: ManifestOptions,
    place: Place,
) -> pa.Table:
    """Return the sorted listing of rows: `name` as written, `etag` and `size_bytes` as text or null, other columns.

    Raises:
        DataError: a location stands twice, or an etag or size is none.
    """
    if rows.nbytes > MOST_ALL_BYTES or rows["name"].nbytes > MOST_BYTES:
        raise DataError(
            f"Expected at most {MOST_ALL_BYTES >> 30} GiB of text in {uri}. Received: {rows.num_rows} rows that hold "
            "more. Next: split the manifest."
        )
    names = _one_array(rows["name"])
    located = allowed_locations(names, root.uri, allow_uris)
    uris = _with_refused(located, names)
    rows = rows.drop_columns(["name"])
    first = pc.index_in(uris, value_set=uris)
    is_first = pc.equal(first, pa.array(np.arange(len(uris), dtype=np.int32)))
    if pc.any(pc.invert(is_first)).as_py():
        if options.on_duplicate == "error":
            raise _twice(uris, first, is_first, uri, place)
        kept = np.flatnonzero(is_first.to_numpy(zero_copy_only=False))
        inner = place
        place = lambda row: inner(int(kept[row]))  # noqa: E731 - rows are counted as in the manifest
        uris, located, rows = uris.filter(is_first), located.filter(is_first), rows.filter(is_first)
    known = _given(rows, uri, place)
    listing = _looked_up(uris, located, known, Stores(root, follow_symlinks=options.follow_symlinks))
    for name in rows.column_names[2:]:
        listing = listing.append_column(name, rows[name])
    return listing.sort_by("uri")


def _locations_as_written(manifest: ManifestTable, uri: str, uri_column: str) -> Any:
    table = manifest.table
    if uri_column not in table.column_names:
        have = ", ".join(table.column_names)
        lone = table.num_columns == 1 and next((mark for mark in (";", "\t", "|") if mark in have), None)
        fix = f"separate the cells by commas, not by {lone!r}." if lone else "name the column with --uri-column."
        raise DataError(f"Expected a column {uri_column!r} in {uri}. Received: {have[:500] or 'none'}. Next: {fix}")
    names = table[uri_column]
    empty = pc.fill_null(pc.match_substring_regex(names, r"^\s*$"), True)
    if pc.any(empty).as_py():
        row = int(pc.index(empty, True).as_py())
        raise DataError(
            f"Expected a location in each row of {uri}. Received: none in {manifest.place(row)}, column "
            f"{uri_column!r}. Next: correct or remove the row."
        )
    return names


def _column(manifest: ManifestTable, uri: str, wanted: str, usual: Sequence[str], field: str) -> str | None:
    """The name of the column that holds etags or sizes, None where there is none."""
    have = manifest.table.column_names
    if wanted == NO_COLUMN:
        return None
    if wanted == AUTO_COLUMN:
        return next((name for name in usual if name in have), None)
    if wanted not in have:
        raise DataError(
            f"Expected a column {wanted!r} in {uri}. Received: {', '.join(have)[:500]}. Next: correct {field}."
        )
    return wanted


def _input_names(names: Sequence[str], uri: str) -> list[str]:
    """The columns' names in the output: all readers take them, and tell them apart without regard to case."""
    clean = [INPUT_PREFIX + (_AWKWARD.sub("_", name) or f"column_{number}") for number, name in enumerate(names, 1)]
    seen: dict[str, str] = {}
    for name, output in zip(names, clean, strict=True):
        other = seen.setdefault(output.casefold(), name)
        if other != name:
            raise DataError(
                f"Expected columns of {uri} whose names differ in more than case and punctuation. Received: {other!r} "
                f"and {name!r}, both {output!r} for a reader of the output. Next: rename one of them."
            )
    return clean


def _with_refused(located: Any, names: Any) -> Any:
    """The locations; for entries that are not allowed the entry itself, without its secrets."""
    refused = pc.is_null(located)
    if not pc.any(refused).as_py():
        return located
    shown = pa.array([_shown(name) for name in names.filter(refused).to_pylist()], pa.string())
    return pc.replace_with_mask(located, refused, shown)


def _shown(name: str) -> str:
    """What stands for a name that is not allowed: signed URLs lose their signature and stay different."""
    clean = redact(name)
    return name if clean == name else f"{clean}#{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _twice(uris: Any, first: Any, is_first: Any, uri: str, place: Place) -> DataError:
    row = int(pc.index(is_first, False).as_py())
    before = place(int(first[row].as_py()))
    count = int(pc.sum(pc.invert(is_first)).as_py())
    more = f" ({count} rows repeat an earlier one)" if count > 1 else ""
    return DataError(
        f"Expected each uri once in {uri}. Received: {uris[row].as_py()} twice, in {before} and {place(row)}{more}. "
        "Next: remove one of the rows, or set on_duplicate to first."
    )


def _given(rows: pa.Table, uri: str, place: Place) -> pa.Table:
    """What the manifest itself says of each row: etag without quotes, size; null where it must be asked for."""
    etags, sizes = _one_array(rows["etag"]), _one_array(rows["size_bytes"])
    none = pa.scalar(None, pa.string())
    etags = pc.if_else(pc.or_kleene(pc.equal(etags, ""), pc.starts_with(etags, "W/")), none, etags)  # weak: no version
    sizes = pc.if_else(pc.equal(sizes, ""), none, sizes)
    reserved = pc.is_in(etags, value_set=pa.array([ABSENT, DENIED, NOT_ALLOWED]))
    for values, wrong, what in (
        (etags, pc.or_kleene(pc.invert(pc.match_substring_regex(etags, _ETAG)), reserved), "an etag"),
        (sizes, pc.invert(pc.match_substring_regex(sizes, _SIZE)), "a number of bytes"),
    ):
        if pc.any(wrong).as_py():
            row = int(pc.index(pc.fill_null(wrong, False), True).as_py())
            raise DataError(
                f"Expected {what} as S3 writes it in each row of {uri}. Received: "
                f"{str(values[row].as_py())[:100]!r} in {place(row)}. "
                f"Next: correct the cell, or set etag_column and size_column to {NO_COLUMN}."
            )
    return pa.table({"etag": pc.utf8_trim(etags, '"'), "size_bytes": sizes.cast(pa.int64())})


def _looked_up(uris: Any, located: Any, known: pa.Table, stores: Stores) -> pa.Table:
    """The listing in the order of the rows; what the manifest does not say is asked for."""
    etags, sizes = _one_array(known["etag"]), _one_array(known["size_bytes"])
    allowed = pc.is_valid(located)
    etags = pc.if_else(allowed, etags, pa.scalar(NOT_ALLOWED))
    sizes = pc.if_else(allowed, sizes, pa.scalar(0, pa.int64()))
    unknown = pc.invert(pc.and_(pc.is_valid(etags), pc.is_valid(sizes)))
    if pc.any(unknown).as_py():
        found = look_up(uris.filter(unknown), stores)
        there = pc.invert(pc.is_in(found["etag"], value_set=pa.array([ABSENT, DENIED, NOT_ALLOWED])))
        given = etags.filter(unknown)  # a version that is named and not there any more ends as `changed`
        named = pc.and_(pc.is_valid(given), _one_array(there))
        etags = pc.replace_with_mask(etags, unknown, pc.if_else(named, given, _one_array(found["etag"])))
        sizes = pc.replace_with_mask(sizes, unknown, _one_array(found["size_bytes"]))
    return pa.Table.from_arrays([uris, etags, sizes], schema=LISTING_SCHEMA)


def _one_array(column: Any) -> Any:
    return column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column


def _nulls(count: int) -> Any:
    return pa.nulls(count, pa.string())
