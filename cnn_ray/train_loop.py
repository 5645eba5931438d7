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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cnn_ray.collectives import World, all_reduce_sum
from cnn_ray.config import PhaseConfig
from cnn_ray.errors import ConfigError
from cnn_ray.model import walk_layers
from cnn_ray.train_state import Position, read_position, restore_callbacks, restore_model, save_state

if TYPE_CHECKING:
    import keras

log = logging.getLogger(__name__)

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
"""pixels uint8 [b, S, S, 3], label_ids int32 [b], weights float32 [b] (0 for padding)"""


@dataclass(frozen=True)
class Phase:
    """One phase: its configuration, and what `prepare` does to the model before it (freeze, unfreeze)."""

    name: str
    config: PhaseConfig
    prepare: Callable[[Any], None]


@dataclass(frozen=True)
class Batches:
    """The rows of one side that this rank holds, as a sequence of batches. A streaming source needs the same three.

    A global batch takes one row from each of `batch_size` strata and rank r holds the strata s with s % world == r
    (`cnn_ray.dataset.share_of_rank`). The order within a stratum is drawn from (seed, epoch, stratum): hence 2 workers
    x 16 see batch for batch the rows that 1 worker x 32 sees, while each holds half of them. The price: two rows of one
    stratum never share a batch, which among thousands of possible partners does not matter.
    """

    pixels: np.ndarray
    """uint8 [K, S, S, 3]"""
    label_ids: np.ndarray
    """int32 [K]"""
    strata: np.ndarray
    """int64 [K]"""
    rows_per_batch: int
    """Rows of this rank in a batch, padding included: the same on all ranks."""

    @property
    def steps(self) -> int:
        """Batches that hold all rows of this rank; the ranks then take the largest of all ranks' numbers."""
        return int(np.bincount(self.strata).max()) if len(self.strata) else 0

    def epoch(self, steps: int, order: tuple[int, int] | None) -> Iterator[Batch]:
        """`steps` batches, in the order drawn from (seed, epoch), or as they lie without one."""
        turns = np.zeros(len(self.strata), np.int64)
        for stratum in np.unique(self.strata):
            members = np.flatnonzero(self.strata == stratum)
            if order is not None:
                members = np.random.default_rng([*order, int(stratum)]).permutation(members)
            turns[members] = np.arange(len(members))
        by_turn = np.lexsort((self.strata, turns))
        ends = np.searchsorted(turns[by_turn], np.arange(steps + 1))
        for k in range(steps):
            yield self._padded(by_turn[ends[k] : ends[k + 1]])

    def _padded(self, rows: np.ndarray) -> Batch:
        """Real rows first, then own rows again at weight 0: black images would spoil the statistics of BatchNorm."""
        weights = np.zeros(self.rows_per_batch, np.float32)
        weights[: len(rows)] = 1
        if len(self.strata) == 0:
            shape = (self.rows_per_batch, *self.pixels.shape[1:])
            return np.zeros(shape, np.uint8), np.zeros(self.rows_per_batch, np.int32), weights
        filled = np.resize(rows if len(rows) else np.arange(len(self.strata)), self.rows_per_batch)
        return self.pixels[filled], self.label_ids[filled].astype(np.int32), weights


def make_batches(
    pixels: np.ndarray, label_ids: np.ndarray, strata: np.ndarray, batch_size: int, world_size: int
) -> Batches:
    """Batches of a rank's rows for the global batch size."""
    return Batches(pixels, label_ids, strata, math.ceil(batch_size / world_size))


CallbackFactory = Callable[[str], "list[keras.callbacks.Callback]"]
SaveState = Callable[[Path], None]
AfterEpoch = Callable[[dict[str, Any], SaveState], None]


class Trainer:
    """Trains one model through its phases. All ranks build one and call `run`."""

    def __init__(self, world: World, model: keras.Model, train: Batches, validation: Batches, *, seed: int) -> None:
        """Afterwards all ranks hold rank 0's start weights and agree on the steps of an epoch."""
        self.world, self.model, self.train, self.validation, self.seed = world, model, train, validation, seed
        self.train_steps, self.validation_steps = world.max(train.steps), world.max(validation.steps)
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

        self._compile(phase)
        if resume_from is not None:
            restore_model(resume_from, self.model)
        steps = _Steps(self.world, self.model)
        listeners = keras.callbacks.CallbackList(
            callbacks, model=self.model, epochs=phase.config.epochs, steps=self.train_steps, verbose=0
        )
        self.model.stop_training = False
        listeners.on_train_begin()
        if resume_from is not None:
            restore_callbacks(resume_from, callbacks)
        position = self.position
        while position.epoch < phase.config.epochs and not position.stopped:
            logs = self._run_epoch(phase, steps, listeners, _wants_batches(callbacks))
            position.stopped = self._agree_on_stop()
            position.epoch += 1
            position.history.append(logs)
            after_epoch(logs, lambda folder: save_state(folder, self.model, position, callbacks))
        listeners.on_train_end()
        self.world.check_equal(self.model.weights)

    def _compile(self, phase: Phase) -> None:
        """A fresh optimizer whose slots exist before any tf.function is traced: it cannot make variables in there."""
        import keras

        phase.prepare(self.model)
        with self.world.strategy.scope(), self.world.explained():
            kind = {"adam": keras.optimizers.Adam, "sgd": keras.optimizers.SGD}[phase.config.optimizer]
            optimizer = kind(learning_rate=phase.config.learning_rate)
            self.model.compile(
                optimizer=optimizer,
                loss="sparse_categorical_crossentropy",
                jit_compile=False,  # pyright: ignore[reportArgumentType] - Keras annotates its default alone
            )
            optimizer.build(self.model.trainable_variables)

    def _run_epoch(self, phase: Phase, steps: _Steps, listeners: Any, batch_logs: bool) -> dict[str, Any]:
        started = time.monotonic()
        number = len(self.position.history)
        listeners.on_epoch_begin(number)
        totals = np.zeros(3)
        rows = 0.0
        pending: list[Any] = []
        for k, batch in enumerate(self.train.epoch(self.train_steps, (self.seed, number))):
            listeners.on_train_batch_begin(k)
            rows += float(batch[2].sum())
            pending.append(steps.train(batch))
            if batch_logs:  # reading a result waits for the device, so only where somebody listens
                totals += pending.pop().numpy()
            listeners.on_train_batch_end(k, _means(totals) if batch_logs else {})
        totals += _added(pending, self.world)
        self._average_batchnorm(rows)
        logs = _means(totals)
        listeners.on_test_begin()
        seen = [steps.evaluate(batch) for batch in self.validation.epoch(self.validation_steps, None)]
        validation = _means(_added(seen, self.world))
        listeners.on_test_end(validation)
        logs |= {f"val_{name}": value for name, value in validation.items()}
        self._check_finite(logs["loss"], number, phase)
        logs["learning_rate"] = float(np.asarray(self.model.optimizer.learning_rate))
        listeners.on_epoch_end(number, logs)
        return {"phase": phase.name, "epoch": number + 1, **logs, "duration_s": round(time.monotonic() - started, 3)}

    def _check_finite(self, loss: float, number: int, phase: Phase) -> None:
        if not math.isfinite(loss):
            raise ConfigError(
                f"Expected a finite loss. Received: {loss} in epoch {number + 1}. "
                f"Next: lower {phase.name}.learning_rate (now {phase.config.learning_rate:g})."
            )

    def _agree_on_stop(self) -> bool:
        """Whether any rank's callbacks stop the phase. The learning rate becomes rank 0's, should theirs differ."""
        if self.world.size == 1:
            return bool(self.model.stop_training)
        rate = float(np.asarray(self.model.optimizer.learning_rate))
        votes = self.world.gather(np.array([float(bool(self.model.stop_training)), rate]))
        if votes[0, 1] != np.float32(rate):
            self.model.optimizer.learning_rate = float(votes[0, 1])
        return bool(votes[:, 0].any())

    def _average_batchnorm(self, rows: float) -> None:
        """Afterwards the moving statistics of BatchNorm layers that are in training mode are the ranks' averages.

        Keras gives these variables no aggregation, so each rank's drift after its own images. Layers in inference mode
        are left alone: averaging equal numbers would still change their last bits every epoch.
        """
        import keras

        variables: list[Any] = [
            variable
            for layer in walk_layers(self.model)
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

    def __init__(self, world: World, model: keras.Model) -> None:
        import keras
        import tensorflow as tf

        loss_of = keras.losses.SparseCategoricalCrossentropy(reduction=None)  # pyright: ignore[reportArgumentType]
        variables = model.trainable_variables

        def totals(labels: Any, scores: Any, weights: Any, losses: Any) -> Any:
            hits = tf.cast(tf.equal(tf.argmax(scores, axis=-1, output_type=labels.dtype), labels), tf.float32)
            return all_reduce_sum(tf.stack([losses, tf.reduce_sum(hits * weights), tf.reduce_sum(weights)]))

        def train(pixels: Any, labels: Any, weights: Any) -> Any:
            count = all_reduce_sum(tf.reduce_sum(weights))
            with tf.GradientTape() as tape:
                scores = model(pixels, training=True)
                losses = tf.reduce_sum(loss_of(labels, scores) * weights)
                objective = losses / tf.maximum(count, 1.0)
                if model.losses:
                    objective += tf.add_n(model.losses) / world.size
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

        with self._world.explained():
            return step(*(tf.constant(part) for part in batch))


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
