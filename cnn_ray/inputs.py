# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""INPUT -> sorted tables of (uri, etag, size_bytes): a folder, an s3:// prefix, or a manifest of locations."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.manifest_files import is_inventory, is_manifest
from cnn_ray.manifest_listing import ManifestOptions, manifest_listing
from cnn_ray.s3_inventory import inventory_listing
from cnn_ray.storage import open_store

SUCCESS = "_SUCCESS"


def list_inputs(
    uri: str, uri_column: str, allow_uris: tuple[str, ...] = (), options: ManifestOptions | None = None
) -> Iterator[pa.Table]:
    """Tables with LISTING_SCHEMA (and `input_` columns of a manifest), sorted by uri, each uri once.

    What a manifest names outside of `allow_uris` (see `is_allowed`) is a row that nothing is fetched for.

    Raises:
        NotFoundError: no such folder, bucket or manifest.
        DataError: the manifest cannot be parsed, lacks the column, or names a uri twice.
    """
    options = options or ManifestOptions()
    if is_inventory(uri):
        yield _without_markers(inventory_listing(uri, allow_uris, options))
    elif is_manifest(uri):
        yield manifest_listing(uri, uri_column, allow_uris, options)
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
