# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""A manifest file's bytes -> a table: CSV, Parquet, JSON Lines."""

from __future__ import annotations

import io

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq

from cnn_ray.errors import DataError
from cnn_ray.storage import open_store, split_uri

MANIFEST_SUFFIXES = (".csv", ".parquet", ".jsonl")


def is_manifest(uri: str) -> bool:
    """Whether the location names a manifest file rather than a collection."""
    return uri.lower().endswith(MANIFEST_SUFFIXES)


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
