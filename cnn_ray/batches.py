"""The input pipeline of a training worker: decoded pixels in batches, read ahead while the device computes.

Pixels are kept in memory up to a limit; images beyond are read and decoded again in every epoch, a few batches ahead. A
batch has the same bits whether its images come from memory or were decoded anew. An image that cannot be read keeps its
place at weight 0, so that what is trained does not depend on memory.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cnn_ray.errors import DataError
from cnn_ray.images import ImageCaps
from cnn_ray.reader import LARGEST_SIDE_PX, ImageReader, read_threads, shared_decoders
from cnn_ray.records import RowFailure

log = logging.getLogger(__name__)

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""pixels uint8 [b, S, S, 3], label_ids int32 [b], weights float32 [b] (0 for padding)"""

READ_AHEAD = 4
"""Batches that are made before they are asked for."""
MAX_UNREADABLE_RATE = 0.5
LEAST_JUDGED = 10
"""Of fewer images a rank does not judge alone that too many are unreadable."""
FILLED_AT_ONCE = 64
"""Images that one task of the first pass decodes."""


class Pixels(Protocol):
    """Where batches take their images from."""

    @property
    def in_memory(self) -> bool:
        """Whether taking rows costs no decoding."""
        ...

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(pixels uint8 [K, H, W, 3] of the rows, bool [K]: which of them could be read)."""
        ...


@dataclass(frozen=True)
class HeldPixels:
    """An array in memory."""

    pixels: np.ndarray
    """[N, ...]"""
    readable: np.ndarray | None = None
    """bool [N]; None: all of them."""

    @property
    def in_memory(self) -> bool:
        """Always."""
        return True

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows of the array."""
        return self.pixels[rows], np.ones(len(rows), bool) if self.readable is None else self.readable[rows]


class DecodedPixels:
    """Images of a labelled set, decoded by threads; the first ones are kept as far as `cache_bytes` go."""

    def __init__(
        self,
        root_uri: str,
        uris: list[str],
        size_px: tuple[int, int],
        *,
        cache_bytes: int,
        threads: int = 0,
        num_decoders: int = 0,
    ) -> None:
        """Decoding of what will be kept begins at once, in the background. 0 decoders: one for each core."""
        self._uris = uris
        self._shape = (*size_px, 3)
        caps = ImageCaps()
        decoders = shared_decoders((LARGEST_SIDE_PX, LARGEST_SIDE_PX), caps, num_decoders)
        self._reader = ImageReader(root_uri, caps, decoders)
        self._failures: dict[int, RowFailure] = {}
        self._unseen = set(range(len(uris)))
        self._reported = False
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads or read_threads(root_uri), "cnn_ray-decode")
        kept = min(len(uris), cache_bytes // int(np.prod(self._shape)))
        self._kept = np.zeros((kept, *self._shape), np.uint8)
        starts = range(0, kept, FILLED_AT_ONCE)
        self._filling = [self._pool.submit(self._fill, k, min(k + FILLED_AT_ONCE, kept)) for k in starts]

    @property
    def in_memory(self) -> bool:
        """Whether all images are kept."""
        return len(self._kept) == len(self._uris)

    def _fill(self, start: int, end: int) -> None:
        for k in range(start, end):
            self._decode(k, self._kept[k])

    def _decode(self, row: int, out: np.ndarray) -> None:
        answer = self._reader.read_into(self._uris[row], out)
        with self._lock:
            self._unseen.discard(row)
            if isinstance(answer, RowFailure):
                self._failures.setdefault(row, answer)

    @property
    def unreadable(self) -> int:
        """Images that could not be read so far."""
        with self._lock:
            return len(self._failures)

    def wait(self) -> None:
        """Afterwards everything that is kept is decoded.

        Raises:
            DataError: more than half of all images are unreadable.
            StorageError: storage is down or the credentials are wrong.
        """
        for future in self._filling:
            future.result()
        self._filling = []
        self._report()

    def _report(self) -> None:
        """Judges the whole set, so that the answer does not depend on how much of it fits into memory."""
        with self._lock:
            failures = dict(self._failures)
            done = self._reported or bool(self._unseen)
            self._reported |= not done
        if len(self._uris) >= LEAST_JUDGED and len(failures) > MAX_UNREADABLE_RATE * len(self._uris):
            raise DataError(
                f"Expected readable images. Received: {_unreadable(self._uris, failures)}. "
                "Next: check data.uri and data.uri_column."
            )
        if failures and not done:
            log.warning("left out: %s", _unreadable(self._uris, failures))

    def take(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The rows' pixels, zeros where they cannot be read; the last image that is seen brings the report of all.

        Raises:
            DataError: more than half of all images are unreadable.
            StorageError: storage is down or the credentials are wrong.
        """
        self.wait()
        pixels = np.zeros((len(rows), *self._shape), np.uint8)
        held = rows < len(self._kept)
        pixels[held] = self._kept[rows[held]]
        jobs = [self._pool.submit(self._decode, int(rows[k]), pixels[k]) for k in np.flatnonzero(~held)]
        for job in jobs:
            job.result()
        if jobs:
            self._report()
        return pixels, np.array([int(row) not in self._failures for row in rows], bool)

    def close(self) -> None:
        """Ends the threads; what has not begun is not decoded any more."""
        self._pool.shutdown(cancel_futures=True)


def _unreadable(uris: list[str], failures: dict[int, RowFailure]) -> str:
    """Their number by code, and the first of them."""
    by_code = Counter(failure.code for failure in failures.values())
    codes = ", ".join(f"{code} {count}" for code, count in sorted(by_code.items()))
    first = min(failures)
    return (
        f"{len(failures)} of {len(uris)} images unreadable ({codes}); the first is {uris[first]} "
        f"({failures[first].detail})"
    )


@dataclass
class Batches:
    """The rows of one side that this rank holds, as a sequence of batches.

    A global batch takes one row from each of `batch_size` strata and rank r holds the strata s with s % world == r
    (`cnn_ray.dataset.share_of_rank`). The order within a stratum is drawn from (seed, epoch, stratum): hence 2 workers
    x 16 see batch for batch the rows that 1 worker x 32 sees, while each holds half of them. The price: two rows of one
    stratum never share a batch, which among thousands of possible partners does not matter.
    """

    source: Pixels
    label_ids: np.ndarray
    """int32 [K]"""
    strata: np.ndarray
    """int64 [K]"""
    rows_per_batch: int
    """Rows of this rank in a batch, padding included: the same on all ranks."""
    waited_s: float = field(default=0.0, init=False)
    """Time that the consumer has waited for batches so far."""

    @property
    def steps(self) -> int:
        """Batches that hold all rows of this rank; the ranks then take the largest of all ranks' numbers."""
        return int(np.bincount(self.strata).max()) if len(self.strata) else 0

    def epoch(self, steps: int, order: tuple[int, int] | None) -> Generator[Batch]:
        """`steps` batches, in the order drawn from (seed, epoch), or as they lie without one."""
        turns = np.zeros(len(self.strata), np.int64)
        for stratum in np.unique(self.strata):
            members = np.flatnonzero(self.strata == stratum)
            if order is not None:
                members = np.random.default_rng([*order, int(stratum)]).permutation(members)
            turns[members] = np.arange(len(members))
        by_turn = np.lexsort((self.strata, turns))
        ends = np.searchsorted(turns[by_turn], np.arange(steps + 1))
        batches = [by_turn[ends[k] : ends[k + 1]] for k in range(steps)]
        made = map(self._padded, batches) if self.source.in_memory else _read_ahead(self._padded, batches)
        while True:
            since = time.monotonic()
            batch = next(made, None)
            self.waited_s += time.monotonic() - since
            if batch is None:
                return
            yield batch

    def _padded(self, rows: np.ndarray) -> Batch:
        """Real rows first, then own rows again at weight 0: black images would spoil the statistics of BatchNorm."""
        size = self.rows_per_batch
        weights = np.zeros(size, np.float32)
        if len(self.strata) == 0:
            pixels, _ = self.source.take(np.zeros(0, np.int64))
            return np.zeros((size, *pixels.shape[1:]), pixels.dtype), np.zeros(size, np.int32), weights
        filled = np.resize(rows if len(rows) else np.arange(len(self.strata)), size)
        pixels, readable = self.source.take(filled)
        weights[: len(rows)] = readable[: len(rows)]
        if not readable.all() and readable.any():
            pixels[~readable] = pixels[np.flatnonzero(readable)[0]]
        return pixels, self.label_ids[filled].astype(np.int32), weights


def _read_ahead(make: Callable[[np.ndarray], Batch], rows: list[np.ndarray]) -> Generator[Batch]:
    """The batches in order, READ_AHEAD of them in the making; an error of a thread is raised here."""
    with ThreadPoolExecutor(READ_AHEAD, "cnn_ray-batches") as pool:
        pending: deque[Future[Batch]] = deque()
        try:
            for k in range(len(rows) + READ_AHEAD):
                if k < len(rows):
                    pending.append(pool.submit(make, rows[k]))
                if k >= READ_AHEAD:
                    yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def make_batches(
    pixels: np.ndarray | Pixels, label_ids: np.ndarray, strata: np.ndarray, batch_size: int, world_size: int
) -> Batches:
    """Batches of a rank's rows for the global batch size; an array of pixels is taken as it is."""
    source = HeldPixels(pixels) if isinstance(pixels, np.ndarray) else pixels
    return Batches(source, label_ids, strata, math.ceil(batch_size / world_size))
