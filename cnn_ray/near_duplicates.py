"""Images that look alike: a perceptual hash finds candidates, small thumbnails decide.

Two captures of one page on both sides of a split let a model score well by remembering. The hash is the usual pHash:
the signs of the low frequencies of a 32x32 grey image around their median. Pairs within MAX_DISTANCE bits are found
exactly, without comparing all with all: cut into MAX_DISTANCE + 1 bands, such a pair agrees in one band at least.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

MAX_DISTANCE = 6
"""Bits of 64 that may differ."""
MAX_MEAN_DIFFERENCE = 4.0
"""Grey levels of 255 by which 16x16 colour thumbnails may differ on average: JPEG recompression makes about 1."""
MAX_LARGEST_DIFFERENCE = 40
FLAT_RANGE = 8
"""Below this range of values a thumbnail is blank: such images are twins only where they are equal."""
HASH_SIDE_PX = 32
LOW_FREQUENCIES = 8
MOST_COMPARED = 4096
"""Images compared with as many others at a time: bounds memory where many agree in a band."""


@dataclass(frozen=True)
class Prints:
    """What is left of the images. hashes: uint64 [N]; thumbnails: uint8 [N, 16, 16, 3]; readable: bool [N]."""

    hashes: np.ndarray
    thumbnails: np.ndarray
    readable: np.ndarray


def fingerprint(read: Callable[[str], np.ndarray | None], uris: Sequence[str], threads: int = 0) -> Prints:
    """Prints of the images; `read` gives uint8 [32, 32, 3], or None for what cannot be read."""
    hashes = np.zeros(len(uris), np.uint64)
    thumbnails = np.zeros((len(uris), 16, 16, 3), np.uint8)
    readable = np.zeros(len(uris), bool)

    def one(k: int) -> None:
        pixels = read(uris[k])
        if pixels is not None:
            hashes[k] = perceptual_hash(pixels)
            halves = pixels.reshape(16, 2, 16, 2, 3).mean((1, 3))
            thumbnails[k] = np.round(halves)
            readable[k] = True

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0))) as pool:
        list(pool.map(one, range(len(uris))))
    return Prints(hashes, thumbnails, readable)


def perceptual_hash(pixels: np.ndarray) -> int:
    """The 64-bit pHash of uint8 [32, 32, 3]."""
    import cv2

    grey = pixels @ np.array([0.299, 0.587, 0.114], np.float32)
    low = cv2.dct(grey.astype(np.float32))[:LOW_FREQUENCIES, :LOW_FREQUENCIES].ravel()
    middle = np.partition(low, (31, 32))  # numpy's median takes three times as long as the rest
    bits = low > (middle[31] + middle[32]) / np.float32(2)
    return int(np.packbits(bits).view(np.uint64)[0])


def picture_hash(pixels: np.ndarray) -> int:
    """Return the pHash of uint8 [H, W, 3], shrunk to 32x32 by the mean of areas, as a signed 64-bit number."""
    import cv2

    if pixels.shape[:2] != (HASH_SIDE_PX, HASH_SIDE_PX):
        pixels = cv2.resize(pixels, (HASH_SIDE_PX, HASH_SIDE_PX), interpolation=cv2.INTER_AREA)
    unsigned = perceptual_hash(pixels)
    return unsigned - (1 << 64) if unsigned >> 63 else unsigned


def find_twins(prints: Prints) -> np.ndarray:
    """int64 [N]: the position of the first image that each looks like (its own where it has no twin), transitively."""
    parent = np.arange(len(prints.hashes))

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = parent[parent[k]]
            k = int(parent[k])
        return k

    for a, b in _candidates(prints):
        for i, j in zip(a.tolist(), b.tolist(), strict=True):
            first, second = sorted((root(i), root(j)))
            parent[second] = first
    return np.array([root(k) for k in range(len(parent))], np.int64)


def _candidates(prints: Prints) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of rows that look alike, each pair at least once."""
    everything = np.flatnonzero(prints.readable)
    rows, first = _different(prints, everything)
    found = [(everything[first != everything], first[first != everything])]
    edges = np.linspace(0, 64, MAX_DISTANCE + 2).astype(int)
    for start, end in itertools.pairwise(edges):
        band = (prints.hashes[rows] >> np.uint64(start)) & np.uint64((1 << int(end - start)) - 1)
        order = np.lexsort((prints.hashes[rows], band))
        ends = np.flatnonzero(np.diff(band[order])) + 1
        for bucket in np.split(rows[order], ends):
            if len(bucket) < 2:
                continue
            blocks = [bucket[k : k + MOST_COMPARED] for k in range(0, len(bucket), MOST_COMPARED)]
            for left, right in itertools.combinations_with_replacement(blocks, 2):
                found += _alike(prints, left, right)
    return found


def _different(prints: Prints, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the rows without those whose print was there before, and for each row the first with its print)."""
    seen: dict[tuple[int, bytes], int] = {}
    hashes = prints.hashes[rows].tolist()
    first = [seen.setdefault((hashes[k], prints.thumbnails[row].tobytes()), int(row)) for k, row in enumerate(rows)]
    return np.array(list(seen.values()), np.int64), np.array(first, np.int64)


def _alike(prints: Prints, left: np.ndarray, right: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Pairs of a row of `left` with one of `right` that look alike."""
    near = np.bitwise_count(prints.hashes[left][:, None] ^ prints.hashes[right][None]) <= MAX_DISTANCE
    a, b = np.nonzero(np.triu(near, 1) if left is right else near)
    if len(a) == 0:
        return []
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    for k in range(0, len(a), 65_536):
        i, j = left[a[k : k + 65_536]], right[b[k : k + 65_536]]
        first, second = (prints.thumbnails[side].astype(np.int16).reshape(len(i), -1) for side in (i, j))
        gap = np.abs(first - second)
        flat = np.ptp(first.reshape(len(i), -1, 3), axis=1).max(1) < FLAT_RANGE
        alike = np.where(
            flat, gap.max(1) == 0, (gap.mean(1) <= MAX_MEAN_DIFFERENCE) & (gap.max(1) <= MAX_LARGEST_DIFFERENCE)
        )
        pairs.append((i[alike], j[alike]))
    return pairs
