"""The data-parallel training loop: a Keras 3 model under MultiWorkerMirroredStrategy, epoch by epoch.

`model.fit` cannot be used here: under this strategy Keras 3 fails in its metrics (keras#20585, ray#47464, both open).
What stays Keras's own: layers, optimizers, and callbacks, which a `CallbackList` drives with global logs. All ranks see
the same logs, so callbacks decide alike; those that write files belong on rank 0.

Loss and metrics are sums over all ranks divided by the sum of weights over all ranks, so an uneven or padded batch
counts every image once. All ranks run the same number of steps; one that has fewer rows repeats rows at weight 0.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_ray.batches import Batch, Batches
from cnn_ray.collectives import World, all_reduce_sum
from cnn_ray.config import PhaseConfig
from cnn_ray.errors import ConfigError
from cnn_ray.model import walk_layers
from cnn_ray.train_callbacks import make_optimizer
from cnn_ray.train_state import Position, read_position, restore_callbacks, restore_model, save_state

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Phase:
    """One phase: its configuration, and what `prepare` does to the model before it (freeze, unfreeze)."""

    name: str
    config: PhaseConfig
    prepare: Callable[[Any], None]
    view: Callable[[], View] | None = None
    """Called after `prepare`: what this phase trains in place of the whole model, on which data."""


@dataclass(frozen=True)
class View:
    """A part of the model that shares its variables, with the data that it reads."""

    model: Any
    train: Batches
    validation: Batches


@dataclass(frozen=True)
class Objective:
    """What is minimised: the loss of single images, and the weights of classes (float32 [C]) while training."""

    losses: Callable[[Any, Any], Any]
    class_weights: np.ndarray


TIMINGS = ("duration_s", "images_per_s", "input_wait")
"""Logs that say how fast an epoch was: they differ between ranks and runs."""

CallbackFactory = Callable[[str], "list[keras.callbacks.Callback]"]
SaveState = Callable[[Path], None]
AfterEpoch = Callable[[dict[str, Any], SaveState], None]


class Trainer:
    """Trains one model through its phases. All ranks build one and call `run`."""

    def __init__(
        self,
        world: World,
        model: keras.Model,
        train: Batches,
        validation: Batches,
        *,
        seed: int,
        objective: Objective | None = None,
    ) -> None:
        """Afterwards all ranks hold rank 0's start weights and agree on the steps of an epoch.

        Without an objective it is the cross-entropy, all classes alike.
        """
        self.world, self.model, self.seed = world, model, seed
        self.train, self.validation = train, validation
        self.train_steps, self.validation_steps = world.max(train.steps), world.max(validation.steps)
        self.objective = objective or _cross_entropy(model.output_shape[-1])
        self.position = Position()
        with world.explained():
            world.copy_from_rank_0(model.weights)

    def run(
        self,
        phases: Sequence[Phase],
        *,
        callbacks: CallbackFactory = lambda _phase: [],
        after_epoch: AfterEpoch = lambda _logs, _save: None,
        resume_from: Path | None = None,
    ) -> list[dict[str, Any]]:
        """Logs of every epoch, the same on all ranks. The model is trained afterwards, with equal bits on all ranks.

        Args:
            callbacks: phase name -> this rank's Keras callbacks; those for all ranks first, in the same order.
            after_epoch: called by all ranks with the epoch's logs and a function that saves the state into a folder.
            resume_from: folder of a saved state; a training that resumes ends like an undisturbed one.

        Raises:
            ConfigError: the loss is not a number any more.
            TrainingError: a peer stalled or died, or memory ran out.
        """
        if resume_from is not None:
            self.position = read_position(resume_from)
        for index in range(self.position.phase, len(phases)):
            if index != self.position.phase:
                self.position.phase, self.position.epoch, self.position.stopped = index, 0, False
            self._run_phase(phases[index], callbacks(phases[index].name), after_epoch, resume_from)
            resume_from = None
        return self.position.history

    def _run_phase(self, phase: Phase, callbacks: list[Any], after_epoch: AfterEpoch, resume_from: Path | None) -> None:
        import keras

        started = time.monotonic()
        part = self._compile(phase)
        prepared_s = time.monotonic() - started if phase.view is not None else 0.0
        if resume_from is not None:
            restore_model(resume_from, self.model, part.model.optimizer)
        steps = _Steps(self.world, part.model, self.objective)
        listeners = keras.callbacks.CallbackList(
            callbacks, model=part.model, epochs=phase.config.epochs, steps=self.train_steps, verbose=0
        )
        part.model.stop_training = False
        listeners.on_train_begin()
        if resume_from is not None:
            restore_callbacks(resume_from, callbacks)
        position = self.position
        while position.epoch < phase.config.epochs and not position.stopped:
            logs = self._run_epoch(phase, part, steps, listeners, _wants_batches(callbacks))
            position.stopped = self._agree_on_stop(part.model)
            position.epoch += 1
            logs["duration_s"], prepared_s = round(logs["duration_s"] + prepared_s, 3), 0.0
            position.history.append(logs)
            optimizer = part.model.optimizer
            after_epoch(logs, lambda folder: save_state(folder, self.model, optimizer, position, callbacks))  # noqa: B023
        listeners.on_train_end()
        self.world.check_equal(self.model.weights)

    def _compile(self, phase: Phase) -> View:
        """What the phase trains. Its optimizer is fresh, and its slots exist before any tf.function is traced: it
        cannot make variables in there."""
        phase.prepare(self.model)
        part = View(self.model, self.train, self.validation) if phase.view is None else phase.view()
        with self.world.strategy.scope(), self.world.explained():
            optimizer = make_optimizer(phase.config, self.train_steps)
            part.model.compile(
                optimizer=optimizer,
                loss="sparse_categorical_crossentropy",
                jit_compile=False,  # pyright: ignore[reportArgumentType] - Keras annotates its default alone
            )
            optimizer.build(part.model.trainable_variables)
        return part

    def _run_epoch(self, phase: Phase, part: View, steps: _Steps, listeners: Any, batch_logs: bool) -> dict[str, Any]:
        started, waited_s = time.monotonic(), part.train.waited_s
        number = len(self.position.history)
        listeners.on_epoch_begin(number)
        totals = np.zeros(3)
        rows = 0.0
        pending: list[Any] = []
        for k, batch in enumerate(part.train.epoch(self.train_steps, (self.seed, number))):
            listeners.on_train_batch_begin(k)
            rows += float(batch[2].sum())
            pending.append(steps.train(batch))
            if batch_logs:  # reading a result waits for the device, so only where somebody listens
                totals += pending.pop().numpy()
            listeners.on_train_batch_end(k, _means(totals) if batch_logs else {})
        totals += _added(pending, self.world)
        trained_s = time.monotonic() - started
        self._average_batchnorm(part.model, rows)
        logs = _means(totals)
        listeners.on_test_begin()
        seen = [steps.evaluate(batch) for batch in part.validation.epoch(self.validation_steps, None)]
        validation = _means(_added(seen, self.world))
        listeners.on_test_end(validation)
        logs |= {f"val_{name}": value for name, value in validation.items()}
        self._check_finite(logs["loss"], number, phase)
        logs["learning_rate"] = float(np.asarray(part.model.optimizer.learning_rate))
        listeners.on_epoch_end(number, logs)
        return {
            "phase": phase.name,
            "epoch": number + 1,
            **logs,
            "duration_s": round(time.monotonic() - started, 3),
            "images_per_s": round(float(totals[2]) / max(trained_s, 1e-9), 1),
            "input_wait": round((part.train.waited_s - waited_s) / max(trained_s, 1e-9), 3),
        }

    def _check_finite(self, loss: float, number: int, phase: Phase) -> None:
        if not math.isfinite(loss):
            raise ConfigError(
                f"Expected a finite loss. Received: {loss} in epoch {number + 1}. "
                f"Next: lower {phase.name}.learning_rate (now {phase.config.learning_rate:g})."
            )

    def _agree_on_stop(self, model: Any) -> bool:
        """Whether any rank's callbacks stop the phase. The learning rate becomes rank 0's, should theirs differ."""
        if self.world.size == 1:
            return bool(model.stop_training)
        rate = float(np.asarray(model.optimizer.learning_rate))
        votes = self.world.gather(np.array([float(bool(model.stop_training)), rate]))
        if votes[0, 1] != np.float32(rate):
            model.optimizer.learning_rate = float(votes[0, 1])
        return bool(votes[:, 0].any())

    def _average_batchnorm(self, model: Any, rows: float) -> None:
        """Afterwards the moving statistics of BatchNorm layers that are in training mode are the ranks' averages.

        Keras gives these variables no aggregation, so each rank's drift after its own images. Layers in inference mode
        are left alone: averaging equal numbers would still change their last bits every epoch.
        """
        import keras

        variables: list[Any] = [
            variable
            for layer in walk_layers(model)
            if isinstance(layer, keras.layers.BatchNormalization) and layer.trainable
            for variable in (layer.moving_mean, layer.moving_variance)
        ]
        if self.world.size == 1 or not variables:
            return
        mine = np.concatenate([np.ravel(variable.numpy()) for variable in variables]) * rows
        sums = self.world.sum(np.append(mine, rows))
        averages = sums[:-1] / np.maximum(sums[-1], 1)
        start = 0
        for variable in variables:
            count = int(np.prod(variable.shape))
            variable.assign(averages[start : start + count].reshape(variable.shape))
            start += count


class _Steps:
    """Compiled steps of one phase. Each returns float32 [3]: sum of losses, of hits, of weights over all ranks.

    No XLA: on CPU it aborts around an all-reduce.
    """

    def __init__(self, world: World, model: keras.Model, objective: Objective) -> None:
        import tensorflow as tf

        loss_of, class_weights = objective.losses, tf.constant(objective.class_weights)
        variables = model.trainable_variables

        def totals(labels: Any, scores: Any, weights: Any, losses: Any) -> Any:
            hits = tf.cast(tf.equal(tf.argmax(scores, axis=-1, output_type=labels.dtype), labels), tf.float32)
            return all_reduce_sum(tf.stack([losses, tf.reduce_sum(hits * weights), tf.reduce_sum(weights)]))

        def train(pixels: Any, labels: Any, weights: Any) -> Any:
            count = all_reduce_sum(tf.reduce_sum(weights))
            with tf.GradientTape() as tape:
                scores = model(pixels, training=True)
                losses = tf.reduce_sum(loss_of(labels, scores) * weights * tf.gather(class_weights, labels))
                objective = losses / tf.maximum(count, 1.0)
                if model.losses:
                    objective += tf.add_n(model.losses) / world.replicas
            gradients = tape.gradient(objective, variables)
            model.optimizer.apply_gradients(zip(gradients, variables, strict=True))
            return totals(labels, scores, weights, losses)

        def evaluate(pixels: Any, labels: Any, weights: Any) -> Any:
            scores = model(pixels, training=False)
            return totals(labels, scores, weights, tf.reduce_sum(loss_of(labels, scores) * weights))

        self._world = world
        self._train = tf.function(lambda *batch: world.local(world.strategy.run(train, args=batch)))
        self._evaluate = tf.function(lambda *batch: world.local(world.strategy.run(evaluate, args=batch)))

    def train(self, batch: Batch) -> Any:
        """Totals of one training step, after which the weights are updated equally on all ranks."""
        return self._call(self._train, batch)

    def evaluate(self, batch: Batch) -> Any:
        """Totals of one batch in inference mode."""
        return self._call(self._evaluate, batch)

    def _call(self, step: Callable[..., Any], batch: Batch) -> Any:
        import tensorflow as tf

        local = self._world.local_replicas
        with self._world.explained():
            if local == 1:
                return step(*(tf.constant(part) for part in batch))
            pieces = _cut(batch, local)
            spread = self._world.strategy.experimental_distribute_values_from_function
            return step(*(spread(lambda at, k=k: pieces[at.replica_id_in_sync_group % local][k]) for k in range(3)))


def _cut(batch: Batch, count: int) -> list[tuple[Any, Any, Any]]:
    """The batch in equal pieces, one for each replica of this process; the last row fills up at weight 0."""
    import tensorflow as tf

    pixels, label_ids, weights = batch
    missing = -len(weights) % count
    rows = np.append(np.arange(len(weights)), np.full(missing, len(weights) - 1, np.int64))
    filled = np.append(weights, np.zeros(missing, np.float32))
    parts = zip(np.split(rows, count), np.split(filled, count), strict=True)
    return [(tf.constant(pixels[own]), tf.constant(label_ids[own]), tf.constant(weight)) for own, weight in parts]


def _cross_entropy(num_classes: int) -> Objective:
    import keras

    losses: Any = keras.losses.SparseCategoricalCrossentropy(reduction=None)  # pyright: ignore[reportArgumentType]
    return Objective(losses, np.ones(num_classes, np.float32))


def _added(results: list[Any], world: World) -> np.ndarray:
    with world.explained():
        return np.array([result.numpy() for result in results], np.float64).reshape(-1, 3).sum(axis=0)


def _means(totals: np.ndarray) -> dict[str, Any]:
    count = max(float(totals[2]), 1.0)
    return {"loss": float(totals[0]) / count, "accuracy": float(totals[1]) / count}


def _wants_batches(callbacks: list[Any]) -> bool:
    """Whether some callback listens to single batches, by its class or, as LambdaCallback, by an attribute."""
    import keras

    silent = keras.callbacks.Callback
    return any(
        name in vars(callback) or getattr(type(callback), name) is not getattr(silent, name)
        for callback in callbacks
        for name in ("on_batch_end", "on_train_batch_end")
    )
