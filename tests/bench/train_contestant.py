"""One training of the bench in a process of its own: prints {"images_per_s": ..., "first_step_s": ...} as JSON.

    python train_contestant.py keras|ray FOLDER ARCHITECTURE [--workers N] [--precision P] [--fine-tune] [--cache]

FOLDER holds images/ (class folders) and ARCHITECTURE.weights.h5. `keras` is plain `model.fit` in this process on the
same pixels, model and batch size.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

SIDE_PX = 96
EPOCHS = 4
BATCH = 32


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kind", choices=("keras", "ray"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("architecture")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--precision", default="float32")
    parser.add_argument("--fine-tune", action="store_true")
    parser.add_argument("--cache", action="store_true")
    parser.add_argument("--jit", action="store_true")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    arguments = parser.parse_args()
    began = float(os.environ.get("BENCH_BEGAN", time.time()))
    answer = by_keras(arguments, began) if arguments.kind == "keras" else by_ray(arguments, began)
    sys.stdout.write(json.dumps(answer) + "\n")


def configuration(arguments: argparse.Namespace) -> Any:
    from cnn_ray.config import DataConfig, ModelDefinition, PhaseConfig, TrainConfig

    phase = PhaseConfig(epochs=arguments.epochs, learning_rate=1e-4)
    folder = arguments.folder
    return TrainConfig(
        name="bench",
        models_uri=str(folder / "models"),
        runs_uri=str(folder / f"runs-{os.getpid()}"),
        data=DataConfig(uri=str(folder / "images"), near_duplicates="ignore", validation_fraction=0.05),
        model=ModelDefinition(
            architecture=arguments.architecture,
            weights=str(folder / f"{arguments.architecture}.weights.h5"),
            input_size_px=SIDE_PX,
        ),
        train=phase.model_copy(update={"epochs": 1}) if arguments.fine_tune else phase,
        fine_tune=phase if arguments.fine_tune else None,
        batch_size=BATCH,
        num_workers=arguments.workers,
        precision=arguments.precision,
        cache_features=arguments.cache,
        allow=("no_augmentation", "too_few_per_class", "unfrozen_too_early"),
    )


def by_ray(arguments: argparse.Namespace, began: float) -> dict[str, float]:
    from cnn_ray.train import run_training

    told: list[tuple[float, dict[str, Any]]] = []
    run_training(configuration(arguments), on_epoch=lambda logs: told.append((time.time(), logs)))
    phase = "fine_tune" if arguments.fine_tune else "train"
    steady = [logs["images_per_s"] for _, logs in told if logs["phase"] == phase][1:]
    first_at, first = told[0]
    return {
        "images_per_s": statistics.median(steady) if steady else 0.0,
        "first_step_s": first_at - first["duration_s"] - began,
        "all_epochs_s": sum(logs["duration_s"] for _, logs in told),
        "input_wait": statistics.median(logs["input_wait"] for _, logs in told),
    }


def by_keras(arguments: argparse.Namespace, began: float) -> dict[str, float]:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import keras
    import numpy as np
    import tensorflow as tf

    from cnn_ray.batches import DecodedPixels
    from cnn_ray.dataset import read_labelled_set
    from cnn_ray.model import build_classifier, freeze_backbone, unfreeze_backbone

    tf.config.threading.set_intra_op_parallelism_threads(len(os.sched_getaffinity(0)))
    config = configuration(arguments)
    labelled = read_labelled_set(config.data)
    rows = labelled.rows("train")
    uris = [labelled.uris[row] for row in rows]
    source = DecodedPixels(labelled.root_uri, uris, (SIDE_PX, SIDE_PX), cache_bytes=2 * 1024**3)
    pixels, _ = source.take(np.arange(len(rows)))
    source.close()
    keras.config.set_dtype_policy(config.precision)
    model: Any = build_classifier(config.model, len(labelled.labels))
    (unfreeze_backbone if arguments.fine_tune else freeze_backbone)(model)
    model.compile(keras.optimizers.Adam(1e-4), "sparse_categorical_crossentropy", jit_compile=arguments.jit)
    spent: list[float] = []
    started: list[float] = []

    class Clock(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            started.append(time.time())

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            spent.append(time.time() - started[-1])

    labels = np.asarray(labelled.label_ids[rows])
    model.fit(pixels, labels, batch_size=BATCH, epochs=arguments.epochs, verbose=0, callbacks=[Clock()])
    steady = [len(rows) / second for second in spent[1:]]
    return {
        "images_per_s": statistics.median(steady) if steady else 0.0,
        "first_step_s": started[0] - began,
        "all_epochs_s": sum(spent),
        "input_wait": 0.0,
    }


if __name__ == "__main__":
    main()
