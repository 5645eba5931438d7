"""Several configurations trained on one split and one list of seeds, measured alike and put side by side."""

from __future__ import annotations

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cnn_ray.architectures import find_architecture
from cnn_ray.artifact import WEIGHTS, load_artifact
from cnn_ray.compare_page import build_page
from cnn_ray.comparison_rows import ComparisonResult, Failure, Row, Spread, Training
from cnn_ray.config import CompareConfig, DataConfig, LabelledScoresConfig, TrainConfig
from cnn_ray.dataset import read_labelled_set
from cnn_ray.errors import ArtifactError, CnnRayError, ConfigError, NotFoundError
from cnn_ray.evaluate import score_labelled
from cnn_ray.metrics import log_loss, topk_accuracy
from cnn_ray.model import check_definition
from cnn_ray.predictor import Predictor, cpu_count, load_predictor
from cnn_ray.ray_session import connected
from cnn_ray.storage import open_store
from cnn_ray.storage_options import use_storage_options
from cnn_ray.train import HARMLESS, TrainResult, run_training

log = logging.getLogger(__name__)

JSON_FILE, PAGE = "comparison.json", "comparison.html"
MEASURED_IMAGES = 64
ROUNDS = 3
TOP = (1, 3, 5)


OnTraining = Callable[["Training | Failure | str"], None]
Side = Literal["test", "validation"]
Train = Callable[[TrainConfig], TrainResult]


def run_comparison(
    config: CompareConfig, *, on_training: OnTraining = lambda _event: None, train: Train | None = None
) -> ComparisonResult:
    """The table; comparison.json and comparison.html lie under output_uri/NAME afterwards.

    A training that finished before with the same configuration and data is kept. One that fails is named and the others
    go on. `on_training` is told what begins and what ended.

    Raises:
        ConfigError: base and variants do not fit together, or their data or splits differ.
        StorageError: the output cannot be written.
    """
    use_storage_options(config)
    digest, split = _shared_split(config)
    store = open_store(f"{config.output_uri.rstrip('/')}/{config.name}")
    store.check_writable()
    done: list[Training] = []
    failed: list[Failure] = []
    with nullcontext() if train else connected(num_cpus=max(cpu_count(), *_workers(config))):
        for variant in config.variants:
            for seed in config.seeds:
                event = _one(config, variant, seed, digest, split, store, on_training, train or run_training)
                on_training(event)
                if isinstance(event, Training):
                    done.append(event)
                else:
                    failed.append(event)
    speeds = _throughputs(config, done)
    names = [variant for variant in config.variants if any(t.variant == variant for t in done)]
    rows = tuple(_row(config, name, [t for t in done if t.variant == name], speeds.get(name)) for name in names)
    images = done[0].images if done else 0
    result = ComparisonResult(config.name, split, images, rows, tuple(failed))
    store.put(JSON_FILE, json.dumps({**asdict(result), "trainings": [asdict(t) for t in done]}, indent=2).encode())
    store.put(PAGE, build_page(result).encode("utf-8", "backslashreplace"))
    return ComparisonResult(
        config.name, split, images, rows, tuple(failed), store.uri_of(PAGE), store.uri_of(JSON_FILE)
    )


def dry_run(config: CompareConfig) -> str:
    """What a comparison would do, in one sentence."""
    for variant in config.variants:
        check_definition(config.training(variant, config.seeds[0]).model)
    _, split = _shared_split(config)
    count = len(config.variants) * len(config.seeds)
    return f"Would train {', '.join(config.variants)} with {len(config.seeds)} seeds ({count} trainings), on {split}."


def _shared_split(config: CompareConfig) -> tuple[str, Side]:
    """(digest of the images, labels and split, the side that is judged): all variants must share them."""
    sets: dict[DataConfig, tuple[str, Side]] = {}
    for variant in config.variants:
        data = config.training(variant, config.seeds[0]).data
        if data not in sets:
            labelled = read_labelled_set(data)
            sets[data] = (labelled.digest(), "test" if len(labelled.rows("test")) else "validation")
    if len({digest for digest, _ in sets.values()}) > 1:
        raise ConfigError(
            "Expected all variants on the same images and split. Received: data that differ. "
            "Next: put data into base, and leave it out of the variants."
        )
    return next(iter(sets.values()))


def _workers(config: CompareConfig) -> list[int]:
    return [config.training(variant, config.seeds[0]).num_workers for variant in config.variants]


def _one(
    config: CompareConfig,
    variant: str,
    seed: int,
    digest: str,
    split: Side,
    store: Any,
    on_training: OnTraining,
    train: Train,
) -> Training | Failure:
    training = config.training(variant, seed)
    decides = training.model_dump_json(exclude=set(HARMLESS))
    key = f"trainings/{variant}-{seed}-{hashlib.sha256(f'{decides}{digest}'.encode()).hexdigest()[:12]}.json"
    try:
        kept = Training(**json.loads(store.get(key)))
        load_artifact(training.models_uri, kept.reference)
        return kept
    except (NotFoundError, ArtifactError):  # never trained, or the version was removed since
        pass
    on_training(f"{variant}, seed {seed}: training")
    try:
        finished = train(training)
        measured = _measure(training, variant, seed, finished.reference, split)
    except CnnRayError as error:
        if error.exit_code == 130:
            raise
        return Failure(variant, seed, str(error), error.exit_code)
    store.put(key, json.dumps(asdict(measured)).encode())
    return measured


def _measure(training: TrainConfig, variant: str, seed: int, reference: str, split: Side) -> Training:
    artifact = load_artifact(training.models_uri, reference)
    judged = LabelledScoresConfig(
        model=reference, models_uri=training.models_uri, data=training.data, split=split, precision="f32"
    )
    scored = score_labelled(judged, artifact)
    told = artifact.description.training
    return Training(
        variant=variant,
        seed=seed,
        reference=reference,
        split=split,
        images=len(scored.truth),
        top_k={str(k): topk_accuracy(scored.scores, scored.truth, k) for k in TOP if k < len(artifact.labels)},
        log_loss=log_loss(scored.scores, scored.truth),
        train_s=round(sum(epoch["duration_s"] for epoch in told["history"]), 1),
        parameters=told["parameters"],
        size_bytes=artifact.description.files[WEIGHTS].size_bytes,
        history=told["history"],
    )


def _throughputs(config: CompareConfig, done: Sequence[Training]) -> Mapping[str, tuple[float | None, float | None]]:
    """variant -> (CPU, GPU) images/s in float32, the median of interleaved rounds; without decoding."""
    found: dict[str, tuple[float | None, float | None]] = {}
    by_device: list[dict[str, float]] = []
    for use_gpu in (False, True):
        predictors: dict[str, Predictor] = {}
        for training in done:
            if training.variant not in predictors and (not use_gpu or _has_gpu()):
                predictor = _predictor(config, training, use_gpu=use_gpu)
                if predictor is not None:
                    predictors[training.variant] = predictor
        by_device.append(_interleaved(predictors))
    for training in done:
        found[training.variant] = (by_device[0].get(training.variant), by_device[1].get(training.variant))
    return found


def _interleaved(predictors: Mapping[str, Predictor]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in predictors}
    for _ in range(ROUNDS):
        for name, predictor in predictors.items():
            shape = (MEASURED_IMAGES, *predictor.artifact.size_px, 3)
            pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
            start = time.perf_counter()
            predictor.predict_in_batches(pixels, 32)
            times[name].append(time.perf_counter() - start)
    return {name: round(MEASURED_IMAGES / statistics.median(spent), 1) for name, spent in times.items()}


def _predictor(config: CompareConfig, training: Training, *, use_gpu: bool) -> Predictor | None:
    """In float32; None, with a warning, where it cannot be loaded: the table is worth more than its speed."""
    models_uri = config.training(training.variant, training.seed).models_uri
    engine = "tensorflow" if use_gpu else "openvino"
    try:
        artifact = load_artifact(models_uri, training.reference)
        return load_predictor(artifact, engine=engine, precision="f32", use_gpu=use_gpu)
    except CnnRayError as error:
        log.warning("no speed of %s: %s", training.variant, error)
        return None


def _has_gpu() -> bool:
    """Whether TensorFlow sees a GPU; only asked where the machine has one: its import costs 5 s."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return False
    import tensorflow as tf

    return bool(tf.config.list_physical_devices("GPU"))


def _row(
    config: CompareConfig,
    variant: str,
    trainings: Sequence[Training],
    speed: tuple[float | None, float | None] | None,
) -> Row:
    definition = config.training(variant, config.seeds[0]).model
    return Row(
        variant=variant,
        architecture=find_architecture(definition.architecture).name,
        weights=definition.weights,
        seeds=len(trainings),
        parameters=trainings[0].parameters,
        size_bytes=trainings[0].size_bytes,
        top_k={k: _spread([t.top_k[k] for t in trainings]) for k in trainings[0].top_k},
        log_loss=_spread([t.log_loss for t in trainings]),
        train_s=_spread([t.train_s for t in trainings]),
        cpu_images_per_s=speed[0] if speed else None,
        gpu_images_per_s=speed[1] if speed else None,
        curves={name: _curve(trainings, name) for name in ("accuracy", "val_accuracy", "loss", "val_loss")},
    )


def _spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)


def _curve(trainings: Sequence[Training], name: str) -> list[float]:
    """Seeds that stopped earlier leave the mean from there on."""
    longest = max(len(t.history) for t in trainings)
    return [statistics.fmean([t.history[k][name] for t in trainings if k < len(t.history)]) for k in range(longest)]
