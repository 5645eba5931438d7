"""TensorFlow's "Better performance with the tf.data API": parallel map, batch, prefetch, then model.predict."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import keras
import tensorflow as tf


def main() -> None:
    given = json.loads(sys.argv[1])
    side, batch_size = (given["size_px"], given["size_px"]), given["batch_size"]

    def load(path: Any) -> Any:
        image = tf.io.decode_image(tf.io.read_file(path), channels=3, expand_animations=False)
        return tf.cast(tf.image.resize(image, side), tf.uint8)

    dataset = (
        tf.data.Dataset.list_files(f"{given['images']}/*", shuffle=False)
        .map(load, num_parallel_calls=tf.data.AUTOTUNE)
        .batch(batch_size)
        .prefetch(tf.data.AUTOTUNE)
    )
    marks: list[list[float]] = []

    class Clock(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            marks.append([time.time(), min((batch + 1) * batch_size, given["count"])])

    model: Any = keras.saving.load_model(given["keras"], compile=False)
    scores = model.predict(dataset, verbose=0, callbacks=[Clock()])
    marks[-1][1] = len(scores)
    sys.stdout.write(json.dumps({"marks": marks}) + "\n")


if __name__ == "__main__":
    main()
