"""What a scoring run owes: the settings that decide its answers, and the plan that is open or comes next."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import pyarrow as pa

from cnn_ray.artifact import Artifact, load_artifact
from cnn_ray.config import ScoreConfig
from cnn_ray.errors import ConfigError, NoImagesError, NotFoundError
from cnn_ray.generations import Changes, earlier_plans, next_plan
from cnn_ray.input_filters import BROKEN_LINK, EXCLUDED, LINK_OUTSIDE, NOT_INCLUDED, Selection, describe_left_out
from cnn_ray.inputs import list_inputs
from cnn_ray.manifest_files import collection_of
from cnn_ray.manifest_listing import ManifestOptions
from cnn_ray.manifests import Manifest
from cnn_ray.outputs import Partition
from cnn_ray.partitions import fill_date, partition_uri
from cnn_ray.plan import Frozen, Plan, largest_shard, make_plan, refuse_other_settings
from cnn_ray.predictor import choose_engine
from cnn_ray.storage import open_store

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreJob:
    """A configuration with its model, its partition, and everything that decides the answers."""

    config: ScoreConfig
    artifact: Artifact
    partition: Partition
    frozen: Frozen


@dataclass(frozen=True)
class Owed:
    """The generation to work on, None where nothing is owed; `resumes` where its plan was there."""

    plan: Plan | None
    resumes: bool = False
    changes: Changes = field(default_factory=Changes)
    left_out: Mapping[str, int] = field(default_factory=dict[str, int])
    """What lies in the input and is no image to be scored, by reason."""


def job_of(config: ScoreConfig) -> ScoreJob:
    """The job of a configuration; the model is looked up, nothing is written.

    Raises:
        ArtifactError, ConfigError: no such model, or one that lacks the engine or precision.
    """
    artifact = load_artifact(config.models_uri, config.model)
    partition = Partition(partition_uri(config.output_uri, config.date, artifact.name, artifact.version))
    return ScoreJob(config, artifact, partition, freeze(config, artifact))


def owed_by(
    job: ScoreJob, manifest: Manifest | None, write_page: Callable[[str, bytes], object], *, retried: bool = False
) -> Owed:
    """What follows the manifest: the generation that is open, else what the input as it is now asks for.

    `retried` says that this run has tried the quarantined rows already.
    """
    config, partition = job.config, job.partition
    plan = partition.read_plan(1 if manifest is None else manifest.generation + 1)
    first = plan if plan is not None or manifest is None else earlier_plans(partition, manifest.generation)[0]
    if first is not None:
        refuse_other_settings(first.frozen, job.frozen, partition.uri)
    if plan is not None:
        return Owed(plan, resumes=True, left_out=plan.left_out)
    if manifest is None:
        _refuse_mixed_depth(config)
        left_out = Counter[str]()
        plan = make_plan(_images(config, left_out), job.frozen, write_page)
        planned = plan.model_copy(update={"accept": config.accept, "left_out": dict(left_out)})
        _warn_of_links(left_out)
        return Owed(planned, left_out=left_out)
    if config.limit is not None:
        return Owed(_plan_of_a_trial(job, manifest), left_out=manifest.left_out)
    retry = config.retry_quarantined and not retried
    return _next_plan(job, manifest, write_page, retry=retry)


def freeze(config: ScoreConfig, artifact: Artifact) -> Frozen:
    """Everything that decides the answers, with the alias and `auto` resolved.

    Raises:
        ConfigError: the model or this node lacks the engine or precision, or the output lies inside the input.
    """
    engine, precision = choose_engine(artifact, config.engine, config.precision, use_gpu=config.num_gpus > 0)
    uri = fill_date(config.input_uri, config.date)
    _refuse_output_in_input(uri, config.output_uri)
    return Frozen(
        input_uri=open_store(uri).uri,
        uri_column=config.uri_column,
        model=artifact.name,
        version=artifact.version,
        model_digest=artifact.digest,
        engine=engine,
        precision=precision,
        threshold=artifact.threshold,
        max_image_pixels=config.max_image_pixels,
        max_image_bytes=config.max_image_bytes,
        shard_size=config.shard_size,
        largest_shard=largest_shard(*artifact.size_px),
        limit=config.limit,
        include=config.include,
        exclude=config.exclude,
        follow_symlinks=config.follow_symlinks,
    )


def _refuse_output_in_input(input_uri: str, output_uri: str) -> None:
    collection = collection_of(input_uri)
    if collection is not None and f"{open_store(output_uri).uri}/".startswith(f"{open_store(collection).uri}/"):
        raise ConfigError(
            f"Expected OUTPUT outside of INPUT. Received: {output_uri} inside {input_uri}, where the next run would "
            "take results for its input. Next: choose another OUTPUT."
        )


def _refuse_mixed_depth(config: ScoreConfig) -> None:
    """Return where all partitions of OUTPUT have a date, or none has one.

    Spark and Polars refuse to read a folder in which some paths have a `date=` level and others have none.

    Raises:
        ConfigError: a new partition would mix the two.
    """
    other = "model=" if config.date is not None else "date="
    try:
        mixed = next(iter(open_store(config.output_uri).list(other)), None) is not None
    except NotFoundError:
        return
    if mixed and config.date is None:
        raise ConfigError(
            f"Expected --date, as for the other runs in {config.output_uri}: readers such as Spark take a folder with "
            "dates and without for an error. Received: no date. Next: give --date, or choose another OUTPUT."
        )
    if mixed:
        raise ConfigError(
            f"Expected a run without --date, as the other runs in {config.output_uri}: readers such as Spark take a "
            "folder with dates and without for an error. Received: a date. Next: leave --date out, or choose "
            "another OUTPUT."
        )


def listing(config: ScoreConfig, left_out: Counter[str] | None = None) -> Iterator[pa.Table]:
    """Yield what the input of a configuration holds now, see `list_inputs`."""
    selection = Selection(config.include, config.exclude, config.follow_symlinks)
    options = ManifestOptions(config.etag_column, config.size_column, config.on_duplicate, config.follow_symlinks)
    uri = fill_date(config.input_uri, config.date)
    yield from list_inputs(uri, config.uri_column, config.allow_uris, options, selection=selection, left_out=left_out)


def _images(config: ScoreConfig, left_out: Counter[str]) -> Iterator[pa.Table]:
    """The listing, which must not be empty."""
    found = False
    for table in listing(config, left_out):
        found = found or table.num_rows > 0
        yield table
    if not found:
        said = f"none; left out were {describe_left_out(left_out)}" if left_out else "none"
        advice = ["check INPUT (and --date)"]
        if left_out[LINK_OUTSIDE]:
            advice.insert(0, "follow the links with --follow-symlinks")
        if left_out[EXCLUDED] or left_out[NOT_INCLUDED]:
            advice.insert(0, "correct --include and --exclude")
        raise NoImagesError(
            f"Expected images in {fill_date(config.input_uri, config.date)}. Received: {said}. "
            f"Next: {', or '.join(advice)}."
        )


def _next_plan(job: ScoreJob, manifest: Manifest, write_page: Callable[[str, bytes], object], *, retry: bool) -> Owed:
    left_out = Counter[str]()
    found, accept = listing(job.config, left_out), job.config.accept
    try:
        plan, changes = next_plan(job.partition, manifest, found, write_page, accept=accept, retry=retry)
    except NotFoundError:  # the input may be gone; the results are still there
        plan, changes = next_plan(job.partition, manifest, (), write_page, accept=accept)
    if plan is not None:
        plan = plan.model_copy(update={"left_out": dict(left_out)})
        _warn_of_links(left_out)
    return Owed(plan, changes=changes, left_out=left_out)


def _warn_of_links(left_out: Counter[str]) -> None:
    """Say at once that links are left out: each of them may be an image."""
    links = {reason: left_out[reason] for reason in (LINK_OUTSIDE, BROKEN_LINK) if left_out[reason]}
    if links:
        log.warning("Left out of INPUT: %s.", describe_left_out(links))


def _plan_of_a_trial(job: ScoreJob, manifest: Manifest) -> Plan | None:
    """A run with --limit has one generation, but can be accepted like any other.

    Raises:
        ConfigError: its quarantined rows are to be tried again.
    """
    if job.config.retry_quarantined:
        raise ConfigError(
            "Expected a full run for --retry-quarantined. Received: one with --limit, which has a single generation. "
            "Next: choose another OUTPUT for another trial."
        )
    if not job.config.accept or manifest.status == "complete":
        return None
    empty = make_plan((), job.frozen, job.partition.store.put_if_absent, manifest.generation + 1)
    return empty.model_copy(update={"accept": True})
