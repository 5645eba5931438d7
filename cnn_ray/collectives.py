"""The workers of one training as TensorFlow sees them: a strategy, and the few things that all ranks agree on.

One process is one rank and, as a rule, one device; with several devices it holds several replicas, which share its
batches. With one worker the same code runs without a peer. Every collective has a time
limit: without one, a peer that stalls but lives blocks the others for ever.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from cnn_ray import errors
from cnn_ray.errors import CnnRayError, ConfigError, TrainingError

_NOTE_BYTES = 2000


class World:
    """All ranks of a training. Every method that communicates must be called by all ranks in the same order."""

    def __init__(self, timeout_s: float, devices: Sequence[str] = ()) -> None:
        """Waits until all workers of TF_CONFIG are there; must come before any other TensorFlow operation.

        With `devices` (such as "CPU:0", "CPU:1") it is one worker with a replica on each. GPUs talk by NCCL.
        """
        import tensorflow as tf

        self.timeout_s = timeout_s
        ways = tf.distribute.experimental.CommunicationImplementation
        options = tf.distribute.experimental.CommunicationOptions(
            timeout_seconds=timeout_s,
            implementation=ways.NCCL if tf.config.list_physical_devices("GPU") else ways.AUTO,
        )
        with self.explained():
            if devices:
                self.strategy: Any = tf.distribute.MirroredStrategy(list(devices))
            else:
                self.strategy = tf.distribute.MultiWorkerMirroredStrategy(communication_options=options)
            here = self.strategy.experimental_local_results(self.strategy.run(lambda: tf.constant(0)))
        self.local_replicas = len(here)
        self.replicas: int = self.strategy.num_replicas_in_sync
        self.size: int = self.replicas // self.local_replicas
        self.rank: int = 0 if devices else self.strategy.cluster_resolver.task_id or 0
        # The all-reduce of a raw argument fails ("destinations can not be empty"), hence tf.identity.
        self._sum = self._collective(lambda value: all_reduce_sum(tf.identity(value)))
        self._gather = self._collective(
            lambda value: tf.distribute.get_replica_context().all_gather(tf.identity(value), axis=0)
        )

    def _collective(self, body: Callable[[Any], Any]) -> Callable[[np.ndarray], np.ndarray]:
        import tensorflow as tf

        compiled = tf.function(lambda value: self.local(self.strategy.run(body, args=(value,))), reduce_retracing=True)

        def call(value: np.ndarray) -> np.ndarray:
            with self.explained():
                return compiled(tf.constant(value, tf.float32)).numpy()

        return call

    def local(self, value: Any) -> Any:
        """This rank's part of what `strategy.run` returned."""
        return self.strategy.experimental_local_results(value)[0]

    def sum(self, values: np.ndarray) -> np.ndarray:
        """float32, shaped like `values`: the sums over all ranks, the same bits on each."""
        return self._sum(np.asarray(values, np.float32) / np.float32(self.local_replicas))

    def gather(self, values: np.ndarray) -> np.ndarray:
        """float32 [ranks, K]: the values [K] of every rank. Counts beyond 2**24 would be rounded."""
        return self._gather(np.asarray(values, np.float32).reshape(1, -1))[:: self.local_replicas]

    def max(self, value: int) -> int:
        """The largest of the ranks' values."""
        return int(self.gather(np.array([value])).max())

    def agree(self, error: CnnRayError | None) -> None:
        """Nothing if no rank has an error; else every rank raises the same one, that of the lowest rank that has any.

        So a rank that cannot go on does not leave the others waiting for it, and the user reads its sentence.

        Raises:
            CnnRayError: the error, in its own class.
        """
        note = b"" if error is None else f"{type(error).__name__}\n{error}".encode()[:_NOTE_BYTES]
        padded = np.zeros(_NOTE_BYTES, np.uint8)
        padded[: len(note)] = np.frombuffer(note, np.uint8)
        for row in self.gather(padded):
            if row.any():
                text = row.astype(np.uint8).tobytes().rstrip(b"\0").decode(errors="ignore")
                kind, _, message = text.partition("\n")
                agreed: CnnRayError = vars(errors)[kind](message)
                agreed.agreed = True
                raise agreed

    def copy_from_rank_0(self, variables: list[Any]) -> None:
        """Afterwards the variables hold rank 0's values on every rank."""
        if self.size == 1:
            return
        for variable in variables:
            mine = np.asarray(variable.numpy())
            if mine.dtype.kind == "f":
                variable.assign(self.sum(mine if self.rank == 0 else np.zeros_like(mine)))

    def check_equal(self, variables: list[Any]) -> None:
        """Nothing if every rank holds the same bits.

        Raises:
            TrainingError: the ranks drifted apart: a bug, and no model may come of it.
        """
        crc = 0
        for variable in variables:
            crc = zlib.crc32(np.ascontiguousarray(variable.numpy()).tobytes(), crc)
        halves = self.gather(np.array([crc & 0xFFFF, crc >> 16]))
        if not (halves == halves[0]).all():
            raise TrainingError(
                f"Expected equal weights on all {self.size} workers. Received: different ones. "
                "Next: report this with the configuration; train with num_workers 1 until then."
            )

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Turn TensorFlow's runtime errors inside into one sentence; errors of the program itself pass as they are.

        Raises:
            ConfigError: memory ran out: the same command ends in the same way.
            TrainingError: a peer did not answer in time or is gone.
        """
        import tensorflow as tf

        try:
            yield
        except tf.errors.ResourceExhaustedError as error:
            raise ConfigError(
                f"Expected the batch to fit into memory. Received: {_first_line(error)}. "
                "Next: use a smaller batch_size, a smaller input_size_px, or more workers."
            ) from error
        except (tf.errors.InvalidArgumentError, tf.errors.UnimplementedError):
            raise
        except tf.errors.OpError as error:
            raise TrainingError(
                f"Expected all workers to answer within {self.timeout_s:g} s. Received: {_first_line(error)}. "
                "Next: run the same command again; it goes on from the last checkpoint. If workers are only slow, "
                "raise collective_timeout_s."
            ) from error


def all_reduce_sum(value: Any) -> Any:
    """The sum over replicas; only inside `strategy.run`. With one of them it is the value, and costs nothing."""
    import tensorflow as tf

    context = tf.distribute.get_replica_context()
    if context.num_replicas_in_sync == 1:
        return value
    return context.all_reduce(tf.distribute.ReduceOp.SUM, value)


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")
    return f"{type(error).__name__}: {text[:200]}"
