"""INPUT -> sorted tables of (uri, etag, size_bytes): a folder, an s3:// prefix, or a manifest of locations."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import pyarrow as pa

from cnn_ray.input_filters import NameFilter, Selection
from cnn_ray.manifest_files import is_inventory, is_manifest
from cnn_ray.manifest_listing import ManifestOptions, manifest_listing
from cnn_ray.s3_inventory import inventory_listing
from cnn_ray.storage import LocalStore, open_store, split_uri
from cnn_ray.storage_base import LIST_BATCH_ROWS


def list_inputs(
    uri: str,
    uri_column: str,
    allow_uris: tuple[str, ...] = (),
    options: ManifestOptions | None = None,
    *,
    selection: Selection | None = None,
    left_out: Counter[str] | None = None,
) -> Iterator[pa.Table]:
    """Yield tables with LISTING_SCHEMA (and `input_` columns of a manifest), sorted by uri, each uri once.

    What a manifest names outside of `allow_uris` (see `is_allowed`) is a row that nothing is fetched for. What the
    selection does not take, and in a folder or bucket what is no image by its name, is counted in `left_out` by reason.

    Raises:
        NotFoundError: no such folder, bucket or manifest.
        DataError: the manifest cannot be parsed, lacks the column, or names a uri twice.
        ConfigError: the patterns are too long.
    """
    selection, options = selection or Selection(), options or ManifestOptions()
    counts = Counter[str]() if left_out is None else left_out
    if is_inventory(uri):
        table = inventory_listing(uri, allow_uris, options)
        bucket = "/".join(table["uri"][0].as_py().split("/")[:3]) if table.num_rows else uri
        yield NameFilter(bucket, selection, counts).images(table)
        return
    if is_manifest(uri):
        root = open_store(split_uri(uri)[0]).uri
        yield NameFilter(root, selection, counts).selected(manifest_listing(uri, uri_column, allow_uris, options))
        return
    store = open_store(uri, follow_symlinks=selection.follow_symlinks)
    tables = store.list(left_out=counts) if isinstance(store, LocalStore) else store.list()
    yield from map(NameFilter(store.uri, selection, counts).images, _joined(tables))


def _joined(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in fewer tables: the first as it comes, each later one of up to LIST_BATCH_ROWS rows or more.

    A page of S3 has 1,000 rows, and a pattern is prepared anew for each table.
    """
    waiting: list[pa.Table] = []
    rows, wanted = 0, 1
    for table in tables:
        waiting.append(table)
        rows += table.num_rows
        if rows >= wanted:
            yield pa.concat_tables(waiting)
            waiting, rows, wanted = [], 0, LIST_BATCH_ROWS
    if waiting:
        yield pa.concat_tables(waiting)
