# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
"""The column contract: Arrow schemas of everything that cnn_ray writes, and the closed list of row failures."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa


class QuarantineCode(StrEnum):
    """Why a row could not be scored. A closed list: analysts filter on it, so a code is never renamed."""

    NOT_FOUND = "not_found"
    ACCESS_DENIED = "access_denied"
    ARCHIVED = "archived"
    CHANGED = "changed"
    EMPTY = "empty"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    TOO_LARGE = "too_large"
    DECODE_ERROR = "decode_error"
    DECODER_CRASH = "decoder_crash"
    URI_NOT_ALLOWED = "uri_not_allowed"


@dataclass(frozen=True, slots=True)
class RowFailure:
    """One row that could not be scored. `detail` is for people: same input, same text; no paths of ours, no times."""

    code: QuarantineCode
    detail: str


LISTING_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
    ]
)
"""What a listing or a manifest input yields, and what the pages of a plan hold (with `shard` before)."""

PLAN_PAGE_SCHEMA = pa.schema([pa.field("shard", pa.int32(), nullable=False), *LISTING_SCHEMA])

SCORE_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("size_bytes", pa.int64(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("phash", pa.int64(), nullable=False),
        pa.field("width_px", pa.int32(), nullable=False),
        pa.field("height_px", pa.int32(), nullable=False),
        pa.field("label", pa.string(), nullable=False),
        pa.field("score", pa.float32(), nullable=False),
        pa.field("scores", pa.list_(pa.field("element", pa.float32(), nullable=False)), nullable=False),
        pa.field("flagged", pa.bool_(), nullable=False),
        pa.field("model_name", pa.string(), nullable=False),
        pa.field("model_version", pa.int32(), nullable=False),
        pa.field("run_date", pa.date32()),
        pa.field("generation", pa.int32(), nullable=False),
    ]
)
"""One row per scored image. `score` is the score of `label`, `scores` are in label order, and `flagged` says that the
positive label's score reached the threshold. `sha256` is the hex digest of the image file's bytes. `phash` holds the 64
bits of the perceptual hash (`near_duplicates.perceptual_hash`) of the picture as the model sees it, as a signed number,
because Spark, Athena and Delta Lake have no unsigned one; pictures look alike where bit_count(xor(a, b)) is small.

No column is called `date`, `model` or `version`: those are the names of the folders, which readers with Hive partitions
add as columns, each reader with a type of its own. A file column of the same name and another type is an error for
pandas and Arrow. `run_date`, `model_name` and `model_version` say the same to readers that know only files, with one
type everywhere. Columns of a manifest input follow with the prefix `input_`; they are text."""

QUARANTINE_SCHEMA = pa.schema(
    [
        pa.field("uri", pa.string(), nullable=False),
        pa.field("etag", pa.string(), nullable=False),
        pa.field("code", pa.string(), nullable=False),
        pa.field("detail", pa.string(), nullable=False),
        pa.field("sha256", pa.string()),
    ]
)
"""One row per image that could not be scored. `sha256` is null where no bytes were read."""

INPUT_PREFIX = "input_"


def score_schema(input_columns: pa.Schema | None = None) -> pa.Schema:
    """Schema of a part: the fixed columns, then the manifest input's own ones prefixed with `input_`."""
    extra = [] if input_columns is None else [f.with_name(INPUT_PREFIX + f.name) for f in input_columns]
    return pa.schema([*SCORE_SCHEMA, *extra])
