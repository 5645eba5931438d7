# pyright: strict
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false
# pyright: reportUnknownParameterType=false, reportUnknownLambdaType=false
# pyright: reportAttributeAccessIssue=false
# (the last one because pyarrow.compute makes its functions while it is imported)
"""Etags and sizes of objects that a manifest names, at the least cost: pages of listings where these answer for many
objects, a HEAD for each of the rest.

The names are sorted, and a listing can begin at any name. So each page begins at the first name that has no answer yet:
there are never more pages than names, and a thousand names of one folder are one page. A page that answered for few
names is followed by some HEADs, because names there are far apart.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cnn_ray.errors import AccessDeniedError, ConfigError, NotFoundError
from cnn_ray.records import LISTING_SCHEMA
from cnn_ray.storage import S3Store
from cnn_ray.stores import Stores

HEAD_THREADS = 32
HEADS_AHEAD = 4096
"""Rows asked about at a time: a million waiting calls would take a gigabyte."""
LIST_FROM = 64
"""Names of one bucket from which on pages are tried: a page takes as long as some HEADs."""
LIST_THREADS = 16
NAMES_PER_THREAD = 4096
SPARSE_NAMES = 4
"""A page that answers for fewer names costs more than their HEADs."""
SPARSE_HEADS = 32
"""Names that get a HEAD after such a page."""

NOT_ALLOWED = "not-allowed"
ABSENT = "absent"
DENIED = "denied"
"""Planned in place of an etag for manifest rows that are known to be unreadable: the row is frozen as such."""


def look_up(uris: Any, stores: Stores) -> pa.Table:
    """Return uri, etag and size_bytes of each location, in the order of `uris` (all different, none null).

    What is not there, or may not be read, has ABSENT or DENIED for an etag.

    Raises:
        StorageError: storage does not answer, or the credentials are wrong.
    """
    order = pc.sort_indices(uris)
    names = pc.take(uris, order)
    answers = _Answers()
    start = 0
    for end in [*_bucket_ends(names), len(names)]:
        _of_bucket(names.slice(start, end - start), stores, answers)
        start = end
    answers.tables.append(_heads(answers.heads, stores))
    found = pa.concat_tables(answers.tables)
    index = pc.index_in(uris, value_set=found["uri"].combine_chunks())
    etags = pc.fill_null(found["etag"].take(index), ABSENT).combine_chunks()
    sizes = pc.fill_null(found["size_bytes"].take(index), 0).combine_chunks()
    return pa.Table.from_arrays([uris, etags, sizes], schema=LISTING_SCHEMA)


@dataclass
class _Answers:
    """What pages said, and the locations that need a HEAD."""

    tables: list[pa.Table] = field(default_factory=list)
    heads: list[str] = field(default_factory=list)


def _bucket_ends(names: Any) -> list[int]:
    """Where the sorted names go over from one bucket to the next, or to paths."""
    buckets = pc.fill_null(pc.struct_field(pc.extract_regex(names, r"^(?P<bucket>s3://[^/]*)/"), "bucket"), "")
    changes = pc.not_equal(buckets[1:], buckets[:-1]) if len(names) > 1 else pa.array([], pa.bool_())
    return [int(place) + 1 for place in np.flatnonzero(changes.to_numpy(zero_copy_only=False))]


def _of_bucket(names: Any, stores: Stores, answers: _Answers) -> None:
    if not len(names):
        return
    first = str(names[0].as_py())
    if not first.startswith("s3://") or len(names) < LIST_FROM:
        answers.heads += names.to_pylist()
        return
    folders = pc.ends_with(names, "/")  # listings leave them out
    answers.heads += names.filter(folders).to_pylist()
    names = names.filter(pc.invert(folders))
    store = stores.bucket(first[len("s3://") :].partition("/")[0])
    if not isinstance(store, S3Store) or not len(names):
        answers.heads += names.to_pylist()
        return
    pieces = min(LIST_THREADS, -(-len(names) // NAMES_PER_THREAD))
    cuts = [round(edge) for edge in np.linspace(0, len(names), pieces + 1)]
    with ThreadPoolExecutor(pieces, thread_name_prefix="list") as pool:
        parts = [names.slice(start, end - start) for start, end in pairwise(cuts)]
        for part in pool.map(lambda piece: _by_pages(piece, store), parts):
            answers.tables += part.tables
            answers.heads += part.heads


def _by_pages(names: Any, store: S3Store) -> _Answers:
    """The answers about sorted names of one bucket. Where pages do not help, the names are left to HEADs."""
    answers, root = _Answers(), f"{store.uri}/"
    prefix = _shared_folder(str(names[0].as_py()), str(names[-1].as_py()))[len(root) :]
    at = 0
    while at < len(names):
        try:
            page = store.page_at(str(names[at].as_py())[len(root) :], prefix)
        except NotFoundError:  # no such bucket
            break
        except (AccessDeniedError, ConfigError):  # a HEAD needs another permission
            answers.heads += names.slice(at).to_pylist()
            break
        if page.token is None:
            end = len(names)
        elif page.last is None or not _ascending(page.table["uri"]):
            end = at
        else:
            end = at + _count_through(names.slice(at), root + page.last)
        asked = names.slice(at, end - at)
        hit = page.table.filter(pc.is_in(page.table["uri"], value_set=asked)) if len(asked) else page.table.slice(0, 0)
        nameless = pc.equal(hit["etag"], "")
        answers.heads += hit.filter(nameless)["uri"].to_pylist()
        answers.tables.append(hit.filter(pc.invert(nameless)))
        at = end
        if len(asked) < SPARSE_NAMES:
            answers.heads += names.slice(at, SPARSE_HEADS).to_pylist()
            at += SPARSE_HEADS
    return answers


def _shared_folder(first: str, last: str) -> str:
    """The folder, with its "/", in which all names from `first` to `last` lie."""
    alike = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:alike].rpartition("/")[0] + "/"


def _ascending(uris: Any) -> bool:
    joined = uris.combine_chunks() if isinstance(uris, pa.ChunkedArray) else uris
    return len(joined) < 2 or bool(pc.all(pc.less(joined[:-1], joined[1:])).as_py())


def _count_through(names: Any, bound: str) -> int:
    return bisect.bisect_right(range(len(names)), bound, key=lambda row: str(names[row].as_py()))


def _heads(uris: Iterable[str], stores: Stores) -> pa.Table:
    """One HEAD for each location."""
    asked = list(uris)
    etags: list[str] = []
    sizes: list[int] = []
    with ThreadPoolExecutor(HEAD_THREADS, thread_name_prefix="head") as pool:
        for start in range(0, len(asked), HEADS_AHEAD):
            for etag, size_bytes in pool.map(lambda uri: _head(uri, stores), asked[start : start + HEADS_AHEAD]):
                etags.append(etag)
                sizes.append(size_bytes)
    columns = [pa.array(asked, pa.string()), pa.array(etags, pa.string()), pa.array(sizes, pa.int64())]
    return pa.Table.from_arrays(columns, schema=LISTING_SCHEMA)


def _head(uri: str, stores: Stores) -> tuple[str, int]:
    try:
        store, key = stores.locate(uri)
        info = store.head(key)
    except NotFoundError:
        return ABSENT, 0
    except AccessDeniedError:
        return DENIED, 0
    except ConfigError:  # a key that no store can hold
        return NOT_ALLOWED, 0
    return info.etag, info.size_bytes
