"""What one Ray Train worker does: load its share, train with the others, and on rank 0 publish the model.

Everything it needs comes in a `TrainJob`. The model is published from here, not from the driver: TensorFlow is loaded
and the weights are at hand, and the driver saves 5 s of imports.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_ray.artifact import sha256_of
from cnn_ray.batches import Batches, DecodedPixels, make_batches
from cnn_ray.config import ModelDefinition, TrainConfig
from cnn_ray.dataset import LabelledSet, share_of_rank
from cnn_ray.errors import CnnRayError, DataError
from cnn_ray.guards import Finding, check_model, raise_errors
from cnn_ray.losses import class_weights, image_losses
from cnn_ray.redaction import redacted
from cnn_ray.storage import open_store
from cnn_ray.storage_options import use_storage_options

if TYPE_CHECKING:
    import keras

    from cnn_ray.collectives import World
    from cnn_ray.train_loop import Objective, Phase, SaveState, View

log = logging.getLogger(__name__)

SAMPLE_IMAGES = 64
"""Training images that the guards look at."""
EXPORT_IMAGES = 512
"""Validation images that the engines are compared on at export."""
SPLIT = "_split.parquet"
"""The split as a manifest, in the run's folder."""


@dataclass(frozen=True)
class TrainJob:
    """What every worker is given; locations are absolute, because Ray changes a worker's folder."""

    config: TrainConfig
    labelled: LabelledSet
    run_uri: str
    findings: tuple[Finding, ...] = ()
    """What the guards saw before Ray started."""


@dataclass(frozen=True)
class WorkerOutcome:
    """What rank 0 hands back: a published model, or the error that no restart would mend."""

    reference: str = ""
    artifact_uri: str = ""
    metrics: dict[str, Any] | None = None
    error: CnnRayError | None = None


def run_worker(settings: dict[str, TrainJob]) -> WorkerOutcome | None:
    """The outcome on rank 0, None on the others; Ray Train calls it in every worker with {"job": the job}.

    An error that a restart may mend is raised, and Ray restarts the group from the last checkpoint. The others are
    returned, or Ray would run into them `max_failures` times more.
    """
    use_storage_options(settings["job"].config)
    try:
        return _train_and_publish(settings["job"])
    except CnnRayError as error:
        if error.retryable or not (error.agreed or _is_rank_0()):
            raise  # the others wait for this rank: only a failure of it ends them
        return WorkerOutcome(error=error)


def _is_rank_0() -> bool:
    import ray.train

    return ray.train.get_context().get_world_rank() == 0


def _train_and_publish(job: TrainJob) -> WorkerOutcome | None:
    import ray.train

    context = ray.train.get_context()
    # Images are decoded while TensorFlow is imported: 5 s that would be waited twice otherwise.
    data = _Data.begin(job, context.get_world_rank(), context.get_world_size(), context.get_local_world_size())
    try:
        world = _join_world(job.config, context.get_local_world_size())
        model, told = _agree_on_model(job, world, data)
        history = _train(job, world, model, data, told["findings"])
        return _publish(job, model, data, history, told) if world.rank == 0 else None
    finally:
        data.close()


@dataclass(frozen=True)
class _Data:
    """This rank's images of both sides, being decoded."""

    sources: dict[str, DecodedPixels] = field(repr=False)
    batches: dict[str, Batches] = field(repr=False)

    @staticmethod
    def begin(job: TrainJob, rank: int, ranks: int, ranks_here: int) -> _Data:
        from cnn_ray.model import input_size_px

        config, labelled = job.config, job.labelled
        size_px = input_size_px(config.model)
        num_decoders = max(1, len(os.sched_getaffinity(0)) // ranks_here)  # the workers of a machine share its cores
        sources: dict[str, DecodedPixels] = {}
        batches: dict[str, Batches] = {}
        rest = config.cache_bytes
        for split in ("train", "validation"):
            share = share_of_rank(labelled, split, rank, ranks, config.batch_size, config.seed)
            uris = [labelled.uris[row] for row in share.rows]
            sources[split] = DecodedPixels(
                labelled.root_uri, uris, size_px, cache_bytes=rest, num_decoders=num_decoders
            )
            rest -= min(rest, len(uris) * size_px[0] * size_px[1] * 3)
            batches[split] = make_batches(
                sources[split], labelled.label_ids[share.rows], share.strata, config.batch_size, ranks
            )
        return _Data(sources, batches)

    def unreadable(self) -> tuple[int, int]:
        return sum(s.unreadable for s in self.sources.values()), sum(len(b.label_ids) for b in self.batches.values())

    def wait(self) -> None:
        for source in self.sources.values():
            source.wait()

    def close(self) -> None:
        for source in self.sources.values():
            source.close()


def _agree_on_model(job: TrainJob, world: World, data: _Data) -> tuple[keras.Model, dict[str, Any]]:
    """The model with start weights on every rank, and what to record of it; one rank's error is raised by all."""
    from cnn_ray.model import build_classifier, fetch_weights

    config, classes = job.config, len(job.labelled.labels)
    error, weights_path = None, None
    try:
        weights_path = fetch_weights(config.model)
        if config.model.weights == "imagenet":
            build_classifier(config.model, classes)  # downloads into Keras's cache
        data.wait()
    except CnnRayError as caught:
        error = caught
    world.agree(error)
    unreadable, images = world.sum(np.array(data.unreadable()))
    if unreadable > config.data.max_unreadable_rate * images:
        error = DataError(
            f"Expected the images of {config.data.uri} to stay readable. Received: {unreadable:.0f} of {images:.0f} "
            "that could be read before cannot be read now. Next: look whether they were changed, and run again."
        )
    world.agree(error)
    with world.strategy.scope(), world.explained():
        model = build_classifier(config.model, classes, seed=config.seed, weights_path=weights_path)
    findings: list[Finding] = []
    try:
        if world.rank == 0:
            source = data.sources["train"]
            sample, readable = source.take(np.arange(min(SAMPLE_IMAGES, len(data.batches["train"].label_ids))))
            findings = check_model(config, job.labelled, model, sample[readable])
            raise_errors(findings, config.allow)
    except CnnRayError as caught:
        error = caught
    world.agree(error)
    digest = sha256_of(weights_path) if weights_path is not None and world.rank == 0 else None
    told = [asdict(finding) for finding in (*job.findings, *findings)]
    return model, {"findings": told, "weights_sha256": digest, "split_uri": f"{job.run_uri}/{SPLIT}"}


def _join_world(config: TrainConfig, workers_here: int) -> World:
    """The world of all workers. Settings of TensorFlow that must come before its first operation are made here."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import keras
    import tensorflow as tf

    from cnn_ray.collectives import World

    cores = max(1, len(os.sched_getaffinity(0)) // workers_here)
    tf.config.threading.set_intra_op_parallelism_threads(cores)
    for device in tf.config.list_physical_devices("GPU"):
        tf.config.experimental.set_memory_growth(device, True)
    keras.config.set_dtype_policy(config.precision)
    return World(config.collective_timeout_s)


def _phases(config: TrainConfig, model: keras.Model, data: _Data) -> list[Phase]:
    from cnn_ray.model import freeze_backbone, train_from_scratch, unfreeze_backbone
    from cnn_ray.train_loop import Phase

    def features() -> View:
        return _cached_view(config, model, data)

    if config.model.weights is None:
        first = Phase("train", config.train, train_from_scratch)
    else:
        first = Phase("train", config.train, freeze_backbone, features if config.cache_features else None)
    if config.fine_tune is None:
        return [first]
    return [first, Phase("fine_tune", config.fine_tune, unfreeze_backbone)]


def _cached_view(config: TrainConfig, model: keras.Model, data: _Data) -> View:
    from cnn_ray.feature_cache import cached, cut_at_features
    from cnn_ray.train_loop import View

    below, head = cut_at_features(model)
    augment = config.model.augmentation != "none"
    return View(
        head,
        cached(data.batches["train"], below, augment=augment),
        cached(data.batches["validation"], below, augment=False),
    )


def _objective(job: TrainJob) -> Objective:
    from cnn_ray.train_loop import Objective

    labelled = job.labelled
    classes = len(labelled.labels)
    weights = class_weights(job.config, labelled.label_ids[labelled.rows("train")], classes)
    return Objective(image_losses(job.config, classes), weights)


def _train(
    job: TrainJob, world: World, model: keras.Model, data: _Data, findings: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Logs of every epoch; each is reported with a checkpoint, the first one with what the guards saw."""
    import ray.train

    from cnn_ray.train_callbacks import fetch_log, shared_callbacks, upload, writing_callbacks
    from cnn_ray.train_loop import Trainer
    from cnn_ray.train_state import read_position

    config, store = job.config, open_store(job.run_uri)
    trainer = Trainer(
        world, model, data.batches["train"], data.batches["validation"], seed=config.seed, objective=_objective(job)
    )
    with tempfile.TemporaryDirectory(prefix="cnn_ray-logs-") as logs_folder, _last_checkpoint() as resumed:
        folder, sent = Path(logs_folder), {}
        writes = world.rank == 0 and bool(config.logs)
        if writes:
            fetch_log(store, folder, len(read_position(resumed).history) if resumed else 0)

        def callbacks(phase: str) -> list[Any]:
            settings = config.fine_tune if phase == "fine_tune" and config.fine_tune is not None else config.train
            return shared_callbacks(settings) + (writing_callbacks(config.logs, folder) if writes else [])

        def after_epoch(logs: dict[str, Any], save: SaveState) -> None:
            if world.rank != 0:
                ray.train.report(logs)
                return
            if writes:
                upload(store, folder, sent)
            if logs["epoch"] == 1 and findings:
                logs = {**logs, "findings": findings}
            with tempfile.TemporaryDirectory(prefix="cnn_ray-checkpoint-") as checkpoint:
                save(Path(checkpoint))
                ray.train.report(logs, checkpoint=ray.train.Checkpoint.from_directory(checkpoint))

        phases = _phases(config, model, data)
        return trainer.run(phases, callbacks=callbacks, after_epoch=after_epoch, resume_from=resumed)


@contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _publish(
    job: TrainJob, model: keras.Model, data: _Data, history: list[dict[str, Any]], told: dict[str, Any]
) -> WorkerOutcome:
    """The published model, rebuilt outside the strategy and in float32 so that the export sees plain variables."""
    import keras

    from cnn_ray.export import publish_artifact
    from cnn_ray.model import build_classifier
    from cnn_ray.train_loop import TIMINGS

    config, labelled, validation = job.config, job.labelled, data.batches["validation"]
    pixels, readable = validation.source.take(np.arange(min(EXPORT_IMAGES, len(validation.label_ids))))
    if not readable.any():
        raise DataError("Expected readable validation images. Received: none. Next: check the files of data.uri.")
    keras.config.set_dtype_policy("float32")
    plain = build_classifier(_without_weights(config.model), len(labelled.labels), seed=config.seed)
    plain.set_weights(model.get_weights())
    last = {name: value for name, value in published_epoch(config, history).items() if name not in TIMINGS}
    artifact = publish_artifact(
        plain,
        models_uri=config.models_uri,
        name=config.name,
        definition=config.model,
        labels=labelled.labels,
        positive_label=positive_label(config, labelled.labels),
        threshold=config.threshold,
        validation_pixels=pixels[readable],
        validation_labels=validation.label_ids[: len(pixels)][readable],
        training={
            "config": redacted(config.model_dump(mode="json")),
            "data_digest": labelled.digest(),
            "images": {split: len(labelled.rows(split)) for split in ("train", "validation", "test")},
            "left_out": asdict(labelled.left_out),
            "metrics": last,
            "history": history,
            "run_uri": job.run_uri,
            "parameters": plain.count_params(),
            **told,
        },
    )
    return WorkerOutcome(artifact.reference, artifact.uri, last)


def published_epoch(config: TrainConfig, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Logs of the epoch whose weights are published: the last one, or the best where EarlyStopping went back to it."""
    if not history:
        return {}
    last = history[-1]
    phase = config.fine_tune if last["phase"] == "fine_tune" and config.fine_tune is not None else config.train
    if phase.early_stopping is None:
        return last
    return min((logs for logs in history if logs["phase"] == last["phase"]), key=lambda logs: logs["val_loss"])


def _without_weights(definition: ModelDefinition) -> ModelDefinition:
    return definition.model_copy(update={"weights": None})


def positive_label(config: TrainConfig, labels: tuple[str, ...]) -> str | None:
    """The class that `flagged` is about: the configured one, else the last one of two, else none."""
    return config.positive_label or (labels[-1] if len(labels) == 2 else None)
