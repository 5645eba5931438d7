"""What a data location says: uri, class name, group, split and source of every image."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pyarrow as pa

from cnn_ray.allowed_uris import resolve_uri
from cnn_ray.config import DataConfig
from cnn_ray.errors import DataError
from cnn_ray.input_filters import NameFilter, Selection, is_system_file
from cnn_ray.known_sets import FLOWERS_FILES, KERAS_CIFAR10, cifar10_rows, flowers102_rows, is_packed
from cnn_ray.manifest_files import is_manifest, read_manifest
from cnn_ray.storage import open_store, split_uri

SPLIT_NAMES = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "val", "valid", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
"""Names of the parts of a split as data sets are distributed, in lower case."""


@dataclass(frozen=True)
class LabelledRows:
    """Location and class name of each image, and what else the data say of it."""

    uris: list[str]
    names: list[str]
    groups: list[str] | None = None
    splits: list[str] | None = None
    sources: list[str] | None = None
    outside_classes: int = 0
    """Files that lie in no class folder."""
    empty_classes: tuple[str, ...] = ()
    """Class folders without a file, where the storage knows folders."""
    by_pattern: int = 0
    """Images that `data.include` or `data.exclude` leave out."""

    def take(self, order: Sequence[int]) -> LabelledRows:
        """The rows at these positions, in their order."""

        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[k] for k in order]

        return replace(
            self,
            uris=[self.uris[k] for k in order],
            names=[self.names[k] for k in order],
            groups=pick(self.groups),
            splits=pick(self.splits),
            sources=pick(self.sources),
        )


def read_rows(config: DataConfig) -> tuple[str, LabelledRows]:
    """Return where the uris start, and the rows that `data.include` and `data.exclude` take. See `_all_rows`."""
    root_uri, rows = _all_rows(config)
    if not config.include and not config.exclude:
        return root_uri, rows
    counts: Counter[str] = Counter()
    names = NameFilter(root_uri, Selection(config.include, config.exclude), counts)
    table = names.selected(pa.table({"uri": pa.array(rows.uris, pa.string()), "row": pa.array(range(len(rows.uris)))}))
    return root_uri, replace(rows.take(table["row"].to_pylist()), by_pattern=counts.total())


def _all_rows(config: DataConfig) -> tuple[str, LabelledRows]:
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
    """Return the rows of class folders: CLASS/..., or SPLIT/CLASS/... where all folders are named like a split.

    Names that begin with `.` or `_`, and files of operating systems, are not data.
    """
    store = open_store(uri)
    start = len(store.uri.rstrip("/")) + 1
    paths: list[list[str]] = []
    outside = 0
    for table in store.list():
        for location in table["uri"].to_pylist():
            parts = location[start:].split("/")
            if any(part.startswith((".", "_")) for part in parts) or is_system_file(location[start:]):
                continue
            if len(parts) > 1:
                paths.append(parts)
            else:
                outside += 1
    depth = _depth_of_classes(paths, uri)
    kept = [parts for parts in paths if len(parts) > depth + 1]
    names = [parts[depth] for parts in kept]
    splits = [SPLIT_NAMES[parts[0].lower()] for parts in kept] if depth else None
    return store.uri, LabelledRows(
        [store.uri_of("/".join(parts)) for parts in kept],
        names,
        splits=splits,
        outside_classes=outside + len(paths) - len(kept),
        empty_classes=_empty_classes(store.uri, depth, set(names)),
    )


def _depth_of_classes(paths: list[list[str]], uri: str) -> int:
    """Return at which depth the class folders are: 0, or 1 below folders that are named like a split.

    Raises:
        DataError: folders named like a split stand beside class folders.
    """
    tops = {parts[0] for parts in paths}
    splits = {name for name in tops if name.lower() in SPLIT_NAMES}
    deeper = {parts[0] for parts in paths if len(parts) > 2}
    if tops and splits == tops and deeper and any(SPLIT_NAMES[name.lower()] == "train" for name in splits):
        return 1
    above = sorted(splits & deeper)
    beside = sorted(tops - splits)
    if above and beside:
        raise DataError(
            f"Expected either class folders or folders named train, validation and test above them in {uri}. "
            f"Received: {above[0]}/ with folders in it beside {beside[0]}/. Next: move {beside[0]}/ away, or give a "
            "manifest with a label and a split column."
        )
    if len(splits) > 1 and splits == tops:
        raise DataError(
            f"Expected class folders in {uri}. Received: only {', '.join(sorted(splits))}, which name parts of a "
            "split, not classes. Next: put class folders into each of them, with one of them named train."
        )
    return 0


def _empty_classes(root_uri: str, depth: int, names: set[str]) -> tuple[str, ...]:
    """Return the class folders without a file; object storage has none."""
    root = Path(root_uri)
    if "://" in root_uri or not root.is_dir():
        return ()
    found = {path.name for path in root.glob("*/" * (depth + 1)) if path.is_dir()} - names
    return tuple(sorted(n for n in found if not n.startswith((".", "_")) and not is_system_file(f"{n}/")))


def _resolve(root_uri: str, value: str) -> str | None:
    """The location of a manifest's entry; a packed set is a file like any other, and must be allowed like one."""
    if not is_packed(value) or value.startswith(f"{KERAS_CIFAR10}#"):
        return value if is_packed(value) else resolve_uri(root_uri, value)
    container, _, number = value.rpartition("#")
    resolved = resolve_uri(root_uri, container)
    return None if resolved is None else f"{resolved}#{number}"


def _manifest_rows(config: DataConfig) -> tuple[str, LabelledRows]:
    manifest = read_manifest(config.uri, config.uri_column)
    table = manifest.table
    root = open_store(split_uri(config.uri)[0])

    def column(name: str, field: str) -> list[str]:
        if name not in table.column_names:
            near = difflib.get_close_matches(name, table.column_names, n=1)
            hint = f"did you mean {near[0]}?" if near else f"set data.{field}."
            have = ", ".join(table.column_names)
            raise DataError(f"Expected a column {name!r} in {config.uri}. Received: {have}. Next: {hint}")
        values = table[name].to_pylist()
        empty = next((k for k, value in enumerate(values) if value is None or not value.strip()), None)
        if empty is not None:
            raise DataError(
                f"Expected a value in column {name!r} of every row. Received: none in {manifest.place(empty)} of "
                f"{config.uri}. "
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
    groups, splits, sources = (None if name is None else column(name, field) for name, field in wanted)
    return root.uri, LabelledRows(uris, names, groups, splits, sources)
