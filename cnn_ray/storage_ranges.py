# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""A long listing in byte order, read as many ranges of names at once.

A page of 1,000 keys takes S3 some 100 ms, and each page needs the token of the one before: ten million keys in turn are
a quarter of an hour. So what is left after some pages is cut into ranges of names that several threads read ahead.

Cuts are found by asking for the one key behind all that begin alike: behind `shot-01` comes `shot-02`, behind `shot-09`
perhaps `shot-1`, behind the last shot `next-folder/`. Wherever the cuts fall, the ranges share no key and miss none,
because each keeps only what is inside; so folders, flat or deep, need no rule of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.errors import StorageError
from cnn_ray.storage_pages import ListingPage

THREADS = 16
SPAN_PAGES = 16
"""Pages that one thread reads in turn before the rest of its range is cut. Shorter listings are never cut."""
SPANS_AHEAD = 32
"""Ranges that are read before their turn: 32 x 16 pages are at most half a million rows, some 80 MB."""
PROBES = 64
"""Keys asked for to cut one range: with 50 ms each, three seconds."""
HIGHEST = "\U0010fffd"

Ask = Callable[[dict[str, Any]], ListingPage]
"""One ListObjectsV2 with these arguments."""


@dataclass(frozen=True, slots=True)
class _Range:
    """Names from `low` (itself too) up to `high` (not itself; None: to the end)."""

    low: str
    high: str | None

    def start_after(self) -> dict[str, str]:
        """The argument that begins the listing at `low`, or somewhat before where no name says it exactly."""
        return start_at(self.low)


def start_at(name: str) -> dict[str, str]:
    """The argument that begins a listing at `name` itself, or somewhat before where no name says it exactly."""
    if name.endswith("\0"):
        return {"StartAfter": name[:-1]}  # the very next name
    before, last = name[:-1], ord(name[-1]) - 1
    if last < ord(" ") or 0xD800 <= last <= 0xDFFF:
        return {"StartAfter": before} if before else {}
    return {"StartAfter": before + chr(last) + HIGHEST}


@dataclass(slots=True)
class _Span:
    """What one thread read: tables in order, and the ranges that follow, in order."""

    tables: list[pa.Table]
    rest: list[_Range]


class RangeLister:
    """All names that begin with `prefix`, in byte order, from a server that `ask` asks; uris begin with `root`."""

    def __init__(self, ask: Ask, prefix: str, root: str) -> None:
        self._ask, self._prefix, self._root = ask, prefix, root
        self._stop = threading.Event()

    def tables(self) -> Iterator[pa.Table]:
        """Tables of at most a page, one after the other.

        Raises:
            StorageError: the server lists in another order, or what `ask` raises.
        """
        before = ""
        for table in self._unchecked():
            uris = table["uri"].combine_chunks()
            if str(uris[0].as_py()) <= before or not _ascending(uris):
                raise StorageError(
                    f"Expected {self._root}{self._prefix} to be listed in byte order. Received: another order, as in "
                    "directory buckets. Next: use a general purpose bucket, or a manifest of locations as INPUT."
                )
            before = str(uris[-1].as_py())
            yield table

    def _unchecked(self) -> Iterator[pa.Table]:
        arguments: dict[str, Any] = {"Prefix": self._prefix}
        first = last = None
        pages = 0
        while last is None or pages < SPAN_PAGES:
            page = self._ask(arguments)
            if page.table.num_rows:
                yield page.table
            if page.token is None:
                return
            first, last, pages = first or page.first, page.last or last, pages + 1
            arguments = {"Prefix": self._prefix, "ContinuationToken": page.token}
        yield from self._ahead(self._cut(_Range(last + "\0", None), first or last, last))

    def _ahead(self, ranges: list[_Range]) -> Iterator[pa.Table]:
        """The rows of the ranges. The first SPANS_AHEAD of what is left are being read, or have been."""
        pool = ThreadPoolExecutor(THREADS, thread_name_prefix="list")
        nodes: list[_Range | Future[_Span] | _Span] = list(ranges)
        try:
            while nodes:
                place = 0
                while place < min(len(nodes), SPANS_AHEAD):
                    node = nodes[place]
                    if isinstance(node, _Range):
                        nodes[place] = pool.submit(self._read, node)
                    elif isinstance(node, Future) and (node.done() or place == 0):
                        span = node.result()
                        nodes[place : place + 1] = [_Span(span.tables, []), *span.rest]
                    place += 1
                head = nodes[0]
                if isinstance(head, _Span):
                    nodes.pop(0)
                    yield from head.tables
        finally:
            self._stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, asked: _Range) -> _Span:
        """The first SPAN_PAGES pages of the range, and how to go on."""
        arguments: dict[str, Any] = {"Prefix": self._prefix, **asked.start_after()}
        tables: list[pa.Table] = []
        first = last = None
        pages = 0
        while not self._stop.is_set():
            page = self._ask(arguments)
            table = self._inside(page, asked)
            if table.num_rows:
                tables.append(table)
            first, last, pages = first or page.first, page.last or last, pages + 1
            if page.token is None or (last is not None and asked.high is not None and last >= asked.high):
                break
            if pages >= SPAN_PAGES and first is not None and last is not None and last >= asked.low:
                return _Span(tables, self._cut(_Range(last + "\0", asked.high), first, last))
            arguments = {"Prefix": self._prefix, "ContinuationToken": page.token}
        return _Span(tables, [])

    def _inside(self, page: ListingPage, asked: _Range) -> pa.Table:
        """The rows of the page that are in the range."""
        table = page.table
        if page.first is not None and page.first < asked.low:
            table = table.filter(pc.greater_equal(table["uri"], self._root + asked.low))
        if page.last is not None and asked.high is not None and page.last >= asked.high:
            table = table.filter(pc.less(table["uri"], self._root + asked.high))
        return table

    def _cut(self, rest: _Range, first: str, last: str) -> list[_Range]:
        """`rest` in pieces. What was read lies from `first` to `last`; where these two differ, names are dense."""
        edges = [rest.low]
        at = last[: _alike(first, last) + 1]
        for _ in range(PROBES):
            if self._stop.is_set():
                break
            found = self._ask({"Prefix": self._prefix, "StartAfter": at + HIGHEST, "MaxKeys": 1}).first
            if found is None or (rest.high is not None and found >= rest.high):
                break
            behind = found[: _alike(found, at) + 1]
            if behind <= at:  # a name with HIGHEST in it: no cut can be found here
                break
            at = behind
            if behind > edges[-1]:
                edges.append(behind)
        return [_Range(low, high) for low, high in pairwise([*edges, rest.high]) if low is not None]


def _ascending(uris: Any) -> bool:
    return len(uris) < 2 or bool(pc.all(pc.less(uris[:-1], uris[1:])).as_py())


def _alike(one: str, other: str) -> int:
    """With how many equal characters the two begin."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
