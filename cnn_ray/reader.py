"""The one way from a uri to pixels or to the reason why not: scoring, training, evaluation and the report all take it.

    uri -> store and key -> bytes (at most `max_bytes`) -> a decoder process -> uint8 RGB of the wanted size

Failures that belong to one image are values (`RowFailure`). What concerns the whole run is raised: storage that does
not answer, wrong credentials. Images come from attackers, so none is decoded in this process (`cnn_ray.decoders`).
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from cnn_ray.decoders import Decoders
from cnn_ray.errors import (
    AccessDeniedError,
    ArchivedError,
    ChangedError,
    ConfigError,
    DamagedError,
    EncodedError,
    NotFoundError,
    TooLargeError,
)
from cnn_ray.images import DecodedImage, ImageCaps
from cnn_ray.known_sets import KERAS_CIFAR10, is_packed, read_packed
from cnn_ray.records import QuarantineCode, RowFailure
from cnn_ray.storage import open_store
from cnn_ray.stores import Stores

FETCHED_BYTES = 256 * 1024**2
"""Encoded bytes that may wait for a decoder in one process: many threads wait for storage, and files may be large."""
LARGEST_SIDE_PX = 2048
"""Decoders that are shared between sizes take images up to this side; memory that no image touches costs nothing."""
S3_THREADS = 32


class ImageReader:
    """Read images by uri. Safe for any number of threads."""

    def __init__(
        self,
        root_uri: str,
        caps: ImageCaps | None = None,
        decoders: Decoders | None = None,
        stores: Stores | None = None,
    ) -> None:
        """`root_uri` is where most uris start. Without `decoders` the shared ones of this process are used."""
        self._caps = caps or ImageCaps()
        self._decoders = decoders
        packed = root_uri == KERAS_CIFAR10 or root_uri.endswith(".npz")
        self._stores = None if packed else (stores or Stores(open_store(root_uri)))

    def fetch(self, uri: str, etag: str | None = None) -> bytes | RowFailure:
        """Return the encoded bytes of the version that `etag` names (any version without one), or the failure.

        Raises:
            StorageError: storage does not answer, or the credentials are wrong.
        """
        planned = etag is not None
        try:
            if self._stores is None or is_packed(uri):
                return read_packed(uri)
            store, key = self._stores.locate(uri)
            return store.get(key, if_match=etag, max_bytes=self._caps.max_bytes)
        except NotFoundError:
            return RowFailure(
                QuarantineCode.NOT_FOUND, "it is not there, or not any more" if planned else "no such object"
            )
        except ChangedError:
            return RowFailure(
                QuarantineCode.CHANGED,
                "it is not the version that was planned: it changed, or the manifest has another etag",
            )
        except AccessDeniedError:
            return RowFailure(QuarantineCode.ACCESS_DENIED, "the credentials of the run may not read it")
        except ArchivedError:
            return RowFailure(
                QuarantineCode.ARCHIVED, "it lies in an archive storage class: restore it, then --retry-quarantined"
            )
        except EncodedError:
            return RowFailure(QuarantineCode.UNSUPPORTED_FORMAT, "its Content-Encoding is not gzip")
        except DamagedError:
            return RowFailure(QuarantineCode.DECODE_ERROR, "its Content-Encoding is gzip, its bytes are damaged")
        except TooLargeError:
            return RowFailure(QuarantineCode.TOO_LARGE, f"more than {self._caps.max_bytes} bytes")
        except ConfigError:  # S3 may list keys such as `a/../b`, which a folder cannot hold
            return RowFailure(QuarantineCode.URI_NOT_ALLOWED, "a location that steps out of its folder")

    def check_etag(self, uri: str) -> None:
        """Return where the storage tells one etag of an image that has not changed (`Store.check_etag`)."""
        if self._stores is not None:
            store, key = self._stores.locate(uri)
            store.check_etag(key)

    def read_into(
        self, uri: str, out: NDArray[np.uint8], etag: str | None = None, size_bytes: int = 0
    ) -> tuple[int, int] | RowFailure:
        """Decode the image into `out`, uint8 [H, W, 3], and return the original's width and height, or the failure.

        `size_bytes`, where it is known, bounds the memory of fetched files together (`FETCHED_BYTES`).

        Raises:
            StorageError: storage does not answer, the credentials are wrong, or no decoder process can be started.
        """
        with _fetched.holding(size_bytes):
            data = self.fetch(uri, etag)
            return data if isinstance(data, RowFailure) else self._decode(data, out)

    def read_hashed(
        self, uri: str, out: NDArray[np.uint8], etag: str | None = None, size_bytes: int = 0
    ) -> tuple[tuple[int, int] | RowFailure, bytes | None]:
        """Return what `read_into` returns, and the SHA-256 of the image's bytes; None where none were read."""
        with _fetched.holding(size_bytes):
            data = self.fetch(uri, etag)
            if isinstance(data, RowFailure):
                return data, None
            if etag is not None and len(data) != size_bytes and not self._has_size(uri, size_bytes):
                return RowFailure(QuarantineCode.CHANGED, "its size is not the one that was planned"), None
            return self._decode(data, out), hashlib.sha256(data).digest()

    def _has_size(self, uri: str, size_bytes: int) -> bool:
        """Whether the object is stored with this size: one that is stored compressed has more bytes when it is read.

        A manifest may say sizes itself, so a planned size is not always one that storage has told.
        """
        if self._stores is None or is_packed(uri):
            return True
        store, key = self._stores.locate(uri)
        return store.head(key).size_bytes == size_bytes

    def _decode(self, data: bytes, out: NDArray[np.uint8]) -> tuple[int, int] | RowFailure:
        decoders = self._decoders or shared_decoders((LARGEST_SIDE_PX, LARGEST_SIDE_PX), self._caps)
        return decoders.decode(data, out)

    def read(self, uri: str, size_px: tuple[int, int], etag: str | None = None) -> DecodedImage | RowFailure:
        """Return the image at `size_px` (height, width), or the failure. See `read_into`."""
        pixels = np.empty((*size_px, 3), np.uint8)
        answer = self.read_into(uri, pixels, etag)
        return answer if isinstance(answer, RowFailure) else DecodedImage(pixels, *answer)


def read_threads(root_uri: str) -> int:
    """Return how many threads keep this machine's cores, or an S3 bucket's connections, busy."""
    return S3_THREADS if root_uri.startswith("s3://") else len(os.sched_getaffinity(0))


def shared_decoders(size_px: tuple[int, int], caps: ImageCaps, count: int = 0) -> Decoders:
    """Return this process's decoder processes for images up to `size_px`; they are started at the first call.

    `count` 0 means one for each core. A process that was forked has its own.
    """
    key = (os.getpid(), size_px, caps, count)
    with _starting:
        if key not in _decoders:
            _decoders[key] = Decoders(size_px, caps, count or len(os.sched_getaffinity(0)))
        return _decoders[key]


def close_decoders() -> None:
    """End all decoder processes that `shared_decoders` started in this process."""
    with _starting:
        mine = [key for key in _decoders if key[0] == os.getpid()]
        ended = [_decoders.pop(key) for key in mine]
    for pool in ended:
        pool.close()


class _ByteBudget:
    """Let threads hold `most` bytes together, and any one of them more when it is alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._changed = threading.Condition()

    @contextmanager
    def holding(self, size: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._held == 0 or self._held + size <= self._most)
            self._held += size
        try:
            yield
        finally:
            with self._changed:
                self._held -= size
                self._changed.notify_all()


_fetched = _ByteBudget(FETCHED_BYTES)
_starting = threading.Lock()
_decoders: dict[tuple[object, ...], Decoders] = {}
