# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""A manifest -> its sorted listing: each row's location, etag, size, and `input_` columns."""

from __future__ import annotations

import hashlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.allowed_uris import is_allowed, resolve_uri
from cnn_ray.errors import AccessDeniedError, DataError, NotFoundError
from cnn_ray.manifest_files import read_manifest_table
from cnn_ray.records import INPUT_PREFIX, LISTING_SCHEMA
from cnn_ray.redaction import redact
from cnn_ray.storage import open_store, split_uri
from cnn_ray.stores import Stores

HEAD_THREADS = 32
HEADS_AHEAD = 4096
"""Rows asked about at a time: a million waiting calls would take a gigabyte."""

NOT_ALLOWED = "not-allowed"
ABSENT = "absent"
DENIED = "denied"
"""Planned in place of an etag for manifest rows that are known to be unreadable: the row is frozen as such."""


def manifest_listing(uri: str, uri_column: str, allow_uris: tuple[str, ...]) -> pa.Table:
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
