"""Whether the screenshots of a date are complete, as far as their storage can tell."""

from __future__ import annotations

from datetime import date as Date
from datetime import datetime

from cnn_ray.config import NightlyConfig, ScoreConfig
from cnn_ray.errors import NotFoundError
from cnn_ray.manifest_files import ALL_PARQUET, is_manifest, manifest_exists
from cnn_ray.nightly_status import NO_IMAGE, NO_SCREENSHOTS, DateRecord
from cnn_ray.partitions import fill_date
from cnn_ray.planning import listing
from cnn_ray.storage import open_store, split_uri


def why_not_ready(config: NightlyConfig, date: Date, now: datetime) -> str | None:
    """Why the screenshots of the date may be incomplete, None where they can be scored.

    Raises:
        StorageError: storage refused. A folder that is not there yet is no such case; a bucket that is not there is.
    """
    uri = fill_date(config.score.input_uri, date)
    folder, name = split_uri(uri) if is_manifest(uri) else (uri, "")
    store, marker = open_store(folder, follow_symlinks=config.score.follow_symlinks), config.wait_for_marker
    if marker is not None and not store.exists(marker) and not (name and open_store(uri).exists(marker)):
        return f"waits for {store.uri_of(marker)}"
    if name and not manifest_exists(uri):
        return f"waits for {uri}"
    if marker is None and is_empty(config, date):
        return f"waits for the first screenshot in {uri}"
    if config.min_age_s > 0:
        newest_s = store.newest_s("" if name == ALL_PARQUET else name)
        age_s = config.min_age_s if newest_s is None else now.timestamp() - newest_s
        if age_s < config.min_age_s:
            return f"waits until the newest object in {uri} is {config.min_age_s:g} s old; it is {age_s:.0f} s"
    return None


def empty_is_done(config: NightlyConfig, date: Date, today: Date) -> bool:
    """Whether the date is over, has no image, and the configuration takes that for its end.

    A marker that is waited for, or a manifest that is not there, says that the date is not complete.

    Raises:
        StorageError: storage refused, or the bucket does not exist.
    """
    if config.empty_date != "done" or config.wait_for_marker is not None or date >= today:
        return False
    return is_empty(config, date)


def is_settled_empty(config: NightlyConfig, known: DateRecord | None) -> bool:
    """Whether an earlier call has recorded that the date ended without an image, and that still holds."""
    return config.empty_date == "done" and known is not None and known.detail in (NO_IMAGE, NO_SCREENSHOTS)


def is_empty(config: NightlyConfig, date: Date) -> bool:
    """Whether the input of the date holds no screenshot; a manifest input is looked into by the run itself.

    Raises:
        StorageError: storage refused, or the bucket does not exist.
    """
    uri = fill_date(config.score.input_uri, date)
    if is_manifest(uri):
        return False
    try:
        of_date = ScoreConfig.model_validate(config.score.model_dump() | {"date": date})
        return not any(table.num_rows for table in listing(of_date))
    except NotFoundError:
        if uri.startswith("s3://"):  # the bucket: waiting does not bring that
            raise
        return True
