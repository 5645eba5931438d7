"""One frozen class per job: the same fields are YAML keys, command-line flags, `--help` texts and README rows.

The string under a field is its documentation. Units are in the names (`_s`, `_px`, `_bytes`), locations end in `_uri`.
Precedence: default < YAML file < flag. The environment is read for credentials and RAY_ADDRESS only.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from datetime import date as Date
from datetime import datetime
from typing import Annotated, Any, Literal, Self, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from cnn_ray.errors import ConfigError
from cnn_ray.partitions import PLACEHOLDERS, differs_by_day, placeholders
from cnn_ray.yaml_files import load_yaml as load_yaml

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}$"
S3_SCHEMES = re.compile(r"^s3[an]?://", re.IGNORECASE)
REFERENCE_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,99}@([1-9][0-9]{0,8}|[A-Za-z][A-Za-z0-9_-]{0,99})$"

Engine = Literal["auto", "tensorflow", "openvino"]
Precision = Literal["auto", "f32", "bf16", "mixed_bfloat16", "mixed_float16"]
PositiveInt = Annotated[int, Field(ge=1, le=2**53)]
Rate = Annotated[float, Field(ge=0, le=1)]


def _as_date(value: object) -> object:
    """Return the date that a file or a flag writes as text; a number is no date, whatever pydantic makes of it."""
    if isinstance(value, Date) and not isinstance(value, datetime):
        return value
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", value):
        raise ValueError(f"Expected a date like 2026-11-23. Received: {value!r}.")
    try:
        return Date.fromisoformat(value)
    except ValueError:
        raise ValueError(f"Expected a date of the calendar. Received: {value}, which does not exist.") from None


def parse_date(text: str, flag: str) -> Date:
    """Return the date that a flag gives.

    Raises:
        ConfigError: it is none, or not in the calendar.
    """
    try:
        return Date.fromisoformat(str(_as_date(text)))
    except ValueError as error:
        raise ConfigError(f"{error} Next: correct {flag}.") from None


Day = Annotated[Date, BeforeValidator(_as_date)]
"""A UTC date."""


def _as_patterns(values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the patterns of names; an empty one names nothing, and is a mistake."""
    wrong = next((value for value in values if not value or "\0" in value), None)
    if wrong is not None:
        raise ValueError(f"Expected patterns such as *.png. Received: {wrong!r}.")
    return values


Patterns = Annotated[tuple[str, ...], AfterValidator(_as_patterns)]
"""Patterns of fnmatch over names relative to an input."""


class Config(BaseModel):
    """Base of the job configurations: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _one_name_for_s3(cls, value: Any) -> Any:
        """Write s3a:// and s3n://, Hadoop's names, and S3:// as s3://."""
        if isinstance(value, str):
            return S3_SCHEMES.sub("s3://", value)
        if isinstance(value, list | tuple):
            items: list[Any] = [*value]
            return [S3_SCHEMES.sub("s3://", item) if isinstance(item, str) else item for item in items]
        return value


class StorageConfig(Config):
    """How S3 is asked, beyond what AWS's own environment and files say: shared by all jobs, on every node."""

    request_payer: Literal["requester"] | None = None
    """requester: this account pays for what it reads from and writes to buckets of others (requester pays)."""
    sse: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """Server-side encryption asked for with every object that is written; by default the bucket's own."""
    sse_kms_key_id: Annotated[str, Field(min_length=1)] | None = None
    """Id or ARN of the KMS key for sse aws:kms; by default the account's own key."""
    addressing_style: Literal["auto", "path", "virtual"] | None = None
    """Where the bucket stands in a request: path, virtual (in the host name), or auto as boto3 chooses. By default what
    the AWS profile says, else auto on AWS and path on other servers."""

    @model_validator(mode="after")
    def _key_of_kms(self) -> Self:
        if self.sse_kms_key_id is not None and self.sse not in ("aws:kms", "aws:kms:dsse"):
            raise ValueError(f"Expected sse aws:kms with sse_kms_key_id. Received: {self.sse or 'none'}.")
        return self


class ModelConfig(StorageConfig):
    """Which model answers and how its inputs are read: shared by scoring and serving, so that answers are the same."""

    model: str
    """Model reference, NAME@VERSION or NAME@ALIAS, for instance phishing@3 or phishing@champion."""
    models_uri: str = "models"
    """Folder or s3:// prefix that holds the models."""
    engine: Engine = "auto"
    """What computes the scores: openvino (fast on CPUs), tensorflow (GPUs), or auto."""
    precision: Precision = "auto"
    """Number format of the engine; auto takes a faster one only where the model's own figures allow it."""
    num_threads: Annotated[int, Field(ge=0, le=4096)] = 0
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
    """Folder, s3:// prefix, or manifest of the images; {date}, {year}, {month}, {day} are filled in from --date. A
    manifest is a file .csv, .tsv, .jsonl or .ndjson (also .gz), a file or a Spark folder .parquet, any
    FOLDER/*.parquet (quote it), or the manifest.json of an S3 Inventory."""
    output_uri: str
    """Folder or s3:// prefix for the results; each model version and date gets its own partition below it."""
    date: Day | None = None
    """UTC date (YYYY-MM-DD) of the partition; also fills {date}, {year}, {month} and {day} in the input."""
    uri_column: str = "uri"
    """Column of a manifest input that holds the image locations."""
    etag_column: str = "auto"
    """Column of a manifest input that holds etags: rows with an etag and a size need no request before they are read,
    and an object that has another etag by then is set aside as changed. auto: etag, ETag or e_tag; none: no column."""
    size_column: str = "auto"
    """Column of a manifest input that holds sizes in bytes; only taken with etags. auto: size_bytes, size or Size."""
    on_duplicate: Literal["error", "first"] = "error"
    """What to do with a manifest that names a location twice: refuse it, or take the first of the rows."""
    allow_uris: tuple[str, ...] = ()
    """Locations (s3://bucket, s3://bucket/prefix, /folder) that a manifest may name besides its own folder. Without
    any one in S3 may name its own bucket, a local one whatever this run can read; never http. Else: uri_not_allowed."""
    include: Patterns = ()
    """Score only files whose name below the input fits one of these patterns, such as *.png: * takes / too, and case
    counts. In a manifest the patterns hold for the location (below the manifest's folder: for the rest of it)."""
    exclude: Patterns = ()
    """Leave out files whose name below the input fits one of these patterns; thumbs/ means what lies in that folder.
    Files of operating systems and writers (.DS_Store, ._*, Thumbs.db, _SUCCESS, _temporary/) always are left out."""
    follow_symlinks: bool = False
    """Follow symbolic links of a local input wherever they lead, as far as this user may read; without it those that
    lead outside of the input are left out. Not together with allow_uris."""
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

    @model_validator(mode="after")
    def _links_within_allowed_locations(self) -> ScoreConfig:
        if self.follow_symlinks and self.allow_uris:
            raise ValueError(
                "Expected follow_symlinks or allow_uris. Received: both, but a link may lead past what is allowed."
            )
        return self

    @field_validator("output_uri")
    @classmethod
    def _output_without_dates(cls, value: str) -> str:
        found = next((name for name in PLACEHOLDERS if f"{{{name}}}" in value), None)
        if found is not None:
            raise ValueError(
                f"Expected OUTPUT without {{{found}}}: each date gets its own folder date=YYYY-MM-DD below it. "
                f"Received: {value}."
            )
        return value

    @model_validator(mode="after")
    def _date_for_placeholder(self) -> ScoreConfig:
        found = sorted(placeholders(self.input_uri))
        if found and self.date is None:
            raise ValueError(f"Expected --date, because the input holds {{{found[0]}}}. Received: no date.")
        return self


class NightScoreConfig(ScoreConfig):
    """What `nightly` scores: the settings of `score` for every date. The dates are its own affair."""

    @model_validator(mode="after")
    def _date_for_placeholder(self) -> NightScoreConfig:
        if not differs_by_day(self.input_uri):
            raise ValueError(
                f"Expected {{date}} in input_uri of a nightly run, or {{year}}, {{month}} and {{day}}. "
                f"Received: {self.input_uri}."
            )
        given = [name for name in ("date", "limit", "accept", "retry_quarantined") if getattr(self, name)]
        if given:
            raise ValueError(f"Expected settings that hold for every date. Received: {given[0]}, which is for one run.")
        return self


class NightlyConfig(Config):
    """Every night by itself: each date of the look-back window that owes a manifest is scored. Dates are UTC dates."""

    score: NightScoreConfig
    """How each date is scored; input_uri holds {date}, or {year}, {month} and {day}; an alias is resolved once for the
    whole call."""
    look_back_days: Annotated[int, Field(ge=1, le=366)] = 7
    """How many dates are looked at: a missed night heals as long as its date is one of them."""
    lag_days: Annotated[int, Field(ge=0, le=366)] = 1
    """The newest date looked at is this many days before today (UTC): 1 is yesterday, whose last hour is over."""
    first_date: Day | None = None
    """Dates before this one owe nothing: screenshots are collected since then."""
    order: Literal["oldest", "newest"] = "oldest"
    """Which owed date comes first."""
    max_dates: PositiveInt = 7
    """Most dates that one call scores; the others stay owed (exit code 75) for the next one."""
    rescore_new_version: bool = False
    """Dates that an earlier version of the model has finished are owed again after the alias moved."""
    wait_for_marker: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]+$")] | None = None
    """A date is ready when an object of this name (such as _SUCCESS) lies in its input. Name it _SUCCESS, leave it
    empty with _ in front, or name it in score.exclude: other names are taken for images."""
    empty_date: Literal["wait", "done"] = "wait"
    """What a date without an image means. wait: its images are late, it stays owed (exit code 75). done: there were
    none; once the date is over and the call has waited, it is recorded as done and not looked at again."""
    min_age_s: Annotated[float, Field(ge=0)] = 0
    """A date is ready when the newest object of its input is at least this old."""
    wait_timeout_s: Annotated[float, Field(ge=0)] = 0
    """How long one call waits for dates that are not ready; what still is not stays owed (exit code 75)."""
    date_budget_s: Annotated[float, Field(gt=0)] | None = None
    """A date that takes longer is stopped as by SIGTERM: what is committed is kept, the rest stays owed."""
    webhook_url: str | None = None
    """https address that is told of failures and drift (JSON, POST). Only its host is ever shown."""
    webhook_hosts: tuple[str, ...] = ()
    """Hosts (HOST or HOST:PORT) that webhook_url may name."""

    @model_validator(mode="after")
    def _webhook_is_allowed(self) -> NightlyConfig:
        if self.webhook_url is None:
            return self
        address = urlsplit(self.webhook_url)
        shown = f"{address.scheme}://{address.netloc.rpartition('@')[2]}"
        if address.scheme != "https" or not address.hostname or "@" in address.netloc:
            raise ValueError(f"Expected https://HOST/... without a user for webhook_url. Received: {shown}.")
        if address.netloc.lower() not in {host.lower() for host in self.webhook_hosts}:
            allowed = ", ".join(self.webhook_hosts) or "none"
            raise ValueError(f"Expected a webhook_url on one of webhook_hosts ({allowed}). Received: {shown}.")
        return self

    @field_serializer("webhook_url")
    def _webhook_without_its_secret(self, value: str | None) -> str | None:
        """Path and query are what lets anybody write there."""
        return None if value is None else f"https://{urlsplit(value).netloc}/..."


class DataConfig(Config):
    """Labelled images: class folders, a manifest with one row per image, or a data set as it is distributed."""

    uri: str
    """Folder or s3:// prefix with one folder per class, a manifest (as for score), keras.datasets.cifar10, an .npz of
    encoded images, or the folder of Oxford 102 Flowers (jpg/, imagelabels.mat, setid.mat)."""
    format: Literal["auto", "folders", "manifest", "cifar10", "flowers102"] = "auto"
    """How the data lie there; auto sees it from the name and the files."""
    uri_column: str = "uri"
    """Manifest column with the image location; relative ones start at the manifest's folder."""
    label_column: str = "label"
    """Manifest column with the class name."""
    group_column: str | None = None
    """Manifest column (domain, brand) whose values never stand on both sides of the split."""
    source_column: str | None = None
    """Manifest column with where an image came from; evaluate reports by it."""
    split_column: str | None = None
    """Manifest column with train, validation (or val, valid, dev) or test; without it the split is drawn from
    split_seed. Folders of these names above the class folders are the split as well."""
    labels: tuple[str, ...] | None = None
    """Class names in output order; images of other classes are left out. By default the sorted names in the data."""
    include: Patterns = ()
    """Take only images whose name below the data fits one of these patterns, such as *.png: * takes / too."""
    exclude: Patterns = ()
    """Leave out images whose name below the data fits one of these patterns; thumbs/ means what lies in that folder."""
    max_unreadable_rate: Rate = 0.05
    """Above this share of images that cannot be read, nothing is trained or evaluated."""
    validation_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training images (of whole groups, where there are groups) kept for validation."""
    test_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share kept for the test set, where the data name none; no training ever reads it."""
    split_seed: int = 0
    """Seed of the split: trainings with different seeds can share one split."""
    near_duplicates: Literal["keep_together", "ignore"] = "keep_together"
    """keep_together: images that look alike (perceptual hash) never stand on both sides of a split that is drawn."""
    limit: PositiveInt | None = None
    """Take only N images, evenly over the classes, to try things out."""


class ModelDefinition(Config):
    """What is trained: the architecture, its start weights and its head."""

    architecture: str = "simple_cnn"
    """simple_cnn, augmented_cnn, lenet5, alexnet, small_resnet, or the name of a keras.applications model such as
    MobileNetV2, ResNet50 or EfficientNetB0 (in any case of letters)."""
    weights: str | None = None
    """Start weights of the backbone: imagenet (downloaded by Keras), a .weights.h5 file (local or s3://), or none."""
    weights_sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """SHA-256 that the file of start weights must have."""
    input_size_px: PositiveInt | None = None
    """Side of the square model input; by default the architecture's own size."""
    preprocessing: Literal["auto", "none", "zero_to_one", "minus_one_to_one", "imagenet_caffe", "imagenet_torch"] = (
        "auto"
    )
    """How pixel values reach the backbone; auto is what its published weights were made for."""
    top: Literal["pooled", "original"] = "pooled"
    """pooled: average pooling and one output layer. original: the layers that the paper has (VGG16: 4096, 4096)."""
    hidden_units: Annotated[int, Field(ge=0)] = 0
    """Width of a Dense layer between pooling and output; 0 means none. Where the paper has dense layers (simple_cnn 64,
    augmented_cnn 128, lenet5 120 and 84, alexnet and the original top of VGG 4096 twice), 0 leaves them."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of features dropped after each dense layer, or before the output layer, while training. 0 leaves what the
    paper has: 0.5 for augmented_cnn, alexnet and the original top of VGG."""
    augmentation: Literal["none", "photo", "screenshot"] = "none"
    """photo: flip, rotation, zoom, shift, contrast. screenshot: crop and rescale, page zoom, small translations,
    brightness, contrast, JPEG recompression; never flips or rotations. Inside the model, active only in training."""
    augmentation_strength: Annotated[float, Field(gt=0, le=2)] = 1.0
    """Factor on the ranges of photo; 1.5 served small sets of large images best."""


class EarlyStoppingConfig(Config):
    """Keras's EarlyStopping on the validation loss; the best weights are restored."""

    patience: PositiveInt = 5
    """Epochs without a lower validation loss before the phase ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """A smaller gain than this counts as none."""


class ReduceLROnPlateauConfig(Config):
    """Keras's ReduceLROnPlateau on the validation loss."""

    patience: PositiveInt = 3
    """Epochs without a lower validation loss before the learning rate is lowered."""
    factor: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """What the learning rate is multiplied with."""
    min_lr: Annotated[float, Field(ge=0)] = 0.0
    """The learning rate never goes below this."""
    min_delta: Annotated[float, Field(ge=0)] = 1e-4
    """A smaller gain than this counts as none."""
    cooldown: Annotated[int, Field(ge=0)] = 0
    """Epochs after a reduction in which none is counted."""


class PhaseConfig(Config):
    """One training phase: how long and how fast."""

    epochs: Annotated[int, Field(ge=0)]
    """Passes over the training images."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Step size of the optimizer; it does not change with the number of workers."""
    optimizer: Literal["adam", "adamw", "sgd"] = "adam"
    """Keras optimizer."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of sgd (Nesterov's when above 0)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay of kernels (adamw, sgd); biases and normalisation are left out."""
    schedule: Literal["constant", "cosine"] = "constant"
    """cosine: the learning rate falls to 0 along half a cosine over the phase, step by step."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0.0
    """Epochs in which the learning rate rises linearly from 0 before the schedule begins."""
    early_stopping: EarlyStoppingConfig | None = None
    """Stop the phase when the validation loss no longer falls, with the best weights."""
    reduce_lr_on_plateau: ReduceLROnPlateauConfig | None = None
    """Lower the learning rate when the validation loss no longer falls."""

    @model_validator(mode="after")
    def _one_master_of_the_rate(self) -> PhaseConfig:
        if (self.schedule == "cosine" or self.warmup_epochs) and self.reduce_lr_on_plateau is not None:
            raise ValueError(
                "Expected a schedule (cosine, warmup_epochs) or reduce_lr_on_plateau, not both. Received: both."
            )
        if self.momentum and self.optimizer != "sgd":
            raise ValueError(f"Expected momentum with optimizer sgd. Received: {self.optimizer}.")
        if self.weight_decay and self.optimizer == "adam":
            raise ValueError("Expected weight_decay with optimizer adamw or sgd. Received: adam.")
        return self


GuardName = Literal[
    "wrong_input_shape",
    "unnormalised_pixels",
    "too_many_parameters",
    "no_augmentation",
    "unfrozen_too_early",
    "label_leakage",
    "class_imbalance",
    "constant_input",
    "too_few_per_class",
]


class TrainConfig(StorageConfig):
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
    """Seed of the start weights, the augmentation and the shuffling."""
    loss: Literal["crossentropy", "focal"] = "crossentropy"
    """focal: (1 - p)^focal_gamma times cross-entropy, for classes that drown in easy examples (arXiv 1708.02002)."""
    focal_gamma: Annotated[float, Field(ge=0)] = 2.0
    """Exponent of the focal loss."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target that is spread evenly over all classes."""
    class_weight: Literal["none", "balanced"] = "none"
    """balanced: each class weighs N / (classes x its images), so that rare classes count as much as common ones."""
    logs: tuple[Literal["CSVLogger", "TensorBoard"], ...] = ()
    """What writes the epochs' metrics into the run's folder: log.csv, and events for TensorBoard."""
    precision: Literal["float32", "mixed_bfloat16"] = "float32"
    """Keras dtype policy while training; the published model is float32 in any case."""
    cache_features: bool = False
    """Compute a frozen backbone once per image instead of in every epoch (exact without augmentation; with it an
    approximation: each image keeps the augmentation of its first pass)."""
    cache_bytes: Annotated[int, Field(ge=0)] = 2 * 1024**3
    """Decoded pixels that each worker keeps in memory; images beyond are decoded again in every epoch."""
    num_workers: PositiveInt = 1
    """Ray Train workers; one worker is one GPU when use_gpu is set."""
    min_workers: PositiveInt | None = None
    """Elastic: go on with no fewer than this many workers when nodes are lost; by default all of num_workers."""
    use_gpu: bool = False
    """Give each worker one GPU."""
    max_failures: Annotated[int, Field(ge=-1)] = 2
    """How often a broken worker group is restarted from the last checkpoint."""
    collective_timeout_s: Annotated[float, Field(gt=0)] = 300.0
    """A worker that waits longer than this for the others ends with an error instead of hanging."""
    allow: tuple[GuardName, ...] = ()
    """Guards that may find something without stopping the run."""
    positive_label: str | None = None
    """The class that `flagged` is about, such as phishing; by default the last one of two classes."""
    threshold: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Score of the positive label from which a row is flagged."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _checked_name(value)

    @model_validator(mode="after")
    def _worker_bounds(self) -> TrainConfig:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(f"Expected min_workers <= num_workers. Received: {self.min_workers} > {self.num_workers}.")
        if self.cache_features and self.model.weights is None:
            raise ValueError("Expected model.weights with cache_features: only a frozen backbone can be cached.")
        return self


class CompareConfig(StorageConfig):
    """Several trainings on one split and one list of seeds, side by side."""

    name: str
    """Name of the comparison; its trainings publish models NAME-VARIANT."""
    output_uri: str = "comparisons"
    """Folder or s3:// prefix for the table (comparison.json) and the page (comparison.html)."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """One training per variant and seed."""
    base: dict[str, Any]
    """Keys of a training configuration (all but name and seed) that all variants share."""
    variants: dict[str, dict[str, Any]]
    """Variant name -> keys that it changes in base."""

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        return _checked_name(value)

    @model_validator(mode="after")
    def _something_to_compare(self) -> CompareConfig:
        if not self.variants or not self.seeds or len(set(self.seeds)) != len(self.seeds):
            raise ValueError("Expected one or more variants and different seeds. Received: none, or a seed twice.")
        for variant in self.variants:
            _checked_name(variant)
        return self

    def training(self, variant: str, seed: int) -> TrainConfig:
        """The training of one variant with one seed.

        Raises:
            ConfigError: base and variant do not make a training configuration.
        """
        own = {"name": f"{self.name}-{variant}", "seed": seed}
        own |= self.model_dump(include=set(StorageConfig.model_fields), exclude_none=True)
        source = f"base and variant {variant}"
        return build_config(TrainConfig, self.base, self.variants[variant], own, source=source)


class LabelledScoresConfig(ModelConfig):
    """A model and labelled images that it is judged on."""

    data: DataConfig
    """The labelled images."""
    split: Literal["auto", "all", "train", "validation", "test"] = "auto"
    """Which side of the split is scored; auto: validation of the data that the model was trained on, all of others."""
    seed: int = 0
    """Seed of the bootstrap."""
    bootstrap_samples: Annotated[int, Field(ge=100)] = 2000
    """Resamples behind each confidence interval."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Confidence level of every interval."""


class EvaluateConfig(LabelledScoresConfig):
    """What a model gets right and wrong on labelled images, as a page and as JSON."""

    output_uri: str = "evaluations"
    """Folder or s3:// prefix; evaluation.html and evaluation.json lie below it under model, version and data."""


class CalibrateConfig(LabelledScoresConfig):
    """The positive label's threshold at a false-positive budget, as a new version of the model."""

    max_fpr: Annotated[float, Field(gt=0, lt=1)] = 0.001
    """Largest share of negatives that may be flagged."""
    temperature_scaling: bool = True
    """Scale the logits first so that scores are probabilities (arXiv 1706.04599); labels do not change."""


class PromoteConfig(LabelledScoresConfig):
    """The release gate: an alias moves to a version that is not worse than the one it means now."""

    alias: str = "champion"
    """Alias to move."""
    metric: Literal["auto", "accuracy", "roc_auc", "pr_auc", "recall_at_fpr"] = "auto"
    """What is compared; auto: roc_auc with a positive label, else accuracy."""
    max_fpr: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """False-positive rate of recall_at_fpr."""
    force: bool = False
    """Move the alias whatever the comparison says; needs reason."""
    reason: str | None = None
    """Why, written into the record of the promotion."""

    @model_validator(mode="after")
    def _forced_with_reason(self) -> PromoteConfig:
        if self.force and not (self.reason or "").strip():
            raise ValueError("Expected --reason with --force. Received: none.")
        return self


def _checked_name(value: str) -> str:
    if not re.match(NAME_PATTERN, value):
        raise ValueError(f"Expected letters, digits, dot, dash or underscore. Received: {value!r}.")
    return value


class ServeConfig(ModelConfig):
    """The HTTP endpoint of one model or several."""

    also: tuple[str, ...] = ()
    """More models to answer for, each NAME@VERSION or NAME@ALIAS."""
    max_loaded_models: PositiveInt = 4
    """Model versions that a replica keeps in memory; above that the least recently used one goes."""
    alias_poll_s: Annotated[float, Field(gt=0)] = 2
    """How often a replica looks whether an alias means another version now, in seconds."""
    canary: str | None = None
    """Alias of the version that answers canary_percent of the requests that name no version, for instance candidate."""
    canary_percent: Annotated[float, Field(ge=0, le=100)] = 0
    """Share of request bodies for the canary; the same bytes always get the same version."""
    host: str = "127.0.0.1"
    """Address to listen on. Anything but loopback wants api_keys_uri."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 is any free one."""
    ssl_certfile: str | None = None
    """PEM file with the certificate chain: the endpoint then speaks HTTPS (Ray's own option)."""
    ssl_keyfile: str | None = None
    """PEM file with the certificate's private key."""
    haproxy: bool = False
    """Ray's HAProxy ingress instead of its Python proxy: faster, see README for what it opens."""
    api_keys_uri: str | None = None
    """File or s3:// object with the hashes of the API keys (`cnn-ray keys add`); requests then need a bearer key."""
    allow_anonymous: bool = False
    """Listen on any address without API keys: whoever reaches the port may ask."""
    open_metrics: bool = False
    """/metrics is answered without an API key too."""
    page: bool = True
    """A page for people at /."""
    access_log: bool = True
    """One line of JSON per request in the replica's log; never bodies or keys."""
    min_replicas: Annotated[int, Field(ge=0)] = 1
    """Autoscaling: never fewer replicas than this; with 0 the first request after a pause waits for a start."""
    max_replicas: PositiveInt = 2
    """Autoscaling: never more replicas than this."""
    target_ongoing_requests: Annotated[float, Field(gt=0)] = 8
    """Autoscaling: requests in flight per replica that Ray Serve aims at."""
    upscale_delay_s: Annotated[float, Field(ge=0)] = 10
    """Autoscaling: how long the load must be high before replicas are added."""
    downscale_delay_s: Annotated[float, Field(ge=0)] = 300
    """Autoscaling: how long the load must be low before replicas are taken away."""
    max_ongoing_requests: PositiveInt = 64
    """Requests that one replica takes at the same time; more are answered with 429 and Retry-After."""
    max_batch_size: PositiveInt = 16
    """Images per call of the model."""
    batch_wait_timeout_s: Annotated[float, Field(ge=0)] = 0
    """How long a call of the model waits for more images; 0: those that came during the call before are the next."""
    request_timeout_s: Annotated[float, Field(gt=0)] = 30
    """A request that takes longer is answered with 504; a client may ask for less with X-Request-Timeout-Seconds."""
    body_timeout_s: Annotated[float, Field(gt=0)] = 10
    """A body that is not there after this time is answered with 408."""
    drain_s: Annotated[float, Field(ge=0)] = 20
    """How long a replica that goes away finishes requests."""
    max_body_bytes: PositiveInt = 64 * 1024**2
    """A request body with more bytes is answered with 413."""
    max_instances: PositiveInt = 128
    """Images in one request."""
    num_cpus: Annotated[float, Field(gt=0)] = 1
    """CPUs of one replica."""
    num_gpus: Annotated[float, Field(ge=0)] = 0
    """GPUs of one replica."""

    @field_validator("also")
    @classmethod
    def _references(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        wrong = [reference for reference in value if not re.match(REFERENCE_PATTERN, reference)]
        if wrong:
            raise ValueError(f"Expected NAME@VERSION or NAME@ALIAS, for instance phishing@3. Received: {wrong[0]!r}.")
        return value

    @model_validator(mode="after")
    def _bounds(self) -> ServeConfig:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"Expected min_replicas <= max_replicas. Received: {self.min_replicas} > {self.max_replicas}."
            )
        names = [reference.partition("@")[0] for reference in (self.model, *self.also)]
        if len(set(names)) < len(names):
            raise ValueError(f"Expected each model name once. Received: {', '.join(names)}.")
        if (self.ssl_certfile is None) != (self.ssl_keyfile is None):
            raise ValueError("Expected ssl_certfile and ssl_keyfile together. Received: one of them.")
        if self.haproxy and self.ssl_certfile is not None:
            raise ValueError("Expected no ssl_certfile with haproxy: Ray's HAProxy has no TLS. Received: both.")
        if self.canary_percent > 0 and self.canary is None:
            raise ValueError("Expected canary (an alias) with canary_percent. Received: none.")
        return self


ConfigT = TypeVar("ConfigT", bound=Config)


def fields_of(kind: type[Config]) -> dict[str, FieldInfo]:
    """Return the fields of a configuration as people read them: what the job is about first, how S3 is asked last."""
    shared = StorageConfig.model_fields.keys()
    return dict(sorted(kind.model_fields.items(), key=lambda item: item[0] in shared))


def build_config(kind: type[ConfigT], *layers: Mapping[str, Any], source: str = "configuration") -> ConfigT:
    """The configuration of the given kind; later layers win key by key, nested mappings are merged.

    Raises:
        ConfigError: one sentence per wrong key, with the nearest valid name for an unknown one.
    """
    merged: dict[str, Any] = {}
    for layer in layers:
        merged = merge_layers(merged, layer)
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_explain(kind, error, source)) from None


def merge_layers(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """The upper mapping over the lower one, key by key; nested mappings are merged likewise."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = merge_layers(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value  # pyright: ignore[reportUnknownArgumentType]
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
            sentences.append(f"{message} Next: correct {where}." if where else f"{message} Next: correct {source}.")
        elif problem["type"] == "string_type" and isinstance(problem["input"], bool | int | float):
            sentences.append(
                f"Expected text for {where}. Received: {problem['input']!r}, as YAML reads it. "
                "Next: write it in quotes."
            )
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
