# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""listing -> frozen plan of shards. Pure: what is written and where is for cnn_ray.outputs.

A plan is a small JSON head and pages of rows. The head freezes everything that decides an answer, so that a resumed run
cannot mix two kinds of answers; the pages are named by their digest, so that the head alone decides a race.
"""

from __future__ import annotations

import hashlib
import io
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from cnn_ray.errors import ConfigError
from cnn_ray.records import PLAN_PAGE_SCHEMA

FORMAT = 2
"""2: the parts of the plan have the columns of manifest format 3."""
ROWS_PER_PAGE = 16_384
"""A worker reads one page to learn its shard: half a megabyte, and 10 million objects make some 620 of them."""
PAGE_THREADS = 4
PAGES_AHEAD = 8
"""Pages that are being encoded or written; a PUT of each in turn would add minutes to ten million objects."""

LARGEST_SHARD = 1024
SHARD_PIXELS_BYTES = 256 << 20


class Frozen(BaseModel):
    """Everything that decides the answers of a partition. Runner and parallelism are not among it."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    input_uri: str
    uri_column: str
    model: str
    version: int
    model_digest: str
    engine: str
    precision: str
    threshold: float
    max_image_pixels: int
    max_image_bytes: int
    shard_size: int
    """Rows of every shard; 0: `auto_shard_size`, with `largest_shard` rows at most."""
    limit: int | None
    largest_shard: int = LARGEST_SHARD
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    follow_symlinks: bool = False


class PageRef(BaseModel):
    """One page of planned rows: `_plan/<digest>.parquet` holds the shards first_shard, first_shard + 1, ...

    Pages are sorted by uri, each within and one after the other; the uris are None in plans of older versions.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    first_shard: int
    shards: int
    rows: int
    first_uri: str | None = None
    last_uri: str | None = None


class Plan(BaseModel):
    """What one generation of a partition scores. `removed` counts the recorded objects that its listing no longer had,
    `left_out` what lies in the input and is no image to be scored, by reason (`input_filters.REASONS`); `accept` and
    `retry` say what it was asked for, so that whoever finishes it does the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    generation: int
    frozen: Frozen
    planned_rows: int
    shards: int
    pages: tuple[PageRef, ...]
    removed: int = 0
    left_out: dict[str, int] = {}
    accept: bool = False
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work, retry, commit and resume: up to some thousand rows of one page."""

    generation: int
    index: int
    page: str

    @property
    def part_name(self) -> str:
        """Name of its Parquet part."""
        return f"part-g{self.generation:04d}-{self.index:05d}.parquet"

    @property
    def quarantine_name(self) -> str:
        """Name of its quarantine file, which exists only where rows could not be scored.

        It lies in a folder of its own whose name begins with `_`: Arrow, Spark and Hive skip such names, so a plain
        read of the partition sees scored rows alone, and a read of the folder sees the quarantine as one table.
        """
        return f"_quarantine/quarantine-g{self.generation:04d}-{self.index:05d}.parquet"


def largest_shard(height_px: int, width_px: int) -> int:
    """Rows of the longest shard of a model with this input: 1024, or as many as have 256 MiB of RGB pixels."""
    return max(min(LARGEST_SHARD, SHARD_PIXELS_BYTES // (height_px * width_px * 3)), 1)


def auto_shard_size(shard: int, largest: int) -> int:
    """Rows of a shard where none were asked for, known without the number of all rows.

    The first ones are short, 32, 64 and 128 rows, so that something is committed soon; then 256 up to shard 63, 512 up
    to shard 127 and `largest`, which none exceeds, from there on. A million rows make some 1,060 parts.
    """
    if shard < 64:
        return min(32 << min(shard, 3), largest)
    return min(512 if shard < 128 else largest, largest)


def make_plan(
    listing: Iterable[pa.Table], frozen: Frozen, write_page: Callable[[str, bytes], object], generation: int = 1
) -> Plan:
    """The plan of a sorted listing; its pages are handed to write_page (name, Parquet bytes).

    write_page is called from several threads at once and in any order, and has returned for each page when this
    returns. Same listing and same settings give the same bytes, so two planners agree or one of them loses whole.

    Raises:
        Exception: whatever the listing or write_page raises.
    """
    pages: list[PageRef] = []

    def finish(table: pa.Table, first_shard: int, sizes: list[int]) -> PageRef:
        raw = _page_bytes(table, first_shard, sizes)
        name = f"_plan/{hashlib.sha256(raw).hexdigest()[:32]}.parquet"
        write_page(name, raw)
        first, last = (str(table["uri"][row].as_py()) for row in (0, -1))
        rows, shards = table.num_rows, len(sizes)
        return PageRef(name=name, first_shard=first_shard, shards=shards, rows=rows, first_uri=first, last_uri=last)

    with ThreadPoolExecutor(PAGE_THREADS, thread_name_prefix="plan") as pool:
        ahead: deque[Future[PageRef]] = deque()
        try:
            for table, first_shard, sizes in _page_tables(listing, frozen):
                ahead.append(pool.submit(finish, table, first_shard, sizes))
                if len(ahead) >= PAGES_AHEAD:
                    pages.append(ahead.popleft().result())
            pages += [page.result() for page in ahead]
        finally:
            for page in ahead:
                page.cancel()
    return Plan(
        format=FORMAT,
        generation=generation,
        frozen=frozen,
        planned_rows=sum(page.rows for page in pages),
        shards=sum(page.shards for page in pages),
        pages=tuple(pages),
    )


def shards_of(plan: Plan) -> list[Shard]:
    """All shards of the plan in order."""
    return [
        Shard(plan.generation, index, page.name)
        for page in plan.pages
        for index in range(page.first_shard, page.first_shard + page.shards)
    ]


def pending_shards(plan: Plan, committed: Iterable[str]) -> list[Shard]:
    """The shards whose part is not among the committed names."""
    names = set(committed)
    return [shard for shard in shards_of(plan) if shard.part_name not in names]


def shard_rows(page: bytes, shard: int) -> pa.Table:
    """The planned rows of one shard (uri, etag, size_bytes and any `input_` columns) out of its page's bytes."""
    file = pq.ParquetFile(io.BytesIO(page))
    first = file.read_row_group(0, columns=["shard"])["shard"][0].as_py()
    return file.read_row_group(shard - first).drop_columns(["shard"])


def page_rows(page: bytes) -> pa.Table:
    """All planned rows of a page, with their shard."""
    return pq.read_table(io.BytesIO(page))


def refuse_other_settings(planned: Frozen, asked: Frozen, where: str) -> None:
    """Returns where a rerun asks for the same answers as the plan.

    Raises:
        ConfigError: a field that decides the answer differs; the message names it.
    """
    before, now = planned.model_dump(), asked.model_dump()
    different = [name for name in before if before[name] != now[name]]
    if different:
        name = different[0]
        raise ConfigError(
            f"Expected {name}={_shown(before[name])}, as the plan in {where} froze it. Received: {_shown(now[name])}"
            f"{_also(different[1:])}. Next: repeat the first command to finish this run, or choose another OUTPUT."
        )


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _also(names: list[str]) -> str:
    return f" (and another {', '.join(names)})" if names else ""


def _page_tables(listing: Iterable[pa.Table], frozen: Frozen) -> Iterator[tuple[pa.Table, int, list[int]]]:
    """The rows of each page, its first shard, and the rows of each of its shards."""
    rows = _Rows(listing, frozen.limit)
    shard = 0
    while True:
        sizes = _page_sizes(frozen, shard)
        table = rows.take(sum(sizes))
        if not table.num_rows:
            return
        ends = np.minimum(np.cumsum(sizes), table.num_rows)
        sizes = [int(size) for size in np.diff(ends, prepend=0) if size]
        yield table, shard, sizes
        shard += len(sizes)


def _page_sizes(frozen: Frozen, shard: int) -> list[int]:
    """Rows of the shards of a full page that begins with `shard`: as many as fit into ROWS_PER_PAGE, at least one."""
    sizes: list[int] = []
    total = 0
    while True:
        size = frozen.shard_size or auto_shard_size(shard + len(sizes), frozen.largest_shard)
        if sizes and total + size > ROWS_PER_PAGE:
            return sizes
        sizes.append(size)
        total += size


class _Rows:
    """The first `limit` rows of a listing, to be taken in any portions."""

    def __init__(self, listing: Iterable[pa.Table], limit: int | None) -> None:
        self._tables, self._left = iter(listing), limit
        self._waiting: list[pa.Table] = []
        self._count = 0

    def take(self, count: int) -> pa.Table:
        """The next `count` rows, fewer at the end. Reads no table more than it needs."""
        while self._count < count and self._left != 0 and (table := next(self._tables, None)) is not None:
            if self._left is not None:
                table = table.slice(0, self._left)
                self._left -= table.num_rows
            self._waiting.append(table)
            self._count += table.num_rows
        if not self._waiting:
            return pa.table({})
        joined = pa.concat_tables(self._waiting)
        self._waiting = [joined.slice(count)]
        self._count = self._waiting[0].num_rows
        return joined.slice(0, count)


def _page_bytes(table: pa.Table, first_shard: int, sizes: list[int]) -> bytes:
    """Parquet with a row group for each shard: reading one shard decodes nothing else."""
    extra = [field for field in table.schema if field.name not in PLAN_PAGE_SCHEMA.names]
    schema = pa.schema([*PLAN_PAGE_SCHEMA, *extra])
    shards = np.repeat(np.arange(first_shard, first_shard + len(sizes), dtype=np.int32), sizes)
    index = pa.Array.from_buffers(pa.int32(), len(shards), [None, pa.py_buffer(shards)])
    page = pa.Table.from_arrays([index, *(table[name] for name in schema.names[1:])], schema=schema).combine_chunks()
    dictionary: Any = ["shard", *(field.name for field in extra)]  # uris and etags hardly repeat
    sink = io.BytesIO()
    with pq.ParquetWriter(sink, schema, compression="zstd", use_dictionary=dictionary) as writer:
        start = 0
        for size in sizes:
            writer.write_table(page.slice(start, size), row_group_size=size)
            start += size
    return sink.getvalue()
