# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""One page of an S3 listing (the XML of ListObjectsV2) as Arrow columns.

Ten million keys are 10,000 pages. A page in the order of elements that AWS writes is read by one regular expression
whose matches become Arrow buffers: 2.1 ms CPU for 1,000 keys, ElementTree 5.8 (load 5). Whatever does not match to the
last entry is left to ElementTree, so the quick way never decides what a page means.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus, unquote_to_bytes
from xml.etree import ElementTree

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.records import LISTING_SCHEMA
from cnn_ray.storage_retry import unavailable

_HEAD = re.compile(
    rb'(?:<\?xml version="1\.0"(?: encoding="(?:UTF|utf)-8")?\s*\?>\s*)?<ListBucketResult(?: xmlns="[^"<&]*")?>'
)
_QUOTE = rb'(?:&quot;|&#34;|")'
_ENTRY = re.compile(
    rb"<Contents>\s*<Key>([^<&\r]*)</Key>\s*<LastModified>[^<]*</LastModified>\s*"
    rb"<ETag>" + _QUOTE + rb'([^<&"]*)' + _QUOTE + rb"</ETag>\s*"
    rb"(?:<ChecksumAlgorithm>[^<]*</ChecksumAlgorithm>\s*)*(?:<ChecksumType>[^<]*</ChecksumType>\s*)?"
    rb"<Size>(\d{1,18})</Size>\s*(?:<StorageClass>[^<]*</StorageClass>\s*)?</Contents>"
)
_TOKEN = re.compile(rb"<NextContinuationToken>([^<]*)</NextContinuationToken>")
_STRANGE = (b"<!", b"%00")
"""Comments and CDATA, which can hold anything; and the byte that separates our strings."""


@dataclass(frozen=True, slots=True)
class ListingPage:
    """Rows of `records.LISTING_SCHEMA` without folder markers; the first and last name with them, None on an empty
    page; and the token of the next page, None on the last one."""

    table: pa.Table
    first: str | None
    last: str | None
    token: str | None


def parse_page(body: bytes, root: str, folder: str = "") -> ListingPage:
    """The page, its uris being `root` (such as s3://bucket/) and the names.

    Zero-byte names that end with "/" are folder markers, and so is `folder` itself: both are left out.

    Raises:
        UnavailableError: it is half a page, or none; asking again may help.
    """
    table, token = _quick(body, root) or _slow(body, root)
    if not table.num_rows:
        return ListingPage(table, None, None, token)
    uris = table["uri"]
    first, last = (str(uris[row].as_py())[len(root) :] for row in (0, -1))
    slash = pc.ends_with(uris, "/")
    if pc.any(slash).as_py():
        marker = pc.or_(pc.equal(table["size_bytes"], 0), pc.equal(uris, root + folder))
        table = table.filter(pc.invert(pc.and_(slash, marker)))
    return ListingPage(table, first, last, token)


def _quick(body: bytes, root: str) -> tuple[pa.Table, str | None] | None:
    """The rows and the token of the next page, or None where the page is not exactly of the form that AWS writes."""
    entries = _ENTRY.findall(body)
    token = _TOKEN.search(body)
    exact = (
        entries
        and body.count(b"Contents>") == 2 * len(entries)
        and b"<EncodingType>url</EncodingType>" in body
        and not any(mark in body for mark in _STRANGE)
        and _HEAD.match(body)
        and body.endswith(b"</ListBucketResult>")
        and (token is None or b"&" not in token[1])
    )
    if not exact:
        return None
    names, etags, sizes = zip(*entries, strict=True)
    prefix = root.encode()
    uris = unquote_to_bytes((prefix + (b"\0" + prefix).join(names)).replace(b"+", b" "))
    try:
        columns = [_strings(uris), _strings(b"\0".join(etags)), _integers(np.array(sizes).astype(np.int64))]
    except UnicodeDecodeError:
        return None
    return pa.Table.from_arrays(columns, schema=LISTING_SCHEMA), None if token is None else token[1].decode()


def _strings(joined: bytes) -> Any:
    """A string column of what NUL bytes separate.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    if not joined.isascii():
        joined.decode()
    raw = np.frombuffer(joined + b"\0", np.uint8)
    ends = np.flatnonzero(raw == 0)
    offsets = np.zeros(len(ends) + 1, np.int32)
    offsets[1:] = ends - np.arange(len(ends))
    data = joined.replace(b"\0", b"")
    return pa.Array.from_buffers(pa.string(), len(ends), [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def _integers(values: np.ndarray[Any, np.dtype[np.int64]]) -> Any:
    return pa.Array.from_buffers(pa.int64(), len(values), [None, pa.py_buffer(values)])


def _slow(body: bytes, root: str) -> tuple[pa.Table, str | None]:
    try:
        page = ElementTree.fromstring(body)  # noqa: S314 - from the storage that the user named
    except ElementTree.ParseError as error:
        raise unavailable("a listing", "half a page") from error
    space = page.tag[: page.tag.find("}") + 1]
    if page.tag != f"{space}ListBucketResult":
        raise unavailable("a listing", "another document")
    key, etag, size = f"{space}Key", f"{space}ETag", f"{space}Size"
    encoded = page.findtext(f"{space}EncodingType") == "url"
    entries = list(page.iter(f"{space}Contents"))
    names = [entry.findtext(key, "") for entry in entries]
    columns = [
        pa.array([root + (unquote_plus(name) if encoded else name) for name in names], pa.string()),
        pa.array([entry.findtext(etag, "").strip('"') for entry in entries], pa.string()),
        pa.array([int(entry.findtext(size, "0")) for entry in entries], pa.int64()),
    ]
    return pa.Table.from_arrays(columns, schema=LISTING_SCHEMA), page.findtext(f"{space}NextContinuationToken")
