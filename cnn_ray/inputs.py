# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""INPUT -> sorted tables of (uri, etag, size_bytes): a folder, an s3:// prefix, or a manifest of locations."""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from cnn_ray.errors import AccessDeniedError, DataError, NotFoundError
from cnn_ray.records import INPUT_PREFIX, LISTING_SCHEMA
from cnn_ray.redaction import redact
from cnn_ray.storage import open_store, split_uri
from cnn_ray.stores import Stores

SUCCESS = "_SUCCESS"
MANIFEST_SUFFIXES = (".csv", ".parquet", ".jsonl")
HEAD_THREADS = 32
HEADS_AHEAD = 4096
"""Rows asked about at a time: a million waiting calls would take a gigabyte."""

NOT_ALLOWED = "not-allowed"
ABSENT = "absent"
DENIED = "denied"
"""Planned in place of an etag for manifest rows that are known to be unreadable: the row is frozen as such."""


def is_manifest(uri: str) -> bool:
    """Whether the location names a manifest file rather than a collection."""
    return uri.lower().endswith(MANIFEST_SUFFIXES)


def list_inputs(uri: str, uri_column: str, allow_uris: tuple[str, ...] = ()) -> Iterator[pa.Table]:
    """Tables with LISTING_SCHEMA (and `input_` columns of a manifest), sorted by uri, each uri once.

    What a manifest names outside of `allow_uris` (see `is_allowed`) is a row that nothing is fetched for.

    Raises:
        NotFoundError: no such folder, bucket or manifest.
        DataError: the manifest cannot be parsed, lacks the column, or names a uri twice.
    """
    if is_manifest(uri):
        yield _manifest_listing(uri, uri_column, allow_uris)
    else:
        yield from map(_without_markers, open_store(uri).list())


def _without_markers(table: pa.Table) -> pa.Table:
    """The rows that can be images: not those that say that a folder is complete.

    Hadoop and Spark write `_SUCCESS` for that; any other name counts where it begins with `_` and the object is empty,
    because a hash that names an image may begin with `_` too.
    """
    success = pc.ends_with(table["uri"], f"/{SUCCESS}")
    empty = pc.equal(table["size_bytes"], 0)
    if not pc.any(pc.or_(success, empty)).as_py():
        return table
    marker = pc.or_(success, pc.and_(empty, pc.match_substring_regex(table["uri"], "/_[^/]*$")))
    return table.filter(pc.invert(marker))


def read_manifest_table(uri: str) -> pa.Table:
    """The rows of a CSV, Parquet or JSON Lines file as they stand.

    Raises:
        DataError: the file is not what its name says.
    """
    folder, name = split_uri(uri)
    raw = open_store(folder).get(name)
    try:
        if uri.lower().endswith(".csv"):
            return pyarrow.csv.read_csv(io.BytesIO(raw))
        if uri.lower().endswith(".parquet"):
            return pq.read_table(io.BytesIO(raw))
        return pyarrow.json.read_json(io.BytesIO(raw))
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"Expected a readable manifest in {uri}. Received: {reason}. Next: correct the file.") from None


def resolve_uri(base: str, uri: str) -> str | None:
    """The absolute location of a manifest entry, None where it is not allowed.

    A manifest may be written by somebody else: a relative entry must stay below the manifest's folder, only s3:// is a
    scheme, and a local path is taken only from a local manifest.
    """
    if uri.startswith("s3://"):
        return uri if len(uri) > len("s3://") and ".." not in uri.split("/") else None
    if "://" in uri or "\0" in uri or not uri:
        return None
    if uri.startswith("/"):
        return None if base.startswith("s3://") or ".." in uri.split("/") else posixpath.normpath(uri)
    relative = posixpath.normpath(uri)
    return None if relative.startswith("..") or relative == "." else f"{base.rstrip('/')}/{relative}"


def is_allowed(location: str, base: str, allow_uris: tuple[str, ...]) -> bool:
    """Whether a manifest in the folder `base` may name this absolute location.

    What lies in the manifest's own folder always. Else `allow_uris` are the locations (s3://bucket, s3://bucket/prefix,
    /folder) that it may name; without any a manifest in S3 may name its own bucket, because who may write there need
    not be who may read all that this run can, and a local one, the operator's own, whatever the run can read.
    Links are followed before a folder is judged.
    """
    if _is_below(location, base):
        return True  # the store keeps links from leading out of it
    if not allow_uris:
        return not base.startswith("s3://") or _is_below(location, "/".join(base.split("/")[:3]))
    if location.startswith("s3://"):
        return any(_is_below(location, root) for root in allow_uris)
    real = os.path.realpath(location)
    return any(_is_below(real, os.path.realpath(root)) for root in allow_uris if "://" not in root)


def _is_below(location: str, root: str) -> bool:
    return location.startswith(root.rstrip("/") + "/")


def _manifest_listing(uri: str, uri_column: str, allow_uris: tuple[str, ...]) -> pa.Table:
    table = read_manifest_table(uri)
    if uri_column not in table.column_names:
        raise DataError(
            f"Expected a column {uri_column!r} in {uri}. Received: {', '.join(table.column_names)}. "
            "Next: name the column with --uri-column."
        )
    listing = _listing_of([str(value) for value in table[uri_column].to_pylist()], uri, allow_uris)
    for name in table.column_names:
        if name != uri_column:
            listing = listing.append_column(INPUT_PREFIX + name, table[name])
    return listing.sort_by("uri")


def _listing_of(named: list[str], manifest: str, allow_uris: tuple[str, ...]) -> pa.Table:
    """The locations, etags and sizes of what the manifest names, in its order."""
    root = open_store(split_uri(manifest)[0])
    stores = Stores(root)
    resolved = [
        location if location is not None and is_allowed(location, root.uri, allow_uris) else None
        for location in (resolve_uri(root.uri, name) for name in named)
    ]
    uris = pa.array([location or _shown(name) for name, location in zip(named, resolved, strict=True)], pa.string())
    _refuse_duplicates(uris, manifest)
    etags: list[str] = []
    sizes = np.zeros(len(resolved), np.int64)
    with ThreadPoolExecutor(HEAD_THREADS, thread_name_prefix="head") as pool:
        for start in range(0, len(resolved), HEADS_AHEAD):
            part = resolved[start : start + HEADS_AHEAD]
            for place, (etag, size_bytes) in enumerate(pool.map(lambda location: _head(location, stores), part), start):
                etags.append(etag)
                sizes[place] = size_bytes
    return pa.Table.from_arrays([uris, pa.array(etags, pa.string()), pa.array(sizes)], schema=LISTING_SCHEMA)


def _shown(name: str) -> str:
    """What stands for a name that is not allowed: signed URLs lose their signature and stay different."""
    clean = redact(name)
    return name if clean == name else f"{clean}#{hashlib.sha256(name.encode()).hexdigest()[:12]}"


def _refuse_duplicates(uris: pa.Array, manifest: str) -> None:
    first = pc.index_in(uris, value_set=uris)
    repeats = pc.indices_nonzero(pc.not_equal(first, pa.array(np.arange(len(uris), dtype=np.int32))))
    if len(repeats):
        uri = uris[repeats[0].as_py()].as_py()
        raise DataError(f"Expected each uri once in {manifest}. Received: {uri} twice. Next: remove one of the rows.")


def _head(location: str | None, stores: Stores) -> tuple[str, int]:
    if location is None:
        return NOT_ALLOWED, 0
    store, key = stores.locate(location)
    try:
        info = store.head(key)
    except NotFoundError:
        return ABSENT, 0
    except AccessDeniedError:
        return DENIED, 0
    return info.etag, info.size_bytes
