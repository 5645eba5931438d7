"""What one Ray Train worker does: load its share, train with the others, and on rank 0 publish the model.

Everything it needs comes in a `TrainJob`. The model is published from here, not from the driver: TensorFlow is loaded
and the weights are at hand, and the driver saves 5 s of imports.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_ray.config import ModelDefinition, TrainConfig
from cnn_ray.dataset import LabelledSet, LoadedPixels, Share, load_pixels, share_of_rank
from cnn_ray.errors import CnnRayError

if TYPE_CHECKING:
    import keras

    from cnn_ray.collectives import World
    from cnn_ray.train_loop import Phase, SaveState

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainJob:
    """What every worker is given; locations are absolute, because Ray changes a worker's folder."""

    config: TrainConfig
    labelled: LabelledSet
    run_uri: str


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
    try:
        return _train_and_publish(settings["job"])
    except CnnRayError as error:
        if error.retryable:
            raise
        return WorkerOutcome(error=error)


def _train_and_publish(job: TrainJob) -> WorkerOutcome | None:
    import ray.train

    from cnn_ray.model import build_classifier, fetch_weights, input_size_px

    config, labelled, context = job.config, job.labelled, ray.train.get_context()
    size_px = input_size_px(config.model)
    shares = {
        split: share_of_rank(
            labelled, split, context.get_world_rank(), context.get_world_size(), config.batch_size, config.seed
        )
        for split in ("train", "validation")
    }
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cnn_ray-train-")))
        pool = stack.enter_context(ThreadPoolExecutor(1))
        # Images are decoded while TensorFlow is imported: 5 s that would be waited twice otherwise.
        loading = {split: pool.submit(_load, labelled, share, size_px) for split, share in shares.items()}
        world = _join_world(config, context.get_local_world_size())
        error, weights_path = None, None
        try:
            weights_path = fetch_weights(config.model)
            if config.model.weights == "imagenet":
                build_classifier(config.model, len(labelled.labels))  # downloads into Keras's cache
            loaded = {split: future.result() for split, future in loading.items()}
        except CnnRayError as caught:
            error, loaded = caught, {}
        world.agree(error)
        with world.strategy.scope(), world.explained():
            model = build_classifier(config.model, len(labelled.labels), seed=config.seed, weights_path=weights_path)
        history = _train(job, world, model, loaded)
    if world.rank != 0:
        return None
    return _publish(job, model, loaded["validation"], history)


def _load(labelled: LabelledSet, share: Share, size_px: tuple[int, int]) -> tuple[Share, LoadedPixels]:
    loaded = load_pixels(labelled.root_uri, [labelled.uris[row] for row in share.rows], size_px)
    return share.keep(loaded.kept), loaded


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


def _phases(config: TrainConfig) -> list[Phase]:
    from cnn_ray.model import freeze_backbone, unfreeze_backbone
    from cnn_ray.train_loop import Phase

    def whole(_model: Any) -> None:
        """From scratch everything trains, BatchNorm in training mode."""

    phases = [Phase("train", config.train, whole if config.model.weights is None else freeze_backbone)]
    if config.fine_tune is not None:
        phases.append(Phase("fine_tune", config.fine_tune, unfreeze_backbone))
    return phases


def _train(
    job: TrainJob, world: World, model: keras.Model, loaded: dict[str, tuple[Share, LoadedPixels]]
) -> list[dict[str, Any]]:
    import ray.train

    from cnn_ray.train_loop import Trainer, make_batches

    def batches(split: str) -> Any:
        share, images = loaded[split]
        return make_batches(
            images.pixels, job.labelled.label_ids[share.rows], share.strata, job.config.batch_size, world.size
        )

    def after_epoch(logs: dict[str, Any], save: SaveState) -> None:
        if world.rank != 0:
            ray.train.report(logs)
            return
        with tempfile.TemporaryDirectory(prefix="cnn_ray-checkpoint-") as folder:
            save(Path(folder))
            ray.train.report(logs, checkpoint=ray.train.Checkpoint.from_directory(folder))

    trainer = Trainer(world, model, batches("train"), batches("validation"), seed=job.config.seed)
    phases = _phases(job.config)
    with _last_checkpoint() as folder:
        return trainer.run(
            phases,
            callbacks=lambda name: _callbacks(job.config, name),
            after_epoch=after_epoch,
            resume_from=folder,
        )


@contextmanager
def _last_checkpoint() -> Iterator[Path | None]:
    import ray.train

    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        yield None
        return
    with checkpoint.as_directory() as folder:
        yield Path(folder)


def _callbacks(config: TrainConfig, phase: str) -> list[Any]:
    import keras

    settings = config.fine_tune if phase == "fine_tune" and config.fine_tune is not None else config.train
    if settings.early_stopping is None:
        return []
    patience = settings.early_stopping.patience
    return [keras.callbacks.EarlyStopping("val_loss", patience=patience, restore_best_weights=True)]


def _publish(
    job: TrainJob, model: keras.Model, validation: tuple[Share, LoadedPixels], history: list[dict[str, Any]]
) -> WorkerOutcome:
    """The published model, rebuilt outside the strategy and in float32 so that the export sees plain variables."""
    import keras

    from cnn_ray.export import publish_artifact
    from cnn_ray.model import build_classifier

    config, labelled, (share, images) = job.config, job.labelled, validation
    keras.config.set_dtype_policy("float32")
    plain = build_classifier(_without_weights(config.model), len(labelled.labels), seed=config.seed)
    plain.set_weights(model.get_weights())
    last = {name: value for name, value in (history[-1] if history else {}).items() if name != "duration_s"}
    artifact = publish_artifact(
        plain,
        models_uri=config.models_uri,
        name=config.name,
        definition=config.model,
        labels=labelled.labels,
        positive_label=positive_label(config, labelled.labels),
        threshold=config.threshold,
        validation_pixels=images.pixels,
        validation_labels=labelled.label_ids[share.rows],
        training={
            "config": json.loads(config.model_dump_json()),
            "data_digest": labelled.digest(),
            "images": {split: len(labelled.rows(split)) for split in ("train", "validation", "test")},
            "metrics": last,
            "history": history,
            "run_uri": job.run_uri,
        },
    )
    return WorkerOutcome(artifact.reference, artifact.uri, last)


def _without_weights(definition: ModelDefinition) -> ModelDefinition:
    return definition.model_copy(update={"weights": None})


def positive_label(config: TrainConfig, labels: tuple[str, ...]) -> str | None:
    """The class that `flagged` is about: the configured one, else the last one of two, else none."""
    return config.positive_label or (labels[-1] if len(labels) == 2 else None)
