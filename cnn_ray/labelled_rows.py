"""What a data location says: uri, class name, group, split and source of every image."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.allowed_uris import resolve_uri
from cnn_ray.config import DataConfig
from cnn_ray.errors import DataError
from cnn_ray.known_sets import FLOWERS_FILES, KERAS_CIFAR10, cifar10_rows, flowers102_rows, is_packed
from cnn_ray.manifest_files import is_manifest, read_manifest_table
from cnn_ray.storage import open_store, split_uri


@dataclass(frozen=True)
class LabelledRows:
    """Location and class name of each image, and what else the data say of it."""

    uris: list[str]
    names: list[str]
    groups: list[str] | None = None
    splits: list[str] | None = None
    sources: list[str] | None = None

    def take(self, order: Sequence[int]) -> LabelledRows:
        """The rows at these positions, in their order."""

        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[k] for k in order]

        picked = (pick(v) for v in (self.groups, self.splits, self.sources))
        return LabelledRows([self.uris[k] for k in order], [self.names[k] for k in order], *picked)


def read_rows(config: DataConfig) -> tuple[str, LabelledRows]:
    """(where the uris start, the rows) of class folders, a manifest or a known set.

    Raises:
        DataError: a missing column or value, or an image named twice.
        StorageError: the location cannot be read.
    """
    kind = config.format if config.format != "auto" else _recognised(config.uri)
    if kind == "manifest":
        return _manifest_rows(config)
    if kind == "folders":
        return _folder_rows(config.uri)
    known = cifar10_rows(config.uri) if kind == "cifar10" else flowers102_rows(config.uri)
    return known.root_uri, LabelledRows(known.uris, known.names, splits=known.splits)


def _recognised(uri: str) -> str:
    if is_manifest(uri):
        return "manifest"
    if uri == KERAS_CIFAR10 or uri.lower().endswith(".npz"):
        return "cifar10"
    return "flowers102" if open_store(uri).exists(FLOWERS_FILES[0]) else "folders"


def _folder_rows(uri: str) -> tuple[str, LabelledRows]:
    """Rows of class folders: the first folder below the root is the class; hidden and `_` names are not data."""
    store = open_store(uri)
    start = len(store.uri.rstrip("/")) + 1
    uris: list[str] = []
    names: list[str] = []
    for table in store.list():
        for location in table["uri"].to_pylist():
            parts = location[start:].split("/")
            if len(parts) > 1 and not any(part.startswith((".", "_")) for part in parts):
                uris.append(location)
                names.append(parts[0])
    return store.uri, LabelledRows(uris, names)


def _resolve(root_uri: str, value: str) -> str | None:
    """The location of a manifest's entry; a packed set is a file like any other, and must be allowed like one."""
    if not is_packed(value) or value.startswith(f"{KERAS_CIFAR10}#"):
        return value if is_packed(value) else resolve_uri(root_uri, value)
    container, _, number = value.rpartition("#")
    resolved = resolve_uri(root_uri, container)
    return None if resolved is None else f"{resolved}#{number}"


def _manifest_rows(config: DataConfig) -> tuple[str, LabelledRows]:
    table = read_manifest_table(config.uri)
    root = open_store(split_uri(config.uri)[0])

    def column(name: str, field: str) -> list[str]:
        if name not in table.column_names:
            near = difflib.get_close_matches(name, table.column_names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"set data.{field}."
            have = ", ".join(table.column_names)
            raise DataError(f"Expected a column {name!r} in {config.uri}. Received: {have}. Next: {hint}")
        values = pc.cast(table[name], pa.string()).to_pylist()
        empty = next((k for k, value in enumerate(values) if value is None or not value.strip()), None)
        if empty is not None:
            raise DataError(
                f"Expected a value in column {name!r} of every row. Received: none in row {empty + 1} of {config.uri}. "
                "Next: correct the manifest."
            )
        return [value.strip() for value in values]

    uris: list[str] = []
    for value in column(config.uri_column, "uri_column"):
        resolved = _resolve(root.uri, value)
        if resolved is None:
            raise DataError(
                f"Expected image locations below {root.uri} or s3://. Received: {value!r} in {config.uri}. "
                "Next: correct the manifest."
            )
        uris.append(resolved)
    twice = next((uri for uri, count in Counter(uris).items() if count > 1), None)
    if twice is not None:
        raise DataError(
            f"Expected each image once. Received: {twice} twice in {config.uri}. Next: remove one of the rows."
        )
    names = column(config.label_column, "label_column")
    wanted = [(config.group_column, "group_column"), (config.split_column, "split_column")]
    wanted.append((config.source_column, "source_column"))
    return root.uri, LabelledRows(
        uris, names, *(None if name is None else column(name, field) for name, field in wanted)
    )
