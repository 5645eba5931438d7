"""The stages over shards in this process: threads for storage, decoder processes, one predictor. The oracle of the Ray
runner: equal bytes, by test."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cnn_ray.config import ScoreConfig
from cnn_ray.manifests import PartRecord
from cnn_ray.plan import Shard
from cnn_ray.predictor import Predictor, load_predictor
from cnn_ray.reader import close_decoders
from cnn_ray.stages import (
    DecodedShard,
    StageContext,
    TimedPredictor,
    cancel_fetches,
    commit_shard,
    fetch_decode,
    start_decoders,
)

SHARDS_AHEAD = 2
"""Shards that may be decoded before the predictor takes them, so that it never waits."""
LARGE_SHARD_BYTES = 64 * 1024**2
"""From this many bytes of pixels on, only one shard is decoded ahead: no core is idle while one of the two works."""


def run_local(context: StageContext, shards: Sequence[Shard], config: ScoreConfig) -> Iterator[PartRecord]:
    """Records of the shards in order, each yielded after it was committed.

    Decoding of the next shards, prediction, and the write of the last one overlap.
    """
    start_decoders(context)  # they import while the predictor loads
    readers = ThreadPoolExecutor(SHARDS_AHEAD, thread_name_prefix="shard")
    writer = ThreadPoolExecutor(1, thread_name_prefix="commit")
    waiting: list[Future[DecodedShard]] = []
    committing: list[Future[PartRecord]] = []
    remaining = iter(shards)
    ahead = SHARDS_AHEAD

    def read_ahead() -> None:
        while len(waiting) < ahead and (shard := next(remaining, None)) is not None:
            waiting.append(readers.submit(fetch_decode, context, shard))

    try:
        read_ahead()
        predictor = TimedPredictor(load_stage_predictor(context, config), context.batch_size)
        while waiting:
            decoded = waiting.pop(0).result()
            ahead = 1 if decoded.pixels.nbytes > LARGE_SHARD_BYTES else SHARDS_AHEAD
            read_ahead()
            scores, wait_s, busy_s = predictor.predict(decoded.pixels)
            committing.append(writer.submit(_commit_timed, context, decoded.without_pixels(), scores, wait_s, busy_s))
            del decoded
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
        close_decoders()


def load_stage_predictor(context: StageContext, config: ScoreConfig) -> Predictor:
    """The predictor that the plan asks for.

    Raises:
        ArtifactError: damaged files, or this node lacks the engine or precision.
    """
    frozen = context.plan.frozen
    return load_predictor(
        context.artifact,
        engine=frozen.engine,
        precision=frozen.precision,
        num_threads=config.num_threads,
        use_gpu=config.num_gpus > 0,
    )


def _commit_timed(
    context: StageContext, decoded: DecodedShard, scores: NDArray[np.float32], wait_s: float, busy_s: float
) -> PartRecord:
    return commit_shard(context, decoded, scores).model_copy(update={"wait_s": wait_s, "busy_s": busy_s})
