"""One rank of the proofs in test_data_parallel.py: runs the named scenarios and writes what it ended with.

python data_parallel_worker.py OUT_FOLDER SCENARIO... with TF_CONFIG naming the ranks, or without for a single worker.
Scenarios share one process, because importing TensorFlow takes longer than all of them together.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cnn_ray.batches import Batches, make_batches
from cnn_ray.collectives import World
from cnn_ray.config import DataConfig, EarlyStoppingConfig, PhaseConfig, ReduceLROnPlateauConfig, TrainConfig
from cnn_ray.dataset import SPLITS, LabelledSet, share_of_rank
from cnn_ray.errors import CnnRayError, ConfigError, DataError
from cnn_ray.feature_cache import cached, cut_at_features
from cnn_ray.losses import class_weights, image_losses
from cnn_ray.model import freeze_backbone, unfreeze_backbone
from cnn_ray.train_callbacks import fetch_log, rate_at, shared_callbacks, upload, writing_callbacks
from cnn_ray.train_loop import Objective, Phase, Trainer, View

SIDE = 12
CLASSES = 3
BATCH = 32
SEED = 3


def images(count: int) -> tuple[np.ndarray, np.ndarray]:
    """uint8 [N, 12, 12, 3] noise whose mean colour tells the class, int32 [N]."""
    rng = np.random.default_rng(7)
    labels = rng.integers(0, CLASSES, count).astype(np.int32)
    pixels = rng.integers(0, 160, (count, SIDE, SIDE, 3))
    pixels[np.arange(count), :, :, labels] += 60
    return pixels.astype(np.uint8), labels


def labelled(train: int, validation: int) -> tuple[LabelledSet, np.ndarray]:
    pixels, labels = images(train + validation)
    splits = np.repeat([SPLITS.index("train"), SPLITS.index("validation")], [train, validation]).astype(np.uint8)
    uris = tuple(f"{k}.png" for k in range(len(labels)))
    return LabelledSet("memory", uris, labels, tuple("abc"), splits), pixels


def batches(data: LabelledSet, pixels: np.ndarray, split: str, world: World) -> Batches:
    share = share_of_rank(data, split, world.rank, world.size, BATCH, SEED)
    return make_batches(pixels[share.rows], data.label_ids[share.rows], share.strata, BATCH, world.size)


def plain_model() -> Any:
    import keras

    keras.utils.set_random_seed(SEED)
    pixels = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    features = keras.layers.Rescaling(1 / 255)(pixels)
    features = keras.layers.Conv2D(6, 3, activation="relu", name="backbone")(features)
    features = keras.layers.Flatten()(keras.layers.MaxPooling2D()(features))
    return keras.Model(pixels, keras.layers.Dense(CLASSES, activation="softmax", dtype="float32")(features))


def noisy_model() -> Any:
    import keras

    keras.utils.set_random_seed(SEED)
    pixels = keras.Input((SIDE, SIDE, 3), dtype="uint8")
    features = keras.layers.RandomFlip(seed=1)(keras.layers.Rescaling(1 / 255)(pixels))
    features = keras.layers.Conv2D(6, 3, name="backbone")(features)
    features = keras.layers.ReLU()(keras.layers.BatchNormalization()(features))
    features = keras.layers.Dropout(0.3, seed=2)(keras.layers.Flatten()(features))
    return keras.Model(pixels, keras.layers.Dense(CLASSES, activation="softmax", dtype="float32")(features))


def make_trainer(
    world: World, make_model: Any, train: int = 70, validation: int = 21, objective: Objective | None = None
) -> Trainer:
    data, pixels = labelled(train, validation)
    with world.strategy.scope():
        model = make_model()
    sides = (batches(data, pixels, split, world) for split in ("train", "validation"))
    return Trainer(world, model, *sides, seed=SEED, objective=objective)


def phase(
    epochs: int, rate: float, optimizer: str = "sgd", name: str = "train", prepare: Any = lambda _m: None
) -> Phase:
    return Phase(name, PhaseConfig(epochs=epochs, learning_rate=rate, optimizer=optimizer), prepare)  # pyright: ignore


def exact(world: World, _folder: Path) -> dict[str, Any]:
    trainer = make_trainer(world, plain_model)
    return {"history": trainer.run([phase(4, 0.1)]), "weights": trainer.model.get_weights()}


def noisy(world: World, _folder: Path) -> dict[str, Any]:
    trainer = make_trainer(world, noisy_model)
    history = trainer.run([phase(3, 0.01, "adam"), phase(2, 0.001, "adam", "fine_tune", lambda m: None)])
    return {"history": history, "weights": trainer.model.get_weights()}


def uneven(world: World, _folder: Path) -> dict[str, Any]:
    """37 training images, one validation image: with two ranks, one of them has none."""
    trainer = make_trainer(world, plain_model, train=37, validation=1)
    history = trainer.run([phase(2, 0.1)])
    _, pixels = labelled(37, 1)
    scores = np.asarray(trainer.model(pixels, training=False))
    return {
        "history": history,
        "weights": trainer.model.get_weights(),
        "scores": scores,
        "held": [len(trainer.train.label_ids), len(trainer.validation.label_ids)],
    }


def callbacks(world: World, folder: Path) -> dict[str, Any]:
    import keras

    def make(_phase: str) -> list[Any]:
        both = [
            keras.callbacks.ReduceLROnPlateau(monitor="val_loss", factor=0.5, patience=1, min_delta=10.0),
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=4, min_delta=10.0, restore_best_weights=True),
        ]
        return [*both, keras.callbacks.CSVLogger(folder / "log.csv")] if world.rank == 0 else both

    trainer = make_trainer(world, plain_model)
    return {"history": trainer.run([phase(20, 0.05)], callbacks=make), "weights": trainer.model.get_weights()}


def chief_stops(world: World, _folder: Path) -> dict[str, Any]:
    """Only rank 0 has a callback that stops and that changes the learning rate."""
    import keras

    def on_epoch_end(model: Any) -> Any:
        def act(epoch: int, _logs: Any) -> None:
            model.optimizer.learning_rate = 0.01
            model.stop_training = epoch == 1

        return act

    trainer = make_trainer(world, plain_model)
    make = [keras.callbacks.LambdaCallback(on_epoch_end=on_epoch_end(trainer.model))] if world.rank == 0 else []
    return {"history": trainer.run([phase(5, 0.1)], callbacks=lambda _p: make), "weights": trainer.model.get_weights()}


def resume(world: World, folder: Path) -> dict[str, Any]:
    """Two phases that EarlyStopping ends after three epochs each, going back to the first one's weights.

    Once undisturbed, then again from the state in mid-phase, at the end of a phase, and in the second phase.
    """
    import keras

    phases = [phase(6, 0.01, "adam"), phase(6, 0.01, "adam", "fine_tune")]

    def make(_phase: str) -> list[Any]:
        return [
            keras.callbacks.EarlyStopping(monitor="val_loss", patience=2, min_delta=10.0, restore_best_weights=True)
        ]

    saved: list[Path] = []

    def keep(_logs: dict[str, Any], save: Any) -> None:
        saved.append(folder / f"epoch_{len(saved)}")
        saved[-1].mkdir()
        save(saved[-1])

    trainer = make_trainer(world, noisy_model)
    history = trainer.run(phases, callbacks=make, after_epoch=keep)
    weights = trainer.model.get_weights()
    equal = []
    for state in (saved[1], saved[2], saved[4]):
        again = make_trainer(world, noisy_model)
        history_again = again.run(phases, callbacks=make, resume_from=state)
        same = all(np.array_equal(a, b) for a, b in zip(weights, again.model.get_weights(), strict=True))
        equal.append(same and [h["val_loss"] for h in history_again] == [h["val_loss"] for h in history])
    return {"history": history, "weights": weights, "equal": equal}


def frozen(world: World, _folder: Path) -> dict[str, Any]:
    """Head on a frozen backbone, then fine-tuning: the backbone's BatchNorm statistics must not move by one bit."""
    import keras

    def nested_model() -> Any:
        keras.utils.set_random_seed(SEED)
        pixels = keras.Input((SIDE, SIDE, 3), dtype="uint8")
        inner = keras.Sequential(
            [keras.Input((SIDE, SIDE, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()],
            name="backbone",
        )
        features = inner(keras.layers.Rescaling(1 / 255)(pixels))
        features = keras.layers.GlobalAveragePooling2D()(features)
        return keras.Model(pixels, keras.layers.Dense(CLASSES, activation="softmax", name="scores")(features))

    trainer = make_trainer(world, nested_model)
    start = trainer.model.get_weights()
    after_head: list[np.ndarray] = []

    def keep(logs: dict[str, Any], _save: Any) -> None:
        if logs["phase"] == "train":
            after_head[:] = trainer.model.get_weights()

    phases = [phase(1, 0.1, prepare=freeze_backbone), phase(1, 0.1, name="fine_tune", prepare=unfreeze_backbone)]
    history = trainer.run(phases, after_epoch=keep)

    def moved(now: list[np.ndarray]) -> list[str]:
        pairs = zip(trainer.model.weights, start, now, strict=True)
        return sorted(variable.path for variable, a, b in pairs if not np.array_equal(a, b))

    weights = trainer.model.get_weights()
    return {"history": history, "weights": weights, "head": moved(after_head), "moved": moved(weights)}


def weighted(world: World, _folder: Path) -> dict[str, Any]:
    """Focal loss with label smoothing and balanced classes."""
    settings = TrainConfig(
        name="x",
        data=DataConfig(uri="memory"),
        loss="focal",
        label_smoothing=0.1,
        class_weight="balanced",
    )
    data, _ = labelled(70, 21)
    weights = class_weights(settings, data.label_ids[data.rows("train")], CLASSES)
    trainer = make_trainer(world, plain_model, objective=Objective(image_losses(settings, CLASSES), weights))
    return {"history": trainer.run([phase(3, 0.1)]), "weights": trainer.model.get_weights()}


SCHEDULED = PhaseConfig(
    epochs=5, learning_rate=0.02, optimizer="adamw", weight_decay=0.05, schedule="cosine", warmup_epochs=1.5
)


def scheduled(world: World, folder: Path) -> dict[str, Any]:
    """Cosine with warm-up, then plateaus: resumed in the middle of either phase it ends equally."""
    plateau = PhaseConfig(
        epochs=7,
        learning_rate=0.01,
        reduce_lr_on_plateau=ReduceLROnPlateauConfig(patience=2, factor=0.5, min_delta=10.0, cooldown=1),
        early_stopping=EarlyStoppingConfig(patience=6, min_delta=10.0),
    )
    settings = {"train": SCHEDULED, "fine_tune": plateau}
    phases = [Phase(name, config, lambda _m: None) for name, config in settings.items()]
    saved: list[Path] = []

    def keep(_logs: dict[str, Any], save: Any) -> None:
        saved.append(folder / f"epoch_{len(saved)}")
        saved[-1].mkdir()
        save(saved[-1])

    def make(name: str) -> list[Any]:
        return shared_callbacks(settings[name])

    trainer = make_trainer(world, noisy_model)
    history = trainer.run(phases, callbacks=make, after_epoch=keep)
    weights = trainer.model.get_weights()
    equal = []
    for state in (saved[2], saved[7]):
        again = make_trainer(world, noisy_model)
        other = again.run(phases, callbacks=make, resume_from=state)
        same = all(np.array_equal(a, b) for a, b in zip(weights, again.model.get_weights(), strict=True))
        equal.append(same and [h["learning_rate"] for h in other] == [h["learning_rate"] for h in history])
    expected = [rate_at(SCHEDULED, trainer.train_steps, (k + 1) * trainer.train_steps) for k in range(5)]
    return {"history": history, "weights": weights, "equal": equal, "expected": expected}


def features(world: World, _folder: Path) -> dict[str, Any]:
    """The head on a frozen backbone, once as ever and once on features that were computed once."""
    import keras

    def transfer_model() -> Any:
        keras.utils.set_random_seed(SEED)
        pixels = keras.Input((SIDE, SIDE, 3), dtype="uint8")
        inner = keras.Sequential(
            [keras.Input((SIDE, SIDE, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization()],
            name="backbone",
        )
        found = inner(keras.layers.Rescaling(1 / 255)(pixels))
        found = keras.layers.GlobalAveragePooling2D(name="features")(found)
        found = keras.layers.Dense(5, activation="relu", name="hidden")(found)
        return keras.Model(pixels, keras.layers.Dense(CLASSES, activation="softmax", name="scores")(found))

    def run(with_cache: bool) -> Trainer:
        trainer = make_trainer(world, transfer_model)

        def view() -> View:
            below, head = cut_at_features(trainer.model)
            return View(head, *(cached(b, below, augment=False) for b in (trainer.train, trainer.validation)))

        first = phase(2, 0.1, prepare=freeze_backbone)
        second = phase(1, 0.01, name="fine_tune", prepare=unfreeze_backbone)
        trainer.run([Phase("train", first.config, first.prepare, view if with_cache else None), second])
        return trainer

    plain, fast = run(False), run(True)
    pairs = zip(plain.model.get_weights(), fast.model.get_weights(), strict=True)
    gap = max(float(np.abs(a - b).max()) for a, b in pairs)
    losses = [[h["val_loss"] for h in t.position.history] for t in (plain, fast)]
    return {"history": fast.position.history, "weights": fast.model.get_weights(), "gap": gap, "losses": losses}


def logs(world: World, folder: Path) -> dict[str, Any]:
    """CSVLogger and TensorBoard on rank 0, uploaded after each epoch; a resumed run drops what it trains again."""
    from cnn_ray.storage import open_store

    store = open_store(str(folder / "run"))
    saved: list[Path] = []

    def train(number: int, resumed: Path | None, epochs: int) -> Trainer:
        local, sent = folder / f"local_{number}", {}
        if world.rank == 0:
            fetch_log(store, local, 2 if resumed else 0)

        def keep(_logs: dict[str, Any], save: Any) -> None:
            if world.rank == 0:
                upload(store, local, sent)
            saved.append(folder / f"epoch_{len(saved)}")
            saved[-1].mkdir()
            save(saved[-1])

        def make(_phase: str) -> list[Any]:
            return writing_callbacks(("CSVLogger", "TensorBoard"), local) if world.rank == 0 else []

        trainer = make_trainer(world, plain_model)
        trainer.run([phase(epochs, 0.1)], callbacks=make, after_epoch=keep, resume_from=resumed)
        return trainer

    train(0, None, 3)
    trainer = train(1, saved[1], 4)
    return {"history": trainer.position.history, "weights": trainer.model.get_weights()}


def agree(world: World, _folder: Path) -> dict[str, Any]:
    """The last rank has an error: every rank must raise it, in its class and words."""
    raised = None
    world.agree(None)
    try:
        world.agree(DataError("Expected a ä. Received: b.") if world.rank == world.size - 1 else None)
    except ConfigError as error:
        raised = [type(error).__name__, str(error)]
    return {"history": [], "weights": [], "raised": raised}


def stall(world: World, folder: Path) -> dict[str, Any]:
    """The last rank sleeps after the first epoch. TensorFlow's heartbeats go on, so only the time limit can notice."""

    def sleep(_logs: Any, _save: Any) -> None:
        if world.rank == world.size - 1:
            (folder / "asleep").touch()
            time.sleep(600)

    make_trainer(world, plain_model).run([phase(3, 0.1)], after_epoch=sleep)
    return {"history": [], "weights": []}


ALL = (exact, noisy, uneven, callbacks, chief_stops, resume, frozen, weighted, scheduled, features, logs, agree, stall)
SCENARIOS = {f.__name__: f for f in ALL}


def main() -> int:
    out = Path(sys.argv[1])
    devices = int(os.environ.get("LOGICAL_DEVICES", "0"))
    if devices:
        import tensorflow as tf

        one = tf.config.list_physical_devices("CPU")[0]
        tf.config.set_logical_device_configuration(one, [tf.config.LogicalDeviceConfiguration()] * devices)
    world = World(
        timeout_s=float(os.environ.get("COLLECTIVE_TIMEOUT_S", "60")), devices=[f"CPU:{k}" for k in range(devices)]
    )
    for name in sys.argv[2:]:
        folder = out / f"{name}_{world.rank}_of_{world.size}"
        folder.mkdir()
        try:
            result = SCENARIOS[name](world, folder)
        except CnnRayError as error:
            sys.stderr.write(f"{type(error).__name__}: {error}\n")
            sys.stderr.flush()
            return error.exit_code
        np.savez(folder / "weights.npz", *result.pop("weights"))
        scores = result.pop("scores", None)
        if scores is not None:
            np.save(folder / "scores.npy", scores)
        (folder / "result.json").write_text(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
