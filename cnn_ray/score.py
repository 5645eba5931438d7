"""One scoring run: plan -> stages over the shards that are not committed yet -> manifest.

Run it again after anything: an open generation is finished first, committed parts are never fetched again, then what is
new or changed in the input is the next generation; where nothing is, the run is a no-op that writes nothing.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version as installed

import pyarrow as pa
import pyarrow.parquet as pq

import cnn_ray
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import PlanError
from cnn_ray.generations import Changes, Superseded, supersede
from cnn_ray.lease import Lease
from cnn_ray.manifest_files import is_manifest
from cnn_ray.manifests import FORMAT, FileRef, GenerationRecord, Manifest, PartRecord
from cnn_ray.partitions import fill_date
from cnn_ray.plan import Plan, Shard, refuse_other_settings, shards_of
from cnn_ray.planning import ScoreJob, job_of, owed_by
from cnn_ray.predictor import cpu_count
from cnn_ray.quarantine_limit import refuse_over_limit
from cnn_ray.ray_runner import run_ray
from cnn_ray.redaction import redacted
from cnn_ray.runners import run_local
from cnn_ray.stages import StageContext, positive_index
from cnn_ray.storage import open_store, split_uri
from cnn_ray.storage_options import storage_options, use_storage_options
from cnn_ray.tallies import Tally, Timeline

S3_FETCHES = 32
"""GETs in flight where each one waits for a network."""
RECOVERY_THREADS = 8


@dataclass(frozen=True)
class Progress:
    """How far a generation is. Rows count those committed by earlier attempts too."""

    rows: int
    planned: int
    quarantined: int
    images_per_s: float


@dataclass(frozen=True)
class Attempt:
    """What this run did for a generation: `timeline` holds (seconds since the start, rows so far); predictors waited
    `wait_s` seconds and worked `busy_s`."""

    started_at: str = ""
    resumed_rows: int = 0
    images_per_s: float = 0.0
    wait_s: float = 0.0
    busy_s: float = 0.0
    timeline: tuple[tuple[float, int], ...] = ()

    @property
    def wait_share(self) -> float | None:
        """Share of the predictors' time that they waited for images, None where nothing was predicted."""
        total = self.wait_s + self.busy_s
        return self.wait_s / total if total else None


@dataclass(frozen=True)
class ScoreResult:
    """A finished run: its manifest, how the input differed from an earlier one, and what this attempt did."""

    partition_uri: str
    manifest: Manifest
    already_done: bool
    changes: Changes
    attempt: Attempt
    report_uri: str | None = None

    @property
    def resumed_rows(self) -> int:
        """Rows that an earlier attempt had committed."""
        return self.attempt.resumed_rows

    @property
    def images_per_s(self) -> float:
        """Rows of this attempt per second, start-up included."""
        return self.attempt.images_per_s


@dataclass(frozen=True)
class DryRun:
    """What a run would do: nothing was written. `resumes` says that the generation is open and would be finished."""

    partition_uri: str
    generation: int
    resumes: bool
    rows: int
    bytes: int
    shards: int
    engine: str
    precision: str
    changes: Changes
    left_out: Mapping[str, int]


def run_score(config: ScoreConfig, on_progress: Callable[[Progress], None] | None = None) -> ScoreResult:
    """The finished run of the configuration; where nothing is owed, the one that is there.

    A run that finishes an open generation looks at the input afterwards, so that one command always ends up to date.

    Raises:
        ConfigError: the output holds a run with other settings, or a full run where --limit is given.
        DataError: no images in the input.
        BusyError: another run holds the partition.
        QuarantineLimitError: too many rows could not be scored; the manifest is written with that status.
    """
    use_storage_options(config)
    job = job_of(config)
    manifest = job.partition.newest_manifest()
    owed = None if manifest is None else owed_by(job, manifest, job.partition.store.put_if_absent)
    if manifest is not None and owed is not None and owed.plan is None:  # before the lease: a no-op writes nothing
        refuse_over_limit(job.partition, manifest)
        return ScoreResult(job.partition.uri, manifest, True, owed.changes, Attempt())
    job.partition.store.check_writable()
    job.partition.store.check_conditional_writes()
    with Lease(job.partition.store, config.lease_s):
        owed = owed or owed_by(job, None, job.partition.store.put_if_absent)
        result: ScoreResult | None = None
        while owed.plan is not None:
            result, plan = _run_generation(job, owed.plan, owed.changes, on_progress)
            result = _reported(job, result)
            refuse_over_limit(job.partition, result.manifest)
            if not owed.resumes:
                break
            owed = owed_by(job, result.manifest, job.partition.store.put_if_absent, retried=plan.retry)
    if result is None:
        raise PlanError(f"Expected a plan in {job.partition.uri}. Received: none. Next: report this as a bug.")
    return result


def dry_run(config: ScoreConfig) -> DryRun:
    """What `run_score` would do, found without writing anything: the model and the input are really looked at."""
    use_storage_options(config)
    job = job_of(config)
    manifest = job.partition.newest_manifest()
    sizes: list[int] = []
    owed = owed_by(job, manifest, lambda _name, raw: sizes.append(_page_size_bytes(raw)))
    plan = owed.plan
    generation = (0 if manifest is None else manifest.generation) + (plan is not None)
    if plan is not None and owed.resumes:
        sizes += [_page_size_bytes(job.partition.store.get(page.name)) for page in plan.pages]
    rows, shards = (0, 0) if plan is None else (plan.planned_rows, plan.shards)
    frozen = job.frozen
    return DryRun(
        job.partition.uri,
        generation,
        owed.resumes,
        rows,
        sum(sizes),
        shards,
        frozen.engine,
        frozen.precision,
        owed.changes,
        owed.left_out,
    )


def _page_size_bytes(raw: bytes) -> int:
    return int(pq.read_table(io.BytesIO(raw), columns=["size_bytes"])["size_bytes"].to_numpy().sum())


def _run_generation(
    job: ScoreJob, plan: Plan, changes: Changes, on_progress: Callable[[Progress], None] | None
) -> tuple[ScoreResult, Plan]:
    """The finished generation, and the plan that it had: ours, or the one of a planner that was faster."""
    plan = job.partition.write_plan(plan)
    refuse_other_settings(plan.frozen, job.frozen, job.partition.uri)
    before = job.partition.read_manifest(plan.generation - 1) if plan.generation > 1 else None
    totals = _Totals()
    attempt = _score_pending(job, plan, totals, on_progress)
    if totals.tally.rows != plan.planned_rows:
        raise PlanError(
            f"Expected {plan.planned_rows} planned rows. Received: {totals.tally.scored} scored and "
            f"{totals.tally.quarantined} quarantined. Next: report this as a bug; no manifest was written."
        )
    gone = Superseded() if before is None else supersede(job.partition, plan, before)
    manifest = job.partition.write_manifest(_manifest(job, plan, totals, attempt, before, gone))
    return ScoreResult(job.partition.uri, manifest, False, changes, attempt), plan


class _Totals:
    """What the committed shards of a generation add up to: memory grows by one file name a shard, not by rows."""

    def __init__(self) -> None:
        self.tally = Tally()
        self.parts: list[FileRef] = []
        self.quarantine: list[FileRef] = []
        self.wait_s = self.busy_s = 0.0

    def add(self, record: PartRecord) -> None:
        """Afterwards the shard is counted."""
        self.tally = self.tally.plus(record.tally)
        self.parts.append(record.part)
        if record.quarantine is not None:
            self.quarantine.append(record.quarantine)
        self.wait_s += record.wait_s or 0.0
        self.busy_s += record.busy_s or 0.0


def _score_pending(
    job: ScoreJob, plan: Plan, totals: _Totals, on_progress: Callable[[Progress], None] | None
) -> Attempt:
    started_at = datetime.now(UTC).isoformat(timespec="seconds")
    pending = _recover(job, plan, totals)
    resumed_rows = totals.tally.rows
    if not pending:
        return Attempt(started_at, resumed_rows)
    config = job.config
    run = run_ray if wants_ray(config) else run_local
    start, rate, timeline = time.monotonic(), 0.0, Timeline()
    if on_progress is not None:  # what was there before is no progress of this run
        on_progress(Progress(resumed_rows, plan.planned_rows, totals.tally.quarantined, 0.0))
    for record in run(_stage_context(job, plan), pending, config):
        totals.add(record)
        seconds = time.monotonic() - start
        rate = (totals.tally.rows - resumed_rows) / seconds
        timeline.add(seconds, totals.tally.rows - resumed_rows)
        if on_progress is not None:
            on_progress(Progress(totals.tally.rows, plan.planned_rows, totals.tally.quarantined, rate))
    return Attempt(started_at, resumed_rows, rate, totals.wait_s, totals.busy_s, timeline.points)


def _reported(job: ScoreJob, result: ScoreResult) -> ScoreResult:
    """The result with the location of its report, which was written now; unchanged where none is wanted or possible."""
    if not job.config.report:
        return result
    from cnn_ray.report import REPORT, write_report  # not before the first images are scored

    resumed = result.resumed_rows
    written = write_report(
        job.partition,
        result.manifest,
        timeline=[(0.0, resumed), *((seconds, resumed + rows) for seconds, rows in result.attempt.timeline)],
        wait_share=result.attempt.wait_share,
        config=job.config,
        artifact=job.artifact,
    )
    return replace(result, report_uri=job.partition.store.uri_of(REPORT)) if written else result


def _recover(job: ScoreJob, plan: Plan, totals: _Totals) -> list[Shard]:
    """The shards that are not committed; those that are have been read back into the totals."""
    present = set(job.partition.committed_names(plan.generation))
    positive = positive_index(job.artifact)
    shards = shards_of(plan)
    with ThreadPoolExecutor(RECOVERY_THREADS, thread_name_prefix="recover") as pool:
        committed = [shard for shard in shards if shard.part_name in present]
        for record in pool.map(
            lambda shard: job.partition.recover_part(
                shard, positive, quarantine_present=shard.quarantine_name in present
            ),
            committed,
        ):
            totals.add(record)
    return [shard for shard in shards if shard.part_name not in present]


def _stage_context(job: ScoreJob, plan: Plan) -> StageContext:
    config = job.config
    uri = fill_date(config.input_uri, config.date)
    return StageContext(
        partition_uri=job.partition.uri,
        input_root=open_store(split_uri(uri)[0] if is_manifest(uri) else uri).uri,
        plan=plan,
        artifact=job.artifact,
        fetch_concurrency=config.fetch_concurrency or (S3_FETCHES if uri.startswith("s3://") else cpu_count()),
        num_decoders=1 if wants_ray(config) else cpu_count(),  # a Ray task that reads has one CPU
        batch_size=config.batch_size,
        run_date=config.date,
        storage=storage_options(),
    )


def wants_ray(config: ScoreConfig) -> bool:
    """Whether the run goes through Ray: asked for, or RAY_ADDRESS names a cluster."""
    return config.runner == "ray" or (config.runner == "auto" and bool(os.environ.get("RAY_ADDRESS")))


def _manifest(
    job: ScoreJob, plan: Plan, totals: _Totals, attempt: Attempt, before: Manifest | None, gone: Superseded
) -> Manifest:
    """The manifest of a generation all of whose shards are committed: live totals, after those of the one before."""
    config, artifact = job.config, job.artifact
    earlier = Tally() if before is None else before.tally.without(gone.tally, gone.shown)
    live = earlier.plus(totals.tally)
    accept = config.accept or plan.accept
    accepted = live.quarantined if accept else min(0 if before is None else before.accepted, live.quarantined)
    over = live.quarantined - accepted > config.max_quarantine_rate * live.rows
    finished_at = datetime.now(UTC).isoformat(timespec="seconds")
    done = GenerationRecord(
        generation=plan.generation,
        planned=plan.planned_rows,
        scored=totals.tally.scored,
        quarantined=totals.tally.quarantined,
        superseded=gone.rows,
        removed=plan.removed,
        retry=plan.retry,
        parts=len(totals.parts),
        started_at=attempt.started_at,
        finished_at=finished_at,
        images_per_s=round(attempt.images_per_s, 3),
        wait_s=round(attempt.wait_s, 3),
        busy_s=round(attempt.busy_s, 3),
    )
    return Manifest(
        format=FORMAT,
        generation=plan.generation,
        status="quarantine_limit" if over else "complete",
        planned=live.rows,
        **{name: getattr(live, name) for name in Tally.model_fields},
        removed=plan.removed,
        accepted=accepted,
        left_out=plan.left_out,
        parts=(*(() if before is None else before.parts), *_by_name(totals.parts)),
        quarantine=(*(() if before is None else before.quarantine), *_by_name(totals.quarantine)),
        superseded=(*(() if before is None else before.superseded), *gone.files),
        generations=(*(() if before is None else before.generations), done),
        model=artifact.name,
        version=artifact.version,
        model_digest=artifact.digest,
        label_names=tuple(artifact.labels),
        positive_label=artifact.positive_label,
        threshold=plan.frozen.threshold,
        engine=plan.frozen.engine,
        precision=plan.frozen.precision,
        runner="ray" if wants_ray(config) else "local",
        config=redacted(config.model_dump(mode="json")),
        libraries={"cnn_ray": cnn_ray.__version__, "pyarrow": pa.__version__, "pillow": installed("pillow")},
        started_at=attempt.started_at,
        finished_at=finished_at,
    )


def _by_name(files: list[FileRef]) -> list[FileRef]:
    return sorted(files, key=lambda ref: ref.name)
