"""The three stages of a shard, the same for both runners: fetch and decode -> predict -> commit.

Everything a stage needs besides its row is a `StageContext`, small and picklable, so that Ray can send it to any node.
Unreadable images travel as values; only what concerns the whole run (storage down, wrong credentials) is raised.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date as Date

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cnn_ray.artifact import Artifact
from cnn_ray.config import StorageConfig
from cnn_ray.errors import AccessDeniedError, ArchivedError
from cnn_ray.images import ImageCaps
from cnn_ray.manifests import PartRecord
from cnn_ray.memory import keep_freed_memory
from cnn_ray.near_duplicates import picture_hash
from cnn_ray.object_lookup import ABSENT, DENIED, NOT_ALLOWED
from cnn_ray.outputs import Partition
from cnn_ray.plan import Plan, Shard, shard_rows
from cnn_ray.predictor import Predictor
from cnn_ray.reader import ImageReader, close_decoders, shared_decoders
from cnn_ray.records import INPUT_PREFIX, QUARANTINE_SCHEMA, QuarantineCode, RowFailure, score_schema
from cnn_ray.storage_options import use_storage_options
from cnn_ray.stores import Stores, stores_of

NO_DIGEST = bytes(32)
"""Stands for the SHA-256 of a row whose bytes were not read; no file has it."""
PROBES = 16
"""Rows tried elsewhere in the plan before a wholly denied shard is taken for bad rows and not for a bad key."""


@dataclass(frozen=True)
class StageContext:
    """What all shards of a run share."""

    partition_uri: str
    input_root: str
    plan: Plan
    artifact: Artifact
    fetch_concurrency: int
    num_decoders: int
    batch_size: int
    run_date: Date | None = None
    storage: StorageConfig = field(default_factory=StorageConfig)

    def use_storage(self) -> None:
        """Let this process ask storage as the run is configured; Ray's workers begin with it."""
        use_storage_options(self.storage)

    @property
    def stores(self) -> Stores:
        """Where the images are; links are followed where the plan's listing followed them."""
        return stores_of(self.input_root, follow_symlinks=self.plan.frozen.follow_symlinks)

    @property
    def caps(self) -> ImageCaps:
        """Limits on what is decoded, as the plan froze them."""
        frozen = self.plan.frozen
        return ImageCaps(max_pixels=frozen.max_image_pixels, max_bytes=frozen.max_image_bytes)


@dataclass(slots=True)
class DecodedShard:
    """Images of a shard that could be read, and the failures of those that could not.

    pixels: uint8 [K, H, W, 3]; position: int32 [K], their rows in the shard; size_px: int32 [K, 2], original width and
    height; sha256: uint8 [N, 32] of all rows' bytes, zeros where none were read; phash: int64 [K]; failures: row in the
    shard -> failure.
    """

    shard: Shard
    pixels: NDArray[np.uint8]
    position: NDArray[np.int32]
    size_px: NDArray[np.int32]
    sha256: NDArray[np.uint8]
    phash: NDArray[np.int64]
    failures: dict[int, RowFailure]

    def without_pixels(self) -> DecodedShard:
        """All that a commit needs: the pixels of a shard may be 150 MB."""
        return dataclasses.replace(self, pixels=np.empty((0,), np.uint8))


def fetch_decode(context: StageContext, shard: Shard) -> DecodedShard:
    """The shard's images, fetched and decoded with many in flight.

    Raises:
        StorageError: storage is down, credentials are wrong, or every row of the run is denied or archived.
    """
    rows = planned_rows(context, shard)
    uris = rows["uri"].to_pylist()
    height, width = context.artifact.size_px
    pixels = np.empty((len(uris), height, width, 3), np.uint8)
    read = functools.partial(_read_image, _reader(context))
    columns = (uris, rows["etag"].to_pylist(), rows["size_bytes"].to_pylist(), pixels)
    images = list(_fetch_pool(context.fetch_concurrency).map(read, *columns))
    failures = {k: image.result for k, image in enumerate(images) if isinstance(image.result, RowFailure)}
    if failures and len(failures) == len(uris):
        _refuse_hopeless(context, uris, {failure.code for failure in failures.values()})
    position = np.array([k for k in range(len(images)) if k not in failures], np.int32)
    sizes = [image.result for image in images if not isinstance(image.result, RowFailure)]
    digests = b"".join(image.sha256 or NO_DIGEST for image in images)
    return DecodedShard(
        shard=shard,
        pixels=pixels[position] if failures else pixels,
        position=position,
        size_px=np.array(sizes, np.int32).reshape(-1, 2),
        sha256=np.frombuffer(digests, np.uint8).reshape(-1, len(NO_DIGEST)),
        phash=np.array([images[k].phash for k in position], np.int64),
        failures=failures,
    )


def commit_shard(context: StageContext, decoded: DecodedShard, scores: NDArray[np.float32]) -> PartRecord:
    """What the shard's part holds after it was committed; scores are float32 [K, C] of the decoded images."""
    rows = planned_rows(context, decoded.shard)
    scored = _scored_table(context, rows, decoded, scores)
    quarantined = _quarantine_table(rows, decoded)
    positive = positive_index(context.artifact)
    return _partition(context.partition_uri).commit_part(decoded.shard, scored, quarantined, rows.num_rows, positive)


def positive_index(artifact: Artifact) -> int | None:
    """Index of the label that `flagged` is about, None where the model has none."""
    return None if artifact.positive_label is None else artifact.labels.index(artifact.positive_label)


class TimedPredictor:
    """A predictor that knows how long it worked and how long it waited for its next shard, in seconds."""

    def __init__(self, predictor: Predictor, batch_size: int) -> None:
        self._predictor = predictor
        self._batch_size = batch_size
        self._free_since = time.monotonic()

    def predict(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.float32], float, float]:
        """Scores float32 [K, C] of a shard's images (uint8 [K, H, W, 3]), seconds waited before and worked on it."""
        start = time.monotonic()
        waited_s = start - self._free_since
        scores = self._predictor.predict_in_batches(np.ascontiguousarray(pixels), self._batch_size)
        self._free_since = time.monotonic()
        return scores, waited_s, self._free_since - start


def planned_rows(context: StageContext, shard: Shard) -> pa.Table:
    """The rows that the plan gives to the shard: uri, etag, size_bytes and any `input_` columns."""
    return shard_rows(_page(context.partition_uri, shard.page), shard.index)


@functools.lru_cache(maxsize=4)
def _page(partition_uri: str, name: str) -> bytes:
    return _partition(partition_uri).store.get(name)


@functools.lru_cache(maxsize=8)
def _partition(uri: str) -> Partition:
    return Partition(uri)


_made = threading.Lock()
_pools: dict[int, ThreadPoolExecutor] = {}


def _fetch_pool(threads: int) -> ThreadPoolExecutor:
    with _made:
        if threads not in _pools:
            keep_freed_memory()
            _pools[threads] = ThreadPoolExecutor(threads, thread_name_prefix="fetch")
        return _pools[threads]


def start_decoders(context: StageContext) -> None:
    """Start the decoder processes of this run."""
    _reader(context)


def _reader(context: StageContext) -> ImageReader:
    decoders = shared_decoders(context.artifact.size_px, context.caps, context.num_decoders)
    return ImageReader(context.input_root, context.caps, decoders, context.stores)


def cancel_fetches() -> None:
    """Afterwards no image waits for a thread any more; shards in flight end with CancelledError, so Ctrl-C is quick."""
    while _pools:
        _pools.popitem()[1].shutdown(wait=False, cancel_futures=True)
    close_decoders()


@dataclass(frozen=True, slots=True)
class _Image:
    """Width and height of one image or its failure, and the hashes of its bytes and of its picture."""

    result: tuple[int, int] | RowFailure
    sha256: bytes | None = None
    phash: int = 0


def _read_image(reader: ImageReader, uri: str, etag: str, size_bytes: int, out: NDArray[np.uint8]) -> _Image:
    """Decode the image into `out`."""
    failure = _FROZEN_FAILURES.get(etag)
    if failure is not None:
        return _Image(failure)
    result, sha256 = reader.read_hashed(uri, out, etag, size_bytes)
    return _Image(result, sha256, 0 if isinstance(result, RowFailure) else picture_hash(out))


_FROZEN_FAILURES = {
    ABSENT: RowFailure(QuarantineCode.NOT_FOUND, "it was not there when the run was planned"),
    DENIED: RowFailure(QuarantineCode.ACCESS_DENIED, "the credentials of the run may not read it"),
    NOT_ALLOWED: RowFailure(QuarantineCode.URI_NOT_ALLOWED, "outside of what a manifest may name (--allow-uris)"),
}


def _refuse_hopeless(context: StageContext, uris: list[str], codes: set[QuarantineCode]) -> None:
    """Return where the failures of a shard, none of whose rows could be read, are failures of single rows.

    Raises:
        AccessDeniedError: none of some rows spread over the whole plan can be read either: these are no bad rows but
            credentials without the right to read the input.
        ArchivedError: likewise, all lie in an archive. Only in a first generation: a later one must not wait for them.
        ServerLacksError: nothing changed, the storage tells different etags in listings and answers.
    """
    if codes == {QuarantineCode.CHANGED}:
        _reader(context).check_etag(uris[0])
    elif codes == {QuarantineCode.ACCESS_DENIED} and _all_fail(context, QuarantineCode.ACCESS_DENIED):
        local = "file reads there; where the files are links that lead outside of it, add --follow-symlinks"
        advice = "s3:GetObject there" if context.input_root.startswith("s3://") else local
        raise AccessDeniedError(
            f"Expected credentials that may read {context.input_root}. Received: access denied on every row tried. "
            f"Next: allow {advice}, and run again."
        )
    elif (
        codes == {QuarantineCode.ARCHIVED}
        and context.plan.generation == 1
        and _all_fail(context, QuarantineCode.ARCHIVED)
    ):
        raise ArchivedError(
            f"Expected images that can be read in {context.input_root}. Received: every object tried lies in an "
            "archive storage class (GLACIER, DEEP_ARCHIVE or an archive tier). Next: restore them (aws s3api "
            "restore-object), wait until that is done, and run the same command again."
        )


def _all_fail(context: StageContext, code: QuarantineCode) -> bool:
    """Return whether each of some rows spread over the whole plan fails with `code`."""
    reader, pages = _reader(context), context.plan.pages
    for page in pages[:: max(len(pages) // PROBES, 1)]:
        for index in range(page.first_shard, page.first_shard + page.shards, max(page.shards // PROBES, 1)):
            rows = planned_rows(context, Shard(context.plan.generation, index, page.name)).slice(0, 1).to_pylist()
            uri, etag = rows[0]["uri"], rows[0]["etag"]
            result = _FROZEN_FAILURES.get(etag) or reader.fetch(uri, etag)
            if not isinstance(result, RowFailure) or result.code != code:
                return False
    return True


def _scored_table(
    context: StageContext, rows: pa.Table, decoded: DecodedShard, scores: NDArray[np.float32]
) -> pa.Table:
    artifact, threshold = context.artifact, context.plan.frozen.threshold
    best = scores.argmax(1) if len(scores) else np.zeros(0, np.int64)
    positive = positive_index(artifact)
    flagged = np.zeros(len(scores), bool) if positive is None else scores[:, positive] >= np.float32(threshold)
    picked = rows.take(pa.array(decoded.position))
    extra = [field for field in rows.schema if field.name.startswith(INPUT_PREFIX)]
    schema = pa.schema([*score_schema(), *extra])
    count = len(scores)
    columns = {
        "uri": picked["uri"],
        "etag": picked["etag"],
        "size_bytes": picked["size_bytes"],
        "sha256": pa.array([_hex(digest) for digest in decoded.sha256[decoded.position]], pa.string()),
        "phash": pa.array(decoded.phash, pa.int64()),
        "width_px": pa.array(decoded.size_px[:, 0]),
        "height_px": pa.array(decoded.size_px[:, 1]),
        "label": pa.array([artifact.labels[k] for k in best], pa.string()),
        "score": pa.array(scores[np.arange(count), best], pa.float32()),
        "scores": pa.array(list(scores), schema.field("scores").type),
        "flagged": pa.array(flagged),
        "model_name": pa.array([artifact.name] * count, pa.string()),
        "model_version": pa.array([artifact.version] * count, pa.int32()),
        "run_date": pa.array([context.run_date] * count, pa.date32()),
        "generation": pa.array([decoded.shard.generation] * count, pa.int32()),
        **{field.name: picked[field.name] for field in extra},
    }
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def _hex(digest: NDArray[np.uint8]) -> str | None:
    return digest.tobytes().hex() if digest.any() else None


def _quarantine_table(rows: pa.Table, decoded: DecodedShard) -> pa.Table:
    failures = decoded.failures
    picked = rows.take(pa.array(sorted(failures), pa.int32()))
    ordered = [failures[k] for k in sorted(failures)]
    return pa.Table.from_arrays(
        [
            picked["uri"],
            picked["etag"],
            pa.array([str(failure.code) for failure in ordered], pa.string()),
            pa.array([failure.detail for failure in ordered], pa.string()),
            pa.array([_hex(decoded.sha256[k]) for k in sorted(failures)], pa.string()),
        ],
        schema=QUARANTINE_SCHEMA,
    )
