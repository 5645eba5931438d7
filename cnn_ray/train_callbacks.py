"""Optimizers, learning-rate schedules and Keras callbacks of a phase, from its configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cnn_ray.config import PhaseConfig
from cnn_ray.storage import Store

NOT_DECAYED = ["bias", "gamma", "beta"]
"""Biases and normalisation: pulling them to zero does not make a function smoother (arXiv 1812.01187, section 3.1)."""
CSV_FILE = "log.csv"
TENSORBOARD_FOLDER = "tensorboard"


def make_optimizer(phase: PhaseConfig, steps_per_epoch: int) -> Any:
    """The phase's Keras optimizer, not built. Its schedule counts the optimizer's own steps, which a checkpoint holds;
    an epoch has as many of them whatever the number of workers."""
    import keras

    rate = _learning_rate(phase, steps_per_epoch)
    decay = phase.weight_decay or None
    if phase.optimizer == "adam":
        optimizer: Any = keras.optimizers.Adam(rate)
    elif phase.optimizer == "adamw":
        optimizer = keras.optimizers.AdamW(rate, weight_decay=phase.weight_decay)
    else:
        optimizer = keras.optimizers.SGD(rate, phase.momentum, nesterov=phase.momentum > 0, weight_decay=decay)
    if phase.weight_decay:
        optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    return optimizer


def rate_at(phase: PhaseConfig, steps_per_epoch: int, step: int) -> float:
    """The scheduled learning rate of a step, counted from 0."""
    warmup = phase.warmup_epochs * steps_per_epoch
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    if phase.schedule == "constant":
        return phase.learning_rate * rising
    whole = max(phase.epochs * steps_per_epoch - warmup, 1.0)
    done = min(max((step + 1 - warmup) / whole, 0.0), 1.0)
    return phase.learning_rate * rising * 0.5 * (1 + math.cos(math.pi * done))


def _learning_rate(phase: PhaseConfig, steps_per_epoch: int) -> Any:
    """A number, which callbacks may change, or a Keras schedule (SGDR's half cosine, arXiv 1608.03983, after a linear
    rise)."""
    if phase.schedule == "constant" and not phase.warmup_epochs:
        return phase.learning_rate
    import keras

    ops: Any = keras.ops
    warmup = phase.warmup_epochs * steps_per_epoch
    whole = max(phase.epochs * steps_per_epoch - warmup, 1.0)

    class Schedule(keras.optimizers.schedules.LearningRateSchedule):
        def __call__(self, step: Any) -> Any:
            number = ops.cast(step, "float32") + 1.0
            rate = ops.minimum(1.0, number / warmup) if warmup else ops.ones_like(number)
            if phase.schedule == "cosine":
                done = ops.clip((number - warmup) / whole, 0.0, 1.0)
                rate = rate * 0.5 * (1.0 + ops.cos(math.pi * done))
            return phase.learning_rate * rate

        def get_config(self) -> dict[str, Any]:
            return {"phase": phase.model_dump(), "steps_per_epoch": steps_per_epoch}

    return Schedule()


def shared_callbacks(phase: PhaseConfig) -> list[Any]:
    """The callbacks that every rank runs, in the same order: they see the same logs and decide alike."""
    import keras

    found: list[Any] = []
    plateau, stopping = phase.reduce_lr_on_plateau, phase.early_stopping
    if plateau is not None:
        found.append(keras.callbacks.ReduceLROnPlateau(monitor="val_loss", **plateau.model_dump()))
    if stopping is not None:
        found.append(
            keras.callbacks.EarlyStopping(monitor="val_loss", restore_best_weights=True, **stopping.model_dump())
        )
    return found


def writing_callbacks(logs: Sequence[str], folder: Path) -> list[Any]:
    """The callbacks of rank 0 that write into the local folder; `upload` brings their files into the run's folder."""
    import keras

    found: list[Any] = []
    if "CSVLogger" in logs:
        found.append(keras.callbacks.CSVLogger(folder / CSV_FILE, append=True))
    if "TensorBoard" in logs:
        found.append(_tensorboard(folder / TENSORBOARD_FOLDER))
    return found


def _tensorboard(folder: Path) -> Any:
    """A callback that writes every epoch's logs as TensorBoard events.

    Keras's own needs the tensorboard package to write a scalar; tensorboardX comes with Ray and writes the same files.
    """
    import keras
    from tensorboardX import SummaryWriter

    class TensorBoard(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
            with SummaryWriter(str(folder), filename_suffix=f".{epoch:05}") as writer:
                for name, value in (logs or {}).items():
                    writer.add_scalar(f"epoch_{name}", value, epoch)

    return TensorBoard()


def fetch_log(store: Store, folder: Path, resumed_epochs: int) -> None:
    """Afterwards the folder holds the CSV log up to the checkpoint: epochs that are trained again are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    if resumed_epochs and store.exists(CSV_FILE):
        lines = store.get(CSV_FILE).decode().splitlines(keepends=True)
        (folder / CSV_FILE).write_text("".join(lines[: resumed_epochs + 1]), encoding="utf-8")


def upload(store: Store, folder: Path, sent: dict[Path, int]) -> None:
    """Afterwards the run's folder holds the logs as they are now; `sent` remembers which need not go again."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and sent.get(path) != path.stat().st_mtime_ns:
            sent[path] = path.stat().st_mtime_ns
            store.put_file(path.relative_to(folder).as_posix(), path)
