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
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnn_ray.config import StorageConfig, TrainConfig, build_config
from cnn_ray.dataset import LabelledSet, absolute_uri, describe_set, read_labelled_set, sample_images, write_split
from cnn_ray.errors import ConfigError, DataError, NotFoundError
from cnn_ray.guards import Finding, check_config, check_model, raise_errors
from cnn_ray.lease import Lease
from cnn_ray.model import check_definition, input_size_px
from cnn_ray.predictor import cpu_count
from cnn_ray.ray_session import connected
from cnn_ray.storage import open_store
from cnn_ray.storage_options import use_storage_options
from cnn_ray.train_ray import fit

log = logging.getLogger(__name__)

FINISHED = "_finished.json"
CONFIG = "_config.json"
OnEpoch = Callable[[dict[str, Any]], None]
OnFinding = Callable[[Finding], None]

HARMLESS = frozenset(
    (
        *("num_workers", "min_workers", "use_gpu", "max_failures", "collective_timeout_s", "cache_bytes", "allow"),
        *StorageConfig.model_fields,
    )
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
    """What a dry run says: one sentence, what the guards saw, and lines about the data."""

    sentence: str
    findings: list[Finding]
    data: list[str]


def run_training(
    config: TrainConfig,
    *,
    on_epoch: OnEpoch | None = None,
    on_finding: OnFinding | None = None,
    on_data: Callable[[list[str]], None] | None = None,
    resume_uri: str | None = None,
) -> TrainResult:
    """A model version trained as configured. `on_epoch` is called here with the logs of every epoch as it ends, and
    `on_finding` with every finding of the guards that does not stop the run; `on_data` is called with
    lines about the classes and what is left out (`describe_set`), before anything is trained.

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

    use_storage_options(config)
    config, labelled, findings = _checked(config, on_data)
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
            outcome = fit(job, run_name, progress_file, local)
        if outcome.error is not None:
            raise outcome.error
        result = TrainResult(outcome.reference, outcome.artifact_uri, outcome.metrics or {}, job.run_uri)
        store.put(FINISHED, json.dumps({"reference": result.reference}).encode())
    return result


def _checked(
    config: TrainConfig, on_data: Callable[[list[str]], None] | None = None
) -> tuple[TrainConfig, LabelledSet, list[Finding]]:
    """Check everything that can be checked without TensorFlow."""
    config = _absolute(config)
    check_definition(config.model)
    labelled = read_labelled_set(config.data)
    if on_data is not None:
        on_data(describe_set(labelled))
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

    use_storage_options(config)
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
    return Rehearsal(sentence, findings, describe_set(labelled))


def resumed_config(run_uri: str, config_file: str | None, flags: Mapping[str, Any]) -> TrainConfig:
    """The configuration of an unfinished run, with harmless flags (`HARMLESS`) over it.

    Raises:
        ConfigError: no such run, it is finished, or a flag would change what comes of it.
    """
    asked = {name: value for name in StorageConfig.model_fields if (value := flags.get(name)) is not None}
    use_storage_options(build_config(StorageConfig, asked, source="the flags"))
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
    if "failed" in line:
        for rank, text in line["failed"].items():
            log.warning("worker %s failed (%s)", rank, " ".join(text.split()))
    elif on_epoch is not None:
        on_epoch(line)
