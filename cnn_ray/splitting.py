"""Which side of the split each image is on: drawn from a seed, whole groups, every class on both sides.

The draw depends on (seed, group) alone, so not on the order of a listing; an image that is added later moves no other
one unless a class target is crossed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


def _lot(seed: int | str, text: str) -> bytes:
    """What a name draws: the same for the same seed, whatever else is in the data."""
    return hashlib.sha256(f"{seed}\t{text}".encode()).digest()


def join_groups(groups: Sequence[str], twins: np.ndarray | None) -> list[str]:
    """The groups with those joined that share a near-duplicate; each is named by its first member in sorted order."""
    if twins is None:
        return list(groups)
    parent = {name: name for name in groups}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for group, twin in zip(groups, [groups[int(k)] for k in twins], strict=True):
        first, second = sorted((root(group), root(twin)))
        parent[second] = first
    return [root(name) for name in groups]


def even_sample(uris: list[str], label_ids: np.ndarray, limit: int, seed: int) -> list[int]:
    """Ascending positions of `limit` images, taken in turns from the classes so that none outgrows the others."""
    lots = [_lot(seed, f"limit {uri}") for uri in uris]
    turn = np.zeros(len(uris), np.int64)
    for label in np.unique(label_ids):
        members = sorted(np.flatnonzero(label_ids == label), key=lots.__getitem__)
        turn[members] = np.arange(len(members))
    order = sorted(range(len(uris)), key=lambda k: (turn[k], lots[k]))
    return sorted(order[:limit])


def draw_validation(groups: Sequence[str], label_ids: np.ndarray, fraction: float, seed: int | str) -> np.ndarray:
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
