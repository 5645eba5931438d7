# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""What a finished partition owes to its input as it is now: the next generation, and what that supersedes.

The sorted listing and the sorted plan pages of earlier generations are walked in step, so ten million objects are
compared with some pages of each in memory. An object is new if no generation planned its uri, and changed if its etag
is not the one that was planned last. Objects that are gone keep their rows and are counted.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cnn_ray.errors import DataError, PlanError
from cnn_ray.manifests import FileRef, Manifest
from cnn_ray.object_lookup import ABSENT, DENIED, NOT_ALLOWED
from cnn_ray.outputs import Partition, live_rows, read_ahead
from cnn_ray.plan import PageRef, Plan, Shard, make_plan
from cnn_ray.records import INPUT_PREFIX
from cnn_ray.sorted_rows import among, in_step, newest_rows
from cnn_ray.tallies import Tally, tally_of

PAGE_THREADS = 8
UNREADABLE = pa.array([ABSENT, DENIED, NOT_ALLOWED])
"""Planned instead of an etag for what a manifest input names and nobody can read: never a reason to replace a row."""


@dataclass
class Changes:
    """How the input differs from what is recorded. Counted while the rows of the next plan are read."""

    new: int = 0
    changed: int = 0
    retried: int = 0
    removed: int = 0
    size_bytes: int = 0

    @property
    def rows(self) -> int:
        """Rows of the next generation."""
        return self.new + self.changed + self.retried


@dataclass
class Superseded:
    """Rows of earlier generations that a generation replaces: their files, number and tally, and which of the rows that
    the manifest shows are among them."""

    files: tuple[FileRef, ...] = ()
    rows: int = 0
    tally: Tally = field(default_factory=Tally)
    shown: set[str] = field(default_factory=set)


def earlier_plans(partition: Partition, through: int) -> list[Plan]:
    """The plans of generations 1 to `through`.

    Raises:
        PlanError: one is missing.
    """
    plans = [partition.read_plan(generation) for generation in range(1, through + 1)]
    found = [plan for plan in plans if plan is not None]
    if len(found) < through:
        raise PlanError(
            f"Expected the plans of {through} generations in {partition.uri}. Received: {len(found)}. "
            "Next: restore the missing _plan-g file."
        )
    return found


def next_plan(
    partition: Partition,
    manifest: Manifest,
    listing: Iterable[pa.Table],
    write_page: Callable[[str, bytes], object],
    *,
    accept: bool = False,
    retry: bool = False,
) -> tuple[Plan | None, Changes]:
    """The plan that follows the manifest, and how the input differs; no plan where there is nothing to do.

    `listing` is the sorted input as it is now. With `retry` the quarantined rows are planned too, if their object is
    there; with `accept` a partition over its quarantine limit gets a plan even without rows. Pages go to write_page.

    Raises:
        DataError: a column of a manifest input has another type than before.
    """
    plans = earlier_plans(partition, manifest.generation)
    changes = Changes()
    release = accept and manifest.status != "complete"
    rows = _due_rows(partition, manifest, plans, listing, changes, retry=retry)
    plan = make_plan(rows, plans[0].frozen, write_page, manifest.generation + 1)
    if not plan.planned_rows and not release:
        return None, changes
    return plan.model_copy(update={"removed": changes.removed, "accept": accept, "retry": retry}), changes


def supersede(partition: Partition, plan: Plan, manifest: Manifest) -> Superseded:
    """What the plan's generation replaces of the rows that the manifest before it shows.

    A function of committed files alone: whoever finishes the generation, and however often, writes the same.

    Raises:
        PlanError: an earlier part does not hold what its plan says.
    """
    result = Superseded()
    examples = pa.array([row.uri for row in (*manifest.top, *manifest.bad)], pa.string())
    older = list(reversed(earlier_plans(partition, plan.generation - 1)))
    with ThreadPoolExecutor(PAGE_THREADS, thread_name_prefix="supersede") as pool:

        def replaced_uris() -> Iterator[pa.Table]:
            streams = [planned_uris(partition, p, pool) for p in (plan, *older)]
            for current, *past in in_step(streams):
                known = newest_rows(past)
                if current is None or known is None:
                    continue
                hit = known.filter(among(known["uri"], [current]))
                if hit.num_rows:
                    _take_away(partition, hit, manifest, pool, result)
                    result.shown |= set(examples.filter(among(examples, [hit])).to_pylist())
                    yield hit.select(["uri"]).sort_by("uri")

        result.files = partition.write_superseded(plan.generation, replaced_uris())
    return result


def planned_uris(partition: Partition, plan: Plan, pool: ThreadPoolExecutor) -> Iterator[pa.Table]:
    """The planned rows of a generation, sorted by uri: uri, etag, shard, generation."""

    def read_page(page: PageRef) -> pa.Table:
        raw = partition.store.get(page.name)
        table = pq.read_table(io.BytesIO(raw), columns=["uri", "etag", "shard"])
        return table.append_column("generation", pa.array(np.full(table.num_rows, plan.generation, np.int32)))

    return read_ahead(pool, read_page, plan.pages)


def _due_rows(
    partition: Partition,
    manifest: Manifest,
    plans: Sequence[Plan],
    listing: Iterable[pa.Table],
    changes: Changes,
    *,
    retry: bool,
) -> Iterator[pa.Table]:
    """The rows of the listing that the next generation scores; afterwards `changes` is complete."""
    schema = _input_types(partition, plans)
    quarantined = live_rows(partition.store, manifest.quarantine if retry else (), manifest.superseded)
    with ThreadPoolExecutor(PAGE_THREADS, thread_name_prefix="plan-pages") as pool:
        streams = [planned_uris(partition, plan, pool) for plan in reversed(plans)]
        for current, bad, *past in in_step([listing, quarantined, *streams]):
            known = newest_rows(past)
            if known is not None:
                changes.removed += _count_removed(known, current)
            if current is None:
                continue
            due = _due(current, known, bad, changes)
            if due.num_rows:
                changes.size_bytes += pc.sum(due["size_bytes"]).as_py()
                yield _with_types(due, schema)


def _due(current: pa.Table, known: pa.Table | None, bad: pa.Table | None, changes: Changes) -> pa.Table:
    uris = current["uri"]
    readable = pc.invert(pc.is_in(current["etag"], value_set=UNREADABLE))
    if known is None:
        old = changed = pa.array(np.zeros(current.num_rows, bool))
    else:
        index = pc.index_in(uris, value_set=known["uri"].combine_chunks())
        old = pc.is_valid(index)
        differs = pc.fill_null(pc.not_equal(known["etag"].take(index), current["etag"]), False)
        changed = pc.and_(differs, readable)
    retried = pc.and_not(pc.and_(among(uris, [bad]), readable), changed)
    new = pc.invert(old)
    changes.new += _count(new)
    changes.changed += _count(changed)
    changes.retried += _count(pc.and_(retried, old))
    return current.filter(pc.or_(new, pc.or_(changed, retried)))


def _count_removed(known: pa.Table, current: pa.Table | None) -> int:
    """How many of the known rows had an object once, and have none now."""
    existed = pc.invert(pc.is_in(known["etag"], value_set=pa.array([ABSENT, NOT_ALLOWED])))
    if current is None:
        return _count(existed)
    there = current.filter(pc.not_equal(current["etag"], ABSENT))
    return _count(pc.and_(existed, pc.invert(among(known["uri"], [there]))))


def _count(mask: Any) -> int:
    return int(pc.sum(mask).as_py() or 0)


def _input_types(partition: Partition, plans: Sequence[Plan]) -> dict[str, pa.DataType]:
    """Types of the `input_` columns of earlier generations, by name."""
    types: dict[str, pa.DataType] = {}
    for plan in plans:
        for page in plan.pages[:1]:
            for column in pq.read_schema(io.BytesIO(partition.store.get(page.name))):
                if column.name.startswith(INPUT_PREFIX) and not pa.types.is_null(column.type):
                    types.setdefault(column.name, column.type)
    return types


def _with_types(table: pa.Table, types: dict[str, pa.DataType]) -> pa.Table:
    """The table with its `input_` columns as earlier generations had them, so that all parts read as one table."""
    for number, column in enumerate(table.schema):
        wanted = types.get(column.name)
        if wanted is not None and wanted != column.type:
            try:
                table = table.set_column(number, column.name, table[column.name].cast(wanted))
            except pa.ArrowInvalid as error:
                raise DataError(
                    f"Expected {wanted} in the column {column.name.removeprefix(INPUT_PREFIX)!r}, as in earlier "
                    f"generations. Received: {error}. Next: correct the manifest, or choose another OUTPUT."
                ) from None
    return table


def _take_away(
    partition: Partition, hit: pa.Table, manifest: Manifest, pool: ThreadPoolExecutor, result: Superseded
) -> None:
    """Adds the tally of the rows `hit` (uri, generation, shard), read from their parts, to what is superseded."""
    positive = None if manifest.positive_label is None else manifest.label_names.index(manifest.positive_label)
    groups = hit.group_by(["generation", "shard"]).aggregate([("uri", "list")])

    def tally(group: dict[str, Any]) -> Tally:
        name = Shard(group["generation"], group["shard"], "").part_name
        scored, quarantined = partition.read_part(name)
        uris = pa.array(group["uri_list"], pa.string())
        found = [table.filter(pc.is_in(table["uri"], value_set=uris)) for table in (scored, quarantined)]
        if found[0].num_rows + found[1].num_rows != len(uris):
            raise PlanError(
                f"Expected {len(uris)} rows of its plan in {partition.store.uri_of(name)}. Received: "
                f"{found[0].num_rows + found[1].num_rows}. Next: report this as a bug; no manifest was written."
            )
        return tally_of(found[0], found[1], positive)

    for part in pool.map(tally, groups.to_pylist()):
        result.tally = result.tally.plus(part)
    result.rows += hit.num_rows
