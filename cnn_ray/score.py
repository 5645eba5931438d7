"""One scoring run: plan -> stages over the shards that are not committed yet -> manifest.

Run it again after anything: committed parts are never fetched again, and a finished run is a no-op.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed

import pyarrow as pa

import cnn_ray
from cnn_ray.artifact import Artifact, load_artifact
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import ConfigError, DataError, NotFoundError, PlanError, QuarantineLimitError
from cnn_ray.inputs import is_manifest, list_inputs
from cnn_ray.lease import Lease
from cnn_ray.outputs import FORMAT, Manifest, Partition, PartRecord
from cnn_ray.partitions import fill_date, partition_uri
from cnn_ray.plan import Frozen, Plan, make_plan, page_rows, pending_shards, refuse_other_settings, shards_of
from cnn_ray.predictor import choose_engine, cpu_count
from cnn_ray.ray_runner import run_ray
from cnn_ray.runners import run_local
from cnn_ray.stages import StageContext, positive_index
from cnn_ray.storage import open_store, split_uri
from cnn_ray.tallies import Tally

GENERATION = 1
S3_FETCHES = 32
"""GETs in flight where each one waits for a network."""


@dataclass(frozen=True)
class Progress:
    """How far a run is. Rows count those committed by earlier attempts too."""

    rows: int
    planned: int
    quarantined: int
    images_per_s: float


@dataclass(frozen=True)
class ScoreResult:
    """A finished run: its manifest, what this attempt did, and how fast."""

    partition_uri: str
    manifest: Manifest
    already_done: bool
    resumed_rows: int
    unplanned: int
    images_per_s: float


@dataclass(frozen=True)
class DryRun:
    """What a run would do: nothing was written."""

    partition_uri: str
    rows: int
    bytes: int
    shards: int
    engine: str
    precision: str


def run_score(config: ScoreConfig, on_progress: Callable[[Progress], None] | None = None) -> ScoreResult:
    """The finished run of the configuration; a finished one is returned as it stands.

    Raises:
        ConfigError: the output holds a run with other settings, or a full run where --limit is given.
        DataError: no images in the input.
        BusyError: another run holds the partition.
        QuarantineLimitError: too many rows could not be scored; the manifest is written with that status.
    """
    artifact = load_artifact(config.models_uri, config.model)
    partition = Partition(partition_uri(config.output_uri, config.date, artifact.name, artifact.version))
    frozen = freeze(config, artifact)
    manifest = partition.read_manifest(GENERATION)
    if manifest is not None:
        return _finished_before(config, partition, frozen, manifest)
    partition.store.check_writable()
    with Lease(partition.store, config.lease_s):
        plan = _plan(config, partition, frozen)
        records, result = _score_pending(config, artifact, partition, plan, on_progress)
        manifest = partition.write_manifest(_manifest(config, artifact, plan, records, result.started_at))
    _refuse_quarantine(manifest, partition.uri)
    return ScoreResult(partition.uri, manifest, False, result.resumed_rows, 0, result.images_per_s)


def dry_run(config: ScoreConfig) -> DryRun:
    """What `run_score` would do, found without writing anything: the model and the input are really looked at."""
    artifact = load_artifact(config.models_uri, config.model)
    frozen = freeze(config, artifact)
    partition = Partition(partition_uri(config.output_uri, config.date, artifact.name, artifact.version))
    planned = partition.read_plan(GENERATION)
    if planned is not None:
        refuse_other_settings(planned.frozen, frozen, partition.uri)
    sizes: list[int] = []
    plan = make_plan(_tee_sizes(_listing(config), sizes), frozen, lambda _name, _raw: None)
    return DryRun(partition.uri, plan.planned_rows, sum(sizes), plan.shards, frozen.engine, frozen.precision)


def freeze(config: ScoreConfig, artifact: Artifact) -> Frozen:
    """Everything that decides the answers, with the alias and `auto` resolved.

    Raises:
        ConfigError: the model or this node lacks the engine or precision, or the output lies inside the input.
    """
    engine, precision = choose_engine(artifact, config.engine, config.precision, use_gpu=config.num_gpus > 0)
    uri = fill_date(config.input_uri, config.date)
    _refuse_output_in_input(uri, config.output_uri)
    return Frozen(
        input_uri=open_store(uri).uri,
        uri_column=config.uri_column,
        model=artifact.name,
        version=artifact.version,
        model_digest=artifact.digest,
        engine=engine,
        precision=precision,
        threshold=artifact.threshold,
        max_image_pixels=config.max_image_pixels,
        max_image_bytes=config.max_image_bytes,
        shard_size=config.shard_size,
        limit=config.limit,
    )


def _refuse_output_in_input(input_uri: str, output_uri: str) -> None:
    inside, outside = (f"{open_store(uri).uri}/" for uri in (output_uri, input_uri))
    if not is_manifest(input_uri) and inside.startswith(outside):
        raise ConfigError(
            f"Expected OUTPUT outside of INPUT. Received: {output_uri} inside {input_uri}, where the next run would "
            "take results for images. Next: choose another OUTPUT."
        )


def _listing(config: ScoreConfig) -> Iterator[pa.Table]:
    uri = fill_date(config.input_uri, config.date)
    found = False
    for table in list_inputs(uri, config.uri_column):
        found = found or table.num_rows > 0
        yield table
    if not found:
        raise DataError(f"Expected images in {uri}. Received: none. Next: check INPUT (and --date).")


def _tee_sizes(listing: Iterator[pa.Table], sizes: list[int]) -> Iterator[pa.Table]:
    for table in listing:
        sizes.append(sum(table["size_bytes"].to_pylist()))
        yield table


def _plan(config: ScoreConfig, partition: Partition, frozen: Frozen) -> Plan:
    """The plan to work on: the one that is there, or a new one; whoever was first decides."""
    plan = partition.read_plan(GENERATION)
    if plan is None:
        plan = partition.write_plan(make_plan(_listing(config), frozen, partition.store.put_if_absent, GENERATION))
    refuse_other_settings(plan.frozen, frozen, partition.uri)
    return plan


@dataclass(frozen=True)
class _Attempt:
    started_at: str
    resumed_rows: int
    images_per_s: float


def _score_pending(
    config: ScoreConfig,
    artifact: Artifact,
    partition: Partition,
    plan: Plan,
    on_progress: Callable[[Progress], None] | None,
) -> tuple[list[PartRecord], _Attempt]:
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    present = set(partition.committed_names())
    pending = pending_shards(plan, present)
    owed = {shard.index for shard in pending}
    records = [
        partition.recover_part(shard, positive_index(artifact), quarantine_present=shard.quarantine_name in present)
        for shard in shards_of(plan)
        if shard.index not in owed
    ]
    resumed_rows = sum(record.rows for record in records)
    if not pending:
        return records, _Attempt(started_at, resumed_rows, 0.0)
    uri = fill_date(config.input_uri, config.date)
    context = StageContext(
        partition_uri=partition.uri,
        input_root=open_store(split_uri(uri)[0] if is_manifest(uri) else uri).uri,
        plan=plan,
        artifact=artifact,
        fetch_concurrency=config.fetch_concurrency or (S3_FETCHES if uri.startswith("s3://") else cpu_count()),
        num_decoders=1 if wants_ray(config) else cpu_count(),  # a Ray task that reads has one CPU
        batch_size=config.batch_size,
    )
    run = run_ray if wants_ray(config) else run_local
    start, rows, rate = time.monotonic(), resumed_rows, 0.0
    for record in run(context, pending, config):
        records.append(record)
        rows += record.rows
        rate = (rows - resumed_rows) / (time.monotonic() - start)
        if on_progress is not None:
            on_progress(Progress(rows, plan.planned_rows, sum(r.tally.quarantined for r in records), rate))
    return records, _Attempt(started_at, resumed_rows, rate)


def wants_ray(config: ScoreConfig) -> bool:
    """Whether the run goes through Ray: asked for, or RAY_ADDRESS names a cluster."""
    return config.runner == "ray" or (config.runner == "auto" and bool(os.environ.get("RAY_ADDRESS")))


def _manifest(
    config: ScoreConfig, artifact: Artifact, plan: Plan, records: list[PartRecord], started_at: str
) -> Manifest:
    """The manifest of a run all of whose shards are committed.

    Raises:
        PlanError: the parts do not add up to the plan.
    """
    records = sorted(records, key=lambda record: record.part.name)
    total = functools.reduce(Tally.plus, (record.tally for record in records), Tally())
    scored, quarantined = total.scored, total.quarantined
    if scored + quarantined != plan.planned_rows:
        raise PlanError(
            f"Expected {plan.planned_rows} planned rows. Received: {scored} scored and {quarantined} quarantined. "
            "Next: report this as a bug; no manifest was written."
        )
    over = quarantined > config.max_quarantine_rate * plan.planned_rows
    return Manifest(
        format=FORMAT,
        generation=plan.generation,
        status="quarantine_limit" if over else "complete",
        planned=plan.planned_rows,
        scored=scored,
        quarantined=quarantined,
        flagged=total.flagged,
        labels=total.labels,
        codes=total.codes,
        parts=tuple(record.part for record in records),
        quarantine=tuple(record.quarantine for record in records if record.quarantine is not None),
        superseded_uris=(),
        model=artifact.name,
        version=artifact.version,
        model_digest=artifact.digest,
        engine=plan.frozen.engine,
        precision=plan.frozen.precision,
        runner="ray" if wants_ray(config) else "local",
        config=config.model_dump(mode="json"),
        libraries={"cnn_ray": cnn_ray.__version__, "pyarrow": pa.__version__, "pillow": installed("pillow")},
        started_at=started_at,
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _finished_before(config: ScoreConfig, partition: Partition, frozen: Frozen, manifest: Manifest) -> ScoreResult:
    plan = partition.read_plan(GENERATION)
    if plan is None:
        raise PlanError(f"Expected a plan beside the manifest in {partition.uri}. Received: none. Next: restore it.")
    refuse_other_settings(plan.frozen, frozen, partition.uri)
    _refuse_quarantine(manifest, partition.uri)
    return ScoreResult(partition.uri, manifest, True, manifest.planned, _unplanned(config, partition, plan), 0.0)


def _unplanned(config: ScoreConfig, partition: Partition, plan: Plan) -> int:
    """Objects of the input that the finished run does not hold as they are now."""
    if config.limit is not None:
        return 0
    known: set[tuple[str, str]] = set()
    for page in plan.pages:
        rows = page_rows(partition.store.get(page.name))
        known.update(zip(rows["uri"].to_pylist(), rows["etag"].to_pylist(), strict=True))
    try:
        return sum(
            (uri, etag) not in known
            for table in list_inputs(fill_date(config.input_uri, config.date), config.uri_column)
            for uri, etag in zip(table["uri"].to_pylist(), table["etag"].to_pylist(), strict=True)
        )
    except NotFoundError:  # the input may be gone; the results are still there
        return 0


def _refuse_quarantine(manifest: Manifest, uri: str) -> None:
    if manifest.status == "quarantine_limit":
        codes = ", ".join(f"{count} {code}" for code, count in manifest.codes.items())
        limit = manifest.config["max_quarantine_rate"]
        raise QuarantineLimitError(
            f"Expected at most {limit:.1%} unreadable images. Received: {manifest.quarantined} of {manifest.planned} "
            f"({codes}). Next: look at the quarantine files in {uri}; readers refuse this run."
        )
