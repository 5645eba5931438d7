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
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from cnn_ray.errors import ConfigError
from cnn_ray.records import PLAN_PAGE_SCHEMA

FORMAT = 1
ROWS_PER_PAGE = 16_384
"""A worker reads one page to learn its shard: half a megabyte, and 10 million objects make 610 of them."""


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
    limit: int | None


class PageRef(BaseModel):
    """One page of planned rows: `_plan/<digest>.parquet` holds the shards first_shard, first_shard + 1, ..."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    first_shard: int
    shards: int
    rows: int


class Plan(BaseModel):
    """What one generation of a partition scores. `removed` counts the recorded objects that its listing no longer had;
    `accept` and `retry` say what it was asked for, so that whoever finishes it does the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    generation: int
    frozen: Frozen
    planned_rows: int
    shards: int
    pages: tuple[PageRef, ...]
    removed: int = 0
    accept: bool = False
    retry: bool = False


@dataclass(frozen=True, slots=True)
class Shard:
    """The unit of work, retry, commit and resume: some hundred rows of one page."""

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


def make_plan(
    listing: Iterable[pa.Table], frozen: Frozen, write_page: Callable[[str, bytes], object], generation: int = 1
) -> Plan:
    """The plan of a sorted listing; its pages are handed to write_page (name, Parquet bytes) one by one.

    Same listing and same settings give the same bytes, so two planners agree or one of them loses whole.
    """
    pages: list[PageRef] = []
    shard = 0
    for table in _page_tables(listing, frozen.shard_size, frozen.limit):
        raw = _page_bytes(table, shard, frozen.shard_size)
        shards = -(-table.num_rows // frozen.shard_size)
        name = f"_plan/{hashlib.sha256(raw).hexdigest()[:32]}.parquet"
        pages.append(PageRef(name=name, first_shard=shard, shards=shards, rows=table.num_rows))
        write_page(name, raw)
        shard += shards
    return Plan(
        format=FORMAT,
        generation=generation,
        frozen=frozen,
        planned_rows=sum(page.rows for page in pages),
        shards=shard,
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
    return "none" if value is None else str(value)


def _also(names: list[str]) -> str:
    return f" (and another {', '.join(names)})" if names else ""


def _page_tables(listing: Iterable[pa.Table], shard_size: int, limit: int | None) -> Iterator[pa.Table]:
    """Tables of ROWS_PER_PAGE rows, rounded down to whole shards so that no shard spans two pages."""
    rows_per_page = max(ROWS_PER_PAGE // shard_size, 1) * shard_size
    left = limit
    waiting: list[pa.Table] = []
    count = 0
    for table in listing:
        if left is not None:
            table = table.slice(0, left)
            left -= table.num_rows
        waiting.append(table)
        count += table.num_rows
        while count >= rows_per_page:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, rows_per_page)
            waiting = [joined.slice(rows_per_page)]
            count = waiting[0].num_rows
        if left == 0:
            break
    if count:
        yield pa.concat_tables(waiting)


def _page_bytes(table: pa.Table, first_shard: int, shard_size: int) -> bytes:
    index = pa.array([first_shard + row // shard_size for row in range(table.num_rows)], pa.int32())
    extra = [field for field in table.schema if field.name not in PLAN_PAGE_SCHEMA.names]
    schema = pa.schema([*PLAN_PAGE_SCHEMA, *extra])
    columns = [index, *(table[name] for name in schema.names[1:])]
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, row_group_size=shard_size, compression="zstd")
    return sink.getvalue()
