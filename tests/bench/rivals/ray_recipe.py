"""Ray's "End-to-end: Offline Batch Inference" for a Keras model: read_images -> map_batches with an actor."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}

import numpy as np
import ray
from ray.data import ActorPoolStrategy, DataContext


class Predictor:
    """The recipe's class: the model is loaded once per actor."""

    def __init__(self, path: str) -> None:
        import keras

        self._model: Any = keras.saving.load_model(path, compile=False)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"path": batch["path"], "scores": self._model.predict(batch["image"], verbose=0)}


def main() -> None:
    given = json.loads(sys.argv[1])
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    DataContext.get_current().enable_progress_bars = False
    DataContext.get_current().print_on_execution_start = False
    side = (given["size_px"], given["size_px"])
    predictions = ray.data.read_images(given["images"], size=side, mode="RGB", include_paths=True).map_batches(
        Predictor,
        fn_constructor_args=(given["keras"],),
        batch_size=given["batch_size"],
        compute=ActorPoolStrategy(size=1),
    )
    rows, marks = 0, []
    for batch in predictions.iter_batches(batch_size=None):
        rows += len(batch["path"])
        marks.append([time.time(), rows])
    sys.stdout.write(json.dumps({"marks": marks}) + "\n")


if __name__ == "__main__":
    main()
