"""All labelled images read once before they are split: which cannot be read, and which look alike."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from cnn_ray import near_duplicates
from cnn_ray.errors import DataError
from cnn_ray.reader import ImageReader, read_threads
from cnn_ray.records import RowFailure

EXAMPLES = 3


@dataclass(frozen=True)
class LeftOut:
    """What the data name and the labelled set does not hold, for the log, `--dry-run` and the artifact."""

    unreadable: dict[str, int] = field(default_factory=dict)
    """Images that cannot be read, by quarantine code."""
    examples: tuple[str, ...] = ()
    """Some of them: location and reason."""
    other_labels: dict[str, int] = field(default_factory=dict)
    """Images of classes that `data.labels` leaves out, by class."""
    outside_classes: int = 0
    """Files that lie in no class folder."""
    empty_classes: tuple[str, ...] = ()
    """Class folders without a file."""
    by_pattern: int = 0
    """Images that `data.include` or `data.exclude` leave out."""

    @property
    def lines(self) -> list[str]:
        """Sentences for people, one for each reason."""
        said: list[str] = []
        if self.unreadable:
            said.append(f"Left out as unreadable: {counted(self.unreadable)}; for instance {'; '.join(self.examples)}.")
        if self.other_labels:
            said.append(f"Left out because data.labels does not name them: {counted(self.other_labels)}.")
        if self.by_pattern:
            said.append(f"Left out by data.include and data.exclude: {self.by_pattern} files.")
        if self.outside_classes:
            said.append(f"Left out because they lie in no class folder: {self.outside_classes} files.")
        if self.empty_classes:
            said.append(f"Class folders without images: {', '.join(self.empty_classes)}.")
        return said


def counted(counts: Mapping[str, int]) -> str:
    """Return counts as text: `12 images (not_an_image 10, truncated 2)`."""
    total = sum(counts.values())
    parts = ", ".join(f"{name} {count}" for name, count in sorted(counts.items()))
    return f"{total} image{'s' if total != 1 else ''} ({parts})"


def inspect_images(root_uri: str, uris: Sequence[str]) -> tuple[near_duplicates.Prints, dict[int, RowFailure]]:
    """Read all images and return their prints, and the failures by position of those that cannot be read.

    This costs 0.4 ms of CPU for a CIFAR image and 2 ms for a screenshot, about as much as one epoch of decoding.
    Nothing less tells a whole file from one that was cut.

    Raises:
        StorageError: storage is down or the credentials are wrong.
    """
    reader = ImageReader(root_uri)
    side = near_duplicates.HASH_SIDE_PX
    position = {uri: k for k, uri in enumerate(uris)}
    failures: dict[int, RowFailure] = {}
    lock = threading.Lock()

    def read(uri: str) -> np.ndarray | None:
        image = reader.read(uri, (side, side))
        if not isinstance(image, RowFailure):
            return image.pixels
        with lock:
            failures[position[uri]] = image
        return None

    prints = near_duplicates.fingerprint(read, uris, read_threads(root_uri))
    return prints, dict(sorted(failures.items()))


def describe_failures(
    uris: Sequence[str], failures: Mapping[int, RowFailure]
) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the counts by code, and some examples with their location."""
    counts = Counter(str(failure.code) for failure in failures.values())
    examples = [f"{uris[k]} ({failure.code}: {failure.detail})" for k, failure in list(failures.items())[:EXAMPLES]]
    return dict(sorted(counts.items())), tuple(examples)


def refuse_unreadable(counts: Mapping[str, int], examples: Sequence[str], images: int, most: float, where: str) -> None:
    """Return where at most the share `most` of the images is unreadable.

    Raises:
        DataError: more are, with counts by code and examples.
    """
    unreadable = sum(counts.values())
    if unreadable > most * images:
        raise DataError(
            f"Expected at most {most:.3g} of the {images} images in {where} to be unreadable. Received: "
            f"{counted(counts)}; for instance {'; '.join(examples)}. Next: replace or remove these files, or raise "
            "data.max_unreadable_rate (--data-max-unreadable-rate)."
        )
