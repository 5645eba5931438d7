"""The Ray Train driver: configuration -> a published model version. Light: Ray is imported when a run starts.

The run's folder under `runs_uri` is named by what decides the result (configuration and data), so the same command
after Ctrl-C, a crash or a lost node goes on from the last checkpoint; once a run is finished, the same command trains
the next version.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn_ray.config import TrainConfig, build_config
from cnn_ray.dataset import LabelledSet, absolute_uri, read_labelled_set, sample_images, write_split
from cnn_ray.errors import CnnRayError, ConfigError, DataError, NotFoundError, RunInterruptedError, TrainingError
from cnn_ray.guards import Finding, check_config, check_model, raise_errors
from cnn_ray.lease import Lease
from cnn_ray.model import check_definition, input_size_px
from cnn_ray.predictor import cpu_count
from cnn_ray.ray_session import connected
from cnn_ray.storage import open_store

if TYPE_CHECKING:
    from cnn_ray.train_worker import TrainJob, WorkerOutcome

log = logging.getLogger(__name__)

FINISHED = "_finished.json"
CONFIG = "_config.json"
OnEpoch = Callable[[dict[str, Any]], None]
OnFinding = Callable[[Finding], None]

HARMLESS = frozenset(
    ("num_workers", "min_workers", "use_gpu", "max_failures", "collective_timeout_s", "cache_bytes", "allow")
)
"""Fields that decide how a run is computed but not what comes of it: a resumed run may change them."""
SAMPLE_IMAGES = 64
LEASE_S = 60.0


@dataclass(frozen=True)
class TrainResult:
    """A finished training: the published version, its last metrics, and where checkpoints and logs are."""

    reference: str
    artifact_uri: str
    metrics: dict[str, Any]
    run_uri: str


@dataclass(frozen=True)
class Rehearsal:
    """What a dry run says: one sentence, and what the guards saw."""

    sentence: str
    findings: list[Finding]


def run_training(
    config: TrainConfig,
    *,
    on_epoch: OnEpoch | None = None,
    on_finding: OnFinding | None = None,
    resume_uri: str | None = None,
) -> TrainResult:
    """A model version trained as configured. `on_epoch` is called here with the logs of every epoch as it ends, and
    `on_finding` with every finding of the guards that does not stop the run.

    Everything that can be checked without TensorFlow is checked before Ray starts. A local Ray is started unless one is
    connected or RAY_ADDRESS names a cluster, and stopped again.

    Raises:
        ConfigError: data, architecture, weights or labels do not fit together, or are not those of `resume_uri`.
        GuardError: a guard found a mistake that `allow` does not name.
        StorageError: data, models or runs cannot be read or written.
        TrainingError: workers failed more often than max_failures.
        BusyError: another driver works on this very run.
        RunInterruptedError: Ctrl-C; the same command goes on from the last checkpoint.
    """
    from cnn_ray.train_worker import SPLIT, TrainJob

    config, labelled, findings = _checked(config)
    run_name = _run_name(config, labelled)
    job = TrainJob(config, labelled, f"{config.runs_uri.rstrip('/')}/{run_name}", tuple(findings))
    if resume_uri is not None and job.run_uri != open_store(resume_uri).uri:
        raise ConfigError(
            f"Expected the images and labels of {resume_uri}. Received: others in {config.data.uri}, which are a run "
            f"of their own. Next: restore the data, or start anew without --resume."
        )
    store = open_store(job.run_uri)
    # Read by Ray when it starts: 2 s otherwise, waited several times in a run.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    if not os.environ.get("RAY_ADDRESS"):
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # an actor that waits for the cloud's notice
    cores = max(cpu_count(), config.num_workers)
    with Lease(store, LEASE_S):  # two drivers in one folder would remove each other's checkpoints
        store.put(CONFIG, config.model_dump_json(indent=2).encode())
        store.put(SPLIT, write_split(labelled))
        with connected(num_cpus=cores) as local, _epochs(on_epoch, on_finding) as progress_file:
            outcome = _fit(job, run_name, progress_file, local)
        if outcome.error is not None:
            raise outcome.error
        result = TrainResult(outcome.reference, outcome.artifact_uri, outcome.metrics or {}, job.run_uri)
        store.put(FINISHED, json.dumps({"reference": result.reference}).encode())
    return result


def _checked(config: TrainConfig) -> tuple[TrainConfig, LabelledSet, list[Finding]]:
    """Everything that can be checked without TensorFlow, done."""
    config = _absolute(config)
    check_definition(config.model)
    labelled = read_labelled_set(config.data)
    _check_positive_label(config, labelled)
    images = sample_images(labelled, "train", SAMPLE_IMAGES, input_size_px(config.model))
    if not images:
        raise DataError(
            f"Expected readable images in {config.data.uri}. Received: none of those looked at. Next: check data.uri."
        )
    findings = check_config(config, labelled, [(image.width_px, image.height_px) for image in images])
    raise_errors(findings, config.allow)
    return config, labelled, findings


def dry_run(config: TrainConfig) -> Rehearsal:
    """What a training would do. The model is built in this process, so that all guards can look.

    Raises:
        ConfigError, GuardError: as `run_training` would.
    """
    import numpy as np

    from cnn_ray.model import build_classifier

    config, labelled, findings = _checked(config)
    model = build_classifier(config.model, len(labelled.labels), seed=config.seed)
    images = sample_images(labelled, "train", SAMPLE_IMAGES, input_size_px(config.model))
    findings += check_model(config, labelled, model, np.stack([image.pixels for image in images]))
    raise_errors(findings, config.allow)
    sides = ", ".join(f"{len(labelled.rows(split))} {split}" for split in ("train", "validation", "test"))
    sentence = (
        f"Would train {config.model.architecture} ({model.count_params():,} parameters) on {len(labelled.uris)} images "
        f"of {len(labelled.labels)} classes ({sides}) with {config.num_workers} workers."
    )
    return Rehearsal(sentence, findings)


def resumed_config(run_uri: str, config_file: str | None, flags: Mapping[str, Any]) -> TrainConfig:
    """The configuration of an unfinished run, with harmless flags (`HARMLESS`) over it.

    Raises:
        ConfigError: no such run, it is finished, or a flag would change what comes of it.
    """
    store = open_store(run_uri)
    given = sorted(name for name, value in flags.items() if value is not None and name not in HARMLESS)
    if config_file is not None or given:
        raise ConfigError(
            f"Expected --resume with no more than {', '.join(sorted(HARMLESS))}. Received: "
            f"{given[0] if given else '--config'}. Next: leave it out; the run keeps its own configuration."
        )
    try:
        saved = json.loads(store.get(CONFIG))
    except NotFoundError:
        raise ConfigError(
            f"Expected the folder of a training run. Received: {run_uri}, which has no {CONFIG}. "
            "Next: name a folder below runs_uri."
        ) from None
    if store.exists(FINISHED):
        reference = json.loads(store.get(FINISHED))["reference"]
        raise ConfigError(
            f"Expected an unfinished run. Received: {run_uri}, which became {reference}. "
            "Next: train again with --config to get the next version."
        )
    harmless = {name: value for name, value in flags.items() if value is not None}
    return build_config(TrainConfig, saved, harmless, source=f"{run_uri}/{CONFIG}")


def _absolute(config: TrainConfig) -> TrainConfig:
    """The configuration with absolute locations: workers run in another folder."""
    model = config.model
    if model.weights is not None and model.weights != "imagenet" and not model.weights.startswith("s3://"):
        model = model.model_copy(update={"weights": open_store(model.weights).uri})
    locations = {field: open_store(getattr(config, field)).uri for field in ("models_uri", "runs_uri")}
    data = config.data.model_copy(update={"uri": absolute_uri(config.data.uri)})
    return config.model_copy(update={**locations, "data": data, "model": model})


def _check_positive_label(config: TrainConfig, labelled: LabelledSet) -> None:
    if config.positive_label is not None and config.positive_label not in labelled.labels:
        raise ConfigError(
            f"Expected positive_label to be one of {', '.join(labelled.labels)}. Received: {config.positive_label!r}. "
            "Next: correct positive_label."
        )


def _run_name(config: TrainConfig, labelled: LabelledSet) -> str:
    """NAME-DIGEST-N: N counts finished runs of the same configuration and data, so an unfinished one is found again."""
    decides = config.model_dump_json(exclude=set(HARMLESS))
    digest = hashlib.sha256(f"{decides}\n{labelled.digest()}".encode()).hexdigest()[:10]
    store = open_store(config.runs_uri)
    number = 1
    while store.exists(f"{config.name}-{digest}-{number}/{FINISHED}"):
        number += 1
    return f"{config.name}-{digest}-{number}"


def _fit(job: TrainJob, run_name: str, progress_file: Path, local: bool) -> WorkerOutcome:
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
            "Expected to finish training. Received: Ctrl-C. "
            f"Next: the same command goes on from the last checkpoint in {job.run_uri}."
        ) from None
    except (ray.train.TrainingFailedError, RayError) as error:
        raise explain_failure(error, job.run_uri) from error


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
            for rank, error in worker_exceptions.items():
                self._append({"failed_rank": rank, "error": f"{type(error).__name__}: {str(error).strip()[-300:]}"})

    return ProgressWriter()


@contextmanager
def _epochs(on_epoch: OnEpoch | None, on_finding: OnFinding | None) -> Iterator[Path]:
    """A file inside; every line that appears in it is handed to `on_epoch` from a thread, the last ones at the end."""
    with tempfile.TemporaryDirectory(prefix="cnn_ray-progress-") as folder:
        path = Path(folder) / "epochs.jsonl"
        path.touch()
        done = threading.Event()

        def follow() -> None:
            with path.open(encoding="utf-8") as stream:
                partial = ""
                last = False
                while not last:
                    last = done.wait(0.2)
                    partial += stream.read()
                    *lines, partial = partial.split("\n")
                    for line in lines:
                        _hand_over(json.loads(line), on_epoch, on_finding)

        thread = threading.Thread(target=follow, name="cnn_ray-epochs", daemon=True)
        thread.start()
        try:
            yield path
        finally:
            done.set()
            thread.join()


def _hand_over(line: dict[str, Any], on_epoch: OnEpoch | None, on_finding: OnFinding | None) -> None:
    for finding in line.pop("findings", []):
        if on_finding is not None:
            on_finding(Finding(**finding))
    if "failed_rank" in line:
        log.warning("worker %s failed (%s)", line["failed_rank"], " ".join(line["error"].split()))
    elif on_epoch is not None:
        on_epoch(line)


def explain_failure(error: BaseException, run_uri: str) -> CnnRayError:
    """The one of our errors that hides in Ray's wrappers, else a TrainingError that names the innermost cause."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, CnnRayError):
            return cause
    innermost = causes[-1]
    lines = [line.strip() for line in str(innermost).splitlines() if line.strip()] or ["no message"]
    return TrainingError(
        f"Expected all workers to finish. Received: {type(innermost).__name__}: {lines[-1][:300]}. "
        f"Next: run the same command again; it goes on from the last checkpoint in {run_uri}."
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it wraps, outermost first: Ray keeps causes in four different places."""
    yield error
    inner = [*getattr(error, "worker_failures", {}).values()]
    inner += [getattr(error, name, None) for name in ("controller_failure", "_base_exc", "cause", "__cause__")]
    for cause in inner:
        if isinstance(cause, BaseException):
            yield from _causes(cause)
