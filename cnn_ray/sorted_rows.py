# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""Streams of tables sorted by uri, walked in step: joins over ten million rows that hold some pages in memory.

Listings, plan pages and parts are sorted by uri in byte order, which is also Python's order of `str`. So whatever two
of them have in common is found range by range.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

STEP_ROWS = 16_384
"""Tables are joined to at least so many rows: a step costs about a millisecond, whatever its rows."""


def in_step(streams: Sequence[Iterable[pa.Table]]) -> Iterator[list[pa.Table | None]]:
    """For one range of uris after another, the rows of each stream that fall into it; None for a stream without any.

    Each stream's tables are sorted by their column `uri`, and follow each other; every row comes exactly once, and rows
    of equal uris come in the same step.
    """
    iterators = [_filled(stream) for stream in streams]
    heads = [next(iterator, None) for iterator in iterators]
    while any(head is not None for head in heads):
        bound = min(_uri(head, -1) for head in heads if head is not None)
        step: list[pa.Table | None] = []
        for k, head in enumerate(heads):
            count = 0 if head is None else _rows_through(head, bound)
            step.append(None if head is None or not count else head.slice(0, count))
            if head is not None and count:
                heads[k] = head.slice(count) if count < head.num_rows else next(iterators[k], None)
        yield step


def newest_rows(tables: Sequence[pa.Table | None]) -> pa.Table | None:
    """One row per uri: where several tables have it, the one of the first table. None where there are no rows."""
    present = [table for table in tables if table is not None]
    if len(present) < 2:
        return present[0] if present else None
    joined = pa.concat_tables(present, promote_options="permissive").combine_chunks()
    first = pc.index_in(joined["uri"], value_set=joined["uri"].combine_chunks())
    return joined.filter(pc.equal(first, pa.array(np.arange(joined.num_rows), pa.int32())))


def among(uris: Any, others: Sequence[pa.Table | None]) -> Any:
    """For each uri whether one of the tables holds it, as a boolean array."""
    present = [table["uri"] for table in others if table is not None]
    if not present:
        return pa.array(np.zeros(len(uris), bool))
    values = pa.concat_arrays([chunk for column in present for chunk in column.chunks])
    return pc.is_in(uris, value_set=values)


def _filled(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of at least STEP_ROWS (but for the last), each column in one piece."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        if table.num_rows:
            waiting.append(table)
            count += table.num_rows
        if count >= STEP_ROWS:
            yield pa.concat_tables(waiting, promote_options="permissive").combine_chunks()
            waiting, count = [], 0
    if waiting:
        yield pa.concat_tables(waiting, promote_options="permissive").combine_chunks()


def _uri(table: pa.Table, row: int) -> str:
    return str(table["uri"][row].as_py())


def _rows_through(table: pa.Table, bound: str) -> int:
    """How many rows of the table have a uri up to the bound."""
    if _uri(table, -1) <= bound:
        return table.num_rows
    return bisect.bisect_right(range(table.num_rows), bound, key=lambda row: _uri(table, row))
