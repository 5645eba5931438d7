"""A training handed to Ray Train: its trainer, the TF_CONFIG backend, progress, and failures in one sentence."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_ray.config import TrainConfig
from cnn_ray.errors import CnnRayError, ConfigError, RunInterruptedError, TrainingError
from cnn_ray.ray_session import logs_folder
from cnn_ray.storage_base import error_of_os

if TYPE_CHECKING:
    from cnn_ray.train_worker import TrainJob, WorkerOutcome

_LOST_PEER = {"UnavailableError", "DeadlineExceededError", "AbortedError", "CancelledError", "InternalError"}
"""TensorFlow's errors (tf.errors) for a collective whose peer is gone."""
_NUMBER = re.compile(r"0x[0-9a-f]+|[0-9a-f]{16,}|\d+")


def fit(job: TrainJob, run_name: str, progress_file: Path, local: bool) -> WorkerOutcome:
    """What rank 0 returned, after as many restarts as are allowed."""
    import ray.train
    from ray.exceptions import RayError

    from cnn_ray.train_worker import run_worker

    config = job.config
    if local and config.use_gpu:
        _check_gpus(config.num_workers)
    trainer = _trainer_class(local)(
        run_worker,
        train_loop_config={"job": job},
        backend_config=_tensorflow_workers(),
        scaling_config=ray.train.ScalingConfig(num_workers=_workers(config), use_gpu=config.use_gpu),
        run_config=ray.train.RunConfig(
            name=run_name,
            storage_path=config.runs_uri,
            failure_config=ray.train.FailureConfig(max_failures=config.max_failures),
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=1),
            callbacks=[_progress_writer(progress_file)],
        ),
    )
    try:
        with _own_sigint():
            return trainer.fit().return_value  # pyright: ignore[reportReturnType]
    except (SystemExit, KeyboardInterrupt):  # Ray's handler of Ctrl-C stops the workers, then leaves with sys.exit
        raise RunInterruptedError(
            f"Interrupted. Run the same command to continue from the last checkpoint in {job.run_uri}."
        ) from None
    except (ray.train.TrainingFailedError, RayError) as error:
        lines = progress_file.read_text(encoding="utf-8").splitlines()
        raise explain_failure(error, job.run_uri, again=failed_again(lines)) from error


def _workers(config: TrainConfig) -> int | tuple[int, int]:
    """Ray's `num_workers`: a number, or (least, most) for elastic training."""
    return config.num_workers if config.min_workers is None else (config.min_workers, config.num_workers)


def _trainer_class(local: bool) -> Any:
    """Ray Train's data-parallel trainer; on a local Ray without its placement-group cleaner.

    The cleaner asks "the" cluster of the machine whether the run's controller lives, which is the one started last.
    With two local Rays it hears of a stranger's actors, takes ours for dead and kills the workers (seen with Ray 2.60).
    On a local Ray it has nothing to clean, and costs a process that imports Ray Train.
    """
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    class LocalTrainer(DataParallelTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            callbacks = super()._create_default_callbacks()
            return [c for c in callbacks if type(c).__name__ != "PlacementGroupCleanerCallback"]

    return LocalTrainer if local else DataParallelTrainer


def _check_gpus(num_workers: int) -> None:
    """Nothing, if the local Ray has the GPUs; without this, Ray waits for ever for what will never come.

    Raises:
        ConfigError: it has fewer.
    """
    import ray

    gpus = ray.cluster_resources().get("GPU", 0)
    if gpus < num_workers:
        raise ConfigError(
            f"Expected {num_workers} GPUs, one for each worker. Received: {gpus:g}. "
            "Next: lower num_workers, leave use_gpu out, or set RAY_ADDRESS to a cluster."
        )


@contextmanager
def _own_sigint() -> Iterator[None]:
    """Puts the handler of Ctrl-C back: Ray Train replaces it and leaves its own behind."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _tensorflow_workers() -> Any:
    """Ray Train's TensorFlow backend without its imports: every worker gets TF_CONFIG, nothing else is set.

    `ray.train.tensorflow` imports TensorFlow wherever it is unpickled, so in the driver and in the controller too: two
    times 5 s of CPU that compute nothing. It also sets TF_USE_LEGACY_KERAS, which we do not want. The trainer that
    takes this backend is the base class of Ray's own TensorflowTrainer.
    """
    import ray
    from ray.train.backend import Backend, BackendConfig

    def free_address() -> str:
        from ray._common.network_utils import build_address  # pyright: ignore[reportAttributeAccessIssue]
        from ray.train._internal.utils import get_address_and_port

        return build_address(*get_address_and_port())

    def set_tf_config(addresses: list[str], rank: int) -> None:
        task = {"type": "worker", "index": rank}
        os.environ["TF_CONFIG"] = json.dumps({"cluster": {"worker": addresses}, "task": task})

    class TensorflowBackend(Backend):
        def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:  # noqa: ARG002 - Ray's signature
            addresses = worker_group.execute(free_address)
            ray.get([worker_group.execute_single_async(k, set_tf_config, addresses, k) for k in range(len(addresses))])

    class TensorflowWorkers(BackendConfig):
        @property
        def backend_cls(self) -> type[Backend]:
            return TensorflowBackend

    return TensorflowWorkers()


def _progress_writer(path: Path) -> Any:
    """A Ray Train callback that appends rank 0's logs to the file, one JSON object a line.

    It runs in the controller, which Ray keeps on the driver's machine: a file is enough, and saves an actor's start-up.
    """
    import json as json_
    from pathlib import Path as Path_

    from ray.train import UserCallback

    class ProgressWriter(UserCallback):
        def _append(self, line: dict[str, Any]) -> None:
            with Path_(path).open("a", encoding="utf-8") as stream:
                stream.write(json_.dumps(line) + "\n")

        def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:  # noqa: ARG002
            self._append(metrics[0])

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:  # noqa: ARG002
            texts = {str(rank): f"{type(e).__name__}: {str(e).strip()[-300:]}" for rank, e in worker_exceptions.items()}
            self._append({"failed": texts})

    return ProgressWriter()


def explain_failure(error: BaseException, run_uri: str, *, again: bool = False) -> Exception:
    """Return what to raise for a failed training: one of our errors, or the worker's own error where it is a bug.

    `again` says that the workers failed in the same way after a restart. An error of the program itself does not go
    away when the command is repeated, so it is never a TrainingError ("run the same command again").
    """
    causes = list(_causes(error))
    ours = [cause for cause in causes if isinstance(cause, CnnRayError)]
    final = next((cause for cause in ours if not cause.retryable), None)
    if final is not None:
        return final
    innermost = causes[-1]
    # Ranks that waited for a failed one end with a TrainingError of their own: the cause is what the failed one raised.
    bug = next((cause for cause in causes if _is_final(cause)), None)
    if bug is not None:
        return _explain_final(bug)
    if ours:
        return ours[0]
    said = _last_line(innermost)
    if again:
        return ConfigError(
            f"Expected workers that keep running. Received: {said}, in the same way after each restart. Next: look for "
            f"the reason in the workers' logs (`ray logs`, or {logs_folder()}); where memory ran out, "
            "lower cache_bytes, batch_size or num_workers."
        )
    return TrainingError(
        f"Expected all workers to finish. Received: {said}. "
        f"Next: run the same command again; it goes on from the last checkpoint in {run_uri}."
    )


def failed_again(lines: Sequence[str]) -> bool:
    """Return whether the last two failures in a progress file are alike and no epoch was finished between them."""
    failures: list[set[str]] = []
    for line in map(json.loads, lines):
        if "failed" in line:
            failures.append({_NUMBER.sub("#", str(text)) for text in line["failed"].values()})
        elif "epoch" in line:
            failures.clear()
    return len(failures) > 1 and bool(failures[-1] & failures[-2])


def _is_final(cause: BaseException) -> bool:
    """Return whether the error was raised by code and not by a lost worker, node or connection."""
    from ray.exceptions import RayError
    from ray.train import TrainingFailedError

    if isinstance(cause, CnnRayError | RayError | TrainingFailedError | ConnectionError | TimeoutError):
        return False
    if not isinstance(cause, Exception) or type(cause).__module__.startswith("ray."):
        return False
    return type(cause).__name__ not in _LOST_PEER


def _explain_final(cause: BaseException) -> Exception:
    if isinstance(cause, MemoryError):
        return ConfigError(
            "Expected enough memory on the workers. Received: MemoryError. "
            "Next: lower cache_bytes, batch_size or num_workers."
        )
    if isinstance(cause, OSError) and cause.errno is not None:
        return error_of_os(cause, str(cause.filename or "a worker's disk"))
    return cause if isinstance(cause, Exception) else RuntimeError(_last_line(cause))


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    return f"{type(error).__name__}: {lines[-1][:300]}"


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it wraps, outermost first: Ray keeps causes in four different places."""
    yield error
    inner = [*getattr(error, "worker_failures", {}).values()]
    inner += [getattr(error, name, None) for name in ("controller_failure", "_base_exc", "cause", "__cause__")]
    for cause in inner:
        if isinstance(cause, BaseException):
            yield from _causes(cause)
