"""Labelled images -> a frozen `LabelledSet` with its split, and pixels in memory. Light: no TensorFlow, no Ray.

The split is drawn from (seed, group) alone, so it does not depend on the order of a listing, and an image that is added
later moves no other one unless a class target is crossed. Whole groups (domains, brands) stay on one side: near
duplicates of one site on both sides would let a model score well by remembering.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.config import DataConfig
from cnn_ray.errors import AccessDeniedError, DataError, NotFoundError, TooLargeError
from cnn_ray.images import DecodedImage, ImageCaps, decode
from cnn_ray.inputs import is_manifest, read_manifest_table, resolve_uri, store_and_key
from cnn_ray.records import QuarantineCode, RowFailure
from cnn_ray.storage import Store, open_store, split_uri

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
MAX_UNREADABLE_RATE = 0.5
S3_THREADS = 32


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images in the order of their uris, each on one side of the split."""

    root_uri: str
    """Where the uris start: what `load_pixels` opens once."""
    uris: tuple[str, ...]
    label_ids: np.ndarray
    """int32 [N], indices into `labels`"""
    labels: tuple[str, ...]
    """Class names in output order."""
    splits: np.ndarray
    """uint8 [N], indices into `SPLITS`"""
    groups: tuple[str, ...] | None = None
    """Group of each image, where the manifest has them."""

    def rows(self, split: str) -> np.ndarray:
        """int64 [K]: the rows on one side of the split, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def digest(self) -> str:
        """SHA-256 over uris, labels and split: two trainings with the same digest saw the same list."""
        lines = zip(self.uris, self.label_ids.tolist(), self.splits.tolist(), strict=True)
        text = "\n".join(["\t".join(self.labels), *(f"{uri}\t{label}\t{split}" for uri, label, split in lines)])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class LoadedPixels:
    """Decoded images. pixels: uint8 [K, H, W, 3]; kept: int64 [K], their positions in the uris that were asked for."""

    pixels: np.ndarray
    kept: np.ndarray
    failures: dict[QuarantineCode, int]


@dataclass(frozen=True)
class _Rows:
    uris: list[str]
    names: list[str]
    groups: list[str] | None = None
    splits: list[str] | None = None

    def take(self, order: Sequence[int]) -> _Rows:
        def pick(values: list[str] | None) -> list[str] | None:
            return None if values is None else [values[k] for k in order]

        return _Rows(pick(self.uris) or [], pick(self.names) or [], pick(self.groups), pick(self.splits))


def read_labelled_set(config: DataConfig) -> LabelledSet:
    """The labelled images that the configuration names, with labels as numbers and every image on one side.

    Raises:
        DataError: nothing there, one class only, a missing column, an unknown label or split, an image named twice, a
            group on both sides of a given split, or a class too small to stand on both sides.
        StorageError: the location cannot be read.
    """
    seed = config.split_seed
    root_uri, rows = _manifest_rows(config) if is_manifest(config.uri) else _folder_rows(config.uri)
    if not rows.uris:
        raise DataError(
            f"Expected labelled images in {config.uri}. Received: none. Next: give a folder with one folder per class, "
            "or a .csv or .parquet manifest."
        )
    rows = rows.take(sorted(range(len(rows.uris)), key=rows.uris.__getitem__))
    labels, label_ids = _number_labels(rows.names, config)
    if config.limit is not None:
        order = _even_sample(rows.uris, label_ids, config.limit, seed)
        rows, label_ids = rows.take(order), label_ids[order]
    splits = _split(rows, label_ids, labels, config, seed)
    groups = None if rows.groups is None else tuple(rows.groups)
    return LabelledSet(root_uri, tuple(rows.uris), label_ids, labels, splits, groups)


def _folder_rows(uri: str) -> tuple[str, _Rows]:
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
    return store.uri, _Rows(uris, names)


def _manifest_rows(config: DataConfig) -> tuple[str, _Rows]:
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
        resolved = resolve_uri(root.uri, value)
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
    groups = None if config.group_column is None else column(config.group_column, "group_column")
    splits = None if config.split_column is None else column(config.split_column, "split_column")
    return root.uri, _Rows(uris, names, groups, splits)


def _number_labels(names: list[str], config: DataConfig) -> tuple[tuple[str, ...], np.ndarray]:
    found = sorted(set(names))
    labels = config.labels or tuple(found)
    if len(set(labels)) != len(labels):
        raise DataError(f"Expected different labels. Received: {', '.join(labels)}. Next: correct data.labels.")
    unknown = [name for name in found if name not in labels]
    if unknown:
        raise DataError(
            f"Expected only the labels {', '.join(labels)} in {config.uri}. Received: {unknown[0]!r}. "
            "Next: add it to data.labels or correct the data."
        )
    absent = [label for label in labels if label not in found]
    if absent:
        raise DataError(
            f"Expected images of every label in {config.uri}. Received: none of {absent[0]!r}. "
            "Next: remove it from data.labels or add images."
        )
    if len(labels) < 2:
        raise DataError(
            f"Expected two or more classes in {config.uri}. Received: only {found[0]!r}. "
            "Next: add images of another class."
        )
    index = {label: k for k, label in enumerate(labels)}
    return tuple(labels), np.array([index[name] for name in names], np.int32)


def _lot(seed: int, text: str) -> bytes:
    """What a name draws: the same for the same seed, whatever else is in the data."""
    return hashlib.sha256(f"{seed}\t{text}".encode()).digest()


def _even_sample(uris: list[str], label_ids: np.ndarray, limit: int, seed: int) -> list[int]:
    """Ascending positions of `limit` images, taken in turns from the classes so that none outgrows the others."""
    lots = [_lot(seed, f"limit {uri}") for uri in uris]
    turn = np.zeros(len(uris), np.int64)
    for label in np.unique(label_ids):
        members = sorted(np.flatnonzero(label_ids == label), key=lots.__getitem__)
        turn[members] = np.arange(len(members))
    order = sorted(range(len(uris)), key=lambda k: (turn[k], lots[k]))
    return sorted(order[:limit])


def _split(rows: _Rows, label_ids: np.ndarray, labels: tuple[str, ...], config: DataConfig, seed: int) -> np.ndarray:
    given = np.zeros(len(label_ids), np.uint8) if rows.splits is None else _given_split(rows, config)
    if not np.any(given == SPLITS.index("validation")):
        free = np.flatnonzero(given == SPLITS.index("train"))
        groups = rows.uris if rows.groups is None else rows.groups
        drawn = draw_validation([groups[k] for k in free], label_ids[free], config.validation_fraction, seed)
        given[free[drawn]] = SPLITS.index("validation")
    for split in ("train", "validation"):
        present = set(label_ids[given == SPLITS.index(split)].tolist())
        absent = next((label for k, label in enumerate(labels) if k not in present), None)
        if absent is not None:
            raise DataError(
                f"Expected images of {absent!r} in {split}. Received: none, because its images are too few or all in "
                "one group. Next: add images of it, or remove the class from the data."
            )
    return given


def _given_split(rows: _Rows, config: DataConfig) -> np.ndarray:
    names = rows.splits or []
    wrong = next((name for name in names if name not in SPLITS), None)
    if wrong is not None:
        raise DataError(
            f"Expected train, validation or test in column {config.split_column!r}. Received: {wrong!r}. "
            "Next: correct the manifest."
        )
    sides: dict[str, str] = {}
    for group, name in zip(rows.groups or [], names, strict=False):
        if sides.setdefault(group, name) != name:
            raise DataError(
                f"Expected each {config.group_column} on one side of the split. Received: {group!r} in {sides[group]} "
                f"and {name}. Next: correct column {config.split_column!r}."
            )
    return np.array([SPLITS.index(name) for name in names], np.uint8)


def draw_validation(groups: Sequence[str], label_ids: np.ndarray, fraction: float, seed: int) -> np.ndarray:
    """bool [N]: whether each image is in validation. Whole groups, near `fraction` of every class, drawn from the seed.

    Groups come in the order of their lots; each is taken if that brings the shares of the classes nearer to `fraction`
    (least squares), and in later passes put back if that does. So a group larger than twice the target stays in train,
    and single images hit the target exactly. A class that got nothing then takes the group that disturbs the shares
    least. Train always keeps something of every class.
    """
    names = sorted(set(groups), key=lambda group: _lot(seed, f"split {group}"))
    index = {name: k for k, name in enumerate(names)}
    ids = np.array([index[group] for group in groups], np.int64)
    counts = np.zeros((len(names), int(label_ids.max()) + 1 if len(label_ids) else 0), np.int64)
    np.add.at(counts, (ids, label_ids), 1)
    total = counts.sum(axis=0)

    def distance(taken_counts: np.ndarray) -> np.ndarray:
        return np.sum((taken_counts / np.maximum(total, 1) - fraction * (total > 0)) ** 2, axis=-1)

    taken = np.zeros(len(names), bool)
    have = np.zeros_like(total)
    moved = True
    while moved:  # ends, because every move brings the distance down
        moved = False
        for k, group in enumerate(counts):
            after = have - group if taken[k] else have + group
            if distance(after) < distance(have) - 1e-12 and np.all((after < total) | (group == 0)):
                taken[k], have, moved = not taken[k], after, True
    for label in np.flatnonzero((have == 0) & (total > 0)):
        after = have + counts
        fits = ~taken & (counts[:, label] > 0) & np.all((after < total) | (counts == 0), axis=1)
        if have[label] == 0 and fits.any():
            best = int(np.argmin(np.where(fits, distance(after), np.inf)))
            taken[best], have = True, after[best]
    return taken[ids]


def load_pixels(
    root_uri: str, uris: Sequence[str], size_px: tuple[int, int], *, caps: ImageCaps | None = None, threads: int = 0
) -> LoadedPixels:
    """Pixels of the images that could be read; the others are counted by code in a warning.

    Everything is held in memory: 10,000 images of 224x224 are 1.5 GB, divided by the number of workers.

    Raises:
        DataError: more than half of the images are unreadable.
        StorageError: storage is down or the credentials are wrong.
    """
    root, limits = open_store(root_uri), caps or ImageCaps()
    pixels = np.empty((len(uris), *size_px, 3), np.uint8)

    def read(position: int) -> RowFailure | None:
        image = _read_image(root, uris[position], size_px, limits)
        if isinstance(image, RowFailure):
            return image
        pixels[position] = image.pixels
        return None

    cores = len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(threads or (S3_THREADS if root_uri.startswith("s3://") else cores)) as pool:
        failures = list(pool.map(read, range(len(uris))))
    kept = np.array([k for k, failure in enumerate(failures) if failure is None], np.int64)
    by_code = dict(Counter(failure.code for failure in failures if failure is not None))
    if by_code:
        _report_unreadable(uris, failures, by_code)
        pixels = pixels[kept]
    return LoadedPixels(pixels, kept, by_code)


def _report_unreadable(
    uris: Sequence[str], failures: list[RowFailure | None], by_code: dict[QuarantineCode, int]
) -> None:
    unreadable = sum(by_code.values())
    codes = ", ".join(f"{code} {count}" for code, count in sorted(by_code.items()))
    first, failure = next((uri, failure) for uri, failure in zip(uris, failures, strict=True) if failure is not None)
    if unreadable > MAX_UNREADABLE_RATE * len(uris):
        raise DataError(
            f"Expected readable images. Received: {unreadable} of {len(uris)} unreadable ({codes}); the first is "
            f"{first} ({failure.detail}). Next: check data.uri and data.uri_column."
        )
    log.warning(
        "%d of %d images are unreadable and left out (%s); the first is %s", unreadable, len(uris), codes, first
    )


def _read_image(root: Store, uri: str, size_px: tuple[int, int], caps: ImageCaps) -> DecodedImage | RowFailure:
    store, key = store_and_key(uri, root)
    try:
        data = store.get(key, max_bytes=caps.max_bytes)
    except NotFoundError:
        return RowFailure(QuarantineCode.NOT_FOUND, "no such object")
    except AccessDeniedError:
        return RowFailure(QuarantineCode.ACCESS_DENIED, "access denied")
    except TooLargeError:
        return RowFailure(QuarantineCode.TOO_LARGE, f"more than {caps.max_bytes} bytes")
    return decode(data, size_px, caps)


def share_of_rank(labelled: LabelledSet, split: str, rank: int, world_size: int, batch_size: int, seed: int) -> Share:
    """The rows of one side that a rank holds, with the stratum of each.

    The side's rows are put in an order drawn from the seed; the row at position p belongs to stratum p % batch_size,
    and stratum s to rank s % world_size. A global batch takes one row of every stratum (`cnn_ray.train_loop`), so it
    holds the same rows for any number of workers, while each worker loads its own share only.
    """
    rows = labelled.rows(split)
    rows = rows[np.random.default_rng([seed, SPLITS.index(split)]).permutation(len(rows))]
    strata = np.arange(len(rows)) % batch_size
    mine = strata % world_size == rank
    return Share(rows[mine], strata[mine])


@dataclass(frozen=True)
class Share:
    """rows: int64 [K] into the labelled set; strata: int64 [K], each in [0, batch_size)."""

    rows: np.ndarray
    strata: np.ndarray

    def keep(self, kept: np.ndarray) -> Share:
        """The share without the images that could not be read."""
        return replace(self, rows=self.rows[kept], strata=self.strata[kept])
