"""Two ways to run the stages over shards: a loop with threads in this process, or Ray Data. Equal results, by test.

On Ray one row is one shard all the way: rows never split, so part names stay deterministic, and 2 cores reach the rate
of the same threads in one plain process, where one row per image reached 0.55 of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from cnn_ray.config import ScoreConfig
from cnn_ray.errors import CnnRayError
from cnn_ray.outputs import PartRecord
from cnn_ray.plan import Shard
from cnn_ray.predictor import cpu_count, load_predictor
from cnn_ray.ray_session import connected
from cnn_ray.records import QuarantineCode, RowFailure
from cnn_ray.stages import DecodedShard, StageContext, cancel_fetches, commit_shard, fetch_decode, predict_shard

SHARDS_AHEAD = 2
"""Shards that may be decoded before the predictor takes them: enough to never wait, little enough to stay in memory."""
WAIT_FOR_NODES_S = 24 * 3600
"""Ray Data gives up after half an hour without progress; waiting for a GPU node through a night is no failure."""


def run_local(context: StageContext, shards: Sequence[Shard], config: ScoreConfig) -> Iterator[PartRecord]:
    """Records of the shards in order, each yielded after it was committed.

    Decoding of the next shards, prediction, and the write of the last one overlap.
    """
    frozen = context.plan.frozen
    readers = ThreadPoolExecutor(SHARDS_AHEAD, thread_name_prefix="shard")
    writer = ThreadPoolExecutor(1, thread_name_prefix="commit")
    waiting: list[Future[DecodedShard]] = []
    committing: list[Future[PartRecord]] = []
    remaining = iter(shards)

    def read_ahead() -> None:
        while len(waiting) < SHARDS_AHEAD and (shard := next(remaining, None)) is not None:
            waiting.append(readers.submit(fetch_decode, context, shard))

    try:
        read_ahead()  # decoding starts while the predictor loads
        predictor = load_predictor(
            context.artifact, engine=frozen.engine, precision=frozen.precision, num_threads=config.num_threads
        )
        while waiting:
            decoded = waiting.pop(0).result()
            read_ahead()
            scores = predict_shard(context, predictor, decoded)
            committing.append(writer.submit(commit_shard, context, decoded, scores))
            while committing and (len(committing) > 1 or committing[0].done()):
                yield committing.pop(0).result()
        for future in committing:
            yield future.result()
    except BaseException:
        cancel_fetches()
        raise
    finally:
        readers.shutdown(wait=True, cancel_futures=True)
        writer.shutdown(wait=True)


def run_ray(context: StageContext, shards: Sequence[Shard], config: ScoreConfig) -> Iterator[PartRecord]:
    """Records of the shards in the order they are committed, computed by Ray Data over the cluster.

    Raises:
        CnnRayError: the error of the stage that failed, as it was raised there.
    """
    import ray
    from ray.data import ActorPoolStrategy
    from ray.exceptions import RayError

    # One logical CPU more than cores: the stage that waits for storage must not keep the predictor from starting.
    with connected(num_cpus=max(cpu_count(), 2) + 1):
        _configure_ray_data(ray)
        rows = [{"index": shard.index, "page": shard.page} for shard in shards]
        dataset = (
            ray.data.from_items(rows, override_num_blocks=len(rows))
            .map(_ReadStage(context), num_cpus=1)
            .map(
                _PredictStage,  # pyright: ignore[reportArgumentType]  # Ray makes one for each actor
                fn_constructor_args=(context, config.num_threads),
                compute=ActorPoolStrategy(size=config.num_predict_actors),
                num_cpus=0.5,
                num_gpus=config.num_gpus or None,
            )
            .map(_CommitStage(context), num_cpus=0.25)
        )
        try:
            for row in dataset.iter_rows():
                yield PartRecord.model_validate_json(row["record"])
        except RayError as error:
            raise unwrap(error) from None


def unwrap(error: BaseException) -> BaseException:
    """The error of ours inside Ray's wrapping, or the wrapping itself where there is none."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, CnnRayError):
            # Ray mixes its own class in; users and exit codes want the plain one
            kind = next(k for k in type(seen).__mro__ if k.__module__ == CnnRayError.__module__)
            plain = getattr(seen, "cause", seen)
            return kind(str(plain))
        seen = getattr(seen, "cause", None) or seen.__cause__
    return error


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
        decoded = fetch_decode(context, Shard(context.plan.generation, int(row["index"]), str(row["page"])))
        return {
            "index": decoded.shard.index,
            "page": decoded.shard.page,
            "pixels": decoded.pixels,
            "position": decoded.position,
            "size_px": decoded.size_px,
            "failures": [{"row": k, "code": str(f.code), "detail": f.detail} for k, f in decoded.failures.items()],
        }


class _PredictStage:
    def __init__(self, context: StageContext, num_threads: int) -> None:
        frozen = context.plan.frozen
        self._batch_size = context.batch_size
        self._failure: CnnRayError | None = None
        try:
            self._predictor = load_predictor(
                context.artifact, engine=frozen.engine, precision=frozen.precision, num_threads=num_threads
            )
        except CnnRayError as error:  # Ray keeps only the text of what a constructor raises, and tries it again
            self._failure = error

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        if self._failure is not None:
            raise self._failure
        scores = self._predictor.predict_in_batches(np.ascontiguousarray(row.pop("pixels")), self._batch_size)
        return {**row, "scores": scores}


class _CommitStage:
    def __init__(self, context: StageContext) -> None:
        self._context = context

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        context = self._context
        decoded = DecodedShard(
            shard=Shard(context.plan.generation, int(row["index"]), str(row["page"])),
            pixels=np.empty((0,), np.uint8),
            position=np.asarray(row["position"], np.int32),
            size_px=np.asarray(row["size_px"], np.int32).reshape(-1, 2),
            failures={f["row"]: RowFailure(QuarantineCode(f["code"]), f["detail"]) for f in row["failures"]},
        )
        record = commit_shard(context, decoded, np.asarray(row["scores"], np.float32))
        return {"record": record.model_dump_json()}
