"""Labelled images -> a frozen `LabelledSet` with its split, and pixels in memory. Light: no TensorFlow, no Ray.

Whole groups (domains, brands) and images that look alike stay on one side of a split that is drawn: near-duplicates of
one site on both sides would let a model score well by remembering.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cnn_ray import near_duplicates
from cnn_ray.config import DataConfig
from cnn_ray.errors import DataError
from cnn_ray.images import DecodedImage
from cnn_ray.inspection import LeftOut, describe_failures, inspect_images, refuse_unreadable
from cnn_ray.known_sets import KERAS_CIFAR10
from cnn_ray.labelled_rows import SPLIT_NAMES, LabelledRows, read_rows
from cnn_ray.reader import ImageReader, read_threads
from cnn_ray.splitting import draw_validation, even_sample, join_groups
from cnn_ray.storage import open_store

log = logging.getLogger(__name__)

SPLITS = ("train", "validation", "test")
MOST_CLASSES = 20
"""Classes that `describe_set` names."""


@dataclass(frozen=True)
class LabelledSet:
    """Labelled images in the order of their uris, each on one side of the split."""

    root_uri: str
    """Where the uris start: what `ImageReader` opens once."""
    uris: tuple[str, ...]
    label_ids: np.ndarray
    """int32 [N], indices into `labels`"""
    labels: tuple[str, ...]
    """Class names in output order."""
    splits: np.ndarray
    """uint8 [N], indices into `SPLITS`"""
    groups: tuple[str, ...] | None = None
    """Group of each image, where the manifest has them."""
    sources: tuple[str, ...] | None = None
    """Where each image came from, where the manifest says so."""
    twins: np.ndarray | None = None
    """int64 [N], images that look alike share a number; None where nobody looked."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """What the data name besides."""

    def rows(self, split: str) -> np.ndarray:
        """int64 [K]: the rows on one side of the split, ascending."""
        return np.flatnonzero(self.splits == SPLITS.index(split))

    def digest(self) -> str:
        """SHA-256 over uris, labels and split: two trainings with the same digest saw the same list."""
        lines = zip(self.uris, self.label_ids.tolist(), self.splits.tolist(), strict=True)
        text = "\n".join(["\t".join(self.labels), *(f"{uri}\t{label}\t{split}" for uri, label, split in lines)])
        return hashlib.sha256(text.encode()).hexdigest()


def read_labelled_set(config: DataConfig, *, split: bool = True) -> LabelledSet:
    """Return the readable labelled images that the configuration names, each on one side of the split.

    Without `split` none is drawn and one class will do: all images stand on the side that the data name, else in train,
    and none is read, so unreadable ones are still among them.

    Raises:
        DataError: nothing there, one class only, a missing column, an unknown split, an image named twice, a group on
            both sides of a given split, a class too small to stand on both sides, or too many unreadable images.
        StorageError: the location cannot be read.
    """
    root_uri, rows = read_rows(config)
    if not rows.uris:
        raise DataError(
            f"Expected labelled images in {config.uri}. Received: none. Next: give a folder with one folder per class, "
            "or a .csv or .parquet manifest."
        )
    rows = rows.take(sorted(range(len(rows.uris)), key=rows.uris.__getitem__))
    rows, other_labels = _of_labels(rows, config)
    labels, label_ids = _number_labels(rows.names, config, least=2 if split else 1)
    if config.limit is not None:
        order = even_sample(rows.uris, label_ids, config.limit, config.split_seed)
        rows, label_ids = rows.take(order), label_ids[order]
    left_out = LeftOut(
        other_labels=other_labels,
        outside_classes=rows.outside_classes,
        empty_classes=rows.empty_classes,
        by_pattern=rows.by_pattern,
    )
    if rows.splits is not None:
        _given_split(rows, config)  # a wrong name is said before hours of reading
    twins = None
    if split:
        rows, label_ids, twins, left_out = _inspected(root_uri, rows, label_ids, labels, config, left_out)
        splits = _split(rows, label_ids, labels, config, twins)
    else:
        splits = np.zeros(len(label_ids), np.uint8) if rows.splits is None else _given_split(rows, config)
    groups, sources = (None if values is None else tuple(values) for values in (rows.groups, rows.sources))
    return LabelledSet(root_uri, tuple(rows.uris), label_ids, labels, splits, groups, sources, twins, left_out)


def _inspected(
    root_uri: str,
    rows: LabelledRows,
    label_ids: np.ndarray,
    labels: tuple[str, ...],
    config: DataConfig,
    left_out: LeftOut,
) -> tuple[LabelledRows, np.ndarray, np.ndarray | None, LeftOut]:
    """Return rows, class numbers and twins of the images that can be read, and what is left out."""
    prints, failures = inspect_images(root_uri, rows.uris)
    if failures:
        counts, examples = describe_failures(rows.uris, failures)
        refuse_unreadable(counts, examples, len(rows.uris), config.max_unreadable_rate, config.uri)
        left_out = replace(left_out, unreadable=counts, examples=examples)
        kept = np.flatnonzero(prints.readable)
        _refuse_unreadable_class(label_ids, label_ids[kept], labels, config)
        rows, label_ids = rows.take(kept.tolist()), label_ids[kept]
        prints = near_duplicates.Prints(prints.hashes[kept], prints.thumbnails[kept], prints.readable[kept])
    twins = near_duplicates.find_twins(prints) if config.near_duplicates == "keep_together" else None
    return rows, label_ids, twins, left_out


def _refuse_unreadable_class(
    named: np.ndarray, readable: np.ndarray, labels: tuple[str, ...], config: DataConfig
) -> None:
    lost = sorted(set(named.tolist()) - set(readable.tolist()))
    if lost:
        others = ",".join(label for k, label in enumerate(labels) if k not in lost)
        raise DataError(
            f"Expected readable images of every class in {config.uri}. Received: none of {labels[lost[0]]!r}. Next: "
            f"replace its files, or leave it out with data.labels (--data-labels {others})."
        )


def absolute_uri(uri: str) -> str:
    """The location as a training writes it down."""
    return uri if uri == KERAS_CIFAR10 else open_store(uri).uri


def write_split(labelled: LabelledSet) -> bytes:
    """The split as a Parquet manifest: uri, label, split, twin, and group and source where there are any.

    Given as `data.uri` with `split_column: split` (and group_column, source_column) it makes the same set again.
    """
    columns: dict[str, object] = {
        "uri": list(labelled.uris),
        "label": [labelled.labels[k] for k in labelled.label_ids],
        "split": [SPLITS[k] for k in labelled.splits],
    }
    for name, values in (("group", labelled.groups), ("source", labelled.sources)):
        if values is not None:
            columns[name] = list(values)
    if labelled.twins is not None:
        columns["twin"] = [labelled.uris[k] for k in labelled.twins]
    stream = io.BytesIO()
    pq.write_table(pa.table(columns), stream)
    return stream.getvalue()


def _of_labels(rows: LabelledRows, config: DataConfig) -> tuple[LabelledRows, dict[str, int]]:
    """Return the rows of the classes that `data.labels` names, and how many images of each other class there are."""
    if config.labels is None:
        return rows, {}
    wanted = set(config.labels)
    others = Counter(name for name in rows.names if name not in wanted)
    return rows.take([k for k, name in enumerate(rows.names) if name in wanted]), dict(sorted(others.items()))


def _number_labels(names: list[str], config: DataConfig, least: int) -> tuple[tuple[str, ...], np.ndarray]:
    found = sorted(set(names))
    labels = config.labels or tuple(found)
    if len(set(labels)) != len(labels):
        raise DataError(f"Expected different labels. Received: {', '.join(labels)}. Next: correct data.labels.")
    absent = [label for label in labels if label not in found]
    if absent:
        raise DataError(
            f"Expected images of every label in {config.uri}. Received: none of {absent[0]!r}. "
            "Next: correct data.labels (--data-labels) or add images."
        )
    if len(labels) < least:
        raise DataError(
            f"Expected two or more classes in {config.uri}. Received: only {found[0]!r}. "
            "Next: add images of another class."
        )
    index = {label: k for k, label in enumerate(labels)}
    return tuple(labels), np.array([index[name] for name in names], np.int32)


def _split(
    rows: LabelledRows, label_ids: np.ndarray, labels: tuple[str, ...], config: DataConfig, twins: np.ndarray | None
) -> np.ndarray:
    given = np.zeros(len(label_ids), np.uint8) if rows.splits is None else _given_split(rows, config)
    groups = join_groups(rows.groups or rows.uris, twins)
    for side, fraction, draw in (
        ("test", config.test_fraction, rows.splits is None and config.test_fraction > 0),
        ("validation", config.validation_fraction, not np.any(given == SPLITS.index("validation"))),
    ):
        if draw:
            free = np.flatnonzero(given == SPLITS.index("train"))
            seed = config.split_seed if side == "validation" else f"{config.split_seed} test"
            drawn = draw_validation([groups[k] for k in free], label_ids[free], fraction, seed)
            given[free[drawn]] = SPLITS.index(side)
    for split in ("train", "validation"):
        present = set(label_ids[given == SPLITS.index(split)].tolist())
        absent = next((label for k, label in enumerate(labels) if k not in present), None)
        if absent is not None:
            raise DataError(
                f"Expected images of {absent!r} in {split}. Received: none, because its images are too few, or all in "
                "one group or alike. Next: add images of it, remove the class, or set data.near_duplicates: ignore."
            )
    return given


def _given_split(rows: LabelledRows, config: DataConfig) -> np.ndarray:
    names = [SPLIT_NAMES.get(name.lower(), name) for name in rows.splits or []]
    wrong = next((name for name in names if name not in SPLITS), None)
    if wrong is not None:
        raise DataError(
            f"Expected train, validation or test in column {config.split_column!r}. Received: {wrong!r}. "
            "Next: correct the manifest."
        )
    return np.array([SPLITS.index(name) for name in names], np.uint8)


def describe_set(labelled: LabelledSet) -> list[str]:
    """Return what is trained on, as lines for people: classes with their images on each side, and what is left out."""
    sides = [labelled.label_ids[labelled.rows(split)] for split in SPLITS]
    counts = np.array([np.bincount(ids, minlength=len(labelled.labels)) for ids in sides])
    shown = range(min(len(labelled.labels), MOST_CLASSES))
    classes = [f"{labelled.labels[k]} {'/'.join(str(n) for n in counts[:, k])}" for k in shown]
    more = len(labelled.labels) - len(classes)
    fewest = int(counts.sum(0).argmin())
    if more:
        classes.append(f"and {more} more, fewest images: {labelled.labels[fewest]} {counts[:, fewest].sum()}")
    line = f"{len(labelled.labels)} classes (train/validation/test images): {', '.join(classes)}"
    return [line, *labelled.left_out.lines]


def sample_images(labelled: LabelledSet, split: str, count: int, size_px: tuple[int, int]) -> list[DecodedImage]:
    """Up to `count` readable images of one side, spread evenly over it, in the size (height, width).

    Raises:
        StorageError: storage is down or the credentials are wrong.
    """
    rows = labelled.rows(split)
    chosen = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int))] if len(rows) else rows
    reader = ImageReader(labelled.root_uri)
    with ThreadPoolExecutor(read_threads(labelled.root_uri)) as pool:
        images = list(pool.map(lambda row: reader.read(labelled.uris[row], size_px), chosen))
    return [image for image in images if isinstance(image, DecodedImage)]


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
