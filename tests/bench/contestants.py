"""The contestants that are no command of ours: each runs in a process of its own and prints when how many were scored.

A mark is (seconds since the epoch, images scored so far). `floor` is what the hardware gives with our own decoder and
predictor and nothing else; the other two are what one would write after reading Ray's and TensorFlow's documentation.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from material import LABELS, REFERENCE, Material, image_paths

Mark = tuple[float, int]


def floor(material: Material) -> list[Mark]:
    """Decode threads that run as far ahead as the local runner's, and the predictor in the main thread."""
    from cnn_ray.artifact import load_artifact
    from cnn_ray.images import DecodedImage, ImageCaps, decode
    from cnn_ray.predictor import cpu_count, load_predictor
    from cnn_ray.runners import SHARDS_AHEAD

    caps = ImageCaps()
    size_px = (material.size_px, material.size_px)

    def read(path: Path) -> np.ndarray:
        image = decode(path.read_bytes(), size_px, caps)
        if not isinstance(image, DecodedImage):
            raise TypeError(f"{path}: {image}")
        return image.pixels

    paths = iter(image_paths(material))
    marks: list[Mark] = []
    with ThreadPoolExecutor(cpu_count()) as threads:
        ahead: deque[Future[np.ndarray]] = deque()

        def read_ahead() -> None:
            missing = SHARDS_AHEAD * material.shard_size - len(ahead)
            ahead.extend(threads.submit(read, path) for path in itertools.islice(paths, missing))

        read_ahead()
        predictor = load_predictor(load_artifact(material.models, REFERENCE), engine="openvino", precision="f32")
        rows = 0
        while ahead:
            batch = np.stack([ahead.popleft().result() for _ in range(min(material.batch_size, len(ahead)))])
            read_ahead()
            rows += len(predictor.predict(batch))
            marks.append((time.time(), rows))
    return marks


def ray_recipe(material: Material) -> list[Mark]:
    """Ray's "End-to-end: Offline Batch Inference" for a Keras model: read_images -> map_batches with an actor."""
    import ray
    from ray.data import ActorPoolStrategy, DataContext

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    DataContext.get_current().print_on_execution_start = False
    side = (material.size_px, material.size_px)
    predictions = ray.data.read_images(material.images, size=side, mode="RGB", include_paths=True).map_batches(
        RecipePredictor,
        fn_constructor_args=(material.to_json(),),
        batch_size=material.batch_size,
        compute=ActorPoolStrategy(size=1),
    )
    return _count(predictions.iter_batches(batch_size=None), lambda batch: len(batch["path"]))


class RecipePredictor:
    """The recipe's class: the model is loaded once per actor."""

    def __init__(self, material: str) -> None:
        self._model = _keras_model(Material.from_json(material))

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"path": batch["path"], "scores": self._model.predict(batch["image"], verbose=0)}


def tf_data(material: Material) -> list[Mark]:
    """TensorFlow's "Better performance with the tf.data API": parallel map, batch, prefetch, then model.predict."""
    import keras
    import tensorflow as tf

    side = (material.size_px, material.size_px)

    def load(path: Any) -> Any:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.cast(tf.image.resize(image, side), tf.uint8)

    dataset = (
        tf.data.Dataset.list_files(f"{material.images}/*", shuffle=False)
        .map(load, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(material.batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    marks: list[Mark] = []

    class Clock(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            marks.append((time.time(), min((batch + 1) * material.batch_size, material.count)))

    scores = _keras_model(material).predict(dataset, verbose=0, callbacks=[Clock()])
    return [*marks[:-1], (marks[-1][0], len(scores))]


def _keras_model(material: Material) -> Any:
    from cnn_ray.predictor import rebuild_model

    return rebuild_model(material.definition, len(LABELS), material.weights)


def _count(batches: Any, size: Callable[[Any], int]) -> list[Mark]:
    rows, marks = 0, []
    for batch in batches:
        rows += size(batch)
        marks.append((time.time(), rows))
    return marks


CONTESTANTS: dict[str, Callable[[Material], list[Mark]]] = {
    "floor": floor,
    "ray_recipe": ray_recipe,
    "tf_data": tf_data,
}
