"""A job handed to a cluster through Ray's job server, at most once per partition and attempt.

The submission id is a hash of what the job writes, so a second submission of the same work meets the first one instead
of running beside it. The configuration is checked here, before anything is uploaded, and travels in a working directory
with the package and its entry points, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date as Date
from pathlib import Path
from typing import Any, Literal

import cnn_ray
from cnn_ray.config import Config, EvaluateConfig, NightlyConfig, ScoreConfig, TrainConfig
from cnn_ray.errors import ConfigError
from cnn_ray.redaction import redact

JobKind = Literal["score", "train", "evaluate", "nightly"]
KINDS: Mapping[JobKind, type[Config]] = {
    "score": ScoreConfig,
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "nightly": NightlyConfig,
}
CONFIG_NAME = "job.yaml"


@dataclass(frozen=True)
class Resources:
    """What the entrypoint itself holds while it runs. The work of score and train asks for its own; an evaluation runs
    in the entrypoint. 0 CPUs: it runs on the head node, whatever is there."""

    num_cpus: float = 0
    num_gpus: float = 0
    memory_bytes: int = 0


@dataclass(frozen=True)
class Submission:
    """A job that can be submitted: `document` is its configuration as a YAML file would hold it."""

    kind: JobKind
    submission_id: str
    document: Mapping[str, Any]
    arguments: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def entrypoint(self) -> str:
        """The command that the cluster runs in the working directory."""
        return " ".join(["python", f"jobs/{self.kind}.py", "--config", CONFIG_NAME, *self.arguments])


def submission_of(
    kind: JobKind, config: Config, document: Mapping[str, Any], *, attempt: int, today: Date
) -> Submission:
    """The submission of a checked configuration; `today` is the UTC date that a night is looked back from.

    Raises:
        ConfigError: a location is relative, so that it would end with the job's own folder.
    """
    _refuse_relative(config.model_dump(mode="json"))
    target = _target(config, today)
    digest = hashlib.sha256(json.dumps(target, sort_keys=True).encode()).hexdigest()[:12]
    day = "" if target.get("date") is None else f"-{target['date']}"
    metadata = {"cnn_ray": cnn_ray.__version__, "job": kind, "attempt": str(attempt)}
    metadata |= {name: redact(str(value)) for name, value in target.items() if name != "config" and value is not None}
    arguments = ("--today", today.isoformat()) if kind == "nightly" else ()
    return Submission(kind, f"cnnray-{kind}{day}-{digest}-{attempt}", document, arguments, metadata)


def _target(config: Config, today: Date) -> dict[str, Any]:
    """What the job writes: two jobs with the same one must not run side by side."""
    match config:
        case ScoreConfig():
            day = None if config.date is None else config.date.isoformat()
            return {"output": config.output_uri.rstrip("/"), "date": day, "model": config.model}
        case NightlyConfig():
            score = config.score
            return {"output": score.output_uri.rstrip("/"), "date": today.isoformat(), "model": score.model}
        case TrainConfig():
            whole = config.model_dump(mode="json")
            return {"output": config.models_uri.rstrip("/"), "model": config.name, "config": whole}
        case EvaluateConfig():
            whole = config.model_dump(mode="json")
            return {"output": config.output_uri.rstrip("/"), "model": config.model, "config": whole}
        case _:
            raise ConfigError(
                f"Expected one of the jobs {', '.join(KINDS)}. Received: {type(config).__name__}. Next: name a job."
            )


def _refuse_relative(values: Mapping[str, Any], prefix: str = "") -> None:
    for name, value in values.items():
        if isinstance(value, Mapping):
            _refuse_relative(value, f"{prefix}{name}.")
        elif (
            (name == "uri" or name.endswith("_uri"))
            and isinstance(value, str)
            and not value.startswith(("/", "s3://", "file:///", "keras.datasets."))
        ):
            raise ConfigError(
                f"Expected for {prefix}{name} s3:// or an absolute folder that every node has. Received: {value!r}, "
                "which on a cluster lies in the job's own folder and ends with it. Next: name the whole location."
            )


@contextmanager
def working_folder(submission: Submission) -> Iterator[Path]:
    """Inside, a folder with the package, the entry points and the configuration: all that the job needs from here.

    The configuration may hold a webhook's address, so only this user may look into it.
    """
    import yaml

    package = Path(cnn_ray.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    with tempfile.TemporaryDirectory(prefix="cnn_ray-submit-") as name:
        folder = Path(name)
        shutil.copytree(package, folder / "cnn_ray", ignore=ignored)
        shutil.copytree(
            package.parent / "jobs", folder / "jobs", ignore=shutil.ignore_patterns("__pycache__", "*.yaml")
        )
        text = yaml.safe_dump(dict(submission.document), sort_keys=False)
        (folder / CONFIG_NAME).write_text(text, encoding="utf-8")
        yield folder


def runtime_env(folder: Path, requirements: str | None) -> dict[str, Any]:
    """Ray's runtime environment: the working directory, and with `requirements` (a file of pins) a virtual environment
    that every node makes once. Without it the node image has the dependencies.

    Raises:
        ConfigError: there is no such file.
    """
    environment: dict[str, Any] = {"working_dir": str(folder)}
    if requirements is None:
        return environment
    try:
        lines = Path(requirements).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigError(
            f"Expected a file of pins. Received: {requirements} ({error.strerror}). Next: check the path."
        ) from None
    pins = [line.strip() for line in lines]
    return environment | {"pip": [pin for pin in pins if pin and not pin.startswith("#")]}
