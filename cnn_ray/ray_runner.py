"""The stages over shards by Ray Data: fetch and decode in tasks on CPUs, predict in an actor pool, commit in tasks.

One row is one shard all the way: rows never split, so part names stay deterministic, and 2 cores reach the rate of the
same threads in one plain process, where one row per image reached 0.55 of it. Backpressure is Ray Data's own. A worker,
actor or node that dies costs the shards it worked on, which are computed again: a part is written once only.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from cnn_ray.config import ScoreConfig
from cnn_ray.errors import CnnRayError, UnavailableError
from cnn_ray.manifests import PartRecord
from cnn_ray.placement import Share, require_resources, watched_placement
from cnn_ray.plan import Shard
from cnn_ray.predictor import cpu_count
from cnn_ray.ray_session import connected
from cnn_ray.records import QuarantineCode, RowFailure
from cnn_ray.runners import load_stage_predictor
from cnn_ray.stages import NO_DIGEST, DecodedShard, StageContext, TimedPredictor, commit_shard, fetch_decode

WAIT_FOR_NODES_S = 24 * 3600
"""Ray Data gives up after half an hour without progress; waiting for a GPU node through a night is no failure."""
PREDICT_CPUS = 0.5
SHARDS_PER_ACTOR = 3
"""One computed, one on its way into the actor's memory, one waiting."""


def run_ray(context: StageContext, shards: Sequence[Shard], config: ScoreConfig) -> Iterator[PartRecord]:
    """Records of the shards in the order they are committed, computed by Ray Data over the cluster.

    Raises:
        ConfigError: the local Ray lacks the GPUs or CPUs for the predictors.
        CnnRayError: the error of the stage that failed, as it was raised there; UnavailableError where Ray lost more
            workers or nodes than it could replace.
    """
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError

    # One logical CPU more than cores: the stage that waits for storage must not keep the predictor from starting.
    with connected(num_cpus=max(cpu_count(), 2) + 1) as local:
        _configure_ray_data(ray)
        actors = config.num_predict_actors or _actors_of(ray, config.num_gpus)
        share = Share(PREDICT_CPUS, config.num_gpus, actors)
        if local:
            require_resources(share, "predictor")
        rows = [{"index": shard.index, "page": shard.page} for shard in shards]
        dataset = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(_ReadStage(context), num_cpus=1)
            .map(
                _PredictStage,  # pyright: ignore[reportArgumentType]  # Ray makes one for each actor
                fn_constructor_args=(context, config),
                compute=ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=SHARDS_PER_ACTOR),
                num_cpus=PREDICT_CPUS,
                num_gpus=config.num_gpus or None,
            )
            .map(_CommitStage(context), num_cpus=0.25)
        )
        try:
            with watched_placement(share, "predictor") as placed:
                for row in dataset.iter_rows():
                    placed.set()
                    yield PartRecord.model_validate_json(row["record"])
        except RayError as error:
            raise unwrap(error) from None


def unwrap(error: BaseException) -> BaseException:
    """The error of ours inside Ray's wrapping; UnavailableError for lost workers or nodes; or the wrapping itself."""
    from ray import exceptions

    lost = (
        exceptions.WorkerCrashedError,
        exceptions.RayActorError,
        exceptions.NodeDiedError,
        exceptions.ObjectLostError,
        exceptions.OutOfMemoryError,
        exceptions.RaySystemError,
        exceptions.LocalRayletDiedError,
        exceptions.ObjectStoreFullError,
    )
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CnnRayError):
            # Ray mixes its own class in; users and exit codes want the plain one
            kind = next(k for k in type(seen).__mro__ if k.__module__ == CnnRayError.__module__)
            plain = getattr(seen, "cause", seen)
            return kind(str(plain))
        if isinstance(seen, lost):
            first = str(seen).strip().partition("\n")[0][:200]
            return UnavailableError(
                f"Expected Ray's workers to live. Received: {type(seen).__name__}: {first} "
                "Next: run the same command again; what is committed is kept."
            )
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error


def _actors_of(ray: Any, num_gpus: float) -> int:
    """Predictors that the cluster has room for now: one for each GPU share, or one a node without GPUs."""
    if num_gpus > 0:
        return max(int(ray.cluster_resources().get("GPU", 0) / num_gpus), 1)
    return max(sum(bool(node["Alive"]) and node["Resources"].get("CPU", 0) > 0 for node in ray.nodes()), 1)


def _configure_ray_data(ray: Any) -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.raise_original_map_exception = True  # else only the text of our errors arrives
    context.execution_no_progress_timeout_s = WAIT_FOR_NODES_S
    logging.getLogger("ray.data").setLevel(logging.ERROR)


class _ReadStage:
    def __init__(self, context: StageContext) -> None:
        self._context = context

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        context = self._context
        context.use_storage()
        decoded = fetch_decode(context, Shard(context.plan.generation, int(row["index"]), str(row["page"])))
        return {
            "index": decoded.shard.index,
            "page": decoded.shard.page,
            "pixels": decoded.pixels,
            "position": decoded.position,
            "size_px": decoded.size_px,
            "sha256": decoded.sha256,
            "phash": decoded.phash,
            "failures": [{"row": k, "code": str(f.code), "detail": f.detail} for k, f in decoded.failures.items()],
        }


class _PredictStage:
    def __init__(self, context: StageContext, config: ScoreConfig) -> None:
        self._failure: CnnRayError | None = None
        context.use_storage()
        try:
            self._predictor = TimedPredictor(load_stage_predictor(context, config), context.batch_size)
        except CnnRayError as error:  # Ray keeps only the text of what a constructor raises, and tries it again
            self._failure = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure
        scores, wait_s, busy_s = self._predictor.predict(row.pop("pixels"))
        return {**row, "scores": scores, "wait_s": wait_s, "busy_s": busy_s}


class _CommitStage:
    def __init__(self, context: StageContext) -> None:
        self._context = context

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        context = self._context
        context.use_storage()
        decoded = DecodedShard(
            shard=Shard(context.plan.generation, int(row["index"]), str(row["page"])),
            pixels=np.empty((0,), np.uint8),
            position=np.asarray(row["position"], np.int32),
            size_px=np.asarray(row["size_px"], np.int32).reshape(-1, 2),
            sha256=np.asarray(row["sha256"], np.uint8).reshape(-1, len(NO_DIGEST)),
            phash=np.asarray(row["phash"], np.int64),
            failures={f["row"]: RowFailure(QuarantineCode(f["code"]), f["detail"]) for f in row["failures"]},
        )
        record = commit_shard(context, decoded, np.asarray(row["scores"], np.float32))
        record = record.model_copy(update={"wait_s": float(row["wait_s"]), "busy_s": float(row["busy_s"])})
        _Metrics.of_this_process().count(record)
        return {"record": record.model_dump_json()}


class _Metrics:
    """Prometheus metrics of Ray's own endpoint, one set a worker process."""

    _made: _Metrics | None = None

    def __init__(self) -> None:
        from ray.util.metrics import Counter

        self._scored = Counter("cnn_ray_rows_scored", "Images scored and committed.", ("label",))
        self._quarantined = Counter("cnn_ray_rows_quarantined", "Images set aside.", ("code",))
        self._flagged = Counter("cnn_ray_rows_flagged", "Images whose positive label reached the threshold.")
        self._seconds = Counter("cnn_ray_predictor_seconds", "What predictors did with their time.", ("state",))

    @classmethod
    def of_this_process(cls) -> _Metrics:
        if cls._made is None:
            cls._made = cls()
        return cls._made

    def count(self, record: PartRecord) -> None:
        for label, rows in record.tally.labels.items():
            self._scored.inc(rows, {"label": label})
        for code, rows in record.tally.codes.items():
            self._quarantined.inc(rows, {"code": code})
        if record.tally.flagged:
            self._flagged.inc(record.tally.flagged)
        for state, seconds in (("waiting", record.wait_s), ("working", record.busy_s)):
            if seconds:
                self._seconds.inc(seconds, {"state": state})
