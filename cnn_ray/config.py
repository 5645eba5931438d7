"""One frozen class per job: the same fields are YAML keys, command-line flags, `--help` texts and README rows.

The string under a field is its documentation. Units are in the names (`_s`, `_px`, `_bytes`), locations end in `_uri`.
Precedence: default < YAML file < flag. The environment is read for credentials and RAY_ADDRESS only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from datetime import date as Date
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from cnn_ray.errors import ConfigError

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
REFERENCE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}@([1-9][0-9]{0,8}|[A-Za-z][A-Za-z0-9_-]{0,99})$"

Engine = Literal["auto", "tensorflow", "openvino"]
Precision = Literal["auto", "f32", "bf16", "mixed_bfloat16", "mixed_float16"]
PositiveInt = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of the job configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ModelConfig(Config):
    """Which model answers and how its inputs are read: shared by scoring and serving, so that answers are the same."""

    model: str
    """Model reference, NAME@VERSION or NAME@ALIAS, for instance phishing@3 or phishing@champion."""
    models_uri: str = "models"
    """Folder or s3:// prefix that holds the models."""
    engine: Engine = "auto"
    """What computes the scores: openvino (fast on CPUs), tensorflow (GPUs), or auto."""
    precision: Precision = "auto"
    """Number format of the engine; auto takes a faster one only where the model's own figures allow it."""
    num_threads: Annotated[int, Field(ge=0)] = 0
    """Threads of one predictor on a CPU; 0 means all cores that this process may use."""
    max_image_pixels: PositiveInt = 64_000_000
    """An image with more pixels than this is set aside as too_large before it is decoded."""
    max_image_bytes: PositiveInt = 64 * 1024**2
    """A file with more bytes than this is set aside as too_large before it is read."""

    @field_validator("model")
    @classmethod
    def _model_reference(cls, value: str) -> str:
        if not re.match(REFERENCE_PATTERN, value):
            raise ValueError(f"Expected NAME@VERSION or NAME@ALIAS, for instance phishing@3. Received: {value!r}.")
        return value


class ScoreConfig(ModelConfig):
    """One scoring run: every image under the input becomes one row of Parquet, or one row of the quarantine."""

    input_uri: str
    """Folder, s3:// prefix, or manifest (.csv, .parquet, .jsonl) of the images; {date} is replaced by --date."""
    output_uri: str
    """Folder or s3:// prefix for the results; each model version and date gets its own partition below it."""
    date: Date | None = None
    """UTC date (YYYY-MM-DD) of the partition; also fills {date} in the input."""
    uri_column: str = "uri"
    """Column of a manifest input that holds the image locations."""
    runner: Literal["auto", "local", "ray"] = "auto"
    """local (this process), ray (a cluster, or a local Ray), or auto: ray when RAY_ADDRESS is set."""
    limit: PositiveInt | None = None
    """Score only the first N images, to try things out; such an output never becomes a full run."""
    shard_size: Annotated[int, Field(ge=0, le=4096)] = 0
    """Images per shard: the unit of work, of retry and of output (one Parquet part each). 0: 32, 64 and 128, so that
    something is committed soon, then 256 each; 512 from the 65th shard on and 1,024 from the 129th (fewer where their
    pixels are more than 256 MiB), which makes some 1,060 parts of a million images."""
    batch_size: PositiveInt = 32
    """Images per call of the tensorflow engine; openvino computes one image per thread at a time."""
    max_quarantine_rate: Rate = 0.05
    """Above this share of unreadable images the run ends with exit code 4 and readers refuse it."""
    accept: bool = False
    """Take the unreadable images of this run as they are, however many; later runs judge only what comes on top."""
    retry_quarantined: bool = False
    """Try the quarantined images once more, as they are in the input now."""
    fetch_concurrency: Annotated[int, Field(ge=0)] = 0
    """Threads that fetch and decode at the same time in one worker; 0 means as many as it has cores (32 for s3://)."""
    num_predict_actors: Annotated[int, Field(ge=0)] = 0
    """Ray runner: how many predictors run side by side; 0 means one for each GPU share, or one a node without GPUs."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """Ray runner: GPUs for each predictor; fractions are allowed."""
    report: bool = True
    """Write _report.html, for people, into the partition at the end; it fetches the images that it shows once more."""
    lease_s: Annotated[float, Field(ge=2)] = 60
    """How long a run that died silently blocks the partition for others."""

    @field_validator("date", mode="before")
    @classmethod
    def _date_is_a_date(cls, value: object) -> object:
        if isinstance(value, str) and not re.match(r"^\d{4}-\d{2}-\d{2}$", value):
            raise ValueError(f"Expected a date like 2026-11-23. Received: {value!r}.")
        return value

    @model_validator(mode="after")
    def _date_for_placeholder(self) -> ScoreConfig:
        if "{date}" in self.input_uri and self.date is None:
            raise ValueError("Expected --date, because the input holds {date}. Received: no date.")
        return self


class DataConfig(Config):
    """Labelled images: a folder of class folders, or a manifest with one row per image."""

    uri: str
    """Folder or s3:// prefix with one folder per class, or a manifest (.csv, .parquet) of labelled images."""
    uri_column: str = "uri"
    """Manifest column with the image location; relative ones start at the manifest's folder."""
    label_column: str = "label"
    """Manifest column with the class name."""
    group_column: str | None = None
    """Manifest column (domain, brand) whose values never stand on both sides of the split."""
    split_column: str | None = None
    """Manifest column with train, validation or test; without it the split is drawn from the seed."""
    labels: tuple[str, ...] | None = None
    """Class names in output order; by default the sorted names found in the data."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the images (of whole groups, where there are groups) kept for validation."""
    limit: PositiveInt | None = None
    """Take only N images, evenly over the classes, to try things out."""


class ModelDefinition(Config):
    """What is trained: the architecture, its start weights and its head."""

    architecture: str = "simple_cnn"
    """simple_cnn, or the name of a keras.applications model such as MobileNetV2, ResNet50 or EfficientNetB0."""
    weights: str | None = None
    """Start weights of the backbone: imagenet (downloaded by Keras), a .weights.h5 file (local or s3://), or none."""
    input_size_px: PositiveInt | None = None
    """Side of the square model input; by default the architecture's own size."""
    hidden_units: Annotated[int, Field(ge=0)] = 0
    """Width of a Dense layer between pooling and output; 0 means none. simple_cnn has its own of 64."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of features dropped before the output layer while training."""
    augmentation: Literal["none", "photo"] = "none"
    """photo: flip, rotation, zoom and contrast, inside the model and active only in training."""


class PhaseConfig(Config):
    """One training phase: how long and how fast."""

    epochs: Annotated[int, Field(ge=0)]
    """Passes over the training images."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Step size of the optimizer; it does not change with the number of workers."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Keras optimizer."""
    patience: PositiveInt | None = None
    """Stop after N epochs without a lower validation loss, and go back to the best weights; by default never."""


class TrainConfig(Config):
    """One training run: labelled images become a model version."""

    name: str
    """Model name; the run writes the next free version under it."""
    models_uri: str = "models"
    """Folder or s3:// prefix that holds the models."""
    runs_uri: str = "runs"
    """Folder or s3:// prefix for checkpoints and Ray Train's records."""
    data: DataConfig
    """The labelled images."""
    model: ModelDefinition = ModelDefinition()
    """The network."""
    train: PhaseConfig = PhaseConfig(epochs=10, learning_rate=1e-3)
    """First phase: the whole network, or only the head when start weights are given (the base is frozen)."""
    fine_tune: PhaseConfig | None = None
    """Second phase: the whole network at a low learning rate, BatchNorm in inference mode."""
    batch_size: PositiveInt = 32
    """Global batch size, over all workers."""
    seed: int = 0
    """Seed of the split, the start weights and the shuffling."""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """Keras dtype policy while training; the published model is float32 in any case."""
    num_workers: PositiveInt = 1
    """Ray Train workers; one worker is one GPU when use_gpu is set."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """How often a broken worker group is restarted from the last checkpoint."""
    collective_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A worker that waits longer than this for the others ends with an error instead of hanging."""
    positive_label: str | None = None
    """The class that `flagged` is about, such as phishing; by default the last one of two classes."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Score of the positive label from which a row is flagged."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not re.match(NAME_PATTERN, value):
            raise ValueError(f"Expected letters, digits, dot, dash or underscore. Received: {value!r}.")
        return value


class ServeConfig(ModelConfig):
    """The HTTP endpoint of one model."""

    host: str = "127.0.0.1"
    """Address to listen on. There is no authentication yet: keep it on loopback or behind a gateway."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Autoscaling: never fewer replicas than this."""
    max_replicas: PositiveInt = 2
    """Autoscaling: never more replicas than this."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8
    """Autoscaling: requests in flight per replica that Ray Serve aims at."""
    max_ongoing_requests: PositiveInt = 64
    """Requests that one replica takes at the same time."""
    max_queued_requests: PositiveInt = 256
    """Requests that wait in front of the replicas before 503 is answered."""
    max_batch_size: PositiveInt = 16
    """Images per call of the model."""
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = 0.002
    """How long a batch waits for more images."""
    max_body_bytes: PositiveInt = 64 * 1024**2
    """A request body with more bytes is answered with 413."""
    max_instances: PositiveInt = 128
    """Images in one request."""
    num_cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs of one replica."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one replica."""

    @model_validator(mode="after")
    def _replica_bounds(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"Expected min_replicas <= max_replicas. Received: {self.min_replicas} > {self.max_replicas}."
            )
        return self


ConfigT = TypeVar("ConfigT", bound=Config)


def build_config(kind: type[ConfigT], *layers: Mapping[str, Any], source: str = "configuration") -> ConfigT:
    """The configuration of the given kind; later layers win key by key, nested mappings are merged.

    Raises:
        ConfigError: one sentence per wrong key, with the nearest valid name for an unknown one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = _merge(merged, layer)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, source)) from None


def load_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, read with the safe loader.

    Raises:
        ConfigError: the file is missing, is not YAML, or is not a mapping.
    """
    import yaml  # 40 ms that --help does not need

    try:
        loaded: object = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"Expected a readable YAML file. Received: {path} ({error.strerror}). Next: check the path."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Expected YAML in {path}. Received: {reason}. Next: correct the file.") from None
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"Expected keys and values in {path}. Received: {type(loaded).__name__}. Next: see jobs/*.yaml."
        )
    return {str(key): value for key, value in loaded.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]


def _merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value  # pyright: ignore[reportUnknownArgumentType]
    return merged


def _explain(kind: type[Config], error: ValidationError, source: str) -> str:
    sentences: list[str] = []
    for problem in error.errors(include_url=False, include_context=False):
        where = ".".join(str(step) for step in problem["loc"])
        if problem["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(problem["loc"][-1]), _keys_at(kind, problem["loc"][:-1]), n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"valid keys: {', '.join(_keys_at(kind, problem['loc'][:-1]))}."
            )
            sentences.append(f"Expected a known key in {source}. Received: {where}. Next: {hint}")
        elif problem["type"] == "missing":
            sentences.append(
                f"Expected a value for {where}. Received: none. Next: give it in the YAML file or as a flag."
            )
        elif problem["type"] == "value_error":
            message = str(problem["msg"]).removeprefix("Value error, ")
            sentences.append(f"{message} Next: correct {where}." if where else f"{message} Next: correct the {source}.")
        else:
            shown = repr(problem["input"])[:80]
            sentences.append(f"Expected for {where}: {problem['msg'].lower()}. Received: {shown}. Next: correct it.")
    return "\n".join(sentences)


def _keys_at(kind: type[Config], path: tuple[int | str, ...]) -> list[str]:
    current: type[Config] = kind
    for step in path:
        field = current.model_fields.get(str(step))
        annotation = None if field is None else field.annotation
        inner = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
        configs = [a for a in inner if issubclass(a, Config)]
        if not configs:
            return []
        current = configs[0]
    return list(current.model_fields)
