"""`_report.html` of a run: gathers what the page shows, thumbnails and the night before among it, and puts it in place.

The results are committed before the report is made, so nothing here may end a run: what cannot be had is told on the
page, and a page that cannot be written is a warning in the log.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date as Date
from datetime import timedelta
from io import BytesIO

import numpy as np
from PIL import Image

from cnn_ray.artifact import Artifact
from cnn_ray.comparison import Night
from cnn_ray.config import ScoreConfig
from cnn_ray.decoders import Decoders
from cnn_ray.errors import CnnRayError, PlanError, UnavailableError
from cnn_ray.images import ImageCaps
from cnn_ray.manifest_files import is_manifest
from cnn_ray.manifests import Manifest
from cnn_ray.outputs import Partition
from cnn_ray.partitions import fill_date, partition_uri
from cnn_ray.reader import ImageReader
from cnn_ray.records import QuarantineCode, RowFailure
from cnn_ray.redaction import redact
from cnn_ray.report_page import ReportData, build_report
from cnn_ray.storage import Store, open_store, split_uri
from cnn_ray.stores import stores_of
from cnn_ray.tallies import TopRow

__all__ = ["REPORT", "ReportData", "build_report", "previous_night", "write_report"]

REPORT = "_report.html"
"""With `_` in front, because readers of the folder take every other name for Parquet."""
LOOK_BACK_DAYS = 31
SIDE_PX = 240
MOST_JPEG_BYTES = 20_000
QUALITIES = (80, 60, 40, 20)
GALLERY_S = 60.0
"""After this time the rest of the gallery stays without pictures."""
GONE = {
    QuarantineCode.NOT_FOUND: "it is no longer there",
    QuarantineCode.CHANGED: "it changed after it was scored",
}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class EarlierNight:
    """A manifest, and the date of the partition that it was found in."""

    date: Date
    manifest: Manifest


def previous_night(output_uri: str, date: Date | None, model: str, version: int) -> EarlierNight | None:
    """The newest complete run of the nearest earlier date of the same model, of the same version where there is one.

    None without a date, or where the LOOK_BACK_DAYS before it hold none. Manifests that cannot be read are passed over.
    """
    if date is None:
        return None
    output = open_store(output_uri)
    for back in range(1, LOOK_BACK_DAYS + 1):
        day = date - timedelta(days=back)
        for other in _versions(output, day, model, version):
            manifest = _complete_manifest(Partition(partition_uri(output_uri, day, model, other)))
            if manifest is not None:
                return EarlierNight(day, manifest)
    return None


def write_report(
    partition: Partition,
    manifest: Manifest,
    *,
    timeline: Sequence[tuple[float, int]],
    wait_share: float | None,
    config: ScoreConfig,
    artifact: Artifact,
) -> bool:
    """Whether `_report.html` is in the partition now; a warning says why not. Nothing is raised."""
    try:
        night = Night.model_validate(manifest.model_dump(mode="json"))
        earlier = _earlier(config, manifest)
        page = build_report(
            ReportData(
                night=night,
                partition_uri=redact(partition.uri),
                date=None if config.date is None else config.date.isoformat(),
                positive_label=artifact.positive_label,
                threshold=artifact.threshold,
                previous=None if earlier is None else Night.model_validate(earlier.manifest.model_dump(mode="json")),
                previous_date=None if earlier is None else earlier.date.isoformat(),
                thumbnails=_thumbnails(night.top, config),
                timeline=tuple(timeline),
                wait_share=wait_share,
                config={key: value for key, value in manifest.config.items() if key in ScoreConfig.model_fields},
            )
        )
        partition.store.put(REPORT, page.encode("utf-8", "backslashreplace"))
    except Exception as error:  # noqa: BLE001 - the night is committed: a page about it must not make it a failure
        log.warning("no %s in %s: %s: %s", REPORT, partition.uri, type(error).__name__, error)
        return False
    return True


def _versions(output: Store, day: Date, model: str, version: int) -> list[int]:
    """Versions that left something for that day: the same one first, then from the newest down."""
    prefix = partition_uri("", day, model, version).lstrip("/").removesuffix(str(version))
    names = {key.removeprefix(prefix).partition("/")[0] for key in output.keys(prefix)}
    return sorted((int(name) for name in names if name.isdigit()), key=lambda found: (found != version, -found))


def _complete_manifest(partition: Partition) -> Manifest | None:
    names = [key for key in partition.store.keys("_manifest-g") if key.endswith(".json")]
    for name in sorted(names, reverse=True):
        try:
            manifest = partition.read_manifest(int(name.removeprefix("_manifest-g").removesuffix(".json")))
        except (PlanError, ValueError) as error:
            log.warning("the report compares with another night: %s", error)
            continue
        if manifest is not None and manifest.status == "complete":
            return manifest
    return None


def _earlier(config: ScoreConfig, manifest: Manifest) -> EarlierNight | None:
    try:
        return previous_night(config.output_uri, config.date, manifest.model, manifest.version)
    except CnnRayError as error:
        log.warning("the report compares with no earlier night: %s", error)
        return None


def _thumbnails(rows: Sequence[TopRow], config: ScoreConfig) -> Mapping[str, bytes | str]:
    """uri -> JPEG bytes, or the reason why there are none."""
    if not rows:
        return {}
    uri = fill_date(config.input_uri, config.date)
    root = open_store(split_uri(uri)[0] if is_manifest(uri) else uri)
    stores = stores_of(root.uri, follow_symlinks=config.follow_symlinks)
    caps = ImageCaps(max_pixels=config.max_image_pixels, max_bytes=config.max_image_bytes)
    decoders = Decoders((SIDE_PX, SIDE_PX), caps, 1)
    reader = ImageReader(root.uri, caps, decoders, stores)
    shown: dict[str, bytes | str] = {}
    end = time.monotonic() + GALLERY_S
    try:
        for row in rows:
            if time.monotonic() > end:
                shown[row.uri] = "there was no time left to fetch it"
                continue
            try:
                shown[row.uri] = _thumbnail(row, reader)
            except UnavailableError:  # it was tried for long: the others would be too
                end = 0.0
                shown[row.uri] = "storage did not answer"
            except CnnRayError as error:
                shown[row.uri] = f"it could not be fetched ({type(error).__name__})"
    finally:
        decoders.close()
    return shown


def _thumbnail(row: TopRow, reader: ImageReader) -> bytes | str:
    """JPEG of at most MOST_JPEG_BYTES, of the very bytes that were scored.

    A child process decodes to a square; shrinking that along one axis gives the picture its proportions back and loses
    nothing. The JPEG is encoded from pixels here, so no byte of the file reaches the page.
    """
    pixels = np.empty((SIDE_PX, SIDE_PX, 3), np.uint8)
    answer = reader.read_into(row.uri, pixels, row.etag)
    if isinstance(answer, RowFailure):
        return GONE.get(answer.code) or f"{answer.code}: {answer.detail}"
    longest = max(answer)
    width, height = (max(1, round(SIDE_PX * side / longest)) for side in answer)
    picture = Image.fromarray(pixels).resize((width, height), Image.Resampling.BOX)
    for quality in QUALITIES:
        stream = BytesIO()
        picture.save(stream, "JPEG", quality=quality, optimize=True)
        if stream.tell() <= MOST_JPEG_BYTES:
            return stream.getvalue()
    return "too large for a thumbnail"
