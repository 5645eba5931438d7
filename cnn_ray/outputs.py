# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""The partition on storage: plan, parts, quarantine and manifest, each written once by put-if-absent.

The part is the one commit point of a shard. It carries the shard's quarantined rows in its Parquet metadata, and the
quarantine file is derived from it: a process that dies between the two leaves nothing that could contradict itself, and
the next run writes the missing file from the part. The manifest comes last; readers trust nothing without it.

Generations: a row of generation g is live where its uri is in no `_superseded` file of a later one. Files are never
changed, so a reader of an older manifest goes on seeing what it vouches for.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from cnn_ray import manifests
from cnn_ray.errors import NotFoundError, PlanError, QuarantineLimitError
from cnn_ray.manifests import FileRef, Manifest, PartRecord
from cnn_ray.plan import FORMAT as PLAN_FORMAT
from cnn_ray.plan import Plan, Shard
from cnn_ray.records import QUARANTINE_SCHEMA, SCORE_SCHEMA
from cnn_ray.sorted_rows import among, in_step
from cnn_ray.storage import Store, open_store
from cnn_ray.tallies import tally_of

SUPERSEDED_ROWS = 262_144
"""Uris in one `_superseded` file: writer and reader hold one of them at a time."""
READ_AHEAD = 4
QUARANTINE_KEY = b"cnn_ray.quarantine"

ModelT = TypeVar("ModelT", bound=BaseModel)
ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


class Partition:
    """One model version's results for one input (and date)."""

    def __init__(self, uri: str) -> None:
        self.store: Store = open_store(uri)

    @property
    def uri(self) -> str:
        """Its location."""
        return self.store.uri

    def read_plan(self, generation: int) -> Plan | None:
        """The plan of a generation, None where there is none yet."""
        return self._read(f"_plan-g{generation:04d}.json", Plan)

    def write_plan(self, plan: Plan) -> Plan:
        """The plan that holds from now on: ours, or the one of a planner that was faster."""
        name = f"_plan-g{plan.generation:04d}.json"
        if self.store.put_if_absent(name, plan.model_dump_json(indent=2).encode()):
            return plan
        winner = self.read_plan(plan.generation)
        return plan if winner is None else winner

    def read_manifest(self, generation: int) -> Manifest | None:
        """The manifest of a generation, None where the run is not finished."""
        return self._read(f"_manifest-g{generation:04d}.json", Manifest)

    def write_manifest(self, manifest: Manifest) -> Manifest:
        """The manifest that holds from now on: ours, or the one of a run that was faster."""
        raw = manifest.model_dump_json(indent=2).encode()
        if self.store.put_if_absent(f"_manifest-g{manifest.generation:04d}.json", raw):
            return manifest
        winner = self.read_manifest(manifest.generation)
        return manifest if winner is None else winner

    def newest_manifest(self) -> Manifest | None:
        """The manifest of the highest generation, None where no run has finished."""
        names = [key for key in self.store.keys("_manifest-g") if key.endswith(".json")]
        return self._read(max(names), Manifest) if names else None

    def manifest_digest(self, generation: int) -> str:
        """SHA-256 of the manifest's bytes."""
        return hashlib.sha256(self.store.get(f"_manifest-g{generation:04d}.json")).hexdigest()

    def committed_names(self, generation: int) -> list[str]:
        """Names of all parts and quarantine files of a generation that are there."""
        kinds = ("part", "_quarantine/quarantine")
        return [key for kind in kinds for key in self.store.keys(f"{kind}-g{generation:04d}-")]

    def write_superseded(self, generation: int, pieces: Iterable[pa.Table]) -> tuple[FileRef, ...]:
        """The generation's files of superseded uris: ours, or the equal ones of a run that was faster.

        `pieces` are sorted tables with one column `uri`. The same pieces give the same bytes.
        """
        refs: list[FileRef] = []
        for number, table in enumerate(_in_pieces(pieces, SUPERSEDED_ROWS)):
            name = f"_superseded/superseded-g{generation:04d}-{number:05d}.parquet"
            raw = table_bytes(table)
            if not self.store.put_if_absent(name, raw):
                raw = self.store.get(name)
            refs.append(_file_ref(name, raw, table.num_rows))
        return tuple(refs)

    def read_part(self, name: str) -> tuple[pa.Table, pa.Table]:
        """The scored and the quarantined rows of a committed part.

        Raises:
            PlanError: the part is damaged.
        """
        return self._parse_part(name, self.store.get(name))

    def commit_part(
        self, shard: Shard, scored: pa.Table, quarantined: pa.Table, planned_rows: int, positive: int | None
    ) -> PartRecord:
        """What the shard holds from now on: our part, or the one of a run that was faster.

        `positive` is the index of the label that `flagged` is about, None where the model has none.

        Raises:
            PlanError: scored and quarantined rows do not add up to the planned ones.
        """
        if scored.num_rows + quarantined.num_rows != planned_rows:
            raise PlanError(
                f"Expected {planned_rows} rows in {shard.part_name}. Received: {scored.num_rows} scored and "
                f"{quarantined.num_rows} quarantined. Next: report this as a bug; nothing was written."
            )
        raw = part_bytes(scored, quarantined)
        if not self.store.put_if_absent(shard.part_name, raw):
            return self.recover_part(shard, positive, quarantine_present=False)
        return self._finish_part(shard, raw, scored, quarantined, positive, quarantine_present=False)

    def recover_part(self, shard: Shard, positive: int | None, *, quarantine_present: bool) -> PartRecord:
        """What a committed part holds, read back; a missing quarantine file is written from it.

        Raises:
            PlanError: the part is damaged.
        """
        raw = self.store.get(shard.part_name)
        scored, quarantined = self._parse_part(shard.part_name, raw)
        return self._finish_part(shard, raw, scored, quarantined, positive, quarantine_present=quarantine_present)

    def _parse_part(self, name: str, raw: bytes) -> tuple[pa.Table, pa.Table]:
        try:
            scored = pq.read_table(io.BytesIO(raw))
            metadata = scored.schema.metadata or {}
            return scored, pa.Table.from_pylist(json.loads(metadata.get(QUARANTINE_KEY, b"[]")), QUARANTINE_SCHEMA)
        except (pa.ArrowException, ValueError) as error:
            raise PlanError(
                f"Expected a Parquet part in {self.store.uri_of(name)}. Received: {error}. "
                "Next: move the file away and run again; the shard is then scored anew."
            ) from None

    def _finish_part(
        self,
        shard: Shard,
        raw: bytes,
        scored: pa.Table,
        quarantined: pa.Table,
        positive: int | None,
        *,
        quarantine_present: bool,
    ) -> PartRecord:
        quarantine = None
        if quarantined.num_rows:
            rows = table_bytes(quarantined)
            if not quarantine_present:
                self.store.put_if_absent(shard.quarantine_name, rows)
            quarantine = _file_ref(shard.quarantine_name, rows, quarantined.num_rows)
        return PartRecord(
            part=_file_ref(shard.part_name, raw, scored.num_rows),
            quarantine=quarantine,
            tally=tally_of(scored, quarantined, positive),
        )

    def _read(self, name: str, kind: type[ModelT]) -> ModelT | None:
        try:
            raw = self.store.get(name)
        except NotFoundError:
            return None
        self._refuse_other_format(name, raw, manifests.FORMAT if kind is Manifest else PLAN_FORMAT)
        try:
            return kind.model_validate_json(raw)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise PlanError(
                f"Expected a whole {name} in {self.uri}. Received: {first['msg']}. "
                "Next: choose another OUTPUT, or use the cnn_ray version that wrote it."
            ) from None

    def _refuse_other_format(self, name: str, raw: bytes, expected: int) -> None:
        try:
            found = json.loads(raw)["format"]
        except (ValueError, KeyError, TypeError):
            return  # damaged, which pydantic says better
        if found != expected:
            raise PlanError(
                f"Expected format {expected} in {self.store.uri_of(name)}. Received: format {found}, written by "
                "another version of cnn_ray. Next: choose another OUTPUT, or use the version that wrote it."
            )


def part_bytes(scored: pa.Table, quarantined: pa.Table) -> bytes:
    """Parquet bytes of a part, the same for the same rows: no time, no host, no random name inside."""
    metadata = {QUARANTINE_KEY: json.dumps(quarantined.to_pylist()).encode()} if quarantined.num_rows else None
    return table_bytes(scored.replace_schema_metadata(metadata))


def table_bytes(table: pa.Table) -> bytes:
    """Parquet bytes of a table, zstd-compressed, the same for the same rows and library version."""
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue()


def read(uri: str) -> pa.Table:
    """The scored rows that the newest manifest of a partition vouches for: one row per uri, the newest, sorted by uri.

    Raises:
        PlanError: there is no manifest (the run is not finished), or a file is not what the manifest says.
        QuarantineLimitError: the run had too many unreadable images and nobody accepted it.
    """
    partition = Partition(uri)
    manifest = finished_manifest(partition)
    tables = list(live_rows(partition.store, manifest.parts, manifest.superseded))
    return pa.concat_tables(tables, promote_options="permissive") if tables else SCORE_SCHEMA.empty_table()


def read_quarantine(uri: str) -> pa.Table:
    """The rows that could not be scored and were not scored later, as the newest manifest names them, sorted by uri."""
    partition = Partition(uri)
    manifest = partition.newest_manifest()
    if manifest is None:
        return QUARANTINE_SCHEMA.empty_table()
    tables = list(live_rows(partition.store, manifest.quarantine, manifest.superseded))
    return pa.concat_tables(tables) if tables else QUARANTINE_SCHEMA.empty_table()


def finished_manifest(partition: Partition) -> Manifest:
    """The newest manifest of a partition that readers may trust.

    Raises:
        PlanError: there is none.
        QuarantineLimitError: it has too many quarantined rows and nobody accepted them.
    """
    manifest, uri = partition.newest_manifest(), partition.uri
    if manifest is None:
        raise PlanError(
            f"Expected a finished run in {uri}. Received: no manifest. Next: run the same `cnn-ray score` again."
        )
    if manifest.status != "complete":
        raise QuarantineLimitError(
            f"Expected a complete run in {uri}. Received: status {manifest.status} ({manifest.quarantined} of "
            f"{manifest.planned} rows quarantined). Next: look at the quarantine files; --accept releases the run."
        )
    return manifest


def live_rows(store: Store, files: Sequence[FileRef], superseded: Sequence[FileRef]) -> Iterator[pa.Table]:
    """The rows of the files (parts, or quarantine files) that no later generation supersedes, sorted by uri.

    A table per range of uris: memory does not grow with the partition. Every file is checked against its digest.
    """
    generations = sorted({ref.generation for ref in files})
    later = sorted({ref.generation for ref in superseded})
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(2 * READ_AHEAD, thread_name_prefix="read"))

        def stream(refs: Sequence[FileRef], generation: int) -> Iterator[pa.Table]:
            chosen = sorted((ref for ref in refs if ref.generation == generation), key=lambda ref: ref.name)
            return read_ahead(pool, lambda ref: _read_checked(store, ref), chosen)

        streams = [stream(files, g) for g in generations] + [stream(superseded, g) for g in later]
        for step in in_step(streams):
            gone = dict(zip(later, step[len(generations) :], strict=True))
            kept: list[pa.Table] = []
            for g, rows in zip(generations, step, strict=False):
                if rows is not None:
                    newer = [table for h, table in gone.items() if h > g and table is not None]
                    kept.append(rows.filter(pc.invert(among(rows["uri"], newer))) if newer else rows)
            if sum(table.num_rows for table in kept):
                joined = pa.concat_tables(kept, promote_options="permissive")
                yield joined if len(kept) == 1 else joined.sort_by("uri")


def read_ahead(
    pool: ThreadPoolExecutor, read_one: Callable[[ItemT], ResultT], items: Iterable[ItemT]
) -> Iterator[ResultT]:
    """What read_one gives for the items, in order, with READ_AHEAD of them under way."""
    waiting: deque[Future[ResultT]] = deque()
    for item in items:
        waiting.append(pool.submit(read_one, item))
        if len(waiting) > READ_AHEAD:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _in_pieces(tables: Iterable[pa.Table], rows: int) -> Iterator[pa.Table]:
    """The same rows in tables of exactly `rows` (but for the last), however they came."""
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= rows:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, rows).combine_chunks()
            waiting, count = [joined.slice(rows)], count - rows
    if count:
        yield pa.concat_tables(waiting).combine_chunks()


def _read_checked(store: Store, ref: FileRef) -> pa.Table:
    try:
        raw = store.get(ref.name)
    except NotFoundError:
        raw = None
    if raw is None or hashlib.sha256(raw).hexdigest() != ref.sha256:
        raise PlanError(
            f"Expected {store.uri_of(ref.name)} as the manifest names it. Received: "
            f"{'no such file' if raw is None else 'other bytes'}. Next: restore the file."
        )
    return pq.read_table(io.BytesIO(raw)).replace_schema_metadata(None)


def _file_ref(name: str, raw: bytes, rows: int) -> FileRef:
    return FileRef(name=name, rows=rows, size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
