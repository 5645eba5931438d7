# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""The partition on storage: plan, parts, quarantine and manifest, each written once by put-if-absent.

The part is the one commit point of a shard. It carries the shard's quarantined rows in its Parquet metadata, and the
quarantine file is derived from it: a process that dies between the two leaves nothing that could contradict itself, and
the next run writes the missing file from the part. The manifest comes last; readers trust nothing without it.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict, ValidationError

from cnn_ray.errors import NotFoundError, PlanError, QuarantineLimitError
from cnn_ray.plan import Plan, Shard
from cnn_ray.records import QUARANTINE_SCHEMA
from cnn_ray.storage import Store, open_store
from cnn_ray.tallies import Tally, tally_of

FORMAT = 1
QUARANTINE_KEY = b"cnn_ray.quarantine"

ModelT = TypeVar("ModelT", bound=BaseModel)


class FileRef(BaseModel):
    """One committed file: its name, rows and digest."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    rows: int
    size_bytes: int
    sha256: str


class PartRecord(BaseModel):
    """What one committed shard holds, and how it was made: `wait_s` and `busy_s` are seconds that the predictor waited
    for its images and worked on them, None where the part was read back. No committed byte depends on the two."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    part: FileRef
    quarantine: FileRef | None
    tally: Tally
    wait_s: float | None = None
    busy_s: float | None = None

    @property
    def rows(self) -> int:
        """Rows of the plan that this shard accounts for."""
        return self.tally.rows


class Manifest(BaseModel):
    """The last word on one generation. `live` counts and files are what readers see."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: int
    generation: int
    status: str
    planned: int
    scored: int
    quarantined: int
    flagged: int
    labels: dict[str, int]
    codes: dict[str, int]
    parts: tuple[FileRef, ...]
    quarantine: tuple[FileRef, ...]
    superseded_uris: tuple[str, ...]
    model: str
    version: int
    model_digest: str
    engine: str
    precision: str
    runner: str
    config: dict[str, Any]
    libraries: dict[str, str]
    started_at: str
    finished_at: str


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

    def committed_names(self) -> list[str]:
        """Names of all parts and quarantine files that are there."""
        return [key for prefix in ("part-", "_quarantine/") for key in self.store.keys(prefix)]

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
        try:
            scored = pq.read_table(io.BytesIO(raw))
            metadata = scored.schema.metadata or {}
            quarantined = pa.Table.from_pylist(json.loads(metadata.get(QUARANTINE_KEY, b"[]")), QUARANTINE_SCHEMA)
        except (pa.ArrowException, ValueError) as error:
            raise PlanError(
                f"Expected a Parquet part in {self.store.uri_of(shard.part_name)}. Received: {error}. "
                "Next: move the file away and run again; the shard is then scored anew."
            ) from None
        return self._finish_part(shard, raw, scored, quarantined, positive, quarantine_present=quarantine_present)

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
            return kind.model_validate_json(self.store.get(name))
        except NotFoundError:
            return None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            raise PlanError(
                f"Expected a whole {name} in {self.uri}. Received: {first['msg']}. "
                "Next: choose another OUTPUT, or use the cnn_ray version that wrote it."
            ) from None


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
    """The scored rows that the newest manifest of a partition vouches for: one row per uri, the newest.

    Raises:
        PlanError: there is no manifest (the run is not finished), or a part is not what the manifest says.
        QuarantineLimitError: the run had too many unreadable images and nobody accepted it.
    """
    partition = Partition(uri)
    manifest = partition.newest_manifest()
    if manifest is None:
        raise PlanError(
            f"Expected a finished run in {uri}. Received: no manifest. Next: run the same `cnn-ray score` again."
        )
    if manifest.status != "complete":
        raise QuarantineLimitError(
            f"Expected a complete run in {uri}. Received: status {manifest.status} ({manifest.quarantined} of "
            f"{manifest.planned} rows quarantined). Next: look at the quarantine files."
        )
    return pa.concat_tables([_read_checked(partition.store, ref) for ref in manifest.parts])


def read_quarantine(uri: str) -> pa.Table:
    """The rows that could not be scored, as the newest manifest of a partition names them."""
    partition = Partition(uri)
    manifest = partition.newest_manifest()
    refs: Sequence[FileRef] = () if manifest is None else manifest.quarantine
    tables = [_read_checked(partition.store, ref) for ref in refs]
    return pa.concat_tables(tables) if tables else QUARANTINE_SCHEMA.empty_table()


def _read_checked(store: Store, ref: FileRef) -> pa.Table:
    raw = store.get(ref.name)
    if hashlib.sha256(raw).hexdigest() != ref.sha256:
        raise PlanError(
            f"Expected {store.uri_of(ref.name)} as the manifest names it. Received: other bytes. "
            "Next: restore the file."
        )
    return pq.read_table(io.BytesIO(raw)).replace_schema_metadata(None)


def _file_ref(name: str, raw: bytes, rows: int) -> FileRef:
    return FileRef(name=name, rows=rows, size_bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
